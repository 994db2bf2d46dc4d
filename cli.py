"""The command line: `happyhorse generate`, `happyhorse inspect`, `happyhorse doctor`."""

import argparse
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from . import __version__, pony
from .media import UPSCALE_MODES, read_audio
from .model import catalog
from .model.audio_vae import ENCODE_RATE
from .model.checkpoint import Checkpoint, describe, open_checkpoint
from .model.config import PRESETS, VARIANTS, Preset
from .model.geometry import FPS, MAX_SECONDS, MIN_SECONDS, FilmShape, super_resolution_size
from .sampler.guidance import DEFAULT_NEGATIVE_PROMPT
from .sampler.parts import Parts
from .sampler.pipeline import AUDIO_MODES, FilmRequest, generate, write_film
from .sampler.placement import OFFLOADS
from .sampler.plan import Plan, free_memory, plan_film, require_fit, table
from .sampler.stages import RECIPES

log = logging.getLogger("happyhorse")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LONG_SECONDS = 10.0
PACKAGES = ("torch", "safetensors", "tokenizers", "av", "numpy", "pillow", "einops")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for input that cannot be used, 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options = _parser().parse_args(arguments)
        with torch.inference_mode():
            options.run(options)
    except KeyboardInterrupt:
        sys.stderr.write("\nhappyhorse: interrupted; no film was written\n")
        return 130
    except (ValueError, OSError, MemoryError) as error:
        sys.stderr.write(f"happyhorse: {_sentence(error)}\n")
        return 2
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"happyhorse: the device is out of memory ({str(error).splitlines()[0]}); "
                         "try --offload blocks, fewer --seconds or a smaller --size\n")  # fmt: skip
        return 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="happyhorse", description="Films with sound from the open daVinci-MagiHuman weights.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | inspect | doctor")
    _add_generate(commands.add_parser("generate", help="make a film"))
    inspect = commands.add_parser("inspect", help="say what checkpoint files are")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.set_defaults(run=_inspect)
    doctor = commands.add_parser("doctor", help="versions, device, memory, parts found, and what each size needs")
    _add_models(doctor)
    _add_compute(doctor)
    doctor.add_argument("--seconds", type=float, help="length of the films in the table (default: the preset's)")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, help="what is to be seen and heard")
    parser.add_argument("--negative", default=DEFAULT_NEGATIVE_PROMPT, help="what is not; used by the base variant only")
    parser.add_argument("--image", type=Path, help="the first frame")
    parser.add_argument("--audio", type=Path, help="sound (or a film with sound) that the film follows")
    parser.add_argument("--audio-mode", choices=AUDIO_MODES, default="hold",
                        help="hold keeps the sound and puts it into the film; start only begins from it")  # fmt: skip
    parser.add_argument("--audio-encoding", choices=("mean", "sample"), default="mean",
                        help="sample draws the audio latents from the seed, as published")  # fmt: skip
    parser.add_argument("--seconds", type=float, help=f"{MIN_SECONDS:g} to {MAX_SECONDS:g} in steps of {1 / FPS:g}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT", help="multiples of 32")
    size.add_argument("--aspect", choices=tuple(PRESETS["magihuman"].sizes))
    parser.add_argument("--seed", type=_seed, default=42)
    parser.add_argument("--steps", type=_steps, help="default: the variant's own number")
    parser.add_argument("--variant", choices=("base", "distill"), default="distill")
    parser.add_argument("--sr", choices=("540p", "1080p"), help="super-resolution")
    parser.add_argument("--decoder", choices=("turbo", "wan"), default="turbo", help="which network makes the pixels")
    parser.add_argument("--upscale", type=_upscale, metavar="WIDTHxHEIGHT[:MODE]",
                        help=f"plain resizing of the finished frames: {', '.join(UPSCALE_MODES)}")  # fmt: skip
    _add_models(parser)
    _add_compute(parser)
    parser.add_argument("--out", type=Path, default=Path("happyhorse.mp4"), help="the film (.mp4)")
    parser.add_argument("--save-latents", type=Path, metavar="FILE", help="also keep the latents (.safetensors)")
    parser.set_defaults(run=_generate)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="magihuman",
                        help="pony: a tiny stand-in with random weights that needs no download")  # fmt: skip
    parser.add_argument("--models", type=Path, help="folder in which all parts lie (default: models)")
    for role, (option, what) in PART_OPTIONS.items():
        parser.add_argument(option, dest=f"path_{role}", type=Path, metavar="PATH", help=f"the {what} itself")


def _add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the transformers' linears")
    parser.add_argument("--device", type=_device, default=None, help="default: the accelerator, else the CPU")
    parser.add_argument("--offload", choices=("auto", *OFFLOADS), default="auto",
                        help="none: all on the device; stage: one part at a time; blocks: layer by layer")  # fmt: skip


