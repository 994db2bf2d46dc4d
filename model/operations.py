"""The leaf layers of every network. A host may pass a namespace of its own with the same names instead.

Contract of every leaf: it owns `weight` and perhaps `bias` (the weight-normalised convolutions of the audio
VAE, as published, `weight_g` and `weight_v` for the weight), and it computes in the dtype of its input,
whatever dtype its weights are stored in. A network therefore states its number formats by what it hands to a
leaf.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Spans = tuple[tuple[int, int], ...]  # (start, stop) of the tokens of each modality: video, audio, text


def _cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _cast(self.weight, x), _cast(self.bias, x))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _cast(self.weight, x), _cast(self.bias, x))


class Conv3d(nn.Conv3d):
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


class Embedding(nn.Embedding):
    """Rows of `weight`, in the dtype they are stored in."""


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    # a slice of a sequence would be taken for a batch of matrices, which is slower than one product
    return F.linear(x.flatten(0, 1), weight).unflatten(0, x.shape[:2])


def modality_linear(x: Tensor, weight: Tensor, modalities: int, spans: Spans) -> Tensor:
    """The product of `ModalityLinear`, `weight` being in the dtype of `x`."""
    if modalities == 1:
        return F.linear(x, weight)
    copies = zip(spans, weight.chunk(modalities), strict=True)
    return torch.cat([_rows(x[:, start:stop], copy) for (start, stop), copy in copies], dim=1)


def modality_rms_norm(x: Tensor, weight: Tensor, modalities: int, spans: Spans, eps: float) -> Tensor:
    """The norm of `ModalityRMSNorm`, `weight` being in the dtype of `x`."""
    gain = 1 + weight
    if modalities == 1:
        return F.rms_norm(x, gain.shape, gain, eps)
    copies = zip(spans, gain.chunk(modalities), strict=True)
    return torch.cat([F.rms_norm(x[:, a:b], copy.shape, copy, eps) for (a, b), copy in copies], dim=1)


class ModalityLinear(nn.Module):
    """An unbiased linear whose weight stacks one copy per modality (video, audio, text) along its first axis.

    `x` is [B, S, in_features] with the tokens of a modality in one span; the result is [B, S, out_features].
    With one copy it is a plain linear and `spans` is not looked at.
    """

    def __init__(self, in_features: int, out_features: int, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * out_features, in_features))

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        return modality_linear(x, _cast(self.weight, x), self.modalities, spans)


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
