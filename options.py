"""The command line's options: what each accepts, and one sentence for what it does not."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from . import __version__, pony
from .media import UPSCALE_MODES
from .model.config import PRESETS
from .model.geometry import FPS, MAX_SECONDS, MIN_SECONDS
from .sampler.guidance import DEFAULT_NEGATIVE_PROMPT
from .sampler.pipeline import AUDIO_MODES
from .sampler.placement import OFFLOADS

Command = Callable[[argparse.Namespace], None]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PART_OPTIONS = {
    "transformer": ("--model", "transformer"),
    "super_resolution": ("--sr-model", "super-resolution transformer"),
    "text_encoder": ("--text-encoder", "text encoder"),
    "video_vae": ("--vae", "Wan2.2 video VAE"),
    "turbo": ("--turbo-vae", "fast video decoder"),
    "audio_vae": ("--audio-vae", "audio VAE"),
}


def _text(text: str) -> str:
    if not text.strip() or text.encode(errors="ignore").decode() != text:
        raise argparse.ArgumentTypeError(f"must be words in UTF-8, got {text!r}")
    return text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(generate: Command, inspect: Command, doctor: Command) -> argparse.ArgumentParser:
    """The parser of all three commands; the one chosen stands in the options as `run`."""
    parser = Parser(
        prog="happyhorse", description="Films with sound from the open daVinci-MagiHuman weights."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | inspect | doctor")
    film = commands.add_parser("generate", help="make a film")
    _add_generate(film)
    _add_models(film)
    _add_compute(film)
    film.set_defaults(run=generate)
    files = commands.add_parser("inspect", help="say what checkpoint files are")
    files.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files.set_defaults(run=inspect)
    needs = commands.add_parser(
        "doctor", help="versions, device, memory, parts found, and what each size needs"
    )
    _add_models(needs)
    _add_compute(needs)
    needs.add_argument(
        "--seconds", type=float, help="length of the films in the table (default: the preset's)"
    )
    needs.set_defaults(run=doctor)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, type=_text, help="what is to be seen and heard")
    parser.add_argument(
        "--negative", type=_text, default=DEFAULT_NEGATIVE_PROMPT, help="what is not; base only"
    )
    parser.add_argument("--image", type=Path, help="the first frame")
    parser.add_argument("--audio", type=Path, help="sound (or a film with sound) that the film follows")
    parser.add_argument(
        "--audio-mode",
        choices=AUDIO_MODES,
        default="hold",
        help="hold keeps the sound and puts it into the film; start only begins from it",
    )
    parser.add_argument(
        "--audio-encoding",
        choices=("mean", "sample"),
        default="mean",
        help="sample draws the audio latents from the seed, as published",
    )
    parser.add_argument(
        "--seconds", type=float, help=f"{MIN_SECONDS:g} to {MAX_SECONDS:g} in steps of {1 / FPS:g}"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT", help="multiples of 32")
    size.add_argument("--aspect", choices=tuple(PRESETS["magihuman"].sizes))
    parser.add_argument("--seed", type=_seed, default=42)
    parser.add_argument("--steps", type=_steps, help="default: the variant's own number")
    parser.add_argument("--variant", choices=("base", "distill"), default="distill")
    parser.add_argument("--sr", choices=("540p", "1080p"), help="super-resolution")
    parser.add_argument(
        "--decoder", choices=("turbo", "wan"), default="turbo", help="which network makes the pixels"
    )
    parser.add_argument(
        "--upscale",
        type=_upscale,
        metavar="WIDTHxHEIGHT[:MODE]",
        help=f"plain resizing of the finished frames: {', '.join(UPSCALE_MODES)}",
    )
    parser.add_argument("--out", type=Path, default=Path("happyhorse.mp4"), help="the film (.mp4)")
    parser.add_argument(
        "--save-latents", type=Path, metavar="FILE", help="also keep the latents (.safetensors)"
    )
    parser.add_argument(
        "--save-workflow",
        type=Path,
        metavar="FILE",
        help="besides making the film, write its settings as a prompt for ComfyUI (.json, API format)",
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="magihuman",
        help="pony: a tiny stand-in with random weights that needs no download",
    )
    parser.add_argument("--models", type=Path, help="folder in which all parts lie (default: models)")
    for role, (option, what) in PART_OPTIONS.items():
        parser.add_argument(option, dest=f"path_{role}", type=Path, metavar="PATH", help=f"the {what} itself")


def _add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the transformers' linears and the text encoder; default: bfloat16, on a CPU float32",
    )
    parser.add_argument("--device", type=_device, default=None, help="default: the accelerator, else the CPU")
    parser.add_argument(
        "--offload",
        choices=("auto", *OFFLOADS),
        default="auto",
        help="none: all on the device; stage: one part at a time; blocks: layer by layer",
    )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must look like 448x256, got {text!r}")
    return int(width), int(height)


def _upscale(text: str) -> tuple[int, int, str]:
    size, _, mode = text.partition(":")
    width, height = _size(size)
    if width % 2 or height % 2 or not min(width, height) >= 2 or max(width, height) > 8192:
        raise argparse.ArgumentTypeError(f"width and height must be even and at most 8192, got {size!r}")
    if mode and mode not in UPSCALE_MODES:
        raise argparse.ArgumentTypeError(f"mode must be one of {', '.join(UPSCALE_MODES)}, got {mode!r}")
    return width, height, mode or "bicubic"


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
    return value


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1 - 8)


def _steps(text: str) -> int:
    return _whole(text, 1, 1000)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({first}); try cpu") from error
    return device


def compute_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What the transformers' linears and the text encoder compute in."""
    if options.dtype:
        return DTYPES[options.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def default_device() -> torch.device:
    """The accelerator of this machine, else the CPU."""
    if torch.accelerator.is_available():  # a build for an accelerator may run on a machine without one
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def models_folder(options: argparse.Namespace) -> Path:
    """The folder of models asked for; the pony's is written first if it is not there."""
    if options.models is None and options.preset == "pony":
        return pony_folder()
    return options.models or Path("models")


def pony_folder() -> Path:
    """The user's copy of the pony, written first if it is not there; raises ValueError where that fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "happyhorse"
    try:
        return pony.ensure_pony(cache / f"pony-{pony.VERSION}")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the pony cannot be written to {cache} ({error}); set XDG_CACHE_HOME") from error


def sentence(error: Exception) -> str:
    """An error as one line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
