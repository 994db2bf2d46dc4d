"""The node that compiles the transformer, layer by layer."""

from typing import Any

from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ..sampler.parts import allow_recompiling
from .loader import CATEGORY
from .sampler import family

BACKENDS = ("inductor", "cudagraphs")
MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune")


class HappyHorseCompile(io.ComfyNode):
    """torch.compile of every layer on its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseCompile",
            display_name="HappyHorse Compile Layers",
            category=CATEGORY,
            description="Compiles the layers of a transformer with torch.compile. Layers of one kind share "
            "their code, so that four are compiled at most and not forty; done anew for every length of film "
            "and of prompt.",
            search_aliases=["torch.compile", "inductor", "happyhorse speed"],
            inputs=[
                io.Model.Input("model", tooltip="A HappyHorse transformer."),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="inductor",
                    tooltip="Who compiles. inductor: makes faster code, and needs Triton on a GPU, a C++ "
                    "compiler on a CPU; cudagraphs: only replays the steps without Python, on a GPU.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    advanced=True,
                    tooltip="Of inductor alone. The max-autotune ones compile for minutes to find faster "
                    "code; those with CUDA graphs (reduce-overhead, max-autotune) take more memory.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="It, compiled when it first runs.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, backend: str, mode: str = "default") -> io.NodeOutput:
        family(model)
        if backend != "inductor" and mode != "default":
            raise ValueError(f"mode: {mode!r} is one of inductor's, {backend} has none; choose default")
        compiled = model.clone(disable_dynamic=True)
        layers = range(len(compiled.model.diffusion_model.block.layers))
        allow_recompiling()
        set_torch_compile_wrapper(
            compiled,
            backend,
            mode=None if mode == "default" else mode,
            keys=[f"diffusion_model.block.layers.{layer}" for layer in layers],
        )
        return io.NodeOutput(compiled)


NODES = [HappyHorseCompile]
