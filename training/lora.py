"""LoRA training (arXiv:2106.09685): the joint transformer's weights, quantised or not, stay as they are.

A trained layer adds scale * up(down(x)) to what it computes. In a layer with one weight copy per modality
`up` stacks one copy for each, as the weight does, and those that are not trained stay zero.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from ..model.config import TransformerConfig
from ..model.convert import FAMILY
from ..model.lora import MODALITIES, modalities_of, parse_blocks, transformer_shapes
from ..model.lora_tools import STOCK_PREFIX
from ..model.operations import ModalityLinear, Spans
from ..model.run_block import RunBlock, run_in_place
from ..model.stream_writer import DTYPE_NAMES, SafetensorsWriter
from ..model.transformer import JointTransformer
from ..sampler.placement import LayerStream
from ..sampler.schedule import SHIFT
from .flow import Data, FlowNetworks, accumulated, drawn_loss
from .generators import generator
from .optim import Ema, decayed, scale_rates

COPIES = (*MODALITIES, "shared")
PARTS = ("attention", "mlp")
LARGEST_GRADIENT = 1.0  # norm over all adapters to which longer gradients are cut
DECAY = 0.99  # of the running mean, which is what is saved


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a run of `steps` updates; `negative` and what all runs share as in `FlowSettings`.

    `blocks` lists layers such as "0-11,30", "" being all; `parts` are of attention and mlp; `copies` are
    whose weights are trained: of video, audio and text in the layers that have one for each, and those that
    are `shared`. `alpha` 0 stands for the rank. Raises ValueError for what is unknown.
    """

    steps: int
    rank: int = 16
    alpha: float = 0.0
    blocks: str = ""
    parts: tuple[str, ...] = PARTS
    copies: tuple[str, ...] = COPIES
    rate: float = 2e-4
    seed: int = 0
    negative: float = 0.1
    shift: ClassVar[float] = SHIFT
    image: ClassVar[float] = 0.15
    beginning: ClassVar[int] = 1
    audio: ClassVar[float] = 0.12
    first_frame: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"the {name} of a LoRA must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.alpha < inf:
            raise ValueError(f"alpha must be positive, or 0 for the rank, got {self.alpha:g}")
        if not 0 < self.rate < inf:
            raise ValueError(f"the rate of a LoRA must be positive, got {self.rate:g}")
        for name, given, known in (("parts", self.parts, PARTS), ("copies", self.copies, COPIES)):
            if not given or set(given) - set(known):
                raise ValueError(f"{name} of a LoRA must be some of {', '.join(known)}, got {list(given)}")
        chosen = parse_blocks(self.blocks) if self.blocks.strip() else {}
        if any(weight != 1 for weight in chosen.values()):
            raise ValueError(
                f"blocks to train have no weights; write them as in 0-11,30, got {self.blocks!r}"
            )

    @property
    def scale(self) -> float:
        """What the product of the factors counts times."""
        return (self.alpha or self.rank) / self.rank


def targets(settings: LoraSettings, config: TransformerConfig) -> dict[str, tuple[bool, ...]]:
    """The linears to train by name, and for each of their weight copies whether it is trained.

    Raises ValueError for layers that the model does not have and where nothing is left.
    """
    chosen = parse_blocks(settings.blocks) if settings.blocks.strip() else range(config.num_layers)
    if max(chosen) >= config.num_layers:
        raise ValueError(
            f"blocks name layer {max(chosen)}, but the model's layers are 0-{config.num_layers - 1}; name "
            "layers among these"
        )
    leaves = {"attention": ("linear_qkv", "linear_proj"), "mlp": ("up_gate_proj", "down_proj")}
    names = [
        f"block.layers.{layer}.{part}.{leaf}"
        for layer in sorted(chosen)
        for part in PARTS
        for leaf in (leaves[part] if part in settings.parts else ())
    ]
    trained = {
        name: tuple(copy in settings.copies for copy in modalities_of(name, config)[1]) for name in names
    }
    trained = {name: copies for name, copies in trained.items() if any(copies)}
    if not trained:
        raise ValueError(
            f"nothing is left to train: none of the layers {settings.blocks or 'of the model'} has weights "
            f"of {', '.join(settings.copies)}; the layers with a copy for each modality are "
            f"{', '.join(map(str, config.mm_layers)) or 'none'}"
        )
    return trained


