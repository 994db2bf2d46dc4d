"""`happyhorse doctor`: versions, device, memory, parts found, and the memory that films need."""

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__
from .defaults import compute_dtype, default_device, models_folder
from .model import catalog
from .model.checkpoint import NETWORKS, QUANTIZABLE, open_checkpoint, storage_dtype
from .model.config import PRESETS, VARIANTS, Config, Preset
from .model.convert import FORMATS
from .model.geometry import FilmShape, super_resolution_size
from .model.gguf_blocks import BLOCKS
from .model.quant import Stored, block_bytes
from .options import sentence
from .sampler.activations import TEXT_TOKENS
from .sampler.parts import default_vae_dtype, needed_parts, open_part
from .sampler.placement import OFFLOADS
from .sampler.plan import (
    GB,
    RESERVE,
    Plan,
    Room,
    SizedPart,
    check_vram,
    plan_film,
    room_on,
    table,
    works_in_ram,
)

PACKAGES = ("torch", "safetensors", "tokenizers", "av", "numpy", "pillow", "einops")
VARIANT, DECODER = "distill", "turbo"  # what `generate` takes by default
NAMED_SIZES = {"256p": None, "540p": "540p", "1080p": "1080p"}  # with the super-resolution that makes them
PATH_OPTIONS = {
    "base": "transformer", "distill": "transformer", "540p_sr": "super_resolution",
    "1080p_sr": "super_resolution", "video_decoder": "turbo",
}  # fmt: skip


@dataclass(frozen=True)
class PublishedPart:
    """A part as it is published, without its file; its matrices in a format of `convert` (FORMATS)."""

    part: str
    config: Config
    weights: str
    names: Mapping[str, str]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, name: str, preset: Preset, weights: str) -> "PublishedPart":
        """The part of a preset by its name in the catalog."""
        part = "transformer" if name in preset.transformers else name
        config = preset.transformers.get(name) or getattr(preset, name)
        with torch.device("meta"):
            shapes = {own: tensor.shape for own, tensor in NETWORKS[part](config).state_dict().items()}
        return cls(part, config, weights, {own: own for own in shapes}, shapes)

    def shape(self, own: str) -> torch.Size:
        """The shape of a tensor."""
        return self.shapes[own]

    def keeps_quantized(self, own: str) -> bool:
        """Whether a tensor is quantised."""
        return self._format(own) is not None

    def kept_bytes(self, own: str, dtype: torch.dtype) -> int:
        """Bytes that a tensor takes once it is loaded."""
        if (stored := self._format(own)) is not None:
            return block_bytes(self.shapes[own], stored)
        return self.shapes[own].numel() * storage_dtype(self.part, own, dtype).itemsize

    def _format(self, own: str) -> Stored | None:
        if self.weights == "bf16" or self.part not in QUANTIZABLE or not QUANTIZABLE[self.part].match(own):
            return None
        kind = FORMATS[self.weights]
        if own == "embed_tokens.weight":  # as `convert` does
            return Stored("Q8_0", None) if kind in BLOCKS else None
        if kind in BLOCKS:
            whole = self.shapes[own].numel() % BLOCKS[kind].values == 0
            return Stored(kind, None) if whole else None
        return Stored(kind, "scale")


def doctor(options: argparse.Namespace) -> int:
    """Write it all to standard output; returns the exit code, 1 where the film asked for does not fit."""
    device = _planned_device(options)
    room = room_on(device, options.vram, options.ram)
    lines = [f"happyhorse {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"device {device}: {room.device / GB:.1f} GB to use; RAM: {room.ram / GB:.1f} GB "
                 f"({RESERVE:.0%} of what is free or given is left to others)")  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    found = _found_parts(options, models_folder(options))
    films = Films(options, found, device)
    if not options.size:
        sys.stdout.write("\n".join(_all_sizes(films)) + "\n")
        return 0
    lines, fits = film_plan(films, options.size, room, options.offload)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if fits else 1


def _planned_device(options: argparse.Namespace) -> torch.device:
    """The device asked for; with VRAM to plan for, an accelerator even where there is none."""
    device = options.device or default_device()
    if options.device is not None:
        check_vram(device, options.vram)
    return torch.device("cuda") if options.vram is not None and works_in_ram(device) else device


def part_path(options: argparse.Namespace, name: str, folder: Path) -> Path:
    """The file of a part, by its name in the catalog: the one given, else that in the folder of models."""
    return _given(options, name) or catalog.find(name, folder)


