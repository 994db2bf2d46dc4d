"""`happyhorse train`: a LoRA from a folder of clips, or the pony."""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from .defaults import DTYPES, compute_dtype, default_device, models_folder
from .doctor import part_path
from .model.checkpoint import Checkpoint, check_names
from .model.config import PRESETS
from .model.geometry import FilmShape
from .model.stream_writer import check_target
from .options import PONY_STAGES
from .sampler.parts import open_part
from .sampler.placement import is_out_of_memory
from .sampler.plan import check_vram, room_on
from .sampler.stages import RECIPES

if TYPE_CHECKING:
    from .training.lora_run import LoraJob

SETTINGS = ("steps", "rank", "alpha", "blocks", "parts", "copies", "rate", "seed")


class Shown(Protocol):
    """Bars on the terminal."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are finished."""


def run_train(options: argparse.Namespace, bars: Callable[[], AbstractContextManager[Shown]]) -> str:
    """Train as the options say and return what to tell of it; raises ValueError, OSError or MemoryError.

    Must not run in inference mode. KeyboardInterrupt says how to go on.
    """
    checkpoints = _open_parts(options)
    check_target(options.out, [part.path for part in checkpoints.values()], options.overwrite)
    job = _job(options, checkpoints["transformer"])
    for path in job.replaced:
        check_target(path, [], options.overwrite)
    try:
        return _train(options, job, checkpoints, bars)
    except KeyboardInterrupt as interrupt:
        done = str(interrupt) or "no LoRA is written yet"
        raise KeyboardInterrupt(f"{done}; run the same command to go on ({job.folder})") from interrupt
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        on_cpu = (options.device or default_device()).type == "cpu"  # where streamed layers save nothing
        fewer = "" if on_cpu else "fewer layers on the device (--resident), "
        raise MemoryError(
            f"out of memory ({str(error).splitlines()[0]}); try {fewer}fewer --seconds, a smaller --size "
            "or --batch 1"
        ) from error


def run_train_pony(options: argparse.Namespace) -> None:
    """Train the miniature's stages as the options say; must not run in inference mode."""
    from .pony import FOLDER
    from .training.pony import Recipe, fast_dtype

    device = _chosen_device(options)
    dtype = DTYPES[options.dtype] if options.dtype else fast_dtype(device)
    for option, folder in (("--runs", options.runs), ("--out", options.out or FOLDER)):
        _check_folder(option, folder)
    recipe = Recipe(options.runs, options.out or FOLDER, device.type, options.compile, dtype)
    try:
        recipe.run(options.stages or PONY_STAGES)
    except KeyboardInterrupt as interrupt:
        done = str(interrupt) or "the stage is not finished"
        raise KeyboardInterrupt(f"{done}; run the same command to go on ({options.runs})") from interrupt


def _check_folder(option: str, folder: Path) -> None:
    """Make it, now and not after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{option}: the folder {folder} cannot be made ({error.strerror}); give another"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: the folder {folder} cannot be written to; give another")


def _chosen_device(options: argparse.Namespace) -> torch.device:
    device = options.device or default_device()
    if device.index:
        torch.accelerator.set_device_index(device.index)  # where accelerate works
    return device


def _train(
    options: argparse.Namespace,
    job: "LoraJob",
    checkpoints: dict[str, Checkpoint],
    bars: Callable[[], AbstractContextManager[Shown]],
) -> str:
    from .training.loop import progress_bar  # slow to import, and of no use to the other commands
    from .training.lora_run import TITLE, prepare_lora, train_lora

    device = _chosen_device(options)
    check_vram(device, options.vram)
    room = room_on(device, options.vram, options.ram)
    with bars() as shown:
        stage = prepare_lora(job, checkpoints, device, compute_dtype(options, device), room, shown.progress)
    with stage, progress_bar(TITLE) as on_step:
        figures = train_lora(job, stage, on_step)
    losses = [step["loss"] for step in figures[-10:]]
    told = f"{options.out.resolve()}: {options.out.stat().st_size / 1e6:,.1f} MB, {job.settings.steps} steps"
    if not losses:  # the run's log was deleted
        return told
    mean = sum(losses) / len(losses)
    return f"{told}, mean loss of the last {len(losses)} {mean:.4g} (plot: {job.folder / 'loss.png'})"


def _open_parts(options: argparse.Namespace) -> dict[str, Checkpoint]:
    folder, parts = models_folder(options), {}
    names = {name: name for name in ("text_encoder", "video_vae", "audio_vae")}
    for role, name in {"transformer": options.variant, **names}.items():
        parts[role] = open_part(name, part_path(options, name, folder))
        check_names(parts[role], parts[role].build().state_dict())  # now, not when its turn comes
    return parts


def _job(options: argparse.Namespace, transformer: Checkpoint) -> "LoraJob":
    from .training.lora import LoraSettings
    from .training.lora_run import LoraJob

    preset = PRESETS[options.preset]
    size = options.size or preset.sizes[options.aspect or preset.default_aspect]
    seconds = preset.default_seconds if options.seconds is None else options.seconds
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    if not RECIPES[transformer.variant].guided:  # it never sees a negative prompt
        if options.negative is not None:
            raise ValueError(
                f"--negative: {transformer.variant} never sees a negative prompt; leave it out, or train base"
            )
        given["negative"] = 0.0
    return LoraJob(
        options.data, options.out, options.resume or default_run_folder(options.out),
        FilmShape.from_seconds(*size, seconds), LoraSettings(**given),
        options.negative or preset.negative_prompt, options.batch, options.accumulation, options.resident,
        options.save_every, "another folder (--resume)",
    )  # fmt: skip


def default_run_folder(out: Path) -> Path:
    """The folder of a run beside the file that it makes."""
    return out.with_suffix(".run")
