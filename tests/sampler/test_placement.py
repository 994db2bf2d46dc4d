import itertools
import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import relative_error
from safetensors.torch import load_file

from happyhorse import cli
from happyhorse.media import read_film_metadata
from happyhorse.model.audio_vae import AudioVAE
from happyhorse.model.checkpoint import load, open_checkpoint
from happyhorse.model.packing import Latents
from happyhorse.model.run_block import run_in_place
from happyhorse.model.text_encoder import TextEncoder
from happyhorse.model.transformer import JointTransformer
from happyhorse.model.video_decoder import VideoDecoder
from happyhorse.sampler.noise import FilmNoise
from happyhorse.sampler.parts import Parts
from happyhorse.sampler.placement import (
    PAGE,
    LayerStream,
    Placement,
    in_pieces,
    is_out_of_memory,
    page_ranges,
)
from happyhorse.sampler.stages import network_of

CPU = torch.device("cpu")


def latents() -> Latents:
    return Latents(torch.empty(1, 48, 3, 4, 4), torch.empty(1, 9, 64))


def test_one_seed_draws_the_same_noise_in_the_stated_order() -> None:
    noise = FilmNoise(5).initial(latents())
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(noise.video, torch.randn(1, 48, 3, 4, 4, generator=generator))
    assert torch.equal(noise.audio, torch.randn(1, 64, 9, generator=generator).transpose(1, 2))


def test_step_and_super_resolution_noise_have_their_own_generators() -> None:
    film = FilmNoise(5)
    first, second = film.step(latents()), film.step(latents())
    assert torch.equal(first.video, FilmNoise(6).initial(latents()).video)
    assert not torch.equal(first.video, second.video)
    assert torch.equal(film.super_resolution(latents()).audio, FilmNoise(7).initial(latents()).audio)


def test_streamed_layers_give_the_same_bits_and_hold_two_layers_at_most(pony_folder: Path) -> None:
    transformer = load(open_checkpoint(pony_folder / "distill"), torch.bfloat16)
    layers = transformer.block.layers
    homes = [p.data_ptr() for p in layers.parameters()]
    start, text = FilmNoise(0).initial(latents()), torch.randn(1, 7, 96)
    stream = LayerStream(layers, CPU)
    away = []

    def run_block(index: int, layer, x: torch.Tensor) -> torch.Tensor:
        def watched(x: torch.Tensor) -> torch.Tensor:
            moved = [i for i, l in enumerate(layers) if l.mlp.down_proj.weight.data_ptr() not in homes]  # noqa: E741
            away.append((index, moved, stream._ahead))
            return layer(x)

        x = stream(index, watched, x)
        assert stream._ahead[0] == (index + 1) % len(layers)
        return x

    got = [network_of(transformer, run_block)(start, text) for _ in range(2)]
    want = network_of(transformer)(start, text)
    for velocity in got:
        assert all(torch.equal(a, b) for a, b in zip(velocity, want, strict=True))
    count = len(layers)
    assert away == [(i, [i], None) for i in range(count)] * 2
    assert [p.data_ptr() for p in layers.parameters()] == homes, "the weights must be back where they live"
    stream.close()
    assert stream._ahead is None


def test_an_error_inside_a_streamed_layer_puts_its_weights_back(pony_folder: Path) -> None:
    transformer = load(open_checkpoint(pony_folder / "distill"), torch.bfloat16)
    homes = [p.data_ptr() for p in transformer.block.layers.parameters()]

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        LayerStream(transformer.block.layers, CPU)(0, fail, torch.zeros(1))
    assert [p.data_ptr() for p in transformer.block.layers.parameters()] == homes


@pytest.mark.parametrize("resident", [1, 4])
def test_resident_layers_stay_and_the_others_are_streamed(pony_folder: Path, resident: int) -> None:
    transformer = load(open_checkpoint(pony_folder / "distill"), torch.bfloat16)
    layers = transformer.block.layers
    start, text = FilmNoise(0).initial(latents()), torch.randn(1, 7, 96)
    stream = LayerStream(layers, CPU, resident)
    homes = [layer.mlp.down_proj.weight.data_ptr() for layer in layers]
    moved, ahead = [], []

    def run_block(index: int, layer, x: torch.Tensor) -> torch.Tensor:
        def watched(x: torch.Tensor) -> torch.Tensor:
            moved.append(layers[index].mlp.down_proj.weight.data_ptr() != homes[index])
            return layer(x)

        x = stream(index, watched, x)
        ahead.append(stream._ahead[0])
        return x

    got = [network_of(transformer, run_block)(start, text) for _ in range(2)]
    want = network_of(transformer)(start, text)
    assert all(torch.equal(a, b) for velocity in got for a, b in zip(velocity, want, strict=True))
    count = len(layers)
    assert moved == [index >= resident for index in range(count)] * 2
    # beside the resident ones the first of the others lies ready, at the end that for the next pass
    assert ahead == [*[resident] * resident, *range(resident + 1, count), resident] * 2


