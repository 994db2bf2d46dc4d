"""Training of the audio VAE: it learns, goes on exactly, and is written as the loader wants it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from happyhorse.model.audio_vae import AudioVAE
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import AudioVAEConfig
from happyhorse.pony import write_part
from happyhorse.training.audio_vae import (
    PLAIN,
    SAMPLING,
    AudioVAEStage,
    divergence,
    finished,
    initialize,
    sound_losses,
    training_sounds,
)
from happyhorse.training.data.clip import make_clip, make_sound
from happyhorse.training.data.world import held_out
from happyhorse.training.loop import train

SMALL = AudioVAEConfig(io_channels=2, latent_dim=16, channels=4, c_mults=(1, 2), strides=(16, 16))
STEPS = 12


def stage(**settings: int) -> AudioVAEStage:
    return AudioVAEStage(SMALL, **{"steps": STEPS, "clips": 4} | settings)


def sounds() -> Tensor:
    return training_sounds(4, seed=9)[:, None, -256 * 96 :].expand(-1, 2, -1)


@torch.no_grad()
def rebuilt(vae: AudioVAE) -> Tensor:
    return vae.decode(vae.encode(sounds()))


@pytest.fixture(scope="module")
def trained() -> tuple[AudioVAEStage, list[dict[str, float]]]:
    one = stage()
    return one, [one.step(step) for step in range(STEPS)]


def test_a_few_steps_lower_every_loss(trained: tuple[AudioVAEStage, list[dict[str, float]]]):
    before, after = (sound_losses(sounds(), rebuilt(vae)) for vae in (stage(steps=0).vae, trained[0].vae))
    for name in ("convergence", "logarithmic", "squares"):
        assert after[name] < before[name], name


def test_a_resumed_training_equals_an_unbroken_one(tmp_path: Path):
    def interrupt(done: int, _: int, __: dict[str, float]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    unbroken, first, second = stage(steps=5), stage(steps=5), stage(steps=5)
    expected = train(unbroken, tmp_path / "unbroken", 5, title="sound")
    with pytest.raises(KeyboardInterrupt):
        train(first, tmp_path / "broken", 5, on_step=interrupt, title="sound")
    assert train(second, tmp_path / "broken", 5, title="sound") == expected
    for name, value in unbroken.vae.state_dict().items():
        assert torch.equal(value, second.vae.state_dict()[name]), name


def test_a_checkpoint_of_another_number_of_clips_is_refused(tmp_path: Path):
    train(stage(steps=1), tmp_path, 1, title="sound")
    with pytest.raises(ValueError, match=r"clips 4 \(now 7\)"):
        train(stage(steps=1, clips=7), tmp_path, 1, title="sound")


def test_a_new_network_starts_with_latents_of_unit_size_and_a_little_sound():
    vae = AudioVAE(SMALL, PLAIN)
    waveform = sounds()
    initialize(vae, waveform, seed=0)
    latents = vae.encoder(waveform)[:, : SMALL.latent_dim]
    torch.testing.assert_close(latents.mean(dim=(0, 2)), torch.zeros(SMALL.latent_dim), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2)), torch.ones(SMALL.latent_dim), atol=1e-4, rtol=0)
    assert vae.decoder(latents).std().item() == pytest.approx(0.1 * float(waveform.std()), rel=0.3)


def test_a_finished_network_decodes_what_it_encodes_as_the_trained_one_does(
    trained: tuple[AudioVAEStage, list[dict[str, float]]],
):
    plain = trained[0].vae
    vae = finished(plain, sounds())
    with torch.no_grad():
        torch.testing.assert_close(
            vae.decode(vae.encode(sounds())), plain.decode(plain.encode(sounds())), atol=2e-5, rtol=1e-3
        )


def test_finished_latents_have_unit_std_and_are_sampled_near_their_mean(
    trained: tuple[AudioVAEStage, list[dict[str, float]]],
):
    vae = finished(trained[0].vae, sounds())
    mean = vae.encode(sounds())
    sampled = vae.encode(sounds(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean.flatten(0, 1).std(dim=0), torch.ones(SMALL.latent_dim))
    assert (sampled - mean).std() == pytest.approx(SAMPLING, rel=0.05)


def test_a_written_network_is_loaded_with_the_values_it_was_rounded_to(
    trained: tuple[AudioVAEStage, list[dict[str, float]]], tmp_path: Path
):
    vae = finished(trained[0].vae, sounds())
    write_part(tmp_path / "new", "audio_vae", vae, "a note")
    loaded = load(open_checkpoint(tmp_path / "new" / "audio_vae"), torch.float32)
    assert loaded.config == SMALL
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, vae.state_dict()[name].half().float()), name


def test_divergence_is_zero_for_standard_normal_latents_and_grows_with_mean_and_scale():
    latents = torch.randn(64, 3, 500, generator=torch.Generator().manual_seed(0))
    assert divergence(latents) < 1e-3
    assert divergence(latents + 1) == pytest.approx(0.5, abs=0.02)
    assert divergence(2 * latents) == pytest.approx(0.5 * (3 - math.log(4)), abs=0.02)


def test_losses_vanish_for_equal_sounds_and_are_one_for_silence():
    sound = sounds()
    same, silent = sound_losses(sound, sound), sound_losses(sound, torch.zeros_like(sound))
    assert max(float(value) for value in same.values()) == 0
    assert silent["convergence"] == pytest.approx(1, abs=1e-3)
    assert silent["squares"] == 1
    assert silent["logarithmic"] > 0.1


def test_a_silent_batch_gives_finite_losses_and_gradients():
    rebuilt = torch.full((1, 2, 4096), 1e-3, requires_grad=True)
    losses = sound_losses(torch.zeros(1, 2, 4096), rebuilt)
    sum(losses.values()).backward()
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())
    assert torch.isfinite(rebuilt.grad).all()
    assert rebuilt.grad.abs().max() > 0


@pytest.mark.parametrize("world", ["bounce", "head"])
def test_a_sound_without_pictures_is_that_of_the_clip(world: str):
    for seed, attributes in enumerate(held_out(world, 3)):
        clip = make_clip(attributes, seed, (32, 32), frames=5, latents=6)
        assert (make_sound(attributes, seed, frames=5, latents=6) == clip.sound).all()
