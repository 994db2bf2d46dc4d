"""The joint transformer: noisy video and audio latents and text states in, velocities of both latents out.

One sequence [video | audio | text] runs through all layers. In the first and last few, every weight holds one
copy per modality; the others share theirs. There is no timestep input: the network sees only the noisy
latents.

Number formats: the residual stream, norms, embedders and heads are float32; the linears inside the blocks and
the attention compute in `compute_dtype` (bfloat16 as published, or float32).

Letters: B batch, S packed tokens, D model width, N query heads, K key/value heads, H head size.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels.attention import Attention as AttentionFunction
from ..kernels.attention import FrameWindow, attention
from . import operations as plain_operations
from .config import TransformerConfig
from .operations import Spans
from .packing import Latents, PackedLayout, patchify, unpatchify
from .rope import apply_rope, rope_bands, rope_table
from .run_block import RunBlock, run_in_place

# A feed-forward runs in pieces, as its inner activations are the largest tensors there are: of at least so
# many tokens, and not in more pieces than that.
MLP_TOKENS, MLP_PIECES = 1024, 8


def piece_tokens(tokens: int) -> int:
    """Tokens of one piece of a feed-forward over `tokens`."""
    return max(MLP_TOKENS, -(-tokens // MLP_PIECES))


class JointTransformer(nn.Module):
    """The network of all four variants; module and parameter names are those of the published checkpoints."""

    def __init__(
        self,
        config: TransformerConfig,
        operations: ModuleType = plain_operations,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.adapter = Adapter(config, operations)
        self.block = Block(config, operations, compute_dtype)
        self.final_norm_video = operations.ModalityRMSNorm(config.hidden_size, 1)
        self.final_norm_audio = operations.ModalityRMSNorm(config.hidden_size, 1)
        self.final_linear_video = operations.Linear(config.hidden_size, config.video_in_channels, bias=False)
        self.final_linear_audio = operations.Linear(config.hidden_size, config.audio_in_channels, bias=False)

    def forward(
        self,
        latents: Latents,
        text: Tensor,
        layout: PackedLayout,
        attend: AttentionFunction = attention,
        run_block: RunBlock = run_in_place,
    ) -> Latents:
        """Return the velocity (noise - clean) of both streams, float32, in the shapes of `latents`.

        `text` is [B, L, C] without padding; `layout` is `PackedLayout.of(latents, text,
        config.coords_style)`.
        """
        x = self.adapter(latents, text)
        rope = rope_table(layout.coordinates(x.device), self.adapter.rope.bands)
        for index, layer in enumerate(self.block.layers):
            x = run_block(index, partial(layer, rope=rope, layout=layout, attend=attend), x)
        video, audio, _ = layout.spans
        video_tokens = self.final_linear_video(self.final_norm_video(x[:, slice(*video)], layout.spans))
        audio_tokens = self.final_linear_audio(self.final_norm_audio(x[:, slice(*audio)], layout.spans))
        return Latents(unpatchify(video_tokens, layout), audio_tokens)


class Adapter(nn.Module):
    """Embeds the three modalities, and holds the frequencies of the rotary positions."""

    def __init__(self, config: TransformerConfig, operations: ModuleType) -> None:
        super().__init__()
        self.video_embedder = operations.Linear(config.video_in_channels, config.hidden_size)
        self.audio_embedder = operations.Linear(config.audio_in_channels, config.hidden_size)
        self.text_embedder = operations.Linear(config.text_in_channels, config.hidden_size)
        self.rope = Rope(config.head_dim)

    def forward(self, latents: Latents, text: Tensor) -> Tensor:
        # -> [B, S, D] float32
        video, audio = patchify(latents.video).float(), latents.audio.float()
        return torch.cat(
            (self.video_embedder(video), self.audio_embedder(audio), self.text_embedder(text.float())), dim=1
        )


class Rope(nn.Module):
    """The bands as a buffer: published files carry them, some rounded to bfloat16; these are used."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("bands", rope_bands(head_dim))


