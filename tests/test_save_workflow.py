"""The settings of a film, written as a prompt for ComfyUI."""

import json
import wave
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from happyhorse import cli, pony
from happyhorse.model.config import PONY
from happyhorse.model.lora import transformer_shapes

Inputs = dict[str, Any]
LORA_LOADER = "HappyHorseLoraLoader"


class Workflow:
    """What `generate --save-workflow` writes for some options."""

    def __init__(self, path: Path) -> None:
        self.nodes = json.loads(path.read_text(encoding="utf-8"))

    def all(self, kind: str) -> list[Inputs]:
        """The inputs of every node of a class."""
        return [node["inputs"] for node in self.nodes.values() if node["class_type"] == kind]

    def one(self, kind: str) -> Inputs:
        (inputs,) = self.all(kind)
        return inputs

    def at(self, link: list[Any]) -> tuple[str, Inputs]:
        """The class and the inputs of the node that a link comes from."""
        node = self.nodes[link[0]]
        return node["class_type"], node["inputs"]


@pytest.fixture
def cached_pony(pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in pony is that of all tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "happyhorse" / f"pony-{pony.version()}"
    home.parent.mkdir(parents=True)
    home.symlink_to(pony_folder, target_is_directory=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (160, 96), "teal").save(tmp_path / "first frame.png")
    return tmp_path / "first frame.png"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        file.writeframes(b"\0\1" * 44100)
    return tmp_path / "voice.wav"


def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Workflow:
    """The workflow of these options; the film itself is left out."""

    def stop(*_: object) -> NoReturn:
        raise ValueError("no film in this test")

    monkeypatch.setattr(cli, "generate", stop)
    file = tmp_path / "film.json"
    given = [
        "--prompt",
        "a red circle .",
        "--out",
        str(tmp_path / "circle.mp4"),
        "--save-workflow",
        str(file),
    ]
    assert cli.main(["generate", "--preset", "pony", "--device", "cpu", *given, *options]) == 2
    return Workflow(file)


@pytest.mark.usefixtures("cached_pony")
def test_the_film_is_made_besides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, film = tmp_path / "film.json", tmp_path / "film.mp4"
    with caplog.at_level("INFO", "happyhorse"):
        outputs = ["--save-workflow", str(file), "--out", str(film), "--seconds", "0.2"]
        assert cli.main(["generate", "--preset", "pony", "--prompt", "a red circle .", *outputs]) == 0
    assert film.exists() and Workflow(file).one("HappyHorseDecodeVideo")
    assert str(file) in caplog.text


@pytest.mark.usefixtures("cached_pony")
def test_what_the_graph_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    with caplog.at_level("INFO", "happyhorse"):
        saved(tmp_path, monkeypatch)
        assert "not in it" not in caplog.text and "transparency" not in caplog.text
        monkeypatch.setattr(cli, "attention_backend", lambda *_: None)
        saved(
            tmp_path, monkeypatch, "--attention", "sage", "--compile", "--offload", "pieces",
            "--image", str(tmp_path / "clear.png"),
        )  # fmt: skip
    assert "; not in it: --attention sage, --compile, --offload pieces;" in caplog.text
    assert "ComfyUI drops the transparency of clear.png" in caplog.text
    assert "otherwise" not in caplog.text and "by itself" not in caplog.text
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    with caplog.at_level("INFO", "happyhorse"):
        saved(tmp_path, monkeypatch, "--image", str(tmp_path / "photo.jpg"), "--upscale", "192x192:bicubic")
    assert "ComfyUI decodes photo.jpg a little otherwise" in caplog.text
    assert "ComfyUI resizes and encodes by itself" in caplog.text


@pytest.mark.usefixtures("cached_pony")
def test_no_graph_is_written_for_an_image_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, file = tmp_path / "a.png", tmp_path / "film.json"
    image.write_bytes(b"no image")
    given = ["--prompt", "x", "--image", str(image), "--save-workflow", str(file)]
    assert cli.main(["generate", "--preset", "pony", *given, "--out", str(tmp_path / "a.mp4")]) == 2
    assert "a.png is not a readable image" in capsys.readouterr().err and not file.exists()


@pytest.mark.usefixtures("cached_pony")
def test_loras_are_loaded_in_turn_with_their_strengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "loras" / "mine").mkdir(parents=True)
    name = "block.layers.2.mlp.down_proj"
    rows, columns = transformer_shapes(PONY.transformers["distill"])[f"{name}.weight"]
    tensors = {f"{name}.lora_A.weight": torch.ones(1, columns), f"{name}.lora_B.weight": torch.ones(rows, 1)}
    for number in "12":
        save_file(tensors, tmp_path / "loras" / "mine" / f"{number}.safetensors")
    loras = [str(tmp_path / "loras" / "mine" / f"{number}.safetensors:0.{number}") for number in "12"]
    with caplog.at_level("INFO", "happyhorse"):
        flow = saved(tmp_path, monkeypatch, "--lora", loras[0], "--lora", loras[1])
    assert "mine/1.safetensors in models/loras" in caplog.text
    kind, last = flow.at(flow.one("HappyHorseSampler")["model"])
    assert (kind, last["lora_name"], last["strength"]) == ("HappyHorseLoraLoader", "mine/2.safetensors", 0.2)
    kind, first = flow.at(last["model"])
    assert (kind, first["lora_name"], first["strength"]) == (
        "HappyHorseLoraLoader",
        "mine/1.safetensors",
        0.1,
    )
    assert flow.at(first["model"])[0] == "HappyHorseLoadModel"


