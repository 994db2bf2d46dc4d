"""What LoRA training is planned to take against the live tensors of the network, and what of it may stay."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.config import MAGIHUMAN, TransformerConfig
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import Latents
from happyhorse.model.run_block import run_in_place
from happyhorse.model.transformer import JointTransformer
from happyhorse.sampler.activations import TEXT_TOKENS
from happyhorse.sampler.placement import Placement
from happyhorse.sampler.plan import Room
from happyhorse.training.flow import FlowNetworks
from happyhorse.training.lora import LoraAdapters, LoraSettings, checkpointed
from happyhorse.training.lora_memory import (
    lora_activations,
    lora_parameters,
    lora_stage_need,
    resident_layers,
)

META, SETTINGS = torch.device("meta"), LoraSettings(steps=1, rank=16)
FULL = MAGIHUMAN.transformers["base"]
SHORT = replace(FULL, num_layers=3, mm_layers=(0,), gelu7_layers=(0,))
FILM = FilmShape(448, 256, 126)


class Fused(Function):
    """Attention without values, which keeps for its gradient what a fused kernel does."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def measured(
    config: TransformerConfig,
    shape: FilmShape,
    dtype: torch.dtype,
    batch: int,
    patch: pytest.MonkeyPatch,
) -> tuple[int, int]:
    """The peak of a step's tensors beside weights and factors, and how many the latter are."""
    patch.setattr(F, "scaled_dot_product_attention", Fused.apply)
    with META:
        network = JointTransformer(config, compute_dtype=dtype)
        size = shape.latent_frames, shape.latent_rows, shape.latent_columns
        video = torch.zeros(batch, config.latent_channels, *size)
        latents = Latents(video, torch.zeros(batch, shape.audio_latents, config.audio_in_channels))
        text = torch.zeros(batch, TEXT_TOKENS, config.text_in_channels)
    for name, parameter in network.named_parameters():
        if name.startswith("block.") and parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    adapters = LoraAdapters(network.requires_grad_(False), SETTINGS).to(META)
    networks = FlowNetworks(network, run_block=checkpointed(run_in_place))
    with LiveBytes(nn.ModuleList([network, adapters])) as live:
        sum(stream.square().mean() for stream in networks(latents, text)).backward()
    return live.peak, sum(parameter.numel() for parameter in adapters.parameters())


@pytest.mark.parametrize(
    ("config", "shape", "dtype", "batch"),
    [
        (FULL, FILM, torch.bfloat16, 1),
        (SHORT, FILM, torch.bfloat16, 2),
        (SHORT, FILM, torch.float32, 1),
        (SHORT, FilmShape(256, 256, 26), torch.bfloat16, 1),
        (replace(SHORT, gelu7_layers=(0, 1, 2)), FILM, torch.bfloat16, 1),
    ],
)
def test_the_plan_is_a_little_above_what_a_step_holds(
    config: TransformerConfig, shape: FilmShape, dtype: torch.dtype, batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    peak, parameters = measured(config, shape, dtype, batch, monkeypatch)
    assert parameters == lora_parameters(SETTINGS, config)
    tokens = batch * (shape.video_tokens + shape.audio_latents + TEXT_TOKENS)
    planned = lora_activations(config, tokens, dtype.itemsize) + 4 * parameters  # and their gradients
    assert 1.0 <= planned / peak <= 1.4, f"planned {planned:.3g}, needed {peak:.3g}"


def test_as_many_layers_stay_as_fit(pony_folder: Path) -> None:
    part = open_checkpoint(pony_folder / "base", "transformer")
    stage = lora_stage_need(part, FilmShape(96, 96, 51), SETTINGS, 1, torch.bfloat16, META)

    def chosen(num_bytes: int, asked: int | None = None) -> int | None:
        return resident_layers(stage, META, Room(num_bytes, 10**12), asked)

    whole = stage.need(Placement(), META).device
    assert chosen(whole) is None
    # one layer more or less in RAM is one copy less or more that is under way: the least need may be whole
    fitting = [n for n in range(6) if stage.need(Placement(resident=n), META).device <= whole - 1]
    assert chosen(whole - 1) == max(fitting)
    assert chosen(1, asked=2) == 2 and chosen(1, asked=6) is None
    with pytest.raises(ValueError, match="must be from 0 to 6, got 7"):
        chosen(whole, asked=7)
    with pytest.raises(MemoryError, match=r"training needs about .* GB on meta and .* GB of RAM"):
        chosen(1000)
    cpu = torch.device("cpu")
    assert resident_layers(stage, cpu, Room(whole * 2, whole * 2), None) is None
    with pytest.raises(MemoryError, match=r"training needs about .* GB on cpu, "):
        resident_layers(stage, cpu, Room(1000, 1000), None)
