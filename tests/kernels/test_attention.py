import pytest
import torch
from golden_files import relative_error
from torch.nn import functional as F

from happyhorse.kernels.attention import (
    FrameWindow,
    attention,
    attention_by,
    attention_reference,
    windowed_by_merging,
)


def random_qkv(tokens: int, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, tokens, heads, 16), (2, tokens, groups, 16), (2, tokens, groups, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got.double() - want).abs().max().item()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_full_attention_with_grouped_heads_is_the_definition(groups: int) -> None:
    q, k, v = random_qkv(45, 6, groups, torch.float32)
    assert worst(attention(q, k, v), attention_reference(q.double(), k.double(), v.double())) < 2e-6


def joined(*tensors: torch.Tensor, window: FrameWindow) -> torch.Tensor:
    return attention_by(attention, *tensors, window)


@pytest.mark.parametrize("windowed", [attention, joined, windowed_by_merging])
@pytest.mark.parametrize(("frames", "radius"), [(1, 0), (5, 0), (5, 1), (5, 3), (5, 4), (7, 11)])
def test_frame_windows_are_one_softmax_over_window_and_other_tokens(
    windowed, frames: int, radius: int
) -> None:
    window = FrameWindow(frames, tokens_per_frame=6, radius=radius)
    q, k, v = random_qkv(frames * 6 + 9, 4, 2, torch.float32)
    want = attention_reference(q.double(), k.double(), v.double(), window)
    assert worst(windowed(q, k, v, window=window), want) < 2e-6
    if radius < frames - 1:
        assert worst(attention(q, k, v), want) > 1e-2, (
            "the window must make a difference for this test to mean something"
        )


def test_cpu_attention_in_bfloat16_only_rounds_its_result() -> None:
    q, k, v = random_qkv(64, 4, 2, torch.bfloat16)
    exact = attention_reference(q.double(), k.double(), v.double())
    got = attention(q, k, v)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact.bfloat16().double(), rtol=2**-7, atol=1e-6)  # one step
    error = relative_error(got, exact)
    assert error < 1.01 * relative_error(exact.bfloat16(), exact)
    # PyTorch's own kernel rounds in between as well
    assert error <= relative_error(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), exact)