def _given(options: argparse.Namespace, name: str) -> Path | None:
    return getattr(options, f"path_{PATH_OPTIONS.get(name, name)}")


def _is_of_its_twin(path: Path, name: str) -> bool:
    """Whether a file says that it is the other variant that the option of `name` is for."""
    if name not in VARIANTS:
        return False
    try:
        variant = open_checkpoint(path).variant
    except (ValueError, OSError):  # which is told where it is opened as the part
        return False
    return variant != name and PATH_OPTIONS.get(variant) == PATH_OPTIONS[name]


def _found_parts(options: argparse.Namespace, folder: Path) -> dict[str, SizedPart]:
    found, lines, absent = {}, [], 0
    for name, source in catalog.SOURCES.items():
        try:
            given = _given(options, name)
            twin = given is not None and _is_of_its_twin(given, name)
            path = catalog.find(name, folder) if twin else part_path(options, name, folder)
        except FileNotFoundError:  # which lists the patterns of names too
            absent += 1
            lines.append(f"{name}: none in {folder}; it is published as {source.origin}")
            continue
        try:
            found[name] = open_part(name, path)
            lines.append(f"{name}: {path}")
        except (ValueError, OSError) as error:
            lines.append(f"{name}: {sentence(error)}")
    if options.size and absent == len(catalog.SOURCES):
        lines = [f"no files in {folder}: published sizes are taken"]
    sys.stdout.write("\n".join(lines) + "\n")
    return found


class Films:
    """Plans of films of the sizes that a user may ask for, from files where there are any."""

    def __init__(
        self, options: argparse.Namespace, found: Mapping[str, SizedPart], device: torch.device
    ) -> None:
        self.found, self.device = found, device
        self.preset, self.weights = PRESETS[options.preset], options.weights
        self.decoder = options.decoder
        self.seconds = self.preset.default_seconds if options.seconds is None else options.seconds
        self.seconds_asked = options.seconds is not None
        self.dtype = compute_dtype(options, device)
        self._published: dict[tuple[str, str], PublishedPart] = {}

    def part(self, name: str, weights: str | None) -> SizedPart:
        """A file's part, or the published one where there is no file or a weight format is asked for."""
        if name in self.found and weights is None:
            return self.found[name]
        key = name, weights or "bf16"
        if key not in self._published:
            self._published[key] = PublishedPart.of(name, self.preset, key[1])
        return self._published[key]

    def missing(self, sr: str | None) -> list[str]:
        """Names of the parts of a film that there are no files of."""
        return [name for name in self._names(sr).values() if name not in self.found]

    def _names(self, sr: str | None) -> dict[str, str]:
        return needed_parts(VARIANT, sr, self.decoder, image=True)

    def shapes(self, size: tuple[int, int], sr: str | None) -> tuple[FilmShape, FilmShape | None]:
        """The film's shape, and that after super-resolution."""
        shape = FilmShape.from_seconds(*size, self.seconds)
        return shape, sr and shape.resized(super_resolution_size(sr, size, self.preset.pixels_1080p))

    def plan(self, size: tuple[int, int], sr: str | None, weights: str | None = None) -> Plan:
        """The plan of a film from text or an image."""
        parts = {role: self.part(name, weights or self.weights) for role, name in self._names(sr).items()}
        vae_dtype = default_vae_dtype(self.dtype, self.device)
        return plan_film(parts, *self.shapes(size, sr), self.dtype, vae_dtype, self.device)

    def asked(self, size: str | tuple[int, int]) -> tuple[tuple[int, int], str | None]:
        """The base size and the super-resolution of what stands behind `--size`."""
        if isinstance(size, str):
            return self.preset.sizes["16:9"], NAMED_SIZES[size]
        return size, None


