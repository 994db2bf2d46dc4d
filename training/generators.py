"""Random streams named by a seed and a path: a resumed run draws what an unbroken one would have drawn."""

import hashlib
import json

import torch


def generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each `seed` and `path`, e.g. `generator(0, "noise", step)`.

    Streams differ between devices: what must be equal everywhere is drawn on the CPU.
    """
    digest = hashlib.sha256(json.dumps([seed, *path]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
