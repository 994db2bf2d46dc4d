"""The joint transformer as the host's MODEL: a BaseModel in a patcher, with the published mixed precision.

Host latents are a NestedTensor of raw Wan2.2 video (B, 48, T, H, W) and audio (B, 64, A); inside, the video
is normalised. The host hands the network both streams in float32; its linears compute in bfloat16 or float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.memory_management
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_prefetch
import comfy.ops
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..kernels.attention import Attention, FrameWindow, attention, attention_by, by_head, by_key_head
from ..kernels.scaled_matmul import has_scaled_matmul
from ..model.checkpoint import BLOCK_LINEAR, Checkpoint, check_finite, check_names, open_checkpoint
from ..model.config import TransformerConfig
from ..model.packing import Latents, PackedLayout
from ..model.prompt import TEXT_LIMIT
from ..model.quant import QuantizedWeight, quantize
from ..model.rope import rope_bands
from ..model.transformer import JointTransformer
from ..model.video_vae import denormalize_latents, normalize_latents
from ..sampler.activations import SMALL_TENSORS, transformer_activations
from ..sampler.schedule import SHIFT
from .latents import check_shapes
from .operations import operations
from .quantized import patcher_class
from .quantized import to_core as quantized_weight
from .quantized import to_host as to_quantized

FP8 = "float8_e4m3fn"
# what the linears of the layers are held in at most; "default" is what they compute in
WEIGHT_DTYPES = {
    "default": None,
    "float32": torch.float32,
    FP8: torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
}
LATENTS_PER_TOKEN = 192  # 48 channels of 1 x 2 x 2


class HostTransformer(JointTransformer):
    """The joint transformer behind the host's calling convention for diffusion models."""

    def __init__(
        self,
        config: TransformerConfig,
        compute_dtype: torch.dtype,
        dtype: torch.dtype,
        operations: Any,
        **_: Any,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, operations, compute_dtype)
        self.dtype = dtype

    def forward(
        self,
        x: list[Tensor],
        timestep: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **kwargs: Any,
    ) -> list[Tensor]:
        """Return the velocities [video (B, 48, T, H, W), audio (B, 64, A)] of latents of the same shapes.

        `context` is [B, L, C]. The timestep is not looked at: the network has no such input.
        """
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timestep, context, control, transformer_options, **kwargs)

    def _velocity(
        self,
        x: list[Tensor],
        timestep: Tensor,  # noqa: ARG002
        context: Tensor,
        control: Any = None,  # noqa: ARG002
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **_: Any,
    ) -> list[Tensor]:
        latents = to_core(x)
        layout = PackedLayout.of(latents, context, self.config.coords_style)
        attend = _attention_on(x[0].device, transformer_options)
        run_layer = _LayerRunner(list(self.block.layers), x[0].device, transformer_options)
        velocity = super().forward(latents, context, layout, attend, run_layer)
        run_layer.close()
        return to_host(velocity)


def to_core(streams: list[Tensor]) -> Latents:
    """[video, audio (B, 64, A)] as the core has them, audio (B, A, 64)."""
    video, audio = streams
    return Latents(video, audio.transpose(1, 2))


def to_host(latents: Latents) -> list[Tensor]:
    """The way back of `to_core`."""
    return [latents.video, latents.audio.transpose(1, 2)]


class _HostAttention:
    """The host's choice of attention, which torch.compile goes around, as it may be anything.

    The options change with every layer and step: compiled code must not depend on them.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: FrameWindow | None) -> Tensor:
        return attention_by(self._full, q, k, v, window)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype == torch.float32:  # no fused kernel takes fewer key heads then
            return by_head(self._host(by_key_head(q, k), k, v), q.shape[2])
        return self._host(q, k, v)

    def _host(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return comfy.ldm.modules.attention.optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True,
            enable_gqa=q.shape[1] != k.shape[1], low_precision_attention=q.dtype != torch.float32,
            transformer_options=self.options,
        )  # fmt: skip


def _attention_on(device: torch.device, options: dict[str, Any]) -> Attention:
    # On a CPU the host's own way splits the softmax, which is slower; ours is used if no other is asked for
    own = device.type == "cpu" and "optimized_attention_override" not in options
    return attention if own else _HostAttention(options)


class _LayerRunner:
    """Runs the layers for the host: its prefetching, and the replacements that its patches ask for."""

    def __init__(self, layers: list[torch.nn.Module], device: torch.device, options: dict[str, Any]) -> None:
        self.layers, self.device, self.options = layers, device, options
        self.replaced = options.get("patches_replace", {}).get("dit", {})
        self.queue = comfy.model_prefetch.make_prefetch_queue(layers, device, options)
        options["total_blocks"], options["block_type"] = len(layers), "double"

    def __call__(self, index: int, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.options["block_index"] = index
        comfy.model_prefetch.prefetch_queue_pop(self.queue, self.device, self.layers[index])
        replace = self.replaced.get(("double_block", index))
        if replace is None:
            return layer(x)
        block = {"original_block": lambda args: {"img": layer(args["img"])}}
        return replace({"img": x, "transformer_options": self.options}, block)["img"]

    def close(self) -> None:
        """Release what was prefetched for the last layer."""
        if self.queue is not None:
            comfy.model_prefetch.prefetch_queue_pop(self.queue, self.device, None)


class LatentFormat(comfy.latent_formats.Wan22):
    """Wan2.2's, whose preview colours serve the video; EasyCache takes `latent_channels` for all streams."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_channels = 64


