"""Whole films from the command line, with the miniature: every kind of input, every size, every placement."""

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from golden_files import GoldenFile, golden_files, recorded_transformer, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

from happyhorse import cli
from happyhorse.media import frames_to_uint8, prepare_image, read_audio, read_film_metadata, read_image
from happyhorse.model.audio_vae import ENCODE_RATE
from happyhorse.model.checkpoint import load, open_checkpoint, storage_dtype
from happyhorse.model.config import PONY, VARIANTS, TransformerConfig
from happyhorse.model.convert import convert
from happyhorse.model.geometry import FILM_RATE, SIZE_STEP, FilmShape
from happyhorse.model.packing import Latents
from happyhorse.model.prompt import TextStates
from happyhorse.sampler import pipeline
from happyhorse.sampler.schedule import SHIFT

AAC_FRAME = 1024 / FILM_RATE


class Film:
    """A film made by the command line, and what is in its file."""

    def __init__(self, pony: Path, folder: Path, *options: str, name: str = "film") -> None:
        self.path, latents = folder / f"{name}.mp4", folder / f"{name}.safetensors"
        arguments = [
            "generate",
            "--preset",
            "pony",
            "--models",
            str(pony),
            "--prompt",
            "a red circle bounces slow .",
        ]
        outputs = ["--device", "cpu", "--out", str(self.path), "--save-latents", str(latents)]
        assert cli.main([*arguments, *outputs, *options]) == 0
        self.latents = Latents(**load_file(latents))
        self.settings = json.loads(read_film_metadata(self.path)["comment"])
        with av.open(str(self.path)) as file:
            self.frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            video, audio = file.streams.video[0], file.streams.audio[0]
            self.rate, self.sound_rate = video.average_rate, audio.rate
            self.seconds, self.sound_seconds = (float(s.duration * s.time_base) for s in (video, audio))

    def check(self, width: int, height: int, frames: int) -> None:
        """The file has this picture, at 25 frames a second, and sound as long as it."""
        assert len(self.frames) == frames
        assert self.frames[0].shape == (height, width, 3)
        assert (self.rate, self.sound_rate) == (25, FILM_RATE)
        assert math.isclose(self.seconds, frames / 25)
        assert abs(self.sound_seconds - self.seconds) <= AAC_FRAME
        assert self.frames[0].std() > 1, "an even picture would mean that nothing was made"


@pytest.fixture(scope="module")
def plain(pony_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Film:
    """One second from a prompt alone."""
    return Film(pony_folder, tmp_path_factory.mktemp("plain"), "--seconds", "1")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "first.png"
    rows, columns = np.mgrid[0:150, 0:200]
    pixels = np.stack((rows, columns, (rows + columns) // 2), axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def tone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second and a half of two different tones, stereo, at 48 kHz."""
    path = tmp_path_factory.mktemp("tone") / "tone.wav"
    time = np.arange(72000) / 48000
    stereo = np.stack((np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 660 * time)))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray((stereo * 8000).astype(np.int16).T.reshape(1, -1), "s16", "stereo")
        frame.rate = 48000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def test_a_prompt_makes_a_film_with_sound_and_its_settings(plain: Film, pony_folder: Path) -> None:
    plain.check(96, 96, 25)
    assert plain.latents.video.shape == (1, 48, 7, 6, 6)
    assert plain.latents.audio.shape == (1, 26, 64)
    settings = plain.settings
    assert settings["prompt"] == "a red circle bounces slow ."
    assert (settings["seed"], settings["variant"], settings["steps"]) == (42, "distill", 8)
    assert settings["note"] == open_checkpoint(pony_folder / "distill").file.metadata["note"]
    assert "negative" not in settings, "without guidance nothing may claim that a negative prompt was used"


def test_the_same_seed_makes_the_same_film_bit_for_bit_and_another_does_not(
    plain: Film, pony_folder: Path, tmp_path: Path
) -> None:
    again = Film(pony_folder, tmp_path, "--seconds", "1")
    assert again.path.read_bytes() == plain.path.read_bytes()
    other = Film(pony_folder, tmp_path, "--seconds", "1", "--seed", "43", name="other")
    assert not torch.equal(other.latents.video, plain.latents.video)


@pytest.mark.parametrize("offload", ["none", "stage", "blocks"])
def test_every_offload_makes_the_same_film_bit_for_bit(
    plain: Film, pony_folder: Path, tmp_path: Path, offload: str
) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "1", "--offload", offload)
    assert film.path.read_bytes() == plain.path.read_bytes()


def test_an_image_is_the_first_frame(pony_folder: Path, tmp_path: Path, image: Path) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "1", "--image", str(image), "--decoder", "wan")
    film.check(96, 96, 25)
    vae = load(open_checkpoint(pony_folder / "wan22_vae.safetensors"), torch.float32)
    latent = vae.encode(prepare_image(read_image(image), 96, 96).unsqueeze(2))
    assert torch.equal(film.latents.video[:, :, :1], latent)
    # the Wan2.2 decoder is causal: the first picture is that of the encoded image alone
    want = frames_to_uint8(vae.decode(latent))[0]
    assert torch.equal(frames_to_uint8(vae.decode(film.latents.video))[0], want)
    blocks = [np.asarray(p, float).reshape(12, 8, 12, 8, 3).mean((1, 3)) for p in (film.frames[0], want)]
    error = np.mean(
        (blocks[0] - blocks[1]) ** 2
    )  # of blocks: noise loses its fine grain in the film's compression
    assert 10 * math.log10(255**2 / error) > 28


