"""The nodes that write a prompt in the trained form and turn it into conditioning."""

import html
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context

from ..model.prompt import TextStates
from ..model.structured_prompt import (
    LANGUAGES,
    LINE_FORMAT,
    NO_SOUND,
    build_prompt,
    count_words,
    parse_dialogue,
    warnings_for,
)
from .text_encoder import encode

CATEGORY = "HappyHorse/prompt"
CUT_CHARACTERS = 300  # of what was cut, this much is shown


class HappyHorsePrompt(io.ComfyNode):
    """HappyHorsePrompt: body, dialogue and background sound -> one prompt, and what to improve in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorsePrompt",
            display_name="HappyHorse Prompt",
            category=CATEGORY,
            description="Writes a prompt in the form the models were trained on: what is seen, who says what "
            "in which language, and what else is heard. Warns about what the models do badly.",
            search_aliases=["magihuman prompt", "dialogue", "speech", "enhanced prompt", "prompt builder"],
            inputs=[
                io.String.Input(
                    "body",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="A young woman in a yellow coat stands still and smiles. She says in a soft, "
                    'slow voice, "Good morning." ... The light is even, the camera static.',
                    tooltip="What is seen and heard, in the order of time: 150 to 200 English words on the "
                    "person, face, mouth and voice, the light and a static camera. Each spoken line stands "
                    "in it in quotation marks, in its own language.",
                ),
                io.String.Input(
                    "dialogue",
                    optional=True,
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder=f"{LINE_FORMAT}\nYoung woman in yellow coat, English: Good morning.",
                    tooltip=f"The spoken lines again, one per row as `{LINE_FORMAT}`. Speaker: about five "
                    f"words. Language: {', '.join(LANGUAGES)}. Empty: nobody speaks.",
                ),
                io.String.Input(
                    "background_sound",
                    optional=True,
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    placeholder="Rain on a window",
                    tooltip="The one sound that stands out behind the voices, in English. "
                    f"Empty: {NO_SOUND.lower()}.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt, for HappyHorse Text Encode."),
                io.String.Output(
                    display_name="warnings",
                    tooltip="What the models do badly, one per row; empty if nothing.",
                ),
            ],
        )

    @classmethod
    def execute(cls, body: str, dialogue: str = "", background_sound: str = "") -> io.NodeOutput:
        lines = parse_dialogue(dialogue)
        prompt = build_prompt(body, lines, background_sound)
        warnings = "\n".join(warnings_for(body, lines, background_sound))
        show(warnings or f"{count_words(body)} words in the body, no warnings")
        return io.NodeOutput(prompt, warnings, ui=ui.PreviewText(warnings) if warnings else None)


class HappyHorseTextEncode(io.ComfyNode):
    """HappyHorseTextEncode: a prompt -> the text states that steer the models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HappyHorseTextEncode",
            display_name="HappyHorse Text Encode",
            category=CATEGORY,
            description="Encodes a prompt with the T5Gemma text encoder as the published pipeline does, and "
            "says what did not fit.",
            search_aliases=[
                "magihuman text encode",
                "clip text encode",
                "t5gemma",
                "prompt",
                "negative prompt",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="A T5Gemma encoder, from HappyHorse Load Text Encoder."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="Best made with HappyHorse Prompt",
                    tooltip="The prompt, positive or negative; it must not be blank. All of it is read, the "
                    "states of its first 640 tokens (about 450 English words) are kept. Brackets are text, "
                    "not weights.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The text states, for positive or negative."
                ),
                io.Int.Output(display_name="states", tooltip="How many text states are kept, 1 to 640."),
                io.String.Output(
                    display_name="report", tooltip="How many tokens the prompt has, and what was cut."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str) -> io.NodeOutput:
        conditioning, states = encode(clip, prompt, "prompt")
        text = report(states)
        show(text)
        return io.NodeOutput(conditioning, states.states.shape[1], text, ui=ui.PreviewText(text))


def report(states: TextStates) -> str:
    """Say how many tokens a prompt has, how many states are kept and which text the others stand for."""
    num_tokens, num_kept = states.num_tokens, states.states.shape[1]
    if num_tokens == num_kept:
        return f"{num_tokens} token{'' if num_tokens == 1 else 's'}, all kept"
    cut = states.cut_text
    more = "" if len(cut) <= CUT_CHARACTERS else f"… ({len(cut) - CUT_CHARACTERS} characters more)"
    return (
        f"{num_tokens} tokens, the first {num_kept} kept; shorten the prompt by {num_tokens - num_kept}. "
        f"Cut from the end:\n{cut[:CUT_CHARACTERS]}{more}"
    )


def show(text: str) -> None:
    """Write `text` on the node that is running; does nothing where no server runs it.

    The page draws a node's `ui` text on the host's own preview nodes only, and reads this one as HTML.
    """
    context = get_executing_context()
    if context is None:
        return
    from server import PromptServer  # the whole host: only a running server has it loaded

    PromptServer.instance.send_progress_text(html.escape(text, quote=False), context.node_id)


NODES = [HappyHorsePrompt, HappyHorseTextEncode]
