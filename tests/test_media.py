"""Images, sound and films, written by the tests themselves and read again."""

import contextlib
import json
import math
import os
import struct
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from golden_files import GoldenFile, golden_files, relative_error
from PIL import Image
from torch import Tensor

from happyhorse import media
from happyhorse.training.data.clip import make_clip
from happyhorse.training.data.world import held_out

RATE = media.FILM_RATE


# Images


@pytest.mark.parametrize("file", golden_files("image_prep"), ids=str)
def test_golden_image_prep(file: GoldenFile) -> None:
    tensors = file.tensors()
    for k, (width, height, target_width, target_height) in enumerate(file.config["cases"]):
        image = Image.fromarray(tensors[f"case{k}.image"].numpy())
        assert image.size == (width, height)
        cropped = torch.from_numpy(np.array(media.crop_to_aspect(image, target_width, target_height)))
        assert torch.equal(cropped, tensors[f"case{k}.cropped"])
        prepared = media.prepare_image(image, target_width, target_height)
        assert relative_error(prepared, tensors[f"case{k}.tensor"]) < 1e-5
    frames = media.frames_to_uint8(tensors["frames.decoded"])
    assert torch.equal(frames, tensors["frames.uint8"])
    for name in (name for name in tensors if name.startswith("frames.upsampled_")):
        mode, want = name.removeprefix("frames.upsampled_"), tensors[name]
        assert torch.equal(media.upscale_frames(frames, want.shape[2], want.shape[1], mode), want)


