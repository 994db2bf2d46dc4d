"""What every sampler takes: the denoising function, the callback, and what is held fixed while it runs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..model.packing import Latents

DenoiseFunction = Callable[
    [Latents, float], Latents
]  # (latents, sigma) -> predicted clean latents, after guidance
StepCallback = Callable[[int, Latents, Latents], None]  # (step index, latents, predicted clean latents)


def no_callback(index: int, latents: Latents, denoised: Latents) -> None:
    """Do nothing after a step."""


@dataclass(frozen=True)
class Conditions:
    """Clean latents that stand in the film from the first step to the last.

    `first_frame` [B, C, 1, Y, X] replaces latent frame 0, `audio` [B, A, C] the whole sound.
    """

    first_frame: Tensor | None = None
    audio: Tensor | None = None

    def apply(self, latents: Latents) -> Latents:
        """Return `latents` with the held parts put in; samplers call this before every step and once at the
        end.
        """
        video, audio = latents
        if self.first_frame is not None:
            video = video.clone()
            video[:, :, :1] = self.first_frame
        return Latents(video, audio if self.audio is None else self.audio)
