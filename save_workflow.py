"""`happyhorse generate --save-workflow`: a film's settings as a prompt for ComfyUI, in its API format."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .media import has_transparency, is_plain_png, read_image
from .model.checkpoint import Checkpoint
from .pony import pony_folder
from .sampler.pipeline import FilmRequest
from .sampler.stages import RECIPES

Prompt = dict[str, dict[str, Any]]  # {"1": {"class_type": ..., "inputs": {name: value or [node id, output]}}}
HOST_FOLDERS = {"diffusion_models", "unet", "text_encoders", "clip", "vae", "checkpoints", "loras", "models"}
CHOICES = {  # the node that loads a part -> its input for the file
    "HappyHorseLoadModel": "model",
    "HappyHorseLoadTextEncoder": "text_encoder",
    "HappyHorseLoadVideoVAE": "vae",
    "HappyHorseLoadAudioVAE": "audio_vae",
}
LOADERS = {
    "transformer": "HappyHorseLoadModel",
    "text_encoder": "HappyHorseLoadTextEncoder",
    "video_vae": "HappyHorseLoadVideoVAE",
    "video_decoder": "HappyHorseLoadVideoVAE",
    "audio_vae": "HappyHorseLoadAudioVAE",
}
SCALINGS = {"bilinear": "bilinear", "nearest": "nearest-exact", "bicubic": "bicubic"}


def save_workflow(
    path: Path, options: argparse.Namespace, request: FilmRequest, checkpoints: Mapping[str, Checkpoint]
) -> str:
    """Write the film's settings to `path` and return, as one sentence, what ComfyUI needs to run them."""
    prompt, remarks = film_prompt(options, request, checkpoints), list(_left_out(options, request))
    path.write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    needs = [f"{file.name} in its folder input" for file in (request.image, request.audio) if file]
    loaders = [node for node in prompt.values() if node["class_type"] in CHOICES]
    loaded = {node["inputs"][CHOICES[node["class_type"]]] for node in loaders}
    loras = {node["inputs"]["lora_name"] for node in prompt.values() if "lora_name" in node["inputs"]}
    needs += sorted(f"{choice} in its folders of models" for choice in loaded if not _is_pony(choice))
    needs += sorted(f"{name} in models/loras" for name in loras)
    told = f"{path} is for ComfyUI with these nodes" + (f" and {', '.join(needs)}" if needs else "")
    return told + "".join(f"; {remark}" for remark in remarks)


def _left_out(options: argparse.Namespace, request: FilmRequest) -> Iterator[str]:
    """What the graph does otherwise than the command."""
    given = {
        f"--attention {options.attention}": options.attention != "sdpa",
        "--compile": options.compile,
        "--offload pieces": options.offload == "pieces",
    }
    if missing := [option for option, is_given in given.items() if is_given]:
        yield f"not in it: {', '.join(missing)}"
    if options.upscale:
        yield "ComfyUI resizes and encodes by itself: pixels differ by roundings"
    if request.image is None:
        return
    read_image(request.image)  # what is wrong with it is said by this
    if not is_plain_png(request.image):
        yield f"ComfyUI decodes {request.image.name} a little otherwise, but not a PNG of 8-bit colours"
    if has_transparency(request.image):
        yield f"ComfyUI drops the transparency of {request.image.name}, which is white here"


class _Graph:
    """Nodes by number; the same node asked for twice is one."""

    def __init__(self) -> None:
        self.nodes: Prompt = {}

    def add(self, kind: str, **inputs: Any) -> list[Any]:
        """A node and the link to its first output; inputs that are None are left out."""
        given = {name: value for name, value in inputs.items() if value is not None}
        node = {"class_type": kind, "inputs": given}
        for key, other in self.nodes.items():
            if other == node:
                return [key, 0]
        key = str(len(self.nodes) + 1)
        self.nodes[key] = node
        return [key, 0]


