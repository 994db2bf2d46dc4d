"""Sound of the two worlds, 51200 Hz, the same on both sides.

All frequencies are multiples of the 25 latents a second, and all notes and syllables start with a latent: so
equal latents stand for equal samples.
"""

from collections.abc import Iterable

import numpy as np

SAMPLE_RATE, SAMPLES_PER_LATENT = 51200, 2048
NOTES = {"low": 200, "middle": 400, "high": 800}  # Hz
VOICES = {"low": 125, "high": 250}  # Hz
_OVERTONES = (1.0, 0.4, 0.15)
_FORMANTS = ((700, 260, 1.0), (1200, 300, 0.5))  # Hz, width in Hz, level
NOTE_LEVEL, VOICE_LEVEL, DECAY = 0.5, 0.35, 0.12  # the last in seconds


def bounce_sound(pitch: str, onsets: Iterable[int], latents: int) -> np.ndarray:
    """A waveform [2, 2048 x latents] float32 with a note at each of `onsets`, in latents."""
    sound = np.zeros(latents * SAMPLES_PER_LATENT)
    seconds = np.arange(len(sound)) / SAMPLE_RATE
    tone = _harmonics(NOTES[pitch], dict(enumerate(_OVERTONES, 1)), seconds)
    note = tone * np.exp(-seconds / DECAY) * np.minimum(seconds / 0.002, 1)
    for onset in onsets:
        start = onset * SAMPLES_PER_LATENT
        sound[start:] += NOTE_LEVEL * note[: len(sound) - start]
    return _stereo(sound)


def head_sound(voice: str, opening: np.ndarray) -> np.ndarray:
    """A waveform [2, N] float32 of a babble as loud as the mouth is open; `opening` [N] is 0 to 1."""
    seconds = np.arange(len(opening)) / SAMPLE_RATE
    base = VOICES[voice]
    levels = {k: _voice_level(k * base) for k in range(1, 2500 // base)}
    total = sum(level**2 for level in levels.values()) ** 0.5
    return _stereo(VOICE_LEVEL / total * opening * _harmonics(base, levels, seconds))


def _voice_level(frequency: float) -> float:
    return 0.1 + sum(top * np.exp(-(((frequency - centre) / width) ** 2)) for centre, width, top in _FORMANTS)


def _harmonics(frequency: float, levels: dict[int, float], seconds: np.ndarray) -> np.ndarray:
    phase = 2 * np.pi * frequency * seconds
    return sum(level * np.sin(k * phase) for k, level in levels.items())


def _stereo(sound: np.ndarray) -> np.ndarray:
    return np.stack([sound, sound]).astype(np.float32)
