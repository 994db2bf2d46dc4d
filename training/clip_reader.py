"""The beginning of a film file as a film of a given shape.

Letters: F pixel frames, H height, W width, N samples.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import torch
from av.video.reformatter import Colorspace
from torch import Tensor
from torch.nn import functional as F

from ..media import prepare_image, read_audio
from ..model.audio_vae import ENCODE_RATE
from ..model.geometry import FPS, FilmShape

log = logging.getLogger(__name__)
ENLARGED = 1.5  # times; clips that must be enlarged more are told
SHORT_SOUND = 0.25  # seconds; clips whose sound ends so much before are told
EARLY = 0.25 / FPS  # a picture may come so many seconds after its time, as time stamps are rounded
INEXACT = 0.5  # seconds by which a file may err about its length
HDR = (16, 18)  # FFmpeg's numbers of PQ and HLG


def read_clip(path: Path, shape: FilmShape) -> tuple[Tensor, Tensor]:
    """The beginning of a clip: frames [1, 3, F, H, W] in [-1, 1], and sound [2, N] at 51200 Hz.

    Frames are taken at 25 a second, with square pixels, cropped about their centre and scaled. Raises
    ValueError naming a clip that is damaged, shorter than the shape, or without picture or sound; warns of
    one that is far smaller, or HDR.
    """
    with _opened(path) as (container, video, audio):
        late = _start(audio) - _start(video)
        frames, found = _frames(container, video, shape, path)
    if len(frames) < shape.pixel_frames:
        raise _too_short(path, found, shape)
    samples = shape.audio_latents * ENCODE_RATE // FPS
    sound = read_audio(path, ENCODE_RATE, 2, samples / ENCODE_RATE + max(0.0, -late))
    shift = round(late * ENCODE_RATE)
    sound = sound[:, max(0, -shift) :]  # one that begins before the picture is cut
    sound = F.pad(sound, (min(max(0, shift), samples), 0))[:, :samples]
    missing = (samples - sound.shape[1]) / ENCODE_RATE
    if missing > SHORT_SOUND:
        log.warning(
            "%s has no sound in the last %.1f of %.1f s, where silence is learnt; give a clip whose sound "
            "is as long as its picture", path, missing, shape.seconds,
        )  # fmt: skip
    return torch.stack(frames, dim=2), F.pad(sound, (0, samples - sound.shape[1]))


def check_clip(path: Path, shape: FilmShape) -> None:
    """Raise as `read_clip`, but for what the beginning of the file tells without its pictures."""
    with _opened(path) as (container, video, _):
        if video.duration is not None:
            length = float(video.duration * video.time_base)
        elif container.duration is not None:
            length = container.duration / av.time_base
        else:
            return
    if 0 < length < shape.seconds - INEXACT:
        raise _too_short(path, length, shape)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream, av.AudioStream]]:
    """A clip with its picture and its sound."""
    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            videos, sounds = container.streams.video, container.streams.audio
            if not videos:
                raise ValueError(f"{path} has no picture; take it out of the folder")
            if not sounds:
                raise ValueError(
                    f"{path} has no sound stream; add one (silence, if it is a silent film), or take it out"
                )
            yield container, videos[0], sounds[0]
    except av.error.FFmpegError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{path} cannot be read ({reason}); export it again, or take it out of the folder"
        ) from error


def _too_short(path: Path, length: float, shape: FilmShape) -> ValueError:
    return ValueError(
        f"{path} is too short: it lasts {length:.2f} s, and {shape.seconds:.2f} s are needed; give a "
        "longer clip, or train with fewer seconds"
    )


def _start(stream: av.stream.Stream) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, shape: FilmShape, path: Path
) -> tuple[list[Tensor], float]:
    """Frames [1, 3, H, W] at 25 a second, up to the shape's number, and the seconds that were read.

    A frame without a time, as in some AVI files, comes at the end of the one before.
    """
    stream.thread_type = "AUTO"
    frames: list[Tensor] = []
    first, end, current = None, 0.0, None
    for frame in container.decode(stream):
        if frame.time is None and not stream.average_rate:
            raise ValueError(
                f"{path} has pictures without times and no rate; export it again, as mp4 at 25 a second"
            )
        if current is None:
            _warn_of(frame, stream, shape, path)
        if first is None and frame.time is not None:
            first = frame.time - end
        time = end if frame.time is None else frame.time - first
        _repeat(frames, current, time, shape)
        if len(frames) == shape.pixel_frames:
            return frames, time
        length = frame.duration * frame.time_base if frame.duration else 1 / (stream.average_rate or FPS)
        current, end = partial(_pixels, frame, stream.sample_aspect_ratio, shape), time + float(length)
    _repeat(frames, current, end, shape)
    return frames, end


def _warn_of(frame: av.VideoFrame, stream: av.VideoStream, shape: FilmShape, path: Path) -> None:
    if stream.codec_context.color_trc in HDR:
        log.warning("%s is HDR, which is learnt as flat, pale colours; give it as SDR", path)
    width, height = _shown_width(frame, stream.sample_aspect_ratio), frame.height
    if frame.rotation % 180:
        width, height = height, width
    scale = max(shape.width / width, shape.height / height)
    if scale > ENLARGED:
        log.warning(
            "%s is %d x %d and is enlarged %.1f times, so its blur is learnt too; train at a smaller size "
            "or give a larger clip",
            path, width, height, scale,
        )  # fmt: skip


def _repeat(
    frames: list[Tensor], current: Callable[[], Tensor] | None, until: float, shape: FilmShape
) -> None:
    """Append the present frame for every picture that is due before `until` seconds."""
    pixels = None
    while current and len(frames) < shape.pixel_frames and len(frames) / FPS + EARLY < until:
        pixels = current() if pixels is None else pixels
        frames.append(pixels)


def _pixels(frame: av.VideoFrame, aspect: Fraction | None, shape: FilmShape) -> Tensor:
    # PyAV before 17 takes all colours for BT.601 unless told; it wants another matrix for the result then
    told = {"src_colorspace": Colorspace.ITU709, "dst_colorspace": Colorspace.ITU601}
    image = frame.to_image(**(told if frame.colorspace == Colorspace.ITU709 else {}))
    if (width := _shown_width(frame, aspect)) != frame.width:
        image = image.resize((width, frame.height))
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    return prepare_image(image, shape.width, shape.height)


def _shown_width(frame: av.VideoFrame, aspect: Fraction | None) -> int:
    """The width of a frame whose pixels are `aspect` times as wide as high, in square ones."""
    return round(frame.width * (aspect or 1))
