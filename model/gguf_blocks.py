"""The block formats of GGUF as plain torch, so that weights can stay in blocks on any device.

A block is a few bytes that hold 32 or 256 values: float16 scales and small integers. The arithmetic and its
order are those of ggml (ggml-quants.c), in float32. Shapes: N blocks, V values of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE_VALUES = 1 << 22  # values worked out at a time: some 50 MB of intermediate tensors


@dataclass(frozen=True)
class Block:
    """A block format: how many values a block has and how many bytes it takes."""

    values: int
    num_bytes: int


BLOCKS: dict[str, Block] = {
    "Q4_0": Block(values=32, num_bytes=18),
    "Q5_0": Block(values=32, num_bytes=22),
    "Q8_0": Block(values=32, num_bytes=34),
    "Q4_K": Block(values=256, num_bytes=144),
    "Q5_K": Block(values=256, num_bytes=176),
    "Q6_K": Block(values=256, num_bytes=210),
}


def dequantize_blocks(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The values of whole blocks: uint8 [..., bytes] -> `dtype` [..., values], worked out in float32.

    Raises ValueError where the last axis is no whole number of blocks.
    """
    block = BLOCKS[kind]
    if data.dtype != torch.uint8 or not data.ndim or data.shape[-1] % block.num_bytes:
        raise ValueError(
            f"{kind} data must be uint8 with a multiple of {block.num_bytes} bytes in its last axis, "
            f"got {data.dtype} {list(data.shape)}"
        )
    shape = (*data.shape[:-1], data.shape[-1] // block.num_bytes * block.values)
    out = torch.empty(shape, dtype=dtype, device=data.device)
    blocks, values = data.reshape(-1, block.num_bytes), out.view(-1, block.values)
    step = math.ceil(SLICE_VALUES / block.values)
    for source, target in zip(blocks.split(step), values.split(step), strict=True):
        target.copy_(_VALUES[kind](source))
    return out


def block_scales(data: Tensor, kind: str) -> Tensor:
    """The float16 scales of all blocks, as float32: what can make a value NaN or infinite."""
    start, stop = _SCALES.get(kind, (0, 2))
    scales = data.reshape(-1, BLOCKS[kind].num_bytes)[:, start:stop]
    return scales.contiguous().view(torch.float16).float()


def _float(data_N2: Tensor) -> Tensor:
    """float16 as bytes [N, 2] -> float32 [N, 1]."""
    # a copy, as bytes in the middle of a block need not be aligned
    return data_N2.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(data: Tensor, width: int, count: int) -> Tensor:
    """Bit fields of bytes: uint8 [N, ..., B] -> [N, ..., count, B], the lowest `width` bits first."""
    shifts = torch.arange(count, dtype=torch.uint8, device=data.device) * width
    return data.unsqueeze(-2) >> shifts[:, None] & (1 << width) - 1


def _q8_0(data: Tensor) -> Tensor:
    return data[:, 2:].view(torch.int8).float() * _float(data[:, :2])


def _q4_0(data: Tensor) -> Tensor:
    low = _fields(data[:, 2:], 4, 2).flatten(1)  # 16 bytes: values 0-15, then 16-31
    return (low.float() - 8) * _float(data[:, :2])


def _q5_0(data: Tensor) -> Tensor:
    low = _fields(data[:, 6:], 4, 2).flatten(1)
    high = _fields(data[:, 2:6, None], 1, 8).flatten(1)  # bit i of 32 belongs to value i
    return ((low | high << 4).float() - 16) * _float(data[:, :2])


def _scaled_8(data: Tensor, q_N8V: Tensor) -> Tensor:
    """Values q [N, 8, 32] of a block that begins with two float16 and eight scales and minima of 6 bits."""
    a, b, c = data[:, 4:16].unflatten(1, (3, 4)).unbind(1)  # of these 12 bytes; c holds the rest of 4-7
    scales = torch.cat([a & 63, c & 15 | a >> 2 & 48], dim=1).float() * _float(data[:, :2])
    minima = torch.cat([b & 63, c >> 4 | b >> 2 & 48], dim=1).float() * _float(data[:, 2:4])
    return (q_N8V.float() * scales[..., None] - minima[..., None]).flatten(1)


def _q4_k(data: Tensor) -> Tensor:
    return _scaled_8(data, _fields(data[:, 16:].unflatten(1, (4, 32)), 4, 2).flatten(1, 2))


def _q5_k(data: Tensor) -> Tensor:
    low = _fields(data[:, 48:].unflatten(1, (4, 32)), 4, 2).flatten(1, 2)
    high = _fields(data[:, 16:48], 1, 8)  # bit i of 32 bytes belongs to the i-th 32 values
    return _scaled_8(data, low | high << 4)


def _q6_k(data: Tensor) -> Tensor:
    low = _fields(data[:, :128].unflatten(1, (2, 64)), 4, 2).reshape(-1, 8, 32)
    high = _fields(data[:, 128:192].unflatten(1, (2, 32)), 2, 4).reshape(-1, 8, 32)
    scales = data[:, 192:208].view(torch.int8).float() * _float(data[:, 208:])
    values = (low | high << 4).float() - 32
    return (values.reshape(-1, 16, 16) * scales[..., None]).flatten(1)


# bytes of a block that are float16, where they are not the first two
_SCALES = {"Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}

# one slice of blocks: uint8 [N, bytes] -> float32 [N, V]
_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
