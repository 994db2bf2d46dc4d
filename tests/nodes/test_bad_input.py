"""Wrong input at every socket: the dialog names the socket and the cure, and the next film is made."""

import itertools
import math
import random
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host import Client, Prompt
from safetensors.torch import load_file, safe_open, save_file

from happyhorse.nodes import decoder, latent, prompt, sampler, super_resolution
from happyhorse.nodes.audio_vae import load_audio_vae
from happyhorse.nodes.latents import film_latent
from happyhorse.nodes.model import load_model
from happyhorse.nodes.sampling import CoreSampler
from happyhorse.nodes.text_encoder import load_clip
from happyhorse.nodes.vae import load_video_vae

SEEDS = itertools.count(1000)
TRACES = (
    "Traceback",
    "NoneType",
    "object has no attribute",
    "not enough values",
    "out of range",
    "size of tensor",
)
SIZE = {"aspect": "custom", "width": 64, "height": 32}
ENLARGED = {"size": "custom", "seed": 1, "width": 96, "height": 64}


def node(kind: str, **given: Any) -> dict[str, Any]:
    """A node of the API format; "@name.1" is a link to the second output of a node."""
    return {"class_type": kind, "inputs": {key: _link(value) for key, value in given.items()}}


def _link(value: Any) -> Any:
    if isinstance(value, str) and value[:1] == "@":
        name, _, output = value[1:].partition(".")
        return [name, int(output or 0)]
    return value


def video_vae(choice: str) -> dict[str, Any]:
    return node("HappyHorseLoadVideoVAE", vae=choice, weight_dtype="default")


def model(choice: str) -> dict[str, Any]:
    return node("HappyHorseLoadModel", model=choice, weight_dtype="default", variant="auto")


def empty(seconds: float = 0.2, **size: Any) -> dict[str, Any]:
    return node("HappyHorseEmptyLatent", **(SIZE | size), seconds=seconds, batch_size=1)


GOOD: Prompt = {  # every kind of thing that a socket takes
    "distill": model("pony: distill"),
    "base": model("pony: base"),
    "540p_sr": model("pony: 540p_sr"),
    "clip": node("HappyHorseLoadTextEncoder", text_encoder="pony", weight_dtype="default", device="default"),
    "vae": video_vae("pony"),
    "turbo": video_vae("pony: turbo"),
    "audio_vae": node("HappyHorseLoadAudioVAE", audio_vae="pony"),
    "text": node("HappyHorseTextEncode", clip="@clip", prompt="a red circle bounces slow ."),
    "film": empty(),
    "image": node("EmptyImage", width=64, height=32, batch_size=1, color=0x336699),
    "images": node("EmptyImage", width=64, height=32, batch_size=9, color=0x336699),
    "audio": node("LoadAudio", audio="tone.wav"),
    "sigmas": node("HappyHorseSigmas", steps=2, denoise=1.0, shift=5.0),
    "noise": node("HappyHorseNoise", seed=1),
    "dmd2": node("HappyHorseSamplerSelect", sampler="dmd2"),
    "unipc": node("HappyHorseSamplerSelect", sampler="unipc"),
    "guider": node("HappyHorseGuider", model="@distill", positive="@text"),
}
WRONG: Prompt = {  # what stock nodes hand out
    "sd": node("EmptyLatentImage", width=64, height=32, batch_size=1),
    "wan16": node("EmptyHunyuanLatentVideo", width=64, height=32, length=5, batch_size=1),
    "split": node("LTXVSeparateAVLatent", av_latent="@film"),
    "swapped": node("LTXVConcatAVLatent", video_latent="@split.1", audio_latent="@split.0"),
    "wrong_channels": node("LTXVConcatAVLatent", video_latent="@wan16", audio_latent="@split.1"),
    "longer": empty(1.0),
    "split_longer": node("LTXVSeparateAVLatent", av_latent="@longer"),
    "two_lengths": node("LTXVConcatAVLatent", video_latent="@split_longer.0", audio_latent="@split.1"),
    "two_films": empty() | {"inputs": empty()["inputs"] | {"batch_size": 2}},
    "split_two": node("LTXVSeparateAVLatent", av_latent="@two_films"),
    "two_batches": node("LTXVConcatAVLatent", video_latent="@split_two.0", audio_latent="@split.1"),
    "pixels": node("VAELoader", vae_name="pixel_space"),
    "no_sound": node("EmptyAudio", duration=0.0, sample_rate=44100, channels=2),
    "short_sound": node("EmptyAudio", duration=0.001, sample_rate=44100, channels=2),
    "silent_video": node("CreateVideo", images="@images", fps=25.0),
    "parts": node("GetVideoComponents", video="@silent_video"),
    "short_images": node("EmptyImage", width=64, height=32, batch_size=4, color=0),
}
TARGETS: Prompt = {  # every node with sockets, rightly connected
    "HappyHorseTextEncode": {"clip": "@clip", "prompt": "a red circle ."},
    "HappyHorsePrompt": {"body": "A red circle bounces."},
    "HappyHorseEmptyLatent": {**SIZE, "seconds": 0.2, "batch_size": 1},
    "HappyHorseImageToFilm": {"latent": "@film", "vae": "@vae", "image": "@image"},
    "HappyHorseAudioToFilm": {
        "latent": "@film", "audio_vae": "@audio_vae", "audio": "@audio", "mode": "hold", "encoding": "mean",
        "seed": 1,
    },
    "HappyHorseFilmToFilm": {"vae": "@vae", "audio_vae": "@audio_vae", **SIZE, "images": "@images"},
    "HappyHorseContinueFilm": {
        "vae": "@vae", "audio_vae": "@audio_vae", **SIZE, "images": "@images", "seconds": 0.4, "overlap": 5,
    },
    "HappyHorseSaveLatent": {"latent": "@film", "filename_prefix": "latents/bad"},
    "HappyHorseSampler": {
        "model": "@distill", "positive": "@text", "latent": "@film", "seed": 1, "steps": 1, "denoise": 1.0,
    },
    "HappyHorseGuider": {"model": "@distill", "positive": "@text"},
    "HappyHorseSigmas": {"steps": 2, "denoise": 1.0, "shift": 5.0},
    "HappyHorseSuperResolution": {
        "model": "@540p_sr", "positive": "@text", "latent": "@film", **ENLARGED, "steps": 1,
    },
    "HappyHorseSuperResolutionStart": {"latent": "@film", **ENLARGED},
    "HappyHorseDecode": {"latent": "@film", "vae": "@turbo", "audio_vae": "@audio_vae"},
    "HappyHorseDecodeVideo": {"latent": "@film", "vae": "@turbo", "audio_vae": "@audio_vae"},
    "SamplerCustomAdvanced": {
        "noise": "@noise", "guider": "@guider", "sampler": "@dmd2", "sigmas": "@sigmas",
        "latent_image": "@film",
    },
    "KSampler": {
        "model": "@distill", "positive": "@text", "negative": "@text", "latent_image": "@film", "seed": 1,
        "steps": 1, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0,
    },
    "VAEDecode": {"samples": "@film", "vae": "@turbo"},
    "VAEDecodeAudio": {"samples": "@film", "vae": "@audio_vae"},
    "VAEEncode": {"pixels": "@image", "vae": "@vae"},
    "VAEEncodeAudio": {"audio": "@audio", "vae": "@audio_vae"},
}  # fmt: skip


