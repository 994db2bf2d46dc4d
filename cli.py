"""The command line: `happyhorse generate`, `inspect`, `doctor`, `convert`, `lora` and `train`."""

import argparse
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from . import __version__
from .convert_cli import run_convert
from .defaults import compute_dtype, default_device, models_folder
from .doctor import doctor, part_path
from .kernels.attention import attention_backend
from .lora_cli import run_lora
from .media import read_audio
from .model import catalog
from .model.audio_vae import ENCODE_RATE
from .model.checkpoint import Checkpoint, check_names, describe
from .model.config import PRESETS, Preset
from .model.convert import suffix_of
from .model.geometry import (
    FPS,
    LONG_SECONDS,
    MAX_SECONDS,
    MIN_SECONDS,
    FilmShape,
    audio_latents,
    super_resolution_size,
)
from .model.lora import LoraPatch, bytes_at_use, patches
from .model.lora_formats import open_lora
from .model.packing import LATENTS_FORMAT
from .model.stream_writer import check_target, write_tensors
from .options import parser, sentence
from .sampler.parts import Parts, default_vae_dtype, needed_parts, open_part
from .sampler.pipeline import FilmRequest, generate, with_sound, with_steps_down, write_film
from .sampler.placement import is_out_of_memory
from .sampler.plan import GB, Plan, check_vram, plan_film, require_fit, room_on
from .sampler.stages import RECIPES
from .save_workflow import save_workflow
from .train_cli import run_train, run_train_pony

log = logging.getLogger("happyhorse")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for a film that `doctor` says does not fit, 2 for input
    that cannot be used, 130 when interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; matrix products have it off by default
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in other letters must not make a failure of a film
        sys.stdout.reconfigure(errors="backslashreplace")
    options = None
    try:
        options = parser(_generate, _inspect, doctor, _convert, _lora, _train).parse_args(arguments)
        with torch.inference_mode(options.command != "train"):
            code = options.run(options) or 0
        sys.stdout.flush()  # here, so that the end of `| head` is noticed here
        return code
    except KeyboardInterrupt as interrupt:
        what = "film" if options is None or options.command == "generate" else "file"
        sys.stderr.write(f"\nhappyhorse: interrupted; {str(interrupt) or f'no {what} was written'}\n")
        return 130
    except BrokenPipeError:  # who read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as error:
        sys.stderr.write(f"happyhorse: {sentence(error)}\n")
        return 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        cure = "try --offload pieces, fewer --seconds or a smaller --size"
        if options and options.command == "train":  # the miniature: a LoRA has cures of its own
            on_cpu = (options.device or default_device()).type == "cpu"
            cure = "close other programs" if on_cpu else "try --device cpu"
        sys.stderr.write(f"happyhorse: out of memory ({str(error).splitlines()[0]}); {cure}\n")
        return 2
    return 0


def _open_parts(options: argparse.Namespace, folder: Path) -> dict[str, Checkpoint]:
    """The checkpoints that these options need, by role; the first that is missing or wrong raises."""
    parts = {}
    for role, name in needed_parts(
        options.variant, options.sr, options.decoder, options.image is not None
    ).items():
        parts[role] = open_part(name, part_path(options, name, folder))
        check_names(parts[role], parts[role].build().state_dict())  # now, not when its turn comes
    return parts


