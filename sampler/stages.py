"""The two sampling stages of a film, with the published settings of each model variant."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..model.packing import Latents, PackedLayout
from ..model.run_block import RunBlock, run_in_place
from ..model.transformer import JointTransformer
from . import super_resolution
from .conditions import Conditions, DenoiseFunction, StepCallback, no_callback
from .dmd2 import sample_dmd2
from .guidance import base_video_scale, guide, super_resolution_video_scale
from .noise import NoiseFunction
from .schedule import SHIFT, flow_sigmas
from .unipc import sample_unipc

Network = Callable[[Latents, Tensor], Latents]  # (latents, text states) -> velocity


@dataclass(frozen=True)
class Recipe:
    """How a variant is sampled: default steps, few-step sampler or UniPC, one pass or two with guidance."""

    steps: int
    few_step: bool
    guided: bool


RECIPES = {
    "base": Recipe(steps=32, few_step=False, guided=True),
    "distill": Recipe(steps=8, few_step=True, guided=False),
    "540p_sr": Recipe(steps=5, few_step=False, guided=False),
    "1080p_sr": Recipe(steps=5, few_step=False, guided=False),
}


def network_of(transformer: JointTransformer, run_block: RunBlock = run_in_place) -> Network:
    """The transformer as a function of latents and text states, the layout being worked out from them."""

    def network(latents: Latents, text: Tensor) -> Latents:
        layout = PackedLayout.of(latents, text, transformer.config.coords_style)
        return transformer(latents, text, layout, run_block=run_block)

    return network


def denoise_function(
    network: Network, text: Tensor, negative: Tensor | None, video_scale: Callable[[float], float | Tensor]
) -> DenoiseFunction:
    """The clean prediction for one prompt: one pass, or with a `negative` prompt two passes and guidance."""

    def denoise(latents: Latents, sigma: float) -> Latents:
        conditional = denoised(latents, network(latents, text), sigma)
        if negative is None:
            return conditional
        unconditional = denoised(latents, network(latents, negative), sigma)
        return guide(conditional, unconditional, video_scale(sigma))

    return denoise


def denoised(latents: Latents, velocity: Latents, sigma: float) -> Latents:
    """The clean latents that a velocity at noise level `sigma` points to."""
    return latents.map(lambda x, v: x - v * sigma, velocity)


def sample_base(
    network: Network,
    start: Latents,
    text: Tensor,
    *,
    negative: Tensor | None,
    few_step: bool,
    steps: int,
    noise_fn: NoiseFunction,
    conditions: Conditions,
    shift: float = SHIFT,
    callback: StepCallback = no_callback,
) -> Latents:
    """Make a film's latents from `start`, which is noise (the audio may be given instead).

    `text` and `negative` are states [B, L, C]; without `negative` there is no guidance.
    """
    denoise = denoise_function(network, text, negative, base_video_scale)
    sigmas = flow_sigmas(steps, shift)
    if few_step:
        return sample_dmd2(denoise, start, sigmas, noise_fn, conditions, callback)
    return sample_unipc(denoise, start, sigmas, conditions, callback)


def sample_super_resolution(
    network: Network,
    base: Latents,
    noise: Latents,
    text: Tensor,
    *,
    negative: Tensor | None,
    steps: int,
    first_frame: Tensor | None,
    shift: float = SHIFT,
    callback: StepCallback = no_callback,
) -> Latents:
    """Make the latents of the larger film; `noise` and `first_frame` have its size, the audio stays that of
    `base`.
    """
    start = super_resolution.prepare(base, noise, *noise.video.shape[-2:])
    scale = super_resolution_video_scale(start.video.shape[2], start.video.device)
    denoise = denoise_function(network, text, negative, lambda sigma: scale)  # noqa: ARG005
    conditions = Conditions(first_frame, start.audio)
    result = sample_unipc(denoise, start, flow_sigmas(steps, shift), conditions, callback)
    return Latents(result.video, base.audio)
