"""The command line's options: what each accepts, and one sentence for what it does not."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .defaults import DTYPES
from .kernels.attention import BACKENDS
from .media import UPSCALE_MODES
from .model.config import PRESETS, VARIANTS
from .model.convert import FORMATS
from .model.geometry import FPS, MAX_SECONDS, MIN_SECONDS
from .option_values import (
    parse_count,
    parse_device,
    parse_gigabytes,
    parse_lora,
    parse_names,
    parse_planned_size,
    parse_rank,
    parse_rate,
    parse_resident,
    parse_seed,
    parse_size,
    parse_steps,
    parse_text,
    parse_updates,
    parse_upscale,
)
from .sampler.pipeline import AUDIO_MODES
from .sampler.placement import OFFLOADS

Command = Callable[[argparse.Namespace], int | None]  # its exit code, None is 0
PONY_STAGES = (
    "audio_vae", "video_vae", "video_decoder", "base", "distill", "super_resolution", "lora", "measure"
)  # fmt: skip
PART_OPTIONS = {
    "transformer": ("--model", "transformer"),
    "super_resolution": ("--sr-model", "super-resolution transformer"),
    "text_encoder": ("--text-encoder", "text encoder"),
    "video_vae": ("--vae", "Wan2.2 video VAE"),
    "turbo": ("--turbo-vae", "fast video decoder"),
    "audio_vae": ("--audio-vae", "audio VAE"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser(
    generate: Command, inspect: Command, doctor: Command, convert: Command, lora: Command, train: Command
) -> argparse.ArgumentParser:
    """The parser of all commands; the one chosen stands in the options as `run`."""
    parser = Parser(
        prog="happyhorse", description="Films with sound from the open daVinci-MagiHuman weights."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="generate | inspect | doctor | convert | lora | train"
    )
    film = commands.add_parser("generate", help="make a film")
    _add_generate(film)
    _add_models(film)
    _add_compute(film)
    film.set_defaults(run=generate)
    files = commands.add_parser(
        "inspect", help="say what checkpoint files are, or those of a folder of models"
    )
    files.add_argument("files", nargs="+", type=Path, metavar="FILE or FOLDER")
    files.set_defaults(run=inspect)
    needs = commands.add_parser(
        "doctor", help="versions, device, memory, parts found, and what each size needs"
    )
    _add_models(needs)
    _add_compute(needs)
    _add_doctor(needs)
    needs.set_defaults(run=doctor)
    weights = commands.add_parser(
        "convert", help="rewrite a checkpoint in another weight format, as one file"
    )
    _add_convert(weights)
    weights.set_defaults(run=convert)
    loras = commands.add_parser("lora", help="what LoRA files are; convert, extract or merge them")
    _add_lora(loras)
    loras.set_defaults(run=lora)
    training = commands.add_parser("train", help="train a LoRA on a folder of clips, or the pony anew")
    _add_train(training)
    training.set_defaults(run=train)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, type=parse_text, help="what is to be seen and heard")
    parser.add_argument(
        "--negative", type=parse_text, help="what is not; base only (default: the preset's negative prompt)"
    )
    parser.add_argument("--image", type=Path, help="the first frame")
    parser.add_argument("--audio", type=Path, help="sound (or a film with sound) that the film follows")
    parser.add_argument(
        "--audio-mode",
        choices=AUDIO_MODES,
        default="hold",
        help="hold keeps the sound and puts it into the film; start only begins from it (default: hold)",
    )
    parser.add_argument(
        "--audio-encoding",
        choices=("mean", "sample"),
        default="mean",
        help="sample draws the audio latents from the seed, as published",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"{MIN_SECONDS:g} to {MAX_SECONDS:g} in steps of {1 / FPS:g}; default: as --audio, or what "
        "the preset says",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT", help="multiples of 32")
    size.add_argument(
        "--aspect", choices=tuple(PRESETS["magihuman"].sizes), help="the preset's size of this aspect"
    )
    parser.add_argument(
        "--seed", type=parse_seed, default=42, help="draws the noise; another is another film (default: 42)"
    )
    parser.add_argument("--steps", type=parse_steps, help="default: the variant's own number")
    parser.add_argument(
        "--variant",
        choices=("base", "distill"),
        default="distill",
        help="distill: 8 steps; base: 32 with guidance, of two passes each (default: distill)",
    )
    parser.add_argument("--sr", choices=("540p", "1080p"), help="super-resolution")
    parser.add_argument(
        "--decoder", choices=("turbo", "wan"), default="turbo", help="which network makes the pixels"
    )
    parser.add_argument(
        "--upscale",
        type=parse_upscale,
        metavar="WIDTHxHEIGHT[:MODE]",
        help=f"plain resizing of the finished frames: {', '.join(UPSCALE_MODES)}",
    )
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH[:SETTINGS]]",
        help="a LoRA for the base-stage transformer (not for --sr); may be given several times; settings: "
        "video=, audio=, text=, shared= strengths, and last blocks=0-3:0.5,4-35",
    )
    parser.add_argument(
        "--attention",
        choices=BACKENDS,
        default="sdpa",
        help="of the transformers: PyTorch's own; flash (package flash_attn) and sage (sageattention, faster "
        "and less exact) need a GPU and their package",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformers' layers with torch.compile: minutes at first, faster steps after",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("happyhorse.mp4"),
        help="the film (.mp4; default: happyhorse.mp4); a file that is there is replaced, as by the next two",
    )
    parser.add_argument(
        "--save-latents",
        type=Path,
        metavar="FILE",
        help="also keep the latents (.safetensors), which HappyHorse Load Latent reads in ComfyUI",
    )
    parser.add_argument(
        "--save-workflow",
        type=Path,
        metavar="FILE",
        help="besides making the film, write its settings as a prompt for ComfyUI (.json, API format)",
    )


def _add_models(parser: argparse.ArgumentParser, roles: Sequence[str] = tuple(PART_OPTIONS)) -> None:
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="magihuman",
        help="pony: a built-in miniature of two toy worlds, which needs no download",
    )
    parser.add_argument("--models", type=Path, help="folder in which all parts lie (default: models)")
    for role in roles:
        option, what = PART_OPTIONS[role]
        parser.add_argument(option, dest=f"path_{role}", type=Path, metavar="PATH", help=f"the {what} itself")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=parse_planned_size,
        metavar="SIZE",
        help="plan one film: 256p, 540p, 1080p (the last two by super-resolution) or WIDTHxHEIGHT",
    )
    parser.add_argument("--seconds", type=float, help="length of the films (default: the preset's)")
    parser.add_argument(
        "--weights",
        choices=tuple(FORMATS),
        help="plan for the published models in this format instead of the files that are there",
    )
    parser.add_argument(
        "--decoder", choices=("turbo", "wan"), default="turbo", help="which network makes the pixels"
    )


def _add_compute(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument(
        "--offload",
        choices=("auto", *OFFLOADS),
        default="auto",
        help="none: all on the device; stage: one part at a time; blocks: layer by layer; pieces: that, and "
        "the transformers work on pieces of the film, which changes roundings (1e-5 in float32); auto: the "
        "fastest that fits for each part, as many layers on the device as fit",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the transformers' linears and the text encoder; default: bfloat16, on a CPU float32",
    )
    parser.add_argument(
        "--device", type=parse_device, default=None, help="default: the accelerator, else the CPU"
    )
    parser.add_argument(
        "--vram", type=parse_gigabytes, metavar="GB", help="use so much of the device's memory"
    )
    parser.add_argument(
        "--ram", type=parse_gigabytes, metavar="GB", help="use so much RAM; both replace what is free"
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint, a file or a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write (.safetensors or .gguf)")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(FORMATS),
        help="the format of the matrices in its layers; fp8 has a scale for each row, fp8_tensor one for "
        "a matrix, as ComfyUI's own layers want it",
    )
    parser.add_argument(
        "--variant", choices=VARIANTS, help="of a transformer whose file and name do not tell it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--check", action="store_true", help="compare the velocities of both transformers on a fixed input"
    )


def _add_lora(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="inspect | convert | extract | merge", parser_class=Parser
    )
    inspect = actions.add_parser(
        "inspect", help="say what LoRA files hold, and how much of it fits the model"
    )
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    convert = actions.add_parser("convert", help="rewrite a LoRA for the loaders that ComfyUI brings")
    convert.add_argument("source", type=Path, metavar="IN", help="the LoRA")
    for action in (inspect, convert):
        action.add_argument("--preset", choices=tuple(PRESETS), default="magihuman", help="of the model")
    extract = actions.add_parser("extract", help="make a LoRA of what one transformer has over another")
    extract.add_argument("tuned", type=Path, metavar="TUNED", help="the transformer that it shall lead to")
    extract.add_argument("base", type=Path, metavar="BASE", help="the transformer that it shall be used with")
    merge = actions.add_parser("merge", help="write a transformer with LoRAs in it")
    merge.add_argument("source", type=Path, metavar="CHECKPOINT", help="the transformer")
    merge.add_argument(
        "loras",
        nargs="+",
        type=parse_lora,
        metavar="LORA",
        help="as for generate: FILE[:STRENGTH[:SETTINGS]]",
    )
    for action in (convert, extract, merge):
        action.add_argument("out", type=Path, metavar="OUT", help="the file to write (.safetensors)")
        action.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    extract.add_argument("--rank", required=True, type=parse_rank, help="32 or 64 is common; more is nearer")
    merge.add_argument("--variant", choices=VARIANTS, help="of a file whose header and name do not tell it")


def _add_train_pony(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stages", nargs="*", type=_stage, metavar="STAGE",
        help=f"of {', '.join(PONY_STAGES)}; each needs those before it (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("pony-runs"),
        metavar="FOLDER",
        help="checkpoints, logs and plots; what is there is gone on from (default: pony-runs)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the trained parts (default: the pack's own pony)"
    )
    parser.add_argument("--device", type=parse_device, help="default: the accelerator, else the CPU")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of transformers and fast decoder; default: bfloat16, on a CPU without AVX512-BF16 float32",
    )
    parser.add_argument("--compile", action="store_true", help="compile layers: faster, needs a C++ compiler")


def _stage(text: str) -> str:
    if text not in PONY_STAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is no stage, they are {', '.join(PONY_STAGES)}")
    return text


def _add_train(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="lora | pony", parser_class=Parser)
    _add_train_pony(kinds.add_parser("pony", help="train the built-in miniature again: hours on a CPU"))
    lora = kinds.add_parser("lora", help="train a LoRA on a folder of clips with captions")
    lora.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="the clips (films with sound), each with its caption in a .txt of the same name, or all "
        "captions in captions.jsonl",
    )
    lora.add_argument("--out", required=True, type=Path, help="the LoRA to write (.safetensors)")
    lora.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    lora.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="the folder of the run: encoded clips, checkpoint, log and plot of the loss; a checkpoint in it "
        "is gone on from (default: OUT with .run in place of .safetensors)",
    )
    _add_models(lora, ("transformer", "text_encoder", "video_vae", "audio_vae"))
    lora.add_argument(
        "--variant", choices=("base", "distill"), default="base", help="the model to train on (default: base)"
    )
    lora.add_argument("--steps", type=parse_updates, default=1000, help="updates (default: 1000)")
    lora.add_argument("--rate", type=parse_rate, help="learning rate (default: 2e-4)")
    lora.add_argument("--rank", type=parse_rank, help="of every change (default: 16)")
    lora.add_argument(
        "--alpha", type=parse_rate, help="the change counts alpha / rank times (default: the rank)"
    )
    lora.add_argument("--blocks", help="layers to train, such as 0-11,30 (default: all)")
    lora.add_argument(
        "--parts", type=parse_names, metavar="NAMES", help="of attention,mlp those to train (default: both)"
    )
    lora.add_argument(
        "--copies",
        type=parse_names,
        metavar="NAMES",
        help="of video,audio,text (in the layers with a weight for each) and shared (all others) those to "
        "train (default: all)",
    )
    size = lora.add_mutually_exclusive_group()
    size.add_argument(
        "--size", type=parse_size, metavar="WIDTHxHEIGHT", help="multiples of 32; clips are cropped"
    )
    size.add_argument("--aspect", choices=tuple(PRESETS["magihuman"].sizes))
    lora.add_argument("--seconds", type=float, help="of each clip, from its start (default: as for generate)")
    lora.add_argument("--batch", type=parse_count, default=1, help="clips computed at once (default: 1)")
    lora.add_argument("--accumulation", type=parse_count, default=1, help="batches of an update (default: 1)")
    lora.add_argument(
        "--save-every",
        type=parse_updates,
        default=0,
        metavar="STEPS",
        help="after so many updates each the LoRA is also written as it is then, as OUT-000500 (default: "
        "only at the end)",
    )
    lora.add_argument("--seed", type=parse_seed, help="default: 0")
    lora.add_argument(
        "--negative", type=parse_text, help="the negative prompt of your films (default: the preset's)"
    )
    _add_device(lora)
    lora.add_argument(
        "--resident",
        type=parse_resident,
        metavar="LAYERS|auto",
        help="so many of the transformer's first layers stay on the device, the others come from RAM layer "
        "by layer; auto: as many as fit (default)",
    )


def sentence(error: Exception) -> str:
    """An error as one line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