def film_prompt(
    options: argparse.Namespace, request: FilmRequest, checkpoints: Mapping[str, Checkpoint]
) -> Prompt:
    """The graph that makes the film of these settings."""
    graph = _Graph()
    parts = {role: _load(graph, options, checkpoint) for role, checkpoint in checkpoints.items()}
    positive = graph.add("HappyHorseTextEncode", clip=parts["text_encoder"], prompt=request.prompt)
    negative = None
    if RECIPES[checkpoints["transformer"].variant].guided:
        negative = graph.add("HappyHorseTextEncode", clip=parts["text_encoder"], prompt=request.negative)
    latent, image, sound = _inputs(graph, request, parts)
    model = parts["transformer"]
    for lora in options.lora:
        name = _below(lora.path.absolute())
        model = graph.add("HappyHorseLoraLoader", model=model, lora_name=name, **lora.strengths.settings)
    latent = graph.add(
        "HappyHorseSampler", model=model, positive=positive, latent=latent, seed=request.seed,
        steps=request.steps or 0, denoise=1.0, negative=negative,
    )  # fmt: skip
    if request.large is not None:
        own_size = options.preset != "magihuman"  # the node's 1080p is that of the published models
        latent = graph.add(
            "HappyHorseSuperResolution", model=parts["super_resolution"], positive=positive, latent=latent,
            size="custom" if own_size else options.sr, seed=request.seed, width=request.large.width,
            height=request.large.height, steps=0, vae=image and parts["video_vae"], image=image,
        )  # fmt: skip
    video = _decode(graph, options, parts, latent, sound)
    graph.add(
        "SaveVideo", video=video, filename_prefix=options.out.stem, format="auto", **{"format.codec": "auto"}
    )
    return graph.nodes


def _load(graph: _Graph, options: argparse.Namespace, checkpoint: Checkpoint) -> list[Any]:
    kind, choice = LOADERS[checkpoint.part], _choice(options, checkpoint)
    inputs = {CHOICES[kind]: choice}
    if kind != "HappyHorseLoadAudioVAE":
        given = options.dtype or "default"
        # like the command line's, a VAE computes in bfloat16 only where the device is good at it
        is_vae = kind == "HappyHorseLoadVideoVAE"
        inputs["weight_dtype"] = "default" if is_vae and given == "bfloat16" else given
    if checkpoint.part == "transformer":
        inputs["variant"] = "auto" if _is_pony(choice) else checkpoint.variant
    if checkpoint.part == "text_encoder":
        inputs["device"] = "default"
    return graph.add(kind, **inputs)


def _choice(options: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """What a Load node calls a checkpoint: the built-in pony, or its path from the host's folder on."""
    path = checkpoint.path.absolute()
    if options.preset == "pony" and options.models is None and path.is_relative_to(pony_folder().absolute()):
        names = {"transformer": f"pony: {checkpoint.variant}", "video_decoder": "pony: turbo"}
        return names.get(checkpoint.part, "pony")
    return _below(path)


def _below(path: Path) -> str:
    """A path from the last of the host's folders on; else its own name."""
    folders = [i for i, name in enumerate(path.parts[:-1]) if name in HOST_FOLDERS]
    return "/".join(path.parts[folders[-1] + 1 :]) if folders else path.name


def _is_pony(choice: str) -> bool:
    return choice == "pony" or choice.startswith("pony: ")


def _inputs(
    graph: _Graph, request: FilmRequest, parts: Mapping[str, list[Any]]
) -> tuple[list[Any], list[Any] | None, list[Any] | None]:
    """The links to the latents to start from, to the first frame, and to the film's given sound."""
    shape, image, sound = request.shape, None, None
    latent = graph.add(
        "HappyHorseEmptyLatent", aspect="custom", width=shape.width, height=shape.height,
        seconds=shape.asked_seconds, batch_size=1,
    )  # fmt: skip
    if request.image:
        image = graph.add("LoadImage", image=request.image.name)
        latent = graph.add("HappyHorseImageToFilm", latent=latent, vae=parts["video_vae"], image=image)
    if request.audio:
        latent = graph.add(
            "HappyHorseAudioToFilm", latent=latent, audio_vae=parts["audio_vae"],
            audio=graph.add("LoadAudio", audio=request.audio.name), mode=request.audio_mode,
            encoding="sampled" if request.sample_audio else "mean", seed=request.seed,
        )  # fmt: skip
        sound = [latent[0], 1] if request.audio_mode == "hold" else None
    return latent, image, sound


def _decode(
    graph: _Graph,
    options: argparse.Namespace,
    parts: Mapping[str, list[Any]],
    latent: list[Any],
    sound: list[Any] | None,
) -> list[Any]:
    inputs = {
        "latent": latent,
        "vae": parts["video_decoder"],
        "audio_vae": parts["audio_vae"],
        "audio": sound,
    }
    if not options.upscale:
        return graph.add("HappyHorseDecodeVideo", **inputs)
    width, height, mode = options.upscale
    images = graph.add("HappyHorseDecode", **inputs)
    scaled = graph.add(
        "ImageScale", image=images, upscale_method=SCALINGS[mode], width=width, height=height, crop="disabled"
    )
    return graph.add("CreateVideo", images=scaled, audio=[images[0], 1], fps=[images[0], 2])
