"""Rotary positions over (time, row, column): coordinates -> angles -> rotation.

Letters: B batch, S tokens, N heads, H head size, R = 3H/8 angles per token.
"""

import torch
from torch import Tensor


def rope_bands(head_dim: int) -> Tensor:
    """Return the H/8 frequencies 10000^(-b/(H/8)), float32, shared by the three axes."""
    count = head_dim // 8
    return torch.tensor([10000.0 ** (-band / count) for band in range(count)], dtype=torch.float32)


def rope_table(coordinates: Tensor, bands: Tensor) -> Tensor:
    """Return [S, 2R]: sines then cosines, each with all time bands, then row bands, then column bands.

    `coordinates` is [S, 9] float32, as from `PackedLayout.coordinates`. Positions are scaled to the reference
    size, rows and columns also centred.
    """
    position, size, reference = coordinates.split(3, dim=1)
    scale = torch.where((size == 1) & (reference == 1), 1.0, (reference - 1) / (size - 1))
    centre = (size - 1) / 2 * torch.tensor([0.0, 1.0, 1.0], device=size.device)
    angles = ((position - centre) * scale).unsqueeze(2) * bands.to(coordinates)
    angles = angles.flatten(1)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first 2R values of each head in pairs (i, i + R); `x` is [B, N, S, H], `table` [S, 2R]."""
    width = table.shape[1] // 2
    sin, cos = table.split(width, dim=1)  # [S, R] each
    first, second, rest = x.split((width, width, x.shape[-1] - 2 * width), dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat((*turned, rest), dim=-1)
