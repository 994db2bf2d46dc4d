"""Training of the miniature's audio VAE on the sounds of the two worlds.

Its convolutions are trained without weight norm, which `finished` adds.
"""

import math
from collections.abc import Mapping
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.audio_vae import AudioVAE, ResidualUnit, Snake
from ..model.config import AudioVAEConfig
from .data.clip import make_sound
from .data.world import training_attributes
from .generators import generator
from .optim import decayed, optimizers, scale_rates

PLAIN = SimpleNamespace(WeightNormConv1d=nn.Conv1d, WeightNormConvTranspose1d=nn.ConvTranspose1d)
CROPS = (8, 12, 16)  # latents; the network sees 8 to 10 to each side
LATENTS = 48  # of all crops of a step
EDGES = 0.2  # share of crops that begin with the film, and of those that end with it
NOISE = 0.05  # added to latents in training: the size below which the decoder hears no difference
SAMPLING = 0.05  # standard deviation of sampled latents around their mean
PRIOR = 0.01  # weight of the latents' divergence from standard normal ones
RESIDUAL = 0.1  # size of what a residual unit adds, of the decoder's waveform, at the start
WINDOWS = (512, 2048)  # of the spectra compared
QUIET = 1e-3  # amplitude added before logarithms
SILENT_SPECTRUM, SILENT_SOUND = 1e-4, 1e-3  # root mean squares from which on errors are relative
MUON_RATE, ADAM_RATE = 3e-3, 1e-3
CLIPS = 400


