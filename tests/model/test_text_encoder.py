"""The text encoder against transformers' T5GemmaEncoderModel on random weights, and from prompt to states."""

# ruff: noqa: RUF001 (full-width punctuation belongs to the languages tried)

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_files import relative_error
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors
from torch import Tensor, nn

from happyhorse.model import text_encoder
from happyhorse.model.config import MAGIHUMAN, PONY, TextEncoderConfig
from happyhorse.model.prompt import TextStates, Tokenizer, encode_prompt
from happyhorse.model.text_encoder import TextEncoder
from happyhorse.model.tiny_tokenizer import RESERVED, tiny_tokenizer
from happyhorse.training.data.world import caption, combinations

# sqrt(56) is not a bfloat16 number, the score scale is not that of the head size, and a cap of 2 is felt
CONFIG = TextEncoderConfig(
    vocab_size=64, hidden_size=56, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
    sliding_window=100, rope_theta=10000.0, rms_norm_eps=1e-6,
)  # fmt: skip
PROMPT = "A red circle bounces slow on a teal background."
LANGUAGES = {
    "Mandarin": "你 好 ， 世 界 ！ 你好，世界！",
    "Cantonese": "早晨，你食咗飯未呀？冇問題。",
    "English": "Hello, world! It's <pad> 100% fine — really…",
    "Japanese": "こんにちは、世界。カタカナも漢字も。",
    "Korean": "안녕하세요, 세계! 오늘은 어때요?",
    "German": "Schöne Grüße aus Köln, großer Fuß!",
    "French": "Ça va très bien, où êtes-vous ? L'œuvre « naïve ».",
}


def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Fill with values of a size that keeps every part of the network felt."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        size = 0.3 if "norm" in name else 2 * weight.shape[-1] ** -0.5
        weight.data = torch.randn(weight.shape, generator=generator) * size


def tiny_encoder(**changes: object) -> TextEncoder:
    encoder = TextEncoder(dataclasses.replace(CONFIG, **changes))
    random_weights(encoder)
    return encoder.requires_grad_(False)


def pony_encoder() -> TextEncoder:
    encoder = TextEncoder(PONY.text_encoder)
    random_weights(encoder)
    return encoder.requires_grad_(False)


def random_tokens(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, CONFIG.vocab_size, (batch, length), generator=generator)


@functools.cache
def pony_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(PONY.text_encoder.vocab_size))