PART_OPTIONS = {
    "transformer": ("--model", "transformer"),
    "super_resolution": ("--sr-model", "super-resolution transformer"),
    "text_encoder": ("--text-encoder", "text encoder"),
    "video_vae": ("--vae", "Wan2.2 video VAE"),
    "turbo": ("--turbo-vae", "fast video decoder"),
    "audio_vae": ("--audio-vae", "audio VAE"),
}


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must look like 448x256, got {text!r}")
    return int(width), int(height)


def _upscale(text: str) -> tuple[int, int, str]:
    size, _, mode = text.partition(":")
    width, height = _size(size)
    if width % 2 or height % 2 or not 2 <= min(width, height) or max(width, height) > 8192:
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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({first}); try cpu") from error
    return device


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _models_folder(options: argparse.Namespace) -> Path:
    if options.models is None and options.preset == "pony":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return pony.ensure_pony(cache / "happyhorse" / f"pony-{pony.VERSION}")
    return options.models or Path("models")


def _open_parts(options: argparse.Namespace, folder: Path) -> dict[str, Checkpoint]:
    """The checkpoints that these options need, by role; the first that is missing or wrong raises."""
    decoder = "turbo" if options.decoder == "turbo" else "video_vae"
    wanted = {"text_encoder": ("text_encoder", "text_encoder", None)}
    if options.image:
        wanted["video_vae"] = ("video_vae", "video_vae", None)
    wanted["transformer"] = ("transformer", options.variant, options.variant)
    if options.sr:
        wanted["super_resolution"] = ("super_resolution", f"{options.sr}_sr", f"{options.sr}_sr")
    wanted["video_decoder"] = (decoder, "video_decoder" if decoder == "turbo" else "video_vae", None)
    wanted["audio_vae"] = ("audio_vae", "audio_vae", None)
    parts = {}
    for role, (option, name, variant) in wanted.items():
        path = getattr(options, f"path_{option}") or catalog.find(name, folder)
        parts[role] = open_checkpoint(path, "transformer" if variant else name, variant)
    return parts


def _generate(options: argparse.Namespace) -> None:
    preset = PRESETS[options.preset]
    request = _request(options, preset)
    _check_output(options.out, ".mp4")
    if options.save_latents:
        _check_output(options.save_latents, ".safetensors")
    checkpoints = _open_parts(options, _models_folder(options))
    device, dtype = options.device or _default_device(), DTYPES[options.dtype]
    vae_dtype = torch.float32 if device.type == "cpu" else dtype

    def plan(shape: FilmShape, large: FilmShape | None) -> Plan:
        needed = {role: part for role, part in checkpoints.items() if large or role != "super_resolution"}
        return plan_film(needed, shape, large, dtype, vae_dtype)

    offload = require_fit(plan(request.shape, request.large), options.offload, device, _smaller(request, plan))
    parts = Parts(checkpoints, device, offload, dtype, vae_dtype)
    with Bars() as bars:
        film = generate(parts, request, bars.progress, bars.notice)
        if options.save_latents:
            save_file({name: t.contiguous() for name, t in film.latents._asdict().items()}, options.save_latents)
        write_film(parts, film, options.out, _metadata(options, request, checkpoints, device), request, bars.progress)
    note = checkpoints["transformer"].file.metadata.get("note")
    sys.stdout.write(f"{options.out.resolve()}{f' ({note})' if note else ''}\n")


def _request(options: argparse.Namespace, preset: Preset) -> FilmRequest:
    seconds = options.seconds
    if seconds is None:
        seconds = _sound_seconds(options.audio) if options.audio else preset.default_seconds
    size = options.size or preset.sizes[options.aspect or preset.default_aspect]
    shape = FilmShape.from_seconds(*size, seconds)
    if seconds > LONG_SECONDS:
        log.warning("films above %g s are longer than what the models were trained on", LONG_SECONDS)
    large = options.sr and shape.resized(super_resolution_size(options.sr, size, preset.pixels_1080p))
    return FilmRequest(
        options.prompt, options.negative, shape, large, options.seed, options.steps, options.image, options.audio,
        options.audio_mode, options.audio_encoding == "sample", options.upscale,
    )  # fmt: skip


def _sound_seconds(audio: Path) -> float:
    """The length of a sound file on the grid of film lengths."""
    seconds = read_audio(audio, ENCODE_RATE, 1).shape[1] / ENCODE_RATE
    if seconds > MAX_SECONDS:
        log.warning("%s lasts %.1f s; the film ends after %g", audio, seconds, MAX_SECONDS)
    return min(max(math.floor(seconds * FPS) / FPS, MIN_SECONDS), MAX_SECONDS)


