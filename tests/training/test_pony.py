"""The pony's recipe, run with next to nothing of everything."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from happyhorse import cli, pony
from happyhorse.model import catalog
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import PONY
from happyhorse.model.lora_formats import open_lora
from happyhorse.model.weight_files import open_weights
from happyhorse.options import PONY_STAGES
from happyhorse.training import measure
from happyhorse.training import pony as pony_recipe
from happyhorse.training.dmd2 import Dmd2Stage
from happyhorse.training.flow import FlowStage
from happyhorse.training.measure import measure_all
from happyhorse.training.pony import STAGES, Recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "pony").mkdir()
    steps = dict.fromkeys([*STAGES, "continuation", "settling"], 1)
    recipe = Recipe(
        folder / "runs", folder / "pony", steps=steps, clips=(3, 1), codec_films=3, latent_clips=24,
        large_latent_clips=8, encoded_clips=4, lora_clips=(4, 4), batch=4,
    )  # fmt: skip
    recipe.run(stage for stage in STAGES if stage != "measure")
    return recipe


@pytest.mark.parametrize("asked", [[], ["base", "measure"], ["--compile"]])
def test_stages_are_asked_for_on_the_command_line(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(Recipe, "run", lambda recipe, stages: ran.append((recipe.compiled, *stages)))
    assert cli.main(["train", "pony", "--device", "cpu", *asked]) == 0
    names = [name for name in asked if name in STAGES] or STAGES
    assert ran == [("--compile" in asked, *names)]


def test_an_interrupted_recipe_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "run", interrupted)
    assert (
        cli.main(["train", "pony", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 130
    )
    assert f"run the same command to go on ({tmp_path / 'runs'})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "fast", "want"),
    [
        ([], True, torch.bfloat16),
        ([], False, torch.float32),
        (["--dtype", "float32"], True, torch.float32),
        (["--dtype", "bfloat16"], False, torch.bfloat16),
    ],
)
def test_a_cpu_that_is_quick_with_bfloat16_computes_in_it(
    asked: list[str], fast: bool, want: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast}, raising=False)
    monkeypatch.setattr(Recipe, "run", lambda recipe, _: ran.append(recipe.dtype))
    assert cli.main(["train", "pony", "--device", "cpu", *asked]) == 0
    assert ran == [want]


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "pony", "bass"])
    assert "'bass' is no stage, they are audio_vae, video_vae" in capsys.readouterr().err


def test_what_would_end_a_run_after_hours_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for option in ("--runs", "--out"):
        folders = {"--runs": tmp_path / "runs", "--out": tmp_path / "pony", option: tmp_path / "file"}
        words = [str(word) for pair in folders.items() for word in pair]
        assert cli.main(["train", "pony", "--device", "cpu", *words, "audio_vae"]) == 2
        assert f"{option}: the folder {tmp_path / 'file'} cannot be made" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="run `happyhorse train pony audio_vae` first"):
        Recipe(tmp_path / "runs", tmp_path / "pony").run(["base"])


def test_the_trained_pony_is_measured(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pony_recipe, "measure_all", functools.partial(measure_all, count=1, size=(32, 32)))
    monkeypatch.setattr(measure, "LORA_FILMS", 1)
    recipe.run(["measure"])
    (folder,) = recipe.runs.glob("measured-*")
    for way in (*measure.WAYS, "LoRA"):
        assert {"figures.json", "figures.md", "films.png"} <= {path.name for path in (folder / way).iterdir()}
    found = json.loads((folder / "summary.json").read_text())
    assert {*measure.WAYS, "LoRA", "super-resolution", "ceiling"} <= set(found)
    assert all("hat" in found[way]["new thing"]["head"] for way in ("LoRA", "distill"))
    del found["2 steps"], found["distill"]["new thing"]
    (folder / "summary.json").write_text(json.dumps(found))
    made = []
    make_films = measure.films_by
    monkeypatch.setattr(
        measure, "films_by", lambda parts, steps=None: made.append(steps) or make_films(parts, steps)
    )
    recipe.run(["measure"])
    assert made == [2, None]  # what is missing


def test_the_new_thing_is_learnt_from_clips_of_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [path.read_text() for path in sorted((recipe.lora.parent / "clips").glob("*.txt"))]
    assert [" in a top hat " in text for text in captions] == [True] * 4 + [False] * 4
    assert open_lora(recipe.lora).adapters
    monkeypatch.setattr("happyhorse.training.pony.prepare_lora", None)
    recipe.run(["lora"])  # it is done


def test_a_missing_lora_is_said_before_anything_is_measured(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        measure_all(recipe.out, tmp_path / "measured", torch.device("cpu"), tmp_path / "none.safetensors", 4)
    assert not (tmp_path / "measured").exists()


@pytest.mark.parametrize(
    ("stage", "missing", "needed"),
    [
        ("distill", "text_encoder", "base"),
        ("distill", "codec", "video_vae"),
        ("base", "codec", "video_vae"),
        ("video_decoder", "codec", "video_vae"),
        ("super_resolution", "text_encoder", "base"),
        ("lora", "base", "base"),
        ("measure", "540p_sr", "super_resolution"),
    ],
)
def test_a_stage_names_the_one_that_it_needs(
    stage: str, missing: str, needed: str, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(recipe.out, out)
    if missing in pony.FILES:
        (out / pony.FILES[missing]).unlink()
    with pytest.raises(FileNotFoundError, match=f"run `happyhorse train pony {needed}` first"):
        replace(recipe, out=out, runs=tmp_path / "runs").run([stage])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stage", "replaced", "again"),
    [
        ("distill", "codec", "base"),
        ("distill", "audio_vae", "base"),
        ("super_resolution", "codec", "video_vae"),
        ("lora", "base", "base"),
        ("measure", "base", "distill"),
    ],
)
def test_parts_that_were_not_trained_together_are_refused(
    stage: str, replaced: str, again: str, recipe: Recipe, tmp_path: Path
) -> None:
    other = replace(recipe, out=tmp_path / "out", runs=tmp_path / "runs")
    shutil.copytree(recipe.out, other.out)
    other.runs.mkdir()
    shutil.copyfile(recipe.file("codec"), other.file("codec"))
    tensors, header = load_file(other.file(replaced)), open_weights(other.file(replaced)).metadata
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other.file(replaced), header)
    with pytest.raises(
        ValueError, match=f"trained with another {replaced.replace('_', ' ')} .* {again}` again"
    ):
        other.run([stage])


def test_parts_of_two_codecs_are_not_measured_together(recipe: Recipe, tmp_path: Path) -> None:
    other = replace(recipe, out=tmp_path / "out", runs=tmp_path / "runs")
    shutil.copytree(recipe.out, other.out)
    decoder = other.file("video_decoder")
    save_file(
        load_file(decoder), decoder, open_weights(decoder).metadata | {"made_with": '{"codec": "another"}'}
    )
    with pytest.raises(ValueError, match=r"turbo_vae.* another codec than that of .*base"):
        other.run(["measure"])


def test_measuring_needs_the_lora_of_the_parts(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `happyhorse train pony lora` first"):
        replace(recipe, runs=tmp_path / "runs").run(["measure"])


def test_a_lora_of_another_dtype_is_another_file(recipe: Recipe) -> None:
    assert replace(recipe, dtype=torch.bfloat16).lora != recipe.lora


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


@pytest.mark.parametrize(("name", "kind"), [("base", FlowStage), ("distill", Dmd2Stage)])
def test_a_finished_stage_is_not_trained_again(
    recipe: Recipe, name: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(kind, "step", never)
    path = recipe.out / pony.FILES[name]
    before = path.read_bytes()
    path.unlink()
    replace(recipe).run([name])
    assert path.read_bytes() == before


def test_both_super_resolution_variants_are_one_network(recipe: Recipe) -> None:
    small, large = (
        load(open_checkpoint(recipe.out / pony.FILES[name]), torch.float32).state_dict()
        for name in ("540p_sr", "1080p_sr")
    )
    assert all(torch.equal(small[name], large[name]) for name in small)
    config = open_checkpoint(recipe.out / pony.FILES["1080p_sr"]).config
    assert config == PONY.transformers["1080p_sr"] and config.local_attn_layers
