"""The nodes that load the parts of a film."""

from typing import Any

from comfy_api.latest import io

from . import files
from .audio_vae import load_audio_vae
from .model import WEIGHT_DTYPES, load_model
from .text_encoder import WEIGHT_DTYPES as TEXT_DTYPES
from .text_encoder import load_clip
from .vae import load_video_vae

CATEGORY = "HappyHorse/load"
VARIANTS = ("auto", "base", "distill", "540p_sr", "1080p_sr")
WHERE = "The pony is a built-in miniature of two toy worlds, bouncing shapes and babbling heads: no download."


class HappyHorseLoadModel(io.ComfyNode):
    """The transformer, of any variant."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseLoadModel",
            display_name="HappyHorse Load Model",
            category=CATEGORY,
            description="Loads a daVinci-MagiHuman transformer, a file or a folder in diffusion_models.",
            search_aliases=["magihuman", "davinci", "happyhorse loader", "load diffusion model", "unet"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=files.choices("transformer"),
                    tooltip="A file (.safetensors, .gguf) or a folder of shards in models/diffusion_models, "
                    f"quantised or not. {WHERE}",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="What the large linears are held in at most, and compute in. default: bfloat16, "
                    "on a CPU float32; float32: for comparisons; float8_e4m3fn: half the memory, less exact, "
                    "computing as default; bfloat16: also on a CPU.",
                ),
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default="auto",
                    advanced=True,
                    tooltip="Which variant the file is. auto: as it, its name or its folder says.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The transformer, for a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        return _validate("transformer", model)

    @classmethod
    def fingerprint_inputs(cls, model: str | None, **_: Any) -> str:
        return files.fingerprint("transformer", model)

    @classmethod
    def execute(cls, model: str, weight_dtype: str, variant: str = "auto") -> io.NodeOutput:
        path = files.resolve("transformer", model)
        return io.NodeOutput(load_model(path, None if variant == "auto" else variant, weight_dtype))


class HappyHorseLoadTextEncoder(io.ComfyNode):
    """T5Gemma."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseLoadTextEncoder",
            display_name="HappyHorse Load Text Encoder",
            category=CATEGORY,
            description="Loads the text encoder t5gemma-9b-9b-ul2 and its tokenizer from text_encoders.",
            search_aliases=["t5gemma", "magihuman", "happyhorse loader", "load clip"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=files.choices("text_encoder"),
                    tooltip="A folder or a file (.safetensors or .gguf) in models/text_encoders, with "
                    f"tokenizer.json beside it or inside it. {WHERE}",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(TEXT_DTYPES),
                    default="default",
                    tooltip="What the weights are held and computed in. default: bfloat16; float32 where "
                    "ComfyUI has no other device than the CPU.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip="Where it runs. default: on the accelerator while needed; cpu: slower, no VRAM.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="The text encoder, for Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, text_encoder: str | None) -> bool | str:
        return _validate("text_encoder", text_encoder)

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str | None, **_: Any) -> str:
        return files.fingerprint("text_encoder", text_encoder)

    @classmethod
    def execute(cls, text_encoder: str, weight_dtype: str, device: str = "default") -> io.NodeOutput:
        return io.NodeOutput(load_clip(files.resolve("text_encoder", text_encoder), weight_dtype, device))


class HappyHorseLoadVideoVAE(io.ComfyNode):
    """Wan2.2's, or the fast decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseLoadVideoVAE",
            display_name="HappyHorse Load Video VAE",
            category=CATEGORY,
            description="Loads what turns latents into pictures: the Wan2.2 VAE, which also encodes, or the "
            "turbo decoder, which is faster and only decodes.",
            search_aliases=["wan2.2 vae", "turbo vae", "magihuman", "happyhorse loader", "load vae"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=files.choices("video_vae"),
                    tooltip="Wan2.2_VAE.pth or the folder turbo_vae, in models/vae; it is recognised which. "
                    f"{WHERE}",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "float32", "bfloat16"],
                    default="default",
                    advanced=True,
                    tooltip="What it computes in. default: bfloat16 on an accelerator, float32 on a CPU.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="The video VAE, for encoding and decoding.")],
        )

    @classmethod
    def validate_inputs(cls, vae: str | None) -> bool | str:
        return _validate("video_vae", vae)

    @classmethod
    def fingerprint_inputs(cls, vae: str | None, **_: Any) -> str:
        return files.fingerprint("video_vae", vae)

    @classmethod
    def execute(cls, vae: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(load_video_vae(files.resolve("video_vae", vae), weight_dtype))


class HappyHorseLoadAudioVAE(io.ComfyNode):
    """The VAE of Stable Audio Open."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseLoadAudioVAE",
            display_name="HappyHorse Load Audio VAE",
            category=CATEGORY,
            description="Loads what turns latents into sound and back: the VAE of Stable Audio Open 1.0.",
            search_aliases=["stable audio", "sd_audio", "magihuman", "happyhorse loader", "load vae"],
            inputs=[
                io.Combo.Input(
                    "audio_vae",
                    options=files.choices("audio_vae"),
                    tooltip="stable-audio-open-1.0 (model.safetensors with model_config.json beside it) or "
                    f"sd_audio.safetensors, in models/vae. {WHERE}",
                ),
            ],
            outputs=[
                io.Vae.Output(display_name="audio_vae", tooltip="The audio VAE, for encoding and decoding.")
            ],
        )

    @classmethod
    def validate_inputs(cls, audio_vae: str | None) -> bool | str:
        return _validate("audio_vae", audio_vae)

    @classmethod
    def fingerprint_inputs(cls, audio_vae: str) -> str:
        return files.fingerprint("audio_vae", audio_vae)

    @classmethod
    def execute(cls, audio_vae: str) -> io.NodeOutput:
        return io.NodeOutput(load_audio_vae(files.resolve("audio_vae", audio_vae)))


def _validate(part: str, choice: str | None) -> bool | str:
    """True, or a sentence for the dialog. An input with a link has no value yet."""
    return True if choice is None else files.problem(part, choice) or True


NODES = [HappyHorseLoadModel, HappyHorseLoadTextEncoder, HappyHorseLoadVideoVAE, HappyHorseLoadAudioVAE]
