"""Files of tensors on disk: safetensors (one file or shards with an index), GGUF, plain pickled dictionaries.

Opening one reads names, shapes and metadata only; tensors are read one by one.
"""

import json
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
IN_FOLDERS = (".safetensors", ".gguf", *PICKLES)  # whose weights are read from a folder
INDEX = "*.safetensors.index.json"
TOKENIZER, TURBO_CONFIG, AUDIO_CONFIG = "tokenizer.json", "Turbo*.json", "model_config.json"  # beside weights
LARGEST_POINTER = 1024  # bytes of a file that Git LFS puts in place of a large one
ACCEPTED = (
    "a .safetensors or .gguf file, a folder of shards with model.safetensors.index.json, "
    "or a .pth/.ckpt of tensors"
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class WeightFile(ABC):
    """Named tensors of one checkpoint; `path` is what the user gave, `metadata` the header's strings.

    `absent` holds the tensors that an index promises in shards that are not there, and these shards' names.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    absent: Mapping[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, in the dtype of the file; it may be backed by the file itself."""


def open_weights(path: Path) -> WeightFile:
    """Open a checkpoint file or folder; raises FileNotFoundError or ValueError that say what is wrong and the
    cure.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give {ACCEPTED}")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".zst":
        raise ValueError(f"{path} is compressed; decompress it first: zstd -d {path}")
    if path.suffix in (".safetensors", ".sft"):
        return SafetensorsFile(path, {path: []})
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix in PICKLES:
        return PickledFile(path)
    raise ValueError(f"{path} is not a checkpoint this program reads; give {ACCEPTED}")


def files_of(path: Path) -> list[Path]:
    """The files that may be read of a checkpoint, of a folder or of a file with what may lie beside it."""
    folder, names = (path, (INDEX,)) if path.is_dir() else (path.parent, ())
    files = {file for name in (*names, TOKENIZER, TURBO_CONFIG, AUDIO_CONFIG) for file in folder.glob(name)}
    files |= {file for file in path.iterdir() if file.suffix in IN_FOLDERS} if path.is_dir() else {path}
    return sorted(file for file in files if file.is_file())


def _open_gguf(path: Path) -> WeightFile:
    from .gguf_file import GgufFile  # which builds on this file

    return GgufFile(path)


def _open_folder(folder: Path) -> WeightFile:
    indexes = sorted(folder.glob(INDEX))
    if len(indexes) == 1:
        return SafetensorsFile(folder, _shards(indexes[0]))
    files = sorted(file for file in folder.iterdir() if file.suffix in IN_FOLDERS)
    if len(files) == 1:
        file = files[0]
        if file.suffix == ".gguf":
            return _open_gguf(file)
        return PickledFile(file) if file.suffix in PICKLES else SafetensorsFile(folder, {file: []})
    if compressed := sorted(folder.glob("*.zst")):
        raise ValueError(
            f"{folder} holds compressed shards ({compressed[0].name}, ...); {_decompress(folder)}"
        )
    found = ", ".join(file.name for file in files[:3]) or "no checkpoint file"
    raise ValueError(
        f"{folder} must hold one checkpoint, or shards with one index; found {found}; name the file"
    )


def _shards(index: Path) -> dict[Path, list[str]]:
    """The shards an index names, with the tensors it promises in each."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {index.parent / name: [] for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            shards[index.parent / name].append(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error}); download it again") from error
    if any(shard.parent != index.parent for shard in shards):
        raise ValueError(f"{index} names shards outside its folder; such an index is not read")
    if any(not shard.exists() and shard.with_name(shard.name + ".zst").exists() for shard in shards):
        raise ValueError(f"{index.parent} holds compressed shards; {_decompress(index.parent)}")
    return shards


def _decompress(folder: Path) -> str:
    return f"decompress them first: zstd -d {folder}/*.zst"


class SafetensorsFile(WeightFile):
    """One or more safetensors files that together hold a checkpoint; shards are opened when first needed."""

    def __init__(self, path: Path, shards: Mapping[Path, list[str]]) -> None:
        self.path = path
        self.metadata, self.tensors, self.absent, self._shard_of, self._open = {}, {}, {}, {}, {}
        for shard, promised in shards.items():
            if not shard.exists():
                self.absent |= dict.fromkeys(promised, shard.name)
                continue
            header, metadata = _read_header(shard)
            self.metadata |= metadata
            self.tensors |= header
            self._shard_of |= dict.fromkeys(header, shard)

    def read(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        if shard not in self._open:
            self._open[shard] = _safe_open(shard)
        try:
            return self._open[shard].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{shard} is damaged at {name} ({error}); download it again") from error


def _safe_open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if file.stat().st_size < LARGEST_POINTER and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} only points to the real file; fetch that with: git lfs pull") from error
        raise ValueError(
            f"{file} is damaged or not a safetensors file ({error}); download it again"
        ) from error


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    _safe_open(file)  # checks the header against the length of the file
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = header.pop("__metadata__", None) or {}
    return {
        name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()
    }, metadata


class PickledFile(WeightFile):
    """A dictionary of tensors saved by torch; anything that is not data is refused, nothing in it is run."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata, self.absent = path, {}, {}
        self._state = _flatten(_unpickle(path), path)
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    def read(self, name: str) -> Tensor:
        return self._state[name]


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual file, which is refused below if it is no use
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged: it was not loaded, for it can run code; "
            "use one converted to safetensors"
        ) from error
    except Exception as error:  # damage shows as any kind, IndexError and AssertionError among them
        reason = str(error).partition("\n")[0] or "it ends early"
        raise ValueError(f"{path} is damaged or not a torch file ({reason}); download it again") from error


def _is_zip(path: Path) -> bool:
    # only the zip form, torch's own since 1.6, can be read tensor by tensor
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def _flatten(value: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in a pickle: under `ema_state_dict` or `state_dict`, else the top level."""
    for key in ("ema_state_dict", "state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    entries = value.items() if isinstance(value, Mapping) else ()
    tensors = {name: item for name, item in entries if isinstance(name, str) and isinstance(item, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no dictionary of tensors; give {ACCEPTED}")
    return tensors