class LoraAdapter(nn.Module):
    """The change of one linear: `down` [rank, inputs], and `up` [copies * outputs, rank], zero at first."""

    def __init__(
        self, shape: Sequence[int], rank: int, trained: Sequence[bool], draw: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = shape
        self.trained = tuple(trained)
        self.down = nn.Parameter(torch.randn(rank, columns, generator=draw) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        """The change of the linear's result for `x` [B, S, inputs], whose modalities lie in `spans`."""
        hidden = F.linear(x[..., : self.down.shape[1]], self.down.to(x.dtype))
        copies = self.up.to(x.dtype).chunk(len(self.trained))
        if len(copies) == 1:
            return F.linear(hidden, copies[0])
        parts = [
            F.linear(hidden[:, start:stop], copy)
            if trained
            else hidden.new_zeros(len(x), stop - start, len(copy))
            for (start, stop), copy, trained in zip(spans, copies, self.trained, strict=True)
        ]
        return torch.cat(parts, dim=1)


class LoraAdapters(nn.Module):
    """The adapters of a transformer, applied by hooks on its linears."""

    def __init__(self, transformer: JointTransformer, settings: LoraSettings) -> None:
        super().__init__()
        self.scale = settings.scale
        trained = targets(settings, transformer.config)
        self.names = list(trained)
        draw = generator(settings.seed, "lora")
        shapes = transformer_shapes(transformer.config)
        self.adapters = nn.ModuleList(
            LoraAdapter(shapes[f"{name}.weight"], settings.rank, copies, draw)
            for name, copies in trained.items()
        )
        self._hooks = [
            transformer.get_submodule(name).register_forward_hook(partial(self._added, adapter))
            for name, adapter in zip(self.names, self.adapters, strict=True)
        ]

    def _added(
        self, adapter: LoraAdapter, _: nn.Module, inputs: tuple[Tensor, Spans], result: Tensor
    ) -> Tensor:
        change = adapter(*inputs) * self.scale
        # a loaded feed-forward may have been made wider by zeros (model/padding.py), and so may its input
        return result + F.pad(change, (0, result.shape[-1] - change.shape[-1]))

    def remove(self) -> None:
        """Take the hooks off the transformer."""
        for hook in self._hooks:
            hook.remove()


class BackwardStream(LayerStream):
    """A `LayerStream` for layers that are computed anew for their gradient, from the last to the first."""

    @contextmanager
    def anew(self, index: int) -> Iterator[None]:
        """Around the second computation of layer `index`, after it begin to copy the layer before.

        Copies of two layers are there at most: at the start the gradient of the layer after this one has been
        asked for, and its copy given back; it can be reused when the device has come as far.
        """
        begun = self._module.current_stream(self.device).record_event() if self._module else None
        try:
            yield
        finally:
            if begun is not None:
                begun.synchronize()
            if index > self.resident:
                self._start(index - 1)

    def _arrived(self, index: int) -> list[Tensor]:
        """Keeps the copies until others are begun: at either end the same layer is next."""
        copies = super()._arrived(index)
        self._ahead = index, copies
        return copies

    def _start_after(self, index: int) -> None:
        if index + 1 < len(self.layers):
            self._start(index + 1)


def checkpointed(run_block: RunBlock) -> RunBlock:
    """Run layers by `run_block` and keep only their inputs; each is computed anew for its gradient."""

    def contexts(index: int) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), run_block.anew(index) if isinstance(
            run_block, BackwardStream
        ) else nullcontext()

    def run(index: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return run_block(index, layer, x)
        return checkpoint(
            run_block, index, layer, x, use_reentrant=False, preserve_rng_state=False,
            context_fn=partial(contexts, index),
        )  # fmt: skip

    return run


class LoraStage:
    """Trains a LoRA on a loaded transformer, whose weights stay as they are; a `Stage` of `loop.train`.

    `negative` is the states of the negative prompt, [1, L, C]; `base` is the checkpoint's name, and
    `identity` tells it from others; `told` is what else a run must be continued with. With `resident` the
    layers from that one on lie in CPU memory and are streamed. The accelerator says the device of everything
    else, and how many batches make an update.
    `close`, or the end of a `with`, gives the transformer back as it was and lets go of all that was made.
    """

    def __init__(
        self,
        transformer: JointTransformer,
        data: Data,
        negative: Tensor,
        settings: LoraSettings,
        accelerator: Accelerator,
        base: str,
        identity: str = "",
        resident: int | None = None,
        told: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.data, self.settings, self.accelerator = data, settings, accelerator
        self.base, self.identity, self.told = base, identity, told
        device = accelerator.device
        with ExitStack() as undo:
            self.adapters = LoraAdapters(transformer, settings)
            undo.callback(self.adapters.remove)
            self.adapters.to(device)
            self.stream = None
            if resident is not None:
                self.stream = BackwardStream(transformer.block.layers, device, resident)
                undo.callback(self.stream.close)
            for leaf in filter(_must_dequantize, transformer.modules()):
                leaf.patches = (_unchanged,)
                undo.callback(setattr, leaf, "patches", ())
            transformer.requires_grad_(False)
            self.networks = FlowNetworks(transformer, run_block=checkpointed(self.stream or run_in_place))
            self.negative = negative.to(device)
            self.optimizer = Adam(self.adapters.parameters(), settings.rate)
            self.ema = Ema(self.adapters, DECAY)
            self._undo = undo.pop_all()

    def __enter__(self) -> "LoraStage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The settings that a run must be continued with."""
        return {
            "stage": "lora",
            **asdict(self.settings),
            "accumulation": self.accelerator.gradient_accumulation_steps,
            "base": self.base,
            "base_file": self.identity,
            "dtype": str(self.networks.transformer.compute_dtype),
            **self.told,
            "data": self.data.fingerprint,
        }

    def step(self, step: int) -> dict[str, float]:
        """Make update number `step`; returns the mean loss and its parts, by stream, over the batches.

        And the norm of the gradient before it is cut, which is not finite where the factors no longer are.
        """
        scale_rates([self.optimizer], decayed(step, self.settings.steps))
        figures = accumulated(self.accelerator, self.adapters, self._loss, step)
        norm = self.accelerator.clip_grad_norm_(self.adapters.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.adapters)
        return {**figures, "gradient": norm.item()}

    def _loss(self, index: int) -> tuple[Tensor, dict[str, float]]:
        return drawn_loss(self.networks, self.data.batch(index), self.negative, self.settings, index)

    def state_dict(self) -> dict[str, Any]:
        """The factors, their running mean and the optimizer's state."""
        return {
            "adapters": self.adapters.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.adapters.load_state_dict(state["adapters"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, path: Path) -> None:
        """Write the running mean as a LoRA in the transformer's compute dtype, under PEFT's names.

        Raises OSError where that fails; then there is no new file.
        """
        tensors = self._tensors(self.networks.transformer.compute_dtype)
        entries = [(name, DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
        with SafetensorsWriter(path, entries, self._metadata()) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)

    def _tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {}
        for index, name in enumerate(self.adapters.names):
            stem = f"{STOCK_PREFIX}{name}"
            down, up = (self.ema.averages[f"adapters.{index}.{factor}"] for factor in ("down", "up"))
            tensors |= {f"{stem}.lora_A.weight": down.to(dtype), f"{stem}.lora_B.weight": up.to(dtype)}
            tensors[f"{stem}.alpha"] = torch.tensor(self.settings.alpha or float(self.settings.rank))
        return tensors

    def _metadata(self) -> dict[str, str]:
        told = {name: value for name, value in self.fingerprint.items() if name not in ("stage", "data")}
        told |= {name: ", ".join(told[name]) for name in ("parts", "copies")}
        told |= {"alpha": f"{self.settings.alpha or self.settings.rank:g}", "shift": self.settings.shift}
        return {"format": "pt", "family": FAMILY, **{name: str(value) for name, value in told.items()}}

    def close(self) -> None:
        """Take hooks and streaming off the transformer, and let go of it and of what was trained."""
        self._undo.close()
        for name in ("adapters", "stream", "networks", "negative", "optimizer", "ema"):
            vars(self).pop(name, None)  # whoever still holds the stage, such as a traceback, holds none of it


def _must_dequantize(leaf: nn.Module) -> bool:
    # fast products with stored values have no gradient; weights with patches are multiplied as values
    return isinstance(leaf, ModalityLinear) and leaf.quantized is not None and not leaf.patches


def _unchanged(weight: Tensor) -> Tensor:
    return weight
