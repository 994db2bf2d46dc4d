"""Line plots."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from happyhorse.training.plot import BOTTOM, COLOURS, LEFT, RIGHT, TOP, line_plot

FALLING = [(float(step), 10.0 ** (-step / 50)) for step in range(101)]  # 1 to 0.01


def rows_of(image: Image.Image, colour: tuple[int, int, int], column: int) -> np.ndarray:
    """The rows, from the frame's top as 0 to its bottom as 1, where a column has about this colour."""
    pixels = np.asarray(image, dtype=int)[:, column]
    rows = np.flatnonzero(np.abs(pixels - colour).max(1) < 40)
    return (rows - TOP) / (image.height - TOP - BOTTOM)


def column_at(image: Image.Image, share: float) -> int:
    return round(LEFT + share * (image.width - LEFT - RIGHT))


@pytest.mark.parametrize(("log_y", "middle"), [(False, 0.88), (True, 0.5)])
def test_a_line_runs_through_its_points(log_y: bool, middle: float) -> None:
    image = line_plot({"loss": FALLING}, "A title", log_y=log_y)
    assert (image.size, image.mode) == ((900, 500), "RGB")
    assert rows_of(image, COLOURS[0], column_at(image, 0.01)).mean() == pytest.approx(0.06, abs=0.03)
    assert rows_of(image, COLOURS[0], column_at(image, 0.5)).mean() == pytest.approx(middle, abs=0.03)


def test_every_series_has_its_colour_also_when_there_are_many() -> None:
    series = {f"part {index}": [(0.0, index), (1.0, index)] for index in range(8)}
    image = line_plot(series, "Many", size=(600, 400))
    assert image.size == (600, 400)
    for colour in COLOURS:
        assert len(rows_of(image, colour, column_at(image, 0.3)))


def test_noise_is_drawn_pale_and_its_average_over_it() -> None:
    noisy = [(float(step), float(step % 2)) for step in range(400)]
    image = line_plot({"loss": noisy}, "Noise")
    rows = rows_of(image, COLOURS[0], column_at(image, 0.5))
    assert rows.min() > 0.4 and rows.max() < 0.6


def test_a_few_points_are_not_averaged() -> None:
    image = line_plot({"loss": [(0, 0.0), (1, 1.0), (2, 0.0)]}, "Peak")
    assert rows_of(image, COLOURS[0], column_at(image, 0.5)).min() < 0.07


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "points",
    [[(0, 1.0)], [(0, 1.0), (1, 1.0)], [(3, 1e-9), (4, 2e-9)], [(0, 1e-12), (9e6, 1e12)]],
    ids=["one", "equal", "small", "wide"],
)
def test_points_of_any_extent_are_drawn(points: list[tuple[float, float]], log_y: bool) -> None:
    image = line_plot({"loss": points}, "Extent", log_y=log_y)
    inside = np.asarray(image, dtype=int)[TOP:-BOTTOM, LEFT : column_at(image, 0.75)]
    assert (np.abs(inside - COLOURS[0]).max(-1) < 40).any()


@pytest.mark.parametrize(
    ("series", "log_y", "sentence"),
    [
        ({}, False, "Run: there are no points to draw"),
        ({"loss": []}, False, "Run: there are no points to draw"),
        ({"loss": [(0, math.nan)]}, False, "Run: loss has values that are not finite"),
        ({"a": [(0, 1.0)], "b": [(0, 0.0)]}, True, "Run: b has values that are not positive"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    series: dict[str, list[tuple[float, float]]], log_y: bool, sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        line_plot(series, "Run", log_y=log_y)
