"""The memory plan: bytes of weights and activations of every stage, and which placements fit.

Weights are counted from the files, activations by the formulas of activations.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import psutil
import torch

from ..model.config import Config, TransformerConfig, VideoDecoderConfig
from ..model.geometry import FilmShape
from .activations import SMALL_TENSORS, activations, latent_bytes
from .parts import STREAMED_PARTS, part_dtype
from .placement import OFFLOADS, Placement

GB = 1e9
RESERVE = 0.06  # share of the memory left to the driver, the allocator's gaps and everybody else
SAMPLER_LATENTS = 10  # latents that a sampler holds beside the network: its history, noise and results
PIECES = (4096, 1024)  # tokens at a time
TILES = (2, 4, 8, 16)
CPU = torch.device("cpu")


class SizedPart(Protocol):
    """What the plan wants to know of a part: an opened `Checkpoint`, or what stands for one."""

    part: str
    config: Config
    names: Mapping[str, str]

    def shape(self, own: str) -> torch.Size:
        """The shape of a tensor by our name."""

    def kept_bytes(self, own: str, dtype: torch.dtype) -> int:
        """Bytes of it once it is loaded."""

    def keeps_quantized(self, own: str) -> bool:
        """Whether it stays quantised."""


@dataclass(frozen=True)
class Room:
    """Bytes that a film may use on its device and in RAM, the same where the device works in RAM."""

    device: int
    ram: int


@dataclass(frozen=True)
class Need:
    """Peak bytes on the device and in RAM; where the device works in RAM all is in the first."""

    device: int
    ram: int

    def fits(self, room: Room) -> bool:
        """Whether there is room for it."""
        return not any(self.short(room))

    def short(self, room: Room) -> tuple[bool, bool]:
        """Whether the device has too little memory, and the RAM."""
        return self.device > room.device, self.ram > room.ram


@dataclass(frozen=True)
class Work:
    """Bytes of activations where a network works on pieces of so many tokens, or in so many tiles."""

    num_bytes: int
    piece: int = 0
    tiles: int = 0


@dataclass(frozen=True)
class Stage:
    """What one part of a film needs, in bytes.

    `layers` are those of its weights that can be streamed, `rest` is all others. `dequantized` is the most
    that is worked out from quantised weights at once, as a rule and in pieces; `largest` the largest tensor
    that passes through RAM when it is loaded, `in_ram` what the stage holds there. `works` begins with the
    usual way of working, each other needing less.
    """

    role: str
    name: str
    rest: int
    layers: tuple[int, ...]
    works: tuple[Work, ...]
    dequantized: tuple[int, int] = (0, 0)
    largest: int = 0
    in_ram: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.rest + sum(self.layers)

    def activations(self, placement: Placement) -> int:
        """Bytes beside the weights."""
        wanted = (placement.piece, placement.tiles)
        return self.dequantized[bool(placement.piece)] + next(
            w.num_bytes for w in self.works if (w.piece, w.tiles) == wanted
        )

    def need(self, placement: Placement, device: torch.device) -> Need:
        """The peak of the stage alone."""
        active = self.activations(placement)
        if placement.resident is None:
            streamed = copies = 0
        else:
            streamed = sum(self.layers[placement.resident :])
            copies = 2 * max(self.layers[placement.resident :], default=0)
        if works_in_ram(device):  # what the copies are made from lies there too
            return Need(self.weights + copies + active, 0)
        return Need(self.weights - streamed + copies + active, streamed + self.largest + self.in_ram)


@dataclass(frozen=True)
class Plan:
    """The stages of one film on a device."""

    stages: tuple[Stage, ...]
    device: torch.device

    def options(self, stage: Stage, offload: str) -> Iterator[Placement]:
        """The placements of a stage under an offload, the fastest first; what changes roundings comes last.

        'auto' has all of them. Streaming is of no use where the device works in RAM.
        """
        streams = bool(stage.layers) and not works_in_ram(self.device)
        if offload in ("none", "stage", "blocks"):
            resident = 0 if offload == "blocks" and stage.layers else None
            yield Placement(keep=offload == "none", resident=resident)
            return
        works = stage.works
        if offload == "pieces":
            works = stage.works[-1:] if stage.works[-1].piece else stage.works
        for work in works:
            whole = Placement(piece=work.piece, tiles=work.tiles)
            if offload == "auto" or not streams:
                yield whole
            counts = range(len(stage.layers) - 1, -1, -1) if offload == "auto" else (0,)
            for resident in counts if streams else ():
                yield replace(whole, resident=resident)

    def place(self, offload: str, room: Room) -> dict[str, Placement] | None:
        """A placement for every role under an offload or 'auto', or None if nothing fits."""
        if offload in ("auto", "none") and self.need("none").fits(room):
            return {stage.role: Placement(keep=True) for stage in self.stages}
        if offload == "none":
            return None
        chosen = {stage.role: self._first_fit(stage, offload, room) for stage in self.stages}
        return None if None in chosen.values() else chosen

    def closest(self, offload: str, room: Room) -> dict[str, Placement]:
        """For every role the first placement that fits, else the one that needs least."""
        least = {stage.role: self._least(stage, offload)[0] for stage in self.stages}
        return {s.role: self._first_fit(s, offload, room) or least[s.role] for s in self.stages}

    def _first_fit(self, stage: Stage, offload: str, room: Room) -> Placement | None:
        options = self.options(stage, offload)
        return next((option for option in options if stage.need(option, self.device).fits(room)), None)

    def steps_down(self, stage: Stage, placement: Placement, room: Room) -> tuple[Placement, ...]:
        """A placement and those to take after it where memory runs out all the same, by what RAM allows."""
        steps = [placement]
        if placement.keep:  # what is kept of other parts goes first
            steps.append(Placement())
        works = [(work.piece, work.tiles) for work in stage.works]
        later = works[works.index((placement.piece, placement.tiles)) :]
        resident = 0 if stage.layers and not works_in_ram(self.device) else placement.resident
        steps += [Placement(False, resident, *work) for work in later]
        needs = [stage.need(step, self.device) for step in steps]
        kept = [step for step, need in zip(steps[1:], needs[1:], strict=True) if need.ram <= room.ram]
        return tuple(dict.fromkeys((placement, *kept)))

    def need(self, offload: str) -> Need:
        """The peak of the whole film: under 'auto' and 'pieces' the least that it can be made with."""
        needs = [self._least(stage, offload)[1] for stage in self.stages]
        device, ram = max(need.device for need in needs), max(need.ram for need in needs)
        if offload == "none":
            active = max(stage.activations(Placement()) for stage in self.stages)
            device = sum(stage.weights for stage in self.stages) + active
        return Need(device, ram)

    def _least(self, stage: Stage, offload: str) -> tuple[Placement, Need]:
        needs = [(option, stage.need(option, self.device)) for option in self.options(stage, offload)]
        return min(needs, key=lambda pair: (pair[1].device, pair[1].ram))


def works_in_ram(device: torch.device) -> bool:
    """Whether a device has no memory of its own, as CPUs and Apple's GPUs."""
    return device.type in ("cpu", "mps")


