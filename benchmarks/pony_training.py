"""Updates of the pony's training in float32 and in bfloat16, compiled, in turn.

    python benchmarks/pony_training.py

Processor time on one thread, medians, and the ratio of each pair of updates. Compiling takes ten minutes.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from happyhorse import pony
from happyhorse.model.config import PONY
from happyhorse.model.transformer import JointTransformer
from happyhorse.training.flow import FlowSettings, FlowStage, initialise
from happyhorse.training.loop import Stage
from happyhorse.training.pony import BEGINNING, IMAGE, Recipe
from happyhorse.training.video_vae import VideoDecoderStage

DTYPES = torch.float32, torch.bfloat16
FIRST, PAIRS, STEP = 6, 7, 1000  # updates that compile, pairs that count, and the number of the first of them


def main() -> None:
    """Print a line for the light decoder and one for the base."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "pony")
        (out / "audio_vae").mkdir(parents=True)
        shutil.copyfile(pony.FOLDER / pony.FILES["audio_vae"], out / pony.FILES["audio_vae"])
        recipe = Recipe(
            Path(folder, "runs"), out, compiled=True, clips=(24, 4), codec_films=24, latent_clips=64
        )
        print_pairs("fast decoder", [decoder_stage(recipe, dtype) for dtype in DTYPES])
        print_pairs("base", [base_stage(recipe, dtype) for dtype in DTYPES])


def decoder_stage(recipe: Recipe, dtype: torch.dtype) -> Stage:
    """The first round of the light decoder's training."""
    return VideoDecoderStage(PONY.video_decoder, recipe.codec, recipe.pool, 1500, 0, "cpu", dtype, True)


def base_stage(recipe: Recipe, dtype: torch.dtype) -> Stage:
    """The first phase of the base's training."""
    transformer = JointTransformer(PONY.transformers["base"], compute_dtype=dtype)
    text_encoder = pony.build("text_encoder")
    initialise(transformer, 0)
    initialise(text_encoder, 1)
    settings = FlowSettings(3000, image=IMAGE, beginning=BEGINNING, first_frame=2.0)
    data = recipe.data(recipe.batch)
    return FlowStage(transformer, data, recipe.negative, settings, recipe.accelerator, text_encoder, True)


def print_pairs(name: str, stages: list[Stage]) -> None:
    """Update both in turn."""
    pairs = []
    for step in range(STEP, STEP + FIRST + PAIRS):
        seconds = []
        for stage in stages:
            started = time.process_time()
            stage.step(step)
            seconds.append(time.process_time() - started)
        pairs.append(seconds)
    wide, narrow = (statistics.median(column) for column in zip(*pairs[FIRST:], strict=True))
    ratios = [wide / narrow for wide, narrow in pairs[FIRST:]]
    sys.stdout.write(
        f"{name}: {wide:.2f} s in float32, {narrow:.2f} s in bfloat16; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})\n"
    )


if __name__ == "__main__":
    main()
