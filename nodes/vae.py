"""The video VAEs as the host's VAE objects, for our nodes and for every stock node that takes a VAE.

Latents are raw here, (B, 48, T, H, W) as the Wan2.2 VAE makes them, not normalised.
Letters: B batch, T latent frames, H/W latent rows and columns, F pixel frames.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..model.checkpoint import Checkpoint, load, open_checkpoint
from ..model.config import Config
from ..model.finite import check_finite
from ..model.geometry import PIXELS_PER_LATENT, SIZE_STEP, FilmShape
from ..model.video_decoder import VideoDecoder
from ..model.video_vae import PATCH, FrameCache, VideoVAE, normalize_latents, patchify
from ..sampler.activations import SMALL_TENSORS, activations
from .operations import operations

WEIGHT_DTYPES = {"default": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
WORKING_DTYPES = [torch.bfloat16, torch.float32]
FRAMES_PER_LATENT = 4
CURE = "check the weights, or load the VAE with weight_dtype float32"


class FilmDecoding:
    """What the host asks of a video network: raw latents -> a film, chunk by chunk."""

    comfy_has_chunked_io = True

    def film_chunks(self, latents: Tensor, bar: comfy.utils.ProgressBar | None = None) -> Iterator[Tensor]:
        """Yield the film of raw `latents` [B, 48, T, H, W] as chunks [B, 3, f, 16H, 16W] of about [-1, 1].

        Stops with ValueError where pixels are not finite, and where the user interrupts.
        """
        for chunk in self.decode_chunks(normalize_latents(latents)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            check_finite({"pixel": chunk}, "decoding the picture", CURE)
            if bar is not None:
                bar.update(chunk.shape[2])
            yield chunk

    def decode_output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the film [B, 3, F, Y, X] of latents of `shape`."""
        batch, _, frames, rows, columns = shape
        return batch, 3, pixel_frames(frames), PIXELS_PER_LATENT * rows, PIXELS_PER_LATENT * columns

    def decode(self, latents: Tensor, output_buffer: Tensor | None = None) -> Tensor:
        """Return the film of raw `latents`, in `output_buffer` if given, with a progress bar then."""
        shape = self.decode_output_shape(latents.shape)
        bar = None if output_buffer is None else comfy.utils.ProgressBar(shape[2])
        film = output_buffer
        if film is None:
            film = torch.empty(shape, device=comfy.model_management.intermediate_device())
        done = 0
        for chunk in self.film_chunks(latents, bar):
            film[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        return film


class HostVideoVAE(FilmDecoding, VideoVAE):
    """The Wan2.2 VAE behind the host's calling convention."""

    def encode(self, video: Tensor, device: torch.device | None = None) -> Tensor:
        """Return the raw latents [B, 48, k+1, H/16, W/16] of `video` [B, 3, 4k+1, H, W] in [-1, 1].

        With `device` the chunks go there one by one, and there is a progress bar.
        """
        self._check_video(video)
        bar = None if device is None else comfy.utils.ProgressBar(video.shape[2])
        cache, means = FrameCache(), []
        for chunk in video.tensor_split(list(range(1, video.shape[2], self.frames_per_latent)), dim=2):
            comfy.model_management.throw_exception_if_processing_interrupted()
            pixels = chunk.to(device or video.device, self.conv1.weight.dtype)
            mean, _ = self.conv1(self.encoder(patchify(pixels, PATCH), cache)).chunk(2, dim=1)
            means.append(mean.float())
            if bar is not None:
                bar.update(chunk.shape[2])
        latents = torch.cat(means, dim=2)
        check_finite({"latent": latents}, "encoding the picture", CURE)
        return latents


class HostVideoDecoder(FilmDecoding, VideoDecoder):
    """The turbo decoder behind the host's calling convention; it has no encoder."""


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "video_vae": HostVideoVAE,
    "video_decoder": HostVideoDecoder,
}


