"""Nodes that make the LATENT a film starts from."""

import logging
import math
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..model.config import MAGIHUMAN
from ..model.geometry import FILM_RATE, FPS, LONG_SECONDS, MAX_SECONDS, MIN_SECONDS, SIZE_STEP, FilmShape
from ..sampler.noise import FilmNoise
from ..sampler.pipeline import AUDIO_MODES, film_sound
from .inputs import Audio, check_sound, encode_film, encode_first_frame, encode_sound, film_frames, one_sound
from .latents import film_latent, masks, shape_of, streams
from .sampler import MAX_SEED

log = logging.getLogger(__name__)
CATEGORY = "HappyHorse/latent"
ASPECTS = (*MAGIHUMAN.sizes, "custom")
AS_GIVEN = "as given"
FILM = "A film with sound, not made yet: from HappyHorse Empty Latent or another of these nodes."
ENCODER = "Wan2.2 VAE, from HappyHorse Load Video VAE; the turbo decoder cannot encode."
AUDIO_VAE = "From HappyHorse Load Audio VAE."
Latent = dict[str, Any]


MAX_SIDE = 4096  # pixels


def latent_output(tooltip: str = "The film, for HappyHorse Sampler.") -> io.Latent.Output:
    """The LATENT that these nodes hand out."""
    return io.Latent.Output(display_name="latent", tooltip=tooltip)


def size_inputs(as_given: bool = False) -> list[io.Input]:
    """Aspect, width and height; `as_given` offers the aspect of a given film."""
    more = f"; {AS_GIVEN} takes the trained size nearest to the film's aspect" if as_given else ""
    sizes = ", ".join(f"{aspect} {width}x{height}" for aspect, (width, height) in MAGIHUMAN.sizes.items())
    return [
        io.Combo.Input("aspect", options=[*([AS_GIVEN] if as_given else []), *ASPECTS],
                       tooltip=f"The trained sizes in pixels: {sizes}; custom takes width and height{more}."),
        io.Int.Input("width", default=448, min=SIZE_STEP, max=MAX_SIDE, step=SIZE_STEP,
                     tooltip="Pixels, a multiple of 32, for aspect custom only."),
        io.Int.Input("height", default=256, min=SIZE_STEP, max=MAX_SIDE, step=SIZE_STEP,
                     tooltip="Pixels, a multiple of 32, for aspect custom only."),
    ]  # fmt: skip


def seconds_input() -> io.Float.Input:
    """The length of a film."""
    return io.Float.Input(
        "seconds", default=5.0, min=MIN_SECONDS, max=MAX_SECONDS, step=0.04, round=0.0001,
        tooltip="Length, 0.2 to 30 s in steps of 0.04 s. The models were trained on films of up to 10 s.",
    )  # fmt: skip


def size_of(aspect: str, width: int, height: int, frames: Tensor | None = None) -> tuple[int, int]:
    """(width, height) of an aspect, of that of `frames` (F, H, W, C), or those given."""
    if aspect != AS_GIVEN:
        return MAGIHUMAN.sizes.get(aspect, (width, height))
    given = math.log(frames.shape[2] / frames.shape[1])
    return min(MAGIHUMAN.sizes.values(), key=lambda size: abs(math.log(size[0] / size[1]) - given))