def _smaller(request: FilmRequest, plan: Callable[[FilmShape, FilmShape | None], Plan]) -> Iterator[tuple[str, Plan]]:
    """Plans of smaller films, with the options that ask for them."""
    if request.large:
        yield "the film without --sr", plan(request.shape, None)
    for seconds in (10.0, 5.0, 2.0, 1.0, 0.2):
        if seconds < request.shape.seconds:
            latents = round(seconds * FPS) + 1
            large = request.large and replace(request.large, audio_latents=latents)
            yield f"--seconds {seconds:g}", plan(replace(request.shape, audio_latents=latents), large)


def _check_output(path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ValueError(f"the output must end in {suffix}, got {path.name!r}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder {path.parent} cannot be written to; choose another")


def _metadata(
    options: argparse.Namespace, request: FilmRequest, checkpoints: dict[str, Checkpoint], device: torch.device
) -> dict[str, str]:
    """The settings of a film, as one JSON object under the tag `comment`."""
    transformer, final = checkpoints["transformer"], request.large or request.shape
    settings = {
        "program": f"happyhorse {__version__}", "torch": torch.__version__, "device": device.type,
        "preset": options.preset, "variant": transformer.variant, "model": transformer.path.name,
        "note": transformer.file.metadata.get("note"), "prompt": request.prompt,
        "negative": request.negative if RECIPES[transformer.variant].guided else None,
        "image": request.image and request.image.name, "audio": request.audio and request.audio.name,
        "audio_mode": request.audio_mode if request.audio else None,
        "audio_encoding": options.audio_encoding if request.audio else None,
        "seed": request.seed, "steps": request.steps or RECIPES[transformer.variant].steps,
        "size": f"{request.shape.width}x{request.shape.height}", "seconds": request.shape.seconds,
        "sr": options.sr, "final_size": f"{final.width}x{final.height}", "upscale": request.upscale,
        "decoder": options.decoder, "dtype": options.dtype,
    }  # fmt: skip
    return {"comment": json.dumps({name: value for name, value in settings.items() if value is not None})}


class Bars:
    """One progress bar per stage on the terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are finished."""
        if self._bar is None or self._stage != stage:
            self._close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def notice(self, sentence: str) -> None:
        """Tell the user something that is not an error."""
        tqdm.write(sentence, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _inspect(options: argparse.Namespace) -> None:
    for path in options.files:
        sys.stdout.write(f"{describe(path)}\n")


def _doctor(options: argparse.Namespace) -> None:
    device = options.device or _default_device()
    lines = [f"happyhorse {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"device {device}: {free_memory(device) / 1e9:.1f} GB free; "
                 f"RAM: {free_memory(torch.device('cpu')) / 1e9:.1f} GB free")  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    checkpoints = _found_parts(options, _models_folder(options))
    sys.stdout.write("\n".join(_needs(options, checkpoints, device)) + "\n")


def _found_parts(options: argparse.Namespace, folder: Path) -> dict[str, Checkpoint]:
    found = {}
    for name in catalog.SOURCES:
        option = {"video_decoder": "turbo"}.get(name, name)
        given = getattr(options, f"path_{option}", None)
        try:
            path = given or catalog.find(name, folder)
            found[name] = open_checkpoint(path, "transformer" if name in VARIANTS else name,
                                          name if name in VARIANTS else None)  # fmt: skip
            sys.stdout.write(f"{name}: {path}\n")
        except (ValueError, OSError) as error:
            sys.stdout.write(f"{name}: {_sentence(error)}\n")
    return found


def _needs(options: argparse.Namespace, found: dict[str, Checkpoint], device: torch.device) -> list[str]:
    """What films of the preset's first size need, plain and with both super-resolutions."""
    preset, dtype = PRESETS[options.preset], DTYPES[options.dtype]
    size = preset.sizes[preset.default_aspect]
    shape = FilmShape.from_seconds(*size, options.seconds or preset.default_seconds)
    lines = []
    for sr in (None, "540p", "1080p"):
        names = {"text_encoder": "text_encoder", "transformer": "distill", "video_decoder": "video_decoder",
                 "audio_vae": "audio_vae"} | ({"super_resolution": f"{sr}_sr"} if sr else {})  # fmt: skip
        parts = {role: found[name] for role, name in names.items() if name in found}
        if len(parts) < len(names):
            continue
        large = sr and shape.resized(super_resolution_size(sr, size, preset.pixels_1080p))
        final = large or shape
        lines.append(f"\n{final.width}x{final.height}, {shape.seconds:g} s, {options.dtype} (computed):")
        lines.append(table(plan_film(parts, shape, large, dtype, torch.float32), device))
    return lines or ["not all parts are there, so no needs can be computed"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
