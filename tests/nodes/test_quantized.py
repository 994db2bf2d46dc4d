"""Quantised weights in the host: the same velocities as in the core, and patches that lose nothing."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.memory_management
import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.model_patcher import LowVramPatch
from safetensors.torch import load_file, save_file
from torch import Tensor

from happyhorse.model import operations as core
from happyhorse.model import transformer
from happyhorse.model.checkpoint import BLOCK_LINEAR, load, open_checkpoint
from happyhorse.model.config import PONY
from happyhorse.model.convert import convert
from happyhorse.model.packing import Latents, PackedLayout
from happyhorse.model.quant import FLOAT8, QuantizedWeight, quantize
from happyhorse.nodes.model import load_model
from happyhorse.nodes.quantized import to_core, to_host
from happyhorse.nodes.text_encoder import load_clip

CONFIG = PONY.transformers["distill"]
KEY = "diffusion_model.block.layers.2.attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def quantized_pony(pony_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distilled pony in float8 with a scale for each row."""
    source = open_checkpoint(pony_folder / "distill")
    state = {}
    for own in source.names:
        tensor = source.read(own)
        if BLOCK_LINEAR.match(own):
            weight = quantize(tensor, "float8_e4m3fn")
            state |= {own: weight.data, own.replace(".weight", ".weight_scale"): weight.scale}
        else:
            state[own] = tensor
    path = tmp_path_factory.mktemp("quantized") / "distill.safetensors"
    save_file(state, path, {"config": json.dumps(CONFIG.to_dict()), "variant": "distill"})
    return path


