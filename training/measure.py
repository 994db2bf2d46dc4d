"""The pony measured: by each of its variants, in fewer steps, with quantised weights, enlarged.

Every figure stands beside its ceiling: the same figure of true films that went through the video and audio
VAE.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ..media import FilmWriter, frames_to_uint8, upscale_frames
from ..model import catalog
from ..model.audio_vae import AudioVAE, to_film_rate
from ..model.checkpoint import load_tokenizer
from ..model.config import PONY
from ..model.convert import convert, suffix_of
from ..model.geometry import FPS, FilmShape
from ..model.lora import Strengths, patches
from ..model.lora_formats import open_lora
from ..model.packing import Latents
from ..model.prompt import encode_prompt
from ..model.video_vae import VideoVAE
from ..sampler.noise import FilmNoise
from ..sampler.parts import Parts, default_vae_dtype, needed_parts, open_part
from ..sampler.pipeline import FilmRequest, film_sound, generate, with_sound, write_film
from ..sampler.stages import RECIPES, network_of, sample_super_resolution
from .data.clip import SIZE, make_clip
from .data.judge import judge_bounce, sync_f1
from .data.pool import to_video
from .data.sound import SAMPLE_RATE
from .data.world import Head, body, caption, heads_in_hats, held_out
from .evaluate import (
    COUNT,
    JUDGES,
    MODES,
    SHUFFLED,
    Figures,
    MakeFilm,
    Prompt,
    evaluate,
    film_path,
    film_psnr,
    judge_films,
    make_prompts,
    prompts_for,
)
from .files import write_whole
from .report import NETWORKS, contact_sheet, write_report, write_summary

SHOWN = 3  # prompts of each world on the contact sheet
LORA_FILMS = 50  # of a new thing
NEW_THING = "new thing"  # in the place of a mode
OF_IMAGES = ("kept", "first frame PSNR")  # figures that only films of a given image have
OF_SOUNDS = ("pitch", "voice", "pauses", "sync", "mouth")
ENLARGED = 20  # films of each world that super-resolution is measured by
QUANTIZED = ("transformer", "text_encoder")  # roles that weights in fewer bits are for


@dataclass(frozen=True)
class Way:
    """A way of making films: `steps` None is the variant's own number, `modes` are those of `evaluate`."""

    variant: str = "distill"
    steps: int | None = None
    weights: str | None = None
    modes: tuple[str, ...] = ("text",)
    decoder: str = "turbo"


WAYS = {
    "distill": Way(modes=MODES),
    "distill, Wan2.2 decoder": Way(modes=MODES, decoder="wan"),
    "base": Way("base"),
    "4 steps": Way(steps=4),
    "2 steps": Way(steps=2),
    "fp8": Way(weights="fp8"),
    "Q8_0": Way(weights="q8_0"),
    "Q4_0": Way(weights="q4_0"),
}


def measure_all(
    models: Path,
    folder: Path,
    device: torch.device,
    lora: Path,
    lora_clips: int,
    count: int = COUNT,
    size: tuple[int, int] = SIZE,
) -> None:
    """Measure a folder of models in all ways, and a LoRA of hats, made from the first `lora_clips`.

    Each way has a folder of its own in `folder`; "summary" as .json and .md has the figures of all, which are
    not measured again.
    """
    parts, changed, enlarging = (
        open_models(models, "distill", device, **more) for more in ({}, {"lora": lora}, {"sr": "540p"})
    )
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.json"
    found: dict[str, Figures] = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}

    def once(name: str, what: Callable[[], Figures], unless: str | None = None) -> None:
        if name not in found or (unless and unless not in found[name]):
            found.setdefault(name, {}).update(what())
            write_summary(summary, found)

    ceilings = {"turbo": "ceiling", "wan": "ceiling, Wan2.2 decoder"}
    with (
        parts.use("video_vae") as (vae, _),
        parts.use("audio_vae") as (audio_vae, _),
        parts.use("video_decoder") as (fast, _),
    ):
        for kind, name in ceilings.items():
            decoder = fast if kind == "turbo" else None
            once(name, partial(ceiling, vae, audio_vae, folder / name, count, size, decoder))
    for name, way in {**WAYS, "LoRA": Way()}.items():
        limits, given = found[ceilings[way.decoder]], lora if name == "LoRA" else None
        once(name, partial(measure, models, way, folder / name, device, count, size, limits, given))
    wanted = heads_in_hats()[lora_clips:][:LORA_FILMS]
    for name, used in (("LoRA", changed), ("distill", parts)):
        once(name, partial(_new_thing, used, wanted, folder / name, size), unless=NEW_THING)
    once(
        "super-resolution",
        lambda: {"large": super_resolution_gain(enlarging, min(count, ENLARGED), size)},
    )


