"""Images, sound and films in and out, with Pillow and PyAV.

What reads raises FileNotFoundError for a missing file, and ValueError of one sentence for one that is no use.
Letters: `C` channels, `F` pixel frames, `H` height, `W` width, `N` samples.
"""

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from .model.geometry import FILM_RATE

AAC_FRAME = 1024  # samples that one packet of sound holds
FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")  # as the files of films end
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
UPSCALE_MODES = ("bilinear", "nearest", "bicubic")
BT709 = 1  # primaries, transfer and matrix of high definition video have this number (ITU-T H.273)


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such file, check its name", str(path))
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of one")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    return path


# Images


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Return an image file as RGB, turned as its EXIF orientation says, transparent parts on white."""
    path = _existing_file(path)
    try:
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            image.load()
            if image.mode != "F":
                return _to_rgb(ImageOps.exif_transpose(image))
    except (PermissionError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
        ) from error
    except Exception as error:  # Pillow's readers raise many kinds, SyntaxError and struct.error among them
        accepted = ", ".join(IMAGE_FORMATS)
        raise ValueError(f"{path} is not a readable image (damaged, or none of {accepted})") from error
    raise ValueError(f"{path} holds floating-point values, whose white is not told; export it as PNG")


def has_transparency(path: str | os.PathLike[str]) -> bool:
    """Whether `read_image`, which can read it, puts parts of this image file on white."""
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        return _has_transparency(image)


def is_plain_png(path: str | os.PathLike[str]) -> bool:
    """Whether an image file is a PNG in colour of 8 bits, which all decoders read alike."""
    with Path(path).open("rb") as file:
        head = file.read(26)
    depth, colours = head[24:25], head[25:26]
    rgb, palette = depth == b"\x08" and colours in (b"\2", b"\6"), colours == b"\3"
    return head[:8] == b"\x89PNG\r\n\x1a\n" and (rgb or palette)


def _has_transparency(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if _has_transparency(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def prepare_image(image: Image.Image, width: int, height: int) -> Tensor:
    """Return an RGB image as [1, 3, height, width] in [-1, 1], cropped about its centre and resized."""
    resized = crop_to_aspect(image, width, height).resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # [C, H, W]
    return pixels[None].float() / 255 * 2 - 1


def crop_to_aspect(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the largest centred part of an image with the aspect of `width` x `height`."""
    w, h = image.size
    if h / w > height / width:
        new_w, new_h = w, max(int(w * height / width), 1)
    else:
        new_w, new_h = max(int(h * width / height), 1), h
    left, top = (w - new_w) / 2, (h - new_h) / 2
    # Pillow rounds each edge, ties to even, so the part may be one pixel larger: as published.
    return image.crop((left, top, left + new_w, top + new_h))


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Return frames [1, 3, F, H, W] of about [-1, 1] as uint8 [F, H, W, 3], clamped and truncated."""
    if frames.ndim != 5 or frames.shape[:2] != (1, 3):
        raise ValueError(f"frames must be [1, 3, frames, height, width], got {list(frames.shape)}")
    scaled = (frames[0] * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.to(torch.uint8).permute(1, 2, 3, 0)


def upscale_frames(frames: Tensor, width: int, height: int, mode: str = "bilinear") -> Tensor:
    """Return uint8 frames [F, H, W, 3] resized to `width` x `height`, without antialiasing.

    Raises ValueError for a `mode` other than 'bilinear', 'nearest' or 'bicubic'.
    """
    if mode not in UPSCALE_MODES:
        raise ValueError(f"upscaling mode must be one of {', '.join(UPSCALE_MODES)}, got {mode!r}")
    _check_frames(frames)
    resized = torch.empty(len(frames), height, width, 3, dtype=torch.uint8, device=frames.device)
    for i, frame in enumerate(frames):
        planes = frame.permute(2, 0, 1)[None].float() / 255  # [1, C, H, W]
        planes = F.interpolate(planes, size=(height, width), mode=mode).clamp(0, 1) * 255
        resized[i] = planes[0].permute(1, 2, 0).to(torch.uint8)
    return resized


def _check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"frames must be uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}"
        )


# Sound


def read_audio(
    path: str | os.PathLike[str], sample_rate: int, channels: int, seconds: float | None = None
) -> Tensor:
    """Return the sound of an audio or film file as float32 [channels, N], at most `seconds` long.

    Mono is doubled for two `channels`, stereo averaged for one. Raises ValueError for a file without sound or
    one that is damaged, ends early or holds values that are not numbers.
    """
    if channels not in (1, 2):
        raise ValueError(f"channels must be 1 or 2, got {channels}")
    path = _existing_file(path)
    limit = None if seconds is None else int(seconds * sample_rate)
    waveform, stated = None, 0.0
    try:
        # With "file:" in front, a colon in the path does not make a protocol of it.
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            for stream in container.streams.audio[:1]:
                stated = _stated_seconds(container, stream, path)
                waveform = _decode(container, stream, sample_rate, channels, limit)
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} is damaged, or no sound or film that FFmpeg reads ({reason})") from error
    if waveform is None:
        raise ValueError(f"{path} has no sound track; give a sound, or a film that has one")
    found = waveform.shape[1] / sample_rate
    if not found:
        raise ValueError(f"the sound track of {path} is empty")
    if waveform.shape[1] != limit and found < 0.98 * stated - 0.1:
        raise ValueError(f"{path} is cut off: it holds {found:.1f} of {stated:.1f} seconds; copy it again")
    if not waveform.isfinite().all():
        raise ValueError(f"the sound of {path} holds values that are not finite numbers; export it again")
    return waveform


def resample_sound(waveform: Tensor, rate: int, sample_rate: int, channels: int) -> Tensor:
    """Return sound [C, N] at `rate` as float32 [channels, N'] at `sample_rate`, as `read_audio` makes it."""
    planes = waveform.float().cpu().contiguous().numpy()
    # FFmpeg knows layouts by name; of more than two channels any name of their number does
    layout = {1: "mono", 2: "stereo"}.get(len(planes), f"{len(planes)}c")
    frames = []
    for start in range(0, planes.shape[1], rate):
        block = planes[:, start : start + rate].T.reshape(1, -1)  # PyAV fills no more than seven planes
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="flt", layout=layout)
        frame.sample_rate = rate
        frames.append(frame)
    blocks = [_mixed(frame, channels) for frame in _resampled(frames, sample_rate)]
    return _limited(torch.cat([torch.zeros(channels, 0), *blocks], dim=1), len(planes))


