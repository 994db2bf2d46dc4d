"""The Load nodes, in this process and on a server."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
from comfy_api.latest import io
from host import Client, PromptError

from happyhorse import pony
from happyhorse.nodes import loader

FILE_INPUT = {
    "HappyHorseLoadModel": "model",
    "HappyHorseLoadTextEncoder": "text_encoder",
    "HappyHorseLoadVideoVAE": "vae",
    "HappyHorseLoadAudioVAE": "audio_vae",
}
OUTPUT = {
    "HappyHorseLoadModel": "MODEL",
    "HappyHorseLoadTextEncoder": "CLIP",
    "HappyHorseLoadVideoVAE": "VAE",
    "HappyHorseLoadAudioVAE": "VAE",
}
nodes = pytest.mark.parametrize("node", loader.NODES, ids=lambda node: node.__name__)


@pytest.fixture
def cached_pony(pony_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in pony is that of all tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "happyhorse" / f"pony-{pony.version()}"
    home.parent.mkdir(parents=True)
    home.symlink_to(pony_folder, target_is_directory=True)


def load(node: type[io.ComfyNode], **inputs: Any) -> Any:
    """What a node puts out, its other widgets at their defaults."""
    defaults = {
        item.id: item.default or item.options[0]
        for item in node.define_schema().inputs
        if item.id not in inputs
    }
    return node.execute(**defaults, **inputs).args[0]


@nodes
def test_the_schema_is_complete(node: type[io.ComfyNode]) -> None:
    schema = node.define_schema()
    assert schema.category == "HappyHorse/load" and schema.description and schema.search_aliases
    assert all(item.tooltip for item in [*schema.inputs, *schema.outputs])
    assert [output.io_type for output in schema.outputs] == [OUTPUT[schema.node_id]]
    assert schema.inputs[0].id == FILE_INPUT[schema.node_id]
    assert schema.inputs[0].options[0].startswith("pony")


@nodes
def test_only_the_file_is_checked_by_the_node_itself(node: type[io.ComfyNode]) -> None:
    (name,) = inspect.signature(node.validate_inputs).parameters
    assert name == FILE_INPUT[node.define_schema().node_id]


@nodes
def test_a_missing_file_is_one_sentence_before_the_prompt_runs(node: type[io.ComfyNode]) -> None:
    name = FILE_INPUT[node.define_schema().node_id]
    assert node.validate_inputs(**{name: None}) is True  # a link
    assert node.validate_inputs(**{name: "pony"}) is True
    told = node.validate_inputs(**{name: "nothing.safetensors"})
    assert "'nothing.safetensors' is not in" in told and "huggingface.co/" in told


@nodes
def test_a_node_runs_again_when_its_file_is_replaced(node: type[io.ComfyNode]) -> None:
    schema = node.define_schema()
    kind = {"LoadModel": "diffusion_models", "LoadTextEncoder": "text_encoders"}.get(
        schema.node_id.removeprefix("HappyHorse"), "vae"
    )
    file = Path(folder_paths.get_folder_paths(kind)[0]) / "replaced.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    widgets = {item.id: item.default for item in schema.inputs} | {FILE_INPUT[schema.node_id]: file.name}
    prints = []
    for content in (b"one", b"three"):
        file.write_bytes(content)
        prints.append(node.fingerprint_inputs(**widgets))
    file.unlink()
    assert prints[0] != prints[1]


@nodes
def test_a_file_that_comes_by_a_link_is_loaded_once(node: type[io.ComfyNode]) -> None:
    schema = node.define_schema()
    widgets = {item.id: item.default for item in schema.inputs} | {FILE_INPUT[schema.node_id]: None}
    assert node.fingerprint_inputs(**widgets) == node.fingerprint_inputs(**widgets)


@pytest.mark.usefixtures("cached_pony")
@pytest.mark.parametrize("variant", ["base", "distill", "540p_sr", "1080p_sr"])
def test_every_variant_of_the_pony_loads(variant: str) -> None:
    assert load(loader.HappyHorseLoadModel, model=f"pony: {variant}").model.variant == variant


@pytest.mark.usefixtures("cached_pony")
def test_the_other_ponies_load() -> None:
    assert isinstance(load(loader.HappyHorseLoadTextEncoder, text_encoder="pony"), comfy.sd.CLIP)
    assert isinstance(load(loader.HappyHorseLoadAudioVAE, audio_vae="pony"), comfy.sd.VAE)
    wan, turbo = (load(loader.HappyHorseLoadVideoVAE, vae=name) for name in ("pony", "pony: turbo"))
    assert isinstance(wan, comfy.sd.VAE) and isinstance(turbo, comfy.sd.VAE)
    assert type(wan.first_stage_model) is not type(turbo.first_stage_model)


def test_a_file_of_the_host_loads_under_either_slash(pony_folder: Path) -> None:
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0]) / "mine"
    shutil.copytree(pony_folder / "base", folder / "base")
    for choice in ("mine/base", "mine\\base", "mine/base/model.safetensors"):
        assert load(loader.HappyHorseLoadModel, model=choice).model.variant == "base"
    shutil.rmtree(folder)


def test_a_variant_that_the_file_contradicts_is_refused(pony_folder: Path) -> None:
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0]) / "wrong"
    shutil.copytree(pony_folder / "base", folder)
    with pytest.raises(ValueError, match=r"'base'.*'distill' is asked for"):
        load(loader.HappyHorseLoadModel, model="wrong", variant="distill")
    shutil.rmtree(folder)


def prompt(kind: str, **inputs: Any) -> dict[str, dict[str, Any]]:
    """A prompt that loads one part and looks at it."""
    return {
        "1": {"class_type": kind, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


WIDGETS = {
    "HappyHorseLoadModel": {"weight_dtype": "default", "variant": "auto"},
    "HappyHorseLoadTextEncoder": {"weight_dtype": "default", "device": "default"},
    "HappyHorseLoadVideoVAE": {"weight_dtype": "default"},
    "HappyHorseLoadAudioVAE": {},
}


@pytest.mark.parametrize("kind", FILE_INPUT)
def test_the_pony_loads_on_a_server(client: Client, kind: str) -> None:
    told = client.object_info()[kind]
    options = told["input"]["required"][FILE_INPUT[kind]][1]["options"]
    assert options[0].startswith("pony")
    client.run(prompt(kind, **{FILE_INPUT[kind]: options[0]}, **WIDGETS[kind]))


@pytest.mark.parametrize("kind", FILE_INPUT)
def test_a_missing_file_is_told_in_the_dialog(client: Client, kind: str) -> None:
    with pytest.raises(PromptError, match=r"'lost\.safetensors' is not in .*huggingface.co/"):
        client.run(prompt(kind, **{FILE_INPUT[kind]: "lost.safetensors"}, **WIDGETS[kind]))


def test_a_wrong_choice_of_another_widget_is_still_refused(client: Client) -> None:
    widgets = WIDGETS["HappyHorseLoadModel"] | {"weight_dtype": "int3"}
    with pytest.raises(PromptError, match="weight_dtype"):
        client.run(prompt("HappyHorseLoadModel", model="pony: distill", **widgets))
