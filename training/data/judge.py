"""A rule-based judge of films about the two worlds: what is seen and heard, and whether the two agree.

It knows the palettes and the geometry of the renderer, and nothing of what a film was asked to show; it
learns nothing. Its words are those of `world`, and "none" where a film has nothing to judge. Coordinates are
those of `render`, so any picture size will do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby, pairwise

import numpy as np

from ...model.geometry import FPS
from .clip import PERIODS, SYLLABLES
from .render import (
    CROWN,
    FLOOR,
    HAT_COLOR,
    LIPS,
    MOUTH,
    MOUTH_CENTRE,
    MOUTH_OPEN,
    MOUTH_WIDTH,
    ellipse,
    grid,
    shape_distance,
)
from .sound import NOTES, VOICES
from .world import BACKGROUNDS, COLORS, HAIR, HAT, NEW_SHAPES, NO_HAT, SHAPES, SHIRTS, Attributes, Color

NONE = "none"
TOLERANCE = 2  # frames between a bounce and its note
_COLUMN = 0.32  # half width of the column in which a shape bounces
_CONTRAST = 30  # of 255: less is no shape
_MOVED = 0.1  # shorter sides: less is no bouncing
_SILENCE = 1e-3  # root mean square
_QUIET, _PAUSE = 0.1, 5  # of the loudest frame; frames of a pause, at least
_ABOVE_EYES = {**BACKGROUNDS, **HAIR, HAT: HAT_COLOR}  # what is seen where a hat would be
_VIEW, _VIEW_POINTS = 0.30, 64  # half size and points per side of the window in which shapes are compared


@dataclass(frozen=True)
class BounceVerdict:
    """What a film of a bouncing shape shows; `bounces` and `onsets` are frames."""

    shape: str
    colour: str
    background: str
    speed: str
    pitch: str
    shape_iou: float
    bounces: tuple[int, ...]
    onsets: tuple[int, ...]
    sync_f1: float


@dataclass(frozen=True, eq=False)
class HeadVerdict:
    """What a film of a head shows; `opening` [F] is the mouth's, about 0 to 1, `loudness` [F] the sound's.

    `pauses` says whether the voice is silent for some frames, as it is in a share of the true films.
    """

    hair: str
    shirt: str
    background: str
    voice: str
    speed: str
    hat: str
    pauses: bool
    mouth_correlation: float
    opening: np.ndarray
    loudness: np.ndarray


def judge_bounce(frames: np.ndarray, sound: np.ndarray, sample_rate: int) -> BounceVerdict:
    """Judge frames [F, H, W, 3] uint8 at 25 a second with their sound [channels, N]."""
    _check(frames, sound)
    x, y, pixel = grid((frames.shape[2], frames.shape[1]))
    background = _median(frames, (np.abs(x) > _COLUMN) & (y < FLOOR - 0.1))
    columns, rows = np.abs(x[0]) < _COLUMN, y[:, 0] < FLOOR
    cover, color = _cover(frames[:, rows][:, :, columns], background)
    left, top = x[0, columns][0], y[rows, 0][0]
    centres = _centres(cover, left, top, pixel)
    overlaps = _overlaps(cover, centres - (left, top), pixel)
    shape = max(overlaps, key=lambda name: overlaps[name]) if color is not None else NONE
    heights = -centres[:, 1]
    bounces = _bounces(heights)
    onsets = _onsets(frame_loudness(sound, sample_rate, len(frames)))
    return BounceVerdict(
        shape=shape,
        colour=NONE if color is None else _nearest(color, COLORS),
        background=_nearest(background, BACKGROUNDS),
        speed=_bouncing_speed(heights),
        pitch=_pitch(sound, sample_rate),
        shape_iou=overlaps.get(shape, 0.0),
        bounces=bounces,
        onsets=onsets,
        sync_f1=sync_f1(bounces, onsets),
    )


def judge_head(frames: np.ndarray, sound: np.ndarray, sample_rate: int) -> HeadVerdict:
    """Judge frames [F, H, W, 3] uint8 at 25 a second with their sound [channels, N]."""
    _check(frames, sound)
    x, y, pixel = grid((frames.shape[2], frames.shape[1]))
    hair = (ellipse(x, y + 0.10, 0.26, 0.29) < 0) & (y < -0.19)
    shirt = (ellipse(x, y - 0.56, 0.36, 0.24) < 0) & (y > 0.37) & (y < 0.5)
    crown = (np.abs(x) < CROWN[0] - 0.03) & (y > CROWN[1] + 0.03) & (y < CROWN[2] - 0.03)
    opening = _mouth_opening(frames, x, y, pixel)
    loudness = frame_loudness(sound, sample_rate, len(frames))
    return HeadVerdict(
        hair=_nearest(_median(frames, hair), HAIR),
        shirt=_nearest(_median(frames, shirt), SHIRTS),
        background=_nearest(_median(frames, (np.abs(x) > 0.34) & (y < 0.2)), BACKGROUNDS),
        voice=_voice(sound, sample_rate),
        speed=_speaking_speed(opening),
        hat=HAT if _nearest(_median(frames, crown), _ABOVE_EYES) == HAT else NO_HAT,
        pauses=_longest(loudness < _QUIET * loudness.max()) >= _PAUSE,
        mouth_correlation=mouth_correlation(opening, loudness),
        opening=opening,
        loudness=loudness,
    )


def compare(attributes: Attributes, verdict: BounceVerdict | HeadVerdict) -> dict[str, float]:
    """1 or 0 for each attribute that the judge names, then the verdict's scores."""
    asked = {field.name: getattr(attributes, field.name) for field in fields(attributes)}
    seen = {field.name: getattr(verdict, field.name) for field in fields(verdict)}
    right = {name: float(seen[name] == value) for name, value in asked.items() if name in seen}
    return right | {name: value for name, value in seen.items() if isinstance(value, float)}


