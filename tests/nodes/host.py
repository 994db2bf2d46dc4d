"""A ComfyUI server of its own for the tests, and a client that talks to it like the browser does."""

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

LAUNCHER = Path(__file__).with_name("launch_host.py")
PACK = Path(__file__).resolve().parents[2]
FOLDER_NAME = "ComfyUI-HappyHorse"  # what the pack's folder is called in the server's custom_nodes/
READY_SECONDS = 120
Prompt = dict[str, dict[str, Any]]  # API format: {"1": {"class_type": ..., "inputs": {...}}}


class PromptError(RuntimeError):
    """A prompt was refused or failed; `detail` is what the server said."""

    def __init__(self, message: str, detail: dict[str, Any]) -> None:
        super().__init__(message)
        self.detail = detail


@dataclass
class Run:
    """What happened while one prompt ran, as told over the websocket."""

    prompt_id: str
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)  # JPEG or PNG files
    previews_at: list[int] = field(default_factory=list)  # after so many events
    history: dict[str, Any] = field(default_factory=dict)
    base: Path = Path()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of a kind: progress, executing, executed, execution_cached..."""
        return [event["data"] for event in self.events if event["type"] == kind]

    @property
    def outputs(self) -> dict[str, dict[str, list[Any]]]:
        """{node id: {"images" | "audio" | "text" | ...: [...]}}"""
        return self.history["outputs"]

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order; cached ones are not among them."""
        return [data["node"] for data in self.of("executing") if data["node"] is not None]

    @property
    def files(self) -> list[Path]:
        """Every file that the prompt wrote and showed, as a path on this machine."""
        shown = [
            entry
            for output in self.outputs.values()
            for entries in output.values()
            for entry in entries
            if isinstance(entry, dict) and "filename" in entry
        ]
        return [self.base / entry["type"] / entry["subfolder"] / entry["filename"] for entry in shown]


