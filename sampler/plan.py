"""The memory plan: bytes of weights and activations of every stage, and which placement fits.

Weights are counted from the files. Activations are sums of the tensors alive at each network's fullest
moment, as its code makes them; tests/sampler/test_plan.py compares them with the live tensors of the networks
themselves, of published and miniature size. What a device's library takes beside tensors is not in them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from ..model.audio_vae import CHUNK, decoder_context
from ..model.checkpoint import Checkpoint, storage_dtype
from ..model.config import (
    AudioVAEConfig,
    Config,
    TextEncoderConfig,
    TransformerConfig,
    VideoDecoderConfig,
    VideoVAEConfig,
)
from ..model.geometry import FilmShape
from ..model.prompt import TEXT_LIMIT
from ..model.transformer import piece_tokens
from ..model.video_decoder import piece_frames
from .parts import STREAMED_PARTS, part_dtype
from .placement import OFFLOADS

GB = 1e9
TEXT_TOKENS = TEXT_LIMIT  # a longer prompt is encoded whole, and needs more
RESERVE = 0.06  # share of the memory left to the driver, the allocator's gaps and everybody else
SMALL_TENSORS = 1.05  # everything that the formulas leave out
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stage:
    """What one stage needs, in bytes. `layers` is the part of its weights that can be streamed."""

    name: str
    weights: int
    activations: int
    layers: int = 0
    largest_layer: int = 0


@dataclass(frozen=True)
class Plan:
    """The stages of one film on a device; if offloaded, the weights of one stage at a time are there."""

    stages: tuple[Stage, ...]
    device: torch.device

    def on_device(self, offload: str) -> int:
        """Peak bytes on the device under an offload ('none', 'stage' or 'blocks')."""
        if offload == "none":
            return sum(s.weights for s in self.stages) + max(s.activations for s in self.stages)
        return max(s.activations + self._weights(s, offload) for s in self.stages)

    def _weights(self, stage: Stage, offload: str) -> int:
        if offload == "stage":
            return stage.weights
        # Two layers are copied; where the device is the CPU, what they are copied from lies there too.
        elsewhere = 0 if self.device.type == "cpu" else stage.layers
        return stage.weights - elsewhere + 2 * stage.largest_layer

    def in_ram(self, offload: str) -> int:
        """Peak bytes that lie in RAM for good beside an accelerator: the layers to stream, and two staged."""
        if offload != "blocks" or self.device.type == "cpu":
            return 0
        return max(s.layers + 2 * s.largest_layer for s in self.stages)

    def fits(self, offload: str) -> bool:
        """Whether the device and the RAM have what is needed under an offload."""
        return self.on_device(offload) <= free_memory(self.device) and self.in_ram(offload) <= free_memory(
            CPU
        )

    def choose(self, offloads: Iterable[str] = OFFLOADS) -> str | None:
        """The first placement that fits, the fastest first; None if none does."""
        return next((offload for offload in offloads if self.fits(offload)), None)


def free_memory(device: torch.device) -> int:
    """Bytes that a film may use on `device`."""
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        free = torch.get_device_module(device).mem_get_info(device)[0]
    return int(free * (1 - RESERVE))


def require_fit(plan: Plan, offload: str, smaller: Iterable[tuple[str, Plan]]) -> str:
    """Return the offload to use ('auto' is decided here); raises MemoryError saying what would fit.

    `smaller` are plans of other films, the dearest first, with what to ask for to get them.
    """
    asked = OFFLOADS if offload == "auto" else (offload,)
    if (chosen := plan.choose(asked)) is not None:
        return chosen
    cures = []
    if (other := plan.choose()) is not None:
        cures.append(f"--offload {other} ({_need(plan, other)})")
    for what, film in smaller:
        if (other := film.choose((*asked, *OFFLOADS))) is not None:
            cures.append(what if other in asked else f"{what} with --offload {other}")
            break
    least = min(asked, key=plan.on_device)
    free = f"{_gb(free_memory(plan.device))}"
    if plan.in_ram(least):
        free += f" and {_gb(free_memory(CPU))}"
    raise MemoryError(
        f"this film needs about {_need(plan, least)} with --offload {least}, {free} are free; "
        + (f"what would fit: {' or '.join(cures)}" if cures else "nothing smaller would fit")
    )


def _need(plan: Plan, offload: str) -> str:
    ram = plan.in_ram(offload)
    return f"{_gb(plan.on_device(offload))} on {plan.device}" + (f" and {_gb(ram)} of RAM" if ram else "")


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def plan_film(
    parts: dict[str, Checkpoint],
    shape: FilmShape,
    large: FilmShape | None,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """The plan of a film of `shape`, and of `large` after super-resolution.

    `parts` holds the opened checkpoints by role, as `parts.needed_parts` names them.
    """
    shapes = {"transformer": shape, "audio_vae": shape}
    return Plan(tuple(
        _stage(role, part, shapes.get(role, large or shape), part_dtype(part.part, dtype, vae_dtype), device)
        for role, part in parts.items()
    ), device)  # fmt: skip


def _stage(
    role: str, checkpoint: Checkpoint, shape: FilmShape, dtype: torch.dtype, device: torch.device
) -> Stage:
    weights, layers = 0, {}
    for own, name in checkpoint.names.items():
        elements = torch.Size(checkpoint.file.tensors[name].shape).numel()
        size = elements * storage_dtype(checkpoint.part, own, dtype).itemsize
        weights += size
        head, _, rest = own.removeprefix("block.").partition(".")
        if head == "layers" and checkpoint.part in STREAMED_PARTS:
            index = rest.partition(".")[0]
            layers[index] = layers.get(index, 0) + size
    needed = int(SMALL_TENSORS * activations(role, checkpoint.config, shape, dtype, device))
    return Stage(
        role.replace("_", " "), weights, needed, sum(layers.values()), max(layers.values(), default=0)
    )


def activations(
    role: str, config: Config, shape: FilmShape, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes of the tensors alive at the fullest moment of the network of a role, without its weights."""
    size = dtype.itemsize
    if isinstance(config, TransformerConfig):
        tokens = shape.video_tokens + shape.audio_latents + TEXT_TOKENS
        windowed = config.frame_receptive_field < shape.latent_frames - 1
        return transformer_activations(config, tokens, size, device, windowed)
    if isinstance(config, TextEncoderConfig):
        return _text_encoder(config, size)
    if isinstance(config, AudioVAEConfig):
        return _audio(config, shape)
    if isinstance(config, VideoDecoderConfig):
        return _turbo_decoder(config, shape, size)
    return (_video_encoder if role == "video_vae" else _wan_decoder)(config, shape, size)


