"""UniPC for rectified flow: the sampler of the base and super-resolution models.

Order 2, B(h) = expm1(h) ('bh2'), predicting clean samples (arXiv:2302.04867). With alpha = 1 - sigma the half
log signal-to-noise ratio is lambda = log(1 - sigma) - log(sigma).
"""

import math

from torch import Tensor

from ..model.packing import Latents
from .conditions import Conditions, DenoiseFunction, StepCallback, no_callback


def sample_unipc(
    denoise_fn: DenoiseFunction,
    latents: Latents,
    sigmas: Tensor,
    conditions: Conditions,
    callback: StepCallback = no_callback,
) -> Latents:
    """Denoise `latents` from sigmas[0] to sigmas[-1] = 0 and return them clean.

    One call of `denoise_fn` per step; the corrector uses the call that the next prediction needs anyway.
    """
    levels = sigmas.double().tolist()
    steps = len(levels) - 1
    history: list[Latents] = []  # predicted clean latents of the last steps, newest last
    corrected, order = latents, 0
    for index, sigma in enumerate(levels[:-1]):
        latents = conditions.apply(latents)
        denoised = denoise_fn(latents, sigma)
        corrected = latents if index == 0 else _correct(corrected, denoised, history, levels, index, order)
        history = [*history[-1:], denoised]
        order = min(2, steps - index, index + 1)
        latents = _predict(corrected, history, levels, index, order)
        callback(index, latents, denoised)
    return conditions.apply(latents)


def _predict(y: Latents, history: list[Latents], levels: list[float], index: int, order: int) -> Latents:
    """Step from level `index` to the next; `history` ends with this level's clean prediction."""
    sigma, target = levels[index], levels[index + 1]
    if target == 0:
        return history[-1]
    h = _lambda(target) - _lambda(sigma)
    scale, e = target / sigma, (1 - target) * math.expm1(-h)
    if order == 1:
        return y.map(lambda y, m: scale * y - e * m, history[-1])
    r = (_lambda(levels[index - 1]) - _lambda(sigma)) / h
    return y.map(lambda y, m, m1: scale * y - e * m - e * (m1 - m) / (2 * r), history[-1], history[-2])


def _correct(
    y: Latents, denoised: Latents, history: list[Latents], levels: list[float], index: int, order: int
) -> Latents:
    """Redo the step to level `index` from `y`, now that the prediction `denoised` at its end is known."""
    previous, sigma = levels[index - 1], levels[index]
    h = _lambda(sigma) - _lambda(previous)
    scale, e = sigma / previous, (1 - sigma) * math.expm1(-h)
    m0 = history[-1]
    if order == 1:
        return y.map(lambda y, m0, m: scale * y - e * m0 - e * (m - m0) / 2, m0, denoised)
    r = (_lambda(levels[index - 2]) - _lambda(previous)) / h
    rho_1, rho_2 = _corrector_weights(r, h)
    return y.map(
        lambda y, m0, m, m1: scale * y - e * m0 - e * (rho_1 * (m1 - m0) / r + rho_2 * (m - m0)),
        m0, denoised, history[-2],
    )  # fmt: skip


def _corrector_weights(r: float, h: float) -> tuple[float, float]:
    """Solve [[1, 1], [r, 1]] rho = [phi_1 / e, 2 phi_2 / e]."""
    e = math.expm1(-h)
    phi_1 = e / -h - 1
    phi_2 = phi_1 / -h - 0.5
    first, second = phi_1 / e, 2 * phi_2 / e
    rho_1 = (first - second) / (1 - r)
    return rho_1, first - rho_1


def _lambda(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)