SHOW = node("PreviewAny", source="@target")


def graph(kind: str, **wrong: Any) -> Prompt:
    """A node with some inputs replaced, and all that it may be linked to; its first output is looked at."""
    nodes = GOOD | WRONG | {"target": node(kind, **(TARGETS[kind] | wrong))}
    if kind != "HappyHorseSaveLatent":
        nodes["show"] = SHOW
    return nodes


def check_next_film(client: Client) -> None:
    """A small film runs from its text to the file."""
    film = GOOD | {
        "sampled": node("HappyHorseSampler", **(TARGETS["HappyHorseSampler"] | {"seed": next(SEEDS)})),
        "decoded": node("HappyHorseDecodeVideo", latent="@sampled", vae="@turbo", audio_vae="@audio_vae"),
        "saved": node("SaveVideo", video="@decoded", filename_prefix="next", format="auto", codec="auto"),
    }
    assert client.run(film).files


def check_refused(client: Client, nodes: Prompt, *said: str) -> None:
    """The prompt fails with a sentence that holds all of `said`, and the next prompt works."""
    message = client.error_of(nodes)
    check_message(message, *said)
    check_next_film(client)


def check_message(message: str, *said: str) -> None:
    missing = [words for words in said if words not in message]
    assert not missing, message
    assert not [trace for trace in TRACES if trace in message], message


@pytest.mark.parametrize("kind", TARGETS)
def test_the_nodes_work_where_nothing_is_wrong(client: Client, kind: str) -> None:
    assert client.run(graph(kind)).of("execution_success")


MAKE, LENGTH = "make it with HappyHorse Empty Latent", "go with"
LATENTS = {  # what is found, and the cure
    "@sd": ("a film with sound is needed", MAKE),
    "@wan16": ("a film with sound is needed", MAKE),
    "@split.0": ("a film with sound is needed", MAKE),
    "@split.1": ("a film with sound is needed", MAKE),
    "@swapped": ("latents of another model", MAKE),
    "@wrong_channels": ("latents of another model", MAKE),
    "@two_lengths": ("do not belong to one film", LENGTH),
    "@two_batches": ("do not belong to one film", LENGTH),
}
LATENT_SOCKETS = [kind for kind, given in TARGETS.items() if "latent" in given]


@pytest.mark.parametrize("wrong", LATENTS)
@pytest.mark.parametrize("kind", LATENT_SOCKETS)
def test_a_latent_of_another_kind_is_refused(client: Client, kind: str, wrong: str) -> None:
    check_refused(client, graph(kind, latent=wrong), f"{kind} (target)", "latent: ", *LATENTS[wrong])