def transformer_activations(
    config: TransformerConfig, tokens: int, size: int, device: torch.device, windowed: bool = True
) -> int:
    """Bytes of a forward pass over `tokens`, `size` being that of a value in the linears.

    `windowed` is whether the film is longer than the window of local layers, where there are any.
    """
    width, groups = config.hidden_size, config.num_query_groups * config.head_dim
    windowed = windowed and bool(config.local_attn_layers)
    stream = 4 * width + 3 * config.head_dim  # float32, and the rotary table
    heads = size * (width + 2 * groups + config.num_heads) + size * (width + groups)  # qkvg; q and k rotated
    # keys and values of all heads, the result and its copies; with windows, pieces of all these
    attended = (6 if windowed else 4) * size * width
    if device.type == "cpu":  # there all of it is float32
        attended = (2 * size + (8 if size == 4 else 18) + (14 if windowed else 0)) * width
    gated = (8 + size) * width
    inner = max(
        config.inner_width(i) * (16 if i in config.gelu7_layers else 24) for i in range(config.num_layers)
    )
    mlp = tokens * (2 * 4 + size) * width + min(tokens, piece_tokens(tokens)) * inner
    return max(tokens * (stream + heads + max(attended, gated)), mlp)


def _text_encoder(config: TextEncoderConfig, size: int) -> int:
    heads = (3 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    scores = config.num_attention_heads * TEXT_TOKENS**2 * 12  # three of float32, or its equal
    return scores + TEXT_TOKENS * size * (2 * config.hidden_size + heads)


def _turbo_decoder(config: VideoDecoderConfig, shape: FilmShape, size: int) -> int:
    pixels, length = shape.width * shape.height, shape.latent_frames
    first, step = config.first_chunk_size, config.step_size
    frames, chunk = 4 * first - 3, 0
    if length > first:  # later windows; meanwhile the pixels of the one before are being written
        frames, chunk = 4 * (step + 1 + (length > first + step)), 4 * 3 * pixels * 4 * step
    # The last blocks at full size hold input, middle and output; a piece needs 10 bytes a value for its norm
    full = config.decoder_spatio_temporal_scaling.index(True) + 1
    frame = pixels // config.patch_size**2 * max(config.decoder_block_out_channels[:full])
    piece = min(piece_frames(frame) + 2, frames)
    return 3 * frames * frame * size + piece * frame * 10 + chunk + _latents(shape)


def _wan_decoder(config: VideoVAEConfig, shape: FilmShape, size: int) -> float:
    # The first block at full size works on two widths, beside two frames of the past of every convolution:
    # together 46 frames of one width. There are four frames of pixels at a time, and those before them.
    pixels = shape.width * shape.height
    return pixels * (46.5 * config.dec_dim / 4 * size + 2 * 4 * 3 * 4) + _latents(shape)


def _video_encoder(config: VideoVAEConfig, shape: FilmShape, size: int) -> float:
    # 15 frames of the first width, most of them the past that a picture alone does not need; then the patches
    pixels = shape.width * shape.height
    return pixels * (15.3 * config.dim / 4 * size + 9 * size + 3 * 4)


def _latents(shape: FilmShape) -> int:
    return 4 * 48 * shape.latent_frames * shape.latent_rows * shape.latent_columns


def _audio(config: AudioVAEConfig, shape: FilmShape) -> int:
    # Five tensors of the first width at every sample of a piece; or the largest weight, put together anew.
    latents = min(shape.audio_latents, CHUNK + 2 * decoder_context(config))
    widths = [config.channels * multiple for multiple in config.c_mults[-2:]]
    weight = 4 * widths[0] * widths[-1] * 2 * config.strides[-1]
    piece = 5 * 4 * latents * config.samples_per_latent * config.channels
    sound = 4 * config.io_channels * shape.audio_latents * config.samples_per_latent
    return max(piece, weight) + sound
