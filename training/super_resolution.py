"""Training of the super-resolution transformer, and the pairs of films that it is trained on.

Its sampler begins, at a noise level of nearly 1, not from noise but from the small film's latents, resized
and partly noised. So it is trained on the straight lines from there to the large film's latents,
x = (1 - sigma) large + sigma start, with the velocity start - large (rectified flow between two
distributions, arXiv:2209.03003): along them large = x - sigma velocity, which is what the sampler reckons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from ..model.packing import Latents
from ..model.prompt import Tokenizer
from ..model.text_encoder import TextEncoder
from ..model.transformer import JointTransformer
from ..sampler.noise import normal_like
from ..sampler.schedule import SHIFT
from ..sampler.super_resolution import prepare
from .dmd2 import negative_checksum, text_states
from .flow import FlowStage, Held, VelocityFunction, flow_loss, sample_sigmas
from .generators import checksum, generator
from .world_data import WorldData


class Pairs(NamedTuple):
    """The same films small and large: `small` with sound, `large` [B, C, F, Y, X], and text as in `Batch`."""

    small: Latents
    large: Tensor
    text: Tensor


class PairsOfFilms(Protocol):
    """What a run trains on; as `Data`, but of pairs."""

    fingerprint: str

    def batch(self, index: int) -> Pairs: ...


class PairData:
    """Batches of `size` pairs of clips with their captions, drawn as by `WorldData`.

    `latents` are of the small clips, as from `encode_clips`, and `large` the video latents of the first of
    them, twice as large. Raises ValueError where there are more large clips than small ones.
    """

    def __init__(
        self, latents: Mapping[str, Tensor], large: Tensor, tokenizer: Tokenizer, size: int, seed: int
    ) -> None:
        count = len(large)
        if count > len(latents["video"]):
            raise ValueError(
                f"there are {count} large clips but {len(latents['video'])} small ones; encode as many"
            )
        audio = latents["audio"][:count]
        self.small, self.large = (
            WorldData({"video": video, "audio": audio}, tokenizer, size, seed)
            for video in (latents["video"][:count], large)
        )

    @property
    def fingerprint(self) -> str:
        """Those of the small and the large clips."""
        return f"{self.small.fingerprint} {self.large.fingerprint}"

    def batch(self, index: int) -> Pairs:
        """Batch number `index`, with captions as tokens."""
        small, large = self.small.batch(index), self.large.batch(index)  # of one seed, so the same clips
        return Pairs(small.clean, large.clean.video, small.text)


class PairsInTurns:
    """A batch of each world from one of `data`, then two from the next, and from the first again."""

    def __init__(self, *data: PairData) -> None:
        self.data = data

    @property
    def fingerprint(self) -> str:
        """Those of all data."""
        return " ".join(data.fingerprint for data in self.data)

    def batch(self, index: int) -> Pairs:
        """Batch number `index`."""
        return self.data[index // 2 % len(self.data)].batch(index)


@dataclass(frozen=True)
class SuperResolutionSettings:
    """Settings of a run of `steps` updates, as in `FlowSettings`.

    Films that a few-step model made are not quite as those that were encoded, so the small films are made
    worse first: they get noise of a deviation up to `rough_noise`, and up to a share `rough_blur` of them is
    replaced by the mean of neighbouring latents.
    """

    steps: int
    seed: int = 0
    shift: float = SHIFT
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.998
    image: float = 0.15
    negative: float = 0.1
    rough_noise: float = 0.1
    rough_blur: float = 0.3


class SuperResolutionStage(FlowStage):
    """Trains a transformer to make large films of small ones; a `Stage` of `loop.train`.

    Arguments as of `FlowStage`, but that the text encoder, for data that gives tokens, stays as it is.
    `metric` as of `flow_loss`: what errors of the latents count, such as that of their pixels.
    """

    def __init__(
        self,
        transformer: JointTransformer,
        data: PairsOfFilms,
        negative: Tensor,
        settings: SuperResolutionSettings,
        accelerator: Accelerator,
        text_encoder: TextEncoder | None = None,
        compiled: bool = False,
        metric: Tensor | None = None,
    ) -> None:
        device = accelerator.device
        frozen = None if text_encoder is None else text_encoder.to(device).requires_grad_(False)
        states = text_states(frozen, negative.to(device))
        super().__init__(transformer, data, states, settings, accelerator, compiled=compiled)
        self.negative_checksum = negative_checksum(negative, text_encoder)
        self.text_encoder = frozen
        self.metric = None if metric is None else metric.to(device)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The settings that a run must be continued with."""
        return {
            **super().fingerprint,
            "stage": "super_resolution",
            "metric": None if self.metric is None else checksum(self.metric),
            "negative_checksum": self.negative_checksum,
        }

    def _loss(self, index: int) -> tuple[Tensor, dict[str, float]]:
        pairs = self.data.batch(index)
        pairs = pairs._replace(text=text_states(self.text_encoder, pairs.text.to(self.negative.device)))
        return drawn_pair_loss(self.module, pairs, self.negative, self.settings, index, self.metric)


def drawn_pair_loss(
    velocity_fn: VelocityFunction,
    pairs: Pairs,
    negative: Tensor,
    settings: SuperResolutionSettings,
    index: int,
    metric: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of batch number `index` under noise, levels and tasks drawn for that number and seed.

    The sound is what the sampler shows, held. Computed on the device of `negative`, which is of a batch of
    one.
    """
    device, draw = negative.device, generator(settings.seed, "super-resolution", index)
    small, large, text = (
        pairs.small.map(lambda x: x.to(device)),
        pairs.large.to(device),
        pairs.text.to(device),
    )
    films = len(large)
    sigma = sample_sigmas(films, settings.shift, draw).to(device)
    first_frame = torch.rand(films, generator=draw) < settings.image
    if torch.rand(1, generator=draw).item() < settings.negative:
        text = negative.expand(films, *negative.shape[1:])
    small = small._replace(video=roughened(small.video, settings, draw))
    start = prepare(small, normal_like(Latents(large, small.audio), draw), *large.shape[-2:])
    held = Held(first_frame.long(), torch.ones_like(first_frame))
    clean = Latents(large, start.audio)
    return flow_loss(velocity_fn, clean, text, sigma, start, held, metric)


def roughened(video: Tensor, settings: SuperResolutionSettings, draw: torch.Generator) -> Tensor:
    """Small video latents [B, C, F, Y, X] made worse, each film by shares of its own."""
    noise, blur = (
        (most * torch.rand(len(video), 1, 1, 1, 1, generator=draw)).to(video)
        for most in (settings.rough_noise, settings.rough_blur)
    )
    mean = F.avg_pool3d(F.pad(video, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    drawn = torch.randn(video.shape, generator=draw).to(video)
    return video + blur * (mean - video) + noise * drawn