@pytest.mark.usefixtures("cached_pony")
def test_a_film_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = saved(tmp_path, monkeypatch, "--seconds", "1.4", "--seed", "7", "--size", "160x96")
    assert flow.one("HappyHorseLoadModel") == {
        "model": "pony: distill", "weight_dtype": "default", "variant": "auto",
    }  # fmt: skip
    assert flow.one("HappyHorseLoadTextEncoder")["text_encoder"] == "pony"
    assert flow.one("HappyHorseLoadVideoVAE")["vae"] == "pony: turbo"
    assert flow.one("HappyHorseLoadAudioVAE") == {"audio_vae": "pony"}
    assert flow.one("HappyHorseEmptyLatent") == {
        "aspect": "custom", "width": 160, "height": 96, "seconds": 1.4, "batch_size": 1,
    }  # fmt: skip
    sampler = flow.one("HappyHorseSampler")
    assert (sampler["seed"], sampler["steps"], sampler["denoise"]) == (7, 0, 1.0)
    assert "negative" not in sampler
    assert flow.at(sampler["positive"])[1]["prompt"] == "a red circle ."
    saver = flow.one("SaveVideo")
    assert saver["filename_prefix"] == "circle" and flow.at(saver["video"])[0] == "HappyHorseDecodeVideo"


@pytest.mark.usefixtures("cached_pony")
def test_every_link_goes_to_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    flow = saved(tmp_path, monkeypatch, "--image", str(image), "--sr", "540p", "--variant", "base")
    links = [
        value for node in flow.nodes.values() for value in node["inputs"].values() if isinstance(value, list)
    ]
    assert links and all(key in flow.nodes and isinstance(slot, int) for key, slot in links)
    assert len({json.dumps(node, sort_keys=True) for node in flow.nodes.values()}) == len(flow.nodes)


@pytest.mark.usefixtures("cached_pony")
def test_guidance_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = saved(
        tmp_path,
        monkeypatch,
        "--variant",
        "base",
        "--negative",
        "blurred .",
        "--steps",
        "3",
        "--dtype",
        "float32",
    )
    sampler = flow.one("HappyHorseSampler")
    assert sampler["steps"] == 3 and flow.at(sampler["negative"])[1]["prompt"] == "blurred ."
    assert flow.one("HappyHorseLoadModel")["model"] == "pony: base"
    for kind in ("HappyHorseLoadModel", "HappyHorseLoadTextEncoder", "HappyHorseLoadVideoVAE"):
        assert flow.one(kind)["weight_dtype"] == "float32"


