"""Feed-forwards that were made wider by units of zeros."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden_files import relative_error
from torch import Tensor

from happyhorse.model.config import PRESETS
from happyhorse.model.packing import Latents, PackedLayout
from happyhorse.model.padding import pad_feed_forward
from happyhorse.model.quant import quantize
from happyhorse.model.transformer import JointTransformer, gelu7, swiglu7

CONFIG = replace(
    PRESETS["pony"].transformers["distill"],
    num_layers=3, hidden_size=160, mm_layers=(0, 2), gelu7_layers=(0,),
)  # fmt: skip
UNITS, PADDED = 424, 432  # of the swiglu7 layers; gelu7 has 640, which need nothing


def network() -> JointTransformer:
    generator = torch.Generator().manual_seed(0)
    network = JointTransformer(CONFIG, compute_dtype=torch.float32)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
    return network.requires_grad_(False)


def velocity(network: JointTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = Latents(
        torch.randn(1, 48, 3, 4, 6, generator=generator), torch.randn(1, 9, 64, generator=generator)
    )
    text = torch.randn(1, 7, CONFIG.text_in_channels, generator=generator)
    result = network(latents, text, PackedLayout.of(latents, text, CONFIG.coords_style))
    return torch.cat([stream.flatten() for stream in result])


@pytest.mark.parametrize(("activation", "inputs"), [(gelu7, 1), (swiglu7, 2)])
def test_a_unit_without_weights_is_exactly_zero(activation, inputs: int) -> None:
    assert torch.equal(activation(torch.zeros(3, 8 * inputs)), torch.zeros(3, 8))


@pytest.mark.parametrize("index", [1, 2], ids=["shared", "by modality"])
def test_padded_units_contribute_exactly_nothing(index: int) -> None:
    """What comes out of the activation, and the weights behind it, unit by unit."""
    x, spans = torch.randn(1, 30, CONFIG.hidden_size), ((0, 11), (11, 20), (20, 30))
    plain, padded = network().block.layers[index], network().block.layers[index]
    pad_feed_forward(padded)
    inner = []
    for layer in (plain, padded):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: inner.append(given[0]))
        layer.mlp(x, SimpleNamespace(spans=spans))
    assert (inner[0].shape[2], inner[1].shape[2]) == (UNITS, PADDED)
    torch.testing.assert_close(inner[1][..., :UNITS], inner[0], rtol=0, atol=1e-6)
    assert torch.equal(padded.mlp.down_proj.weight[:, :UNITS], plain.mlp.down_proj.weight)
    assert not inner[1][..., UNITS:].any() and not padded.mlp.down_proj.weight[:, UNITS:].any()


def test_a_padded_network_has_the_same_velocity() -> None:
    want, padded = velocity(network()), network()
    for layer in padded.block.layers:
        pad_feed_forward(layer)
    assert [layer.mlp.down_proj.weight.shape[1] for layer in padded.block.layers] == [640, PADDED, PADDED]
    assert relative_error(velocity(padded), want.double()) < 1e-6


@pytest.mark.parametrize("leaf", ["up_gate_proj", "down_proj"])
@pytest.mark.parametrize("format", ["float8_e4m3fn", "Q8_0"])
def test_a_quantised_linear_keeps_its_neighbour_as_it_is(leaf: str, format: str) -> None:
    mixed = network()
    mlp = mixed.block.layers[1].mlp
    getattr(mlp, leaf).hold(quantize(torch.randn(getattr(mlp, leaf).weight.shape), format))
    weights = [mlp.up_gate_proj.weight, mlp.down_proj.weight]
    pad_feed_forward(mixed.block.layers[1])
    assert mlp.up_gate_proj.weight is weights[0] and mlp.down_proj.weight is weights[1]
