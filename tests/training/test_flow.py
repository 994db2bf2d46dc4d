"""The flow-matching loss, and the training of the joint transformer by it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_networks import NEGATIVE, TEXT_CONFIG, filled, random_latents, tensors, text_encoder
from torch import Tensor

from happyhorse.kernels.attention import FrameWindow, windowed_by_joining
from happyhorse.model.config import TransformerConfig
from happyhorse.model.packing import Latents
from happyhorse.model.text_encoder import TextEncoder
from happyhorse.model.transformer import JointTransformer
from happyhorse.sampler.conditions import Conditions
from happyhorse.training.flow import (
    Batch,
    FlowNetworks,
    FlowSettings,
    FlowStage,
    Held,
    draw_held,
    drawn_loss,
    flow_loss,
    initialise,
    sample_sigmas,
    trainable_attention,
)
from happyhorse.training.generators import generator
from happyhorse.training.loop import train

CONFIG = TransformerConfig(
    num_layers=3, hidden_size=32, head_dim=16, num_query_groups=1, video_in_channels=16, audio_in_channels=4,
    text_in_channels=12, mm_layers=(0,), gelu7_layers=(0,), local_attn_layers=(), frame_receptive_field=1,
    enable_attn_gating=True, coords_style="v2",
)  # fmt: skip


def transformer(seed: int = 0, config: TransformerConfig = CONFIG) -> JointTransformer:
    return filled(JointTransformer(config, compute_dtype=torch.float32), seed)


class Random:
    """Another random batch for every index, or the first one always; with tokens, or text states."""

    fingerprint = "random"

    def __init__(self, fixed: bool = False, states: bool = False) -> None:
        self.fixed, self.states = fixed, states

    def batch(self, index: int) -> Batch:
        draw = generator(7, "data", 0 if self.fixed else index)
        text = torch.randint(0, 20, (2, 5), generator=draw)
        return Batch(
            random_latents(draw), torch.nn.functional.one_hot(text % 12, 12).float() if self.states else text
        )


def accelerator(batches: int = 1) -> Accelerator:
    return Accelerator(cpu=True, gradient_accumulation_steps=batches)


def stage(settings: FlowSettings, data: Random | None = None, batches: int = 1) -> FlowStage:
    return FlowStage(
        transformer(), data or Random(), NEGATIVE, settings, accelerator(batches), text_encoder()
    )


def test_noise_levels_follow_the_shifted_schedule() -> None:
    draw = generator(0, "levels")
    sigma = torch.cat([sample_sigmas(16, 5.0, draw) for _ in range(200)])
    u = sigma / (5 - 4 * sigma)  # the schedule solved for u
    assert sigma.min() >= 0 and sigma.max() < 1
    shares = torch.histc(u, bins=10, min=0, max=1) / len(u)
    assert (shares - 0.1).abs().max() < 0.01
    assert sigma.mean() > 0.7


def test_the_exact_velocity_costs_nothing() -> None:
    draw = generator(0, "exact")
    clean, noise = random_latents(draw), random_latents(draw)
    velocity = noise.map(torch.sub, clean)
    sigma = torch.tensor([0.3, 0.9])
    loss, figures = flow_loss(lambda *_: velocity, clean, torch.zeros(2, 5, 12), sigma, noise)
    assert loss == 0 and set(figures) == {"loss", "video_loss", "audio_loss"}


def test_noisy_latents_are_those_of_the_sampler_with_its_held_parts() -> None:
    draw = generator(0, "held")
    clean, noise, sigma = random_latents(draw), random_latents(draw), torch.tensor([0.25, 0.75])
    held = Held(frames=torch.tensor([1, 0]), audio=torch.tensor([False, True]))
    seen = []
    flow_loss(
        lambda noisy, _: seen.append(noisy) or noisy, clean, torch.zeros(2, 5, 12), sigma, noise, held,
    )  # fmt: skip
    for film, conditions in enumerate(
        (Conditions(first_frame=clean.video[:1, :, :1]), Conditions(audio=clean.audio[1:]))
    ):
        level = sigma[film].item()
        mixed = clean.map(lambda x, e, s=level, i=film: ((1 - s) * x + s * e)[i : i + 1], noise)
        for found, expected in zip(seen[0], conditions.apply(mixed), strict=True):
            torch.testing.assert_close(found[film : film + 1], expected, rtol=0, atol=0)


def test_longer_beginnings_are_held_whole() -> None:
    draw = generator(0, "beginning")
    clean, noise, sigma = random_latents(draw), random_latents(draw), torch.tensor([0.5, 0.5])
    errors, seen = random_latents(draw), []
    velocity = noise.map(lambda e, x, error: e - x + error, clean, errors)
    held = Held(frames=torch.tensor([2, 1]), audio=torch.tensor([True, True]))
    _, figures = flow_loss(
        lambda noisy, _: seen.append(noisy.video) or velocity,
        clean, torch.zeros(2, 5, 12), sigma, noise, held,
    )  # fmt: skip
    assert torch.equal(seen[0][0, :, :2], clean.video[0, :, :2])
    assert torch.equal(seen[0][1, :, :1], clean.video[1, :, :1])
    made = [errors.video[0, :, 2:], errors.video[1, :, 1:]]
    squares = torch.cat([x.square().mean(dim=(0, 2, 3)) for x in made])
    assert figures["video_loss"] == pytest.approx(squares.mean().item(), rel=1e-5)


@pytest.mark.parametrize("beginning", [1, 6])
def test_beginnings_are_drawn_the_more_seldom_the_longer(beginning: int) -> None:
    settings = FlowSettings(steps=1, image=0.4, beginning=beginning, audio=0.12)
    held = draw_held(20_000, settings, generator(0, "draw"))
    counts = torch.bincount(held.frames, minlength=beginning + 1) / len(held.frames)
    assert counts[0].item() == pytest.approx(0.6, abs=0.02) and len(counts) == beginning + 1
    assert (counts[1:-1] > counts[2:]).all()
    assert held.audio.float().mean().item() == pytest.approx(0.12, abs=0.02)
    nothing = draw_held(100, FlowSettings(steps=1, image=0.0, audio=0.0), generator(0, "draw"))
    assert not nothing.frames.any() and not nothing.audio.any()


def test_what_is_held_has_no_loss_and_the_first_frame_its_own_weight() -> None:
    draw = generator(0, "weights")
    clean, noise, sigma = random_latents(draw), random_latents(draw), torch.tensor([0.5, 0.5])
    errors = random_latents(draw)
    velocity = noise.map(lambda e, x, error: e - x + error, clean, errors)

    def figures(held: Held | None = None, first_frame: float = 1.0) -> dict[str, float]:
        text = torch.zeros(2, 5, 12)
        return flow_loss(lambda *_: velocity, clean, text, sigma, noise, held, first_frame=first_frame)[1]

    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    square = errors.video.square()
    held = figures(Held(yes, no))
    assert held["video_loss"] == pytest.approx(square[:, :, 1:].mean().item(), rel=1e-5)
    assert held["audio_loss"] == pytest.approx(errors.audio.square().mean().item(), rel=1e-5)
    silent = figures(Held(no, yes))
    assert silent.keys() == {"loss", "video_loss"} and silent["loss"] == silent["video_loss"]
    weighted = figures(first_frame=4.0)
    frames = square.mean(dim=(0, 1, 3, 4))
    assert weighted["video_loss"] == pytest.approx((frames @ torch.tensor([4.0, 1, 1]) / 6).item(), rel=1e-5)
    assert weighted["loss"] == pytest.approx(weighted["video_loss"] + weighted["audio_loss"], 1e-5)


def test_a_metric_weighs_the_channels_of_the_error() -> None:
    draw = generator(0, "metric")
    clean, noise, errors = random_latents(draw), random_latents(draw), random_latents(draw)
    velocity, sigma = noise.map(lambda e, x, error: e - x + error, clean, errors), torch.tensor([0.5, 0.5])

    def video_loss(metric: Tensor | None) -> float:
        figures = flow_loss(lambda *_: velocity, clean, torch.zeros(2, 5, 12), sigma, noise, metric=metric)[1]
        return figures["video_loss"]

    scales = torch.arange(1.0, 1.0 + errors.video.shape[1])
    by_channel = errors.video.square().mean(dim=(0, 2, 3, 4))
    assert video_loss(torch.eye(len(scales))) == pytest.approx(video_loss(None), rel=1e-5)
    expected = (by_channel * scales.square()).mean().item()
    assert video_loss(scales.diag()) == pytest.approx(expected, rel=1e-5)


def test_every_weight_of_both_networks_gets_a_gradient() -> None:
    networks = FlowNetworks(transformer(), text_encoder())
    batch = Random().batch(0)
    settings = FlowSettings(steps=1, negative=0.0)
    drawn_loss(networks, batch, NEGATIVE, settings, 0)[0].backward()
    without = [
        name for name, weight in networks.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert not without


def test_the_gradient_is_that_of_finite_differences() -> None:
    network = FlowNetworks(transformer()).double()
    for module in network.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float64
    draw = generator(0, "differences")
    clean, noise = random_latents(draw), random_latents(draw)
    text, weight = (
        torch.randn(2, 5, 12, generator=draw),
        network.transformer.block.layers[0].mlp.down_proj.weight,
    )

    def loss() -> Tensor:
        return flow_loss(network, clean, text, torch.tensor([0.4, 0.8]), noise)[0]

    (slope,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=draw).to(weight)
    with torch.no_grad():
        weight += 3e-3 * direction
        above = loss()
        weight -= 6e-3 * direction
        below = loss()
    assert ((above - below) / 6e-3).item() == pytest.approx((slope * direction).sum().item(), rel=0.02)


def test_windowed_attention_is_trained_through_every_weight_of_its_softmax() -> None:
    draw = generator(0, "window")
    q, k, v = (torch.randn(1, 2, 20, 8, generator=draw, requires_grad=True) for _ in range(3))
    window, direction = FrameWindow(4, 4, 1), torch.randn(1, 2, 20, 8, generator=draw)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 8**0.5).softmax(dim=-1) @ v

    found = torch.autograd.grad((trainable_attention(q, k, v, window) * direction).sum(), (q, k, v))
    expected = torch.autograd.grad((windowed_by_joining(plain, q, k, v, window) * direction).sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_first_weights_predict_zero_and_keep_the_stream_near_unit_size() -> None:
    networks = FlowNetworks(JointTransformer(CONFIG, compute_dtype=torch.float32), TextEncoder(TEXT_CONFIG))
    initialise(networks, 3)
    batch, streams = Random().batch(0), []
    networks.transformer.block.layers[-1].register_forward_hook(lambda *call: streams.append(call[-1]))
    with torch.no_grad():
        velocity = networks(*batch)
    assert not velocity.video.any() and not velocity.audio.any()
    assert 0.5 < streams[0].std() < 5


def test_the_loss_falls_on_a_fixed_batch() -> None:
    trained = stage(FlowSettings(steps=60, image=0.0, audio=0.0, negative=0.0), Random(fixed=True))
    losses = [trained.step(step)["loss"] for step in range(60)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_bfloat16_linears_train_float32_weights() -> None:
    network = filled(JointTransformer(CONFIG), 0)
    trained = FlowStage(
        network, Random(fixed=True, states=True), torch.zeros(1, 2, 12), FlowSettings(steps=40, negative=0.0),
        accelerator(),
    )  # fmt: skip
    losses = [trained.step(step)["loss"] for step in range(40)]
    assert network.block.layers[0].mlp.up_gate_proj.weight.dtype is torch.float32
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_two_batches_to_an_update_give_the_mean_of_their_gradients() -> None:
    settings = FlowSettings(steps=4, image=0.0, audio=0.0, negative=0.0)
    two = stage(settings, batches=2)
    found = []
    for optimizer in two.optimizers:
        optimizer.step = lambda o=optimizer: found.extend(
            weight.grad.clone() for group in o.param_groups for weight in group["params"]
        )
    figures = two.step(1)
    one = stage(settings)
    losses = [drawn_loss(one.networks, Random().batch(i), NEGATIVE, settings, i)[0] for i in (2, 3)]
    (sum(losses) / 2).backward()
    weights = [w for optimizer in one.optimizers for group in optimizer.param_groups for w in group["params"]]
    assert figures["loss"] == pytest.approx(sum(loss.item() for loss in losses) / 2)
    for grad, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(grad, weight.grad, rtol=1e-4, atol=1e-6)


def test_dropped_text_is_the_negative_prompt_of_its_own_length() -> None:
    seen = []

    def velocity(noisy: Latents, text: Tensor) -> Latents:
        seen.append(text)
        return noisy

    settings = FlowSettings(steps=1, negative=0.5)
    for index in range(40):
        drawn_loss(velocity, Random().batch(index), NEGATIVE, settings, index)
    dropped = [text for text in seen if text.shape[1] == 2]
    assert 10 < len(dropped) < 30
    assert all(torch.equal(text, NEGATIVE.expand(2, 2)) for text in dropped)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    settings = FlowSettings(steps=6)
    whole = stage(settings, batches=2)
    train(whole, tmp_path / "whole", 6, title="whole")
    broken = stage(settings, batches=2)

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(broken, tmp_path / "broken", 6, on_step=stop, title="broken")
    resumed = FlowStage(transformer(5), Random(), NEGATIVE, settings, accelerator(2), text_encoder(6))
    train(resumed, tmp_path / "broken", 6, title="broken")
    pairs = list(zip(tensors(whole.state_dict()), tensors(resumed.state_dict()), strict=True))
    assert len(pairs) > 60
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = FlowSettings(steps=2)
    train(stage(settings), tmp_path, 2, title="run")
    with pytest.raises(ValueError, match="shift"):
        train(stage(replace(settings, shift=3.0)), tmp_path, 2, title="run")


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    train(stage(FlowSettings(steps=1)), tmp_path, 1, title="run")
    other = Random()
    other.fingerprint = "another"
    with pytest.raises(ValueError, match="with other clips, captions, batches or encoders; give"):
        train(stage(FlowSettings(steps=1), other), tmp_path, 1, title="run")


def test_a_run_with_another_negative_prompt_or_share_of_it_is_refused(tmp_path: Path) -> None:
    settings = FlowSettings(steps=1)
    train(stage(settings), tmp_path, 1, title="run")
    with pytest.raises(ValueError, match=r"with negative 0\.1 \(now 0\.9\); give"):
        train(stage(replace(settings, negative=0.9)), tmp_path, 1, title="run")
    other = stage(settings)
    other.negative = other.negative + 1
    with pytest.raises(ValueError, match="with another negative prompt or text encoder; give"):
        train(other, tmp_path, 1, title="run")
