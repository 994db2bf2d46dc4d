"""The networks of one film: opened together, loaded when their stage comes, and let go of after it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..model.checkpoint import Checkpoint, load, open_checkpoint
from ..model.config import VARIANTS
from ..model.run_block import RunBlock, run_in_place
from .placement import LayerStream

Progress = Callable[[str, int, int], None]  # (stage, done, total)
STREAMED_PARTS = ("transformer", "text_encoder")


def needed_parts(variant: str, sr: str | None, decoder: str, image: bool) -> dict[str, str]:
    """The parts of a film by role, in the order of their stages, under their names in the catalog."""
    parts = {"text_encoder": "text_encoder"}
    if image:
        parts["video_vae"] = "video_vae"
    parts["transformer"] = variant
    if sr:
        parts["super_resolution"] = f"{sr}_sr"
    parts["video_decoder"] = "video_decoder" if decoder == "turbo" else "video_vae"
    return {**parts, "audio_vae": "audio_vae"}


def open_part(name: str, path: Path) -> Checkpoint:
    """Open the file of a part under its name in the catalog, which for a transformer is its variant."""
    return open_checkpoint(path, *(("transformer", name) if name in VARIANTS else (name, None)))


def default_vae_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the video VAE and decoder; CPUs are slow at convolutions in less than float32."""
    return torch.float32 if device.type == "cpu" else dtype


def part_dtype(part: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a part is loaded in."""
    vaes = {"video_vae": vae_dtype, "video_decoder": vae_dtype, "audio_vae": torch.float32}
    return vaes.get(part, dtype)


class Parts:
    """Opened checkpoints by role, and where and how they are run.

    Roles: text_encoder, transformer, audio_vae, video_decoder (of either kind), and where they are needed
    video_vae and super_resolution. `offload` is 'none', 'stage' or 'blocks'. `progress` hears of loading.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device,
        offload: str,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        progress: Progress = lambda stage, done, total: None,  # noqa: ARG005
    ) -> None:
        self.checkpoints = checkpoints
        self.progress = progress
        self.device, self.offload = device, offload
        self._dtype, self._vae_dtype = dtype, vae_dtype
        self._kept: dict[Path, nn.Module] = {}

    @contextmanager
    def use(self, role: str) -> Iterator[tuple[nn.Module, RunBlock]]:
        """The network of a role, ready on the device, with the hook that runs its layers."""
        checkpoint = self.checkpoints[role]
        streams = self.offload == "blocks" and checkpoint.part in STREAMED_PARTS
        module = self._kept.get(checkpoint.path)
        if module is None:
            dtype = part_dtype(checkpoint.part, self._dtype, self._vae_dtype)
            told = partial(self.progress, f"loading the {checkpoint.label}")
            module = load(checkpoint, dtype, self.device, layers_on_cpu=streams, progress=told)
        if self.offload == "none":
            self._kept[checkpoint.path] = module
        stream = LayerStream(_layers(module), self.device) if streams else None
        try:
            yield module, stream or run_in_place
        finally:
            if stream is not None:
                stream.close()


def _layers(module: nn.Module) -> nn.ModuleList:
    return module.block.layers if hasattr(module, "block") else module.layers
