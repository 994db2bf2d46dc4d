"""What comes in from other nodes: pictures, sounds, films and VAEs, checked and encoded.

The numbers are the command line's: a picture goes through Pillow, a sound through FFmpeg.
"""

import logging
import math
from fractions import Fraction
from typing import Any

import comfy.model_management
import comfy.sd
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..media import prepare_image, resample_sound
from ..model.audio_vae import ENCODE_RATE, encode_driving_audio
from ..model.finite import check_finite
from ..model.geometry import FPS, FilmShape
from ..sampler.pipeline import READ_SECONDS, driving_audio
from .audio_vae import AudioVAEObject, full_float32
from .vae import VideoVAEObject

log = logging.getLogger(__name__)
VIDEO_CHANNELS = 48
MAX_CHANNELS = 8  # of a sound
CURE = "check the weights, or load them with weight_dtype float32"
Audio = dict[str, Any]  # the host's AUDIO: waveform (B, C, N) and sample_rate


def check_video_vae(vae: comfy.sd.VAE, socket: str = "vae", encodes: bool = False) -> None:
    """Raise ValueError unless a socket's VAE decodes Wan2.2 video latents, and encodes if that is needed."""
    if (getattr(vae, "latent_channels", None), getattr(vae, "latent_dim", None)) != (VIDEO_CHANNELS, 3):
        raise ValueError(
            f"{socket}: this must be a VAE for video latents of {VIDEO_CHANNELS} channels, "
            f"got {_describe(vae)}; connect the Wan2.2 VAE or turbo decoder from HappyHorse Load Video VAE"
        )
    if encodes and isinstance(vae, VideoVAEObject) and not vae.can_encode:
        raise ValueError(
            f"{socket}: the turbo decoder cannot encode; load the Wan2.2 VAE with HappyHorse Load Video VAE"
        )


def check_audio_vae(vae: comfy.sd.VAE, socket: str = "audio_vae") -> None:
    """Raise ValueError unless a socket's VAE is the audio VAE of HappyHorse Load Audio VAE."""
    if not isinstance(vae, AudioVAEObject):
        raise ValueError(
            f"{socket}: this must be the audio VAE of the film, got {_describe(vae)}; "
            f"connect the audio VAE from HappyHorse Load Audio VAE"
        )


def _describe(vae: Any) -> str:
    if vae is None:
        return "nothing"
    channels = getattr(vae, "latent_channels", None)
    return f"a VAE for latents of {channels} channels" if channels else type(vae).__name__


def check_sound(audio: Audio, socket: str = "audio") -> None:
    """Raise ValueError for a sound that is empty or not finite."""
    if audio is None:  # what Get Video Components gives for a film without sound
        raise ValueError(f"{socket}: there is no sound in what is connected; connect a sound")
    waveform = audio["waveform"]
    if waveform.ndim != 3 or 0 in waveform.shape or not waveform.isfinite().all():
        found = "values that are not finite numbers" if waveform.numel() else "no samples"
        raise ValueError(f"{socket}: the sound holds {found}; connect another sound")
    if waveform.shape[1] > MAX_CHANNELS:
        raise ValueError(
            f"{socket}: a sound of at most {MAX_CHANNELS} channels (7.1) is needed, got "
            f"{waveform.shape[1]}; mix it to stereo, or connect another sound"
        )


def one_sound(audio: Audio, sample_rate: int, channels: int, socket: str = "audio") -> Tensor:
    """The sound of a socket as [channels, N] at `sample_rate`, at most a little longer than any film."""
    check_sound(audio, socket)
    waveform, rate = audio["waveform"], audio["sample_rate"]
    if waveform.shape[0] != 1:
        raise ValueError(f"{socket}: one sound is needed, got a batch of {waveform.shape[0]}; connect one")
    return resample_sound(waveform[0, :, : math.ceil(READ_SECONDS * rate)], rate, sample_rate, channels)


