"""Checkpoints on disk -> modules: built on the meta device, checked strictly, filled tensor by tensor."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import audio_vae, video_decoder
from .audio_vae import AudioVAE
from .config import (
    MAGIHUMAN,
    VARIANTS,
    AudioVAEConfig,
    Config,
    TextEncoderConfig,
    TransformerConfig,
    VideoDecoderConfig,
    VideoVAEConfig,
)
from .key_maps import KEY_MAPS, recognise
from .prompt import Tokenizer
from .rope import rope_bands
from .text_encoder import TextEncoder
from .transformer import JointTransformer
from .video_decoder import VideoDecoder
from .video_vae import VideoVAE
from .weight_files import WeightFile, open_weights

BLOCK_LINEAR = re.compile(r"^block\..*\.(linear_qkv|linear_proj|up_gate_proj|down_proj)\.weight$")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: which part it is, its configuration, and for a transformer its variant.

    `names` maps our tensor names to the file's.
    """

    file: WeightFile
    part: str
    config: Config
    variant: str | None
    names: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def label(self) -> str:
        """What it is, in words."""
        return " ".join(filter(None, (self.variant, _words(self.part))))

    @property
    def dtypes(self) -> set[str]:
        return {self.file.tensors[name].dtype for name in self.names.values()}

    @property
    def parameters(self) -> int:
        return sum(torch.Size(self.file.tensors[name].shape).numel() for name in self.names.values())

    def build(self, compute_dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The module on the meta device."""
        with torch.device("meta"):
            if self.part == "transformer":
                return JointTransformer(self.config, compute_dtype=compute_dtype)
            return NETWORKS[self.part](self.config)


NETWORKS: Mapping[str, Callable[[Any], nn.Module]] = {
    "transformer": JointTransformer,
    "text_encoder": TextEncoder,
    "video_vae": VideoVAE,
    "video_decoder": VideoDecoder,
    "audio_vae": AudioVAE,
}
CONFIGS: Mapping[str, type[Config]] = {
    "transformer": TransformerConfig,
    "text_encoder": TextEncoderConfig,
    "video_vae": VideoVAEConfig,
    "video_decoder": VideoDecoderConfig,
    "audio_vae": AudioVAEConfig,
}


def open_checkpoint(path: Path, part: str | None = None, variant: str | None = None) -> Checkpoint:
    """Open a checkpoint and work out what it is.

    `part` is what is expected, `variant` what a transformer is said to be; the header's metadata, then the file's
    name decide otherwise. Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    file = open_weights(path)
    listed = [*file.tensors, *file.absent]
    found = recognise(listed)
    if found is None or part not in (None, found):
        first = ", ".join(listed[:3]) or "none"
        is_a = f"a {_words(found)}" if found else f"something else ({len(listed)} tensors: {first}, ...)"
        raise ValueError(f"{path} is {is_a}, expected a {_words(part or 'known part')}; give the file of that part")
    names = KEY_MAPS[found].own_names(listed)
    if missing := sorted({file.absent[name] for name in names.values() if name in file.absent}):
        shown = ", ".join(missing[:3])
        raise FileNotFoundError(f"{path}: {len(missing)} of its shards are missing ({shown}); download them")
    variant = _variant(file, variant) if found == "transformer" else None
    return Checkpoint(file, found, _config(file, found, variant), variant, names)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _variant(file: WeightFile, asked: str | None) -> str:
    stored = file.metadata.get("variant")
    if asked is not None and asked not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {asked!r}")
    if stored is not None:
        if asked not in (None, stored):
            raise ValueError(f"{file.path} says it is the variant {stored!r}, not {asked!r}; give the other file")
        return stored
    if asked is not None:
        return asked
    for name in (file.path.stem, file.path.parent.name):
        if len(found := [v for v in VARIANTS if re.search(v.removesuffix("_sr"), name.lower())]) == 1:
            return found[0]
    raise ValueError(
        f"cannot tell which variant {file.path} is; say so with --variant ({', '.join(VARIANTS)}), "
        "or put the variant into the file's or folder's name"
    )


def _config(file: WeightFile, part: str, variant: str | None) -> Config:
    """From the header; else from the published JSON beside the file; else the published model's numbers."""
    try:
        if "config" in file.metadata:
            return CONFIGS[part].from_dict(json.loads(file.metadata["config"]))
        folder = file.path if file.path.is_dir() else file.path.parent
        if part == "audio_vae" and (beside := folder / "model_config.json").exists():
            return audio_vae.from_published(json.loads(beside.read_text(encoding="utf-8")))
        if part == "video_decoder" and len(found := list(folder.glob("Turbo*.json"))) == 1:
            return video_decoder.from_published(json.loads(found[0].read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file.path}: its configuration cannot be used: {error}") from error
    published: dict[str, Config] = {
        "text_encoder": MAGIHUMAN.text_encoder,
        "video_vae": MAGIHUMAN.video_vae,
        "video_decoder": MAGIHUMAN.video_decoder,
        "audio_vae": MAGIHUMAN.audio_vae,
    }
    return MAGIHUMAN.transformers[variant] if part == "transformer" else published[part]


def check_names(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError where tensors are missing, unknown or of another shape, with counts and the first of each."""
    optional = set(KEY_MAPS[checkpoint.part].optional)
    shapes = {own: checkpoint.file.tensors[name].shape for own, name in checkpoint.names.items()}
    problems = {
        "missing": [name for name in expected if name not in shapes and name not in optional],
        "unknown": [name for name in shapes if name not in expected],
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
             for what, names in problems.items() if names]  # fmt: skip
    if found:
        label = checkpoint.label
        raise ValueError(
            f"{checkpoint.path} does not fit the {label}: of {len(expected)} tensors {'; '.join(found)}; "
            "check that the file is complete and of this model"
        )


def load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu", layers_on_cpu: bool = False
) -> nn.Module:
    """Load a module, ready for inference: one tensor at a time is read, cast and moved to `device`.

    `dtype` is that of the transformer's block linears (all else of it is float32) or of all weights of another part.
    With `layers_on_cpu` the weights of its layers stay in CPU memory. Raises ValueError for tensors that do not fit
    or are not finite.
    """
    module = checkpoint.build(dtype)
    expected = module.state_dict()
    check_names(checkpoint, expected)
    state = {}
    for own in expected:
        home = torch.device("cpu") if layers_on_cpu and re.match(r"(block\.)?layers\.", own) else device
        if own not in checkpoint.names:
            state[own] = rope_bands(checkpoint.config.head_dim).to(home)  # the one optional tensor
            continue
        stored = checkpoint.file.read(checkpoint.names[own])
        tensor = stored.to(home, storage_dtype(checkpoint.part, own, dtype))
        _check_finite(tensor, own, checkpoint.path)
        state[own] = tensor
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def storage_dtype(part: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor is kept in: the published mixed policy for the transformer, `dtype` elsewhere."""
    if part == "transformer" and not BLOCK_LINEAR.match(name):
        return torch.float32
    return dtype


def _check_finite(tensor: Tensor, name: str, path: Path) -> None:
    # minimum and maximum carry NaN and infinity, and need no memory of the tensor's size
    if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor)):
        raise ValueError(f"{path}: {name} holds NaN or infinite values; the file is damaged, download it again")


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a text encoder: in the file's header, or tokenizer.json beside it."""
    if "tokenizer" in checkpoint.file.metadata:
        return Tokenizer.from_json(checkpoint.file.metadata["tokenizer"], str(checkpoint.path))
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    beside = folder / "tokenizer.json"
    if not beside.exists():
        raise FileNotFoundError(f"{beside} does not exist; put the text encoder's tokenizer.json there")
    return Tokenizer.from_file(beside)


def describe(path: Path) -> str:
    """One paragraph on a checkpoint: part, variant, dtypes, parameters, and what is missing or unknown."""
    checkpoint = open_checkpoint(path)
    try:
        check_names(checkpoint, checkpoint.build().state_dict())
        verdict = "complete"
    except ValueError as error:
        verdict = str(error)
    dtypes = ", ".join(sorted(checkpoint.dtypes))
    size = f"{checkpoint.parameters:,} parameters in {len(checkpoint.names)} tensors"
    return f"{path}: {checkpoint.label}, {dtypes}, {size}, {verdict}"
