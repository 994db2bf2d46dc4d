"""The pony's video VAE and fast decoder with and without the convolutions of small films, in turn.

    python benchmarks/small_films.py

Seconds of processor time on one thread, medians, and the ratio of each pair of runs.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from happyhorse import pony
from happyhorse.kernels import convolution
from happyhorse.model.checkpoint import load, open_checkpoint

PAIRS = 5


@torch.inference_mode()
def main() -> None:
    """Print a line for each network and direction."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 48, 13, 6, 6, generator=draw)
    film = 2 * torch.rand(1, 3, 49, 96, 96, generator=draw) - 1
    vae, decoder = (
        load(open_checkpoint(pony.FOLDER / pony.FILES[name]), torch.float32)
        for name in ("video_vae", "video_decoder")
    )
    print_pairs("fast decoder", lambda: decoder.decode(latents))
    print_pairs("video VAE, decoding", lambda: vae.decode(latents))
    print_pairs("video VAE, encoding", lambda: vae.encode(film))


def print_pairs(name: str, run: Callable[[], Tensor]) -> None:
    """Run by oneDNN and as PyTorch would in turn, after one pair that does not count."""
    chosen, pairs = convolution.is_slow, []
    for _ in range(PAIRS + 1):
        seconds = []
        for is_slow in (chosen, lambda _: False):
            convolution.is_slow = is_slow
            started = time.process_time()
            run()
            seconds.append(time.process_time() - started)
        pairs.append(seconds)
    convolution.is_slow = chosen
    ours, torchs = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratios = [slow / fast for fast, slow in pairs[1:]]
    sys.stdout.write(
        f"{name}: {torchs:.2f} s, by oneDNN {ours:.2f} s; ratio {statistics.median(ratios):.1f} "
        f"({min(ratios):.1f} to {max(ratios):.1f})\n"
    )


if __name__ == "__main__":
    main()
