"""Writes workflows/*.json with their pictures, and the prompts in tests/workflows_api/.

The graphs stand in workflow_graphs.py. Needs the environment of the tests on ComfyUI, and Chromium: the
own page of the host turns every graph into the file that it would save.

    .venv-host/bin/python tools/make_workflows.py [name ...]
"""

import io
import json
import math
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from workflow_graphs import (
    ALL,
    BOTH,
    CHOICE_INPUTS,
    COLUMNS,
    FILES,
    FIRST,
    INPUTS,
    JOIN_PICTURES,
    JOIN_SOUNDS,
    LARGER,
    LATENT,
    MODELS,
    PONIES,
    PROMPT,
    SAMPLE,
    SAVE,
    Graph,
    Json,
    Node,
    Workflow,
    note,
)

from happyhorse import __version__

HOST_VERSION = "0.33.0"
ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS, TWINS = ROOT / "workflows", ROOT / "tests" / "workflows_api"

# The file for the page

# In the page's other way of drawing, nodes of a pack have a badge and a row for advanced inputs below.
BELOW_OURS = 56
GAP, PADDING, GROUP_TITLE, NODE_TITLE = 40, 20, 44, 30
WIDTH, WIDTHS = 340, {PROMPT: 460, SAVE: 520}
HEIGHTS = {
    "HappyHorsePrompt": 620, "CLIPTextEncode": 520, "LoadImage": 330, "LoadVideo": 330, "SaveVideo": 440,
    "BatchImagesNode": 110,
}  # fmt: skip
PREVIEW = 210  # what a sampler shows while it works makes it so much higher
SAMPLERS = (
    "HappyHorseSampler", "HappyHorseSuperResolution", "KSampler", "SamplerCustom", "SamplerCustomAdvanced",
)  # fmt: skip
COLORS = {
    MODELS: "#5b9bd5", INPUTS: "#d9a441", PROMPT: "#6abf7b", FIRST: "#d9a441",
    LATENT: "#b58ae0", SAMPLE: "#e07a94", LARGER: "#e07a94",
    BOTH: "#6fb7c9", JOIN_PICTURES: "#6fb7c9", JOIN_SOUNDS: "#6fb7c9", SAVE: "#a9adb8",
}  # fmt: skip
NOTE_WIDTH = WIDTH + 2 * PADDING  # it stands below the first column


def arranged(raw: Json, workflow: Workflow, graph: Graph) -> Json:
    """The page's own file with places, groups, the note and what the host's manager wants to know."""
    nodes = {node["id"]: node for node in raw["nodes"]}
    own = dict(enumerate(graph.nodes, 1))
    groups, left, note_top = [], 0, 0
    for column in COLUMNS:
        members = {group: [i for i, node in own.items() if node.group == group] for group in column}
        if not any(members.values()):
            continue
        width, top = WIDTHS.get(column[0], WIDTH), 0
        for group, ids in members.items():
            if not ids:
                continue
            y = top + GROUP_TITLE
            for i in ids:
                node = nodes[i]
                height = max(node["size"][1], HEIGHTS.get(node["type"], 0))
                if node["type"] == "SaveVideo" and graph.pony:  # a square film
                    height = 640
                if node["type"] == "HappyHorseTextEncode":
                    if "prompt" in _linked(node):
                        node["widgets_values"] = [""]  # the page may have put another node's there
                    else:
                        height = max(height, 240)
                node["pos"], node["size"] = [left + PADDING, y + NODE_TITLE], [width, height]
                y += PREVIEW if node["type"] in SAMPLERS else 0
                y += NODE_TITLE + height + (BELOW_OURS if node["type"].startswith("HappyHorse") else PADDING)
            bounding = [left, top, width + 2 * PADDING, y - top]
            groups.append(_group(len(groups) + 1, group, bounding))
            top = y + GAP
        note_top = note_top or top
        left += width + 2 * PADDING + GAP
    for i, node in nodes.items():
        node["properties"] = _properties(own[i])
    text = _note(max(nodes) + 1, note(workflow, graph), note_top)
    return raw | {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"happyhorse/{graph.name}")),
        "last_node_id": text["id"],
        "nodes": [*(nodes[i] for i in sorted(nodes)), text],
        "groups": groups,
        "extra": {"ds": {"scale": 0.6, "offset": [40, 80]}},
    }


def _linked(node: Json) -> set[str]:
    return {entry["name"] for entry in node.get("inputs", []) if entry.get("link") is not None}


def _group(number: int, title: str, bounding: list[float]) -> Json:
    return {
        "id": number, "title": f"{number}. {title}", "bounding": bounding, "color": COLORS[title],
        "font_size": 24, "flags": {},
    }  # fmt: skip


def _note(number: int, text: str, top: float) -> Json:
    lines = sum(math.ceil(len(re.sub(r"\(http[^)]*\)", "", line)) / 58) for line in text.splitlines())
    height = 40 + 14 * lines + 8 * text.count("\n\n") + 16 * text.count("# ")
    return {
        "id": number, "type": "MarkdownNote", "pos": [0, top + NODE_TITLE], "size": [NOTE_WIDTH, height],
        "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "title": "Read me", "properties": {},
        "widgets_values": [text], "color": "#3a3a2a", "bgcolor": "#22221a",
    }  # fmt: skip


