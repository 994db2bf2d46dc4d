"""LoRAs: every format against deltas worked out by hand, on the miniature transformer."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.config import PONY
from happyhorse.model.convert import convert, suffix_of
from happyhorse.model.lora import (
    SLICE_ROWS,
    LoraPatch,
    Rows,
    Strengths,
    bytes_at_use,
    match,
    parse_blocks,
    patches,
    transformer_shapes,
)
from happyhorse.model.lora_formats import Change, open_lora
from happyhorse.model.quant import quantize
from happyhorse.model.stream_writer import GgufStreamWriter

CONFIG = PONY.transformers["base"]  # 6 layers; 0 holds one copy per modality
SHAPES = transformer_shapes(CONFIG)
SHARED, MODAL = "block.layers.2.mlp.down_proj", "block.layers.0.attention.linear_proj"
FUSED = "block.layers.0.attention.linear_qkv"
WIDTH, INNER = SHAPES[f"{SHARED}.weight"]
SECTIONS = (WIDTH, 32, 32, WIDTH // 32)  # q, k, v, gate
RANK, ALPHA, TOLERANCE = 4, 6.0, 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape))) * 0.3


def weights(*stems: str) -> dict[str, Tensor]:
    return {f"{stem}.weight": random(*SHAPES[f"{stem}.weight"], seed=9) for stem in stems}


def pair(stem: str, rows: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """up and down for a layer, or for `rows` of its rows."""
    height, width = SHAPES[f"{stem}.weight"]
    return random(rows or height, RANK, seed=seed), random(RANK, width, seed=seed + 1)


def plain(stem: str, prefix: str = "diffusion_model.", seed: int = 0) -> dict[str, Tensor]:
    up, down = pair(stem, seed=seed)
    return {f"{prefix}{stem}.lora_A.weight": down, f"{prefix}{stem}.lora_B.weight": up}


def save(folder: Path, tensors: Mapping[str, Tensor], name: str = "a.safetensors", **metadata: str) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / name, metadata)
    return folder / name


def apply(path: Path, before: Mapping[str, Tensor], strengths: Strengths | None = None) -> dict[str, Tensor]:
    """Copies of weights with the patches of one file."""
    changes = found(path, strengths or Strengths())
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name, tensor in after.items():
        for patch in changes.pop(name, []):
            assert patch(tensor) is tensor
    assert not changes  # nothing else is changed
    return after


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def by_hand(kind: str, stem: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one layer in a format, and the change they stand for, entry by entry."""
    height, width = SHAPES[f"{stem}.weight"]
    up, down = pair(stem)
    low = torch.einsum("or,ri->oi", up.double(), down.double())
    if kind == "peft":
        return {"lora_A.weight": down, "lora_B.weight": up}, low
    if kind == "peft default":
        return {"lora_A.default.weight": down, "lora_B.default.weight": up}, low
    if kind == "kohya":
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
        return tensors, low * ALPHA / RANK
    if kind == "kohya convolution":
        return {"lora_down.weight": down[..., None, None], "lora_up.weight": up[..., None, None]}, low
    if kind == "loha":
        up2, down2 = pair(stem, seed=5)
        tensors = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up2, "hada_w2_b": down2}
        other = torch.einsum("or,ri->oi", up2.double(), down2.double())
        return {**tensors, "alpha": torch.tensor(ALPHA)}, low * other * ALPHA / RANK
    if kind == "difference":
        return {"diff": random(height, width)}, random(height, width).double()
    left, right = random(2, 4), random(height // 2, width // 4)
    tensors, scale = {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(ALPHA)}, 1.0
    if kind == "lokr factored":
        up, down = random(height // 2, RANK), random(RANK, width // 4)
        right, scale = up @ down, ALPHA / RANK
        tensors = {"lokr_w1": left, "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(ALPHA)}
    blocks = [torch.cat([left[i, j] * right.double() for j in range(4)], dim=1) for i in range(2)]
    return tensors, torch.cat(blocks) * scale


KINDS = ("peft", "peft default", "kohya", "kohya convolution", "loha", "lokr", "lokr factored", "difference")


@pytest.mark.parametrize("stem", [SHARED, MODAL])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_adds_the_change_worked_out_by_hand(kind: str, stem: str, tmp_path: Path) -> None:
    tensors, delta = by_hand(kind, stem)
    path = save(tmp_path, {f"diffusion_model.{stem}.{role}": tensor for role, tensor in tensors.items()})
    before = weights(stem)
    after = apply(path, before, Strengths(0.7))[f"{stem}.weight"]
    assert error(after, before[f"{stem}.weight"].double() + 0.7 * delta) <= TOLERANCE
    assert error(after, before[f"{stem}.weight"]) > 0.01


PREFIXES = (
    "", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.",
    "base_model.model.transformer.", "base_model.model.model.diffusion_model.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_understood(prefix: str, tmp_path: Path) -> None:
    before, (up, down) = weights(SHARED), pair(SHARED)
    after = apply(save(tmp_path, plain(SHARED, prefix)), before)
    assert error(after[f"{SHARED}.weight"], before[f"{SHARED}.weight"] + up @ down) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_names_with_underscores_are_understood(prefix: str, tmp_path: Path) -> None:
    before, (up, down) = weights(SHARED), pair(SHARED)
    stem = prefix + SHARED.replace(".", "_")
    path = save(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    assert error(apply(path, before)[f"{SHARED}.weight"], before[f"{SHARED}.weight"] + up @ down) <= TOLERANCE


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("dots", [True, False])
@pytest.mark.parametrize("section", range(4))
def test_separate_q_k_v_and_gate_change_their_rows(
    section: int, dots: bool, copies: int, tmp_path: Path
) -> None:
    size = SECTIONS[section]
    up, down = pair(FUSED, size * copies)
    word = ("to_q", "k_proj", "linear_v", "to_gate")[section]
    stem = FUSED.replace("linear_qkv", word)
    stem = f"transformer.{stem}" if dots else f"lora_unet_{stem.replace('.', '_')}"
    path = save(tmp_path, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    before = weights(FUSED)
    expected = before[f"{FUSED}.weight"].clone()
    for modality in range(3):
        start = modality * sum(SECTIONS) + sum(SECTIONS[:section])
        rows = up[modality * size : (modality + 1) * size] if copies == 3 else up
        expected[start : start + size] += rows @ down
    after = apply(path, before)[f"{FUSED}.weight"]
    assert error(after, expected) <= TOLERANCE
    assert ((after != before[f"{FUSED}.weight"]).any(dim=1).sum()) == 3 * size


def test_all_sections_together_are_the_fused_layer(tmp_path: Path) -> None:
    up, down = pair(FUSED)
    copies = up.unflatten(0, (3, sum(SECTIONS)))
    separate = {}
    for word, rows in zip(("to_q", "to_k", "to_v", "to_gate"), copies.split(SECTIONS, dim=1), strict=True):
        stem = FUSED.replace("linear_qkv", word)
        separate |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": rows.flatten(0, 1)}
    before = weights(FUSED)
    fused = apply(save(tmp_path, plain(FUSED)), before)[f"{FUSED}.weight"]
    parts = apply(save(tmp_path, separate, "b.safetensors"), before)[f"{FUSED}.weight"]
    assert error(fused, parts) <= 1e-6


@pytest.mark.parametrize(
    "key", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight", "dora_scale"]
)
def test_dora_gives_every_row_its_norm(key: str, tmp_path: Path) -> None:
    up, down = pair(SHARED)
    before = weights(SHARED)
    norms = random(len(up)).abs() + 0.5
    magnitude = norms.unsqueeze(1) if key == "dora_scale" else norms
    path = save(tmp_path, {**plain(SHARED), f"diffusion_model.{SHARED}.{key}": magnitude})
    after = apply(path, before)[f"{SHARED}.weight"]
    assert error(after.norm(dim=1), norms) <= TOLERANCE
    changed = before[f"{SHARED}.weight"] + up @ down
    assert error(after, norms.unsqueeze(1) * changed / changed.norm(dim=1, keepdim=True)) <= TOLERANCE


@pytest.mark.parametrize("stem", [SHARED, MODAL])
def test_dora_over_columns_gives_every_column_its_norm(stem: str, tmp_path: Path) -> None:
    up, down = pair(stem)
    before = weights(stem)
    norms = random(1, down.shape[1]).abs() + 0.5
    path = save(tmp_path, {**plain(stem), f"diffusion_model.{stem}.dora_scale": norms})
    after = apply(path, before)[f"{stem}.weight"]
    assert error(after.norm(dim=0), norms[0]) <= TOLERANCE
    half = apply(path, before, Strengths(0.5))[f"{stem}.weight"]
    assert error(half, (before[f"{stem}.weight"] + after) / 2) <= TOLERANCE
    video = apply(path, before, Strengths(audio=0, text=0, shared=0))[f"{stem}.weight"]
    third = len(up) // 3 if stem == MODAL else 0
    assert torch.equal(video[:third], after[:third])
    assert torch.equal(video[third:], before[f"{stem}.weight"][third:])


def test_embedders_heads_biases_and_norms_take_differences(tmp_path: Path) -> None:
    names = {
        "adapter.video_embedder.weight": "diff", "adapter.audio_embedder.bias": "diff_b",
        "block.layers.0.attention.q_norm.weight": "diff", "block.layers.1.mlp.pre_norm.weight": "w_norm",
        "final_norm_audio.weight": "diff",
    }  # fmt: skip
    before = {name: random(*SHAPES[name], seed=3) for name in names}
    deltas = {name: random(*SHAPES[name], seed=4) for name in names}
    tensors = {
        f"diffusion_model.{name.rpartition('.')[0]}.{role}": deltas[name] for name, role in names.items()
    }
    after = apply(save(tmp_path, tensors), before)
    assert all(error(after[name], before[name] + deltas[name]) <= TOLERANCE for name in names)


def test_alpha_comes_from_the_header_that_diffusers_writes(tmp_path: Path) -> None:
    settings = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {SHARED: 2}, "transformer.r": RANK}
    tensors = {**plain(SHARED, "transformer."), **plain(MODAL, "transformer.")}
    before = weights(SHARED, MODAL)
    after = apply(save(tmp_path, tensors, lora_adapter_metadata=json.dumps(settings)), before)
    for stem, scale in ((SHARED, 2 / RANK), (MODAL, 8 / RANK)):
        up, down = pair(stem)
        expected = before[f"{stem}.weight"] + scale * (up @ down)
        assert error(after[f"{stem}.weight"], expected) <= TOLERANCE


def test_alpha_comes_from_the_settings_beside_a_file_of_peft(tmp_path: Path) -> None:
    save(tmp_path, plain(SHARED, "base_model.model."), "adapter_model.safetensors")
    settings = {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    before, (up, down) = weights(SHARED), pair(SHARED)
    expected = before[f"{SHARED}.weight"] + 8 / math.sqrt(RANK) * (up @ down)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert error(apply(path, before)[f"{SHARED}.weight"], expected) <= TOLERANCE


@pytest.mark.parametrize(
    "pattern", [f"^{SHARED}", SHARED.partition(".")[2], r".*\.down_proj", "(x|down)_proj"]
)
def test_patterns_of_alpha_are_those_of_peft(pattern: str, tmp_path: Path) -> None:
    assert SHARED.endswith(".down_proj")
    settings = {"lora_alpha": 8, "alpha_pattern": {"other": 1, "own_proj": 1, pattern: 2, ".*": 3}}
    before, (up, down) = weights(SHARED), pair(SHARED)
    after = apply(save(tmp_path, plain(SHARED), lora_adapter_metadata=json.dumps(settings)), before)
    assert error(after[f"{SHARED}.weight"], before[f"{SHARED}.weight"] + 2 / RANK * (up @ down)) <= TOLERANCE


def test_strengths_per_modality_touch_only_their_thirds(tmp_path: Path) -> None:
    stems = (FUSED, MODAL, SHARED, "adapter.audio_embedder", "final_linear_video")
    path = save(tmp_path, {key: tensor for stem in stems for key, tensor in plain(stem).items()})
    before = weights(*stems)
    given = {"video": 0.5, "audio": -2.0, "text": 0.0, "shared": 0.25}
    after = apply(path, before, Strengths(0.5, **given))
    for stem in stems:
        up, down = pair(stem)
        delta, old, new = up @ down, before[f"{stem}.weight"], after[f"{stem}.weight"]
        copies = {SHARED: ["shared"], stems[3]: ["audio"], stems[4]: ["video"]}
        names = copies.get(stem, ["video", "audio", "text"])
        thirds = zip(
            names, delta.chunk(len(names)), old.chunk(len(names)), new.chunk(len(names)), strict=True
        )
        for modality, change, was, now in thirds:
            assert error(now, was + 0.5 * given[modality] * change) <= TOLERANCE
            assert torch.equal(now, was) == (modality == "text")


def test_blocks_weigh_the_layers(tmp_path: Path) -> None:
    stems = [f"block.layers.{index}.attention.linear_proj" for index in range(6)] + ["final_linear_audio"]
    path = save(tmp_path, {key: tensor for stem in stems for key, tensor in plain(stem).items()})
    before = weights(*stems)
    after = apply(path, before, Strengths(blocks="0-1:0.5,3,4:-1"))
    for stem, weight in zip(stems, (0.5, 0.5, 0, 1, -1, 0, 1), strict=True):
        up, down = pair(stem)
        expected = before[f"{stem}.weight"] + weight * (up @ down)
        assert error(after[f"{stem}.weight"], expected) <= TOLERANCE


def test_several_loras_add_up(tmp_path: Path) -> None:
    paths = [save(tmp_path, plain(SHARED, seed=seed), f"{seed}.safetensors") for seed in (0, 7)]
    loras = [
        (open_lora(path), Strengths(strength)) for path, strength in zip(paths, (1.0, -0.5), strict=True)
    ]
    found = patches(loras, CONFIG, SHAPES)[f"{SHARED}.weight"]
    before = weights(SHARED)[f"{SHARED}.weight"]
    after = before.clone()
    for patch in found:
        patch(after)
    (up, down), (up2, down2) = pair(SHARED), pair(SHARED, seed=7)
    assert len(found) == 2
    assert error(after, before + up @ down - 0.5 * (up2 @ down2)) <= TOLERANCE


@pytest.mark.parametrize(
    "strengths",
    [
        Strengths(0),
        Strengths(video=0, audio=0, text=0, shared=0),
        Strengths(blocks="1:1"),
        Strengths(blocks="0-5:0"),
    ],
)
def test_strength_zero_leaves_no_patch(strengths: Strengths, tmp_path: Path) -> None:
    path = save(tmp_path, {**plain(SHARED), **plain(MODAL), **plain(FUSED)})
    assert patches([(open_lora(path), strengths)], CONFIG, SHAPES) == {}


def test_weights_of_bfloat16_are_rounded_once(tmp_path: Path) -> None:
    up, down = pair(SHARED)
    before = {name: tensor.bfloat16() for name, tensor in weights(SHARED).items()}
    after = apply(save(tmp_path, plain(SHARED)), before)[f"{SHARED}.weight"]
    expected = (before[f"{SHARED}.weight"].float() + up @ down).bfloat16()
    assert torch.equal(after, expected)


def test_a_patch_moves_with_its_factors(tmp_path: Path) -> None:
    path = save(tmp_path, {**plain(SHARED), f"diffusion_model.{SHARED}.dora_scale": random(1, INNER).abs()})
    patch = patches([(open_lora(path), Strengths())], CONFIG, SHAPES)[f"{SHARED}.weight"][0]
    moved = patch.to("meta")
    assert [tensor.device.type for tensor in moved.change.tensors] == ["meta"] * 3
    same = zip(patch.to("cpu").change.tensors, patch.change.tensors, strict=True)
    assert all(there is here for there, here in same)  # nothing is copied where it is there already


def test_what_is_not_used_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"lora_te_text_model_0_q.lora_up.weight": random(4, 4), "logit_scale": random(2)}
    extra["lora_te_text_model_0_q.lora_down.weight"] = random(4, 4)
    path = save(tmp_path, {**plain(SHARED), **extra})
    report = match(open_lora(path), CONFIG, SHAPES)
    assert set(report.unmatched) == set(extra)
    assert "1 of 2 matched, 3 keys not used: " in str(report)
    patches([(open_lora(path), Strengths())], CONFIG, SHAPES)
    assert "a.safetensors: 1 of 2 matched, 3 keys not used" in caplog.text
    one = save(tmp_path, {**plain(SHARED), "logit_scale": extra["logit_scale"]})
    assert str(match(open_lora(one), CONFIG, SHAPES)) == "1 of 1 matched, 1 key not used: logit_scale"


def test_a_lora_that_fits_is_told_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, {**plain(SHARED), **plain(MODAL)})
    with caplog.at_level(logging.INFO):
        patches([(open_lora(path), Strengths())] * 2, CONFIG, SHAPES)
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [("INFO", "a.safetensors: 2 of 2 matched")] * 2


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("3", {3: 1.0}),
        ("0-2,5", {0: 1.0, 1: 1.0, 2: 1.0, 5: 1.0}),
        (" 0-1 : 0.5 , 2:-1e-1", {0: 0.5, 1: 0.5, 2: -0.1}),
    ],
)
def test_blocks_are_ranges_with_weights(text: str, weights: dict[int, float]) -> None:
    assert parse_blocks(text) == weights


@pytest.mark.parametrize("text", ["x", "1-", "3-1", "1:nan", "1:2:3", "1,,2", "-1", "0-99999999999", "1:"])
def test_blocks_that_are_no_ranges_are_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="blocks must be layers with weights, such as 0-11,30"):
        Strengths(blocks=text)


def test_a_block_named_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="name layer 3 twice"):
        parse_blocks("0-3,3:0.5")