@pytest.mark.parametrize("wrong", [name for name in LATENTS if name != "@two_batches"])
@pytest.mark.parametrize("kind", ["SamplerCustomAdvanced", "KSampler"])
def test_a_latent_of_another_kind_is_refused_by_stock_samplers(client: Client, kind: str, wrong: str) -> None:
    check_refused(client, graph(kind, latent_image=wrong), "latent", LATENTS[wrong][1])


ENCODERS = {
    "@turbo": ("the turbo decoder cannot encode", "load the Wan2.2 VAE"),
    "@audio_vae": ("video latents", "HappyHorse Load Video VAE"),
    "@pixels": ("video latents", "HappyHorse Load Video VAE"),
}
DECODERS = {name: ENCODERS[name] for name in ("@audio_vae", "@pixels")}
AUDIO_VAES = {name: ("the audio VAE", "HappyHorse Load Audio VAE") for name in ("@vae", "@turbo", "@pixels")}
VAES = [
    *((kind, "vae", wrong, said) for wrong, said in ENCODERS.items()
      for kind in ("HappyHorseImageToFilm", "HappyHorseFilmToFilm", "HappyHorseContinueFilm",
                   "HappyHorseSuperResolution", "HappyHorseSuperResolutionStart")),
    *((kind, "vae", wrong, said) for wrong, said in DECODERS.items()
      for kind in ("HappyHorseDecode", "HappyHorseDecodeVideo")),
    *((kind, "audio_vae", wrong, said) for wrong, said in AUDIO_VAES.items()
      for kind in ("HappyHorseAudioToFilm", "HappyHorseFilmToFilm", "HappyHorseContinueFilm",
                   "HappyHorseDecode", "HappyHorseDecodeVideo")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "socket", "wrong", "said"), VAES)
def test_another_vae_is_refused(
    client: Client, kind: str, socket: str, wrong: str, said: tuple[str, str]
) -> None:
    frame = {"image": "@image"} if "SuperResolution" in kind else {}
    check_refused(client, graph(kind, **{socket: wrong}, **frame), f"{kind} (target)", f"{socket}: ", *said)


@pytest.mark.parametrize("kind", ["HappyHorseSuperResolution", "HappyHorseSuperResolutionStart"])
def test_a_first_frame_needs_a_vae(client: Client, kind: str) -> None:
    check_refused(client, graph(kind, image="@image"), "vae: ", "HappyHorse Load Video VAE")


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("VAEDecode", {"vae": "@audio_vae"}, ("samples: this VAE decodes audio", "connect")),
        ("VAEDecode", {"samples": "@split.1"}, ("samples: this VAE decodes video", "connect")),
        ("VAEDecode", {"samples": "@sd"}, ("samples: this VAE decodes video", "connect")),
        ("VAEDecodeAudio", {"vae": "@turbo"}, ("samples: this VAE decodes video", "connect")),
        ("VAEDecodeAudio", {"samples": "@split.0"}, ("samples: this VAE decodes audio", "connect")),
        ("VAEEncode", {"vae": "@turbo"}, ("vae: the turbo decoder cannot encode", "load the Wan2.2 VAE")),
        ("VAEEncode", {"vae": "@audio_vae"}, ("audio: this VAE encodes sound", "connect")),
        ("VAEEncode", {"pixels": "@short_images"}, ("pixels: ", "take 1 of them")),
        (
            "VAEEncodeAudio",
            {"audio": "@short_sound"},
            ("audio: this VAE encodes sound", "connect a longer AUDIO"),
        ),
    ],
)
def test_our_vaes_in_stock_nodes_say_what_they_take(
    client: Client, kind: str, given: dict[str, str], said: tuple[str, ...]
) -> None:
    check_refused(client, graph(kind, **given), f"{kind} (target)", *said)


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        ("HappyHorseSampler", "@540p_sr", ("'540p_sr'", "HappyHorse Super-Resolution")),
        ("HappyHorseSuperResolution", "@distill", ("'distill'", "HappyHorse Sampler")),
        ("HappyHorseSuperResolution", "@base", ("'base'", "HappyHorse Sampler")),
    ],
)
def test_a_model_of_the_other_stage_is_refused(
    client: Client, kind: str, wrong: str, said: tuple[str, ...]
) -> None:
    check_refused(client, graph(kind, model=wrong), f"{kind} (target)", "model: ", *said)


@pytest.mark.parametrize("kind", ["HappyHorseSampler", "HappyHorseGuider"])
def test_the_base_model_needs_a_negative_prompt(client: Client, kind: str) -> None:
    check_refused(client, graph(kind, model="@base"), "negative: ", "connect a HappyHorse Text Encode")


@pytest.mark.parametrize(
    "kind", ["HappyHorseImageToFilm", "HappyHorseSuperResolution", "HappyHorseSuperResolutionStart"]
)
def test_a_batch_of_images_is_refused_where_one_is_needed(client: Client, kind: str) -> None:
    nodes = graph(kind, vae="@vae", image="@images")
    check_refused(client, nodes, "image: one picture is needed, got a batch of 9", "Get Image from Batch")


