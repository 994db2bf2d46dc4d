"""The few-step sampler of the distilled model: no guidance, fresh noise at every step."""

from torch import Tensor

from ..model.packing import Latents
from .conditions import Conditions, DenoiseFunction, StepCallback, no_callback
from .noise import NoiseFunction


def sample_dmd2(
    denoise_fn: DenoiseFunction,
    latents: Latents,
    sigmas: Tensor,
    noise_fn: NoiseFunction,
    conditions: Conditions,
    callback: StepCallback = no_callback,
) -> Latents:
    """Denoise `latents` from sigmas[0] to sigmas[-1] = 0 and return them clean.

    At each level the clean film is predicted and put back to the next level with fresh noise. Multi-step
    sampling of a distribution-matching student, DMD2 (arXiv:2405.14867), section 4.4.
    """
    for index, (sigma, sigma_next) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        latents = conditions.apply(latents)
        denoised = denoise_fn(latents, sigma)
        latents = renoise(denoised, sigma_next, noise_fn(latents))
        callback(index, latents, denoised)
    return conditions.apply(latents)


def renoise(denoised: Latents, sigma: float, noise: Latents) -> Latents:
    """Return `denoised` put back to noise level `sigma` in [0, 1] (rectified flow)."""
    return denoised.map(lambda clean, e: sigma * e + (1 - sigma) * clean, noise)
