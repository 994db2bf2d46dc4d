"""The T5Gemma encoder as the host's CLIP."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..model.checkpoint import Checkpoint, check_finite, check_names, load_tokenizer, open_checkpoint
from ..model.config import TextEncoderConfig
from ..model.geometry import FilmShape
from ..model.prompt import TextStates, cut_text, encode_tokens, tokens_of
from ..model.prompt import Tokenizer as CoreTokenizer
from ..model.quant import QuantizedWeight
from ..model.text_encoder import TextEncoder
from ..sampler.activations import activations
from .model import default_compute_dtype
from .operations import operations
from .quantized import CANNOT_SAVE, to_host

WEIGHT_DTYPES = {"default": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
NAME = "t5gemma"
ANY_SHAPE = FilmShape(32, 32, 6)


class Tokenizer:
    """The host's face of the core's tokenizer: whole prompts, no weights in brackets, no padding."""

    def __init__(self, tokenizer: CoreTokenizer, quantized: bool) -> None:
        self.core, self.quantized = tokenizer, quantized

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_: Any
    ) -> dict[str, list[list[tuple[Any, ...]]]]:
        """Return {"t5gemma": [[(token, 1.0), ...]]}; raises ValueError for a blank prompt."""
        tokens, _offsets = tokens_of(self.core, text)
        return {NAME: [[(t, 1.0, i) if return_word_ids else (t, 1.0) for i, t in enumerate(tokens)]]}

    def untokenize(self, pairs: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
        """Pair each token with its text."""
        return [(pair, self.core.text_of(pair[0])) for pair in pairs]

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the tokenizer lies beside the weights. ComfyUI asks for it when it saves a CLIP: raises
        ValueError where that cannot be done.
        """
        if self.quantized:
            raise ValueError(f"clip: {CANNOT_SAVE}")
        return {}


class TextEncoderModel(nn.Module):
    """What the host loads, moves and calls as a text encoder."""

    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            self.transformer = TextEncoder(config, operations(comfy.ops.manual_cast))
        self.dtypes = {dtype}
        self._device: torch.device | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Take the device to run on; there are no other options."""
        self._device = options.get("execution_device", self._device)

    def reset_clip_options(self) -> None:
        """Forget the device."""
        self._device = None

    def memory_estimation_function(self, tokens: Any, device: torch.device | None = None) -> int:
        """Bytes that encoding needs beside the weights."""
        del tokens
        dtype = next(iter(self.dtypes))
        return int(activations("text_encoder", self.transformer.config, ANY_SHAPE, dtype, device))

    def encode_token_weights(self, tokens: dict[str, list[Any]]) -> tuple[Tensor, None]:
        """Return text states [1, n, C] and no pooled output."""
        ids = [pair[0] for pair in tokens[NAME][0]]
        states = encode_tokens(self.transformer, ids, self._device)
        return states.to(comfy.model_management.intermediate_device()), None

    def load_sd(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take the tensors of the encoder, by its own names."""
        result = self.transformer.load_state_dict(state, strict=True, assign=True)
        return result.missing_keys, result.unexpected_keys


def load_clip(path: Path, dtype_name: str = "default", device: str = "default") -> comfy.sd.CLIP:
    """Load a T5Gemma encoder and its tokenizer as a CLIP; raises FileNotFoundError or ValueError, saying the
    cure.

    `device` 'cpu' keeps it on the CPU.
    """
    clip = _load(path, dtype_name, device)
    clip.patcher.cached_patcher_init = (_load_patcher, (path, dtype_name, device))
    return clip


def _load_patcher(path: Path, dtype_name: str, device: str, disable_dynamic: bool = False) -> Any:
    return _load(path, dtype_name, device, disable_dynamic).patcher


def _load(path: Path, dtype_name: str, device: str, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    checkpoint = open_checkpoint(path, "text_encoder")
    check_names(checkpoint, checkpoint.build().state_dict())
    tokenizer = load_tokenizer(checkpoint)
    dtype = WEIGHT_DTYPES[dtype_name] or default_compute_dtype()
    target = comfy.supported_models_base.ClipTarget(
        lambda **_: Tokenizer(tokenizer, bool(checkpoint.quantized)), TextEncoderModel
    )
    target.params = {"config": checkpoint.config}
    cpu = torch.device("cpu")
    options = {"load_device": cpu, "offload_device": cpu} if device == "cpu" else {}
    # its tensors are taken as they lie in the file, so it starts where they do
    options |= {"dtype": dtype, "initial_device": cpu}
    return comfy.sd.CLIP(
        target, parameters=checkpoint.parameters, state_dict=[_read_state(checkpoint, dtype)],
        model_options=options, disable_dynamic=disable_dynamic,
    )  # fmt: skip


def _read_state(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    bar = comfy.utils.ProgressBar(len(checkpoint.names))
    state = {}
    for own in checkpoint.names:
        tensor = checkpoint.read(own)
        if not isinstance(tensor, QuantizedWeight):
            tensor = tensor.to(dtype)
        elif checkpoint.keeps_quantized(own):
            check_finite(tensor.bounds(), own, checkpoint)
            tensor = to_host(tensor, dtype)
        else:
            tensor = tensor.dequantize(dtype)
        state[own] = tensor
        bar.update(1)
    return state


def check_clip(clip: Any) -> TextEncoderModel:
    """The model of a CLIP; raises ValueError for one of another family."""
    model = getattr(clip, "cond_stage_model", clip)
    if not isinstance(model, TextEncoderModel):
        found = "nothing" if model is None else type(model).__name__
        raise ValueError(
            f"clip: a T5Gemma encoder is needed, got {found}; connect HappyHorse Load Text Encoder"
        )
    return model


def encode(clip: comfy.sd.CLIP, prompt: str, socket: str = "prompt") -> tuple[list[Any], TextStates]:
    """Encode a prompt as the command line does; returns CONDITIONING and what was encoded.

    Raises ValueError for a blank prompt and for a CLIP of another family.
    """
    check_clip(clip)
    try:
        _tokens, offsets = tokens_of(clip.tokenizer.core, prompt)
    except ValueError as error:
        raise ValueError(f"{socket}: {error}") from error
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return conditioning, TextStates(conditioning[0][0], len(offsets), cut_text(prompt, offsets))
