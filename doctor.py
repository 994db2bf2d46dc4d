"""`happyhorse doctor`: versions, device, memory, parts found, and what each size needs."""

import argparse
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .model import catalog
from .model.checkpoint import Checkpoint
from .model.config import PRESETS
from .model.geometry import FilmShape, super_resolution_size
from .options import compute_dtype, default_device, models_folder, sentence
from .sampler.parts import default_vae_dtype, needed_parts, open_part
from .sampler.placement import OFFLOADS
from .sampler.plan import GB, TEXT_TOKENS, free_memory, plan_film

PACKAGES = ("torch", "safetensors", "tokenizers", "av", "numpy", "pillow", "einops")
VARIANT, DECODER = "distill", "turbo"  # what `generate` takes by default
PATH_OPTIONS = {
    "base": "transformer", "distill": "transformer", "540p_sr": "super_resolution",
    "1080p_sr": "super_resolution", "video_decoder": "turbo",
}  # fmt: skip


def doctor(options: argparse.Namespace) -> None:
    """Write it all to standard output."""
    device = options.device or default_device()
    lines = [f"happyhorse {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"device {device}: {free_memory(device) / GB:.1f} GB free; "
                 f"RAM: {free_memory(torch.device('cpu')) / GB:.1f} GB free")  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    checkpoints = _found_parts(options, models_folder(options))
    sys.stdout.write("\n".join(_needs(options, checkpoints, device)) + "\n")


def part_path(options: argparse.Namespace, name: str, folder: Path) -> Path:
    """The file of a part, by its name in the catalog: the one given, else that in the folder of models."""
    return getattr(options, f"path_{PATH_OPTIONS.get(name, name)}") or catalog.find(name, folder)


def _found_parts(options: argparse.Namespace, folder: Path) -> dict[str, Checkpoint]:
    found = {}
    for name in catalog.SOURCES:
        try:
            path = part_path(options, name, folder)
            found[name] = open_part(name, path)
            sys.stdout.write(f"{name}: {path}\n")
        except (ValueError, OSError) as error:
            sys.stdout.write(f"{name}: {sentence(error)}\n")
    return found


def _needs(options: argparse.Namespace, found: dict[str, Checkpoint], device: torch.device) -> Iterator[str]:
    """What films of the preset's sizes need, plain and with both super-resolutions, as lines of a table."""
    preset = PRESETS[options.preset]
    seconds = options.seconds or preset.default_seconds
    columns = "".join(f"{offload:>9}" for offload in OFFLOADS)
    yield f"\nGB on {device} by --offload and, for blocks, in RAM; computed, not measured; {seconds:g} s,"
    dtype = str(compute_dtype(options, device)).removeprefix("torch.")
    yield f"{VARIANT}, {DECODER} decoder, {dtype}, no --image, a prompt of {TEXT_TOKENS} tokens:"
    yield f"{'size':<9}{'--sr':>6}{'film':>11}{'tokens':>8}{columns}{'RAM':>9}"
    for sr in (None, "540p", "1080p"):
        names = needed_parts(VARIANT, sr, DECODER, image=False)
        if missing := [name for name in names.values() if name not in found]:
            yield f"{'all':<9}{sr or '-':>6}  not computed without {', '.join(missing)}"
            continue
        parts = {role: found[name] for role, name in names.items()}
        for size in preset.sizes.values():
            shape = FilmShape.from_seconds(*size, seconds)
            large = sr and shape.resized(super_resolution_size(sr, size, preset.pixels_1080p))
            yield _row(options, parts, shape, sr, large, device)


def _row(
    options: argparse.Namespace,
    parts: dict[str, Checkpoint],
    shape: FilmShape,
    sr: str | None,
    large: FilmShape | None,
    device: torch.device,
) -> str:
    dtype, final = compute_dtype(options, device), large or shape
    plan = plan_film(parts, shape, large, dtype, default_vae_dtype(dtype, device), device)
    tokens = final.video_tokens + final.audio_latents + TEXT_TOKENS
    size, film = (f"{s.width}x{s.height}" for s in (shape, final))
    needs = [*(plan.on_device(offload) for offload in OFFLOADS), plan.in_ram("blocks")]
    return f"{size:<9}{sr or '-':>6}{film:>11}{tokens:>8}" + "".join(f"{n / GB:>9.2f}" for n in needs)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
