"""Load a synthetic 3 GB float32 checkpoint in shards as bfloat16 and compare the peak of anonymous memory
with what must be there: final size + the largest tensor in float32 + 100 MB. Linux only. Usage: `python
benchmarks/load_memory.py`.
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
from safetensors.torch import save_file

from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import TransformerConfig
from happyhorse.model.transformer import JointTransformer

MB = 1e6
ALLOWANCE = 100 * MB
CONFIG = TransformerConfig(
    num_layers=12, hidden_size=2048, head_dim=128, num_query_groups=4, video_in_channels=192,
    audio_in_channels=64, text_in_channels=3584, mm_layers=(0, 11), gelu7_layers=(0,), local_attn_layers=(),
    frame_receptive_field=11, enable_attn_gating=True, coords_style="v2",
)  # fmt: skip


def write_checkpoint(folder: Path, shards: int = 4) -> int:
    """Write a float32 transformer in `shards` files with an index; returns the bytes of its tensors."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in JointTransformer(CONFIG).state_dict().items()}
    names = list(shapes)
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        state = {name: torch.full(shapes[name], 0.01) for name in names[shard::shards]}
        save_file(state, folder / file, {"config": json.dumps(CONFIG.to_dict()), "variant": "distill"})
        weight_map |= dict.fromkeys(state, file)
        total += sum(tensor.nbytes for tensor in state.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measure(folder: Path) -> None:
    """Load the checkpoint and print the peak over the level before, and what it may be."""
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    module = load(open_checkpoint(folder), torch.bfloat16)
    done.set()
    watcher.join()
    sizes = [tensor.nbytes for tensor in module.state_dict().values()]
    largest = max(tensor.numel() for tensor in module.state_dict().values()) * 4
    sys.stdout.write(json.dumps({"peak": peak - before, "final": sum(sizes), "largest": largest}))


def main() -> int:
    """Run the measurement in a fresh process; 1 if the peak is too high."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        stored = write_checkpoint(Path(folder))
        command = [sys.executable, __file__, "--measure", folder]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    limit = result["final"] + result["largest"] + ALLOWANCE
    sys.stdout.write(
        f"stored {stored / MB:.0f} MB float32; final {result['final'] / MB:.0f} MB, largest tensor "
        f"{result['largest'] / MB:.0f} MB; peak {result['peak'] / MB:.0f} MB, limit {limit / MB:.0f} MB\n"
    )
    return int(result["peak"] > limit)


if __name__ == "__main__":
    sys.exit(main())
