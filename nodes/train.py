"""The node that trains a LoRA on a folder of clips.

It loads the parts itself, by the core: the host's own objects are made in inference mode, in which nothing
can be trained.
"""

import json
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor

from ..media import FILMS
from ..model.checkpoint import Checkpoint, UnknownVariantError, check_names, open_checkpoint
from ..model.config import MAGIHUMAN, PRESETS, TransformerConfig
from ..model.geometry import SIZE_STEP, FilmShape
from ..model.lora import MODALITIES, Strengths
from ..sampler.plan import room_on
from ..sampler.stages import RECIPES
from . import files
from .latent import seconds_input
from .lora import load_lora
from .model import default_compute_dtype
from .prompt import show

if TYPE_CHECKING:
    from ..training.lora_run import LoraJob

RUNS = "happyhorse_training"  # in the host's folder of outputs
FINISHED = "finished.json"  # in the folder of a run
DTYPES = {"default": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = {"all": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}
ROLES = {  # and the inputs that name their files
    "transformer": "base",
    "text_encoder": "text_encoder",
    "video_vae": "vae",
    "audio_vae": "audio_vae",
}
NAME = re.compile(r"[^\x00-\x1f<>:\"|?*\\]+")
GUESSED = (
    "the file does not say its variant and was trained on as base; if it is not, put the variant into the "
    "file's name, such as my_distill"
)
UNCONNECTED = (
    "model of HappyHorse Train LoRA: nothing is connected to its input, which comes out with the LoRA"
)


class HappyHorseTrainLora(io.ComfyNode):
    """A LoRA from clips."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def part(role: str, tooltip: str, **default: str) -> io.Combo.Input:
            return io.Combo.Input(ROLES[role], options=files.choices(role), tooltip=tooltip, **default)

        def whole(name: str, default: int, low: int, high: int, tooltip: str, **more: Any) -> io.Int.Input:
            return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip, **more)

        def copy(name: str, what: str) -> io.Boolean.Input:
            tooltip = f"Train {what}."
            return io.Boolean.Input(name, default=True, tooltip=tooltip, advanced=True, optional=True)

        hidden = {"advanced": True, "optional": True}
        return io.Schema(
            node_id="HappyHorseTrainLora",
            display_name="HappyHorse Train LoRA",
            category="HappyHorse/train",
            description="Trains a LoRA on a folder of clips with sound and captions, writes it into "
            "models/loras and applies it. An interrupted run goes on when it is queued again; a finished one "
            "is loaded, not trained again.",
            search_aliases=["train", "training", "finetune", "magihuman lora", "happyhorse trainer"],
            inputs=[
                io.Combo.Input("folder", options=sorted(_clip_folders(), key=_has_films, reverse=True),
                               tooltip="A folder in ComfyUI's input folder: films with sound, each with its "
                               "caption in a .txt of the same name, or all captions in captions.jsonl."),
                part("transformer", "The model to train on: base. Quantised files stay as small as they are.",
                     default="pony: base"),
                part("text_encoder", "What encodes the captions: t5gemma-9b-9b-ul2."),
                part("video_vae", "What encodes the pictures: the Wan2.2 VAE, not the turbo decoder."),
                part("audio_vae", "What encodes the sound: the VAE of Stable Audio Open 1.0."),
                io.String.Input("name", default="my_lora",
                                tooltip="Of the file in models/loras; a number is added where it exists. The "
                                f"run is kept under this name in output/{RUNS}."),
                whole("width", 448, SIZE_STEP, 2048, "Pixels, a multiple of 32; clips are cropped to it.",
                      step=SIZE_STEP),
                whole("height", 256, SIZE_STEP, 2048, "Pixels, a multiple of 32; clips are cropped to it.",
                      step=SIZE_STEP),
                seconds_input(),
                whole("steps", 1000, 1, 1_000_000, "Updates of the LoRA."),
                io.Float.Input("learning_rate", default=2e-4, min=1e-7, max=1.0, step=1e-5, round=1e-7,
                               tooltip="How far an update goes: lower it where the loss jumps."),
                whole("rank", 16, 1, 1024, "Of every change: more can hold more, and takes more memory."),
                # that the page draws another after every run would keep an interrupted one from going on
                whole("seed", 0, 0, 2**32 - 1, "Of the noise and of the order of the clips.",
                      control_after_generate=False),
                io.Model.Input("model", optional=True,
                               tooltip="A model that the LoRA shall be applied to, such as distill: it comes "
                               "out with it."),
                whole("batch_size", 1, 1, 64, "Most clips computed at once: those whose captions have as "
                      "many tokens.", **hidden),
                whole("accumulation", 1, 1, 1024, "Batches of an update.", **hidden),
                io.Float.Input("alpha", default=0.0, min=0.0, max=4096.0, step=1.0,
                               tooltip="The change counts alpha / rank times; 0: as the rank.", **hidden),
                io.String.Input("blocks", default="", placeholder="0-11,30",
                                tooltip="Layers to train, such as 0-11,30. Empty: all.", **hidden),
                io.Combo.Input("parts", options=list(PARTS), default="all",
                               tooltip="Of each layer: attention, the feed-forward (mlp) or both.", **hidden),
                copy("video", "the video copies of the first and last layers"),
                copy("audio", "the audio copies of the first and last layers"),
                copy("text", "the text copies of the first and last layers"),
                copy("shared", "the layers that all three share"),
                io.Combo.Input("weight_dtype", options=list(DTYPES), default="default",
                               tooltip="What is computed in. default: bfloat16, on a CPU float32.", **hidden),
                whole("resident", -1, -1, 1000, "So many layers stay on the device, the others come from "
                      "RAM; -1: as many as fit.", **hidden),
                whole("save_every", 0, 0, 1_000_000, "After so many updates each the LoRA is also written "
                      "as it is then, as my_lora-000500; 0: only at the end.", **hidden),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The connected model with the LoRA."),
                io.Image.Output(display_name="loss", tooltip="The plot of the loss."),
                io.String.Output(display_name="lora_name", tooltip="The file in models/loras."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, folder: str | None, base: str | None, text_encoder: str | None, vae: str | None,
        audio_vae: str | None,
    ) -> bool | str:  # fmt: skip
        chosen = dict(zip(ROLES, (base, text_encoder, vae, audio_vae), strict=True))
        problems = [files.problem(role, choice) for role, choice in chosen.items() if choice is not None]
        if folder is not None:
            problems.append(_folder_problem(folder))
        return next(filter(None, problems), True)

    @classmethod
    def fingerprint_inputs(
        cls, folder: str, base: str, text_encoder: str, vae: str, audio_vae: str, **_: Any
    ) -> str:
        chosen = dict(zip(ROLES, (base, text_encoder, vae, audio_vae), strict=True))
        clips = sorted(_clips(folder).iterdir()) if _folder_problem(folder) is None else []
        stats = [(path.name, path.stat()) for path in clips if path.is_file()]
        told = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        return " ".join([*told, *(files.fingerprint(role, choice) for role, choice in chosen.items())])

    @classmethod
    def execute(
        cls, folder: str, base: str, text_encoder: str, vae: str, audio_vae: str, name: str, width: int,
        height: int, seconds: float, steps: int, learning_rate: float, rank: int, seed: int,
        model: Any = None, batch_size: int = 1, accumulation: int = 1, alpha: float = 0.0, blocks: str = "",
        parts: str = "all", video: bool = True, audio: bool = True, text: bool = True, shared: bool = True,
        weight_dtype: str = "default", resident: int = -1, save_every: int = 0,
    ) -> io.NodeOutput:  # fmt: skip
        LoraJob, LoraSettings = _trainer()
        if problem := _folder_problem(folder):
            raise FileNotFoundError(problem)
        checkpoints, guessed = _open(dict(zip(ROLES, (base, text_encoder, vae, audio_vae), strict=True)))
        transformer = checkpoints["transformer"]
        copies = zip((*MODALITIES, "shared"), (video, audio, text, shared), strict=True)
        guided = RECIPES[transformer.variant].guided
        settings = LoraSettings(
            steps, rank, alpha, blocks, PARTS[parts], tuple(copy for copy, wanted in copies if wanted),
            learning_rate, seed=seed, **({} if guided else {"negative": 0.0}),
        )  # fmt: skip
        name = _plain(name)
        dtype = DTYPES[weight_dtype] or default_compute_dtype()
        kept = Path(folder_paths.get_output_directory(), RUNS, name)
        job = _replacing_nothing(LoraJob(
            _clips(folder), _loras() / f"{name}.safetensors", kept,
            FilmShape.from_seconds(width, height, seconds), settings,
            negative_prompt(transformer.variant, transformer.config), batch_size, accumulation,
            None if resident < 0 else resident, save_every, "another name",
        ))  # fmt: skip
        files_now = cls.fingerprint_inputs(folder, base, text_encoder, vae, audio_vae)
        made_of = json.dumps([job.told, accumulation, str(dtype), files_now])
        lines = ["trained"]
        if out := _finished(job, made_of):
            lines = ["trained before, of the same files and settings; another seed makes another"]
        else:
            with torch.inference_mode(False), torch.enable_grad():
                _train(job, checkpoints, dtype)
            _finish(job, made_of)
            out = job.out
        plot = _picture(job.folder / "loss.png")
        written = out.relative_to(_loras()).as_posix()
        patched = ExecutionBlocker(UNCONNECTED)
        if model is not None:
            patched, report = load_lora(model, out, Strengths())
            lines.append(report)
        show("\n".join([written, *lines, *([GUESSED] if guessed else [])]))
        return io.NodeOutput(patched, plot, written, ui=ui.PreviewImage(plot, cls=cls))


def negative_prompt(variant: str, config: TransformerConfig) -> str:
    """That of the preset which a transformer is of."""
    return next(
        (preset for preset in PRESETS.values() if preset.transformers.get(variant) == config), MAGIHUMAN
    ).negative_prompt


def _trainer() -> tuple[type, type]:
    try:
        from ..training.lora import LoraSettings  # slow to import, and of no use to the other nodes
        from ..training.lora_run import LoraJob
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs the package {error.name}, which is not installed; install the requirements.txt "
            "of this pack"
        ) from error
    return LoraJob, LoraSettings


def _train(job: "LoraJob", checkpoints: Mapping[str, Checkpoint], dtype: torch.dtype) -> None:
    from ..training.lora_run import prepare_lora, train_lora

    device = management.get_torch_device()
    loading, bar = comfy.utils.ProgressBar(1), comfy.utils.ProgressBar(job.settings.steps)

    def progress(stage: str, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        loading.update_absolute(done, total)
        if done in (0, total):
            show(stage)

    def on_step(done: int, steps: int, figures: dict[str, float]) -> None:
        bar.update_absolute(done, steps)
        show(f"step {done} of {steps}, loss {figures['loss']:.4g}")
        management.throw_exception_if_processing_interrupted()

    with (
        _device_to_ourselves(),
        prepare_lora(job, checkpoints, device, dtype, room_on(device), progress) as stage,
    ):
        job.out.parent.mkdir(parents=True, exist_ok=True)
        train_lora(job, stage, on_step)


def _finish(job: "LoraJob", made_of: str) -> None:
    """Keep beside the run which LoRA it made, and of what."""
    from ..training.files import write_whole

    told = json.dumps({"lora": job.out.relative_to(_loras()).as_posix(), "made_of": made_of})
    write_whole(job.folder / FINISHED, lambda path: path.write_text(told, encoding="utf-8"), job.elsewhere)


def _finished(job: "LoraJob", made_of: str) -> Path | None:
    """The LoRA that the last run under this name made, if it is there and was made of the same."""
    path = job.folder / FINISHED
    if not path.exists():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    lora = _loras() / told["lora"]
    return lora if told["made_of"] == made_of and lora.exists() else None


@contextmanager
def _device_to_ourselves() -> Iterator[None]:
    """Move the host's models out, and give back what was used when it is over."""
    management.unload_all_models()
    management.soft_empty_cache()
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold networks and what these were computing
        raise
    finally:
        management.soft_empty_cache()


def _open(choices: Mapping[str, str]) -> tuple[dict[str, Checkpoint], bool]:
    """The checkpoints by role, and whether the transformer's variant is a guess."""
    checkpoints, guessed = {}, False
    for role, choice in choices.items():
        path = files.resolve(role, choice)
        try:
            checkpoints[role] = open_checkpoint(path, role)
        except UnknownVariantError:  # base and distill have the same names and shapes
            checkpoints[role], guessed = open_checkpoint(path, role, "base"), True
        check_names(checkpoints[role], checkpoints[role].build().state_dict())
    return checkpoints, guessed


def _picture(path: Path) -> Tensor:
    """A picture as an IMAGE (1, Y, X, 3), a white one where it was deleted."""
    if not path.exists():
        return torch.ones(1, 500, 900, 3)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels)[None]


