"""LoRAs on the joint transformer: which weights a file changes, how strongly, and the patches that do it.

A joint model asks for more than one strength: the layers with one weight copy per modality can follow a LoRA
in video, audio and text differently, and every layer may have a weight of its own.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .config import TransformerConfig
from .lora_formats import Adapter, Change, LoraFile
from .transformer import JointTransformer

log = logging.getLogger(__name__)
MODALITIES = ("video", "audio", "text")
LAYER = re.compile(r"block\.layers\.(\d+)\.")
# layers of models that keep apart what linear_qkv holds in one: q, k, v and the gate, in this order
SECTIONS = (
    ("to_q", "q_proj", "linear_q"),
    ("to_k", "k_proj", "linear_k"),
    ("to_v", "v_proj", "linear_v"),
    ("to_gate", "gate_proj", "linear_gate"),
)
OUTPUTS = ("to_out.0", "to_out", "o_proj", "linear_o")
MAX_LAYER = 999
SLICE_ROWS = 4096  # of a weight changed at a time: the change of the largest takes 1.7 GB


def parse_blocks(text: str) -> dict[int, float]:
    """Weights of layers from a list such as `0-11,30` or `0-3:0.5,4-35:1`; a range without weight counts 1.

    Raises ValueError that quotes what is wrong.
    """
    weights: dict[int, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?(?::\s*([^\s:]+)\s*)?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        weight = _number(match[3] or "1") if match else None
        if weight is None or first > last or last > MAX_LAYER:
            raise ValueError(
                f"blocks must be layers with weights, such as 0-11,30 or 0-3:0.5,4-35:1, got {item.strip()!r}"
            )
        if twice := weights.keys() & range(first, last + 1):
            raise ValueError(f"blocks name layer {min(twice)} twice in {text!r}; name it once")
        weights |= dict.fromkeys(range(first, last + 1), weight)
    return weights


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Strengths:
    """How strongly a LoRA counts: all of it, times that of a modality or of the layers that all share.

    `video`, `audio` and `text` are for their copies in the layers that hold one each, and for the embedders
    and heads; `blocks` as in `parse_blocks`, where layers that are not named count 0 and "" names all with 1;
    embedders and heads belong to no layer. Raises ValueError for what is no number.
    """

    all: float = 1.0
    video: float = 1.0
    audio: float = 1.0
    text: float = 1.0
    shared: float = 1.0
    blocks: str = ""

    def __post_init__(self) -> None:
        for item in fields(self)[:-1]:
            if not math.isfinite(getattr(self, item.name)):
                what = "the strength" if item.name == "all" else f"the strength of {item.name}"
                raise ValueError(f"{what} of a LoRA must be a finite number, got {getattr(self, item.name)}")
        _ = self.layers

    @cached_property
    def layers(self) -> dict[int, float] | None:
        """Weights of layers; None where all count 1."""
        return parse_blocks(self.blocks) if self.blocks.strip() else None

    def of(self, modality: str, layer: int | None) -> float:
        """That of a modality, or of `shared`, in a layer or outside of all."""
        weight = 1.0 if layer is None or self.layers is None else self.layers.get(layer, 0.0)
        return self.all * getattr(self, modality) * weight

    @property
    def settings(self) -> dict[str, float | str]:
        """As ComfyUI's node calls them."""
        return {"strength" if name == "all" else name: value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        """As on the command line, without what is 1."""
        settings = [f"{name}={getattr(self, name):g}" for name in (*MODALITIES, "shared")
                    if getattr(self, name) != 1]  # fmt: skip
        settings += [f"blocks={self.blocks}"] if self.layers is not None else []
        return f"{self.all:g}" + (f":{','.join(settings)}" if settings else "")


@dataclass(frozen=True)
class Lora:
    """A LoRA file and its strengths."""

    path: Path
    strengths: Strengths = field(default_factory=Strengths)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.strengths}"


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of a weight, and how strongly they are changed."""

    start: int
    stop: int
    strength: float = 1.0


@dataclass(frozen=True)
class LoraPatch:
    """Changes a weight of its full shape; a `WeightPatch`.

    Each of `groups` takes the change's rows in turn, from the first to the last.
    """

    change: Change
    groups: tuple[tuple[Rows, ...], ...]

    def __call__(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Add the change, worked out in float32, to `weight` itself; returns it."""
        change = self.change.to(weight.device)
        for group in self.groups:
            first = 0
            old_norms = None
            if change.magnitude is not None and len(change.magnitude) == 1:
                old_norms = _column_norms(weight, change, group)
            for rows in group:
                last = first + rows.stop - rows.start
                for start in range(first, last, SLICE_ROWS) if rows.strength else ():
                    stop = min(start + SLICE_ROWS, last)
                    part = weight[rows.start - first + start : rows.start - first + stop]
                    _add(part, change, (start, stop), rows.strength * strength, old_norms)
                first = last
        return weight

    def with_tensors(self, tensors: Sequence[Tensor]) -> "LoraPatch":
        """The same with other copies of `change.tensors`."""
        return replace(self, change=self.change.with_tensors(tensors))

    def to(self, device: torch.device | str) -> "LoraPatch":
        """The same with its factors on another device."""
        return replace(self, change=self.change.to(device))


