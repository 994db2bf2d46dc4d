"""Training of the video VAE and of the light decoder."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from happyhorse.model.config import PONY
from happyhorse.model.video_vae import VideoVAE, denormalize_latents
from happyhorse.training import video_vae
from happyhorse.training.data.pool import VideoPool
from happyhorse.training.generators import generator
from happyhorse.training.loop import train
from happyhorse.training.patch_codec import PatchCodec, fit
from happyhorse.training.video_vae import (
    BUSY_ROUND,
    DOUBLE_ROUND,
    JUMP_ROUND,
    JUMP_WEIGHT,
    LATENT_NOISE,
    ROUGH_NOISE,
    ROUGH_ROUND,
    VideoDecoderStage,
    VideoVAEStage,
    decode_film,
    encode_film,
    fold_constants,
    jumping,
    picture_loss,
    psnr,
    round_rate,
    start,
)

VAE = replace(PONY.video_vae, dim=4, dec_dim=4)
DECODER = replace(PONY.video_decoder, decoder_block_out_channels=(4, 4, 4, 4))


@pytest.fixture(autouse=True)
def small_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EARLY_CROPS", "LATE_CROPS"):
        monkeypatch.setattr(video_vae, name, (2, 32))


@pytest.fixture(scope="module")
def pool() -> VideoPool:
    return VideoPool(4, 0)


@pytest.fixture(scope="module")
def codec(pool: VideoPool) -> PatchCodec:
    return fit((pool.crops(1, 96, Random(i)) for i in range(8)), generator(0, "codec"))


@pytest.fixture
def vae() -> VideoVAE:
    vae = VideoVAE(VAE).requires_grad_(False)
    start(vae, generator(1))
    return vae


def test_two_chunks_give_what_small_chunks_give(vae: VideoVAE, pool: VideoPool) -> None:
    film = pool.crops(1, 48, Random(0))[:, :, :21]
    latents = encode_film(vae, film)
    torch.testing.assert_close(latents, denormalize_latents(vae.encode(film)), rtol=0, atol=1e-5)
    pixels = decode_film(vae, denormalize_latents(latents))
    torch.testing.assert_close(pixels.clamp(-1, 1), vae.decode(latents), rtol=0, atol=1e-5)


def test_folding_moves_the_latents_and_no_picture(vae: VideoVAE, pool: VideoPool) -> None:
    film = pool.crops(1, 32, Random(0))[:, :, :9]
    raw = encode_film(vae, film)
    before = decode_film(vae, raw).clamp(-1, 1)
    fold_constants(vae)
    latents = vae.encode(film)
    torch.testing.assert_close(latents, raw, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["video_vae", "video_decoder"])
def test_training_makes_pictures_better(part: str, pool: VideoPool, codec: PatchCodec) -> None:
    stage = _stage(part, pool, codec, steps=120)
    figures = [stage.step(i) for i in range(36)]
    first, last = (sum(f["loss"] for f in half) for half in (figures[:6], figures[-6:]))
    assert last < 0.8 * first
    assert psnr(torch.zeros(1), torch.ones(1)) == pytest.approx(6.02, abs=0.01)


def test_the_trained_vae_has_the_codecs_latents(pool: VideoPool, codec: PatchCodec) -> None:
    stage = _stage("video_vae", pool, codec, steps=300)
    film = pool.crops(1, 48, Random(5))
    before = (encode_film(stage.module, film) - codec.encode(film)).square().mean()
    for step in range(90):
        stage.step(step)
    after = (stage.trained().encode(film) - codec.encode(film)).square().mean()
    assert after < 0.9 * before


def test_rates_fall_in_every_round_and_start_lower_in_the_next() -> None:
    rates = [round_rate(step, 1000) for step in range(2000)]
    assert max(rates[:1000]) == 1 and max(rates[1000:]) == 0.5
    assert rates[999] < 1e-3 and rates[1999] < 1e-3
    assert rates[20:1000] == sorted(rates[20:1000], reverse=True)


def test_a_share_of_the_crops_is_of_clips_of_twice_the_size() -> None:
    pool = VideoPool(1, 1)
    pool.clips = [np.full_like(frames, value) for frames, value in zip(pool.clips, (0, 255), strict=True)]
    crops = pool.crops(20, 16, Random(0), double=1.0)
    assert (crops == 1).all()
    few = pool.crops(200, 16, Random(0), double=0.5).amax(dim=(1, 2, 3, 4)).add(1).mean() / 2
    assert 0.6 < few < 0.9  # half, and half of the others
    assert (VideoPool(1, 0).crops(1, 16, Random(0), double=1.0).shape) == (1, 3, 49, 16, 16)


def test_every_other_crop_is_the_busiest_of_some_tries(pool: VideoPool) -> None:
    def motion(tries: int) -> list[float]:
        crops = torch.cat([pool.crops(4, 32, Random(seed), tries=tries) for seed in range(20)])
        return crops.std(dim=2).mean(dim=(1, 2, 3)).view(-1, 2).mean(dim=0).tolist()

    plain, busy = motion(1), motion(4)
    assert busy[1] > 1.5 * plain[1] and busy[1] > 1.5 * busy[0]
    assert busy[0] == pytest.approx(plain[0], rel=0.3)


def test_the_light_decoder_sees_rough_latents_in_the_last_rounds(
    pool: VideoPool, codec: PatchCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, seen = _stage("video_decoder", pool, codec, steps=1), []
    decode = stage.decode
    monkeypatch.setattr(stage, "decode", lambda latents: seen.append(latents) or decode(latents))
    monkeypatch.setattr(codec.__class__, "encode", lambda _self, video: torch.zeros(len(video), 48, 13, 2, 2))
    for step in (ROUGH_ROUND - 1, ROUGH_ROUND, ROUGH_ROUND + 1):
        stage.step(step)
    sizes = [[film.std().item() for film in films] for films in seen]
    assert all(size == pytest.approx(LATENT_NOISE, rel=0.1) for size in sizes[0])
    rough = [size for films in sizes[1:] for size in films]
    assert len(set(rough)) == len(rough) and max(rough) < 1.1 * ROUGH_NOISE and max(rough) > 2 * LATENT_NOISE


def test_the_light_decoder_sees_every_other_film_jump_in_the_last_round(
    pool: VideoPool, codec: PatchCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, jumps = _stage("video_decoder", pool, codec, steps=2), []

    def loss(film: torch.Tensor, video: torch.Tensor, first_frame: float) -> tuple[torch.Tensor, float]:
        own = stage._crops(step, video_vae.DOUBLE_SHARE, video_vae.BUSY_TRIES)
        assert torch.equal(video[:, :, 1:], own[:, :, 1:])
        jumps.append((not torch.equal(video, own), first_frame))
        return picture_loss(film, video, first_frame)

    monkeypatch.setattr(video_vae, "picture_loss", loss)
    for step in range(2 * JUMP_ROUND - 1, 2 * JUMP_ROUND + 2):
        stage.step(step)
    assert jumps == [(False, 2), (False, 2), (True, JUMP_WEIGHT)]


@pytest.mark.parametrize(("part", "later"), [("video_vae", False), ("video_decoder", True)])
def test_only_the_light_decoder_sees_large_and_busy_crops_and_from_their_rounds_on(
    part: str, later: bool, pool: VideoPool, codec: PatchCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, seen = _stage(part, pool, codec, steps=2), []

    def crops(count: int, side: int, random: Random, double: float, tries: int) -> torch.Tensor:
        seen.append((double > 0, tries > 1))
        return VideoPool.crops(pool, count, side, random)

    monkeypatch.setattr(pool, "crops", crops)
    turns = sorted({0, DOUBLE_ROUND - 1, DOUBLE_ROUND, BUSY_ROUND - 1, BUSY_ROUND})
    for turn in turns:
        stage.step(2 * turn)
    wanted = [(turn >= DOUBLE_ROUND, turn >= BUSY_ROUND) for turn in turns]
    assert seen == (wanted if later else [(False, False)] * len(turns))


def test_a_jump_puts_another_of_the_frames_first() -> None:
    film = torch.arange(7.0).view(1, 1, 7, 1, 1)
    starts = {jumping(film, Random(seed))[0, 0, 0].item() for seed in range(50)}
    assert starts == set(range(7))


def test_the_first_frame_can_weigh_more() -> None:
    film = torch.zeros(1, 3, 5, 4, 4)
    video = film.clone()
    video[:, :, 0] = 0.5
    losses = [picture_loss(film, video, weight)[0] for weight in (1, 2, 8)]
    motion = 1 + video_vae.MOTION_WEIGHT * 0.5  # the first frame differs from the others
    shares = [motion * weight / (4 + motion * weight) for weight in (1, 2, 8)]
    assert [float(loss) for loss in losses] == pytest.approx([share * (0.5 + 0.25) for share in shares])


@pytest.mark.parametrize("part", ["video_vae", "video_decoder"])
def test_a_resumed_run_equals_an_unbroken_one(
    part: str, pool: VideoPool, codec: PatchCodec, tmp_path: Path
) -> None:
    def run(folder: str, steps: int) -> dict[str, torch.Tensor]:
        stage = _stage(part, pool, codec, steps=4)
        train(stage, tmp_path / folder, steps, title=part)
        return stage.trained().state_dict()

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _stage(part: str, pool: VideoPool, codec: PatchCodec, steps: int) -> VideoVAEStage | VideoDecoderStage:
    if part == "video_vae":
        return VideoVAEStage(VAE, codec, pool, steps, seed=0)
    return VideoDecoderStage(DECODER, codec, pool, steps, seed=0)


def test_the_light_decoder_can_be_trained_in_bfloat16(pool: VideoPool, codec: PatchCodec) -> None:
    decoder = VideoDecoderStage(DECODER, codec, pool, 4, seed=0, dtype=torch.bfloat16)
    loss, want = (stage.step(0)["loss"] for stage in (decoder, _stage("video_decoder", pool, codec, 4)))
    assert loss != want and loss == pytest.approx(want, rel=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in decoder.module.parameters())