def sync_f1(bounces: Sequence[int], onsets: Sequence[int], tolerance: int = TOLERANCE) -> float:
    """F1 of bounces and notes, each matched at most once, in order, within `tolerance` frames."""
    matched, notes = 0, list(onsets)
    for bounce in bounces:
        near = [note for note in notes if abs(note - bounce) <= tolerance]
        if near:
            matched += 1
            notes.remove(near[0])
    total = len(bounces) + len(onsets)
    return 2 * matched / total if total else 0.0


def mouth_correlation(opening: np.ndarray, loudness: np.ndarray) -> float:
    """Pearson's correlation of mouth and sound; 0 where either does not move."""
    if np.ptp(opening) < 0.05 or np.ptp(loudness) < _SILENCE:
        return 0.0
    return float(np.corrcoef(opening, loudness)[0, 1])


def frame_loudness(sound: np.ndarray, sample_rate: int, frames: int) -> np.ndarray:
    """Root mean square [frames] of a sound [channels, N] during each frame; missing sound is silence."""
    mono = sound.mean(axis=0, dtype=np.float64)
    edges = np.arange(frames + 1) * sample_rate // FPS
    mono = np.pad(mono, (0, max(0, edges[-1] - len(mono))))
    return np.sqrt([np.mean(mono[a:b] ** 2) for a, b in pairwise(edges)])


def _longest(marked: np.ndarray) -> int:
    """The length of the longest run of marked frames."""
    return max((len(list(run)) for is_marked, run in groupby(marked) if is_marked), default=0)


def _check(frames: np.ndarray, sound: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        found = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"frames to judge must be uint8 [frames, height, width, 3], got {found}")
    if sound.ndim != 2:
        raise ValueError(f"sound to judge must be [channels, samples], got {list(sound.shape)}")


# Colours


