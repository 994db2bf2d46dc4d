"""What was measured, as tables and pictures."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..model.geometry import FILM_RATE
from .evaluate import CHANCE, LOOKS, SHUFFLED, Figures, read_film
from .files import write_whole

NETWORKS = "networks"  # in the place of a mode: how near films that went through the VAEs are


def table(figures: Figures, ceilings: Figures | None = None) -> str:
    """A Markdown table of all figures, their ceilings and chances."""
    rows = ["| given | world | figure | value | ceiling | chance |", "|---|---|---|---|---|---|"]
    for mode, worlds in figures.items():
        for world, found in worlds.items():
            limits = (ceilings or {}).get(mode, {}).get(world, {})
            for name, value in found.items():
                if not name.endswith(SHUFFLED):
                    texts = [
                        _number(number) for number in (value, limits.get(name), chance(found, world, name))
                    ]
                    rows.append(f"| {' | '.join([mode, world, name, *texts])} |")
    return "\n".join(rows) + "\n"


def chance(found: Mapping[str, float], world: str, name: str) -> float | None:
    """What a film that does not listen to its prompt gets for a figure; None where that means nothing."""
    if name == "kept":
        return float(np.mean([CHANCE[look] for look in LOOKS[world]]))
    return found.get(name + SHUFFLED, CHANCE.get(name))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) > 2 else f"{value:.2f}"


def write_report(path: Path, figures: Figures, ceilings: Figures | None = None) -> None:
    """Write figures and ceilings to `path`, a .json, and as a table beside it to a .md."""
    _write(path, {"figures": figures, "ceilings": ceilings}, table(figures, ceilings))


def write_summary(path: Path, found: Mapping[str, Figures]) -> None:
    """Write the figures of several ways of making films to `path`, a .json, and beside it as a .md."""
    _write(path, found, summary(found))


def summary(found: Mapping[str, Figures]) -> str:
    """A Markdown table of all figures, a column for each way of making films."""
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for way, figures in found.items():
        for mode, worlds in figures.items():
            for world, values in worlds.items():
                for name, value in values.items():
                    rows.setdefault((mode, world, name), {})[way] = value
    lines = [["given", "world", "figure", *found], ["---"] * (3 + len(found))]
    lines += [[*row, *(_number(values.get(way)) for way in found)] for row, values in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _write(path: Path, values: object, text: str) -> None:
    texts = {path.with_suffix(".json"): json.dumps(values, indent=1) + "\n", path.with_suffix(".md"): text}
    for name, content in texts.items():
        write_whole(name, partial(Path.write_text, data=content, encoding="utf-8"), "another folder")


def contact_sheet(films: Mapping[str, Path], columns: int = 8, height: int = 96) -> Image.Image:
    """A row for each film under its title: frames from first to last, waveform over spectrogram."""
    rows = [_film_row(title, *read_film(path), columns, height) for title, path in films.items()]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _film_row(title: str, frames: np.ndarray, sound: np.ndarray, columns: int, height: int) -> Image.Image:
    width = round(height * frames.shape[2] / frames.shape[1])
    sound_width, margin, line = 2 * height, 4, 14
    row = Image.new("RGB", (columns * width + margin + sound_width, line + height + margin), "white")
    draw = ImageDraw.Draw(row)
    draw.text((2, 1), title, "black", ImageFont.load_default(11))
    shown = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    for column, frame in enumerate(shown):
        row.paste(Image.fromarray(frames[frame]).resize((width, height)), (column * width, line))
    left, half = columns * width + margin, height // 2
    mono = sound.mean(axis=0)
    blocks = np.array_split(mono, sound_width)
    for x, block in enumerate(blocks):
        low, high = (line + half / 2 * (1 - float(edge)) for edge in (block.max(), block.min()))
        draw.line((left + x, low, left + x, high), (40, 90, 160))
    row.paste(_spectrogram(mono).resize((sound_width, height - half)), (left, line + half))
    return row


def _spectrogram(mono: np.ndarray, window: int = 2048, top: int = 3000) -> Image.Image:
    """Levels from -70 to 0 dB up to `top` Hz, low at the bottom, loud is dark."""
    mono = np.pad(mono, (0, max(0, window - len(mono))))
    pieces = np.lib.stride_tricks.sliding_window_view(mono, window)[:: window // 4] * np.hanning(window)
    levels = np.abs(np.fft.rfft(pieces))[:, : top * window // FILM_RATE].T[::-1] * 4 / window
    decibels = 20 * np.log10(levels + 1e-6)
    return Image.fromarray((-decibels / 70 * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
