"""The networks of one film: opened together, loaded when their stage comes, and let go of after it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from ..kernels.attention import Attention, attention
from ..model.checkpoint import Checkpoint, load, open_checkpoint
from ..model.config import VARIANTS
from ..model.quant import WeightPatch
from ..model.run_block import RunBlock, run_in_place
from .placement import LayerStream, Placement, in_pieces

Progress = Callable[[str, int, int], None]  # (stage, done, total)
STREAMED_PARTS = ("transformer", "text_encoder")
RECOMPILES = 64  # of a layer; torch's own limit, 8, is two prompts of different length
WHOLE = {
    "none": Placement(keep=True),
    "stage": Placement(),
    "blocks": Placement(resident=0),
}  # how all parts run under an offload, where nobody has planned more finely


def needed_parts(variant: str, sr: str | None, decoder: str, image: bool) -> dict[str, str]:
    """The parts of a film by role, in the order of their stages, under their names in the catalog."""
    parts = {"text_encoder": "text_encoder"}
    if image:
        parts["video_vae"] = "video_vae"
    parts["transformer"] = variant
    if sr:
        parts["super_resolution"] = f"{sr}_sr"
    parts["video_decoder"] = "video_decoder" if decoder == "turbo" else "video_vae"
    return {**parts, "audio_vae": "audio_vae"}


def open_part(name: str, path: Path) -> Checkpoint:
    """Open the file of a part under its name in the catalog, which for a transformer is its variant."""
    return open_checkpoint(path, *(("transformer", name) if name in VARIANTS else (name, None)))


def default_vae_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the video VAE and decoder; CPUs are slow at convolutions in less than float32."""
    return torch.float32 if device.type == "cpu" else dtype


def part_dtype(part: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a part is loaded in."""
    vaes = {"video_vae": vae_dtype, "video_decoder": vae_dtype, "audio_vae": torch.float32}
    return vaes.get(part, dtype)


class Parts:
    """Opened checkpoints by role, and where and how they are run.

    Roles: text_encoder, transformer, audio_vae, video_decoder (of either kind), and where they are needed
    video_vae and super_resolution. `placements` has for each role its placement, followed by those to take
    where memory runs out; or it is 'none', 'stage' or 'blocks' for all. `progress` hears of loading.
    `attend` is the attention of the transformers; with `compiled` their layers go through torch.compile.
    `patches` change the weights of the first transformer.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device,
        placements: str | Mapping[str, Sequence[Placement]],
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        progress: Progress = lambda stage, done, total: None,  # noqa: ARG005
        attend: Attention = attention,
        compiled: bool = False,
        patches: Mapping[str, Sequence[WeightPatch]] = MappingProxyType({}),
    ) -> None:
        self.checkpoints, self._patches = checkpoints, patches
        self.attend, self.compiled = attend, compiled
        self.progress = progress
        self.device = device
        if isinstance(placements, str):
            placements = {role: (WHOLE[placements],) for role in checkpoints}
        self._placements = {role: list(chosen) for role, chosen in placements.items()}
        self.steps_down: list[str] = []  # what was changed because memory ran out
        self._dtype, self._vae_dtype = dtype, vae_dtype
        self._kept: dict[Path, nn.Module] = {}

    def placement(self, role: str) -> Placement:
        """How the part of a role runs now."""
        return self._placements[role][0]

    def step_down(self, role: str) -> Placement | None:
        """Take the next placement of a role, which needs less, and let go of all that is kept.

        Returns it, or None where there is none.
        """
        if len(self._placements[role]) == 1:
            return None
        self._kept.clear()
        self._placements[role].pop(0)
        for steps in self._placements.values():
            steps[0] = replace(steps[0], keep=False)
        self.steps_down.append(self._describe(role))
        return self.placement(role)

    def chunked(self) -> list[str]:
        """The parts that work in pieces or tiles, and how, in words."""
        roles = [
            role for role in self.checkpoints if self.placement(role).piece or self.placement(role).tiles
        ]
        return [self._describe(role) for role in roles]

    def _describe(self, role: str) -> str:
        return f"{role.replace('_', ' ')}: {self.placement(role).describe()}"

    @contextmanager
    def use(self, role: str) -> Iterator[tuple[nn.Module, RunBlock]]:
        """The network of a role, ready on the device, with the hook that runs its layers."""
        checkpoint, placement = self.checkpoints[role], self.placement(role)
        streams = placement.resident is not None and checkpoint.part in STREAMED_PARTS
        module = self._kept.get(checkpoint.path)
        if module is None:
            dtype = part_dtype(checkpoint.part, self._dtype, self._vae_dtype)
            told = partial(self.progress, f"loading the {checkpoint.label}")
            patches = self._patches if role == "transformer" else {}
            on_cpu = placement.resident if streams else None
            module = load(checkpoint, dtype, self.device, on_cpu, progress=told, patches=patches)
            if self.compiled and checkpoint.part == "transformer":
                compile_layers(_layers(module))
        if placement.keep:
            self._kept[checkpoint.path] = module
        stream = LayerStream(_layers(module), self.device, placement.resident) if streams else None
        run_block = stream or run_in_place
        if self.attend is not attention and checkpoint.part == "transformer":
            run_block = attending_by(run_block, self.attend)
        try:
            yield module, in_pieces(run_block, placement.piece) if placement.piece else run_block
        finally:
            if stream is not None:
                stream.close()


def attending_by(run_block: RunBlock, attend: Attention) -> RunBlock:
    """Run a transformer's layers by `run_block`, with another attention."""
    return lambda index, layer, x: run_block(index, partial(layer, attend=attend), x)


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile each layer on its own; layers of one kind then share their code."""
    allow_recompiling()
    for layer in layers:
        layer.compile()


def allow_recompiling() -> None:
    """Let torch.compile make code for every kind of layer, length of film and length of prompt."""
    import torch._dynamo.config as settings  # slow to import

    settings.cache_size_limit = max(settings.cache_size_limit, RECOMPILES)


def _layers(module: nn.Module) -> nn.ModuleList:
    return module.block.layers if hasattr(module, "block") else module.layers
