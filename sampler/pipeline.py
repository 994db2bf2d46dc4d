"""The whole path: prompt, image and sound in, a film with sound out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from ..media import FilmWriter, frames_to_uint8, prepare_image, read_audio, read_image, upscale_frames
from ..model.audio_vae import ENCODE_RATE, encode_driving_audio, to_film_rate
from ..model.checkpoint import load_tokenizer
from ..model.finite import check_finite
from ..model.geometry import FILM_RATE, FPS, MAX_SECONDS, FilmShape
from ..model.packing import Latents, PackedLayout
from ..model.prompt import TextStates, encode_prompt
from ..model.video_vae import denormalize_latents, normalize_latents
from .conditions import Conditions, StepCallback
from .noise import FilmNoise
from .parts import Parts, Progress
from .placement import is_out_of_memory
from .stages import RECIPES, network_of, sample_base, sample_super_resolution

AUDIO_MODES = ("hold", "start")
CURE = "check the weights, or try --dtype float32"
READ_SECONDS = MAX_SECONDS + 1  # of given sound: more than the longest film, so that a rest is noticed
LESS = "a shorter or smaller film needs less, and so do weights in fewer bits"
Notice = Callable[[str], None]  # one sentence for the user
T = TypeVar("T")


@dataclass(frozen=True)
class FilmRequest:
    """What to make. `large` is the shape after super-resolution, if any; `steps` None is the variant's own
    number.

    `audio_mode` 'hold' keeps the given sound clean and puts it into the film; 'start' is the published
    behaviour, in which the few-step sampler treats it as noise. With `sample_audio` its encoding is drawn
    instead of the mean.
    """

    prompt: str
    negative: str
    shape: FilmShape
    large: FilmShape | None = None
    seed: int = 42
    steps: int | None = None
    image: Path | None = None
    audio: Path | None = None
    audio_mode: str = "hold"
    sample_audio: bool = False


@dataclass(frozen=True)
class FilmLatents:
    """A film before its picture is decoded; `sound` [2, N] at 44100 Hz is given or already decoded."""

    latents: Latents
    shape: FilmShape
    sound: Tensor | None


def generate(parts: Parts, request: FilmRequest, progress: Progress, notice: Notice) -> FilmLatents:
    """Make the latents of a film; raises ValueError for unusable input or numbers, naming it or the stage."""
    image = read_image(request.image) if request.image else None
    driving = _read_driving_audio(request, notice) if request.audio else None
    sound = _film_sound(request) if request.audio and request.audio_mode == "hold" else None
    final = request.large or request.shape

    def run(role: str, stage: Callable[[], T]) -> T:
        return with_steps_down(parts, role, stage, notice)

    text, negative = run("text_encoder", lambda: _encode_texts(parts, request, progress, notice))
    if request.large is not None:  # what its layout refuses, it shall refuse before the first stage
        coords_style = parts.checkpoints["super_resolution"].config.coords_style
        PackedLayout.of(_empty(parts, request.large), text, coords_style)
    frames = {}
    if image is not None:
        shapes = {request.shape, final}
        frames = run("video_vae", lambda: _encode_first_frames(parts, image, shapes, progress))
    given = None
    if driving is not None:
        given = run("audio_vae", lambda: _encode_audio(parts, driving, request, progress))

    # a network is let go of where the function that used it returns, before the next one is loaded
    frame = frames.get(request.shape)
    latents = run("transformer", lambda: _sample(parts, request, text, negative, frame, given, progress))
    if request.large is not None:
        base, frame = latents, frames.get(final)
        latents = run("super_resolution", lambda: _enlarge(parts, request, base, text, frame, progress))
    return FilmLatents(latents, final, sound)


def with_sound(parts: Parts, film: FilmLatents, progress: Progress, notice: Notice) -> FilmLatents:
    """The film with its sound decoded, unless it carries a given one."""
    sound = with_steps_down(parts, "audio_vae", lambda: _sound_of(parts, film, progress), notice)
    return replace(film, sound=sound)


def with_steps_down(parts: Parts, role: str, stage: Callable[[], T], notice: Notice) -> T:
    """What a stage returns; where memory runs out it is begun anew with the next placement of its part.

    A stage draws its noise anew, so that its result is the same. Raises MemoryError where no placement is
    left.
    """
    while True:
        try:
            return stage()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found, placement = (str(error).splitlines() or ["no memory"])[0], parts.step_down(role)
            name = role.replace("_", " ")
            if placement is None:
                raise MemoryError(f"out of memory ({found}) in the stage {name!r}; {LESS}") from error
        # after the handler, as the error holds on to the tensors of the stage
        notice(f"out of memory ({found}) in the stage {name!r}: once more, {parts.steps_down[-1]}")


def write_film(
    parts: Parts,
    film: FilmLatents,
    out: Path,
    metadata: Mapping[str, str],
    progress: Progress,
    upscale: tuple[int, int, str] | None = None,
) -> None:
    """Decode a film and write it to `out`, frame by frame; nothing is left behind if that fails.

    `upscale` is the (width, height, mode) of a plain resizing of the frames.
    """
    width, height = (upscale or (film.shape.width, film.shape.height))[:2]
    total, done = film.shape.pixel_frames, 0
    with FilmWriter(out, width, height, FPS, metadata) as writer:
        writer.add_audio(_sound_of(parts, film, progress))
        progress("decoding", 0, total)
        tiles = parts.placement("video_decoder").tiles
        with parts.use("video_decoder") as (decoder, _):
            for chunk in decoder.decode_chunks(film.latents.video, *([tiles] if tiles else [])):
                check_finite({"pixel": chunk}, "decoding the picture", CURE)
                frames = frames_to_uint8(chunk)
                writer.add_frames(upscale_frames(frames, *upscale) if upscale else frames)
                done += len(frames)
                progress("decoding", done, total)


def _read_driving_audio(request: FilmRequest, notice: Notice) -> Tensor:
    """The given sound as [1, N] at 51200 Hz, as long as the film."""
    waveform = read_audio(request.audio, ENCODE_RATE, 1, READ_SECONDS)
    return driving_audio(waveform, request.shape, str(request.audio), notice)


def driving_audio(waveform: Tensor, shape: FilmShape, name: str, notice: Notice) -> Tensor:
    """A sound [1, N] at 51200 Hz cut or padded to the film, saying so of the one called `name`."""
    samples = shape.audio_latents * ENCODE_RATE // FPS
    # a film has latents of sound for a few frames after its last picture: what fits there is not called long
    missing = shape.seconds - waveform.shape[1] / ENCODE_RATE
    if waveform.shape[1] > samples + ENCODE_RATE // FPS:
        notice(f"{name} is longer than the film ({shape.seconds:.2f} s): the rest is left out")
    elif missing > 1 / FPS:
        notice(f"{name} ends {missing:.2f} s before the film does: the end is silent")
    return _fit(waveform, samples)


def _film_sound(request: FilmRequest) -> Tensor:
    return film_sound(read_audio(request.audio, FILM_RATE, 2, READ_SECONDS), request.shape)


def film_sound(waveform: Tensor, shape: FilmShape) -> Tensor:
    """A sound [..., N] at 44100 Hz cut or padded with silence to the pictures of the film."""
    return _fit(waveform, _film_samples(shape))


def _film_samples(shape: FilmShape) -> int:
    return round(shape.seconds * FILM_RATE)


def _fit(waveform: Tensor, samples: int) -> Tensor:
    """Cut [..., N] to `samples`, or pad it with silence."""
    return torch.nn.functional.pad(waveform[..., :samples], (0, max(0, samples - waveform.shape[-1])))


def _encode_texts(
    parts: Parts, request: FilmRequest, progress: Progress, notice: Notice
) -> tuple[Tensor, Tensor | None]:
    guided = RECIPES[parts.checkpoints["transformer"].variant].guided
    prompts = {"prompt": request.prompt} | ({"negative prompt": request.negative} if guided else {})
    tokenizer = load_tokenizer(parts.checkpoints["text_encoder"])
    encoded: dict[str, TextStates] = {}
    progress("text", 0, len(prompts))
    with parts.use("text_encoder") as (encoder, run_block):
        for name, prompt in prompts.items():
            encoded[name] = encode_prompt(encoder, tokenizer, prompt, run_block=run_block)
            progress("text", len(encoded), len(prompts))
    for name, states in encoded.items():
        if states.cut_text:
            kept = states.states.shape[1]
            notice(f"the {name} has {states.num_tokens} tokens, {kept} are used; cut: {states.cut_text!r}")
    texts = [states.states for states in encoded.values()]
    return texts[0], texts[1] if guided else None


def _encode_first_frames(
    parts: Parts, image: Image, shapes: set[FilmShape], progress: Progress
) -> dict[FilmShape, Tensor]:
    frames = {}
    progress("image", 0, len(shapes))
    with parts.use("video_vae") as (vae, _):
        for shape in shapes:
            pixels = prepare_image(image, shape.width, shape.height).unsqueeze(2)
            frames[shape] = vae.encode(pixels.to(parts.device))
            check_finite({"image": frames[shape]}, "encoding the image", CURE)
            progress("image", len(frames), len(shapes))
    return frames


def _encode_audio(parts: Parts, waveform: Tensor, request: FilmRequest, progress: Progress) -> Tensor:
    progress("audio", 0, 1)
    generator = FilmNoise(request.seed).audio_encoding() if request.sample_audio else None
    with parts.use("audio_vae") as (vae, _):
        latents = encode_driving_audio(vae, waveform.to(parts.device), generator=generator)
    check_finite({"audio": latents}, "encoding the audio", CURE)
    progress("audio", 1, 1)
    return latents


def _empty(parts: Parts, shape: FilmShape) -> Latents:
    """Latents of a film's shapes, on the device."""
    config = parts.checkpoints["transformer"].config
    video = (1, config.latent_channels, shape.latent_frames, shape.latent_rows, shape.latent_columns)
    audio = (1, shape.audio_latents, config.audio_in_channels)
    return Latents(torch.empty(video, device=parts.device), torch.empty(audio, device=parts.device))


