"""Folders of clips: captions, reading, and the cache of latents and text states."""

import contextlib
import json
import os
import unicodedata
import weakref
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from happyhorse.media import FilmWriter, prepare_image
from happyhorse.model.audio_vae import ENCODE_RATE, encode_driving_audio
from happyhorse.model.geometry import FILM_RATE, FilmShape
from happyhorse.model.prompt import encode_prompt
from happyhorse.model.run_block import RunBlock
from happyhorse.sampler.parts import open_part
from happyhorse.training.clip_reader import _frames, check_clip, read_clip
from happyhorse.training.clips import (
    ClipData,
    Encoders,
    file_identity,
    find_clips,
    prepare_clips,
)

SHAPE = FilmShape(64, 32, 9)  # 9 pictures
CPU = torch.device("cpu")
NEGATIVE = "blurry"


def write_clip(
    path: Path, seconds: float = 0.6, size: tuple[int, int] = (64, 32), seed: int = 0, sound: bool = True,
    sound_seconds: float | None = None,
) -> Path:  # fmt: skip
    """A clip whose whole picture has one grey after the other, and a tone that begins at 0.2 s."""
    frames = round(25 * seconds)
    greys = (torch.arange(frames) * 15 + 10 * seed) % 256
    pixels = greys[:, None, None, None].expand(frames, size[1], size[0], 3).to(torch.uint8)
    times = torch.arange(round((sound_seconds or seconds) * FILM_RATE)) / FILM_RATE
    tone = 0.5 * torch.sin(2 * torch.pi * 880 * times) * (times >= 0.2)
    with FilmWriter(path, *size, sound=sound) as film:
        if sound:
            film.add_audio(tone.expand(2, -1))
        film.add_frames(pixels)
    return path


