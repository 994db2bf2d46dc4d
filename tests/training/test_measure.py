"""Ways of making films to measure, tried on the pony with next to nothing of everything."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.quant import QuantizedWeight
from happyhorse.training.evaluate import CHANCE, LOOKS, evaluate, make_prompts
from happyhorse.training.measure import (
    WAYS,
    Way,
    ceiling,
    films_by,
    measure,
    open_models,
    super_resolution_gain,
)

CPU = torch.device("cpu")


def test_the_ceiling_is_measured_through_the_networks(tmp_path: Path) -> None:
    found = ceiling(Unchanged(), Unchanged(), tmp_path, 2)
    assert found["networks"]["both"]["PSNR"] > 45  # but for rounding
    assert found["image"]["bounce"]["sync"] == found["image"]["bounce"]["kept"] == 1
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


def test_the_clock_is_of_the_sampling_alone(pony_folder: Path, tmp_path: Path) -> None:
    parts = open_models(pony_folder, "distill", CPU)
    (prompt,) = make_prompts("head", "text", tmp_path, 1)
    few, many = (films_by(parts, steps)(prompt, tmp_path / "a.mp4") for steps in (1, 16))
    assert 0 < few["seconds of sampling"] < many["seconds of sampling"]


def test_super_resolution_stands_beside_plain_resizing(pony_folder: Path) -> None:
    found = super_resolution_gain(pony_folder, CPU, 1, (32, 32))
    assert set(found) == set(LOOKS)
    for figures in found.values():
        assert set(figures) == {"super-resolution", "bicubic", "bicubic, true film", "ceiling"}
        assert all(5 < value < 60 for value in figures.values())