def bytes_at_use(patches: Mapping[str, Sequence[LoraPatch]], quantized: Collection[str]) -> int:
    """Bytes that patches of quantised weights take while a film is made: their factors and one slice of work.

    Those of other weights are merged before.
    """
    held = [patch.change for own in quantized for patch in patches.get(own, ())]
    factors = sum(tensor.nbytes for change in held for tensor in change.tensors)
    columns = max((change.factors[-1].shape[-1] for change in held), default=0)
    return factors + 2 * 4 * SLICE_ROWS * columns


def _add(
    part: Tensor, change: Change, rows: tuple[int, int], strength: float, column_norms: Tensor | None
) -> None:
    delta = change.rows(*rows)
    if change.magnitude is None:
        part.add_(delta, alpha=strength * change.scale)
        return
    # DoRA (arXiv:2402.09353): the changed weight gets new norms. ComfyUI 0.33 divides by the norms of the
    # rows before the change, which neither PEFT nor LyCORIS does (github.com/Comfy-Org/ComfyUI/pull/15458).
    changed = delta.mul_(change.scale).add_(part)
    if column_norms is None:
        gain = change.magnitude[slice(*rows)].float() / _positive(changed.norm(dim=1, keepdim=True))
    else:
        gain = change.magnitude.float() / column_norms
    part.add_(changed.mul_(gain).sub_(part), alpha=strength)


def _column_norms(weight: Tensor, change: Change, group: Sequence[Rows]) -> Tensor:
    """Norms of the columns, over all rows of a group, of the changed weight: [1, columns]."""
    squares, first = torch.zeros(weight.shape[1], device=weight.device), 0
    for rows in group:
        last = first + rows.stop - rows.start
        changed = change.rows(first, last).mul_(change.scale).add_(weight[rows.start : rows.stop])
        squares += changed.square_().sum(dim=0)
        first = last
    return _positive(squares.sqrt()).unsqueeze(0)


def _positive(norms: Tensor) -> Tensor:
    return norms + torch.finfo(norms.dtype).eps


@dataclass(frozen=True)
class Place:
    """What an adapter changes: a weight by our name, or one section (q, k, v, gate) of a linear_qkv."""

    name: str
    section: int | None = None


@dataclass(frozen=True)
class Match:
    """How a LoRA file fits a model: the adapters with their places, how many the file has in all, and its
    keys that fit nowhere.
    """

    places: tuple[tuple[Adapter, Place], ...]
    total: int
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        """In words: how much is used, and what is not."""
        text = f"{len(self.places)} of {self.total} matched"
        if self.unmatched:
            text += f", {counted(len(self.unmatched), 'key')} not used: {_first(self.unmatched)}"
        return text


