"""The pack in the browser: headless Chromium on the pages of a real server."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from host import PACK, Client, Server, serve
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
FIRST_FILM = PACK / "workflows" / "pony_text_to_film.json"
READY = "() => document.querySelector('[data-testid=queue-button]') && app.graph?.nodes.length"
SECONDS = 1000  # playwright counts milliseconds
# errors that the page also reports with an empty pack, and why
HOST_ERRORS = {
    r"404 .* \S+/user\.css$": "the page asks for a style sheet that a user may add",
    r"huggingface\.co": "under --disable-api-nodes the host forbids its page to look a workflow's models up",
    r"^ComfyApp graph accessed before initialization": "the page's own scripts are in each other's way",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the pages alone: what other tests leave in its history (NaN) would be complained about."""
    with serve(tmp_path_factory.mktemp("pages")) as running:
        yield running


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the pages are kept: $SCREENSHOTS, else the run's temporary folder."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def problems() -> list[str]:
    """What the page complained about: console errors, exceptions and failed requests."""
    return []


@pytest.fixture(scope="module")
def open_page(browser: Browser, server: Server, problems: list[str]) -> Iterator[Page]:
    for name in ("example.png", "voice.wav", "film.mp4"):  # what the workflows ask for
        (server.base / "input" / name).write_bytes(b"0")  # not empty: the page asks for the first byte
    page = browser.new_page(viewport={"width": 1600, "height": 1000}, device_scale_factor=1)
    page.on("console", lambda message: problems.extend(complaint(message)))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(READY, timeout=60 * SECONDS)
    yield page
    page.close()


@pytest.fixture
def page(open_page: Page, problems: list[str]) -> Iterator[Page]:
    """The page with an empty graph; the test fails if it complained meanwhile."""
    open_page.evaluate("() => app.graph.clear()")
    # the graph that the page opens with lacks its models; its message may be gone before it is closed
    open_page.evaluate("() => document.querySelector('[data-testid=error-overlay-dismiss]')?.click()")
    yield open_page
    complaints = [text for text in problems if not any(re.search(known, text) for known in HOST_ERRORS)]
    problems.clear()
    assert not complaints


def test_the_page_loads_without_errors(page: Page, screenshots: Path) -> None:
    page.screenshot(path=screenshots / "empty.png")
    assert page.title().endswith("ComfyUI")


def test_every_node_is_created_and_drawn(page: Page, client: Client, screenshots: Path) -> None:
    names = sorted(name for name in client.object_info() if name.startswith("HappyHorse"))
    assert names
    made = page.evaluate(
        """names => {
            let x = 0, y = 0, tallest = 0;
            return names.map(name => {
                const node = LiteGraph.createNode(name);
                if (!node) return [name, null];
                app.graph.add(node);
                if (x + node.size[0] > 2400) { x = 0; y += tallest + 80; tallest = 0; }
                node.pos = [x, y];
                x += node.size[0] + 40;
                tallest = Math.max(tallest, node.size[1]);
                return [name, [node.title, node.inputs?.length ?? 0, node.outputs?.length ?? 0]];
            });
        }""",
        names,
    )
    assert [name for name, node in made if node is None] == []
    draw(page)
    assert page.evaluate("() => app.canvas.visible_nodes.map(node => node.type).sort()") == names
    page.screenshot(path=screenshots / "nodes.png")


