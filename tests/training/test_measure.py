"""Ways of making films to measure, tried on the pony with next to nothing of everything."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from happyhorse.model import catalog
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.lora_tools import extract_lora
from happyhorse.model.quant import QuantizedWeight
from happyhorse.sampler.parts import open_part
from happyhorse.training.evaluate import CHANCE, LOOKS, evaluate, make_prompts
from happyhorse.training.measure import (
    WAYS,
    SamplingClock,
    Way,
    ceiling,
    convert_parts,
    films_by,
    measure,
    open_models,
    super_resolution_gain,
)

CPU = torch.device("cpu")


def test_the_ceiling_is_measured_through_the_networks(tmp_path: Path) -> None:
    found = ceiling(Unchanged(), Unchanged(), tmp_path, 2)
    assert found["networks"]["both"]["PSNR"] > 45  # but for rounding
    assert found["networks"]["both"]["onsets"] == 1
    assert found["image"]["bounce"]["sync"] == found["image"]["bounce"]["kept"] == 1
    assert "kept" not in found["text"]["bounce"] and "pitch" in found["text"]["bounce"]
    assert "shape" in found["audio"]["bounce"] and "pitch" not in found["audio"]["bounce"]
    silent = ceiling(Unchanged(), Unchanged(0.0), tmp_path, 2)
    assert silent["networks"]["both"]["onsets"] == 0
    halved = ceiling(Unchanged(0.5), Unchanged(), tmp_path, 2)
    assert halved["networks"]["both"]["PSNR"] < 20
    assert halved["networks"]["both"]["worst frame"] <= halved["networks"]["both"]["PSNR"]


class Unchanged(torch.nn.Module):
    """A VAE whose latents are the film itself, times a factor when decoded."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.encode: Callable[[torch.Tensor], torch.Tensor] = lambda film: film

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.factor


@pytest.mark.parametrize("variant", ["base", "distill"])
def test_films_are_made_from_every_kind_of_prompt(variant: str, pony_folder: Path, tmp_path: Path) -> None:
    make_film = films_by(open_models(pony_folder, variant, CPU), steps=1)
    figures = evaluate(make_film, tmp_path, 1, size=(32, 32))
    assert set(figures) == {"text", "audio", "image"}
    names = {name for worlds in figures.values() for found in worlds.values() for name in found}
    assert set(CHANCE) | {"seconds of sampling"} <= names


def test_a_folder_of_models_is_measured(pony_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ceilings = {"text": {"head": {"voice": 0.5}}}
    figures = measure(pony_folder, replace(WAYS["distill"], steps=1), out, CPU, 1, (32, 32), ceilings)
    assert json.loads((out / "figures.json").read_text()) == {"figures": figures, "ceilings": ceilings}
    assert Image.open(out / "films.png").height > 6 * 96


@pytest.mark.parametrize("weights", [way.weights for way in WAYS.values() if way.weights])
def test_films_are_made_by_weights_in_fewer_bits(weights: str, pony_folder: Path, tmp_path: Path) -> None:
    measure(pony_folder, Way(steps=1, weights=weights), tmp_path, CPU, 1, (32, 32))
    files = list((tmp_path / "weights").iterdir())
    assert {path.stem for path in files} == {"transformer", "text_encoder"}
    for path in files:
        stored = open_checkpoint(path)
        assert any(isinstance(stored.read(name), QuantizedWeight) for name in stored.names)


def test_converted_networks_and_a_lora_change_the_films(pony_folder: Path, tmp_path: Path) -> None:
    base, distill = (open_part(name, catalog.find(name, pony_folder)) for name in ("base", "distill"))
    extract_lora(distill, base, tmp_path / "lora.safetensors", 4, "test")
    ways = (
        {},
        {"converted": convert_parts(pony_folder, Way(weights="q4_0"), tmp_path)},
        {"lora": tmp_path / "lora.safetensors"},
    )
    (prompt,) = make_prompts("head", "text", tmp_path, 1, (32, 32))
    for number, more in enumerate(ways):
        make_film = films_by(open_models(pony_folder, "distill", CPU, **more), steps=1)
        make_film(prompt, tmp_path / f"{number}.mp4")
    assert len({(tmp_path / f"{number}.mp4").read_bytes() for number in range(3)}) == 3


def test_the_clock_is_of_the_sampling_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 100, 10))
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    clock = SamplingClock(CPU)
    for stage, done in (("text", 0), ("sampling", 0), ("sampling", 1), ("sampling", 2), ("decoding", 0)):
        clock(stage, done, 2)
    assert clock.seconds == 20


def test_super_resolution_stands_beside_plain_resizing(pony_folder: Path) -> None:
    found = super_resolution_gain(open_models(pony_folder, "distill", CPU, sr="540p"), 1)
    assert set(found) == set(LOOKS)
    for figures in found.values():
        assert set(figures) == {"super-resolution", "bicubic", "bicubic, true film", "ceiling"}
        assert figures["bicubic"] < figures["ceiling"] and figures["bicubic, true film"] > 30
    assert found["head"]["bicubic"] + 1 < found["head"]["super-resolution"]
