"""Optimizers, learning-rate schedule, moving average, random streams."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import Adam

from happyhorse.training.generators import generator
from happyhorse.training.optim import (
    NEWTON_SCHULZ,
    Ema,
    Muon,
    decayed,
    optimizers,
    orthogonalised,
    scale_rates,
)


def muon_update(shape: tuple[int, ...], copies: int | None = None) -> torch.Tensor:
    """What one Muon step with learning rate 1 takes from a parameter of this shape."""
    parameter = nn.Parameter(torch.zeros(shape))
    if copies:
        parameter.copies = copies
    parameter.grad = torch.randn(shape, generator=generator(0, "gradient", *shape))
    Muon([parameter], lr=1.0).step()
    return -parameter.detach()


def assert_near_one(matrix: torch.Tensor, scale: float = 1.0) -> None:
    values = torch.linalg.svdvals(matrix) / scale
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 48), (12, 4, 3, 3), (12, 4, 3, 3, 3)])
def test_the_singular_values_of_a_wide_update_are_near_one(shape: tuple[int, ...]) -> None:
    assert_near_one(muon_update(shape).flatten(1))


def test_a_tall_update_is_larger_by_the_root_of_its_proportions() -> None:
    assert_near_one(muon_update((96, 24)), scale=2.0)


def test_each_of_stacked_copies_is_orthogonalised_on_its_own() -> None:
    update = muon_update((36, 40), copies=3)
    for part in update.chunk(3):
        assert_near_one(part)
    together = muon_update((36, 40))
    assert (update - together).abs().max() > 0.05


def test_copies_are_updated_as_separate_parameters_would_be() -> None:
    gradient = torch.randn(30, 16, generator=generator(1))
    stacked = nn.Parameter(torch.zeros(30, 16))
    stacked.copies = 3
    parts = [nn.Parameter(torch.zeros(10, 16)) for _ in range(3)]
    together, apart = Muon([stacked], lr=0.1), Muon(parts, lr=0.1)
    for factor in (1.0, -0.3, 2.0):
        stacked.grad = factor * gradient.square()
        for part, own in zip(parts, stacked.grad.chunk(3), strict=True):
            part.grad = own.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([part.detach() for part in parts]))


def test_the_momentum_is_that_of_nesterov() -> None:
    parameter = nn.Parameter(torch.zeros(4, 8))
    optimizer = Muon([parameter], lr=1.0, momentum=0.9)
    first, second = (torch.randn(4, 8, generator=generator(2, index)) for index in range(2))
    for gradient in (first, second):
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
    ahead = 0.1 * second + 0.9 * (0.9 * 0.1 * first + 0.1 * second)
    alone = nn.Parameter(torch.zeros(4, 8))
    alone.grad = ahead / 0.19  # by the factor that a first gradient is scaled with; only its direction counts
    Muon([alone], lr=1.0, momentum=0.9).step()
    torch.testing.assert_close(parameter.detach() - before, alone.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "rank"), [((24, 96), 24), ((96, 24), 24), ((32, 32), 32), ((32, 64), 3)])
def test_the_steps_on_the_gram_matrix_are_those_on_the_matrix(shape: tuple[int, int], rank: int) -> None:
    random = generator(5)
    matrix = torch.randn(shape[0], rank, generator=random) @ torch.randn(rank, shape[1], generator=random)
    a, b, c = NEWTON_SCHULZ
    expected = matrix.double() / matrix.norm()
    for _ in range(5):
        square = expected @ expected.T
        expected = a * expected + (b * square + c * square @ square) @ expected
    (result,) = orthogonalised([matrix[None]])
    torch.testing.assert_close(result[0], expected.float(), atol=1e-4, rtol=1e-4)


def test_a_gradient_of_zeros_or_none_moves_nothing() -> None:
    parameters = [nn.Parameter(torch.ones(4, 8)) for _ in range(2)]
    parameters[0].grad = torch.zeros(4, 8)
    Muon(parameters, lr=1.0).step()
    assert all(torch.equal(parameter, torch.ones(4, 8)) for parameter in parameters)


@pytest.mark.parametrize(
    ("shape", "copies", "words"), [((8,), 1, "needs 2 or more dimensions"), ((8, 4), 3, "not 3 equal copies")]
)
def test_muon_refuses_what_is_no_stack_of_matrices(shape: tuple[int], copies: int, words: str) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.copies = copies
    with pytest.raises(ValueError, match=words):
        Muon([parameter], lr=0.1)


def test_muon_refuses_a_closure() -> None:
    with pytest.raises(ValueError, match="no closure"):
        Muon([nn.Parameter(torch.zeros(2, 2))], lr=0.1).step(lambda: 0.0)


def test_muon_gets_hidden_matrices_and_adam_the_rest() -> None:
    module = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(8, 4),
            "hidden": nn.Linear(4, 4),
            "conv": nn.Conv3d(4, 4, 3),
            "gain": nn.Conv1d(4, 1, 1, bias=False),  # one row: a vector
            "final_linear_video": nn.Linear(4, 2),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    muon, adam = optimizers(module, 0.02, 1e-3, (0.8, 0.9))
    assert isinstance(muon, Muon) and isinstance(adam, Adam)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(parameter)] for parameter in muon.param_groups[0]["params"]} == {
        "hidden.weight",
        "conv.weight",
    }
    assert {names[id(parameter)] for parameter in adam.param_groups[0]["params"]} == {
        "embed_tokens.weight",
        "hidden.bias",
        "conv.bias",
        "gain.weight",
        "final_linear_video.weight",
        "final_linear_video.bias",
    }
    assert (muon.defaults["lr"], adam.defaults["lr"], adam.defaults["betas"]) == (0.02, 1e-3, (0.8, 0.9))


def test_an_optimizer_without_parameters_is_left_out() -> None:
    assert [type(one) for one in optimizers(nn.Linear(4, 4, bias=False), 0.02, 1e-3)] == [Muon]
    assert [type(one) for one in optimizers(nn.LayerNorm(4), 0.02, 1e-3)] == [Adam]


def test_rates_are_scaled_from_the_first_ones_each_time() -> None:
    made = optimizers(nn.Linear(4, 4), 0.02, 1e-3)
    for factor in (0.1, 0.5):
        scale_rates(made, factor)
    assert [one.param_groups[0]["lr"] for one in made] == [0.01, 5e-4]


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [decayed(step, 100, flat=0.6, warmup=10) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 40)
    assert decayed(100, 100) == 0.0
    assert decayed(5, 10, flat=1.0, warmup=0) == 1.0


def test_the_average_is_the_weighted_mean_with_a_decay_that_ramps_up() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    ema, expected = Ema(module, 0.5), 2.0
    for index in range(20):
        nn.init.constant_(module.weight, float(index))
        ema.update(module)
        decay = min(0.5, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * index
    other = nn.Linear(1, 1, bias=False)
    ema.copy_to(other)
    assert other.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 19.0


def test_the_average_is_float32_and_of_trained_parameters_only() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)).bfloat16()
    ema = Ema(module, 0.99)
    assert {name: tensor.dtype for name, tensor in ema.averages.items()} == {
        "0.weight": torch.float32,
        "0.bias": torch.float32,
    }
    ema.update(module)
    ema.copy_to(module)
    assert module[0].weight.dtype == torch.bfloat16


def test_an_average_goes_on_from_its_state() -> None:
    module = nn.Linear(3, 3)
    ema, resumed = Ema(module, 0.9), Ema(nn.Linear(3, 3), 0.9)
    nn.init.ones_(module.weight)
    ema.update(module)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    nn.init.zeros_(module.weight)
    for one in (ema, resumed):
        one.update(module)
    assert resumed.updates == 2
    assert all(torch.equal(ema.averages[name], resumed.averages[name]) for name in ema.averages)


def test_an_average_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"other parameters \(e\.g\. bias\)"):
        Ema(nn.Linear(2, 2, bias=False), 0.9).load_state_dict(Ema(nn.Linear(2, 2), 0.9).state_dict())


def test_a_stream_depends_on_its_seed_and_on_every_part_of_its_path() -> None:
    paths = [(0,), (1,), (0, 1), (0, "1"), (0, 1, 2), (0, 12), (0, "noise", 3), (0, 3, "noise"), (0, -1)]
    first = [torch.randn(4, generator=generator(*path)) for path in paths]
    again = [torch.randn(4, generator=generator(*path)) for path in paths]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({tuple(one.tolist()) for one in first}) == len(paths)


def test_streams_of_successive_steps_are_uncorrelated() -> None:
    draws = torch.stack([torch.randn(2000, generator=generator(0, "noise", step)) for step in range(20)])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 0.1
