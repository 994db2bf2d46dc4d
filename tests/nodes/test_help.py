"""Help pages, translations and docs/nodes.md: made from the schemas, and whole."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = re.compile(r"[{}@|]")  # the page reads names and descriptions as formats, in which these stand out


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_help", ROOT / "tools" / "make_help.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schemas(tool: ModuleType) -> list[Any]:
    return tool.node_schemas()


def strings(value: Any) -> list[str]:
    return (
        [text for entry in value.values() for text in strings(entry)] if isinstance(value, dict) else [value]
    )


def test_the_files_are_what_the_schemas_make(tool: ModuleType, schemas: list[Any]) -> None:
    assert tool.outdated(tool.generated(schemas)) == [], "run tools/make_help.py"


def test_every_node_has_a_page_in_both_languages(schemas: list[Any]) -> None:
    for schema in schemas:
        for file in (f"{schema.node_id}.md", f"{schema.node_id}/zh.md"):
            page = (ROOT / "web" / "docs" / file).read_text(encoding="utf-8")
            assert page.startswith("# "), file
            named = [socket.id for socket in schema.inputs] + [o.display_name for o in schema.outputs]
            assert all(f"`{name}`" in page for name in named), file


def test_what_is_written_by_hand_has_every_node_input_and_output(
    tool: ModuleType, schemas: list[Any]
) -> None:
    assert tool.gaps(schemas) == []


def test_a_gap_is_found(tool: ModuleType, schemas: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = tool.translation()
    del words["HappyHorseSampler"]["inputs"]["seed"]
    words["HappyHorseDecode"]["outputs"]["0"]["tooltip"] = ""
    words["HappyHorseNoise"]["inputs"]["extra"] = {"name": "x", "tooltip": "x"}
    monkeypatch.setattr(tool, "translation", lambda: words)
    file = "locales/zh/nodeDefs.json"
    assert sorted(tool.gaps(schemas)) == [
        f"{file}, HappyHorseDecode, outputs, 0, tooltip: empty",
        f"{file}, HappyHorseNoise, inputs: extra belongs to no node",
        f"{file}, HappyHorseSampler, inputs: seed is missing",
    ]
    page = tool.generated(schemas)[ROOT / "web" / "docs" / "HappyHorseSampler" / "zh.md"]
    assert "`seed`" in page  # in English until it is translated


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_string_is_empty(tool: ModuleType, schemas: list[Any], language: str) -> None:
    words = tool.translation() if language == "zh" else {s.node_id: tool.english(s) for s in schemas}
    assert all(text.strip() for text in strings(words))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_name_or_description_is_taken_for_a_format(
    tool: ModuleType, schemas: list[Any], language: str
) -> None:
    words = tool.translation() if language == "zh" else {s.node_id: tool.english(s) for s in schemas}
    for node in words.values():
        sockets = [*node["inputs"].values(), *node["outputs"].values()]
        for text in (node["display_name"], node["description"], *(socket["name"] for socket in sockets)):
            assert not SPECIAL.search(text), text


def test_chinese_is_translated(tool: ModuleType) -> None:
    for name, node in tool.translation().items():
        texts = [node["description"]]
        texts += [socket["tooltip"] for socket in [*node["inputs"].values(), *node["outputs"].values()]]
        assert all(re.search(r"[\u4e00-\u9fff]", text) for text in texts), name


def test_choices_that_a_tooltip_explains_keep_their_names(tool: ModuleType, schemas: list[Any]) -> None:
    words = tool.translation()
    for schema in schemas:
        for socket in schema.inputs:
            for option in getattr(socket, "options", None) or ():
                if re.search(rf"\b{re.escape(option)}\b", socket.tooltip):
                    told = words[schema.node_id]["inputs"][socket.id]["tooltip"]
                    assert option in told, f"{schema.node_id}.{socket.id}: {option}"


def test_numbers_are_the_same_in_both_languages(tool: ModuleType, schemas: list[Any]) -> None:
    words = tool.translation()
    for schema in schemas:
        for socket in [*schema.inputs]:
            told = words[schema.node_id]["inputs"][socket.id]["tooltip"]
            numbers = set(re.findall(r"\d+(?:\.\d+)?", socket.tooltip))
            assert numbers <= set(re.findall(r"\d+(?:\.\d+)?", told)), f"{schema.node_id}.{socket.id}"


def test_every_category_is_a_group_of_the_overview(tool: ModuleType, schemas: list[Any]) -> None:
    assert {schema.category for schema in schemas} == {f"HappyHorse/{group}" for group in tool.GROUPS}


def test_links_of_the_overview_lead_somewhere(tool: ModuleType, schemas: list[Any]) -> None:
    page = tool.overview(schemas)
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target).resolve().is_file(), target
