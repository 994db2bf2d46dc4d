"""LoRAs on the MODEL: our node through the host's patches, and the host's own loader."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.utils
import execution
import folder_paths
import pytest
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter
from comfy.weight_adapter.base import weight_decompose
from safetensors.torch import save_file
from torch import Tensor

import nodes
from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.convert import convert, suffix_of
from happyhorse.model.lora import LoraPatch, Rows, Strengths, transformer_shapes
from happyhorse.model.lora_formats import Change, open_lora
from happyhorse.model.lora_tools import convert_lora
from happyhorse.nodes.latents import film_latent
from happyhorse.nodes.lora import HappyHorseLoraLoader, load_lora
from happyhorse.nodes.model import load_model
from happyhorse.nodes.sampler import HappyHorseSampler

SHARED, MODAL = "block.layers.2.mlp.down_proj", "block.layers.0.attention.linear_qkv"
STEMS = (SHARED, MODAL, "final_linear_audio")
RANK, TOLERANCE = 4, 1e-5


@pytest.fixture(scope="module")
def model(pony_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPatcher:
    """The pony with weights in float32, which the host does not round."""
    checkpoint = open_checkpoint(pony_folder / "distill")
    tensors = {own: checkpoint.read(own).float() for own in checkpoint.names}
    path = tmp_path_factory.mktemp("float32") / "distill.safetensors"
    save_file(tensors, path, dict(checkpoint.file.metadata))
    return load_model(path, None, "float32")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape))) * 0.3


def pair(model: ModelPatcher, stem: str) -> tuple[Tensor, Tensor]:
    height, width = transformer_shapes(model.model.config)[f"{stem}.weight"]
    return random(height, RANK), random(RANK, width)


def write(path: Path, model: ModelPatcher, prefix: str = "transformer.") -> Path:
    tensors = {}
    for stem in STEMS:
        up, down = pair(model, stem)
        tensors |= {f"{prefix}{stem}.lora_A.weight": down, f"{prefix}{stem}.lora_B.weight": up}
    save_file(tensors, path)
    return path


def weight(model: ModelPatcher, stem: str) -> Tensor:
    """A weight as the host computes with it."""
    key = f"diffusion_model.{stem}.weight"
    return model.patch_weight_to_device(key, return_weight=True).clone()


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def film(model: ModelPatcher) -> list[Tensor]:
    states = random(1, 9, model.model.config.text_in_channels, seed=1)
    latent = film_latent(torch.zeros(1, 48, 3, 4, 6), torch.zeros(1, 64, 9))
    with torch.inference_mode():
        result = HappyHorseSampler.execute(model, [[states, {}]], latent, 7, 2, 1.0)
    return result[0]["samples"].unbind()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_patched_weights_are_merged_by_hand(model: ModelPatcher, tmp_path: Path) -> None:
    patched, report = load_lora(model, write(tmp_path / "a.safetensors", model), Strengths(0.7))
    for stem in STEMS:
        up, down = pair(model, stem)
        assert error(weight(patched, stem), weight(model, stem) + 0.7 * (up @ down)) <= TOLERANCE
    other = "block.layers.3.mlp.down_proj"
    assert torch.equal(weight(patched, other), weight(model, other))
    assert "3 of 3 matched: 1 down_proj, 1 final_linear_audio, 1 linear_qkv" in report
    assert "layers 0, 2; audio: 1, one copy per modality: 1, shared: 1" in report
    assert report.endswith("strength 0.7, 3 weights changed")


def test_strengths_per_modality_touch_only_their_thirds(model: ModelPatcher, tmp_path: Path) -> None:
    given = Strengths(video=0, audio=0.5, text=0, shared=0)
    patched, _ = load_lora(model, write(tmp_path / "a.safetensors", model), given)
    up, down = pair(model, MODAL)
    video, audio, text = weight(patched, MODAL).chunk(3)
    was = weight(model, MODAL).chunk(3)
    assert torch.equal(video, was[0]) and torch.equal(text, was[2])
    assert error(audio, was[1] + 0.5 * (up @ down).chunk(3)[1]) <= TOLERANCE
    assert torch.equal(weight(patched, SHARED), weight(model, SHARED))
    assert not torch.equal(weight(patched, STEMS[2]), weight(model, STEMS[2]))


def test_the_film_changes_and_is_the_same_to_the_bit_after_removal(
    model: ModelPatcher, tmp_path: Path
) -> None:
    before = film(model)
    path = write(tmp_path / "a.safetensors", model)
    patched, _ = load_lora(model, path, Strengths())
    assert not same(film(patched), before)
    assert same(film(model), before)
    for nothing in (Strengths(0), Strengths(blocks="1,3", audio=0)):
        assert same(film(load_lora(model, path, nothing)[0]), before)


def test_two_loras_behind_one_another_add_up(model: ModelPatcher, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", model)
    once, _ = load_lora(model, path, Strengths())
    twice, _ = load_lora(once, path, Strengths(0.5))
    up, down = pair(model, SHARED)
    assert error(weight(twice, SHARED), weight(model, SHARED) + 1.5 * (up @ down)) <= TOLERANCE
    assert error(weight(once, SHARED), weight(model, SHARED) + up @ down) <= TOLERANCE


def test_weights_that_stay_in_memory_are_patched_when_they_are_used(
    model: ModelPatcher, tmp_path: Path
) -> None:
    """As the host does it for what does not fit: the factors are prefetched into one buffer."""
    patched, _ = load_lora(model, write(tmp_path / "a.safetensors", model), Strengths())
    key = f"diffusion_model.{MODAL}.weight"
    patch = LowVramPatch(key, patched.patches)
    up, down = pair(model, MODAL)
    assert patch.memory_required() >= up.nbytes + down.nbytes
    buffer = torch.empty(patch.memory_required(), dtype=torch.uint8)
    patch.prepare(buffer, None)
    adapter = patch.prepared_patches[0][1]
    assert {tensor.untyped_storage().data_ptr() for tensor in adapter.weights[1]} == {buffer.data_ptr()}
    assert error(patch(weight(model, MODAL)), weight(model, MODAL) + up @ down) <= TOLERANCE


@pytest.mark.parametrize("to", ["fp8", "q4_0"])
@torch.inference_mode()  # as in the host
def test_on_quantised_weights_the_film_is_that_of_their_values_with_the_change(
    to: str, pony_folder: Path, tmp_path: Path
) -> None:
    quantised = tmp_path / f"distill{suffix_of(to)}"
    convert(open_checkpoint(pony_folder / "distill"), quantised, to, "test")
    checkpoint = open_checkpoint(quantised)
    model = load_model(quantised, None, "float32")
    path = write(tmp_path / "a.safetensors", model)
    tensors = {}
    for own in checkpoint.names:
        stored = checkpoint.read(own)
        tensors[own] = stored.dequantize(torch.float32) if own in checkpoint.quantized else stored.float()
    for stem in STEMS:
        up, down = pair(model, stem)
        tensors[f"{stem}.weight"] += 0.5 * (up @ down)
    config = json.dumps(model.model.config.to_dict())
    save_file(tensors, tmp_path / "merged.safetensors", {"variant": "distill", "config": config})
    before = film(model)
    got = film(load_lora(model, path, Strengths(0.5))[0])
    wanted = film(load_model(tmp_path / "merged.safetensors", None, "float32"))
    assert max(error(x, y) for x, y in zip(got, wanted, strict=True)) <= 1e-4
    assert not same(got, before) and same(film(model), before)


def theirs(adapter: Any, before: Tensor, strength: float) -> Tensor:
    return adapter.calculate_weight(before.clone(), "key", strength, 1.0, None, lambda a: a, torch.float32)


FACTORS = (random(24, 4), random(4, 16), random(24, 4, seed=2), random(4, 16, seed=3))
COLUMNS = random(1, 16).abs() + 0.5
ADAPTERS = {
    "lora": (LoRAAdapter, (*FACTORS[:2], 6.0, None, None, None), Change("lora", FACTORS[:2], 1.5)),
    "loha": (LoHaAdapter, (*FACTORS[:2], 6.0, *FACTORS[2:], None, None, None), Change("loha", FACTORS, 1.5)),
    "lokr": (
        LoKrAdapter,
        (random(3, 2), random(8, 8), 6.0, *[None] * 6),
        Change("lokr", (random(3, 2), random(8, 8))),
    ),
    "dora": (
        LoRAAdapter,
        (*FACTORS[:2], 6.0, None, COLUMNS, None),
        Change("lora", FACTORS[:2], 1.5, COLUMNS),
    ),
}


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_our_formulas_are_the_hosts(kind: str, strength: float) -> None:
    host, weights, change = ADAPTERS[kind]
    before = random(24, 16, seed=5)
    ours = LoraPatch(change, ((Rows(0, 24),),))(before.clone(), strength)
    assert error(ours, theirs(host(set(), weights), before, strength)) <= TOLERANCE
    assert error(ours, before) > 0.01


def test_dora_over_rows_is_the_hosts_but_for_the_norm() -> None:
    """The host divides by the norms before the change."""
    before, rows = random(24, 16, seed=5), random(24, 1).abs() + 0.5
    delta = FACTORS[0] @ FACTORS[1]
    ours = LoraPatch(Change("lora", FACTORS[:2], 1.5, rows), ((Rows(0, 24),),))(before.clone())
    host = weight_decompose(rows, before.clone(), delta.clone(), 1.5, 1.0, torch.float32, lambda a: a)
    after = before + 1.5 * delta
    corrected = host * before.norm(dim=1, keepdim=True) / after.norm(dim=1, keepdim=True)
    assert error(ours, corrected) <= TOLERANCE


@pytest.mark.parametrize("kohya", [False, True])
def test_the_stock_loader_takes_its_two_families_of_names(
    kohya: bool, model: ModelPatcher, tmp_path: Path
) -> None:
    tensors = {}
    for stem in STEMS:
        up, down = pair(model, stem)
        if kohya:
            name = f"lora_unet_{stem.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        else:
            tensors |= {
                f"diffusion_model.{stem}.lora_A.weight": down,
                f"diffusion_model.{stem}.lora_B.weight": up,
            }
    save_file(tensors, tmp_path / "a.safetensors")
    stock = comfy.sd.load_lora_for_models(model, None, dict(tensors), 0.7, 0)[0]
    ours, _ = load_lora(model, tmp_path / "a.safetensors", Strengths(0.7))
    for stem in STEMS:
        assert error(weight(stock, stem), weight(ours, stem)) <= TOLERANCE
        assert error(weight(stock, stem), weight(model, stem)) > 0.01


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["q, k, v", "loha", "lokr", "dora over columns", "difference"])
def test_the_stock_loader_takes_what_convert_writes(
    kind: str, strength: float, model: ModelPatcher, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    height, width = transformer_shapes(model.model.config)[f"{SHARED}.weight"]
    up, down = pair(model, SHARED)
    name = f"base_model.model.{SHARED}"
    if kind == "q, k, v":
        tensors = {}
        sections = {"to_q": height, "to_k": 96, "to_v": 32, "to_gate": height // 32}
        for index, (word, rows) in enumerate(sections.items()):
            stem = f"transformer.{MODAL.replace('linear_qkv', word)}"
            tensors |= {
                f"{stem}.lora_A.weight": random(RANK, height),
                f"{stem}.lora_B.weight": random(rows, RANK),
            }
            tensors[f"{stem}.alpha"] = torch.tensor(1.0 + index)
    elif kind == "loha":
        parts = {
            "w1_a": up,
            "w1_b": down,
            "w2_a": random(*up.shape, seed=1),
            "w2_b": random(*down.shape, seed=2),
        }
        tensors = {f"{name}.hada_{part}": tensor for part, tensor in parts.items()}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    elif kind == "lokr":
        tensors = {f"{name}.lokr_w1": random(2, 4), f"{name}.lokr_w2": random(height // 2, width // 4)}
    elif kind == "dora over columns":
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.dora_scale"] = random(1, width).abs() + 0.5
    else:
        tensors = {f"{name}.diff": random(height, width)}
    save_file(tensors, source)
    convert_lora(open_lora(source), target, model.model.config)
    stock = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(target)), strength, 0)[
        0
    ]
    ours, _ = load_lora(model, source, Strengths(strength))
    stem = MODAL if kind == "q, k, v" else SHARED
    assert error(weight(stock, stem), weight(ours, stem)) <= TOLERANCE
    assert error(weight(stock, stem), weight(model, stem)) > 0.01


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's only folder of LoRAs."""
    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    return folder


