"""The loop of every training: checkpoints, exact resuming, a log, a picture of the losses."""

import contextlib
import errno
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..model.file_lock import NO_LOCKS, try_lock
from .files import naming, write_whole
from .plot import line_plot

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"
# settings of which a run knows a checksum only: what to say where it differs
CHECKSUMS = {
    "data": "other clips, captions, batches or encoders",
    "negative_checksum": "another negative prompt or text encoder",
    "base_file": "another file of the base",
    "base_checksum": "another base",
}

STOPPING = b"\nfinishing this step, then saving; once more stops at once, and loses what is not saved\n"

OnStep = Callable[[int, int, dict[str, float]], None]  # steps done, of how many, figures of the last one


class Stage(Protocol):
    """What is trained and how.

    `fingerprint` holds the settings, as JSON values, in which a checkpoint to go on from must agree. A stage
    whose schedule depends on the number of steps names it there; another may leave it out and so be trained
    on with more steps.
    """

    fingerprint: Mapping[str, Any]

    def step(self, step: int) -> dict[str, float]:
        """Do update number `step` (0-based) and return figures; those with "loss" in their names are drawn.

        All randomness comes from generators seeded by `step`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on (weights, averages, optimizers), as tensors and plain Python."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...


def train(
    stage: Stage,
    folder: Path,
    steps: int,
    *,
    save_every_seconds: float = 300,
    on_step: OnStep | None = None,
    title: str,
    elsewhere: str = "another folder",
) -> list[dict[str, float]]:
    """Train until `steps` steps are done, going on from the checkpoint in `folder` if there is one.

    Returns the figures of all steps, each with its number as "step". `on_step` may raise to interrupt. Then
    and after Ctrl-C (or SIGTERM, SIGHUP), the step that was begun is finished and saved before the exception
    goes on. Raises ValueError for a checkpoint that is damaged or of other settings, for figures that are not
    finite, and where another run is at work in `folder`; `elsewhere` is what the messages tell to give for a
    new run.
    """
    with alone_in(folder, title, elsewhere):
        run = _Run(stage, folder, title, elsewhere)
        if run.done > steps:
            raise ValueError(
                f"{run.checkpoint} has {run.done} steps, only {steps} are asked for; ask for as many, "
                f"delete it to start again, or give {elsewhere}"
            )
        saved = time.monotonic()
        with _interrupt_between_steps() as interrupted:
            while run.done < steps:
                figures = run.step()
                try:
                    if on_step:
                        on_step(run.done, steps, figures)
                    if interrupted.is_set():
                        raise KeyboardInterrupt(f"{title} is saved at step {run.done}")
                except BaseException:
                    run.save()
                    raise
                if run.done == steps or time.monotonic() - saved >= save_every_seconds:
                    run.save()
                    saved = time.monotonic()
        if not run.picture.exists():
            run.draw()
    if interrupted.is_set():  # while the end was saved
        raise KeyboardInterrupt(f"all steps of {title} are done and saved")
    return run.figures


class _Run:
    """A stage, how far it is, and its files in `folder`."""

    def __init__(self, stage: Stage, folder: Path, title: str, elsewhere: str) -> None:
        self.stage, self.title, self.elsewhere = stage, title, elsewhere
        self.checkpoint, self.log, self.picture = (
            folder / name for name in (CHECKPOINT, "log.jsonl", "loss.png")
        )
        self.fingerprint = json.loads(
            json.dumps(dict(stage.fingerprint))
        )  # tuples become lists, as when read
        self.done, self.figures = 0, []
        if self.checkpoint.exists():
            self._resume()
        self.logged = len(self.figures)
        lines = "".join(f"{json.dumps(figures)}\n" for figures in self.figures)
        write_whole(self.log, lambda file: file.write_text(lines, encoding="utf-8"), elsewhere)

    def _resume(self) -> None:
        state = _read(self.checkpoint, self.elsewhere)
        _check_fingerprint(self.checkpoint, state["fingerprint"], self.fingerprint, self.elsewhere)
        self.stage.load_state_dict(state["stage"])
        self.done = state["done"]
        self.figures = _read_log(self.log, self.done)
        log.info("%s goes on from step %d", self.title, self.done)

    def step(self) -> dict[str, float]:
        """Do one step and return its figures."""
        figures = {name: float(value) for name, value in self.stage.step(self.done).items()}
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{self.title}: {name} is {value} at step {self.done}, it must be finite; lower the "
                    f"learning rate and give {self.elsewhere} ({self.checkpoint.parent} keeps what was saved)"
                )
        self.figures.append({"step": self.done, **figures})
        self.done += 1
        return figures

    def save(self) -> None:
        """Write the log first: it must reach at least as far as the checkpoint."""
        state = {"done": self.done, "fingerprint": self.fingerprint, "stage": self.stage.state_dict()}
        _check_plain(state, "state")
        if broken := next(_not_finite(state["stage"], "stage"), None):
            raise ValueError(
                f"{self.title}: {broken} has values that are not finite after {self.done} steps; lower the "
                f"learning rate and give {self.elsewhere} ({self.checkpoint.parent} keeps what was saved)"
            )
        with naming(self.log, self.elsewhere), self.log.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(figures)}\n" for figures in self.figures[self.logged :])
            file.flush()
            os.fsync(file.fileno())
        self.logged = len(self.figures)
        write_whole(self.checkpoint, lambda file: torch.save(state, file), self.elsewhere)
        self.draw()

    def draw(self) -> None:
        """Draw the losses of all steps, if there are any."""
        series: dict[str, list[tuple[float, float]]] = {}
        for figures in self.figures:
            for name, value in figures.items():
                if "loss" in name:
                    series.setdefault(name, []).append((figures["step"], value))
        if series:
            positive = all(value > 0 for points in series.values() for _, value in points)
            image = line_plot(series, self.title, log_y=positive)
            write_whole(self.picture, lambda file: image.save(file, "png"), self.elsewhere)


def check_settings(folder: Path, settings: Mapping[str, Any], elsewhere: str = "another folder") -> None:
    """Raise ValueError where a run in `folder` was begun with other `settings`: before dear work for it.

    They are some of its stage's fingerprint, all of which `train` checks.
    """
    path = folder / CHECKPOINT
    if path.exists():
        found = _read(path, elsewhere)["fingerprint"]
        expected = json.loads(json.dumps(dict(settings)))
        _check_fingerprint(path, {name: found.get(name) for name in expected}, expected, elsewhere)


@contextlib.contextmanager
def alone_in(folder: Path, title: str, elsewhere: str) -> Iterator[None]:
    """Make the folder of a run, and let no other run use it meanwhile."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give {elsewhere} for the checkpoints of {title}")
    with naming(folder, elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"  # stays: one that is removed could be locked by two
    with naming(path, elsewhere):
        file = path.open("ab")
    with file:
        free = True  # as far as can be told where the file system has no locks
        with naming(path, elsewhere):
            try:
                free = try_lock(file)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        if not free:
            raise ValueError(
                f"another run trains in {folder}; wait until it has ended, or give {elsewhere} for {title}"
            )
        yield


@contextlib.contextmanager
def _interrupt_between_steps() -> Iterator[threading.Event]:
    """Let Ctrl-C, or who ends the process, set the event that is yielded instead of tearing a step apart.

    The second one does that.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals go to the main thread
        return

    def note(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        with contextlib.suppress(OSError):
            os.write(2, STOPPING)  # a step may take minutes; print and logging are not safe in a handler

    ends = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # which Windows does not have
    # what is ignored, as nohup has it, stays so
    handled = [signal.SIGINT, *(number for number in ends if signal.getsignal(number) is signal.SIG_DFL)]
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(path: Path, elsewhere: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {"done", "fingerprint", "stage"} <= state.keys():
            return state
        reason = "it is not of a training"
    except Exception as error:  # damaged bytes raise nearly everything, a file that was cut also EINVAL
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise ValueError(f"{path} is damaged ({reason}); delete it to start again, or give {elsewhere}")


def _check_plain(value: object, name: str) -> None:
    """Refuse what could be saved but not be read with `weights_only`."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_plain(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check_plain(part, f"{name}.{index}")
    elif not (value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str)):
        raise TypeError(
            f"{name} is a {type(value).__name__}; a checkpoint holds tensors and plain Python only"
        )


