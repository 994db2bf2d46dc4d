"""The node that trains a LoRA on the miniature, in this process and on a server."""

import shutil
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from host import Client, Prompt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from happyhorse import pony
from happyhorse.media import FilmWriter
from happyhorse.model.config import MAGIHUMAN, PONY
from happyhorse.model.geometry import FILM_RATE
from happyhorse.model.lora import Strengths
from happyhorse.nodes import train
from happyhorse.nodes.latents import film_latent
from happyhorse.nodes.lora import load_lora
from happyhorse.nodes.model import load_model
from happyhorse.nodes.sampler import HappyHorseSampler
from happyhorse.nodes.train import HappyHorseTrainLora
from happyhorse.training.clips import ClipData
from happyhorse.training.lora import LoraStage

SIZE, FRAMES = (32, 32), 12
SETTINGS = {
    "folder": "clips", "base": "pony: base", "text_encoder": "pony", "vae": "pony", "audio_vae": "pony",
    "name": "mine", "width": 32, "height": 32, "seconds": 0.36, "steps": 3, "learning_rate": 0.01, "rank": 2,
    "seed": 0,
}  # fmt: skip


def write_clips(folder: Path) -> Path:
    folder.mkdir(parents=True)
    times = torch.arange(FRAMES * FILM_RATE // 25) / FILM_RATE
    for number in range(2):
        greys = (torch.arange(FRAMES) * 20 + 60 * number) % 256
        with FilmWriter(folder / f"{number}.mp4", *SIZE) as film:
            film.add_audio((0.4 * torch.sin(2 * torch.pi * 440 * (number + 1) * times)).expand(2, -1))
            film.add_frames(greys[:, None, None, None].expand(FRAMES, *SIZE, 3).to(torch.uint8))
        (folder / f"{number}.txt").write_text("a red circle bounces slow .", encoding="utf-8")
    return folder


@pytest.fixture
def home(pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of a host with two clips, and the built-in pony of all tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "happyhorse" / f"pony-{pony.version()}"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(pony_folder, target_is_directory=True)
    for kind in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    loras = ([str(tmp_path / "loras")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", loras)
    folder_paths.filename_list_cache.pop("loras", None)
    write_clips(tmp_path / "input" / "clips")
    return tmp_path


def run(**changed: Any) -> Any:
    """The node as the host runs it."""
    with torch.inference_mode():
        return HappyHorseTrainLora.execute(**SETTINGS | changed)


def film(model: Any) -> list[torch.Tensor]:
    states = torch.randn(1, 9, model.model.config.text_in_channels, generator=torch.manual_seed(1))
    latent = film_latent(torch.zeros(1, 48, 3, 2, 2), torch.zeros(1, 64, 9))
    with torch.inference_mode():
        return HappyHorseSampler.execute(model, [[states, {}]], latent, 7, 2, 1.0)[0]["samples"].unbind()


def test_it_trains_where_the_host_infers_and_its_model_is_the_loaded_lora(
    home: Path, pony_folder: Path
) -> None:
    model = load_model(pony_folder / "distill", None, "float32")
    plain = film(model)
    patched, loss, name = run(model=model).args
    assert name == "mine.safetensors" and loss.shape == (1, 500, 900, 3) and 0 <= loss.min() < loss.max() <= 1
    written = home / "loras" / name
    assert all(tensor.any() for tensor in load_file(written).values())
    made = film(patched)
    assert not any(torch.equal(a, b) for a, b in zip(made, plain, strict=True))
    loaded = film(load_lora(model, written, Strengths())[0])
    assert all(torch.equal(a, b) for a, b in zip(made, loaded, strict=True))
    stock = film(comfy.sd.load_lora_for_models(model, None, load_file(written), 1.0, 0)[0])
    for a, b, without in zip(made, stock, plain, strict=True):
        assert (a - b).norm() < 1e-2 * (a - without).norm()
    assert not (home / "output" / train.RUNS / "mine" / "checkpoint.pt").exists()


def test_folders_that_hold_films_are_offered_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offered() -> list[str]:
        return next(
            each for each in HappyHorseTrainLora.define_schema().inputs if each.id == "folder"
        ).options

    for name in ("3d", "a", "zoo"):
        (home / "input" / name).mkdir()
    (home / "input" / "zoo" / "film.MOV").touch()
    assert offered() == ["clips", "zoo", "3d", "a"]

    def refused(_: Path) -> None:
        raise PermissionError(13, "permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    assert offered() == ["3d", "a", "clips", "zoo"]


def test_no_file_is_replaced_and_no_model_is_made_up(home: Path) -> None:
    first = run(name="style/mine.safetensors")
    assert isinstance(first[0], ExecutionBlocker) and first[2] == "style/mine.safetensors"
    kept = (home / "loras" / "style" / "mine.safetensors").read_bytes()
    assert run(name="style/mine", seed=1)[2] == "style/mine_00002.safetensors"
    assert (home / "loras" / "style" / "mine.safetensors").read_bytes() == kept


def test_versions_of_another_run_are_not_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "loras").mkdir()
    (home / "loras" / "mine-000001.safetensors").write_text("precious")
    jobs = []
    with monkeypatch.context() as patched:
        patched.setattr(train, "_train", lambda job, *_: jobs.append(job))
        patched.setattr(train, "_finish", lambda *_: None)
        for every in (0, 3, 1):
            run(save_every=every)
    assert [job.out.name for job in jobs] == ["mine.safetensors"] * 2 + ["mine_00002.safetensors"]
    with monkeypatch.context() as patched:
        patched.setattr(LoraStage, "save", lambda _, path: stop_at("-000002", path))
        with pytest.raises(RuntimeError, match="stopped"):
            run(save_every=1)
    assert run(save_every=1)[2] == "mine_00002.safetensors"  # it goes on under its name
    assert (home / "loras" / "mine-000001.safetensors").read_text() == "precious"
    assert not (home / "loras" / "mine.safetensors").exists()


def stop_at(version: str, path: Path) -> None:
    if version in path.name:
        raise RuntimeError("stopped")


def test_a_finished_run_is_loaded_and_not_trained_again(
    home: Path, pony_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(pony_folder / "distill", None, "float32")
    made, plot, name = run(model=model).args
    trained, calls = train._train, []
    monkeypatch.setattr(train, "_train", lambda *given: (calls.append(given), trained(*given)))
    again, same_plot, same_name = run(model=model).args
    assert not calls and same_name == name and torch.equal(same_plot, plot)
    assert all(torch.equal(a, b) for a, b in zip(film(again), film(made), strict=True))

    (home / "loras" / name).unlink()
    assert run()[2] == name and len(calls) == 1, "a LoRA that is gone is made anew"
    assert run(accumulation=2)[2] == "mine_00002.safetensors" and len(calls) == 2
    (home / "input" / "clips" / "0.txt").write_text("a blue circle bounces slow .", encoding="utf-8")
    assert run(accumulation=2)[2] == "mine_00003.safetensors" and len(calls) == 3


def test_an_interrupted_run_goes_on_to_the_same_lora(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(name="unbroken")
    real, seen = comfy.model_management.throw_exception_if_processing_interrupted, []

    def interrupt() -> None:
        seen.append(1)
        if (home / "output" / train.RUNS / "mine" / "log.jsonl").exists():
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run()
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", real)
    folder = home / "output" / train.RUNS / "mine"
    assert len((folder / "log.jsonl").read_text().splitlines()) == 1 and (folder / "checkpoint.pt").exists()
    assert not (home / "loras" / "mine.safetensors").exists()
    run()
    expected, got = (load_file(home / "loras" / f"{name}.safetensors") for name in ("unbroken", "mine"))
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_what_was_loaded_is_let_go_of_before_the_memory_is_given_back(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, alive = [], []

    class Watched(LoraStage):
        def __init__(self, transformer: torch.nn.Module, *rest: Any) -> None:
            super().__init__(transformer, *rest)
            made.extend(weakref.ref(thing) for thing in (transformer, self.adapters, self.optimizer))
            transformer.block.layers[1].register_forward_pre_hook(full)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    def count() -> None:
        alive.append(sum(thing() is not None for thing in made))

    monkeypatch.setattr("happyhorse.training.lora_run.LoraStage", Watched)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", count)
    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert len(made) == 3 and alive[-1] == 0
    assert (home / "output" / train.RUNS / "mine" / "cache").is_dir()


def test_other_settings_under_a_name_are_told_to_take_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(LoraStage, "save", broken)
        with pytest.raises(OSError, match="the disk is full"):
            run()
    with pytest.raises(ValueError, match="give the same settings or another name"):
        run(seed=5)
    for name in ("log.jsonl", "loss.png"):
        (home / "output" / train.RUNS / "mine" / name).unlink()
    assert (run()[1] == 1).all()  # it was done: there is nothing to draw


def test_a_file_that_does_not_say_its_variant_is_trained_as_base_and_that_is_said(
    home: Path, pony_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = (pony_folder / "base").glob("*.safetensors")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        "diffusion_models",
        ([str(home / "models")], {".safetensors"}),
    )
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    (home / "models").mkdir()
    with safe_open(source, "pt") as file:
        header = {name: value for name, value in file.metadata().items() if name != "variant"}
    save_file(load_file(source), home / "models" / "mine.safetensors", header)
    shown = []
    monkeypatch.setattr(train, "show", shown.append)
    run(base="mine.safetensors")
    assert train.GUESSED in shown[-1]
    run()
    assert train.GUESSED not in shown[-1]


def test_the_negative_prompt_is_that_of_the_models_preset() -> None:
    for preset in (PONY, MAGIHUMAN):
        assert train.negative_prompt("base", preset.transformers["base"]) == preset.negative_prompt
    other = replace(PONY.transformers["base"], num_layers=7)
    assert train.negative_prompt("base", other) == MAGIHUMAN.negative_prompt


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folder": "none"}, "folder: 'none' is not in"),
        ({"folder": "../clips"}, "folder: '../clips' is not in"),
        ({"name": "../mine"}, "name: the LoRA needs a name"),
        ({"name": " "}, "name: the LoRA needs a name"),
        ({"vae": "pony: turbo"}, "holds the video decoder; give the file of the part wanted here: video vae"),
        ({"base": "pony: 540p_sr"}, "is the variant 540p_sr; a LoRA is trained on base or distill"),
        ({"base": "no.safetensors"}, "the transformer 'no.safetensors' is not in"),
        ({"seconds": 2.0}, "0.mp4 is too short"),
        ({"blocks": "40"}, "blocks name layer 40"),
        (
            {"video": False, "audio": False, "text": False, "shared": False},
            "copies of a LoRA must be some of",
        ),
        ({"resident": 99}, "layers to keep on the device must be from 0 to 6, got 99"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(home: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(**changed)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (home / "loras").exists() or not list((home / "loras").iterdir())


def test_files_are_checked_before_anything_runs(home: Path) -> None:  # noqa: ARG001
    chosen = {name: SETTINGS[name] for name in ("folder", "base", "text_encoder", "vae", "audio_vae")}
    assert HappyHorseTrainLora.validate_inputs(**chosen) is True
    assert "is not in" in HappyHorseTrainLora.validate_inputs(**chosen | {"folder": "other"})
    assert "'x.gguf' is not in" in HappyHorseTrainLora.validate_inputs(**chosen | {"text_encoder": "x.gguf"})


@pytest.mark.usefixtures("home")
def test_an_update_is_made_of_as_many_batches_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, batch = [], ClipData.batch
    monkeypatch.setattr(ClipData, "batch", lambda data, index: asked.append(index) or batch(data, index))
    run(name="more", accumulation=2)
    assert sorted(set(asked)) == list(range(2 * SETTINGS["steps"]))


def test_linked_widgets_do_not_train_it_again() -> None:
    linked = SETTINGS | dict.fromkeys(("folder", "base", "vae"))
    assert HappyHorseTrainLora.fingerprint_inputs(**linked) == HappyHorseTrainLora.fingerprint_inputs(
        **linked
    )


def test_the_fingerprint_changes_with_the_clips(home: Path) -> None:
    before = HappyHorseTrainLora.fingerprint_inputs(**SETTINGS)
    assert HappyHorseTrainLora.fingerprint_inputs(**SETTINGS) == before
    (home / "input" / "clips" / "0.txt").write_text("another caption .", encoding="utf-8")
    assert HappyHorseTrainLora.fingerprint_inputs(**SETTINGS) != before


def graph(**changed: Any) -> Prompt:
    """Train, and make a film at once with the result."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "model": node("HappyHorseLoadModel", model="pony: distill", weight_dtype="default", variant="auto"),
        "train": node("HappyHorseTrainLora", **SETTINGS | {"model": ["model", 0]} | changed),
        "clip": node("HappyHorseLoadTextEncoder", text_encoder="pony", weight_dtype="default", device="cpu"),
        "text": node("HappyHorseTextEncode", clip=["clip", 0], prompt="a red circle bounces slow ."),
        "empty": node("HappyHorseEmptyLatent", aspect="custom", width=32, height=32, seconds=0.36,
                      batch_size=1),
        "sampler": node("HappyHorseSampler", model=["train", 0], positive=["text", 0], latent=["empty", 0],
                        seed=1, steps=2, denoise=1.0),
        "keep": node("HappyHorseSaveLatent", latent=["sampler", 0], filename_prefix="latents/trained"),
        "loss": node("SaveImage", images=["train", 1], filename_prefix="loss"),
    }  # fmt: skip


def test_on_a_server_a_run_is_interrupted_and_another_makes_a_film(client: Client) -> None:
    base = client.server.base
    shutil.rmtree(base / "input" / "clips", ignore_errors=True)
    write_clips(base / "input" / "clips")
    prompt = client.post(graph(name="long", steps=2000))
    for event in client.events(time.monotonic() + 90):  # which raises TimeoutError
        if not isinstance(event, bytes) and event["type"] == "progress" and event["data"]["max"] == 2000:
            break  # a step is done
    client.interrupt()
    assert client.follow(prompt).of("execution_interrupted")[0]["node_id"] == "train"
    assert (base / "output" / train.RUNS / "long" / "checkpoint.pt").exists()
    assert not (base / "models" / "loras" / "long.safetensors").exists()
    done = client.run(graph(name="short"))
    assert (base / "models" / "loras" / "short.safetensors").exists()
    assert {file.suffix for file in done.files} >= {".png"} and done.outputs["train"]["images"]
