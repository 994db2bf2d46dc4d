"""The files of the miniature."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import disk_of
from safetensors.torch import load_file

from happyhorse import cli, pony
from happyhorse.model.config import VARIANTS
from happyhorse.pony import FILES, FOLDER, build, write_part
from happyhorse.training.evaluate import evaluate
from happyhorse.training.measure import films_by, open_models
from happyhorse.training.pony import Recipe, made_with


@pytest.mark.parametrize("name", ["distill", "video_vae"])
def test_the_same_weights_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    module = build(name)
    for folder in ("a", "b"):
        write_part(tmp_path / folder, name, module, "a note")
    assert (tmp_path / "a" / FILES[name]).read_bytes() == (tmp_path / "b" / FILES[name]).read_bytes()


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    module = build("audio_vae")
    with disk_of(1), pytest.raises(OSError, match="full"):
        write_part(tmp_path, "audio_vae", module, "a note")
    assert not list((tmp_path / "audio_vae").iterdir())


def test_the_shipped_parts_were_trained_together(tmp_path: Path) -> None:
    recipe, names = Recipe(tmp_path), [name for name in FILES if name != "1080p_sr"]
    recipe.require(*names)
    assert all(made_with(recipe.file(name)) for name in names if name != "audio_vae")


def test_all_parts_have_no_more_than_24_megabytes() -> None:
    files = [path for path in FOLDER.rglob("*.safetensors") if path != FOLDER / FILES["1080p_sr"]]
    assert len(files) == len(FILES) - 1 and sum(path.stat().st_size for path in files) < 24e6


@pytest.mark.parametrize("variant", ["base", "distill"])
def test_the_shipped_parts_make_the_films_that_are_asked_for(
    variant: str, pony_folder: Path, tmp_path: Path
) -> None:
    make_film = films_by(open_models(pony_folder, variant, torch.device("cpu")))
    found = evaluate(make_film, tmp_path, 2, ["text"])["text"]
    looks = {"bounce": ("colour", "background", "pitch"), "head": ("hair", "shirt", "background", "voice")}
    assert {found[world][name] for world, names in looks.items() for name in names} == {1.0}
    assert found["bounce"]["sync"] > 0.65 and found["head"]["mouth"] > 0.4


def test_every_process_finds_the_same_copy() -> None:
    code = "from happyhorse import pony; print(pony.version())"
    found = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_parts_are_stored_in_the_dtypes_of_the_published_ones(pony_folder: Path) -> None:
    dtypes = {
        name: {tensor.dtype for tensor in load_file(pony_folder / FILES[name]).values()} for name in VARIANTS
    }
    assert dtypes.pop("base") == {torch.bfloat16}
    assert all(found == {torch.bfloat16, torch.float32} for found in dtypes.values())


def test_every_part_of_a_folder_of_models_is_described(
    pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(pony_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FILES) and all(line.endswith("complete") for line in lines)
    assert cli.main(["inspect", str(pony_folder / "distill")]) == 0
    assert capsys.readouterr().out.startswith(f"{pony_folder / 'distill'}: ")
    files = [tmp_path / name for name in ("distill-bf16.safetensors", "distill_from_base.safetensors")]
    (tmp_path / "base").symlink_to(pony_folder / "base", target_is_directory=True)
    assert cli.main(["inspect", str(tmp_path)]) == 0  # one part so far
    assert capsys.readouterr().out.count("complete\n") == 1
    for file in files:
        file.symlink_to(pony_folder / FILES["distill"])
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("complete\n") == 3 and all(out.count(f"{file}: ") == 1 for file in files)


def test_a_missing_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pony, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"base/model\.safetensors is missing, a part of the pony"):
        pony.ensure_pony(tmp_path / "pony")
    assert not list(tmp_path.iterdir())
