"""A prompt -> the text states that condition the transformer: tokens, encoding, rounding and cut."""

from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from .finite import check_finite
from .run_block import RunBlock, run_in_place
from .text_encoder import TextEncoder

TEXT_LIMIT = 640  # states that the transformers were trained with


class Tokenizer:
    """Text -> tokens and nothing else.

    Special tokens, padding and truncation that a tokenizer.json may ask for are switched off (the latter two
    in the object given): the models were trained on prompts with neither BOS nor EOS, encoded whole.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json; raises ValueError naming a file that is missing or of another format."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"cannot read the tokenizer {path}: {error}; give the tokenizer.json of the text encoder"
            ) from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "the given JSON") -> "Tokenizer":
        """Read the text of a tokenizer.json, as a checkpoint may hold it; `source` names it in errors."""
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"{source} is not a tokenizer.json: {error}; give the one of the text encoder"
            ) from error
        return cls(tokenizer)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of `text` and, for each, the (start, stop) of its characters in `text`.

        Raises ValueError where `text` is not valid Unicode (half of a surrogate pair).
        """
        text.encode("utf-8")  # a UnicodeEncodeError, which names the place; the library's own error does not
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def text_of(self, token: int) -> str:
        """The text that a token stands for."""
        return self._tokenizer.decode([token])


@dataclass(frozen=True, eq=False)
class TextStates:
    """An encoded prompt.

    `states` [1, n, C] is float32, on the encoder's device, without padding. `num_tokens` counts the tokens of
    the whole prompt, of which the first n are kept; `cut_text` is the end of the prompt that the others stand
    for, or "".
    """

    states: Tensor
    num_tokens: int
    cut_text: str


def encode_prompt(
    encoder: TextEncoder,
    tokenizer: Tokenizer,
    prompt: str,
    limit: int = TEXT_LIMIT,
    run_block: RunBlock = run_in_place,
) -> TextStates:
    """Encode a prompt as the models were trained on it: last hidden states in float16, the first `limit`.

    The whole prompt is encoded, so the states kept have seen what is cut. Tokens are put where the encoder's
    embedding lies. Raises ValueError for a blank prompt, a tokenizer of another model and states that are not
    finite.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 token, got {limit}")
    if tokenizer.vocab_size > encoder.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the text encoder {encoder.config.vocab_size}; "
            "give the tokenizer.json of this encoder"
        )
    tokens, offsets = tokens_of(tokenizer, prompt)
    states = encode_tokens(encoder, tokens, encoder.embed_tokens.weight.device, limit, run_block)
    return TextStates(states, len(tokens), cut_text(prompt, offsets, limit))


def tokens_of(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a prompt and their places in it; raises ValueError where there are none."""
    if not prompt.strip():
        raise ValueError(f"the prompt is blank, got {prompt!r}; describe what is to be seen and heard")
    tokens, offsets = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of {prompt!r}; write words or check tokenizer.json")
    return tokens, offsets


def cut_text(prompt: str, offsets: list[tuple[int, int]], limit: int = TEXT_LIMIT) -> str:
    """The end of a prompt that the tokens after the first `limit` stand for, or ""."""
    return prompt[offsets[limit][0] :] if len(offsets) > limit else ""


def encode_tokens(
    encoder: TextEncoder,
    tokens: list[int],
    device: torch.device,
    limit: int = TEXT_LIMIT,
    run_block: RunBlock = run_in_place,
) -> Tensor:
    """The text states [1, n, C], float32, of the first `limit` tokens, each having seen all of them."""
    states = encoder(torch.tensor([tokens], dtype=torch.int64, device=device), run_block)[:, :limit]
    check_finite({"text": states}, "encoding the prompt", "the text encoder's weights may be damaged")
    # The published pipeline stores states as float16 before it uses them as float32.
    rounded = states.to(torch.float16)
    check_finite({"text": rounded}, "rounding the text states", "the weights may be another encoder's")
    return rounded.float()
