"""Flow-matching training of the joint transformer: the loss, and the stage of a training run.

A film's clean latents are mixed with noise, x = (1 - sigma) clean + sigma noise, and the network, which is
not told sigma, predicts the velocity noise - clean (rectified flow, arXiv:2209.03003). Some samples keep a
part clean, as the sampler holds it: the first latent frame (an image is given) or the sound.

Letters: B batch, C channels, F latent frames, Y/X latent rows and columns, A audio latents, L text tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..kernels.attention import attention, attention_by
from ..model.operations import ModalityLinear
from ..model.packing import Latents, PackedLayout
from ..model.run_block import RunBlock, run_in_place
from ..model.text_encoder import TextEncoder
from ..model.transformer import JointTransformer
from ..sampler.noise import normal_like
from ..sampler.parts import compile_layers
from ..sampler.schedule import SHIFT
from .generators import checksum, generator
from .optim import Ema, decayed, optimizers, scale_rates

VelocityFunction = Callable[[Latents, Tensor], Latents]  # (noisy latents, text) -> velocity

# windows by joining frames: the merging of sums that inference prefers on a CPU has no gradient
trainable_attention = partial(attention_by, attention)


class Batch(NamedTuple):
    """Films of one shape: clean, normalised latents, and text as states [B, L, C] or tokens [B, L], int64."""

    clean: Latents
    text: Tensor


class Data(Protocol):
    """What a run trains on; one index is one batch, always the same one.

    `fingerprint` tells it from other data, with which a run must not be continued.
    """

    fingerprint: str

    def batch(self, index: int) -> Batch: ...


class Held(NamedTuple):
    """What films keep clean: so many of the first latent frames [B], and whether their sound, [B] bool."""

    frames: Tensor
    audio: Tensor

    def free(self, latents: Latents) -> Latents:
        """What of `latents` is not held: bool, broadcasts, video [B, 1, F, 1, 1], audio [B, 1, 1]."""
        video = torch.arange(latents.video.shape[2]) >= self.frames[:, None]
        masks = Latents(video[:, None, :, None, None], ~self.audio[:, None, None])
        return masks.map(lambda mask: mask.to(latents.video.device))


def sample_sigmas(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels [B], float32, of the shifted schedule: shift u / (1 + (shift - 1) u) for uniform u.

    The u of a batch are evenly spread behind one random offset (arXiv:2107.00630, section I.1).
    """
    u = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
    return shift * u / (1 + (shift - 1) * u)


def flow_loss(
    velocity_fn: VelocityFunction,
    clean: Latents,
    text: Tensor,
    sigma: Tensor,
    noise: Latents,
    held: Held | None = None,
    metric: Tensor | None = None,
    first_frame: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of the velocity at the noise levels `sigma` [B], without what is `held`.

    Each stream's is the mean over what is not held; the figures are their sum and these two, a stream that is
    held in all films being left out. Errors of video latents are multiplied by `metric` [C, C] before they
    are squared; the first latent frame counts `first_frame` times.
    """
    free = _free(clean, held)
    levels = free.map(lambda mask: mask * _along(sigma, mask))
    noisy = levels.map(lambda level, x, e: (1 - level) * x + level * e, clean, noise)
    velocity = velocity_fn(noisy, text)
    video, audio = velocity.map(lambda v, x, e: v - (e - x), clean, noise)
    if metric is not None:
        video = torch.einsum("dc,bcfyx->bdfyx", metric, video)
    video, audio = video.square(), audio.square()
    free.video[:, :, 0] *= first_frame
    video = _weighted_mean(video.mean(dim=(1, 3, 4), keepdim=True), free.video)
    audio = _weighted_mean(audio.mean(dim=2, keepdim=True), free.audio)
    loss = video + audio
    found = {"video_loss": (video, free.video), "audio_loss": (audio, free.audio)}
    figures = {name: value.item() for name, (value, mask) in found.items() if mask.any()}
    return loss, {"loss": loss.item(), **figures}


def _free(clean: Latents, held: Held | None) -> Latents:
    # 1 where noise is added, 0 where held: [B, 1, F, 1, 1] and [B, A, 1]
    batch, _, frames, _, _ = clean.video.shape
    free = Latents(
        clean.video.new_ones(batch, 1, frames, 1, 1), clean.audio.new_ones(batch, clean.audio.shape[1], 1)
    )
    return free if held is None else free.map(torch.mul, held.free(clean))


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, 1)


class FlowNetworks(nn.Module):
    """The transformer, and the text encoder where it is trained with it: noisy latents, text -> velocity."""

    def __init__(
        self,
        transformer: JointTransformer,
        text_encoder: TextEncoder | None = None,
        run_block: RunBlock = run_in_place,
    ) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.run_block = transformer, text_encoder, run_block

    def forward(self, latents: Latents, text: Tensor) -> Latents:
        """`text` is states [B, L, C], or tokens [B, L], int64, for the text encoder."""
        if self.text_encoder is not None and not text.is_floating_point():
            text = self.text_encoder(text)
        layout = PackedLayout.of(latents, text, self.transformer.config.coords_style)
        return self.transformer(latents, text, layout, attend=trainable_attention, run_block=self.run_block)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Give a transformer or text encoder that is trained from nothing its first weights, in place.

    Activations have about unit size, gains are 1, and the transformer predicts zero.
    """
    draw = generator(seed, "first weights")
    for name, weight in module.named_parameters():
        if weight.ndim < 2 or "final_linear" in name:  # gains are stored as their offset from 1
            weight.zero_()
        else:
            scale = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=draw) * scale)


