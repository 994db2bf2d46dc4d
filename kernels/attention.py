"""Softmax attention with grouped key/value heads, over the whole sequence or over a window of frames.

Letters: B batch, N query heads, K key/value heads, S tokens, H head size. Query head n reads key/value head n
// (N/K).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class FrameWindow:
    """Which keys a video token sees: its own frame, `radius` frames on each side, and all tokens after the
    video.

    The first `frames * tokens_per_frame` tokens are the video; all other tokens see everything.
    """

    frames: int
    tokens_per_frame: int
    radius: int


Attention = Callable[[Tensor, Tensor, Tensor, FrameWindow | None], Tensor]


FullAttention = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same without a window


def attention(q: Tensor, k: Tensor, v: Tensor, window: FrameWindow | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(H)) v: `q` [B, N, S, H], `k` and `v` [B, K, S, H] -> [B, N, S, H].

    Uses PyTorch's fused attention; windows are taken frame by frame, without a mask of S x S.
    """
    if q.device.type != "cpu":
        return attention_by(_fused, q, k, v, window)
    # PyTorch's CPU kernel rounds the softmax weights to the dtype of the input. In bfloat16 that alone moves
    # the velocity as far as all other roundings together, and the recorded runs do not have it. It is also
    # faster when the tokens of a head lie together.
    wide = [t.float().contiguous() for t in (q, k, v)]
    out = _fused(*wide) if _sees_all(window) else windowed_by_merging(*wide, window, part_dtype=q.dtype)
    return out.to(q.dtype)


def attention_by(
    full: FullAttention, q: Tensor, k: Tensor, v: Tensor, window: FrameWindow | None = None
) -> Tensor:
    """The same on any device by a given attention over whole sequences, where a host has its own."""
    return full(q, k, v) if _sees_all(window) else windowed_by_joining(full, q, k, v, window)


def _flash(package: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # its heads lie inside the tokens
    return package.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _sage(package: ModuleType, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return package.sageattn(q, k, v, tensor_layout="HND", is_causal=False)


PACKAGES = {  # backend -> its package, how that is installed, and its full attention
    "flash": ("flash_attn", "pip install flash-attn --no-build-isolation", _flash),
    "sage": ("sageattention", "pip install sageattention", _sage),
}
BACKENDS = ("sdpa", *PACKAGES)


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention of one of BACKENDS for tensors of a device and dtype; sdpa is PyTorch's own.

    Raises ValueError for one that is unknown, not installed, or not made for such tensors.
    """
    if name == "sdpa":
        return attention
    if name not in PACKAGES:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    package, command, full = PACKAGES[name]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention {name!r} computes in bfloat16 on a GPU, not in "
            f"{str(dtype).removeprefix('torch.')} on {device.type}; choose sdpa"
        )
    if find_spec(package) is None:
        there = ", ".join(["sdpa", *(other for other in PACKAGES if find_spec(PACKAGES[other][0]))])
        raise ValueError(
            f"attention {name!r} needs the package {package}, which is not installed; install it "
            f"({command}), or choose what is there: {there}"
        )
    try:
        # torch.compile goes around it, as not all versions of the packages let themselves be traced
        return torch.compiler.disable(partial(attention_by, partial(full, import_module(package))))
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, for instance
        raise ValueError(
            f"attention {name!r}: {package} is installed but does not load ({str(error).splitlines()[0]}); "
            "install it anew for this torch, or choose sdpa"
        ) from error


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_head(F.scaled_dot_product_attention(by_key_head(q, k), k, v), q.shape[2])


def by_key_head(q: Tensor, k: Tensor) -> Tensor:
    """The query heads of one key head as one long row of queries: [B, N, S, H] -> [B, K, N/K * S, H].

    With fewer key heads than query heads, most fused kernels step aside for one that makes the whole matrix
    of scores; this way no kernel sees a difference, and no key is copied.
    """
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])


def by_head(out: Tensor, tokens: int) -> Tensor:
    """The way back of `by_key_head`; the heads of a token lie together, as in the output of fused kernels."""
    return rearrange(out, "b k (g s) h -> b s (k g) h", s=tokens).transpose(1, 2)


def _sees_all(window: FrameWindow | None) -> bool:
    return window is None or window.radius >= window.frames - 1


def _near(window: FrameWindow, frame: int) -> slice:
    """The video tokens that the tokens of `frame` see."""
    first, last = max(0, frame - window.radius), min(window.frames, frame + window.radius + 1)
    return slice(first * window.tokens_per_frame, last * window.tokens_per_frame)


def windowed_by_joining(full: FullAttention, q: Tensor, k: Tensor, v: Tensor, window: FrameWindow) -> Tensor:
    """Windowed attention by `full`: every frame attends to its keys copied into one piece."""
    size, video = window.tokens_per_frame, window.frames * window.tokens_per_frame
    pieces = []
    for frame in range(window.frames):
        near = _near(window, frame)
        keys = torch.cat((k[:, :, near], k[:, :, video:]), dim=2)
        values = torch.cat((v[:, :, near], v[:, :, video:]), dim=2)
        pieces.append(full(q[:, :, frame * size : (frame + 1) * size], keys, values))
    pieces.append(full(q[:, :, video:], k, v))
    return torch.cat(pieces, dim=2)


def windowed_by_merging(
    q: Tensor, k: Tensor, v: Tensor, window: FrameWindow, part_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Windowed attention on a CPU: the near frames and the tokens after the video apart, merged by sums.

    Both parts are rounded to `part_dtype` before they are merged, as in the recorded runs.
    """
    size, video = window.tokens_per_frame, window.frames * window.tokens_per_frame
    near = [
        _with_log_sum(q[:, :, frame * size : (frame + 1) * size], k[:, :, keys], v[:, :, keys])
        for frame, keys in ((frame, _near(window, frame)) for frame in range(window.frames))
    ]
    near_out, near_log_sum = (torch.cat(parts, dim=2) for parts in zip(*near, strict=True))
    after_out, after_log_sum = _with_log_sum(q[:, :, :video], k[:, :, video:], v[:, :, video:])
    share = torch.sigmoid(after_log_sum - near_log_sum).unsqueeze(-1)
    merged = torch.lerp(near_out.to(part_dtype).float(), after_out.to(part_dtype).float(), share)
    return torch.cat((merged, _fused(q[:, :, video:], k, v)), dim=2)


def _with_log_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # attention and the logarithm [B, N, S] of each softmax's denominator
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(by_key_head(q, k), k, v)
    return by_head(out, q.shape[2]), log_sum.reshape(q.shape[:3])


def attention_reference(q: Tensor, k: Tensor, v: Tensor, window: FrameWindow | None = None) -> Tensor:
    """The same by its definition, with the full matrix of scores, in the dtype of the input."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if window is not None:
        token = torch.arange(q.shape[2], device=q.device)
        frame = token // window.tokens_per_frame
        video = token < window.frames * window.tokens_per_frame
        far = (frame[:, None] - frame[None, :]).abs() > window.radius
        scores = scores.masked_fill(far & video[:, None] & video[None, :], float("-inf"))
    return scores.softmax(dim=-1) @ v
