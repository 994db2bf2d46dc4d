from pathlib import Path

import pytest
import torch

from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.packing import Latents
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.placement import LayerStream
from happyhorse.sampler.stages import network_of

CPU = torch.device("cpu")


def latents() -> Latents:
    return Latents(torch.empty(1, 48, 3, 4, 4), torch.empty(1, 9, 64))


def test_one_seed_draws_the_same_noise_in_the_stated_order() -> None:
    noise = FilmNoise(5).initial(latents())
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(noise.video, torch.randn(1, 48, 3, 4, 4, generator=generator))
    assert torch.equal(noise.audio, torch.randn(1, 64, 9, generator=generator).transpose(1, 2))


def test_step_and_super_resolution_noise_have_their_own_generators() -> None:
    film = FilmNoise(5)
    first, second = film.step(latents()), film.step(latents())
    assert torch.equal(first.video, FilmNoise(6).initial(latents()).video)
    assert not torch.equal(first.video, second.video)
    assert torch.equal(film.super_resolution(latents()).audio, FilmNoise(7).initial(latents()).audio)


def test_streamed_layers_give_the_same_bits_and_hold_two_layers_at_most(pony_folder: Path) -> None:
    transformer = load(open_checkpoint(pony_folder / "distill"), torch.bfloat16)
    layers = transformer.block.layers
    homes = [p.data_ptr() for p in layers.parameters()]
    start, text = FilmNoise(0).initial(latents()), torch.randn(1, 7, 96)
    stream = LayerStream(layers, CPU)
    away = []

    def run_block(index: int, layer, x: torch.Tensor) -> torch.Tensor:
        def watched(x: torch.Tensor) -> torch.Tensor:
            moved = [i for i, l in enumerate(layers) if l.mlp.down_proj.weight.data_ptr() not in homes]  # noqa: E741
            away.append((index, moved, stream._ahead))
            return layer(x)

        x = stream(index, watched, x)
        assert stream._ahead[0] == (index + 1) % len(layers)
        return x

    got = [network_of(transformer, run_block)(start, text) for _ in range(2)]
    want = network_of(transformer)(start, text)
    for velocity in got:
        assert all(torch.equal(a, b) for a, b in zip(velocity, want, strict=True))
    count = len(layers)
    assert away == [(i, [i], None) for i in range(count)] * 2
    assert [p.data_ptr() for p in layers.parameters()] == homes, "the weights must be back where they live"
    stream.close()
    assert stream._ahead is None


def test_an_error_inside_a_streamed_layer_puts_its_weights_back(pony_folder: Path) -> None:
    transformer = load(open_checkpoint(pony_folder / "distill"), torch.bfloat16)
    homes = [p.data_ptr() for p in transformer.block.layers.parameters()]

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        LayerStream(transformer.block.layers, CPU)(0, fail, torch.zeros(1))
    assert [p.data_ptr() for p in transformer.block.layers.parameters()] == homes