@dataclass
class Server:
    """A running ComfyUI with its own base directory."""

    base: Path
    log: Path
    port: int
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self, last: int = 60) -> str:
        """The last lines of what the server printed."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-last:])


@contextlib.contextmanager
def serve(base: Path, *arguments: str, pack: Path = PACK, folder_name: str = FOLDER_NAME) -> Iterator[Server]:
    """Start ComfyUI on the CPU with `base` as its base directory and the pack as its only custom node.

    Raises RuntimeError with the server's log if it does not become ready.
    """
    for folder in ("custom_nodes", "models", "input", "output", "user", "temp"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    _settle_user(base / "user" / "default")
    (base / "custom_nodes" / folder_name).symlink_to(pack, target_is_directory=True)
    port, log = _free_port(), base / "server.log"
    command = [
        sys.executable, str(LAUNCHER), "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--preview-method", "auto",
        "--disable-auto-launch", "--disable-api-nodes", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=base, env=environment, stdout=output, stderr=output)
    server = Server(base, log, port, process)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _settle_user(folder: Path) -> None:
    """Write what the page of a user who was here before finds: no tour, and no request for a missing file."""
    for name in ("workflows", "subgraphs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "user.css").touch()
    (folder / "comfy.templates.json").write_text("[]", encoding="utf-8")
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Minimap.Visible": False,
        "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # titles and values are painted at any zoom
    }
    (folder / "comfy.settings.json").write_text(json.dumps(settings), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/system_stats", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"ComfyUI did not become ready on {server.url}:\n{server.log_text()}")


class Client:
    """One user of a server. `run` is what most tests need; `post` and `follow` are its halves."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.id = uuid.uuid4().hex
        url = f"ws://127.0.0.1:{server.port}/ws?clientId={self.id}"
        self.socket = websocket.create_connection(url, timeout=60)
        self._announce()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str) -> bytes:
        """The body of `path`; raises urllib.error.HTTPError."""
        with urllib.request.urlopen(self.server.url + path, timeout=60) as response:
            return response.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def send(self, path: str, body: dict[str, Any]) -> Any:
        """POST `body` as JSON and return the JSON answer, None where there is none."""
        return self._send(path, json.dumps(body).encode(), "application/json")

    def object_info(self) -> dict[str, dict[str, Any]]:
        """{node id: what the server knows of the node}"""
        return self.get_json("/object_info")

    def post(self, prompt: Prompt, **extra: Any) -> str:
        """Queue a prompt and return its id; raises PromptError with every node's errors if it is refused."""
        try:
            return self.send("/prompt", {"prompt": prompt, "client_id": self.id, **extra})["prompt_id"]
        except urllib.error.HTTPError as error:
            detail = json.loads(error.read())
            raise PromptError(_refusal(detail), detail) from error

    def follow(self, prompt_id: str, seconds: float = 120) -> Run:
        """Collect events until the prompt is over, and return them with its history; raises TimeoutError.

        An execution error or an interruption is not raised: look at the events, or use `run`.
        """
        run = Run(prompt_id, base=self.server.base)
        end = time.monotonic() + seconds
        for event in self.events(end):
            if isinstance(event, bytes):
                run.previews.append(event)
                run.previews_at.append(len(run.events))
                continue
            if event["data"].get("prompt_id", prompt_id) != prompt_id:
                continue
            run.events.append(event)
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                break
        while prompt_id not in (history := self.get_json(f"/history/{prompt_id}")):
            if time.monotonic() > end:
                raise TimeoutError(f"prompt {prompt_id} never reached the history")
            time.sleep(0.02)
        run.history = history[prompt_id]
        return run

    def events(self, end: float) -> Iterator[dict[str, Any] | bytes]:
        """Events as they come, previews as image files; raises TimeoutError at the monotonic time `end`."""
        while True:
            self.socket.settimeout(max(end - time.monotonic(), 0.01))
            try:
                message = self.socket.recv()
            except websocket.WebSocketTimeoutException:
                raise TimeoutError(
                    f"no end of the prompt in time; the server says:\n{self.server.log_text()}"
                ) from None
            if isinstance(message, str):
                yield json.loads(message)
            elif (image := _preview(message)) is not None:
                yield image

    def run(self, prompt: Prompt, seconds: float = 120, **extra: Any) -> Run:
        """Queue a prompt, wait for its end and return what happened; raises PromptError if it failed."""
        run = self.follow(self.post(prompt, **extra), seconds)
        for error in run.of("execution_error"):
            where = f"{error['node_type']} ({error['node_id']})"
            raise PromptError(f"{where}: {error['exception_type']}: {error['exception_message']}", error)
        for data in run.of("execution_interrupted"):
            raise PromptError("the prompt was interrupted", data)
        return run

    def error_of(self, prompt: Prompt, seconds: float = 120) -> str:
        """The message with which a prompt is refused or fails; AssertionError if it works."""
        try:
            self.run(prompt, seconds)
        except PromptError as error:
            return str(error)
        raise AssertionError("the prompt worked, an error was expected")

    def interrupt(self) -> None:
        """Stop the prompt that runs now."""
        self.send("/interrupt", {})

    def free(self) -> None:
        """Unload all models and forget cached results.

        The host overlooks what is asked while it tidies up after a prompt, and answers before it has done it.
        """
        for _ in range(2):  # the second wakes it where it did not hear the first, and it then finds both
            time.sleep(0.5)
            self.send("/free", {"free_memory": True})  # implies the other; the host may miss one of two
        time.sleep(0.5)

    def upload(self, file: Path) -> str:
        """Put an image, a sound or a film into the input folder and return its name for a Load node."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{file.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return self._send("/upload/image", body, f"multipart/form-data; boundary={boundary}")["name"]

    upload_image = upload

    def put(self, file: Path, folder: str = "input") -> str:
        """Copy a file into a folder of the server's base directory (models/loras...) and return its name."""
        target = self.server.base / folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        return file.name

    def _send(self, path: str, body: bytes, kind: str) -> Any:
        request = urllib.request.Request(self.server.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def _announce(self) -> None:
        flags = {"supports_preview_metadata": True}
        self.socket.send(json.dumps({"type": "feature_flags", "data": flags}))


def _refusal(detail: dict[str, Any]) -> str:
    lines = [f"{detail['error']['message']} {detail['error']['details']}".strip()]
    for node, problem in detail["node_errors"].items():
        for error in problem["errors"]:
            lines.append(f"{problem['class_type']} ({node}): {error['message']}: {error['details']}")
    return "\n".join(lines)


def _preview(message: bytes) -> bytes | None:
    """The image file in a binary message; None for the other kinds."""
    kind, length = struct.unpack(">II", message[:8])
    if kind == 1:  # then `length` is the image format
        return message[8:]
    return message[8 + length :] if kind == 4 else None  # JSON metadata stand before the image