@dataclass(frozen=True)
class FlowSettings:
    """Settings of a run of `steps` updates.

    `image` and `audio` are the shares of films with a held image or sound, `negative` that of batches whose
    text is the negative prompt. A held image is the first latent frame, most often, or up to `beginning` of
    them; where it is not held, its error counts `first_frame` times.
    """

    steps: int
    seed: int = 0
    shift: float = SHIFT
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.998
    image: float = 0.15
    beginning: int = 1
    audio: float = 0.12
    negative: float = 0.1
    first_frame: float = 1.0


class FlowStage:
    """Trains the transformer, and the text encoder if one is given; a `Stage` of `loop.train`.

    `negative` is the negative prompt as the data gives text, for a batch of one. The accelerator says the
    device and how many batches make an update. With `compiled` the layers go through torch.compile.
    """

    def __init__(
        self,
        transformer: JointTransformer,
        data: Data,
        negative: Tensor,
        settings: FlowSettings,
        accelerator: Accelerator,
        text_encoder: TextEncoder | None = None,
        compiled: bool = False,
    ) -> None:
        self.data, self.settings, self.accelerator = data, settings, accelerator
        self.networks = FlowNetworks(transformer, text_encoder).requires_grad_(True).train()
        self.module = accelerator.prepare_model(self.networks)
        self.negative = negative.to(accelerator.device)
        for leaf in self.networks.modules():
            if isinstance(leaf, ModalityLinear):
                leaf.weight.copies = leaf.modalities
        self.optimizers = optimizers(self.networks, settings.muon_lr, settings.adam_lr, settings.betas)
        self.ema = Ema(self.networks, settings.ema)
        if compiled:
            compile_layers(transformer.block.layers)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The settings that a run must be continued with."""
        return {
            "stage": "flow",
            **asdict(self.settings),
            "batches": self.accelerator.gradient_accumulation_steps,
            "text_encoder": self.networks.text_encoder is not None,
            "config": self.networks.transformer.config.to_dict(),
            "dtype": str(self.networks.transformer.compute_dtype),
            "data": self.data.fingerprint,
            "negative_checksum": checksum(self.negative),
        }

    def step(self, step: int) -> dict[str, float]:
        """Make update number `step`; returns the mean loss and its parts, by stream, over the batches."""
        scale_rates(self.optimizers, decayed(step, self.settings.steps))
        figures = accumulated(self.accelerator, self.module, self._loss, step)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.networks)
        return figures

    def _loss(self, index: int) -> tuple[Tensor, dict[str, float]]:
        return drawn_loss(self.module, self.data.batch(index), self.negative, self.settings, index)

    def state_dict(self) -> dict[str, Any]:
        """Weights, their running mean and the optimizers' states."""
        return {
            "networks": self.networks.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.networks.load_state_dict(state["networks"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class Holding(Protocol):
    """The settings that say what is held, as in `FlowSettings`."""

    image: float
    beginning: int
    audio: float


class Drawn(Holding, Protocol):
    """The settings that say how a batch is noised, as in `FlowSettings`."""

    seed: int
    shift: float
    negative: float
    first_frame: float


def draw_held(films: int, settings: Holding, draw: torch.Generator) -> Held:
    """Draw what is held in the films of a batch; the more frames, the more seldom."""
    image, audio = (torch.rand(films, generator=draw) for _ in range(2))
    frames = 1 + (settings.beginning * (image / settings.image).square()).long()
    return Held(torch.where(image < settings.image, frames, 0), audio < settings.audio)


def drawn_loss(
    velocity_fn: VelocityFunction, batch: Batch, negative: Tensor, settings: Drawn, index: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss of batch number `index` under noise, levels and tasks drawn for that number and seed.

    Computed on the device of `negative`.
    """
    device, draw = negative.device, generator(settings.seed, "flow", index)
    clean, text = batch.clean.map(lambda x: x.to(device)), batch.text.to(device)
    films = len(clean.video)
    sigma = sample_sigmas(films, settings.shift, draw).to(device)
    held = draw_held(films, settings, draw)
    if torch.rand(1, generator=draw).item() < settings.negative:
        text = negative.expand(films, *negative.shape[1:])
    noise = normal_like(clean, draw)
    return flow_loss(velocity_fn, clean, text, sigma, noise, held, first_frame=settings.first_frame)


def accumulated(
    accelerator: Accelerator,
    module: nn.Module,
    loss_fn: Callable[[int], tuple[Tensor, dict[str, float]]],
    step: int,
) -> dict[str, float]:
    """Add up the gradients of all batches of update `step`, and return the means of their figures.

    `loss_fn(index)` is the loss of batch number `index` of the run.
    """
    parts = accelerator.gradient_accumulation_steps
    found: dict[str, list[float]] = {}
    for index in range(step * parts, (step + 1) * parts):
        with accelerator.accumulate(module):
            loss, figures = loss_fn(index)
            accelerator.backward(loss)
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
