"""Make many small films in one process, changing sizes, inputs and variants, and watch the memory.

Prints the anonymous memory after every tenth film. The first round of all options warms up; exits with 1 if
the mean over the last round is more than 2 % above that over the second. Linux only.
Usage: `python benchmarks/soak.py [--films 210]`.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from load_memory import anonymous_memory
from PIL import Image

from happyhorse import cli
from happyhorse.pony import write_pony

MB = 1e6
GROWTH = 1.02


def option_sets(image: Path) -> list[list[str]]:
    """Options of films that differ in size, length, input and stages."""
    sizes = (["--aspect", "1:1"], ["--aspect", "16:9"], ["--size", "64x96"])
    inputs = (
        [],
        ["--image", str(image)],
        ["--variant", "base", "--steps", "3"],
        ["--sr", "540p"],
        ["--decoder", "wan"],
    )
    lengths = (["--seconds", "0.2"], ["--seconds", "1"])
    return [list(itertools.chain(*parts)) for parts in itertools.product(sizes, inputs, lengths)]


def main() -> int:
    """Make the films; 1 if memory grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=210)
    options = parser.parse_args()
    torch.set_num_threads(1)
    levels = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_pony(folder)
        pixels = np.arange(96 * 128 * 3, dtype=np.uint8).reshape(96, 128, 3)
        Image.fromarray(pixels).save(folder / "image.png")
        sets = option_sets(folder / "image.png")
        if options.films < 3 * len(sets):
            parser.error(
                f"--films must be at least {3 * len(sets)}, three rounds of all options, got {options.films}"
            )
        for index, chosen in enumerate(itertools.islice(itertools.cycle(sets), options.films)):
            arguments = [
                "--preset",
                "pony",
                "--models",
                work,
                "--out",
                str(folder / "film.mp4"),
                "--seed",
                str(index),
            ]
            if cli.main(["generate", "--prompt", "a red circle .", *arguments, *chosen]):
                return 1
            gc.collect()
            levels.append(anonymous_memory())
            if index % 10 == 9:
                sys.stdout.write(f"{index + 1} films: {levels[-1] / MB:.0f} MB\n")
    early, late = (
        statistics.mean(part) for part in (levels[len(sets) : 2 * len(sets)], levels[-len(sets) :])
    )
    sys.stdout.write(f"second round {early / MB:.0f} MB, last round {late / MB:.0f} MB\n")
    return int(late > GROWTH * early)


if __name__ == "__main__":
    sys.exit(main())
