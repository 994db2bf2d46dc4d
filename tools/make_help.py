"""Writes the help pages, locales/en and docs/nodes.md from the nodes' schemas; run where ComfyUI's tests run.

    .venv-host/bin/python tools/make_help.py           # writes what has changed
    .venv-host/bin/python tools/make_help.py --check   # exits 1 where something would be written

Written by hand: tools/help/notes.*.md (when to use a node, and what goes wrong) and locales/zh/nodeDefs.json.
"""

import argparse
import asyncio
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTES = Path(__file__).resolve().parent / "help"
TRANSLATION = ROOT / "locales" / "zh" / "nodeDefs.json"
GROUPS = {
    "load": "加载",
    "prompt": "提示词",
    "latent": "潜空间",
    "sample": "采样",
    "super-resolution": "超分辨率",
    "decode": "解码",
    "train": "训练",
}
THEIRS = {"latent"}  # names of categories that the page translates itself; ours would change all nodes
Schema = Any  # the host's io.Schema
Words = dict[str, Any]  # of one node, as the host's locale files hold them


@dataclass(frozen=True)
class Language:
    """The fixed words of a help page."""

    code: str
    id: str
    inputs: str
    outputs: str
    default: str
    output_columns: tuple[str, ...]
    optional: str
    advanced: str
    file: str
    text: str
    span: str
    step: str


LANGUAGES = (
    Language(
        code="en", id="Node id", inputs="Inputs", outputs="Outputs",
        default="default",
        output_columns=("output", "type", "meaning"),
        optional="optional", advanced="advanced", file="a file found on disk", text="text",
        span="{} to {}", step="step {}",
    ),
    Language(
        code="zh", id="节点 ID", inputs="输入", outputs="输出",
        default="默认值",
        output_columns=("输出", "类型", "说明"),
        optional="可选", advanced="高级", file="磁盘上的文件", text="文本",
        span="{} 到 {}", step="步长 {}",
    ),
)  # fmt: skip


def node_schemas() -> list[Schema]:
    """The schemas of all nodes, in their order; this process must be a host already."""
    from happyhorse.nodes import HappyHorseExtension

    nodes = asyncio.run(HappyHorseExtension().get_node_list())
    return [node.define_schema() for node in nodes]


def english(schema: Schema) -> Words:
    """The words of a schema, in the form of the host's locale files."""
    words: Words = {"display_name": schema.display_name, "description": schema.description}
    words["inputs"] = {socket.id: _entry(socket.id, socket.tooltip) for socket in schema.inputs}
    outputs = [_entry(output.display_name, output.tooltip) for output in schema.outputs]
    return words | {"outputs": {str(index): entry for index, entry in enumerate(outputs)}}


def _entry(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip or ""}


def translation() -> dict[str, Words]:
    """The Chinese words of all nodes, written by hand."""
    return json.loads(TRANSLATION.read_text(encoding="utf-8"))


