"""How well films show and sound what was asked for: held-out prompts, made, decoded from their mp4, judged.

Every figure stands beside its chance, and beside its ceiling: the same figure of true renders that went
through the video and audio VAE. Figures are kept as `figures[mode][world][name]`.
"""

import json
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import permutations
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from ..media import FilmWriter, frames_to_uint8, read_audio
from ..model import catalog
from ..model.audio_vae import AudioVAE, to_film_rate
from ..model.config import PONY
from ..model.geometry import FILM_RATE, FPS, FilmShape
from ..model.video_vae import VideoVAE
from ..sampler.parts import Parts, default_vae_dtype, needed_parts, open_part
from ..sampler.pipeline import FilmRequest, film_sound, generate, with_sound, write_film
from .data.clip import SIZE, Clip, make_clip
from .data.judge import (
    BounceVerdict,
    HeadVerdict,
    compare,
    judge_bounce,
    judge_head,
    mouth_correlation,
    sync_f1,
)
from .data.sound import NOTES, SAMPLE_RATE, VOICES
from .data.world import (
    BACKGROUNDS,
    COLORS,
    HAIR,
    SHAPES,
    SHIRTS,
    SPEEDS,
    Attributes,
    caption,
    held_out,
)

COUNT = 60  # prompts per world
MODES = ("text", "audio", "image")  # what is given: the prompt alone, or the sound or the first frame too
SECONDS = 2.0
SHOWN = 3  # prompts of each world on the contact sheet
LAST_FRAMES = 5  # in which a given image must still be recognised
JUDGES = {"bounce": judge_bounce, "head": judge_head}
LOOKS = {"bounce": ("shape", "colour", "background"), "head": ("hair", "shirt", "background")}
CHANCE = {
    "shape": 1 / len(SHAPES), "colour": 1 / len(COLORS), "background": 1 / len(BACKGROUNDS),
    "hair": 1 / len(HAIR), "shirt": 1 / len(SHIRTS), "speed": 1 / len(SPEEDS),
    "pitch": 1 / len(NOTES), "voice": 1 / len(VOICES),
}  # fmt: skip
SHUFFLED = " with another film's sound"  # ends the names of figures that are the chance of others

Verdict = BounceVerdict | HeadVerdict
Figures = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Prompt:
    """What a film is asked for. Attributes and seed are those of the render that it is compared with."""

    attributes: Attributes
    text: str
    seed: int
    image: Path | None = None
    audio: Path | None = None
    size: tuple[int, int] = SIZE  # (width, height)

    @property
    def shape(self) -> FilmShape:
        """The shape of the film asked for."""
        return FilmShape.from_seconds(*self.size, SECONDS)

    def render(self) -> Clip:
        """The true film; its first frame and its sound are the given image and audio."""
        shape = self.shape
        return make_clip(self.attributes, self.seed, self.size, shape.pixel_frames, shape.audio_latents)


MakeFilm = Callable[[Prompt, Path], object]  # writes the film of a prompt to an mp4


def make_prompts(
    world: str, mode: str, folder: Path, count: int = COUNT, size: tuple[int, int] = SIZE
) -> list[Prompt]:
    """The held-out prompts of a world, always the same; given images and sounds are written to `folder`."""
    if mode not in MODES:
        raise ValueError(f"the mode must be one of {', '.join(MODES)}, got {mode!r}")
    prompts = []
    for seed, attributes in enumerate(held_out(world, count)):
        name = f"{world}-{seed:03}"
        image = folder / f"{name}.png" if mode == "image" else None
        audio = folder / f"{name}.wav" if mode == "audio" else None
        prompt = Prompt(attributes, caption(attributes), seed, image, audio, size)
        if image:
            Image.fromarray(prompt.render().frames[0]).save(image)
        if audio:
            _write_wave(audio, prompt.render().sound)
        prompts.append(prompt)
    return prompts


