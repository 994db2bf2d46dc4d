"""The node that loads a LoRA, through the host's own system of patches."""

from pathlib import Path
from typing import Any

import comfy.model_patcher
import folder_paths
import torch
from comfy.weight_adapter import WeightAdapterBase
from comfy_api.latest import io, ui
from torch import Tensor

from ..model.lora import LoraPatch, Strengths, counted, match, patches, transformer_shapes
from ..model.lora_formats import open_lora
from ..model.lora_report import describe_lora, describe_match
from .prompt import show
from .sampler import family

PREFIX = "diffusion_model."  # of the network's weights in a MODEL


class PatchAdapter(WeightAdapterBase):
    """One of our patches in the host's list; `weights` is the patch and its tensors, which the host moves."""

    name = "happyhorse"

    def __init__(self, loaded_keys: set[str], weights: tuple[LoraPatch, tuple[Tensor, ...]]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,  # noqa: ARG002
        strength: float,
        strength_model: float,  # noqa: ARG002
        offset: Any,  # noqa: ARG002
        function: Any,  # noqa: ARG002
        intermediate_dtype: torch.dtype = torch.float32,  # noqa: ARG002
        original_weight: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Change `weight`, which is the host's working copy."""
        patch, tensors = self.weights
        return patch.with_tensors(tensors)(weight, strength)


def load_lora(
    model: comfy.model_patcher.ModelPatcher, path: Path, strengths: Strengths
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """A MODEL with a LoRA, and a report; raises FileNotFoundError or ValueError, saying the cure."""
    config = family(model).config
    lora, shapes = open_lora(path), transformer_shapes(config)
    report = "\n".join((describe_lora(lora), describe_match(match(lora, config, shapes), config)))
    changes = patches([(lora, strengths)], config, shapes)
    patched = model.clone()
    for name, found in changes.items():
        for patch in found:
            adapter = PatchAdapter({name}, (patch, patch.change.tensors))
            patched.add_patches({PREFIX + name: adapter})
    return patched, f"{report}\nstrength {strengths}, {counted(len(changes), 'weight')} changed"


class HappyHorseLoraLoader(io.ComfyNode):
    """A LoRA with strengths for what a joint model has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def strength(name: str, what: str) -> io.Float.Input:
            tooltip = f"For {what}; it multiplies the strength."
            return io.Float.Input(
                name,
                default=1.0,
                min=-10.0,
                max=10.0,
                step=0.05,
                tooltip=tooltip,
                advanced=True,
                optional=True,
            )

        return io.Schema(
            node_id="HappyHorseLoraLoader",
            display_name="HappyHorse Load LoRA",
            category="HappyHorse/load",
            description="Applies a LoRA of any usual format to the transformer, if wanted with strengths for "
            "video, audio and text, and for single layers.",
            search_aliases=["lora", "lora loader", "magihuman lora", "loha", "lokr", "dora"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, from HappyHorse Load Model."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file in models/loras: LoRA, LoHa, LoKr, DoRA or differences, under the names "
                    "of PEFT, diffusers or kohya.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA counts; 0 leaves the model as it is.",
                ),
                strength("video", "the video copies of the first and last layers, its embedder and its head"),
                strength("audio", "the audio copies of the first and last layers, its embedder and its head"),
                strength("text", "the text copies of the first and last layers, and its embedder"),
                strength("shared", "the layers that all three share"),
                io.String.Input(
                    "blocks",
                    default="",
                    placeholder="0-3:0.5, 4-35",
                    tooltip="Layers with weights, such as 0-11,30 or 0-3:0.5,4-35:1; layers not named stay "
                    "as they are. Empty: all.",
                    advanced=True,
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The transformer with the LoRA."),
                io.String.Output(
                    display_name="report", tooltip="What the file holds, and how much of it fits."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        # the host puts one answer on every input that is named here: the others speak for themselves later
        return True if lora_name is None else _problem(lora_name) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> str:
        path = _locate(lora_name)
        stat = path and path.stat()
        return f"{path} {stat.st_size} {stat.st_mtime_ns}" if stat else "missing"

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength: float,
        video: float = 1.0,
        audio: float = 1.0,
        text: float = 1.0,
        shared: float = 1.0,
        blocks: str = "",
    ) -> io.NodeOutput:
        if problem := _problem(lora_name):
            raise FileNotFoundError(problem)
        strengths = Strengths(strength, video, audio, text, shared, blocks)
        patched, report = load_lora(model, _locate(lora_name), strengths)
        show(report)
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))


def _locate(name: str | None) -> Path | None:
    """The file of a name in the host's folders of LoRAs; never one outside of them."""
    if name is None:  # it comes by a link
        return None
    try:
        found = folder_paths.get_full_path("loras", name.replace("\\", "/"))
    except ValueError:  # a name that no file can have
        return None
    return Path(found) if found else None


def _problem(name: object) -> str | None:
    if not isinstance(name, str) or not name.strip():
        return f"the LoRA must be the name of a file, got {name!r}"
    if _locate(name) is None:
        folders = folder_paths.get_folder_paths("loras")
        return (
            f"the LoRA {name!r} is not in {folders[0]}, nor in any other folder of loras; put it there, or "
            "choose another; the key R renews the list"
        )
    return None


NODES = [HappyHorseLoraLoader]