def _generate(options: argparse.Namespace) -> None:
    preset = PRESETS[options.preset]
    request = _request(options, preset)
    device = options.device or default_device()
    check_vram(device, options.vram)
    _check_output("--out", options.out, ".mp4")
    if options.save_latents:
        _check_output("--save-latents", options.save_latents, ".safetensors")
    if options.save_workflow:
        _check_output("--save-workflow", options.save_workflow, ".json")
    checkpoints = _open_parts(options, models_folder(options))
    given = [options.image, options.audio, *(lora.path for lora in options.lora)]
    files = [path for path in given if path is not None and path.is_file()]
    sources = [*files, *(part.path for part in checkpoints.values())]
    for target in filter(None, (options.out, options.save_latents, options.save_workflow)):
        check_target(target, sources, overwrite=True)
    _warn_of_idle(options)
    changes = _patches(options, checkpoints["transformer"])
    dtype = compute_dtype(options, device)
    attend = attention_backend(options.attention, device, dtype)
    beside = bytes_at_use(changes, checkpoints["transformer"].quantized)

    def plan(shape: FilmShape, large: FilmShape | None) -> Plan:
        needed = {role: part for role, part in checkpoints.items() if large or role != "super_resolution"}
        return plan_film(needed, shape, large, dtype, default_vae_dtype(dtype, device), device, beside)

    smaller = _smaller(request, options.sr, preset, plan)
    room = room_on(device, options.vram, options.ram)
    placements = require_fit(plan(request.shape, request.large), options.offload, smaller, room)
    if options.vram and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.vram * GB / total), device.index)
    if options.save_workflow:
        log.info(save_workflow(options.save_workflow, options, request, checkpoints))
    with Bars() as bars:
        parts = Parts(
            checkpoints, device, placements, dtype, default_vae_dtype(dtype, device), bars.progress,
            patches=changes, attend=attend, compiled=options.compile,
        )  # fmt: skip
        why = "works in pieces" if options.offload == "pieces" else "memory is short"
        for words in parts.chunked():
            bars.notice(f"{why}: {words} (rounding differs from a film made at once)")
        film = generate(parts, request, bars.progress, bars.notice)
        if options.save_latents:
            write_tensors(options.save_latents, film.latents._asdict(), {"format": LATENTS_FORMAT})
        film = with_sound(parts, film, bars.progress, bars.notice)

        def write() -> None:
            metadata = _metadata(options, request, parts)
            write_film(parts, film, options.out, metadata, bars.progress, options.upscale)

        with_steps_down(parts, "video_decoder", write, bars.notice)
    note = checkpoints["transformer"].file.metadata.get("note")
    sys.stdout.write(f"{options.out.resolve()}{f' ({note})' if note else ''}\n")


def _patches(options: argparse.Namespace, transformer: Checkpoint) -> dict[str, list[LoraPatch]]:
    """What the LoRAs asked for change in the transformer."""
    loras = [(open_lora(lora.path), lora.strengths) for lora in options.lora]
    shapes = {own: transformer.shape(own) for own in transformer.names}
    return patches(loras, transformer.config, shapes) if loras else {}


def _request(options: argparse.Namespace, preset: Preset) -> FilmRequest:
    seconds = options.seconds
    if seconds is None:
        seconds = _sound_seconds(options.audio) if options.audio else preset.default_seconds
    size = options.size or preset.sizes[options.aspect or preset.default_aspect]
    shape = FilmShape.from_seconds(*size, seconds)
    if preset.other_sizes and size != preset.sizes[preset.default_aspect]:
        log.warning(preset.other_sizes)
    if not options.lora and (unknown := preset.unknown_words(options.prompt)):
        log.warning(
            "the %s never learnt the words %s; docs/pony.md tells what it knows",
            options.preset,
            ", ".join(unknown),
        )
    if seconds > LONG_SECONDS:
        log.warning("films above %g s are longer than what the models were trained on", LONG_SECONDS)
    large = options.sr and shape.resized(super_resolution_size(options.sr, size, preset.pixels_1080p))
    return FilmRequest(
        options.prompt, options.negative or preset.negative_prompt, shape, large, options.seed,
        options.steps, options.image, options.audio, options.audio_mode, options.audio_encoding == "sample",
    )  # fmt: skip


