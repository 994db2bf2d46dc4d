"""Convert a synthetic 6 GB float32 transformer in shards to every format, and compare the peak of anonymous
memory with the level after the imports: it may rise by 1 GB. Then kill a run half-way, which must leave no
file under the final name, and run it again. Linux only; needs 13 GB of disk. Usage: `python
benchmarks/convert_memory.py [FORMAT ...]`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from load_memory import anonymous_memory
from safetensors.torch import save_file

from happyhorse.model.checkpoint import check_names, open_checkpoint
from happyhorse.model.config import TransformerConfig
from happyhorse.model.convert import FORMATS, convert, suffix_of
from happyhorse.model.transformer import JointTransformer

GB = 1e9
LIMIT = 1 * GB
# layers of the full width: the largest tensor is the largest of the published model, 1.7 GB in float32
CONFIG = TransformerConfig(
    num_layers=4, hidden_size=5120, head_dim=128, num_query_groups=8, video_in_channels=192,
    audio_in_channels=64, text_in_channels=3584, mm_layers=(1,), gelu7_layers=(0,), local_attn_layers=(),
    frame_receptive_field=11, enable_attn_gating=True, coords_style="v2",
)  # fmt: skip


def write_checkpoint(folder: Path, shards: int = 5) -> int:
    """Write a float32 transformer in `shards` files with an index; returns the bytes of its tensors."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in JointTransformer(CONFIG).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    names = sorted(shapes, key=lambda name: shapes[name].numel())
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        state = {name: torch.empty(shapes[name]) for name in names[shard::shards]}
        for tensor in state.values():
            tensor.normal_(std=0.02, generator=generator)
        save_file(state, folder / file, {"config": json.dumps(CONFIG.to_dict()), "variant": "distill"})
        weight_map |= dict.fromkeys(state, file)
        total += sum(tensor.nbytes for tensor in state.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def measure(folder: Path, target: Path, to: str) -> None:
    """Convert and print the peak over the level before, and the seconds it took."""
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.monotonic()
    convert(open_checkpoint(folder), target, to, "benchmark")
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    sys.stdout.write(json.dumps({"peak": peak - before, "seconds": seconds}))


def kill_half_way(folder: Path, target: Path, to: str, num_bytes: int) -> None:
    """Begin a conversion and kill it when half of the file is there; raises AssertionError where it ended
    before.
    """
    process = subprocess.Popen([sys.executable, __file__, "--measure", folder, target, to])
    while not any(
        file.stat().st_blocks * 512 > num_bytes / 2 for file in target.parent.glob(".*.unfinished")
    ):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    process.wait()


def main() -> int:
    """Run each conversion in a fresh process; 1 if a peak is too high or a killed run leaves a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), Path(options.measure[1]), options.measure[2])
        return 0
    failures = 0
    formats = options.formats or list(FORMATS)
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "distill", Path(temporary) / "out"
        folder.mkdir()
        out.mkdir()
        stored = write_checkpoint(folder)
        for to in formats:
            target = out / f"distill{suffix_of(to)}"
            command = [sys.executable, __file__, "--measure", str(folder), str(target), to]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            failures += result["peak"] > LIMIT
            size = target.stat().st_size
            sys.stdout.write(
                f"{stored / GB:.2f} GB float32 to {to}: {size / GB:.2f} GB in {result['seconds']:.0f} s, "
                f"anonymous memory rises by {result['peak'] / GB:.3f} GB, limit {LIMIT / GB:g} GB\n"
            )
            sys.stdout.flush()
            if to == formats[-1]:
                target.unlink()
                kill_half_way(folder, target, to, size)
                left = sorted(file.name for file in out.iterdir())
                subprocess.run(command, check=True, capture_output=True)
                converted = open_checkpoint(target)
                check_names(converted, converted.build().state_dict())
                whole = [file.name for file in out.iterdir()] == [target.name]
                failures += not whole or any(not name.startswith(".") for name in left)
                sys.stdout.write(
                    f"killed half-way: {left} is left; run again: {target.name}, whole: {whole}\n"
                )
            target.unlink()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
