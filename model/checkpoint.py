"""Checkpoints on disk -> modules: built on the meta device, checked strictly, filled tensor by tensor."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..kernels.scaled_matmul import has_scaled_matmul
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
from .key_maps import KEY_MAPS, added, recognise
from .operations import Embedding, ModalityLinear
from .padding import pad_feed_forward
from .prompt import Tokenizer
from .quant import QuantizedWeight, Stored, WeightPatch, block_bytes, find_quantized, read_quantized
from .rope import rope_bands
from .text_encoder import TextEncoder
from .transformer import JointTransformer
from .video_decoder import VideoDecoder
from .video_vae import VideoVAE
from .weight_files import AUDIO_CONFIG, TOKENIZER, TURBO_CONFIG, WeightFile, open_weights

RENEW_CONFIG = "correct it, or download the file again"
LORA_TENSOR = re.compile(r"\.(lora_(A|B|up|down)|hada_w1_a|lokr_w1(_a)?|diff)(\.|$)")
LAYER = re.compile(r"(?:block\.)?layers\.(\d+)\.")
BLOCK_LINEAR = re.compile(r"^block\..*\.(linear_qkv|linear_proj|up_gate_proj|down_proj)\.weight$")
# the weights that stay as they are stored where a file has them quantised; others are few and small
QUANTIZABLE = {
    "transformer": BLOCK_LINEAR,
    "text_encoder": re.compile(r"^(embed_tokens|layers\..*_proj)\.weight$"),
}


class UnknownVariantError(ValueError):
    """A transformer's file does not tell which variant it is."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: which part it is, its configuration, and for a transformer its variant.

    `names` maps our tensor names to the file's; `quantized` says how the file stores those that are.
    """

    file: WeightFile
    part: str
    config: Config
    variant: str | None
    names: Mapping[str, str]
    quantized: Mapping[str, Stored]

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.file.path

    @property
    def label(self) -> str:
        """What it is, in words."""
        return " ".join(filter(None, (self.variant, _words(self.part))))

    @property
    def dtypes(self) -> set[str]:
        """What its tensors are stored in."""
        return {self.file.tensors[name].dtype for name in self.names.values()}

    @property
    def parameters(self) -> int:
        """How many values its tensors hold."""
        return sum(torch.Size(self.file.tensors[name].shape).numel() for name in self.names.values())

    def shape(self, own: str) -> torch.Size:
        """The shape of a tensor."""
        return torch.Size(self.file.tensors[self.names[own]].shape)

    def read(self, own: str) -> Tensor | QuantizedWeight:
        """Read a tensor as it is stored; raises ValueError for what is damaged."""
        name = self.names[own]
        if own in self.quantized:
            return read_quantized(self.file, name, self.quantized[own])
        tensor, more = self.file.read(name), added(name)
        return tensor.float() - more if more else tensor

    def keeps_quantized(self, own: str) -> bool:
        """Whether a tensor stays quantised once it is loaded."""
        return own in self.quantized and bool(self.part in QUANTIZABLE and QUANTIZABLE[self.part].match(own))

    def kept_bytes(self, own: str, dtype: torch.dtype) -> int:
        """Bytes that a tensor takes once it is loaded with `dtype`, as in `load`."""
        if self.keeps_quantized(own):
            return block_bytes(self.shape(own), self.quantized[own])
        return self.shape(own).numel() * storage_dtype(self.part, own, dtype).itemsize

    def build(
        self, compute_dtype: torch.dtype = torch.bfloat16, network: Callable[..., nn.Module] | None = None
    ) -> nn.Module:
        """The module on the meta device; raises ValueError where the configuration contradicts itself.

        `network` makes it from the configuration, where a host has a class of its own.
        """
        options = {"compute_dtype": compute_dtype} if self.part == "transformer" else {}
        try:
            with torch.device("meta"):
                return (network or NETWORKS[self.part])(self.config, **options)
        except Exception as error:  # which kind depends on the layer that cannot be built
            what = f"no {_words(self.part)} can be built from its configuration"
            raise ValueError(f"{self.path}: {what} ({error}); {RENEW_CONFIG}") from error


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
PUBLISHED_JSON: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Config]]] = {
    "video_decoder": (TURBO_CONFIG, video_decoder.from_published),
    "audio_vae": (AUDIO_CONFIG, audio_vae.from_published),
}


def open_checkpoint(path: Path, part: str | None = None, variant: str | None = None) -> Checkpoint:
    """Open a checkpoint and work out what it is.

    `part` is what is expected. A transformer's variant is that of the header, else of the file's or folder's
    name, else `variant`, which must not contradict these. Raises FileNotFoundError or ValueError naming the
    file and what is wrong with it.
    """
    file = open_weights(path)
    quantized, beside = find_quantized(file)
    listed = [name for name in (*file.tensors, *file.absent) if name not in beside]
    found = part if part and KEY_MAPS[part].prefix(listed) is not None else recognise(listed)
    if found is None and any(LORA_TENSOR.search(name) for name in listed):
        raise ValueError(
            f"{path} is a LoRA, not a checkpoint; give it to --lora or HappyHorse Load LoRA, or look into it "
            "with `happyhorse lora inspect`"
        )
    if found is None or part not in (None, found):
        first = f" ({', '.join(listed[:3])}, ...)" if listed else ""
        holds = f"the {_words(found)}" if found else f"{len(listed)} tensors of no known part{first}"
        wanted = _words(part) if part else f"one of {', '.join(map(_words, KEY_MAPS))}"
        raise ValueError(f"{path} holds {holds}; give the file of the part wanted here: {wanted}")
    names = KEY_MAPS[found].own_names(listed)
    if missing := sorted({file.absent[name] for name in names.values() if name in file.absent}):
        shown = ", ".join(missing[:3])
        raise FileNotFoundError(f"{path}: {len(missing)} of its shards are missing ({shown}); download them")
    variant = _variant(file, variant) if found == "transformer" else None
    stored = {own: quantized[name] for own, name in names.items() if name in quantized}
    return Checkpoint(file, found, _config(file, found, variant), variant, names, stored)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _variant(file: WeightFile, asked: str | None) -> str:
    stored = file.metadata.get("variant")
    sources = {"the variant asked for": asked, f"the variant in the header of {file.path}": stored}
    for what, given in sources.items():
        if given not in (None, *VARIANTS):
            raise ValueError(f"{what} must be one of {', '.join(VARIANTS)}, got {given!r}")
    found = stored or _named_variant(file.path.absolute())
    if found is None and asked is None:
        raise UnknownVariantError(
            f"cannot tell which variant {file.path} is; say so with --variant ({', '.join(VARIANTS)}), "
            "or put the variant into the file's or folder's name"
        )
    if found is not None and asked not in (None, found):
        source, cure = ("header", "") if stored else ("name", ", or rename it if the name is wrong")
        raise ValueError(
            f"{file.path} is the variant {found!r} by its {source}, but {asked!r} is asked for; "
            f"ask for {found!r} or give another file{cure}"
        )
    return found or asked


def _named_variant(path: Path) -> str | None:
    """The variant that a file's name gives, else its folder's; more than one is none."""
    for name in (path.name, path.parent.name):
        words = [v for v in VARIANTS if re.search(rf"(?<![a-z0-9]){v.removesuffix('_sr')}", name.lower())]
        if len(words) == 1:
            return words[0]
    return None


def _config(file: WeightFile, part: str, variant: str | None) -> Config:
    """From the header; else from the published JSON beside the file; else the published model's numbers."""
    source, text, read = file.path, file.metadata.get("config"), partial(_from_header, CONFIGS[part])
    if text is None and part in PUBLISHED_JSON:
        pattern, read = PUBLISHED_JSON[part]
        beside = list((file.path if file.path.is_dir() else file.path.parent).glob(pattern))
        if len(beside) == 1:
            source, text = beside[0], beside[0].read_bytes()
    if text is None:
        return MAGIHUMAN.transformers[variant] if part == "transformer" else getattr(MAGIHUMAN, part)
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"it must be a JSON object, got {str(values)[:40]!r}")
        return read(values)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{source}: its configuration cannot be used: {error}; {RENEW_CONFIG}") from error


