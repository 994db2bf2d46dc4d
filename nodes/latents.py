"""LATENTs of films with sound: made, checked and taken apart.

A LATENT holds a NestedTensor of raw Wan2.2 video (B, 48, T, H, W) and audio (B, 64, A), and perhaps a noise
mask of (B, 1, T, H, W) and (B, 1, A) in which 1 is generated and 0 is kept.
"""

from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ..model.config import MAGIHUMAN, TransformerConfig
from ..model.geometry import PIXELS_PER_LATENT, FilmShape
from ..model.packing import PATCH

MAKE_ONE = "make it with HappyHorse Empty Latent or another of the HappyHorse latent nodes"
CONFIG = MAGIHUMAN.transformers["distill"]


def film_latent(
    video: Tensor, audio: Tensor, video_mask: Tensor | None = None, audio_mask: Tensor | None = None
) -> dict[str, Any]:
    """The LATENT of raw video (B, 48, T, H, W) and audio (B, 64, A); a mask left out is all ones."""
    latent: dict[str, Any] = {"samples": NestedTensor([video, audio])}
    if video_mask is not None or audio_mask is not None:
        ones = torch.ones_like(video[:, :1]), torch.ones_like(audio[:, :1])
        given = (video_mask, audio_mask)
        latent["noise_mask"] = NestedTensor(
            [one if mask is None else mask for one, mask in zip(ones, given, strict=True)]
        )
    return latent


def check_shapes(
    shapes: Sequence[Sequence[int]], config: TransformerConfig = CONFIG, socket: str = "latent"
) -> None:
    """Raise ValueError unless these are the shapes of one film's video and audio latents."""
    if len(shapes) != 2:
        found = f"{len(shapes)} stream(s) {_words(shapes)}"
        raise ValueError(f"{socket}: a film with sound is needed, got {found}; {MAKE_ONE}")
    video, audio = shapes
    channels = config.latent_channels, config.audio_in_channels
    if len(video) != 5 or len(audio) != 3 or (video[1], audio[1]) != channels:
        raise ValueError(
            f"{socket}: latents of another model, {_words(shapes)}; video (B, {channels[0]}, T, H, W) and "
            f"audio (B, {channels[1]}, A) are needed, {MAKE_ONE}"
        )
    if video[0] != audio[0] or video[2] != (audio[2] - 1) // 4 + 1:
        raise ValueError(
            f"{socket}: video and audio do not belong to one film, {_words(shapes)}; {audio[2]} audio "
            f"latents go with {(audio[2] - 1) // 4 + 1} latent frames of the same batch size"
        )
    if video[3] % PATCH or video[4] % PATCH:
        raise ValueError(
            f"{socket}: the picture must be a multiple of 32 pixels wide and high, got "
            f"{video[4] * PIXELS_PER_LATENT}x{video[3] * PIXELS_PER_LATENT}"
        )


def _words(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)


def streams(latent: dict[str, Any], socket: str = "latent") -> tuple[Tensor, Tensor]:
    """The raw video (B, 48, T, H, W) and audio (B, 64, A) of a LATENT; raises ValueError."""
    samples = latent["samples"]
    tensors = samples.unbind() if samples.is_nested else [samples]
    check_shapes([tensor.shape for tensor in tensors], socket=socket)
    return tensors[0], tensors[1]


def masks(latent: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The noise masks (B, 1, T, H, W) and (B, 1, A) of a checked LATENT, ones where there are none.

    Masks of stock nodes, at the size of pixels or with a mask per channel, come out as the sampler would use
    them, of the latents' size. Raises ValueError for more masks than streams.
    """
    both = streams(latent)
    found = latent.get("noise_mask")
    given = [] if found is None else found.unbind() if found.is_nested else [found]
    if len(given) > len(both):
        raise ValueError(
            f"latent: {len(given)} noise masks for a film of picture and sound; give one for each"
        )
    fitted = [
        comfy.utils.reshape_mask(mask, (len(stream), 1, *stream.shape[2:]))[:, :1]
        for mask, stream in zip(given, both[: len(given)], strict=True)
    ]
    return tuple([*fitted, *(torch.ones_like(stream[:, :1]) for stream in both[len(fitted) :])])


def start_audio(latent: dict[str, Any]) -> Tensor | None:
    """The sound that a LATENT gives as a start, as long as it holds just that sound."""
    given = latent.get("start_audio")
    return given if given is not None and given is latent["samples"].unbind()[-1] else None


def shape_of(latent: dict[str, Any], socket: str = "latent") -> FilmShape:
    """The size of the film of a LATENT."""
    video, audio = streams(latent, socket)
    height, width = (PIXELS_PER_LATENT * side for side in video.shape[-2:])
    return FilmShape(width, height, audio.shape[2])
