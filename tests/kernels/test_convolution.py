"""Convolutions of small films against PyTorch's own."""

import platform

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from happyhorse.kernels import convolution
from happyhorse.kernels.convolution import is_slow
from happyhorse.model.operations import Conv3d

pytestmark = pytest.mark.skipif(
    platform.machine() not in convolution.MACHINES or not torch.backends.mkldnn.is_available(),
    reason="PyTorch has no oneDNN for this processor",
)

CASES = {
    "3x3x3": {"kernel_size": 3, "padding": (0, 1, 1)},
    "3x1x1": {"kernel_size": (3, 1, 1)},
    "1x1x1": {"kernel_size": 1},
    "halving time": {"kernel_size": (3, 1, 1), "stride": (2, 1, 1)},
    "without bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_small_film_is_convolved_as_by_torch(
    case: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, taken = convolution.small_conv3d, []
    monkeypatch.setattr(convolution, "small_conv3d", lambda *given: taken.append(1) or ours(*given))
    generator = torch.Generator().manual_seed(0)
    layer = Conv3d(6, 10, **CASES[case])
    reference = nn.Conv3d(6, 10, **CASES[case])
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, 5, 9, 7, generator=generator).to(memory_format=layout).requires_grad_()
    found, expected = layer(x), reference(x)
    assert taken
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), [x, *layer.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *reference.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 4, 3, 8, 8),
        torch.zeros(1, 4, 3, 8, 8, dtype=torch.bfloat16),
        torch.zeros(1, 4, 3, 8, 8, device="meta"),
        torch.zeros(1, 64, 8, 64, 2),
        torch.zeros(1, 3, 8, 8),
    ],
    ids=["two films", "bfloat16", "another device", "large", "without a batch"],
)
def test_all_else_goes_torchs_way(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(F, "conv3d", lambda *_: taken.append(True) or x)
    assert not is_slow(x)
    Conv3d(x.shape[-4], 1, 1, device=x.device)(x)
    assert taken


def test_switching_onednn_off_is_heard() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_slow(torch.zeros(1, 4, 3, 8, 8))


def test_other_paddings_are_torchs() -> None:
    x = torch.randn(1, 2, 3, 6, 6)
    for padding in ({"padding": 1, "padding_mode": "replicate"}, {"padding": "same"}):
        layer, reference = Conv3d(2, 2, 3, **padding), nn.Conv3d(2, 2, 3, **padding)
        reference.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), reference(x))


def test_a_layer_can_be_compiled() -> None:
    layer, x = Conv3d(6, 10, 3), torch.randn(1, 6, 5, 9, 7)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x), rtol=1e-5, atol=1e-5)
