"""Distillation of a base transformer into a few-step student: distribution matching, DMD2 (arXiv:2405.14867).

The student is trained on what it makes itself, by the few-step sampler, on the published noise levels. Its
films are noised, and pushed to where the base, with guidance, sees more clean film than a third network, the
fake, which learns by flow matching how the student's own films look. There is no adversarial loss.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Adam

from ..model.packing import Latents
from ..model.text_encoder import TextEncoder
from ..model.transformer import JointTransformer
from ..sampler.conditions import Conditions, DenoiseFunction
from ..sampler.dmd2 import sample_dmd2
from ..sampler.guidance import base_video_scale
from ..sampler.noise import NoiseFunction, normal_like
from ..sampler.parts import compile_layers
from ..sampler.schedule import SHIFT, flow_sigmas
from ..sampler.stages import denoise_function
from .flow import Data, FlowNetworks, Held, accumulated, draw_held, flow_loss, sample_sigmas
from .generators import checksum, generator
from .optim import Ema


@dataclass(frozen=True)
class Dmd2Settings:
    """Settings of a run.

    The student learns to make films in `sampling_steps`. Their levels and those at which its films are noised
    are shifted by `shift`; at less noise it drops kinds of films. The fake has `fake_updates` for each of the
    student's. `video_guidance` and `audio_guidance` are the base's. What is held is as in `FlowSettings`.
    """

    seed: int = 0
    sampling_steps: int = 8
    shift: float = SHIFT
    student_lr: float = 2e-4
    fake_lr: float = 5e-4
    betas: tuple[float, float] = (0.0, 0.99)
    ema: float = 0.99
    fake_updates: int = 2
    video_guidance: float = 2.0
    audio_guidance: float = 1.5
    image: float = 0.15
    beginning: int = 1
    audio: float = 0.12


@dataclass(frozen=True, eq=False, kw_only=True)
class FilmConditions(Conditions):
    """What is held, for each film of a batch on its own: all of `clean` but what is `free`.

    `free` is bool and broadcasts: video [B, 1, F, 1, 1], audio [B, 1, 1].
    """

    clean: Latents
    free: Latents

    @classmethod
    def of(cls, clean: Latents, held: Held) -> "FilmConditions":
        """Hold beginnings and sounds of `clean`."""
        return cls(clean=clean, free=held.free(clean))

    def apply(self, latents: Latents) -> Latents:
        """Return `latents` with the held parts put in."""
        return self.free.map(torch.where, latents, self.clean)


def simulated(
    denoise_fn: DenoiseFunction,
    start: Latents,
    sigmas: Tensor,
    step: int,
    noise_fn: NoiseFunction,
    conditions: Conditions,
) -> Latents:
    """The clean latents that the few-step sampler has predicted after step number `step` (0-based).

    Only that step has a gradient. After the last one they are what the sampler returns.
    """
    with torch.no_grad():
        noisy = sample_dmd2(denoise_fn, start, sigmas[: step + 1], noise_fn, conditions)
    return conditions.apply(denoise_fn(noisy, sigmas[step].item()))


def matching_loss(
    film: Latents,
    teacher_fn: Callable[[Latents], Latents],
    fake_fn: Callable[[Latents], Latents],
    sigma: Tensor,
    noise: Latents,
    conditions: FilmConditions,
) -> Tensor:
    """A loss whose gradient in `film` is that of distribution matching, weighted as in arXiv:2311.18828.

    It is fake's minus teacher's prediction of the clean film from `film` at the noise levels `sigma` [B],
    over the mean distance of film and teacher's prediction. Both functions return velocities: a prediction is
    noisy - sigma velocity, and sigma cancels. What is held has no part in it.
    """

    def noised(x: Tensor, e: Tensor) -> Tensor:
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return (1 - level) * x + level * e

    def stream_loss(x: Tensor, e: Tensor, real: Tensor, fake: Tensor, free: Tensor) -> Tensor:
        mask = free.expand_as(x).float()
        axes = tuple(range(1, x.ndim))
        with torch.no_grad():
            count = mask.sum(axes, keepdim=True).clamp(min=1)
            distance = ((real - (e - x)).abs() * mask).sum(axes, keepdim=True) / count
            target = x - (real - fake) / distance.clamp(min=1e-6)
        return 0.5 * ((x - target).square() * mask).sum() / mask.sum().clamp(min=1)

    with torch.no_grad():
        noisy = conditions.apply(film.map(noised, noise))
        real, fake = teacher_fn(noisy), fake_fn(noisy)
    return sum(film.map(stream_loss, noise, real, fake, conditions.free))


class Dmd2Stage:
    """Distils `base`, which stays as it is; a `Stage` of `loop.train`.

    Films have the shapes, prompts and held parts of `data`, whose text, as that of the `negative` prompt for
    a batch of one, is states, or tokens for the frozen text encoder. The accelerator says the device and how
    many batches make an update. With `compiled` the layers go through torch.compile.

    Figures: "loss" and "fake_loss", and in steps that made whole films the deviations of their latents,
    "video_std" and "audio_std". They should stay near those of the data; the end of a run is up to them, so
    that the number of steps is no setting.
    """

    def __init__(
        self,
        base: JointTransformer,
        data: Data,
        negative: Tensor,
        settings: Dmd2Settings,
        accelerator: Accelerator,
        text_encoder: TextEncoder | None = None,
        compiled: bool = False,
    ) -> None:
        self.data, self.settings, self.accelerator = data, settings, accelerator
        device = accelerator.device
        self.student, self.fake = (FlowNetworks(copy.deepcopy(base).requires_grad_(True)) for _ in range(2))
        self.base = FlowNetworks(base.to(device)).requires_grad_(False)
        self.student_module, self.fake_module = map(accelerator.prepare_model, (self.student, self.fake))
        self.text_encoder = None if text_encoder is None else text_encoder.to(device).requires_grad_(False)
        self.negative = text_states(self.text_encoder, negative.to(device))
        self.sigmas = flow_sigmas(settings.sampling_steps, settings.shift)
        self.student_optimizer = Adam(self.student.parameters(), settings.student_lr, settings.betas)
        self.fake_optimizer = Adam(self.fake.parameters(), settings.fake_lr, settings.betas)
        self.ema = Ema(self.student.transformer, settings.ema)
        self.fingerprint = {
            "stage": "dmd2",
            **asdict(settings),
            "batches": accelerator.gradient_accumulation_steps,
            "base_checksum": checksum(*base.parameters()),
            "config": base.config.to_dict(),
            "dtype": str(base.compute_dtype),
            "data": data.fingerprint,
            "negative_checksum": negative_checksum(negative, text_encoder),
        }
        if compiled:
            for networks in (self.student, self.fake, self.base):
                compile_layers(networks.transformer.block.layers)

    def step(self, step: int) -> dict[str, float]:
        """Make the fake's updates of number `step`, and then the student's."""
        figures: dict[str, float] = {}
        for turn in range(self.settings.fake_updates):
            number = step * self.settings.fake_updates + turn
            figures |= accumulated(self.accelerator, self.fake_module, self._fake_loss, number)
            self.fake_optimizer.step()
            self.fake_optimizer.zero_grad(set_to_none=True)
        figures |= accumulated(self.accelerator, self.student_module, self._student_loss, step)
        self.student_optimizer.step()
        self.student_optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.student.transformer)
        return figures

    def trained(self) -> JointTransformer:
        """A copy of the student with the running mean of its weights."""
        transformer = copy.deepcopy(self.student.transformer)
        self.ema.copy_to(transformer)
        return transformer

    def _fake_loss(self, index: int) -> tuple[Tensor, dict[str, float]]:
        draw = generator(self.settings.seed, "fake", index)
        with torch.no_grad():
            task = self._task(index, draw)
            film, figures = self._film(task, draw)
        sigma, noise = self._noise(film, draw)
        loss, _ = flow_loss(self.fake_module, film, task.text, sigma, noise, task.held)
        return loss, {"fake_loss": loss.item(), **figures}

    def _student_loss(self, index: int) -> tuple[Tensor, dict[str, float]]:
        draw = generator(self.settings.seed, "student", index)
        task = self._task(index, draw)
        film, figures = self._film(task, draw)
        sigma, noise = self._noise(film, draw)
        teacher_fn = partial(self._guided, text=task.text)
        fake_fn = partial(self.fake, text=task.text)
        loss = matching_loss(film, teacher_fn, fake_fn, sigma, noise, task.conditions)
        return loss, {"loss": loss.item(), **figures}

    def _task(self, index: int, draw: torch.Generator) -> "Task":
        """Batch number `index`, and what is held in it."""
        device, batch = self.accelerator.device, self.data.batch(index)
        clean = batch.clean.map(lambda x: x.to(device))
        held = draw_held(len(clean.video), self.settings, draw)
        text = text_states(self.text_encoder, batch.text.to(device))
        return Task(clean, text, held, FilmConditions.of(clean, held))

    def _film(self, task: "Task", draw: torch.Generator) -> tuple[Latents, dict[str, float]]:
        """What the student makes until a random step, and figures if that is the last one."""
        step = int(torch.randint(self.settings.sampling_steps, (1,), generator=draw).item())
        denoise = denoise_function(self.student_module, task.text, None, base_video_scale)
        start = normal_like(task.clean, draw)
        noise_fn = partial(normal_like, generator=draw)
        film = simulated(denoise, start, self.sigmas, step, noise_fn, task.conditions)
        return film, deviations(film, task.conditions) if step == self.settings.sampling_steps - 1 else {}

    def _noise(self, film: Latents, draw: torch.Generator) -> tuple[Tensor, Latents]:
        sigma = sample_sigmas(len(film.video), self.settings.shift, draw)
        return sigma.to(film.video.device), normal_like(film, draw)

    def _guided(self, noisy: Latents, text: Tensor) -> Latents:
        """The base's velocity, with guidance."""
        scales = Latents(self.settings.video_guidance, self.settings.audio_guidance)
        conditional = self.base(noisy, text)
        unconditional = self.base(noisy, self.negative.expand(len(text), -1, -1))
        return conditional.map(lambda c, u, scale: u + scale * (c - u), unconditional, scales)

    def state_dict(self) -> dict[str, Any]:
        """Both networks, their optimizers' states, and the student's running mean."""
        return {
            "student": self.student.transformer.state_dict(),
            "fake": self.fake.transformer.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "fake_optimizer": self.fake_optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.student.transformer.load_state_dict(state["student"])
        self.fake.transformer.load_state_dict(state["fake"])
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        self.fake_optimizer.load_state_dict(state["fake_optimizer"])
        self.ema.load_state_dict(state["ema"])


class Task(NamedTuple):
    """What the student is to make: films of these shapes for text states [B, L, C], with these parts held."""

    clean: Latents
    text: Tensor
    held: Held
    conditions: FilmConditions


@torch.no_grad()
def negative_checksum(negative: Tensor, text_encoder: TextEncoder | None) -> int:
    """Of what states are computed from: they themselves are rounded differently by other processors."""
    return checksum(negative, *(() if text_encoder is None else text_encoder.parameters()))


def text_states(text_encoder: TextEncoder | None, text: Tensor) -> Tensor:
    """States [B, L, C] of tokens [B, L], int64; what already is states stays as it is."""
    return text if text_encoder is None or text.is_floating_point() else text_encoder(text)


def deviations(film: Latents, conditions: FilmConditions) -> dict[str, float]:
    """The standard deviation of each stream's latents, but for what is held."""
    made = film.map(lambda x, free: x.detach()[free.expand_as(x)], conditions.free)
    return {f"{name}_std": values.std().item() for name, values in made._asdict().items() if len(values)}
