"""LoRA training on a small transformer: what is trained, how it is saved, and that it is loaded as it was."""

import re
import weakref
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from small_networks import filled

from happyhorse.kernels.scaled_matmul import scaled_linear
from happyhorse.model.config import TransformerConfig
from happyhorse.model.lora import Strengths, patches, transformer_shapes
from happyhorse.model.lora_formats import open_lora
from happyhorse.model.operations import ModalityLinear
from happyhorse.model.packing import Latents
from happyhorse.model.padding import pad_feed_forward
from happyhorse.model.quant import QuantizedWeight, quantize
from happyhorse.model.transformer import JointTransformer
from happyhorse.training.flow import Batch, FlowNetworks
from happyhorse.training.generators import generator
from happyhorse.training.loop import train
from happyhorse.training.lora import BackwardStream, LoraSettings, LoraStage, targets
from happyhorse.training.lora_run import accelerator_on

CONFIG = TransformerConfig(
    num_layers=4, hidden_size=64, head_dim=16, num_query_groups=2, video_in_channels=16, audio_in_channels=4,
    text_in_channels=12, mm_layers=(0, 3), gelu7_layers=(0,), local_attn_layers=(), frame_receptive_field=1,
    enable_attn_gating=True, coords_style="v2",
)  # fmt: skip
SETTINGS = LoraSettings(steps=30, rank=4, alpha=6.0, rate=1e-2, negative=0.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_film_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold nothing clean, so that losses of one batch can be compared."""
    monkeypatch.setattr(LoraSettings, "image", 0.0)
    monkeypatch.setattr(LoraSettings, "audio", 0.0)


def transformer(dtype: torch.dtype = torch.float32) -> JointTransformer:
    return filled(JointTransformer(CONFIG, compute_dtype=dtype), 0).requires_grad_(False)


def quantized(format: str) -> JointTransformer:
    module = transformer()
    for leaf in module.modules():
        if isinstance(leaf, ModalityLinear):
            leaf.hold(quantize(leaf.weight.data, format))
    return module


class Fixed:
    """One batch always."""

    fingerprint = "fixed"

    def batch(self, index: int) -> Batch:  # noqa: ARG002
        draw = generator(7, "data")
        video, audio = torch.randn(2, 4, 3, 4, 4, generator=draw), torch.randn(2, 9, 4, generator=draw)
        return Batch(Latents(video, audio), torch.randn(2, 5, 12, generator=draw))


class Changing(Fixed):
    """Another batch for every index."""

    def batch(self, index: int) -> Batch:
        draw = generator(8, "data", index)
        return Batch(
            super().batch(0).clean.map(lambda x: torch.randn(x.shape, generator=draw)), super().batch(0).text
        )


def stage(
    module: JointTransformer | None = None, settings: LoraSettings = SETTINGS, data: Fixed | None = None,
    resident: int | None = None, batches: int = 1,
) -> LoraStage:  # fmt: skip
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=batches)
    return LoraStage(
        module or transformer(),
        data or Fixed(),
        torch.zeros(1, 3, 12),
        settings,
        accelerator,
        "base",
        "its file",
        resident,
    )


def test_the_learning_rate_rises_stays_and_falls() -> None:
    trained, rates = stage(settings=replace(SETTINGS, steps=100)), []
    for step in (0, 9, 50, 90, 99):
        trained.step(step)
        rates.append(trained.optimizer.param_groups[0]["lr"] / SETTINGS.rate)
    assert rates == pytest.approx([1 / 20, 10 / 20, 1, 10 / 40, 1 / 40])


def test_long_gradients_are_cut_and_their_length_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, seen = stage(), []
    for parameter in trained.adapters.parameters():
        parameter.register_hook(lambda gradient: 1e6 * gradient)

    def norm() -> None:
        gradients = [p.grad.flatten() for p in trained.adapters.parameters() if p.grad is not None]
        seen.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(trained.optimizer, "step", norm)
    assert trained.step(0)["gradient"] > 10
    assert seen == [pytest.approx(1.0, rel=1e-3)]


def velocity(module: JointTransformer) -> Latents:
    with torch.no_grad():
        return FlowNetworks(module)(*Fixed().batch(0))


def error(found: Latents, expected: Latents) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def trained(lora: LoraStage, steps: int = 8) -> list[float]:
    return [lora.step(step)["loss"] for step in range(steps)]


def with_averages(lora: LoraStage) -> Latents:
    lora.ema.copy_to(lora.adapters)
    return velocity(lora.networks.transformer)


def loaded(path: Path, module: JointTransformer, strength: float = 1.0) -> JointTransformer:
    """The module with the LoRA of a file in its weights."""
    found = patches([(open_lora(path), Strengths(strength))], CONFIG, transformer_shapes(CONFIG))
    for name, changes in found.items():
        leaf = module.get_submodule(name.removesuffix(".weight"))
        if leaf.quantized is not None:
            leaf.patches = tuple(changes)
        else:
            for change in changes:
                change(leaf.weight.data)
    return module


def test_the_loss_falls_on_a_fixed_batch_and_the_weights_stay() -> None:
    module = transformer()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    losses = trained(stage(module), 30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_an_untrained_lora_and_one_that_was_taken_off_are_bit_identical_to_none() -> None:
    module = transformer()
    plain = velocity(module)
    lora = stage(module)
    assert error(velocity(module), plain) == 0
    trained(lora)
    assert error(velocity(module), plain) > 1e-3
    lora.close()
    assert all(torch.equal(a, b) for a, b in zip(velocity(module), plain, strict=True))


@pytest.mark.parametrize("format", [None, "float8_e4m3fn", "Q8_0"])
def test_a_saved_lora_gives_the_velocity_it_had_in_training(tmp_path: Path, format: str | None) -> None:
    def base() -> JointTransformer:
        return quantized(format) if format else transformer()

    lora = stage(base())
    trained(lora)
    lora.save(tmp_path / "a.safetensors")
    expected, plain = with_averages(lora), velocity(base())
    assert error(expected, plain) > 1e-2
    assert error(velocity(loaded(tmp_path / "a.safetensors", base())), expected) < 1e-5
    assert error(velocity(loaded(tmp_path / "a.safetensors", base(), 0.0)), plain) == 0


def test_a_lora_of_bfloat16_linears_is_saved_as_such(tmp_path: Path) -> None:
    lora = stage(transformer(torch.bfloat16))
    trained(lora)
    lora.save(tmp_path / "a.safetensors")
    expected = with_averages(lora)
    assert set(open_lora(tmp_path / "a.safetensors").file.tensors) == set(lora._tensors(torch.bfloat16))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert (
            file.get_tensor("diffusion_model.block.layers.1.mlp.down_proj.lora_A.weight").dtype
            is torch.bfloat16
        )
    found = velocity(loaded(tmp_path / "a.safetensors", transformer(torch.bfloat16)))
    assert error(found, expected) < 0.02


def test_names_shapes_and_header_are_those_of_peft_with_alphas(tmp_path: Path) -> None:
    stage().save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        shapes = {key: list(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
        alpha, header = file.get_tensor("diffusion_model.block.layers.0.mlp.down_proj.alpha"), file.metadata()
    assert len(shapes) == 4 * 4 * 3
    assert shapes["diffusion_model.block.layers.0.attention.linear_qkv.lora_A.weight"] == [4, 64]
    assert shapes["diffusion_model.block.layers.0.attention.linear_qkv.lora_B.weight"] == [3 * 132, 4]
    assert shapes["diffusion_model.block.layers.1.mlp.up_gate_proj.lora_B.weight"] == [2 * 168, 4]
    assert alpha == 6 and header["rank"] == "4" and header["base"] == "base"
    assert header["copies"].count(",") == 3 and header["accumulation"] == "1" and header["alpha"] == "6"


def test_only_the_chosen_layers_parts_and_copies_are_trained(tmp_path: Path) -> None:
    chosen = replace(SETTINGS, blocks="0,2", parts=("attention",), copies=("audio", "shared"))
    lora = stage(settings=chosen)
    trained(lora)
    assert lora.adapters.names == [
        f"block.layers.{layer}.attention.{leaf}" for layer in (0, 2) for leaf in ("linear_qkv", "linear_proj")
    ]
    video, audio, text = lora.adapters.adapters[0].up.chunk(3)
    assert audio.abs().min() > 0 and not video.any() and not text.any()
    assert lora.adapters.adapters[2].up.abs().min() > 0
    lora.save(tmp_path / "a.safetensors")
    found = velocity(loaded(tmp_path / "a.safetensors", transformer()))
    assert error(found, with_averages(lora)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank of a LoRA must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"parts": ("mlps",)}, r"parts of a LoRA must be some of attention, mlp, got \['mlps'\]"),
        ({"copies": ()}, "copies of a LoRA must be some of video, audio, text, shared"),
        ({"blocks": "0-1:0.5"}, "have no weights"),
        ({"blocks": "1-"}, "blocks must be layers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_layers_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks name layer 4, but the model's layers are 0-3"):
        targets(replace(SETTINGS, blocks="2-4"), CONFIG)
    with pytest.raises(ValueError, match=r"nothing is left to train: none of the layers 1-2 .* are 0, 3"):
        targets(replace(SETTINGS, blocks="1-2", copies=("video",)), CONFIG)


@pytest.mark.parametrize("resident", [0, 2])
def test_streamed_layers_train_bit_for_bit_as_those_on_the_device(resident: int) -> None:
    module = quantized("float8_e4m3fn")
    homes = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    streamed, whole = stage(module, resident=resident), stage(quantized("float8_e4m3fn"))
    assert trained(streamed, 4) == trained(whole, 4)
    for one, other in zip(streamed.adapters.parameters(), whole.adapters.parameters(), strict=True):
        assert torch.equal(one, other)
    streamed.close()
    assert homes == {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streamed_layers_are_copied_ahead_both_ways_and_at_either_end_used_again(resident: int) -> None:
    lora, copied, used = stage(resident=resident, batches=2), [], []
    start, arrived = lora.stream._start, lora.stream._arrived
    lora.stream._start = lambda index: copied.append(index) or start(index)
    lora.stream._arrived = lambda index: used.append(index) or arrived(index)
    for step in range(2):
        lora.step(step)
    there = list(range(resident, 4))
    assert used == [*there, *reversed(there)] * 4
    assert copied == [resident] + [*there[1:], *there[-2::-1]] * 4


def test_a_layer_is_copied_ahead_when_the_gradient_of_the_one_above_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, numbers = [], count()

    def record_event() -> SimpleNamespace:
        number = next(numbers)
        done.append(f"recorded {number}")
        return SimpleNamespace(synchronize=lambda: done.append(f"waited for {number}"))

    queue = SimpleNamespace(record_event=record_event)
    stream = BackwardStream(transformer().block.layers, CPU, 1)
    monkeypatch.setattr(stream, "_module", SimpleNamespace(current_stream=lambda _: queue))
    monkeypatch.setattr(stream, "_start", lambda index: done.append(f"copied {index}"))
    for index in (3, 2, 1):
        with stream.anew(index):
            done.append(f"computed {index}")
    assert done == [
        "recorded 0", "computed 3", "waited for 0", "copied 2",
        "recorded 1", "computed 2", "waited for 1", "copied 1",
        "recorded 2", "computed 1", "waited for 2",
    ]  # fmt: skip


def test_layers_are_computed_anew_and_give_the_same_gradient() -> None:
    module = transformer()
    runs = []
    module.block.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    lora = stage(module)
    plain = FlowNetworks(module)
    losses, grads = [], []
    for networks in (lora.networks, plain):
        loss = sum(stream.square().mean() for stream in networks(*Fixed().batch(0)))
        grads.append(torch.autograd.grad(loss, list(lora.adapters.parameters()), materialize_grads=True))
        losses.append(loss)
    assert len(runs) == 3 and torch.equal(*losses)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_quantised_weights_are_multiplied_as_values_where_fast_products_have_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fast(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return scaled_linear(x.detach(), *weight)

    monkeypatch.setattr(QuantizedWeight, "is_fast_for", lambda *_: True)
    monkeypatch.setattr("happyhorse.model.quant.scaled_linear", fast)
    module = quantized("float8_e4m3fn")
    lora, plain = stage(module), stage(transformer())
    for one in (lora, plain):
        one.networks(*Fixed().batch(0)).video.square().mean().backward()
    down = [one.adapters.adapters[0].up.grad for one in (lora, plain)]
    assert float(torch.cosine_similarity(*(grad.flatten() for grad in down), dim=0)) > 0.9
    lora.close()
    assert all(leaf.patches == () for leaf in module.modules() if isinstance(leaf, ModalityLinear))


def test_a_stage_that_is_over_or_could_not_be_made_holds_nothing_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, closed = quantized("float8_e4m3fn"), []
    monkeypatch.setattr(BackwardStream, "close", lambda stream: closed.append(stream.resident))

    def untouched(module: JointTransformer) -> bool:
        leaves = [leaf for leaf in module.modules() if isinstance(leaf, ModalityLinear)]
        return not any(leaf._forward_hooks or leaf.patches for leaf in leaves)

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("happyhorse.training.lora.Ema", full)
        with pytest.raises(MemoryError):
            stage(module, resident=1)
    assert untouched(module) and closed == [1]
    with pytest.raises(InterruptedError), stage(module, resident=2) as lora:
        assert not untouched(module)
        raise InterruptedError
    assert untouched(module) and closed == [1, 2]
    gone = weakref.ref(module)
    del module
    assert gone() is None and not any(isinstance(value, torch.Tensor) for value in vars(lora).values())
    lora.close()


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    lora, folder = stage(settings=replace(SETTINGS, steps=2)), tmp_path / "run"
    weight = lora.adapters.adapters[0].up
    weight.register_hook(lambda grad: grad * float("nan") if "last" in told else grad)
    told = []
    with pytest.raises(ValueError, match="LoRA: gradient is nan at step 1, it must be finite"):
        train(lora, folder, 2, save_every_seconds=0, on_step=lambda *_: told.append("last"), title="LoRA")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["done"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"identity": "another"}, "trained with another file of the base; give"),
        ({"dtype": torch.bfloat16}, "dtype torch.float32 (now torch.bfloat16)"),
    ],
)
def test_a_run_does_not_go_on_with_another_base_or_dtype(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    train(stage(), tmp_path, 1, title="LoRA")
    other = stage(transformer(changed.get("dtype", torch.float32)))
    other.identity = changed.get("identity", other.identity)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(other, tmp_path, 1, title="LoRA")


def test_an_accelerator_that_is_not_what_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator_on(CPU, 3).gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match="accelerate is set up here for cpu, not for meta"):
        accelerator_on(torch.device("meta"), 1)  # as for a GPU where another has asked for the CPU
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        with pytest.raises(ValueError, match="an update of 4 batches, not of 2"):
            accelerator_on(CPU, 2)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "bf16")
    with pytest.raises(ValueError, match="set up in this process in another way"):
        accelerator_on(CPU, 1)


def test_a_feed_forward_widened_for_speed_is_trained_like_the_plain_one() -> None:
    narrow = transformer()
    wide = transformer()
    for layer in wide.block.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(
            layer.mlp.down_proj.weight.clone(), requires_grad=False
        )
        pad_feed_forward(layer)
    assert (
        wide.block.layers[1].mlp.down_proj.weight.shape[1]
        > narrow.block.layers[1].mlp.down_proj.weight.shape[1]
    )
    found, expected = stage(wide), stage(narrow)
    assert trained(found, 3) == pytest.approx(trained(expected, 3), rel=1e-4)
    assert error(with_averages(found), with_averages(expected)) < 1e-3


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # films are held
    settings = replace(SETTINGS, steps=6, negative=0.3)

    def fresh() -> LoraStage:
        return stage(settings=settings, data=Changing(), batches=2)

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise InterruptedError

    whole, broken, resumed = fresh(), fresh(), fresh()
    train(whole, tmp_path / "whole", 6, title="whole")
    with pytest.raises(InterruptedError):
        train(broken, tmp_path / "broken", 6, on_step=stop, title="broken")
    train(resumed, tmp_path / "broken", 6, title="broken")
    for name, one in (("whole", whole), ("broken", resumed)):
        one.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "broken.safetensors").read_bytes()
    broken.data.fingerprint = "other"
    with pytest.raises(ValueError, match="with other clips, captions, batches or encoders; give"):
        train(broken, tmp_path / "broken", 6, title="broken")


def test_a_folder_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.safetensors"):
        stage().save(tmp_path / "none" / "a.safetensors")
    assert not list(tmp_path.iterdir())