@pytest.mark.parametrize("kind", ["HappyHorseFilmToFilm", "HappyHorseContinueFilm"])
def test_a_film_is_given_once(client: Client, kind: str) -> None:
    nodes = graph(kind)
    del nodes["target"]["inputs"]["images"]
    check_refused(client, nodes, "video, images: ", "neither", "connect")
    nodes = graph(kind, video="@silent_video")
    check_refused(client, nodes, "video, images: ", "both", "connect")


def test_a_film_has_five_frames_or_more(client: Client) -> None:
    nodes = graph("HappyHorseFilmToFilm", images="@short_images")
    check_refused(client, nodes, "images: ", "at least 5 frames", "got 4", "connect more")


@pytest.mark.parametrize("overlap", [2, 13, 9])
def test_the_overlap_fits_both_films(client: Client, overlap: int) -> None:
    nodes = graph("HappyHorseContinueFilm", overlap=overlap)
    check_refused(client, nodes, "overlap: ", f"got {overlap}", "choose another")


@pytest.mark.parametrize(
    "kind",
    ["HappyHorseAudioToFilm", "HappyHorseFilmToFilm", "HappyHorseContinueFilm", "HappyHorseDecode",
     "HappyHorseDecodeVideo"],
)  # fmt: skip
def test_sound_without_samples_is_refused(client: Client, kind: str) -> None:
    check_refused(client, graph(kind, audio="@no_sound"), "audio: ", "no samples", "connect another sound")


def test_a_film_without_sound_is_not_a_sound(client: Client) -> None:
    nodes = graph("HappyHorseAudioToFilm", audio="@parts.1")
    check_refused(client, nodes, "audio: ", "no sound", "connect a sound")


SIZED = ["HappyHorseEmptyLatent", "HappyHorseFilmToFilm", "HappyHorseContinueFilm"]


@pytest.mark.parametrize("kind", [*SIZED, "HappyHorseSuperResolution", "HappyHorseSuperResolutionStart"])
def test_sizes_off_the_grid_are_refused(client: Client, kind: str) -> None:
    check_refused(client, graph(kind, width=100), "width", "100", "the nearest is 96x")
    check_refused(client, graph(kind, height=72), "height", "72", "the nearest is")


@pytest.mark.parametrize("kind", [*SIZED, "HappyHorseSuperResolution", "HappyHorseSuperResolutionStart"])
def test_sizes_out_of_range_are_refused(client: Client, kind: str) -> None:
    check_refused(client, graph(kind, width=16), "width", "min")
    check_refused(client, graph(kind, height=5000), "height", "max")


@pytest.mark.parametrize("kind", ["HappyHorseEmptyLatent", "HappyHorseContinueFilm"])
@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.21, ("0.21", "the nearest are 0.2 and 0.24")),
        (0.0, ("min",)),
        (31.0, ("max",)),
        (math.nan, ("from 0.2",)),
    ],
)
def test_lengths_that_no_film_has_are_refused(
    client: Client, kind: str, seconds: float, said: tuple[str, ...]
) -> None:
    check_refused(client, graph(kind, seconds=seconds), "seconds", *said)


@pytest.mark.parametrize("kind", ["HappyHorseSampler", "HappyHorseSigmas"])
def test_a_denoise_that_is_none_is_refused(client: Client, kind: str) -> None:
    check_refused(client, graph(kind, denoise=0.0), "denoise", "min")
    check_refused(client, graph(kind, denoise=math.nan), "denoise", "above 0 and at most 1")


def test_a_batch_is_no_single_video(client: Client) -> None:
    check_refused(
        client, graph("HappyHorseDecodeVideo", latent="@two_films"), "latent: ", "HappyHorse Decode"
    )


def test_a_blank_prompt_is_refused(client: Client) -> None:
    check_refused(client, graph("HappyHorseTextEncode", prompt=" \n"), "prompt: ", "blank", "describe")
    check_refused(client, graph("HappyHorsePrompt", body=" "), "body", "blank", "describe")


@pytest.mark.parametrize(
    "dialogue", ["Good morning.", "Woman, Klingon: nuqneH", "Woman, English:", ", English: hello"]
)
def test_dialogue_of_another_form_is_refused(client: Client, dialogue: str) -> None:
    check_refused(client, graph("HappyHorsePrompt", dialogue=dialogue), "dialogue: row 1", "write it as")


def test_the_clip_of_stock_nodes_refuses_a_blank_prompt(client: Client) -> None:
    nodes = graph("KSampler", negative="@stock") | {"stock": node("CLIPTextEncode", clip="@clip", text="")}
    check_refused(client, nodes, "CLIPTextEncode", "prompt is blank", "describe")


# Conditioning as stock nodes combine it: prompts of two lengths work, those for a part of a picture cannot


def average(to: str, other: str) -> dict[str, Any]:
    given = {"conditioning_to": to, "conditioning_from": other}
    return node("ConditioningAverage", **given, conditioning_to_strength=0.5)


