"""A loaded feed-forward made wider by units of zeros, for plain weights; quantised ones see to it themselves.

Fast products want rows of whole 16-byte pieces, and 13652 units in bfloat16 are none. A unit without weights
is zero behind either activation, and nothing goes on from it.
"""

from torch import nn

from ..kernels.scaled_matmul import next_multiple, pad_linear
from .transformer import TransformerLayer, swiglu7


def pad_feed_forward(layer: TransformerLayer) -> None:
    """Pad both linears of a layer's feed-forward in place; its results stay, but for the order of sums.

    Where one of them is quantised, both stay as they are.
    """
    up, down = layer.mlp.up_gate_proj, layer.mlp.down_proj
    if up.quantized is not None or down.quantized is not None:
        return
    units = next_multiple(down.weight.shape[1])
    rows = 2 * units if layer.mlp.activation is swiglu7 else units  # those of a unit lie together
    for leaf, shape in (
        (up, (rows, up.weight.shape[1])),
        (down, (down.weight.shape[0] // down.modalities, units)),
    ):
        weight, _ = pad_linear(leaf.weight, None, *shape, leaf.modalities)
        leaf.weight = nn.Parameter(weight, requires_grad=False)
