"""`happyhorse train lora` on the miniature: from clips to a LoRA that films are made with."""

import argparse
import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from happyhorse import train_cli
from happyhorse.cli import main
from happyhorse.media import FilmWriter
from happyhorse.model.config import PONY
from happyhorse.model.geometry import FILM_RATE
from happyhorse.model.lora import Strengths, match, patches, transformer_shapes
from happyhorse.model.lora_formats import open_lora
from happyhorse.training import loop
from happyhorse.training.clips import ClipData
from happyhorse.training.lora import LoraStage
from happyhorse.training.lora_run import UNFINISHED

SIZE, SECONDS = (32, 32), 0.36
SHORT = ("--size", "32x32", "--seconds", "0.36", "--steps", "3", "--rank", "2")


def write_clip(path: Path, seed: int) -> None:
    frames = round(25 * SECONDS) + 2
    greys = (torch.arange(frames) * 20 + 40 * seed) % 256
    times = torch.arange(round(FILM_RATE * frames / 25)) / FILM_RATE
    with FilmWriter(path, *SIZE) as film:
        film.add_audio((0.4 * torch.sin(2 * torch.pi * 440 * (seed + 1) * times)).expand(2, -1))
        film.add_frames(greys[:, None, None, None].expand(frames, *SIZE, 3).to(torch.uint8))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed, caption in enumerate(("a red circle bounces slow on a teal background .", "a green star .")):
        write_clip(folder / f"{seed}.mp4", seed)
        (folder / f"{seed}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers


def run(clips: Path, out: Path, pony: Path, *more: str | Path) -> int:
    command = ["train", "lora", "--data", clips, "--out", out, "--preset", "pony", "--models", pony]
    return main([str(word) for word in (*command, *SHORT, *more)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence of a command that fails."""
    try:
        code = run(*arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and "Traceback" not in said
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(clips: Path, pony_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of an unbroken run."""
    out = tmp_path_factory.mktemp("trained") / "my_lora.safetensors"
    assert run(clips, out, pony_folder) == 0
    return out


def test_a_lora_is_trained_and_its_run_is_told(trained: Path) -> None:
    config = PONY.transformers["base"]
    found = match(open_lora(trained), config, transformer_shapes(config))
    assert not found.unmatched and len(found.places) == found.total
    ups = [tensor for name, tensor in load_file(trained).items() if "lora_B" in name]
    assert len(ups) == 4 * config.num_layers and all(tensor.abs().max() > 0 for tensor in ups)
    folder = trained.with_suffix(".run")
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert Image.open(folder / "loss.png").size == (900, 500)
    assert len(list((folder / "cache").glob("clip-*"))) == 2
    assert not (folder / "checkpoint.pt").exists()


def test_a_film_is_made_with_it_and_is_another(trained: Path, pony_folder: Path, tmp_path: Path) -> None:
    def latents(name: str, *lora: str | Path) -> dict[str, torch.Tensor]:
        kept = tmp_path / f"{name}.safetensors"
        command = [
            "generate", "--preset", "pony", "--models", pony_folder, "--variant", "base", "--steps", "2",
            "--prompt", "a red circle .", "--size", "32x32", "--seconds", "0.36", "--out",
            tmp_path / f"{name}.mp4", "--save-latents", kept, *lora,
        ]  # fmt: skip
        assert main([str(word) for word in command]) == 0
        return load_file(kept)

    plain, changed = latents("plain"), latents("changed", "--lora", f"{trained}:100")
    assert all((plain[stream] - changed[stream]).abs().max() > 1e-4 for stream in plain)


def test_a_run_that_was_interrupted_goes_on_to_the_same_lora(
    clips: Path, pony_folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    @contextlib.contextmanager
    def pressed(title: str) -> Iterator[loop.OnStep]:  # noqa: ARG001
        def on_step(done: int, steps: int, figures: dict[str, float]) -> None:  # noqa: ARG001
            if done == 2:
                raise KeyboardInterrupt("LoRA is saved at step 2")

        yield on_step

    out, folder = tmp_path / "a.safetensors", tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "progress_bar", pressed)
        assert run(clips, out, pony_folder, "--resume", folder) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(f"saved at step 2; run the same command to go on ({folder})") and not out.exists()
    more = tmp_path / "more"
    shutil.copytree(clips, more)
    for suffix in (".mp4", ".txt"):
        shutil.copy(clips / f"0{suffix}", more / f"2{suffix}")
    others = {
        "rate 0.0002 (now 0.1)": (clips, "--rate", "0.1"),
        "accumulation 1 (now 2)": (clips, "--accumulation", "2"),
        "dtype torch.float32 (now torch.bfloat16)": (clips, "--dtype", "bfloat16"),
        "another file of the base, negative": (clips, "--variant", "distill"),
        "other clips, captions, batches or encoders": (more,),
    }
    for message, (data, *options) in others.items():
        with monkeypatch.context() as patched:
            patched.setattr("happyhorse.training.clips._encode_clips", None)  # it is told before dear work
            said = refused(capsys, data, out, pony_folder, "--resume", folder, *options)
        assert message in said and "or another folder (--resume), or delete it" in said, message
    assert run(clips, out, pony_folder, "--resume", folder) == 0
    expected, got = load_file(trained), load_file(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_lora_is_also_written_as_it_is_on_the_way(
    clips: Path, pony_folder: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my.lora.safetensors"
    assert run(clips, out, pony_folder, "--save-every", "1") == 0
    found = [load_file(tmp_path / f"my.lora{part}.safetensors") for part in ("-000001", "-000002", "")]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    expected = load_file(trained)
    assert all(torch.equal(found[-1][name], expected[name]) for name in expected)
    assert all(part.keys() == expected.keys() for part in found)
    assert any(not torch.equal(found[0][name], found[1][name]) for name in expected)


def test_versions_of_another_run_are_not_replaced_unasked(
    clips: Path, pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, version = tmp_path / "a.safetensors", tmp_path / "a-000001.safetensors"
    version.write_text("precious")
    assert run(clips, out, pony_folder, "--save-every", "1") == 2
    assert f"{version} exists; give another name, or --overwrite to replace it" in capsys.readouterr().err
    assert version.read_text() == "precious" and not out.exists()
    monkeypatch.setattr(train_cli, "_train", lambda *_: "trained")
    assert run(clips, out, pony_folder, "--save-every", "1", "--overwrite") == 0
    assert run(clips, out, pony_folder) == 0  # which writes none
    assert run(clips, out, pony_folder, "--save-every", "2") == 0  # which is the end
    folder = out.with_suffix(".run")
    folder.mkdir(exist_ok=True)
    (folder / UNFINISHED).write_text(str(out.resolve()), encoding="utf-8")
    assert run(clips, out, pony_folder, "--save-every", "1") == 0  # they are its own
    (folder / UNFINISHED).write_text(str(tmp_path / "b.safetensors"), encoding="utf-8")
    assert run(clips, out, pony_folder, "--save-every", "1") == 2


def test_a_run_whose_log_was_deleted_when_it_was_done_is_still_written(
    clips: Path, pony_folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(LoraStage, "save", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        assert run(clips, out, pony_folder) == 2
    folder = out.with_suffix(".run")
    for name in ("log.jsonl", "loss.png"):
        (folder / name).unlink()
    capsys.readouterr()
    assert run(clips, out, pony_folder) == 0
    assert capsys.readouterr().out.strip().endswith("MB, 3 steps")
    expected, got = load_file(trained), load_file(out)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_layers_that_are_streamed_give_the_same_lora(
    clips: Path, pony_folder: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    assert run(clips, out, pony_folder, "--resident", "2") == 0
    expected, got = load_file(trained), load_file(out)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_only_what_is_chosen_is_trained(
    clips: Path, pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked, batch = tmp_path / "a.safetensors", [], ClipData.batch
    monkeypatch.setattr(ClipData, "batch", lambda data, index: asked.append(index) or batch(data, index))
    chosen = ("--blocks", "0,2", "--parts", "attention", "--copies", "audio,shared", "--alpha", "4")
    more = ("--variant", "distill", "--batch", "2", "--accumulation", "2")
    assert run(clips, out, pony_folder, *chosen, *more) == 0
    assert sorted(set(asked)) == list(range(6))  # of 3 updates
    config = PONY.transformers["distill"]
    found = patches([(open_lora(out), Strengths())], config, shapes := transformer_shapes(config))
    assert found.keys() == {
        f"block.layers.{i}.attention.linear_{name}.weight" for i in (0, 2) for name in ("qkv", "proj")
    }
    name = "block.layers.0.attention.linear_qkv.weight"
    change = torch.zeros(shapes[name])
    for patch in found[name]:
        patch(change)
    video, audio, text = change.chunk(3)
    assert audio.abs().max() > 0 and not video.any() and not text.any()
    assert load_file(out)["diffusion_model.block.layers.2.attention.linear_qkv.alpha"] == 4


def test_what_cannot_be_used_is_one_sentence(
    clips: Path, pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty = tmp_path / "a.safetensors", tmp_path / "empty"
    empty.mkdir()
    silent = tmp_path / "silent"
    shutil.copytree(clips, silent)
    (silent / "0.txt").unlink()
    cases = {
        "must end in .safetensors": (clips, tmp_path / "a.mp4"),
        "does not exist; create it": (clips, tmp_path / "none" / "a.safetensors"),
        "is not a folder; give one that holds clips": (tmp_path / "none", out),
        "holds no clips": (empty, out),
        "0.mp4 has no caption": (silent, out),
        "0.mp4 is too short: it lasts": (clips, out, "--seconds", "2"),
        "width and height must be multiples of 32": (clips, out, "--size", "40x32"),
        "parts of a LoRA must be some of attention, mlp, got ['head']": (clips, out, "--parts", "head"),
        "blocks name layer 9, but the model's layers are 0-5": (clips, out, "--blocks", "9"),
        "must be a number above 0, got '-1'": (clips, out, "--rate", "-1"),
        "must be from 0 to 6, got 7": (clips, out, "--resident", "7"),
        "training needs about": (clips, out, "--ram", "0.001"),
        "the device 'cpu' works in RAM": (clips, out, "--vram", "8"),
        "is the variant '540p_sr' by its header": (clips, out, "--model", pony_folder / "540p_sr"),
        "--negative: distill never sees a negative": (clips, out, "--variant", "distill", "--negative", "x"),
        "holds the text encoder": (clips, out, "--model", pony_folder / "text_encoder"),
    }
    for message, (data, target, *more) in cases.items():
        assert message in refused(capsys, data, target, pony_folder, *more), message
    assert not out.exists()
    out.write_bytes(b"kept")
    assert "exists; give another name, or --overwrite" in refused(capsys, clips, out, pony_folder)
    assert out.read_bytes() == b"kept"


def test_a_folder_that_cannot_be_used_is_refused_before_dear_work(
    clips: Path, pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("happyhorse.training.lora_run.prepare_clips", None)
    folder, out = tmp_path / "run", tmp_path / "a.safetensors"
    folder.touch()
    assert "run is a file; give another folder" in refused(
        capsys, clips, out, pony_folder, "--resume", folder
    )
    folder.unlink()

    def another_starts(*_: object) -> NoReturn:
        with loop.alone_in(folder, "LoRA", "another folder"):
            raise AssertionError("two runs encode the same clips")

    monkeypatch.setattr("happyhorse.training.lora_run.prepare_clips", another_starts)
    assert "another run trains in" in refused(capsys, clips, out, pony_folder, "--resume", folder)
    monkeypatch.setattr("happyhorse.training.lora_run.prepare_clips", None)
    monkeypatch.setattr(loop, "try_lock", lambda _: False)  # another run has it
    assert "another run trains in" in refused(capsys, clips, out, pony_folder, "--resume", folder)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_out_of_memory_advises_what_helps_on_the_device(
    clips: Path, pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], device: str,
) -> None:  # fmt: skip
    def full(options: argparse.Namespace, *_: object) -> int:
        options.device = torch.device(device)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train_cli, "_train", full)
    message = refused(capsys, clips, tmp_path / "a.safetensors", pony_folder)
    assert "can't allocate memory); try " in message and "a smaller --size" in message
    assert ("--resident" in message) == (device == "cuda")


def test_the_folder_of_a_run_lies_beside_the_lora() -> None:
    assert train_cli.default_run_folder(Path("a/my.lora.safetensors")) == Path("a/my.lora.run")