def empty(shape: FilmShape, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Raw latents of a film's shapes, all zero."""
    device, config = comfy.model_management.intermediate_device(), MAGIHUMAN.transformers["distill"]
    size = shape.latent_frames, shape.latent_rows, shape.latent_columns
    video = torch.zeros(batch, config.latent_channels, *size, device=device)
    return video, torch.zeros(batch, config.audio_in_channels, shape.audio_latents, device=device)


class HappyHorseEmptyLatent(io.ComfyNode):
    """A film to be made from a prompt alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseEmptyLatent",
            display_name="HappyHorse Empty Latent",
            category=CATEGORY,
            description="Size and length of a film with sound. Other nodes put a first frame or a sound in.",
            search_aliases=["empty av latent", "size", "aspect", "seconds", "magihuman"],
            inputs=[
                *size_inputs(),
                seconds_input(),
                io.Int.Input("batch_size", default=1, min=1, max=8,
                             tooltip="Films made at once, 1 to 8. More than one needs as much more memory."),
            ],
            outputs=[latent_output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, aspect: str, width: int, height: int, seconds: float, batch_size: int) -> io.NodeOutput:
        shape = FilmShape.from_seconds(*size_of(aspect, width, height), seconds)
        if seconds > LONG_SECONDS:
            log.warning("films above %g s are longer than what the models were trained on", LONG_SECONDS)
        return io.NodeOutput(film_latent(*empty(shape, batch_size)))


class HappyHorseImageToFilm(io.ComfyNode):
    """A picture as the first frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseImageToFilm",
            display_name="HappyHorse Image to Film",
            category=CATEGORY,
            description="Puts a picture into a film as its first frame, which the sampler then keeps.",
            search_aliases=["image to video", "i2v", "first frame", "start image"],
            inputs=[
                io.Latent.Input("latent", tooltip=FILM),
                io.Vae.Input("vae", tooltip=ENCODER),
                io.Image.Input(
                    "image", tooltip="One picture; cropped about its centre to the film's aspect."
                ),
            ],
            outputs=[latent_output()],
        )

    @classmethod
    def execute(cls, latent: Latent, vae: Any, image: Tensor) -> io.NodeOutput:
        video, audio = streams(latent)
        frame = encode_first_frame(vae, image, shape_of(latent))
        video_mask, audio_mask = masks(latent)
        video, video_mask = video.clone(), video_mask.clone()
        video[:, :, :1], video_mask[:, :, :1] = frame, 0
        return io.NodeOutput(latent | film_latent(video, audio, video_mask, audio_mask))