def _new_thing(parts: Parts, wanted: Sequence[Head], folder: Path, size: tuple[int, int]) -> Figures:
    prompts = prompts_for(wanted, "head", folder, size)
    return {NEW_THING: {"head": judge_films(films_by(parts), prompts, "head", NEW_THING, folder)}}


def measure(
    models: Path,
    way: Way,
    out: Path,
    device: torch.device,
    count: int = COUNT,
    size: tuple[int, int] = SIZE,
    ceilings: Figures | None = None,
    lora: Path | None = None,
) -> Figures:
    """Measure a way of making films by a folder of models; films, report and contact sheet go to `out`."""
    converted = convert_parts(models, way, out / "weights")
    parts = open_models(models, way.variant, device, way.decoder, converted, lora)
    make_film = films_by(parts, way.steps)
    out.mkdir(parents=True, exist_ok=True)
    make_film(make_prompts("bounce", "text", out, 1, size)[0], out / "first.mp4")  # loads the networks
    figures = evaluate(make_film, out / "films", count, way.modes, size)
    write_report(out / "figures.json", figures, ceilings)
    shown = {}
    for world in JUDGES:
        for seed, attributes in enumerate(held_out(world, count)[:SHOWN]):
            words = body(attributes).partition(":")[0]  # not what is said: its letters may be in no font
            shown |= {
                f"{words} (given: {mode})": film_path(out / "films", mode, world, seed) for mode in way.modes
            }
    sheet = contact_sheet(shown)
    write_whole(out / "films.png", lambda path: sheet.save(path, "png"), "another folder")
    return figures


def convert_parts(models: Path, way: Way, folder: Path) -> dict[str, Path]:
    """Files by role of those networks that a way wants in another format."""
    if way.weights is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    names = needed_parts(way.variant, None, "turbo", image=False)
    files = {}
    for role in QUANTIZED:
        source = open_part(names[role], catalog.find(names[role], models))
        files[role] = folder / f"{role}{suffix_of(way.weights)}"
        convert(source, files[role], way.weights, "happyhorse train pony")
    return files


def open_models(
    folder: Path,
    variant: str,
    device: torch.device,
    decoder: str = "turbo",
    converted: Mapping[str, Path] = MappingProxyType({}),
    lora: Path | None = None,
    sr: str | None = None,
) -> Parts:
    """The networks of films by 'base' or 'distill' in a folder of models, kept loaded from film to film.

    `converted` are files to take in their place, by role.
    """
    names = needed_parts(variant, sr, decoder, image=True)
    checkpoints = {
        role: open_part(name, converted.get(role) or catalog.find(name, folder))
        for role, name in names.items()
    }
    changes = {}
    if lora:
        transformer = checkpoints["transformer"]
        shapes = {name: transformer.shape(name) for name in transformer.names}
        changes = patches([(open_lora(lora), Strengths())], transformer.config, shapes)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Parts(checkpoints, device, "none", dtype, default_vae_dtype(dtype, device), patches=changes)


class SamplingClock:
    """Takes the time of sampling, as the progress of a film; on a CPU that of the processor."""

    started = seconds = 0.0

    def __init__(self, device: torch.device) -> None:
        self.now = time.process_time if device.type == "cpu" else time.perf_counter

    def __call__(self, stage: str, done: int, total: int) -> None:  # noqa: ARG002
        if stage == "sampling" and not done:
            self.started = self.now()
        elif stage == "sampling":
            self.seconds = self.now() - self.started


def films_by(parts: Parts, steps: int | None = None) -> MakeFilm:
    """Make films with these networks; `steps` None is the variant's own number."""

    def quiet(*_: object) -> None: ...

    @torch.inference_mode()
    def make_film(prompt: Prompt, path: Path) -> dict[str, float]:
        request = FilmRequest(
            prompt.text, PONY.negative_prompt, prompt.shape, seed=prompt.seed, steps=steps,
            image=prompt.image, audio=prompt.audio,
        )  # fmt: skip
        clock = SamplingClock(parts.device)
        film = with_sound(parts, generate(parts, request, clock, quiet), quiet, quiet)
        write_film(parts, film, path, {}, quiet)
        return {"seconds of sampling": clock.seconds}

    return make_film


def write_render(prompt: Prompt, path: Path) -> None:
    """Make the true film."""
    clip = prompt.render()
    _write(path, torch.from_numpy(clip.frames), torch.from_numpy(clip.sound), prompt.shape)


