"""The pack on a real server, under two folder names: what the host lists and serves of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from host import FOLDER_NAME, PACK, Client, PromptError, Server, serve

WORKFLOWS = sorted(file.stem for file in (PACK / "workflows").glob("*.json"))
GROUPS = {"load", "prompt", "latent", "sample", "super-resolution", "decode", "train"}
IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 0xFF}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}}


@pytest.fixture(scope="module", params=[FOLDER_NAME, "comfyui_happyhorse.v2"])
def user(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator:
    """A client, and the name under which its server knows the pack's folder."""
    if request.param == FOLDER_NAME:
        with Client(server) as client:
            yield client, request.param
        return
    with serve(tmp_path_factory.mktemp("other"), folder_name=request.param) as other, Client(other) as client:
        yield client, request.param


def ours(client: Client) -> dict[str, dict]:
    """What the server knows of the pack's nodes."""
    nodes = {name: info for name, info in client.object_info().items() if name.startswith("HappyHorse")}
    assert nodes, client.server.log_text()
    return nodes


def test_the_pack_loads_without_a_warning(user: tuple[Client, str]) -> None:
    client, folder = user
    ours(client)
    log, started, _ = client.server.log.read_text(encoding="utf-8").partition("Starting server")
    assert started and "IMPORT FAILED" not in log and "Traceback" not in log
    marks = (folder.lower(), "happyhorse")
    warned = [line for line in log.splitlines() if "[WARNING]" in line or "[ERROR]" in line]
    assert not [line for line in warned if any(mark in line.lower() for mark in marks)]
    assert folder in log  # the table of import times names it


def test_every_node_says_what_it_is(user: tuple[Client, str]) -> None:
    for name, info in ours(user[0]).items():
        top, _, group = info["category"].partition("/")
        assert top == "HappyHorse", name
        assert group in GROUPS, name
        assert info["display_name"], name
        assert info["display_name"] != name
        assert len(info["description"]) > 20, name
        assert info["search_aliases"], name
        assert name.isalnum(), name
        assert not name.endswith("Api"), name  # the host's frontend would hide it


def test_every_input_and_output_has_a_tooltip(user: tuple[Client, str]) -> None:
    for name, info in ours(user[0]).items():
        for group in ("required", "optional"):
            for key, spec in info["input"].get(group, {}).items():
                assert len(spec) > 1, f"{name}.{key}"
                assert spec[1].get("tooltip"), f"{name}.{key}"
        assert len(info["output_tooltips"]) == len(info["output"]), name
        assert all(info["output_tooltips"]), name


def test_every_node_has_a_help_page(user: tuple[Client, str]) -> None:
    client, folder = user
    for name, info in ours(client).items():
        page = client.get(f"/extensions/{quote(folder)}/docs/{name}.md").decode()
        assert page.startswith("# "), name
        for group in ("required", "optional"):
            for key in info["input"].get(group, {}):
                assert key in page, f"the help of {name} does not explain {key}"


def test_every_workflow_is_listed_and_served(user: tuple[Client, str]) -> None:
    client, folder = user
    listed = client.get_json("/workflow_templates").get(folder, [])
    assert sorted(listed) == WORKFLOWS
    for name in WORKFLOWS:
        workflow = client.get_json(f"/api/workflow_templates/{quote(folder)}/{quote(name)}.json")
        assert workflow["nodes"], name
        assert client.get(f"/api/workflow_templates/{quote(folder)}/{quote(name)}.jpg")[:2] == b"\xff\xd8", (
            name
        )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_input_and_output_is_translated(user: tuple[Client, str], language: str) -> None:
    client, _ = user
    words = client.get_json("/i18n")[language]["nodeDefs"]
    for name, info in ours(client).items():
        assert words[name]["display_name"], name
        assert words[name]["description"], name
        keys = {key for group in ("required", "optional") for key in info["input"].get(group, {})}
        assert set(words[name].get("inputs", {})) == keys, name
        assert all(entry["name"] and entry["tooltip"] for entry in words[name].get("inputs", {}).values()), (
            name
        )
        outputs = words[name].get("outputs", {})
        assert set(outputs) == {str(index) for index in range(len(info["output"]))}, name
        assert all(entry["name"] for entry in outputs.values()), name


def test_english_words_are_the_schema_s_own(user: tuple[Client, str]) -> None:
    client, _ = user
    words = client.get_json("/i18n")["en"]["nodeDefs"]
    for name, info in ours(client).items():
        assert words[name]["display_name"] == info["display_name"]
        assert words[name]["description"] == info["description"]
        for group in ("required", "optional"):
            for key, spec in info["input"].get(group, {}).items():
                assert words[name]["inputs"][key]["tooltip"] == spec[1]["tooltip"], f"{name}.{key}"


def test_a_repeated_prompt_runs_nothing_again(client: Client) -> None:
    first = client.run({"1": IMAGE, "2": SAVE})
    assert first.files[0].is_file()
    assert "1" not in client.run({"1": IMAGE, "2": SAVE}).executed


def test_an_uploaded_file_reaches_a_load_node(client: Client) -> None:
    made = client.run({"1": IMAGE, "2": SAVE | {"inputs": SAVE["inputs"] | {"filename_prefix": "again"}}})
    name = client.upload(made.files[0] if made.files else next((client.server.base / "output").glob("blue*")))
    load = {"class_type": "LoadImage", "inputs": {"image": name}}
    assert client.run({"1": load, "2": SAVE}).files


def test_a_refused_prompt_names_the_node_and_the_input(client: Client) -> None:
    with pytest.raises(PromptError, match=r"SaveImage \(2\).*images"):
        client.run({"2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "blue"}}})


def test_workflow_files_are_in_the_format_of_the_browser() -> None:
    for name in WORKFLOWS:
        workflow = json.loads((Path(PACK) / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        assert workflow["version"] == 0.4, name
        assert {"nodes", "links", "last_node_id", "last_link_id"} <= set(workflow), name