def check_vram(device: torch.device, vram: float | None) -> None:
    """Raise ValueError where GB of VRAM are given for a device that has none."""
    if vram is not None and works_in_ram(device):
        raise ValueError(
            f"--vram: the device {str(device)!r} works in RAM and has none; limit its memory with --ram"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a film may use on `device`."""
    module = None if works_in_ram(device) else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free = module.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(free * (1 - RESERVE))


def room_on(device: torch.device, vram: float | None = None, ram: float | None = None) -> Room:
    """What is free, or of so many GB of a device's memory and of RAM what a film may use."""
    on_cpu = free_memory(CPU) if ram is None else int(ram * GB * (1 - RESERVE))
    if works_in_ram(device):
        return Room(on_cpu, on_cpu)
    return Room(free_memory(device) if vram is None else int(vram * GB * (1 - RESERVE)), on_cpu)


def require_fit(
    plan: Plan, offload: str, smaller: Iterable[tuple[str, Plan]], room: Room
) -> dict[str, tuple[Placement, ...]]:
    """For each role the placement chosen, then those to step down to; raises MemoryError saying what fits.

    `smaller` are plans of other films, the dearest first, with what to ask for to get them.
    """
    if (chosen := plan.place(offload, room)) is not None:
        return {stage.role: plan.steps_down(stage, chosen[stage.role], room) for stage in plan.stages}
    cures = []
    if (other := first_offload(plan, room)) is not None:
        cures.append(f"--offload {other} ({_need(plan, other)})")
    for what, film in smaller:
        if film.place(offload, room) is not None:
            cures.append(what)
        elif (other := first_offload(film, room)) is not None:
            cures.append(f"{what} with --offload {other}")
        else:
            continue
        break
    free = _gb(room.device)
    if plan.need(offload).ram:
        free += f" and {_gb(room.ram)}"
    raise MemoryError(
        f"this film needs about {_need(plan, offload)} with --offload {offload}, {free} are free; "
        + (f"what would fit: {' or '.join(cures)}" if cures else "nothing smaller would fit")
    )


def first_offload(plan: Plan, room: Room) -> str | None:
    """The fastest offload under which a film fits, if any."""
    return next((offload for offload in (*OFFLOADS, "auto") if plan.place(offload, room) is not None), None)


def _need(plan: Plan, offload: str) -> str:
    need = plan.need(offload)
    return f"{_gb(need.device)} on {plan.device}" + (f" and {_gb(need.ram)} of RAM" if need.ram else "")


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def table(plan: Plan, placements: Mapping[str, Placement], room: Room) -> list[str]:
    """The plan as lines: of each stage its placement, its peak on the device and in RAM in GB, if it fits."""
    rows = [("stage", "placement", "VRAM", "RAM", "fits")]
    kept = sum(stage.weights for stage in plan.stages if placements[stage.role].keep)
    for stage in plan.stages:
        placement = placements[stage.role]
        need = stage.need(placement, plan.device)
        need = Need(need.device + kept - (stage.weights if placement.keep else 0), need.ram)
        vram, ram = (f"{num_bytes / GB:.2f}" for num_bytes in (need.device, need.ram))
        memories = ("VRAM", "RAM")
        if works_in_ram(plan.device):
            vram, ram, memories = "-", vram, ("RAM", "RAM")
        short = [memory for memory, lacks in zip(memories, need.short(room), strict=True) if lacks]
        fits = f"NO, too little {' and '.join(short)}" if short else "yes"
        rows.append((stage.name, placement.describe(len(stage.layers)), vram, ram, fits))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{name:<{widths[0]}}  {place:<{widths[1]}}  {vram:>{widths[2]}}  {ram:>{widths[3]}}  {fits}"
        for name, place, vram, ram, fits in rows
    ]


