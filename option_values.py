"""What the command line's options accept: their words as values, and one sentence for what is refused.

What is refused raises argparse.ArgumentTypeError.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .media import UPSCALE_MODES
from .model.lora import MODALITIES, Lora, Strengths

LORA_STRENGTHS = (*MODALITIES, "shared")


def parse_text(text: str) -> str:
    """Words that can be written as UTF-8."""
    if not text.strip() or text.encode(errors="ignore").decode() != text:
        raise argparse.ArgumentTypeError(f"must be words in UTF-8, got {text!r}")
    return text


def parse_planned_size(text: str) -> str | tuple[int, int]:
    """256p, 540p, 1080p or a size."""
    if text in ("256p", "540p", "1080p"):
        return text
    try:
        return parse_size(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be 256p, 540p, 1080p or look like 448x256, got {text!r}"
        ) from None


def parse_gigabytes(text: str) -> float:
    """A number of GB above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of GB above 0, got {text!r}")
    return value


def parse_updates(text: str) -> int:
    """How many updates a training has."""
    return _whole(text, 1, 10**6)


def parse_count(text: str) -> int:
    """How many clips or batches."""
    return _whole(text, 1, 1024)


def parse_resident(text: str) -> int | None:
    """How many layers stay on the device; None for `auto`."""
    return None if text == "auto" else _whole(text, 0, 1000)


def parse_rate(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def parse_names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_size(text: str) -> tuple[int, int]:
    """(width, height), written 448x256."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must look like 448x256, got {text!r}")
    return int(width), int(height)


def parse_upscale(text: str) -> tuple[int, int, str]:
    """(width, height, mode), written 1280x720:bicubic."""
    size, _, mode = text.partition(":")
    width, height = parse_size(size)
    if width % 2 or height % 2 or not min(width, height) >= 2 or max(width, height) > 8192:
        raise argparse.ArgumentTypeError(f"width and height must be even and at most 8192, got {size!r}")
    if mode and mode not in UPSCALE_MODES:
        raise argparse.ArgumentTypeError(f"mode must be one of {', '.join(UPSCALE_MODES)}, got {mode!r}")
    return width, height, mode or "bicubic"


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
    return value


def parse_seed(text: str) -> int:
    """A seed that leaves room for those drawn from it."""
    return _whole(text, 0, 2**63 - 1 - 8)


def parse_steps(text: str) -> int:
    """How many steps a sampler takes."""
    return _whole(text, 1, 1000)


def parse_rank(text: str) -> int:
    """The rank of a LoRA."""
    return _whole(text, 1, 4096)


def parse_lora(text: str) -> Lora:
    """FILE, FILE:0.8 or FILE:0.8:video=1,audio=0,blocks=0-3:0.5,4-35.

    Raises ArgumentTypeError that quotes what is wrong.
    """
    found = re.search(rf"[:,]\s*(?=({'|'.join(LORA_STRENGTHS)}|blocks)\s*=)", text)
    head, settings = (text[: found.start()], text[found.end() :]) if found else (text, "")
    path, colon, strength = head.rpartition(":")
    if not colon or re.search(r"[/\\]|\.[a-z]+$", strength):  # the colon of a path, as in C:\a.safetensors
        path, strength = head, "1"
    try:
        if not path.strip():
            raise ValueError("the file is missing")
        if "=" in strength:  # behind which no setting that is known was found
            _check_names([strength.partition("=")[0].rpartition(",")[2].strip()])
        values, blocks = _lora_settings(settings)
        if found and found[0].startswith(","):
            raise ValueError(f"a colon must stand before {found[1]}=, got a comma")
        return Lora(Path(path), Strengths(_number(strength), **values, blocks=blocks))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} in {text!r}; write FILE:0.8:video=1,audio=0") from error


def _lora_settings(text: str) -> tuple[dict[str, float], str]:
    """The strengths by name, and blocks; raises ValueError for names that are unknown or out of place."""
    start = re.search(r"(?:^|,)\s*blocks\s*=", text)
    text, blocks = (text[: start.start()], text[start.end() :]) if start else (text, "")
    pairs = [pair.partition("=")[::2] for pair in text.split(",") if pair.strip()]
    names = [name.strip() for name, _ in pairs]
    behind = re.findall(r"([^\s,:=]*)\s*=", blocks)
    _check_names([*names, *(["blocks"] if start else []), *behind])
    if behind:
        raise ValueError(f"blocks= must come last, got {behind[0]}= behind it")
    if ":" in text:
        raise ValueError(f"commas must stand between settings, got a colon in {text!r}")
    return {name: _number(value) for name, (_, value) in zip(names, pairs, strict=True)}, blocks


def _check_names(names: Sequence[str]) -> None:
    known = (*LORA_STRENGTHS, "blocks")
    if wrong := [name for name in names if name not in known or names.count(name) > 1]:
        raise ValueError(f"settings are {', '.join(LORA_STRENGTHS)} and blocks, each once, got {wrong[0]!r}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"a strength must be a number, got {text!r}") from error


def parse_device(text: str) -> torch.device:
    """A device that can be used here."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0].partition(". ")[0]  # what follows may be a page long
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({first}); try cpu") from error
    return device
