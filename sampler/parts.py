"""The networks of one film: opened together, loaded when their stage comes, and let go of after it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..model.checkpoint import Checkpoint, load
from ..model.run_block import RunBlock, run_in_place
from .placement import LayerStream

STREAMED_PARTS = ("transformer", "text_encoder")


class Parts:
    """Opened checkpoints by role, and where and how they are run.

    Roles: text_encoder, transformer, audio_vae, video_decoder (of either kind), and where they are needed
    video_vae and super_resolution. `offload` is 'none', 'stage' or 'blocks'.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device,
        offload: str,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
    ) -> None:
        self.checkpoints = checkpoints
        self.device, self.offload = device, offload
        self._dtypes = {"video_vae": vae_dtype, "video_decoder": vae_dtype, "audio_vae": torch.float32}
        self._dtype = dtype
        self._kept: dict[Path, nn.Module] = {}

    @contextmanager
    def use(self, role: str) -> Iterator[tuple[nn.Module, RunBlock]]:
        """The network of a role, ready on the device, with the hook that runs its layers."""
        checkpoint = self.checkpoints[role]
        streams = self.offload == "blocks" and checkpoint.part in STREAMED_PARTS
        module = self._kept.get(checkpoint.path)
        if module is None:
            dtype = self._dtypes.get(checkpoint.part, self._dtype)
            module = load(checkpoint, dtype, self.device, layers_on_cpu=streams)
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
