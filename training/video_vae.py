"""Training of the video VAE, and of the light decoder on its latents.

Both see whole films: the first frame as one chunk and all others as the second, which gives the same as
the small chunks of inference. The latents have mean 0 and deviation 1; that the published constants normalise
them is folded into the convolutions around them afterwards.
"""

from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..model.config import LATENT_MEAN, LATENT_STD, VideoDecoderConfig, VideoVAEConfig
from ..model.video_decoder import VideoDecoder
from ..model.video_vae import FrameCache, VideoVAE, patchify, run_causal, unpatchify
from .data.pool import VideoPool
from .generators import checksum, generator
from .optim import Ema, decayed, optimizers, scale_rates
from .patch_codec import PatchCodec

LATENT_NOISE = 0.05  # added in training: small changes of latents must be small changes of pictures
MUON_RATE, ADAM_RATE, EMA_DECAY = 0.012, 2e-3, 0.995
WHOLE = 96  # pixels a side of a training clip
# (how many, side) crops make a step until CROP_SHARE of the first round, and then
EARLY_CROPS, LATE_CROPS, CROP_SHARE = (2, 48), (2, 64), 0.6
# What the light decoder also sees, each from a round on: so many crops of clips of twice the size; in every
# other crop the busiest of so many; noise of up to so much on the latents; and in every other step films that
# jump after their first frame, which has this weight there: a given image must look the same whatever comes.
DOUBLE_ROUND, DOUBLE_SHARE = 3, 0.5
BUSY_ROUND, BUSY_TRIES = 7, 4
ROUGH_ROUND, ROUGH_NOISE = 6, 0.4
JUMP_ROUND, JUMP_WEIGHT = 10, 8.0
MOTION_WEIGHT, FIRST_FRAME_WEIGHT, EDGE_WEIGHT = 4.0, 2.0, 0.5
ENCODER_EVERY, OWN_LATENTS = 3, 0.7  # steps; share of the first round before the decoder sees its encoder


class _PictureStage:
    """What the trainings of `module` on crops of clips and the latents of `codec` have in common."""

    def __init__(
        self, part: str, module: nn.Module, codec: PatchCodec, pool: VideoPool, steps: int, seed: int,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        start(module, generator(seed, "start"))
        self.module = module.to(device)
        self.codec, self.pool, self.steps, self.seed, self.device = codec, pool, steps, seed, device
        self.optimizers = optimizers(module, MUON_RATE, ADAM_RATE)
        self.ema = Ema(module, EMA_DECAY)
        self.fingerprint = {
            "part": part, **module.config.to_dict(), "steps": steps, "seed": seed,
            "codec": checksum(codec.mean, codec.project), "clips": len(pool.clips),
        }  # fmt: skip

    def _crops(self, step: int, double: float = 0.0, tries: int = 1) -> Tensor:
        kind = EARLY_CROPS if step < CROP_SHARE * self.steps else LATE_CROPS
        return self.pool.crops(*kind, Random(f"{self.seed} crops {step}"), double, tries).to(self.device)

    def _noised(self, latents: Tensor, step: int, most: float | None = None) -> Tensor:
        draw = generator(self.seed, "noise", step)
        noise = torch.randn(latents.shape, generator=draw)
        size = LATENT_NOISE if most is None else most * torch.rand(len(noise), 1, 1, 1, 1, generator=draw)
        return latents + (size * noise).to(self.device)

    def _update(self, step: int) -> None:
        scale_rates(self.optimizers, round_rate(step, self.steps))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.module)

    def state_dict(self) -> dict[str, Any]:
        """Weights, their average, and the optimizers' momenta."""
        return {
            "weights": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])