@pytest.mark.parametrize("variant", ["distill", "1080p_sr"])
@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_of_the_film_give_the_same_velocity_but_for_rounding(
    pony_folder: Path, variant: str, piece: int
) -> None:
    transformer = load(open_checkpoint(pony_folder / variant), torch.float32)
    film = Latents(torch.empty(2, 48, 7, 4, 6), torch.empty(2, 26, 64))
    start, text = FilmNoise(0).initial(film), torch.randn(2, 9, 96)
    got = network_of(transformer, in_pieces(run_in_place, piece))(start, text)
    for a, b in zip(got, network_of(transformer)(start, text), strict=True):
        # the pony's super-resolution never learnt to change a sound: that velocity is zero
        assert (a - b).norm() <= 1e-5 * b.norm()


def parts_of(pony_folder: Path, *placements: Placement) -> Parts:
    checkpoints = {"transformer": open_checkpoint(pony_folder / "distill")}
    return Parts(checkpoints, CPU, {"transformer": placements}, torch.float32, torch.float32)


def test_parts_are_run_as_they_are_placed(pony_folder: Path) -> None:
    start, text = FilmNoise(0).initial(latents()), torch.randn(1, 7, 96)
    velocities = []
    placed = (Placement(), Placement(resident=2), Placement(resident=2, piece=5))
    for placement in placed:
        with parts_of(pony_folder, placement).use("transformer") as (transformer, run_block):
            velocities.append(network_of(transformer, run_block)(start, text))
    whole, streamed, in_five = (velocity.video for velocity in velocities)
    assert torch.equal(streamed, whole)
    assert not torch.equal(in_five, whole) and relative_error(in_five, whole) < 1e-5


def test_a_step_down_lets_go_of_what_is_kept_and_is_noted(pony_folder: Path) -> None:
    parts = parts_of(pony_folder, Placement(keep=True), Placement(resident=0, piece=4))
    with parts.use("transformer") as (kept, _):
        pass
    with parts.use("transformer") as (again, _):
        assert again is kept
    assert not parts.chunked()
    assert parts.step_down("transformer") == Placement(resident=0, piece=4)
    with parts.use("transformer") as (anew, _):
        assert anew is not kept
    assert parts.steps_down == parts.chunked() == ["transformer: layers streamed, pieces of 4 tokens"]
    assert parts.step_down("transformer") is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_errors_for_want_of_memory_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


# Where memory runs out

Generate = Callable[..., tuple[int, dict[str, torch.Tensor], dict[str, Any]]]


@pytest.fixture
def generate(pony_folder: Path, tmp_path: Path) -> Generate:
    """Make a film by the command line: its exit code, latents and settings."""

    def run(name: str, *options: str) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
        film, kept = tmp_path / f"{name}.mp4", tmp_path / f"{name}.safetensors"
        fixed = ["--preset", "pony", "--models", str(pony_folder), "--device", "cpu", "--seconds", "0.2"]
        outputs = ["--prompt", "a red circle", "--out", str(film), "--save-latents", str(kept)]
        code = cli.main(["generate", *fixed, *outputs, *options])
        settings = json.loads(read_film_metadata(film)["comment"]) if film.exists() else {}
        return code, load_file(kept) if kept.exists() else {}, settings

    return run


def fail(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, calls: Container[int]) -> None:
    """Make these calls of a function, counted from 0, run out of memory."""
    own, count = getattr(target, name), itertools.count()

    def run(*args: Any, **kwargs: Any) -> Any:
        if next(count) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")
        return own(*args, **kwargs)

    monkeypatch.setattr(target, name, run)