def evaluate(
    make_film: MakeFilm,
    folder: Path,
    count: int = COUNT,
    modes: Sequence[str] = MODES,
    size: tuple[int, int] = SIZE,
) -> Figures:
    """Make the films of `count` held-out prompts of each world and mode in `folder`, and judge them.

    Attributes are shares of films that show them. "sync" is a mean F1, "mouth" a median correlation, and both
    are also measured with the sounds of all other films. "kept" is the share of what is seen in an image that
    still is at the end, "first frame PSNR" is in dB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: Figures = {}
    for mode in modes:
        for world in JUDGES:
            rows, verdicts = [], []
            prompts = make_prompts(world, mode, folder, count, size)
            for prompt in tqdm(prompts, f"{mode}, {world}", unit="film"):
                path = film_path(folder, mode, world, prompt.seed)
                make_film(prompt, path)
                row, verdict = _judge(prompt, world, path)
                rows.append(row)
                verdicts.append(verdict)
            means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
            figures.setdefault(mode, {})[world] = means | _agreement(verdicts)
    return figures


def film_path(folder: Path, mode: str, world: str, seed: int) -> Path:
    """Where `evaluate` has the film of a prompt."""
    return folder / f"{mode}-{world}-{seed:03}.mp4"


def _judge(prompt: Prompt, world: str, path: Path) -> tuple[dict[str, float], Verdict]:
    frames, sound = read_film(path)
    verdict = JUDGES[world](frames, sound, FILM_RATE)
    row = compare(prompt.attributes, verdict)
    row = {name.replace("_", " "): row[name] for name in row if name not in ("sync_f1", "mouth_correlation")}
    if prompt.image:
        end = compare(prompt.attributes, JUDGES[world](frames[-LAST_FRAMES:], sound, FILM_RATE))
        row["kept"] = float(np.mean([end[name] for name in LOOKS[world]]))
        row["first frame PSNR"] = psnr(frames[:1], prompt.render().frames[:1])
    return row, verdict


def _agreement(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """How picture and sound agree, and how the pictures agree with the sounds of all other films."""
    others = list(permutations(verdicts, 2))
    if isinstance(verdicts[0], BounceVerdict):
        shuffled = [sync_f1(seen.bounces, heard.onsets) for seen, heard in others]
        own = float(np.mean([verdict.sync_f1 for verdict in verdicts]))
        return {"sync": own, "sync" + SHUFFLED: float(np.mean(shuffled)) if others else 0.0}
    shuffled = [mouth_correlation(seen.opening, heard.loudness) for seen, heard in others]
    own = float(np.median([verdict.mouth_correlation for verdict in verdicts]))
    return {"mouth": own, "mouth" + SHUFFLED: float(np.median(shuffled)) if others else 0.0}


def psnr(frames: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB, at most 100."""
    error = np.square(frames.astype(np.float64) - true).mean() / 255**2
    return float(-10 * np.log10(max(error, 1e-10)))


