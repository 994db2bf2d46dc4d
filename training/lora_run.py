"""A LoRA from a folder of clips, as the command line and the node make it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..model.checkpoint import Checkpoint, load
from ..model.geometry import FilmShape
from ..sampler.parts import Progress, default_vae_dtype
from ..sampler.plan import Room, plan_film
from .clips import ROLES, Encoders, file_identity, prepare_clips
from .files import write_whole
from .loop import CHECKPOINT, OnStep, alone_in, check_settings, train
from .lora import LoraSettings, LoraStage, targets
from .lora_memory import lora_stage_need, resident_layers

log = logging.getLogger(__name__)
TITLE = "LoRA"
UNFINISHED = "unfinished.txt"  # in the folder of a run: the file that it makes
TRAINABLE = ("base", "distill")


@dataclass(frozen=True)
class LoraJob:
    """What a LoRA is made from and how.

    `clips` is the folder of clips with their captions; `folder` that of the run, which keeps the encoded
    clips, the log and the plot of the loss, and the checkpoint until the LoRA is written; messages tell to
    give `elsewhere` in its place. An update is made of `batches` batches of `batch` clips. `resident` layers
    stay on the device, None being as many as fit. After every `save_every` updates the LoRA is also written
    as it is then, as OUT-000500 for `out` OUT; 0: only at the end.
    """

    clips: Path
    out: Path
    folder: Path
    shape: FilmShape
    settings: LoraSettings
    negative: str
    batch: int = 1
    batches: int = 1
    resident: int | None = None
    save_every: int = 0
    elsewhere: str = "another folder"

    @property
    def begun_as(self) -> Path | None:
        """The file that the unfinished run in the folder was begun to make."""
        path = self.folder / UNFINISHED
        return Path(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def replaced(self) -> list[Path]:
        """Versions on the way that are there, of another run, and that this one would replace."""
        if not self.save_every or self.begun_as == self.out.resolve():
            return []
        on_the_way = range(self.save_every, self.settings.steps, self.save_every)
        return [path for done in on_the_way if (path := self.version(done)).exists()]

    def version(self, done: int) -> Path:
        """The file of the LoRA as it is after so many updates."""
        return self.out.with_stem(f"{self.out.stem}-{done:06}")

    @property
    def told(self) -> dict[str, Any]:
        """What a run must be continued with, as far as the job says it."""
        return {
            **asdict(self.settings), **asdict(self.shape), "batch": self.batch,
            "negative_prompt": self.negative,
        }  # fmt: skip


def prepare_lora(
    job: LoraJob,
    checkpoints: Mapping[str, Checkpoint],
    device: torch.device,
    dtype: torch.dtype,
    room: Room,
    progress: Progress,
) -> LoraStage:
    """Encode the clips and load the transformer; use the stage in a `with`, or `close` it.

    `checkpoints` by role: transformer, text_encoder, video_vae, audio_vae. Must not run in inference mode.
    Raises ValueError, OSError or MemoryError naming what cannot be used, the dearest of it last.
    """
    transformer = checkpoints["transformer"]
    if transformer.variant not in TRAINABLE:
        raise ValueError(
            f"{transformer.path} is the variant {transformer.variant}; a LoRA is trained on "
            f"{' or '.join(TRAINABLE)}, give one of these"
        )
    targets(job.settings, transformer.config)
    for name, number in (("batch", job.batch), ("batches", job.batches)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    accelerator = accelerator_on(device, job.batches)
    need = lora_stage_need(transformer, job.shape, job.settings, job.batch, dtype, device)
    resident = resident_layers(need, device, room, job.resident)
    encoding = {role: checkpoints[role] for role in ROLES}
    plan = plan_film(encoding, job.shape, None, dtype, default_vae_dtype(dtype, device), device)
    placements = {role: (placement,) for role, placement in plan.closest("auto", room).items()}
    encoders = Encoders.of(encoding, device, dtype, placements, progress)
    if resident is not None:
        log.info("%d of %d layers stay on %s, the others are streamed", resident, len(need.layers), device)

    def loading(done: int, total: int) -> None:
        progress(f"loading the {transformer.label}", done, total)

    identity = file_identity(transformer.path)
    told = {**job.told, "accumulation": job.batches, "base_file": identity, "dtype": str(dtype)}

    def check(data: str) -> None:
        check_settings(job.folder, {**told, "data": data}, job.elsewhere)

    with alone_in(job.folder, TITLE, job.elsewhere):
        data = prepare_clips(
            job.clips, job.folder / "cache", job.shape, encoders, job.negative, device, progress, job.batch,
            job.settings.seed, check,
        )  # fmt: skip
        module = load(transformer, dtype, device, resident, loading)
    return LoraStage(
        module,
        data,
        data.negative,
        job.settings,
        accelerator,
        transformer.path.name,
        identity,
        resident,
        job.told,
    )


def accelerator_on(device: torch.device, batches: int) -> Accelerator:
    """An accelerator for one process in full precision, `batches` batches making an update.

    Its state is the process's: raises ValueError where somebody else has set it to something else.
    """
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu", gradient_accumulation_steps=batches, mixed_precision="no"
        )
    except ValueError as error:
        raise ValueError(
            f"accelerate is set up in this process in another way ({error}); start the process again, and "
            "train before anything else uses accelerate"
        ) from error
    if accelerator.device.type != device.type:
        raise ValueError(
            f"accelerate is set up here for {accelerator.device.type}, not for {device.type}; start "
            "the process again without ACCELERATE_USE_CPU, and train before anything else uses accelerate"
        )
    if accelerator.gradient_accumulation_steps != batches:
        raise ValueError(
            f"accelerate makes an update of {accelerator.gradient_accumulation_steps} batches, not of "
            f"{batches}; unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )
    return accelerator


def train_lora(job: LoraJob, stage: LoraStage, on_step: OnStep | None = None) -> list[dict[str, float]]:
    """Train, going on from the run's checkpoint if there is one, and write the LoRA.

    Returns the figures of all steps. The checkpoint is deleted once the LoRA is there. Raises as `train`.
    """

    def after_step(done: int, steps: int, figures: dict[str, float]) -> None:
        if job.begun_as != job.out.resolve():
            text = str(job.out.resolve())
            write_whole(job.folder / UNFINISHED, lambda path: path.write_text(text, "utf-8"), job.elsewhere)
        if job.save_every and done % job.save_every == 0 and done < steps:
            stage.save(job.version(done))
        if on_step:
            on_step(done, steps, figures)

    figures = train(
        stage, job.folder, job.settings.steps, on_step=after_step, title=TITLE, elsewhere=job.elsewhere
    )
    stage.save(job.out)
    for name in (CHECKPOINT, UNFINISHED):
        (job.folder / name).unlink(missing_ok=True)
    return figures
