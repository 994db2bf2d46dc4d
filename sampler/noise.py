"""Seeded noise: drawn on the CPU, so that one seed is one film on every device.

Audio noise is drawn as [B, C, A], the layout of ComfyUI's audio latents, and transposed.
"""

from collections.abc import Callable

import torch

from ..model.packing import Latents

# what a sampler calls for fresh noise in the shapes of the given latents
NoiseFunction = Callable[[Latents], Latents]

STEP_SEED_OFFSET = 1
SUPER_RESOLUTION_SEED_OFFSET = 2


def normal_like(latents: Latents, generator: torch.Generator) -> Latents:
    """Draw standard normal noise, video first, then audio; float32, on the device of the latents."""
    video = torch.randn(latents.video.shape, generator=generator)
    batch, length, channels = latents.audio.shape
    audio = torch.randn((batch, channels, length), generator=generator).transpose(1, 2).contiguous()
    return Latents(video.to(latents.video.device), audio.to(latents.audio.device))


class FilmNoise:
    """All random draws of one film, as functions of its seed.

    Seeds that follow each other share draws: step noise comes from seed + 1, super-resolution's from seed +
    2.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._steps = self._generator(STEP_SEED_OFFSET)

    def _generator(self, offset: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed((self.seed + offset) % 2**64)

    def initial(self, like: Latents) -> Latents:
        """The noise a film starts from."""
        return normal_like(like, self._generator(0))

    def step(self, like: Latents) -> Latents:
        """Fresh noise for one step of the few-step sampler; each call draws the next."""
        return normal_like(like, self._steps)

    def super_resolution(self, like: Latents) -> Latents:
        """The noise that super-resolution adds to the resized video and mixes into the audio."""
        return normal_like(like, self._generator(SUPER_RESOLUTION_SEED_OFFSET))

    def audio_encoding(self) -> torch.Generator:
        """The generator of the published random draw in the audio encoder."""
        return self._generator(3)