def _properties(node: Node) -> Json:
    ours = node.kind.startswith("HappyHorse")
    found = {
        "cnr_id": "comfyui-happyhorse" if ours else "comfy-core",
        "ver": __version__ if ours else HOST_VERSION,
        "Node name for S&R": node.kind,
    }
    chosen = [node.inputs[name] for name in CHOICE_INPUTS if isinstance(node.inputs.get(name), str)]
    models = [
        {"name": choice, "url": FILES[choice].url, "directory": FILES[choice].folder.rstrip("/")}
        for choice in chosen
        if choice in FILES and FILES[choice].url
    ]
    return found | ({"models": models} if models else {})


def tidied(saved: Json, before: Json) -> Json:
    """The page's file with its links numbered from 1 and without what differs from run to run."""
    numbers = {link[0]: number for number, link in enumerate(saved["links"], 1)}
    for link in saved["links"]:
        link[0] = numbers[link[0]]
    for node in saved["nodes"]:
        for entry in node.get("inputs", []):
            entry["link"] = numbers.get(entry.get("link"))
        for entry in node.get("outputs", []):
            entry["links"] = [numbers[link] for link in entry.get("links") or []]
        node["pos"], node["size"] = [list(map(round, node[key])) for key in ("pos", "size")]
    saved["nodes"].sort(key=lambda node: node["id"])
    return saved | {"id": before["id"], "last_link_id": len(numbers), "extra": before["extra"]}


# The page

READY = "() => document.querySelector('[data-testid=queue-button]') && app.graph?.nodes.length"
CONVERT = """async ([prompt, name]) => {
    await app.loadApiJson(prompt, name);
    for (const node of app.rootGraph.nodes) node.setSize(node.computeSize());
    return JSON.stringify(app.rootGraph.serialize());
}"""
OPEN = """async workflow => {
    await app.loadGraphData(workflow);
    return JSON.stringify(app.rootGraph.serialize());
}"""
FIT = """async box => {
    const canvas = app.canvas, [width, height] = [canvas.canvas.clientWidth, canvas.canvas.clientHeight];
    const scale = Math.min(width / box[2], height / box[3]);
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = (width / scale - box[2]) / 2 - box[0];
    canvas.ds.offset[1] = (height / scale - box[3]) / 2 - box[1];
    canvas.low_quality_zoom_threshold = 0;
    canvas.setDirty(true, true);
}"""
BARE = """() => {
    app.extensionManager.command.execute('Workspace.ToggleFocusMode');
    app.extensionManager.setting.set('Comfy.Graph.CanvasInfo', false);
    app.extensionManager.setting.set('Comfy.Graph.CanvasMenu', false);
}"""
SHOT, THUMBNAIL_WIDTH, THUMBNAIL_BYTES = (2048, 1152), 512, 60_000


def provide_files(base: Path) -> None:
    """What the graphs name, by name only: else the page marks their nodes red."""
    from launch_host import find_comfyui

    (base / "models" / "vae").mkdir(exist_ok=True)
    (base / "models" / "vae" / "Wan2.2_VAE.pth").touch()
    shutil.copy(find_comfyui() / "input" / "example.png", base / "input")
    for name in ("voice.wav", "film.mp4"):
        (base / "input" / name).touch()


def open_page(page: Page, url: str) -> None:
    """Open the server's page and wait until it can draw a graph."""
    page.goto(url)
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate(BARE)
    page.add_style_tag(content=".no-drag.fixed { display: none !important }")


def workflow_file(page: Page, workflow: Workflow, graph: Graph) -> Json:
    """The graph as the page would save it."""
    raw = json.loads(page.evaluate(CONVERT, [graph.api(), graph.name]))
    before = arranged(raw, workflow, graph)
    return tidied(json.loads(page.evaluate(OPEN, before)), before)


def picture(page: Page, groups: Iterable[Json]) -> Image.Image:
    """What the page shows of the graph that is open."""
    boxes = [group["bounding"] for group in groups]
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    page.evaluate(FIT, [-GAP, -GAP, right + 2 * GAP, bottom + 2 * GAP])
    page.wait_for_timeout(700)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def save_thumbnail(shot: Image.Image, path: Path) -> None:
    """Write a small JPEG."""
    small = shot.resize((THUMBNAIL_WIDTH, THUMBNAIL_WIDTH * shot.height // shot.width), Image.LANCZOS)
    small.save(path, quality=82, optimize=True)
    if path.stat().st_size > THUMBNAIL_BYTES:
        raise ValueError(f"{path} must be below {THUMBNAIL_BYTES} bytes, got {path.stat().st_size}")


def write_json(path: Path, data: Json) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(names: list[str]) -> None:
    """Write the workflows named, or all of them."""
    sys.path.insert(0, str(ROOT / "tests" / "nodes"))
    import host

    for workflow in ALL:
        write_json(TWINS / f"pony_{workflow.name}.json", workflow.graph(pony=True).api())
    graphs = [(workflow, workflow.graph(pony=False)) for workflow in ALL]
    graphs += [(workflow, workflow.graph(pony=True)) for workflow in ALL if workflow.name in PONIES]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    folder = Path(tempfile.mkdtemp(prefix="happyhorse-workflows-"))
    with host.serve(folder) as server, sync_playwright() as playwright:
        provide_files(server.base)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(zip(("width", "height"), SHOT, strict=True)))
        open_page(page, server.url)
        for workflow, graph in graphs:
            if names and graph.name not in names:
                continue
            saved = workflow_file(page, workflow, graph)
            write_json(WORKFLOWS / f"{graph.name}.json", saved)
            shot = picture(page, saved["groups"])
            shot.save(folder / f"{graph.name}.png")
            save_thumbnail(shot, WORKFLOWS / f"{graph.name}.jpg")
            sys.stdout.write(f"{graph.name} ({folder / graph.name}.png)\n")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
