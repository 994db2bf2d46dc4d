"""How well films show and sound what was asked for: held-out prompts, made, decoded from their mp4, judged.

Figures are kept as `figures[mode][world][name]`. Chance is a figure of films that do not listen to their
prompts; that of how picture and sound agree is measured, with the sounds of other films.
"""

import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..media import read_audio
from ..model.geometry import FILM_RATE, FilmShape
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


# writes the film of a prompt to an mp4, and returns figures of its making, if any
MakeFilm = Callable[[Prompt, Path], Mapping[str, float] | None]


def make_prompts(
    world: str, mode: str, folder: Path, count: int = COUNT, size: tuple[int, int] = SIZE
) -> list[Prompt]:
    """The held-out prompts of a world, always the same; given images and sounds are written to `folder`."""
    if mode not in MODES:
        raise ValueError(f"the mode must be one of {', '.join(MODES)}, got {mode!r}")
    return prompts_for(held_out(world, count), world, folder, size, mode)


def prompts_for(
    wanted: Sequence[Attributes],
    world: str,
    folder: Path,
    size: tuple[int, int] = SIZE,
    mode: str = "text",
) -> list[Prompt]:
    """Prompts for films of these attributes, their seeds being 0 and on."""
    prompts = []
    for seed, attributes in enumerate(wanted):
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

    Attributes are shares of films that show them, "pauses" that of heads who pause. "sync" is a mean F1,
    "mouth" a median correlation, and both are also measured with the sounds of all other films. "kept" is the
    share of what is seen in an image (and named by the prompt) that still is at the end, "first frame PSNR"
    is in dB, "course" the F1 of the bounces and those of the render that the image is from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: Figures = {}
    for mode in modes:
        for world in JUDGES:
            prompts = make_prompts(world, mode, folder, count, size)
            figures.setdefault(mode, {})[world] = judge_films(make_film, prompts, world, mode, folder)
    return figures


def judge_films(
    make_film: MakeFilm, prompts: Sequence[Prompt], world: str, mode: str, folder: Path
) -> dict[str, float]:
    """Make the films of these prompts in `folder` and return their figures, as `evaluate` describes them."""
    rows, verdicts = [], []
    for prompt in tqdm(prompts, f"{mode}, {world}", unit="film"):
        path = film_path(folder, mode, world, prompt.seed)
        making = make_film(prompt, path) or {}
        row, verdict = _judge(prompt, world, path)
        rows.append(row | making)
        verdicts.append(verdict)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | _agreement(verdicts)


def film_path(folder: Path, mode: str, world: str, seed: int) -> Path:
    """Where `evaluate` has the film of a prompt."""
    return folder / f"{mode}-{world}-{seed:03}.mp4"


def _judge(prompt: Prompt, world: str, path: Path) -> tuple[dict[str, float], Verdict]:
    frames, sound = read_film(path)
    verdict = JUDGES[world](frames, sound, FILM_RATE)
    row = compare(prompt.attributes, verdict)
    row = {name.replace("_", " "): row[name] for name in row if name not in ("sync_f1", "mouth_correlation")}
    if isinstance(verdict, HeadVerdict):
        row["pauses"] = float(verdict.pauses)
    if prompt.audio:  # it is the film's sound, whatever the networks do
        row = {name: value for name, value in row.items() if name not in ("pitch", "voice", "pauses")}
    if prompt.image:
        end = compare(prompt.attributes, JUDGES[world](frames[-LAST_FRAMES:], sound, FILM_RATE))
        row["kept"] = float(np.mean([end[name] for name in LOOKS[world]]))
        clip = prompt.render()
        row["first frame PSNR"] = psnr(frames[:1], clip.frames[:1])
        if isinstance(verdict, BounceVerdict):
            row["course"] = sync_f1(verdict.bounces, clip.onsets)
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


def film_psnr(frames: np.ndarray, true: np.ndarray) -> list[float]:
    """The `psnr` of each frame of a film."""
    return [psnr(*pair) for pair in zip(frames, true, strict=True)]


def read_film(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The frames [F, H, W, 3] uint8 of a film, and its sound [2, N] at 44100 Hz."""
    sound = read_audio(path, FILM_RATE, 2).numpy()
    with av.open(f"file:{path}") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), sound


def _write_wave(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((sound.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
