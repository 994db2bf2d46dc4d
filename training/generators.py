"""Random streams named by a seed and a path: a resumed run draws what an unbroken one would have drawn."""

import hashlib
import json
import zlib

import torch
from torch import Tensor


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A generator of its own for each `seed` and `path`, e.g. `generator(0, "noise", step)`.

    It draws on the CPU, so that every device sees the same.
    """
    digest = hashlib.sha256(json.dumps([seed, *path]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def checksum(*tensors: Tensor) -> int:
    """Changes with the values, by which a run knows what it was begun with."""
    found = 0
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found = zlib.crc32(values.numpy(), found)
    return found
