"""Distribution matching: the student's films, the gradient that they get, and runs of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_networks import NEGATIVE, filled, random_latents, tensors, text_encoder
from torch import Tensor, nn

from happyhorse.model.config import TransformerConfig
from happyhorse.model.packing import Latents
from happyhorse.model.transformer import JointTransformer
from happyhorse.sampler.conditions import Conditions
from happyhorse.sampler.guidance import base_video_scale
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.schedule import flow_sigmas
from happyhorse.sampler.stages import denoise_function, network_of, sample_base
from happyhorse.training.dmd2 import Dmd2Settings, Dmd2Stage, FilmConditions, matching_loss, simulated
from happyhorse.training.flow import Batch, FlowNetworks, Held
from happyhorse.training.generators import generator
from happyhorse.training.loop import train

CONFIG = TransformerConfig(
    num_layers=2, hidden_size=32, head_dim=16, num_query_groups=1, video_in_channels=16, audio_in_channels=4,
    text_in_channels=12, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(), frame_receptive_field=1,
    enable_attn_gating=True, coords_style="v2",
)  # fmt: skip


def transformer(seed: int = 0) -> JointTransformer:
    return filled(JointTransformer(CONFIG, compute_dtype=torch.float32), seed)


class Tokens:
    """Another random batch for every index."""

    fingerprint = "tokens"

    def batch(self, index: int) -> Batch:
        draw = generator(7, "data", index)
        return Batch(random_latents(draw), torch.randint(0, 20, (2, 5), generator=draw))


def stage(settings: Dmd2Settings, seed: int = 0, batches: int = 1) -> Dmd2Stage:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=batches)
    return Dmd2Stage(transformer(seed), Tokens(), NEGATIVE, settings, accelerator, text_encoder())


@pytest.mark.parametrize("held", [(False, False), (True, False), (False, True), (True, True)])
def test_the_student_makes_what_the_few_step_sampler_makes_to_the_last_bit(held: tuple[bool, bool]) -> None:
    clean = random_latents(generator(0, "film"), films=1)
    text = torch.randn(1, 5, 12, generator=generator(0, "text"))
    networks = FlowNetworks(transformer())
    given = FilmConditions.of(clean, Held(*(torch.tensor([part]) for part in held)))
    conditions = Conditions(clean.video[:, :, :1] if held[0] else None, clean.audio if held[1] else None)
    noise, predicted = FilmNoise(5), []
    expected = sample_base(
        network_of(networks.transformer), noise.initial(clean), text, negative=None, few_step=True, steps=8,
        noise_fn=noise.step, conditions=conditions,
        callback=lambda _index, _latents, denoised: predicted.append(conditions.apply(denoised)),
    )  # fmt: skip
    denoise = denoise_function(networks, text, None, base_video_scale)
    for step in (0, 3, 7):
        again = FilmNoise(5)
        found = simulated(denoise, again.initial(clean), flow_sigmas(8), step, again.step, given)
        for one, other in zip(found, predicted[step], strict=True):
            assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found.video.requires_grad


def test_the_gradient_is_the_difference_of_clean_predictions_over_the_distance_to_the_teachers() -> None:
    draw = generator(0, "gradient")
    film, noise, real, fake = (random_latents(draw) for _ in range(4))
    film = film.map(lambda x: x.requires_grad_(True))
    sigma = torch.tensor([0.3, 0.8])
    nothing = FilmConditions.of(film, Held(*torch.zeros(2, 2, dtype=torch.bool)))
    seen = []
    loss = matching_loss(
        film, lambda noisy: seen.append(noisy) or real, lambda _: fake, sigma, noise, nothing
    )
    loss.backward()
    for x, e, noisy, v_real, v_fake in zip(film, noise, seen[0], real, fake, strict=True):
        for index, level in enumerate(sigma.tolist()):
            torch.testing.assert_close(noisy[index], ((1 - level) * x + level * e)[index])
            clean_real, clean_fake = (noisy[index] - level * v[index] for v in (v_real, v_fake))
            expected = (clean_fake - clean_real) / (x[index] - clean_real).abs().mean()
            torch.testing.assert_close(x.grad[index] * x.numel(), expected)


def test_what_is_held_is_seen_clean_and_does_not_count() -> None:
    draw = generator(0, "held")
    film, noise, real, fake = (random_latents(draw) for _ in range(4))
    held = FilmConditions.of(film, Held(torch.tensor([True, False]), torch.tensor([False, True])))
    seen = []

    def loss(real: Latents) -> Tensor:
        sigma = torch.tensor([0.5, 0.9])
        return matching_loss(
            film, lambda noisy: seen.append(noisy) or real, lambda _: fake, sigma, noise, held
        )

    before = loss(real)
    other = real.map(torch.clone)
    other.video[0, :, 0] += 1
    other.audio[1] += 1
    assert loss(other) == before
    assert torch.equal(seen[0].video[0, :, 0], film.video[0, :, 0])
    assert torch.equal(seen[0].audio[1], film.audio[1])
    other.video[1, :, 0] += 1
    assert loss(other) != before


def test_the_teacher_is_guided_as_the_settings_say() -> None:
    trained = stage(Dmd2Settings(video_guidance=3.0, audio_guidance=1.0))
    noisy = random_latents(generator(0, "noisy"))
    text = torch.randn(2, 5, 12, generator=generator(0, "text"))
    found = trained._guided(noisy, text)
    negative = trained.text_encoder(NEGATIVE).expand(2, -1, -1)
    plain, opposite = trained.base(noisy, text), trained.base(noisy, negative)
    torch.testing.assert_close(found.audio, plain.audio)
    torch.testing.assert_close(found.video, 3 * plain.video - 2 * opposite.video)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_films_are_noised_at_the_levels_of_the_sampler(shift: float) -> None:
    trained = stage(Dmd2Settings(shift=shift))
    assert torch.equal(trained.sigmas, flow_sigmas(8, shift))
    film = Latents(torch.zeros(1000, 1, 1, 1, 1), torch.zeros(1000, 1, 1))
    sigma, _ = trained._noise(film, generator(0, "levels"))
    assert sigma.median().item() == pytest.approx(shift / (1 + shift), abs=0.01)


class Line(nn.Module):
    """A transformer for data without structure: velocity = slope x + offset, for each stream its own."""

    config, compute_dtype = CONFIG, torch.float32

    def __init__(self, slope: float, offset: float) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.tensor([value, value])) for value in (slope, offset))

    def forward(self, latents: Latents, *_: object, **__: object) -> Latents:
        lines = zip(latents, self.slope, self.offset, strict=True)
        return Latents(*(slope * x + offset for x, slope, offset in lines))


class Shapes:
    """Films of which nothing but the shape is looked at."""

    fingerprint = "shapes"

    def batch(self, _: int) -> Batch:
        return Batch(Latents(torch.zeros(8, 4, 3, 4, 4), torch.zeros(8, 48, 4)), torch.zeros(8, 2, 12))


def fitted_line(mean: float, deviation: float, shift: float) -> Line:
    """The best line for normally distributed data over the shifted noise levels of training."""
    u = (torch.arange(4000) + 0.5) / 4000
    sigma = shift * u / (1 + (shift - 1) * u)
    square = mean**2 + deviation**2
    # moments of x = (1 - sigma) clean + sigma noise and of noise - clean
    x, xx = ((1 - sigma) * mean).mean(), ((1 - sigma) ** 2 * square + sigma**2).mean()
    slope = ((sigma - (1 - sigma) * square).mean() + x * mean) / (xx - x**2)
    return Line(slope.item(), (-mean - slope * x).item())


def test_the_student_comes_to_make_what_its_teacher_was_trained_on() -> None:
    mean, deviation = 0.6, 0.4
    settings = Dmd2Settings(
        sampling_steps=1, student_lr=0.01, fake_lr=0.04, ema=0.9, image=0.0, audio=0.0,
        video_guidance=1.0, audio_guidance=1.0,
    )  # fmt: skip
    negative = torch.zeros(1, 2, 12)
    base = fitted_line(mean, deviation, settings.shift)
    trained = Dmd2Stage(base, Shapes(), negative, settings, Accelerator(cpu=True))

    def distance() -> float:
        network, noise = FlowNetworks(trained.trained()), FilmNoise(3)
        clean, text = Shapes().batch(0)
        with torch.no_grad():
            film = sample_base(
                network, noise.initial(clean), text, negative=None, few_step=True, steps=1,
                noise_fn=noise.step, conditions=Conditions(),
            )  # fmt: skip
        return max(max(abs(x.mean().item() - mean), abs(x.std().item() - deviation)) for x in film)

    before = distance()
    for step in range(150):
        figures = trained.step(step)
    assert before > 0.25 and distance() < 0.1
    assert figures["video_std"] == pytest.approx(deviation, abs=0.15)


def test_only_student_and_fake_are_trained_and_figures_say_how_they_do() -> None:
    trained = stage(Dmd2Settings(sampling_steps=2, image=0.5, audio=0.5))
    frozen = [tensor.clone() for part in (trained.base, trained.text_encoder) for tensor in part.parameters()]
    figures = [trained.step(step) for step in range(3)]
    kept = [tensor for part in (trained.base, trained.text_encoder) for tensor in part.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(frozen, kept, strict=True))
    for networks in (trained.student, trained.fake):
        pairs = zip(networks.parameters(), trained.base.parameters(), strict=True)
        assert all(not torch.equal(one, other) for one, other in pairs)
    assert all({"loss", "fake_loss"} <= found.keys() for found in figures)
    assert any(found.get("video_std", 0) > 0 for found in figures)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, batches: int) -> None:
    settings = Dmd2Settings(sampling_steps=3)
    whole = stage(settings, batches=batches)
    train(whole, tmp_path / "whole", 4, title="whole")
    train(stage(settings, batches=batches), tmp_path / "broken", 2, title="broken")
    resumed = stage(settings, batches=batches)
    train(resumed, tmp_path / "broken", 4, title="broken")
    pairs = list(zip(tensors(whole.state_dict()), tensors(resumed.state_dict()), strict=True))
    assert len(pairs) > 100
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_run_of_another_base_other_data_or_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Dmd2Settings(sampling_steps=1)
    train(stage(settings), tmp_path, 1, title="run")
    with pytest.raises(ValueError, match="trained with another base; give"):
        train(stage(settings, seed=1), tmp_path, 2, title="run")
    with pytest.raises(ValueError, match="audio_guidance"):
        train(stage(replace(settings, audio_guidance=1.0)), tmp_path, 2, title="run")
    monkeypatch.setattr(Tokens, "fingerprint", "others")
    with pytest.raises(ValueError, match="with other clips, captions, batches or encoders; give"):
        train(stage(settings), tmp_path, 2, title="run")
