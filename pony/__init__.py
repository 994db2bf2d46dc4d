"""The pony: the whole family in miniature, its files laid out like the published ones.

It is trained on two small worlds (training/data/world.py); docs/pony.md is its model card.
"""

import functools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from torch import nn

from ..model.audio_vae import AudioVAE, published_config
from ..model.checkpoint import storage_dtype
from ..model.config import PONY, VARIANTS
from ..model.geometry import FILM_RATE
from ..model.stream_writer import write_tensors
from ..model.text_encoder import TextEncoder
from ..model.tiny_tokenizer import tiny_tokenizer
from ..model.transformer import JointTransformer
from ..model.video_decoder import VideoDecoder
from ..model.video_vae import VideoVAE
from ..model.weight_files import open_weights

FOLDER = Path(__file__).parent  # of the trained parts
FILES = {
    **{variant: f"{variant}/model.safetensors" for variant in VARIANTS},
    "text_encoder": "text_encoder/model.safetensors",
    "video_vae": "wan22_vae.safetensors",
    "video_decoder": "turbo_vae/model.safetensors",
    "audio_vae": "audio_vae/model.safetensors",
}


@functools.cache
def version() -> str:
    """Changes with the trained parts, and with the configurations that are written beside them."""
    digest = zlib.crc32(repr(PONY).encode())
    for path in _shipped().values():
        digest = zlib.crc32(path.read_bytes(), digest)
    return f"{digest:08x}"


def ensure_pony(folder: Path) -> Path:
    """Return `folder`, written first if it does not exist; the files appear all at once or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write_pony(work)
            work.replace(folder)
        except OSError:
            if not folder.exists():  # else another process was faster with the same files
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def pony_folder() -> Path:
    """The user's copy of the pony, written first if it is not there; raises ValueError where that fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "happyhorse"
    try:
        return ensure_pony(cache / f"pony-{version()}")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the pony cannot be written to {cache} ({error}); set XDG_CACHE_HOME") from error


def write_pony(folder: Path) -> None:
    """Copy all parts of the miniature into the existing `folder`, and write what belongs beside them."""
    for name, path in _shipped().items():
        (folder / FILES[name]).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / FILES[name])
        _write_companion(folder, name)


def _shipped() -> dict[str, Path]:
    """The files of the parts that the pack has; raises FileNotFoundError for one that it lacks.

    1080p_sr is made of 540p_sr where it is wanted.
    """
    paths = {name: FOLDER / file for name, file in FILES.items() if name != "1080p_sr"}
    for path in paths.values():
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, a part of the pony; install the node pack again")
    return paths


def build(name: str) -> nn.Module:
    """A part without weights; names are those of `FILES`."""
    if name in VARIANTS:
        return JointTransformer(PONY.transformers[name])
    kinds = {
        "text_encoder": TextEncoder,
        "video_vae": VideoVAE,
        "video_decoder": VideoDecoder,
        "audio_vae": AudioVAE,
    }
    return kinds[name](getattr(PONY, name))


def write_part(
    folder: Path, name: str, module: nn.Module, note: str, made_with: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a part under its published names, and what belongs beside it; the header has `made_with`.

    In float16; transformers in bfloat16 and float32, base in bfloat16 alone, as published. For its size,
    super-resolution has in float32 only what is no matrix. The same weights give the same bytes. Raises
    OSError where that fails.
    """
    part = "transformer" if name in VARIANTS else name
    dtype = torch.bfloat16 if part == "transformer" else torch.float16
    prefix = "pretransform.model." if part == "audio_vae" else ""
    stored = {
        key: dtype
        if name == "base" or (name.endswith("_sr") and tensor.ndim > 1)
        else storage_dtype(part, key, dtype)
        for key, tensor in module.state_dict().items()
    }
    state = {
        prefix + key: tensor.detach().to("cpu", stored[key]) for key, tensor in module.state_dict().items()
    }
    header = {"format": "pt", "config": json.dumps(module.config.to_dict()), "note": note}
    header["made_with"] = json.dumps(dict(made_with))
    if part == "transformer":
        header["variant"] = name
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state, header)
    _write_companion(folder, name)


def _write_companion(folder: Path, name: str) -> None:
    path = (folder / FILES[name]).parent
    if name == "text_encoder":
        tokenizer = tiny_tokenizer(PONY.text_encoder.vocab_size).to_str()
        (path / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    elif name == "audio_vae":
        pretransform = {"type": "autoencoder", "config": published_config(PONY.audio_vae)}
        published = {"sample_rate": FILM_RATE, "model": {"pretransform": pretransform}}
        (path / "model_config.json").write_text(json.dumps(published), encoding="utf-8")
    elif name == "540p_sr":
        _write_large_twin(folder)


def _write_large_twin(folder: Path) -> None:
    """Write 1080p_sr, the network of 540p_sr that sees windows of frames."""
    file, twin = open_weights(folder / FILES["540p_sr"]), folder / FILES["1080p_sr"]
    config = json.dumps(PONY.transformers["1080p_sr"].to_dict())
    twin.parent.mkdir(exist_ok=True)
    tensors = {name: file.read(name) for name in file.tensors}
    write_tensors(twin, tensors, {**file.metadata, "config": config, "variant": "1080p_sr"})