class ModelConfig(comfy.supported_models_base.BASE):
    """What the host wants to know of the family."""

    unet_extra_config: ClassVar = {}
    sampling_settings: ClassVar = {"shift": SHIFT, "multiplier": 1000}
    latent_format = LatentFormat
    supported_inference_dtypes: ClassVar = [torch.bfloat16, torch.float32]


class HappyHorseModel(comfy.model_base.BaseModel):
    """One variant of the joint transformer, `variant` and `config` saying which."""

    def __init__(self, model_config: ModelConfig, variant: str) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, unet_model=HostTransformer)
        self.variant = variant
        self.config: TransformerConfig = self.diffusion_model.config

    def get_dtype_inference(self) -> torch.dtype:
        """The dtype of the network's inputs; the published policy keeps the stream in float32."""
        return torch.float32

    def process_latent_in(self, latent: Tensor | NestedTensor) -> Tensor | NestedTensor:
        """Raw latents -> normalised ones; packed or nested, the audio stays as it is."""
        return self._convert_video(latent, normalize_latents)

    def process_latent_out(self, latent: Tensor | NestedTensor) -> Tensor | NestedTensor:
        """The way back of `process_latent_in`."""
        return self._convert_video(latent, denormalize_latents)

    def _convert_video(
        self, latent: Tensor | NestedTensor, convert: Callable[[Tensor], Tensor]
    ) -> Tensor | NestedTensor:
        if latent.is_nested:
            video, audio = latent.unbind()
            return NestedTensor([convert(video), audio])
        check_shapes(self.latent_shapes, self.config)
        video, audio = comfy.utils.unpack_latents(latent, self.latent_shapes)
        return comfy.utils.pack_latents([convert(video), audio])[0]

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The prompt's states and the shapes of both streams; raises ValueError for those of other models."""
        check_shapes(kwargs["latent_shapes"], self.config)
        text = kwargs.get("cross_attn")
        if text is None or text.ndim != 3 or text.shape[2] != self.config.text_in_channels:
            found = "none" if text is None else f"of shape {list(text.shape)}"
            raise ValueError(
                f"positive, negative: this model wants text states of width {self.config.text_in_channels}, "
                f"got {found}; encode the prompt with the CLIP of HappyHorse Load Text Encoder"
            )
        films = kwargs["latent_shapes"][0][0]
        if text.shape[0] not in (1, films):
            raise ValueError(
                f"positive, negative: {text.shape[0]} prompts for {films} film(s); give one prompt, or as "
                "many as there are films"
            )
        PackedLayout.of(*_layout_inputs(kwargs["latent_shapes"], text), self.config.coords_style)
        conds = super().extra_conds(**kwargs)
        conds["c_crossattn"] = comfy.conds.CONDRegular(
            text
        )  # repeating states to one length would change them
        conds["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
        return conds

    def scale_latent_inpaint(self, latent_image: Tensor, **_: Any) -> Tensor:
        """What the network sees where nothing is to be made: the clean latents, as in the published code."""
        return latent_image

    def memory_required(self, input_shape: list[int], cond_shapes: dict[str, Any] | None = None) -> float:
        """Bytes of one pass over packed latents [B, 1, N], and of the weights that it works out."""
        del cond_shapes
        tokens = input_shape[-1] // LATENTS_PER_TOKEN + TEXT_LIMIT
        layers = self.diffusion_model.block.layers
        dtype = layers[0].attention.compute_dtype
        device = comfy.model_management.get_torch_device()
        needed = SMALL_TENSORS * transformer_activations(self.config, tokens, dtype.itemsize, device)
        linears = ((layer.mlp.up_gate_proj, layer.mlp.down_proj) for layer in layers)
        worked_out = max(sum(_worked_out(leaf.weight, dtype) for leaf in pair) for pair in linears)
        return input_shape[0] * needed + worked_out

    def get_dynamic_vram__units(self) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
        """The layers, in the order in which the host shall keep them in memory."""
        return list(self.diffusion_model.block.layers), []


def _worked_out(weight: Tensor, dtype: torch.dtype) -> int:
    """Bytes of a weight's values while it is held: where it is quantised, or may be fetched for a while."""
    dynamic = comfy.memory_management.aimdo_enabled
    fetched = not dynamic and not comfy.model_management.cpu_mode()
    return weight.numel() * dtype.itemsize if quantized_weight(weight) is not None or fetched else 0


def _layout_inputs(shapes: list[tuple[int, ...]], text: Tensor) -> tuple[Latents, Tensor]:
    video, audio = (torch.empty((1, *shape[1:]), device="meta") for shape in shapes)
    return Latents(video, audio.transpose(1, 2)), text[:1]


def load_model(path: Path, variant: str | None, dtype_name: str) -> comfy.model_patcher.ModelPatcher:
    """Load a transformer as a MODEL; raises FileNotFoundError or ValueError, saying the cure.

    `variant` is asked of a file that does not tell; `dtype_name` is one of WEIGHT_DTYPES.
    """
    patcher = _load_patcher(path, variant, dtype_name)
    patcher.cached_patcher_init = (_load_patcher, (path, variant, dtype_name))
    return patcher


def _load_patcher(
    path: Path, variant: str | None, dtype_name: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    checkpoint = open_checkpoint(path, "transformer", variant)
    check_names(checkpoint, checkpoint.build().state_dict())
    asked = WEIGHT_DTYPES[dtype_name]
    compute = asked if asked in (torch.float32, torch.bfloat16) else default_compute_dtype()
    state = _read_state(checkpoint, asked or compute, compute)
    return make_patcher(checkpoint.config, checkpoint.variant, state, compute, disable_dynamic)


def default_compute_dtype() -> torch.dtype:
    """That of the linears: bfloat16 as published, where the host's device is good at it; float32 on a CPU."""
    device = comfy.model_management.get_torch_device()
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32


def make_patcher(
    config: TransformerConfig,
    variant: str,
    state: dict[str, Tensor],
    compute_dtype: torch.dtype,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The patcher of a network whose tensors are `state`, which are taken as they are."""
    settings = ModelConfig({"config": config, "compute_dtype": compute_dtype})
    settings.set_inference_dtype(state["block.layers.0.attention.linear_qkv.weight"].dtype, compute_dtype)
    settings.custom_operations = operations(comfy.ops.manual_cast)
    model = HappyHorseModel(settings, variant)
    model.diffusion_model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)
    comfy.model_management.archive_model_dtypes(model.diffusion_model)
    offload = comfy.model_management.unet_offload_device()
    kind = patcher_class(disable_dynamic)
    return kind(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


def _read_state(
    checkpoint: Checkpoint, highest: torch.dtype, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors as they are stored, except that the linears of the layers are taken down to `highest`.

    Nothing is ever cast up, but for small tensors that a file has quantised.
    """
    bar = comfy.utils.ProgressBar(len(checkpoint.names))
    state = {}
    for own in checkpoint.names:
        tensor = checkpoint.read(own)
        if isinstance(tensor, QuantizedWeight):
            check_finite(tensor.bounds(), own, checkpoint)
            if not checkpoint.keeps_quantized(own):
                tensor = tensor.dequantize(torch.float32)
        elif BLOCK_LINEAR.match(own) and tensor.dtype.itemsize > highest.itemsize:
            tensor = quantize(tensor, FP8) if highest == torch.float8_e4m3fn else tensor.to(highest)
        if isinstance(tensor, QuantizedWeight):
            if has_scaled_matmul(comfy.model_management.get_torch_device()):
                tensor = tensor.aligned(checkpoint.config.copies(int(own.split(".")[2])))
            tensor = to_quantized(tensor, compute_dtype)
        state[own] = tensor
        bar.update(1)
    state.setdefault("adapter.rope.bands", rope_bands(checkpoint.config.head_dim))
    return state
