"""The loop of every training: resuming, interrupting, refusing."""

import errno
import json
import math
import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import disk_of
from PIL import Image
from torch import nn
from tqdm import tqdm

from happyhorse.training import loop
from happyhorse.training.generators import generator
from happyhorse.training.loop import progress_bar, train
from happyhorse.training.optim import Ema, decayed, optimizers, scale_rates

STEPS = 20
TITLE = "A small net"
FILES = [".lock", "checkpoint.pt", "log.jsonl", "loss.png"]


class SmallStage:
    """A linear net that learns a sine, with all that real stages have."""

    def __init__(self, **settings: Any) -> None:
        self.fingerprint = {"seed": 0, "steps": STEPS, "sizes": (8, 16, 4)} | settings
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.optimizers = optimizers(self.net, 0.02, 1e-2)
        self.ema = Ema(self.net, 0.9)
        self.before_step: Callable[[int], float] = lambda _: 0.0  # what it returns is added to the loss

    def step(self, step: int) -> dict[str, float]:
        extra = self.before_step(step)
        scale_rates(self.optimizers, decayed(step, STEPS, warmup=4))
        inputs = torch.randn(32, 8, generator=generator(0, "inputs", step))
        loss = (self.net(inputs) - inputs[:, :4].sin()).square().mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(self.net)
        return {"loss": loss.item() + extra, "rate": self.optimizers[0].param_groups[0]["lr"]}

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.ema.load_state_dict(state["ema"])


class Stop(Exception):
    """Raised by `on_step` to interrupt."""


def stop_at(number: int, error: type[BaseException] = Stop) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(done: int, _steps: int, _figures: dict[str, float]) -> None:
        if done == number:
            raise error

    return on_step


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def interrupted_at(number: int, folder: Path, **settings: Any) -> None:
    with pytest.raises(Stop):
        train(SmallStage(**settings), folder, STEPS, on_step=stop_at(number), title=TITLE)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[SmallStage, list[dict[str, float]], Path]:
    """A run without interruptions: stage, figures, folder."""
    stage, folder = SmallStage(), tmp_path / "whole"
    return stage, train(stage, folder, STEPS, title=TITLE), folder


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_interrupted_and_resumed_run_equals_a_whole_one_bit_for_bit(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path, error: type[BaseException]
) -> None:
    stage, figures, folder = whole
    with pytest.raises(error):
        train(SmallStage(), tmp_path / "parts", STEPS, on_step=stop_at(7, error), title=TITLE)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["done"] == 7
    resumed = SmallStage()
    assert train(resumed, tmp_path / "parts", STEPS, title=TITLE) == figures
    assert equal(resumed.state_dict(), stage.state_dict())
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()


def test_a_run_learns_and_leaves_checkpoint_log_and_picture(
    whole: tuple[SmallStage, list[dict[str, float]], Path],
) -> None:
    stage, figures, folder = whole
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == figures
    assert [entry["step"] for entry in figures] == list(range(STEPS))
    assert figures[-1]["loss"] < 0.7 * figures[0]["loss"]
    assert Image.open(folder / "loss.png").size == (900, 500)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["done"] == STEPS and equal(state["stage"], stage.state_dict())


def test_a_done_run_is_not_trained_again(whole: tuple[SmallStage, list[dict[str, float]], Path]) -> None:
    _, figures, folder = whole
    stage = SmallStage()
    stage.before_step = lambda step: pytest.fail(f"step {step} was done again")
    assert train(stage, folder, STEPS, title=TITLE) == figures


