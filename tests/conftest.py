"""Fixtures that several test files share."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from happyhorse.pony import write_pony

STARTED = pytest.StashKey[float]()

torch.set_num_threads(1)  # tests are small and run side by side: more threads only wait for each other


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.time()


@pytest.fixture(scope="session")
def pony_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature models, written once."""
    folder = tmp_path_factory.mktemp("pony")
    write_pony(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say loudly what was not tested and why; also at the end of $TEST_SUMMARY, which `make test` shows."""
    stats = terminalreporter.stats
    why = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", ()))
    lines = [f"NOT TESTED, {number} skipped: {reason}" for reason, number in why.most_common()]
    for line in lines:
        terminalreporter.write_line(line, yellow=True, bold=True)
    summary = os.environ.get("TEST_SUMMARY")
    if summary and not hasattr(config, "workerinput"):  # workers of xdist have their own ends
        counts = [
            f"{len(stats[kind])} {kind}" for kind in ("passed", "failed", "error", "skipped") if kind in stats
        ]
        marks = config.getoption("markexpr") or "all"
        seconds = time.time() - config.stash[STARTED]
        lines.insert(0, f"[{marks}] {', '.join(counts) or 'no tests'} in {seconds:.0f} s")
        with Path(summary).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