def test_a_block_beyond_the_model_is_an_error(tmp_path: Path) -> None:
    lora = open_lora(save(tmp_path, plain(SHARED)))
    with pytest.raises(ValueError, match="name layer 39, but the model's layers are 0-5"):
        patches([(lora, Strengths(blocks="0-39"))], CONFIG, SHAPES)


def test_a_strength_must_be_finite() -> None:
    with pytest.raises(ValueError, match="the strength of audio of a LoRA must be a finite number, got nan"):
        Strengths(audio=math.nan)


@pytest.mark.parametrize(
    ("strengths", "text"),
    [(Strengths(), "1"), (Strengths(0.5, audio=0, blocks="0-3:0.5"), "0.5:audio=0,blocks=0-3:0.5")],
)
def test_strengths_read_as_on_the_command_line(strengths: Strengths, text: str) -> None:
    assert str(strengths) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_with_its_loras(dtype: torch.dtype, pony_folder: Path, tmp_path: Path) -> None:
    path = save(tmp_path, {**plain(SHARED), **plain("final_linear_audio")})
    checkpoint = open_checkpoint(pony_folder / "base")
    plainly, nothing, patched = (
        load(checkpoint, dtype, patches=changes).state_dict()
        for changes in ({}, found(path, Strengths(0)), found(path, Strengths(0.5)))
    )
    for name, tensor in plainly.items():
        assert torch.equal(nothing[name], tensor)
        stem = name.removesuffix(".weight")
        if stem in (SHARED, "final_linear_audio"):
            up, down = pair(stem)
            merged = checkpoint.read(name).float() + 0.5 * (up @ down)
            assert error(patched[name], merged.to(patched[name].dtype)) <= TOLERANCE
        else:
            assert torch.equal(patched[name], tensor)