def test_the_node_loads_a_file_of_the_folder(model: ModelPatcher, loras: Path) -> None:
    write(loras / "sub" / "a.safetensors", model)
    assert HappyHorseLoraLoader.define_schema().inputs[1].options == ["sub/a.safetensors"]
    patched, report = HappyHorseLoraLoader.execute(model, "sub\\a.safetensors", 0.5, audio=0.0).args
    assert "strength 0.5:audio=0, 2 weights changed" in report
    assert not torch.equal(weight(patched, SHARED), weight(model, SHARED))


def test_the_fingerprint_changes_with_the_file(model: ModelPatcher, loras: Path) -> None:
    assert HappyHorseLoraLoader.fingerprint_inputs("a.safetensors") == "missing"
    assert HappyHorseLoraLoader.fingerprint_inputs(None) == "missing"  # it comes by a link
    write(loras / "a.safetensors", model)
    first = HappyHorseLoraLoader.fingerprint_inputs("a.safetensors", strength=1.0)
    save_file({"x": torch.zeros(3)}, loras / "a.safetensors")
    assert first not in ("missing", HappyHorseLoraLoader.fingerprint_inputs("a.safetensors"))


@pytest.mark.parametrize(
    "name", ["b.safetensors", "../secret.safetensors", "/etc/passwd", "", "  ", "a\0b", 3, "x" * 5000]
)
def test_a_name_that_is_not_in_the_folder_is_one_sentence(name: Any, loras: Path) -> None:
    (loras.parent / "secret.safetensors").write_bytes(b"")
    answer = HappyHorseLoraLoader.validate_inputs(lora_name=name)
    assert isinstance(answer, str) and ("is not in" in answer or "must be the name" in answer)
    with pytest.raises(FileNotFoundError):
        HappyHorseLoraLoader.execute(None, name, 1.0)


