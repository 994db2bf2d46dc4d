"""`happyhorse lora`: what LoRA files are, and what is made of them."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import __version__
from .model.checkpoint import Checkpoint, UnknownVariantError, open_checkpoint
from .model.config import PRESETS, VARIANTS, TransformerConfig
from .model.lora import match, transformer_shapes
from .model.lora_formats import LoraFile, open_lora
from .model.lora_report import describe_lora, describe_match
from .model.lora_tools import convert_lora, extract_lora, merge_loras
from .model.stream_writer import check_target
from .options import sentence

Progress = Callable[[str, int, int], None]
PROGRAM = f"happyhorse {__version__}"
SHOWN_SETTINGS, SHOWN_CHARACTERS = 12, 100


def run_lora(options: argparse.Namespace, progress: Progress) -> str:
    """Do what the options say and return what to tell of it; raises ValueError or OSError."""
    return {"inspect": _inspect, "convert": _convert, "extract": _extract, "merge": _merge}[options.action](
        options, progress
    )


def _inspect(options: argparse.Namespace, progress: Progress) -> str:  # noqa: ARG001
    """Tell of every file that is a LoRA; then raise ValueError where one is none or does not fit."""
    config, told, failures = _config(options), [], []
    for path in options.files:
        try:
            lora = open_lora(path)
            described, header = describe_lora(lora), _header(lora)
        except (ValueError, OSError) as error:
            failures.append(sentence(error))
            continue
        try:
            fit = describe_match(match(lora, config, transformer_shapes(config)), config)
        except ValueError as error:
            failures.append(f"{sentence(error)}, or give the preset that it was made for (--preset)")
            fit = "does not fit"
        told.append(f"{described}\n{options.preset}: {fit}\n{header}")
    report = "\n\n".join(told)
    if failures:
        sys.stdout.write(f"{report}\n" if told else "")
        raise ValueError("; ".join(failures))
    return report


def _header(lora: LoraFile) -> str:
    settings = [
        f"  {name}: {value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + '...'}"
        for name, value in sorted(lora.file.metadata.items())
    ]
    more = settings[SHOWN_SETTINGS:]
    settings = [*settings[:SHOWN_SETTINGS], *([f"  and {len(more)} more"] if more else [])]
    return "\n".join(["metadata:", *settings]) if settings else "no metadata"


def _convert(options: argparse.Namespace, progress: Progress) -> str:  # noqa: ARG001
    check_target(options.out, [options.source], options.overwrite)
    lora, config = open_lora(options.source), _config(options)
    return f"{describe_match(convert_lora(lora, options.out, config), config)}\n{_size(options.out)}"


def _extract(options: argparse.Namespace, progress: Progress) -> str:
    check_target(options.out, [options.tuned, options.base], options.overwrite)
    tuned, base = _open(options.tuned), _open(options.base)
    told = partial(progress, "extracting")
    errors = extract_lora(tuned, base, options.out, options.rank, PROGRAM, told)
    lines = [f"{kind}: error of the difference {100 * error:.3g} %" for kind, error in errors.items()]
    return "\n".join([*lines, _size(options.out)])


def _merge(options: argparse.Namespace, progress: Progress) -> str:
    check_target(options.out, [options.source, *(lora.path for lora in options.loras)], options.overwrite)
    checkpoint = open_checkpoint(options.source, "transformer", options.variant)
    loras = [(open_lora(lora.path), lora.strengths) for lora in options.loras]
    changed = merge_loras(checkpoint, loras, options.out, PROGRAM, partial(progress, "merging"))
    return f"{changed} of {len(checkpoint.names)} tensors changed\n{_size(options.out)}"


def _config(options: argparse.Namespace) -> TransformerConfig:
    return PRESETS[options.preset].transformers["base"]  # the same names and shapes in all variants


def _open(path: Path) -> Checkpoint:
    try:
        return open_checkpoint(path, "transformer")
    except UnknownVariantError:  # names and shapes are the same in all of them
        return open_checkpoint(path, "transformer", VARIANTS[0])


def _size(path: Path) -> str:
    return f"{path.resolve()}: {path.stat().st_size / 1e6:,.1f} MB"