class Block(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TransformerConfig, operations: ModuleType, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(config, index, operations, compute_dtype) for index in range(config.num_layers)
        )


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each added to the float32 stream."""

    def __init__(
        self, config: TransformerConfig, index: int, operations: ModuleType, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention = Attention(config, index, operations, compute_dtype)
        self.mlp = MLP(config, index, operations, compute_dtype)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        layout: PackedLayout,
        attend: AttentionFunction,
        piece: int | None = None,
    ) -> Tensor:
        """The layer; with `piece`, of so many tokens at a time, equal but for rounding."""
        # the norms in front sit inside, as in the published weights
        if piece is None:
            x = x + self.attention(x, rope, layout, attend)
            return x + self.mlp(x, layout)
        x = self.attention.added_in_pieces(x, rope, layout, attend, piece)
        # of a layer by modality both weights at once would be a good deal of the memory that is short
        for part, result in self.mlp.pieces(x, layout, piece, hold=self.mlp.up_gate_proj.modalities == 1):
            part += result
        return x


class Attention(nn.Module):
    """Grouped-query attention with normed and rotated q and k, and a sigmoid gate on every head's output."""

    def __init__(
        self, config: TransformerConfig, index: int, operations: ModuleType, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        width, modalities = config.hidden_size, config.copies(index)
        self.head_dim = config.head_dim
        gates = config.num_heads if config.enable_attn_gating else 0
        groups = config.num_query_groups * config.head_dim
        self.sections = (width, groups, groups, gates)
        self.window_radius = config.frame_receptive_field if index in config.local_attn_layers else None
        self.compute_dtype = compute_dtype
        self.pre_norm = operations.ModalityRMSNorm(width, modalities)
        self.linear_qkv = operations.ModalityLinear(width, sum(self.sections), modalities)
        self.q_norm = operations.ModalityRMSNorm(config.head_dim, modalities)
        self.k_norm = operations.ModalityRMSNorm(config.head_dim, modalities)
        self.linear_proj = operations.ModalityLinear(width, width, modalities)

    def forward(self, x: Tensor, rope: Tensor, layout: PackedLayout, attend: AttentionFunction) -> Tensor:
        q_BNSH, k_BKSH, v_BKSH, gate = self.heads(x, rope, layout.spans)
        out = attend(q_BNSH, k_BKSH, v_BKSH, self.window(layout))
        out = self.gated(out, gate)
        return self.linear_proj(out, layout.spans)

    def heads(self, x: Tensor, rope: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two rotated, and the gates [B, S, N]."""
        qkvg = self.linear_qkv(self.pre_norm(x, spans).to(self.compute_dtype), spans)
        q, k, v, gate = qkvg.split(self.sections, dim=-1)
        q, k, v = (rearrange(t, "b s (n h) -> b s n h", h=self.head_dim) for t in (q, k, v))
        q_BNSH = apply_rope(self.q_norm(q.float(), spans).transpose(1, 2), rope).to(self.compute_dtype)
        k_BKSH = apply_rope(self.k_norm(k.float(), spans).transpose(1, 2), rope).to(self.compute_dtype)
        return q_BNSH, k_BKSH, v.transpose(1, 2), gate

    def gated(self, out_BNSH: Tensor, gate: Tensor) -> Tensor:
        """The heads' outputs gated and put side by side: [B, S, D]."""
        out = out_BNSH.transpose(1, 2)
        if gate.shape[-1]:
            out = (out.float() * gate.float().sigmoid().unsqueeze(-1)).to(self.compute_dtype)
        return out.flatten(2)

    def added_in_pieces(
        self, x: Tensor, rope: Tensor, layout: PackedLayout, attend: AttentionFunction, piece: int
    ) -> Tensor:
        """A new x + attention(x), made `piece` tokens at a time; only heads and result are whole."""
        (batch, tokens, _), width = x.shape, self.head_dim
        shapes = [(batch, section // width, tokens, width) for section in self.sections[:3]]
        shapes.append((batch, tokens, self.sections[3]))
        q, k, v, gate = (torch.empty(s, dtype=self.compute_dtype, device=x.device) for s in shapes)
        with self.linear_qkv.held(self.compute_dtype, x.device):
            for start in range(0, tokens, piece):
                part = slice(start, min(start + piece, tokens))
                spans = _clip(layout.spans, part.start, part.stop)
                heads = self.heads(x[:, part], rope[part], spans)
                q[:, :, part], k[:, :, part], v[:, :, part], gate[:, part] = heads
        out = torch.empty_like(x)
        with self.linear_proj.held(self.compute_dtype, x.device):
            for start, stop, keys, values in _seen(self.window(layout), k, v, piece):
                heads = self.gated(attend(q[:, :, start:stop], keys, values, None), gate[:, start:stop])
                part = self.linear_proj(heads, _clip(layout.spans, start, stop))
                torch.add(x[:, start:stop], part, out=out[:, start:stop])
        return out

    def window(self, layout: PackedLayout) -> FrameWindow | None:
        """The window of a local layer, None for a layer that sees everything."""
        if self.window_radius is None:
            return None
        return FrameWindow(layout.frames, layout.tokens_per_frame, self.window_radius)


class MLP(nn.Module):
    """The feed-forward: gelu7 in the first layers, swiglu7 in the others."""

    def __init__(
        self, config: TransformerConfig, index: int, operations: ModuleType, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        width, modalities = config.hidden_size, config.copies(index)
        inner = config.inner_width(index)
        gated = index not in config.gelu7_layers
        self.activation = swiglu7 if gated else gelu7
        self.compute_dtype = compute_dtype
        self.pre_norm = operations.ModalityRMSNorm(width, modalities)
        self.up_gate_proj = operations.ModalityLinear(width, 2 * inner if gated else inner, modalities)
        self.down_proj = operations.ModalityLinear(inner, width, modalities)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        pieces = self.pieces(x, layout, piece_tokens(x.shape[1]), hold=True)
        return torch.cat([result for _, result in pieces], dim=1)

    def pieces(
        self, x: Tensor, layout: PackedLayout, size: int, hold: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of `size` tokens and the feed-forward of each; every token is on its own here.

        With `hold` the weights are made ready once, not for each piece.
        """
        dtype = self.compute_dtype
        with ExitStack() as held:
            for linear in (self.up_gate_proj, self.down_proj) if hold else ():
                held.enter_context(linear.held(dtype, x.device))
            for start in range(0, x.shape[1], size):
                part, spans = x[:, start : start + size], _clip(layout.spans, start, start + size)
                inner = self.up_gate_proj(self.pre_norm(part, spans).to(dtype), spans)
                yield part, self.down_proj(self.activation(inner.float()).to(dtype), spans)


def _seen(
    window: FrameWindow | None, k: Tensor, v: Tensor, piece: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop) of at most `piece` queries, and the keys and values that all of them see."""
    video = window.frames * window.tokens_per_frame if window else 0
    for frame in range(window.frames if window else 0):
        size, first = window.tokens_per_frame, max(0, frame - window.radius)
        near = slice(first * size, min(video, (frame + window.radius + 1) * size))
        keys, values = (torch.cat((t[:, :, near], t[:, :, video:]), dim=2) for t in (k, v))
        for start in range(frame * size, (frame + 1) * size, piece):
            yield start, min(start + piece, (frame + 1) * size), keys, values
    for start in range(video, k.shape[2], piece):
        yield start, min(start + piece, k.shape[2]), k, v


def _clip(spans: Spans, start: int, stop: int) -> Spans:
    """The spans within tokens start..stop, counted from `start`."""
    return tuple(tuple(min(max(edge, start), stop) - start for edge in span) for span in spans)


def gelu7(u: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) of u limited to at most 7."""
    u = u.clamp(max=7)
    return u * torch.sigmoid(1.702 * u)


def swiglu7(u: Tensor) -> Tensor:
    """gelu7 of the even entries times (1 + the odd entries limited to [-7, 7]); halves the last axis."""
    gate, value = gelu7(u[..., 0::2]), u[..., 1::2].clamp(-7, 7)
    return torch.addcmul(gate, gate, value)
