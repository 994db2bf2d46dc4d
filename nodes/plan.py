"""The node that says beforehand what memory a film will take; the host's memory manager does the placing."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
from comfy_api.latest import io, ui

from ..model.geometry import SIZE_STEP, FilmShape
from ..sampler.plan import GB
from .inputs import check_audio_vae, check_video_vae
from .latent import MAX_SIDE, seconds_input
from .latents import CONFIG, shape_of, streams
from .loader import CATEGORY
from .prompt import show
from .sampler import family, recipe_of
from .super_resolution import target_shape
from .text_encoder import check_clip

SIZES = ("540p", "1080p")


@dataclass(frozen=True)
class Load:
    """What one stage asks of the host, in bytes: weights, and working memory beside them."""

    name: str
    weights: int
    working: int
    largest: int  # of the pieces in which weights can come: a layer, or all of them

    def row(self, free: int) -> tuple[str, ...]:
        """The stage as a line of the table, where so much may be used."""
        there = max(0, min(self.weights, free - self.working))
        if self.working + self.largest > free:
            how = "does not fit"
        elif there == self.weights:
            how = "all on the device"
        else:
            how = f"{_gb(there)} on the device, the rest comes from RAM"
        peak = min(self.weights + self.working, max(free, self.working + self.largest))
        return self.name, _gb(self.weights), _gb(self.working), _gb(peak), how


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f}"


def model_load(name: str, model: Any, shape: FilmShape, films: int) -> Load:
    """What a pass of a transformer over so many films asks for."""
    channels = CONFIG.latent_channels * shape.latent_frames * shape.latent_rows * shape.latent_columns
    packed = channels + CONFIG.audio_in_channels * shape.audio_latents
    working = int(model.model.memory_required([films, 1, packed]))
    layers = model.model.diffusion_model.block.layers
    largest = max(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)
    return Load(name, model.model_size(), working, largest)


def decoder_load(vae: Any, shape: FilmShape) -> Load:
    """What decoding the picture of a film asks for; its weights come all at once."""
    latents = (1, CONFIG.latent_channels, shape.latent_frames, shape.latent_rows, shape.latent_columns)
    weights = vae.patcher.model_size()
    return Load("picture", weights, int(vae.memory_used_decode(latents, vae.vae_dtype)), weights)


def encoder_load(clip: Any) -> Load:
    """What encoding a prompt asks for; raises ValueError for a CLIP of another family."""
    model = check_clip(clip)
    encoder, device = model.transformer, clip.patcher.load_device
    working = int(model.memory_estimation_function(None, device=device))
    pieces = (encoder.embed_tokens, *encoder.layers)
    largest = max(sum(weight.nbytes for weight in piece.parameters()) for piece in pieces)
    return Load("text encoder", clip.patcher.model_size(), working, largest)


def sound_load(audio_vae: Any, shape: FilmShape) -> Load:
    """What decoding the sound of a film asks for; its weights come all at once."""
    latents = (1, shape.audio_latents, CONFIG.audio_in_channels)
    weights = audio_vae.patcher.model_size()
    working = int(audio_vae.memory_used_decode(latents, audio_vae.vae_dtype))
    return Load("sound", weights, working, weights)


def usable_memory(device: Any) -> tuple[int, int]:
    """Bytes of the device that a film may use, and those of them where other models are loaded now.

    The host makes room by moving models out.
    """
    loaded = sum(m.model_loaded_memory() for m in management.current_loaded_models if m.device == device)
    return int(management.get_free_memory(device)) + loaded, loaded


def verdict(loads: list[Load], device: Any) -> str:
    """The plan in a few words, which are all that a node of usual size has room for."""
    free, _ = usable_memory(device)
    if short := [load.name for load in loads if load.working + load.largest > free]:
        return f"{', '.join(short)}: does not fit"
    if any(load.working + load.weights > free for load in loads):
        return "fits with weights in RAM"
    return "fits on the device"


def table(loads: list[Load], device: Any) -> Iterator[str]:
    """The stages that run on a device as lines."""
    free, loaded = usable_memory(device)
    yield f"{device}: {_gb(free)} GB to use ({_gb(loaded)} GB of them hold models now), "
    yield "GB by stage, computed; ComfyUI moves the weights:"
    rows = [("stage", "weights", "working", "peak", "how"), *(load.row(free) for load in loads)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, *numbers, how in rows:
        columns = "  ".join(f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=True))
        yield f"{name:<{widths[0]}}  {columns}  {how}"


class HappyHorseMemoryPlan(io.ComfyNode):
    """What memory a film will take, before it is made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def pixels(name: str, default: int) -> io.Input:
            return io.Int.Input(name, default=default, min=SIZE_STEP, max=MAX_SIDE, step=SIZE_STEP,
                                tooltip="Pixels, a multiple of 32; not looked at with a latent.")  # fmt: skip

        return io.Schema(
            node_id="HappyHorseMemoryPlan",
            display_name="HappyHorse Memory Plan",
            category=CATEGORY,
            description="Says what memory the stages of a film will take on this machine. It only computes: "
            "ComfyUI moves the weights as it always does. Only the stages that are connected are in it.",
            search_aliases=["vram", "memory", "offload", "doctor", "will it fit"],
            inputs=[
                io.Model.Input("model", tooltip="The base or distilled model."),
                pixels("width", 448),
                pixels("height", 256),
                seconds_input(),
                io.Combo.Input("size", options=list(SIZES), default="1080p",
                               tooltip="What the super-resolution model makes, if one is connected."),
                io.Latent.Input("latent", optional=True,
                                tooltip="A film, in place of width, height and seconds."),
                io.Model.Input("super_resolution", optional=True, tooltip="540p_sr or 1080p_sr model."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that will make the picture."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder."),
                io.Vae.Input("audio_vae", optional=True, tooltip="The VAE that will make the sound."),
            ],
            outputs=[io.String.Output(display_name="plan", tooltip="The plan as a table.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Never the same: what is free changes. Not NaN, which pages cannot read in the host's history."""
        return uuid.uuid4().hex

    @classmethod
    def execute(
        cls, model: Any, width: int, height: int, seconds: float, size: str,
        latent: dict[str, Any] | None = None, super_resolution: Any = None, vae: Any = None,
        clip: Any = None, audio_vae: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        recipe_of(model, super_resolution=False)
        shape = FilmShape.from_seconds(width, height, seconds) if latent is None else shape_of(latent)
        films = 1 if latent is None else len(streams(latent)[0])
        loads, remarks = [model_load("base", model, shape, films)], []
        if clip is not None:
            encoder, where = encoder_load(clip), clip.patcher.load_device
            if where == model.load_device:
                loads.insert(0, encoder)
            else:
                remarks.append(
                    f"the text encoder runs on {where}: {_gb(encoder.weights + encoder.working)} GB"
                )
        if super_resolution is not None:
            recipe_of(super_resolution, super_resolution=True)
            shape = target_shape(shape, size, width, height)
            if (variant := family(super_resolution).variant) != f"{size}_sr":
                remarks.append(f"the model is {variant}, but the size is {size}")
            loads.append(model_load("super-resolution", super_resolution, shape, films))
        if vae is not None:
            check_video_vae(vae)
            loads.append(decoder_load(vae, shape))
        if audio_vae is not None:
            check_audio_vae(audio_vae)
            loads.append(sound_load(audio_vae, shape))
        count = f"{films} films of " if films > 1 else ""
        title = (
            f"{count}{shape.width}x{shape.height}, {shape.seconds:g} s: {verdict(loads, model.load_device)}"
        )
        text = "\n".join([title, *table(loads, model.load_device), *remarks])
        show(text.replace("  ", 2 * "\N{NO-BREAK SPACE}"))  # the page would draw these spaces as one
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [HappyHorseMemoryPlan]