def film_plan(films: Films, asked: str | tuple[int, int], room: Room, offload: str) -> tuple[list[str], bool]:
    """The plan of one film as lines: a table, whether it fits, and otherwise what would; and if it fits."""
    size, sr = films.asked(asked)
    shape, large = films.shapes(size, sr)
    plan, final = films.plan(size, sr), large or shape
    tokens = final.video_tokens + final.audio_latents + TEXT_TOKENS
    kind = f"{final.width}x{final.height}" + (f" from {size[0]}x{size[1]}" if sr else "")
    lines = [
        f"\n{kind}, {films.seconds:g} s ({tokens} tokens), {VARIANT}, {films.decoder} decoder, "
        f"{_dtype_name(films)}: GB, computed, not measured"
    ]
    if films.weights:
        lines.append(f"published sizes, transformers and text encoder as {films.weights}")
    elif missing := films.missing(sr):
        instead = f" instead of what was not found: {', '.join(missing)}" if films.found else ""
        lines.append(f"published sizes, not quantised{',' if instead else ''}{instead}")
    placements = plan.place(offload, room)
    fits = placements is not None
    lines += table(plan, placements or plan.closest(offload, room), room)
    if fits:
        lines.append(f"fits: --offload {offload} does this")
    elif cures := list(_cures(films, asked, room, offload)):
        lines.append(f"does not fit; what would: {' or '.join(words for words, _ in cures)}")
        if formats := list(dict.fromkeys(weights for _, weights in cures if weights)):
            lines.append(
                f"files in {' or '.join(formats)}: happyhorse convert SOURCE OUT --to {formats[0]}, for each "
                f"transformer and the text encoder"
            )
        if any("--size" in words for words, _ in cures):
            lines.append("in generate: --sr 540p for 540p, no --sr for 256p")
    else:
        lines.append("does not fit, nor does anything smaller")
    return lines, fits


def _cures(
    films: Films, asked: str | tuple[int, int], room: Room, offload: str
) -> Iterator[tuple[str, str | None]]:
    """What to ask for instead, nearest first, with the weight format that files must be converted to."""
    if offload != "auto" and films.plan(*films.asked(asked)).place("auto", room):
        yield "--offload auto", None
    found = list(_smaller(films, asked, room, offload))
    if not found and offload != "auto":
        found = [
            (f"--offload auto with {words}", weights)
            for words, weights in _smaller(films, asked, room, "auto")
        ]
    yield from found


def _smaller(
    films: Films, asked: str | tuple[int, int], room: Room, offload: str
) -> Iterator[tuple[str, str | None]]:
    """What fits of other sizes and formats, in one way of offloading."""
    names = list(NAMED_SIZES)
    smaller = names[: names.index(asked)][::-1] if isinstance(asked, str) else names[:1]
    kept = f" --seconds {films.seconds:g}" if films.seconds_asked else ""
    kept += f" --offload {offload}" if offload != "auto" else ""
    for size in (asked, *smaller):
        for weights in (films.weights, *(name for name in FORMATS if name not in (films.weights, "bf16"))):
            if (size, weights) == (asked, films.weights):
                continue
            if films.plan(*films.asked(size), weights).place(offload, room):
                converted = None if weights == "bf16" else weights
                words = [f"--size {size}{kept}"] * (size != asked) + [f"files in {converted}"] * bool(
                    converted
                )
                yield " with ".join(words), converted
                break


def _all_sizes(films: Films) -> Iterator[str]:
    """What films of the preset's sizes need, plain and with both super-resolutions, as lines of a table."""
    columns = "".join(f"{offload:>9}" for offload in OFFLOADS)
    yield f"\nGB on {films.device} by --offload and, for blocks, in RAM; computed, not measured;"
    yield (f"{films.seconds:g} s, {VARIANT}, {films.decoder} decoder, {_dtype_name(films)}, "
           f"a prompt of {TEXT_TOKENS} tokens; --size 1080p shows a plan:")  # fmt: skip
    yield f"{'size':<9}{'--sr':>6}{'film':>11}{'tokens':>8}{columns}{'RAM':>9}"
    for sr in (None, "540p", "1080p"):
        if (missing := films.missing(sr)) and not films.weights:
            yield f"published sizes, not quantised, instead of what was not found: {', '.join(missing)}"
        for size in films.preset.sizes.values():
            yield _row(films, size, sr)


def _row(films: Films, size: tuple[int, int], sr: str | None) -> str:
    plan = films.plan(size, sr)
    shape, large = films.shapes(size, sr)
    final = large or shape
    tokens = final.video_tokens + final.audio_latents + TEXT_TOKENS
    base, film = (f"{s.width}x{s.height}" for s in (shape, final))
    needs = [*(plan.need(offload).device for offload in OFFLOADS), plan.need("blocks").ram]
    return f"{base:<9}{sr or '-':>6}{film:>11}{tokens:>8}" + "".join(f"{n / GB:>9.2f}" for n in needs)


def _dtype_name(films: Films) -> str:
    return str(films.dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
