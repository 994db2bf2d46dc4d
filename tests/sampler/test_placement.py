from pathlib import Path

import pytest
import torch

from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import Latents
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.placement import LayerStream
from happyhorse.sampler.plan import Plan, Stage, plan_film, require_fit
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


def test_the_plan_counts_the_weights_exactly(pony_folder: Path) -> None:
    checkpoint = open_checkpoint(pony_folder / "distill")
    made = plan_film(
        {"transformer": checkpoint}, FilmShape(128, 128, 26), None, torch.bfloat16, torch.float32
    )
    state = load(checkpoint, torch.bfloat16).state_dict()
    assert made.stages[0].weights == sum(t.nbytes for t in state.values())
    layers = [sum(t.nbytes for n, t in state.items() if n.startswith(f"block.layers.{i}.")) for i in range(6)]
    assert made.stages[0].streamed == made.stages[0].weights - sum(layers) + 2 * max(layers)


def test_larger_and_longer_films_need_more(pony_folder: Path) -> None:
    parts = {"transformer": open_checkpoint(pony_folder / "distill")}
    needs = [
        plan_film(parts, FilmShape(*size, latents), None, torch.bfloat16, torch.float32).on_device("stage")
        for size, latents in [((128, 128), 26), ((256, 128), 26), ((256, 256), 26), ((256, 256), 251)]
    ]
    assert needs == sorted(needs)
    assert len(set(needs)) == len(needs)


GB = 10**9
PLAN = Plan((Stage("text encoder", 18 * GB, 4 * GB, GB), Stage("transformer", 30 * GB, 2 * GB, 3 * GB)))


@pytest.mark.parametrize(
    ("free", "offload"),
    [(60, "none"), (51, "none"), (50, "stage"), (33, "stage"), (32, "blocks"), (5, "blocks"), (4, None)],
)
def test_the_fastest_placement_that_fits_is_chosen(free: int, offload: str | None) -> None:
    assert PLAN.choose(free * GB) == offload


def test_what_would_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("happyhorse.sampler.plan.free_memory", lambda _: 20 * GB)
    assert require_fit(PLAN, "auto", CPU, []) == "blocks"
    with pytest.raises(
        MemoryError, match=r"51.00 GB on cpu with --offload none.*would fit: --offload blocks"
    ):
        require_fit(PLAN, "none", CPU, [])
    smaller = [("--seconds 2", Plan((Stage("transformer", GB, GB, GB),)))]
    monkeypatch.setattr("happyhorse.sampler.plan.free_memory", lambda _: 3 * GB)
    with pytest.raises(MemoryError, match="what would fit: --seconds 2"):
        require_fit(PLAN, "auto", CPU, smaller)
