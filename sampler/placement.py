"""Where the parts of a film run: on the device, streamed from CPU memory, in pieces."""

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..model.run_block import RunBlock

PAGE = mmap.PAGESIZE
# from the fastest to the one that needs least
OFFLOADS = ("none", "stage", "blocks", "pieces")


@dataclass(frozen=True)
class Placement:
    """How a part runs.

    `keep`: it stays on the device after its stage. `resident`: so many of its first layers lie on the device,
    the others in CPU memory; None is all. `piece`: tokens that a transformer works on at once. `tiles`: of a
    picture that is decoded. For both 0 is all at once.
    """

    keep: bool = False
    resident: int | None = None
    piece: int = 0
    tiles: int = 0

    def describe(self, layers: int | str = "all") -> str:
        """It in words, for a part that has so many layers to stream."""
        words = ["on the device for the whole film" if self.keep else "on the device"]
        if self.resident is not None:
            words = [
                f"{self.resident} of {layers} layers on the device" if self.resident else "layers streamed"
            ]
        if self.piece:
            words.append(f"pieces of {self.piece} tokens")
        if self.tiles:
            words.append(f"{self.tiles} tiles")
        return ", ".join(words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the RAM has no more memory."""
    # by the CPU; by Apple's GPUs and by CUDA where the error has no type; by cuBLAS
    said = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def in_pieces(run_block: RunBlock, tokens: int) -> RunBlock:
    """Run a transformer's layers by `run_block`, each on so many tokens at a time."""
    return lambda index, layer, x: run_block(index, partial(layer, piece=tokens), x)


class LayerStream:
    """Runs layers whose weights stay in CPU memory, each copied to the device while the one before it works.

    An object of this class is the `run_block` of a network. The first `resident` layers are on the device and
    run as they are. Copies of two others are there at most: the next copy begins when the layer before the
    present one has been computed. Where the device can, the CPU's memory is page-locked in place until
    `close`, so that copying and computing overlap.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device, resident: int = 0) -> None:
        self.device, self.resident = device, resident
        self.layers = [list(layer.parameters()) for layer in layers]
        self._ahead: tuple[int, list[Tensor]] | None = None
        # CPU and some accelerators have no streams: there a copy is made when it is asked for
        module = torch.get_device_module(device) if device.type != "cpu" else None
        self._module = module if hasattr(module, "Stream") else None
        self._copying = self._module.Stream(device) if self._module else None
        self._computed = None  # event at the end of the layer before
        streamed = [weight for layer in self.layers[resident:] for weight in layer]
        self._locked: list[int] = []
        try:
            for start, stop in page_ranges(streamed):
                if self._lock(start, stop):
                    self._locked.append(start)
        except BaseException:
            self.close()
            raise

    def __call__(self, index: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if index < self.resident:
            if self._ahead is None:
                self._start(self.resident)
            return layer(x)
        copies = self._arrived(index)
        with _standing_in(self.layers[index], copies):
            x = layer(x)
        if self._module:
            computed = self._module.current_stream(self.device).record_event()
            if self._computed is not None:
                self._computed.synchronize()
            self._computed = computed
        self._start_after(index)
        return x

    def close(self) -> None:
        """Let go of the copy that is ahead and of the page locks."""
        self._ahead = None
        try:
            if self._locked:
                self._module.synchronize(self.device)
        finally:  # it raises what went wrong on the device before
            for start in self._locked:
                self._module.cudart().cudaHostUnregister(start)
            self._locked = []

    def _start_after(self, index: int) -> None:
        """Begin to copy what is needed after layer `index`."""
        self._start(index + 1 if index + 1 < len(self.layers) else self.resident)

    def _start(self, index: int) -> None:
        """Begin to copy layer `index` to the device."""
        weights = [parameter.data for parameter in self.layers[index]]
        if not self._module:
            self._ahead = index, [weight.to(self.device, copy=True) for weight in weights]
            return
        with self._module.stream(self._copying):
            self._ahead = index, [weight.to(self.device, non_blocking=True) for weight in weights]

    def _arrived(self, index: int) -> list[Tensor]:
        """The copies of layer `index`, safe to use in the stream that computes."""
        if self._ahead is None or self._ahead[0] != index:
            self._start(index)
        _, copies = self._ahead
        self._ahead = None
        if self._module:
            computing = self._module.current_stream(self.device)
            computing.wait_stream(self._copying)
            for copy in copies:
                copy.record_stream(computing)  # the allocator must not reuse it before the layer has run
        return copies

    def _lock(self, start: int, stop: int) -> bool:
        """Page-lock memory where it lies; torch's own pinned copies take up to twice their size."""
        if not self._module or not hasattr(self._module, "cudart"):
            return False
        if int(self._module.cudart().cudaHostRegister(start, stop - start, 0)) == 0:
            return True
        with suppress(RuntimeError):  # else the next kernel would be blamed: the error waits for it
            torch.zeros(1, device=self.device).add_(1).item()
        return False


def page_ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The addresses (start, stop) of tensors in CPU memory in whole pages, those that touch as one.

    Neighbours in a mapped file share a page, which can be locked only once.
    """
    ranges: list[tuple[int, int]] = []
    for address, num_bytes in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors):
        start = address // PAGE * PAGE
        stop = -(-(address + num_bytes) // PAGE) * PAGE
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
        else:
            ranges.append((start, stop))
    return ranges


@contextmanager
def _standing_in(parameters: list[nn.Parameter], copies: list[Tensor]) -> Iterator[None]:
    """Let the copies be the parameters' values for a while."""
    homes = [parameter.data for parameter in parameters]
    try:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data = copy
        yield
    finally:
        for parameter, home in zip(parameters, homes, strict=True):
            parameter.data = home
