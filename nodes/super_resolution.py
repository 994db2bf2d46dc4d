"""Nodes that enlarge a film in latent space with a super-resolution model."""

from typing import Any

import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io
from torch import Tensor

from ..model.config import MAGIHUMAN
from ..model.geometry import FilmShape, super_resolution_size
from ..model.packing import Latents
from ..model.video_vae import normalize_latents
from ..sampler import super_resolution
from ..sampler.noise import FilmNoise, NoiseFunction
from ..sampler.schedule import SHIFT, flow_sigmas
from .inputs import encode_first_frame
from .latent import MAX_SIDE
from .latents import film_latent, shape_of, streams
from .model import to_core, to_host
from .sampler import MAX_STEPS, recipe_of, run, seed_input
from .sampling import CoreSampler, FixedNoise, guider

CATEGORY = "HappyHorse/super-resolution"
SIZES = ("540p", "1080p", "custom")


def _size_inputs() -> list[io.Input]:
    return [
        io.Combo.Input("size", options=list(SIZES),
                       tooltip="540p doubles both sides; 1080p keeps the aspect at about 1920x1088 pixels; "
                       "custom takes width and height."),
        seed_input(),
        io.Int.Input("width", default=1920, min=32, max=MAX_SIDE, step=32, advanced=True,
                     tooltip="Pixels, a multiple of 32; for size custom."),
        io.Int.Input("height", default=1088, min=32, max=MAX_SIDE, step=32, advanced=True,
                     tooltip="Pixels, a multiple of 32; for size custom."),
    ]  # fmt: skip


def _frame_inputs() -> list[io.Input]:
    return [
        io.Vae.Input("vae", optional=True,
                     tooltip="Wan2.2 video VAE that encodes the image; only needed with an image."),
        io.Image.Input("image", optional=True,
                       tooltip="First frame of the film, encoded anew at the larger size."),
    ]  # fmt: skip


LATENT_INPUT = io.Latent.Input("latent", tooltip="Film from HappyHorse Sampler; its sound is kept as it is.")


def target_shape(shape: FilmShape, size: str, width: int, height: int) -> FilmShape:
    """The shape of the larger film; raises ValueError for a size that is refused."""
    if size == "custom":
        return shape.resized((width, height))
    given = (shape.width, shape.height)
    return shape.resized(super_resolution_size(size, given, MAGIHUMAN.pixels_1080p))


def start_of(
    latent: dict[str, Any], large: FilmShape, noise_fn: NoiseFunction, frame: Tensor | None
) -> tuple[NestedTensor, dict[str, Any]]:
    """What super-resolution starts from (normalised), and a LATENT of what is held meanwhile.

    `frame` is the raw latent (B, 48, 1, H, W) of the first frame at the larger size.
    """
    raw_video, audio = streams(latent)
    base = to_core([normalize_latents(raw_video.float()), audio.float()])
    batch, channels, frames = raw_video.shape[:3]
    size = batch, channels, frames, large.latent_rows, large.latent_columns
    like = Latents(raw_video.new_empty(size, dtype=torch.float32), base.audio)
    start = super_resolution.prepare(base, noise_fn(like), large.latent_rows, large.latent_columns)
    video, video_mask = torch.zeros_like(start.video), torch.ones_like(start.video[:, :1])
    if frame is not None:
        video[:, :, :1], video_mask[:, :, :1] = frame, 0
    context = to_host(start)[1]
    held = film_latent(video, context, video_mask, torch.zeros_like(context[:, :1]))
    return NestedTensor(to_host(start)), held


def _first_frame(vae: Any, image: Tensor | None, large: FilmShape) -> Tensor | None:
    return None if image is None else encode_first_frame(vae, image, large)


class HappyHorseSuperResolution(io.ComfyNode):
    """The whole of super-resolution."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseSuperResolution",
            display_name="HappyHorse Super-Resolution",
            category=CATEGORY,
            description="Enlarges a film in latent space and adds detail, in 5 steps. The sound stays.",
            search_aliases=["upscale", "540p", "1080p", "hires"],
            inputs=[
                io.Model.Input("model", tooltip="540p_sr or 1080p_sr model, from HappyHorse Load Model."),
                io.Conditioning.Input("positive", tooltip="The prompt that the film was made with."),
                LATENT_INPUT,
                *_size_inputs(),
                io.Int.Input("steps", default=0, min=0, max=MAX_STEPS, advanced=True,
                             tooltip="Steps, 1 to 1000; 0 takes the model's own number (5)."),
                *_frame_inputs(),
                io.Conditioning.Input("negative", optional=True, advanced=True,
                                      tooltip="Connected, the published guidance is used: twice the time."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The larger film, for decoding.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: list[Any], latent: dict[str, Any], size: str, seed: int, width: int,
        height: int, steps: int, vae: Any = None, image: Tensor | None = None,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        recipe = recipe_of(model, super_resolution=True)
        large = target_shape(shape_of(latent), size, width, height)
        start, held = start_of(
            latent, large, FilmNoise(seed).super_resolution, _first_frame(vae, image, large)
        )
        sampler = CoreSampler("unipc", stage="super-resolution")
        guide = guider(model, positive, negative, guided=negative is not None)
        video, _ = run(
            guide, sampler, flow_sigmas(steps or recipe.steps, SHIFT), held, FixedNoise(seed, start)
        )
        return io.NodeOutput(film_latent(video, streams(latent)[1]))


class HappyHorseSuperResolutionStart(io.ComfyNode):
    """The parts of super-resolution for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseSuperResolutionStart",
            display_name="HappyHorse Super-Resolution Start",
            category=CATEGORY,
            description="The enlarged, partly noised film as NOISE, and a LATENT that holds the sound, for "
            "SamplerCustomAdvanced. Take the sound of the finished film from the film given here.",
            search_aliases=["upscale", "noise"],
            inputs=[LATENT_INPUT, *_size_inputs(), *_frame_inputs()],
            outputs=[
                io.Noise.Output(display_name="noise", tooltip="Connect to noise."),
                io.Latent.Output(display_name="latent", tooltip="Connect to latent_image."),
            ],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], size: str, seed: int, width: int, height: int, vae: Any = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        large = target_shape(shape_of(latent), size, width, height)
        start, held = start_of(
            latent, large, FilmNoise(seed).super_resolution, _first_frame(vae, image, large)
        )
        return io.NodeOutput(FixedNoise(seed, start), held)


NODES = [HappyHorseSuperResolution, HappyHorseSuperResolutionStart]