def _mixed(frame: av.AudioFrame, channels: int) -> Tensor:
    block = torch.from_numpy(frame.to_ndarray())  # [1 or 2, N]
    return block.expand(2, -1) if channels == 2 else block.mean(dim=0, keepdim=True)


def _limited(waveform: Tensor, channels: int) -> Tensor:
    """The mix of so many channels; more than two may add up to more than full scale."""
    if channels <= 2 or not waveform.numel():
        return waveform
    return waveform / waveform.abs().amax().clamp(min=1)


def _decode(
    container: av.container.InputContainer,
    stream: av.AudioStream,
    sample_rate: int,
    channels: int,
    limit: int | None,
) -> Tensor:
    """Decode one sound track to [channels, N], stopping at `limit` samples."""
    blocks, samples = [torch.zeros(channels, 0)], 0
    for frame in _resampled(container.decode(stream), sample_rate):
        blocks.append(_mixed(frame, channels))
        samples += frame.samples
        if limit is not None and samples >= limit:
            break
    return _limited(torch.cat(blocks, dim=1)[:, :limit], stream.codec_context.channels)


def _resampled(frames: Iterable[av.AudioFrame], sample_rate: int) -> Iterator[av.AudioFrame]:
    """Yield sound as float32, mono as it is and all else as stereo; the format may change on the way."""
    resampler, previous = None, None
    for frame in frames:
        kind = (frame.layout.name, frame.format.name, frame.sample_rate)
        if kind != previous:
            if resampler is not None:
                yield from resampler.resample(None)
            layout = "mono" if frame.layout.nb_channels == 1 else "stereo"
            resampler, previous = av.AudioResampler(format="fltp", layout=layout, rate=sample_rate), kind
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _stated_seconds(container: av.container.InputContainer, stream: av.AudioStream, path: Path) -> float:
    """How long the file itself says that its sound is, or 0 where it says nothing."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    stated = float(stream.duration * stream.time_base) if stream.duration else 0.0
    guessed_mp3 = container.format.name == "mp3" and not (b"Xing" in head or b"Info" in head)
    if guessed_mp3 or container.format.name == "aac":
        return 0.0  # then the duration is a guess from the bit rate
    if container.format.name == "wav" and head[:4] == b"RIFF":
        num_bytes = 8 + int.from_bytes(head[4:8], "little")
        written_as_a_stream = num_bytes > 0x7FFFF000  # such a file says "unknown"
        return stated if written_as_a_stream else stated * num_bytes / path.stat().st_size
    if "DURATION" in stream.metadata:  # Matroska: the time at which the track ends
        with contextlib.suppress(ValueError):
            hours, minutes, rest = stream.metadata["DURATION"].split(":")
            end = int(hours) * 3600 + int(minutes) * 60 + float(rest)
            return end - float((stream.start_time or 0) * stream.time_base)
    return stated


# Films


def read_film_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a film, that given to `FilmWriter` among it."""
    path = _existing_file(path)
    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            return dict(container.metadata)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is not a readable film, or it is damaged ({error.strerror})") from error


