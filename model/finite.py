"""The check that stops a film at the stage where its numbers go wrong."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite(tensors: Mapping[str, Tensor], stage: str, cure: str) -> None:
    """Raise ValueError naming `stage`, and what to do, where a tensor holds NaN or infinite values."""
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise ValueError(f"{stage}: {bad} of {tensor.numel()} {name} values are NaN or infinite; {cure}")
