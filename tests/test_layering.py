"""Dependencies point one way, and only nodes/ knows ComfyUI."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "kernels": set(),
    "model": {"kernels"},
    "sampler": {"kernels", "model", "media"},
    "training": {"kernels", "model", "sampler", "media", "pony"},
}  # what each may import
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "node_helpers", "nodes"}


def imported(file: Path) -> set[str]:
    """Names of the modules a file imports: `.`-relative ones resolved from the root, others by their first
    part.
    """
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else list(base)
            names |= {f".{target[0]}"} if target else {f".{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", BELOW)
def test_each_folder_imports_only_what_lies_below_it(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        own = {name[1:] for name in imported(file) if name.startswith(".")}
        assert own <= BELOW[folder] | {folder}, file
        assert not imported(file) & HOST, file


@pytest.mark.parametrize("file", sorted(file.name for file in ROOT.glob("*.py")))
def test_nothing_outside_the_nodes_needs_the_host(file: str) -> None:
    assert not imported(ROOT / file) & HOST


def test_the_nodes_are_used_by_the_host_alone() -> None:
    for file in [*ROOT.glob("*.py"), *(file for folder in BELOW for file in (ROOT / folder).glob("*.py"))]:
        assert file.name == "__init__.py" or ".nodes" not in imported(file), file


def test_inference_does_without_the_training() -> None:
    """Neither the command line nor a node takes in, when it is loaded, what only training needs."""
    code = "import sys, happyhorse.cli; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.split()
    assert "happyhorse.train_cli" in loaded and "accelerate" not in loaded
    assert not [name for name in loaded if name.startswith("happyhorse.training")]
    for file in (ROOT / "nodes").glob("*.py"):
        lines = ast.parse(file.read_text(encoding="utf-8")).body
        modules = [line.module or "" for line in lines if isinstance(line, ast.ImportFrom) and line.level]
        assert not [name for name in modules if name.split(".")[0] == "training"], file


@pytest.mark.parametrize("command", [["-m", "happyhorse"], [str(ROOT)]])
def test_the_command_runs_as_a_module_and_as_a_folder(command: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, *command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().count(".") == 2


def test_the_folder_may_have_any_name(tmp_path: Path) -> None:
    """ComfyUI loads a pack under the name of its folder, hyphens and dots included."""
    (tmp_path / "Some-Pack.v2").symlink_to(ROOT)
    code = (
        "import importlib.util, sys; root = sys.argv[1];"
        "spec = importlib.util.spec_from_file_location('Some-Pack_x_v2', root + '/__init__.py',"
        " submodule_search_locations=[root]);"
        "package = importlib.util.module_from_spec(spec); sys.modules['Some-Pack_x_v2'] = package;"
        "spec.loader.exec_module(package); import importlib;"
        "print(importlib.import_module('Some-Pack_x_v2.sampler.pipeline').generate.__module__)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "Some-Pack.v2")], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "Some-Pack_x_v2.sampler.pipeline"
