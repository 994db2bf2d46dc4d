"""Checks that need an accelerator: `make gpu`."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from golden_files import relative_error

from happyhorse.kernels.attention import (
    PACKAGES,
    FrameWindow,
    attention,
    attention_backend,
    attention_reference,
)
from happyhorse.kernels.scaled_matmul import has_scaled_matmul, scaled_linear, scaled_linear_reference
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.packing import Latents
from happyhorse.model.transformer import JointTransformer
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.parts import Parts
from happyhorse.sampler.stages import network_of
from happyhorse.training.flow import Batch, FlowSettings, FlowStage, initialise
from happyhorse.training.generators import generator
from happyhorse.training.lora import LoraSettings, LoraStage
from happyhorse.training.lora_run import accelerator_on

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.accelerator.is_available():
        pytest.skip("this machine has no accelerator")
    return torch.device(torch.accelerator.current_accelerator().type, 0)


def velocity(pony: Path, device: torch.device, offload: str, dtype: torch.dtype, **options) -> Latents:
    checkpoints = {"transformer": open_checkpoint(pony / "1080p_sr")}
    parts = Parts(checkpoints, device, offload, dtype, dtype, **options)
    start = FilmNoise(0).initial(Latents(torch.empty(1, 48, 7, 8, 8), torch.empty(1, 26, 64)))
    text = torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(1))
    with parts.use("transformer") as (transformer, run_block), torch.inference_mode():
        network = network_of(transformer, run_block)
        result = network(start.map(lambda t: t.to(device)), text.to(device))
        return network(result, text.to(device)).map(lambda t: t.cpu())  # twice: the stream wraps around


@pytest.mark.parametrize("offload", ["none", "stage", "blocks"])
def test_the_velocity_on_the_device_is_that_on_the_cpu(
    pony_folder: Path, device: torch.device, offload: str
) -> None:
    want = velocity(pony_folder, torch.device("cpu"), "none", torch.float32)
    got = velocity(pony_folder, device, offload, torch.float32)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-3
    half = velocity(pony_folder, device, offload, torch.bfloat16)
    resident = velocity(pony_folder, device, "none", torch.bfloat16)
    for a, b, c in zip(half, want, resident, strict=True):
        assert relative_error(a, b) < 0.05
        assert torch.equal(a, c), "streaming must not change a bit"


@pytest.mark.parametrize("radius", [1, 3, 9])
def test_windowed_attention_on_the_device_is_the_definition(device: torch.device, radius: int) -> None:
    window = FrameWindow(8, 64, radius)
    shapes = (1, 8, 600, 64), (1, 2, 600, 64), (1, 2, 600, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    want = attention_reference(*(t.cpu().double() for t in (q, k, v)), window)
    assert relative_error(attention(q, k, v, window).cpu(), want) < 0.01


def test_a_film_gives_its_memory_back(pony_folder: Path, device: torch.device) -> None:
    memory = torch.get_device_module(device)
    velocity(pony_folder, device, "blocks", torch.bfloat16)
    before = memory.memory_allocated(device)
    velocity(pony_folder, device, "blocks", torch.bfloat16)
    assert memory.memory_allocated(device) <= before


SHAPES = [(256, 512), (27, 41), (7208, 5120), (5120, 13652)]  # the last two as published, and no multiples


@pytest.mark.parametrize("scaled", ["not", "whole", "by row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_float8_products_on_the_device_are_their_reference(
    device: torch.device,
    rows: int,
    columns: int,
    weight_dtype: torch.dtype,
    dtype: torch.dtype,
    scaled: str,
) -> None:
    if not has_scaled_matmul(device):
        pytest.skip("this device does not multiply float8")
    weight = torch.randn(rows, columns, device=device).to(weight_dtype)
    by_row = torch.rand(rows, 1, device=device) / 100 + 0.01
    scale = {"not": None, "whole": by_row[0, 0], "by row": by_row}[scaled]
    x = torch.randn(2, 37, columns, device=device).to(dtype)
    got = scaled_linear(x, weight, scale)
    assert got.dtype == dtype and got.shape == (2, 37, rows)
    # the units round sums of many products to fewer bits than float32 has
    assert relative_error(got, scaled_linear_reference(x, weight, scale).double()) < 0.01
    assert scaled_linear(x[:, :0], weight, scale).shape == (2, 0, rows)


@pytest.mark.parametrize("window", [None, FrameWindow(8, 64, 3)])
@pytest.mark.parametrize(("backend", "tolerance"), [("sdpa", 0.01), ("flash", 0.01), ("sage", 0.06)])
def test_every_attention_that_is_installed_is_the_definition(
    device: torch.device, backend: str, tolerance: float, window: FrameWindow | None
) -> None:
    if backend in PACKAGES:
        pytest.importorskip(PACKAGES[backend][0])
    shapes = (1, 8, 600, 128), (1, 2, 600, 128), (1, 2, 600, 128)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    want = attention_reference(*(t.float() for t in (q, k, v)), window)
    got = attention_backend(backend, device, torch.bfloat16)(q, k, v, window)
    assert relative_error(got, want.double()) < tolerance


@pytest.mark.parametrize("offload", ["none", "blocks"])
def test_compiled_layers_on_the_device_change_nothing(
    pony_folder: Path, device: torch.device, offload: str
) -> None:
    want = velocity(pony_folder, device, offload, torch.float32)
    got = velocity(pony_folder, device, offload, torch.float32, compiled=True)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5


class Films:
    """Another random batch for every index."""

    fingerprint = "random"

    def batch(self, index: int) -> Batch:
        draw = generator(7, "data", index)
        video, audio = torch.randn(2, 48, 3, 4, 4, generator=draw), torch.randn(2, 9, 64, generator=draw)
        return Batch(Latents(video, audio), torch.randn(2, 5, 96, generator=draw))


def training_on(device: torch.device) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # else the process's first device is that of all
    return accelerator_on(device, 1)


def trained_lora(
    pony: Path, device: torch.device, resident: int | None = None
) -> tuple[list[float], torch.Tensor]:
    """The losses of two steps, and after them the factors that were zero at first."""
    module = load(open_checkpoint(pony / "distill"), torch.float32, device, resident)
    settings, negative = LoraSettings(2, rank=4, rate=1e-2), torch.zeros(1, 3, 96)
    with LoraStage(
        module, Films(), negative, settings, training_on(device), "distill", resident=resident
    ) as lora:
        losses = [lora.step(step)["loss"] for step in range(2)]
        factors = torch.cat([adapter.up.detach().cpu().flatten() for adapter in lora.adapters.adapters])
    return losses, factors


@pytest.mark.parametrize("resident", [0, 2])
def test_a_lora_trained_on_streamed_layers_on_the_device_is_that_of_the_cpu(
    pony_folder: Path, device: torch.device, resident: int
) -> None:
    want_losses, want = trained_lora(pony_folder, torch.device("cpu"))
    losses, got = trained_lora(pony_folder, device, resident)
    assert losses == pytest.approx(want_losses, rel=1e-3)
    assert relative_error(got, want) < 0.02  # Adam makes whole steps of gradients that are all but zero


def test_flow_matching_on_the_device_has_a_finite_loss(pony_folder: Path, device: torch.device) -> None:
    transformer = JointTransformer(open_checkpoint(pony_folder / "base").config)
    initialise(transformer, 0)
    stage = FlowStage(transformer, Films(), torch.zeros(1, 3, 96), FlowSettings(steps=1), training_on(device))
    figures = stage.step(0)
    assert figures["loss"] > 0 and all(map(math.isfinite, figures.values()))
    assert all(weight.device == device and weight.isfinite().all() for weight in transformer.parameters())
