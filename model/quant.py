"""Quantised weights: the formats people have, how files name their scales, and the values behind them.

A quantised weight is kept as it is stored; its values are worked out anew whenever a layer computes. Formats:
`float8_e4m3fn` and `float8_e5m2` with a scale or without, `int8` with one, and the block formats of GGUF.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.scaled_matmul import has_scaled_matmul, next_multiple, pad_linear, scaled_linear
from .gguf_blocks import BLOCKS, block_scales, dequantize_blocks
from .weight_files import WeightFile

FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
WRITTEN = ("float8_e4m3fn", "Q8_0", "Q5_0", "Q4_0")
SLICE_ROWS = 4096  # worked on at a time, to need little memory
# what files call the types of stored values -> format
STORED = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    **{f: f for f in (*FLOAT8, "int8")},
}
# formats by ComfyUI's names; it has others, which are not read
COMFY_FORMATS = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2", "int8_tensorwise": "int8"}
# what stands beside `X.weight`: scales by their published names, and what is not needed to read it
SCALES = ("{0}.weight_scale", "{0}.scale_weight", "{0}.weight.__fp8_scale")
NOTES = ("{0}.comfy_quant", "{0}.input_scale", "{0}.scale_input")
OLD_MARK = "scaled_fp8"  # a tensor of this name says that the file is of ComfyUI's former kind

# patch(weight) -> weight, of any float dtype; it may write into its argument
WeightPatch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of `shape` as a file stores it.

    `data` holds its values, [rows, columns], or for GGUF bytes, uint8: [rows, bytes of a row], or [bytes]
    where a row is no whole number of blocks. A value is multiplied by `scale`, float32 of [] or [rows, 1],
    or None. Behind the rows of each of `copies` and behind each row there may be zeros (see `aligned`).
    """

    data: Tensor
    scale: Tensor | None
    format: str
    shape: torch.Size
    copies: int = 1

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, worked out in float32 and rounded once."""
        if self.format in BLOCKS:
            return dequantize_blocks(self.data, self.format, dtype).reshape(self.shape)
        data, scale = self.data, self.scale
        if data.shape != self.shape:
            rows, wide = self.shape[0] // self.copies, data.unflatten(0, (self.copies, -1))
            data = wide[:, :rows, : self.shape[1:].numel()].reshape(self.shape)
            if scale is not None and scale.ndim:
                scale = scale.unflatten(0, (self.copies, -1))[:, :rows].flatten(0, 1)
        values = data.to(dtype)
        if scale is not None:
            # with axes, as on other devices than the CPU a number alone would be rounded to the values' dtype
            axes = [1] * (values.ndim - 1)
            scale = scale.reshape(-1, *axes).expand(len(values), *axes)
            # in slices, of which the CPU makes float32 copies
            for part, factor in zip(values.split(SLICE_ROWS), scale.split(SLICE_ROWS), strict=True):
                torch.mul(part, factor, out=part)
        return values

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of some rows: `index` of any shape -> [*index.shape, columns]."""
        if self.format in BLOCKS and self.data.ndim == 1:  # rows are no whole blocks
            return self.dequantize(dtype)[index]
        flat = index.flatten()
        scale = self.scale if self.scale is None or not self.scale.ndim else self.scale[flat]
        shape = torch.Size((len(flat), *self.shape[1:]))
        chosen = replace(self, data=self.data[flat], scale=scale, shape=shape)
        return chosen.dequantize(dtype).unflatten(0, index.shape)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def clone(self) -> "QuantizedWeight":
        """A copy."""
        scale = None if self.scale is None else self.scale.clone()
        return replace(self, data=self.data.clone(), scale=scale)

    def aligned(self, copies: int) -> "QuantizedWeight":
        """The same; if of float8, with the zeros that fast products want behind each stacked copy."""
        if self.format not in FLOAT8:
            return self
        rows, columns = self.shape[0] // copies, self.shape[1]
        padded = pad_linear(self.data, self.scale, next_multiple(rows), next_multiple(columns), copies)
        return replace(self, data=padded[0], scale=padded[1], copies=copies)

    def is_fast_for(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a device multiplies the stored values, for activations of `dtype`."""
        half = dtype in (torch.bfloat16, torch.float16)
        return self.format in FLOAT8 and half and has_scaled_matmul(device)

    def linear(self, x: Tensor, copy: int = 0) -> Tensor:
        """`x` [..., columns] times one copy of the weight, with activations in float8 too -> [..., rows]."""
        data, scale = self.data.chunk(self.copies)[copy], self.scale
        if scale is not None and scale.ndim:
            scale = scale.chunk(self.copies)[copy]
        return scaled_linear(x, data, scale)[..., : self.shape[0] // self.copies]

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def bounds(self) -> Tensor:
        """A few values that are NaN or infinite if one of the weight's is."""
        if self.format in FLOAT8:
            sums = [part.to(torch.float32).abs().max() for part in self.data.split(SLICE_ROWS)]
            return torch.stack(sums) * (1.0 if self.scale is None else self.scale.max())
        if self.format in BLOCKS:
            return block_scales(self.data, self.format)
        return self.scale  # whole numbers are always finite


def block_bytes(shape: torch.Size, stored: "Stored") -> int:
    """Bytes of a quantised weight of `shape` in memory."""
    if stored.format in BLOCKS:
        block = BLOCKS[stored.format]
        return shape.numel() // block.values * block.num_bytes
    return shape.numel() + (4 * shape[0] if stored.scale else 0)


@dataclass(frozen=True)
class Stored:
    """The format of one weight in a file, and the name of its scale there."""

    format: str
    scale: str | None


def find_quantized(file: WeightFile) -> tuple[dict[str, Stored], set[str]]:
    """The quantised tensors of a file by name, and the names of what only explains them.

    Raises ValueError for formats that are not read and for scales that are missing.
    """
    found, beside = {}, {name for name in file.tensors if name.rpartition(".")[2] == OLD_MARK}
    noted = _comfy_notes(file)
    for name, info in file.tensors.items():
        layer, dot, leaf = name.rpartition(".")
        stored = info.dtype if info.dtype in BLOCKS else STORED.get(info.dtype)
        note = noted.get(layer) if leaf == "weight" else None
        if note is not None:
            stored = _noted_format(file, name, note, stored)
        if stored is None:
            continue
        scales = [
            pattern.format(layer) for pattern in SCALES if dot and pattern.format(layer) in file.tensors
        ]
        if len(scales) > 1:
            raise ValueError(f"{file.path}: {name} has two scales, {' and '.join(scales)}; download it again")
        found[name] = Stored(stored, next(iter(scales), None))
        beside |= {pattern.format(layer) for pattern in (*SCALES, *NOTES)} & set(file.tensors)
    scaled = bool(noted) or any(stored.scale for stored in found.values())  # then all of them must be
    for name, stored in found.items():
        must = stored.format == "int8" or (stored.format in FLOAT8 and scaled)
        matrix = len(file.tensors[name].shape) > 1 or stored.format == "int8"
        if must and stored.scale is None and matrix:
            looked = ", ".join(pattern.format(name.removesuffix(".weight")) for pattern in SCALES)
            raise ValueError(
                f"{file.path}: {name} is stored in {stored.format}, but its scale is missing (looked for "
                f"{looked}); download the file again"
            )
    return found, beside


def _comfy_notes(file: WeightFile) -> Mapping[str, Any]:
    """ComfyUI's notes on quantised layers: in the header, or a tensor of bytes beside each weight."""
    notes = {}
    try:
        if "_quantization_metadata" in file.metadata:
            notes |= json.loads(file.metadata["_quantization_metadata"])["layers"]
        for name in file.tensors:
            if name.endswith(".comfy_quant"):
                notes[name.removesuffix(".comfy_quant")] = json.loads(bytes(file.read(name).tolist()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.path}: its note on quantised layers cannot be read ({error}); "
                         "download the file again") from error  # fmt: skip
    return notes


def _noted_format(file: WeightFile, name: str, note: Any, stored: str | None) -> str:
    asked = note.get("format") if isinstance(note, dict) else note
    format = COMFY_FORMATS.get(asked) if isinstance(asked, str) else None
    params = note.get("params") if isinstance(note, dict) else None
    details = {**note, **params} if isinstance(params, dict) else note if isinstance(note, dict) else {}
    if format is None or details.get("convrot"):
        found = "a rotated int8" if format else repr(asked)
        raise ValueError(
            f"{file.path}: {name} is quantised as {found}, which is not read here; accepted are "
            f"{', '.join(COMFY_FORMATS)}, GGUF ({', '.join(BLOCKS)}), or no quantisation"
        )
    if stored != format:
        raise ValueError(
            f"{file.path}: {name} is noted as {asked}, but stored in {file.tensors[name].dtype}; "
            "download the file again"
        )
    return format


def read_quantized(file: WeightFile, name: str, stored: Stored) -> QuantizedWeight:
    """Read a quantised weight; raises ValueError for a scale that does not fit or is not positive."""
    data = file.read(name)
    if isinstance(data, QuantizedWeight):
        return data
    scale = None if stored.scale is None else _row_scale(file, stored.scale, data.shape[0])
    return QuantizedWeight(data, scale, stored.format, data.shape)


def _row_scale(file: WeightFile, scale_name: str, rows: int) -> Tensor:
    """A scale as [] or [rows, 1]; one of three stands for a third of the rows."""
    scale = file.read(scale_name)
    if not scale.is_floating_point():
        raise ValueError(
            f"{file.path}: {scale_name} must hold floating-point numbers, not {scale.dtype}; "
            "download the file again"
        )
    scale = scale.float()
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{file.path}: {scale_name} must be positive and finite, and is not; download the file again"
        )
    count = scale.numel()
    if count == 1:
        return scale.reshape(())
    if count not in (3, rows) or rows % count or scale.squeeze().ndim != 1:
        raise ValueError(
            f"{file.path}: {scale_name} has shape {list(scale.shape)}; expected one scale, three for the "
            f"thirds of a layer, or one for each of the {rows} rows; download the file again"
        )
    return scale.reshape(count, 1).repeat_interleave(rows // count, dim=0)


def quantize(weight: Tensor, format: str, scale: Tensor | None = None) -> QuantizedWeight:
    """Quantise a float weight [rows, columns]: float8_e4m3fn with a scale for each row, or with the `scale`
    given, or a block format of GGUF. Raises ValueError for a format that is not in WRITTEN.
    """
    if format not in WRITTEN:
        raise ValueError(f"a weight can be quantised to {', '.join(WRITTEN)}, got {format!r}")
    if format in BLOCKS:
        return _quantize_blocks(weight, format)
    data = torch.empty(weight.shape, dtype=FLOAT8[format], device=weight.device)
    scales = (
        torch.empty(len(weight), 1, device=weight.device) if scale is None else scale.expand(len(weight), 1)
    )
    for rows, out, row_scale in zip(*(t.split(SLICE_ROWS) for t in (weight, data, scales)), strict=True):
        if scale is None:
            row_scale.copy_(float8_scale(rows.float().abs().amax(dim=1, keepdim=True)))
        out.copy_(rows.float() / row_scale)
    return QuantizedWeight(data, scales if scale is None else scale, format, weight.shape)


def float8_scale(largest: Tensor) -> Tensor:
    """The scale under which values of up to `largest` fill the range of float8_e4m3fn."""
    return torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)


def _quantize_blocks(weight: Tensor, format: str) -> QuantizedWeight:
    import gguf

    rows = []
    for values in weight.split(SLICE_ROWS):
        wide = values.float().numpy(force=True)
        if weight.shape[-1] % BLOCKS[format].values:  # stored flat where a row is no whole number of blocks
            wide = wide.reshape(-1)
        rows.append(torch.from_numpy(gguf.quants.quantize(wide, gguf.GGMLQuantizationType[format])))
    return QuantizedWeight(torch.cat(rows).to(weight.device), None, format, weight.shape)
