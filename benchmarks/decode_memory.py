"""Show that the video decoder's windows keep memory constant, however long the film.

Decodes films of several lengths on the CPU, each in a process of its own, once in windows whose frames are
dropped as they come (as when a film is written to disk) and once in a single window. Prints the peak memory
above that of the loaded network, and exits with 1 unless windows need the same for the longest film as for
the shortest while the single window needs more. The network is narrow and its weights are random, for only
sizes matter here; its windows are longer than the published 7 latents, so that small pictures fill them.
Linux only: it reads /proc.

    python benchmarks/decode_memory.py
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

WIDTHS, BLOCKS, WINDOW = (16, 16, 16, 16), (1, 1, 1, 1, 1), 21  # of the network
MB = 1024  # in kB, the unit of /proc
TOLERANCE = 1.05
# By default glibc keeps freed tensors of up to 32 MB for reuse, and how many depends on chance: the peak
# would tell of the allocator. With a fixed limit (in bytes) the peak is that of the tensors in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def memory_kb(field: str) -> int:
    """A field of this process's status: VmRSS, the memory in use now, or VmHWM, the most there has been."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def decode_once(mode: str, seconds: int, height: int, width: int) -> None:
    """Decode one film and write "<peak kB above the loaded network> <seconds> <frames>"."""
    # Imported here, since the memory of the measuring process would count as its children's.
    import torch

    from happyhorse.model.config import PONY
    from happyhorse.model.geometry import FPS
    from happyhorse.model.video_decoder import VideoDecoder

    latent_frames = seconds * FPS // 4 + 1
    config = replace(
        PONY.video_decoder,
        decoder_block_out_channels=WIDTHS,
        decoder_layers_per_block=BLOCKS,
        first_chunk_size=WINDOW if mode == "windows" else latent_frames,
        step_size=WINDOW,
    )
    torch.manual_seed(0)
    decoder = VideoDecoder(config).requires_grad_(False)
    latents = torch.randn(1, config.latent_channels, latent_frames, height // 16, width // 16)
    decoder.decode(latents[:, :, :1, :2, :2])  # loads what the libraries load late

    loaded, start, frames = memory_kb("VmRSS"), time.perf_counter(), 0
    for chunk in decoder.decode_chunks(latents):
        frames += chunk.shape[2]
        del chunk  # before the next window is decoded
    elapsed = time.perf_counter() - start
    sys.stdout.write(f"{memory_kb('VmHWM') - loaded} {elapsed} {frames}\n")


def measure(mode: str, seconds: int, args: argparse.Namespace) -> float:
    """Run one case in a fresh process, write a row of the table, and return the peak in MB."""
    case = [sys.executable, __file__, "--case", mode, str(seconds)]
    size = ["--height", str(args.height), "--width", str(args.width)]
    process = subprocess.run(
        [*case, *size], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ALLOCATOR}
    )
    peak_kb, elapsed, frames = process.stdout.split()
    peak = int(peak_kb) / MB
    sys.stdout.write(f"{mode:>8} {seconds:>6} s {frames:>7} {peak:>9.0f} MB {float(elapsed):>8.1f} s\n")
    sys.stdout.flush()
    return peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=192, help="rows of the picture, a multiple of 16")
    parser.add_argument("--width", type=int, default=320, help="columns of the picture, a multiple of 16")
    parser.add_argument("--windows", type=int, nargs="+", default=[10, 30], help="film lengths in seconds")
    parser.add_argument("--single", type=int, nargs="+", default=[5, 10], help="lengths in a single window")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        decode_once(args.case[0], int(args.case[1]), args.height, args.width)
        return 0

    sys.stdout.write(f"{'mode':>8} {'film':>8} {'frames':>7} {'peak':>12} {'time':>10}\n")
    windows = [measure("windows", seconds, args) for seconds in args.windows]
    single = [measure("single", seconds, args) for seconds in args.single]
    constant = windows[-1] <= TOLERANCE * windows[0]
    grows = single[-1] > TOLERANCE * single[0]
    sys.stdout.write(f"windows need the same for every length: {'yes' if constant else 'NO'}\n")
    sys.stdout.write(f"a single window needs more for a longer film: {'yes' if grows else 'NO'}\n")
    return 0 if constant and grows else 1


if __name__ == "__main__":
    sys.exit(main())