def ceiling(
    vae: VideoVAE,
    audio_vae: AudioVAE,
    folder: Path,
    count: int = COUNT,
    size: tuple[int, int] = SIZE,
    decoder: nn.Module | None = None,
) -> Figures:
    """The figures of true films that were encoded and decoded, `decoder` None being the VAE's own.

    A mode has those that mean something in it: a given sound stays as it is. Beside them, as mode "networks",
    is how near the decoded films are: the mean PSNR in dB, that of the frame number that is worst, and for
    sounds of bounces the F1 of their "onsets" and the true ones.
    """
    ratios: list[list[float]] = []
    onsets: list[float] = []

    @torch.inference_mode()
    def make_film(prompt: Prompt, path: Path) -> None:
        clip, device = prompt.render(), next(vae.parameters()).device
        decoded = (decoder or vae).decode(vae.encode(to_video(clip.frames).to(device)))
        frames = frames_to_uint8(decoded.float()).cpu()
        device = next(audio_vae.parameters()).device
        sound = audio_vae.decode(audio_vae.encode(torch.from_numpy(clip.sound)[None].to(device)))[0]
        sound = sound.float().cpu()
        ratios.append(film_psnr(frames.numpy(), clip.frames))
        if clip.onsets:
            heard = judge_bounce(clip.frames, sound.numpy(), SAMPLE_RATE).onsets
            onsets.append(sync_f1(clip.onsets, heard))
        _write(path, frames, sound, prompt.shape)

    figures = evaluate(make_film, folder, count, ["image"], size)
    for mode, left_out in (("text", OF_IMAGES), ("audio", (*OF_IMAGES, *OF_SOUNDS))):
        figures[mode] = {
            world: {
                name: value for name, value in found.items() if name.removesuffix(SHUFFLED) not in left_out
            }
            for world, found in figures["image"].items()
        }
    by_frame = np.mean(ratios, axis=0)
    near = {
        "PSNR": float(by_frame.mean()),
        "worst frame": float(by_frame.min()),
        "onsets": float(np.mean(onsets)),
    }
    return figures | {NETWORKS: {"both": near}}


def _write(path: Path, frames: Tensor, sound: Tensor, shape: FilmShape) -> None:
    """Write uint8 frames [F, H, W, 3] with a sound [2, N] at 51200 Hz."""
    with FilmWriter(path, shape.width, shape.height, FPS) as film:
        film.add_audio(film_sound(to_film_rate(sound), shape))
        film.add_frames(frames)


@torch.inference_mode()
def super_resolution_gain(
    parts: Parts, count: int = ENLARGED, size: tuple[int, int] = SIZE
) -> dict[str, dict[str, float]]:
    """How near films that were made twice as large are to true films of that size: mean PSNR in dB, by world.

    True films are encoded, and their latents lifted by "super-resolution", or decoded and resized
    ("bicubic"); "bicubic, true film" resizes what was never encoded. "ceiling" is of large films that went
    through the VAE.
    """
    device = parts.device
    tokenizer = load_tokenizer(parts.checkpoints["text_encoder"])
    width, height = 2 * size[0], 2 * size[1]
    found: dict[str, dict[str, float]] = {}
    for world in JUDGES:
        rows = []
        for seed, attributes in enumerate(held_out(world, count)):
            small, large = make_clip(attributes, seed, size), make_clip(attributes, seed, (width, height))
            with parts.use("text_encoder") as (encoder, _):
                text = encode_prompt(encoder, tokenizer, caption(attributes)).states
            with parts.use("video_vae") as (vae, _), parts.use("audio_vae") as (audio_vae, _):
                video, whole = (vae.encode(to_video(clip.frames).to(device)) for clip in (small, large))
                sound = audio_vae.encode(torch.from_numpy(small.sound)[None].to(device))
            noise = FilmNoise(seed).super_resolution(Latents(whole, sound))  # of their shapes
            with parts.use("super_resolution") as (transformer, _):
                lifted = sample_super_resolution(
                    network_of(transformer), Latents(video, sound), noise, text, negative=None,
                    steps=RECIPES["540p_sr"].steps, first_frame=None,
                )  # fmt: skip
            with parts.use("video_decoder") as (decoder, _):
                decoded = [frames_to_uint8(decoder.decode(part)) for part in (lifted.video, video, whole)]
            resized = (
                upscale_frames(film, width, height, "bicubic")
                for film in (decoded[1], torch.from_numpy(small.frames))
            )
            films = {
                "super-resolution": decoded[0],
                **dict(zip(("bicubic", "bicubic, true film"), resized, strict=True)),
                "ceiling": decoded[2],
            }
            ratios = {name: film_psnr(film.cpu().numpy(), large.frames) for name, film in films.items()}
            rows.append({name: np.mean(values) for name, values in ratios.items()})
        found[world] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found