def inputs() -> tuple[Latents, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents = Latents(
        torch.randn(1, 48, 3, 4, 4, generator=generator), torch.randn(1, 9, 64, generator=generator)
    )
    return latents, torch.randn(1, 7, CONFIG.text_in_channels, generator=generator)


def host_velocity(patcher: object) -> Tensor:
    """The velocity of the model of a patcher, loaded by the host as for sampling."""
    latents, text = inputs()
    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        streams = patcher.model.diffusion_model([latents.video, latents.audio.mT], torch.ones(1), text)
    return torch.cat([streams[0].flatten(), streams[1].mT.flatten()])


def core_velocity(path: Path, patches: dict | None = None) -> Tensor:
    module, (latents, text) = load(open_checkpoint(path), torch.float32, patches=patches or {}), inputs()
    with torch.inference_mode():
        velocity = module(latents, text, PackedLayout.of(latents, text, CONFIG.coords_style))
    return torch.cat([stream.flatten() for stream in velocity])


def test_a_quantised_model_computes_in_the_host_as_in_the_core(quantized_pony: Path) -> None:
    patcher = load_model(quantized_pony, None, "default")
    assert torch.equal(host_velocity(patcher), core_velocity(quantized_pony))
    stored = patcher.model.diffusion_model.block.layers[1].mlp.down_proj.weight
    assert stored._qdata.dtype == torch.float8_e4m3fn
    in_core = load(open_checkpoint(quantized_pony), torch.bfloat16).state_dict()
    assert patcher.model_size() < 1.1 * sum(tensor.nbytes for tensor in in_core.values())  # none is widened


def test_the_host_is_told_of_the_values_that_are_worked_out(quantized_pony: Path, pony_folder: Path) -> None:
    shape = [1, 1, 192 * 500]
    plain, stored = (
        load_model(path, None, "default").model for path in (pony_folder / "distill", quantized_pony)
    )
    layers = [layer.mlp for layer in stored.diffusion_model.block.layers]
    values = max(mlp.up_gate_proj.weight.numel() + mlp.down_proj.weight.numel() for mlp in layers) * 4
    assert stored.memory_required(shape) - plain.memory_required(shape) == pytest.approx(values, abs=1)


def test_patches_of_quantised_weights_lose_nothing_and_leave_no_trace(quantized_pony: Path) -> None:
    patcher = load_model(quantized_pony, None, "default")
    before = host_velocity(patcher)
    generator = torch.Generator().manual_seed(2)
    shape = open_checkpoint(quantized_pony).shape(KEY.removeprefix("diffusion_model."))
    delta = 0.001 * torch.randn(shape, generator=generator)  # far below the steps of float8
    plain = "diffusion_model.final_linear_video.weight"
    changed = patcher.clone()
    known = changed.add_patches(
        {KEY: ("diff", (delta,)), plain: ("diff", (torch.ones(192, 192),)), "none": None}
    )
    assert set(known) == {KEY, plain}
    patches = {
        KEY.removeprefix("diffusion_model."): [lambda weight: weight + delta],
        plain.removeprefix("diffusion_model."): [lambda weight: weight + 1],
    }
    want = core_velocity(quantized_pony, patches)
    got = host_velocity(changed)
    assert (got - want).norm() / want.norm() < 1e-5
    assert torch.equal(host_velocity(patcher), before)
    nothing = patcher.clone()
    nothing.add_patches({KEY: ("diff", (delta,))}, strength_patch=0.0)
    assert torch.equal(host_velocity(nothing), before)


def test_clones_with_other_patches_are_not_taken_for_the_same(quantized_pony: Path) -> None:
    patcher = load_model(quantized_pony, None, "default")
    changed = patcher.clone()
    assert patcher.clone_has_same_weights(changed)
    changed.add_patches({KEY: ("diff", (torch.zeros(1),))})
    assert not patcher.clone_has_same_weights(changed)
    assert changed.clone_has_same_weights(changed.clone())


def test_fp8_of_one_scale_loads_into_the_hosts_own_layers(pony_folder: Path, tmp_path: Path) -> None:
    path, name = tmp_path / "distill.safetensors", "block.layers.2.attention.linear_qkv"
    convert(open_checkpoint(pony_folder / "distill"), path, "fp8_tensor", "test")
    stored, checkpoint = load_file(path), open_checkpoint(path)
    rows, columns = checkpoint.shape(f"{name}.weight")
    layer = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(columns, rows, bias=False)
    parts = ("weight", "weight_scale", "comfy_quant")
    layer.load_state_dict({part: stored[f"{name}.{part}"] for part in parts})
    assert layer.quant_format == "float8_e4m3fn"
    plain = checkpoint.read(f"{name}.weight").dequantize(torch.float32)
    torch.testing.assert_close(layer.weight.dequantize(), plain, rtol=1e-6, atol=0)


def test_prefetched_weights_are_patched_once_however_many_pieces_use_them(
    pony_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "MLP_TOKENS", 8)
    patcher = load_model(pony_folder / "distill", None, "bfloat16")
    leaves = {
        f"diffusion_model.{name}.weight": leaf
        for name, leaf in patcher.model.diffusion_model.named_modules()
        if name.startswith("block.") and hasattr(leaf, "weight_function")
    }
    patches = {key: [(0.25, (leaf.weight.clone(),), 1.0, None, None)] for key, leaf in leaves.items()}
    plain = host_velocity(patcher)
    for key, leaf in leaves.items():
        leaf.weight_function = [LowVramPatch(key, patches)]
    want = host_velocity(patcher)
    assert not torch.equal(want, plain)

    for key, leaf in leaves.items():  # as the host's dynamic VRAM has them when there is no room for them
        geometry = comfy.memory_management.tensors_to_geometries([leaf.weight, None])
        leaf.weight_function, leaf.weight_lowvram_function = [], LowVramPatch(key, patches)
        leaf._prefetch = {
            "signature": None, "resident": False, "needs_cast": False, "cast_dest": None,
            "cast_geometry": geometry, "xfer_dest": leaf.weight.detach().clone().flatten().view(torch.uint8),
        }  # fmt: skip
    fetch, calls = comfy.ops.cast_bias_weight, Counter()

    def prefetched(leaf: Any, *arguments: Any, **options: Any) -> Any:
        """Which of the host's two ways is gone is decided here: the one of GPUs."""
        if not hasattr(leaf, "_prefetch"):
            return fetch(leaf, *arguments, **options)
        calls[leaf] += 1
        dtype, device = options["dtype"], options["device"]
        return *comfy.ops.resolve_cast_module_with_vbar(leaf, dtype, device, dtype, None, False), None

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", prefetched)
    assert torch.equal(host_velocity(patcher), want)
    assert len(calls) == len(leaves)


@pytest.mark.parametrize("patched", [False, True])
def test_what_is_held_survives_the_fetching_of_other_weights(
    patched: bool, pony_folder: Path, quantized_pony: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = comfy.ops.cast_bias_weight
    buffers = itertools.cycle(torch.empty(2, 2**22, dtype=torch.uint8))

    def copied(data: Tensor) -> Tensor:
        return next(buffers)[: data.nbytes].view(data.dtype).view(data.shape).copy_(data)

    def into_buffers(leaf: Any, *arguments: Any, **options: Any) -> Any:
        """As the host fetches weights that are not on the device: into one of two buffers, in turn.

        Patches change them there; other dtypes are new tensors.
        """
        weight, bias, stream = fetch(leaf, *arguments, **options)
        if isinstance(weight, comfy.ops.QuantizedTensor):
            stored = to_core(weight)
            weight = to_host(replace(stored, data=copied(stored.data)), weight.dtype)
        elif not isinstance(leaf.weight, comfy.ops.QuantizedTensor) and weight.dtype == leaf.weight.dtype:
            weight = copied(weight)
        return weight, bias, stream

    # else float8 would be worked out on a CPU
    monkeypatch.setattr(QuantizedWeight, "is_fast_for", lambda self, *_: self.format in FLOAT8)

    for path, dtype in ((pony_folder / "distill", "bfloat16"), (quantized_pony, "default")):
        patcher = load_model(path, None, dtype)
        want = host_velocity(patcher)
        if patched:  # now that it is loaded
            for leaf in patcher.model.diffusion_model.modules():
                if hasattr(leaf, "held_weight"):
                    leaf.weight_function = [lambda weight: weight.mul_(1.25)]
            plain, want = want, host_velocity(patcher)
            assert not torch.equal(plain, want)
        with monkeypatch.context() as patch:
            patch.setattr(comfy.ops, "cast_bias_weight", into_buffers)
            assert torch.equal(host_velocity(patcher), want)


def test_nothing_stays_held_when_a_weight_cannot_be_made_ready(
    quantized_pony: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher, closed = load_model(quantized_pony, None, "default"), []
    context = comfy.ops.CastBiasWeightContext
    leave = context.__exit__
    monkeypatch.setattr(context, "__exit__", lambda *given: (closed.append(1), leave(*given))[1])

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(core, "ready", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            host_velocity(patcher)
    assert closed
    leaves = [m for m in patcher.model.diffusion_model.modules() if hasattr(m, "held_weight")]
    assert leaves and not any(leaf.held_weight for leaf in leaves)


def test_quantised_models_are_not_saved_but_refused(
    quantized_pony: Path, pony_folder: Path, tmp_path: Path
) -> None:
    patcher = load_model(quantized_pony, None, "default")
    with pytest.raises(ValueError, match=r"model: quantised weights cannot be saved .* `happyhorse convert`"):
        comfy.sd.save_checkpoint(str(tmp_path / "a.safetensors"), patcher)
    convert(open_checkpoint(pony_folder / "text_encoder"), tmp_path / "encoder.gguf", "q8_0", "test")
    with pytest.raises(ValueError, match=r"clip: quantised weights cannot be saved"):
        load_clip(tmp_path / "encoder.gguf").get_sd()
    assert load_clip(pony_folder / "text_encoder").get_sd()


def test_hooks_on_quantised_weights_are_refused(quantized_pony: Path) -> None:
    patcher = load_model(quantized_pony, None, "default")
    with pytest.raises(ValueError, match=r"LoRA hooks change plain weights only"):
        patcher.add_hook_patches(comfy.hooks.WeightHook(), {KEY: ("diff", (torch.ones(1),))})


def test_a_clone_that_is_not_dynamic_still_patches_at_use(
    quantized_pony: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher = load_model(quantized_pony, None, "default")
    monkeypatch.setattr(type(patcher), "is_dynamic", lambda self: self is patcher)
    clone = patcher.clone(disable_dynamic=True)
    before = host_velocity(clone)
    changed = clone.clone()
    shape = patcher.model.diffusion_model.block.layers[2].attention.linear_qkv.weight.shape
    changed.add_patches({KEY: ("diff", (0.01 * torch.randn(shape),))})
    assert (host_velocity(changed) - before).norm() / before.norm() > 1e-2


def test_merging_models_sees_the_patches_of_quantised_weights(quantized_pony: Path) -> None:
    patcher = load_model(quantized_pony, None, "default")
    shape = patcher.model.diffusion_model.block.layers[2].attention.linear_qkv.weight.shape
    changed, merged = patcher.clone(), patcher.clone()
    changed.add_patches({KEY: ("diff", (0.01 * torch.randn(shape),))})
    for key, patches in changed.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patches}, 1.0, 0.0)
    want, got = host_velocity(changed), host_velocity(merged)
    assert (got - want).norm() / want.norm() < 1e-5