def test_held_audio_stays_clean_and_the_film_carries_the_users_sound(
    plain: Film, pony_folder: Path, tmp_path: Path, tone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "1", "--audio", str(tone))
    film.check(96, 96, 25)
    assert "tone.wav is longer than the film (1.00 s): the rest is left out" in capsys.readouterr().err
    vae = load(open_checkpoint(pony_folder / "audio_vae"), torch.float32)
    mono = read_audio(tone, ENCODE_RATE, 1)[:, : 26 * 2048]
    assert torch.equal(film.latents.audio, vae.encode(mono.expand(1, 2, -1)))
    assert not torch.equal(film.latents.video, plain.latents.video), "the picture must follow the sound"
    got, want = (read_audio(path, FILM_RATE, 2)[:, 2000:40000] for path in (film.path, tone))
    for channel in range(2):  # stereo is kept: each side has its own tone
        assert torch.corrcoef(torch.stack((got[channel], want[channel])))[0, 1] > 0.99


def test_sound_as_long_as_the_picture_is_not_called_short() -> None:
    shape, told = FilmShape.from_seconds(96, 96, 2), []
    for seconds in (shape.seconds, shape.seconds - 0.2):
        sound = torch.zeros(1, round(seconds * ENCODE_RATE))
        pipeline.driving_audio(sound, shape, "s.wav", told.append)
    assert told == ["s.wav ends 0.20 s before the film does: the end is silent"]


