from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_files import GoldenFile, full_size, golden_files, relative_error, weights
from torch import Tensor

from happyhorse.model.config import LATENT_MEAN, LATENT_STD, MAGIHUMAN, PONY, VideoVAEConfig
from happyhorse.model.video_vae import (
    VideoVAE,
    average_shortcut,
    denormalize_latents,
    normalize_latents,
    patchify,
    repeat_shortcut,
    unpatchify,
)

TOLERANCE = 1e-4
HALVES = {"wan22_vae_encoder": ("encoder.", "conv1."), "wan22_vae_decoder": ("decoder.", "conv2.")}
TINY = replace(PONY.video_vae, dim=4, dec_dim=4)


def config_of(published: dict[str, Any]) -> VideoVAEConfig:
    assert not published["attn_scales"], "attention inside stages is not part of the network"
    return VideoVAEConfig.from_dict({name: published[name] for name in published if name != "attn_scales"})


def on_meta(config: VideoVAEConfig) -> VideoVAE:
    with torch.device("meta"):
        return VideoVAE(config)


def half_of(file: GoldenFile, tensors: dict[str, Tensor]) -> VideoVAE:
    """The network with the weights of the half that the file has, all of them; the rest stays on meta."""
    vae = on_meta(config_of(file.config["model"]))
    vae.load_state_dict(vae.state_dict() | weights(tensors), assign=True)
    half = HALVES[file.config["kind"]]
    assert not [name for name, tensor in vae.state_dict().items() if tensor.is_meta and name.startswith(half)]
    return vae.eval().requires_grad_(False)


def assert_statistics_agree(tensors: dict[str, Tensor]) -> None:
    assert torch.equal(tensors["latent_mean"].flatten(), torch.tensor(LATENT_MEAN))
    assert torch.equal(tensors["latent_std"].flatten(), torch.tensor(LATENT_STD))


