"""Golden tensors: found by the `kind` in their metadata, never by name, so that any set can be tried."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

OWN_DIR = Path(__file__).parent / "golden"
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or OWN_DIR)


@dataclass(frozen=True)
class GoldenFile:
    path: Path
    config: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def beside(self, name: str) -> "GoldenFile":
        """Another file of the same set, named in this one's configuration."""
        return _open(self.path.with_name(name))

    def __str__(self) -> str:
        return self.path.stem


def _open(path: Path) -> GoldenFile:
    with safe_open(path, framework="pt") as file:
        return GoldenFile(path, json.loads((file.metadata() or {}).get("config", "{}")))


def golden_files(kind: str) -> list[GoldenFile]:
    """All files of one kind; at least one, else the set is incomplete."""
    found = [
        file
        for file in map(_open, sorted(GOLDEN_DIR.glob("*.safetensors")))
        if file.config.get("kind") == kind
    ]
    if not found:
        raise FileNotFoundError(f"no golden file of kind {kind!r} in {GOLDEN_DIR}")
    return found


def weights(tensors: dict[str, Tensor], prefix: str = "weights.") -> dict[str, Tensor]:
    """The tensors under `prefix`, without it, widened to float32."""
    return {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.double(), want.double()
    return (torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)).item()


def full_size(network: str) -> dict[str, Any]:
    """The published names and shapes of a network; facts, not recordings, so there is one set only."""
    return json.loads((OWN_DIR / f"{network}_full_size.json").read_text(encoding="utf-8"))
