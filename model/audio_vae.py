"""The Oobleck audio VAE: waveform [B, 2, N] <-> latents [B, A, 64], 2048 samples each, in float32 throughout.

The network is nominally one for 44100 Hz. The transformer works at 25 latents per second, so sound enters at
51200 Hz, and what is decoded is at 51200 Hz too, until `to_film_rate` makes it 44100 Hz.
Letters: `B` batch, `C` channels, `N` samples, `A` audio latents.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import operations
from .config import AudioVAEConfig
from .geometry import FILM_RATE

ENCODE_RATE = 51200  # samples per second that the VAE encodes and decodes
WINDOW_SECONDS = 29  # driving audio longer than this is encoded in overlapping windows

DILATIONS = (1, 3, 9)
CHUNK = 128  # latents encoded or decoded at once; at full size a piece needs about 0.8 GB


class AudioVAE(nn.Module):
    """The encoder and decoder of Stable Audio Open, under the names they have after `pretransform.model.`."""

    def __init__(self, config: AudioVAEConfig, operations: ModuleType = operations) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations)
        self.decoder = Decoder(config, operations)

    def moments(self, waveform: Tensor, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
        """Return mean and raw scale, each [B, N // 2048, 64], of `waveform` [B, 2, N] at 51200 Hz.

        The work is done in pieces of `chunk` latents with all around them that they depend on: the result is
        that of a single piece. Raises ValueError for a waveform of another shape or shorter than one latent.
        """
        size = self.config.samples_per_latent
        if waveform.ndim != 3 or waveform.shape[1] != self.config.io_channels or waveform.shape[2] < size:
            raise ValueError(
                f"the waveform must be [batch, {self.config.io_channels} channels, {size} samples or more], "
                f"got {list(waveform.shape)}"
            )
        length = waveform.shape[2] // size
        pieces = []
        for core, around in _pieces(length, chunk, encoder_context(self.config)):
            # The samples left over behind the last latent still reach it.
            piece = waveform[..., around.start * size : around.stop * size if around.stop < length else None]
            pieces.append(self.encoder(piece)[..., core.start - around.start : core.stop - around.start])
        mean, scale = torch.cat(pieces, dim=2).transpose(1, 2).chunk(2, dim=2)  # each [B, A, C]
        return mean, scale

    def encode(
        self, waveform: Tensor, generator: torch.Generator | None = None, *, chunk: int = CHUNK
    ) -> Tensor:
        """Return the latents [B, N // 2048, 64] of `waveform` [B, 2, N] at 51200 Hz.

        They are the mean, or with a CPU `generator` the random sample that the published pipeline takes.
        """
        mean, scale = self.moments(waveform, chunk=chunk)
        if generator is None:
            return mean
        batch, latents, channels = mean.shape
        noise = torch.randn(batch, channels, latents, generator=generator)
        return sample_latent(mean, scale, noise.transpose(1, 2).to(mean.device))

    def decode(self, latents: Tensor, *, chunk: int = CHUNK) -> Tensor:
        """Return the waveform [B, 2, 2048 * A] at 51200 Hz of `latents` [B, A, 64]; not clipped to [-1, 1].

        Works in pieces of `chunk` latents, as `moments` does. Raises ValueError for latents of another shape.
        """
        if latents.ndim != 3 or latents.shape[2] != self.config.latent_dim or not latents.shape[1]:
            raise ValueError(
                f"audio latents must be [batch, 1 or more, {self.config.latent_dim}], "
                f"got {list(latents.shape)}"
            )
        size = self.config.samples_per_latent
        z = latents.transpose(1, 2)  # [B, C, A]
        pieces = []
        for core, around in _pieces(z.shape[2], chunk, decoder_context(self.config)):
            piece = self.decoder(z[..., around])
            pieces.append(piece[..., (core.start - around.start) * size : (core.stop - around.start) * size])
        return torch.cat(pieces, dim=2)


class Encoder(nn.Module):
    """Waveform [B, 2, N] -> mean and scale [B, 128, N // 2048]."""

    def __init__(self, config: AudioVAEConfig, operations: ModuleType) -> None:
        super().__init__()
        widths = _widths(config)
        layers: list[nn.Module] = [operations.WeightNormConv1d(config.io_channels, widths[0], 7, padding=3)]
        for i, stride in enumerate(config.strides):
            layers.append(EncoderBlock(widths[i], widths[i + 1], stride, operations))
        layers.append(Snake(widths[-1]))
        layers.append(operations.WeightNormConv1d(widths[-1], 2 * config.latent_dim, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """Latents [B, 64, A] -> waveform [B, 2, 2048 * A]."""

    def __init__(self, config: AudioVAEConfig, operations: ModuleType) -> None:
        super().__init__()
        widths = _widths(config)
        layers: list[nn.Module] = [operations.WeightNormConv1d(config.latent_dim, widths[-1], 7, padding=3)]
        for i, stride in reversed(list(enumerate(config.strides))):
            layers.append(DecoderBlock(widths[i + 1], widths[i], stride, operations))
        layers.append(Snake(widths[0]))
        layers.append(operations.WeightNormConv1d(widths[0], config.io_channels, 7, padding=3, bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class EncoderBlock(nn.Module):
    """Three residual units, then a convolution that divides the length by an even `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, operations: ModuleType) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(ResidualUnit(in_channels, dilation, operations) for dilation in DILATIONS),
            Snake(in_channels),
            operations.WeightNormConv1d(
                in_channels, out_channels, 2 * stride, stride=stride, padding=stride // 2
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DecoderBlock(nn.Module):
    """A transposed convolution that multiplies the length by an even `stride`, then three residual units."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, operations: ModuleType) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Snake(in_channels),
            operations.WeightNormConvTranspose1d(
                in_channels, out_channels, 2 * stride, stride=stride, padding=stride // 2
            ),
            *(ResidualUnit(out_channels, dilation, operations) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ResidualUnit(nn.Module):
    """A dilated convolution and a pointwise one, each after its activation, added to the input."""

    def __init__(self, channels: int, dilation: int, operations: ModuleType) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            operations.WeightNormConv1d(channels, channels, 7, padding=3 * dilation, dilation=dilation),
            Snake(channels),
            operations.WeightNormConv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Snake(nn.Module):
    """`x + sin(a x)^2 / b` per channel (arXiv:2206.04658), a and b stored as logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        frequency = self.alpha.exp()[:, None]  # [C, 1], against x [B, C, N]
        magnitude = 1 / (self.beta.exp() + 1e-9)[:, None]
        return torch.addcmul(x, magnitude, (x * frequency).sin_().square_())


def _widths(config: AudioVAEConfig) -> list[int]:
    """Channels before the first block of the encoder and after each."""
    return [config.channels * multiple for multiple in (1, *config.c_mults)]


def sample_latent(mean: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Return the latent that standard normal `noise` picks, given `AudioVAE.moments`; all of one shape."""
    return mean + noise * (F.softplus(scale) + 1e-4)


# Long sound: pieces that know enough of their surroundings, and the published windows that do not.


def encoder_context(config: AudioVAEConfig) -> int:
    """How many latents' worth of samples on each side of its own 2048 one latent depends on."""
    first, last = -1, 1  # reach of one latent, followed from the last layer to the samples
    for stride in reversed(config.strides):
        first, last = first * stride - stride // 2, (last + 2) * stride - 1 - stride // 2
        first, last = first - 3 * sum(DILATIONS), last + 3 * sum(DILATIONS)
    first, last = first - 3, last + 3
    size = config.samples_per_latent
    return max(math.ceil(-first / size), last // size)


def decoder_context(config: AudioVAEConfig) -> int:
    """How many latents on each side of its own the 2048 samples of one latent depend on."""
    first, last = -3, config.samples_per_latent + 2  # reach of these samples, followed back to the latents
    for stride in config.strides:
        first, last = first - 3 * sum(DILATIONS), last + 3 * sum(DILATIONS)
        # Sample n of a transposed convolution reads i where 0 <= n + stride // 2 - stride * i < 2 * stride
        first, last = (first + stride // 2) // stride - 1, (last + stride // 2) // stride
    return max(3 - first, last + 3)


def _pieces(length: int, chunk: int, context: int) -> Iterator[tuple[slice, slice]]:
    """Cut 0..length into slices of `chunk`; yield each, and it widened by `context` within 0..length."""
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        yield slice(start, stop), slice(max(start - context, 0), min(stop + context, length))


def encode_driving_audio(
    vae: AudioVAE,
    waveform: Tensor,
    *,
    seconds: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the latents [1, A, 64] of driving audio [1 or 2, N] at 51200 Hz, cut to `seconds` if given.

    More than 29 s are encoded in half overlapping windows, as published. These windows are merged 363 latents
    apart where their samples are 362.5 apart, a drift that is kept. `generator` as in `AudioVAE.encode`.
    Raises ValueError if nothing is left to encode.
    """
    if waveform.ndim != 2 or waveform.shape[0] not in (1, vae.config.io_channels):
        raise ValueError(
            f"driving audio must be [1 or {vae.config.io_channels} channels, samples], "
            f"got {list(waveform.shape)}"
        )
    samples = waveform.shape[1] if seconds is None else min(waveform.shape[1], int(seconds * ENCODE_RATE))
    size = vae.config.samples_per_latent
    if samples < size:
        raise ValueError(
            f"driving audio must last at least {size / ENCODE_RATE:.2f} s, got {samples / ENCODE_RATE:.3f} s"
        )
    waveform = waveform[None, :, :samples].expand(1, vae.config.io_channels, samples)
    window = WINDOW_SECONDS * ENCODE_RATE
    if samples <= window:
        return vae.encode(waveform, generator)
    hop = window // 2
    count = 1 + math.ceil((samples - window) / hop)
    waveform = F.pad(waveform, (0, (count - 1) * hop + window - samples))
    windows = [vae.encode(waveform[..., i * hop : i * hop + window], generator) for i in range(count)]
    return merge_windows(windows)[:, : math.ceil(samples / size)]


def merge_windows(windows: Sequence[Tensor]) -> Tensor:
    """Join half overlapping latents [B, A, C] of one length, with a linear fade from each into the next."""
    length = windows[0].shape[1]
    overlap = length // 2
    step = length - overlap
    fade_in = torch.arange(overlap, dtype=torch.float32, device=windows[0].device)[:, None] / max(overlap, 1)
    merged = windows[0]
    for i, window in enumerate(windows[1:], start=1):
        fade = merged[:, i * step :] * (1 - fade_in) + window[:, :overlap] * fade_in
        merged = torch.cat([merged[:, : i * step], fade, window[:, overlap:]], dim=1)
    return merged


# Sample rates


def resample_fourier(waveform: Tensor, length: int) -> Tensor:
    """Return `waveform` [..., N] as `length` <= N samples over the same time, by cutting off its spectrum."""
    samples = waveform.shape[-1]
    if not 0 < length <= samples:
        raise ValueError(f"resampling {samples} samples must give 1 to {samples} samples, got {length}")
    if length == samples:
        return waveform
    spectrum = torch.fft.rfft(waveform)[..., : length // 2 + 1]
    if length % 2 == 0:  # two bins fall onto the new Nyquist frequency
        spectrum[..., -1] = 2 * spectrum[..., -1].real
    return torch.fft.irfft(spectrum, n=length) * (length / samples)


def to_film_rate(waveform: Tensor) -> Tensor:
    """Return the decoder's `waveform` [..., N] at 51200 Hz as [..., N * 441 // 512] at 44100 Hz."""
    return resample_fourier(waveform, waveform.shape[-1] * 441 // 512)


# Published configuration


def from_published(values: Mapping[str, Any]) -> AudioVAEConfig:
    """Read stable-audio-open's `model_config.json`, or only its `model.pretransform.config`.

    Raises ValueError naming each value that `AudioVAE` does not implement.
    """
    if "model" in values:  # the rest of that file describes another network
        pretransform = _mapping(_mapping(values["model"]).get("pretransform"))
        kind, rate = pretransform.get("type"), values.get("sample_rate")
        if kind != "autoencoder" or rate != FILM_RATE:
            raise ValueError(
                f"audio VAE: the pretransform must be an 'autoencoder' with sample_rate {FILM_RATE}, "
                f"got {kind!r} with {rate!r}"
            )
        values = _mapping(pretransform.get("config"))
    given = {name: value for name, value in _flat(values) if name not in _IGNORED}
    config = AudioVAEConfig.from_dict(
        {
            "io_channels": given.get("io_channels"),
            "latent_dim": given.get("latent_dim"),
            **{name: given.get(f"decoder.config.{name}") for name in ("channels", "c_mults", "strides")},
        }
    )
    _check_sizes(config)
    accepted = dict(_flat(published_config(config)))
    wrong = [
        f"{name} must be {accepted.get(name, 'absent')!r}, got {given.get(name, 'nothing')!r}"
        for name in sorted(accepted.keys() | given.keys())
        if (name in accepted) != (name in given) or accepted[name] != given[name]
    ]
    if wrong:
        raise ValueError("audio VAE: " + "; ".join(wrong))
    return config


_IGNORED = ("encoder.requires_grad", "decoder.requires_grad")  # a matter of training


def published_config(config: AudioVAEConfig) -> dict[str, Any]:
    """Return the published form of `config`, with all that is fixed in this implementation."""
    network = {
        "channels": config.channels,
        "c_mults": list(config.c_mults),
        "strides": list(config.strides),
        "use_snake": True,
    }
    encoder = {"in_channels": config.io_channels, "latent_dim": 2 * config.latent_dim, **network}
    decoder = {"out_channels": config.io_channels, "latent_dim": config.latent_dim, **network}
    return {
        "encoder": {"type": "oobleck", "config": encoder},
        "decoder": {"type": "oobleck", "config": {**decoder, "final_tanh": False}},
        "bottleneck": {"type": "vae"},
        "latent_dim": config.latent_dim,
        "downsampling_ratio": config.samples_per_latent,
        "io_channels": config.io_channels,
    }


def _check_sizes(config: AudioVAEConfig) -> None:
    lists = (config.c_mults, config.strides)
    if not all(isinstance(sizes, tuple) and sizes for sizes in lists) or len(lists[0]) != len(lists[1]):
        raise ValueError(f"audio VAE: c_mults and strides must be lists of one length, got {config}")
    sizes = (config.io_channels, config.latent_dim, config.channels, *config.c_mults, *config.strides)
    if not all(type(size) is int and size > 0 for size in sizes) or any(size % 2 for size in config.strides):
        raise ValueError(f"audio VAE: sizes must be positive whole numbers and strides even, got {config}")


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"audio VAE: model.pretransform.config is missing, found {value!r} on the way to it")
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested objects with their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
