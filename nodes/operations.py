"""The host's twin of `model/operations.py`: every leaf is one of ComfyUI's own.

So the host casts, offloads, prefetches and patches each of them, and loads quantised weights into them. The
contract stays that of the core: a leaf computes in the dtype of its input.
"""

from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ..kernels.convolution import SmallFilmConv3d
from ..model import operations as core
from ..model.operations import Spans
from .quantized import to_core


def operations(base: Any = comfy.ops.manual_cast) -> SimpleNamespace:
    """Return the leaves made from `base`, one of the host's sets of operations that cast their weights."""

    class ModalityLinear(base.Linear):
        """A host linear with the stacked weight of `core.ModalityLinear`."""

        def __init__(self, in_features: int, out_features: int, modalities: int) -> None:
            super().__init__(in_features, modalities * out_features, bias=False)
            self.modalities = modalities

        held_weight = ()

        def held(self, dtype: torch.dtype, device: torch.device) -> "_Held":
            """As the core's."""
            return _Held(self, dtype, device)

        def forward(self, x: Tensor, spans: Spans) -> Tensor:
            if self.held_weight:
                return core.modality_linear(x, *self.held_weight, self.modalities, spans)
            with _Fetched(self, x.dtype, x.device) as weight:
                weight = core.ready(to_core(weight) or weight, x.dtype, x.device, self.modalities)
                return core.modality_linear(x, weight, self.modalities, spans)

        def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:  # noqa: ARG002
            """What the host's patches start from."""
            return weight.dequantize() if isinstance(weight, comfy.ops.QuantizedTensor) else weight

    class Conv3d(SmallFilmConv3d, base.Conv3d):
        """A host convolution that computes as the core's."""

    class Embedding(base.Embedding):
        """A host embedding; of a quantised table only the rows asked for are worked out."""

        def forward(self, tokens: Tensor, **options: Any) -> Tensor:
            table = to_core(self.weight)
            if table is None:
                return super().forward(tokens, **options)
            rows = table.rows(tokens.to(table.data.device), self.weight.dtype)
            return rows.to(tokens.device)

    return SimpleNamespace(
        Linear=base.Linear,
        Conv2d=base.Conv2d,
        Conv3d=Conv3d,
        Embedding=Embedding,
        ModalityLinear=ModalityLinear,
        ModalityRMSNorm=ModalityRMSNorm,
        WeightNormConv1d=core.WeightNormConv1d,
        WeightNormConvTranspose1d=core.WeightNormConvTranspose1d,
    )


class _Fetched:
    """The weight of a leaf where the host puts it, inside a `with`.

    A weight that the host has prefetched is patched in the buffer where it lies, and would be patched again
    by every call: what the first call gets is kept beside it, and goes with it.
    """

    KEPT = "patched by HappyHorse"

    def __init__(self, leaf: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        comfy.ops.run_every_op()
        self.prefetched = getattr(leaf, "_prefetch", {})
        self.context = None
        if self.KEPT not in self.prefetched:
            self.context = comfy.ops.CastBiasWeightContext(
                leaf, dtype=dtype, bias_dtype=dtype, device=device, offloadable=True
            )

    def __enter__(self) -> Tensor:
        if self.context is None:
            return self.prefetched[self.KEPT]
        weight, _ = self.context.__enter__()
        buffer = self.prefetched.get("xfer_dest")
        stays = self.prefetched.get("signature") is not None  # patched for good
        if buffer is not None and not stays and weight.data_ptr() == buffer.data_ptr():
            self.prefetched[self.KEPT] = weight
        return weight

    def __exit__(self, *raised: object) -> None:
        if self.context is not None:
            self.context.__exit__(*raised)


class _Held(core.Held):
    """`core.Held` for a leaf of the host.

    The host fetches weights into buffers that the next fetch may use again, so what is held is a copy of what
    lies there, unless its values are worked out anyway. Where the host moves weights by itself (its dynamic
    VRAM), it keeps those of a layer as long as the layer runs: there nothing needs to be held.
    """

    def __enter__(self) -> None:
        leaf = self.leaf
        with _Fetched(leaf, self.dtype, self.device) as weight:
            stored, own = (to_core(tensor) or tensor for tensor in (weight, leaf.weight))
            made = core.ready(stored, self.dtype, self.device, leaf.modalities)
            patched = bool(leaf.weight_function)  # in place, where the weight is not quantised
            quantized = isinstance(leaf.weight, comfy.ops.QuantizedTensor)
            cast = weight.dtype != leaf.weight.dtype or (patched and quantized)
            if not cast and made.data.data_ptr() == stored.data.data_ptr() != own.data.data_ptr():
                if hasattr(leaf, "_v") and not patched:
                    return
                made = made.clone()
        leaf.held_weight = (made,)


class ModalityRMSNorm(nn.Module, comfy.ops.CastWeightBiasOp):
    """`core.ModalityRMSNorm` as a leaf of the host."""

    comfy_cast_weights = True
    bias = None
    eps = core.ModalityRMSNorm.eps

    def __init__(self, dim: int, modalities: int) -> None:
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * dim), requires_grad=False)

    def forward(self, x: Tensor, spans: Spans) -> Tensor:
        with _Fetched(self, x.dtype, x.device) as weight:
            return core.modality_rms_norm(x, weight, self.modalities, spans, self.eps)
