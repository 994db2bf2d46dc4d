"""The leaf layers of every network. A host may pass a namespace of its own with the same names instead.

Contract of every leaf: it owns `weight` and perhaps `bias` (the weight-normalised convolutions of the audio
VAE, as published, `weight_g` and `weight_v` for the weight), and it computes in the dtype of its input,
whatever dtype its weights are stored in. A network therefore states its number formats by what it hands to a
leaf.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.convolution import SmallFilmConv3d
from .quant import QuantizedWeight, WeightPatch

Spans = tuple[tuple[int, int], ...]  # (start, stop) of the tokens of each modality: video, audio, text


def _cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


class QuantizableLeaf(nn.Module):
    """A leaf whose weight may be quantised: then `weight` is the stored data, and `weight_scale` its scale.

    `patches` change a quantised weight whenever it is used.
    """

    quantization: tuple[str, torch.Size, int] | None = None  # format, shape and copies of the weight
    patches: tuple[WeightPatch, ...] = ()

    def hold(self, weight: QuantizedWeight, patches: Iterable[WeightPatch] = ()) -> None:
        """Take a quantised weight in place of a plain one."""
        self.weight = nn.Parameter(weight.data, requires_grad=False)
        scale = None if weight.scale is None else nn.Parameter(weight.scale, requires_grad=False)
        self.register_parameter("weight_scale", scale)
        self.quantization = (weight.format, weight.shape, weight.copies)
        self.patches = tuple(patches)

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The weight as it is stored, if it is quantised."""
        if self.quantization is None:
            return None
        return QuantizedWeight(self.weight, self.weight_scale, *self.quantization)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight as the leaf computes with it."""
        if self.quantized is None:
            return self.weight.to(dtype)
        weight = self.quantized.dequantize(dtype)
        for patch in self.patches:
            weight = patch(weight)
        return weight


class Linear(QuantizableLeaf, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_in(x.dtype), _cast(self.bias, x))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _cast(self.weight, x), _cast(self.bias, x))


class Conv3d(SmallFilmConv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _cast(self.weight, x), _cast(self.bias, x))


class WeightNormConv1d(nn.Module):
    """A 1-D convolution with `weight = weight_g * weight_v / ||weight_v||`, the norm over all axes but the
    first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight_g = nn.Parameter(torch.empty(out_channels, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(_cast(self.weight_v, x), _cast(self.weight_g, x), 0)
        return F.conv1d(x, weight, _cast(self.bias, x), self.stride, self.padding, self.dilation)


class WeightNormConvTranspose1d(nn.Module):
    """The transposed twin of `WeightNormConv1d`; the first axis of its weight is the input channel."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight_g = nn.Parameter(torch.empty(in_channels, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(in_channels, out_channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(_cast(self.weight_v, x), _cast(self.weight_g, x), 0)
        return F.conv_transpose1d(x, weight, _cast(self.bias, x), self.stride, self.padding)


class Embedding(QuantizableLeaf, nn.Embedding):
    """Rows of `weight`, in the dtype they are stored in; quantised ones in `compute_dtype`."""

    compute_dtype = torch.bfloat16

    def forward(self, tokens: Tensor) -> Tensor:
        if self.quantized is None:
            return super().forward(tokens)
        return self.quantized.rows(tokens, self.compute_dtype)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    # a slice of a sequence would be taken for a batch of matrices, which is slower than one product
    return F.linear(x.flatten(0, 1), weight).unflatten(0, x.shape[:2])


def ready(
    weight: Tensor | QuantizedWeight, dtype: torch.dtype, device: torch.device, copies: int
) -> Tensor | QuantizedWeight:
    """What products in `dtype` are made with: values, or stored ones that the hardware multiplies."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return weight.aligned(copies) if weight.is_fast_for(dtype, device) else weight.dequantize(dtype)


def modality_linear(x: Tensor, weight: Tensor | QuantizedWeight, modalities: int, spans: Spans) -> Tensor:
    """The product of `ModalityLinear` with a weight that is `ready`."""
    spans = spans if modalities > 1 else ((0, x.shape[1]),)
    if isinstance(weight, QuantizedWeight):
        parts = [weight.linear(x[:, start:stop], copy) for copy, (start, stop) in enumerate(spans)]
    elif modalities == 1:
        return F.linear(x, weight)
    else:
        copies = zip(spans, weight.chunk(modalities), strict=True)
        parts = [_rows(x[:, start:stop], copy) for (start, stop), copy in copies]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Held:
    """Keeps the weight of a `ModalityLinear` ready for the products made inside a `with`.

    A host may fetch the weight where that begins, and let go of it where it ends.
    """

    def __init__(self, leaf: "ModalityLinear", dtype: torch.dtype, device: torch.device) -> None:
        self.leaf, self.dtype, self.device = leaf, dtype, device

    def __enter__(self) -> None:
        leaf = self.leaf
        weight = leaf.weight_in(self.dtype) if leaf.patches else leaf.quantized or leaf.weight
        leaf.held_weight = (ready(weight, self.dtype, self.device, leaf.modalities),)

    def __exit__(self, *_: object) -> None:
        self.leaf.held_weight = ()


def modality_rms_norm(x: Tensor, weight: Tensor, modalities: int, spans: Spans, eps: float) -> Tensor:
    """The norm of `ModalityRMSNorm`, `weight` being in the dtype of `x`."""
    gain = 1 + weight
    if modalities == 1:
        return F.rms_norm(x, gain.shape, gain, eps)
    copies = zip(spans, gain.chunk(modalities), strict=True)
    return torch.cat([F.rms_norm(x[:, a:b], copy.shape, copy, eps) for (a, b), copy in copies], dim=1)


class ModalityLinear(QuantizableLeaf):
    """An unbiased linear whose weight stacks one copy per modality (video, audio, text) along its first axis.

    `x` is [B, S, in_features] with the tokens of a modality in one span; the result is [B, S, out_features].
    With one copy it is a plain linear and `spans` is not looked at.
    """

    held_weight: tuple[Tensor | QuantizedWeight, ...] = ()  # in a tuple, as it is no parameter of its own

    def __init__(self, in_features: int, out_features: int, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * out_features, in_features))

    def held(self, dtype: torch.dtype, device: torch.device) -> Held:
        """Inside a `with` of this the weight is made ready once, for inputs of `dtype` on a device."""
        return Held(self, dtype, device)

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        if self.held_weight:
            return modality_linear(x, *self.held_weight, self.modalities, spans)
        with self.held(x.dtype, x.device):
            return modality_linear(x, *self.held_weight, self.modalities, spans)


class ModalityRMSNorm(nn.Module):
    """RMS norm over the last axis with gain `1 + weight`, one stacked copy of `weight` per modality.

    `x` is [B, S, ..., dim], float32; spans as in `ModalityLinear`.
    """

    eps = 1e-6

    def __init__(self, dim: int, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * dim))

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        return modality_rms_norm(x, _cast(self.weight, x), self.modalities, spans, self.eps)