@pytest.mark.usefixtures("cached_pony")
def test_an_image_a_sound_and_super_resolution(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: Path,
    sound: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "happyhorse"):
        flow = saved(
            tmp_path, monkeypatch, "--image", str(image), "--audio", str(sound), "--sr", "1080p",
            "--seed", "9", "--decoder", "wan", "--audio-encoding", "sample",
        )  # fmt: skip
    assert (
        "first frame.png in its folder input" in caplog.text
        and "voice.wav in its folder input" in caplog.text
    )
    assert flow.one("LoadImage")["image"] == "first frame.png"
    assert flow.one("LoadAudio")["audio"] == "voice.wav"
    assert flow.one("HappyHorseLoadVideoVAE")["vae"] == "pony"  # one for encoding and decoding
    audio = flow.one("HappyHorseAudioToFilm")
    assert (audio["mode"], audio["encoding"], audio["seed"]) == ("hold", "sampled", 9)
    assert flow.one("HappyHorseEmptyLatent")["seconds"] == 1.0
    kind, frame = flow.at(audio["latent"])
    assert kind == "HappyHorseImageToFilm" and flow.at(frame["latent"])[0] == "HappyHorseEmptyLatent"
    large = flow.one("HappyHorseSuperResolution")
    assert flow.at(large["model"])[1]["model"] == "pony: 1080p_sr"
    assert (large["size"], large["width"], large["height"], large["seed"]) == ("custom", 288, 288, 9)
    assert flow.at(large["image"])[0] == "LoadImage" and large["vae"] == frame["vae"]
    sound_link = flow.one("HappyHorseDecodeVideo")["audio"]
    assert flow.at(sound_link)[0] == "HappyHorseAudioToFilm" and sound_link[1] == 1


@pytest.mark.usefixtures("cached_pony")
def test_a_started_sound_is_not_put_into_the_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: Path
) -> None:
    flow = saved(tmp_path, monkeypatch, "--audio", str(sound), "--audio-mode", "start")
    assert flow.one("HappyHorseAudioToFilm")["mode"] == "start"
    assert "audio" not in flow.one("HappyHorseDecodeVideo")


@pytest.mark.usefixtures("cached_pony")
def test_plain_resizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = saved(tmp_path, monkeypatch, "--upscale", "320x192:nearest")
    kind, video = flow.at(flow.one("SaveVideo")["video"])
    assert kind == "CreateVideo" and flow.at(video["audio"])[0] == "HappyHorseDecode"
    assert (video["audio"][1], video["fps"][1]) == (1, 2)
    kind, scaled = flow.at(video["images"])
    assert kind == "ImageScale" and (scaled["width"], scaled["height"]) == (320, 192)
    assert scaled["upscale_method"] == "nearest-exact"


def test_files_are_called_as_in_the_folders_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pony_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "ComfyUI" / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    (folder / "magihuman").symlink_to(pony_folder, target_is_directory=True)
    with caplog.at_level("INFO", "happyhorse"):
        flow = saved(
            tmp_path, monkeypatch, "--models", str(pony_folder),
            "--model", str(folder / "magihuman" / "base"), "--variant", "base",
        )  # fmt: skip
    model = flow.one("HappyHorseLoadModel")
    assert (model["model"], model["variant"]) == ("magihuman/base", "base")
    assert flow.one("HappyHorseLoadTextEncoder")["text_encoder"] == "text_encoder"
    assert "magihuman/base in its folders of models" in caplog.text


@pytest.mark.usefixtures("cached_pony")
@pytest.mark.parametrize(
    "name, why", [("film.txt", "must end in .json"), ("none/film.json", "does not exist")]
)
def test_a_file_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    outputs = ["--out", str(tmp_path / "a.mp4"), "--save-workflow", str(tmp_path / name)]
    assert cli.main(["generate", "--preset", "pony", "--prompt", "a .", *outputs]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()
