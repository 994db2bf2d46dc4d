"""Line plots with Pillow alone."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

COLOURS = ((31, 119, 180), (214, 90, 20), (30, 140, 60), (200, 40, 60), (130, 90, 170), (110, 110, 110))
INK, GRID, PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
LEFT, TOP, RIGHT, BOTTOM = 72, 44, 24, 36  # margins in pixels
SHARPNESS = 2  # drawn so many times larger, then made small: smooth edges
SMOOTHED_OVER = 50  # a moving average takes this fraction of all points


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    size: tuple[int, int] = (900, 500),
    log_y: bool = False,
) -> Image.Image:
    """Draw lines through the (x, y) points of each series, pale, and their moving averages over them.

    `size` is (width, height) in pixels. The legend gives where each average ends. Raises ValueError where
    there is no point, a value is not finite, or `log_y` is set and one is not positive.
    """
    lines = {name: np.array(points, np.float64) for name, points in series.items() if len(points)}
    _check(lines, title, log_y)
    if log_y:
        lines = {name: np.stack((line[:, 0], np.log10(line[:, 1])), 1) for name, line in lines.items()}
    averages = {name: _averaged(line) for name, line in lines.items()}
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(lines))]
    canvas = _Canvas(title, size, np.concatenate(list(lines.values())), log_y)
    for line, colour in zip(lines.values(), colours, strict=True):
        canvas.line(line, _pale(colour), 1)
    for line, colour in zip(averages.values(), colours, strict=True):
        canvas.line(line, colour, 2)
    ends = [10 ** line[-1, 1] if log_y else line[-1, 1] for line in averages.values()]
    canvas.legend([f"{name}  {end:.4g}" for name, end in zip(lines, ends, strict=True)], colours)
    return canvas.image.reduce(SHARPNESS)


def _check(lines: Mapping[str, np.ndarray], title: str, log_y: bool) -> None:
    if not lines:
        raise ValueError(f"{title}: there are no points to draw")
    for name, line in lines.items():
        if not np.isfinite(line).all():
            raise ValueError(f"{title}: {name} has values that are not finite; leave them out")
        if log_y and (line[:, 1] <= 0).any():
            raise ValueError(f"{title}: {name} has values that are not positive; draw it without log_y")


def _averaged(line: np.ndarray) -> np.ndarray:
    """The centred moving average of the y of a line; near the ends over what there is."""
    half = len(line) // SMOOTHED_OVER // 2
    sums = np.concatenate(([0.0], np.cumsum(line[:, 1])))
    index = np.arange(len(line))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(line))
    return np.stack((line[:, 0], (sums[last] - sums[first]) / (last - first)), 1)


def _pale(colour: Colour) -> Colour:
    red, green, blue = (255 - (255 - part) // 3 for part in colour)
    return red, green, blue


class _Canvas:
    """A frame with axes for given points; positions are in pixels of the enlarged picture."""

    def __init__(self, title: str, size: tuple[int, int], points: np.ndarray, log_y: bool) -> None:
        width, height = (SHARPNESS * side for side in size)
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(13 * SHARPNESS)
        left, top, right, bottom = (SHARPNESS * margin for margin in (LEFT, TOP, RIGHT, BOTTOM))
        self.frame = (left, top, width - right, height - bottom)
        self.low, self.high = _limits(points)
        self._axes(log_y)
        self.draw.text((left, top / 2), title, INK, ImageFont.load_default(16 * SHARPNESS), anchor="lm")

    def _at(self, points: np.ndarray) -> np.ndarray:
        left, top, right, bottom = self.frame
        return np.array((left, bottom)) + (points - self.low) / (self.high - self.low) * (
            right - left,
            top - bottom,
        )

    def _axes(self, log_y: bool) -> None:
        left, top, right, bottom = self.frame
        (low_x, low_y), (high_x, high_y) = self.low, self.high
        gap = 6 * SHARPNESS
        for value in _ticks(low_x, high_x, 8):
            x = self._at(np.array((value, low_y)))[0]
            self.draw.line((x, top, x, bottom), GRID, SHARPNESS)
            self.draw.text((x, bottom + gap), _label(value), INK, self.font, anchor="ma")
        values = _log_ticks(low_y, high_y) if log_y else _ticks(low_y, high_y, 6)
        for value in values:
            y = self._at(np.array((low_x, math.log10(value) if log_y else value)))[1]
            self.draw.line((left, y, right, y), GRID, SHARPNESS)
            self.draw.text((left - gap, y), _label(value), INK, self.font, anchor="rm")
        self.draw.rectangle(self.frame, outline=INK, width=SHARPNESS)

    def line(self, points: np.ndarray, colour: Colour, width: int) -> None:
        """Draw a line through points [N, 2]; a lone point is a dot."""
        places = self._at(points)
        if len(places) == 1:
            (x, y), radius = places[0], 3 * SHARPNESS
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
        else:
            self.draw.line(places.ravel().tolist(), colour, width * SHARPNESS, joint="curve")

    def legend(self, names: list[str], colours: list[Colour]) -> None:
        """Name the lines in the upper right corner."""
        gap, row, stroke = (SHARPNESS * length for length in (8, 18, 20))
        width = 3 * gap + stroke + max(self.draw.textlength(name, self.font) for name in names)
        _, top, right, _ = self.frame
        left, top, right = right - gap - width, top + gap, right - gap
        box = (left, top, right, top + row * len(names) + gap)
        self.draw.rectangle(box, PAPER, GRID, SHARPNESS)
        for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
            y = top + gap / 2 + row * (index + 0.5)
            self.draw.line((left + gap, y, left + gap + stroke, y), colour, 3 * SHARPNESS)
            self.draw.text((left + 2 * gap + stroke, y), name, INK, self.font, anchor="lm")


def _limits(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper corner of what is shown; y gets some room, no side has no length."""
    low, high = points.min(0), points.max(0)
    empty = high - low <= 1e-9 * np.abs(high)
    room = np.where(empty, np.maximum(0.5, np.abs(high) / 2), (high - low) * (0.0, 0.04))
    return low - room, high + room


def _ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers (1, 2 or 5 times a power of 10 apart) from `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10**low to 10**high."""
    if high - low < 1:
        return [value for value in _ticks(10**low, 10**high, 6) if value > 0]
    factors = (1, 2, 5) if high - low < 4 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in values if 10**low <= value <= 10**high]


def _label(value: float) -> str:
    return f"{value:.6g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.0e}".replace("e+0", "e")