def plan_film(
    parts: Mapping[str, SizedPart],
    shape: FilmShape,
    large: FilmShape | None,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    device: torch.device,
    patches: int = 0,
) -> Plan:
    """The plan of a film of `shape`, and of `large` after super-resolution.

    `parts` holds the opened checkpoints by role, as `parts.needed_parts` names them; `patches` is the bytes
    that those of the first transformer take beside it.
    """
    shapes = {"transformer": shape, "audio_vae": shape}
    stages = (
        _stage(role, part, shapes.get(role, large or shape), part_dtype(part.part, dtype, vae_dtype), device)
        for role, part in parts.items()
    )
    beside = {"transformer": patches}
    return Plan(tuple(replace(s, rest=s.rest + beside.get(s.role, 0)) for s in stages), device)


def _stage(role: str, part: SizedPart, shape: FilmShape, dtype: torch.dtype, device: torch.device) -> Stage:
    rest, layers, largest, dequantized = 0, {}, 0, []
    for own in part.names:
        size = part.kept_bytes(own, dtype)
        largest = max(largest, size)
        if part.keeps_quantized(own) and own != "embed_tokens.weight":  # of which only rows are used
            dequantized.append((own, part.shape(own).numel() * dtype.itemsize))
        head, _, below = own.removeprefix("block.").partition(".")
        if head == "layers" and part.part in STREAMED_PARTS:
            index = int(below.partition(".")[0])
            layers[index] = layers.get(index, 0) + size
        else:
            rest += size
    works = tuple(_works(role, part.config, shape, dtype, device))
    chunk = 2 * 3 * 28 * shape.width * shape.height if role == "video_decoder" else 0
    sizes = tuple(layers[index] for index in sorted(layers))
    return Stage(role, NAMES[role], rest, sizes, works, _at_once(part, dequantized), largest, chunk)


def _at_once(part: SizedPart, values: list[tuple[str, int]]) -> tuple[int, int]:
    """The most of these values of weights that is there at once, as a rule and in pieces."""
    together, apart = {}, {}
    for own, num_bytes in values:
        layer, feed_forward, _ = own.partition(".mlp.")
        joint = part.part == "transformer" and bool(feed_forward)  # both of its linears
        shared = joint and int(layer.rpartition(".")[2]) not in part.config.mm_layers
        for sums, key in ((together, layer if joint else own), (apart, layer if shared else own)):
            sums[key] = sums.get(key, 0) + num_bytes
    return max(together.values(), default=0), max(apart.values(), default=0)


NAMES = {
    "text_encoder": "text encoder",
    "video_vae": "image",
    "transformer": "base",
    "super_resolution": "super-resolution",
    "video_decoder": "picture",
    "audio_vae": "sound",
}


def _works(
    role: str, config: Config, shape: FilmShape, dtype: torch.dtype, device: torch.device
) -> Iterator[Work]:
    """The ways of working, each needing less than the one before."""
    pieces = PIECES if isinstance(config, TransformerConfig) else ()
    tiles = TILES if isinstance(config, VideoDecoderConfig) else ()
    latents = SAMPLER_LATENTS * latent_bytes(shape) if isinstance(config, TransformerConfig) else 0
    least = None
    for piece, tile in ((0, 0), *((piece, 0) for piece in pieces), *((0, count) for count in tiles)):
        needed = int(SMALL_TENSORS * activations(role, config, shape, dtype, device, piece, tile)) + latents
        if least is None or needed < least:
            least = needed
            yield Work(needed, piece, tile)
