"""The audio VAE against recorded tensors, and the pieces it works in."""

import copy
import math
from typing import Any

import pytest
import torch
from golden_files import GoldenFile, full_size, golden_files, relative_error, weights
from torch import Tensor

from happyhorse.model import audio_vae
from happyhorse.model.audio_vae import AudioVAE
from happyhorse.model.config import PRESETS, AudioVAEConfig
from happyhorse.model.geometry import FPS

TINY = AudioVAEConfig(io_channels=2, latent_dim=4, channels=4, c_mults=(1, 2), strides=(2, 4))


def build(config: AudioVAEConfig, state: dict[str, Tensor]) -> AudioVAE:
    with torch.device("meta"):
        vae = AudioVAE(config)
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def random_vae(config: AudioVAEConfig = TINY) -> AudioVAE:
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AudioVAE(config).state_dict().items()}
    return build(config, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def golden_vae(file: GoldenFile) -> AudioVAE:
    return build(audio_vae.from_published(file.config["model"]), weights(file.tensors()))


@pytest.mark.parametrize("file", golden_files("oobleck"), ids=str)
def test_golden_audio_vae(file: GoldenFile) -> None:
    vae, tensors = golden_vae(file), file.tensors()
    for samples in file.config["samples"]:
        names = ("waveform", "mean", "scale", "noise", "latent")
        want = {name: tensors[f"n{samples}.{name}"] for name in names}
        mean, scale = vae.moments(want["waveform"])
        assert relative_error(mean.mT, want["mean"]) < 1e-4
        assert relative_error(scale.mT, want["scale"]) < 1e-4
        latent = audio_vae.sample_latent(mean, scale, want["noise"].mT)
        assert relative_error(latent.mT, want["latent"]) < 1e-4
    for length in file.config["latent_lengths"]:
        waveform = vae.decode(tensors[f"l{length}.latent"].mT)
        assert relative_error(waveform, tensors[f"l{length}.waveform"]) < 1e-4


@pytest.mark.parametrize("file", golden_files("audio_windows"), ids=str)
def test_golden_audio_windows(file: GoldenFile) -> None:
    config, tensors = file.config, file.tensors()
    vae = golden_vae(file.weights_file())
    rate = config["sample_rate"]
    assert rate == audio_vae.ENCODE_RATE
    n = torch.arange(config["seconds_of_audio"] * rate, dtype=torch.float64)
    partials = [a * torch.sin(2 * math.pi * f * n / rate + p) for a, f, p in config["partials"]]
    waveform = sum(partials).float()[None]
    assert relative_error(waveform[0, :4096], tensors["waveform_first_4096"]) < 1e-5
    assert relative_error(waveform[0, -4096:], tensors["waveform_last_4096"]) < 1e-5
    for seconds in config["seconds"]:
        latents = audio_vae.encode_driving_audio(vae, waveform, seconds=seconds)
        want = tensors["latent.all" if seconds is None else f"latent.{seconds}"]
        assert relative_error(latents.mT, want) < 1e-4


@pytest.mark.parametrize("file", golden_files("audio_post"), ids=str)
def test_golden_audio_post(file: GoldenFile) -> None:
    tensors = file.tensors()
    kept, of = file.config["ratio"]
    for samples in file.config["lengths"]:
        waveform, want = (tensors[f"resample.n{samples}.{end}"].T for end in ("input", "output"))
        assert relative_error(audio_vae.resample_fourier(waveform, int(samples * kept / of)), want) < 1e-5
        if [kept, of] == [441, 512]:
            assert relative_error(audio_vae.to_film_rate(waveform), want) < 1e-5
    for k in range(len(file.config["merges"])):
        merged = audio_vae.merge_windows(list(tensors[f"merge.{k}.chunks"]))
        assert relative_error(merged, tensors[f"merge.{k}.output"]) < 1e-5


def test_golden_full_size_names_and_shapes() -> None:
    published = full_size("oobleck")
    config = audio_vae.from_published(published["config"])
    assert config == PRESETS["magihuman"].audio_vae
    with torch.device("meta"):
        state = AudioVAE(config).state_dict()
    prefix = published["checkpoint_prefix"]
    assert {prefix + name: list(tensor.shape) for name, tensor in state.items()} == published["parameters"]
    assert sum(tensor.numel() for tensor in state.values()) == published["parameter_count"]


@pytest.mark.parametrize("config", [TINY, PRESETS["pony"].audio_vae], ids=["tiny", "pony"])
def test_pieces_know_exactly_as_much_of_their_surroundings_as_they_depend_on(config: AudioVAEConfig) -> None:
    """What a value touches is found by making it NaN: just what reads it becomes NaN."""
    vae, size = random_vae(config), config.samples_per_latent
    context = audio_vae.decoder_context(config)
    middle = context + 2
    latents = torch.zeros(1, 2 * middle + 1, config.latent_dim)
    latents[:, middle] = math.nan
    waveform = vae.decode(latents, chunk=latents.shape[1])
    touched = waveform[0, 0].isnan().unflatten(0, (-1, size)).any(dim=1).nonzero()
    assert max(middle - touched.min(), touched.max() - middle) == context

    context = audio_vae.encoder_context(config)
    middle = context + 2
    reached = []
    for sample in (middle * size, middle * size + size - 1):
        waveform = torch.zeros(1, 2, (2 * middle + 1) * size)
        waveform[..., sample] = math.nan
        touched = vae.moments(waveform, chunk=2 * middle + 1)[0][0, :, 0].isnan().nonzero()
        reached += [middle - touched.min(), touched.max() - middle]
    assert max(reached) == context


@pytest.mark.parametrize("chunk", [5, 16])
def test_working_in_pieces_changes_nothing(chunk: int) -> None:
    vae = random_vae()
    latents = torch.randn(2, 37, TINY.latent_dim, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents, chunk=37)
    assert whole.shape == (2, 2, 37 * TINY.samples_per_latent)
    assert_same(vae.decode(latents, chunk=chunk), whole)

    samples = 37 * TINY.samples_per_latent + 5  # a remainder, which the last latents see
    waveform = torch.randn(2, 2, samples, generator=torch.Generator().manual_seed(2))
    mean, scale = vae.moments(waveform, chunk=37)
    assert mean.shape == scale.shape == (2, 37, TINY.latent_dim)
    assert_same(torch.stack(vae.moments(waveform, chunk=chunk)), torch.stack([mean, scale]))


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.std().item())


