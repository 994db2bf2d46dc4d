"""3-D convolutions of single small films on CPUs.

PyTorch 2.6 to 2.13 hand these to oneDNN only from some size on (`use_mkldnn` in ATen's Convolution.cpp), and
below it take a way that is several times slower (benchmarks/pony_cpu_2026-11-29.md). The reference is
`torch.nn.functional.conv3d`.
"""

import platform

import torch
from torch import Tensor, nn

TAKES_ONEDNN = 20480  # PyTorch does, with more than so many values, the innermost axis not counted
MACHINES = ("x86_64", "AMD64")  # where it was measured


class SmallFilmConv3d(nn.Conv3d):
    """To come before `nn.Conv3d`, or a subclass of it, among the bases of a layer."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: object) -> Tensor:
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if plain and not any(options.values()) and is_slow(input):
            return small_conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return super()._conv_forward(input, weight, bias, **options)


def is_slow(x: Tensor) -> bool:
    """Whether PyTorch would take the slow way for a film `x` [B, C, F, Y, X]."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 5
        and len(x) == 1
        and x.shape[:-1].numel() <= TAKES_ONEDNN
        and platform.machine() in MACHINES
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()  # it cannot trace what `small_conv3d` calls
    )


def small_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The same as `conv3d`, by oneDNN in any size."""
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
