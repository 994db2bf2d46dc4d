"""The packed sequence of one sample: [video tokens | audio tokens | text tokens], and where each token lies.

Letters: B batch, S packed tokens, C channels, F latent frames, Y/X latent rows and columns, A audio latents,
L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .operations import Spans

LATENTS_FORMAT = "happyhorse latents 1"  # of a file that holds `Latents`
PATCH = 2  # a video token covers 1 x 2 x 2 latents


class Latents(NamedTuple):
    """Both streams of a film: video [B, C, F, Y, X] and audio [B, A, C], float32, normalised."""

    video: Tensor
    audio: Tensor

    def map(self, function: Callable[..., Tensor], *others: "Latents") -> "Latents":
        """Apply `function` to the video tensors of self and `others`, and to the audio tensors."""
        return Latents(*(function(*streams) for streams in zip(self, *others, strict=True)))


@dataclass(frozen=True)
class PackedLayout:
    """How one shape of film and prompt is packed; computed once per shape and passed along.

    `frames` x `rows` x `columns` is the grid of video tokens; `coords_style` is 'v1' or 'v2'.
    """

    frames: int
    rows: int
    columns: int
    audio_tokens: int
    text_tokens: int
    coords_style: str

    def __post_init__(self) -> None:
        # v1 stretches text over [0, 1] and audio over the film: with one token there is nothing to stretch
        if self.coords_style == "v1" and self.text_tokens == 1:
            raise ValueError(
                "super-resolution needs a prompt of at least 2 tokens, got 1; write a longer prompt"
            )
        if self.coords_style == "v1" and self.audio_tokens == 1 and self.frames > 1:
            raise ValueError(
                f"super-resolution needs at least 2 audio latents for {self.frames} latent frames, got 1"
            )

    @classmethod
    def of(cls, latents: Latents, text: Tensor, coords_style: str) -> "PackedLayout":
        """The layout for these latents and text states [B, L, C]; raises ValueError where they do not fit
        together.
        """
        batch, _, frames, rows, columns = latents.video.shape
        if rows % PATCH or columns % PATCH:
            raise ValueError(f"video latents must have even rows and columns, got {rows}x{columns}")
        if not batch == latents.audio.shape[0] == text.shape[0]:
            raise ValueError(
                "video, audio and text need one batch size, "
                f"got {batch}, {latents.audio.shape[0]}, {text.shape[0]}"
            )
        return cls(
            frames, rows // PATCH, columns // PATCH, latents.audio.shape[1], text.shape[1], coords_style
        )

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens of one latent frame."""
        return self.rows * self.columns

    @property
    def video_tokens(self) -> int:
        """Video tokens of the film."""
        return self.frames * self.tokens_per_frame

    @property
    def total_tokens(self) -> int:
        """S, the length of the sequence."""
        return self.video_tokens + self.audio_tokens + self.text_tokens

    @property
    def spans(self) -> Spans:
        """(start, stop) of the video, audio and text tokens."""
        audio = self.video_tokens + self.audio_tokens
        return (0, self.video_tokens), (self.video_tokens, audio), (audio, self.total_tokens)

    def coordinates(self, device: torch.device | None = None) -> Tensor:
        """Return [S, 9] float32: each token's position, own size and reference size along (time, row,
        column).
        """
        video = (self.frames, self.rows, self.columns)
        audio_reference = self.frames if self.coords_style == "v1" else (self.audio_tokens - 1) // 4 + 1
        text_reference, text_start = (2, 0) if self.coords_style == "v1" else (1, -self.text_tokens)
        return torch.cat(
            (
                _coordinates(video, video, 0, device),
                _coordinates((self.audio_tokens, 1, 1), (audio_reference, 1, 1), 0, device),
                _coordinates((self.text_tokens, 1, 1), (text_reference, 1, 1), text_start, device),
            )
        )


def _coordinates(
    size: tuple[int, int, int], reference: tuple[int, int, int], start: int, device: torch.device | None
) -> Tensor:
    # -> [prod(size), 9]
    axes = [torch.arange(length, dtype=torch.float32, device=device) for length in size]
    axes[0] = axes[0] + start
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    sizes = torch.tensor(size + reference, dtype=torch.float32, device=device)
    return torch.cat((positions, sizes.expand(len(positions), 6)), dim=1)


def patchify(video: Tensor) -> Tensor:
    """[B, C, F, 2Y, 2X] -> [B, F*Y*X, C*4], the latent channel slowest, as the network reads it."""
    return rearrange(video, "b c f (y dy) (x dx) -> b (f y x) (c dy dx)", dy=PATCH, dx=PATCH)


def unpatchify(tokens: Tensor, layout: PackedLayout) -> Tensor:
    """[B, F*Y*X, 4*C] -> [B, C, F, 2Y, 2X], the latent channel fastest, as the network predicts it."""
    return rearrange(
        tokens, "b (f y x) (dy dx c) -> b c f (y dy) (x dx)",
        f=layout.frames, y=layout.rows, x=layout.columns, dy=PATCH, dx=PATCH,
    )  # fmt: skip
