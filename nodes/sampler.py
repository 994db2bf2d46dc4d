"""Nodes that sample: one that does what a variant needs, and its parts for the host's own sampler nodes."""

from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sampler.schedule import SHIFT, flow_sigmas
from ..sampler.stages import RECIPES, Recipe
from .latents import film_latent, masks, start_audio, streams
from .model import HappyHorseModel
from .preview import film_callback
from .sampling import SAMPLERS, CoreSampler, FilmNoiseObject, guider

CATEGORY = "HappyHorse/sample"
MAX_SEED = 0xFFFFFFFFFFFFFFFF
MAX_STEPS = 1000
DENOISE = (
    "Share of the schedule that is run, from 0 to 1. 1 makes a film from noise; below 1 the film given as "
    "latent is changed by so much."
)
POSITIVE = "The prompt, from HappyHorse Text Encode."
NEGATIVE = "What the film shall not be. The base model needs it; the distilled one does not look at it."


def seed_input() -> io.Int.Input:
    """The seed widget, the same in all nodes."""
    return io.Int.Input(
        "seed", default=42, min=0, max=MAX_SEED, control_after_generate=True,
        tooltip="Same seed, same noise on every device; same film here and on the command line.",
    )  # fmt: skip


def family(model: Any, socket: str = "model") -> HappyHorseModel:
    """The network behind a MODEL; raises ValueError for that of another family."""
    network = getattr(model, "model", model)
    if not isinstance(network, HappyHorseModel):
        found = "nothing" if network is None else type(network).__name__
        raise ValueError(
            f"{socket}: a HappyHorse transformer is needed, got {found}; connect HappyHorse Load Model"
        )
    return network


def recipe_of(model: Any, super_resolution: bool) -> Recipe:
    """How the variant of a MODEL is sampled; raises ValueError where it is not for this stage."""
    variant = family(model).variant
    if variant.endswith("_sr") == super_resolution:
        return RECIPES[variant]
    wanted, other = ("a base or distilled", "Super-Resolution")
    if super_resolution:
        wanted, other = ("a super-resolution", "Sampler")
    raise ValueError(
        f"model: {wanted} model is needed, got the variant {variant!r}; choose another file in HappyHorse "
        f"Load Model, or connect this one to HappyHorse {other}"
    )


def partial_sigmas(steps: int, shift: float, denoise: float) -> Tensor:
    """The last `steps` levels of a schedule of which `denoise` is the share that is run."""
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise:g}")
    whole = flow_sigmas(max(steps, round(steps / denoise)), shift)
    return whole[-(steps + 1) :]


def run(
    guide: comfy.samplers.CFGGuider,
    sampler: CoreSampler,
    sigmas: Tensor,
    latent: dict[str, Any],
    noise: Any,
) -> tuple[Tensor, Tensor]:
    """Sample with the host's progress and previews; returns the raw latents of both streams.

    What the noise mask keeps whole comes back as it was given, to the last bit.
    """
    with film_callback(guide.model_patcher, len(sigmas) - 1) as callback:
        samples = guide.sample(
            noise.generate_noise(latent), latent["samples"], sampler, sigmas,
            denoise_mask=latent.get("noise_mask"), callback=callback, disable_pbar=False, seed=noise.seed,
        )  # fmt: skip
    made = samples.to(comfy.model_management.intermediate_device()).unbind()
    given = latent["samples"].unbind()
    return tuple(
        torch.where(mask.to(new.device) == 0, old.to(new), new)
        for new, old, mask in zip(made, given, masks(latent), strict=True)
    )


def hold_start_audio(latent: dict[str, Any]) -> dict[str, Any]:
    """A given start of the sound as a held sound: what the model with guidance makes of either."""
    if start_audio(latent) is None:
        return latent
    video, audio = streams(latent)
    video_mask, audio_mask = masks(latent)
    held = film_latent(video, audio, video_mask, torch.zeros_like(audio_mask))
    return latent | held | {"start_audio": None}