def notes(code: str) -> dict[str, str]:
    """The notes of a language: {group or node id: Markdown}; "overview" is the top of docs/nodes.md."""
    text = (NOTES / f"notes.{code}.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<=[^\x00-\xff])\n(?=[^\x00-\xff])", "", text)  # Chinese lines meet without a space
    pieces = re.split(r"^#{1,2} (\S+)$", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def gaps(schemas: list[Schema]) -> list[str]:
    """What is missing, or stands for nothing, in what is written by hand; one line each."""
    translated, wanted = translation(), {schema.node_id: english(schema) for schema in schemas}
    found = list(_differences(wanted, translated, TRANSLATION.relative_to(ROOT).as_posix()))
    for language in LANGUAGES:
        written = dict.fromkeys(notes(language.code), "")
        names = dict.fromkeys(["overview", *GROUPS, *wanted], "")
        found += _differences(names, written, f"tools/help/notes.{language.code}.md")
    return found


def _differences(wanted: Any, given: Any, where: str) -> Iterator[str]:
    if not isinstance(wanted, dict):
        if wanted and not given:
            yield f"{where}: empty"
        return
    for key in wanted.keys() - given.keys():
        yield f"{where}: {key} is missing"
    for key in given.keys() - wanted.keys():
        yield f"{where}: {key} belongs to no node"
    for key in wanted.keys() & given.keys():
        yield from _differences(wanted[key], given[key], f"{where}, {key}")


def help_page(schema: Schema, words: Words, language: Language, note: str) -> str:
    """The Markdown page of a node."""
    facts = [f"{language.id}: `{schema.node_id}`", f"`{schema.category}`"]
    parts = [f"# {words['display_name']}", words["description"], " · ".join(facts), note]
    parts += [f"## {language.inputs}", _input_list(schema, words, language)]
    if schema.outputs:
        rows = (
            (_name(entry["name"], output.display_name), f"`{output.io_type}`", entry["tooltip"])
            for output, entry in zip(schema.outputs, words["outputs"].values(), strict=True)
        )
        parts += [f"## {language.outputs}", _table(language.output_columns, rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _input_list(schema: Schema, words: Words, language: Language) -> str:
    """One item per input: the page's panel is too narrow for a table of five columns."""
    lines = []
    for socket in schema.inputs:
        entry = words["inputs"][socket.id]
        marks = [getattr(language, mark) for mark in ("optional", "advanced") if getattr(socket, mark, False)]
        kind = ", ".join([f"`{socket.io_type}`", *marks])
        default = _default(socket)
        facts = filter(None, (kind, _values(socket, language), default and f"{language.default}: {default}"))
        lines.append(f"- **{_name(entry['name'], socket.id)}** ({'; '.join(facts)})\n  {entry['tooltip']}")
    return "\n".join(lines)


def _name(name: str, own: str) -> str:
    return f"`{own}`" if name == own else f"{name} `{own}`"


def _is_file(socket: Any) -> bool:
    """Whether what a combo offers is found on disk, so that it differs from machine to machine."""
    return socket.io_type == "COMBO" and (not socket.options or socket.options[0].startswith("pony"))


def _default(socket: Any) -> str:
    default = getattr(socket, "default", None)
    if socket.io_type == "COMBO" and not _is_file(socket):
        default = default or socket.options[0]
    return "" if default in (None, "") else f"`{default}`"


def _values(socket: Any, language: Language) -> str:
    if socket.io_type == "COMBO":
        return language.file if _is_file(socket) else ", ".join(f"`{option}`" for option in socket.options)
    if socket.io_type == "STRING":
        return language.text
    if getattr(socket, "min", None) is None:
        return ""
    span = language.span.format(socket.min, socket.max)
    return span if socket.step in (None, 1) else f"{span}, {language.step.format(socket.step)}"


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def overview(schemas: list[Schema]) -> str:
    """docs/nodes.md: all nodes in a table, then the notes by group."""
    written = notes("en")
    rows = ((group, _link(schema), schema.description) for group in GROUPS for schema in _of(schemas, group))
    parts = ["# Nodes", written["overview"], _table(("group", "node", "what it does"), rows)]
    for group in GROUPS:
        parts += [f"## {group.capitalize()}", written[group]]
        for schema in _of(schemas, group):
            parts += [f"### {schema.display_name}", schema.description, written.get(schema.node_id, "")]
            parts += [f"[Inputs and outputs](../web/docs/{schema.node_id}.md)"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _link(schema: Schema) -> str:
    anchor = re.sub(r"[^\w -]", "", schema.display_name.lower()).replace(" ", "-")
    return f"[{schema.display_name}](#{anchor})"


def _of(schemas: list[Schema], group: str) -> list[Schema]:
    return [schema for schema in schemas if schema.category == f"HappyHorse/{group}"]


def generated(schemas: list[Schema]) -> dict[Path, str]:
    """Every generated file with its text; what a translation lacks stands there in English."""
    words = {"en": {schema.node_id: english(schema) for schema in schemas}}
    words["zh"] = {name: _laid_over(own, translation().get(name)) for name, own in words["en"].items()}
    result = {ROOT / "docs" / "nodes.md": overview(schemas)}
    for language in LANGUAGES:
        written = notes(language.code)
        for schema in schemas:
            name = schema.node_id
            page = help_page(schema, words[language.code][name], language, written.get(name, ""))
            file = f"{name}.md" if language.code == "en" else f"{name}/{language.code}.md"
            result[ROOT / "web" / "docs" / file] = page
    categories = {name: translated for name, translated in GROUPS.items() if name not in THEIRS}
    result[ROOT / "locales" / "en" / "nodeDefs.json"] = _json(words["en"])
    result[ROOT / "locales" / "en" / "main.json"] = _json({"nodeCategories": {n: n for n in categories}})
    result[ROOT / "locales" / "zh" / "main.json"] = _json({"nodeCategories": categories})
    return result


def _laid_over(own: Any, translated: Any) -> Any:
    if isinstance(own, dict):
        found = translated if isinstance(translated, dict) else {}
        return {key: _laid_over(value, found.get(key)) for key, value in own.items()}
    return translated or own


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def outdated(files: dict[Path, str]) -> list[Path]:
    """Of the generated files those that are not on disk as they should be, and help pages of no node."""
    pages = (path for path in (ROOT / "web" / "docs").rglob("*.md") if path not in files)
    return [path for path, text in files.items() if _text(path) != text] + sorted(pages)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _write(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    """Write or check all files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 where files are not as made"
    )
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT / "tests" / "nodes"))
    import conftest  # makes this process a host

    if reason := conftest.why_not():
        parser.error(reason)
    logging.disable(logging.WARNING)
    try:
        schemas = node_schemas()
        files, missing = generated(schemas), gaps(schemas)
    finally:
        conftest.pytest_unconfigure()
    changed = outdated(files)
    for path in changed:
        if not check:
            _write(path, files.get(path))
        sys.stdout.write(f"{'outdated' if check else 'written'}: {path.relative_to(ROOT).as_posix()}\n")
    for line in missing:
        sys.stdout.write(f"{line}\n")
    return 1 if missing or (check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
