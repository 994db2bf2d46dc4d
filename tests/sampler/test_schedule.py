import re

import pytest
import torch
from golden_files import GoldenFile, golden_files, relative_error

from happyhorse.model.packing import Latents
from happyhorse.sampler import guidance, super_resolution
from happyhorse.sampler.conditions import Conditions
from happyhorse.sampler.dmd2 import renoise
from happyhorse.sampler.schedule import flow_sigmas, integer_time
from happyhorse.sampler.unipc import sample_unipc

GOLDENS = pytest.mark.parametrize("golden", golden_files("schedule"), ids=str)


def both(tensor: torch.Tensor) -> Latents:
    return Latents(tensor, tensor)


@GOLDENS
def test_golden_sigma_grids(golden: GoldenFile) -> None:
    tensors = golden.tensors()
    for steps, shift in golden.config["grids"]:
        sigmas = flow_sigmas(steps, shift)
        want = tensors[f"grid.steps{steps}.shift{shift:g}.sigmas"]
        assert relative_error(sigmas, want) < 1e-5
        times = [integer_time(sigma) for sigma in sigmas[:-1].tolist()]
        assert times == tensors[f"grid.steps{steps}.shift{shift:g}.timesteps"].tolist()
    recorded = [name for name in tensors if name.startswith("grid.")]
    assert len(recorded) == 2 * len(golden.config["grids"])


@GOLDENS
def test_golden_few_step_update(golden: GoldenFile) -> None:
    tensors, meta = golden.tensors(), golden.config
    sigmas = flow_sigmas(meta["few_step_steps"], meta["shift"]).tolist()
    for index in meta["few_step_indices"]:
        x, velocity, noise, want = (
            tensors[f"few_step.{index}.{name}"] for name in ("x", "velocity", "noise", "out")
        )
        got = renoise(both(x - sigmas[index] * velocity), sigmas[index + 1], both(noise)).video
        assert relative_error(got, want) < 1e-5


@GOLDENS
def test_golden_unipc(golden: GoldenFile) -> None:
    tensors, meta = golden.tensors(), golden.config
    for steps in meta["unipc_steps"]:
        want = tensors[f"unipc.steps{steps}.trajectory"]
        step, states = iter(range(steps)), []

        def denoise(latents: Latents, sigma: float, step=step) -> Latents:
            index = next(step)
            return latents.map(lambda x: x - sigma * torch.tanh(0.7 * x + 0.1 * index))

        def keep(index: int, latents: Latents, denoised: Latents, states=states) -> None:  # noqa: ARG001
            states.append(latents.video)

        final = sample_unipc(denoise, both(want[0]), flow_sigmas(steps, meta["shift"]), Conditions(), keep)
        assert len(states) == steps
        assert torch.equal(final.video, states[-1])
        for got, expected in zip(states, want[1:], strict=True):
            assert relative_error(got, expected) < 1e-5


@GOLDENS
def test_golden_renoising_and_audio_mix(golden: GoldenFile) -> None:
    tensors, meta = golden.tensors(), golden.config
    assert meta["noise_value"] == super_resolution.RENOISE_TIME
    assert meta["sr_audio_noise_scale"] == super_resolution.AUDIO_NOISE
    alphas = super_resolution.zero_terminal_snr_alphas()
    assert relative_error(alphas, tensors["zero_snr.sigmas"]) < 1e-5
    got = super_resolution.renoise_video(tensors["zero_snr.latent"], tensors["zero_snr.noise"])
    assert relative_error(got, tensors[f"zero_snr.renoised_{meta['noise_value']}"]) < 1e-5
    got = super_resolution.mix_audio(tensors["sr_audio.latent"], tensors["sr_audio.noise"])
    assert relative_error(got, tensors[f"sr_audio.mixed_{meta['sr_audio_noise_scale']}"]) < 1e-5


@GOLDENS
@pytest.mark.parametrize("stage", ["base", "sr"])
def test_golden_guidance(golden: GoldenFile, stage: str) -> None:
    tensors, meta = golden.tensors(), golden.config
    steps = meta["guidance_steps"][stage]
    sigmas = flow_sigmas(steps, meta["shift"]).tolist()
    assert [integer_time(s) for s in sigmas[:-1]] == tensors[f"guidance.{stage}.timesteps"].tolist()
    if stage == "sr":
        per_frame = guidance.super_resolution_video_scale(meta["guidance_latent_length"])
        assert torch.equal(per_frame.flatten(), tensors["guidance.sr.scale_per_frame"])
    for index in range(steps):
        pair = [
            Latents(*(tensors[f"guidance.{stage}.{index}.{kind}_{stream}"] for stream in Latents._fields))
            for kind in ("cond", "uncond")
        ]
        scale = guidance.base_video_scale(sigmas[index]) if stage == "base" else per_frame
        got = guidance.guide(*pair, scale)
        for stream in Latents._fields:
            want = tensors[f"guidance.{stage}.{index}.{stream}"]
            assert relative_error(getattr(got, stream), want) < 1e-5, (index, stream)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_schedule_without_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"steps must be at least 1, got {steps}")):
        flow_sigmas(steps)