class HappyHorseSampler(io.ComfyNode):
    """The whole of sampling for the base and the distilled model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseSampler",
            display_name="HappyHorse Sampler",
            category=CATEGORY,
            description="Makes the latents of a film and its sound. The distilled model runs 8 steps without "
            "guidance (DMD-2), the base model 32 steps with the published guidance (UniPC).",
            search_aliases=["ksampler", "dmd2", "magihuman", "sample film"],
            inputs=[
                io.Model.Input("model", tooltip="Base or distilled model, from HappyHorse Load Model."),
                io.Conditioning.Input("positive", tooltip=POSITIVE),
                io.Latent.Input("latent", tooltip="Film with sound, from a HappyHorse latent node."),
                seed_input(),
                io.Int.Input("steps", default=0, min=0, max=MAX_STEPS,
                             tooltip="Steps, 1 to 1000; 0 takes the model's own: distill 8, base 32."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The film, for decoding or enlarging.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: list[Any], latent: dict[str, Any], seed: int, steps: int, denoise: float,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        recipe = recipe_of(model, super_resolution=False)
        streams(latent)
        if recipe.guided:
            latent = hold_start_audio(latent)
        sampler = CoreSampler("dmd2" if recipe.few_step else "unipc")
        guide = guider(model, positive, negative, recipe.guided)
        sigmas = partial_sigmas(steps or recipe.steps, SHIFT, denoise)
        video, audio = run(guide, sampler, sigmas, latent, FilmNoiseObject(seed))
        kept = {key: latent[key] for key in ("batch_index",) if key in latent}
        return io.NodeOutput(film_latent(video, audio) | kept)


class HappyHorseSigmas(io.ComfyNode):
    """The published schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseSigmas",
            display_name="HappyHorse Sigmas",
            category=CATEGORY,
            description="The published noise levels, for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["scheduler", "sigmas"],
            inputs=[
                io.Int.Input("steps", default=8, min=1, max=MAX_STEPS,
                             tooltip="Steps, 1 to 1000: distill 8, base 32, super-resolution 5."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE),
                io.Float.Input("shift", default=SHIFT, min=0.1, max=100.0, step=0.1, advanced=True,
                               tooltip="Higher spends more steps at high noise; published: 5."),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 noise levels down to 0.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, steps: int, denoise: float, shift: float) -> io.NodeOutput:
        return io.NodeOutput(partial_sigmas(steps, shift, denoise))


class HappyHorseSamplerSelect(io.ComfyNode):
    """The published samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseSamplerSelect",
            display_name="HappyHorse Sampler Select",
            category=CATEGORY,
            description="The published samplers, for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["dmd2", "unipc", "sampler"],
            inputs=[
                io.Combo.Input("sampler", options=list(SAMPLERS),
                               tooltip="dmd2 for the distilled model, unipc for base and super-resolution."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="Draws step noise from seed + 1.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, sampler: str) -> io.NodeOutput:
        return io.NodeOutput(CoreSampler(sampler))


class HappyHorseGuider(io.ComfyNode):
    """The published guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseGuider",
            display_name="HappyHorse Guider",
            category=CATEGORY,
            description="What a model is sampled with: the base model with the published guidance (video 5, "
            "then 2 at low noise; sound 5), the others without.",
            search_aliases=["cfg", "guidance", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="Any variant, from HappyHorse Load Model."),
                io.Conditioning.Input("positive", tooltip=POSITIVE),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: Any, positive: list[Any], negative: list[Any] | None = None) -> io.NodeOutput:
        guided = RECIPES[family(model).variant].guided
        return io.NodeOutput(guider(model, positive, negative, guided))


class HappyHorseNoise(io.ComfyNode):
    """The noise of a film."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseNoise",
            display_name="HappyHorse Noise",
            category=CATEGORY,
            description="The noise a film starts from, for SamplerCustomAdvanced. Unlike RandomNoise it puts "
            "in a sound that HappyHorse Audio to Film gives as a start.",
            search_aliases=["random noise", "seed"],
            inputs=[seed_input()],
            outputs=[io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        return io.NodeOutput(FilmNoiseObject(seed))


NODES = [HappyHorseSampler, HappyHorseSigmas, HappyHorseSamplerSelect, HappyHorseGuider, HappyHorseNoise]