TEXTS: Prompt = {
    "short": node("HappyHorseTextEncode", clip="@clip", prompt="a circle"),
    "long": node("HappyHorseTextEncode", clip="@clip", prompt="a red circle bounces on a teal ground . " * 9),
    "concat": node("ConditioningConcat", conditioning_to="@short", conditioning_from="@long"),
    "combine": node("ConditioningCombine", conditioning_1="@short", conditioning_2="@long"),
    "average": average("@short", "@long"),
    "average_long": average("@long", "@short"),
    "zero": node("ConditioningZeroOut", conditioning="@long"),
    "early": node("ConditioningSetTimestepRange", conditioning="@short", start=0.0, end=0.5),
    "late": node("ConditioningSetTimestepRange", conditioning="@long", start=0.5, end=1.0),
    "halves": node("ConditioningCombine", conditioning_1="@early", conditioning_2="@late"),
    "area": node("ConditioningSetArea", conditioning="@long", width=64, height=64, x=0, y=0, strength=1.0),
    "percentage": node(
        "ConditioningSetAreaPercentage", conditioning="@long", width=0.5, height=0.5, x=0.0, y=0.0,
        strength=1.0,
    ),
    "mask": node("SolidMask", value=1.0, width=64, height=32),
    "masked": node(
        "ConditioningSetMask", conditioning="@long", mask="@mask", strength=1.0, set_cond_area="default"
    ),
    "token": node("HappyHorseTextEncode", clip="@clip", prompt="a"),
}  # fmt: skip


@pytest.mark.parametrize("text", ["concat", "combine", "average", "average_long", "zero", "halves"])
@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_of_two_lengths_are_sampled(client: Client, text: str, batch: int) -> None:
    film = "@film" if batch == 1 else "@two_films"
    nodes = graph(
        "HappyHorseSampler", model="@base", positive=f"@{text}", negative="@short", latent=film, steps=2
    )
    run = client.run(nodes | TEXTS)
    assert "nan" not in str(run.outputs["show"]["text"])


@pytest.mark.parametrize("text", ["area", "percentage", "masked"])
def test_prompts_for_a_part_of_the_picture_are_refused(client: Client, text: str) -> None:
    check_refused(client, graph("HappyHorseSampler", positive=f"@{text}") | TEXTS, "positive", "area")


def test_super_resolution_needs_two_tokens(client: Client) -> None:
    nodes = graph("HappyHorseSuperResolution", positive="@token") | TEXTS
    check_refused(client, nodes, "at least 2 tokens", "prompt")


# Parts for SamplerCustomAdvanced that do not belong together


def test_the_start_of_super_resolution_goes_with_its_own_latent(client: Client) -> None:
    start = {"start": node("HappyHorseSuperResolutionStart", **TARGETS["HappyHorseSuperResolutionStart"])}
    guide = {"guide": node("HappyHorseGuider", model="@540p_sr", positive="@text")}
    for wrong in ("@film", "@sd", "@split.0"):
        nodes = graph("SamplerCustomAdvanced", noise="@start", guider="@guide", latent_image=wrong)
        check_refused(client, nodes | start | guide, "noise", "latent_image", "connect both from one node")


def test_a_start_of_the_sound_needs_the_whole_film(client: Client) -> None:
    voice = {
        "voice": node("HappyHorseAudioToFilm", **(TARGETS["HappyHorseAudioToFilm"] | {"mode": "start"})),
        "split_voice": node("LTXVSeparateAVLatent", av_latent="@voice"),
    }
    for stream in ("@split_voice.0", "@split_voice.1"):
        nodes = graph("SamplerCustomAdvanced", latent_image=stream)
        check_refused(client, nodes | voice, "latent", "HappyHorse")


@pytest.mark.parametrize("name", ["dmd2", "unipc"])
def test_noise_levels_must_fall(client: Client, name: str) -> None:
    flipped = {"flipped": node("FlipSigmas", sigmas="@sigmas")}
    nodes = graph("SamplerCustomAdvanced", sampler=f"@{name}", sigmas="@flipped") | flipped
    check_refused(client, nodes, "sigmas", "HappyHorse Sigmas")


# Files


NAN = {  # part: its file, a weight, what loads it, what uses it, and what is said
    "transformer": (
        "distill/model.safetensors", "block.layers.0.attention.linear_qkv.weight", "distill",
        "HappyHorseSampler", ("sampling, step 1 of 1", "NaN", "check the weights"),
    ),
    "text_encoder": (
        "text_encoder/model.safetensors", "norm.weight", "clip",
        "HappyHorseTextEncode", ("encoding the prompt", "NaN", "weights"),
    ),
    "turbo": (
        "turbo_vae/model.safetensors", ".weight", "turbo",
        "HappyHorseDecode", ("turbo_nan", "NaN", "download it again"),
    ),
    "vae": (
        "wan22_vae.safetensors", ".weight", "vae",
        "HappyHorseImageToFilm", ("vae_nan", "NaN", "download it again"),
    ),
    "audio_vae": (
        "audio_vae/model.safetensors", ".weight_v", "audio_vae",
        "HappyHorseDecode", ("audio_vae_nan", "NaN", "download it again"),
    ),
}  # fmt: skip
FOLDERS = {  # Load node: its input for the file, and the host's folder
    "HappyHorseLoadModel": ("model", "diffusion_models"),
    "HappyHorseLoadTextEncoder": ("text_encoder", "text_encoders"),
    "HappyHorseLoadVideoVAE": ("vae", "vae"),
    "HappyHorseLoadAudioVAE": ("audio_vae", "vae"),
}