def build_oracle(config: TextEncoderConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    sizes = config.to_dict()
    assert sizes.pop("rope_theta") == 10000.0  # its default; releases differ in how it is given
    half = transformers.T5GemmaModuleConfig(**sizes)
    both = transformers.T5GemmaConfig(
        encoder=half, decoder=half, is_encoder_decoder=False, vocab_size=config.vocab_size,
        attn_implementation="eager",  # the only one that caps scores in all releases
    )  # fmt: skip
    return transformers.T5GemmaEncoderModel(both).eval().requires_grad_(False)


def oracle(config: TextEncoderConfig) -> nn.Module:
    """The oracle, its window made ours: in some releases a token also reads the key at that very distance."""
    tokens = random_tokens(21)
    probe = build_oracle(dataclasses.replace(config, sliding_window=5, num_hidden_layers=1))
    output = probe(input_ids=tokens, attention_mask=torch.ones_like(tokens), output_attentions=True)
    reach = (int((output.attentions[0][0, 0, 10] > 0).sum()) - 1) // 2
    assert reach in (4, 5)
    return build_oracle(dataclasses.replace(config, sliding_window=config.sliding_window - (reach - 4)))


def against_oracle(config: TextEncoderConfig, length: int, dtype: torch.dtype) -> float:
    ours, theirs = TextEncoder(config), oracle(config)
    random_weights(theirs)
    for weight in theirs.parameters():  # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    weights = {name.removeprefix("encoder."): weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True, assign=True)
    tokens = random_tokens(length)
    want = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    got = ours(tokens)
    assert got.dtype == want.dtype == dtype
    return relative_error(got, want)


@pytest.mark.parametrize(("length", "window"), [(1, 100), (2, 100), (29, 100), (150, 100), (40, 6), (40, 3)])
def test_states_equal_those_of_transformers_in_float32(length: int, window: int) -> None:
    config = dataclasses.replace(CONFIG, sliding_window=window)
    assert against_oracle(config, length, torch.float32) < 1e-5


@pytest.mark.parametrize(("length", "window"), [(29, 100), (40, 6)])
def test_states_follow_the_rounding_of_transformers_in_bfloat16(length: int, window: int) -> None:
    # The same operations in the same formats agree bit for bit on one machine; a format mistaken costs 8e-3.
    config = dataclasses.replace(CONFIG, sliding_window=window)
    assert against_oracle(config, length, torch.bfloat16) < 2e-3


def test_the_full_size_encoder_has_the_published_tensors() -> None:
    with torch.device("meta"):
        encoder = TextEncoder(MAGIHUMAN.text_encoder)
    shapes = {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    layer = {
        **{f"self_attn.{name}_proj": shape for name, shape in
           {"q": (4096, 3584), "k": (2048, 3584), "v": (2048, 3584), "o": (3584, 4096)}.items()},
        **{f"mlp.{name}_proj": shape for name, shape in
           {"gate": (14336, 3584), "up": (14336, 3584), "down": (3584, 14336)}.items()},
        **{f"{when}_{part}_layernorm": (3584,)
           for when in ("pre", "post") for part in ("self_attn", "feedforward")},
    }  # fmt: skip
    published = {f"layers.{i}.{name}.weight": shape for i in range(42) for name, shape in layer.items()}
    published |= {"embed_tokens.weight": (256000, 3584), "norm.weight": (3584,)}
    assert shapes == published
    assert len(shapes) == 464


def test_each_row_of_a_batch_is_encoded_alone() -> None:
    encoder, tokens = tiny_encoder(sliding_window=5), random_tokens(12, batch=3)
    rows = torch.cat([encoder(row[None]) for row in tokens])
    assert relative_error(encoder(tokens), rows) < 1e-6


def test_a_sliding_layer_sees_less_than_the_window_on_both_sides() -> None:
    encoder, tokens = tiny_encoder(num_hidden_layers=1, sliding_window=4), random_tokens(20)
    changed = tokens.clone()
    changed[0, 10] = (tokens[0, 10] + 1) % CONFIG.vocab_size
    differs = (encoder(tokens) != encoder(changed)).any(dim=2)[0]
    assert differs.nonzero().flatten().tolist() == list(range(7, 14))


def test_the_second_layer_sees_everything() -> None:
    encoder, tokens = tiny_encoder(num_hidden_layers=2, sliding_window=2), random_tokens(20)
    changed = tokens.clone()
    changed[0, 19] = (tokens[0, 19] + 1) % CONFIG.vocab_size
    assert (encoder(tokens) != encoder(changed)).any(dim=2).all()


def test_splitting_the_queries_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tokens = tiny_encoder(sliding_window=5), random_tokens(40)
    whole = encoder(tokens)
    monkeypatch.setattr(text_encoder, "QUERY_CHUNK", 7)
    assert relative_error(encoder(tokens), whole) < 1e-6


def test_every_layer_runs_through_the_hook_in_order() -> None:
    encoder, tokens, seen = tiny_encoder(), random_tokens(9), []

    def run_block(i: int, layer: functools.partial, x: Tensor) -> Tensor:
        seen.append((i, layer.func))
        return layer(x)

    assert torch.equal(encoder(tokens, run_block), encoder(tokens))
    assert seen == list(enumerate(encoder.layers))


# Prompts


def test_a_prompt_gives_the_last_states_rounded_to_float16() -> None:
    encoder, tokenizer = pony_encoder(), pony_tokenizer()
    result = encode_prompt(encoder, tokenizer, PROMPT)
    tokens, _ = tokenizer.encode(PROMPT)
    want = encoder(torch.tensor([tokens])).half().float()
    assert result.states.dtype == torch.float32
    assert torch.equal(result.states, want)
    assert (result.num_tokens, result.cut_text) == (len(tokens), "")


def test_states_are_cut_not_tokens() -> None:
    encoder, tokenizer = pony_encoder(), pony_tokenizer()
    whole, cut = encode_prompt(encoder, tokenizer, PROMPT), encode_prompt(encoder, tokenizer, PROMPT, limit=5)
    assert cut.states.shape == (1, 5, PONY.text_encoder.hidden_size)
    assert torch.equal(cut.states, whole.states[:, :5])
    assert cut.num_tokens == whole.num_tokens > 5
    kept = PROMPT.removesuffix(cut.cut_text)
    assert cut.cut_text and tokenizer.encode(kept)[0] == tokenizer.encode(PROMPT)[0][:5]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_cut_text_is_where_the_kept_tokens_end_in_every_language(language: str) -> None:
    encoder, tokenizer, prompt = pony_encoder(), pony_tokenizer(), LANGUAGES[language]
    for limit in (1, 4, 11):
        cut_text = encode_prompt(encoder, tokenizer, prompt, limit=limit).cut_text
        first_cut = tokenizer.encode(prompt)[1][limit][0]
        assert cut_text == prompt[first_cut:] != ""


def test_prompts_run_through_the_hook() -> None:
    encoder, tokenizer, seen = pony_encoder(), pony_tokenizer(), []
    encode_prompt(encoder, tokenizer, PROMPT, run_block=lambda i, layer, x: seen.append(i) or layer(x))
    assert seen == list(range(PONY.text_encoder.num_hidden_layers))


def test_tokens_go_to_the_device_of_the_embedding() -> None:
    class Reached(Exception):
        pass

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise Reached(inputs[0].device.type, inputs[0].dtype)

    with torch.device("meta"):
        encoder = TextEncoder(PONY.text_encoder)
    encoder.register_forward_pre_hook(stop)
    with pytest.raises(Reached) as reached:
        encode_prompt(encoder, pony_tokenizer(), PROMPT)
    assert reached.value.args == ("meta", torch.int64)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t \u3000"])
def test_a_blank_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt is blank"):
        encode_prompt(pony_encoder(), pony_tokenizer(), prompt)


def test_a_prompt_of_broken_unicode_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        encode_prompt(pony_encoder(), pony_tokenizer(), "a head \ud800")


def test_a_limit_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        encode_prompt(pony_encoder(), pony_tokenizer(), PROMPT, limit=0)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer has 512 tokens, the text encoder 64"):
        encode_prompt(tiny_encoder(), pony_tokenizer(), PROMPT)


def test_states_that_are_not_numbers_are_refused() -> None:
    encoder = pony_encoder()
    encoder.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="encoding the prompt"):
        encode_prompt(encoder, pony_tokenizer(), PROMPT)


def test_states_beyond_float16_are_refused() -> None:
    encoder = pony_encoder()
    encoder.norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match="rounding the text states"):
        encode_prompt(encoder, pony_tokenizer(), PROMPT)