def test_encoding_draws_from_the_generator_only_when_one_is_given() -> None:
    vae = random_vae()
    waveform = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(3))
    mean, scale = vae.moments(waveform)
    assert torch.equal(vae.encode(waveform), mean)
    noise = torch.randn(1, TINY.latent_dim, 8, generator=torch.Generator().manual_seed(4))
    want = audio_vae.sample_latent(mean, scale, noise.mT)
    assert torch.equal(vae.encode(waveform, torch.Generator().manual_seed(4)), want)


def test_mono_driving_audio_is_encoded_as_two_equal_channels() -> None:
    vae = random_vae()
    mono = torch.randn(1, 80, generator=torch.Generator().manual_seed(5))
    want = vae.encode(mono.repeat(2, 1)[None])
    assert torch.equal(audio_vae.encode_driving_audio(vae, mono), want)


def test_driving_audio_of_exactly_one_window_is_not_merged() -> None:
    config = AudioVAEConfig(io_channels=2, latent_dim=2, channels=1, c_mults=(1, 1), strides=(32, 64))
    vae = random_vae(config)
    window = audio_vae.WINDOW_SECONDS * audio_vae.ENCODE_RATE
    mono = torch.randn(1, window + 1, generator=torch.Generator().manual_seed(6))
    latents = audio_vae.encode_driving_audio(vae, mono[:, :window])
    assert torch.equal(latents, vae.encode(mono[:, :window].repeat(2, 1)[None]))
    assert latents.shape[1] == audio_vae.WINDOW_SECONDS * FPS
    assert audio_vae.encode_driving_audio(vae, mono).shape[1] == latents.shape[1] + 1


