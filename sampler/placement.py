"""Where weights live outside ComfyUI: kept on the device, brought there for their stage, or streamed layer by
layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

OFFLOADS = ("none", "stage", "blocks")


class LayerStream:
    """Runs layers whose weights stay in CPU memory, each copied to the device while the one before it works.

    An object of this class is the `run_block` of a network; at most two layers are on the device at a time.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self.layers = [list(layer.parameters()) for layer in layers]
        self._asynchronous = device.type != "cpu"
        self._stream = torch.Stream(device) if self._asynchronous else None
        self._ahead: tuple[int, list[Tensor], torch.Event | None] | None = None
        if self._asynchronous:
            for parameter in layers.parameters():
                parameter.data = parameter.data.pin_memory()

    def __call__(self, index: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        weights = self._arrived(index)
        self._start((index + 1) % len(self.layers))
        homes = [parameter.data for parameter in self.layers[index]]
        try:
            for parameter, weight in zip(self.layers[index], weights, strict=True):
                parameter.data = weight
            return layer(x)
        finally:
            for parameter, home in zip(self.layers[index], homes, strict=True):
                parameter.data = home

    def close(self) -> None:
        """Let go of the copy that is ahead."""
        self._ahead = None

    def _start(self, index: int) -> None:
        """Begin to copy layer `index` to the device."""
        if not self._asynchronous:
            self._ahead = index, [parameter.data.clone() for parameter in self.layers[index]], None
            return
        with self._stream:
            copies = [parameter.data.to(self.device, non_blocking=True) for parameter in self.layers[index]]
            self._ahead = index, copies, self._stream.record_event()

    def _arrived(self, index: int) -> list[Tensor]:
        """The copies of layer `index`, ready for the stream that computes."""
        if self._ahead is None or self._ahead[0] != index:
            self._start(index)
        _, copies, event = self._ahead
        if event is not None:
            computing = torch.accelerator.current_stream(self.device)
            computing.wait_event(event)
            for copy in copies:
                copy.record_stream(computing)  # the allocator must not reuse it before the layer has run
        return copies
