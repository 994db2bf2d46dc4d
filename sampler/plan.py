"""The memory plan: bytes of weights and activations of every stage, and which placement fits.

Weights are counted exactly. Activations are estimates of the largest tensors alive at once; they have been
compared with measured peaks only at small sizes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from ..model.audio_vae import CHUNK, decoder_context
from ..model.checkpoint import Checkpoint, storage_dtype
from ..model.config import (
    AudioVAEConfig,
    TextEncoderConfig,
    TransformerConfig,
    VideoDecoderConfig,
    VideoVAEConfig,
)
from ..model.geometry import FilmShape
from ..model.transformer import MLP_TOKENS

GB = 1e9
TEXT_TOKENS = 640
RESERVE = 0.06  # share of the memory left to the driver, the allocator's gaps and everybody else


@dataclass(frozen=True)
class Stage:
    """What one stage needs on the device, in bytes; `streamed` is what its weights need when layers are
    streamed.
    """

    name: str
    weights: int
    streamed: int
    activations: int

    def on_device(self, offload: str) -> int:
        """Bytes on the device at the stage's peak, under an offload other than 'none'."""
        return self.activations + (self.streamed if offload == "blocks" else self.weights)


@dataclass(frozen=True)
class Plan:
    """The stages of one film in their order; one whole transformer or encoder is in memory at a time, if
    offloaded.
    """

    stages: tuple[Stage, ...]

    def on_device(self, offload: str) -> int:
        """Peak bytes on the device under an offload ('none', 'stage' or 'blocks')."""
        if offload == "none":
            return sum(stage.weights for stage in self.stages) + max(
                stage.activations for stage in self.stages
            )
        return max(stage.on_device(offload) for stage in self.stages)

    def in_ram(self, offload: str, device: torch.device) -> int:
        """Peak bytes of weights in CPU memory beside what a CPU device needs."""
        on_cpu = device.type == "cpu"
        return max(s.weights for s in self.stages) if offload == "blocks" and not on_cpu else 0

    def choose(self, free: int) -> str | None:
        """The first placement, the fastest first, whose peak fits `free` bytes of the device; None if none
        does.
        """
        return next(
            (offload for offload in ("none", "stage", "blocks") if self.on_device(offload) <= free), None
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a film may use on `device`."""
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        free = torch.get_device_module(device).mem_get_info(device)[0]
    return int(free * (1 - RESERVE))


def plan_film(
    parts: dict[str, Checkpoint],
    shape: FilmShape,
    large: FilmShape | None,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> Plan:
    """The plan of a film of `shape`, and of `large` after super-resolution.

    `parts` holds the opened checkpoints by role: text_encoder, transformer, super_resolution, video_vae (for
    an image), video_decoder, audio_vae; those not needed are left out.
    """
    final = large or shape
    activations = {
        "text_encoder": lambda config: _text_encoder(config, dtype),
        "video_vae": lambda config: _video_encoder(config, final, vae_dtype),
        "transformer": lambda config: _transformer(config, shape, dtype),
        "super_resolution": lambda config: _transformer(config, final, dtype),
        "video_decoder": lambda config: _decoder(config, final, vae_dtype),
        "audio_vae": lambda config: _audio(config, shape),
    }
    dtypes = {"video_vae": vae_dtype, "video_decoder": vae_dtype, "audio_vae": torch.float32}
    return Plan(tuple(
        _stage(role, checkpoint, dtypes.get(role, dtype), activations[role](checkpoint.config))
        for role, checkpoint in parts.items()
    ))  # fmt: skip


def _stage(role: str, checkpoint: Checkpoint, dtype: torch.dtype, activations: int) -> Stage:
    layers: dict[str, int] = {}
    weights = 0
    for own, tensor in checkpoint.build().state_dict().items():
        size = tensor.numel() * storage_dtype(checkpoint.part, own, dtype).itemsize
        weights += size
        head, _, rest = own.removeprefix("block.").partition(".")
        if head == "layers" and checkpoint.part in ("transformer", "text_encoder"):
            index = rest.partition(".")[0]
            layers[index] = layers.get(index, 0) + size
    streamed = weights - sum(layers.values()) + 2 * max(layers.values()) if layers else weights
    return Stage(role.replace("_", " "), weights, streamed, activations)


def _transformer(config: TransformerConfig, shape: FilmShape, dtype: torch.dtype) -> int:
    tokens = shape.video_tokens + shape.audio_latents + TEXT_TOKENS
    wide = config.hidden_size + 2 * config.num_query_groups * config.head_dim
    attention = tokens * (config.hidden_size * 8 + wide * (2 * dtype.itemsize + 8))
    inner = max(config.inner_width(i) for i in range(config.num_layers))
    mlp = tokens * config.hidden_size * 12 + min(tokens, MLP_TOKENS) * inner * 24
    return max(attention, mlp)


def _text_encoder(config: TextEncoderConfig, dtype: torch.dtype) -> int:
    scores = config.num_attention_heads * TEXT_TOKENS * TEXT_TOKENS * 8
    return scores + TEXT_TOKENS * (4 * config.hidden_size + 3 * config.intermediate_size) * max(
        4, dtype.itemsize
    )


def _video_encoder(config: VideoVAEConfig, shape: FilmShape, dtype: torch.dtype) -> int:
    return shape.width * shape.height // 4 * config.dim * 8 * dtype.itemsize


def _decoder(config: VideoDecoderConfig | VideoVAEConfig, shape: FilmShape, dtype: torch.dtype) -> int:
    pixels = shape.width * shape.height
    if isinstance(
        config, VideoVAEConfig
    ):  # four frames at half the size, the widest features before the last stage
        return pixels // 4 * 4 * config.dec_dim * 2 * 5 * dtype.itemsize
    frames = min(4 * (config.first_chunk_size + 2), shape.pixel_frames)
    return pixels // 4 * frames * config.decoder_block_out_channels[0] * 5 * dtype.itemsize


def _audio(config: AudioVAEConfig, shape: FilmShape) -> int:
    # the last decoder block has the first width at every sample; its residual units hold a few tensors of
    # that size
    latents = min(shape.audio_latents, CHUNK + 2 * decoder_context(config))
    return latents * config.samples_per_latent * config.channels * 5 * torch.float32.itemsize


def table(plan: Plan, device: torch.device) -> str:
    """The plan as lines of text: bytes on the device per stage, and the peak of every placement."""
    lines = [f"{'stage':<20}{'weights':>12}{'streamed':>12}{'activations':>14}"]
    lines += [
        f"{s.name:<20}{_gb(s.weights):>12}{_gb(s.streamed):>12}{_gb(s.activations):>14}" for s in plan.stages
    ]
    lines += [
        f"--offload {offload:<10}{_gb(plan.on_device(offload)):>12} on {device}, "
        f"{_gb(plan.in_ram(offload, device))} in RAM"
        for offload in ("none", "stage", "blocks")
    ]
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def require_fit(plan: Plan, offload: str, device: torch.device, smaller: Iterable[tuple[str, Plan]]) -> str:
    """Return the offload to use ('auto' is decided here); raises MemoryError saying what would fit."""
    free = free_memory(device)
    chosen = plan.choose(free) if offload == "auto" else offload
    if chosen is not None and plan.on_device(chosen) <= free:
        _require_ram(plan, chosen, device)
        return chosen
    asked = chosen or "blocks"
    cures = [f"--offload {other} ({_gb(plan.on_device(other))})" for other in ("stage", "blocks")
             if offload != "auto" and plan.on_device(other) <= free]  # fmt: skip
    cures += [what for what, other in smaller if other.choose(free)][:1]
    raise MemoryError(
        f"this film needs about {_gb(plan.on_device(asked))} on {device} with --offload {asked}, "
        f"{_gb(free)} are free; "
        + (f"what would fit: {' or '.join(cures)}" if cures else "nothing smaller would fit")
    )


def _require_ram(plan: Plan, offload: str, device: torch.device) -> None:
    needed, free = plan.in_ram(offload, device), free_memory(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"streaming needs {_gb(needed)} of RAM for the largest part, {_gb(free)} are free; "
            "close other programs, or use --offload stage on a larger device"
        )
