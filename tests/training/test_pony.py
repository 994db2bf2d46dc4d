"""The pony's recipe, run with next to nothing of everything."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from happyhorse import pony
from happyhorse.model import catalog
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.options import PONY_STAGES
from happyhorse.training.pony import STAGES, Recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "pony").mkdir()
    recipe = Recipe(
        folder / "runs", folder / "pony", steps=dict.fromkeys(STAGES, 1), clips=(3, 1), codec_films=3,
        latent_clips=24, large_latent_clips=8, batch=4,
    )  # fmt: skip
    recipe.run(stage for stage in STAGES if stage != "measure")
    return recipe


def test_the_command_line_knows_all_stages() -> None:
    assert tuple(STAGES) == PONY_STAGES


@pytest.mark.parametrize("name", [name for name in pony.FILES])
def test_every_stage_leaves_its_part(recipe: Recipe, name: str) -> None:
    path = recipe.out / pony.FILES[name]
    assert path == catalog.find(name, recipe.out) or path.parent == catalog.find(name, recipe.out)
    checkpoint = open_checkpoint(path)
    load(checkpoint, torch.float32)
    with safe_open(path, "pt") as file:
        assert "trained" in file.metadata()["note"]
    if checkpoint.part == "transformer":
        assert checkpoint.variant == name


def test_a_finished_stage_is_not_trained_again(recipe: Recipe) -> None:
    path = recipe.out / pony.FILES["distill"]
    before = path.read_bytes()
    path.unlink()
    replace(recipe).run(["distill"])
    assert path.read_bytes() == before
    assert len((recipe.runs / "distill" / "log.jsonl").read_text().splitlines()) == 1


def test_both_super_resolution_variants_are_one_network(recipe: Recipe) -> None:
    small, large = (
        load(open_checkpoint(recipe.out / pony.FILES[name]), torch.float32).state_dict()
        for name in ("540p_sr", "1080p_sr")
    )
    assert all(torch.equal(small[name], large[name]) for name in small)