def _not_finite(value: object, name: str) -> Iterator[str]:
    """The names of tensors with values that are not finite."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _not_finite(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _not_finite(part, f"{name}.{index}")
    elif isinstance(value, Tensor) and not value.isfinite().all():
        yield name


def _check_fingerprint(
    path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], elsewhere: str
) -> None:
    differing = [
        CHECKSUMS.get(name) or f"{name} {found.get(name, 'absent')} (now {expected.get(name, 'absent')})"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name, ...) != expected.get(name, ...)
    ]
    if differing:
        raise ValueError(
            f"{path} was trained with {', '.join(differing)}; give the same settings or {elsewhere}, "
            "or delete it to start again"
        )


def _read_log(path: Path, done: int) -> list[dict[str, float]]:
    """The figures of the first `done` steps; later ones will be trained again."""
    figures: list[dict[str, float]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] >= done:
                    break
            except (ValueError, TypeError, KeyError):
                break  # the end that a run did not finish writing
            figures.append(entry)
    return figures


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[OnStep]:
    """An `on_step` for the command line: a bar with the last figures."""
    with tqdm(desc=title, unit="step") as bar:

        def show(done: int, steps: int, figures: dict[str, float]) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = steps, done - 1, done - 1
            bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
            bar.update(done - bar.n)

        yield show
