"""`happyhorse convert`: a checkpoint in another weight format, and what that changed."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from . import __version__
from .model.catalog import parts_in
from .model.checkpoint import open_checkpoint
from .model.convert import WeightError, convert, velocity_error
from .model.stream_writer import check_target

LAYER = re.compile(r"[^\d]*\.\d+(?=\.)")  # the name of a tensor up to its first number


def run_convert(options: argparse.Namespace, progress: Callable[[str, int, int], None]) -> str:
    """Convert as the options say and return what to tell of it, one line per layer; raises ValueError or
    OSError.
    """
    if len(parts := parts_in(options.source)) > 1:
        names = ", ".join(part.name for part in parts)
        raise ValueError(f"{options.source} is a folder of models; give one of those in it: {names}")
    source = open_checkpoint(options.source, variant=options.variant)
    if options.check and source.part != "transformer":
        part = source.part.replace("_", " ")
        raise ValueError(f"--check compares velocities, which the {part} has not; leave it out")
    check_target(options.out, [options.source], options.overwrite)
    program = f"happyhorse {__version__}"

    def told(done: int, total: int) -> None:
        progress(f"converting the {source.label}", done, total)

    errors = convert(source, options.out, options.to, program, told)
    lines = [*error_lines(errors), f"{options.out.resolve()}: {_size(options.out)}"]
    if options.check:
        try:
            error = velocity_error(source, options.out, lambda done, total: progress("checking", done, total))
        except KeyboardInterrupt as interrupt:
            whole = f"{options.out} is written and whole, only its check was not finished"
            raise KeyboardInterrupt(whole) from interrupt
        lines.append(f"velocity error {_percent(error)}")
    return "\n".join(lines)


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def error_lines(errors: Mapping[str, WeightError]) -> list[str]:
    """One line per layer with the errors of the tensors that changed, and one for all these."""
    layers: dict[str, dict[str, WeightError]] = {}
    for own, error in errors.items():
        if error.change:
            layer = LAYER.match(own)
            layers.setdefault(layer[0] if layer else own, {})[own] = error
    lines = [f"{layer}: {_told(changed)}" for layer, changed in layers.items()]
    changed = [error for tensors in layers.values() for error in tensors.values()]
    total = sum(changed, WeightError()).relative
    return [*lines, f"weight error {_percent(total)} in {len(changed)} of {len(errors)} tensors"]


def _told(errors: Mapping[str, WeightError]) -> str:
    """The errors of a layer's tensors, or of all together where short names do not tell them apart."""
    names = {own: own.removesuffix(".weight").rpartition(".")[2] for own in errors}
    if len(errors) == 1 or len(set(names.values())) < len(names):
        return _percent(sum(errors.values(), WeightError()).relative)
    return ", ".join(f"{names[own]} {_percent(error.relative)}" for own, error in errors.items())


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"
