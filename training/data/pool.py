"""Clips of the two worlds held in memory, and random crops of them."""

from collections.abc import Callable
from random import Random

import numpy as np
import torch
from torch import Tensor

from .clip import SIZE, Clip, make_clip
from .world import Attributes, training_attributes

GRID = 16  # pixels of a latent; most crops lie on it, as they do in whole pictures

Progress = Callable[[int, int], None]


def training_clip(index: int, size: tuple[int, int] = SIZE) -> Clip:
    """Clip number `index` of an endless list that training may see."""
    return make_clip(training_clip_attributes(index), index, size)


def training_clip_attributes(index: int) -> Attributes:
    """The attributes of that clip."""
    return training_attributes(Random(f"training {index}"))


class VideoPool:
    """The pictures of the first `count` training clips, and of some more at twice the size, in memory.

    49 frames of 96 x 96 pixels take 1.4 MB. `progress(done, total)` is called while they are drawn.
    """

    def __init__(
        self, count: int, count_double: int, progress: Progress = lambda _done, _total: None
    ) -> None:
        sizes = [SIZE] * count + [(2 * SIZE[0], 2 * SIZE[1])] * count_double
        self.clips: list[np.ndarray] = []
        self.count = count
        for index, size in enumerate(sizes):
            self.clips.append(training_clip(index, size).frames)
            progress(index + 1, len(sizes))

    def crops(self, count: int, side: int, random: Random, double: float = 0.0, tries: int = 1) -> Tensor:
        """`count` crops [count, 3, 49, side, side] in [-1, 1] at random places of random clips.

        A share `double` of them is of clips of twice the size, if the pool has any, the others of all clips.
        Every other crop is the one of `tries` in which most moves.
        """
        crops = (
            max((self._crop(side, random, double) for _ in range(tries if n % 2 else 1)), key=_motion)
            for n in range(count)
        )
        return torch.cat([to_video(frames) for frames in crops])

    def _crop(self, side: int, random: Random, double: float) -> np.ndarray:
        doubles = self.clips[self.count :]
        frames = random.choice(doubles if doubles and double > 0 and random.random() < double else self.clips)
        step = random.choice((1, GRID, GRID, GRID))
        top, left = (step * random.randint(0, (length - side) // step) for length in frames.shape[1:3])
        return frames[:, top : top + side, left : left + side]


def _motion(frames: np.ndarray) -> float:
    return float(frames[::4].std(axis=0).mean())


def to_video(frames: np.ndarray) -> Tensor:
    """Frames [F, H, W, 3] uint8 as a film [1, 3, F, H, W] in [-1, 1], channels last in memory."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1
    return video.permute(3, 0, 1, 2).unsqueeze(0)