def test_resampling_keeps_a_tone_and_its_length() -> None:
    tone, want = (
        torch.sin(2 * math.pi * 440 * torch.arange(rate, dtype=torch.float64) / rate).float()
        for rate in (audio_vae.ENCODE_RATE, audio_vae.FILM_RATE)
    )
    got = audio_vae.to_film_rate(tone.expand(1, 2, -1))
    assert got.shape == (1, 2, audio_vae.FILM_RATE) and got.dtype == torch.float32
    torch.testing.assert_close(got, want.expand(1, 2, -1), rtol=0, atol=1e-5)
    assert torch.equal(audio_vae.resample_fourier(tone, len(tone)), tone)


@pytest.mark.parametrize("shape", [(1, 2, 7), (1, 3, 64), (2, 64)])
def test_a_waveform_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the waveform must be"):
        random_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 4, 9), (4, 9)])
def test_latents_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="audio latents must be"):
        random_vae().decode(torch.zeros(shape))


def test_unfit_driving_audio_is_refused() -> None:
    with pytest.raises(ValueError, match="must last at least"):
        audio_vae.encode_driving_audio(random_vae(), torch.zeros(1, 800), seconds=0.0001)
    with pytest.raises(ValueError, match="driving audio must be"):
        audio_vae.encode_driving_audio(random_vae(), torch.zeros(3, 800))


@pytest.mark.parametrize("length", [0, 11])
def test_resampling_upwards_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="must give 1 to 10 samples"):
        audio_vae.resample_fourier(torch.zeros(10), length)


def published(**changes: Any) -> dict[str, Any]:
    """A whole model_config.json, with values at dotted names changed, or removed where None is given."""
    network = {"channels": 8, "c_mults": [1, 2], "strides": [2, 4], "use_snake": True}
    vae = {
        "encoder": {
            "type": "oobleck",
            "requires_grad": False,
            "config": {"in_channels": 2, "latent_dim": 8, **network},
        },
        "decoder": {
            "type": "oobleck",
            "config": {"out_channels": 2, "latent_dim": 4, "final_tanh": False, **network},
        },
        "bottleneck": {"type": "vae"},
        "latent_dim": 4,
        "downsampling_ratio": 8,
        "io_channels": 2,
    }
    pretransform = {"type": "autoencoder", "config": vae}
    values = copy.deepcopy({"sample_rate": 44100, "model": {"pretransform": pretransform, "diffusion": {}}})
    for path, value in changes.items():
        *parents, name = path.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[name] = value
        if value is None:
            del target[name]
    return values


VAE = "model.pretransform.config."


def test_the_published_configuration_is_read_whole_or_in_part() -> None:
    want = AudioVAEConfig(io_channels=2, latent_dim=4, channels=8, c_mults=(1, 2), strides=(2, 4))
    assert audio_vae.from_published(published()) == want
    assert audio_vae.from_published(published()["model"]["pretransform"]["config"]) == want


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample_rate", 48000, "sample_rate 44100, got 'autoencoder' with 48000"),
        ("model.pretransform.type", "dac_pretrained", "got 'dac_pretrained'"),
        ("model.pretransform", None, "is missing"),
        (VAE + "decoder.config.final_tanh", True, "decoder.config.final_tanh must be False, got True"),
        (VAE + "decoder.config.use_snake", False, "decoder.config.use_snake must be True, got False"),
        (VAE + "encoder.config.use_snake", None, "encoder.config.use_snake must be True, got 'nothing'"),
        (VAE + "encoder.config.channels", 16, "encoder.config.channels must be 8, got 16"),
        (VAE + "encoder.config.strides", [4, 2], r"encoder.config.strides must be \[2, 4\], got \[4, 2\]"),
        (VAE + "encoder.config.latent_dim", 4, "encoder.config.latent_dim must be 8, got 4"),
        (VAE + "encoder.type", "dac", "encoder.type must be 'oobleck', got 'dac'"),
        (VAE + "decoder", None, "c_mults and strides must be lists"),
        (VAE + "bottleneck.type", "rvq", "bottleneck.type must be 'vae', got 'rvq'"),
        (VAE + "downsampling_ratio", 16, "downsampling_ratio must be 8, got 16"),
        (VAE + "decoder.config.strides", [3, 4], "strides even"),
        (VAE + "decoder.config.strides", [2], "lists of one length"),
        (VAE + "decoder.config.channels", "8", "positive whole numbers"),
        (VAE + "decoder.config.antialias_activation", True, "must be 'absent', got True"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audio_vae.from_published(published(**{name: value}))