def _remove_stale(folder: Path) -> None:
    """Remove unfinished films of killed processes: those that nobody has written to for a day.

    PyAV opens its files itself, so they cannot be locked as those of model/stream_writer.py are.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*.{'[0-9a-f]' * 32}.part"):
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()


class FilmWriter:
    """Writes one film, H.264 and AAC in MP4, as its frames and sound arrive; a context manager.

    ```
    with FilmWriter("film.mp4", width, height, metadata={"prompt": "..."}) as film:
        film.add_audio(waveform)  # float32 [2, N] at 44100 Hz
        film.add_frames(frames)  # uint8 [F, height, width, 3], as often as there are more
    ```

    Sound and frames may come in any order and in any number of parts; sound first needs the least memory.
    The file appears under its name when the block ends, and not at all if it ends with an exception.
    The same film written twice gives the same bytes.
    Raises ValueError for a name or size that MP4 cannot have, OSError where the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: int = 25,
        metadata: Mapping[str, str] | None = None,
        sound: bool = True,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"a film's name must end in .mp4, got {self.path.name!r}")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"a film's width and height must be even, got {width} x {height}")
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "this is a folder, not a film", str(self.path))
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder; create it first", str(self.path.parent))
        self.width, self.height, self.fps, self.sound = width, height, fps, sound
        self.metadata = dict(metadata or {})
        self.frames = self.samples = 0
        _remove_stale(self.path.parent)
        self._temporary = self.path.with_name(f".{self.path.stem[:64]}.{uuid.uuid4().hex}.part")
        self._reformatter = VideoReformatter()

    def __enter__(self) -> "FilmWriter":
        try:
            with self._writing():
                self._open()
        except BaseException:
            self._discard()
            raise
        return self

    def _open(self) -> None:
        options = {
            "movflags": "+faststart+use_metadata_tags",  # ComfyUI reads workflows from such tags
            "fflags": "+bitexact",
            "max_interleave_delta": "0",  # packets wait for the other track, in whatever order they come
        }
        self._container = av.open(f"file:{self._temporary}", "w", format="mp4", options=options)
        self._container.metadata.update(self.metadata)
        # with mbtree films of some sizes (96x96, 288x288) differ from run to run
        encoder = {"crf": "17", "preset": "medium", "mbtree": "0"}
        self._video = self._container.add_stream("libx264", rate=self.fps, options=encoder)
        self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
        video = self._video.codec_context
        video.time_base = Fraction(1, self.fps)
        video.color_primaries = video.color_trc = video.colorspace = BT709
        video.color_range = ColorRange.MPEG
        video.thread_type, video.thread_count = "FRAME", 8  # fixed, for the outcome depends on it
        if self.sound:
            self._audio = self._container.add_stream("aac", rate=FILM_RATE)
            self._audio.codec_context.layout = "stereo"
            self._audio.codec_context.bit_rate = 192_000
        self._container.start_encoding()

    def add_frames(self, frames: Tensor) -> None:
        """Append frames, uint8 [F, height, width, 3]."""
        _check_frames(frames)
        if frames.shape[1:3] != (self.height, self.width):
            raise ValueError(
                f"frames of this film must be {self.width} x {self.height}, "
                f"got {frames.shape[2]} x {frames.shape[1]}"
            )
        for pixels in frames.cpu().contiguous().numpy():
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(pixels, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
            )
            frame.pts, frame.time_base = self.frames, Fraction(1, self.fps)
            self.frames += 1
            with self._writing():
                self._container.mux(self._video.encode(frame))

    def add_audio(self, waveform: Tensor) -> None:
        """Append sound, float32 [2, N] at 44100 Hz; it is clipped to [-1, 1]."""
        if not self.sound:
            raise ValueError("this film was opened without sound")
        if waveform.ndim != 2 or waveform.shape[0] != 2 or not waveform.isfinite().all():
            raise ValueError(f"sound must be finite and [2 channels, samples], got {list(waveform.shape)}")
        samples = waveform.detach().float().clamp(-1, 1).cpu()
        for block in samples.split(FILM_RATE, dim=1):
            frame = av.AudioFrame.from_ndarray(block.contiguous().numpy(), format="fltp", layout="stereo")
            frame.sample_rate, frame.time_base = FILM_RATE, Fraction(1, FILM_RATE)
            frame.pts = self.samples
            self.samples += block.shape[1]
            with self._writing():
                self._container.mux(self._audio.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        picture = self.frames * FILM_RATE / self.fps
        if not self.frames:
            raise ValueError(f"{self.path} was given no frames, so there is no film to write")
        if self.sound and not self.samples:
            raise ValueError(f"{self.path} was given no sound; open it with sound=False if there is none")
        if self.samples > picture + AAC_FRAME:
            raise ValueError(
                f"the sound of {self.path} is longer than its {self.frames} frames: "
                f"{self.samples} samples, {round(picture)} fit"
            )
        with self._writing():
            self._container.mux(self._video.encode(None))
            if self.sound:
                self._container.mux(self._audio.encode(None))
            self._container.close()
            self._temporary.replace(self.path)

    def _discard(self) -> None:
        """Close and remove the unfinished file, if there still is one."""
        if hasattr(self, "_container"):
            with contextlib.suppress(av.error.FFmpegError, OSError):
                self._container.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(error.errno, f"the film could not be written: {reason}", str(self.path)) from error