def damaged(source: Path, weight: str, folder: Path) -> Path:
    """A copy of a pony file, with what lies beside it, in which the first such weight holds a NaN."""
    folder.mkdir(parents=True)
    state = load_file(source)
    next(tensor for name, tensor in state.items() if name.endswith(weight)).view(-1)[0] = math.nan
    with safe_open(source, "pt") as file:
        save_file(state, folder / "model.safetensors", file.metadata())
    for beside in source.parent.glob("*.json"):
        shutil.copy(beside, folder)
    return folder


@pytest.mark.parametrize("part", NAN)
def test_weights_that_are_nan_stop_the_film_at_their_stage(
    client: Client, pony_folder: Path, part: str
) -> None:
    file, weight, loader, target, said = NAN[part]
    nodes = graph(target)
    kind, given = nodes[loader]["class_type"], nodes[loader]["inputs"]
    socket, folder = FOLDERS[kind]
    place = damaged(pony_folder / file, weight, client.server.base / "models" / folder / f"{part}_nan")
    nodes[loader] = node(kind, **(given | {socket: place.name}))
    message = client.error_of(nodes)
    check_message(message, *said)
    assert "--dtype" not in message, message  # that is an option of the command line
    check_next_film(client)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("HappyHorseLoadModel", "turbo_vae/model.safetensors"),
        ("HappyHorseLoadTextEncoder", "distill/model.safetensors"),
        ("HappyHorseLoadVideoVAE", "distill/model.safetensors"),
        ("HappyHorseLoadAudioVAE", "wan22_vae.safetensors"),
    ],
)
def test_the_file_of_another_part_is_refused(
    client: Client, pony_folder: Path, kind: str, source: str
) -> None:
    socket, folder = FOLDERS[kind]
    place = client.server.base / "models" / folder / f"other_{socket}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(pony_folder / source, place)
    good = next(entry["inputs"] for entry in GOOD.values() if entry["class_type"] == kind)
    nodes = {"target": node(kind, **(good | {socket: place.name})), "show": SHOW}
    message = client.error_of(nodes)
    check_message(message, place.name, f"{kind} (target)")
    assert any(cure in message for cure in ("choose", "give", "take", "connect", "check")), message
    check_next_film(client)


