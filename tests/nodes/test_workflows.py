"""The example workflows: every pony twin makes a film, and every file is complete."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import pytest
from host import PACK, Client
from PIL import Image

from happyhorse import __version__
from happyhorse.model.structured_prompt import parse_dialogue, warnings_for

FOLDER = PACK / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
TWINS = sorted((PACK / "tests" / "workflows_api").glob("pony_*.json"))
FRAMES = {"pony_continue_film": 49 + 49 - 9}  # two films of two seconds that share 9 frames; all others: 49
SOURCES = {"LoadImage", "LoadAudio", "LoadVideo"}
# Every folder that the host takes for a pack's templates; of several it serves the first only.
TEMPLATES = {"example_workflows", "example", "examples", "workflow", "workflows"}
Json = dict[str, Any]


def read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def nodes_of(workflow: Json) -> dict[int, Json]:
    """The nodes that run, by number."""
    return {node["id"]: node for node in workflow["nodes"] if node["type"] != "MarkdownNote"}


def values_of(node: Json, info: dict[str, Json]) -> dict[str, tuple[Any, Json]]:
    """{widget: (value, what the server says of it)}; the file has values in the order of the schema."""
    schema = {}
    for group in info[node["type"]]["input"].values():
        schema |= group
    values, found = iter(node.get("widgets_values") or []), {}
    for entry in node["inputs"]:
        if "widget" not in entry:
            continue
        name = entry["name"]
        kind, options = (*schema.get(name, (None,)), {})[:2]
        found[name] = (next(values), {"kind": kind} | options)
        if options.get("control_after_generate"):
            assert next(values) in ("fixed", "randomize")
    assert list(values) == []
    return found


def links_of(workflow: Json) -> dict[tuple[int, str], list[Any]]:
    """{(node, input): [node, output]} as the API format has it."""
    sources = {number: [str(source), slot] for number, source, slot, *_ in workflow["links"]}
    return {
        (node["id"], entry["name"]): sources[entry["link"]]
        for node in nodes_of(workflow).values()
        for entry in node["inputs"]
        if entry["link"] is not None
    }


@pytest.fixture(scope="module")
def graphs() -> ModuleType:
    """The description that the files are made from."""
    name = "workflow_graphs"
    spec = importlib.util.spec_from_file_location(name, PACK / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def description(graphs: ModuleType, name: str) -> Any:
    """(workflow, graph) of a file's name."""
    workflow = next(w for w in graphs.ALL if w.name == name.removeprefix("pony_"))
    return workflow, workflow.graph(pony=name.startswith("pony_"))


@pytest.mark.parametrize("file", TWINS, ids=lambda file: file.stem)
def test_a_pony_twin_makes_a_film(client: Client, file: Path) -> None:
    (film,) = client.run(read(file)).files
    with av.open(str(film)) as opened:
        video, audio = opened.streams.video[0], opened.streams.audio[0]
        assert (video.codec_context.name, video.average_rate) == ("h264", 25)
        assert (audio.codec_context.name, audio.rate, audio.layout.name) == ("aac", 44100, "stereo")
        length = float(audio.duration * audio.time_base)
        frames = sum(1 for _ in opened.decode(video))
    assert frames == FRAMES.get(file.stem, 49)
    assert length == pytest.approx(frames / 25, abs=1e-3)
    with av.open(str(film)) as opened:
        assert sum(frame.samples for frame in opened.decode(audio=0)) >= frames / 25 * 44100


