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

WEIGHTS_KIND = {"e2e": "e2e_weights", "audio_windows": "oobleck"}
# what the transformers of a recorded run have without its metadata saying so: facts of the published code
COORDS_STYLE = {"base": "v2", "sr": "v1"}
FRAME_RECEPTIVE_FIELD = 11


@dataclass(frozen=True)
class GoldenFile:
    path: Path
    config: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def weights_file(self) -> "GoldenFile":
        """The file of the same set with the weights this one was recorded with.

        Its configuration names it, but a set may have been renamed: then it is the one whose sizes fit.
        """
        kind, name = WEIGHTS_KIND[self.config["kind"]], self.config["weights_file"]
        fitting = [file for file in golden_files(kind, self.path.parent) if _fits(file, self)]
        named = [file for file in fitting if file.path.name == name]
        if len(named or fitting) != 1:
            raise LookupError(
                f"{self.path} needs weights of kind {kind!r} and its sizes: {name!r} is not such a file, and "
                f"there are {[file.path.name for file in fitting]}; give the right one its recorded name"
            )
        return (named or fitting)[0]

    def __str__(self) -> str:
        return self.path.stem


def _open(path: Path) -> GoldenFile:
    with safe_open(path, framework="pt") as file:
        return GoldenFile(path, json.loads((file.metadata() or {}).get("config", "{}")))


def golden_files(kind: str, folder: Path = GOLDEN_DIR) -> list[GoldenFile]:
    """All files of one kind; at least one, else the set is incomplete."""
    found = [
        file for file in map(_open, sorted(folder.glob("*.safetensors"))) if file.config.get("kind") == kind
    ]
    if not found:
        raise FileNotFoundError(f"no golden file of kind {kind!r} in {folder}")
    return found


def _fits(source: GoldenFile, user: GoldenFile) -> bool:
    """Whether these weights have the sizes of that recording."""
    tensors = user.tensors()
    if user.config["kind"] == "audio_windows":
        widths = {tensor.shape[1] for name, tensor in tensors.items() if name.startswith("latent.")}
        return widths == {source.config["model"]["latent_dim"]}
    parts = ["base", "sr"] if "sr_size" in user.config else ["base"]
    arches = [source.config.get(f"{part}_arch", {}) for part in parts]
    return all(arch.get("text_in_channels") == tensors["in.text"].shape[-1] for arch in arches)


def recorded_transformer(run: GoldenFile, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of the transformer `part`, 'base' or 'sr', of a recorded run."""
    source = run.weights_file()
    facts = {"coords_style": COORDS_STYLE[part], "frame_receptive_field": FRAME_RECEPTIVE_FIELD}
    recorded = {name: run.config[name] for name in facts if name in run.config}
    return source.config[f"{part}_arch"] | facts | recorded, weights(source.tensors(), f"{part}.weights.")


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
