"""The memory plan against the memory that films take on the CPU, and the table of docs/memory.md.

Each case is a film made in a process of its own from synthetic checkpoints of a few hundred MB, with one step
of sampling; its peak of anonymous memory above the level after the imports is compared with the plan's. Exits
with 1 if one is more than 15 % off. Linux only: it reads /proc. `--tiers` prints the table instead.

    python benchmarks/plan_memory.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

MB, GB = 1e6, 1e9
LIMIT = 0.15
# offload, dtype, width, height and seconds of films
CASES = (
    ("stage", "float32", 288, 160, 1.0), ("stage", "float32", 416, 224, 1.2),
    ("stage", "bfloat16", 352, 224, 1.0), ("stage", "bfloat16", 256, 192, 2.0),
    ("none", "float32", 352, 256, 1.0), ("none", "float32", 416, 256, 1.2),
    ("none", "bfloat16", 384, 288, 0.8), ("none", "bfloat16", 288, 192, 2.0),
    ("blocks", "float32", 256, 128, 2.0), ("blocks", "float32", 448, 224, 1.0),
    ("blocks", "bfloat16", 352, 256, 1.0), ("pieces", "float32", 416, 256, 1.0),
)  # fmt: skip
# Freed tensors of up to 32 MB would be kept for reuse: the peak would tell of the allocator.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}


def write_checkpoints(folder: Path) -> None:
    """The pony, but for a transformer of 220 MB in float32, an eighth of the real one's width, and a decoder
    whose widths and windows need little work.
    """
    import torch
    from safetensors.torch import save_file

    from happyhorse.model.config import MAGIHUMAN, PONY
    from happyhorse.model.transformer import JointTransformer
    from happyhorse.model.video_decoder import VideoDecoder
    from happyhorse.pony import write_pony

    write_pony(folder)
    config = replace(
        MAGIHUMAN.transformers["distill"], num_layers=9, hidden_size=640, num_query_groups=1,
        text_in_channels=PONY.text_encoder.hidden_size, mm_layers=(0, 8), gelu7_layers=(0,),
    )  # fmt: skip
    decoder = replace(
        PONY.video_decoder, decoder_block_out_channels=(32,) * 4, decoder_layers_per_block=(1,) * 5,
        first_chunk_size=3, step_size=3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, module in (
        ("distill", JointTransformer(config)),
        ("turbo_vae", VideoDecoder(decoder)),
    ):
        # in neither of the dtypes that are tried: weights that need no cast stay in the mapped file
        state = {
            own: (0.03 * torch.randn(tensor.shape, generator=generator)).half()
            for own, tensor in module.state_dict().items()
        }
        header = {"config": json.dumps(module.config.to_dict()), "variant": "distill"}
        save_file(state, folder / name / "model.safetensors", header)


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measure(folder: Path, offload: str, dtype_name: str, width: int, height: int, seconds: float) -> None:
    """Make one film; write its planned and measured peak as JSON."""
    import torch

    from happyhorse import cli  # noqa: F401, all that a film imports
    from happyhorse.defaults import DTYPES
    from happyhorse.model.config import PONY
    from happyhorse.model.geometry import FilmShape
    from happyhorse.sampler.parts import Parts, needed_parts, open_part
    from happyhorse.sampler.pipeline import FilmRequest, generate, write_film
    from happyhorse.sampler.plan import Room, plan_film

    cpu, dtype = torch.device("cpu"), DTYPES[dtype_name]
    names = needed_parts("distill", None, "turbo", image=False)
    files = {"text_encoder": "text_encoder", "distill": "distill", "video_decoder": "turbo_vae",
             "audio_vae": "audio_vae"}  # fmt: skip
    parts = {role: open_part(name, folder / files[name]) for role, name in names.items()}
    shape = FilmShape.from_seconds(width, height, seconds)
    plan = plan_film(parts, shape, None, dtype, torch.float32, cpu)
    chosen = plan.place(offload, Room(10**12, 10**12))

    def make(shape: FilmShape) -> None:
        placed = Parts(parts, cpu, {role: (one,) for role, one in chosen.items()}, dtype, torch.float32)
        request = FilmRequest("a red circle", PONY.negative_prompt, shape, steps=1)
        with torch.inference_mode():
            film = generate(placed, request, lambda *_: None, lambda _: None)
            write_film(placed, film, folder / "film.mp4", {}, lambda *_: None)

    make(FilmShape(64, 64, 6))  # loads what the libraries load late
    before, peak, done = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    make(shape)
    done.set()
    watcher.join()
    planned = plan.need(offload).device
    sys.stdout.write(json.dumps({"planned": planned, "measured": peak - before}))


def compare(folder: Path) -> int:
    """Run all cases, write the table; 1 if one is off."""
    write_checkpoints(folder)
    sys.stdout.write(
        f"{'offload':<8}{'dtype':<10}{'size':<10}{'s':>4}{'planned':>12}{'measured':>12}{'off':>8}\n"
    )
    worst = 0.0
    for offload, dtype, width, height, seconds in CASES:
        case = [offload, dtype, str(width), str(height), str(seconds)]
        done = subprocess.run(
            [sys.executable, __file__, "--case", str(folder), *case],
            check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        result = json.loads(done.stdout)
        off = result["planned"] / result["measured"] - 1
        worst = max(worst, abs(off))
        sys.stdout.write(
            f"{offload:<8}{dtype:<10}{f'{width}x{height}':<10}{seconds:>4g}{result['planned'] / MB:>9.0f} MB"
            f"{result['measured'] / MB:>9.0f} MB{off:>+8.1%}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"largest difference {worst:.1%}, limit {LIMIT:.0%}\n")
    return int(worst > LIMIT)


TIERS = {8: 32, 12: 32, 16: 32, 24: 64, 32: 64, 48: 96, 80: 128}  # GB of VRAM -> GB of RAM
WEIGHTS = ("bf16", "fp8")


def tiers() -> Iterator[str]:
    """The table of docs/memory.md: what is taken on cards of usual sizes, films of 5 s."""
    import torch

    from happyhorse.doctor import NAMED_SIZES, Films
    from happyhorse.sampler.plan import room_on

    options = argparse.Namespace(preset="magihuman", weights=None, decoder="turbo", seconds=5.0, dtype=None)
    films = Films(options, {}, torch.device("cuda"))
    yield "| VRAM | RAM | film | weights | last transformer | picture | peak VRAM | peak RAM |"
    yield "|---|---|---|---|---|---|---|---|"
    for vram, ram in TIERS.items():
        room = room_on(films.device, vram, ram)
        for size in NAMED_SIZES:
            plans = {weights: films.plan(*films.asked(size), weights) for weights in WEIGHTS}
            chosen = {weights: plan.place("auto", room) for weights, plan in plans.items()}
            weights = next((w for w in WEIGHTS if _all_there(chosen[w])), "fp8")
            plan, placements = plans[weights], chosen[weights]
            if placements is None:
                yield f"| {vram} | {ram} | {size} | {weights} | does not fit | | | |"
                continue
            needs = [stage.need(placements[stage.role], plan.device) for stage in plan.stages]
            kept = all(placement.keep for placement in placements.values())
            device = plan.need("none").device if kept else max(need.device for need in needs)
            last = "super_resolution" if "super_resolution" in placements else "transformer"
            words = placements[last].describe(40), placements["video_decoder"].describe()
            peak = f"{device / GB:.1f} | {max(need.ram for need in needs) / GB:.1f}"
            yield f"| {vram} | {ram} | {size} | {weights} | {words[0]} | {words[1]} | {peak} |"


def _all_there(placements: dict | None) -> bool:
    return placements is not None and all(p.resident is None for p in placements.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiers", action="store_true", help="print the table of docs/memory.md")
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiers:
        sys.stdout.write("\n".join(tiers()) + "\n")
        return 0
    if options.case:
        folder, offload, dtype, width, height, seconds = options.case
        measure(Path(folder), offload, dtype, int(width), int(height), float(seconds))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
