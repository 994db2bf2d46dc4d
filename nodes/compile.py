"""The node that compiles the transformer, layer by layer."""

from typing import Any

from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ..sampler.parts import allow_recompiling
from .loader import CATEGORY
from .sampler import family

BACKEND = "inductor"
# CUDA graphs are left out: they overwrite what one compiled layer has handed to the next
MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}


class HappyHorseCompile(io.ComfyNode):
    """torch.compile of every layer on its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseCompile",
            display_name="HappyHorse Compile Layers",
            category=CATEGORY,
            description="Compiles the layers of a transformer with torch.compile for faster steps. Layers of "
            "one kind share their code: 3 to 5 are compiled instead of 40.",
            search_aliases=["torch.compile", "inductor", "happyhorse speed"],
            inputs=[
                io.Model.Input("model", tooltip="A transformer, from HappyHorse Load Model."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    tooltip="default: compiles sooner; max-autotune: tries many kernels first, which takes "
                    "minutes, and may be faster after that.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="It, compiled when it first runs.")],
        )

    @classmethod
    def execute(cls, model: Any, mode: str = "default") -> io.NodeOutput:
        family(model)
        compiled = model.clone(disable_dynamic=True)
        layers = range(len(compiled.model.diffusion_model.block.layers))
        allow_recompiling()
        keys = [f"diffusion_model.block.layers.{layer}" for layer in layers]
        set_torch_compile_wrapper(compiled, BACKEND, mode=MODES[mode], keys=keys)
        return io.NodeOutput(compiled)


NODES = [HappyHorseCompile]