@pytest.fixture(scope="module")
def tiny() -> VideoVAE:
    """A network with random weights, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(3)
    vae = on_meta(TINY).to_empty(device="cpu").requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(1.0)
        else:
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return vae


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("file", golden_files("wan22_vae_encoder"), ids=str)
def test_golden_video_vae_encoder(file: GoldenFile) -> None:
    tensors = file.tensors()
    assert_statistics_agree(tensors)
    vae = half_of(file, tensors)
    films = [name for name in tensors if name.endswith(".video")]
    assert films
    for name in films:
        want = tensors[name.replace(".video", ".latent")]
        assert relative_error(vae.encode(tensors[name]), want) < TOLERANCE, name


@pytest.mark.parametrize("file", golden_files("wan22_vae_decoder"), ids=str)
def test_golden_video_vae_decoder(file: GoldenFile) -> None:
    tensors = file.tensors()
    assert_statistics_agree(tensors)
    vae = half_of(file, tensors)
    films = [name for name in tensors if name.endswith(".video_unclamped")]
    assert films
    for name in films:
        latents = tensors[name.replace(".video_unclamped", ".latent")]
        want = tensors[name]
        got = torch.cat(list(vae.decode_chunks(latents)), dim=2)
        assert relative_error(got, want) < TOLERANCE, name
        assert relative_error(vae.decode(latents), want.clamp(-1, 1)) < TOLERANCE, name


def test_the_full_size_network_has_the_published_tensors() -> None:
    published = full_size("wan22_vae")
    assert config_of(published["config"]) == MAGIHUMAN.video_vae
    state = on_meta(MAGIHUMAN.video_vae).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == published["parameters"]
    assert sum(tensor.numel() for tensor in state.values()) == published["parameter_count"]
    assert list(LATENT_MEAN) == published["latent_mean"]
    assert list(LATENT_STD) == published["latent_std"]


def test_the_miniature_network_can_be_built() -> None:
    full = replace(MAGIHUMAN.video_vae, num_res_blocks=PONY.video_vae.num_res_blocks)
    assert on_meta(PONY.video_vae).state_dict().keys() == on_meta(full).state_dict().keys()


def test_a_film_comes_in_one_frame_and_then_four_at_a_time(tiny: VideoVAE) -> None:
    latents = random(1, 48, 4, 2, 3)
    chunks = list(tiny.decode_chunks(latents))
    assert [list(chunk.shape) for chunk in chunks] == [[1, 3, frames, 32, 48] for frames in (1, 4, 4, 4)]
    assert torch.equal(torch.cat(chunks, dim=2).clamp(-1, 1), tiny.decode(latents))


def test_decoding_starts_before_later_latents_are_needed(tiny: VideoVAE) -> None:
    ran = []
    handle = tiny.decoder.register_forward_hook(lambda *_: ran.append(True))
    next(tiny.decode_chunks(random(1, 48, 3, 2, 2)))
    handle.remove()
    assert len(ran) == 1


def test_frames_do_not_depend_on_later_latents(tiny: VideoVAE) -> None:
    latents = random(1, 48, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 2] += 1
    before, after = tiny.decode(latents), tiny.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_latents_do_not_depend_on_later_frames_but_on_earlier_ones(tiny: VideoVAE) -> None:
    video = random(1, 3, 9, 32, 32).clamp(-1, 1)
    whole = tiny.encode(video)
    assert torch.equal(whole[:, :, :1], tiny.encode(video[:, :, :1]))
    assert torch.equal(whole[:, :, :2], tiny.encode(video[:, :, :5]))
    changed = video.clone()
    changed[:, :, 4] = 0  # the last frame of the second chunk
    assert not torch.equal(whole[:, :, 2], tiny.encode(changed)[:, :, 2])


def test_a_call_leaves_nothing_behind_for_the_next(tiny: VideoVAE) -> None:
    video = random(1, 3, 5, 32, 32)
    latents = tiny.encode(video)
    film = tiny.decode(latents)
    list(tiny.decode_chunks(random(1, 48, 2, 3, 2)))
    assert torch.equal(tiny.encode(video), latents)
    assert torch.equal(tiny.decode(latents), film)


def test_films_of_a_batch_do_not_mix(tiny: VideoVAE) -> None:
    video, latents = random(2, 3, 5, 32, 32), random(2, 48, 2, 2, 2)
    for i in range(2):
        assert relative_error(tiny.encode(video)[i : i + 1], tiny.encode(video[i : i + 1])) < 1e-5
        assert relative_error(tiny.decode(latents)[i : i + 1], tiny.decode(latents[i : i + 1])) < 1e-5


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoded_films_decode_to_the_same_size(tiny: VideoVAE, frames: int) -> None:
    video = random(1, 3, frames, 32, 48)
    latents = tiny.encode(video)
    assert latents.shape == (1, 48, (frames - 1) // 4 + 1, 2, 3)
    assert tiny.decode(latents).shape == video.shape


def test_the_network_runs_in_the_dtype_of_its_weights() -> None:
    vae = on_meta(TINY).to_empty(device="cpu").bfloat16().requires_grad_(False)
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    latents = vae.encode(random(1, 3, 5, 32, 32))
    film = vae.decode(latents)
    assert set(seen) == {torch.bfloat16}
    assert latents.dtype == film.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 5, 32, 32), "3, frames"),
        ((3, 5, 32, 32), "3, frames"),
        ((1, 3, 6, 32, 32), "4k[+]1, got 6; .* 9"),
        ((1, 3, 0, 32, 32), "4k[+]1, got 0; .* 1"),
        ((1, 3, 5, 40, 32), "multiples of 16, got 40 x 32"),
    ],
)
def test_films_of_other_shapes_are_refused(tiny: VideoVAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 2, 2, 2), (48, 2, 2, 2), (1, 48, 0, 2, 2)])
def test_latents_of_other_shapes_are_refused_at_the_call(tiny: VideoVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="48, frames"):
        tiny.decode_chunks(torch.zeros(shape))


def test_unpatchify_and_denormalize_undo_their_opposites() -> None:
    video, latents = random(2, 3, 5, 4, 6), random(1, 48, 2, 3, 4)
    assert torch.equal(unpatchify(patchify(video, 2), 2), video)
    assert relative_error(denormalize_latents(normalize_latents(latents)), latents) < 1e-6


def test_patches_have_the_column_before_the_row() -> None:
    square = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 1, 2, 2)
    assert patchify(square, 2).flatten().tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("step", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_the_averaging_shortcut_undoes_the_repeating_one(step: tuple[int, int, int]) -> None:
    x = random(1, 8, 3, 4, 5)
    larger = repeat_shortcut(x, 4, step)
    assert larger.shape == (1, 4, 3 * step[0], 4 * step[1], 5 * step[2])
    assert relative_error(average_shortcut(larger, 8, step), x) < 1e-6


def test_the_averaging_shortcut_pads_a_lone_frame_with_zeros_in_front() -> None:
    means = average_shortcut(torch.ones(1, 4, 1, 2, 2), 4, (2, 2, 2))
    assert torch.equal(means, torch.full((1, 4, 1, 1, 1), 0.5))
