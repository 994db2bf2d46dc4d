"""Progress and previews while a film is sampled: several of its frames are played until the next step."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import comfy.utils
import latent_preview
from comfy.nested_tensor import NestedTensor
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from torch import Tensor

FRAMES = 8  # of the film, evenly spaced
SECONDS_PER_FRAME = 0.2
Preview = tuple[str, Any, int]  # format, picture, largest side: what the host sends
Callback = Callable[[int, NestedTensor, NestedTensor, int], None]


@contextmanager
def film_callback(patcher: Any, steps: int) -> Iterator[Callback]:
    """The host's callback of a sampling run, to be used while the context lasts."""
    previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
    bar = comfy.utils.ProgressBar(steps)
    player = _Player() if previewer is not None else None

    def callback(step: int, denoised: NestedTensor, latents: NestedTensor, total: int) -> None:
        del latents
        frames = [] if previewer is None else _frames(previewer, denoised.unbind()[0])
        bar.update_absolute(step + 1, total, frames[0] if frames else None)
        if player is not None:
            player.play(frames, step + 1, total)

    try:
        yield callback
    finally:
        if player is not None:
            player.close()


def _frames(previewer: latent_preview.LatentPreviewer, video: Tensor) -> list[Preview]:
    # of video [B, C, T, H, W]: pictures of frame after frame
    count = min(FRAMES, video.shape[2])
    places = [index * video.shape[2] // count for index in range(count)]
    return [previewer.decode_latent_to_preview_image("JPEG", video[:1, :, t : t + 1]) for t in places]


class _Player:
    """Sends the frames one after the other, over and over, from a thread of its own.

    It does not go through the host's progress bar, which would take an interruption for itself.
    """

    def __init__(self) -> None:
        self._node = getattr(get_executing_context(), "node_id", None)
        self._state = get_progress_state()
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def play(self, frames: list[Preview], value: int, total: int) -> None:
        """Play `frames` from now on, at step `value` of `total`."""
        self.close()
        if self._node is None or len(frames) < 2:
            return
        self._stop = threading.Event()
        arguments = (frames, value, total, self._stop)
        self._thread = threading.Thread(target=self._send, args=arguments, daemon=True)
        self._thread.start()

    def _send(self, frames: list[Preview], value: int, total: int, stop: threading.Event) -> None:
        for frame in cycle(frames[1:] + frames[:1]):
            if stop.wait(SECONDS_PER_FRAME):
                return
            self._state.update_progress(self._node, value, total, frame)

    def close(self) -> None:
        """Stop playing."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
