"""The host's SAMPLER, GUIDER and NOISE objects around the core's samplers.

They exist beside the stock ones because the published samplers start from unscaled noise and draw step noise
from a CPU generator: so a film of a graph is the command line's film of the same seed.
"""

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ..model.finite import check_finite
from ..model.packing import Latents
from ..sampler.conditions import DenoiseFunction, StepCallback
from ..sampler.dmd2 import sample_dmd2
from ..sampler.guidance import HIGH_NOISE_VIDEO_SCALE, base_video_scale, guide, super_resolution_video_scale
from ..sampler.noise import FilmNoise, NoiseFunction
from ..sampler.schedule import FIRST_SIGMA
from ..sampler.unipc import sample_unipc
from .inputs import CURE
from .latents import start_audio, streams
from .model import to_core, to_host

SAMPLERS = ("dmd2", "unipc")
HIGHEST_LEVEL = 0.9998  # of UniPC, as published; stock schedules begin at 1, which has no logarithm
NoiseSource = Callable[[int], NoiseFunction]  # seed -> what draws the noise of the steps


def step_noise(seed: int) -> NoiseFunction:
    """The noise of the few-step sampler for a seed."""
    return FilmNoise(seed).step


class MaskedConditions:
    """What a noise mask holds: `clean` latents where `mask` is 0; both packed [B, 1, N].

    Where it is between 0 and 1 the host blends what goes into the network and what comes out of it.
    """

    def __init__(self, mask: Tensor | None, clean: Tensor, shapes: list[tuple[int, ...]]) -> None:
        self.held = None if mask is None else _unpack(mask.expand_as(clean) == 0, shapes)
        self.clean = None if mask is None else _unpack(clean, shapes)

    def apply(self, latents: Latents) -> Latents:
        """Return `latents` with the held parts put in."""
        if self.held is None:
            return latents
        return latents.map(lambda x, held, clean: torch.where(held, clean, x), self.held, self.clean)


class CoreSampler(comfy.samplers.Sampler):
    """One of the core's samplers as a SAMPLER; `noise_source` gives the few-step sampler its noise."""

    def __init__(self, name: str, noise_source: NoiseSource = step_noise, stage: str = "sampling") -> None:
        if name not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
        self.name, self.noise_source, self.stage = name, noise_source, stage

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,  # noqa: ARG002
    ) -> Tensor:
        """Return the clean latents, packed and normalised like `noise` and `latent_image` [B, 1, N]."""
        shapes = model_wrap.inner_model.latent_shapes
        _check_run(shapes, sigmas)
        conditions = MaskedConditions(denoise_mask, latent_image, shapes)
        start = _unpack(_start(noise, latent_image, sigmas[0].item()), shapes)
        predict = _masked(model_wrap, sigmas, extra_args, latent_image, denoise_mask)
        denoise = _denoise_function(predict, shapes)
        told = _step_callback(callback, self.stage, len(sigmas) - 1)
        levels = sigmas.cpu()
        if self.name == "dmd2":
            noise_fn = self.noise_source(extra_args.get("seed") or 0)
            result = sample_dmd2(denoise, start, levels, noise_fn, conditions, told)
        else:
            if len(levels) > 2 and levels[1] >= HIGHEST_LEVEL:
                raise ValueError(
                    f"sigmas: unipc begins at {HIGHEST_LEVEL}, of these only the first may lie above it, got "
                    f"{levels[0]:.6g} and {levels[1]:.6g}; take fewer steps or a lower shift"
                )
            result = sample_unipc(denoise, start, levels.clamp(max=HIGHEST_LEVEL), conditions, told)
        last = levels[-1].item()
        if last > 0:  # a part of a schedule: the sampler of the next part multiplies by 1 - sigma again
            result = conditions.apply(result.map(lambda x: x / (1 - last)))
        return _pack(result)


def _check_run(shapes: list[tuple[int, ...]], sigmas: Tensor) -> None:
    if len(shapes) != 2:
        found = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"sampler: HappyHorse Sampler Select is for films with sound, got latents {found} of another "
            "model; choose one with KSamplerSelect"
        )
    if not (sigmas[1:] < sigmas[:-1]).all():
        levels = ", ".join(f"{level:.3g}" for level in sigmas.tolist())
        raise ValueError(
            f"sigmas: noise levels must fall from step to step, got {levels}; take those of HappyHorse Sigmas"
        )


def _start(noise: Tensor, latent_image: Tensor, sigma: float) -> Tensor:
    """What sampling starts from: at the first published level or above the noise itself, else the mixture."""
    if sigma >= FIRST_SIGMA:
        return noise
    return sigma * noise + (1 - sigma) * latent_image


def _unpack(packed: Tensor, shapes: list[tuple[int, ...]]) -> Latents:
    return to_core(comfy.utils.unpack_latents(packed, shapes))


def _pack(latents: Latents) -> Tensor:
    return comfy.utils.pack_latents(to_host(latents))[0]


