"""The light video decoder (TurboVAED): normalised video latents -> pixels, in windows of constant memory.

It is not causal: a frame depends on its neighbours on both sides. A film is therefore decoded in windows
that see one more latent on either side and drop its frames. Where memory is short, a window is decoded in
tiles that see all latents beyond their edges that matter: they need no blending, and differ from the whole by
rounding only. F latent frames give 4F-3 frames, 16 times as large.
Shapes and layout are those of video_vae.py: [B, C, F, Y, X], channels last in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import operations
from .config import VideoDecoderConfig
from .video_vae import (
    check_latents,
    denormalize_latents,
    double_size,
    interleave_frames,
    per_frame,
    unpatchify,
)

PIECE_FRAMES, PIECE_VALUES = 4, 2**23  # go through a convolution at once, whichever is more

# Fields of the published configuration that ours does not have, with the only value this file implements.
IMPLEMENTED = {
    "decoder_causal": False,
    "decoder_is_dw_conv": False,  # one flag per block
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1,
    "use_unpatchify": True,
}
# Fields of the encoder, of what is refused above, and those that follow from the lists of blocks.
IGNORED = {"in_channels", "decoder_dw_kernel_size", "spatial_compression_ratio", "temporal_compression_ratio"}
IGNORED_PREFIXES = ("_", "aligned_")  # notes of the file format; projections used in training only


def from_published(values: Mapping[str, Any]) -> VideoDecoderConfig:
    """Read the published JSON of a TurboVAED.

    Raises ValueError for values that this decoder does not implement and for missing or unknown fields.
    """
    refused = [
        f"{name}={values[name]!r} (must be {wanted!r})"
        for name, wanted in IMPLEMENTED.items()
        if name in values and any(value != wanted for value in _as_list(values[name]))
    ]
    if refused:
        raise ValueError(f"a video decoder of this kind is not implemented: {', '.join(refused)}")
    ours = {
        name: value
        for name, value in values.items()
        if name not in IMPLEMENTED and name not in IGNORED and not name.startswith(IGNORED_PREFIXES)
    }
    return VideoDecoderConfig.from_dict(ours)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class VideoDecoder(nn.Module):
    """The light decoder. Films and latents are float32; inside, everything is in the dtype of the weights."""

    def __init__(self, config: VideoDecoderConfig, operations: Any = operations) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config, operations)

    def decode_chunks(self, latents: Tensor, tiles: int = 1) -> Iterator[Tensor]:
        """Yield the film of normalised `latents` [B, 48, F, Y, X] window by window, not clamped.

        The chunks [B, 3, f, 16Y, 16X] have 4F-3 frames. Each is put together from so many `tiles`, which
        need less memory and more time. Raises ValueError at the call for other shapes.
        """
        check_latents(latents, self.config.latent_channels)
        return self._decode_windows(latents, tile_grid(*latents.shape[3:], tiles, reach(self.config)))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the whole film [B, 3, 4F-3, 16Y, 16X] of normalised `latents`, not clamped."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2)

    def _decode_windows(self, latents: Tensor, grid: "Grid") -> Iterator[Tensor]:
        length, ratio = latents.shape[2], self.decoder.frames_per_latent
        first, step = self.config.first_chunk_size, self.config.step_size
        for begin in (0, *range(first, length, step)):
            end = begin + (step if begin else first)
            # One latent of context on both sides, and the last latent repeated to fill the last window.
            seen = range(max(begin - 1, 0), end + (end < length))
            window = latents[:, :, [min(i, length - 1) for i in seen]]
            skipped = ratio * (begin - seen.start)
            kept = ratio * (min(end, length) - begin) - (0 if begin else ratio - 1)
            frames = slice(skipped, skipped + kept)
            # Without a name for the frames, so that they are gone before the next window.
            yield self._decode_tiles(window, grid, frames, is_first=begin == 0)

    def _decode_tiles(self, latents: Tensor, grid: "Grid", frames: slice, is_first: bool) -> Tensor:
        """The `frames` of a window, float32."""
        if len(grid) == 1:
            return self._decode_window(latents, is_first)[:, :, frames].float()
        size = self.config.patch_size * 2 ** sum(self.config.decoder_spatio_temporal_scaling)
        margin = reach(self.config)
        batch, _, _, rows, columns = latents.shape
        shape = (batch, self.config.out_channels, frames.stop - frames.start, size * rows, size * columns)
        film = torch.empty(shape, device=latents.device)
        for (top, bottom), (left, right) in grid:
            y = slice(max(0, top - margin), min(rows, bottom + margin))
            x = slice(max(0, left - margin), min(columns, right + margin))
            pixels = self._decode_window(latents[..., y, x], is_first)[:, :, frames]
            film[..., size * top : size * bottom, size * left : size * right] = pixels[
                ...,
                size * (top - y.start) : size * (bottom - y.start),
                size * (left - x.start) : size * (right - x.start),
            ]
            del pixels  # before the next tile is made
        return film

    def _decode_window(self, latents: Tensor, is_first: bool) -> Tensor:
        dtype = self.decoder.conv_in.conv.weight.dtype
        latents = denormalize_latents(latents).to(dtype, memory_format=torch.channels_last_3d)
        return self.decoder(latents, is_first)


Grid = list[tuple[tuple[int, int], tuple[int, int]]]  # of each tile (top, bottom), (left, right), in latents


def reach(config: VideoDecoderConfig) -> int:
    """How many latents around a latent its pixels depend on: one for each 3 x 3 convolution, in its size."""
    widths = config.decoder_block_out_channels[::-1]
    middle, *blocks = config.decoder_layers_per_block[::-1]
    distance, scale = 1.0 + 2 * middle, 1
    stages = zip(
        pairwise((widths[0], *widths)), blocks, config.decoder_spatio_temporal_scaling[::-1], strict=True
    )
    for (width_in, width), count, upsample in stages:
        distance += 2 * (width_in != width) / scale
        scale *= 1 + upsample
        distance += (upsample + 2 * count) / scale
    return math.ceil(distance + 1 / scale)


def tile_grid(rows: int, columns: int, tiles: int, margin: int) -> Grid:
    """Cut `rows` x `columns` latents into at most `tiles` tiles, the largest as small as can be."""
    counts = [(down, tiles // down) for down in range(1, tiles + 1)]
    grids = [[(y, x) for y in _split(rows, down) for x in _split(columns, across)] for down, across in counts]
    return min(grids, key=lambda grid: largest_tile(rows, columns, grid, margin))


def largest_tile(rows: int, columns: int, grid: Grid, margin: int) -> int:
    """Latents of the largest tile with its margins."""
    return max(
        math.prod(min(size, stop + margin) - max(0, start - margin) for size, (start, stop) in sides)
        for sides in (zip((rows, columns), tile, strict=True) for tile in grid)
    )


def _split(size: int, count: int) -> list[tuple[int, int]]:
    edges = [round(i * size / min(count, size)) for i in range(min(count, size) + 1)]
    return list(pairwise(edges))


class Decoder(nn.Module):
    """One window of latents -> its frames. The lists of the configuration run from pixels to latents."""

    def __init__(self, config: VideoDecoderConfig, operations: Any) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels[::-1]
        middle_blocks, *blocks = config.decoder_layers_per_block[::-1]
        upsamples = config.decoder_spatio_temporal_scaling[::-1]
        space_only = config.decoder_spatio_only[::-1]
        doubles_time = [up and not space for up, space in zip(upsamples, space_only, strict=True)]
        self.patch_size = config.patch_size
        self.frames_per_latent = 2 ** sum(doubles_time)
        self.conv_in = Conv(config.latent_channels, widths[0], 3, 3, operations)
        self.mid_block = Middle(widths[0], middle_blocks, operations)
        stages = zip(pairwise((widths[0], *widths)), blocks, upsamples, doubles_time, strict=True)
        self.up_blocks = nn.ModuleList(UpStage(*ends, *rest, operations) for ends, *rest in stages)
        self.conv_out = Conv(widths[-1], config.out_channels * config.patch_size**2, 3, 3, operations)

    def forward(self, x: Tensor, is_first: bool) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            for layer in stage.layers(is_first):
                x = layer(x)
        return unpatchify(self.conv_out(x, lambda x: F.silu(rms_norm(x))), self.patch_size)


class Middle(nn.Module):
    """Residual blocks at the size of the latents."""

    def __init__(self, width: int, blocks: int, operations: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, operations) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


class UpStage(nn.Module):
    """A residual block where the width changes, a step up in size, residual blocks."""

    def __init__(
        self, width_in: int, width: int, blocks: int, upsample: bool, double_time: bool, operations: Any
    ) -> None:
        super().__init__()
        self.conv_in = ResidualBlock(width_in, width, operations) if width_in != width else None
        self.upsamplers = nn.ModuleList([UpStep(width, double_time, operations)] if upsample else [])
        # As published: the blocks of stages that upsample begin with ReLU instead of SiLU.
        self.resnets = nn.ModuleList(
            ResidualBlock(width, width, operations, first_relu=upsample) for _ in range(blocks)
        )

    def layers(self, is_first: bool) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield what to apply one after the other; a `forward` would keep its input alive to the end."""
        if self.conv_in is not None:
            yield self.conv_in
        for upsampler in self.upsamplers:
            yield partial(upsampler, is_first=is_first)
        yield from self.resnets


