"""What training a LoRA takes of a device's memory, and how many layers may therefore stay there."""

import math
from dataclasses import replace

import torch

from ..model.config import TransformerConfig
from ..model.geometry import FilmShape
from ..model.lora import transformer_shapes
from ..model.transformer import piece_tokens
from ..sampler.activations import TEXT_TOKENS
from ..sampler.placement import Placement
from ..sampler.plan import GB, Room, SizedPart, Stage, Work, plan_film, works_in_ram
from .lora import LoraSettings, targets

# float32 values for every parameter of an adapter: itself, its gradient, its running mean and Adam's two
VALUES = 5


def lora_parameters(settings: LoraSettings, config: TransformerConfig) -> int:
    """How many parameters the adapters have together."""
    shapes = transformer_shapes(config)
    return settings.rank * sum(sum(shapes[f"{name}.weight"]) for name in targets(settings, config))


def lora_activations(config: TransformerConfig, tokens: int, size: int) -> int:
    """Bytes of activations of an update over `tokens`, `size` being that of a value in the linears.

    Every layer's input is kept, and what one layer keeps for its gradient while it is computed anew.
    """
    width, groups = config.hidden_size, config.num_query_groups * config.head_dim
    stream = 12 * width  # float32: between attention and feed-forward, and two gradients
    heads = 2 * size * (width + groups) + 4 * (width + groups)  # q, k, v and the result; q and k before norm
    fused = size * (width + 2 * groups + config.num_heads)
    gated, given = 4 * width, 3 * size * width  # before the gate; to the adapters
    kept, passing = (
        max(
            config.inner_width(layer) * (gelu if layer in config.gelu7_layers else swiglu)
            for layer in range(config.num_layers)
        )
        for gelu, swiglu in ((12 + size, 24 + size), (16, 24))
    )
    layer = tokens * (stream + heads + fused + gated + given + kept) + piece_tokens(tokens) * passing
    return config.num_layers * tokens * 4 * width + layer


def lora_stage_need(
    part: SizedPart, shape: FilmShape, settings: LoraSettings, batch: int, dtype: torch.dtype,
    device: torch.device,
) -> Stage:  # fmt: skip
    """The transformer's stage in the memory plan, with what training takes in place of a film's needs."""
    config = part.config
    (stage,) = plan_film({"transformer": part}, shape, None, dtype, dtype, device).stages
    tokens = batch * (shape.video_tokens + shape.audio_latents + TEXT_TOKENS)
    work = lora_activations(config, tokens, dtype.itemsize) + 4 * VALUES * lora_parameters(settings, config)
    values: dict[str, int] = {}  # of a layer's quantised weights, which are there until its gradient is
    for own in part.names:
        if part.keeps_quantized(own):
            layer = ".".join(own.split(".")[:3])
            values[layer] = values.get(layer, 0) + part.shape(own).numel() * dtype.itemsize
    at_once = max(values.values(), default=0)
    return replace(stage, works=(Work(work),), dequantized=(at_once, at_once))


def resident_layers(stage: Stage, device: torch.device, room: Room, asked: int | None) -> int | None:
    """How many of the first layers stay on the device, None being all; as many as fit, or those `asked` for.

    Raises ValueError for a number that cannot be, and MemoryError where nothing fits.
    """
    layers = len(stage.layers)
    if asked is not None:
        if not 0 <= asked <= layers:
            raise ValueError(f"layers to keep on the device must be from 0 to {layers}, got {asked}")
        return None if asked == layers else asked
    counts = (None,) if works_in_ram(device) else (None, *range(layers - 1, -1, -1))
    for resident in counts:
        if stage.need(Placement(resident=resident), device).fits(room):
            return resident
    least = stage.need(Placement(resident=counts[-1]), device)
    in_ram = f" and {least.ram / GB:.2f} GB of RAM" if least.ram else ""
    free = f"{room.device / GB:.2f} GB" + (f" and {room.ram / GB:.2f} GB" if least.ram else "")
    raise MemoryError(
        f"training needs about {math.ceil(least.device / GB * 100) / 100:.2f} GB on {device}{in_ram}, {free} "
        "are free; take fewer seconds, a smaller size, batches of one clip, or weights in fp8"
    )