def test_another_size_than_the_pony_was_trained_at_is_mentioned(
    pony_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for size, told in (("96x96", False), ("64x32", True)):
        caplog.clear()
        Film(pony_folder, tmp_path, "--size", size, "--seconds", "0.2", "--steps", "1")
        assert ("trained at 96x96 only" in caplog.text) == told


def test_words_that_the_pony_never_learnt_are_named(
    pony_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = ("--size", "64x32", "--seconds", "0.2", "--steps", "1")
    Film(pony_folder, tmp_path, *small, "--prompt", 'A red dragon says "hi there", a dragon with fire.')
    assert "the pony never learnt the words dragon, says, fire;" in caplog.text


def test_audio_shorter_than_the_film_is_padded_with_silence(
    pony_folder: Path, tmp_path: Path, tone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "2", "--audio", str(tone))
    film.check(96, 96, 49)
    assert "the end is silent" in capsys.readouterr().err
    sound = read_audio(film.path, FILM_RATE, 2)
    assert sound[:, :FILM_RATE].std() > 0.1
    assert sound[:, int(1.6 * FILM_RATE) :].abs().max() < 0.01


def test_audio_without_seconds_sets_the_length_of_the_film(
    pony_folder: Path, tmp_path: Path, tone: Path
) -> None:
    Film(pony_folder, tmp_path, "--audio", str(tone)).check(96, 96, 37)  # 1.5 s: A = 38, T = 10


def test_audio_as_a_start_is_sampled_anew(pony_folder: Path, tmp_path: Path, tone: Path) -> None:
    options = ("--seconds", "1", "--audio", str(tone))
    held = Film(pony_folder, tmp_path, *options)
    start = Film(pony_folder, tmp_path, *options, "--audio-mode", "start", name="start")
    start.check(96, 96, 25)
    assert not torch.equal(start.latents.audio, held.latents.audio)


def test_a_sampled_audio_encoding_follows_the_seed(pony_folder: Path, tmp_path: Path, tone: Path) -> None:
    options = ("--seconds", "1", "--audio", str(tone), "--audio-encoding", "sample")
    first = Film(pony_folder, tmp_path, *options)
    again = Film(pony_folder, tmp_path, *options, name="again")
    other = Film(pony_folder, tmp_path, *options, "--seed", "7", name="other")
    assert torch.equal(first.latents.audio, again.latents.audio)
    assert not torch.equal(first.latents.audio, other.latents.audio)


def test_image_and_audio_together(pony_folder: Path, tmp_path: Path, image: Path, tone: Path) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "1", "--image", str(image), "--audio", str(tone))
    film.check(96, 96, 25)
    alone = Film(pony_folder, tmp_path, "--seconds", "1", "--image", str(image), name="alone")
    assert torch.equal(film.latents.video[:, :, 0], alone.latents.video[:, :, 0])
    assert not torch.equal(film.latents.video[:, :, 1:], alone.latents.video[:, :, 1:])


def test_the_base_variant_uses_guidance(pony_folder: Path, tmp_path: Path) -> None:
    options = ("--seconds", "1", "--variant", "base", "--steps", "6")
    film = Film(pony_folder, tmp_path, *options)
    film.check(96, 96, 25)
    assert film.settings["negative"] == PONY.negative_prompt
    other = Film(pony_folder, tmp_path, *options, "--negative", "a blue square .", name="other")
    assert not torch.equal(other.latents.video, film.latents.video)


@pytest.mark.parametrize(("sr", "side"), [("540p", 192), ("1080p", 288)])
def test_super_resolution_enlarges_the_film_and_keeps_its_sound(
    plain: Film, pony_folder: Path, tmp_path: Path, image: Path, sr: str, side: int
) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "1", "--sr", sr)
    film.check(side, side, 25)
    assert torch.equal(film.latents.audio, plain.latents.audio)
    config = PONY.transformers[f"{sr}_sr"]
    assert bool(config.local_attn_layers) == (sr == "1080p")
    assert config.frame_receptive_field < film.latents.video.shape[2] - 1, (
        "the window must be smaller than the film"
    )
    with_image = Film(
        pony_folder, tmp_path, "--seconds", "1", "--sr", sr, "--image", str(image), name="image"
    )
    vae = load(open_checkpoint(pony_folder / "wan22_vae.safetensors"), torch.float32)
    latent = vae.encode(prepare_image(read_image(image), side, side).unsqueeze(2))
    assert torch.equal(with_image.latents.video[:, :, :1], latent)


@pytest.mark.parametrize("aspect", PONY.sizes)
def test_each_aspect_has_its_size(pony_folder: Path, tmp_path: Path, aspect: str) -> None:
    Film(pony_folder, tmp_path, "--seconds", "0.2", "--aspect", aspect).check(*PONY.sizes[aspect], 5)


def test_a_film_of_ten_seconds(pony_folder: Path, tmp_path: Path) -> None:
    Film(pony_folder, tmp_path, "--seconds", "10").check(96, 96, 249)


def test_plain_upscaling_changes_the_frames_only(plain: Film, pony_folder: Path, tmp_path: Path) -> None:
    film = Film(pony_folder, tmp_path, "--seconds", "1", "--upscale", "192x160:nearest")
    film.check(192, 160, 25)
    assert torch.equal(film.latents.video, plain.latents.video)


