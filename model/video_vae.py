"""The Wan2.2 video VAE: pixels <-> latents, causal in time and run chunk by chunk with constant memory.

A film of 4k+1 frames of H x W pixels has k+1 latent frames of H/16 x W/16; the first one holds one frame, the
others four. Shapes: B batch, C channels, F frames, Y rows, X columns. Tensors are [B, C, F, Y, X] with the
channels last in memory: norms and most convolutions are faster so, and a film seen as pictures is no copy.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import operations
from .config import LATENT_MEAN, LATENT_STD, VideoVAEConfig

PATCH = 2  # the networks see 2 x 2 pixels as channels

Factors = tuple[int, int, int]  # by how much a step divides or multiplies frames, rows and columns


class FrameCache(dict[nn.Module, Tensor]):
    """The end of the previous chunk as each time convolution of the network saw it, keyed by the convolution.

    One per film: made before its first chunk, handed along with every chunk, dropped after the last. For a
    convolution that is not in it yet, the film has just begun.
    """

    def prepend(self, conv: nn.Module, x: Tensor, frames: int) -> Tensor:
        """Return `x` with the last `frames` frames that `conv` saw in front; zeros where the film begins."""
        past = self.get(conv)
        x = F.pad(x, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat([past, x], dim=2)
        self[conv] = x[:, :, -frames:].clone()  # a view would keep the whole chunk in memory
        return x


class VideoVAE(nn.Module):
    """The Wan2.2 VAE. Films and latents are float32; inside, everything is in the dtype of the weights."""

    def __init__(self, config: VideoVAEConfig, operations: Any = operations) -> None:
        super().__init__()
        self.config = config
        self.frames_per_latent = 2 ** sum(config.temperal_downsample)
        self.pixels_per_latent = PATCH * 2 ** len(config.temperal_downsample)
        self.encoder = Encoder(config, operations)
        self.conv1 = operations.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = operations.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config, operations)

    def encode(self, video: Tensor) -> Tensor:
        """Return the normalised latents [B, 48, k+1, H/16, W/16] of `video` [B, 3, 4k+1, H, W] in [-1, 1].

        They are the mean of the encoder's distribution, nothing is drawn. Raises ValueError for other shapes.
        """
        self._check_video(video)
        cache, dtype = FrameCache(), self.conv1.weight.dtype
        starts = list(range(1, video.shape[2], self.frames_per_latent))
        moments = [
            self.conv1(self.encoder(patchify(chunk.to(dtype), PATCH), cache))
            for chunk in video.tensor_split(starts, dim=2)
        ]
        mean, _ = torch.cat(moments, dim=2).chunk(2, dim=1)
        return normalize_latents(mean)

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the film of normalised `latents` [B, 48, F, Y, X], not clamped: the first frame, then 4 by 4.

        Each chunk is [B, 3, 1 or 4, 16Y, 16X]. Raises ValueError for other shapes, at the call.
        """
        check_latents(latents, self.config.z_dim)
        cache = FrameCache()
        return (self._decode_frame(frame, cache) for frame in latents.split(1, dim=2))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the whole film [B, 3, 4F-3, 16Y, 16X] of normalised `latents`, clamped to [-1, 1]."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2).clamp(-1, 1)

    def _decode_frame(self, frame: Tensor, cache: FrameCache) -> Tensor:
        x = denormalize_latents(frame).to(self.conv2.weight.dtype, memory_format=torch.channels_last_3d)
        return unpatchify(self.decoder(self.conv2(x), cache), PATCH).float()

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be [batch, 3, frames, height, width], got {list(video.shape)}")
        frames, height, width = video.shape[2:]
        if missing := (1 - frames) % self.frames_per_latent:
            raise ValueError(
                f"the number of frames must be {self.frames_per_latent}k+1, got {frames}; "
                f"cut the video, or repeat its last frame until it has {frames + missing}"
            )
        if height % self.pixels_per_latent or width % self.pixels_per_latent:
            raise ValueError(
                f"height and width must be multiples of {self.pixels_per_latent}, got {height} x {width}; "
                "resize or crop the video"
            )


class Encoder(nn.Module):
    """The pixel patches of a chunk -> mean and log-variance of its latents."""

    def __init__(self, config: VideoVAEConfig, operations: Any) -> None:
        super().__init__()
        widths = [config.dim * multiple for multiple in (1, *config.dim_mult)]
        steps = (*((1 + halved, 2, 2) for halved in config.temperal_downsample), (1, 1, 1))
        self.conv1 = causal_conv(3 * PATCH**2, widths[0], operations)
        self.downsamples = nn.ModuleList(
            DownStage(*ends, config.num_res_blocks, step, operations)
            for ends, step in zip(pairwise(widths), steps, strict=True)
        )
        self.middle = Middle(widths[-1], operations)
        self.head = Head(widths[-1], 2 * config.z_dim, operations)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = run_causal(self.conv1, x, cache)
        for stage in self.downsamples:
            x = stage(x, cache)
        return self.head(self.middle(x, cache), cache)