class AudioVAEStage:
    """The training of an audio VAE, in plain convolutions; see `training.loop.Stage`.

    Its rates fall to nothing from the start, which is what a running mean of the weights would be for.
    With `compiled`, which needs a C++ compiler, a step takes two thirds of the time.
    """

    def __init__(
        self,
        config: AudioVAEConfig,
        steps: int,
        *,
        seed: int = 0,
        clips: int = CLIPS,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        self.fingerprint: Mapping[str, Any] = {
            "audio_vae": config.to_dict(), "steps": steps, "seed": seed, "clips": clips
        }  # fmt: skip
        self.config, self.steps, self.seed = config, steps, seed
        self.sounds = training_sounds(clips, seed).to(device)
        self.vae = AudioVAE(config, PLAIN).to(device)
        initialize(self.vae, self._batch(generator(seed, "audio_vae", "start")), seed)
        if compiled:
            for module in self.vae.modules():
                if isinstance(module, Snake):
                    module.compile(dynamic=True)
        self.optimizers = optimizers(self.vae, MUON_RATE, ADAM_RATE)

    def step(self, step: int) -> dict[str, float]:
        """Rebuild one batch of crops."""
        random = generator(self.seed, "audio_vae", step)
        waveform = self._batch(random)
        mean = self.vae.encoder(waveform)[:, : self.config.latent_dim]
        noise = torch.randn(mean.shape, generator=random).to(mean.device)
        rebuilt = self.vae.decoder(mean + NOISE * noise)
        figures = sound_losses(waveform, rebuilt)
        figures["prior"] = divergence(mean)
        loss = (
            figures["convergence"]
            + 0.5 * figures["logarithmic"]
            + 0.5 * figures["squares"]
            + PRIOR * figures["prior"]
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        scale_rates(self.optimizers, decayed(step, self.steps, flat=0.0))
        for optimizer in self.optimizers:
            optimizer.step()
        return {"loss": loss.item(), **{name: value.item() for name, value in figures.items()}}

    def _batch(self, random: torch.Generator) -> Tensor:
        """Crops [B, 2, N] of one length, `LATENTS` in all."""

        def draw(end: int) -> int:
            return int(torch.randint(end, (), generator=random))

        size = self.config.samples_per_latent
        length = CROPS[draw(len(CROPS))]
        last = self.sounds.shape[1] // size - length
        crops = []
        for _ in range(LATENTS // length):
            edge = float(torch.rand((), generator=random))
            start = 0 if edge < EDGES else last if edge < 2 * EDGES else draw(last + 1)
            crops.append(self.sounds[draw(len(self.sounds)), start * size : (start + length) * size])
        return torch.stack(crops)[:, None].expand(-1, self.config.io_channels, -1)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizers."""
        return {
            "vae": self.vae.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.vae.load_state_dict(state["vae"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def training_sounds(clips: int, seed: int) -> Tensor:
    """Sounds [clips, N] of so many training clips; both sides of a clip are the same."""
    random = Random(seed)
    sounds = [make_sound(training_attributes(random), seed + index)[0] for index in range(clips)]
    return torch.stack([torch.from_numpy(sound) for sound in sounds])


def sound_losses(sound: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
    """How far `rebuilt` is from `sound`, both [B, C, N], with N at least 2048.

    "convergence" (relative error of the magnitude spectra) and "logarithmic" (mean distance of their natural
    logarithms), each averaged over `WINDOWS` (arXiv:1910.11480); "squares" is the relative squared error.
    """
    convergence = logarithmic = torch.zeros((), device=sound.device)
    for window in WINDOWS:
        expected, found = spectra(sound, window), spectra(rebuilt, window)
        size = expected.norm().clamp(min=SILENT_SPECTRUM * expected.numel() ** 0.5)
        convergence = convergence + (expected - found).norm() / size
        logarithmic = logarithmic + F.l1_loss((found + QUIET).log(), (expected + QUIET).log())
    size = sound.square().mean().clamp(min=SILENT_SOUND**2)
    return {
        "convergence": convergence / len(WINDOWS),
        "logarithmic": logarithmic / len(WINDOWS),
        "squares": (sound - rebuilt).square().mean() / size,
    }


def spectra(sound: Tensor, window: int) -> Tensor:
    """Magnitudes [B * C, window // 2 + 1, times] of `sound` [B, C, N]; a tone's are up to its amplitude."""
    shape = torch.hann_window(window, device=sound.device) / (window / 4)
    complex_values = torch.stft(sound.flatten(0, 1), window, window // 4, window=shape, return_complex=True)
    # the square root has no derivative at 0
    return (complex_values.real.square() + complex_values.imag.square() + 1e-10).sqrt()


def divergence(latents: Tensor) -> Tensor:
    """Mean over the channels of `latents` [B, C, A] of their divergence from N(0, 1), were they normal."""
    variance, mean = torch.var_mean(latents, dim=(0, 2))
    return (0.5 * (variance + mean.square() - 1 - (variance + 1e-6).log())).mean()


@torch.no_grad()
def initialize(vae: AudioVAE, waveform: Tensor, seed: int) -> None:
    """Draw weights so that each convolution of `vae` gives zero mean, unit std per channel for `waveform`.

    Those that end a residual unit, and the last one, give `RESIDUAL` of it and of the waveform's std. The
    scale half of the latents is zero: the mean alone is trained. Otherwise training ends in silence.
    """
    random = generator(seed, "audio_vae", "weights")
    small = {unit.layers[-1] for unit in vae.modules() if isinstance(unit, ResidualUnit)}
    last = vae.decoder.layers[-1]
    sizes = {last: RESIDUAL * waveform.std().item(), **dict.fromkeys(small, RESIDUAL)}

    def fit(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        draws = torch.randn(module.weight.shape, generator=random)
        module.weight.copy_(draws / module.weight[0].numel() ** 0.5)
        if module.bias is not None:
            module.bias.zero_()
        std, mean = torch.std_mean(module.forward(*inputs), dim=(0, 2))
        size = sizes.get(module, 1.0) / std.clamp(min=1e-4)
        transposed = isinstance(module, nn.ConvTranspose1d)
        module.weight.mul_(size[None, :, None] if transposed else size[:, None, None])
        if module.bias is not None:
            module.bias.copy_(-mean * size)
        return module.forward(*inputs)

    hooks = []
    for module in vae.modules():
        if isinstance(module, Snake):
            module.alpha.zero_()
            module.beta.zero_()
        elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            hooks.append(module.register_forward_hook(fit))
    latents = vae.encoder(waveform)[:, : vae.config.latent_dim]
    vae.decoder(latents)
    for hook in hooks:
        hook.remove()
    _scale_half(vae.encoder.layers[-1].weight).zero_()
    _scale_half(vae.encoder.layers[-1].bias).zero_()


def _scale_half(parameter: Tensor) -> Tensor:
    return parameter[len(parameter) // 2 :]


@torch.no_grad()
def finished(vae: AudioVAE, sounds: Tensor) -> AudioVAE:
    """The trained plain `vae` with weight norm, and latents of unit std per channel on `sounds` [B, 2, N].

    It decodes what it encodes as `vae` does. Its sampled latents vary by `SAMPLING` around their mean.
    """
    result = AudioVAE(vae.config).to(sounds.device)
    std = torch.cat([vae.encode(sound[None]) for sound in sounds]).flatten(0, 1).std(dim=0)
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    end, begin = f"encoder.layers.{len(vae.encoder.layers) - 1}.", "decoder.layers.0."
    half = vae.config.latent_dim
    weights[end + "weight"][:half] /= std[:, None, None]
    weights[end + "bias"][:half] /= std
    # softplus of it, and what sample_latent adds
    _scale_half(weights[end + "bias"]).fill_(math.log(math.expm1(SAMPLING - 1e-4)))
    weights[begin + "weight"] *= std[None, :, None]
    state = {}
    for name, value in weights.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight":
            norm = value.flatten(1).norm(dim=1)[:, None, None]
            state[f"{stem}.weight_g"] = norm
            # a row of zeros has no direction to keep
            state[f"{stem}.weight_v"] = torch.where(norm > 0, value, torch.ones_like(value))
        else:
            state[name] = value
    result.load_state_dict(state)
    return result.requires_grad_(False).eval()
