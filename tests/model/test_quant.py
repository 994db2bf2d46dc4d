"""Quantised weights: every naming that files use, what a layer makes of them, and how exact they are."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file
from small_networks import random_weight
from torch import Tensor, nn

from happyhorse.model import quant
from happyhorse.model.checkpoint import BLOCK_LINEAR, describe, load, open_checkpoint
from happyhorse.model.config import PONY, TransformerConfig
from happyhorse.model.operations import ModalityLinear
from happyhorse.model.packing import Latents, PackedLayout
from happyhorse.model.quant import FLOAT8, QuantizedWeight, quantize
from happyhorse.model.transformer import JointTransformer

log = logging.getLogger(__name__)
State = dict[str, Tensor]
CONFIG = PONY.transformers["distill"]
# the published widths and layers by an eighth, as far as head size and groups allow
EIGHTH = TransformerConfig(
    num_layers=5, hidden_size=640, head_dim=64, num_query_groups=2, video_in_channels=192,
    audio_in_channels=64, text_in_channels=448, mm_layers=(0, 4), gelu7_layers=(0,), local_attn_layers=(),
    frame_receptive_field=11, enable_attn_gating=True, coords_style="v2",
)  # fmt: skip


def random_state(config: TransformerConfig) -> State:
    """Weights of a network, bfloat16 in the linears of its layers, else float32."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        module = JointTransformer(config)
    state = {name: random_weight(name, torch.zeros(tensor.shape), generator)
             for name, tensor in module.state_dict().items() if name != "adapter.rope.bands"}  # fmt: skip
    return {name: tensor.bfloat16() if BLOCK_LINEAR.match(name) else tensor for name, tensor in state.items()}


def save(path: Path, state: State, config: TransformerConfig = CONFIG, **metadata: str) -> Path:
    save_file(state, path, {"config": json.dumps(config.to_dict()), "variant": "distill", **metadata})
    return path


def velocity(module: nn.Module) -> Latents:
    config, generator = module.config, torch.Generator().manual_seed(5)
    latents = Latents(
        torch.randn(1, config.latent_channels, 3, 4, 4, generator=generator),
        torch.randn(1, 9, config.audio_in_channels, generator=generator),
    )
    text = torch.randn(1, 7, config.text_in_channels, generator=generator)
    with torch.inference_mode():
        return module(latents, text, PackedLayout.of(latents, text, config.coords_style))


def difference(got: Latents, want: Latents) -> float:
    got, want = (torch.cat([t.flatten() for t in latents]) for latents in (got, want))
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(CONFIG)


def relative_error(got: State, want: State) -> float:
    """Of the linears of all layers together."""
    names = linears(want)
    errors = sum(float((got[name] - want[name].float()).square().sum()) for name in names)
    return (errors / sum(float(want[name].float().square().sum()) for name in names)) ** 0.5


def linears(state: State) -> list[str]:
    return [name for name in state if BLOCK_LINEAR.match(name)]


# Names and granularities of scales


def by_tensor(weight: Tensor, largest: float) -> Tensor:
    return (weight.abs().amax() / largest).float()


def by_third(weight: Tensor, largest: float) -> Tensor:
    return torch.stack([by_tensor(part, largest) for part in weight.chunk(3)])


def by_row(weight: Tensor, largest: float) -> Tensor:
    return (weight.abs().amax(1, keepdim=True) / largest).float()


