from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_files import GoldenFile, full_size, golden_files, relative_error, weights
from torch import Tensor

from happyhorse.model.config import LATENT_MEAN, LATENT_STD, MAGIHUMAN, PONY, VideoDecoderConfig
from happyhorse.model.video_decoder import VideoDecoder, from_published, reach, tile_grid

TOLERANCE = 1e-4
TINY = replace(PONY.video_decoder, decoder_block_out_channels=(4, 4, 8, 8))
PUBLISHED = full_size("turbo_vaed")


def on_meta(config: VideoDecoderConfig) -> VideoDecoder:
    with torch.device("meta"):
        return VideoDecoder(config)


def with_windows(first: int, step: int) -> VideoDecoder:
    """A network with random weights, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(5)
    decoder = on_meta(replace(TINY, first_chunk_size=first, step_size=step)).to_empty(device="cpu")
    for parameter in decoder.requires_grad_(False).parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return decoder


def random_latents(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 48, frames, 1, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("file", golden_files("turbo_vaed"), ids=str)
def test_golden_video_decoder(file: GoldenFile) -> None:
    tensors = file.tensors()
    assert torch.equal(tensors["latent_mean"].flatten(), torch.tensor(LATENT_MEAN))
    assert torch.equal(tensors["latent_std"].flatten(), torch.tensor(LATENT_STD))
    decoder = on_meta(from_published(file.config["model"]))
    decoder.load_state_dict(weights(tensors), assign=True)
    decoder.requires_grad_(False)
    films = [name for name in tensors if name.endswith(".video") and not name.startswith("bf16.")]
    assert films
    for name in films:
        latents = tensors[name.replace(".video", ".latent")]
        assert relative_error(decoder.decode(latents), tensors[name]) < TOLERANCE, name


def test_the_full_size_network_has_the_published_tensors() -> None:
    assert from_published(PUBLISHED["config"]) == MAGIHUMAN.video_decoder
    state = on_meta(MAGIHUMAN.video_decoder).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == PUBLISHED["parameters"]
    assert sum(tensor.numel() for tensor in state.values()) == PUBLISHED["parameter_count"]


@pytest.mark.parametrize("frames", [1, 2, 6, 7, 8, 13, 14, 15, 16])
def test_every_film_has_four_frames_per_latent_less_three(frames: int) -> None:
    assert with_windows(7, 7).decode(random_latents(frames)).shape == (1, 3, 4 * frames - 3, 16, 32)


@pytest.mark.parametrize(("first", "step"), [(1, 1), (2, 3), (4, 2)])
def test_windows_of_any_size_give_every_frame_once(first: int, step: int) -> None:
    decoder = with_windows(first, step)
    for frames in range(1, 9):
        chunks = list(decoder.decode_chunks(random_latents(frames)))
        lengths = [chunk.shape[2] for chunk in chunks]
        assert sum(lengths) == 4 * frames - 3
        assert lengths[0] == 4 * min(first, frames) - 3
        assert all(length == 4 * step for length in lengths[1:-1])


def test_chunks_joined_are_the_whole_film() -> None:
    decoder, latents = with_windows(3, 2), random_latents(8)
    assert torch.equal(torch.cat(list(decoder.decode_chunks(latents)), dim=2), decoder.decode(latents))


def test_a_film_that_ends_on_a_window_needs_no_padding() -> None:
    decoder = with_windows(3, 2)
    latents = random_latents(4)
    longer = torch.cat([latents, latents[:, :, -1:]], dim=2)  # what padding amounts to
    assert torch.equal(decoder.decode(latents), decoder.decode(longer)[:, :, :13])


def test_no_window_sees_more_than_its_own_latents_and_one_on_each_side() -> None:
    decoder = with_windows(3, 2)
    seen = []
    decoder.decoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[2]))
    for _ in decoder.decode_chunks(random_latents(20)):
        pass
    assert seen == [4, *[4] * 8, 3]


def test_early_frames_do_not_depend_on_latents_beyond_their_window() -> None:
    decoder, latents = with_windows(3, 2), random_latents(9)
    changed = latents.clone()
    changed[:, :, 4:] += 1
    first, first_changed = next(decoder.decode_chunks(latents)), next(decoder.decode_chunks(changed))
    assert torch.equal(first, first_changed)


@pytest.mark.parametrize("tiles", [2, 4, 9])
def test_tiles_make_the_same_film_but_for_rounding(tiles: int) -> None:
    decoder = with_windows(2, 2)
    latents = torch.randn(1, 48, 4, 18, 40, generator=torch.Generator().manual_seed(3))
    whole, tiled = list(decoder.decode_chunks(latents)), list(decoder.decode_chunks(latents, tiles))
    assert [chunk.shape for chunk in tiled] == [chunk.shape for chunk in whole]
    for got, want in zip(tiled, whole, strict=True):
        assert relative_error(got, want) < 1e-5 and (got - want).abs().max() < 1e-4 * want.std()


def test_a_pixel_depends_on_latents_as_far_as_tiles_look_and_no_further() -> None:
    decoder, far = with_windows(1, 1), reach(TINY)
    latents = torch.randn(1, 48, 1, 2 * far + 3, 1, generator=torch.Generator().manual_seed(3))
    changed = latents.clone()
    changed[..., far + 1, :] += 5
    difference = (decoder.decode(changed) - decoder.decode(latents)).abs().amax((0, 1, 2, 4))
    rows = difference.view(-1, 16).amax(1).nonzero().flatten()
    assert (rows[0], rows[-1]) == (1, 2 * far + 1), "the first and the last row are out of reach"
    assert reach(MAGIHUMAN.video_decoder) == 15


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 8, 16, 99])
def test_tiles_cover_the_picture_once_and_are_no_more_than_asked_for(tiles: int) -> None:
    grid = tile_grid(7, 12, tiles, 2)
    seen = torch.zeros(7, 12)
    for (top, bottom), (left, right) in grid:
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all() and len(grid) <= tiles


def test_the_network_runs_in_the_dtype_of_its_weights() -> None:
    decoder = with_windows(3, 2).bfloat16()
    seen = []
    decoder.decoder.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    assert decoder.decode(random_latents(4)).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(1, 16, 2, 2, 2), (48, 2, 2, 2), (1, 48, 0, 2, 2)])
def test_latents_of_other_shapes_are_refused_at_the_call(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="48, frames"):
        with_windows(3, 2).decode_chunks(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_causal", True),
        ("decoder_is_dw_conv", [False, False, True, False, False]),
        ("patch_size_t", 2),
        ("use_unpatchify", False),
        ("resnet_norm_eps", 1e-5),
        ("scaling_factor", 0.5),
        ("a_new_field", 1),
    ],
)
def test_published_values_that_are_not_implemented_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        from_published({**PUBLISHED["config"], field: value})


def test_training_fields_of_the_published_configuration_are_ignored() -> None:
    values = {**PUBLISHED["config"], "aligned_blks_indices": [7], "_diffusers_version": "0"}
    assert from_published(values) == MAGIHUMAN.video_decoder


def test_a_published_configuration_that_lacks_a_field_is_refused() -> None:
    values = {name: value for name, value in PUBLISHED["config"].items() if name != "step_size"}
    with pytest.raises(ValueError, match="step_size"):
        from_published(values)
