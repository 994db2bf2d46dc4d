"""The nodes that make, fill, keep and read the LATENT of a film: the core's numbers, and what they refuse."""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import InputImpl, Types
from comfy_extras import nodes_audio
from comfy_extras.nodes_lt import LTXVConcatAVLatent
from full_disk import disk_of
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import nodes as stock  # the host's
from happyhorse import cli
from happyhorse.media import prepare_image, read_audio, read_image
from happyhorse.model.audio_vae import encode_driving_audio
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import MAGIHUMAN
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import LATENTS_FORMAT
from happyhorse.model.video_vae import denormalize_latents
from happyhorse.nodes import latent, latent_files
from happyhorse.nodes.audio_vae import load_audio_vae
from happyhorse.nodes.inputs import encode_film, film_frames, fit_frames, picture
from happyhorse.nodes.latent import (
    AS_GIVEN,
    HappyHorseAudioToFilm,
    HappyHorseContinueFilm,
    HappyHorseEmptyLatent,
    HappyHorseFilmToFilm,
    HappyHorseImageToFilm,
    size_of,
)
from happyhorse.nodes.latent_files import HappyHorseLoadLatent, HappyHorseSaveLatent
from happyhorse.nodes.latents import masks, shape_of, start_audio, streams
from happyhorse.nodes.vae import load_video_vae
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.pipeline import driving_audio, film_sound

pytestmark = pytest.mark.host
WIDTH, HEIGHT = 64, 32
SIZE = {"aspect": "custom", "width": WIDTH, "height": HEIGHT}