@pytest.mark.parametrize("to", ["fp8", "q8_0", "q4_0"])
def test_quantised_weights_stay_so_and_are_changed_when_they_are_used(
    to: str, pony_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / f"base{suffix_of(to)}"
    convert(open_checkpoint(pony_folder / "base"), target, to, "test")
    path = save(tmp_path, {**plain(SHARED), **plain(FUSED)})
    checkpoint = open_checkpoint(target)
    before, after = (
        load(checkpoint, torch.float32, patches=changes)
        for changes in ({}, found(path, Strengths(0.5, audio=0)))
    )
    for stem in (SHARED, FUSED):
        up, down = pair(stem)
        old, new = (model.get_submodule(stem) for model in (before, after))
        assert new.quantized and torch.equal(old.weight.view(torch.uint8), new.weight.view(torch.uint8))
        delta = 0.5 * (up @ down)
        if stem == FUSED:
            delta.chunk(3)[1].zero_()
        assert error(new.weight_in(torch.float32), old.weight_in(torch.float32) + delta) <= TOLERANCE


def found(path: Path, strengths: Strengths) -> dict[str, list[LoraPatch]]:
    """The patches of one file."""
    return patches([(open_lora(path), strengths)], CONFIG, SHAPES)


def broken(tensors: Mapping[str, Tensor], drop: str = "", **changes: Tensor) -> dict[str, Tensor]:
    stem = f"diffusion_model.{SHARED}."
    kept = {key: tensor for key, tensor in tensors.items() if key != stem + drop}
    return kept | {stem + key: tensor for key, tensor in changes.items()}


UP, DOWN = pair(SHARED)
LOHA = {f"diffusion_model.{SHARED}.{role}": tensor for role, tensor in by_hand("loha", SHARED)[0].items()}
BAD = {
    "holds no LoRA: none of its 1 tensors": {"some.weight": UP},
    "does not fit this model: none of its 1 layer (": plain(SHARED, "diffusion_model.blocks.", 0),
    "is one of the model's (block.layers.0.attention.pre_norm": plain(SHARED, "double_"),
    f"changes a weight of [8, 8], which is [{WIDTH}, {INNER}] here": {
        f"{SHARED}.lora_A.weight": random(2, 8), f"{SHARED}.lora_B.weight": random(8, 2)
    },
    f"changes a weight of [7, {WIDTH}], which is [{3 * WIDTH}, {WIDTH}] or [{WIDTH}, {WIDTH}] here": {
        "block.layers.0.attention.to_q.lora_A.weight": random(2, WIDTH),
        "block.layers.0.attention.to_q.lora_B.weight": random(7, 2),
    },
    "differ, 3 and 4; the file is damaged": broken(plain(SHARED), **{"lora_B.weight": UP[:, :3]}),
    "the two products of": broken(LOHA, hada_w2_a=UP[:10]),
    "under two names, diffusion_model.": {**plain(SHARED), **plain(SHARED, "transformer.")},
    "names down of": broken(plain(SHARED), **{"lora_down.weight": DOWN}),
    "holds NaN or infinite values": broken(plain(SHARED), **{"lora_B.weight": UP / 0}),
    "alpha holds NaN": broken(plain(SHARED), alpha=torch.tensor(math.nan)),
    "lacks down": broken(plain(SHARED), "lora_A.weight"),
    "lacks up": broken(plain(SHARED), "lora_B.weight"),
    "lacks hada_w2_b": broken(LOHA, "hada_w2_b"),
    "also has down": {**plain(SHARED), **LOHA},
    "lacks lokr_w2_a": {f"{SHARED}.lokr_w1": UP},
    "must be a matrix, got the shape [4]": broken(plain(SHARED), **{"lora_A.weight": random(4)}),
    "one value per row or per column": broken(plain(SHARED), dora_scale=random(3)),
    "lora_A.weight must be a matrix, got a single": broken(plain(SHARED), **{"lora_A.weight": UP[0, 0]}),
    f"lora_A.weight has the shape [0, {INNER}], which holds nothing": {
        **broken(plain(SHARED), alpha=torch.tensor(4.0)),
        f"diffusion_model.{SHARED}.lora_A.weight": DOWN[:0],
        f"diffusion_model.{SHARED}.lora_B.weight": UP[:, :0],
    },
    "alpha must be one number, got the shape [0]": broken(plain(SHARED), alpha=torch.zeros(0)),
    "alpha must be one number, got the shape [2]": broken(plain(SHARED), alpha=torch.ones(2)),
    "alpha holds NaN or infinite": broken(plain(SHARED), alpha=torch.tensor(math.inf)),
    "lora_B.weight is stored in U8, but a LoRA must be a .safetensors file of float32": broken(
        plain(SHARED), **{"lora_B.weight": UP.byte()}
    ),
    "lora_B.weight is stored in F8_E4M3 with a scale, but": broken(
        plain(SHARED),
        **{"lora_B.weight": UP.to(torch.float8_e4m3fn), "lora_B.weight_scale": torch.tensor(2.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_cannot_be_used_is_one_sentence(message: str, tmp_path: Path) -> None:
    path = save(tmp_path, BAD[message])
    with pytest.raises(ValueError) as raised:
        patches([(open_lora(path), Strengths())], CONFIG, SHAPES)
    assert message in str(raised.value)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_quantised_gguf_is_no_lora(tmp_path: Path) -> None:
    up, down = (quantize(random(*shape), "Q8_0") for shape in ((WIDTH, 32), (32, INNER)))
    stem, path = f"diffusion_model.{SHARED}", tmp_path / "a.gguf"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    entries = [(name, "Q8_0", tensor.shape) for name, tensor in tensors.items()]
    with GgufStreamWriter(path, entries, {}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor.data)
    with pytest.raises(ValueError, match=r"a\.gguf: .* stored in Q8_0, but a LoRA must be a \.safetensors"):
        open_lora(path)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_plain_dtype_is_read(dtype: torch.dtype, pickled: bool, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in plain(SHARED).items()}
    tensors[f"diffusion_model.{SHARED}.alpha"] = torch.tensor(8)
    path = save(tmp_path, tensors)
    if pickled:
        path = tmp_path / "a.pt"
        torch.save(tensors, path)
    before = weights(SHARED)
    down, up, _ = (tensor.float() for tensor in tensors.values())
    expected = before[f"{SHARED}.weight"] + 8 / RANK * (up @ down)
    assert error(apply(path, before)[f"{SHARED}.weight"], expected) <= TOLERANCE


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the LoRA .*none\.safetensors does not exist"):
        open_lora(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        "[",
        "3",
        '{"lora_alpha": "x"}',
        '{"lora_alpha": NaN}',
        '{"alpha_pattern": 1}',
        '{"alpha_pattern": {"(": 1}}',
    ],
)
def test_settings_that_cannot_be_read_are_an_error(settings: str, tmp_path: Path) -> None:
    path = save(tmp_path, plain(SHARED), lora_adapter_metadata=settings)
    with pytest.raises(ValueError, match="its settings of the LoRA cannot be used"):
        open_lora(path)


def test_what_patches_take_at_use_is_counted() -> None:
    change = Change("lora", (torch.ones(24, 2), torch.ones(2, 16)))
    given = {"a": [LoraPatch(change, ((Rows(0, 24),),))], "b": [LoraPatch(change, ((Rows(0, 24),),))]}
    assert bytes_at_use(given, {"a", "c"}) == 4 * (24 * 2 + 2 * 16) + 2 * 4 * SLICE_ROWS * 16
    assert bytes_at_use(given, {}) == bytes_at_use({}, {"a"}) == 0