def test_text_states_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TextStates(torch.zeros(1, 1, 1), 1, "").num_tokens = 2


# Tokenizers


def test_special_tokens_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path) -> None:
    raw = tiny_tokenizer(PONY.text_encoder.vocab_size)
    plain = raw.encode(PROMPT).ids
    special = [(name, raw.token_to_id(name)) for name in RESERVED]
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    raw.enable_padding(length=50)
    raw.enable_truncation(max_length=4)
    assert raw.encode(PROMPT).ids != plain
    path = tmp_path / "tokenizer.json"
    path.write_text(raw.to_str(), encoding="utf-8")
    assert Tokenizer.from_file(path).encode(PROMPT)[0] == plain
    assert Tokenizer.from_json(raw.to_str()).encode(PROMPT)[0] == plain


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        Tokenizer.from_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 1}', b"\xff\xfe\x00"])
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json"):
        Tokenizer.from_file(path)


def test_json_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="the given JSON is not a tokenizer"):
        Tokenizer.from_json("[]")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("vocab_size", [260, PONY.text_encoder.vocab_size])
def test_the_tiny_tokenizer_restores_text_of_every_language(language: str, vocab_size: int) -> None:
    tokenizer = tiny_tokenizer(vocab_size)
    tokens = tokenizer.encode(LANGUAGES[language], add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == LANGUAGES[language]
    assert max(tokens) < vocab_size
    assert min(tokens) >= len(RESERVED)


def test_the_tiny_tokenizer_makes_one_token_of_each_word_of_its_world() -> None:
    tokenizer, captions = tiny_tokenizer(PONY.text_encoder.vocab_size), map(caption, combinations("head"))
    words = {word for text in (*captions, *map(caption, combinations("bounce"))) for word in text.split()}
    plain = {word.strip('.,:"<>') for word in words if word.isascii()}
    assert len(plain) > 50
    # after a space or at the start of a line or quotation
    assert {w for w in plain if all(len(tokenizer.encode(f"{p}{w}").ids) > 1 for p in ("", " "))} == set()


def test_the_tiny_tokenizer_fills_the_vocabulary_and_survives_its_json() -> None:
    tokenizer = tiny_tokenizer(PONY.text_encoder.vocab_size)
    assert sorted(tokenizer.get_vocab().values()) == list(range(PONY.text_encoder.vocab_size))
    again = RawTokenizer.from_str(tokenizer.to_str())
    assert again.to_str() == tokenizer.to_str()
    assert all(again.encode(text).ids == tokenizer.encode(text).ids for text in LANGUAGES.values())


def test_the_tiny_tokenizer_is_the_same_in_every_process() -> None:
    code = (
        "import sys; from happyhorse.model.tiny_tokenizer import tiny_tokenizer; "
        "sys.stdout.write(tiny_tokenizer(512).to_str())"
    )
    made = [
        subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
            check=True, capture_output=True, encoding="utf-8",
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert made == [tiny_tokenizer(512).to_str()] * 2


def test_the_tiny_tokenizer_is_the_one_the_miniature_weights_know() -> None:
    tokenizer = json.loads(tiny_tokenizer(512).to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["merges"]]
    content = json.dumps([sorted(tokenizer["vocab"].items()), merges]).encode()
    digest = hashlib.sha256(content).hexdigest()
    assert digest == "6486f388de77cd5d1c421156c37e2a3ec22f19e1d35942f1b35832f5218de797"


def test_a_tiny_tokenizer_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 260"):
        tiny_tokenizer(259)
