"""How films behave on a real server: progress, previews, interruption, caching, queueing, stock nodes."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from host import Client, Prompt, PromptError, Run
from PIL import Image
from safetensors.torch import load_file

SIZE = 128
FRAMES = 5  # of a film of 0.2 s
LOADERS = {"model", "clip", "vae", "audio_vae"}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of the API format; a string "name.1" that names a node and an output is a link."""
    links = {k: _link(v) for k, v in inputs.items()}
    return {"class_type": kind, "inputs": links}


def _link(value: Any) -> Any:
    if isinstance(value, str) and value[:1] == "@":
        name, _, output = value[1:].partition(".")
        return [name, int(output or 0)]
    return value


def latents(
    seed: int = 1,
    steps: int = 2,
    seconds: float = 0.2,
    side: int = SIZE,
    batch: int = 1,
    vae: str = "pony: turbo",
) -> Prompt:
    """Everything up to the sampler of a film from a text."""
    return {
        "model": node("HappyHorseLoadModel", model="pony: distill", weight_dtype="default", variant="auto"),
        "clip": node("HappyHorseLoadTextEncoder", text_encoder="pony", weight_dtype="default", device="cpu"),
        "vae": node("HappyHorseLoadVideoVAE", vae=vae, weight_dtype="default"),
        "audio_vae": node("HappyHorseLoadAudioVAE", audio_vae="pony"),
        "text": node("HappyHorseTextEncode", clip="@clip", prompt="a red circle bounces slow ."),
        "empty": node(
            "HappyHorseEmptyLatent",
            aspect="custom",
            width=side,
            height=side,
            seconds=seconds,
            batch_size=batch,
        ),
        "sampler": sampler("@empty", seed, steps),
    }


def sampler(latent: str, seed: int, steps: int) -> dict[str, Any]:
    inputs = {"model": "@model", "positive": "@text", "latent": latent, "seed": seed, "steps": steps}
    return node("HappyHorseSampler", denoise=1.0, **inputs)


def film(prefix: str = "behaviour", **options: Any) -> Prompt:
    """A film from a text, decoded while it is saved."""
    return latents(**options) | {
        "decode": node("HappyHorseDecodeVideo", latent="@sampler", vae="@vae", audio_vae="@audio_vae"),
        "save": save_video("@decode", prefix),
    }


def save_video(video: str, prefix: str) -> dict[str, Any]:
    return node("SaveVideo", video=video, filename_prefix=prefix, format="auto", codec="auto")


def keep(latent: str, prefix: str) -> dict[str, Any]:
    return node("HappyHorseSaveLatent", latent=latent, filename_prefix=f"latents/{prefix}")


def images(run: Run) -> list[np.ndarray]:
    """The pictures that a prompt saved, (Y, X, 3)."""
    return [np.asarray(Image.open(file).convert("RGB")) for file in run.files if file.suffix == ".png"]


