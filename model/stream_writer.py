"""Large files of tensors written one tensor at a time: safetensors and GGUF.

Names, types and shapes are told beforehand; then every tensor is written once, in that order. The file
appears under its name when it is whole; until then it is a hidden one beside it, which a run that is killed
leaves behind and the next run for the same target removes.
"""

import contextlib
import errno
import glob
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from .file_lock import NO_LOCKS, try_lock

WINDOWS = os.name == "nt"  # where a file that is open can be neither replaced nor removed
Writer = TypeVar("Writer", bound="StreamWriter")
Entry = tuple[str, str, Sequence[int]]  # name, type, shape

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # as safetensors and GGUF call them


def check_target(target: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raise ValueError where writing `target` would harm the files or folders it is made of, or replace a
    file without being asked to.
    """
    entry = target.parent.resolve() / target.name  # replaced itself where it is a link
    for source in sources:
        files = [source, *source.iterdir()] if source.is_dir() else [source]
        if target.resolve() == source.resolve():
            raise ValueError(f"{target} is the source itself; give another name")
        if source.resolve() in (*entry.parents, *target.resolve().parents):
            raise ValueError(
                f"{target} lies in the source folder {source}, whose files must stay as they are; "
                "choose another folder"
            )
        if target.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"{target} is a file of the source {source}; choose another folder")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; give another name, or --overwrite to replace it")


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in the file, and what is written there."""

    offset: int
    num_bytes: int
    dtype: torch.dtype


class StreamWriter:
    """Writes `header`, then the tensors of `slots` in turn; all of it or nothing. Used in a `with` statement.

    Raises OSError naming the target where the disk is full or cannot be written to.
    """

    def __init__(self, path: Path, header: bytes, slots: Mapping[str, Slot], num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self._header, self._slots = header, slots
        self._waiting = list(reversed(slots))

    def __enter__(self: Writer) -> Writer:
        _remove_stale(self.path)
        with self._told():
            free = shutil.disk_usage(self.path.parent).free
            if free < self.num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._temporary, self._file = _open_locked(self.path)
        try:
            with self._told():
                self._file.write(self._header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Write a tensor, or the pieces that follow one another in it.

        Raises ValueError where it is not the next one, or of another dtype or size than was told.
        """
        if not self._waiting or name != self._waiting[-1]:
            wanted = self._waiting[-1] if self._waiting else "nothing more"
            raise ValueError(f"{name} is written out of turn; {self.path} takes {wanted} now")
        slot, written, found = self._slots[self._waiting.pop()], 0, set()
        with self._told():
            self._file.seek(slot.offset)
        for piece in [tensor] if isinstance(tensor, Tensor) else tensor:
            written += piece.nbytes
            found.add(piece.dtype)
            if found == {slot.dtype} and written <= slot.num_bytes:
                data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                with self._told():
                    self._file.write(data.data)
        if found - {slot.dtype} or written != slot.num_bytes:
            got = f"{', '.join(map(str, found))} and {written}"
            raise ValueError(
                f"{name} of {self.path} was to be {slot.dtype} and {slot.num_bytes} bytes, got {got}"
            )

    def fill_in(self, placeholder: str, value: str) -> None:
        """Put a `value` that only the end of the work tells in place of a `placeholder` in the metadata."""
        old, new = placeholder.encode(), value.encode()
        if len(old) != len(new) or self._header.count(old) != 1:
            raise ValueError(
                f"{placeholder!r} is not once in the metadata, or longer or shorter than {value!r}"
            )
        with self._told():
            self._file.seek(self._header.index(old))
            self._file.write(new)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        if self._waiting:
            raise ValueError(
                f"{self.path} is not whole: {len(self._waiting)} of its tensors were not written"
            )
        with self._told():
            self._file.truncate(self.num_bytes)  # the padding after the last tensor
            self._file.flush()
            os.fsync(self._file.fileno())
            if WINDOWS:
                self._file.close()
            self._temporary.replace(self.path)  # while locked, else it could be taken for a dead run's

    def _discard(self) -> None:
        """Close and remove the unfinished file; nothing is there any more after a success."""
        with contextlib.suppress(OSError):  # what could not be written is not wanted any more
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.path.parent).free
                reason += f" (it needs {self.num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free)"
            what = f"the file could not be written: {reason}; free some space or choose another folder"
            raise OSError(error.errno or errno.EIO, what, str(self.path)) from error


def _open_locked(path: Path) -> tuple[Path, io.BufferedRandom]:
    """A new hidden file beside `path`, locked for as long as it is open, where the file system has locks."""
    while True:
        temporary = path.with_name(f".{path.name[:48]}.{uuid.uuid4().hex}.unfinished")
        file = temporary.open("x+b")
        try:
            # another run may have taken it for a dead one's before it was locked; Windows keeps what is open
            removed = not try_lock(file) or (os.name == "posix" and not os.fstat(file.fileno()).st_nlink)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                return temporary, file  # no other run can lock it either, so none takes it for a dead run's
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        if not removed:
            return temporary, file
        file.close()


def _remove_stale(path: Path) -> None:
    """Remove what runs for this target left behind that ended early; a run that still goes on holds its
    lock.
    """
    for left in path.parent.glob(f".{glob.escape(path.name[:48])}.*.unfinished"):
        with contextlib.suppress(OSError):
            with left.open("rb") as file:
                if not try_lock(file):
                    continue
                if not WINDOWS:
                    left.unlink()
            left.unlink(missing_ok=True)


class SafetensorsWriter(StreamWriter):
    """Writes a safetensors file; `entries` are (name, dtype such as "BF16" or "F8_E4M3", shape)."""

    def __init__(
        self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        slots, offset = {}, 0
        sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, dtype, shape in entries}
        # the widest first, as the safetensors library does, so that each is aligned to its own size
        for name, dtype, _ in sorted(entries, key=lambda entry: -DTYPES[entry[1]].itemsize):
            slots[name] = Slot(offset, sizes[name], DTYPES[dtype])
            offset += sizes[name]
        described = {
            name: {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + sizes[name]]}
            for name, dtype, shape in entries
            for start in [slots[name].offset]
        }
        told = {"__metadata__": dict(metadata)} if metadata else {}
        text = json.dumps(told | described, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        placed = {name: _moved(slots[name], len(header)) for name, _, _ in entries}
        super().__init__(path, header, placed, len(header) + offset)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of tensors that are all there; errors as of `StreamWriter`."""
    entries = [(name, DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


class GgufStreamWriter(StreamWriter):
    """Writes a GGUF file; `entries` are (name, type such as "Q8_0" or "F32", shape).

    The data of a block type is uint8, the blocks one after another. A tensor whose rows are no whole number
    of blocks is stored as rows of 256 values with its own shape beside it, as ComfyUI-GGUF does it. The keys
    of `metadata` get the prefix `<arch>.`.
    """

    def __init__(
        self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], arch: str = "happyhorse"
    ) -> None:
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
        from gguf.gguf_writer import WriterState

        writer = GGUFWriter(None, arch)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for key, value in metadata.items():
            writer.add_string(f"{arch}.{key}", value)
        slots, offset = {}, 0
        for name, type_name, shape in entries:
            kind = GGMLQuantizationType[type_name]
            values, block_bytes = GGML_QUANT_SIZES[kind]
            stored, total = gguf_shape(shape, values), math.prod(shape)
            if stored != tuple(shape):
                writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in shape])
            size = total // values * block_bytes
            writer.add_tensor_info(name, stored, np.dtype(np.float32), size, raw_dtype=kind)
            slots[name] = Slot(offset, size, DTYPES.get(type_name, torch.uint8))
            offset += writer.ggml_pad(size, writer.data_alignment)
        writer.fout, writer.state = [io.BytesIO()], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = writer.fout[0].getvalue()
        header += bytes(-len(header) % writer.data_alignment)
        placed = {name: _moved(slot, len(header)) for name, slot in slots.items()}
        super().__init__(path, header, placed, len(header) + offset)


def gguf_shape(shape: Sequence[int], block: int) -> tuple[int, ...]:
    """The shape under which a tensor is stored in blocks of so many values.

    Raises ValueError where its values are no whole number of blocks.
    """
    if block == 1 or shape[-1] % block == 0:
        return tuple(shape)
    total = math.prod(shape)
    width = 256 if total % 256 == 0 else block
    if total % width:
        raise ValueError(f"{list(shape)} values are no whole number of blocks of {block}")
    return total // width, width


def _moved(slot: Slot, distance: int) -> Slot:
    return Slot(slot.offset + distance, slot.num_bytes, slot.dtype)
