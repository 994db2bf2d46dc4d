"""The node that compiles layers, on a real MODEL."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from happyhorse.nodes import compile
from happyhorse.nodes.compile import HappyHorseCompile
from happyhorse.nodes.latents import film_latent
from happyhorse.nodes.model import load_model
from happyhorse.nodes.sampler import HappyHorseSampler

KINDS = 2  # of layers in the pony: gelu7 by modality, swiglu7 shared


@pytest.fixture(scope="module")
def model(pony_folder: Path):
    return load_model(pony_folder / "distill", None, "float32")


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def sample(model, steps: int = 1, tokens: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    prompt = [[torch.randn(1, tokens, model.model.config.text_in_channels, generator=generator), {}]]
    latent = film_latent(torch.zeros(1, 48, 3, 4, 6), torch.zeros(1, 64, 9))
    with torch.inference_mode():
        return HappyHorseSampler.execute(model, prompt, latent, 7, steps, 1.0)[0]["samples"].unbind()


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are traced and not compiled, which is faster."""
    monkeypatch.setattr(compile, "BACKEND", "eager")


@pytest.mark.parametrize("mode", compile.MODES)
def test_compiled_layers_change_nothing_and_share_their_code(model, compiler: str, mode: str) -> None:
    del compiler
    layers = list(model.model.diffusion_model.block.layers)
    compiled = HappyHorseCompile.execute(model, mode)[0]
    assert difference(sample(compiled), sample(model)) < 1e-5
    assert graphs() == KINDS and not counters["graph_break"]
    assert list(model.model.diffusion_model.block.layers) == layers, "they are put back after each step"


@pytest.mark.usefixtures("traced_only")
def test_the_steps_of_a_film_are_compiled_once(model) -> None:
    compiled = HappyHorseCompile.execute(model)[0]
    sample(compiled)
    sample(compiled, steps=3)
    assert graphs() == KINDS
    sample(model)
    assert graphs() == KINDS, "the model that was given stays as it was"


@pytest.mark.usefixtures("traced_only")
def test_prompts_of_many_lengths_are_all_compiled(model) -> None:
    compiled = HappyHorseCompile.execute(model)[0]
    for tokens in (5, 6, 7, 8):  # more than torch allows by itself
        sample(compiled, tokens=tokens)
    assert graphs() == 4 * KINDS


@pytest.mark.usefixtures("traced_only")
def test_another_attention_is_honoured_in_compiled_layers(model) -> None:
    calls = []

    def zero(_function, q: torch.Tensor, *_, **options) -> torch.Tensor:
        calls.append(options["transformer_options"]["block_index"])
        return torch.zeros_like(q)

    compiled = HappyHorseCompile.execute(model)[0]
    plain = sample(compiled)
    patched = compiled.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = zero
    assert difference(sample(patched), plain) > 1e-3
    before, layers = graphs(), len(model.model.diffusion_model.block.layers)
    sample(patched, steps=3)
    assert calls == 4 * list(range(layers))
    assert graphs() == before, "what changes with layers and steps must not be compiled in"


def test_another_familys_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: a HappyHorse transformer is needed, got SimpleNamespace"):
        HappyHorseCompile.execute(SimpleNamespace(model=SimpleNamespace()))
