"""The audio VAE as the host's VAE object, for our nodes and for every stock node that takes a VAE.

Letters: B batch, A audio latents, C channels, N samples.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ..model.audio_vae import ENCODE_RATE, AudioVAE, to_film_rate
from ..model.checkpoint import open_checkpoint
from ..model.config import Config
from ..model.finite import check_finite
from ..model.geometry import FILM_RATE, SIZE_STEP, FilmShape
from ..sampler.activations import SMALL_TENSORS, activations
from .vae import CheckedVAE, load_network

LEAST_CHUNK = 32  # latents worked on at once where memory has run out


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep convolutions in float32 from rounding what they multiply to 11 bits, as GPUs do by default."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


class AudioVAEObject(CheckedVAE):
    """The audio VAE as a VAE of the host: latents (B, 64, A), sound in at 51200 Hz, out at 44100 Hz.

    `first_stage_model` is the core's network with latents (B, A, 64). It always works in pieces that add up
    to the whole, so tiles are not needed and change nothing.
    """

    def __init__(self, module: AudioVAE, dtype: torch.dtype, patcher: Callable[..., Any]) -> None:
        super().__init__(module, dtype, patcher)
        config = module.config
        self.latent_channels, self.output_channels = config.latent_dim, config.io_channels
        self.latent_dim, self.disable_offload = 1, True
        self.upscale_ratio = self.downscale_ratio = config.samples_per_latent
        self.crop_input, self.pad_channel_value = False, "replicate"
        self.audio_sample_rate, self.audio_sample_rate_output = ENCODE_RATE, FILM_RATE
        self.process_input = self.process_output = lambda sound: sound
        self.working_dtypes = [torch.float32]
        self.format_encoded = lambda latents: latents.transpose(1, 2).contiguous()
        self.memory_used_decode = lambda shape, dtype: _sound_bytes(config, shape[1], dtype, self.device)
        self.memory_used_encode = lambda shape, dtype: _sound_bytes(
            config, math.ceil(shape[2] / config.samples_per_latent), dtype, self.device
        )

    @full_float32()
    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] = {}) -> Tensor:  # noqa: ARG002, B006
        """Return the sound (B, N, 2) at 44100 Hz of latents (B, 64, A)."""
        self.check_latents(samples_in)
        sound = to_film_rate(super().decode(samples_in.transpose(1, 2)).movedim(-1, 1))
        check_finite({"sound": sound}, "decoding the sound", "check the weights")
        return sound.movedim(1, -1)

    def vae_output_dtype(self) -> torch.dtype:
        """Always float32: the resampling works in it, and sound of 11 bits would be heard."""
        return torch.float32

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """The same as `decode`."""
        return self.decode(samples)

    @full_float32()
    def decode_tiled_1d(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """What the host calls where memory has run out: smaller pieces."""
        samples = samples.to(self.device, self.vae_dtype)
        return self.first_stage_model.decode(samples, chunk=LEAST_CHUNK).to(self.output_device)

    @full_float32()
    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Return latents (B, 64, A) of sound (B, N, C) at 51200 Hz."""
        return super().encode(pixel_samples)

    def encode_tiled(self, pixel_samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """The same as `encode`."""
        return self.encode(pixel_samples)

    @full_float32()
    def encode_tiled_1d(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """What the host calls where memory has run out: smaller pieces."""
        samples = samples.to(self.device, self.vae_dtype)
        return self.first_stage_model.encode(samples, chunk=LEAST_CHUNK).to(self.output_device)

    def check_latents(self, samples: Tensor) -> None:
        """Raise ValueError for latents that are not (B, 64, A)."""
        if samples.ndim != 3 or samples.shape[1] != self.latent_channels or 0 in samples.shape:
            raise ValueError(
                f"samples: this VAE decodes audio latents (batch, {self.latent_channels}, length), "
                f"got {tuple(samples.shape)}; connect the latent of a HappyHorse film"
            )

    def check_input(self, pixels: Tensor) -> None:
        """Raise ValueError for what is not sound (B, N, C) of at least one latent."""
        if pixels.ndim != 3 or pixels.shape[1] < self.downscale_ratio or 0 in pixels.shape:
            raise ValueError(
                f"audio: this VAE encodes sound (batch, samples, channels) of {self.downscale_ratio} "
                f"samples or more at {ENCODE_RATE} Hz, got {tuple(pixels.shape)}; connect a longer AUDIO"
            )


def load_audio_vae(path: Path) -> AudioVAEObject:
    """Load the audio VAE as a VAE of the host, always in float32; raises as `load_video_vae` does."""
    vae = AudioVAEObject(
        load_network(open_checkpoint(path, "audio_vae"), torch.float32, AudioVAE),
        torch.float32,
        comfy.model_patcher.ModelPatcher,
    )
    vae.patcher.cached_patcher_init = (_audio_patcher, (path,))
    return vae


def _sound_bytes(config: Config, latents: int, dtype: torch.dtype, device: torch.device) -> float:
    shape = FilmShape(SIZE_STEP, SIZE_STEP, max(1, latents))
    return SMALL_TENSORS * activations("audio_vae", config, shape, dtype, device)


def _audio_patcher(path: Path, disable_dynamic: bool = False) -> Any:  # noqa: ARG001
    return load_audio_vae(path).patcher
