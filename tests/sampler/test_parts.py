"""How the transformers of a film are run: with which attention, and compiled."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from happyhorse import cli
from happyhorse.kernels.attention import FrameWindow, attention
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.packing import Latents
from happyhorse.sampler.parts import Parts
from happyhorse.sampler.stages import network_of

CPU = torch.device("cpu")


def velocity(pony: Path, **options) -> Latents:
    checkpoints = {"transformer": open_checkpoint(pony / "1080p_sr")}
    parts = Parts(checkpoints, CPU, "none", torch.float32, torch.float32, **options)
    generator = torch.Generator().manual_seed(0)
    latents = Latents(
        torch.randn(1, 48, 4, 4, 6, generator=generator), torch.randn(1, 13, 64, generator=generator)
    )
    text = torch.randn(1, 9, 96, generator=generator)
    with parts.use("transformer") as (transformer, run_block), torch.inference_mode():
        return network_of(transformer, run_block)(latents, text)


def test_all_layers_of_a_transformer_use_the_attention_asked_for(pony_folder: Path) -> None:
    windows = []

    def counted(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: FrameWindow | None
    ) -> torch.Tensor:
        windows.append(window)
        return attention(q, k, v, window)

    got, want = velocity(pony_folder, attend=counted), velocity(pony_folder)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [window is None for window in windows] == [False, True]


def latents_of_a_film(folder: Path, pony: Path, *options: str) -> dict[str, torch.Tensor]:
    outputs = "--out", f"{folder / 'film.mp4'}", "--save-latents", f"{folder / 'latents.safetensors'}"
    fixed = "--preset", "pony", "--models", f"{pony}", "--device", "cpu", "--prompt", "a red circle ."
    short = "--seconds", "0.6", "--steps", "2", "--size", "64x64"
    assert cli.main(["generate", *fixed, *short, *outputs, *options]) == 0
    return load_file(folder / "latents.safetensors")


def test_a_film_of_compiled_layers_is_the_same(pony_folder: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler: install g++ or clang++")
    torch.compiler.reset()
    counters.clear()
    want = latents_of_a_film(tmp_path, pony_folder)
    got = latents_of_a_film(tmp_path, pony_folder, "--compile", "--offload", "blocks")
    for name, stream in want.items():
        assert (got[name] - stream).norm() < 1e-5 * stream.norm()
    # layers of one kind share their code, also where their weights come and go
    assert 0 < counters["stats"]["unique_graphs"] <= 10


def test_an_attention_that_cannot_be_had_is_one_sentence(
    pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--preset", "pony", "--models", f"{pony_folder}", "--device", "cpu", "--prompt", "x"
    out = tmp_path / "film.mp4"
    assert cli.main(["generate", *options, "--attention", "flash", "--out", f"{out}"]) == 2
    said = capsys.readouterr().err  # what no package would help with comes first
    assert "'flash' computes in bfloat16 on a GPU, not in float32 on cpu; choose sdpa" in said
    assert not out.exists()
