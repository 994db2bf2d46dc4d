"""Seconds, pixels and frames of a film against the sizes of its latents; the one place where these are
converted.
"""

import math
from dataclasses import dataclass

FPS = 25  # pictures per second, and audio latents per second
FILM_RATE = 44100  # samples per second of a finished film
PIXELS_PER_LATENT = 16
SIZE_STEP = 32  # two latents: the transformer's patch
MIN_SECONDS, MAX_SECONDS = 0.2, 30.0
LONG_SECONDS = 10.0  # longer films than this were not trained


@dataclass(frozen=True)
class FilmShape:
    """The size of one film: pixels, and how many audio latents (25 a second) it lasts.

    A film has 4T - 3 pictures for T latent frames, so its sound may last up to three pictures longer.
    """

    width: int
    height: int
    audio_latents: int

    def __post_init__(self) -> None:
        if self.width % SIZE_STEP or self.height % SIZE_STEP or min(self.width, self.height) < SIZE_STEP:
            nearest = nearest_size(self.width, self.height)
            raise ValueError(
                f"width and height must be multiples of {SIZE_STEP}, got {self.width}x{self.height}; "
                f"the nearest is {nearest[0]}x{nearest[1]}"
            )

    @classmethod
    def from_seconds(cls, width: int, height: int, seconds: float) -> "FilmShape":
        """The shape of a film of about `seconds`; raises ValueError for a length that is not offered."""
        return cls(width, height, audio_latents(seconds))

    @property
    def latent_frames(self) -> int:
        """T: one for the first picture, then one for every four."""
        return (self.audio_latents - 1) // 4 + 1

    @property
    def pixel_frames(self) -> int:
        """Pictures of the film, 4T - 3."""
        return 4 * self.latent_frames - 3

    @property
    def seconds(self) -> float:
        """How long the pictures last."""
        return self.pixel_frames / FPS

    @property
    def asked_seconds(self) -> float:
        """The length that gives this shape in `from_seconds`."""
        return (self.audio_latents - 1) / FPS

    @property
    def latent_rows(self) -> int:
        """Rows of a latent frame."""
        return self.height // PIXELS_PER_LATENT

    @property
    def latent_columns(self) -> int:
        """Columns of a latent frame."""
        return self.width // PIXELS_PER_LATENT

    @property
    def video_tokens(self) -> int:
        """Tokens that the transformer makes of the video latents."""
        return self.latent_frames * self.latent_rows * self.latent_columns // 4

    def resized(self, size: tuple[int, int]) -> "FilmShape":
        """The same film at another (width, height)."""
        return FilmShape(*size, self.audio_latents)


def audio_latents(seconds: float) -> int:
    """Audio latents of a film: 25 a second and one more; raises ValueError outside 0.2 to 30 s or off the
    0.04 s grid.
    """
    if not math.isfinite(seconds) or not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"seconds must be from {MIN_SECONDS} to {MAX_SECONDS:g}, got {seconds:g}")
    frames = round(seconds * FPS)
    if abs(frames - seconds * FPS) > 1e-6 * FPS:
        below = math.floor(seconds * FPS) / FPS
        raise ValueError(
            f"seconds must be a multiple of {1 / FPS:g}, got {seconds:g}; "
            f"the nearest are {below:g} and {below + 1 / FPS:g}"
        )
    return frames + 1


def nearest_size(width: float, height: float) -> tuple[int, int]:
    """The accepted (width, height) nearest to the given one."""
    return tuple(max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP) for side in (width, height))


def super_resolution_size(kind: str, size: tuple[int, int], pixels_1080p: int) -> tuple[int, int]:
    """The size that super-resolution `kind` ('540p' or '1080p') makes from a base (width, height).

    540p doubles both sides; 1080p keeps the aspect and goes to about `pixels_1080p` pixels.
    """
    width, height = size
    if kind == "540p":
        return 2 * width, 2 * height
    factor = math.sqrt(pixels_1080p / (width * height))
    return nearest_size(width * factor, height * factor)