def _median(frames: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The median colour of all frames at the places `where` [H, W]."""
    return np.median(frames[:, where].reshape(-1, 3), axis=0)


def _nearest(color: np.ndarray, palette: Mapping[str, Color]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - palette[name])))


# The bouncing shape


def _cover(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """How much of each pixel [F, H, W] the shape covers, and its colour; nothing and None without a shape."""
    offset = pixels.astype(np.float32) - background.astype(np.float32)
    distance = np.linalg.norm(offset, axis=-1)
    strong = float(np.quantile(distance, 0.96))  # the smallest shape fills an eighth
    if strong < _CONTRAST:
        return np.zeros(distance.shape, np.float32), None
    span = np.median(offset[distance > 0.7 * strong], axis=0)
    return (offset @ span / (span @ span)).clip(0, 1), background + span


def _centres(cover: np.ndarray, left: float, top: float, pixel: float) -> np.ndarray:
    """Centre of the shape in each frame, [F, 2]; frames without one are filled in from their neighbours."""
    centres = np.full((len(cover), 2), np.nan)
    for frame, picture in enumerate(cover):
        places = np.argwhere(picture > 0.5)[:, ::-1] * pixel + (left, top)
        if len(places) < 0.01 / pixel**2:  # a shape has at least 0.08 squared shorter sides
            continue
        near = np.linalg.norm(places - np.median(places, axis=0), axis=1) < _VIEW
        centres[frame] = places[near].mean(axis=0) if near.any() else places.mean(axis=0)
    known = ~np.isnan(centres[:, 0])
    if not known.any():
        return np.zeros_like(centres)
    index = np.arange(len(cover))
    return np.stack([np.interp(index, index[known], centres[known, axis]) for axis in (0, 1)], axis=1)


def _overlaps(cover: np.ndarray, centres: np.ndarray, pixel: float) -> dict[str, float]:
    """Mean intersection over union with each shape, centre on `centres`, which are from the first pixel."""
    steps = (np.arange(_VIEW_POINTS) + 0.5) * 2 * _VIEW / _VIEW_POINTS - _VIEW
    columns = (centres[:, 0, None] + steps) / pixel  # [F, points]
    rows = (centres[:, 1, None] + steps) / pixel
    seen = _sample(cover, rows, columns) > 0.5
    overlaps = {}
    for name, template in _templates().items():
        union = (seen | template).sum(axis=(1, 2))
        overlaps[name] = float(((seen & template).sum(axis=(1, 2)) / union).mean())
    return overlaps


def _sample(cover: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values [F, R, C] between the pixels of [F, H, W] at `rows` [F, R] x `columns` [F, C]; outside is 0."""
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))
    row = (rows + 1).clip(0, padded.shape[1] - 1.001)[:, :, None]
    column = (columns + 1).clip(0, padded.shape[2] - 1.001)[:, None, :]
    i, j, frame = row.astype(int), column.astype(int), np.arange(len(cover))[:, None, None]
    down, right = row - i, column - j
    upper = padded[frame, i, j] * (1 - right) + padded[frame, i, j + 1] * right
    lower = padded[frame, i + 1, j] * (1 - right) + padded[frame, i + 1, j + 1] * right
    return upper * (1 - down) + lower * down


@cache
def _templates() -> dict[str, np.ndarray]:
    """All shapes about their centres of mass, [points, points] of bool."""
    points = _VIEW_POINTS
    y, x = ((np.mgrid[:points, :points] + 0.5) * 2 * _VIEW / points - _VIEW).astype(np.float32)
    templates = {}
    for name in SHAPES + NEW_SHAPES:
        inside = shape_distance(name, x, y) < 0
        templates[name] = shape_distance(name, x + x[inside].mean(), y + y[inside].mean()) < 0
    return templates


def _bounces(heights: np.ndarray) -> tuple[int, ...]:
    """Frames where a height has a minimum near its lowest."""
    lowest, reach = heights.min(), np.ptp(heights)
    if reach < _MOVED:
        return ()
    found = []
    for frame, height in enumerate(heights):
        around = heights[max(0, frame - 3) : frame + 4]
        # at an end nobody sees whether the shape still falls, so there it must be on the floor
        enough = 0.08 if frame in (0, len(heights) - 1) else 0.3
        is_first = height < heights[max(0, frame - 3) : frame].min(initial=np.inf)
        if height == around.min() and is_first and height <= lowest + enough * reach:
            found.append(frame)
    return tuple(found)


