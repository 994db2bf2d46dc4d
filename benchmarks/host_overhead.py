"""What the nodes add to the core's own time for a film, in one run of alternating films.

Both make one film of the miniature from loaded networks: prompt, sampling, decoding into an MP4. Times are
those of the processor, which other programs disturb less. Needs ComfyUI's environment.
Usage: `.venv-host/bin/python benchmarks/host_overhead.py [--films 7] [--seconds 2]`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "nodes"))
import conftest  # noqa: F401  makes this process a host
import torch

from happyhorse.model.geometry import FilmShape
from happyhorse.nodes.audio_vae import load_audio_vae
from happyhorse.nodes.decoder import HappyHorseDecodeVideo
from happyhorse.nodes.latent import HappyHorseEmptyLatent
from happyhorse.nodes.model import load_model
from happyhorse.nodes.prompt import HappyHorseTextEncode
from happyhorse.nodes.sampler import HappyHorseSampler
from happyhorse.nodes.text_encoder import load_clip
from happyhorse.nodes.vae import load_video_vae
from happyhorse.pony import write_pony
from happyhorse.sampler.parts import Parts, default_vae_dtype, open_part
from happyhorse.sampler.pipeline import FilmRequest, generate, write_film

PROMPT, SEED, SIZE = "a red circle bounces slow on a teal background .", 42, (128, 128)
CPU = torch.device("cpu")


def core(pony: Path, seconds: float) -> Any:
    """The film of the core, its networks kept between films."""
    names = {"text_encoder": "text_encoder", "transformer": "distill", "video_decoder": "turbo_vae",
             "audio_vae": "audio_vae"}  # fmt: skip
    checkpoints = {
        role: open_part("video_decoder" if name == "turbo_vae" else name, pony / name)
        for role, name in names.items()
    }
    parts = Parts(checkpoints, CPU, "none", torch.float32, default_vae_dtype(torch.float32, CPU))
    request = FilmRequest(PROMPT, "", FilmShape.from_seconds(*SIZE, seconds), seed=SEED)

    def film(out: Path) -> None:
        def told(*_: Any) -> None: ...

        write_film(parts, generate(parts, request, told, told), out, {}, told)

    return film


def graph(pony: Path, seconds: float) -> Any:
    """The film of the nodes, from what the load nodes hand out."""
    model, clip = load_model(pony / "distill", None, "float32"), load_clip(pony / "text_encoder", "float32")
    vae, audio_vae = load_video_vae(pony / "turbo_vae"), load_audio_vae(pony / "audio_vae")

    def film(out: Path) -> None:
        positive = HappyHorseTextEncode.execute(clip, PROMPT)[0]
        latent = HappyHorseEmptyLatent.execute("custom", *SIZE, seconds, 1)[0]
        latent = HappyHorseSampler.execute(model, positive, latent, SEED, 0, 1.0)[0]
        HappyHorseDecodeVideo.execute(latent, vae, audio_vae)[0].save_to(str(out))

    return film


def main() -> None:
    """Print the times and the overhead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"core": [], "nodes": []}
    with tempfile.TemporaryDirectory() as work, torch.inference_mode():
        folder = Path(work)
        write_pony(folder)
        films = {"core": core(folder, options.seconds), "nodes": graph(folder, options.seconds)}
        for turn in range(options.films + 1):  # the first pair warms up
            for name, film in sorted(films.items(), reverse=turn % 2 == 1):
                start = time.process_time()
                film(folder / f"{name}.mp4")
                if turn:
                    times[name].append(time.process_time() - start)
        same = (folder / "core.mp4").stat().st_size, (folder / "nodes.mp4").stat().st_size
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        listed = ", ".join(f"{value:.2f}" for value in values)
        sys.stdout.write(f"{name}: median {medians[name]:.2f} s of {listed}\n")
    overhead = medians["nodes"] / medians["core"] - 1
    sys.stdout.write(f"nodes add {100 * overhead:.1f} %; sizes of the films {same[0]} and {same[1]} bytes\n")


if __name__ == "__main__":
    main()