def encode_sound(
    audio_vae: AudioVAEObject, audio: Audio, shape: FilmShape, generator: torch.Generator | None = None
) -> Tensor:
    """The latents (1, 64, A) of a sound as long as a film; `generator` draws them instead of the mean."""
    check_audio_vae(audio_vae)
    waveform = driving_audio(one_sound(audio, ENCODE_RATE, 1), shape, "audio: the sound", log.warning)
    needed = audio_vae.memory_used_encode((1, 2, waveform.shape[1]), audio_vae.vae_dtype)
    comfy.model_management.load_models_gpu([audio_vae.patcher], memory_required=needed, force_full_load=True)
    module = audio_vae.first_stage_model
    with comfy.model_management.cuda_device_context(audio_vae.device), full_float32():
        latents = encode_driving_audio(module, waveform.to(audio_vae.device), generator=generator)
    check_finite({"audio": latents}, "encoding the audio", CURE)
    return latents.transpose(1, 2).contiguous().to(audio_vae.output_device)


def check_pictures(images: Tensor, socket: str) -> None:
    """Raise ValueError for an IMAGE that is not (F, H, W, 3 or 4) or not finite."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"{socket}: pictures in colour (frames, height, width, 3) are needed, got {tuple(images.shape)}; "
            "connect another IMAGE"
        )
    if not images.isfinite().all():
        raise ValueError(f"{socket}: it holds values that are not finite numbers; connect another picture")


def picture(frame: Tensor) -> Image.Image:
    """One frame (H, W, 3 or 4) of an IMAGE in [0, 1] as a picture."""
    values = (frame[..., :3].cpu().float() * 255).round().clamp(0, 255)
    return Image.fromarray(np.ascontiguousarray(values.to(torch.uint8).numpy()))


def fit_frames(images: Tensor, shape: FilmShape) -> Tensor:
    """Frames (F, H, W, C) in [0, 1] cropped about the centre and resized to the film: (F, Y, X, 3)."""
    frames = [prepare_image(picture(frame), shape.width, shape.height)[0] for frame in images]
    return torch.stack(frames).movedim(1, -1) / 2 + 0.5


def encode_first_frame(vae: comfy.sd.VAE, image: Tensor, shape: FilmShape) -> Tensor:
    """The raw latent (1, 48, 1, H, W) of the one picture of an IMAGE, at the size of a film."""
    check_video_vae(vae, encodes=True)
    if image.ndim == 4 and image.shape[0] != 1:
        raise ValueError(
            f"image: one picture is needed, got a batch of {len(image)}; choose one with Get Image from Batch"
        )
    check_pictures(image, "image")
    return vae.encode(fit_frames(image, shape))


def film_frames(video: Any, images: Tensor | None, audio: Audio | None) -> tuple[Tensor, Audio | None]:
    """The frames at 25 a second and the sound of either a VIDEO or an IMAGE; raises ValueError for both."""
    if (video is None) == (images is None):
        found = "neither" if video is None else "both"
        raise ValueError(f"video, images: exactly one of them is needed, got {found}; connect one")
    if images is not None:
        check_pictures(images, "images")
        return images, audio
    parts = video.get_components()
    if len(parts.images) == 0:
        raise ValueError("video: it holds no pictures; connect another, or trim less of it")
    frames, rate = parts.images, Fraction(parts.frame_rate)
    if rate != FPS:
        log.warning("video: its %g frames a second become %d by nearest time", float(rate), FPS)
        times = torch.arange(max(1, round(len(frames) / rate * FPS))) / FPS
        nearest = (times * float(rate) + 0.5).long()
        frames = frames[nearest.clamp(max=len(frames) - 1)]
    return frames, audio if audio is not None else parts.audio


def encode_film(
    vae: comfy.sd.VAE, audio_vae: AudioVAEObject, frames: Tensor, audio: Audio | None, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The raw latents of 4n+1 frames (F, H, W, 3) and of their sound: (1, 48, T, H, W) and (1, 64, F)."""
    check_video_vae(vae, encodes=True)
    check_audio_vae(audio_vae)
    shape = FilmShape(*size, len(frames))
    if audio is None:
        log.warning("audio: the film has no sound, silence is encoded")
        audio = {"waveform": torch.zeros(1, 1, ENCODE_RATE), "sample_rate": ENCODE_RATE}
    return vae.encode(fit_frames(frames, shape)), encode_sound(audio_vae, audio, shape)
