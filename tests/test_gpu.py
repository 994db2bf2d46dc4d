"""Checks that need an accelerator: `make gpu`."""

from pathlib import Path

import pytest
import torch
from golden_files import relative_error

from happyhorse.kernels.attention import FrameWindow, attention, attention_reference
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.packing import Latents
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.parts import Parts
from happyhorse.sampler.stages import network_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.accelerator.is_available():
        pytest.skip("this machine has no accelerator")
    return torch.device(torch.accelerator.current_accelerator().type, 0)


def velocity(pony: Path, device: torch.device, offload: str, dtype: torch.dtype) -> Latents:
    parts = Parts({"transformer": open_checkpoint(pony / "1080p_sr")}, device, offload, dtype, dtype)
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