class VideoVAEStage(_PictureStage):
    """Trains the encoder towards the latents of `codec`, and the decoder from them; see training/loop.py.

    The encoder learns faster and is trained in every third step. From the last part of the first round on,
    the decoder sees the encoder's own latents in every other step. `steps` are those of a round.
    """

    def __init__(
        self,
        config: VideoVAEConfig,
        codec: PatchCodec,
        pool: VideoPool,
        steps: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__("video_vae", VideoVAE(config), codec, pool, steps, seed, device)

    def step(self, step: int) -> dict[str, float]:
        """Reconstruct crops, and follow the gradient."""
        video = self._crops(step)
        target = self.codec.encode(video)
        figures: dict[str, float] = {}
        seen = target
        own = step >= OWN_LATENTS * self.steps and step % 2 == 1
        if own or step % ENCODER_EVERY == 0:
            with torch.set_grad_enabled(step % ENCODER_EVERY == 0):
                latents = encode_film(self.module, video)
                latent_loss = (latents - target).square().mean()
            if latent_loss.requires_grad:
                latent_loss.backward()
                figures["latent_loss"] = latent_loss.item()
            seen = latents.detach() if own else target
        film = decode_film(self.module, self._noised(seen, step))
        loss, figures["psnr"] = picture_loss(film, video)
        loss.backward()
        self._update(step)
        return {"loss": loss.item(), **figures}

    def trained(self) -> VideoVAE:
        """The averaged network, its latents normalised by the published constants."""
        vae = VideoVAE(self.module.config)
        vae.load_state_dict(self.module.state_dict())
        self.ema.copy_to(vae)
        fold_constants(vae)
        return vae


class VideoDecoderStage(_PictureStage):
    """Trains the light decoder on the latents of `codec`, in rounds of `steps`; see training/loop.py.

    In later rounds they are rough, as those of films that a transformer made. It computes in `dtype`.
    """

    def __init__(
        self,
        config: VideoDecoderConfig,
        codec: PatchCodec,
        pool: VideoPool,
        steps: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        super().__init__("video_decoder", VideoDecoder(config), codec, pool, steps, seed, device)
        self.dtype = dtype
        if dtype != torch.float32:
            self.fingerprint["dtype"] = str(dtype)
        self.decode = torch.compile(self.module.decode) if compiled else self.module.decode

    def step(self, step: int) -> dict[str, float]:
        """Decode the latents of crops, and follow the gradient."""
        turn = step // self.steps
        double, tries = DOUBLE_SHARE * (turn >= DOUBLE_ROUND), BUSY_TRIES if turn >= BUSY_ROUND else 1
        video = self._crops(step, double, tries)
        jumps = turn >= JUMP_ROUND and step % 2 == 1
        if jumps:
            video = jumping(video, Random(f"{self.seed} jump {step}"))
        rough = ROUGH_NOISE if turn >= ROUGH_ROUND else None
        latents = self._noised(self.codec.encode(video), step, rough)
        first = JUMP_WEIGHT if jumps else FIRST_FRAME_WEIGHT
        with torch.autocast(latents.device.type, self.dtype, enabled=self.dtype != torch.float32):
            film = self.decode(latents)
        loss, psnr = picture_loss(film, video, first)
        loss.backward()
        self._update(step)
        return {"loss": loss.item(), "psnr": psnr}

    def trained(self) -> VideoDecoder:
        """The averaged network."""
        decoder = VideoDecoder(self.module.config)
        self.ema.copy_to(decoder)
        return decoder


def jumping(video: Tensor, random: Random) -> Tensor:
    """The films [B, 3, F, H, W], with any of their frames in place of the first."""
    frame = random.randrange(video.shape[2])
    return torch.cat([video[:, :, frame : frame + 1], video[:, :, 1:]], dim=2)


def round_rate(step: int, steps: int) -> float:
    """The share of the learning rate at `step`: it falls to nothing in `steps`, then from half of it again.

    Warm restarts (arXiv:1608.03983): a run can go on for another round where one was not enough.
    """
    return (1.0 if step < steps else 0.5) * decayed(step % steps, steps, flat=0.1) ** 2


def encode_film(vae: VideoVAE, video: Tensor) -> Tensor:
    """The mean [B, 48, k+1, H/16, W/16], not normalised, of a film [B, 3, 4k+1, H, W], in two chunks."""
    cache = FrameCache()
    moments = [vae.conv1(vae.encoder(patchify(chunk, 2), cache)) for chunk in video.tensor_split([1], dim=2)]
    return torch.cat(moments, dim=2).chunk(2, dim=1)[0]


def decode_film(vae: VideoVAE, latents: Tensor) -> Tensor:
    """The film [B, 3, 4k+1, H, W] of latents as `encode_film` gives them, in two chunks."""
    cache, decoder = FrameCache(), vae.decoder
    chunks = []
    for chunk in latents.tensor_split([1], dim=2):
        x = decoder.middle(run_causal(decoder.conv1, vae.conv2(chunk), cache), cache)
        for stage in decoder.upsamples:
            x = stage(x, cache)
        chunks.append(unpatchify(decoder.head(x, cache), 2))
    return torch.cat(chunks, dim=2)


def picture_loss(
    film: Tensor, video: Tensor, first_frame: float = FIRST_FRAME_WEIGHT
) -> tuple[Tensor, float]:
    """How far `film` is from `video`, both [B, 3, F, H, W] in [-1, 1], and its PSNR in dB.

    L1 and squares, with more weight where something moves and `first_frame` times that of the others on the
    first frame, and L1 of the edges.
    """
    error = film - video
    with torch.no_grad():
        weight = 1 + MOTION_WEIGHT * (video - video.median(dim=2, keepdim=True).values).abs()
        weight[:, :, 0] *= first_frame
        weight = weight / weight.mean()
    edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
    loss = (weight * (error.abs() + error.square())).mean() + EDGE_WEIGHT * edges
    return loss, psnr(film.detach(), video)


def psnr(film: Tensor, video: Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of films in [-1, 1]."""
    return -10 * torch.log10((film - video).div(2).square().mean()).item()


def start(module: nn.Module, generator: torch.Generator) -> None:
    """Draw first weights: convolutions keep the variance, residual branches begin small."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith("gamma"):
                parameter.fill_(1)
            elif parameter.ndim < 2:
                parameter.zero_()
            else:
                drawn = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
                branch_end = name.endswith(("residual.6.weight", "proj.weight", "conv2.conv.weight"))
                parameter.copy_(0.2 * drawn if branch_end else drawn)


@torch.no_grad()
def fold_constants(vae: VideoVAE) -> None:
    """Take latents of mean 0 and deviation 1 to the published ones, exactly, without changing any picture.

    Both convolutions next to the latents are 1 x 1 x 1.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    half = vae.config.z_dim
    vae.conv1.weight[:half] *= std
    vae.conv1.bias[:half] = vae.conv1.bias[:half] * std.flatten() + mean.flatten()
    vae.conv1.weight[half:] = 0  # the log-variance, which nothing reads: inference takes the mean
    vae.conv1.bias[half:] = -10
    weight = vae.conv2.weight
    weight /= std.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= weight[..., 0, 0, 0] @ mean.flatten()
