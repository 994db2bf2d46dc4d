"""The text encoder: the encoder half of T5Gemma (9b-9b-ul2 in full size), plain torch.

Token embeddings times sqrt(C), then layers of bidirectional attention and a gated feed-forward, each with a
norm before and after it inside the residual branch, then a final norm. Even layers see a sliding window, odd
ones everything. The embedding's dtype is the compute dtype (bfloat16 in the published files); norms and
softmax run in float32.

Shapes: B batch, L tokens, C hidden size, N query heads, K key-value heads, H head size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import operations
from .config import TextEncoderConfig
from .run_block import RunBlock, run_in_place

# Soft capping rules out fused attention, so scores are made for this many queries at a time: at 16 heads and
# 5000 tokens that is 330 MB in float32. A usual prompt (640 tokens and fewer) is one piece.
QUERY_CHUNK = 1024


class TextEncoder(nn.Module):
    """The T5Gemma encoder; parameter names are the published ones below `model.encoder.`."""

    def __init__(self, config: TextEncoderConfig, operations: Any = operations) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            EncoderLayer(config, i, operations) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, run_block: RunBlock = run_in_place) -> Tensor:
        """Return the last hidden states [B, L, C] of `tokens` [B, L], int64, after the final norm.

        There is no padding mask: all rows of a batch have the same true length. `run_block(i, layer, x)` runs
        layer i, `layer` being a partial over the module that takes `x` alone; the default is `layer(x)`.
        """
        x = self.embed_tokens(tokens)
        # Published rounding: the factor takes the dtype of the states first, so sqrt(3584) is 60 in bfloat16.
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        rope = rotary_table(x.shape[1], self.config.head_dim, self.config.rope_theta, like=x)
        for i, module in enumerate(self.layers):
            layer = partial(module, rope=rope)
            x = run_block(i, layer, x)
        return self.norm(x)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each between two norms."""

    def __init__(self, config: TextEncoderConfig, index: int, operations: Any) -> None:
        super().__init__()
        self.pre_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.sliding_window if index % 2 == 0 else None, operations)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, operations)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.pre_self_attn_layernorm(x), rope))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Attention(nn.Module):
    """Bidirectional grouped-query attention with soft-capped scores, within `window` if one is given."""

    def __init__(self, config: TextEncoderConfig, window: int | None, operations: Any) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        query_width, key_width = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = operations.Linear(width, query_width, bias=False)
        self.k_proj = operations.Linear(width, key_width, bias=False)
        self.v_proj = operations.Linear(width, key_width, bias=False)
        self.o_proj = operations.Linear(query_width, width, bias=False)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.cap = config.attn_logit_softcapping
        self.window = window

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q = rotate(self._heads(self.q_proj(x)), rope)
        k = rotate(self._heads(self.k_proj(x)), rope)
        v = self._heads(self.v_proj(x))
        out = capped_attention(q, k, v, scale=self.scale, cap=self.cap, window=self.window)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, N, L, H] -> [B, L, N*H]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [B, L, N*H] -> [B, N, L, H]


class MLP(nn.Module):
    """Gated feed-forward with tanh-approximated GELU."""

    def __init__(self, config: TextEncoderConfig, operations: Any) -> None:
        super().__init__()
        self.gate_proj = operations.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = operations.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = operations.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class RMSNorm(nn.Module):
    """RMS norm over the last axis with gain `1 + weight`, in float32, rounded once to the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


def rotary_table(length: int, head_dim: int, theta: float, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [L, H] of positions 0..L-1, made in float32, then as `like` in dtype and device."""
    bands = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=like.device), bands)
    angles = torch.cat([angles, angles], dim=1)  # half-split: dimension i pairs with i + H/2
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + H/2) of `x` [B, N, L, H] by the angles of `rotary_table`."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def capped_attention(
    q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, *, scale: float, cap: float, window: int | None
) -> Tensor:
    """Return softmax(cap * tanh(scale * q k / cap)) v as [B, N, L, H]; query head j reads head j // (N/K).

    With a window, a query reads the keys less than `window` positions away on both sides. (So do transformers
    4.54 and 4.57; 5.23 also reads the one at that very distance. Only prompts longer than it are concerned.)
    """
    group = q_BNLH.shape[1] // k_BKLH.shape[1]
    k_BNLH, v_BNLH = k_BKLH.repeat_interleave(group, dim=1), v_BKLH.repeat_interleave(group, dim=1)
    positions = torch.arange(q_BNLH.shape[2], device=q_BNLH.device)
    out = []
    for q, rows in zip(q_BNLH.split(QUERY_CHUNK, dim=2), positions.split(QUERY_CHUNK), strict=True):
        scores = q @ k_BNLH.transpose(2, 3) * scale
        scores = torch.tanh(scores / cap) * cap
        if window is not None and window < len(positions):
            far = (rows[:, None] - positions).abs() >= window
            scores = scores.masked_fill(far, float("-inf"))
        out.append(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v_BNLH)
    return torch.cat(out, dim=2)