def write_folder(folder: Path, captions: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, (name, caption) in enumerate(captions.items()):
        write_clip(folder / f"{name}.mp4", seed=seed)
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoders(pony_folder: Path) -> Encoders:
    parts = {
        "text_encoder": pony_folder / "text_encoder",
        "video_vae": pony_folder / "wan22_vae.safetensors",
        "audio_vae": pony_folder / "audio_vae",
    }
    checkpoints = {role: open_part(role, path) for role, path in parts.items()}
    return Encoders.of(checkpoints, CPU, torch.float32)


def prepared(
    folder: Path, encoders: Encoders, **settings: int
) -> tuple[ClipData, list[tuple[str, int, int]]]:
    told = []
    data = prepare_clips(
        folder, folder / "cache", SHAPE, encoders, NEGATIVE, CPU, lambda *step: told.append(step), **settings
    )
    return data, told


def test_captions_come_from_text_files_or_from_a_list(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "a.txt").write_text(" a red circle\n", encoding="utf-8")
    lines = [json.dumps({"file": f"{name}.mp4", "caption": f"clip {name}"}) for name in ("c", "b")]
    (tmp_path / "captions.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    found = [(clip.path.name, clip.caption) for clip in find_clips(tmp_path)]
    assert found == [("a.mp4", "a red circle"), ("b.mp4", "clip b"), ("c.mp4", "clip c")]


def test_captions_find_their_clips_however_their_accents_and_line_ends_are_stored(tmp_path: Path) -> None:
    stored, typed = (unicodedata.normalize(form, "café.mp4") for form in ("NFD", "NFC"))
    assert stored != typed
    (tmp_path / stored).touch()
    (tmp_path / f"._{stored}").write_bytes(b"\xff")  # left by macOS
    caption = "one\u2028two\x85three"
    text = json.dumps({"file": typed, "caption": caption}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text(f"{text}\r\n", encoding="utf-8")
    assert [(clip.path.name, clip.caption) for clip in find_clips(tmp_path)] == [(stored, caption)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no clips"),
        ({"a.mp4": ""}, r"a\.mp4 has no caption; write it into a\.txt"),
        ({"a.mp4": "", "a.txt": " \n"}, r"the caption of .*a\.mp4 in a\.txt is empty"),
        (
            {"a.mp4": "", "a.txt": "x", "captions.jsonl": '{"file": "a.mp4", "caption": "y"}'},
            r"a\.mp4 has two captions",
        ),
        ({"a.mp4": "", "captions.jsonl": '{"file": "b.mp4", "caption": "y"}'}, "line 1: there is no clip 'b"),
        ({"a.mp4": "", "captions.jsonl": '\n{"file": "a.mp4"}'}, "line 2: expected"),
        ({"a.mp4": "", "captions.jsonl": '{"file": "a.mp4", "caption": 3}'}, "must be text"),
        ({"a.mp4": "", "captions.jsonl": "no json"}, "line 1: expected"),
        ({"a.mp4": "", "captions.jsonl": '{"file": "a.mp4", "caption": "y"}\n' * 2}, "line 2: .* already"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_captions_is_said_with_its_place(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        find_clips(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, encoders: Encoders) -> None:
    names = [*"abcdefg"]
    for name in names:
        (tmp_path / f"{name}.mp4").touch()
    with pytest.raises(
        ValueError, match=r"a\.mp4 has no caption.*; .*b\.mp4 has.*e\.mp4 has.*; and 2 more are like"
    ):
        find_clips(tmp_path)
    folder = write_folder(tmp_path / "clips", dict.fromkeys("abc", "a red circle"))
    write_clip(folder / "b.mp4", sound=False)
    (folder / "c.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"b\.mp4 has no sound stream.*; .*c\.mp4 cannot be read"):
        prepared(folder, encoders)
    assert not list((folder / "cache").iterdir())


def test_the_file_tells_of_a_clip_that_is_far_too_short(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", seconds=0.6)
    check_clip(clip, SHAPE)
    check_clip(clip, FilmShape(64, 32, 21))  # 0.84 s: a file may err so far
    with pytest.raises(ValueError, match=r"a\.mp4 is too short: it lasts 0\.60 s, and 1\.96 s are needed"):
        check_clip(clip, FilmShape(64, 32, 49))


def test_captions_of_no_clip_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.mp4").touch()
    for name in ("a.txt", "b.txt", "c.txt", "._a.txt"):
        (tmp_path / name).write_text("a red circle", encoding="utf-8")
    assert [clip.path.name for clip in find_clips(tmp_path)] == ["a.mp4"]
    assert "2 texts in" in caplog.text and "belong to no clip, the first is b.txt; only .mp4" in caplog.text


def test_a_caption_in_another_encoding_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"a\.txt is not text in UTF-8"):
        find_clips(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_clips(tmp_path / "none")


def test_clips_that_are_enlarged_much_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for size in ((64, 32), (44, 22), (128, 256)):
        read_clip(write_clip(tmp_path / "a.mp4", size=size), SHAPE)
    assert not caplog.records
    for name, size in (("b", (64, 16)), ("c", (32, 64))):
        read_clip(write_clip(tmp_path / f"{name}.mp4", size=size), SHAPE)
    wanted = ("b.mp4 is 64 x 16 and is enlarged 2.0 times", "c.mp4 is 32 x 64 and is enlarged 2.0 times")
    assert [text in told for text, told in zip(wanted, caplog.messages, strict=True)] == [True, True]


def write_pixels(path: Path, pixels: torch.Tensor, **settings: Any) -> Path:
    """A silent film of one picture (H, W, 3), with settings of its stream or codec."""
    height, width, _ = pixels.shape
    with av.open(str(path), "w") as container:
        stream, sound = container.add_stream("libx264rgb", 25), container.add_stream("aac", 48000)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.numpy(), "rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 24000), np.float32), "fltp", "stereo")
        silence.rate = 48000
        container.mux([*stream.encode(), *sound.encode(silence), *sound.encode()])
    return path


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.zeros(32, 64, 3, dtype=torch.uint8)
    pixels[:, 16:48] = 255  # all that is seen of a picture of 128 x 32
    clip = write_pixels(tmp_path / "a.mp4", pixels, sample_aspect_ratio=Fraction(2))
    frames, _ = read_clip(clip, SHAPE)
    assert frames[..., 2:-2].min() > 0.9
    assert read_clip(write_pixels(tmp_path / "b.mp4", pixels), SHAPE)[0].min() < -0.9
    assert not caplog.records


@pytest.mark.parametrize("transfer", [16, 18])
def test_clips_in_hdr_are_told(transfer: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_clip(
        write_pixels(tmp_path / "a.mp4", torch.zeros(32, 64, 3, dtype=torch.uint8), color_trc=transfer), SHAPE
    )
    assert "a.mp4 is HDR, which is learnt as flat, pale colours; give it as SDR" in caplog.text


def test_colours_are_those_of_the_film(tmp_path: Path) -> None:
    wanted = torch.tensor([200, 60, 40], dtype=torch.uint8)
    with FilmWriter(tmp_path / "a.mp4", 64, 32) as film:  # in BT.709
        film.add_audio(torch.zeros(2, FILM_RATE))
        film.add_frames(wanted.expand(25, 32, 64, 3))
    found = (read_clip(tmp_path / "a.mp4", SHAPE)[0].mean((0, 2, 3, 4)) + 1) * 127.5
    assert (found - wanted).abs().max() < 3


def test_a_clip_is_read_picture_by_picture_with_its_sound_in_time(tmp_path: Path) -> None:
    frames, sound = read_clip(write_clip(tmp_path / "a.mp4"), SHAPE)
    assert frames.shape == (1, 3, 9, 32, 64) and sound.shape == (2, 9 * 2048)
    greys = (frames.mean(dim=(0, 1, 3, 4)) + 1) / 2 * 255
    torch.testing.assert_close(greys, torch.arange(9) * 15.0, rtol=0, atol=2)
    assert (frames.std(dim=1) < 0.02).all()
    onset = int((sound[0].abs() > 0.1).nonzero()[0]) / ENCODE_RATE
    assert onset == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(("rate", "size"), [(50, (64, 32)), (10, (128, 96))])
def test_other_rates_and_sizes_are_brought_to_the_shape(
    tmp_path: Path, rate: int, size: tuple[int, int]
) -> None:
    path = tmp_path / "a.mp4"
    count = round(rate * 0.6)
    greys = (torch.arange(count) * (255 // count)).to(torch.uint8)
    with FilmWriter(path, *size, fps=rate) as film:
        film.add_audio(torch.zeros(2, FILM_RATE // 2))
        film.add_frames(greys[:, None, None, None].expand(count, size[1], size[0], 3))
    frames, sound = read_clip(path, SHAPE)
    shown = torch.tensor([int(n / 25 * rate + 0.25 * rate / 25) for n in range(9)])
    found = (frames.mean(dim=(0, 1, 3, 4)) + 1) / 2 * 255
    assert frames.shape == (1, 3, 9, 32, 64) and sound.shape == (2, 9 * 2048)
    torch.testing.assert_close(found, greys[shown].float(), rtol=0, atol=3)


def test_frames_without_times_come_one_after_the_other(tmp_path: Path) -> None:
    def frames(*times: float | None, rate: int | None = 50) -> list[float]:
        decoded = [
            SimpleNamespace(
                time=time, duration=0, rotation=0, width=64, height=32, colorspace=2,
                to_image=partial(Image.new, "RGB", (64, 32), (12 * number,) * 3),
            )
            for number, time in enumerate(times)
        ]  # fmt: skip
        container = SimpleNamespace(decode=lambda _: decoded)
        stream = SimpleNamespace(
            average_rate=rate, sample_aspect_ratio=None, codec_context=SimpleNamespace(color_trc=2)
        )
        found, _ = _frames(container, stream, SHAPE, tmp_path / "a.avi")
        return [(float(frame.mean()) + 1) / 2 * 255 for frame in found]

    stamped = frames(*(number / 50 for number in range(20)))
    assert len(stamped) == 9 and frames(*[None] * 20) == stamped
    assert frames(None, *(number / 50 for number in range(1, 20))) == stamped
    with pytest.raises(ValueError, match=r"a\.avi has pictures without times and no rate"):
        frames(None, rate=None)


@pytest.mark.parametrize(("late", "heard"), [(-5.0, 0), (-0.3, 0.06), (0.1, 0.26), (1e6, 0)])
def test_sound_that_begins_before_or_after_the_picture_keeps_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: float, heard: float
) -> None:
    path = write_clip(tmp_path / "a.mp4")
    reader = "happyhorse.training.clip_reader"
    monkeypatch.setattr(f"{reader}._start", lambda s: late if s.type == "audio" else 0.0)
    monkeypatch.setattr(
        f"{reader}.read_audio",
        lambda _, rate, channels, seconds: torch.ones(channels, int(min(seconds, 0.36) * rate)),
    )
    _, sound = read_clip(path, SHAPE)
    assert sound.shape == (2, 9 * 2048)
    assert float(sound[0].sum()) / ENCODE_RATE == pytest.approx(heard, abs=0.005)


def test_the_time_at_which_the_sound_of_a_file_begins_is_read(tmp_path: Path) -> None:
    begin = FILM_RATE // 5
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        picture, sound = (
            container.add_stream("mpeg4", rate=25),
            container.add_stream("pcm_s16le", rate=FILM_RATE),
        )
        picture.width, picture.height, picture.pix_fmt = 64, 32, "yuv420p"
        for number in range(15):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(picture.encode(frame))
        loud = np.full((1, 2 * FILM_RATE // 2), 2**14, np.int16)
        frame = av.AudioFrame.from_ndarray(loud, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = FILM_RATE, begin, Fraction(1, FILM_RATE)
        container.mux([*sound.encode(frame), *picture.encode(None), *sound.encode(None)])
    _, sound = read_clip(tmp_path / "a.mov", SHAPE)
    onset = int((sound[0] > 0.1).nonzero()[0])
    assert onset / ENCODE_RATE == pytest.approx(0.2, abs=0.005)


def test_a_clip_is_cropped_as_the_image_of_a_film_is(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((128, 96))
    with FilmWriter(tmp_path / "a.mp4", 128, 96) as film:
        film.add_audio(torch.zeros(2, FILM_RATE // 2))
        film.add_frames(torch.from_numpy(np.array(coarse)).expand(15, 96, 128, 3).contiguous())
    frames, _ = read_clip(tmp_path / "a.mp4", SHAPE)
    error = frames[:, :, 0] - prepare_image(coarse, SHAPE.width, SHAPE.height)
    assert error.square().mean().sqrt() < 0.06


def test_unusable_clips_are_refused_by_name(tmp_path: Path) -> None:
    short = write_clip(tmp_path / "short.mp4", seconds=0.2)
    with pytest.raises(
        ValueError, match=r"short\.mp4 is too short: it lasts 0\.20 s, and 0\.36 s are needed"
    ):
        read_clip(short, SHAPE)
    silent = write_clip(tmp_path / "silent.mp4", sound=False)
    with pytest.raises(ValueError, match=r"silent\.mp4 has no sound stream"):
        read_clip(silent, SHAPE)
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"noise\.mp4 cannot be read"):
        read_clip(noise, SHAPE)
    blind = tmp_path / "blind.mp4"
    with av.open(str(blind), "w") as container:
        stream = container.add_stream("aac", rate=FILM_RATE)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = FILM_RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(ValueError, match=r"blind\.mp4 has no picture"):
        read_clip(blind, SHAPE)


def test_batches_are_what_the_networks_make_of_the_clips(tmp_path: Path, encoders: Encoders) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a red circle"})
    data, _ = prepared(folder, encoders)
    frames, sound = read_clip(folder / "a.mp4", SHAPE)
    batch = data.batch(0)
    with torch.no_grad(), encoders.use("video_vae") as (vae, _):
        torch.testing.assert_close(batch.clean.video, vae.encode(frames))
    with torch.no_grad(), encoders.use("audio_vae") as (vae, _):
        torch.testing.assert_close(batch.clean.audio, encode_driving_audio(vae, sound))
    with torch.no_grad(), encoders.use("text_encoder") as (encoder, _):
        for text, found in (("a red circle", batch.text), (NEGATIVE, data.negative)):
            assert torch.equal(found, encode_prompt(encoder, encoders.tokenizer, text).states)


def test_only_what_is_new_is_encoded(tmp_path: Path, encoders: Encoders) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a red circle", "b": "a blue square"})
    first, told = prepared(folder, encoders)
    assert ("clips", 2, 2) in told and told[-1] == ("captions", 3, 3)
    again, told = prepared(folder, encoders)
    assert told == [] and again.fingerprint == first.fingerprint
    (folder / "a.txt").write_text("a red circle bounces", encoding="utf-8")
    write_clip(folder / "b.mp4", seed=5)
    changed, told = prepared(folder, encoders)
    assert told == [("clips", 0, 1), ("clips", 1, 1), ("captions", 0, 1), ("captions", 1, 1)]
    assert changed.fingerprint != first.fingerprint
    assert changed.latents[0] == first.latents[0] and changed.texts[1] == first.texts[1]


def test_other_networks_have_other_files_in_the_cache(tmp_path: Path, encoders: Encoders) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a red circle"})
    first, _ = prepared(folder, encoders)
    other = Encoders(encoders.use, encoders.tokenizer, {**encoders.names, "video_vae": "another"})
    second, _ = prepared(folder, other)
    assert first.latents != second.latents and first.texts == second.texts


def test_the_fingerprint_changes_with_the_negative_prompt(tmp_path: Path, encoders: Encoders) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a red circle"})
    first, other = (
        prepare_clips(folder, folder / "cache", SHAPE, encoders, negative, CPU, lambda *_: None)
        for negative in (NEGATIVE, "noise")
    )
    assert first.texts == other.texts and first.fingerprint != other.fingerprint


def test_networks_in_another_dtype_have_other_files_in_the_cache(pony_folder: Path) -> None:
    roles = {"text_encoder": "text_encoder", "video_vae": "wan22_vae.safetensors", "audio_vae": "audio_vae"}
    checkpoints = {role: open_part(role, pony_folder / name) for role, name in roles.items()}
    one, other = (Encoders.of(checkpoints, CPU, dtype).names for dtype in (torch.float32, torch.bfloat16))
    # on a CPU the VAEs are float32 always
    assert {role for role in one if one[role] != other[role]} == {"text_encoder"}


def test_a_folder_of_weights_is_told_by_what_is_read_from_it(tmp_path: Path) -> None:
    shard, tokenizer = tmp_path / "model.safetensors", tmp_path / "tokenizer.json"
    shard.write_bytes(b"weights")
    tokenizer.write_text("{}", encoding="utf-8")
    before = file_identity(tmp_path)
    (tmp_path / "README.md").write_text("where it is from", encoding="utf-8")
    (tmp_path / "model.rgthree-info.json").write_text("{}", encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "gone.bin").symlink_to(tmp_path / "nowhere")
    assert file_identity(tmp_path) == before
    alone = file_identity(shard)
    tokenizer.write_text('{"other": 1}', encoding="utf-8")
    assert file_identity(tmp_path) != before and file_identity(shard) != alone
    alone = file_identity(shard)
    (tmp_path / "other.safetensors").touch()
    assert file_identity(shard) == alone


def test_a_copy_of_weights_is_the_same_and_a_change_in_them_is_not(tmp_path: Path) -> None:
    weights = bytearray(torch.randint(256, (2**23,), generator=torch.manual_seed(0)).to(torch.uint8).numpy())
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        if folder == "c":
            weights[2**22 : 2**22 + 2**18] = bytes(2**18)  # a tensor far from the beginning
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
    os.utime(tmp_path / "b" / "model.safetensors", (1, 1))
    one, copy, other = (file_identity(tmp_path / folder) for folder in ("a", "b", "c"))
    assert one == copy != other


def test_a_stop_leaves_only_whole_files_and_the_next_start_goes_on(
    tmp_path: Path, encoders: Encoders
) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a", "b": "b"})
    write_clip(folder / "b.mp4", seconds=0.2)  # too short, which its pictures tell
    with pytest.raises(ValueError, match=r"b\.mp4"):
        prepared(folder, encoders)
    names = sorted(path.name.partition("-")[0] for path in (folder / "cache").iterdir())
    assert names == ["clip"]
    write_clip(folder / "b.mp4", seed=4)
    _, told = prepared(folder, encoders)
    assert told == [("clips", 0, 1), ("clips", 1, 1), *(("captions", done, 3) for done in range(4))]


def test_a_clip_whose_sound_ends_early_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, short = (
        write_clip(tmp_path / f"{seconds}.mp4", 1.2, sound_seconds=seconds) for seconds in (1.2, 0.5)
    )
    shape = FilmShape(64, 32, 25)
    read_clip(whole, shape)
    assert not caplog.messages
    _, sound = read_clip(short, shape)
    assert "0.5.mp4 has no sound in the last 0.5 of 1.0 s, where silence is learnt" in caplog.text
    assert sound.shape[1] == shape.audio_latents * ENCODE_RATE // 25 and not sound[:, -20000:].any()


def test_a_damaged_file_of_the_cache_is_named(tmp_path: Path, encoders: Encoders) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a red circle"})
    data, _ = prepared(folder, encoders)
    data.latents[0].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cache.clip-.* cannot be read .*; delete it and run again"):
        data.batch(0)
    data.texts[0].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cache.text-.* cannot be read .*; delete it and run again"):
        prepared(folder, encoders)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, encoders: Encoders) -> None:
    folder = write_folder(tmp_path / "clips", {"a": "a red circle"})
    (folder / "cache").write_bytes(b"kept")
    with pytest.raises(OSError, match=r"cache could not be written .*; free some space or give another"):
        prepared(folder, encoders)
    assert (folder / "cache").read_bytes() == b"kept"


def test_the_networks_are_gone_when_the_data_is_ready(tmp_path: Path, encoders: Encoders) -> None:
    folder, alive = write_folder(tmp_path / "clips", {"a": "a red circle"}), []

    @contextlib.contextmanager
    def use(role: str) -> Iterator[tuple[torch.nn.Module, RunBlock]]:
        with encoders.use(role) as (network, run_block):
            alive.append(weakref.ref(network))
            yield network, run_block

    prepare_clips(
        folder, folder / "cache", SHAPE, Encoders(use, encoders.tokenizer, encoders.names), NEGATIVE, CPU,
        lambda *_: None,
    )  # fmt: skip
    assert len(alive) == 3 and not any(network() for network in alive)


def test_every_epoch_has_each_clip_once_in_batches_of_one_length(tmp_path: Path, encoders: Encoders) -> None:
    captions = {**dict.fromkeys("abc", "a red circle"), "d": "a caption of more words than the others have"}
    data, _ = prepared(write_folder(tmp_path / "clips", captions), encoders, batch_size=2, seed=3)
    assert len(data.latents) == 4
    orders = []
    for epoch in range(6):
        batches = [data.batch(epoch * 3 + i) for i in range(3)]
        films = torch.cat([batch.clean.video.flatten(1) for batch in batches])
        assert len(films) == 4 and len(torch.unique(films, dim=0)) == 4
        assert all(len(batch.clean.audio) == len(batch.text) for batch in batches)
        orders.append(films[:, 0].tolist())
    assert len({tuple(order) for order in orders}) > 1
    again = data.batch(4)
    assert torch.equal(again.clean.video, data.batch(4).clean.video)
