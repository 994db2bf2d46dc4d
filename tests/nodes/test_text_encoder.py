"""The CLIP: the host's own nodes encode a prompt as the command line does."""

from pathlib import Path

import pytest
import torch

import nodes as stock
from happyhorse.model.checkpoint import load, load_tokenizer, open_checkpoint
from happyhorse.model.prompt import encode_prompt
from happyhorse.nodes.text_encoder import encode, load_clip

PROMPT = "a red circle (bounces) slow on a teal background ."


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("default", torch.float32)])
def test_the_stock_node_encodes_as_the_command_line_does(pony_folder: Path, name: str, dtype) -> None:
    path = pony_folder / "text_encoder"
    checkpoint = open_checkpoint(path, "text_encoder")
    want = encode_prompt(load(checkpoint, dtype), load_tokenizer(checkpoint), PROMPT)
    clip = load_clip(path, name)
    with torch.inference_mode():
        (states, extra), = stock.CLIPTextEncode().encode(clip, PROMPT)[0]  # fmt: skip
        ours, told = encode(clip, PROMPT)
    assert torch.equal(states, want.states)
    assert torch.equal(ours[0][0], want.states)
    assert extra["pooled_output"] is None
    assert (told.num_tokens, told.cut_text) == (want.num_tokens, "")


def test_a_long_prompt_is_encoded_whole_and_cut(pony_folder: Path) -> None:
    path = pony_folder / "text_encoder"
    checkpoint = open_checkpoint(path, "text_encoder")
    prompt = PROMPT * 80
    want = encode_prompt(load(checkpoint, torch.float32), load_tokenizer(checkpoint), prompt)
    conditioning, told = encode(load_clip(path), prompt)
    assert conditioning[0][0].shape[1] == 640
    assert torch.equal(conditioning[0][0], want.states)
    assert told.cut_text == want.cut_text != ""


def test_a_blank_prompt_and_another_clip_are_refused(pony_folder: Path) -> None:
    clip = load_clip(pony_folder / "text_encoder")
    with pytest.raises(ValueError, match="prompt: the prompt is blank"):
        encode(clip, "  ")
    with pytest.raises(ValueError, match="clip: a T5Gemma encoder is needed, got nothing"):
        encode(None, PROMPT)
    with pytest.raises(ValueError, match="the prompt is blank"):
        stock.CLIPTextEncode().encode(clip, "")


def test_the_text_encoder_is_loaded_anew_for_nodes_that_need_static_weights(pony_folder: Path) -> None:
    clip = load_clip(pony_folder / "text_encoder")
    make, arguments = clip.patcher.cached_patcher_init
    assert not make(*arguments, disable_dynamic=True).is_dynamic()
