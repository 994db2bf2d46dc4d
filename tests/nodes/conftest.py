"""Sets this process up as a ComfyUI host, and offers a real server; without ComfyUI every test is skipped."""

import ast
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launch_host import define_torchvision_ops, find_comfyui

if TYPE_CHECKING:
    import host  # it needs websocket-client, which the core's environment lacks

HERE = Path(__file__).parent
COMFYUI = find_comfyui()
NEEDED = ("aiohttp", "torchsde", "torchvision", "torchaudio", "comfy_kitchen", "websocket", "playwright")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), None)
SCRATCH = Path(tempfile.mkdtemp(prefix="happyhorse-host-"))  # base directory and cache of this process


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


def why_not() -> str | None:
    """What keeps the host tests from running; None if nothing does."""
    if COMFYUI is None:
        return "no ComfyUI: set COMFYUI_PATH, or put this folder into ComfyUI's custom_nodes"
    return f"not the environment of ComfyUI ({', '.join(MISSING)} missing): make test" if MISSING else None


def become_the_host() -> None:
    """Make `comfy` importable here, on the CPU, with a base directory of its own."""
    define_torchvision_ops()
    os.environ["XDG_CACHE_HOME"] = str(SCRATCH / "cache")
    sys.path.insert(0, str(COMFYUI))
    arguments, sys.argv = sys.argv, ["x", "--cpu", "--base-directory", str(SCRATCH)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # parses sys.argv, once
    finally:
        sys.argv = arguments


if why_not() is None:
    become_the_host()


class WithoutHost(pytest.File):
    """A test file that cannot be imported here: its tests are counted and skipped."""

    def collect(self) -> Iterator[pytest.Item]:
        for node in ast.walk(ast.parse(self.path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield SkippedTest.from_parent(self, name=node.name)


class SkippedTest(pytest.Item):
    def runtest(self) -> None:
        pytest.skip(f"{why_not()}")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return WithoutHost.from_parent(parent, path=module_path) if why_not() else None


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["host.Server"]:
    """A ComfyUI server on the CPU whose only custom node is this pack; one per worker of pytest-xdist."""
    import host

    with host.serve(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: "host.Server") -> Iterator["host.Client"]:
    """A fresh user of the server."""
    import host

    with host.Client(server) as user:
        yield user


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the server printed when a test that used it fails."""
    report = yield
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and running is not None:
        report.sections.append(("ComfyUI's log", running.log_text()))
    return report


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's Chromium; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install chromium or google-chrome")
    return CHROMIUM


@pytest.fixture(scope="session")
def compiler() -> str:
    """A C++ compiler, for Torch Compile; the test is skipped where there is none."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    return COMPILER
