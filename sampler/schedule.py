"""Noise levels: step count and shift -> sigmas."""

import torch
from torch import Tensor

FIRST_SIGMA = 0.999  # before the shift; every stage starts there
SHIFT = 5.0


def flow_sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Return the `steps` + 1 noise levels from nearly 1 down to 0, float32, of the shifted linear schedule.

    sigma = shift s / (1 + (shift - 1) s) for s evenly spaced from 0.999 towards 0. Raises ValueError for no
    steps.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    first = torch.tensor(FIRST_SIGMA, dtype=torch.float32).double().item()  # published with this rounding
    s = torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)[:-1]
    sigmas = shift * s / (1 + (shift - 1) * s)
    return torch.cat((sigmas, sigmas.new_zeros(1))).float()


def integer_time(sigma: float) -> int:
    """The training time step of a noise level, 0 to 1000, by which the guidance rules are written."""
    return int(1000 * sigma)