def test_every_workflow_has_a_pony_twin(graphs: ModuleType) -> None:
    names = {workflow.name for workflow in graphs.ALL}
    assert {file.stem for file in TWINS} == {f"pony_{name}" for name in names}
    assert {file.stem for file in FILES} == names | {f"pony_{name}" for name in graphs.PONIES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_twin_has_the_nodes_of_its_workflow(file: Path) -> None:
    name = file.stem if file.stem.startswith("pony_") else f"pony_{file.stem}"
    twin = Counter(
        node["class_type"] for node in read(PACK / "tests" / "workflows_api" / f"{name}.json").values()
    )
    own = Counter(node["type"] for node in nodes_of(read(file)).values())
    if name != file.stem and any(own[source] for source in SOURCES):
        # where files are asked for, the twin makes a first film
        for maker in ("HappyHorseEmptyLatent", "HappyHorseSampler", "HappyHorseDecode"):
            twin[maker] -= 1
        twin["ImageFromBatch"] -= own["LoadImage"]
        twin["CreateVideo"] -= own["LoadVideo"]
        for source in SOURCES:
            del own[source]
    assert +own == +twin


@pytest.mark.parametrize("file", [*FILES, *TWINS], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_file_is_what_its_description_says(client: Client, graphs: ModuleType, file: Path) -> None:
    """If this fails: run tools/make_workflows.py."""
    workflow, graph = description(graphs, file.stem)
    found, api = read(file), graph.api()
    if file in TWINS:
        assert found == api
        return
    info, nodes, links = client.object_info(), nodes_of(found), links_of(found)
    assert {str(number) for number in nodes} == set(api)
    asked = {
        (int(number), name): value
        for number, node in api.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert links == asked
    for number, node in nodes.items():
        wanted = api[str(number)]
        assert node["type"] == wanted["class_type"]
        values = {name: value for name, (value, _) in values_of(node, info).items()}
        plain = {k: v for k, v in wanted["inputs"].items() if not isinstance(v, list)}
        assert {name: values[name] for name in plain} == plain
    (note,) = (node for node in found["nodes"] if node["type"] == "MarkdownNote")
    assert note["widgets_values"] == [graphs.note(workflow, graph)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_node_is_known_and_every_value_is_in_range(
    client: Client, graphs: ModuleType, file: Path
) -> None:
    info = client.object_info()
    for node in nodes_of(read(file)).values():
        assert node["type"] in info
        for name, (value, options) in values_of(node, info).items():
            where = f"{node['type']}.{name}"
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert options.get("min", value) <= value <= options.get("max", value), where
            elif options["kind"] == "COMBO":
                known = [*options["options"], *graphs.FILES, "example.png", "voice.wav", "film.mp4"]
                assert value in known, where


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_text_that_comes_over_a_link_hides_no_other_behind_it(file: Path) -> None:
    """Who takes the link away would find it in the box."""
    for node in nodes_of(read(file)).values():
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        if node["type"] == "HappyHorseTextEncode" and "prompt" in linked:
            assert node["widgets_values"] == [""]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_node_names_its_pack(client: Client, file: Path) -> None:
    nodes = nodes_of(read(file)).values()
    versions = {
        "comfyui-happyhorse": __version__,
        "comfy-core": client.get_json("/system_stats")["system"]["comfyui_version"],
    }
    models = {}
    for node in nodes:
        properties = node["properties"]
        pack = "comfyui-happyhorse" if node["type"].startswith("HappyHorse") else "comfy-core"
        assert (properties["cnr_id"], properties["ver"]) == (pack, versions[pack])
        assert properties["Node name for S&R"] == node["type"]
        for model in properties.get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
            models[model["name"]] = model["directory"]
    wan = any("Wan2.2_VAE.pth" in (node.get("widgets_values") or []) for node in nodes)
    assert models == ({"Wan2.2_VAE.pth": "vae"} if wan else {})  # the other choices are folders


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_note_names_files_folders_and_sources(graphs: ModuleType, file: Path) -> None:
    (note,) = (node for node in read(file)["nodes"] if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert "daVinci-MagiHuman" in text
    assert "HappyHorse's own weights are not public" in text
    for choice in graphs.choices(description(graphs, file.stem)[1]):
        if choice.startswith("pony"):
            assert "two tiny worlds" in text
            continue
        known = graphs.FILES[choice]
        repository = graphs.SOURCES[known.part].origin.split(" ")[0].rstrip(",")
        assert f"`models/{known.folder}`" in text
        assert known.licence in text
        assert f"https://huggingface.co/{repository}" in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_overlaps_and_every_node_stands_in_a_group(file: Path) -> None:
    workflow = read(file)
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    for one, (x, y, width, height) in boxes.items():
        for other, (x2, y2, width2, height2) in boxes.items():
            apart = x + width <= x2 or x2 + width2 <= x or y + height <= y2 - 30 or y2 + height2 <= y - 30
            assert one == other or apart, (one, other)
    for node in nodes_of(workflow).values():
        x, y, width, height = boxes[node["id"]]
        inside = [
            group["title"]
            for group in workflow["groups"]
            for left, top, across, down in [group["bounding"]]
            if left < x and x + width < left + across and top < y - 30 and y + height < top + down
        ]
        assert len(inside) == 1, node["type"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_workflow_has_a_small_picture(file: Path) -> None:
    picture = file.with_suffix(".jpg")
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as opened:
        assert (opened.format, opened.width) == ("JPEG", 512)


def test_there_is_one_folder_of_templates_and_the_server_lists_it(client: Client) -> None:
    assert [entry.name for entry in PACK.iterdir() if entry.name in TEMPLATES] == [FOLDER.name]
    assert {entry.suffix for entry in FOLDER.iterdir()} == {".json", ".jpg"}
    (names,) = (found for found in client.get_json("/workflow_templates").values() if "text_to_film" in found)
    assert set(names) == {file.stem for file in FILES}


def test_the_prompts_draw_no_warning(graphs: ModuleType) -> None:
    for workflow in graphs.ALL:
        words = workflow.words
        assert warnings_for(words.body, parse_dialogue(words.dialogue), words.background_sound) == []


def test_the_published_archive_leaves_out_what_only_developers_need() -> None:
    ignored = set((PACK / ".comfyignore").read_text(encoding="utf-8").splitlines())
    assert {"tests/", "tools/", "benchmarks/"} <= ignored
    assert not {"workflows/", "nodes/", "model/", "sampler/", "kernels/", "web/", "locales/"} & ignored
