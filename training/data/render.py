"""Pictures of the two worlds, drawn with distance functions and smooth edges.

Coordinates are in units of the picture's shorter side, zero in its centre, y downwards. A distance function
is negative inside a shape; its edge is one pixel soft.
"""

import numpy as np

from .world import BACKGROUNDS, COLORS, HAIR, NO_HAT, SHIRTS, Bounce, Color, Head

FLOOR = 0.40  # y of the floor's edge
HEIGHT = 0.38  # that a shape rises
SKIN, LIPS, MOUTH, EYES = (236, 188, 148), (200, 84, 84), (104, 8, 24), (24, 24, 32)
HAT_COLOR = COLORS["purple"]
CROWN, BRIM = (0.22, -0.49, -0.32), (0.36, -0.36, -0.30)  # of a hat: half width, top, bottom
MOUTH_CENTRE, MOUTH_WIDTH, MOUTH_OPEN = (0.0, 0.10), 0.12, 0.09  # half sizes

_POLYGONS = {
    "square": [(-0.18, -0.18), (0.18, -0.18), (0.18, 0.18), (-0.18, 0.18)],
    "triangle": [(0.0, -0.22), (0.24, 0.19), (-0.24, 0.19)],
    "star": [
        (r * np.sin(a), -r * np.cos(a))
        for i, a in enumerate(np.arange(10) * np.pi / 5)
        for r in [0.25 if i % 2 == 0 else 0.11]
    ],
    "heart": [
        (0.0155 * 16 * np.sin(a) ** 3 * 0.9,
         -0.0145 * (13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)))
        for a in np.arange(48) * 2 * np.pi / 48
    ],
}  # fmt: skip
RADIUS = 0.20  # of the circle


def grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """x and y [H, W] of the pixels of a picture `size` (width, height), and the side of a pixel."""
    width, height = size
    pixel = 1 / min(size)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (x + 0.5 - width / 2) * pixel, (y + 0.5 - height / 2) * pixel, pixel


def draw_bounce(attributes: Bounce, phase: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames [F, H, W, 3] uint8 of a shape at `phase` [F], 0 to 1, between two bounces."""
    x, y, pixel = grid(size)
    background = np.array(BACKGROUNDS[attributes.background], np.float32)
    still = np.broadcast_to(background, (*x.shape, 3)).copy()
    _paint(still, FLOOR - y, background * 0.72, pixel)
    rest = FLOOR - lowest(attributes.shape)
    frames = []
    for height in 4 * HEIGHT * phase * (1 - phase):
        picture = still.copy()
        shadow = ellipse(x, y - FLOOR - 0.03, 0.20 - 0.16 * height, 0.025)
        _paint(picture, shadow, background * 0.5, pixel)
        _paint(
            picture, shape_distance(attributes.shape, x, y - rest + height), COLORS[attributes.colour], pixel
        )
        frames.append(picture)
    return _to_uint8(frames)


def lowest(shape: str) -> float:
    """How far a shape reaches below its centre."""
    return RADIUS if shape == "circle" else max(y for _, y in _POLYGONS[shape])


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of a shape around the origin."""
    return np.hypot(x, y) - RADIUS if shape == "circle" else _polygon(_POLYGONS[shape], x, y)


def draw_head(attributes: Head, opening: np.ndarray, blinks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames [F, H, W, 3] uint8 of a head: mouth open by `opening` [F], eyes closed at `blinks` [F]."""
    x, y, pixel = grid(size)
    still = np.broadcast_to(np.float32(BACKGROUNDS[attributes.background]), (*x.shape, 3)).copy()
    hair, shirt = HAIR[attributes.hair], SHIRTS[attributes.shirt]
    _paint(still, ellipse(x, y - 0.56, 0.40, 0.28), shirt, pixel)
    _paint(still, np.maximum(np.abs(x) - 0.08, np.abs(y - 0.26) - 0.08), _darker(SKIN), pixel)
    _paint(still, ellipse(x, y + 0.10, 0.29, 0.32), hair, pixel)
    _paint(still, np.maximum(ellipse(x, y, 0.24, 0.30), -0.16 - y), SKIN, pixel)
    if attributes.hat != NO_HAT:
        for half_width, top, bottom in (CROWN, BRIM):
            _paint(
                still, np.maximum(np.abs(x) - half_width, np.maximum(top - y, y - bottom)), HAT_COLOR, pixel
            )
    frames = []
    for open_by, closed in zip(opening, blinks, strict=True):
        picture = still.copy()
        for side in (-0.10, 0.10):
            _paint(picture, ellipse(x - side, y + 0.06, 0.032, 0.008 if closed else 0.036), EYES, pixel)
        mouth_x, mouth_y = x - MOUTH_CENTRE[0], y - MOUTH_CENTRE[1]
        gap = MOUTH_OPEN * float(open_by)
        _paint(picture, ellipse(mouth_x, mouth_y, MOUTH_WIDTH + 0.02, gap + 0.022), LIPS, pixel)
        if gap > pixel / 4:
            _paint(picture, ellipse(mouth_x, mouth_y, MOUTH_WIDTH, gap), MOUTH, pixel)
        frames.append(picture)
    return _to_uint8(frames)


def ellipse(x: np.ndarray, y: np.ndarray, radius_x: float, radius_y: float) -> np.ndarray:
    """Nearly the signed distance to an ellipse around the origin."""
    scaled = np.hypot(x / radius_x, y / radius_y)
    slope = np.hypot(x / radius_x**2, y / radius_y**2)
    return scaled * (scaled - 1) / np.maximum(slope, 1e-6)


def _polygon(corners: list[tuple[float, float]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon: the nearest edge, inside by the even-odd rule."""
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        along = along.clip(0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
        if ay != by:
            inside ^= ((y < ay) != (y < by)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return np.where(inside, -nearest, nearest)


def _paint(picture: np.ndarray, distance: np.ndarray, color: Color | np.ndarray, pixel: float) -> None:
    cover = (0.5 - distance / pixel).clip(0, 1)[..., None].astype(np.float32)
    picture += cover * (np.asarray(color, np.float32) - picture)


def _darker(color: Color) -> np.ndarray:
    return np.array(color, np.float32) * 0.86


def _to_uint8(frames: list[np.ndarray]) -> np.ndarray:
    return np.stack(frames).round().astype(np.uint8)
