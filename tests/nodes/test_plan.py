"""The node that tells what memory a film will take, on real MODELs; the host's numbers are put in."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy_execution.utils
import pytest
import torch

from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.geometry import FilmShape
from happyhorse.model.prompt import TEXT_LIMIT
from happyhorse.nodes import plan, prompt
from happyhorse.nodes.audio_vae import load_audio_vae
from happyhorse.nodes.latent import HappyHorseEmptyLatent
from happyhorse.nodes.model import load_model
from happyhorse.nodes.plan import HappyHorseMemoryPlan, Load, model_load
from happyhorse.nodes.text_encoder import load_clip
from happyhorse.nodes.vae import load_video_vae
from happyhorse.sampler.activations import SMALL_TENSORS, transformer_activations

pytestmark = pytest.mark.host
FILM = {"width": 128, "height": 96, "seconds": 1.0, "size": "540p"}


@pytest.fixture(scope="module")
def models(pony_folder: Path) -> dict[str, Any]:
    return {name: load_model(pony_folder / name, None, "float32") for name in ("distill", "540p_sr")}


def test_the_text_is_the_output_and_is_shown(models: dict[str, Any]) -> None:
    result = HappyHorseMemoryPlan.execute(models["distill"], **FILM)
    assert result.ui.as_dict() == {"text": (result[0],)}
    title, device, *_, head, base = result[0].splitlines()
    assert (
        title == "128x96, 1 s: fits on the device" and device.startswith("cpu: ") and "computed" in result[0]
    )
    assert head.split() == ["stage", "weights", "working", "peak", "how"]
    assert base.startswith("base") and base.endswith("all on the device")


def test_the_text_is_drawn_on_the_node_with_its_columns_apart(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import server

    sent = []
    page = SimpleNamespace(send_progress_text=lambda text, node_id: sent.append((text, node_id)))
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    context = comfy_execution.utils.ExecutionContext("prompt", "7", None)
    monkeypatch.setattr(prompt, "get_executing_context", lambda: context)
    text = HappyHorseMemoryPlan.execute(models["distill"], **FILM)[0]
    ((drawn, node),) = sent
    assert node == "7" and drawn.replace("\N{NO-BREAK SPACE}", " ") == text and "  " not in drawn


def test_no_run_is_taken_from_an_earlier_one(models: dict[str, Any]) -> None:
    marks = [HappyHorseMemoryPlan.fingerprint_inputs(model=models["distill"], **FILM) for _ in range(2)]
    assert marks[0] != marks[1] and all(mark == mark for mark in marks)  # no NaN


def test_a_model_of_another_size_is_remarked_on(models: dict[str, Any]) -> None:
    for size in ("540p", "1080p"):
        film = FILM | {"width": 96, "height": 64, "size": size}
        text = HappyHorseMemoryPlan.execute(models["distill"], **film, super_resolution=models["540p_sr"])[0]
        assert ("the model is 540p_sr, but the size is 1080p" in text.splitlines()) == (size == "1080p")


def test_text_and_sound_are_stages_where_they_are_connected(
    models: dict[str, Any], pony_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, sound = load_clip(pony_folder / "text_encoder"), load_audio_vae(pony_folder / "audio_vae")
    text = HappyHorseMemoryPlan.execute(models["distill"], **FILM, clip=clip, audio_vae=sound)[0]
    assert [line.split("  ")[0] for line in text.splitlines()[-3:]] == ["text encoder", "base", "sound"]
    found = plan.encoder_load(clip)
    assert 0 < found.largest < found.weights == clip.patcher.model_size() and found.working > 0
    short, long = (plan.sound_load(sound, FilmShape(128, 96, latents)) for latents in (26, 251))
    assert short.weights == sound.patcher.model_size() and 0 < short.working < long.working
    monkeypatch.setattr(clip.patcher, "load_device", torch.device("meta"))
    text = HappyHorseMemoryPlan.execute(models["distill"], **FILM, clip=clip)[0]
    assert text.splitlines()[-1].startswith("the text encoder runs on meta: ")


def test_the_numbers_are_those_of_the_host_and_of_the_core(models: dict[str, Any], pony_folder: Path) -> None:
    shape = FilmShape(128, 96, 26)
    found, config = model_load("base", models["distill"], shape, films=1), models["distill"].model.config
    state = load(open_checkpoint(pony_folder / "distill"), torch.bfloat16).state_dict()  # as stored
    assert found.weights == pytest.approx(sum(tensor.nbytes for tensor in state.values()), rel=0.001)
    layers = [sum(t.nbytes for n, t in state.items() if n.startswith(f"block.layers.{i}.")) for i in range(6)]
    assert found.largest == max(layers)
    tokens = shape.video_tokens + shape.audio_latents * 64 // 192 + TEXT_LIMIT
    core = SMALL_TENSORS * transformer_activations(config, tokens, 4, torch.device("cpu"))
    assert found.working == pytest.approx(core, rel=0.01)


def test_every_stage_has_a_line_and_a_latent_replaces_the_size(
    models: dict[str, Any], pony_folder: Path
) -> None:
    latent = HappyHorseEmptyLatent.execute("custom", 64, 96, 0.4, 1)[0]
    turbo = load_video_vae(pony_folder / "turbo_vae")
    text = HappyHorseMemoryPlan.execute(
        models["distill"], **FILM, latent=latent, super_resolution=models["540p_sr"], vae=turbo
    )[0]
    assert text.startswith("128x192, ")
    stages = [line.split("  ")[0] for line in text.splitlines()[-3:]]
    assert stages == ["base", "super-resolution", "picture"]


def test_all_films_of_a_latent_are_counted(models: dict[str, Any]) -> None:
    one, four = (
        HappyHorseMemoryPlan.execute(
            models["distill"], **FILM, latent=HappyHorseEmptyLatent.execute("custom", 320, 320, 2.0, films)[0]
        )[0]
        for films in (1, 4)
    )
    assert one.startswith("320x320, ") and four.startswith("4 films of 320x320, ")
    working = [float(text.splitlines()[-1].split()[2]) for text in (one, four)]
    assert working[1] == pytest.approx(4 * working[0], abs=0.03)


@pytest.mark.parametrize(
    ("free", "peak", "how"),
    [
        (40, "33.00", "all on the device"),
        (33, "33.00", "all on the device"),
        (20, "20.00", "17.00 on the device, the rest comes from RAM"),
        (5, "5.00", "2.00 on the device, the rest comes from RAM"),
        (4, "5.00", "does not fit"),
    ],
)
def test_what_does_not_fit_comes_from_ram_layer_by_layer(free: int, peak: str, how: str) -> None:
    gigabyte = 10**9
    load = Load("base", 30 * gigabyte, 3 * gigabyte, 2 * gigabyte)
    assert load.row(free * gigabyte) == ("base", "30.00", "3.00", peak, how)


@pytest.mark.parametrize(
    ("free", "words"),
    [(33, "fits on the device"), (20, "fits with weights in RAM"), (4, "base: does not fit")],
)
def test_the_first_line_says_whether_it_fits(monkeypatch: pytest.MonkeyPatch, free: int, words: str) -> None:
    gigabyte = 10**9
    loads = [Load("base", 30 * gigabyte, 3 * gigabyte, 2 * gigabyte), Load("picture", gigabyte, gigabyte, 0)]
    monkeypatch.setattr(plan, "usable_memory", lambda device: (free * gigabyte, 0))  # noqa: ARG005
    assert plan.verdict(loads, None) == words


def test_memory_of_loaded_models_counts_as_usable(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    management = comfy.model_management
    monkeypatch.setattr(plan.management, "get_free_memory", lambda device: 10**9)  # noqa: ARG005
    management.load_models_gpu([models["distill"]])
    weights = models["distill"].model_size()
    free, loaded = plan.usable_memory(torch.device("cpu"))
    assert loaded >= weights and free == 10**9 + loaded


def test_models_and_vaes_of_other_stages_are_refused(models: dict[str, Any], pony_folder: Path) -> None:
    with pytest.raises(ValueError, match="540p_sr"):
        HappyHorseMemoryPlan.execute(models["540p_sr"], **FILM)
    with pytest.raises(ValueError, match="distill"):
        HappyHorseMemoryPlan.execute(models["distill"], **FILM, super_resolution=models["distill"])
    with pytest.raises(ValueError, match="vae"):
        sound = load_audio_vae(pony_folder / "audio_vae")
        HappyHorseMemoryPlan.execute(models["distill"], **FILM, vae=sound)
    with pytest.raises(ValueError, match="audio_vae"):
        picture = load_video_vae(pony_folder / "turbo_vae")
        HappyHorseMemoryPlan.execute(models["distill"], **FILM, audio_vae=picture)
    with pytest.raises(ValueError, match=r"clip: a T5Gemma encoder is needed"):
        other = SimpleNamespace(cond_stage_model=torch.nn.Identity())
        HappyHorseMemoryPlan.execute(models["distill"], **FILM, clip=other)