class Decoder(nn.Module):
    """One latent frame -> the pixel patches of its frames: the encoder turned round, with longer stages."""

    def __init__(self, config: VideoVAEConfig, operations: Any) -> None:
        super().__init__()
        widths = [config.dec_dim * multiple for multiple in (*config.dim_mult, config.dim_mult[-1])][::-1]
        steps = (*((1 + doubled, 2, 2) for doubled in config.temperal_downsample[::-1]), (1, 1, 1))
        self.conv1 = causal_conv(config.z_dim, widths[0], operations)
        self.middle = Middle(widths[0], operations)
        self.upsamples = nn.ModuleList(
            UpStage(*ends, config.num_res_blocks + 1, step, operations)
            for ends, step in zip(pairwise(widths), steps, strict=True)
        )
        self.head = Head(widths[-1], 3 * PATCH**2, operations)
        self.doubling = max((i for i, step in enumerate(steps, 1) if step[0] > 1), default=0)  # stages

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = self.middle(run_causal(self.conv1, x, cache), cache)
        for stage in self.upsamples[: self.doubling]:
            x = stage(x, cache)
        # The rest is as causal one by one, and at full size the frames of a chunk together are too large.
        return torch.cat([self._finish(frame, cache) for frame in x.split(1, dim=2)], dim=2)

    def _finish(self, frame: Tensor, cache: FrameCache) -> Tensor:
        for stage in self.upsamples[self.doubling :]:
            frame = stage(frame, cache)
        return self.head(frame, cache)


class DownStage(nn.Module):
    """Residual blocks and a step down (not in the last stage), with an averaging shortcut around them all."""

    def __init__(self, width_in: int, width_out: int, blocks: int, step: Factors, operations: Any) -> None:
        super().__init__()
        self.width, self.step = width_out, step
        self.downsamples = residual_blocks(width_in, width_out, blocks, operations)
        if step != (1, 1, 1):
            self.downsamples.append(DownStep(width_out, step[0] > 1, operations))

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        shortcut = average_shortcut(x, self.width, self.step)
        for layer in self.downsamples:
            x = layer(x, cache)
        return x + shortcut


class UpStage(nn.Module):
    """Residual blocks and a step up, with a repeating shortcut around them; just blocks in the last stage."""

    def __init__(self, width_in: int, width_out: int, blocks: int, step: Factors, operations: Any) -> None:
        super().__init__()
        self.width, self.step = width_out, step
        self.upsamples = residual_blocks(width_in, width_out, blocks, operations)
        if step != (1, 1, 1):
            self.upsamples.append(UpStep(width_out, step[0] > 1, operations))

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        start = x
        for layer in self.upsamples:
            x = layer(x, cache)
        if self.step == (1, 1, 1):
            return x
        # The first frame of a film is not doubled; of its shortcut, too, only the last frame counts.
        return x + repeat_shortcut(start, self.width, self.step)[:, :, -x.shape[2] :]


