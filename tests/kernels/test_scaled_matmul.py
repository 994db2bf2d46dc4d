from types import SimpleNamespace

import pytest
import torch
from golden_files import relative_error

from happyhorse.kernels import scaled_matmul
from happyhorse.kernels.scaled_matmul import (
    has_scaled_matmul,
    next_multiple,
    pad_linear,
    quantize_tokens,
    scaled_linear,
    scaled_linear_reference,
    scaling_after,
    scaling_rows,
)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float8_weight(dtype: torch.dtype, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = random(rows, columns, seed=1)
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


@pytest.mark.parametrize("way", [scaling_rows, scaling_after])
@pytest.mark.parametrize("scaled", ["not", "whole", "by row"])
@pytest.mark.parametrize("x_dtype", TOLERANCE)
@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (27, 41), (13, 52)])
def test_the_scaled_product_is_its_definition(
    way, scaled: str, x_dtype: torch.dtype, dtype: torch.dtype, rows: int, columns: int, monkeypatch
) -> None:
    monkeypatch.setattr(scaled_matmul, "_takes_row_scales", lambda *_: way is scaling_rows)
    weight, by_row = float8_weight(dtype, rows, columns)
    scale = {"not": None, "whole": torch.tensor(0.013), "by row": by_row}[scaled]
    if scale is None:
        weight = (weight.float() * by_row).to(dtype)  # in float16, values near the largest are out of range
    x = random(2, 5, columns).to(x_dtype)
    got, want = scaled_linear(x, weight, scale), scaled_linear_reference(x.float(), weight, scale)
    assert got.dtype == x_dtype and got.shape == (2, 5, rows)
    reference = scaled_linear_reference(x, weight, scale)
    assert relative_error(got, reference.double()) < 2 * TOLERANCE[x_dtype]
    assert relative_error(got, want.double()) < (2e-6 if x_dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_only_the_activations_lose_precision_and_little(dtype: torch.dtype) -> None:
    weight, scale = float8_weight(dtype, 96, 212)
    x = random(64, 212)
    exact = x.double() @ (weight.double() * scale).t()
    assert relative_error(scaled_linear(x, weight, scale), exact) < 0.03  # float8 rounds by up to 1/16


def test_every_token_has_its_own_scale() -> None:
    weight, scale = float8_weight(torch.float8_e4m3fn, 32, 48)
    x = random(4, 48)
    loud = x.clone()
    loud[2] *= 2.0**20
    quiet, other = scaled_linear(x, weight, scale), scaled_linear(loud, weight, scale)
    assert torch.equal(other[[0, 1, 3]], quiet[[0, 1, 3]])
    assert torch.equal(other[2], quiet[2] * 2.0**20)


@pytest.mark.parametrize("x_dtype", TOLERANCE)
def test_tokens_of_any_size_are_kept_in_range(x_dtype: torch.dtype) -> None:
    limits = torch.finfo(x_dtype)
    sizes = torch.tensor([0.0, limits.smallest_normal, 1e-6, 0.37, 447.3, limits.max / 2]).unsqueeze(1)
    x = (random(6, 33).clamp(-1, 1) * sizes).to(x_dtype)
    tokens, scale = quantize_tokens(x, 48)
    assert torch.equal(tokens[:, 33:].float(), torch.zeros(6, 15))
    back = tokens[:, :33].double() * scale.double()
    assert back.isfinite().all()
    assert relative_error(back[2:], x[2:].double()) < 0.04
    assert torch.equal(back[0], torch.zeros(33).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_spoils_its_token_only(bad: float) -> None:
    weight, scale = float8_weight(torch.float8_e4m3fn, 32, 48)
    x = random(3, 48)
    x[1, 5] = bad
    finite = scaled_linear(x, weight, scale).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


def test_no_tokens_give_no_tokens() -> None:
    weight, scale = float8_weight(torch.float8_e4m3fn, 27, 41)
    assert scaled_linear(torch.empty(2, 0, 41), weight, scale).shape == (2, 0, 27)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *FLOAT8])
def test_padding_adds_zeros_to_every_copy_and_nothing_to_the_product(dtype: torch.dtype) -> None:
    whole = torch.randint(-8, 9, (3 * 13, 41), generator=torch.Generator().manual_seed(2)).to(dtype)
    scale = 2.0 ** torch.arange(39).remainder(5).unsqueeze(1)
    wide, wide_scale = pad_linear(whole, scale, 16, 48, copies=3)
    assert wide.shape == (48, 48) and wide_scale.shape == (48, 1) and wide.dtype == dtype
    assert wide.float().count_nonzero() == whole.float().count_nonzero()
    x = torch.randint(-8, 9, (5, 41), generator=torch.Generator().manual_seed(3)).float()
    wide_x, _ = pad_linear(x, None, 5, 48)
    for i in range(3):  # whole numbers: sums are exact in any order, so nothing but zeros may be added
        got = wide_x @ (wide.float() * wide_scale)[16 * i : 16 * i + 16].t()
        want = x @ (whole.float() * scale)[13 * i : 13 * i + 13].t()
        assert torch.equal(got[:, :13], want)
        assert not got[:, 13:].any()


def test_a_weight_that_fits_is_not_copied() -> None:
    weight, scale = float8_weight(torch.float8_e4m3fn, 48, 64)
    same, same_scale = pad_linear(weight, scale, 16, 64, copies=3)
    assert same is weight and same_scale is scale


@pytest.mark.parametrize("way", [scaling_rows, scaling_after])
def test_a_padded_weight_gives_the_same_bits(way, monkeypatch) -> None:
    monkeypatch.setattr(scaled_matmul, "_takes_row_scales", lambda *_: way is scaling_rows)
    values = torch.randint(-8, 9, (27, 41), generator=torch.Generator().manual_seed(4)).float()
    x = torch.randint(-8, 9, (6, 41), generator=torch.Generator().manual_seed(5)).float()
    x[:, 0] = 448  # so that nothing is rounded
    assert torch.equal(scaled_linear(x, values.to(torch.float8_e4m3fn), None), x @ values.t())


@pytest.mark.parametrize(("size", "multiple"), [(7208, 7216), (27304, 27312), (13652, 13664), (5120, 5120)])
def test_the_published_sizes_and_what_they_become(size: int, multiple: int) -> None:
    assert next_multiple(size) == multiple


def test_a_cpu_has_no_matrix_units_for_float8() -> None:
    assert not has_scaled_matmul(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_nvidia_has_them_from_8_9_on(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_scaled_matmul(torch.device("cuda")) == has
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_scaled_matmul(torch.device("cuda"))
