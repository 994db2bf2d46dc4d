import re
from pathlib import Path

import pytest
import torch
from golden_files import relative_error
from torch.nn import functional as F

from happyhorse.kernels import attention as module
from happyhorse.kernels.attention import (
    BACKENDS,
    FrameWindow,
    attention,
    attention_backend,
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


CUDA = torch.device("cuda")
STAND_INS = {  # with the signatures and layouts of the packages
    "flash": """
from torch.nn.functional import scaled_dot_product_attention
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
""",
    "sage": """
from torch.nn.functional import scaled_dot_product_attention
def sageattn(q, k, v, tensor_layout="HND", is_causal=True, sm_scale=None):
    assert tensor_layout == "HND"
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
""",
}


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with none of the packages, whatever this one has."""
    monkeypatch.setattr(module, "find_spec", lambda _: None)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a stand-in for a backend's package in front of the real ones."""

    def put(backend: str, source: str) -> None:
        package = f"stand_in_{backend}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{package}.py").write_text(source)
        monkeypatch.setitem(module.PACKAGES, backend, (package, *module.PACKAGES[backend][1:]))

    monkeypatch.syspath_prepend(tmp_path)
    return put


def test_the_default_backend_is_that_of_pytorch() -> None:
    assert BACKENDS[0] == "sdpa"
    assert attention_backend("sdpa", torch.device("cpu"), torch.float32) is attention


@pytest.mark.parametrize("window", [None, FrameWindow(3, tokens_per_frame=9, radius=1)])
@pytest.mark.parametrize("backend", STAND_INS)
def test_a_backend_gets_the_layout_it_wants(install, backend: str, window: FrameWindow | None) -> None:
    install(backend, STAND_INS[backend])
    q, k, v = random_qkv(45, 6, 2, torch.float32)
    got = attention_backend(backend, CUDA, torch.bfloat16)(q, k, v, window)
    assert worst(got, attention_reference(q.double(), k.double(), v.double(), window)) < 2e-6


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of sdpa, flash, sage, got 'xformers'"):
        attention_backend("xformers", CUDA, torch.bfloat16)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize(("backend", "package"), [("flash", "flash-attn"), ("sage", "sageattention")])
def test_a_backend_that_is_not_installed_says_how_to(backend: str, package: str) -> None:
    with pytest.raises(ValueError, match=rf"pip install {package}.*choose what is there: sdpa$"):
        attention_backend(backend, CUDA, torch.bfloat16)


def test_it_also_names_the_ones_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name == "sageattention" or None)
    with pytest.raises(ValueError, match=r"choose what is there: sdpa, sage$"):
        attention_backend("flash", CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "dtype", "found"),
    [(torch.device("cpu"), torch.bfloat16, "bfloat16 on cpu"), (CUDA, torch.float32, "float32 on cuda")],
)
def test_a_backend_for_other_tensors_is_refused(
    install, device: torch.device, dtype: torch.dtype, found: str
) -> None:
    install("flash", STAND_INS["flash"])
    with pytest.raises(ValueError, match=f"in bfloat16 on a GPU, not in {found}; choose sdpa"):
        attention_backend("flash", device, dtype)


def test_a_package_that_does_not_load_is_told(install) -> None:
    install("sage", "raise ImportError('libcudart.so.99: not found\\nmore')")
    with pytest.raises(ValueError, match=re.escape("does not load (libcudart.so.99: not found); install")):
        attention_backend("sage", CUDA, torch.bfloat16)
