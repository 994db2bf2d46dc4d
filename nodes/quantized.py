"""Quantised weights inside the host: `model.quant.QuantizedWeight` as one of its quantised tensors.

The host moves, offloads and prefetches them like its own. Patches, such as LoRAs, are added to the values
whenever a layer computes: put back into few bits, small changes would be lost.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor import BaseLayoutParams
from torch import Tensor

from ..model.quant import WRITTEN, QuantizedWeight, quantize

LAYOUT = "HappyHorseLayout"
CANNOT_SAVE = (
    "quantised weights cannot be saved from here; use `happyhorse convert` and `happyhorse lora merge`, or "
    "load a bfloat16 file"
)


class Layout(QuantizedLayout):
    """How the host's quantised tensors hold ours: the stored data, and the rest in `Params`."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """The scale, or None; `orig_dtype` is what the values are worked out in."""

        format: str
        copies: int

        def _tensor_fields(self) -> list[str]:
            return [] if self.scale is None else ["scale"]

    @classmethod
    def quantize(
        cls, tensor: Tensor, format: str = "float8_e4m3fn", **_: Any
    ) -> tuple[Tensor, "Layout.Params"]:
        """Only for who replaces a weight for good; raises ValueError for formats that cannot be written."""
        if format not in WRITTEN:
            raise ValueError(
                f"a weight in {format} cannot be changed for good; load a file in bfloat16 or one of "
                f"{', '.join(WRITTEN)} for that"
            )
        weight = quantize(tensor, format)
        return weight.data, _params(weight, tensor.dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """The format, which stays."""
        return {"format": qtensor.params.format}

    @classmethod
    def dequantize(cls, qdata: Tensor, params: "Layout.Params") -> Tensor:
        """The values."""
        return _weight(qdata, params).dequantize(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
        """The stored data and the scale."""
        return qtensor._qdata, qtensor.params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: "Layout.Params") -> dict[str, Tensor]:
        """By the names they have in files."""
        return {"": qdata} | ({} if params.scale is None else {"_scale": params.scale})


register_layout_class(LAYOUT, Layout)


def to_host(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedTensor:
    """A quantised weight for the host; its values are worked out in `dtype`."""
    return QuantizedTensor(weight.data, LAYOUT, _params(weight, dtype))


def to_core(tensor: Tensor) -> QuantizedWeight | None:
    """What `to_host` was given; None for any other tensor."""
    if not isinstance(tensor, QuantizedTensor) or tensor._layout_cls != LAYOUT:
        return None
    return _weight(tensor._qdata, tensor.params)


def _params(weight: QuantizedWeight, dtype: torch.dtype) -> Layout.Params:
    return Layout.Params(weight.scale, dtype, tuple(weight.shape), weight.format, weight.copies)


def _weight(data: Tensor, params: Layout.Params) -> QuantizedWeight:
    return QuantizedWeight(data, params.scale, params.format, torch.Size(params.orig_shape), params.copies)


class _Patch:
    """One patch of the host, as a function of the values of a weight."""

    def __init__(self, key: str, patch: tuple[Any, ...]) -> None:
        self.key, self.patch = key, patch

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight([self.patch], weight, self.key, intermediate_dtype=weight.dtype)


class PatchesAtUse:
    """Makes a patcher of the host apply patches of quantised weights whenever these are used."""

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Add patches as any patcher does; returns the keys that were known."""
        plain, at_use = {}, []
        for given, patch in patches.items():
            key, offset, function = (
                (*given, None, None)[:3] if isinstance(given, tuple) else (given, None, None)
            )
            if not self._is_quantized(key):
                plain[given] = patch
                continue
            at_use.append(given)
            if strength_patch or strength_model != 1.0:
                whole = (strength_patch, patch, strength_model, offset, function)
                self.add_weight_wrapper(key, _Patch(key, whole))
        known = super().add_patches(plain, strength_patch, strength_model)
        self.patches_uuid = uuid.uuid4()
        return [*known, *at_use]

    def clone(self, *arguments: Any, **options: Any) -> Any:
        """As the host's; one that is not dynamic any more is of this class, too."""
        clone = super().clone(*arguments, **options)
        if not isinstance(clone, PatchesAtUse):
            clone.__class__ = patcher_class(disable_dynamic=True)
        return clone

    def add_hook_patches(
        self, hook: Any, patches: Mapping[Any, Any], *strengths: float, **options: Any
    ) -> Any:
        """Raises ValueError where hooks shall change quantised weights, which these cannot do."""
        if any(self._is_quantized(key[0] if isinstance(key, tuple) else key) for key in patches):
            raise ValueError(
                "LoRA hooks change plain weights only, and this model's are quantised; put HappyHorse Load "
                "LoRA behind the model instead, or load a bfloat16 file"
            )
        return super().add_hook_patches(hook, patches, *strengths, **options)

    def get_key_patches(self, *arguments: Any, **options: Any) -> dict[str, list[Any]]:
        """The weights and their patches, for nodes that merge models."""
        found = super().get_key_patches(*arguments, **options)
        for key, wrappers in self.weight_wrapper_patches.items():
            if key in found:
                found[key] = [*found[key], *(w.patch for w in wrappers if isinstance(w, _Patch))]
        return found

    def state_dict_for_saving(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        """Raises ValueError where there are quantised weights, which ComfyUI's files have no form for."""
        if any(isinstance(weight, QuantizedTensor) for weight in self.model.parameters()):
            raise ValueError(f"model: {CANNOT_SAVE}")
        return super().state_dict_for_saving(*arguments, **options)

    def clone_has_same_weights(self, clone: Any, allow_multigpu: bool = False) -> bool:
        """Whether another clone computes with the same weights."""
        same = self.weight_wrapper_patches == clone.weight_wrapper_patches
        return same and super().clone_has_same_weights(clone, allow_multigpu)

    def _is_quantized(self, key: str) -> bool:
        try:
            return isinstance(comfy.utils.get_attr(self.model, key), QuantizedTensor)
        except AttributeError:
            return False


def patcher_class(disable_dynamic: bool) -> type:
    """The host's class of patcher, which it may replace when it starts, with patches at use."""
    patcher = comfy.model_patcher
    return _with_patches_at_use(patcher.ModelPatcher if disable_dynamic else patcher.CoreModelPatcher)


@cache
def _with_patches_at_use(host: type) -> type:
    return type(host.__name__, (PatchesAtUse, host), {})