def scaled(state: State, name: str, scale: Tensor, stored: torch.dtype) -> Tensor:
    rows = state[name].shape[0]
    wide = state[name].float() / scale.reshape(-1, 1).repeat_interleave(rows // scale.numel(), 0)
    return (wide.round() if stored == torch.int8 else wide).to(stored)


def json_note(note: object) -> Tensor:
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def comfy_note(format: str) -> Tensor:
    return json_note({"format": format})


NAMINGS: dict[str, Callable[[str], str]] = {
    "__fp8_scale": lambda layer: f"{layer}.weight.__fp8_scale",
    "weight_scale": lambda layer: f"{layer}.weight_scale",
    "scale_weight": lambda layer: f"{layer}.scale_weight",
    "comfy_quant": lambda layer: f"{layer}.weight_scale",
    "header": lambda layer: f"{layer}.weight_scale",
}


def quantized_file(
    path: Path,
    state: State,
    naming: str,
    granularity: Callable[[Tensor, float], Tensor],
    format: str,
    config: TransformerConfig = CONFIG,
) -> tuple[Path, State]:
    """A file as its publisher would write it, and the plain weights that it stands for."""
    kind = FLOAT8.get(format, torch.int8)
    largest = 127 if kind == torch.int8 else torch.finfo(kind).max
    files, plain, metadata = dict(state), dict(state), {}
    for name in linears(state):
        layer = name.removesuffix(".weight")
        thirds = granularity is not by_third or state[name].shape[0] % 3 == 0
        scale = (granularity if thirds else by_tensor)(state[name], largest)
        files[name] = scaled(state, name, scale, kind)
        files[NAMINGS[naming](layer)] = scale
        rows = scale.reshape(-1, 1).repeat_interleave(state[name].shape[0] // scale.numel(), 0)
        plain[name] = files[name].float() * rows
        if naming == "comfy_quant":
            files[f"{layer}.comfy_quant"] = comfy_note("int8_tensorwise" if format == "int8" else format)
            files[f"{layer}.input_scale"] = torch.tensor(1.0)
        if naming == "header":
            metadata.setdefault("layers", {})[layer] = {"format": format}
    if naming == "scale_weight":
        files["scaled_fp8"] = torch.empty(2, dtype=FLOAT8[format])
    header = {"_quantization_metadata": json.dumps(metadata)} if metadata else {}
    return save(path, files, config, **header), plain


@pytest.mark.parametrize(
    ("naming", "granularity", "format"),
    [
        ("__fp8_scale", by_tensor, "float8_e4m3fn"),
        ("__fp8_scale", by_third, "float8_e4m3fn"),
        ("weight_scale", by_row, "float8_e4m3fn"),
        ("scale_weight", by_tensor, "float8_e4m3fn"),
        ("scale_weight", by_tensor, "float8_e5m2"),
        ("comfy_quant", by_tensor, "float8_e4m3fn"),
        ("comfy_quant", by_row, "float8_e5m2"),
        ("comfy_quant", by_row, "int8"),
        ("comfy_quant", by_tensor, "int8"),
        ("header", by_third, "float8_e4m3fn"),
    ],
)
def test_scaled_weights_load_as_they_are_published(
    tmp_path: Path, state: State, naming: str, granularity: Callable[[Tensor, float], Tensor], format: str
) -> None:
    path, plain = quantized_file(tmp_path / "distill.safetensors", state, naming, granularity, format)
    checkpoint = open_checkpoint(path)
    module = load(checkpoint, torch.float32)
    for name in linears(state):
        leaf = module.get_submodule(name.removesuffix(".weight"))
        assert leaf.weight.dtype == FLOAT8.get(format, torch.int8)
        torch.testing.assert_close(leaf.weight_in(torch.float32), plain[name], rtol=1e-6, atol=0)
        planned = checkpoint.kept_bytes(name, torch.float32)
        assert leaf.quantized.nbytes <= planned <= leaf.quantized.nbytes + 4 * len(plain[name])
    reference = load(open_checkpoint(save(tmp_path / "plain.safetensors", plain)), torch.float32)
    assert difference(velocity(module), velocity(reference)) < 1e-6
    assert "complete" in describe(path)


def test_unscaled_fp8_stays_as_it_is_and_all_else_is_widened(tmp_path: Path, state: State) -> None:
    files = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    module = load(open_checkpoint(save(tmp_path / "distill.safetensors", files)), torch.bfloat16)
    for name, tensor in module.state_dict().items():
        kept = torch.float8_e4m3fn if BLOCK_LINEAR.match(name) else torch.float32
        assert tensor.dtype == kept, name
    plain = {name: tensor.float() for name, tensor in files.items()}
    reference = load(open_checkpoint(save(tmp_path / "plain.safetensors", plain)), torch.bfloat16)
    assert difference(velocity(module), velocity(reference)) == 0


@pytest.mark.parametrize("scale_of", [None, by_tensor, by_row])
@pytest.mark.parametrize("copies", [1, 3])
def test_zeros_behind_copies_change_no_value(
    copies: int, scale_of: Callable[[Tensor, float], Tensor] | None
) -> None:
    values = torch.randn(copies * 21, 27)
    scale = None if scale_of is None else scale_of(values, 448.0)
    data = (values if scale is None else values / scale).to(torch.float8_e4m3fn)
    weight = QuantizedWeight(data, scale, "float8_e4m3fn", data.shape)
    padded = weight.aligned(copies)
    assert padded.data.shape == (copies * 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(padded.dequantize(dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("per_row", [False, True])
def test_working_out_values_takes_no_copies_of_them(per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize(torch.randn(1000, 500, dtype=torch.bfloat16), "float8_e4m3fn")
    if per_row:
        weight = replace(weight, scale=weight.scale.expand(1000, 1) * torch.rand(1000, 1))
    want = (weight.data.float() * weight.scale).bfloat16()
    padded = weight.aligned(4)
    assert padded.data.shape != weight.data.shape
    monkeypatch.setattr(quant, "SLICE_ROWS", 64)
    for stored in (weight, padded):
        known = nn.Module()
        known.register_buffer("data", stored.data)
        with LiveBytes(known) as live:
            values = stored.dequantize(torch.bfloat16)
        assert torch.equal(values, want)
        assert live.peak < 1.6 * values.nbytes


@pytest.mark.parametrize("modalities", [1, 3])
def test_a_layer_may_multiply_stored_values(monkeypatch: pytest.MonkeyPatch, modalities: int) -> None:
    leaf = ModalityLinear(48, 21, modalities)
    weight = quantize(torch.randn(modalities * 21, 48), "float8_e4m3fn")
    x, spans = torch.randn(2, 9, 48, dtype=torch.bfloat16), ((0, 4), (4, 6), (6, 9))
    leaf.hold(weight)
    want = leaf(x, spans)
    monkeypatch.setattr(quant, "has_scaled_matmul", lambda device: device.type == "cpu")
    for held in (weight, weight.aligned(modalities)):
        leaf.hold(held)
        got = leaf(x, spans)
        assert got.shape == want.shape
        assert 1e-4 < (got - want).norm() / want.norm() < 0.05  # the activations are in float8, too
    leaf.hold(weight, [lambda values: values])
    assert torch.equal(leaf(x, spans), want)


# How exact


def gguf_file(path: Path, state: State, config: TransformerConfig, kind: str) -> tuple[Path, State]:
    """A file as the gguf package writes it, flat where rows are no whole blocks, and its plain weights."""
    writer, plain = gguf.GGUFWriter(path, "happyhorse"), dict(state)
    writer.add_string("happyhorse.config", json.dumps(config.to_dict()))
    writer.add_string("happyhorse.variant", "distill")
    for name, tensor in state.items():
        values, quantized = tensor.float().numpy(), gguf.GGMLQuantizationType[kind]
        if not BLOCK_LINEAR.match(name):
            writer.add_tensor(name, values)
            continue
        if values.shape[1] % 32:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1)
        data = gguf.quants.quantize(values, quantized)
        plain[name] = torch.from_numpy(gguf.quants.dequantize(data, quantized)).reshape(tensor.shape)
        writer.add_tensor(name, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, plain


FORMATS = {  # format -> how its file is made, and the least and largest error of its weights
    "float8_e4m3fn": ("comfy_quant", by_row, (0.02, 0.03)),
    "float8_e4m3fn, one scale": ("__fp8_scale", by_tensor, (0.02, 0.03)),
    "float8_e5m2": ("comfy_quant", by_row, (0.04, 0.06)),
    "int8": ("comfy_quant", by_row, (0.002, 0.02)),
    "Q8_0": (None, None, (0.002, 0.01)),
    "Q5_0": (None, None, (0.02, 0.06)),
    "Q4_0": (None, None, (0.05, 0.12)),
}


@pytest.mark.parametrize("config", [CONFIG, EIGHTH], ids=["pony", "eighth"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_velocities_are_about_as_exact_as_weights(
    tmp_path: Path, config: TransformerConfig, format: str
) -> None:
    state, (naming, granularity, (least, largest)) = random_state(config), FORMATS[format]
    path, kind = tmp_path / "distill.gguf", format.partition(",")[0]
    if naming is None:
        path, plain = gguf_file(path, state, config, kind)
    else:
        path = path.with_suffix(".safetensors")
        path, plain = quantized_file(path, state, naming, granularity, kind, config)
    module = load(open_checkpoint(path), torch.float32)
    held = {name: module.get_submodule(name.removesuffix(".weight")) for name in linears(state)}
    weight_error = relative_error({name: leaf.weight_in(torch.float32) for name, leaf in held.items()}, state)
    assert weight_error == pytest.approx(relative_error(plain, state), rel=1e-3)
    assert least < weight_error < largest
    reference = load(open_checkpoint(save(tmp_path / "plain.safetensors", state, config)), torch.float32)
    error = difference(velocity(module), velocity(reference))
    log.info("%s: weights %.4f, velocities %.4f", format, weight_error, error)
    assert error < 3 * weight_error, (error, weight_error)


# Patches


def test_a_patch_acts_alike_on_plain_and_on_quantised_weights(tmp_path: Path, state: State) -> None:
    path, plain = quantized_file(tmp_path / "a.safetensors", state, "weight_scale", by_row, "float8_e4m3fn")
    dense = save(tmp_path / "plain.safetensors", plain)
    change = {
        name: [lambda weight: weight.mul_(1.1), lambda weight: weight.add_(0.01)] for name in linears(state)
    }
    change["final_linear_video.weight"] = [lambda weight: weight * 2]
    patched = load(open_checkpoint(path), torch.float32, patches=change)
    merged = load(open_checkpoint(dense), torch.float32, patches=change)
    assert difference(velocity(patched), velocity(merged)) < 1e-5
    assert difference(velocity(patched), velocity(load(open_checkpoint(path), torch.float32))) > 1e-2


def test_no_patch_writes_into_a_file(tmp_path: Path, state: State) -> None:
    path = save(tmp_path / "distill.safetensors", {name: t.float() for name, t in state.items()})
    before = path.read_bytes()
    load(open_checkpoint(path), torch.float32, patches={"final_linear_video.weight": [lambda w: w.zero_()]})
    assert path.read_bytes() == before
    again = load(open_checkpoint(path), torch.float32)
    assert torch.equal(again.final_linear_video.weight, state["final_linear_video.weight"])


def test_rows_of_a_quantised_table_are_its_rows() -> None:
    table = quantize(torch.randn(40, 64), "float8_e4m3fn")
    index = torch.tensor([[3, 39, 3], [0, 7, 1]])
    assert torch.equal(table.rows(index, torch.float32), table.dequantize(torch.float32)[index])


def test_rows_of_a_table_that_is_stored_flat_are_its_rows() -> None:
    table = quantize(torch.randn(64, 48), "Q8_0")
    index = torch.tensor([[3, 63, 3], [0, 7, 1]])
    assert table.data.ndim == 1
    assert torch.equal(table.rows(index, torch.float32), table.dequantize(torch.float32)[index])


# Bad input

NAME = "block.layers.1.mlp.down_proj.weight"
SCALE = "block.layers.1.mlp.down_proj.weight_scale"


@pytest.fixture
def files(tmp_path: Path, state: State) -> State:
    path, _ = quantized_file(tmp_path / "a.safetensors", state, "weight_scale", by_row, "float8_e4m3fn")
    return load_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SCALE: None}, rf"{NAME} is stored in float8_e4m3fn, but its scale is missing \(looked for {SCALE}"),
        ({SCALE: torch.ones(2, 2)}, rf"{SCALE} has shape \[2, 2\]; expected one scale, .* of the 192 rows"),
        ({SCALE: torch.ones(7)}, rf"{SCALE} has shape \[7\]; expected"),
        ({SCALE: torch.tensor(float("nan"))}, rf"{SCALE} must be positive and finite, and is not"),
        ({SCALE: torch.tensor(0.0)}, rf"{SCALE} must be positive and finite, and is not"),
        ({NAME: torch.zeros(192, 512, dtype=torch.int8), SCALE: None}, r"stored in int8, but its scale"),
        ({SCALE: torch.ones(192, dtype=torch.int32)}, rf"{SCALE} must hold floating"),
        ({SCALE: torch.tensor(1e38)}, rf"{NAME} of the distill transformer holds NaN or infinite"),
        ({SCALE.replace("weight_scale", "scale_weight"): torch.tensor(1.0)}, rf"{NAME} has two scales"),
        (
            {NAME.replace("weight", "comfy_quant"): json_note({"format": "float8_e4m3fn", "params": [1]}),
             SCALE: torch.tensor(0.0)},
            rf"{SCALE} must be positive",
        ),
        (
            {NAME.replace("weight", "comfy_quant"): comfy_note("nvfp4")},
            rf"{NAME} is quantised as 'nvfp4', which is not read here; accepted are float8_e4m3fn",
        ),
        (
            {NAME.replace("weight", "comfy_quant"): comfy_note("int8_tensorwise")},
            rf"{NAME} is noted as int8_tensorwise, but stored in F8_E4M3; download the file again",
        ),
        (
            {NAME.replace("weight", "comfy_quant"): torch.tensor([1, 2], dtype=torch.uint8)},
            r"its note on quantised layers cannot be read \(.*\); download the file again",
        ),
        (
            {"block.layers.1.mlp.pre_norm.weight_scale": torch.tensor(1.0)},
            r"1 unknown \(block.layers.1.mlp.pre_norm.weight_scale\)",
        ),
    ],
)  # fmt: skip
def test_a_quantised_file_that_is_no_use_says_why(
    tmp_path: Path, files: State, change: State, message: str
) -> None:
    changed = {name: tensor for name, tensor in {**files, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load(open_checkpoint(save(tmp_path / "distill.safetensors", changed)), torch.bfloat16)


def test_values_that_are_not_numbers_are_found(tmp_path: Path, files: State) -> None:
    files[NAME].view(torch.uint8)[3, 4] = 0x7F
    with pytest.raises(ValueError, match=rf"{NAME} of the distill transformer holds NaN"):
        load(open_checkpoint(save(tmp_path / "distill.safetensors", files)), torch.bfloat16)


def test_only_known_formats_are_written() -> None:
    with pytest.raises(ValueError, match=r"can be quantised to float8_e4m3fn, Q8_0, Q5_0, Q4_0, got 'Q4_K'"):
        quantize(torch.zeros(2, 256), "Q4_K")
