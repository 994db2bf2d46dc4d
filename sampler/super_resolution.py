"""From the base latents to what the super-resolution model starts from; no pixels in between."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.packing import Latents

RENOISE_TIME = 220  # of 1000, counted from the clean end
AUDIO_NOISE = 0.7  # share of noise in the audio that the model sees as context


def zero_terminal_snr_alphas() -> Tensor:
    """Return the 1000 signal amplitudes sqrt(cumprod(1 - beta)), float32, the last one moved to 0.

    Scaled-linear betas with the rescaling of "Common diffusion noise schedules and sample steps are flawed"
    (arXiv:2305.08891), algorithm 1.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt().float()
    first, last = alphas[0].clone(), alphas[-1].clone()
    return (alphas - last) * first / (first - last)


def renoise_video(video: Tensor, noise: Tensor) -> Tensor:
    """Put clean video latents to the noise level at which super-resolution begins (variance preserving)."""
    alpha = zero_terminal_snr_alphas()[RENOISE_TIME].item()
    return alpha * video + (1 - alpha**2) ** 0.5 * noise


def mix_audio(audio: Tensor, noise: Tensor) -> Tensor:
    """The audio that the super-resolution model sees."""
    return AUDIO_NOISE * noise + (1 - AUDIO_NOISE) * audio


def resize_video(video: Tensor, rows: int, columns: int) -> Tensor:
    """Resize latents [B, C, F, Y, X] to `rows` x `columns`, trilinear with aligned corners."""
    size = (video.shape[2], rows, columns)
    return F.interpolate(video, size=size, mode="trilinear", align_corners=True)


def prepare(base: Latents, noise: Latents, rows: int, columns: int) -> Latents:
    """Return the latents super-resolution starts from; `noise` has the target's shapes.

    The audio is context only: it is held while sampling, and the film keeps the base audio.
    """
    video = renoise_video(resize_video(base.video, rows, columns), noise.video)
    return Latents(video, mix_audio(base.audio, noise.audio))
