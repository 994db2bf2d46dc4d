import re

import pytest

from happyhorse.model.config import MAGIHUMAN, PONY
from happyhorse.model.geometry import FilmShape, audio_latents, super_resolution_size


@pytest.mark.parametrize(
    ("seconds", "latents", "frames"),
    [
        (0.2, 6, 5),
        (1, 26, 25),
        (2, 51, 49),
        (3, 76, 73),
        (4, 101, 101),
        (5, 126, 125),
        (8, 201, 201),
        (10, 251, 249),
    ],
)
def test_seconds_give_latents_and_frames(seconds: float, latents: int, frames: int) -> None:
    shape = FilmShape.from_seconds(448, 256, seconds)
    assert (shape.audio_latents, shape.pixel_frames) == (latents, frames)
    assert shape.pixel_frames <= shape.audio_latents < shape.pixel_frames + 4


@pytest.mark.parametrize("seconds", [0.2, 0.24, 1.4, 2.52, 9.96, 29.96, 30])
def test_every_step_of_four_hundredths_is_accepted(seconds: float) -> None:
    assert audio_latents(seconds) == round(seconds * 25) + 1


@pytest.mark.parametrize("seconds", [0.16, 30.04, -1, float("nan"), float("inf")])
def test_lengths_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"from 0.2 to 30, got {seconds:g}")):
        audio_latents(seconds)


def test_lengths_off_the_grid_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"multiple of 0.04, got 2.5; the nearest are 2.48 and 2.52"):
        audio_latents(2.5)


@pytest.mark.parametrize(
    ("size", "nearest"), [((450, 256), "448x256"), ((16, 64), "32x64"), ((0, 0), "32x32")]
)
def test_other_sizes_are_refused_with_the_nearest(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"got {size[0]}x{size[1]}; the nearest is {nearest}"):
        FilmShape.from_seconds(*size, 1)


def test_super_resolution_sizes() -> None:
    for size in MAGIHUMAN.sizes.values():
        assert super_resolution_size("540p", size, MAGIHUMAN.pixels_1080p) == (2 * size[0], 2 * size[1])
        width, height = super_resolution_size("1080p", size, MAGIHUMAN.pixels_1080p)
        assert width % 32 == height % 32 == 0
        assert abs(width * height / MAGIHUMAN.pixels_1080p - 1) < 0.03
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.03
    assert super_resolution_size("1080p", MAGIHUMAN.sizes["16:9"], MAGIHUMAN.pixels_1080p) == (1920, 1088)
    assert super_resolution_size("1080p", PONY.sizes["1:1"], PONY.pixels_1080p) == (288, 288)


def test_a_large_second_stage_has_the_published_number_of_tokens() -> None:
    shape = FilmShape.from_seconds(1920, 1088, 5)
    assert shape.video_tokens == 65_280  # 65,806 with 126 audio and 400 text tokens
