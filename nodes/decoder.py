"""Decoding: a film's latents as IMAGE and AUDIO, or as a VIDEO that is decoded while it is written."""

import json
import os
import shutil
import tempfile
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import comfy.model_management
import comfy.sd
import torch
from comfy_api.latest import Input, InputImpl, Types, io
from torch import Tensor

from ..media import FilmWriter, frames_to_uint8, resample_sound
from ..model.geometry import FILM_RATE, FPS, PIXELS_PER_LATENT
from ..sampler.pipeline import film_sound
from .inputs import Audio, check_audio_vae, check_sound, check_video_vae
from .latents import shape_of, streams
from .vae import VideoVAEObject, pixel_frames

CATEGORY = "HappyHorse/decode"

LATENT = "The film, picture and sound: from HappyHorse Sampler or HappyHorse Super-Resolution."
VAE = "Decodes the pictures: the turbo decoder (fast) or the Wan2.2 VAE, from HappyHorse Load Video VAE."
AUDIO_VAE = "Decodes the sound: the audio VAE from HappyHorse Load Audio VAE."
AUDIO = (
    "Your own sound, if the film was made for it: it takes the place of the decoded sound. Any sample rate, "
    "mono or stereo; cut at the end of the film, or followed by silence."
)


class HappyHorseDecode(io.ComfyNode):
    """Pictures and sound for any other node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseDecode",
            display_name="HappyHorse Decode",
            category=CATEGORY,
            description="Decodes a film into its pictures and its sound (44.1 kHz stereo, as loud as made).",
            search_aliases=["decode film", "latent to video", "latent to audio", "magihuman decode"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures of the film, 25 a second."),
                io.Audio.Output(
                    display_name="audio", tooltip="The sound, 44.1 kHz stereo, as long as the pictures."
                ),
                io.Float.Output(
                    display_name="fps", tooltip="Pictures per second: 25. Connect it to Create Video."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], vae: comfy.sd.VAE, audio_vae: comfy.sd.VAE, audio: Audio | None = None
    ) -> io.NodeOutput:
        video, sound = _decoded_sound(latent, vae, audio_vae, audio)
        images = vae.decode(video).flatten(0, 1)
        sound = sound.transpose(0, 1).reshape(1, 2, -1)  # one film after the other, as the pictures
        return io.NodeOutput(images, {"waveform": sound, "sample_rate": FILM_RATE}, float(FPS))


class HappyHorseDecodeVideo(io.ComfyNode):
    """A VIDEO that is decoded while it is saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseDecodeVideo",
            display_name="HappyHorse Decode Video",
            category=CATEGORY,
            description="Makes a VIDEO whose pictures are decoded while Save Video writes them, so that a "
            "long or large film never stands in memory as a whole.",
            search_aliases=["decode film", "stream video", "latent to video", "magihuman decode"],
            inputs=_inputs(),
            outputs=[
                io.Video.Output(display_name="video", tooltip="The film with its sound; connect Save Video.")
            ],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], vae: comfy.sd.VAE, audio_vae: comfy.sd.VAE, audio: Audio | None = None
    ) -> io.NodeOutput:
        films = streams(latent)[0].shape[0]
        if films != 1:
            raise ValueError(
                f"latent: one VIDEO holds one film, got a batch of {films}; connect HappyHorse Decode"
            )
        video, sound = _decoded_sound(latent, vae, audio_vae, audio)
        return io.NodeOutput(DecodedFilm(vae, video, sound[0]))


def _inputs() -> list[io.Input]:
    return [
        io.Latent.Input("latent", tooltip=LATENT),
        io.Vae.Input("vae", tooltip=VAE),
        io.Vae.Input("audio_vae", tooltip=AUDIO_VAE),
        io.Audio.Input("audio", optional=True, tooltip=AUDIO),
    ]