class HappyHorseAudioToFilm(io.ComfyNode):
    """A sound as the film's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseAudioToFilm",
            display_name="HappyHorse Audio to Film",
            category=CATEGORY,
            description="Makes a film for a sound you give, lips in step with speech.",
            search_aliases=["audio to video", "a2v", "lip sync", "talking", "driving audio"],
            inputs=[
                io.Latent.Input("latent", tooltip=FILM),
                io.Vae.Input("audio_vae", tooltip=AUDIO_VAE),
                io.Audio.Input("audio", tooltip="Any rate, mono or stereo; cut or padded to the film."),
                io.Combo.Input("mode", options=list(AUDIO_MODES),
                               tooltip="hold: the sound stays as it is, and the film carries it. start: as "
                               "published, the distilled model only begins with it and makes a new one."),
                io.Combo.Input("encoding", options=["mean", "sampled"], advanced=True,
                               tooltip="mean: the most likely latents. sampled: drawn as published."),
                io.Int.Input("seed", default=42, min=0, max=MAX_SEED, advanced=True,
                             control_after_generate=False, tooltip="Of the drawing, for encoding sampled."),
            ],
            outputs=[
                latent_output(),
                io.Audio.Output(display_name="audio", tooltip="The sound as long as the film, 44.1 kHz "
                                "stereo: connect it to the decode node in mode hold."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, latent: Latent, audio_vae: Any, audio: Audio, mode: str, encoding: str, seed: int
    ) -> io.NodeOutput:
        video, _ = streams(latent)
        shape = shape_of(latent)
        check_sound(audio)
        if not audio["waveform"].any():
            raise ValueError(
                "audio: the sound is silent throughout; connect a sound, or leave this node out for a film "
                "whose sound is made"
            )
        generator = FilmNoise(seed).audio_encoding() if encoding == "sampled" else None
        encoded = encode_sound(audio_vae, audio, shape, generator).expand(len(video), -1, -1)
        video_mask, audio_mask = masks(latent)
        audio_mask = torch.full_like(audio_mask, float(mode == "start"))
        result = (
            latent
            | film_latent(video, encoded, video_mask, audio_mask)
            | {"start_audio": encoded if mode == "start" else None}
        )
        sound = film_sound(one_sound(audio, FILM_RATE, 2), shape)
        return io.NodeOutput(result, {"waveform": sound[None], "sample_rate": FILM_RATE})


def _source_inputs() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip=ENCODER),
        io.Vae.Input("audio_vae", tooltip=AUDIO_VAE),
        *size_inputs(as_given=True),
    ]


def _film_inputs() -> list[io.Input]:
    return [
        io.Video.Input("video", optional=True, tooltip="The film, at any frame rate; or connect images."),
        io.Image.Input("images", optional=True, tooltip="Its frames, taken as 25 a second."),
        io.Audio.Input("audio", optional=True, tooltip="Its sound; without one the video's own is taken."),
    ]


class HappyHorseFilmToFilm(io.ComfyNode):
    """A film to be changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseFilmToFilm",
            display_name="HappyHorse Film to Film",
            category=CATEGORY,
            description="Encodes a film and its sound, to be changed by a sampler with denoise below 1.",
            search_aliases=["video to video", "v2v", "encode film"],
            inputs=[*_source_inputs(), *_film_inputs()],
            outputs=[latent_output("The film, for HappyHorse Sampler with denoise below 1.")],
        )

    @classmethod
    def execute(
        cls, vae: Any, audio_vae: Any, aspect: str, width: int, height: int, video: Any = None,
        images: Tensor | None = None, audio: Audio | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        frames, sound = film_frames(video, images, audio)
        count = min(len(frames) - 1, int(MAX_SECONDS * FPS)) // 4 * 4 + 1
        if count < 5:
            raise ValueError(f"video, images: at least 5 frames are needed, got {len(frames)}; connect more")
        if count < len(frames):
            log.warning(
                "video, images: a film has 4n+1 frames, the last %d are left out", len(frames) - count
            )
        size = size_of(aspect, width, height, frames)
        return io.NodeOutput(film_latent(*encode_film(vae, audio_vae, frames[:count], sound, size)))


class HappyHorseContinueFilm(io.ComfyNode):
    """The end of a film as the start of the next."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseContinueFilm",
            display_name="HappyHorse Continue Film",
            category=CATEGORY,
            description="Begins a film with the last frames and sound of another, which the sampler keeps.",
            search_aliases=["extend video", "continue video", "longer film"],
            inputs=[
                *_source_inputs(),
                seconds_input(),
                io.Int.Input("overlap", default=9, min=1, max=121, step=4,
                             tooltip="Last frames that are taken over, 4n+1: 1, 5, 9 ... 121."),
                *_film_inputs(),
            ],
            outputs=[
                latent_output(),
                io.Int.Output(display_name="overlap_frames", tooltip="Frames that both films have."),
                io.Image.Output(display_name="images", tooltip="The given film's, 25 a second, to join."),
                io.Audio.Output(display_name="audio", tooltip="Its sound, as long as they; else silence."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, vae: Any, audio_vae: Any, aspect: str, width: int, height: int, seconds: float, overlap: int,
        video: Any = None, images: Tensor | None = None, audio: Audio | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        frames, sound = film_frames(video, images, audio)
        shape = FilmShape.from_seconds(*size_of(aspect, width, height, frames), seconds)
        if overlap % 4 != 1 or overlap > len(frames) or overlap >= shape.pixel_frames:
            raise ValueError(
                f"overlap: 4n+1 frames are needed, at most the {len(frames)} of the given film and fewer "
                f"than the {shape.pixel_frames} of the new one, got {overlap}; choose another number"
            )
        size, first = (shape.width, shape.height), len(frames) - overlap
        last = None if sound is None else sound_between(sound, first, len(frames))
        start = encode_film(vae, audio_vae, frames[first:], last, size)
        new_streams, new_masks = empty(shape), []
        for stream, held, given in zip(new_streams, start, (True, sound is not None), strict=True):
            mask = torch.ones_like(stream[:, :1])
            if given:
                stream[:, :, : held.shape[2]], mask[:, :, : held.shape[2]] = held, 0
            new_masks.append(mask)
        silence = {"waveform": torch.zeros(1, 2, 1), "sample_rate": FILM_RATE}
        whole = sound_between(silence if sound is None else sound, 0, len(frames))
        return io.NodeOutput(film_latent(*new_streams, *new_masks), overlap, frames, whole)


def sound_between(audio: Audio, first: int, stop: int) -> Audio:
    """The sound of frames `first` to `stop`; silence where it ends before them."""
    check_sound(audio)
    rate, waveform = audio["sample_rate"], audio["waveform"]
    start, end = (round(frame / FPS * rate) for frame in (first, stop))
    part = waveform[..., start:end]
    missing = end - start - part.shape[-1]
    return {"waveform": torch.nn.functional.pad(part, (0, missing)), "sample_rate": rate}


NODES = [
    HappyHorseEmptyLatent,
    HappyHorseImageToFilm,
    HappyHorseAudioToFilm,
    HappyHorseFilmToFilm,
    HappyHorseContinueFilm,
]