def transformer_shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    """The shapes of a transformer's tensors by our names."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in JointTransformer(config).state_dict().items()}


def match(lora: LoraFile, config: TransformerConfig, shapes: Mapping[str, torch.Size]) -> Match:
    """Find the weights, of `shapes` by our name, that a LoRA changes.

    Raises ValueError where none is there, where one is of another shape, or where one is named twice.
    """
    known, places, unmatched = _places(config, shapes), {}, list(lora.unknown)
    for adapter in lora.adapters:
        place = known.get(adapter.target)
        if place is None:
            unmatched += adapter.keys.values()
        elif place in places:
            raise ValueError(
                f"{lora.path} names {place.name} under two names, {places[place].stem} and {adapter.stem}; "
                "it contradicts itself, use a file that names each layer once"
            )
        else:
            places[place] = adapter
    if not places:
        own = [name.removesuffix(".weight") for name in shapes if LAYER.match(name)]
        raise ValueError(
            f"{lora.path} does not fit this model: none of its {counted(len(lora.adapters), 'layer')} "
            f"({_first([adapter.stem for adapter in lora.adapters])}) is one of the model's ({_first(own)}); "
            "use a LoRA made for this model"
        )
    for place, adapter in places.items():
        rows_of(lora, adapter, place, config, shapes)
    found = tuple((adapter, place) for place, adapter in places.items())
    return Match(found, len(lora.adapters), tuple(unmatched))


def patches(
    loras: Sequence[tuple[LoraFile, Strengths]], config: TransformerConfig, shapes: Mapping[str, torch.Size]
) -> dict[str, list[LoraPatch]]:
    """The patches of some LoRAs by our name of the weight, in their order; without those of strength 0.

    How much of each file is used is logged. Raises ValueError for files that do not fit, see `match`, and for
    NaN or infinite values.
    """
    found: dict[str, list[LoraPatch]] = {}
    for lora, strengths in loras:
        _check_layers(strengths, config)
        fitting = match(lora, config, shapes)
        level = logging.WARNING if fitting.unmatched else logging.INFO
        log.log(level, "%s: %s", lora.path.name, fitting)
        for adapter, place in fitting.places:
            groups = rows_of(lora, adapter, place, config, shapes, strengths)
            groups = tuple(group for group in groups if any(rows.strength for rows in group))
            if groups:
                found.setdefault(place.name, []).append(LoraPatch(lora.read(adapter), groups))
    return found


def _check_layers(strengths: Strengths, config: TransformerConfig) -> None:
    if strengths.layers and max(strengths.layers) >= config.num_layers:
        raise ValueError(
            f"blocks name layer {max(strengths.layers)}, but the model's layers are 0-{config.num_layers - 1}"
        )


def _places(config: TransformerConfig, shapes: Mapping[str, torch.Size]) -> dict[str, Place]:
    """What each name of an adapter stands for, with dots and with underscores."""
    places = {}
    for name in shapes:
        places[name.removesuffix(".weight")] = Place(name)
        if name.endswith(".linear_qkv.weight"):
            attention = name.removesuffix("linear_qkv.weight")
            gates = config.enable_attn_gating
            for section, words in enumerate(SECTIONS if gates else SECTIONS[:-1]):
                places |= {attention + word: Place(name, section) for word in words}
            places |= {attention + word: Place(f"{attention}linear_proj.weight") for word in OUTPUTS}
    return {**{name.replace(".", "_"): place for name, place in places.items()}, **places}


def rows_of(
    lora: LoraFile,
    adapter: Adapter,
    place: Place,
    config: TransformerConfig,
    shapes: Mapping[str, torch.Size],
    strengths: Strengths | None = None,
) -> list[tuple[Rows, ...]]:
    """The rows that an adapter changes; raises ValueError where its shape is not that of its place."""
    shape, given = shapes[place.name], lora.shape(adapter)
    layer, modalities = modalities_of(place.name, config)
    size = shape[0] // len(modalities)
    start, stop = 0, size
    if place.section is not None:
        sections = attention_sections(config)
        start = sum(sections[: place.section])
        stop = start + sections[place.section]
    rows = [
        Rows(i * size + start, i * size + stop, strengths.of(modality, layer) if strengths else 1.0)
        for i, modality in enumerate(modalities)
    ]
    whole = (len(rows) * (stop - start), *shape[1:])
    if given == whole:
        return [tuple(rows)]
    if place.section is not None and given == (stop - start, *shape[1:]):
        return [(part,) for part in rows]  # one change for all copies
    accepted = [list(whole)]
    if place.section is not None and len(rows) > 1:
        accepted.append([stop - start, *shape[1:]])
    raise ValueError(
        f"{lora.path} does not fit this model: {adapter.stem} changes a weight of {list(given)}, which is "
        f"{' or '.join(map(str, accepted))} here; use a LoRA made for this model"
    )


def attention_sections(config: TransformerConfig) -> tuple[int, int, int, int]:
    """Rows of q, k, v and the gate in one copy of a linear_qkv."""
    groups = config.num_query_groups * config.head_dim
    return config.hidden_size, groups, groups, config.num_heads if config.enable_attn_gating else 0


def modalities_of(name: str, config: TransformerConfig) -> tuple[int | None, tuple[str, ...]]:
    """The layer that a weight belongs to, if any, and whose the copies are that it stacks: of modalities,
    or `shared`.
    """
    if found := LAYER.match(name):
        layer = int(found[1])
        return layer, MODALITIES if layer in config.mm_layers else ("shared",)
    return None, (next((modality for modality in MODALITIES if modality in name), "shared"),)


def counted(number: int, word: str) -> str:
    """As `1 key` or `2 keys`."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def _first(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