def test_an_input_with_a_link_is_not_checked_and_bad_blocks_are_told(
    model: ModelPatcher, loras: Path
) -> None:
    write(loras / "a.safetensors", model)
    assert HappyHorseLoraLoader.validate_inputs(lora_name=None) is True
    assert HappyHorseLoraLoader.validate_inputs(lora_name="a.safetensors") is True
    with pytest.raises(ValueError, match=r"blocks must be layers with weights.*got 'first'"):
        HappyHorseLoraLoader.execute(model, "a.safetensors", 1.0, blocks="first")


@pytest.mark.parametrize("name", ["a.safetensors", "none.safetensors"])
def test_the_host_tells_a_missing_file_once_and_on_its_input(
    name: str, model: ModelPatcher, loras: Path
) -> None:
    write(loras / "a.safetensors", model)
    inputs = {"model": ["0", 0], "lora_name": name, "strength": 1.0, "blocks": "0-3"}
    prompt = {"1": {"class_type": "HappyHorseLoraLoader", "inputs": inputs}}
    prompt["0"] = {"class_type": "Model", "inputs": {}}
    source = type("Model", (), {
        "RETURN_TYPES": ("MODEL",), "INPUT_TYPES": classmethod(lambda _: {"required": {}}),
    })  # fmt: skip
    known = {"HappyHorseLoraLoader": HappyHorseLoraLoader, "Model": source}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "NODE_CLASS_MAPPINGS", known)
        _, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "1", {}))
    told = [error["details"] for error in errors]
    if name == "a.safetensors":
        assert told == []
    else:
        assert len(told) == 1 and told[0].startswith("lora_name - the LoRA 'none.safetensors' is not in")