def read_film(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The frames [F, H, W, 3] uint8 of a film, and its sound [2, N] at 44100 Hz."""
    sound = read_audio(path, FILM_RATE, 2).numpy()
    with av.open(f"file:{path}") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), sound


# Ways of making films


def open_models(folder: Path, variant: str, device: torch.device, decoder: str = "turbo") -> Parts:
    """The networks of films by 'base' or 'distill' in a folder of models, kept loaded from film to film."""
    names = needed_parts(variant, None, decoder, image=True)
    checkpoints = {role: open_part(name, catalog.find(name, folder)) for role, name in names.items()}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Parts(checkpoints, device, "none", dtype, default_vae_dtype(dtype, device))


def films_by(parts: Parts, steps: int | None = None) -> MakeFilm:
    """Make films with these networks; `steps` None is the variant's own number."""

    def quiet(*_: object) -> None: ...

    @torch.inference_mode()
    def make_film(prompt: Prompt, path: Path) -> None:
        request = FilmRequest(
            prompt.text, PONY.negative_prompt, prompt.shape, seed=prompt.seed, steps=steps,
            image=prompt.image, audio=prompt.audio,
        )  # fmt: skip
        film = with_sound(parts, generate(parts, request, quiet, quiet), quiet, quiet)
        write_film(parts, film, path, {}, quiet)

    return make_film


def measure(
    models: Path,
    variant: str,
    out: Path,
    device: torch.device,
    count: int = COUNT,
    size: tuple[int, int] = SIZE,
    ceilings: Figures | None = None,
) -> tuple[Figures, Figures]:
    """Measure a folder of models, and write films, report and contact sheet to `out`.

    Returns figures and ceilings; those of another run with the same VAEs may be given.
    """
    parts = open_models(models, variant, device)
    if ceilings is None:
        with (
            parts.use("video_vae") as (vae, _),
            parts.use("audio_vae") as (audio_vae, _),
            parts.use("video_decoder") as (decoder, _),
        ):
            ceilings = ceiling(vae, audio_vae, out / "ceiling", count, size, decoder)
    figures = evaluate(films_by(parts), out / "films", count, size=size)
    write_report(out / "figures.json", figures, ceilings)
    shown = {}
    for world in JUDGES:
        for seed, attributes in enumerate(held_out(world, count)[:SHOWN]):
            words = " ".join(astuple(attributes))
            shown |= {
                f"{words} (given: {mode})": film_path(out / "films", mode, world, seed) for mode in MODES
            }
    contact_sheet(shown).save(out / "films.png")
    return figures, ceilings


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

    They are the same for all modes. Beside them, as mode "networks", is how near the decoded frames are: the
    mean PSNR in dB, and that of the frame number that is worst.
    """
    ratios: list[list[float]] = []

    @torch.inference_mode()
    def make_film(prompt: Prompt, path: Path) -> None:
        clip, device = prompt.render(), next(vae.parameters()).device
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].to(device) / 127.5 - 1
        decoded = (decoder or vae).decode(vae.encode(video))
        frames = frames_to_uint8(decoded.float()).cpu()
        device = next(audio_vae.parameters()).device
        sound = audio_vae.decode(audio_vae.encode(torch.from_numpy(clip.sound)[None].to(device)))[0]
        ratios.append([psnr(frame, true) for frame, true in zip(frames.numpy(), clip.frames, strict=True)])
        _write(path, frames, sound.float().cpu(), prompt.shape)

    figures = dict.fromkeys(MODES, evaluate(make_film, folder, count, ["image"], size)["image"])
    by_frame = np.mean(ratios, axis=0)
    near = {"PSNR": float(by_frame.mean()), "worst frame": float(by_frame.min())}
    return figures | {"networks": {"both": near}}


def _write(path: Path, frames: Tensor, sound: Tensor, shape: FilmShape) -> None:
    """Write uint8 frames [F, H, W, 3] with a sound [2, N] at 51200 Hz."""
    with FilmWriter(path, shape.width, shape.height, FPS) as film:
        film.add_audio(film_sound(to_film_rate(sound), shape))
        film.add_frames(frames)


def _write_wave(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((sound.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


# Reports


def table(figures: Figures, ceilings: Figures | None = None) -> str:
    """A Markdown table of all figures, their ceilings and chances."""
    rows = ["| given | world | figure | value | ceiling | chance |", "|---|---|---|---|---|---|"]
    for mode, worlds in figures.items():
        for world, found in worlds.items():
            limits = (ceilings or {}).get(mode, {}).get(world, {})
            for name, value in found.items():
                if not name.endswith(SHUFFLED):
                    texts = [
                        _number(number) for number in (value, limits.get(name), chance(found, world, name))
                    ]
                    rows.append(f"| {' | '.join([mode, world, name, *texts])} |")
    return "\n".join(rows) + "\n"


def chance(found: Mapping[str, float], world: str, name: str) -> float | None:
    """What a film that does not listen to its prompt gets for a figure; None where that means nothing."""
    if name == "kept":
        return float(np.mean([CHANCE[look] for look in LOOKS[world]]))
    return found.get(name + SHUFFLED, CHANCE.get(name))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) > 2 else f"{value:.2f}"


def write_report(path: Path, figures: Figures, ceilings: Figures | None = None) -> None:
    """Write figures and ceilings to `path`, a .json, and as a table beside it to a .md."""
    texts = {
        path.with_suffix(".json"): json.dumps({"figures": figures, "ceilings": ceilings}, indent=1) + "\n",
        path.with_suffix(".md"): table(figures, ceilings),
    }
    for name, text in texts.items():
        temporary = name.with_name(f".{name.name}.part")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(name)
        finally:
            temporary.unlink(missing_ok=True)


def contact_sheet(films: Mapping[str, Path], columns: int = 8, height: int = 96) -> Image.Image:
    """A row for each film under its title: frames from first to last, waveform over spectrogram."""
    rows = [_film_row(title, *read_film(path), columns, height) for title, path in films.items()]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _film_row(title: str, frames: np.ndarray, sound: np.ndarray, columns: int, height: int) -> Image.Image:
    width = round(height * frames.shape[2] / frames.shape[1])
    sound_width, margin, line = 2 * height, 4, 14
    row = Image.new("RGB", (columns * width + margin + sound_width, line + height + margin), "white")
    draw = ImageDraw.Draw(row)
    draw.text((2, 1), title, "black", ImageFont.load_default(11))
    shown = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    for column, frame in enumerate(shown):
        row.paste(Image.fromarray(frames[frame]).resize((width, height)), (column * width, line))
    left, half = columns * width + margin, height // 2
    mono = sound.mean(axis=0)
    blocks = np.array_split(mono, sound_width)
    for x, block in enumerate(blocks):
        low, high = (line + half / 2 * (1 - float(edge)) for edge in (block.max(), block.min()))
        draw.line((left + x, low, left + x, high), (40, 90, 160))
    row.paste(_spectrogram(mono).resize((sound_width, height - half)), (left, line + half))
    return row


def _spectrogram(mono: np.ndarray, window: int = 2048, top: int = 3000) -> Image.Image:
    """Levels from -70 to 0 dB up to `top` Hz, low at the bottom, loud is dark."""
    mono = np.pad(mono, (0, max(0, window - len(mono))))
    pieces = np.lib.stride_tricks.sliding_window_view(mono, window)[:: window // 4] * np.hanning(window)
    levels = np.abs(np.fft.rfft(pieces))[:, : top * window // FILM_RATE].T[::-1] * 4 / window
    decibels = 20 * np.log10(levels + 1e-6)
    return Image.fromarray((-decibels / 70 * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
