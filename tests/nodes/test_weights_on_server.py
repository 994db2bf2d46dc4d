"""Quantised files and LoRAs on a real server: stock loaders beside ours, and files that are no use."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from host import Client, Prompt
from safetensors.torch import load_file, save_file
from torch import Tensor

from happyhorse.model.checkpoint import open_checkpoint
from happyhorse.model.convert import convert, suffix_of

NAME = "block.layers.2.attention.linear_qkv"
SEEDS = itertools.count()
MODELS, LORAS = "models/diffusion_models", "models/loras"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def prompt(model: str, **lora: Any) -> Prompt:
    """A film's latents, kept in a file; `lora` is the node behind the model."""
    nodes = {
        "model": node("HappyHorseLoadModel", model=model, weight_dtype="default", variant="auto"),
        "clip": node("HappyHorseLoadTextEncoder", text_encoder="pony", weight_dtype="default",
                     device="default"),
        "text": node("HappyHorseTextEncode", clip=["clip", 0], prompt="a red circle bounces slow ."),
        "film": node("HappyHorseEmptyLatent", aspect="custom", width=64, height=32, seconds=0.2,
                     batch_size=1),
        "sampled": node("HappyHorseSampler", model=["lora" if lora else "model", 0], positive=["text", 0],
                        latent=["film", 0], seed=1, steps=2, denoise=1.0),
        "kept": node("HappyHorseSaveLatent", latent=["sampled", 0], filename_prefix=f"latents/{next(SEEDS)}"),
    }  # fmt: skip
    if lora:
        nodes["lora"] = node(lora.pop("kind"), model=["model", 0], **lora)
    return nodes


def video(client: Client, nodes: Prompt) -> Tensor:
    (file,) = client.run(nodes).files
    return load_file(file)["video"]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def loras(pony_folder: Path) -> dict[str, dict[str, Tensor]]:
    """One change in the two families of names that the stock loader takes."""
    rows, columns = open_checkpoint(pony_folder / "distill").shape(f"{NAME}.weight")
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(rows, 4, generator=generator) / 4, torch.randn(4, columns, generator=generator) / 8
    kohya = f"lora_unet_{NAME.replace('.', '_')}"
    return {
        "peft": {f"diffusion_model.{NAME}.lora_A.weight": down, f"diffusion_model.{NAME}.lora_B.weight": up},
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up,
                  f"{kohya}.alpha": torch.tensor(4.0)},
    }  # fmt: skip


@pytest.mark.parametrize("to", ["fp8", "q4_0"])
@pytest.mark.parametrize("family", ["peft", "kohya"])
def test_the_stock_lora_loader_and_ours_make_one_film(
    client: Client, pony_folder: Path, loras: dict[str, dict[str, Tensor]], family: str, to: str
) -> None:
    base, name = client.server.base, f"distill-{to}{suffix_of(to)}"
    for folder in (MODELS, LORAS):
        (base / folder).mkdir(parents=True, exist_ok=True)
    convert(open_checkpoint(pony_folder / "distill"), base / MODELS / name, to, "test")
    save_file(loras[family], base / LORAS / f"{family}.safetensors")
    chosen = {"lora_name": f"{family}.safetensors"}
    stock = video(client, prompt(name, kind="LoraLoaderModelOnly", **chosen, strength_model=0.8))
    ours = video(client, prompt(name, kind="HappyHorseLoraLoader", **chosen, strength=0.8))
    plain = video(client, prompt(name))
    assert difference(ours, plain) > 1e-2
    assert difference(stock, ours) < 1e-5
    none = video(client, prompt(name, kind="HappyHorseLoraLoader", **chosen, strength=0.0))
    assert torch.equal(none, plain)


def cut_gguf(source: Path, path: Path) -> None:
    convert(open_checkpoint(source), path, "q8_0", "test")
    path.write_bytes(path.read_bytes()[:-1000])


def unknown_format(source: Path, path: Path) -> None:
    convert(open_checkpoint(source), path, "fp8", "test")
    state, checkpoint = load_file(path), open_checkpoint(path)
    state[f"{NAME}.comfy_quant"] = torch.tensor(
        list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8
    )
    save_file(state, path, dict(checkpoint.file.metadata))


def no_scale(source: Path, path: Path) -> None:
    convert(open_checkpoint(source), path, "fp8", "test")
    state, checkpoint = load_file(path), open_checkpoint(path)
    del state[f"{NAME}.weight_scale"]
    save_file(state, path, dict(checkpoint.file.metadata))


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (cut_gguf, "distill-cut.gguf", ("distill-cut.gguf", "download it again")),
        (unknown_format, "distill-nvfp4.safetensors", (f"{NAME}.weight", "'nvfp4'", "accepted are")),
        (no_scale, "distill-bare.safetensors", (f"{NAME}.weight", "its scale is missing", "download")),
    ],
)
def test_a_quantised_file_that_is_no_use_is_one_sentence(
    client: Client, pony_folder: Path, make: Any, name: str, said: tuple[str, ...]
) -> None:
    (client.server.base / MODELS).mkdir(parents=True, exist_ok=True)
    make(pony_folder / "distill", client.server.base / MODELS / name)
    message = client.error_of(prompt(name))
    assert all(words in message for words in said), message
    assert client.run(prompt("pony: distill")).files


def test_a_lora_of_another_model_is_one_sentence(client: Client) -> None:
    (client.server.base / LORAS).mkdir(parents=True, exist_ok=True)
    other = {"unet.down.0.lora_A.weight": torch.ones(2, 8), "unet.down.0.lora_B.weight": torch.ones(8, 2)}
    save_file(other, client.server.base / LORAS / "other.safetensors")
    chosen = {"kind": "HappyHorseLoraLoader", "lora_name": "other.safetensors", "strength": 1.0}
    message = client.error_of(prompt("pony: distill", **chosen))
    assert "other.safetensors" in message and "unet.down.0" in message and "block.layers" in message, message
    assert client.run(prompt("pony: distill")).files