def _sample(
    parts: Parts,
    request: FilmRequest,
    text: Tensor,
    negative: Tensor | None,
    frame: Tensor | None,
    audio: Tensor | None,
    progress: Progress,
) -> Latents:
    """The base stage. The two-pass model holds a given sound in either mode, as published."""
    recipe = RECIPES[parts.checkpoints["transformer"].variant]
    noise = FilmNoise(request.seed)
    held = audio if request.audio_mode == "hold" or recipe.guided else None
    start = noise.initial(_empty(parts, request.shape))
    if audio is not None and held is None:
        start = start._replace(audio=audio)
    steps = request.steps or recipe.steps
    progress("sampling", 0, steps)
    with parts.use("transformer") as (transformer, run_block):
        return _kept(sample_base(
            network_of(transformer, run_block), start, text, negative=negative, few_step=recipe.few_step,
            steps=steps, noise_fn=noise.step, conditions=Conditions(frame, held),
            callback=_step_callback("sampling", steps, progress),
        ), frame)  # fmt: skip


def _enlarge(
    parts: Parts,
    request: FilmRequest,
    base: Latents,
    text: Tensor,
    frame: Tensor | None,
    progress: Progress,
) -> Latents:
    """The super-resolution stage."""
    steps = RECIPES[parts.checkpoints["super_resolution"].variant].steps
    progress("super-resolution", 0, steps)
    noise = FilmNoise(request.seed).super_resolution(_empty(parts, request.large))
    with parts.use("super_resolution") as (transformer, run_block):
        return _kept(sample_super_resolution(
            network_of(transformer, run_block), base, noise, text,
            negative=None, steps=steps, first_frame=frame,
            callback=_step_callback("super-resolution", steps, progress),
        ), frame)  # fmt: skip


def _kept(latents: Latents, frame: Tensor | None) -> Latents:
    """Latents as ComfyUI keeps them between nodes, raw, and normalised again, but for a given first frame.

    With the roundings of both, the film of a graph and that of the command line are equal to the last bit.
    """
    video = normalize_latents(denormalize_latents(latents.video))
    return Conditions(frame).apply(latents._replace(video=video))


def _step_callback(stage: str, steps: int, progress: Progress) -> StepCallback:
    def after_step(index: int, latents: Latents, denoised: Latents) -> None:  # noqa: ARG001
        check_finite(latents._asdict(), f"{stage}, step {index + 1} of {steps}", CURE)
        progress(stage, index + 1, steps)

    return after_step


def _sound_of(parts: Parts, film: FilmLatents, progress: Progress) -> Tensor:
    """The film's sound [2, N] at 44100 Hz, exactly as long as its pictures."""
    if film.sound is None:
        with parts.use("audio_vae") as (vae, _):
            waveform = to_film_rate(vae.decode(film.latents.audio)[0].cpu())
    else:
        waveform = film.sound
    check_finite({"sound": waveform}, "decoding the sound", CURE)
    progress("sound", 1, 1)
    return film_sound(waveform, film.shape)
