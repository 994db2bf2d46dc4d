"""Configurations of all networks, and the released and miniature models as tables of numbers.

Field names are those of the published configuration files, so that these can be read as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """A network's configuration; every field must be given, so a configuration is always complete."""

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build from a JSON object; raises ValueError for fields that are missing or unknown."""
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - set(values)):
            raise ValueError(f"{cls.__name__}: missing fields {missing}")
        if unknown := sorted(set(values) - names):
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; accepted are {sorted(names)}")
        return cls(**{name: _frozen(value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The joint transformer. `mm_layers` hold one weight copy per modality, `local_attn_layers` see a window
    of `frame_receptive_field` latent frames on each side; coordinates are 'v1' (super-resolution) or 'v2'.
    """

    num_layers: int
    hidden_size: int
    head_dim: int
    num_query_groups: int
    video_in_channels: int
    audio_in_channels: int
    text_in_channels: int
    mm_layers: tuple[int, ...]
    gelu7_layers: tuple[int, ...]
    local_attn_layers: tuple[int, ...]
    frame_receptive_field: int
    enable_attn_gating: bool
    coords_style: str

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim or self.num_heads % self.num_query_groups or self.head_dim % 8:
            raise ValueError(
                f"hidden_size {self.hidden_size}, head_dim {self.head_dim} and num_query_groups "
                f"{self.num_query_groups} do not fit: "
                "heads must divide the width, groups the heads, and 8 the head size"
            )
        if self.coords_style not in ("v1", "v2"):
            raise ValueError(f"coords_style must be 'v1' or 'v2', got {self.coords_style!r}")
        beyond = [
            i for i in (*self.mm_layers, *self.gelu7_layers, *self.local_attn_layers) if i >= self.num_layers
        ]
        if beyond:
            raise ValueError(f"layers {beyond} are named but there are only {self.num_layers}")

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return self.hidden_size // self.head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the video latents, of which 2 x 2 make a token."""
        return self.video_in_channels // 4

    def copies(self, layer: int) -> int:
        """Copies of a layer's weights, one for each modality or one for all."""
        return 3 if layer in self.mm_layers else 1

    def inner_width(self, layer: int) -> int:
        """Width between the two linears of a layer's feed-forward."""
        return 4 * self.hidden_size if layer in self.gelu7_layers else 8 * self.hidden_size // 3 // 4 * 4


@dataclass(frozen=True)
class TextEncoderConfig(Config):
    """The encoder half of a T5Gemma model; names as in its published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: int
    attn_logit_softcapping: float
    sliding_window: int
    rope_theta: float
    rms_norm_eps: float


@dataclass(frozen=True)
class VideoVAEConfig(Config):
    """The Wan2.2 video VAE."""

    dim: int
    dec_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]


@dataclass(frozen=True)
class VideoDecoderConfig(Config):
    """The light video decoder (TurboVAED); block lists are ordered as published, from pixels to latents."""

    latent_channels: int
    out_channels: int
    patch_size: int
    decoder_block_out_channels: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    decoder_spatio_temporal_scaling: tuple[bool, ...]
    decoder_spatio_only: tuple[bool, ...]
    first_chunk_size: int
    step_size: int


@dataclass(frozen=True)
class AudioVAEConfig(Config):
    """The Oobleck audio VAE of Stable Audio Open."""

    io_channels: int
    latent_dim: int
    channels: int
    c_mults: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def samples_per_latent(self) -> int:
        """Samples of sound that one latent stands for."""
        product = 1
        for stride in self.strides:
            product *= stride
        return product


@dataclass(frozen=True)
class Preset:
    """One family of networks that belong together, with the picture sizes it is used at.

    `sizes` maps an aspect to (width, height); `other_sizes` says what becomes of films of another size than
    the default, where that is worth a word; `words` are those of the training's captions, where they are all
    that a prompt may hold; `pixels_1080p` is the area of the large super-resolution;
    `negative_prompt` is the base variant's where none is given.
    """

    transformers: Mapping[str, TransformerConfig]
    text_encoder: TextEncoderConfig
    video_vae: VideoVAEConfig
    video_decoder: VideoDecoderConfig
    audio_vae: AudioVAEConfig
    sizes: Mapping[str, tuple[int, int]]
    other_sizes: str | None
    words: tuple[str, ...] | None
    default_aspect: str
    default_seconds: float
    pixels_1080p: int
    negative_prompt: str

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of `prompt` that mean nothing to these models; what it quotes is let be."""
        said = dict.fromkeys(re.findall(r"[^\W\d_]+", re.sub(r'"[^"]*"', "", prompt)))
        return [word for word in said if self.words is not None and word not in self.words]


VARIANTS = ("base", "distill", "540p_sr", "1080p_sr")


_PONY_WORDS = """
A a on with and in bounces talks fast slow background head hair shirt voice high middle low notes circle
square triangle star red green blue yellow orange purple white grey teal navy black brown blond Dialogue
Background Sound No prominent sound Mandarin Cantonese English Japanese Korean German French
"""

_COMMON = {"audio_in_channels": 64, "enable_attn_gating": True, "video_in_channels": 192}


def _makers(**fields: Any) -> dict[str, TransformerConfig]:
    """The variants that make films from noise."""
    config = TransformerConfig(coords_style="v2", local_attn_layers=(), **_COMMON, **fields)
    return {"base": config, "distill": config}


