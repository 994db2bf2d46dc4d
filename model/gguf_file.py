"""GGUF files: header, dense tensors and blocks, each tensor backed by a mapping of the file.

The `gguf` package's own reader makes an array of every token of an embedded vocabulary (10 s and 670 MB for
256,000 of them), so the header is read here. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gguf_blocks import BLOCKS
from .quant import QuantizedWeight
from .weight_files import TensorInfo, WeightFile

OWN_PREFIX = "happyhorse."  # of the metadata that this program writes
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors stored flat, as ComfyUI-GGUF writes them
VERSIONS = (2, 3)
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {
    0: "F32", 1: "F16", 30: "BF16",
    2: "Q4_0", 6: "Q5_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
}  # fmt: skip
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
AGAIN = "download it again"


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header describes it; `start` and `end` are bytes of the file."""

    info: TensorInfo
    start: int
    end: int


class GgufFile(WeightFile):
    """One GGUF file. `metadata` holds the strings of the keys `general.*`, and this program's own without
    their prefix. Raises ValueError naming the file, and the tensor where it is one, for what cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.absent = path, {}
        values, entries, data_start = _read_header(path)
        strings = {key: value for key, value in values.items() if isinstance(value, str)}
        self.metadata = {
            key.removeprefix(OWN_PREFIX): value
            for key, value in strings.items()
            if key.startswith((OWN_PREFIX, "general."))
        }
        self._stored = {
            name: _stored(path, name, entry, values.get(ORIGINAL_SHAPE + name), data_start)
            for name, entry in entries.items()
        }
        _check_extents(path, self._stored)
        self.tensors = {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """One tensor as it is stored: dense ones in the file's dtype, others in blocks."""
        stored = self._stored[name]
        shape, kind = torch.Size(stored.info.shape), stored.info.dtype
        # copy on write, as with safetensors, and one mapping for each tensor: a system that promises no more
        # memory than it has would refuse one of the whole file
        mapping = np.memmap(
            self.path, mode="c", offset=stored.start, shape=stored.end - stored.start, dtype=np.uint8
        )
        data = torch.from_numpy(mapping)
        if kind in DENSE:
            return data.view(DENSE[kind]).reshape(shape)
        block = BLOCKS[kind]
        if shape[-1] % block.values == 0:
            data = data.reshape(-1, shape[-1] // block.values * block.num_bytes)
        return QuantizedWeight(data, None, kind, shape)


@dataclass(frozen=True)
class _Entry:
    """A tensor's line in the header; `dims` has the innermost axis first."""

    dims: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """The header, read front to back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = memoryview(np.memmap(path, mode="r", dtype=np.uint8))
        self.at = 0

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        """The next `count` numbers of a struct code."""
        return struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize("<" + code)))

    def number(self, code: str) -> Any:
        """The next number of a struct code."""
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        """The next string."""
        try:
            return str(self._take(self.number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("a string that is not UTF-8") from error

    def value(self) -> Any:
        """The next value, behind its kind: a string, a number or a tuple of these."""
        kind = self.number("I")
        if kind != ARRAY:
            return self._one(kind)
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], count)
        return tuple(self._one(kind) for _ in range(count))

    def entry(self) -> _Entry:
        """The next tensor, behind its name."""
        count = self.number("I")
        if count > MAX_DIMENSIONS:
            raise self.damaged(f"a tensor of {count} dimensions")
        return _Entry(dims=self.numbers("Q", count), kind=self.number("I"), offset=self.number("Q"))

    def damaged(self, what: str) -> ValueError:
        """What to raise where the header cannot be right."""
        return ValueError(f"{self.path} is damaged: its header holds {what}; {AGAIN}")

    def _one(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in NUMBERS:
            raise self.damaged(f"a value of the unknown kind {kind}")
        return self.number(NUMBERS[kind])

    def _take(self, num_bytes: int) -> memoryview:
        taken = self.bytes[self.at : self.at + num_bytes]
        if len(taken) < num_bytes:
            raise ValueError(
                f"{self.path} ends in the middle of its header ({len(self.bytes):,} bytes); {AGAIN}"
            )
        self.at += num_bytes
        return taken


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Entry], int]:
    """The metadata, the tensors, and where in the file their data begins."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file, though it is named so; {AGAIN}")
    header = _Header(path)
    _, version = header.numbers("I", 2)
    if version not in VERSIONS:
        accepted = " and ".join(map(str, VERSIONS))
        raise ValueError(
            f"{path} is a GGUF file of version {version} or big-endian; versions {accepted} are read, "
            "little-endian: convert it anew"
        )
    num_tensors, num_values = header.numbers("Q", 2)
    values = {header.text(): header.value() for _ in range(num_values)}
    entries: dict[str, _Entry] = {}
    for _ in range(num_tensors):
        name = header.text()
        if name in entries:
            raise header.damaged(f"the tensor {name} twice")
        entries[name] = header.entry()
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise header.damaged(f"the alignment {alignment!r}, which must be a multiple of 8")
    if misplaced := [name for name, entry in entries.items() if entry.offset % alignment]:
        raise header.damaged(f"a place for {misplaced[0]} that is no multiple of {alignment}")
    return values, entries, math.ceil(header.at / alignment) * alignment


def _stored(path: Path, name: str, entry: _Entry, original: Any, data_start: int) -> _Stored:
    """What the header says of one tensor, checked as far as one tensor can be."""
    if entry.kind not in TYPES:
        raise ValueError(
            f"{path}: {name} is stored as {_type_name(entry.kind)}, which is not read; "
            f"use a file of {', '.join(TYPES.values())}"
        )
    kind, shape, count = TYPES[entry.kind], entry.dims[::-1], math.prod(entry.dims)
    block = BLOCKS.get(kind)
    if not count or (block and (not entry.dims or entry.dims[0] % block.values)):
        rows = f"rows of a multiple of {block.values} values" if block else "at least one value"
        raise ValueError(
            f"{path} is damaged: {name} has the shape {list(shape)}, but {kind} needs {rows}; {AGAIN}"
        )
    if original is not None:
        whole = isinstance(original, tuple) and all(isinstance(n, int) and n > 0 for n in original)
        if not whole or math.prod(original) != count:
            raise ValueError(
                f"{path} is damaged: {name} holds {count:,} values, but the shape recorded for it is "
                f"{original}; {AGAIN}"
            )
        shape = original
    size = count // block.values * block.num_bytes if block else count * DENSE[kind].itemsize
    start = data_start + entry.offset
    return _Stored(TensorInfo(shape, kind), start, start + size)


def _type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType  # of use for this message only

    known = {member.value: member.name for member in GGMLQuantizationType}
    return known.get(kind, f"the unknown type {kind}")


def _check_extents(path: Path, tensors: dict[str, _Stored]) -> None:
    """Raise ValueError where a tensor reaches beyond the file or into the next one."""
    size = path.stat().st_size
    ordered = sorted(tensors.items(), key=lambda item: item[1].start)
    for name, stored in ordered:
        if stored.end > size:
            raise ValueError(
                f"{path} ends in the middle of {name}: it has {size:,} of at least {stored.end:,} bytes; "
                f"{AGAIN}"
            )
    for (name, stored), (following, after) in pairwise(ordered):
        if stored.end > after.start:
            info = stored.info
            raise ValueError(
                f"{path} is damaged: {name}, {info.dtype} {list(info.shape)}, reaches into {following}; "
                f"{AGAIN}"
            )