class CheckedVAE(comfy.sd.VAE):
    """The host's VAE object around a network of ours; what it is given is checked first."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, patcher: Callable[..., Any]) -> None:
        with _without_warning():  # that there are no weights: we bring them
            super().__init__(sd={})
        management = comfy.model_management
        self.first_stage_model, self.vae_dtype = module, dtype
        management.archive_model_dtypes(module)
        self.device, self.output_device = management.vae_device(), management.intermediate_device()
        self.patcher = patcher(
            module, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.model_size()

    def check_latents(self, samples: Tensor) -> None:
        """Raise ValueError for latents that are not this VAE's."""
        raise NotImplementedError

    def check_input(self, pixels: Tensor) -> None:
        """Raise ValueError for pixels or sound that cannot be encoded."""
        raise NotImplementedError

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """The host's cutting to whole latents; everything to be encoded comes by here first."""
        self.check_input(pixels)
        if pixels.ndim < 5:
            return super().vae_encode_crop_pixels(pixels)
        # of a batch of films the host would cut the number of frames, too
        return super().vae_encode_crop_pixels(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


class VideoVAEObject(CheckedVAE):
    """The Wan2.2 VAE or the turbo decoder as a VAE of the host, for raw latents (B, 48, T, H, W).

    Tiles are cut in space only: along time both networks need the same memory for any length.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, patcher: Callable[..., Any]) -> None:
        super().__init__(module, dtype, patcher)
        config = module.config
        self.can_encode = isinstance(module, VideoVAE)
        self.latent_channels = config.z_dim if self.can_encode else config.latent_channels
        self.latent_dim, self.output_channels = 3, 3
        self.upscale_ratio = (pixel_frames, PIXELS_PER_LATENT, PIXELS_PER_LATENT)
        self.upscale_index_formula = (FRAMES_PER_LATENT, PIXELS_PER_LATENT, PIXELS_PER_LATENT)
        self.downscale_ratio = (latent_frames, PIXELS_PER_LATENT, PIXELS_PER_LATENT)
        self.downscale_index_formula = self.upscale_index_formula
        self.working_dtypes = WORKING_DTYPES
        self.memory_used_decode = partial(_decoding_bytes, config, self.device)
        self.memory_used_encode = partial(_encoding_bytes, config, self.device)

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] = {}) -> Tensor:  # noqa: B006
        """Return the film (B, F, Y, X, 3) in [0, 1] of raw latents (B, 48, T, H, W)."""
        self.check_latents(samples_in)
        return super().decode(samples_in, vae_options)

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`decode` in tiles, sizes and overlap in latents."""
        self.check_latents(samples)
        return super().decode_tiled(samples, *args, **kwargs)

    def decode_stream(self, samples: Tensor) -> Iterator[Tensor]:
        """Yield the film of raw latents (1, 48, T, H, W) as chunks [1, 3, f, Y, X] of about [-1, 1].

        They are on the VAE's device; the film is nowhere as a whole. With a progress bar.
        """
        self.check_latents(samples)
        bar = comfy.utils.ProgressBar(pixel_frames(samples.shape[2]))
        with comfy.model_management.cuda_device_context(self.device):
            self.prepare_decode(samples.shape)
            yield from self.first_stage_model.film_chunks(samples.to(self.device), bar)

    def decode_tiled_3d(
        self,
        samples: Tensor,
        tile_t: int = 0,  # noqa: ARG002
        tile_x: int = 32,
        tile_y: int = 32,
        overlap: tuple[int, int, int] = (1, 8, 8),
    ) -> Tensor:
        """What the host calls for tiles, and where memory has run out; every tile lasts the whole film."""

        def decode(tile: Tensor) -> Tensor:
            return self.first_stage_model.decode(tile.to(self.device, self.vae_dtype))

        film = _in_tiles(
            samples, decode, (tile_y, tile_x), overlap[1], upscale_amount=self.upscale_ratio,
            out_channels=self.output_channels, index_formulas=self.upscale_index_formula,
            output_device=self.output_device,
        )  # fmt: skip
        return self.process_output(film)

    def encode_tiled_3d(
        self,
        samples: Tensor,
        tile_t: int = 0,  # noqa: ARG002
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: tuple[int, int, int] = (1, 64, 64),
    ) -> Tensor:
        """The twin of `decode_tiled_3d`, sizes and overlap in pixels."""

        def encode(tile: Tensor) -> Tensor:
            return self.first_stage_model.encode(self.process_input(tile).to(self.device, self.vae_dtype))

        return _in_tiles(
            samples, encode, (tile_y, tile_x), overlap[1], upscale_amount=self.downscale_ratio,
            out_channels=self.latent_channels, index_formulas=self.downscale_index_formula,
            output_device=self.output_device, downscale=True,
        )  # fmt: skip

    def check_latents(self, samples: Tensor) -> None:
        """Raise ValueError for latents that are not (B, 48, T, H, W)."""
        if samples.ndim != 5 or samples.shape[1] != self.latent_channels or 0 in samples.shape:
            raise ValueError(
                f"samples: this VAE decodes video latents (batch, {self.latent_channels}, frames, rows, "
                f"columns), got {tuple(samples.shape)}; connect the latent of a HappyHorse film"
            )

    def check_input(self, pixels: Tensor) -> None:
        """Raise ValueError for what is not (F, Y, X, 3) with 4k+1 frames, or where there is no encoder."""
        if not self.can_encode:
            raise ValueError(
                "vae: the turbo decoder cannot encode; load the Wan2.2 VAE with HappyHorse Load Video VAE "
                "and connect it here"
            )
        if pixels.ndim not in (4, 5) or pixels.shape[-1] < 3 or min(pixels.shape[-3:-1]) < PIXELS_PER_LATENT:
            raise ValueError(
                f"pixels: this VAE encodes images (frames, height, width, 3) of {PIXELS_PER_LATENT} x "
                f"{PIXELS_PER_LATENT} pixels or more, got {tuple(pixels.shape)}; connect such an IMAGE"
            )
        frames = pixels.shape[-4]
        if frames % FRAMES_PER_LATENT != 1:
            fewer = pixel_frames(latent_frames(frames))
            raise ValueError(
                f"pixels: a film must have 4n+1 frames to be encoded, got {frames}; "
                f"take {fewer or 1} of them, or repeat the last until there are {fewer + FRAMES_PER_LATENT}"
            )


def pixel_frames(latent_frames: int) -> int:
    """Frames of so many latent frames."""
    return max(0, FRAMES_PER_LATENT * latent_frames - FRAMES_PER_LATENT + 1)


def latent_frames(pixel_frames: int) -> int:
    """Whole latent frames of so many frames."""
    return max(0, (pixel_frames + FRAMES_PER_LATENT - 1) // FRAMES_PER_LATENT)


def _in_tiles(
    samples: Tensor, function: Callable[[Tensor], Tensor], tile: tuple[int, int], overlap: int, **kwargs: Any
) -> Tensor:
    """The host's blending of tiles of (rows, columns), with a progress bar and tiles as long as `samples`."""
    overlap = min(overlap, min(tile) // 2)
    rows, columns = samples.shape[3:]
    steps = samples.shape[0] * comfy.utils.get_tiled_scale_steps(columns, rows, tile[1], tile[0], overlap)
    return comfy.utils.tiled_scale_multidim(
        samples, function, tile=(samples.shape[2], *tile), overlap=(1, overlap, overlap),
        pbar=comfy.utils.ProgressBar(steps), **kwargs,
    )  # fmt: skip


def _decoding_bytes(
    config: Config, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> float:
    frames, rows, columns = shape[2:]
    film = _film(rows * PIXELS_PER_LATENT, columns * PIXELS_PER_LATENT, frames)
    return SMALL_TENSORS * activations("video_decoder", config, film, dtype, device)


def _encoding_bytes(
    config: Config, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> float:
    frames, height, width = shape[2:]
    return SMALL_TENSORS * activations("video_vae", config, _film(height, width, frames), dtype, device)


def _film(height: int, width: int, frames: int) -> FilmShape:
    # the plan knows films only, whose sides are whole tokens
    width, height = (math.ceil(side / SIZE_STEP) * SIZE_STEP for side in (width, height))
    return FilmShape(width, height, pixel_frames(max(1, frames)))


@contextmanager
def _without_warning() -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return "No VAE weights detected" not in record.getMessage()

    logging.getLogger().addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(keep)


def load_video_vae(path: Path, dtype_name: str = "default") -> VideoVAEObject:
    """Load a Wan2.2 VAE or a turbo decoder, whichever the file holds, as a VAE of the host.

    `dtype_name` is one of WEIGHT_DTYPES; the default is the host's choice: float32 on a CPU, bfloat16 where
    the device has it. Raises FileNotFoundError or ValueError saying what is wrong with the file.
    """
    vae = _load_video_vae(path, dtype_name)
    vae.patcher.cached_patcher_init = (_video_patcher, (path, dtype_name))
    return vae


def _load_video_vae(path: Path, dtype_name: str, disable_dynamic: bool = False) -> VideoVAEObject:
    checkpoint = open_checkpoint(path)
    if checkpoint.part not in ("video_vae", "video_decoder"):
        raise ValueError(
            f"vae: {path} holds the {checkpoint.label}; choose the Wan2.2 VAE or the turbo decoder"
        )
    device = comfy.model_management.vae_device()
    dtype = WEIGHT_DTYPES[dtype_name] or comfy.model_management.vae_dtype(device, WORKING_DTYPES)
    patchers = comfy.model_patcher
    patcher = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    return VideoVAEObject(load_network(checkpoint, dtype, NETWORKS[checkpoint.part]), dtype, patcher)


def load_network(checkpoint: Checkpoint, dtype: torch.dtype, network: Callable[..., nn.Module]) -> nn.Module:
    """Load the network of a VAE with the host's layers, with a progress bar."""
    bar = comfy.utils.ProgressBar(len(checkpoint.names))
    network = partial(network, operations=operations())
    return load(checkpoint, dtype, progress=bar.update_absolute, network=network)


def _video_patcher(path: Path, dtype_name: str, disable_dynamic: bool = False) -> Any:
    return _load_video_vae(path, dtype_name, disable_dynamic).patcher