class DownStep(nn.Module):
    """Half the rows and columns; half the frames too, except that the first frame of a film stays alone."""

    def __init__(self, width: int, halve_time: bool, operations: Any) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(width, width, 3, stride=2)})
        self.time_conv = operations.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if halve_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = per_frame(self.resample["1"], F.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        if self.time_conv not in cache:
            cache[self.time_conv] = x
            return x
        return self.time_conv(cache.prepend(self.time_conv, x, 1))


class UpStep(nn.Module):
    """Twice the rows and columns; twice the frames too, except that the first frame of a film stays alone."""

    def __init__(self, width: int, double_time: bool, operations: Any) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": operations.Conv2d(width, width, 3, padding=1)})
        self.time_conv = operations.Conv3d(width, 2 * width, (3, 1, 1)) if double_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        if self.time_conv is not None:
            if self.time_conv in cache:
                x = interleave_frames(self.time_conv(cache.prepend(self.time_conv, x, 2)))
            else:  # as published: the second chunk sees zeros, not the first frame
                cache[self.time_conv] = torch.zeros_like(x).repeat_interleave(2, dim=2)
        return per_frame(self.resample["1"], double_size(x))


class Middle(nn.ModuleList):
    """A residual block, attention within each frame, a residual block."""

    def __init__(self, width: int, operations: Any) -> None:
        block = ResidualBlock(width, width, operations)
        super().__init__([block, Attention(width, operations), ResidualBlock(width, width, operations)])

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        before, attention, after = self
        return after(per_frame(attention, before(x, cache)), cache)


class Head(nn.ModuleDict):
    """Norm, SiLU and the last convolution."""

    def __init__(self, width_in: int, width_out: int, operations: Any) -> None:
        super().__init__({"0": RMSNorm(width_in, 3), "2": causal_conv(width_in, width_out, operations)})

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        return run_causal(self["2"], F.silu(self["0"](x)), cache)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input; a 1x1x1 convolution fits the widths."""

    def __init__(self, width_in: int, width_out: int, operations: Any) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(width_in, 3),
                "2": causal_conv(width_in, width_out, operations),
                "3": RMSNorm(width_out, 3),
                "6": causal_conv(width_out, width_out, operations),
            }
        )
        self.shortcut = operations.Conv3d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        h = F.silu(self.residual["0"](x))
        h = run_causal(self.residual["2"], h, cache)
        h = F.silu(self.residual["3"](h))  # h is bound anew, not nested: at full size each tensor counts
        h = run_causal(self.residual["6"], h, cache)
        return self.shortcut(x) + h


class Attention(nn.Module):
    """One head of attention among the points of one picture; `x` is [N, C, Y, X]."""

    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(width, 2)
        self.to_qkv = operations.Conv2d(width, 3 * width, 1)
        self.proj = operations.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [N, Y*X, 3C]
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=2))  # [N, 1 head, Y*X, C]
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj(h.unflatten(2, x.shape[2:]))


class RMSNorm(nn.Module):
    """RMS norm over the channels, axis 1; `axes` is how many axes follow them."""

    def __init__(self, width: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.flatten().to(x.dtype)
        return F.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-24).movedim(-1, 1)


def residual_blocks(width_in: int, width_out: int, blocks: int, operations: Any) -> nn.ModuleList:
    """The residual blocks of a stage; the first one changes the width."""
    widths = [width_in] + [width_out] * blocks
    return nn.ModuleList(ResidualBlock(*ends, operations) for ends in pairwise(widths))


def causal_conv(width_in: int, width_out: int, operations: Any) -> nn.Module:
    """A 3x3x3 convolution that pads space only; `run_causal` gives it its past."""
    return operations.Conv3d(width_in, width_out, 3, padding=(0, 1, 1))


def run_causal(conv: nn.Module, x: Tensor, cache: FrameCache) -> Tensor:
    """Apply a `causal_conv` to a chunk with the two frames before it in front; the number of frames stays."""
    return conv(cache.prepend(conv, x, 2))


def average_shortcut(x: Tensor, width: int, step: Factors) -> Tensor:
    """Return `x` divided in size by `step`: neighbours become channels, of which groups are averaged."""
    frames, rows, columns = step
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % frames, 0))  # zeros in front up to a whole number of groups
    x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, frames))
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, C, F, f, Y, y, X, x] -> [B, F, Y, X, C*f*y*x]
    return x.unflatten(4, (width, -1)).mean(5).movedim(4, 1)


def repeat_shortcut(x: Tensor, width: int, step: Factors) -> Tensor:
    """Return `x` multiplied in size by `step`: channels, repeated as often as needed, become neighbours."""
    x = x.movedim(1, 4).repeat_interleave(width * prod(step) // x.shape[1], dim=4)
    x = x.unflatten(4, (width, *step))  # [B, F, Y, X, C, f, y, x]
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(4, 1)


# What the light decoder (video_decoder.py) shares.


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise ValueError unless `latents` are [B, channels, F, Y, X] with at least one frame."""
    if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
        raise ValueError(
            f"video latents must be [batch, {channels}, frames, rows, columns] with at least one frame, "
            f"got {list(latents.shape)}"
        )


def normalize_latents(latents: Tensor) -> Tensor:
    """Return `(latents - mean) / std` in float32, with the constants of each channel (axis 1).

    Exact constants, whatever the VAE computes in; the reference rounds them to bfloat16 with its weights.
    """
    mean, std = _statistics(latents)
    return (latents.float() - mean) / std


def denormalize_latents(latents: Tensor) -> Tensor:
    """Return `latents * std + mean` in float32, the inverse of `normalize_latents`."""
    mean, std = _statistics(latents)
    return latents.float() * std + mean


def _statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.tensor([LATENT_MEAN, LATENT_STD], dtype=torch.float32, device=latents.device)
    mean, std = table.view(2, -1, 1, 1, 1)
    return mean, std


def patchify(video: Tensor, size: int) -> Tensor:
    """Fold squares of size x size pixels into channels: [B, C, F, Y, X] -> [B, C*size**2, F, Y/size, X/size].

    In the new channel index the column of the square varies slower than its row, as published.
    """
    x = video.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, C, F, Y, dy, X, dx]
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4).movedim(4, 1)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(1, (-1, size, size))  # [B, C, dx, dy, F, Y, X]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def interleave_frames(x: Tensor) -> Tensor:
    """[B, 2C, F, Y, X] -> [B, C, 2F, Y, X]: the first half of the channels are the even frames."""
    x = x.movedim(1, 4).unflatten(4, (2, -1))  # [B, F, Y, X, 2, C]
    return x.movedim(4, 2).flatten(1, 2).movedim(4, 1)


def double_size(x: Tensor) -> Tensor:
    """[B, C, F, Y, X] -> [B, C, F, 2Y, 2X], every point repeated."""
    return per_frame(lambda frames: F.interpolate(frames, scale_factor=2.0, mode="nearest"), x)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer of pictures [B*F, C, Y, X] to the frames of `x` [B, C, F, Y, X]."""
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