class DecodedFilm(Input.Video):
    """A film: raw latents `video` (1, 48, T, H, W), and its `sound` [2, N] at 44100 Hz, as long as they are.

    Written as MP4 it is decoded chunk by chunk into the encoder, as the command line does; for everything
    else it is decoded whole.
    """

    def __init__(self, vae: comfy.sd.VAE, video: Tensor, sound: Tensor) -> None:
        self.vae, self.video, self.sound = vae, video, sound
        self._encoded: bytes | None = None

    def get_components(self) -> Types.VideoComponents:
        """All pictures (F, Y, X, 3) in [0, 1], and the sound."""
        audio = {"waveform": self.sound[None], "sample_rate": FILM_RATE}
        return Types.VideoComponents(self.vae.decode(self.video)[0], self.get_frame_rate(), audio)

    def save_to(
        self,
        path: str | IO[bytes],
        format: Types.VideoContainer = Types.VideoContainer.AUTO,
        codec: Types.VideoCodec = Types.VideoCodec.AUTO,
        metadata: dict[str, Any] | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
        color_space: str | None = None,
    ) -> None:
        """Write the film to a path or a binary stream."""
        plain = bit_depth in (None, 8) and crf is None and color_space in (None, "sRGB")
        if plain and self._can_stream(path, format, codec):
            try:
                return self._stream_to(path, metadata or {})
            except Exception as error:
                comfy.model_management.raise_non_oom(error)
        # The host's own way: pictures in tiles where memory has run out, any container and codec
        film = InputImpl.VideoFromComponents(self.get_components())
        return film.save_to(path, format, codec, metadata, bit_depth, crf, color_space)

    def _can_stream(self, path: str | IO[bytes], format: str, codec: str) -> bool:
        is_path = isinstance(path, str | os.PathLike)
        named = not is_path or Path(path).suffix.lower() == ".mp4"
        mp4 = format in (Types.VideoContainer.AUTO, Types.VideoContainer.MP4)
        h264 = codec in (Types.VideoCodec.AUTO, Types.VideoCodec.H264)
        return isinstance(self.vae, VideoVAEObject) and named and mp4 and h264

    def _stream_to(self, path: str | IO[bytes], metadata: dict[str, Any]) -> None:
        tags = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()
        }
        if isinstance(path, str | os.PathLike):
            return self._write(Path(path), tags)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "film.mp4"
            self._write(file, tags)
            with file.open("rb") as encoded:
                shutil.copyfileobj(encoded, path)
        return None

    def _write(self, path: Path, tags: dict[str, str]) -> None:
        with FilmWriter(path, *self.get_dimensions(), FPS, tags) as writer:
            writer.add_audio(self.sound)
            for chunk in self.vae.decode_stream(self.video):
                writer.add_frames(frames_to_uint8(chunk))

    def get_stream_source(self) -> BytesIO:
        """The film as MP4; it is encoded once."""
        if self._encoded is None:
            self._encoded = super().get_stream_source().getvalue()
        return BytesIO(self._encoded)

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = False
    ) -> Input.Video | None:
        """A part of the film in seconds, or None where it is shorter than a strict duration."""
        encoded = InputImpl.VideoFromFile(self.get_stream_source())
        return encoded.as_trimmed(start_time or 0.0, duration or 0.0, strict_duration)

    def get_dimensions(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        rows, columns = self.video.shape[3:]
        return PIXELS_PER_LATENT * columns, PIXELS_PER_LATENT * rows

    def get_frame_count(self) -> int:
        """How many pictures."""
        return pixel_frames(self.video.shape[2])

    def get_frame_rate(self) -> Fraction:
        """Pictures per second."""
        return Fraction(FPS)

    def get_duration(self) -> float:
        """Seconds."""
        return self.get_frame_count() / FPS

    def get_container_format(self) -> str:
        """That of `get_stream_source`."""
        return "mp4"

    def get_color_space(self) -> str:
        """The host's name for BT.709."""
        return "sRGB"


def _decoded_sound(
    latent: dict[str, Any], vae: comfy.sd.VAE, audio_vae: comfy.sd.VAE, audio: Audio | None
) -> tuple[Tensor, Tensor]:
    """The raw video latents, and the film's sound (B, 2, N) at 44100 Hz, exactly as long as its pictures.

    It is as loud as it was made, and is `audio` if that is given. Everything is checked before the work.
    """
    video, sound = streams(latent)
    check_video_vae(vae)
    check_audio_vae(audio_vae)
    given = None if audio is None else given_sound(audio, len(video))
    waveform = audio_vae.decode(sound).movedim(-1, 1) if given is None else given
    return video, film_sound(waveform, shape_of(latent))


def given_sound(audio: Audio, films: int, socket: str = "audio") -> Tensor:
    """The AUDIO of a socket as (films, 2, N) at 44100 Hz; raises ValueError where it does not fit."""
    waveform, rate = audio["waveform"].float(), audio["sample_rate"]
    if waveform.ndim != 3 or waveform.shape[0] not in (1, films):
        raise ValueError(
            f"{socket}: the sound must be (1 or {films}, channels, samples), got {tuple(waveform.shape)}; "
            "connect one sound, or as many as there are films"
        )
    check_sound(audio, socket)
    sounds = [resample_sound(sound, rate, FILM_RATE, 2) for sound in waveform]
    return torch.stack(sounds).expand(films, 2, -1)


NODES = [HappyHorseDecode, HappyHorseDecodeVideo]
