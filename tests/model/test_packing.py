import pytest
import torch

from happyhorse.model.packing import Latents, PackedLayout, patchify, unpatchify
from happyhorse.model.rope import apply_rope, rope_bands, rope_table


def test_packing_then_unpacking_restores_the_video_up_to_the_channel_order() -> None:
    video = torch.randn(2, 48, 3, 4, 6)
    layout = PackedLayout(3, 2, 3, 9, 5, "v2")
    channels_last = patchify(video).unflatten(2, (48, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channels_last, layout), video)


def test_spans_cover_the_sequence_in_order() -> None:
    layout = PackedLayout(3, 2, 3, 9, 5, "v2")
    assert layout.spans == ((0, 18), (18, 27), (27, 32))
    assert layout.coordinates().shape == (layout.total_tokens, 9)


@pytest.mark.parametrize(("style", "position"), [("v2", -1.0), ("v1", None)])
def test_a_prompt_of_one_token(style: str, position: float | None) -> None:
    if position is None:
        with pytest.raises(ValueError, match="at least 2 tokens"):
            PackedLayout(3, 2, 3, 9, 1, style)
        return
    table = rope_table(PackedLayout(3, 2, 3, 9, 1, style).coordinates(), rope_bands(16))
    assert torch.allclose(table[-1, 0], torch.tensor(position).sin())


def test_audio_of_one_latent_needs_one_latent_frame_in_v1() -> None:
    with pytest.raises(ValueError, match="at least 2 audio latents"):
        PackedLayout(2, 2, 2, 1, 4, "v1")
    coordinates = PackedLayout(1, 2, 2, 1, 4, "v1").coordinates()
    assert torch.isfinite(rope_table(coordinates, rope_bands(8))).all()


def test_latents_that_do_not_fit_are_refused() -> None:
    text = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="even rows and columns, got 3x4"):
        PackedLayout.of(Latents(torch.zeros(1, 48, 2, 3, 4), torch.zeros(1, 5, 64)), text, "v2")
    with pytest.raises(ValueError, match="one batch size, got 2, 1, 1"):
        PackedLayout.of(Latents(torch.zeros(2, 48, 2, 4, 4), torch.zeros(1, 5, 64)), text, "v2")


def test_rotation_keeps_lengths_and_leaves_the_last_quarter() -> None:
    x = torch.randn(1, 2, 23, 32)
    table = rope_table(PackedLayout(2, 2, 3, 6, 5, "v2").coordinates(), rope_bands(32))
    y = apply_rope(x, table)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(y[..., 24:], x[..., 24:])
    assert not torch.allclose(y[..., :24], x[..., :24])
