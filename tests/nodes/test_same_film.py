"""One seed, one film: `happyhorse generate` and the graph that `--save-workflow` writes."""

import json
import math
import shutil
from pathlib import Path

import av
import host
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from happyhorse import cli
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.convert import convert, suffix_of
from happyhorse.model.stream_writer import write_tensors
from happyhorse.model.video_vae import normalize_latents
from happyhorse.pony import pony_folder

SETTINGS = {
    "text": [],
    "image": ["--image", "image.png"],
    "sound held": ["--audio", "sound.wav"],
    "sound as a start": ["--audio", "sound.wav", "--audio-mode", "start", "--audio-encoding", "sample"],
    "image and sound": ["--image", "image.png", "--audio", "sound.wav", "--decoder", "wan"],
    "base with guidance": ["--variant", "base", "--steps", "4", "--negative", "a grey square ."],
    "540p from an image": ["--sr", "540p", "--image", "image.png"],
    "1080p": ["--sr", "1080p"],
}
RESIZED = ["--upscale", "192x128:bilinear"]
COMMAND = ["generate", "--preset", "pony", "--prompt", "a red circle bounces slow .", "--seconds", "0.6"]


def write_inputs(folder: Path) -> None:
    """A picture that is not of the film's aspect, and a sound of another rate, a little too long."""
    rows, columns = np.mgrid[0:90, 0:160]
    picture = np.stack((rows * 2, columns, (rows + columns) % 256), axis=2).astype(np.uint8)
    Image.fromarray(picture).save(folder / "image.png")
    with av.open(str(folder / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=48000, layout="stereo")
        time = np.arange(48000) / 48000
        tone = (20000 * np.sin(2 * np.pi * np.outer((220, 331), time))).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone.T.reshape(1, -1).copy(), "s16", "stereo")
        frame.rate = 48000
        file.mux([*stream.encode(frame), *stream.encode()])


def read_film(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (F, Y, X, 3) and sound (2, N) of a file."""
    with av.open(str(path)) as file:
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    with av.open(str(path)) as file:
        return pictures, np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])  # on a CPU the default is float32
@pytest.mark.parametrize("setting", SETTINGS)
def test_graph_and_command_line_make_one_film(
    client: host.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, dtype: str | None
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = ["--dtype", dtype] if dtype else []
    check_one_film(client, [*SETTINGS[setting], *asked])


# part -> the format it is converted to
QUANTIZED = {
    "fp8": {"distill": "fp8"},
    "GGUF": {"distill": "q8_0", "text_encoder": "q4_0"},
    "a text encoder in fp8": {"text_encoder": "fp8"},
}
OPTIONS = {"distill": ("--model", "diffusion_models"), "text_encoder": ("--text-encoder", "text_encoders")}
LAYERS = ("block.layers.0.attention.linear_qkv", "block.layers.2.mlp.down_proj")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("formats", QUANTIZED)
def test_quantised_weights_and_loras_make_one_film(
    client: host.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: str, dtype: str
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    models, asked = client.server.base / "models", ["--dtype", dtype]
    for part, to in QUANTIZED[formats].items():
        option, folder = OPTIONS[part]
        path = models / folder / f"{part}-{to}{suffix_of(to)}"
        path.parent.mkdir(exist_ok=True)
        convert(open_checkpoint(pony_folder() / part), path, to, "test")
        asked += [option, str(path)]
    if "distill" in QUANTIZED[formats]:
        asked += ["--lora", f"{write_lora(models / 'loras')}:0.7:audio=0.5,blocks=0-2"]
    check_one_film(client, asked)


def write_lora(folder: Path) -> Path:
    """A LoRA that changes the film a good deal."""
    folder.mkdir(exist_ok=True)
    shapes, generator = open_checkpoint(pony_folder() / "distill"), torch.Generator().manual_seed(4)
    tensors = {}
    for name in LAYERS:
        rows, columns = shapes.shape(f"{name}.weight")
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 8
    write_tensors(folder / "same.safetensors", tensors)
    return folder / "same.safetensors"


def check_one_film(client: host.Client, asked: list[str]) -> None:
    """Make a film in the current folder by the command line and by the graph it saves, and compare them."""
    outputs = ["--out", "film.mp4", "--save-latents", "film.safetensors", "--save-workflow", "film.json"]
    assert cli.main([*COMMAND, *asked, *outputs, "--device", "cpu"]) == 0
    for name in ("image.png", "sound.wav"):
        client.put(Path(name))

    prompt = json.loads(Path("film.json").read_text(encoding="utf-8"))
    decode = next(node for node in prompt.values() if node["class_type"] == "HappyHorseDecodeVideo")
    inputs = {"latent": decode["inputs"]["latent"], "filename_prefix": "same"}
    prompt["keep"] = {"class_type": "HappyHorseSaveLatent", "inputs": inputs}
    run = client.run(prompt)
    files = {file.suffix: file for file in run.files}

    want, found = load_file("film.safetensors"), load_file(files[".safetensors"])
    video, audio = normalize_latents(found["video"]), found["audio"].transpose(1, 2)
    assert (video - want["video"]).abs().max() < 1e-4
    assert (audio - want["audio"]).abs().max() < 1e-4
    shutil.copy(files[".mp4"], "graph.mp4")
    (pictures, sound), (other_pictures, other_sound) = (
        read_film(Path("film.mp4")),
        read_film(Path("graph.mp4")),
    )
    assert pictures.shape == other_pictures.shape
    assert psnr(pictures, other_pictures) >= 50
    assert sound.shape == other_sound.shape
    assert np.abs(sound - other_sound).max() < 1e-3


def test_a_film_to_be_resized_is_resized_in_the_graph(
    client: host.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*COMMAND, *RESIZED, "--out", "film.mp4", "--save-workflow", "film.json"]) == 0
    (made,) = client.run(json.loads(Path("film.json").read_text(encoding="utf-8"))).files
    # the host writes these frames itself, with settings of its own
    assert read_film(made)[0].shape == read_film(Path("film.mp4"))[0].shape == (13, 128, 192, 3)
