"""Clips of the two worlds: what happens when, the frames and the sound.

A clip is a function of its attributes and a seed. Positions are in units of the picture's shorter side, from
its centre; a second has 25 frames, and every note and syllable starts with a frame.
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from .render import draw_bounce, draw_head
from .sound import bounce_sound, head_sound
from .world import Attributes, Bounce, Head

FRAMES, SIZE = 49, (96, 96)  # of the clips that the pony is trained on; (width, height)
PERIODS = {"slow": 24, "fast": 12}  # frames between bounces
SYLLABLES = {"slow": 8, "fast": 4}  # frames of a syllable


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip: `frames` [F, H, W, 3] uint8, `sound` [2, N] float32 at 51200 Hz, perhaps a little longer.

    `onsets` are the frames where a bounce's notes begin; `opening` [F] is how far a head's mouth is open,
    0 to 1. Each is empty in the other world.
    """

    attributes: Attributes
    frames: np.ndarray
    sound: np.ndarray
    onsets: tuple[int, ...]
    opening: np.ndarray


def make_clip(
    attributes: Attributes, seed: int, size: tuple[int, int] = SIZE, frames: int = FRAMES, latents: int = 51
) -> Clip:
    """Render so many `frames` of `size` (width, height) pixels, with a sound of `latents` x 2048 samples."""
    random, length = _random(attributes, seed), max(frames, latents)
    if isinstance(attributes, Bounce):
        bounces = _bounces(random, attributes, length)
        phase = (np.arange(frames) - bounces.start) % bounces.step / bounces.step
        pictures = draw_bounce(attributes, phase, size)
        sound = bounce_sound(attributes.pitch, bounces, latents)
        return Clip(attributes, pictures, sound, tuple(f for f in bounces if f < frames), np.empty(0))
    syllables = _syllables(random, SYLLABLES[attributes.speed], length)
    opening = _opening(np.arange(frames) + 0.5, syllables)
    blinks = _blinks(random, frames)
    pictures = draw_head(attributes, opening, blinks, size)
    return Clip(attributes, pictures, _babble(attributes, syllables, latents), (), opening)


def make_sound(attributes: Attributes, seed: int, frames: int = FRAMES, latents: int = 51) -> np.ndarray:
    """The sound alone [2, 2048 x latents] of the clip that `make_clip` renders with the same arguments."""
    random, length = _random(attributes, seed), max(frames, latents)
    if isinstance(attributes, Bounce):
        return bounce_sound(attributes.pitch, _bounces(random, attributes, length), latents)
    return _babble(attributes, _syllables(random, SYLLABLES[attributes.speed], length), latents)


def _random(attributes: Attributes, seed: int) -> Random:
    return Random(f"{attributes} {seed}")


def _bounces(random: Random, attributes: Bounce, length: int) -> range:
    """The frames in which the shape meets the floor."""
    period = PERIODS[attributes.speed]
    return range(random.randrange(period), length, period)


def _babble(attributes: Head, syllables: list[tuple[int, int]], latents: int) -> np.ndarray:
    samples = (np.arange(latents * 2048) + 0.5) / 2048
    return head_sound(attributes.voice, _opening(samples, syllables))


def _syllables(random: Random, duration: int, length: int) -> list[tuple[int, int]]:
    """(first frame, frames) of the syllables; a quarter of the places stays silent, never two in a row."""
    spoken, silent = [], False
    for start in range(random.randrange(-duration, 1), length, duration):
        silent = not silent and random.random() < 0.25
        if not silent:
            spoken.append((start, duration))
    return spoken


def _opening(times: np.ndarray, syllables: list[tuple[int, int]]) -> np.ndarray:
    """How far the mouth is open at `times`, in frames."""
    opening = np.zeros_like(times)
    for start, duration in syllables:
        phase = (times - start) / duration
        opening += np.where((phase > 0) & (phase < 1), np.sin(np.pi * phase.clip(0, 1)), 0)
    return opening


def _blinks(random: Random, frames: int) -> np.ndarray:
    """Which frames have closed eyes."""
    closed = np.zeros(frames, bool)
    start = random.randrange(8, 30)
    while start < frames:
        closed[start : start + 3] = True
        start += random.randrange(20, 40)
    return closed
