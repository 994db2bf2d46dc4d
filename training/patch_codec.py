"""The latents that the miniature's video VAE is trained towards: principal components of patches of clips.

A patch is 4 frames of 16 x 16 pixels, the first frame of a film counting as 4. Its first 48 components are
scaled by the square root of their deviation, which keeps coarse content stronger than fine, and turned by a
random rotation, which makes all channels alike. So what the latents are is known before any network is
trained: encoder, decoders and transformer can be trained side by side.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ..model.stream_writer import write_tensors
from .files import read_tensors

FRAMES, SIDE, CHANNELS = 4, 16, 48


@dataclass(frozen=True, eq=False)
class PatchCodec:
    """`mean` [3072] of the patches and `project` [3072, 48], which takes what is left to latents."""

    mean: Tensor
    project: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, 48, k+1, H/16, W/16], mean 0 and deviation 1, of `video` [B, 3, 4k+1, H, W]."""
        patches = _patches(video)
        return ((patches - self.mean.to(video)) @ self.project.to(video)).movedim(-1, 1)

    @property
    def pixel_metric(self) -> Tensor:
        """[48, 48], by which errors of latents become as large as those of their pixels, up to a factor."""
        pixels = torch.linalg.pinv(self.project.double())  # of each latent
        variances, directions = torch.linalg.eigh(pixels @ pixels.T)
        return ((directions * (variances / variances.mean()).sqrt()) @ directions.T).float()

    def save(self, path: Path) -> None:
        """Write the two tensors as safetensors."""
        write_tensors(path, {"mean": self.mean, "project": self.project})

    @classmethod
    def from_file(cls, path: Path) -> "PatchCodec":
        """Read what `save` wrote; raises ValueError naming a file that cannot be read."""
        return cls(**read_tensors(path)[0])


def fit(films: Iterable[Tensor], generator: torch.Generator) -> PatchCodec:
    """The codec of `films`, each [1, 3, 4k+1, H, W] in [-1, 1]; `generator` draws the rotation."""
    size = 3 * FRAMES * SIDE**2
    count, total, products = 0, torch.zeros(size), torch.zeros(size, size)
    for film in films:
        patches = _patches(film).flatten(0, -2)
        count += len(patches)
        total += patches.sum(0)
        products += patches.T @ patches
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    deviations, directions = variances[-CHANNELS:].clamp(min=1e-8).sqrt(), directions[:, -CHANNELS:]
    rotation, _ = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))
    project = (directions / deviations.sqrt()) @ rotation
    # the variance of every channel is then the mean deviation, but for the luck of the rotation
    spread = (rotation.square() * deviations[:, None]).sum(0).sqrt()
    return PatchCodec(mean, project / spread)


def _patches(video: Tensor) -> Tensor:
    # [B, 3, 4k+1, H, W] -> [B, k+1, H/16, W/16, 3072]
    video = torch.cat([video[:, :, :1]] * (FRAMES - 1) + [video], dim=2)
    return rearrange(
        video, "b c (f t) (y p) (x q) -> b f y x (c t p q)", t=FRAMES, p=SIDE, q=SIDE
    )  # fmt: skip
