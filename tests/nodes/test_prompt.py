"""The prompt nodes: their sockets, what they hand on and what they show."""

from types import SimpleNamespace
from typing import Any

import comfy_execution.utils
import pytest
import torch

from happyhorse.model.prompt import TextStates
from happyhorse.model.structured_prompt import build_prompt, parse_dialogue
from happyhorse.nodes import prompt
from happyhorse.nodes.prompt import NODES, HappyHorsePrompt, HappyHorseTextEncode, report

BODY = 'A man in a red coat says, "Hello."'
LINES = "Man in red coat, English: Hello.\n"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the page is sent, as (text, node id), while node 7 runs."""
    import server

    sent: list[tuple[str, str]] = []
    page = SimpleNamespace(send_progress_text=lambda text, node_id: sent.append((text, node_id)))
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    context = comfy_execution.utils.ExecutionContext("prompt", "7", None)
    monkeypatch.setattr(prompt, "get_executing_context", lambda: context)
    return sent


def encoded(num_tokens: int, num_kept: int, cut_text: str = "") -> TextStates:
    return TextStates(torch.zeros(1, num_kept, 4), num_tokens, cut_text)


@pytest.mark.parametrize("node", NODES)
def test_every_socket_of_a_prompt_node_is_explained(node: Any) -> None:
    schema = node.define_schema()
    assert schema.node_id == node.__name__
    assert schema.category == "HappyHorse/prompt"
    assert schema.display_name and schema.description and schema.search_aliases
    assert all(socket.tooltip for socket in [*schema.inputs, *schema.outputs])
    assert all(output.display_name for output in schema.outputs)


def test_the_sockets_are_the_ones_that_workflows_know() -> None:
    names = [[socket.id for socket in node.define_schema().inputs] for node in NODES]
    assert names == [["body", "dialogue", "background_sound"], ["clip", "prompt"]]
    types = [[output.io_type for output in node.define_schema().outputs] for node in NODES]
    assert types == [["STRING", "STRING"], ["CONDITIONING", "INT", "STRING"]]


def test_the_prompt_node_builds_warns_and_shows(shown: list[tuple[str, str]]) -> None:
    output = HappyHorsePrompt.execute(BODY, LINES + "A boy, German: <Nein> & nie", "rain")
    text, warnings = output.args
    assert text == build_prompt(BODY, parse_dialogue(LINES + "A boy, German: <Nein> & nie"), "rain")
    assert [row.split(":")[0] for row in warnings.splitlines()] == ["body", "dialogue"]
    assert output.ui.as_dict() == {"text": (warnings,)}
    assert shown == [(warnings.replace("<Nein> &", "&lt;Nein&gt; &amp;"), "7")]


def test_without_warnings_the_old_ones_are_written_over(shown: list[tuple[str, str]]) -> None:
    output = HappyHorsePrompt.execute("word " * 170)
    assert output.args[1] == ""
    assert output.ui is None
    assert shown == [("170 words in the body, no warnings", "7")]


def test_outside_a_server_nothing_is_shown() -> None:
    assert HappyHorsePrompt.execute(BODY, LINES, "").args[0].startswith(BODY)


@pytest.mark.parametrize(
    ("values", "match"),
    [((" ",), r"^body is blank"), ((BODY, "Hello"), r"^dialogue: row 1 has no colon.*Cantonese")],
)
def test_a_wrong_input_of_the_prompt_node_is_named(values: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HappyHorsePrompt.execute(*values)


def test_text_encode_hands_on_what_the_encoder_says(
    monkeypatch: pytest.MonkeyPatch, shown: list[tuple[str, str]]
) -> None:
    asked = []

    def encode(*arguments: Any) -> tuple[Any, TextStates]:
        asked.append(arguments)
        return "conditioning", encoded(12, 12)

    monkeypatch.setattr(prompt, "encode", encode)
    output = HappyHorseTextEncode.execute("clip", BODY)
    assert asked == [("clip", BODY, "prompt")]
    assert output.args == ("conditioning", 12, "12 tokens, all kept")
    assert output.ui.as_dict() == {"text": ("12 tokens, all kept",)}
    assert shown == [("12 tokens, all kept", "7")]


def test_a_clip_of_another_family_is_refused() -> None:
    clip = SimpleNamespace(cond_stage_model=torch.nn.Identity())
    for wrong in (clip, None):
        with pytest.raises(ValueError, match=r"^clip: a T5Gemma encoder is needed"):
            HappyHorseTextEncode.execute(wrong, BODY)


def test_the_report_says_what_was_cut() -> None:
    assert report(encoded(1, 1)) == "1 token, all kept"
    text = report(encoded(702, 640, "Background Sound:\n<rain>"))
    assert text.startswith("702 tokens, the first 640 kept; shorten the prompt by 62.")
    assert text.endswith("Cut from the end:\nBackground Sound:\n<rain>")
    assert report(encoded(9000, 640, "x" * 1000)).endswith("xxx… (700 characters more)")
