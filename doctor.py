"""`happyhorse doctor`: versions, device, memory, parts found, and what each size needs."""

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .model import catalog
from .model.checkpoint import Checkpoint, open_checkpoint
from .model.config import PRESETS, VARIANTS
from .model.geometry import FilmShape, super_resolution_size
from .options import DTYPES, default_device, models_folder, sentence
from .sampler.plan import free_memory, plan_film, table

PACKAGES = ("torch", "safetensors", "tokenizers", "av", "numpy", "pillow", "einops")


def doctor(options: argparse.Namespace) -> None:
    """Write it all to standard output."""
    device = options.device or default_device()
    lines = [f"happyhorse {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"device {device}: {free_memory(device) / 1e9:.1f} GB free; "
                 f"RAM: {free_memory(torch.device('cpu')) / 1e9:.1f} GB free")  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    checkpoints = _found_parts(options, models_folder(options))
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
            sys.stdout.write(f"{name}: {sentence(error)}\n")
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