class UpStep(nn.Module):
    """Twice the rows and columns; twice the frames too, where the first window drops the first of them."""

    def __init__(self, width: int, double_time: bool, operations: Any) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(width, width, 3, padding=1)})
        self.time_conv = Conv(width, 2 * width, 3, 1, operations) if double_time else None

    def forward(self, x: Tensor, is_first: bool) -> Tensor:
        if self.time_conv is not None:
            x = interleave_frames(self.time_conv(x))[:, :, int(is_first) :]
        return per_frame(self.resample["1"], double_size(x))


class ResidualBlock(nn.Module):
    """Twice norm, activation and convolution, added to the input; a 1x1x1 convolution fits the widths."""

    def __init__(self, width_in: int, width: int, operations: Any, first_relu: bool = False) -> None:
        super().__init__()
        self.activation = F.relu if first_relu else F.silu
        self.conv1 = Conv(width_in, width, 3, 3, operations)
        self.conv2 = Conv(width, width, 3, 3, operations)
        self.conv_shortcut = Conv(width_in, width, 1, 1, operations) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x, lambda x: self.activation(rms_norm(x)))
        h = self.conv2(h, lambda h: F.silu(rms_norm(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x, lambda x: rms_norm(x, eps=1e-6))
        return h.add_(x)  # in place: at full size every tensor less counts


class Conv(nn.Module):
    """A 3-D convolution that repeats the first and the last frame and pads space with zeros; sizes stay.

    What comes right before it, `prepare`, works on each frame alone. Both take a few frames at a time: only
    the input and the result are whole.
    """

    def __init__(self, width_in: int, width: int, time: int, space: int, operations: Any) -> None:
        super().__init__()
        self.repeats = time // 2
        padding = (0, space // 2, space // 2)
        self.conv = operations.Conv3d(width_in, width, (time, space, space), padding=padding)

    def forward(self, x: Tensor, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        batch, _, frames, rows, columns = x.shape
        shape = (batch, self.conv.out_channels, frames, rows, columns)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        size = piece_frames(x[:, :, 0].numel(), frames)
        for start in range(0, frames, size):
            first, last = start - self.repeats, min(start + size, frames) + self.repeats
            seen = prepare(x[:, :, max(first, 0) : last])
            seen = repeat_ends(seen, max(-first, 0), max(last - frames, 0))
            out[:, :, start : start + size] = self.conv(seen)
            del seen  # before the next is made
        return out


def piece_frames(values: int, frames: int) -> int:
    """How many of `frames` of so many values each go through a convolution at once; small pictures all."""
    count = math.ceil(frames / max(PIECE_FRAMES, PIECE_VALUES // values))
    return math.ceil(frames / count)  # even pieces: for thin ones PyTorch takes a way on CPUs that needs more


def repeat_ends(x: Tensor, before: int, after: int) -> Tensor:
    """Return `x` with its first and its last frame repeated so many times more."""
    if not before and not after:
        return x
    return torch.cat([x[:, :, :1]] * before + [x] + [x[:, :, -1:]] * after, dim=2)


def rms_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """RMS norm over the channels, axis 1, without a gain."""
    return F.rms_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1)