def _from_header(kind: type[Config], values: Mapping[str, Any]) -> Config:
    for field in fields(kind):
        value, listed = values.get(field.name), get_args(field.type)  # a list is tuple[type, ...]
        one = listed[0] if listed else field.type
        accepted = (int, float) if one is float else (one,)
        items = value if listed and isinstance(value, list) else [value]
        wrong = isinstance(value, list) != bool(listed) or any(type(item) not in accepted for item in items)
        if field.name in values and wrong:
            wanted = f"a list of {one.__name__}" if listed else one.__name__
            raise ValueError(f"{field.name} must be {wanted}, got {value!r}")
    return kind.from_dict(values)


def check_names(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError where tensors are missing, unknown or of another shape, with counts and the first of
    each.
    """
    optional = set(KEY_MAPS[checkpoint.part].optional)
    shapes = {own: tuple(checkpoint.shape(own)) for own in checkpoint.names}
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
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layers_on_cpu: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
    network: Callable[..., nn.Module] | None = None,
    patches: Mapping[str, Sequence[WeightPatch]] = MappingProxyType({}),
) -> nn.Module:
    """Load a module, ready for inference: one tensor at a time is read, cast and moved to `device`.

    `dtype` is that of the transformer's block linears (all else of it is float32) or of all weights of
    another part; large quantised weights stay as they are stored. The weights of the layers from
    `layers_on_cpu` on stay in CPU memory. `progress` is told how many tensors of how many are there;
    `network` as in `Checkpoint.build`. `patches` by our name are merged into plain weights, and change
    quantised ones at every use. Raises ValueError for tensors that do not fit or are not finite.
    """
    module = checkpoint.build(dtype, network)
    expected = module.state_dict()
    check_names(checkpoint, expected)
    fast_float8 = has_scaled_matmul(torch.device(device))
    for done, own in enumerate(expected):
        progress(done, len(expected))
        layer = LAYER.match(own)
        stays = layer is not None and layers_on_cpu is not None and int(layer[1]) >= layers_on_cpu
        home = torch.device("cpu") if stays else device
        if own in checkpoint.names:
            changes = tuple(patches.get(own, ()))
            value = _read_for_use(checkpoint, own, dtype, home, changes)
            _place(module, own, value, changes, dtype, fast_float8)
        else:
            bands = rope_bands(checkpoint.config.head_dim)  # the one optional tensor
            _place(module, own, bands.to(home), (), dtype, fast_float8)
    if checkpoint.part == "transformer" and torch.device(device).type == "cuda" and dtype.itemsize == 2:
        for layer in module.block.layers:
            pad_feed_forward(layer)
    progress(len(expected), len(expected))
    return module.requires_grad_(False).eval()


def _read_for_use(
    checkpoint: Checkpoint,
    own: str,
    dtype: torch.dtype,
    home: torch.device | str,
    patches: Sequence[WeightPatch],
) -> Tensor | QuantizedWeight:
    """A tensor on its device: as it is stored if it stays quantised, else in its dtype, with its patches."""
    stored, kept = checkpoint.read(own), storage_dtype(checkpoint.part, own, dtype)
    if isinstance(stored, QuantizedWeight):
        stored = stored.to(home)
        if checkpoint.keeps_quantized(own):
            check_finite(stored.bounds(), own, checkpoint)
            return stored
        stored = stored.dequantize(kept)
    tensor = stored.to(home, torch.float32 if patches else kept)
    check_finite(tensor, own, checkpoint)
    for patch in patches:
        tensor = patch(tensor if tensor is not stored else tensor.clone())
    tensor = tensor.to(kept)
    if patches:
        check_finite_after_lora(tensor, own, checkpoint)
    return tensor


def _place(
    module: nn.Module,
    own: str,
    value: Tensor | QuantizedWeight,
    patches: Sequence[WeightPatch],
    dtype: torch.dtype,
    fast_float8: bool,
) -> None:
    """Put a tensor into its module; `patches` are for quantised ones, the others have them already."""
    owner, _, leaf = own.rpartition(".")
    owner = module.get_submodule(owner)
    if isinstance(value, QuantizedWeight):
        if fast_float8 and isinstance(owner, ModalityLinear):
            value = value.aligned(owner.modalities)
        device = value.data.device
        owner.hold(value, [p.to(device) if hasattr(p, "to") else p for p in patches])
        if isinstance(owner, Embedding):
            owner.compute_dtype = dtype
    elif leaf in dict(owner.named_buffers(recurse=False)):
        setattr(owner, leaf, value)
    else:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def storage_dtype(part: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor is kept in: the published mixed policy for the transformer, `dtype` elsewhere."""
    if part == "transformer" and not BLOCK_LINEAR.match(name):
        return torch.float32
    return dtype


def _is_finite(tensor: Tensor) -> bool:
    # minimum and maximum carry NaN and infinity, and need no memory of the tensor's size
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def check_finite(tensor: Tensor, name: str, checkpoint: Checkpoint) -> None:
    """Raise ValueError naming a tensor of a checkpoint that holds NaN or infinite values."""
    if not _is_finite(tensor):
        raise ValueError(
            f"{checkpoint.path}: {name} of the {checkpoint.label} holds NaN or infinite values; "
            "the file is damaged, download it again"
        )


def check_finite_after_lora(tensor: Tensor, name: str, checkpoint: Checkpoint) -> None:
    """Raise ValueError naming a tensor of a checkpoint that its LoRAs have made NaN or infinite."""
    if not _is_finite(tensor):
        raise ValueError(
            f"a LoRA makes {name} of the {checkpoint.label} NaN or infinite; lower its strength, or give "
            "another"
        )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a text encoder: in the file's header, or tokenizer.json beside it."""
    if "tokenizer" in checkpoint.file.metadata:
        return Tokenizer.from_json(checkpoint.file.metadata["tokenizer"], str(checkpoint.path))
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    beside = folder / TOKENIZER
    if not beside.exists():
        raise FileNotFoundError(
            f"{beside} does not exist; put the tokenizer.json of google/t5gemma-9b-9b-ul2 there, best with "
            "the encoder in a folder of its own"
        )
    return Tokenizer.from_file(beside)


def describe(path: Path) -> str:
    """One paragraph on a checkpoint: part, variant, dtypes, parameters, and what is missing or unknown."""
    try:
        checkpoint = open_checkpoint(path)
    except UnknownVariantError:  # names and shapes are the same in all of them
        checkpoint = replace(open_checkpoint(path, variant=VARIANTS[0]), variant="unknown variant of the")
    try:
        check_names(checkpoint, checkpoint.build().state_dict())
        verdict = "complete"
    except ValueError as error:
        verdict = str(error)
    if checkpoint.part == "text_encoder" and verdict == "complete":
        try:
            load_tokenizer(checkpoint)
        except (ValueError, FileNotFoundError) as error:
            verdict += f", but without a tokenizer: {error}"
    dtypes = ", ".join(sorted(checkpoint.dtypes))
    size = f"{checkpoint.parameters:,} parameters in {len(checkpoint.names)} tensors"
    return f"{path}: {checkpoint.label}, {dtypes}, {size}, {verdict}"