def _sound_seconds(audio: Path) -> float:
    """The length of a sound file on the grid of film lengths."""
    samples = read_audio(audio, ENCODE_RATE, 1, MAX_SECONDS + 1).shape[1]
    return min(max(samples * FPS // ENCODE_RATE / FPS, MIN_SECONDS), MAX_SECONDS)


def _smaller(
    request: FilmRequest, sr: str | None, preset: Preset, plan: Callable[[FilmShape, FilmShape | None], Plan]
) -> Iterator[tuple[str, Plan]]:
    """Plans of smaller films, with what to ask for to get them; the last is the smallest of all."""
    shape, large = request.shape, request.large
    if large:
        yield "the film without --sr", plan(shape, None)
    for seconds in (10.0, 5.0, 2.0, 1.0, MIN_SECONDS):
        if seconds < shape.asked_seconds:
            latents = audio_latents(seconds)
            shorter = large and replace(large, audio_latents=latents)
            yield f"--seconds {seconds:g}", plan(replace(shape, audio_latents=latents), shorter)
    width, height = min(preset.sizes.values(), key=math.prod)
    if width * height < shape.width * shape.height:
        small = shape.resized((width, height))
        enlarged = sr and small.resized(super_resolution_size(sr, (width, height), preset.pixels_1080p))
        yield f"--size {width}x{height}", plan(small, enlarged)
        smallest = replace(small, audio_latents=audio_latents(MIN_SECONDS))
        without = " without --sr" if large else ""
        yield f"--size {width}x{height} --seconds {MIN_SECONDS:g}{without}", plan(smallest, None)


def _warn_of_idle(options: argparse.Namespace) -> None:
    """Tell of options that change nothing beside the others."""
    guided = RECIPES[options.variant].guided
    idle = {
        "--negative": options.negative and not guided and f"{options.variant} never sees it",
        "--sr-model": options.path_super_resolution and not options.sr and "--sr is not given",
        "--vae": options.path_video_vae and options.decoder != "wan" and not options.image
        and "neither --image nor --decoder wan is given",
        "--turbo-vae": options.path_turbo and options.decoder != "turbo" and "--decoder is wan",
        "--audio-mode": options.audio_mode != "hold" and not options.audio and "--audio is not given",
        "--audio-encoding": options.audio_encoding != "mean" and not options.audio and "--audio is not given",
    }  # fmt: skip
    for option, why in idle.items():
        if why:
            log.warning("%s changes nothing: %s", option, why)


def _check_output(option: str, path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ValueError(f"{option} must end in {suffix}, got {path.name!r}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: the folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: the folder {path.parent} cannot be written to; choose another")


def _metadata(options: argparse.Namespace, request: FilmRequest, parts: Parts) -> dict[str, str]:
    """The settings of a film, as one JSON object under the tag `comment`."""
    transformer, final = parts.checkpoints["transformer"], request.large or request.shape
    settings = {
        "program": f"happyhorse {__version__}", "torch": torch.__version__, "device": parts.device.type,
        "preset": options.preset, "variant": transformer.variant, "model": transformer.path.name,
        "note": transformer.file.metadata.get("note"), "prompt": request.prompt,
        "negative": request.negative if RECIPES[transformer.variant].guided else None,
        "image": request.image and request.image.name, "audio": request.audio and request.audio.name,
        "audio_mode": request.audio_mode if request.audio else None,
        "audio_encoding": options.audio_encoding if request.audio else None,
        "seed": request.seed, "steps": request.steps or RECIPES[transformer.variant].steps,
        "size": f"{request.shape.width}x{request.shape.height}", "seconds": request.shape.asked_seconds,
        "lora": list(map(str, options.lora)) or None, "sr": options.sr,
        "final_size": f"{final.width}x{final.height}", "upscale": options.upscale,
        "decoder": options.decoder, "dtype": str(compute_dtype(options, parts.device)).removeprefix("torch."),
        "in_pieces": parts.chunked() or None, "out_of_memory": parts.steps_down or None,
        "attention": options.attention, "compiled": options.compile or None,
    }  # fmt: skip
    return {"comment": json.dumps({name: value for name, value in settings.items() if value is not None})}


class Bars:
    """One progress bar per stage on the terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of a stage are finished."""
        if self._bar is None or self._stage != stage:
            self._close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def notice(self, sentence: str) -> None:
        """Tell the user something that is not an error."""
        tqdm.write(sentence, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _inspect(options: argparse.Namespace) -> None:
    failures = []
    for path in chain.from_iterable(map(catalog.parts_in, options.files)):
        try:
            sys.stdout.write(f"{describe(path)}\n")
        except (ValueError, OSError) as error:
            failures.append(sentence(error))
    if failures:
        raise ValueError("; ".join(failures))


def _convert(options: argparse.Namespace) -> None:
    _check_output("OUT", options.out, suffix_of(options.to))
    with Bars() as bars:
        report = run_convert(options, bars.progress)
    sys.stdout.write(f"{report}\n")


def _lora(options: argparse.Namespace) -> None:
    if options.action != "inspect":
        _check_output("OUT", options.out, ".safetensors")
    with Bars() as bars:
        report = run_lora(options, bars.progress)
    sys.stdout.write(f"{report}\n")


def _train(options: argparse.Namespace) -> None:
    if options.kind == "pony":
        run_train_pony(options)
        return
    _check_output("--out", options.out, ".safetensors")
    sys.stdout.write(f"{run_train(options, Bars)}\n")