@pytest.mark.parametrize("content", [b"not a latent", b"", b"\xff" * 64])
def test_a_damaged_latent_file_is_refused(client: Client, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(content)
    client.put(tmp_path / "damaged.safetensors")
    nodes = {"target": node("HappyHorseLoadLatent", latent="damaged.safetensors"), "show": SHOW}
    check_refused(client, nodes, "latent: damaged.safetensors", "choose one of HappyHorse Save Latent")


def test_a_latent_file_of_another_kind_is_refused(client: Client, tmp_path: Path) -> None:
    save_file({"latent_tensor": torch.zeros(1, 4, 8, 8)}, tmp_path / "stock.safetensors")
    client.put(tmp_path / "stock.safetensors")
    nodes = {"target": node("HappyHorseLoadLatent", latent="stock.safetensors"), "show": SHOW}
    check_refused(client, nodes, "latent: stock.safetensors", "choose one of HappyHorse Save Latent")


@pytest.mark.parametrize("name", ["nothing.safetensors", "../../etc/passwd", "nothing.safetensors [output]"])
def test_a_latent_file_that_is_not_there_is_refused(client: Client, name: str) -> None:
    nodes = {"target": node("HappyHorseLoadLatent", latent=name), "show": SHOW}
    check_refused(client, nodes, "latent", "save one with HappyHorse Save Latent")


@pytest.mark.parametrize("prefix", ["../outside", "/outside", "latents/../../outside"])
def test_latents_are_saved_below_the_output_folder_only(client: Client, prefix: str) -> None:
    nodes = graph("HappyHorseSaveLatent", filename_prefix=prefix)
    check_refused(client, nodes, "filename_prefix: ", "output folder", "without ..")


# What no stock node hands out in a graph, but other packs may


@pytest.fixture
def client(client: Client) -> Client:
    """A user whose input folder holds tone.wav, half a second of noise."""
    file = client.server.base / "input" / "tone.wav"
    if not file.exists():
        with wave.open(str(file), "wb") as tone:
            tone.setparams((2, 2, 44100, 0, "NONE", ""))
            tone.writeframes(random.Random(0).randbytes(4 * 22050))
    return client


@pytest.fixture
def as_the_host_runs() -> Iterator[None]:
    """The host executes every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def objects(pony_folder: Path) -> dict[str, Any]:
    return {
        "distill": load_model(pony_folder / "distill", None, "float32"),
        "540p_sr": load_model(pony_folder / "540p_sr", None, "float32"),
        "clip": load_clip(pony_folder / "text_encoder"),
        "vae": load_video_vae(pony_folder / "wan22_vae.safetensors"),
        "turbo": load_video_vae(pony_folder / "turbo_vae"),
        "audio_vae": load_audio_vae(pony_folder / "audio_vae"),
    }


def film(batch: int = 1, rows: int = 2, columns: int = 4) -> dict[str, Any]:
    return film_latent(torch.zeros(batch, 48, 2, rows, columns), torch.zeros(batch, 64, 6))


def text(objects: dict[str, Any], *shape: int) -> list[Any]:
    width = objects["distill"].model.config.text_in_channels
    batch, length = shape or (1, 5)
    return [[torch.zeros(batch, length, width), {"pooled_output": None}]]


def refusal(call: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def sample(objects: dict[str, Any], **other: Any) -> Any:
    given = {"model": objects["distill"], "positive": text(objects), "latent": film(), "seed": 1, "steps": 1}
    return sampler.HappyHorseSampler.execute(**(given | {"denoise": 1.0} | other))


def enlarge(objects: dict[str, Any], **other: Any) -> Any:
    given = {"model": objects["540p_sr"], "positive": text(objects), "latent": film(), "steps": 1}
    return super_resolution.HappyHorseSuperResolution.execute(**(given | ENLARGED | other))


OTHERS = {
    "another family": SimpleNamespace(model=torch.nn.Linear(1, 1), load_device=torch.device("cpu")),
    "no model at all": object(),
    "nothing": None,
}


@pytest.mark.usefixtures("as_the_host_runs")
@pytest.mark.parametrize("other", OTHERS)
def test_a_model_of_another_family_is_refused(objects: dict[str, Any], other: str) -> None:
    wrong, said = OTHERS[other], ("model: ", "connect HappyHorse Load Model")
    check_message(refusal(lambda: sample(objects, model=wrong)), *said)
    check_message(refusal(lambda: enlarge(objects, model=wrong)), *said)
    guider = sampler.HappyHorseGuider
    check_message(refusal(lambda: guider.execute(model=wrong, positive=text(objects))), *said)


@pytest.mark.parametrize(
    "wrong",
    [SimpleNamespace(cond_stage_model=torch.nn.Linear(1, 1), tokenizer=object()), object(), None],
    ids=["another family", "no clip at all", "nothing"],
)
def test_a_clip_of_another_family_is_refused(wrong: object) -> None:
    encode = prompt.HappyHorseTextEncode
    said = ("clip: ", "connect HappyHorse Load Text Encoder")
    check_message(refusal(lambda: encode.execute(clip=wrong, prompt="a circle")), *said)


@pytest.mark.usefixtures("as_the_host_runs")
@pytest.mark.parametrize("wrong", [object(), None], ids=["no VAE at all", "nothing"])
def test_what_is_no_vae_is_refused(objects: dict[str, Any], wrong: object) -> None:
    image = torch.zeros(1, 32, 64, 3)
    check_message(
        refusal(lambda: latent.HappyHorseImageToFilm.execute(film(), wrong, image)), "vae: ", "Load Video VAE"
    )
    for node_class in (decoder.HappyHorseDecode, decoder.HappyHorseDecodeVideo):
        message = refusal(lambda c=node_class: c.execute(film(), objects["turbo"], wrong))
        check_message(message, "audio_vae: ", "HappyHorse Load Audio VAE")
        message = refusal(lambda c=node_class: c.execute(film(), wrong, objects["audio_vae"]))
        check_message(message, "vae: ", "HappyHorse Load Video VAE")


CONDITIONS = {
    "of another width": [[torch.zeros(1, 7, 77), {"pooled_output": None}]],
    "without a batch": [[torch.zeros(7, 64), {}]],
    "without states": [[None, {}]],
    "empty": [],
}


@pytest.mark.usefixtures("as_the_host_runs")
@pytest.mark.parametrize("name", CONDITIONS)
def test_conditioning_of_another_encoder_is_refused(objects: dict[str, Any], name: str) -> None:
    wrong, said = CONDITIONS[name], ("positive", "HappyHorse Load Text Encoder")
    check_message(refusal(lambda: sample(objects, positive=wrong)), *said)
    check_message(refusal(lambda: enlarge(objects, positive=wrong)), *said)


@pytest.mark.usefixtures("as_the_host_runs")
@pytest.mark.parametrize(("prompts", "films"), [(2, 1), (3, 2), (2, 3)])
def test_prompts_and_films_are_of_one_number(objects: dict[str, Any], prompts: int, films: int) -> None:
    message = refusal(lambda: sample(objects, positive=text(objects, prompts, 5), latent=film(films)))
    check_message(message, "positive", f"{prompts} prompts", f"{films} film")


@pytest.mark.usefixtures("as_the_host_runs")
def test_a_prompt_for_each_film_of_a_batch_is_sampled(objects: dict[str, Any]) -> None:
    assert (
        sample(objects, positive=text(objects, 2, 5), latent=film(2))[0]["samples"].unbind()[0].shape[0] == 2
    )


SOUNDS = {
    "nan": (torch.full((1, 2, 9000), math.nan), "not finite"),
    "infinite": (torch.full((1, 2, 9000), math.inf), "not finite"),
    "no samples": (torch.zeros(1, 2, 0), "no samples"),
    "no channels": (torch.zeros(1, 0, 9000), "no samples"),
    "nine channels": (torch.zeros(1, 9, 9000), "9"),
}


@pytest.mark.usefixtures("as_the_host_runs")
@pytest.mark.parametrize("name", SOUNDS)
def test_sound_that_is_none_is_refused(objects: dict[str, Any], name: str) -> None:
    waveform, found = SOUNDS[name]
    sound = {"waveform": waveform, "sample_rate": 44100}
    vaes = {"vae": objects["vae"], "audio_vae": objects["audio_vae"]}
    images = torch.zeros(9, 32, 64, 3)
    calls = [
        lambda: latent.HappyHorseAudioToFilm.execute(film(), objects["audio_vae"], sound, "hold", "mean", 1),
        lambda: latent.HappyHorseFilmToFilm.execute(**vaes, **SIZE, images=images, audio=sound),
        lambda: latent.HappyHorseContinueFilm.execute(
            **vaes, **SIZE, seconds=0.4, overlap=5, images=images, audio=sound
        ),
        lambda: decoder.HappyHorseDecode.execute(film(), **vaes, audio=sound),
        lambda: decoder.HappyHorseDecodeVideo.execute(film(), **vaes, audio=sound),
    ]
    for call in calls:
        check_message(refusal(call), "audio: ", found, "connect another sound")


@pytest.mark.usefixtures("as_the_host_runs")
def test_a_batch_of_sounds_is_refused_where_one_is_needed(objects: dict[str, Any]) -> None:
    sound = {"waveform": torch.rand(2, 2, 22050), "sample_rate": 44100}
    encode = latent.HappyHorseAudioToFilm
    message = refusal(lambda: encode.execute(film(), objects["audio_vae"], sound, "hold", "mean", 1))
    check_message(message, "audio: one sound is needed, got a batch of 2", "connect one")
    decode = decoder.HappyHorseDecode
    message = refusal(lambda: decode.execute(film(3), objects["vae"], objects["audio_vae"], audio=sound))
    check_message(message, "audio: ", "connect one sound")


@pytest.mark.usefixtures("as_the_host_runs")
def test_a_silent_sound_is_refused(objects: dict[str, Any]) -> None:
    sound = {"waveform": torch.zeros(1, 2, 22050), "sample_rate": 44100}
    run = latent.HappyHorseAudioToFilm.execute
    message = refusal(lambda: run(film(), objects["audio_vae"], sound, "hold", "mean", 1))
    check_message(message, "audio: the sound is silent", "connect")


@pytest.mark.usefixtures("as_the_host_runs")
def test_pictures_of_another_shape_are_refused(objects: dict[str, Any]) -> None:
    for image in (torch.zeros(32, 64, 3), torch.zeros(1, 32, 64, 1)):
        message = refusal(lambda i=image: latent.HappyHorseImageToFilm.execute(film(), objects["vae"], i))
        check_message(message, "image: ", "pictures in colour", "connect")


@pytest.mark.usefixtures("as_the_host_runs")
def test_pictures_that_are_nan_are_refused(objects: dict[str, Any]) -> None:
    image = torch.full((1, 32, 64, 3), math.nan)
    message = refusal(lambda: latent.HappyHorseImageToFilm.execute(film(), objects["vae"], image))
    check_message(message, "image: ", "finite", "connect")


@pytest.mark.usefixtures("as_the_host_runs")
def test_a_latent_that_is_nan_is_refused(objects: dict[str, Any]) -> None:
    wrong = film_latent(torch.full((1, 48, 2, 2, 4), math.nan), torch.zeros(1, 64, 6))
    vaes = objects["turbo"], objects["audio_vae"]
    calls = [
        lambda: decoder.HappyHorseDecode.execute(wrong, *vaes),
        lambda: sample(objects, latent=wrong, denoise=0.5),
    ]
    for call in calls:
        check_message(refusal(call), "NaN", "check the weights")


@pytest.mark.parametrize("name", ["dmd2", "unipc"])
def test_our_samplers_refuse_models_of_other_families(name: str) -> None:
    shapes = [(1, 4, 8, 8)]
    guide = SimpleNamespace(inner_model=SimpleNamespace(latent_shapes=shapes))
    zeros, sigmas = torch.zeros(1, 4, 8, 8), torch.tensor([1.0, 0.5, 0.0])
    options = {"model_options": {}, "seed": 1}
    message = refusal(lambda: CoreSampler(name).sample(guide, sigmas, options, None, zeros, zeros))
    check_message(message, "sampler", "HappyHorse")


@pytest.mark.usefixtures("as_the_host_runs")
def test_odd_rows_are_refused_with_the_size(objects: dict[str, Any]) -> None:
    message = refusal(lambda: sample(objects, latent=film(rows=3)))
    check_message(message, "latent: ", "multiple of 32", "64x48")
