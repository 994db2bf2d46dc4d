"""What `happyhorse generate --save-workflow` writes makes the command line's film on a server."""

import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from host import Client
from PIL import Image

from happyhorse import cli

FILMS = {
    "text": [],
    "image and sound with guidance": [
        "--image",
        "{image}",
        "--audio",
        "{sound}",
        "--variant",
        "base",
        "--steps",
        "3",
    ],
    "sound as a start": ["--audio", "{sound}", "--audio-mode", "start", "--audio-encoding", "sample"],
    "image, 540p, Wan2.2 decoder": ["--image", "{image}", "--sr", "540p", "--decoder", "wan"],
    "1080p": ["--sr", "1080p", "--dtype", "float32"],
    "resized": ["--upscale", "192x128:bilinear"],
}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """An image and a sound of 0.6 s."""
    random = np.random.default_rng(0)
    image, sound = tmp_path / "frame.png", tmp_path / "voice.wav"
    Image.fromarray(random.integers(0, 256, (96, 128, 3), np.uint8)).resize((256, 192)).save(image)
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(44100)
        time = np.arange(26460) / 44100
        file.writeframes((8000 * np.sin(2 * np.pi * 220 * time)).astype(np.int16).tobytes())
    return {"image": image, "sound": sound}


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a film (F, Y, X, 3), and its sound (2, N)."""
    with av.open(str(path)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    with av.open(str(path)) as film:
        sound = [frame.to_ndarray() for frame in film.decode(audio=0)]
    return np.stack(frames).astype(np.float32), np.concatenate(sound, axis=1)


@pytest.mark.parametrize("film", FILMS)
def test_the_saved_workflow_makes_the_same_film(
    client: Client, tmp_path: Path, inputs: dict[str, Path], film: str
) -> None:
    for file in inputs.values():
        client.upload(file)
    options = [option.format(**inputs) for option in FILMS[film]]
    outputs = ["--out", str(tmp_path / "film.mp4"), "--save-workflow", str(tmp_path / "film.json")]
    asked = [
        "--prompt",
        "a red circle bounces slow .",
        "--seconds",
        "0.52",
        "--seed",
        "5",
        "--size",
        "128x96",
    ]
    assert cli.main(["generate", "--preset", "pony", "--device", "cpu", *asked, *outputs, *options]) == 0
    (made,) = client.run(json.loads((tmp_path / "film.json").read_text(encoding="utf-8"))).files
    pictures, sound = decoded(tmp_path / "film.mp4")
    graph_pictures, graph_sound = decoded(made)
    assert graph_pictures.shape == pictures.shape and graph_sound.shape == sound.shape
    psnr = -10 * np.log10(max(np.mean((graph_pictures - pictures) ** 2) / 255**2, 1e-10))
    difference = np.abs(graph_sound - sound).max()
    print("RESULT", film, psnr, difference)
    if film != "resized":  # the host writes that file itself, with settings of its own
        assert psnr >= 50 and difference <= 1e-3