@pytest.fixture(scope="module", autouse=True)
def as_the_host_runs() -> Iterator[None]:
    """The host executes every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vaes(pony_folder: Path) -> dict[str, Any]:
    return {
        "vae": load_video_vae(pony_folder / "wan22_vae.safetensors"),
        "turbo": load_video_vae(pony_folder / "turbo_vae"),
        "audio_vae": load_audio_vae(pony_folder / "audio_vae"),
    }


@pytest.fixture
def both(vaes: dict[str, Any]) -> dict[str, Any]:
    return {name: vaes[name] for name in ("vae", "audio_vae")}


def core(pony_folder: Path, path: str) -> torch.nn.Module:
    return load(open_checkpoint(pony_folder / path), torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def empty(seconds: float = 0.4, batch_size: int = 1) -> dict[str, Any]:
    return HappyHorseEmptyLatent.execute(**SIZE, seconds=seconds, batch_size=batch_size).result[0]


def tone(seconds: float, rate: int = 44100, channels: int = 2) -> dict[str, Any]:
    time = torch.arange(round(seconds * rate)) / rate
    pitches = torch.tensor([220.0 + 97 * i for i in range(channels)])[:, None]
    return {"waveform": (0.5 * torch.sin(2 * math.pi * pitches * time))[None], "sample_rate": rate}


def write_sound(path: Path, seconds: float, rate: int, channels: int) -> Path:
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    samples = (tone(seconds, rate, channels)["waveform"][0] * 32767).to(torch.int16)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).numpy().copy(), "s16", layout)
        frame.rate = rate
        file.mux([*stream.encode(frame), *stream.encode()])
    return path


def film_of(frames: int, rate: float = 25, audio: dict[str, Any] | None = None) -> Any:
    images = random(frames, HEIGHT, WIDTH, 3)
    parts = Types.VideoComponents(images=images, audio=audio, frame_rate=Fraction(rate))
    return InputImpl.VideoFromComponents(parts)


# Empty


@pytest.mark.parametrize("aspect", [*MAGIHUMAN.sizes, "custom"])
def test_empty_latent_has_the_asked_size_and_length(aspect: str) -> None:
    (latent,) = HappyHorseEmptyLatent.execute(aspect, 96, 64, 5.0, 2).result
    width, height = MAGIHUMAN.sizes.get(aspect, (96, 64))
    assert shape_of(latent) == FilmShape(width, height, 126)
    video, audio = streams(latent)
    assert video.shape == (2, 48, 32, height // 16, width // 16) and audio.shape == (2, 64, 126)
    assert not video.any() and not audio.any() and "noise_mask" not in latent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 0.1}, "seconds must be from 0.2 to 30"),
        ({"seconds": 31.0}, "seconds must be from 0.2 to 30"),
        ({"seconds": 1.01}, r"seconds must be a multiple of 0\.04.* nearest are 1 and 1\.04"),
        ({"width": 100}, "multiples of 32, got 100x32; the nearest is 96x32"),
    ],
)
def test_empty_latent_refuses_other_sizes_and_lengths(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HappyHorseEmptyLatent.execute(**{**SIZE, "seconds": 1.0, "batch_size": 1} | change)


def test_long_films_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    empty(10.0)
    assert not caplog.records
    empty(10.04)
    assert "above 10 s" in caplog.text


# Image


def test_first_frame_is_the_command_lines(vaes: dict[str, Any], pony_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray((random(50, 90, 3) * 255).byte().numpy()).save(file)
    image = torch.from_numpy(np.array(Image.open(file))).float()[None] / 255  # as Load Image does
    (latent,) = HappyHorseImageToFilm.execute(empty(), vaes["vae"], image).result
    pixels = prepare_image(read_image(file), WIDTH, HEIGHT).unsqueeze(2)
    wanted = denormalize_latents(core(pony_folder, "wan22_vae.safetensors").encode(pixels))
    video, _ = streams(latent)
    torch.testing.assert_close(video[:, :, :1], wanted, atol=1e-5, rtol=0)
    assert not video[:, :, 1:].any()
    video_mask, audio_mask = masks(latent)
    assert not video_mask[:, :, 0].any() and video_mask[:, :, 1:].all() and audio_mask.all()


def test_pictures_are_exact_to_the_bit() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(-1, -1, 3)
    assert np.array_equal(np.array(picture(values.float() / 255)), values.numpy())


@pytest.mark.parametrize("batch", [1, 3])
def test_image_and_sound_can_be_given_in_any_order(batch: int, both: dict[str, Any]) -> None:
    image, sound = random(1, 40, 40, 3), tone(0.4)

    def with_sound(latent: dict[str, Any]) -> dict[str, Any]:
        return HappyHorseAudioToFilm.execute(latent, both["audio_vae"], sound, "hold", "mean", 0).result[0]

    def with_image(latent: dict[str, Any]) -> dict[str, Any]:
        return HappyHorseImageToFilm.execute(latent, both["vae"], image).result[0]

    first, second = with_image(with_sound(empty(0.4, batch))), with_sound(with_image(empty(0.4, batch)))
    for a, b in zip((*streams(first), *masks(first)), (*streams(second), *masks(second)), strict=True):
        assert a.shape[0] == batch and torch.equal(a, b)
    video_mask, audio_mask = masks(first)
    assert not audio_mask.any() and not video_mask[:, :, 0].any() and video_mask[:, :, 1:].all()


def test_nodes_leave_their_input_alone(both: dict[str, Any]) -> None:
    latent = empty()
    with_image = HappyHorseImageToFilm.execute(latent, both["vae"], random(1, 40, 40, 3)).result[0]
    before = [tensor.clone() for tensor in (*streams(with_image), *masks(with_image))]
    HappyHorseAudioToFilm.execute(with_image, both["audio_vae"], tone(0.4), "hold", "mean", 0)
    HappyHorseImageToFilm.execute(with_image, both["vae"], random(1, 40, 40, 3, seed=1))
    assert "noise_mask" not in latent and not streams(latent)[0].any()
    after = (*streams(with_image), *masks(with_image))
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 1, 16, 32), (1, 1, 3, 2, 4), (1, 48, 3, 2, 4)])
def test_masks_of_stock_nodes_are_kept_at_latent_size(shape: tuple[int, ...], vaes: dict[str, Any]) -> None:
    video, audio = streams(empty())
    stock_video = {"samples": video, "noise_mask": torch.full(shape, 0.5)}
    joined = LTXVConcatAVLatent.execute(stock_video, {"samples": audio}).result[0]
    video_mask, audio_mask = masks(joined)
    assert video_mask.shape == (1, 1, 3, 2, 4) and (video_mask == 0.5).all()
    assert audio_mask.shape == (1, 1, 11) and audio_mask.all()
    (latent,) = HappyHorseImageToFilm.execute(joined, vaes["vae"], random(1, 40, 40, 3)).result
    video_mask, _ = masks(latent)
    assert not video_mask[:, :, 0].any() and (video_mask[:, :, 1:] == 0.5).all()


def test_more_masks_than_streams_are_refused() -> None:
    latent = empty()
    latent["noise_mask"] = NestedTensor([torch.ones(1, 1, 11)] * 3)
    with pytest.raises(ValueError, match=r"^latent: 3 noise masks for a film of picture and sound"):
        masks(latent)


def test_image_to_film_names_what_is_wrong(vaes: dict[str, Any]) -> None:
    def error(latent: dict[str, Any], vae: Any, image: Tensor) -> str:
        with pytest.raises(ValueError) as info:
            HappyHorseImageToFilm.execute(latent, vae, image)
        return str(info.value)

    image = random(1, 40, 40, 3)
    assert error(empty(), vaes["turbo"], image).startswith("vae: the turbo decoder cannot encode")
    assert error(empty(), vaes["audio_vae"], image).startswith("vae: ")
    assert error(empty(), vaes["vae"], random(2, 40, 40, 3)).startswith("image: one picture is needed, got a")
    for wrong in (
        {"samples": torch.zeros(1, 4, 8, 8)},
        {"samples": torch.zeros(1, 48, 3, 2, 4)},
        {"samples": NestedTensor([torch.zeros(1, 128, 3, 2, 4), torch.zeros(1, 64, 11)])},
        {"samples": NestedTensor([torch.zeros(1, 48, 3, 2, 4), torch.zeros(1, 64, 30)])},
        {"samples": NestedTensor([torch.zeros(1, 48, 3, 3, 4), torch.zeros(1, 64, 11)])},
    ):
        message = error(wrong, vaes["vae"], image)
        assert message.startswith("latent: ") and (";" in message or "multiple of 32" in message)


# Sound


@pytest.mark.parametrize("encoding", ["mean", "sampled"])
@pytest.mark.parametrize(
    ("seconds", "rate", "channels"), [(0.5, 44100, 2), (0.3, 48000, 1), (1.0, 16000, 1), (0.5, 48000, 6)]
)
def test_sound_is_the_command_lines(
    seconds: float, rate: int, channels: int, encoding: str,
    vaes: dict[str, Any], pony_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    file = write_sound(tmp_path / "sound.wav", seconds, rate, channels)
    waveform, found = nodes_audio.load(str(file))
    audio = {"waveform": waveform[None], "sample_rate": found}
    latent = empty(0.48)
    result = HappyHorseAudioToFilm.execute(latent, vaes["audio_vae"], audio, "hold", encoding, 7).result
    made, sound = result

    shape, sampled = shape_of(latent), encoding == "sampled"
    given = driving_audio(read_audio(file, 51200, 1, 31), shape, "sound", lambda _: None)
    generator = FilmNoise(7).audio_encoding() if sampled else None
    wanted = encode_driving_audio(core(pony_folder, "audio_vae"), given, generator=generator)
    torch.testing.assert_close(streams(made)[1], wanted.transpose(1, 2), atol=1e-3, rtol=0)
    assert not masks(made)[1].any() and masks(made)[0].all() and start_audio(made) is None
    assert sound["sample_rate"] == 44100 and sound["waveform"].shape == (1, 2, round(shape.seconds * 44100))
    film = film_sound(read_audio(file, 44100, 2, 31), shape)
    torch.testing.assert_close(sound["waveform"][0], film, atol=1e-3, rtol=0)


def test_sound_as_a_start_is_not_masked(vaes: dict[str, Any]) -> None:
    held = HappyHorseAudioToFilm.execute(empty(), vaes["audio_vae"], tone(1), "hold", "mean", 0).result[0]
    start = HappyHorseAudioToFilm.execute(held, vaes["audio_vae"], tone(1), "start", "mean", 0).result[0]
    assert start_audio(start) is streams(start)[1] and masks(start)[1].all()
    assert torch.equal(streams(start)[1], streams(held)[1])
    again = HappyHorseAudioToFilm.execute(start, vaes["audio_vae"], tone(1), "hold", "mean", 0).result[0]
    assert start_audio(again) is None and not masks(again)[1].any()


def test_sound_that_does_not_fit_is_mentioned(vaes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    for seconds, words in ((0.2, "the end is silent"), (2, "the rest is left out")):
        caplog.clear()
        HappyHorseAudioToFilm.execute(empty(), vaes["audio_vae"], tone(seconds), "hold", "mean", 0)
        assert words in caplog.text


@pytest.mark.parametrize(
    "audio",
    [
        {"waveform": torch.zeros(1, 2, 0), "sample_rate": 44100},
        {"waveform": torch.full((1, 2, 4410), float("nan")), "sample_rate": 44100},
        {"waveform": torch.ones(2, 2, 4410), "sample_rate": 44100},
        {"waveform": torch.zeros(1, 2, 44100), "sample_rate": 44100},
        None,  # what Get Video Components gives for a film without sound
    ],
)
def test_unusable_sound_is_named(audio: Any, vaes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^audio: .*; connect"):
        HappyHorseAudioToFilm.execute(empty(), vaes["audio_vae"], audio, "hold", "mean", 0)


def test_a_picture_vae_in_the_audio_socket_is_named(vaes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^audio_vae: "):
        HappyHorseAudioToFilm.execute(empty(), vaes["vae"], tone(1), "hold", "mean", 0)


# Films


def test_a_film_is_encoded_with_its_sound(both: dict[str, Any], pony_folder: Path) -> None:
    video = film_of(11, audio=tone(0.44))
    (latent,) = HappyHorseFilmToFilm.execute(**both, **SIZE, video=video).result
    assert shape_of(latent) == FilmShape(WIDTH, HEIGHT, 9) and "noise_mask" not in latent
    frames = video.get_components().images[:9].movedim(-1, 0)[None]
    pixels = (frames * 255).round() / 255 * 2 - 1
    wanted = denormalize_latents(core(pony_folder, "wan22_vae.safetensors").encode(pixels))
    torch.testing.assert_close(streams(latent)[0], wanted, atol=1e-5, rtol=0)
    same = HappyHorseFilmToFilm.execute(
        **both, **SIZE, images=video.get_components().images, audio=tone(0.44)
    ).result[0]
    assert all(map(torch.equal, streams(latent), streams(same)))


@pytest.mark.parametrize(("rate", "given"), [(50, 25), (12.5, 7), (Fraction(30000, 1001), 16), (24, 13)])
def test_other_frame_rates_become_25(rate: float, given: int, both: dict[str, Any]) -> None:
    (latent,) = HappyHorseFilmToFilm.execute(**both, **SIZE, video=film_of(given, rate)).result
    frames = round(given / rate * 25)
    assert shape_of(latent).pixel_frames == (frames - 1) // 4 * 4 + 1


@pytest.mark.parametrize(
    ("rate", "wanted"), [(50, [0, 2, 4, 6]), (12.5, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7])]
)
def test_frames_are_taken_by_nearest_time(rate: float, wanted: list[int]) -> None:
    greys = torch.arange(8)[:, None, None, None].expand(8, 2, 2, 3) / 8
    parts = Types.VideoComponents(images=greys, audio=None, frame_rate=Fraction(rate))
    frames, _ = film_frames(InputImpl.VideoFromComponents(parts), None, None)
    assert (frames[:, 0, 0, 0] * 8).long().tolist() == wanted


def test_connected_sound_goes_before_that_of_the_film() -> None:
    video, other = film_of(5, audio=tone(0.2)), tone(0.2, rate=22050)
    assert film_frames(video, None, other)[1] is other
    assert film_frames(video, None, None)[1]["sample_rate"] == 44100


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(9, 16, (448, 256)), (16, 9, (256, 448)), (8, 8, (352, 352)), (3, 4, (384, 288))],
)
def test_as_given_takes_the_trained_size_nearest_to_the_aspect(
    height: int, width: int, size: tuple[int, int]
) -> None:
    assert size_of(AS_GIVEN, 0, 0, torch.zeros(1, height, width, 3)) == size


def test_a_film_without_sound_is_silent(both: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    (latent,) = HappyHorseFilmToFilm.execute(**both, **SIZE, images=random(5, HEIGHT, WIDTH, 3)).result
    assert "no sound" in caplog.text
    silence = {"waveform": torch.zeros(1, 1, 44100), "sample_rate": 44100}
    other = HappyHorseFilmToFilm.execute(
        **both, **SIZE, images=random(5, HEIGHT, WIDTH, 3), audio=silence
    ).result[0]
    assert all(map(torch.equal, streams(latent), streams(other)))


def test_a_film_longer_than_the_longest_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def encode(*given: Any) -> tuple[Tensor, Tensor]:
        taken.append(len(given[2]))
        return torch.zeros(1, 48, 1, 2, 2), torch.zeros(1, 64, 1)

    monkeypatch.setattr(latent, "encode_film", encode)
    HappyHorseFilmToFilm.execute(None, None, **SIZE, images=torch.zeros(1, 1, 1, 3).expand(800, 1, 1, 3))
    assert taken == [749]  # 4n+1, and no more than 30 s


def test_films_are_cropped_and_resized_as_pictures_are() -> None:
    images = random(2, 50, 90, 3)
    wanted = torch.cat([prepare_image(picture(image), WIDTH, HEIGHT) for image in images])
    fitted = fit_frames(images, FilmShape(WIDTH, HEIGHT, 5))
    torch.testing.assert_close(fitted.movedim(-1, 1) * 2 - 1, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("node", [HappyHorseFilmToFilm, HappyHorseContinueFilm])
def test_exactly_one_film_is_taken(node: Any, both: dict[str, Any]) -> None:
    more = {"seconds": 1.0, "overlap": 5} if node is HappyHorseContinueFilm else {}
    with pytest.raises(ValueError, match="exactly one of them is needed, got neither"):
        node.execute(**both, **SIZE, **more)
    with pytest.raises(ValueError, match="exactly one of them is needed, got both"):
        node.execute(**both, **SIZE, **more, video=film_of(9), images=random(9, HEIGHT, WIDTH, 3))
    for name, wrong in (("vae", both["audio_vae"]), ("audio_vae", both["vae"])):
        with pytest.raises(ValueError, match=f"^{name}: "):
            node.execute(**both | {name: wrong}, **SIZE, **more, video=film_of(9))


def test_too_few_frames_are_refused(both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 5 frames are needed, got 4"):
        HappyHorseFilmToFilm.execute(**both, **SIZE, images=random(4, HEIGHT, WIDTH, 3))


@pytest.mark.parametrize("overlap", [1, 5, 9])
def test_the_end_of_a_film_is_held_as_the_start_of_the_next(overlap: int, both: dict[str, Any]) -> None:
    images, sound = random(15, HEIGHT, WIDTH, 3), tone(0.6)
    latent, frames, old, whole = HappyHorseContinueFilm.execute(
        **both, **SIZE, seconds=1.0, overlap=overlap, images=images, audio=sound
    ).result
    assert old is images and torch.equal(whole["waveform"], sound["waveform"])
    assert frames == overlap and shape_of(latent) == FilmShape(WIDTH, HEIGHT, 26)
    first = (15 - overlap) * 44100 // 25
    tail = {"waveform": sound["waveform"][..., first:], "sample_rate": 44100}
    video, audio = encode_film(both["vae"], both["audio_vae"], images[-overlap:], tail, (WIDTH, HEIGHT))
    latent_frames = (overlap - 1) // 4 + 1
    made_video, made_audio = streams(latent)
    assert torch.equal(made_video[:, :, :latent_frames], video)
    assert not made_video[:, :, latent_frames:].any()
    torch.testing.assert_close(made_audio[:, :, :overlap], audio, atol=1e-3, rtol=0)
    assert not made_audio[:, :, overlap:].any()
    video_mask, audio_mask = masks(latent)
    assert not video_mask[:, :, :latent_frames].any() and video_mask[:, :, latent_frames:].all()
    assert not audio_mask[..., :overlap].any() and audio_mask[..., overlap:].all()


@pytest.mark.parametrize("overlap", [4, 13, 29])
def test_an_overlap_that_does_not_fit_is_refused(overlap: int, both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^overlap: .* got {overlap}"):
        HappyHorseContinueFilm.execute(
            **both, **SIZE, seconds=1.0, overlap=overlap, images=random(11, HEIGHT, WIDTH, 3), audio=tone(0.4)
        )


def test_sound_that_ends_before_the_film_continues_as_silence(both: dict[str, Any]) -> None:
    def continued(audio: dict[str, Any]) -> list[Any]:
        images = random(15, HEIGHT, WIDTH, 3)
        return HappyHorseContinueFilm.execute(
            **both, **SIZE, seconds=1.0, overlap=5, images=images, audio=audio
        ).result

    latent, _, _, whole = continued(tone(0.2))
    silent = continued({"waveform": torch.zeros(1, 2, 44100), "sample_rate": 44100})[0]
    assert not masks(latent)[1][..., :5].any()
    assert torch.equal(streams(latent)[1], streams(silent)[1])
    given = tone(0.2)["waveform"]
    assert whole["waveform"].shape[-1] == 44100 * 15 // 25
    assert torch.equal(whole["waveform"][..., : given.shape[-1]], given)
    assert not whole["waveform"][..., given.shape[-1] :].any()


def test_a_film_without_sound_and_of_another_rate_comes_out_fit_to_be_joined(both: dict[str, Any]) -> None:
    film = film_of(18, 30)
    latent, _, images, sound = HappyHorseContinueFilm.execute(
        **both, **SIZE, seconds=1.0, overlap=5, video=film
    ).result
    assert torch.equal(images, film_frames(film, None, None)[0]) and len(images) == 15
    assert sound["waveform"].shape == (1, 2, 44100 * 15 // 25) and not sound["waveform"].any()
    assert masks(latent)[1].all(), "its silence is not held"


@pytest.mark.parametrize("rate", [25, 30])
def test_a_video_without_pictures_is_refused(rate: int, both: dict[str, Any]) -> None:
    for node, more in ((HappyHorseFilmToFilm, {}), (HappyHorseContinueFilm, {"seconds": 1.0, "overlap": 5})):
        with pytest.raises(ValueError, match=r"^video: it holds no pictures"):
            node.execute(**both, **SIZE, **more, video=film_of(0, rate))


# Files


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda at=tmp_path / name: str(at))
    return tmp_path


def saved(latent: dict[str, Any], prefix: str = "latents/film") -> str:
    ui = HappyHorseSaveLatent.execute(latent, prefix).ui
    (shown,) = (ui if isinstance(ui, dict) else ui.as_dict())["latents"]
    return f"{shown['subfolder']}/{shown['filename']} [{shown['type']}]"


def sampled(batch: int = 1) -> dict[str, Any]:
    """As a sampler leaves it: both streams are views of one tensor."""
    packed = torch.randn(batch, 1, 48 * 3 * 2 * 4 + 64 * 11, generator=torch.Generator().manual_seed(0))
    shapes = [(batch, 48, 3, 2, 4), (batch, 64, 11)]
    return {"samples": NestedTensor(comfy.utils.unpack_latents(packed, shapes))}


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_saved_latent_comes_back(batch: int, both: dict[str, Any]) -> None:
    latent = sampled(batch)
    found = HappyHorseLoadLatent.execute(saved(latent)).result[0]
    assert all(map(torch.equal, streams(found), streams(latent))) and "noise_mask" not in found
    (latent,) = HappyHorseImageToFilm.execute(latent, both["vae"], random(1, 40, 40, 3)).result
    latent, _ = HappyHorseAudioToFilm.execute(latent, both["audio_vae"], tone(1), "start", "mean", 0).result
    found = HappyHorseLoadLatent.execute(saved(latent)).result[0]
    assert all(map(torch.equal, (*streams(found), *masks(found)), (*streams(latent), *masks(latent))))
    assert start_audio(found) is streams(found)[1]


def test_saved_files_are_numbered_listed_and_hold_raw_streams(folders: Path) -> None:
    names = [saved(sampled()) for _ in range(2)] + [saved(sampled(), "latents/today/film")]
    assert names[:2] == [f"latents/film_0000{i}_.safetensors [output]" for i in (1, 2)]
    (folders / "input" / "mine.safetensors").write_bytes(
        (folders / "output" / "latents" / "film_00001_.safetensors").read_bytes()
    )
    listed = latent_files.saved_latents()
    assert {*names, "mine.safetensors"} <= set(listed) and len(listed) == 4
    for name in listed:
        assert HappyHorseLoadLatent.validate_inputs(name) is True
        HappyHorseLoadLatent.execute(name)
    tensors = load_file(folders / "output" / "latents" / "film_00001_.safetensors")
    assert tensors["video"].shape == (1, 48, 3, 2, 4) and tensors["audio"].shape == (1, 64, 11)


def test_the_latents_of_the_command_line_are_loaded(folders: Path, pony_folder: Path) -> None:
    kept = folders / "input" / "film.safetensors"
    fixed = ["--preset", "pony", "--models", str(pony_folder), "--prompt", "a red circle .", "--steps", "2"]
    small = ["--device", "cpu", "--seconds", "0.2", "--size", "64x32"]
    outputs = ["--out", str(folders / "film.mp4"), "--save-latents", str(kept)]
    assert cli.main(["generate", *fixed, *small, *outputs]) == 0
    video, audio = streams(HappyHorseLoadLatent.execute("film.safetensors").result[0])
    core = load_file(kept)
    assert torch.equal(video, denormalize_latents(core["video"])) and audio.shape[1] == 64
    assert torch.equal(audio.transpose(1, 2), core["audio"])
    video, audio = core["video"], core["audio"]
    others = (
        {"video": video},
        {"video": video[:, :16], "audio": audio},
        {"video": video, "audio": audio[0, 0]},
    )
    for other in others:
        save_file(
            {name: tensor.contiguous() for name, tensor in other.items()}, kept, {"format": LATENTS_FORMAT}
        )
        with pytest.raises(ValueError, match=r"^latent: film\.safetensors .*; choose"):
            HappyHorseLoadLatent.execute("film.safetensors")


def test_nothing_is_left_of_a_file_that_could_not_be_written(folders: Path) -> None:
    latent = sampled()
    with disk_of(10), pytest.raises(OSError, match="the file could not be written: file too large"):
        saved(latent)
    assert not list((folders / "output" / "latents").iterdir())


@pytest.mark.usefixtures("folders")
def test_saving_refuses_other_latents_and_folders() -> None:
    with pytest.raises(ValueError, match=r"^latent: "):
        saved({"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"^filename_prefix: "):
        saved(sampled(), "../film")
    assert saved(sampled(), "film").startswith("/film_00001_")


def test_loading_a_changed_file_is_noticed(folders: Path) -> None:
    name = saved(sampled())
    assert HappyHorseLoadLatent.fingerprint_inputs(None) == "linked"
    before = HappyHorseLoadLatent.fingerprint_inputs(name)
    file = folders / "output" / name.removesuffix(" [output]")
    save_file({"video": torch.zeros(1)}, file)
    assert HappyHorseLoadLatent.fingerprint_inputs(name) != before


def test_other_files_are_refused(folders: Path) -> None:
    inputs = folders / "input"
    stock.SaveLatent().save({"samples": torch.zeros(1, 4, 8, 8)}, "stock")
    (stock_file,) = (folders / "output").glob("stock*.latent")
    stock_file.rename(inputs / "stock.latent")
    save_file({"weight": torch.zeros(1)}, inputs / "weights.safetensors")
    (inputs / "broken.safetensors").write_bytes(b"not a safetensors file at all")
    (inputs / "empty.safetensors").touch()
    for name in ("stock.latent", "weights.safetensors", "broken.safetensors", "empty.safetensors"):
        with pytest.raises(ValueError, match=rf"^latent: {name} .*; choose"):
            HappyHorseLoadLatent.execute(name)
    assert "there is no file" in HappyHorseLoadLatent.validate_inputs("gone.safetensors")
    assert "there is no file" in HappyHorseLoadLatent.validate_inputs("../../etc/passwd")