def test_a_long_prompt_is_cut_with_a_notice(
    pony_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a red circle bounces slow . " * 150 + "zebra"
    Film(pony_folder, tmp_path, "--seconds", "0.2", "--prompt", prompt)
    notice = next(line for line in capsys.readouterr().err.splitlines() if "640 are used" in line)
    assert notice.endswith("zebra'")


def runs_from_text() -> list[GoldenFile | None]:
    """The recorded runs that can be asked for by options: from text alone, with the published shift."""
    others = {"image", "audio_len", "sr_size"}
    fit = [f for f in golden_files("e2e") if not others & set(f.config) and f.config["shift"] == SHIFT]
    return fit or [None]


@pytest.mark.parametrize("golden", runs_from_text(), ids=str)
def test_golden_run_through_the_command_line(
    golden: GoldenFile | None, pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded run from text: its weights as a file, its random draws and its text states put in."""
    assert golden, f"the golden set must have a run from text alone with shift {SHIFT}, and has none"
    meta, tensors = golden.config, golden.tensors()
    variant = "distill" if meta["cfg_number"] == 1 else "base"
    model = write_recorded_transformer(golden, tmp_path / variant)
    draws = iter([tensors[f"draw.{name}"] for name in meta["draw_order"]])
    lengths = {"text": meta["text_len"], "text_null": meta["text_null_len"]}
    states = (TextStates(tensors[f"in.{name}"][:, :length], length, "") for name, length in lengths.items())

    class RecordedNoise:
        def __init__(self, seed: int) -> None:
            assert seed == meta["seed"]

        def initial(self, like: Latents) -> Latents:
            audio = next(draws)
            return self.shaped(Latents(next(draws), audio), like)

        def step(self, like: Latents) -> Latents:
            return self.shaped(Latents(next(draws), next(draws)), like)

        def shaped(self, noise: Latents, like: Latents) -> Latents:
            assert [t.shape for t in noise] == [t.shape for t in like]
            return noise

    monkeypatch.setattr(pipeline, "FilmNoise", RecordedNoise)
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *_, **__: next(states))
    width, height = (side // SIZE_STEP * SIZE_STEP for side in meta["base_size"])
    film = Film(
        pony_folder, tmp_path, "--model", str(model), "--variant", variant, "--dtype", "float32",
        "--size", f"{width}x{height}",
        "--seconds", str(meta["seconds"]), "--seed", str(meta["seed"]), "--steps", str(meta["steps"]),
    )  # fmt: skip
    for stream in Latents._fields:
        assert relative_error(getattr(film.latents, stream), tensors[f"out.{stream}"]) < 1e-4
    assert next(draws, None) is None


def write_recorded_transformer(golden: GoldenFile, folder: Path) -> Path:
    """The transformer of a recorded run, written as one of our checkpoints."""
    values, recorded = recorded_transformer(golden, "base")
    state = {
        name: tensor.to(storage_dtype("transformer", name, torch.bfloat16))
        for name, tensor in recorded.items()
    }
    config = TransformerConfig.from_dict(values)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"config": json.dumps(config.to_dict())})
    return folder


def test_the_miniature_has_all_variants(pony_folder: Path) -> None:
    for variant in VARIANTS:
        assert open_checkpoint(pony_folder / variant).variant == variant


# LoRAs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes the heads of video and audio."""
    path, generator = tmp_path_factory.mktemp("lora") / "heads.safetensors", torch.Generator().manual_seed(1)
    width, tensors = PONY.transformers["distill"].hidden_size, {}
    for name, channels in (("video", 192), ("audio", 64)):
        for half, shape in (("A", (2, width)), ("B", (channels, 2))):
            factor = torch.randn(shape, generator=generator) / width**0.5
            tensors[f"transformer.final_linear_{name}.lora_{half}.weight"] = factor
    save_file(tensors, path)
    return path


def test_a_lora_changes_the_film_as_strongly_as_asked(
    pony_folder: Path, tmp_path: Path, plain: Film, lora: Path
) -> None:
    changed = Film(pony_folder, tmp_path, "--seconds", "1", "--lora", f"{lora}:0.5")
    assert relative_error(changed.latents.video, plain.latents.video) > 1e-2
    assert changed.settings["lora"] == ["heads.safetensors:0.5"]
    for strength in ("0", "1:video=0,audio=0"):
        none = Film(pony_folder, tmp_path, "--seconds", "1", "--lora", f"{lora}:{strength}", name="none")
        assert all(map(torch.equal, none.latents, plain.latents))
    stacked = Film(
        pony_folder, tmp_path, "--seconds", "1", "--lora", f"{lora}:0.2", "--lora", f"{lora}:0.3", name="two"
    )
    assert relative_error(stacked.latents.video, changed.latents.video) < 1e-5


def test_a_quantised_film_streams_without_changing_a_bit(
    pony_folder: Path, tmp_path: Path, lora: Path
) -> None:
    model = tmp_path / "distill.gguf"
    convert(open_checkpoint(pony_folder / "distill"), model, "q5_0", "test")
    options = ["--seconds", "1", "--model", str(model), "--lora", str(lora)]
    films = [
        Film(pony_folder, tmp_path, *options, "--offload", offload, name=offload)
        for offload in ("none", "stage", "blocks")
    ]
    assert films[0].settings["model"] == "distill.gguf"
    for film in films[1:]:
        assert all(map(torch.equal, film.latents, films[0].latents))