def test_the_report_is_shown_on_the_node(
    model: ModelPatcher, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = transformer_shapes(model.model.config)[f"{SHARED}.weight"]
    save_file({f"{SHARED}.diff": random(*shape)}, loras / "a.safetensors")
    shown: list[str] = []
    monkeypatch.setattr("happyhorse.nodes.lora.show", shown.append)
    result = HappyHorseLoraLoader.execute(model, "a.safetensors", 0.5)
    assert shown == [result.args[1]] and result.ui.as_dict()["text"] == (result.args[1],)
    assert "in 1 tensor\n1 of 1 matched: 1 down_proj\nlayer 2; shared: 1" in shown[0]
    assert shown[0].endswith("strength 0.5, 1 weight changed")


def test_a_model_of_another_family_is_one_sentence(model: ModelPatcher, loras: Path) -> None:
    write(loras / "a.safetensors", model)
    with pytest.raises(ValueError, match="model"):
        HappyHorseLoraLoader.execute(SimpleNamespace(model=object()), "a.safetensors", 1.0)


def test_a_lora_of_another_model_is_one_sentence(model: ModelPatcher, loras: Path) -> None:
    save_file({"double_blocks.0.lora_A.weight": random(2, 3), "double_blocks.0.lora_B.weight": random(3, 2)},
              loras / "a.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="none of its 1 layer "):
        HappyHorseLoraLoader.execute(model, "a.safetensors", 1.0)