def _refiners(global_layers: tuple[int, ...], **fields: Any) -> dict[str, TransformerConfig]:
    """The super-resolution variants: coordinates v1; for 1080p all but the `global_layers` are local."""
    local = tuple(i for i in range(fields["num_layers"]) if i not in global_layers)

    def variant(local_layers: tuple[int, ...]) -> TransformerConfig:
        return TransformerConfig(coords_style="v1", local_attn_layers=local_layers, **_COMMON, **fields)

    return {"540p_sr": variant(()), "1080p_sr": variant(local)}


# fmt: off
_MAGIHUMAN = {
    "num_layers": 40, "hidden_size": 5120, "head_dim": 128, "num_query_groups": 8, "text_in_channels": 3584,
    "mm_layers": (0, 1, 2, 3, 36, 37, 38, 39), "gelu7_layers": (0, 1, 2, 3), "frame_receptive_field": 11,
}
MAGIHUMAN = Preset(
    transformers={
        **_makers(**_MAGIHUMAN), **_refiners(global_layers=(3, 7, 11, 15, 19, 23, 27, 31), **_MAGIHUMAN)
    },
    text_encoder=TextEncoderConfig(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, sliding_window=4096, rope_theta=10000.0, rms_norm_eps=1e-6,
    ),
    video_vae=VideoVAEConfig(
        dim=160, dec_dim=256, z_dim=48, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
        temperal_downsample=(False, True, True),
    ),
    video_decoder=VideoDecoderConfig(
        latent_channels=48, out_channels=3, patch_size=2, decoder_block_out_channels=(64, 128, 256, 512),
        decoder_layers_per_block=(2, 2, 2, 3, 3), decoder_spatio_temporal_scaling=(False, True, True, True),
        decoder_spatio_only=(False, True, False, False), first_chunk_size=7, step_size=7,
    ),
    audio_vae=AudioVAEConfig(
        io_channels=2, latent_dim=64, channels=128, c_mults=(1, 2, 4, 8, 16), strides=(2, 4, 4, 8, 8)
    ),
    sizes={
        "16:9": (448, 256), "9:16": (256, 448), "1:1": (352, 352),
        "4:3": (384, 288), "3:4": (288, 384), "21:9": (512, 224),
    },
    other_sizes=None,
    words=None,
    default_aspect="16:9",
    default_seconds=5.0,
    pixels_1080p=1920 * 1088,
    negative_prompt=(
        "blurry, out of focus, low resolution, heavy compression, flicker, ghosting, smeared "
        "textures, washed out or oversaturated colours, overexposed, underexposed, distorted face, "
        "deformed hands, extra fingers, missing limbs, warped body, stiff or frozen expression, eyes "
        "that wander, teeth that melt, mouth out of step with the words, jerky motion, jumping cuts, "
        "shaking camera, subtitles, captions, watermark, logo, border, split screen, static, "
        "background hiss, hum, crackle, clipping, distortion, echo, muffled sound, sudden jumps in "
        "loudness, robotic voice, flat monotone delivery, mumbling, slurred or swallowed words, "
        "stutter, wrong accent, several voices at once, speech without a speaker"
    ),
)

PONY = Preset(
    transformers={
        **_makers(
            num_layers=6, hidden_size=192, head_dim=32, num_query_groups=1, text_in_channels=96,
            mm_layers=(0,), gelu7_layers=(0,), frame_receptive_field=2,
        ),
        **_refiners(
            num_layers=2, hidden_size=192, head_dim=32, num_query_groups=1, text_in_channels=96,
            mm_layers=(), gelu7_layers=(0,), frame_receptive_field=2, global_layers=(1,),
        ),
    },
    text_encoder=TextEncoderConfig(
        vocab_size=512, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, attn_logit_softcapping=50.0,
        sliding_window=4096, rope_theta=10000.0, rms_norm_eps=1e-6,
    ),
    video_vae=VideoVAEConfig(
        dim=16, dec_dim=16, z_dim=48, dim_mult=(1, 2, 4, 4), num_res_blocks=1,
        temperal_downsample=(False, True, True),
    ),
    video_decoder=VideoDecoderConfig(
        latent_channels=48, out_channels=3, patch_size=2, decoder_block_out_channels=(8, 16, 24, 32),
        decoder_layers_per_block=(2, 2, 2, 3, 3), decoder_spatio_temporal_scaling=(False, True, True, True),
        decoder_spatio_only=(False, True, False, False), first_chunk_size=7, step_size=7,
    ),
    audio_vae=AudioVAEConfig(
        io_channels=2, latent_dim=64, channels=8, c_mults=(1, 2, 4, 8, 16), strides=(2, 4, 4, 8, 8)
    ),
    sizes={
        "16:9": (160, 96), "9:16": (96, 160), "1:1": (96, 96),
        "4:3": (128, 96), "3:4": (96, 128), "21:9": (224, 96),
    },
    other_sizes="the pony was trained at 96x96 only; at another size its films may show nothing",
    words=tuple(_PONY_WORDS.split()),
    default_aspect="1:1",
    default_seconds=2.0,
    pixels_1080p=288 * 288,
    negative_prompt="blurry, noise, silence.",
)

# fmt: on
PRESETS: Mapping[str, Preset] = {"magihuman": MAGIHUMAN, "pony": PONY}

# fmt: off
# Statistics of the Wan2.2 latents: constants in the published code, not part of any checkpoint.
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
