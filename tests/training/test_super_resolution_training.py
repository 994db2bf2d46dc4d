"""The training of super-resolution: where its films begin, pairs of clips, and runs of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_networks import NEGATIVE, tensors, text_encoder
from torch import Tensor
from torch.nn import functional as F

from happyhorse.model.config import TransformerConfig
from happyhorse.model.packing import Latents
from happyhorse.model.prompt import Tokenizer
from happyhorse.model.tiny_tokenizer import tiny_tokenizer
from happyhorse.model.transformer import JointTransformer
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.stages import network_of, sample_super_resolution
from happyhorse.sampler.super_resolution import prepare, resize_video
from happyhorse.training import super_resolution
from happyhorse.training.data.pool import training_clip, training_clip_attributes
from happyhorse.training.data.world import caption
from happyhorse.training.flow import initialise
from happyhorse.training.generators import generator
from happyhorse.training.loop import train
from happyhorse.training.super_resolution import (
    PairData,
    Pairs,
    PairsInTurns,
    SuperResolutionSettings,
    SuperResolutionStage,
    drawn_pair_loss,
    roughened,
)
from happyhorse.training.world_data import encode_clips

CONFIG = TransformerConfig(
    num_layers=3, hidden_size=32, head_dim=16, num_query_groups=1, video_in_channels=16, audio_in_channels=4,
    text_in_channels=12, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(), frame_receptive_field=1,
    enable_attn_gating=True, coords_style="v1",
)  # fmt: skip
SMOOTH = {"rough_noise": 0.0, "rough_blur": 0.0}


def transformer(seed: int = 0, config: TransformerConfig = CONFIG) -> JointTransformer:
    module = JointTransformer(config, compute_dtype=torch.float32)
    initialise(module, seed)
    return module


def random_pairs(draw: torch.Generator, films: int = 2) -> Pairs:
    """Large films are the small ones with the same fine pattern everywhere."""
    small = torch.randn(films, 4, 3, 2, 2, generator=draw)
    fine = torch.randn(4, 1, 2, 2, generator=generator(7, "pattern")).repeat(1, 3, 2, 2)
    audio = torch.randn(films, 9, 4, generator=draw)
    text = torch.randint(0, 20, (films, 5), generator=draw)
    return Pairs(Latents(small, audio), resize_video(small, 4, 4) + fine, text)


class Random:
    """Another random batch for every index."""

    fingerprint = "random"

    def batch(self, index: int) -> Pairs:
        return random_pairs(generator(7, "data", index))


def stage(
    settings: SuperResolutionSettings, seed: int = 0, config: TransformerConfig = CONFIG
) -> SuperResolutionStage:
    return SuperResolutionStage(
        transformer(seed, config), Random(), NEGATIVE, settings, Accelerator(cpu=True), text_encoder()
    )


@pytest.mark.parametrize("image", [0.0, 1.0])
def test_lines_begin_where_the_sampler_begins(monkeypatch: pytest.MonkeyPatch, image: float) -> None:
    pairs = random_pairs(generator(0, "film"), films=1)
    noise = FilmNoise(5).super_resolution(Latents(pairs.large, pairs.small.audio))
    text = torch.zeros(1, 5, 12)
    trained, sampled = [], []
    monkeypatch.setattr(super_resolution, "normal_like", lambda _like, _draw: noise)
    monkeypatch.setattr(super_resolution, "sample_sigmas", lambda films, _shift, _draw: torch.ones(films))
    settings = SuperResolutionSettings(steps=1, image=image, negative=0.0, **SMOOTH)
    drawn_pair_loss(
        lambda noisy, _: trained.append(noisy) or noisy, pairs._replace(text=text), text[:, :2], settings, 0
    )
    sample_super_resolution(
        lambda latents, _: sampled.append(latents) or latents, pairs.small, noise, text, negative=None,
        steps=5, first_frame=pairs.large[:, :, :1] if image else None,
    )  # fmt: skip
    assert torch.equal(trained[0].video, sampled[0].video)
    assert torch.equal(trained[0].audio, sampled[0].audio)


def test_the_velocity_that_is_trained_takes_the_sampler_to_the_large_film() -> None:
    pairs = random_pairs(generator(0, "film"))
    noise = FilmNoise(5).super_resolution(Latents(pairs.large, pairs.small.audio))
    start = prepare(pairs.small, noise, 4, 4)
    velocity = Latents(start.video - pairs.large, torch.zeros_like(start.audio))
    film = sample_super_resolution(
        lambda *_: velocity, pairs.small, noise, torch.zeros(2, 5, 12), negative=None, steps=5,
        first_frame=None,
    )  # fmt: skip
    torch.testing.assert_close(film.video, pairs.large, rtol=0, atol=2e-3)
    assert (resize_video(pairs.small.video, 4, 4) - pairs.large).abs().mean() > 0.3
    assert film.audio is pairs.small.audio


def test_the_loss_is_that_of_the_video_alone() -> None:
    pairs = random_pairs(generator(0, "film"))._replace(text=torch.zeros(2, 5, 12))
    settings = SuperResolutionSettings(steps=1, negative=0.0)
    _, found = drawn_pair_loss(
        lambda noisy, _: noisy._replace(audio=noisy.audio + 100), pairs, torch.zeros(1, 2, 12), settings, 0
    )
    assert found.keys() == {"loss", "video_loss"} and found["loss"] == found["video_loss"] < 10


def test_small_films_are_made_worse_by_shares_of_their_own_or_not_at_all() -> None:
    video = torch.randn(64, 4, 3, 2, 2, generator=generator(0, "video"))
    settings = SuperResolutionSettings(steps=1, rough_noise=0.5, rough_blur=0.0)
    assert torch.equal(roughened(video, replace(settings, **SMOOTH), generator(0, "rough")), video)
    noise = (roughened(video, settings, generator(0, "rough")) - video).flatten(1).std(dim=1)
    assert noise.min() < 0.1 and 0.4 < noise.max() < 0.65
    blurred = roughened(video, replace(settings, rough_noise=0.0, rough_blur=1.0), generator(0, "rough"))
    mean = (F.pad(video, (1, 1, 1, 1, 0, 0), mode="replicate").unfold(3, 3, 1).unfold(4, 3, 1)).mean((-1, -2))
    share = ((blurred - video) * (mean - video)).sum((1, 2, 3, 4)) / (mean - video).square().sum((1, 2, 3, 4))
    torch.testing.assert_close(blurred, video + share.view(-1, 1, 1, 1, 1) * (mean - video))
    assert 0 < share.min() < 0.1 and 0.9 < share.max() < 1


def test_a_trained_network_brings_films_nearer_to_the_large_ones_than_resizing_does() -> None:
    trained = stage(SuperResolutionSettings(steps=100))
    losses = [trained.step(step)["loss"] for step in range(100)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    trained.ema.copy_to(trained.networks)
    pairs = random_pairs(generator(7, "another film"))
    noise = FilmNoise(9).super_resolution(Latents(pairs.large, pairs.small.audio))
    with torch.no_grad():
        film = sample_super_resolution(
            network_of(trained.networks.transformer), pairs.small, noise, trained.text_encoder(pairs.text),
            negative=None, steps=5, first_frame=None,
        )  # fmt: skip
    resized = resize_video(pairs.small.video, 4, 4)
    assert (film.video - pairs.large).square().mean() < 0.7 * (resized - pairs.large).square().mean()


def test_layers_with_a_window_are_trained_too() -> None:
    trained = stage(SuperResolutionSettings(steps=2), config=replace(CONFIG, local_attn_layers=(0, 2)))
    before = [weight.clone() for weight in trained.networks.transformer.block.parameters()]
    for step in range(2):  # the first weights predict zero, so one step trains the last layer alone
        trained.step(step)
    pairs = zip(before, trained.networks.transformer.block.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in pairs)


def test_a_resumed_run_equals_an_unbroken_one_and_the_text_encoder_stays(tmp_path: Path) -> None:
    settings = SuperResolutionSettings(steps=4)
    whole = stage(settings)
    train(whole, tmp_path / "whole", 4, title="whole")

    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(stage(settings), tmp_path / "broken", 4, on_step=stop, title="broken")
    resumed = stage(settings, seed=5)
    train(resumed, tmp_path / "broken", 4, title="broken")
    pairs = list(zip(tensors(whole.state_dict()), tensors(resumed.state_dict()), strict=True))
    assert len(pairs) > 60
    assert all(torch.equal(one, other) for one, other in pairs)
    encoders = zip(whole.text_encoder.parameters(), text_encoder().parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in encoders)


def test_a_run_of_other_settings_or_on_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SuperResolutionSettings(steps=1)
    train(stage(settings), tmp_path, 1, title="run")
    with pytest.raises(ValueError, match="rough_blur"):
        train(stage(replace(settings, rough_blur=0.0)), tmp_path, 1, title="run")
    with pytest.raises(ValueError, match=r"with negative 0\.1 \(now 0\.0\); give"):
        train(stage(replace(settings, negative=0.0)), tmp_path, 1, title="run")
    monkeypatch.setattr(Random, "fingerprint", "another")
    with pytest.raises(ValueError, match="with other clips, captions, batches or encoders; give"):
        train(stage(settings), tmp_path, 1, title="run")


def test_the_text_encoder_and_the_metric_are_of_a_runs_settings() -> None:
    settings, other = SuperResolutionSettings(steps=1), text_encoder()
    with torch.no_grad():
        other.embed_tokens.weight[3] += 1
    made = [
        SuperResolutionStage(
            transformer(), Random(), NEGATIVE, settings, Accelerator(cpu=True), encoder, metric=metric
        ).fingerprint
        for encoder, metric in (
            (text_encoder(), None), (text_encoder(), None), (other, None), (text_encoder(), torch.eye(4)),
        )
    ]  # fmt: skip
    assert made[0] == made[1] != made[2] != made[3] != made[0]


def colours(video: Tensor) -> Tensor:
    """Stands for a VAE: [1, 3, 49, H, W] -> [1, 3, 13, H/16, W/16]."""
    return F.avg_pool3d(video, (1, 16, 16))[:, :, ::4]


def test_pairs_are_the_same_clips(tmp_path: Path) -> None:
    count, path, size = 3, tmp_path / "large.safetensors", (192, 192)
    large = encode_clips(path, count, {"video": colours}, "colours", size)["video"]
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
    assert large.dtype is torch.float16 and large.shape == (3, 3, 13, 12, 12)
    small = torch.cat([
        colours(torch.from_numpy(training_clip(i).frames).permute(3, 0, 1, 2)[None] / 127.5 - 1)
        for i in range(count + 1)
    ])  # fmt: skip
    audio = torch.arange(count + 1.0).view(-1, 1, 1).expand(-1, 51, 64)
    tiny = tiny_tokenizer(512)
    data = PairData({"video": small, "audio": audio}, large, Tokenizer(tiny), 4, seed=0)
    drawn = set()
    for index in range(2):
        pairs = data.batch(index)
        assert pairs.large.dtype is torch.float32 and len(pairs.large) == 4
        # a shape is painted in any size: its mean colours are the same
        difference = (F.avg_pool3d(pairs.large, (1, 2, 2)) - pairs.small.video).abs()
        assert difference.mean() < 0.02
        clips = pairs.small.audio[:, 0, 0].int().tolist()
        drawn.update(clips)
        for clip, tokens in zip(clips, pairs.text, strict=True):
            text = tiny.decode(tokens.tolist())
            assert caption(training_clip_attributes(clip)).startswith(text)
    assert drawn <= set(range(count)) and len(drawn) > 1
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(list(pairs)), tensors(list(data.batch(1))), strict=True)
    )
    others = [
        PairData({"video": video, "audio": audio}, twice, Tokenizer(tiny), 4, seed=0)
        for video, twice in ((small + 1, large), (small, large + 1))
    ]
    assert len({pairs.fingerprint for pairs in (data, *others)}) == 3


def test_pairs_are_drawn_in_turns_for_both_worlds() -> None:
    tokenizer = Tokenizer(tiny_tokenizer(512))
    data = [
        PairData(
            {"video": torch.full((6, 3, 1, 1, 1), value), "audio": torch.zeros(6, 1, 1)},
            torch.full((6, 3, 1, 2, 2), value), tokenizer, 2, seed=0,
        )
        for value in (0.0, 1.0)
    ]  # fmt: skip
    turns = PairsInTurns(*data)
    batches = [turns.batch(index) for index in range(6)]
    assert [pairs.small.video.mean().item() for pairs in batches] == [0, 0, 1, 1, 0, 0]
    assert all(
        torch.equal(pairs.text, data[0].batch(index).text) for index, pairs in enumerate(batches)
    )  # of each world in turns, as ever
    assert turns.fingerprint == f"{data[0].fingerprint} {data[1].fingerprint}"


def test_more_large_clips_than_small_ones_are_refused() -> None:
    large, tokenizer = torch.zeros(1, 3, 13, 12, 12), Tokenizer(tiny_tokenizer(512))
    with pytest.raises(ValueError, match="1 large clips but 0 small ones"):
        PairData({"video": large[:0], "audio": large[:0]}, large, tokenizer, 1, seed=0)