def test_an_image_of_the_target_size_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    prepared = media.prepare_image(Image.fromarray(pixels), 64, 32)
    restored = ((prepared[0] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(restored, torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_sliver_of_an_image_can_still_be_cropped() -> None:
    assert media.prepare_image(Image.new("RGB", (1, 500)), 96, 64).shape == (1, 3, 64, 96)


def test_an_image_is_turned_as_its_orientation_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert media.read_image(tmp_path / "turned.jpg").size == (20, 40)


def test_transparent_parts_are_white_in_every_kind_of_image(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    clear.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    for name in ("rgba.png", "palette.png", "palette.gif"):
        image = media.read_image(tmp_path / name)
        assert image.mode == "RGB"
        assert (image.getpixel((0, 0)), image.getpixel((3, 3))) == ((0, 0, 255), (255, 255, 255))


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 128 * 257], [1000, 65535]], dtype=np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        got = np.array(media.read_image(tmp_path / name))
        assert got[..., 0].tolist() == [[0, 128], [3, 255]]


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    assert_refused(media.read_image, tmp_path / "a.tif", "holds floating-point values.*; export it as PNG")


@pytest.mark.parametrize(
    ("mode", "suffix", "plain"),
    [
        ("RGB", "png", True),
        ("RGBA", "png", True),
        ("P", "png", True),
        ("L", "png", False),
        ("LA", "png", False),
        ("I;16", "png", False),
        ("RGB", "jpg", False),
        ("RGB", "webp", False),
    ],
)
def test_a_plain_png_is_told_from_other_images(tmp_path: Path, mode: str, suffix: str, plain: bool) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / f"a.{suffix}")
    assert media.is_plain_png(tmp_path / f"a.{suffix}") == plain


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path)
    assert media.read_image(path).size == (64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(media.read_image, path, "is not a readable image")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    contents = {"text.png": b"hello", "noise.jpg": bytes(range(256)) * 40, "drawing.svg": b"<svg/>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(media.read_image, tmp_path / name, "none of PNG, JPEG, WEBP")


def read_mono(path: Path) -> Tensor:
    return media.read_audio(path, 16000, 1)


@pytest.mark.parametrize("read", [media.read_image, media.read_film_metadata, read_mono])
def test_missing_and_empty_files_are_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read(tmp_path / "absent.png")
    assert_refused(read, tmp_path, "is not a file")
    (tmp_path / "empty.wav").touch()
    assert_refused(read, tmp_path / "empty.wav", "is empty")


def assert_refused(read: Callable[[Path], object], path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


# Sound


def write_wav(path: Path, waveform: Tensor, rate: int) -> Path:
    """A 16 bit file of [channels, N]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(waveform))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((waveform.T * 32767).round().to(torch.int16).numpy().tobytes())
    return path


def write_sound(path: Path, codec: str, waveform: Tensor, rate: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(waveform)]
        frame = av.AudioFrame.from_ndarray(waveform.numpy(), format="fltp", layout=layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tone(seconds: float, rate: int, *gains: float) -> Tensor:
    t = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return (torch.tensor(gains)[:, None] * torch.sin(2 * math.pi * 440 * t)).float()


@pytest.mark.parametrize("rate", [8000, 44100, 51200, 96000])
def test_sound_of_any_rate_is_read_at_the_wanted_one(tmp_path: Path, rate: int) -> None:
    path = write_wav(tmp_path / "tone.wav", tone(1.0, rate, 0.5, 0.25), rate)
    got = media.read_audio(path, 51200, 2)
    assert got.dtype == torch.float32 and abs(got.shape[1] - 51200) <= 2
    inner = slice(2000, 49000)  # the ends of a resampled tone ring
    want = tone(1.0, 51200, 0.5, 0.25)
    torch.testing.assert_close(got[:, inner], want[:, inner], rtol=0, atol=2e-3)


def test_mono_is_doubled_and_stereo_averaged(tmp_path: Path) -> None:
    mono = write_wav(tmp_path / "mono.wav", tone(0.5, 44100, 0.5), 44100)
    stereo = write_wav(tmp_path / "stereo.wav", tone(0.5, 44100, 0.75, 0.25), 44100)
    for path, channels in ((mono, 2), (mono, 1), (stereo, 1)):
        want = tone(0.5, 44100, 0.5).expand(channels, -1)
        torch.testing.assert_close(media.read_audio(path, 44100, channels), want, rtol=0, atol=1e-4)


def test_surround_sound_is_brought_into_range(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "surround.flac", "flac", tone(0.5, 48000, *[0.9] * 6), 48000)
    got = media.read_audio(path, 48000, 2)
    assert got.shape == (2, 24000) and 0.5 < got.abs().max() <= 1


@pytest.mark.parametrize("channels", range(1, 9))
def test_sound_of_many_channels_is_mixed(channels: int) -> None:
    waveform = tone(0.5, 44100, *[0.1] * channels)
    got = media.resample_sound(waveform, 44100, 44100, 2)
    assert got.shape == (2, 22050) and 0.05 < got.abs().max() <= 1
    if channels <= 2:
        assert torch.equal(got, waveform.expand(2, -1))


def test_the_length_of_a_raw_aac_file_is_not_taken_from_its_bit_rate(tmp_path: Path) -> None:
    noise = torch.rand(2, 48000 * 3, generator=torch.manual_seed(0)) - 0.5
    waveform = torch.cat([torch.zeros(2, 48000), noise], dim=1)  # whose silence has few bits
    path = write_sound(tmp_path / "voice.aac", "aac", waveform, 48000)
    assert abs(media.read_audio(path, 48000, 2).shape[1] - 4 * 48000) < 4096


def test_reading_can_stop_early(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "long.wav", tone(3.0, 16000, 0.5), 16000)
    assert media.read_audio(path, 16000, 1, seconds=0.5).shape == (1, 8000)
    assert media.read_audio(path, 16000, 1, seconds=9).shape == (1, 48000)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.mkv", "aac"), ("a.wav", "pcm_s16le")],
)
def test_sound_that_ends_early_is_refused(tmp_path: Path, name: str, codec: str) -> None:
    path = write_sound(tmp_path / name, codec, tone(3.0, 48000, 0.3, 0.2), 48000)
    assert abs(media.read_audio(path, 48000, 2).shape[1] - 3 * 48000) < 2048
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(read_mono, path, "is damaged|is cut off")


def test_a_wav_file_written_as_a_stream_is_read(tmp_path: Path) -> None:
    """Programs that write into a pipe leave the largest number in place of the sizes."""
    path = write_wav(tmp_path / "piped.wav", tone(1.0, 16000, 0.5), 16000)
    content = bytearray(path.read_bytes())
    unknown = struct.pack("<I", 0xFFFFFFFF)
    content[4:8] = unknown
    at = content.index(b"data") + 4
    content[at : at + 4] = unknown
    path.write_bytes(content)
    assert media.read_audio(path, 16000, 1).shape == (1, 16000)


def test_sound_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    assert_refused(read_mono, write_wav(tmp_path / "none.wav", torch.zeros(1, 0), 16000), "empty|damaged")
    (tmp_path / "text.mp3").write_text("no sound at all\n" * 99)
    assert_refused(read_mono, tmp_path / "text.mp3", "is damaged, or no sound or film")
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    assert_refused(read_mono, tmp_path / "image.png", "has no sound track")
    not_a_number = write_sound(tmp_path / "nan.wav", "pcm_f32le", torch.full((1, 1600), math.nan), 16000)
    assert_refused(read_mono, not_a_number, "not finite numbers")
    with pytest.raises(ValueError, match="channels must be 1 or 2, got 3"):
        media.read_audio(not_a_number, 16000, 3)


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_wav(Path("take:1.wav"), tone(0.5, 16000, 0.5), 16000)
    assert media.read_audio("take:1.wav", 16000, 1).shape == (1, 8000)


# Films

PATCHES = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0]]
PATCHES += [[0, 0, 255], [200, 120, 60], [17, 99, 180], [128, 128, 128]]


def coloured_frames(count: int) -> Tensor:
    """Frames [F, 64, 128, 3] of eight flat patches of 32 x 32."""
    grid = torch.tensor(PATCHES, dtype=torch.uint8).reshape(2, 4, 3)
    return grid.repeat_interleave(32, 0).repeat_interleave(32, 1).expand(count, -1, -1, -1)


def moving_frames(count: int) -> Tensor:
    noise = torch.randint(0, 256, (64, 128, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.stack([noise.roll(3 * i, dims=1) for i in range(count)])


def noisy_frames(count: int) -> Tensor:
    """Frames that no codec can make small: about six kilobytes each."""
    shape = (count, 64, 128, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def write_film(path: Path, frames: Tensor, waveform: Tensor, metadata: dict[str, str] | None = None) -> Path:
    with media.FilmWriter(path, frames.shape[2], frames.shape[1], metadata=metadata) as film:
        film.add_audio(waveform)
        film.add_frames(frames)
    return path


def test_a_film_holds_its_frames_sound_and_metadata(tmp_path: Path) -> None:
    metadata = {"comment": json.dumps({"prompt": 'a "red" dog: 犬\n', "seed": 7}), "workflow": "{}"}
    waveform = tone(49 / 25, RATE, 0.5, 0.25)
    path = write_film(tmp_path / "film.mp4", coloured_frames(49), waveform, metadata)
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]
    assert metadata.items() <= media.read_film_metadata(path).items()
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (video.frames, video.average_rate, video.start_time) == (49, 25, 0)
        assert (audio.codec_context.name, audio.rate, audio.codec_context.channels) == ("aac", RATE, 2)
        assert float(video.duration * video.time_base) == pytest.approx(49 / 25)
        assert abs(float(audio.duration * audio.time_base) - 49 / 25) <= media.AAC_FRAME / RATE
        context = video.codec_context
        assert context.colorspace == context.color_primaries == context.color_trc == media.BT709
        assert context.color_range == 1  # 16 to 235
    sound = media.read_audio(path, RATE, 2)
    assert 0 <= sound.shape[1] - waveform.shape[1] <= media.AAC_FRAME
    inner = slice(4000, 80000)  # the sudden start of a tone is hard to compress
    assert relative_error(sound[:, inner], waveform[:, inner]) < 0.02


def test_colours_survive_in_video_range_bt709(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", coloured_frames(5), torch.zeros(2, 8820))
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).to_ndarray(format="yuv420p")  # [H * 3 / 2, W]
    y = planes[16:64:32, 16::32]
    u, v = (plane.reshape(32, 64)[8::16, 8::16] for plane in (planes[64:80], planes[80:96]))
    luma, blue, red = (
        (torch.from_numpy(x).double() - zero) / span
        for x, zero, span in zip((y, u, v), (16, 128, 128), (219, 224, 224), strict=True)
    )
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    got = torch.stack([r, g, b], dim=-1).clamp(0, 1) * 255
    want = torch.tensor(PATCHES).reshape(2, 4, 3).double()
    assert (got - want).abs().max() <= 3


def test_the_same_film_is_the_same_bytes(tmp_path: Path) -> None:
    frames, waveform = moving_frames(60), tone(2.4, RATE, 0.5, 0.25)
    first, second = (write_film(tmp_path / f"{i}.mp4", frames, waveform, {"comment": "x"}) for i in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_a_small_film_is_the_same_bytes_however_often_it_is_written(tmp_path: Path) -> None:
    # this one came out in six versions of eight while the encoder's mbtree was on
    frames = torch.from_numpy(make_clip(held_out("bounce", 1)[0], 0).frames)
    paths = (write_film(tmp_path / f"{i}.mp4", frames, torch.zeros(2, 8820)) for i in range(8))
    assert len({path.read_bytes() for path in paths}) == 1


def test_unfinished_films_of_killed_processes_are_removed_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".film.{digits}.part" for digits in ("a" * 32, "b" * 32, "mine"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    media.FilmWriter(tmp_path / "film.mp4", 32, 32)
    assert sorted(tmp_path.iterdir()) == [new, other]


def test_parts_in_any_order_make_the_same_film(tmp_path: Path) -> None:
    frames, waveform = moving_frames(60), tone(2.4, RATE, 0.5, 0.25)
    want = write_film(tmp_path / "sound_first.mp4", frames, waveform).read_bytes()
    with media.FilmWriter(tmp_path / "mixed.mp4", 128, 64) as film:
        film.add_frames(frames[:7])
        film.add_audio(waveform[:, :1000])
        film.add_frames(frames[7:])
        film.add_audio(waveform[:, 1000:])
    assert (tmp_path / "mixed.mp4").read_bytes() == want


def test_the_index_of_a_film_stands_before_its_data(tmp_path: Path) -> None:
    content = write_film(tmp_path / "film.mp4", coloured_frames(5), torch.zeros(2, 8820)).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_film_without_sound_has_no_sound_track(tmp_path: Path) -> None:
    with media.FilmWriter(tmp_path / "silent.mp4", 128, 64, sound=False) as film:
        film.add_frames(coloured_frames(5))
    assert_refused(read_mono, tmp_path / "silent.mp4", "has no sound track")


def test_a_truncated_film_is_refused(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", moving_frames(50), tone(2.0, RATE, 0.5, 0.5))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(read_mono, path, "is damaged|is cut off")
    path.write_bytes(b"\0" * 1000)
    assert_refused(media.read_film_metadata, path, "not a readable film")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_film_leaves_nothing_and_keeps_the_old_one(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"an older film")
    with pytest.raises(interruption), media.FilmWriter(path, 128, 64) as film:
        film.add_audio(torch.zeros(2, 44100))
        film.add_frames(moving_frames(25))
        assert len(list(tmp_path.iterdir())) == 2
        raise interruption
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]
    assert path.read_bytes() == b"an older film"


def test_a_film_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    too_long = torch.zeros(2, RATE)
    cases = {
        "no frames": ([], [too_long]),
        "no sound": ([coloured_frames(2)], []),
        "is longer than its 2 frames": ([coloured_frames(2)], [too_long]),
        r"frames of this film must be 128 x 64, got 64 x 128": ([coloured_frames(2).transpose(1, 2)], []),
        "frames must be uint8": ([coloured_frames(2).float()], []),
        "sound must be finite": ([], [torch.full((2, 9), math.nan)]),
        r"got \[1, 9\]": ([], [torch.zeros(1, 9)]),
    }
    for message, (pictures, sounds) in cases.items():
        film = media.FilmWriter(tmp_path / "film.mp4", 128, 64)
        with pytest.raises(ValueError, match=message), film:
            for frames in pictures:
                film.add_frames(frames)
            for waveform in sounds:
                film.add_audio(waveform)
        assert not list(tmp_path.iterdir())


def test_a_place_where_no_film_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.mp4, got 'film\.mkv'"):
        media.FilmWriter(tmp_path / "film.mkv", 128, 64)
    with pytest.raises(ValueError, match="must be even, got 127 x 64"):
        media.FilmWriter(tmp_path / "film.mp4", 127, 64)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder.*folder\.mp4"):
        media.FilmWriter(tmp_path / "folder.mp4", 128, 64)
    with pytest.raises(FileNotFoundError, match="absent"):
        media.FilmWriter(tmp_path / "absent" / "film.mp4", 128, 64)


def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    write_film(
        tmp_path / "before.mp4", noisy_frames(2), torch.zeros(2, RATE // 25 * 2)
    )  # imports what it needs
    tmp_path.chmod(0o500)
    film = media.FilmWriter(tmp_path / "film.mp4", 128, 64)
    with unprivileged(), pytest.raises(PermissionError, match="could not be written"), film:
        pass


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be an ordinary user for a while: permissions do not bind root, as whom tests run in containers."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("limit", [0, 20_000, 250_000])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands for the full disk: at the header, in the data, at the end."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    frames = noisy_frames(75)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            write_film(tmp_path / "film.mp4", frames, torch.zeros(2, 3 * RATE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_films_are_written_while_frames_arrive(tmp_path: Path) -> None:
    """The unfinished file grows, so frames are not collected."""
    with media.FilmWriter(tmp_path / "film.mp4", 128, 64) as film:
        film.add_audio(torch.zeros(2, 8 * RATE))
        film.add_frames(noisy_frames(100))
        early = next(tmp_path.iterdir()).stat().st_size
        film.add_frames(noisy_frames(100))
        assert next(tmp_path.iterdir()).stat().st_size >= early + 400_000


def test_upscaling_by_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of bilinear, nearest, bicubic, got 'lanczos'"):
        media.upscale_frames(coloured_frames(1), 256, 128, "lanczos")


def test_frames_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames must be \[1, 3, frames, height, width\]"):
        media.frames_to_uint8(torch.zeros(3, 5, 8, 8))