def frames(file: Path) -> np.ndarray:
    """The pictures of a film (F, Y, X, 3)."""
    with av.open(str(file)) as opened:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def coarse(pictures: np.ndarray) -> np.ndarray:
    """Means of 16 x 16 pixels of (F, Y, X, 3)."""
    count, height, width, _ = pictures.shape
    return pictures.reshape(count, height // 16, 16, width // 16, 16, 3).mean(axis=(2, 4))


def progress_of(run: Run, name: str) -> list[tuple[int, int]]:
    """(value, max) of all progress of a node, in order."""
    return [(data["value"], data["max"]) for data in run.of("progress") if data["node"] == name]


def wait_for(client: Client, name: str, value: int = 1, seconds: float = 60) -> None:
    """Return when a node has come as far as `value`; 0: when it has begun."""
    for event in client.events(time.monotonic() + seconds):
        if isinstance(event, bytes) or event["data"].get("node") != name:
            continue
        if event["type"] == "executing" and value == 0:
            return
        if event["type"] == "progress" and event["data"]["value"] >= value:
            return


def events_for(client: Client, seconds: float) -> list[Any]:
    """All that comes in the next seconds."""
    found = []
    try:
        for event in client.events(time.monotonic() + seconds):
            found.append(event)
    except TimeoutError:
        return found
    return found


def files_of(client: Client, *folders: str) -> set[Path]:
    """All files below folders of the server's base directory."""
    found = (file for folder in folders for file in (client.server.base / folder).rglob("*"))
    return {file for file in found if file.is_file()}


def test_progress_reaches_the_last_step_of_loaders_sampler_and_decoder(client: Client) -> None:
    client.free()
    run = client.run(film(seed=11, steps=3))
    assert progress_of(run, "sampler") == [(1, 3), (2, 3), (3, 3)]
    for name in (*LOADERS, "save"):
        told = progress_of(run, name)
        assert told and told[-1][0] == told[-1][1], (name, told)
        assert told == sorted(told), name
    assert progress_of(run, "save")[-1] == (FRAMES, FRAMES)


def test_previews_play_several_frames_of_every_step(client: Client) -> None:
    steps = 3
    # large enough that a step takes longer than a frame is shown
    prompt = latents(seed=12, steps=steps, seconds=5, side=320) | {"keep": keep("@sampler", "previews")}
    run = client.run(prompt)
    assert len(progress_of(run, "sampler")) == steps
    shown: dict[int, set[bytes]] = {}  # pictures, by the steps that were done
    for picture, at in zip(run.previews, run.previews_at, strict=True):
        done = len(progress_of(replace(run, events=run.events[:at]), "sampler"))
        shown.setdefault(done, set()).add(picture)
    assert all(len(shown[done]) > 1 for done in range(1, steps)), {d: len(p) for d, p in shown.items()}
    assert all(picture[:2] == b"\xff\xd8" for picture in run.previews)


def test_interruption_ends_a_step_and_the_next_prompt_works(client: Client) -> None:
    client.run(film(seed=13))
    before = files_of(client, "output", "temp")
    client_id = client.post(film(seed=14, steps=50, seconds=10, side=512))
    wait_for(client, "sampler", 0)
    time.sleep(1)
    client.interrupt()
    asked = time.monotonic()
    run = client.follow(client_id)
    waited = time.monotonic() - asked
    assert run.of("execution_interrupted")
    assert run.of("execution_interrupted")[0]["node_id"] == "sampler"
    assert not progress_of(run, "sampler"), "a whole step was made: make the film of this test larger"
    assert waited < 5
    assert run.history["status"]["status_str"] == "error"
    assert files_of(client, "output", "temp") == before
    assert frames(client.run(film(seed=15)).files[0]).shape == (FRAMES, SIZE, SIZE, 3)


def test_no_preview_is_played_after_an_interruption(client: Client) -> None:
    def interrupted(seed: int) -> int:
        prompt_id = client.post(film(seed=seed, steps=200, seconds=2, side=256))
        wait_for(client, "sampler")
        time.sleep(0.5)  # the player is at work
        client.interrupt()
        assert client.follow(prompt_id).of("execution_interrupted")
        late = events_for(client, 1)
        assert not [event for event in late if isinstance(event, bytes)]
        assert not [
            event for event in late if not isinstance(event, bytes) and event["type"].startswith("progress")
        ]
        return psutil.Process(client.server.process.pid).num_threads()

    interrupted(21)
    first = interrupted(22)
    assert interrupted(23) <= first
    client.run(film(seed=24))


def test_interrupting_the_decoding_leaves_no_half_film(client: Client) -> None:
    client.run(film(seed=31))
    before = files_of(client, "output", "temp")
    prompt_id = client.post(film(seed=32, steps=1, seconds=4, side=256))
    wait_for(client, "save")
    client.interrupt()
    run = client.follow(prompt_id)
    assert run.of("execution_interrupted")[0]["node_id"] == "save"
    assert files_of(client, "output", "temp") == before
    assert len(client.run(film(seed=33)).files) == 1


def test_a_repeated_prompt_runs_no_node_again(client: Client) -> None:
    first = client.run(film(seed=41))
    assert set(first.executed) >= {"sampler", "decode", "save"}
    again = client.run(film(seed=41))
    assert again.executed in ([], ["save"])  # as the host does with its output nodes
    assert set(again.of("execution_cached")[0]["nodes"]) >= {"sampler", "decode", *LOADERS}


def test_another_decoder_runs_only_itself_and_what_follows(client: Client) -> None:
    client.run(film(seed=42))
    other = film(seed=42) | {"other": node("HappyHorseLoadVideoVAE", vae="pony", weight_dtype="default")}
    other["decode"]["inputs"]["vae"] = ["other", 0]
    del other["vae"]
    assert set(client.run(other).executed) == {"other", "decode", "save"}


def test_another_seed_loads_nothing_again(client: Client) -> None:
    client.run(film(seed=43))
    again = client.run(film(seed=44))
    assert set(again.executed) == {"sampler", "decode", "save"}
    assert not [data for data in again.of("progress") if data["node"] in LOADERS]


@pytest.mark.parametrize(
    ("name", "socket", "file", "said"),
    [
        ("model", "model", "nothing_distill.safetensors", ("diffusion_models", "huggingface.co")),
        ("clip", "text_encoder", "nothing_t5gemma", ("text_encoders", "huggingface.co")),
        ("vae", "vae", "nothing_wan2.2.pth", ("vae", "huggingface.co")),
        ("audio_vae", "audio_vae", "nothing_audio.safetensors", ("vae", "huggingface.co")),
    ],
)
def test_a_file_that_is_not_there_is_refused_with_its_folder_and_source(
    client: Client, name: str, socket: str, file: str, said: tuple[str, ...]
) -> None:
    prompt = film(seed=51)
    prompt[name]["inputs"][socket] = file
    with pytest.raises(PromptError) as caught:
        client.post(prompt)
    (problem,) = caught.value.detail["node_errors"][name]["errors"]
    text = f"{problem['message']} {problem['details']}"
    assert file in text and socket.replace("_", " ").split()[-1] in text
    for words in said:
        assert words in text
    assert client.run(film(seed=52)).files


@pytest.mark.parametrize(
    ("name", "socket", "value"),
    [
        ("empty", "seconds", 31.0),
        ("empty", "seconds", 0.1),
        ("empty", "width", 0),
        ("empty", "height", 4128),
        ("empty", "batch_size", 0),
        ("empty", "aspect", "2:1"),
        ("sampler", "steps", 1_000_000),
        ("sampler", "steps", -1),
        ("sampler", "denoise", 0.0),
        ("sampler", "denoise", 1.5),
        ("sampler", "seed", -1),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(
    client: Client, name: str, socket: str, value: Any
) -> None:
    prompt = film(seed=53)
    prompt[name]["inputs"][socket] = value
    with pytest.raises(PromptError) as caught:
        client.post(prompt)
    (problem,) = caught.value.detail["node_errors"][name]["errors"]
    assert problem["extra_info"]["input_name"] == socket
    assert problem["type"] in ("value_bigger_than_max", "value_smaller_than_min", "value_not_in_list")


def test_a_damaged_model_does_not_break_the_next_prompt(client: Client) -> None:
    folder = client.server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "damaged_distill.safetensors").write_bytes(b"not a model at all")
    prompt = film(seed=54)
    prompt["model"]["inputs"]["model"] = "damaged_distill.safetensors"
    assert "damaged_distill.safetensors" in client.error_of(prompt)
    assert client.run(film(seed=55)).files


def test_after_free_the_same_film_is_made_anew(client: Client) -> None:
    first = client.run(film(seed=61))
    client.free()
    again = client.run(film(seed=61))
    assert set(again.executed) == set(film())
    assert np.array_equal(frames(first.files[0]), frames(again.files[0]))


def test_two_queued_prompts_run_one_after_the_other(client: Client) -> None:
    first, second = (client.post(film(seed=seed, steps=4)) for seed in (62, 63))
    runs = [client.follow(prompt_id) for prompt_id in (first, second)]
    assert all(run.of("execution_success") and run.files for run in runs)
    end = runs[0].of("execution_success")[0]["timestamp"]
    assert runs[1].of("execution_start")[0]["timestamp"] >= end


def test_streamed_and_whole_films_have_the_same_frames(client: Client) -> None:
    prompt = film("streamed", seed=71, seconds=1) | {
        "whole": node("HappyHorseDecode", latent="@sampler", vae="@vae", audio_vae="@audio_vae"),
        "video": node("CreateVideo", images="@whole.0", audio="@whole.1", fps="@whole.2"),
        "save_whole": save_video("@video", "whole"),
        "parts": node("GetVideoComponents", video="@decode"),
        "pictures": node("SaveImage", images="@parts", filename_prefix="streamed"),
        "pictures_whole": node("SaveImage", images="@whole", filename_prefix="whole"),
    }
    run = client.run(prompt)
    films = {file.name.split("_")[0]: file for file in run.files if file.suffix == ".mp4"}
    streamed, whole = frames(films["streamed"]), frames(films["whole"])
    assert streamed.shape == whole.shape == (25, SIZE, SIZE, 3)
    pictures = {key: [f for f in run.files if f.suffix == ".png" and f.name.startswith(key)] for key in films}
    ours, stock = (
        np.stack([np.asarray(Image.open(file)) for file in pictures[key]]) for key in ("streamed", "whole")
    )
    assert len(ours) == 25 and np.array_equal(ours, stock)
    # the two encoders' settings differ, and noise suffers most: its coarse structure must not
    assert psnr(coarse(streamed), coarse(whole)) > 35
    assert psnr(coarse(streamed), coarse(ours)) > 35


def test_a_batch_of_two_comes_out_of_decode_one_after_the_other(client: Client) -> None:
    prompt = latents(seed=72, batch=2) | {
        "whole": node("HappyHorseDecode", latent="@sampler", vae="@vae", audio_vae="@audio_vae"),
        "pictures": node("SaveImage", images="@whole", filename_prefix="batch"),
        "sound": node("SaveAudio", audio="@whole.1", filename_prefix="batch"),
    }
    run = client.run(prompt)
    made = images(run)
    assert len(made) == 2 * FRAMES
    assert not np.array_equal(made[0], made[FRAMES])
    (sound,) = (file for file in run.files if file.suffix == ".flac")
    with av.open(str(sound)) as opened:
        assert sum(frame.samples for frame in opened.decode(audio=0)) == 2 * FRAMES * 44100 // 25


def test_stock_nodes_save_and_play_the_sound(client: Client) -> None:
    prompt = latents(seed=73, seconds=1) | {
        "whole": node("HappyHorseDecode", latent="@sampler", vae="@vae", audio_vae="@audio_vae"),
        "save": node("SaveAudio", audio="@whole.1", filename_prefix="sound"),
        "play": node("PreviewAudio", audio="@whole.1"),
    }
    files = client.run(prompt).files
    assert len(files) == 2
    for file in files:
        with av.open(str(file)) as opened:
            assert opened.streams.audio[0].rate == 44100
            assert opened.streams.audio[0].channels == 2
            assert sum(frame.samples for frame in opened.decode(audio=0)) == 44100


def test_stock_tiled_decoding_of_the_separated_stream(client: Client) -> None:
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    prompt = latents(seed=74) | {
        "split": node("LTXVSeparateAVLatent", av_latent="@sampler"),
        "tiled": node("VAEDecodeTiled", samples="@split.0", vae="@vae", **tiles),
        "nested": node("VAEDecodeTiled", samples="@sampler", vae="@vae", **tiles),
        "sound": node("VAEDecodeAudio", samples="@split.1", vae="@audio_vae"),
        "save": node("SaveImage", images="@tiled", filename_prefix="tiled"),
        "save_nested": node("SaveImage", images="@nested", filename_prefix="tiled"),
        "save_sound": node("SaveAudio", audio="@sound", filename_prefix="tiled"),
    }
    run = client.run(prompt)
    made = images(run)
    assert [picture.shape for picture in made] == [(SIZE, SIZE, 3)] * 2 * FRAMES
    assert np.array_equal(np.stack(made[:FRAMES]), np.stack(made[FRAMES:]))


def test_stock_set_latent_noise_mask_holds_the_picture(client: Client) -> None:
    prompt = latents(seed=75) | {
        "split": node("LTXVSeparateAVLatent", av_latent="@sampler"),
        "mask": node("SolidMask", value=0.0, width=SIZE, height=SIZE),
        "held": node("SetLatentNoiseMask", samples="@split.0", mask="@mask"),
        "joined": node("LTXVConcatAVLatent", video_latent="@held", audio_latent="@split.1"),
        "again": sampler("@joined", 76, 2),
        "first": keep("@sampler", "first"),
        "second": keep("@again", "second"),
    }
    files = {file.name.split("_")[0]: load_file(file) for file in client.run(prompt).files}
    assert (files["first"]["video"] - files["second"]["video"]).abs().max() < 1e-5
    assert (files["first"]["audio"] - files["second"]["audio"]).abs().max() > 0.1