def _bouncing_speed(heights: np.ndarray) -> str:
    """The fast period brings the shape back to where it was, and is half of the slow one."""
    period = PERIODS["fast"]
    if np.ptp(heights) < _MOVED or len(heights) < period + 3:
        return NONE
    offsets = heights - heights.mean()
    return "fast" if offsets[period:] @ offsets[:-period] > 0 else "slow"


# The head


def _mouth_opening(frames: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """The area of the mouth's colour in each frame, in units of an open mouth's."""
    near_x, near_y = np.abs(x[0]) < MOUTH_WIDTH + 0.04, np.abs(y[:, 0] - MOUTH_CENTRE[1]) < MOUTH_OPEN + 0.04
    pixels = frames[:, near_y][:, :, near_x].astype(np.float32)
    span = np.array(MOUTH, np.float32) - LIPS
    cover = ((pixels - np.float32(LIPS)) @ span / (span @ span)).clip(0, 1)
    return cover.sum(axis=(1, 2)) * pixel**2 / (np.pi * MOUTH_WIDTH * MOUTH_OPEN)


def _speaking_speed(opening: np.ndarray) -> str:
    """The speed whose syllables, each as loud as it likes, explain more of the mouth's movement."""
    moved = (opening - np.quantile(opening, 0.1)).clip(0)
    if moved.max() < 0.1:
        return NONE
    return max(SYLLABLES, key=lambda speed: _explained(moved, SYLLABLES[speed]))


def _explained(values: np.ndarray, duration: int) -> float:
    """The sum of squares [F] that half waves of `duration` explain, at their best start."""
    wave = np.sin(np.pi * (np.arange(duration) + 0.5) / duration)
    best = 0.0
    for start in range(duration):
        after = -(start + len(values)) % duration
        slots = np.pad(values, (start, after)).reshape(-1, duration)
        seen = np.pad(np.ones_like(values), (start, after)).reshape(-1, duration)
        best = max(best, float(((slots @ wave) ** 2 / (seen @ wave**2)).sum()))
    return best


# The sound


def _onsets(loudness: np.ndarray) -> tuple[int, ...]:
    """Frames where the sound grows by a quarter of its maximum, and more than two frames before and after."""
    rise = np.diff(loudness, prepend=0.0)
    enough = max(0.25 * loudness.max(), _SILENCE)
    return tuple(
        frame
        for frame in range(len(rise))
        if rise[frame] > enough and rise[frame] == rise[max(0, frame - 2) : frame + 3].max()
    )


def _pitch(sound: np.ndarray, sample_rate: int) -> str:
    """The note with the loudest fundamental."""
    energy = {name: _energy(sound, sample_rate, [hertz], 0.06 * hertz) for name, hertz in NOTES.items()}
    name = max(energy, key=lambda note: energy[note])
    return name if energy[name] > _SILENCE**2 else NONE


def _voice(sound: np.ndarray, sample_rate: int) -> str:
    """The low voice is an octave below the high one: it alone has the odd multiples of its pitch."""
    multiples = range(VOICES["low"], 2500, VOICES["low"])
    odd = _energy(sound, sample_rate, multiples[0::2], 15)
    even = _energy(sound, sample_rate, multiples[1::2], 15)
    if odd + even < _SILENCE**2:
        return NONE
    return "low" if odd > even / 3 else "high"


def _energy(sound: np.ndarray, sample_rate: int, frequencies: Sequence[int], reach: float) -> float:
    """Mean square of the sound within `reach` Hz of the given frequencies."""
    mono = sound.mean(axis=0, dtype=np.float64)
    power = 2 * np.abs(np.fft.rfft(mono)) ** 2 / max(len(mono), 1) ** 2
    hertz = np.fft.rfftfreq(len(mono), 1 / sample_rate)
    return float(sum(power[np.abs(hertz - centre) <= reach].sum() for centre in frequencies))