@pytest.mark.parametrize(
    ("target", "name", "calls", "role"),
    [
        (JointTransformer, "forward", {3}, "transformer"),
        (JointTransformer, "forward", {9}, "super resolution"),
        (TextEncoder, "forward", {0}, "text encoder"),
        (VideoDecoder, "_decode_window", {0}, "video decoder"),
        (AudioVAE, "decode", {0}, "audio vae"),
    ],
    ids=["sampling", "super-resolution", "text", "picture", "sound"],
)
def test_a_stage_that_runs_out_of_memory_is_begun_anew_and_the_film_is_the_same(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    target: Any, name: str, calls: set[int], role: str,
) -> None:  # fmt: skip
    options = ("--sr", "540p") if role == "super resolution" else ()
    _, want, plain = generate("plain", *options)
    assert "out_of_memory" not in plain
    fail(monkeypatch, target, name, calls)
    code, got, settings = generate("film", *options)
    assert code == 0 and all(torch.equal(got[stream], want[stream]) for stream in want)
    assert settings == plain | {"out_of_memory": [f"{role}: on the device"]}
    assert f"in the stage {role!r}: once more, {role}: on the device" in capsys.readouterr().err


def test_step_by_step_less_memory_is_taken_and_then_it_is_an_error(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("happyhorse.sampler.plan.PIECES", (256, 64))
    size = ("--size", "256x256")
    _, want, _ = generate("plain", *size)
    with monkeypatch.context() as patch:
        fail(patch, JointTransformer, "forward", {0, 4})  # kept, then on the device alone
        code, got, settings = generate("film", *size)
    assert code == 0 and settings["in_pieces"] == ["transformer: on the device, pieces of 256 tokens"]
    assert len(settings["out_of_memory"]) == 2
    assert 0 < relative_error(got["video"], want["video"]) < 1e-4
    fail(monkeypatch, JointTransformer, "forward", range(99))
    before, _ = set(tmp_path.iterdir()), capsys.readouterr()
    assert generate("none", *size)[0] == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "happyhorse: out of memory (CUDA out of memory. Tried to allocate 9 GiB) in the"
    )
    assert "smaller film needs less" in message
    assert set(tmp_path.iterdir()) == before


def test_other_errors_are_not_taken_for_want_of_memory(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(JointTransformer, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        generate("film")


def test_pieces_asked_for_stand_in_the_settings_and_streaming_changes_no_bit(generate: Generate) -> None:
    _, want, plain = generate("plain", "--size", "256x256")
    _, streamed, same = generate("blocks", "--size", "256x256", "--offload", "blocks")
    assert same == plain and torch.equal(streamed["video"], want["video"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("happyhorse.sampler.plan.PIECES", (256, 64))
        code, got, settings = generate("pieces", "--size", "256x256", "--offload", "pieces")
    assert code == 0 and settings["in_pieces"] == ["transformer: on the device, pieces of 64 tokens"]
    assert 0 < relative_error(got["video"], want["video"]) < 1e-4


def test_memory_is_locked_in_whole_pages_once() -> None:
    memory = torch.empty(8 * PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE  # where a page begins
    at = memory.data_ptr() + first
    parts = [memory[first + a : first + b] for a, b in ((10, 20), (20, PAGE + 5), (3 * PAGE + 1, 4 * PAGE))]
    assert page_ranges(reversed(parts)) == [(at, at + 2 * PAGE), (at + 3 * PAGE, at + 4 * PAGE)]
    assert page_ranges([]) == []


class Locking:
    """Stands for a device's module and its CUDA runtime: notes what is locked; one call of it fails."""

    def __init__(self, failing: int) -> None:
        self.failing, self.calls, self.locked = failing, 0, set()

    def cudart(self) -> "Locking":
        return self

    def cudaHostRegister(self, start: int, _num_bytes: int, _flags: int) -> int:
        self.calls += 1
        if self.calls == self.failing:
            raise KeyboardInterrupt
        self.locked.add(start)
        return 0

    def cudaHostUnregister(self, start: int) -> None:
        self.locked.remove(start)

    def Stream(self, _: torch.device) -> None:
        pass

    def synchronize(self, _: torch.device) -> None:
        raise RuntimeError("the device has failed")


def locked_stream(monkeypatch: pytest.MonkeyPatch, module: Locking) -> LayerStream:
    """A stream of three layers, far apart in memory."""
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    memory = torch.zeros(20 * PAGE)
    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
    for index, layer in enumerate(layers):
        layer.weight = torch.nn.Parameter(memory[index * 6 * PAGE :][:PAGE])
    return LayerStream(layers, torch.device("cuda"))


def test_memory_is_unlocked_where_locking_it_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Locking(failing=3)
    monkeypatch.setattr(module, "synchronize", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        locked_stream(monkeypatch, module)
    assert module.calls == 3 and not module.locked


def test_memory_is_unlocked_though_the_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Locking(failing=0)
    stream = locked_stream(monkeypatch, module)
    assert len(module.locked) == 3
    with pytest.raises(RuntimeError, match="the device has failed"):
        stream.close()
    assert not module.locked
    stream.close()
