"""The recorded runs through the host's own execution: its guiders, its packed latents, its conditioning."""

import pytest
import torch
from comfy.nested_tensor import NestedTensor
from golden_files import GoldenFile, golden_files, recorded_transformer, relative_error

from happyhorse.model.config import TransformerConfig
from happyhorse.model.geometry import FilmShape
from happyhorse.model.packing import Latents
from happyhorse.model.video_vae import denormalize_latents, normalize_latents
from happyhorse.nodes.latents import film_latent
from happyhorse.nodes.model import make_patcher, to_host
from happyhorse.nodes.sampler import run as run_host
from happyhorse.nodes.sampling import CoreSampler, FixedNoise, guider
from happyhorse.nodes.super_resolution import start_of
from happyhorse.sampler.schedule import flow_sigmas

SIZE_STEP = 32


class Recording:
    """One recorded run: its inputs and its random draws, in their order."""

    def __init__(self, file: GoldenFile) -> None:
        self.file, self.meta, self.tensors = file, file.config, file.tensors()
        self.draws = iter([self.tensors[f"draw.{name}"] for name in self.meta["draw_order"]])
        self.audio = self.tensors.get("in.audio_latent")

    def text(self, name: str, length: str) -> list:
        return [[self.tensors[name][:, : self.meta[length]], {}]]

    def model(self, part: str, variant: str):
        values, state = recorded_transformer(self.file, part)
        return make_patcher(TransformerConfig.from_dict(values), variant, dict(state), torch.float32)

    def frame(self, shape: FilmShape) -> torch.Tensor | None:
        size = f"{shape.latent_rows * 16}x{shape.latent_columns * 16}"
        return self.tensors[f"in.image_latent.{size}"] if self.meta.get("image") else None

    def step_noise(self, like: Latents) -> Latents:
        noise = Latents(next(self.draws), next(self.draws))
        assert noise.video.shape == like.video.shape
        return noise

    def shape(self, size: str) -> FilmShape:
        width, height = (side // SIZE_STEP * SIZE_STEP for side in self.meta[size])
        if self.audio is not None:
            return FilmShape(width, height, self.audio.shape[1])
        return FilmShape.from_seconds(width, height, self.meta["seconds"])


def base_film(run: Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw latents of the base stage."""
    guided, shape = run.meta["cfg_number"] == 2, run.shape("base_size")
    audio = next(run.draws) if run.audio is None else run.audio
    start = Latents(next(run.draws), audio)
    video, mask = torch.zeros_like(start.video), torch.ones_like(start.video[:, :1])
    if (frame := run.frame(shape)) is not None:
        video[:, :, :1], mask[:, :, :1] = denormalize_latents(frame), 0
    audio_mask = torch.full((1, 1, audio.shape[1]), float(not (guided and run.audio is not None)))
    latent = film_latent(video, audio.transpose(1, 2), mask, audio_mask)
    sampler = CoreSampler("unipc" if guided else "dmd2", noise_source=lambda seed: run.step_noise)  # noqa: ARG005
    positive, negative = run.text("in.text", "text_len"), run.text("in.text_null", "text_null_len")
    model = run.model("base", "base" if guided else "distill")
    guide = guider(model, positive, negative if guided else None, guided)
    sigmas = flow_sigmas(run.meta["steps"], run.meta["shift"])
    return run_host(guide, sampler, sigmas, latent, FixedNoise(0, NestedTensor(to_host(start))))


def large_film(run: Recording, video: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """Raw video latents of the super-resolution stage."""
    shape = run.shape("sr_size")
    frame = run.frame(shape)
    start, held = start_of(
        film_latent(video, audio),
        shape,
        run.step_noise,
        None if frame is None else denormalize_latents(frame),
    )
    guided = run.meta["sr_cfg_number"] == 2
    positive, negative = run.text("in.text", "text_len"), run.text("in.text_null", "text_null_len")
    guide = guider(run.model("sr", "540p_sr"), positive, negative, guided)
    sigmas = flow_sigmas(run.meta["sr_steps"], run.meta["shift"])
    return run_host(guide, CoreSampler("unipc"), sigmas, held, FixedNoise(0, start))[0]


@pytest.mark.parametrize("golden", golden_files("e2e"), ids=str)
def test_golden_runs_through_the_host(golden: GoldenFile) -> None:
    run = Recording(golden)
    with torch.inference_mode():
        video, audio = base_film(run)
        if "sr_size" in run.meta:
            video = large_film(run, video, audio)
    assert next(run.draws, None) is None, "every recorded draw must be used"
    assert relative_error(normalize_latents(video), run.tensors["out.video"]) < 1e-4
    assert relative_error(audio.transpose(1, 2), run.tensors["out.audio"]) < 1e-4