def test_a_log_that_went_further_than_the_checkpoint_is_cut_back(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path
) -> None:
    interrupted_at(7, tmp_path / "parts")
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 99.0}\n{"step": 8, "lo')
    assert train(SmallStage(), tmp_path / "parts", STEPS, title=TITLE) == whole[1]
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (whole[2] / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("seconds", "want"), [(0, [None, 1, 2, 3, 4, 5, 6]), (3, [None, None, None, 3, 3, 3, 6])]
)
def test_saves_come_at_the_given_times(
    seconds: int, want: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, clock = [], [0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    def on_step(_done: int, _steps: int, _figures: dict[str, float]) -> None:
        path = tmp_path / "checkpoint.pt"
        saved.append(torch.load(path, weights_only=True)["done"] if path.exists() else None)
        clock[0] += 1  # a second for every step

    train(SmallStage(), tmp_path, 7, save_every_seconds=seconds, on_step=on_step, title=TITLE)
    assert saved == want


def test_on_step_hears_of_every_step_of_this_run(tmp_path: Path) -> None:
    interrupted_at(18, tmp_path)
    heard = []
    figures = train(
        SmallStage(), tmp_path, STEPS, on_step=lambda *arguments: heard.append(arguments), title=TITLE
    )
    assert [(done, steps) for done, steps, _ in heard] == [(19, STEPS), (20, STEPS)]
    assert heard[-1][2] == {name: value for name, value in figures[-1].items() if name != "step"}


def interrupting(number: int, times: int, by: int = signal.SIGINT) -> Callable[[int], float]:
    def before_step(step: int) -> float:
        for _ in range(times if step == number else 0):
            signal.raise_signal(by)
        return 0.0

    return before_step


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_waits_for_the_end_of_the_step_and_saves(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path, name: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = getattr(signal, name, signal.SIGTERM)
    default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before, stage = signal.signal(number, default), SmallStage()
    stage.before_step = interrupting(4, times=1, by=number)
    try:
        with pytest.raises(KeyboardInterrupt, match="A small net is saved at step 5"):
            train(stage, tmp_path / "parts", STEPS, title=TITLE)
        assert signal.getsignal(number) is default
    finally:
        signal.signal(number, before)
    assert "finishing this step, then saving; once more stops at once" in capfd.readouterr().err
    resumed = SmallStage()
    assert train(resumed, tmp_path / "parts", STEPS, title=TITLE) == whole[1]
    assert equal(resumed.state_dict(), whole[0].state_dict())


def test_a_second_ctrl_c_stops_at_once_and_saves_no_half_step(tmp_path: Path) -> None:
    before, stage = signal.getsignal(signal.SIGINT), SmallStage()
    stage.before_step = interrupting(4, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(stage, tmp_path, STEPS, title=TITLE)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    before, stage = signal.signal(signal.SIGTERM, signal.SIG_IGN), SmallStage()
    stage.before_step = interrupting(4, times=1, by=signal.SIGTERM)
    try:
        assert len(train(stage, tmp_path, STEPS, title=TITLE)) == STEPS
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_works_in_a_thread_which_gets_no_signals(tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(SmallStage(), tmp_path, 3, title=TITLE)))
    thread.start()
    thread.join()
    assert len(results[0]) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_save(tmp_path: Path, value: float) -> None:
    interrupted_at(7, tmp_path)
    stage = SmallStage()
    stage.before_step = lambda step: value if step == 9 else 0.0
    sentence = f"A small net: loss is {value} at step 9, it must be finite; lower the learning rate"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(stage, tmp_path, STEPS, title=TITLE)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["done"] == 7


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    stage = SmallStage()

    def spoil(step: int) -> float:
        if step == STEPS - 1:  # after which no loss would tell
            stage.net[2].bias.register_hook(lambda gradient: gradient * math.nan)
        return 0.0

    stage.before_step = spoil
    interrupted_at(7, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    sentence = f"{TITLE}: stage.net.2.bias has values that are not finite after {STEPS} steps; lower the"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(stage, tmp_path, STEPS, title=TITLE)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused_and_names_what_differs(tmp_path: Path) -> None:
    interrupted_at(2, tmp_path, seed=1, hard=True, data="5fd1")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    sentence = (
        "trained with other clips, captions, batches or encoders, hard True (now absent), seed 1 (now 0); "
        "give the same settings or another folder"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(SmallStage(), tmp_path, STEPS, title=TITLE)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_caller_says_what_to_give_for_a_new_run(tmp_path: Path) -> None:
    interrupted_at(2, tmp_path, seed=1)
    with pytest.raises(ValueError, match="give the same settings or another name"):
        train(SmallStage(), tmp_path, STEPS, title=TITLE, elsewhere="another name")
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="delete it to start again, or give another name"):
        train(SmallStage(), tmp_path, STEPS, title=TITLE, elsewhere="another name")


def test_a_picture_that_was_deleted_is_drawn_again(
    whole: tuple[SmallStage, list[dict[str, float]], Path],
) -> None:
    picture = whole[2] / "loss.png"
    before = picture.read_bytes()
    picture.unlink()
    train(SmallStage(), whole[2], STEPS, title=TITLE)
    assert picture.read_bytes() == before


def test_more_steps_are_trained_on_where_the_fingerprint_does_not_name_them(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path
) -> None:
    train(SmallStage(), tmp_path / "parts", 12, title=TITLE)  # its schedule is that of STEPS
    assert train(SmallStage(), tmp_path / "parts", STEPS, title=TITLE) == whole[1]


def test_a_run_that_has_more_steps_than_asked_for_is_refused(tmp_path: Path) -> None:
    train(SmallStage(), tmp_path, 6, title=TITLE)
    with pytest.raises(ValueError, match=r"checkpoint\.pt has 6 steps, only 3 are asked for"):
        train(SmallStage(), tmp_path, 3, title=TITLE)


def test_what_a_device_did_wrong_is_no_matter_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(SmallStage(), tmp_path, 1, title=TITLE)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "tensor", "other", "code"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    interrupted_at(2, tmp_path)
    path = tmp_path / "checkpoint.pt"
    if kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "other":
        torch.save({"state_dict": {}}, path)
    elif kind == "code":
        torch.save(nn.Linear(2, 2), path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-2000], "empty": b"", "text": b"no checkpoint"}[kind])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged \(.+\); delete it to start again"):
        train(SmallStage(), tmp_path, STEPS, title=TITLE)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(
        NotADirectoryError, match="run is a file; give another folder for the checkpoints of A small"
    ):
        train(SmallStage(), tmp_path / "run", STEPS, title=TITLE)


@pytest.mark.parametrize(("room", "name"), [(4000, "checkpoint.pt"), (80, "log.jsonl")])
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path: Path, room: int, name: str) -> None:
    interrupted_at(1, tmp_path)
    sentence = rf"{name} could not be written \(.+\); free some space or give another folder"
    with disk_of(room), pytest.raises(OSError, match=sentence):
        train(SmallStage(), tmp_path, 4, title=TITLE)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["done"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


def test_two_runs_cannot_use_one_folder_at_once(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"

    def on_step(*_: object) -> None:
        sentence = f"another run trains in {folder}; wait until it has ended, or give another name for A"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            train(SmallStage(), folder, STEPS, title=TITLE, elsewhere="another name")
        train(SmallStage(), tmp_path / "other", 1, title=TITLE)

    assert train(SmallStage(), folder, STEPS, on_step=on_step, title=TITLE) == whole[1]
    assert train(SmallStage(), folder, STEPS, title=TITLE) == whole[1]


def _train_for_ever(folder: Path, begun: "multiprocessing.synchronize.Event") -> None:
    def on_step(*_: object) -> None:
        begun.set()
        time.sleep(600)

    train(SmallStage(), folder, STEPS, on_step=on_step, title=TITLE)


def test_the_folder_of_a_run_that_was_killed_is_free(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path
) -> None:
    folder, context = tmp_path / "parts", multiprocessing.get_context("spawn")
    begun = context.Event()
    run = context.Process(target=_train_for_ever, args=(folder, begun))
    run.start()
    try:
        assert begun.wait(60)
        with pytest.raises(ValueError, match="another run trains in"):
            train(SmallStage(), folder, STEPS, title=TITLE)
    finally:
        run.kill()
        run.join()
    assert train(SmallStage(), folder, STEPS, title=TITLE) == whole[1]


def test_where_there_are_no_locks_a_run_goes_on_without(
    whole: tuple[SmallStage, list[dict[str, float]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(_: object) -> bool:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(loop, "try_lock", no_locks)
    assert train(SmallStage(), tmp_path / "parts", STEPS, title=TITLE) == whole[1]


def test_a_state_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    stage = SmallStage()
    stage.optimizers[1].param_groups[0]["where"] = tmp_path
    with pytest.raises(
        TypeError, match=r"state\.stage\.optimizers\.1\.param_groups\.0\.where is a .*Path; a checkpoint"
    ):
        train(stage, tmp_path, 1, title=TITLE)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_progress_bar_begins_where_a_resumed_run_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Bar(tqdm):
        def close(self) -> None:
            bars.append((self.initial, self.n, self.total))
            super().close()

    monkeypatch.setattr(loop, "tqdm", Bar)
    interrupted_at(17, tmp_path)
    with progress_bar(TITLE) as on_step:
        train(SmallStage(), tmp_path, STEPS, on_step=on_step, title=TITLE)
    assert bars[0] == (17, 20, 20)  # from `initial` on it reckons the speed
    shown = capsys.readouterr().err
    assert "A small net: " in shown and "20/20" in shown and "loss=" in shown