def test_the_page_draws_no_other_seed_for_a_training(page: Page) -> None:
    """With another seed an interrupted run could not go on."""
    widgets = page.evaluate(
        """() => Object.fromEntries(['HappyHorseTrainLora', 'HappyHorseSampler'].map(
            name => [name, LiteGraph.createNode(name).widgets.map(widget => widget.name)]))"""
    )
    drawn = {name for name, names in widgets.items() if "control_after_generate" in names}
    assert drawn == {"HappyHorseSampler"} and "seed" in widgets["HappyHorseTrainLora"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_opens_with_no_missing_node(page: Page, file: Path, screenshots: Path) -> None:
    load(page, file)
    types = page.evaluate("() => app.graph.nodes.map(node => node.type)")
    known = page.evaluate("() => Object.keys(LiteGraph.registered_node_types)")
    assert set(types) <= set(known)
    workflow = json.loads(file.read_text(encoding="utf-8"))
    assert page.evaluate("() => app.graph.nodes.length") == len(workflow["nodes"])
    draw(page)
    page.screenshot(path=screenshots / f"{file.stem}.png")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_keeps_its_values_and_links_through_the_page(page: Page, file: Path) -> None:
    """Widget values stand in the file in schema order: one that moved would arrive at another input."""
    load(page, file)
    before = json.loads(file.read_text(encoding="utf-8"))
    after = page.evaluate("() => app.graph.serialize()")
    values = {node["id"]: node.get("widgets_values") for node in after["nodes"]}
    for node in before["nodes"]:
        assert values[node["id"]] == node.get("widgets_values"), node["type"]
    assert sorted(link[0] for link in after["links"]) == sorted(link[0] for link in before["links"])


def test_pressing_run_makes_a_film(page: Page, client: Client, screenshots: Path) -> None:
    load(page, FIRST_FILM)
    before = films(client)
    page.get_by_test_id("queue-button").click()
    end = time.monotonic() + 120
    while not (made := films(client) - before) and time.monotonic() < end:
        page.wait_for_timeout(200)
    assert made, client.server.log_text()
    while client.get_json("/queue")["queue_running"] and time.monotonic() < end:
        page.wait_for_timeout(100)
    page.wait_for_timeout(1 * SECONDS)  # the page shows the film
    page.screenshot(path=screenshots / "film.png")
    with av.open(made.pop()) as film:
        video, audio = film.streams.video[0], film.streams.audio[0]
        assert video.average_rate == 25
        assert audio.rate == 44100
        frames = sum(1 for _ in film.decode(video))
        assert abs(frames / 25 - float(audio.duration * audio.time_base)) < 0.1


def test_the_memory_plan_is_drawn_on_its_node_and_made_anew_at_every_run(
    page: Page, client: Client, screenshots: Path
) -> None:
    known = set(client.get_json("/history"))
    page.evaluate(
        """() => {
            app.canvas.ds.reset();  // other tests have moved the view, and what is out of it is not drawn
            const model = LiteGraph.createNode("HappyHorseLoadModel");
            const plan = LiteGraph.createNode("HappyHorseMemoryPlan");
            app.graph.add(model);
            app.graph.add(plan);
            model.pos = [150, 150];
            plan.pos = [model.size[0] + 200, 150];
            const choice = model.widgets.find(widget => widget.name === "model");
            choice.value = "pony: distill";
            model.connect(0, plan, "model");
        }"""
    )
    for run in (1, 2):
        page.get_by_test_id("queue-button").click()
        # in the page; whether it is in sight depends on the view, which the page moves as it likes
        text = page.get_by_text("GB by stage, computed").first
        text.wait_for(state="attached", timeout=60 * SECONDS)
        page.wait_for_function(
            "async count => Object.keys(await (await fetch('/history')).json()).length >= count",
            arg=len(known) + run,
            timeout=60 * SECONDS,
        )
    page.screenshot(path=screenshots / "plan.png")
    runs = [run for name, run in client.get_json("/history").items() if name not in known]
    assert len(runs) == 2 and all(run["outputs"] for run in runs)
    cached = [data["nodes"] for run in runs for kind, data in run["status"]["messages"]
              if kind == "execution_cached"]  # fmt: skip
    assert cached[-1] == ["1"], "the model is kept, the plan is not"


def complaint(message: ConsoleMessage) -> list[str]:
    """An error on the console with the address it is about; nothing for other messages."""
    return [f"{message.text} {message.location['url']}"] if message.type == "error" else []


def films(client: Client) -> set[Path]:
    """Every film in the output folder."""
    return set((client.server.base / "output").rglob("*.mp4"))


def load(page: Page, file: Path) -> None:
    """Open a workflow as if it had been dropped onto the page."""
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(file.read_text(encoding="utf-8")))


def draw(page: Page) -> None:
    """Fit the graph into the view and wait until it is painted."""
    page.evaluate("() => app.canvas.fitViewToSelectionAnimated?.() ?? app.canvas.draw(true, true)")
    page.wait_for_timeout(0.5 * SECONDS)
