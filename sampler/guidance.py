"""Classifier-free guidance as published: weights by noise level for the base model, by latent frame for
super-resolution."""

import torch
from torch import Tensor

from ..model.packing import Latents
from .schedule import integer_time

AUDIO_SCALE = 5.0
HIGH_NOISE_VIDEO_SCALE, LOW_NOISE_VIDEO_SCALE = 5.0, 2.0
HIGH_NOISE_TIME = 500
FIRST_FRAMES, FIRST_FRAMES_SCALE, LATER_FRAMES_SCALE = 13, 2.0, 3.5


def base_video_scale(sigma: float) -> float:
    """The base model's video guidance weight at noise level `sigma`."""
    return HIGH_NOISE_VIDEO_SCALE if integer_time(sigma) > HIGH_NOISE_TIME else LOW_NOISE_VIDEO_SCALE


def super_resolution_video_scale(frames: int, device: torch.device | None = None) -> Tensor:
    """The super-resolution models' video guidance weight per latent frame, [F, 1, 1]."""
    scale = torch.full((frames, 1, 1), LATER_FRAMES_SCALE, device=device)
    scale[:FIRST_FRAMES] = FIRST_FRAMES_SCALE
    return scale


def guide(conditional: Latents, unconditional: Latents, video_scale: float | Tensor) -> Latents:
    """Return unconditional + scale (conditional - unconditional); audio always takes its fixed weight.

    Published for velocities; clean predictions, which are linear in them, give the same.
    """
    video = unconditional.video + video_scale * (conditional.video - unconditional.video)
    audio = unconditional.audio + AUDIO_SCALE * (conditional.audio - unconditional.audio)
    return Latents(video, audio)