def _masked(
    model: comfy.samplers.CFGGuider,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    clean: Tensor,
    mask: Tensor | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided prediction of packed latents, with the mask as the host's samplers take it."""
    options = {key: extra_args[key] for key in ("model_options", "seed")}
    mask_at = options["model_options"].get("denoise_mask_function")

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        if mask is None:
            return model(x, sigma, **options)
        at = mask
        if mask_at is not None:
            at = mask_at(sigma, mask, extra_options={"model": model, "sigmas": sigmas})
        x = x * at + clean * (1 - at)
        return model(x, sigma, **options) * at + clean * (1 - at)

    return predict


def _denoise_function(
    predict: Callable[[Tensor, Tensor], Tensor], shapes: list[tuple[int, ...]]
) -> DenoiseFunction:
    def denoise(latents: Latents, sigma: float) -> Latents:
        x = _pack(latents)
        return _unpack(predict(x, torch.full((x.shape[0],), sigma, device=x.device)), shapes)

    return denoise


def _step_callback(callback: Callable[..., None] | None, stage: str, steps: int) -> StepCallback:
    def after_step(index: int, latents: Latents, denoised: Latents) -> None:
        check_finite(latents._asdict(), f"{stage}, step {index + 1} of {steps}", CURE)
        if callback is not None:
            callback(index, _pack(denoised), _pack(latents), steps)

    return after_step


class PublishedGuider(comfy.samplers.CFGGuider):
    """Guidance as published: the audio's weight is constant, the video's goes by noise level, or in
    super-resolution by frame.
    """

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return the guided clean latents, packed; nodes that patch guidance are heard as usual."""
        del seed
        options = model_options or {}
        conds = [self.conds["positive"], self.conds["negative"]]
        told = {
            "conds": conds, "cond_scale": self.cfg, "timestep": timestep, "sigma": timestep, "input": x,
            "model": self.inner_model, "model_options": options,
        }  # fmt: skip
        if "sampler_calc_cond_batch_function" in options:
            results = options["sampler_calc_cond_batch_function"](told)
        else:
            results = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        for patch in options.get("sampler_pre_cfg_function", []):
            results = patch({**told, "conds_out": results})
        if "sampler_cfg_function" in options:  # another node's guidance takes the place of the published one
            arguments = (*results[:2], self.cfg, x, timestep, options, *conds)
            return comfy.samplers.cfg_function(self.inner_model, *arguments)
        shapes = self.inner_model.latent_shapes
        conditional, unconditional = (_unpack(result, shapes) for result in results[:2])
        scale = self._video_scale(timestep.flatten()[0].item(), conditional.video)
        denoised = _pack(guide(conditional, unconditional, scale))
        told |= {
            "cond": conds[0], "uncond": conds[1], "cond_denoised": results[0], "uncond_denoised": results[1]
        }  # fmt: skip
        for patch in options.get("sampler_post_cfg_function", []):
            denoised = patch({**told, "denoised": denoised})
        return denoised

    def _video_scale(self, sigma: float, video: Tensor) -> float | Tensor:
        if self.inner_model.variant.endswith("_sr"):
            return super_resolution_video_scale(video.shape[2], video.device)
        return base_video_scale(sigma)


def guider(
    model: Any, positive: list[Any], negative: list[Any] | None, guided: bool
) -> comfy.samplers.CFGGuider:
    """The GUIDER of a model: published guidance with a negative prompt, or one pass without."""
    for socket, prompts in (("positive", positive), ("negative", negative if guided else None)):
        if prompts is not None:
            _check_prompts(prompts, socket)
    if not guided:
        result = comfy.samplers.CFGGuider(model)
        result.inner_set_conds({"positive": positive})
        result.set_cfg(1.0)
        return result
    if negative is None:
        raise ValueError(
            "negative: the base model is sampled with guidance and needs a negative prompt, got none; "
            "connect a HappyHorse Text Encode, or use a distilled model"
        )
    result = PublishedGuider(model)
    result.set_conds(positive, negative)
    result.set_cfg(HIGH_NOISE_VIDEO_SCALE)  # for nodes that bring a rule of their own
    return result


def _check_prompts(prompts: list[Any], socket: str) -> None:
    """Raise ValueError for a CONDITIONING that is empty or only for a part of the picture."""
    if not prompts:
        raise ValueError(
            f"{socket}: there is no prompt in it; encode one with the CLIP of HappyHorse Load Text Encoder"
        )
    if any(part in extra for _, extra in prompts for part in ("area", "mask")):
        raise ValueError(
            f"{socket}: this conditioning is for an area or mask of the picture, which films do not have; "
            "connect it without Conditioning (Set Area) or (Set Mask)"
        )


class FilmNoiseObject:
    """The NOISE of a seed, drawn as everywhere in the host; given audio that is a start takes its place."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, input_latent: dict[str, Any]) -> NestedTensor:
        """Return noise in the shapes of a LATENT."""
        if (start := start_audio(input_latent)) is not None:
            streams(input_latent, "latent_image")
        noise = comfy.sample.prepare_noise(
            input_latent["samples"], self.seed, input_latent.get("batch_index")
        )
        if start is not None:
            noise = NestedTensor([noise.unbind()[0], start.float().cpu()])
        return noise


class FixedNoise:
    """A NOISE that is already drawn, or prepared: what sampling at full noise starts from, normalised."""

    def __init__(self, seed: int, noise: NestedTensor) -> None:
        self.seed, self.noise = seed, noise

    def generate_noise(self, input_latent: dict[str, Any]) -> NestedTensor:
        """Return it, whatever the LATENT; raises ValueError where the shapes differ."""
        shapes = [tuple(t.shape) for t in self.noise.unbind()]
        wanted = [tuple(t.shape) for t in input_latent["samples"].unbind()]
        if shapes != wanted:
            raise ValueError(
                f"noise is of shapes {shapes}, latent_image of {wanted}; connect both from one node"
            )
        return self.noise