def _loras() -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0])


def _replacing_nothing(job: "LoraJob") -> "LoraJob":
    """The same for the file that its run was begun for, or the first free one of NAME, NAME_00002, ..."""
    first, number = job.out, 1
    if job.begun_as and job.begun_as.parent == first.resolve().parent and not job.begun_as.exists():
        return replace(job, out=first.with_name(job.begun_as.name))
    while job.out.exists() or job.replaced:
        number += 1
        job = replace(job, out=first.with_stem(f"{first.stem}_{number:05}"))
    return job


def _plain(name: str) -> str:
    """A name without its ending; raises ValueError for one that leads out of the folder."""
    plain = name.strip().replace("\\", "/").removesuffix(".safetensors")
    parts = plain.split("/")
    if not NAME.fullmatch(plain) or any(not part.strip(". ") for part in parts):
        raise ValueError(
            f"name: the LoRA needs a name that a file in models/loras can have, got {name!r}; write my_lora"
        )
    return plain


def _clip_folders() -> list[str]:
    """The folders in the host's input folder."""
    return sorted(folder.replace("\\", "/") for folder in folder_paths.get_input_subfolders())


def _has_films(folder: str) -> bool:
    try:
        return any(path.suffix.lower() in FILMS for path in _clips(folder).iterdir())
    except OSError:  # one that cannot be read must not cost the host the node
        return False


def _clips(folder: str) -> Path:
    return Path(folder_paths.get_input_directory(), folder)


def _folder_problem(folder: object) -> str | None:
    if isinstance(folder, str) and folder in _clip_folders():
        return None
    return (
        f"folder: {folder!r} is not in {folder_paths.get_input_directory()}; put a folder with the clips and "
        "their captions there, then press R to renew the list"
    )


NODES = [HappyHorseTrainLora]
