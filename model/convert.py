"""Checkpoints rewritten in another weight format, as one file with everything that is needed to load it.

The matrices of the layers change their format; embedders, norms and heads keep the one they have. The source
is read tensor by tensor and worked on in slices of rows, so it may be far larger than memory.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoint import (
    QUANTIZABLE,
    Checkpoint,
    check_finite,
    check_names,
    load,
    load_tokenizer,
    open_checkpoint,
)
from .gguf_blocks import BLOCKS
from .packing import Latents, PackedLayout
from .quant import QuantizedWeight, float8_scale, quantize
from .stream_writer import DTYPE_NAMES, DTYPES, Entry, GgufStreamWriter, SafetensorsWriter

FP8 = "float8_e4m3fn"
ONE_SCALE = "fp8_tensor"  # for a whole matrix, which ComfyUI's own layers want; else one for each row
# what the user asks for -> the format of the layers' matrices
FORMATS = {"bf16": "BF16", "fp8": FP8, "fp8_tensor": FP8, "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"}
FAMILY = "happyhorse"
SLICE_VALUES = 1 << 22  # values worked on at a time: 16 MB in float32
SLICE_ROWS = 256  # a multiple of this many rows is a whole number of blocks, however long the rows
COMFY_QUANT = json.dumps({"format": FP8}).encode()


@dataclass
class WeightError:
    """Squared sums over the values of a tensor: of what the new format changed, and of the values."""

    change: float = 0.0
    values: float = 0.0

    @property
    def relative(self) -> float:
        """The relative change, as a ratio of L2 norms."""
        return math.sqrt(self.change / self.values) if self.values else 0.0

    def __add__(self, other: "WeightError") -> "WeightError":
        return WeightError(self.change + other.change, self.values + other.values)


def suffix_of(to: str) -> str:
    """How the name of a file in this format must end."""
    return ".gguf" if FORMATS[to] in BLOCKS else ".safetensors"


def convert(
    source: Checkpoint,
    target: Path,
    to: str,
    program: str,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> dict[str, WeightError]:
    """Write `source` to the file `target`, the matrices of its layers in the format `to` (see FORMATS).

    `program` is the name and version that the file's metadata tell. Returns the errors of the tensors, by our
    names. Raises ValueError for weights that do not fit or are not finite, or a part that is not written in
    this format, and OSError where the file cannot be written; then there is no new file.
    """
    if source.part not in QUANTIZABLE and to != "bf16":
        raise ValueError(f"the {source.part.replace('_', ' ')} is only converted to bf16, not to {to}")
    expected = source.build().state_dict()
    check_names(source, expected)
    kinds = {own: _kind(source, own, to) for own in expected if own in source.names}
    writer = GgufStreamWriter if suffix_of(to) == ".gguf" else SafetensorsWriter
    errors, digest = {}, hashlib.sha256()
    unknown_hash = uuid.uuid4().hex * 2  # random, so that it is nowhere else in the header
    with writer(target, _entries(source, kinds, to), _metadata(source, to, program, unknown_hash)) as file:
        for done, (own, kind) in enumerate(kinds.items()):
            progress(done, len(kinds))
            weight, errors[own] = source.read(own), WeightError()
            digest.update(f"{own} {tuple(weight.shape)}\n".encode())
            # made now: small tensors that come with the slices and stay would break up the free memory
            scales = torch.empty(_scale_shape(weight.shape, to)) if kind == FP8 else None
            if scales is not None and not scales.ndim:
                scales.copy_(
                    float8_scale(torch.stack([_values(p).abs().max() for p in _slices(weight)]).max())
                )
            file.write(own, _stored(source, own, weight, kind, errors[own], scales, digest.update))
            if isinstance(weight, QuantizedWeight) and weight.scale is not None:
                digest.update(_bytes(weight.scale))
            if scales is not None:
                file.write(_beside(own, "weight_scale"), scales)
                file.write(
                    _beside(own, "comfy_quant"), torch.frombuffer(bytearray(COMFY_QUANT), dtype=torch.uint8)
                )
        progress(len(kinds), len(kinds))
        file.fill_in(unknown_hash, digest.hexdigest())
    return errors


def _kind(source: Checkpoint, own: str, to: str) -> str:
    """What a tensor is written in: a dtype by its name in safetensors, or a format of quantised weights."""
    shape = source.shape(own)
    if source.part not in QUANTIZABLE:
        changes = shape.numel() > max(shape, default=1)  # not vectors: they are few and sensitive
    else:
        changes = bool(QUANTIZABLE[source.part].match(own))
    kept = _kept_dtype(source, own)
    if not changes:
        return kept
    kind = FORMATS[to]
    if own == "embed_tokens.weight" and kind != "BF16":
        kind = "Q8_0" if kind in BLOCKS else "BF16"
    if kind in BLOCKS and shape.numel() % BLOCKS[kind].values:
        return kept
    return kind


def _kept_dtype(source: Checkpoint, own: str) -> str:
    stored = source.file.tensors[source.names[own]].dtype
    if own in source.quantized:  # its values are products, which need more than their own few bits
        return "F32" if source.part == "transformer" else "BF16"
    known = DTYPE_NAMES.get(getattr(torch, stored, None), stored)  # pickles have torch's names
    return known if known in ("BF16", "F16") else "F32"


def _scale_shape(shape: torch.Size, to: str) -> tuple[int, ...]:
    return () if to == ONE_SCALE else (shape[0], 1)


def _entries(source: Checkpoint, kinds: Mapping[str, str], to: str) -> list[Entry]:
    entries = []
    for own, kind in kinds.items():
        shape = source.shape(own)
        if kind == FP8:
            entries += [
                (own, "F8_E4M3", shape),
                (_beside(own, "weight_scale"), "F32", _scale_shape(shape, to)),
                (_beside(own, "comfy_quant"), "U8", (len(COMFY_QUANT),)),
            ]
        else:
            entries.append((own, kind, shape))
    return entries


def _beside(own: str, leaf: str) -> str:
    return f"{own.removesuffix('weight')}{leaf}"


def _metadata(source: Checkpoint, to: str, program: str, source_sha256: str) -> dict[str, str]:
    """What the file says of itself; the same source and program always make the same file."""
    rest = "matrices" if source.part not in QUANTIZABLE else "matrices of the layers"
    told = {
        "format": "pt",
        "family": FAMILY,
        "variant": source.variant,
        "config": json.dumps(source.config.to_dict()),
        "source": source.path.resolve().name,
        # of our names, the shapes and the stored bytes (with scales) of all tensors, in the network's order
        "source_sha256": source_sha256,
        "recipe": f"{program}, convert --to {to}: {rest} in {FORMATS[to]}, all else as in the source",
        "note": source.file.metadata.get("note"),
        "tokenizer": _tokenizer_json(source) if source.part == "text_encoder" else None,
    }
    return {key: value for key, value in told.items() if value is not None}


def _tokenizer_json(source: Checkpoint) -> str:
    load_tokenizer(source)  # says what is wrong with it
    if "tokenizer" in source.file.metadata:
        return source.file.metadata["tokenizer"]
    folder = source.path if source.path.is_dir() else source.path.parent
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


def _stored(
    source: Checkpoint,
    own: str,
    weight: Tensor | QuantizedWeight,
    kind: str,
    error: WeightError,
    scales: Tensor | None,
    digest: Callable[[np.ndarray], None],
) -> Iterator[Tensor]:
    """The data of a tensor in its new format, slice by slice; `error`, `scales` and `digest` get their share
    of each.
    """
    rows = 0
    for piece in _slices(weight):
        digest(_bytes(piece.data))
        values = _values(piece)
        check_finite(values, own, source)
        one_scale = scales if scales is not None and not scales.ndim else None
        same = isinstance(piece, QuantizedWeight) and piece.format == kind and one_scale is None
        new = piece if same else _encode(values, kind, one_scale)
        error.change += float(torch.linalg.vector_norm(_values(new) - values, dtype=torch.float64)) ** 2
        error.values += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        if not math.isfinite(error.change):
            largest = float(values.abs().max())
            raise ValueError(
                f"{source.path}: {own} holds values up to {largest:.3g}, too large for {kind}; "
                "convert to bf16"
            )
        if not isinstance(new, QuantizedWeight):
            yield new
            continue
        yield new.data
        if scales is not None and scales.ndim:
            scales[rows : rows + len(new.data)] = 1.0 if new.scale is None else new.scale
            rows += len(new.data)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _slices(weight: Tensor | QuantizedWeight) -> Iterator[Tensor | QuantizedWeight]:
    """A matrix some rows at a time; anything else whole."""
    if len(weight.shape) != 2:
        yield weight
        return
    rows, columns = weight.shape
    step = max(SLICE_VALUES // columns // SLICE_ROWS, 1) * SLICE_ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if isinstance(weight, Tensor):
            yield weight[start:stop]
            continue
        width = weight.data.numel() // rows if weight.data.ndim == 2 else weight.data.numel() / rows
        data = weight.data.reshape(-1)[round(start * width) : round(stop * width)]
        if weight.data.ndim == 2:
            data = data.reshape(stop - start, -1)
        scale = weight.scale
        scale = scale[start:stop] if scale is not None and scale.ndim else scale
        yield replace(weight, data=data, scale=scale, shape=torch.Size((stop - start, columns)))


def _values(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()


def _encode(values: Tensor, kind: str, scale: Tensor | None) -> Tensor | QuantizedWeight:
    if kind in DTYPES:
        return values.to(DTYPES[kind])
    with np.errstate(over="ignore"):  # which shows in the error that is worked out
        return quantize(values, kind, scale)


def velocity_error(
    source: Checkpoint,
    result: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> float:
    """The relative difference (L2) of the velocities of a transformer and of its conversion, on a fixed input
    of 24 tokens, in float32. Only one layer is in memory at a time.
    """
    config = source.config
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    latents = Latents(normal((1, config.latent_channels, 2, 4, 4)), normal((1, 8, config.audio_in_channels)))
    text = normal((1, 8, config.text_in_channels))
    total = 2 * config.num_layers
    want = _velocity(source, latents, text, lambda done: progress(done, total))
    converted = open_checkpoint(result, source.part, source.variant)
    got = _velocity(converted, latents, text, lambda done: progress(config.num_layers + done, total))
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


def _velocity(
    checkpoint: Checkpoint, latents: Latents, text: Tensor, progress: Callable[[int], None]
) -> Tensor:
    """Both streams of the velocity in one row of values."""
    layout = PackedLayout.of(latents, text, checkpoint.config.coords_style)

    def run_all(_: int, first: partial, x: Tensor) -> Tensor:
        for index in range(checkpoint.config.num_layers):
            progress(index)
            layer = load(_one_layer(checkpoint, index), torch.float32).block.layers[0]
            x = layer(x, **first.keywords)
        progress(checkpoint.config.num_layers)
        return x

    network = load(_one_layer(checkpoint, 0), torch.float32)
    velocity = network(latents, text, layout, run_block=run_all)
    return torch.cat([stream.flatten() for stream in velocity])


def _one_layer(checkpoint: Checkpoint, index: int) -> Checkpoint:
    """The same transformer with this one of its layers alone."""
    ours, first = f"block.layers.{index}.", "block.layers.0."

    def chosen(entries: Mapping) -> dict:
        return {
            own.replace(ours, first): entry
            for own, entry in entries.items()
            if own.startswith(ours) or not own.startswith("block.")
        }

    config = checkpoint.config
    lists = {
        field: (0,) if index in getattr(config, field) else ()
        for field in ("mm_layers", "gelu7_layers", "local_attn_layers")
    }
    return replace(
        checkpoint,
        config=replace(config, num_layers=1, **lists),
        names=chosen(checkpoint.names),
        quantized=chosen(checkpoint.quantized),
    )
