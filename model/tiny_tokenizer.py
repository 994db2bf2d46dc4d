"""The miniature model's tokenizer: byte-level BPE, its merges counted on a small text that lies here.

Weights are trained on its tokens, so these must never change. Hence own training instead of the library's,
which may vary between releases; and hence, once weights exist, no edit to TRAINING_TEXT or to the counting.
"""

# ruff: noqa: RUF001 (full-width punctuation belongs to the languages of TRAINING_TEXT)

from collections import Counter
from itertools import pairwise

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# As in Gemma. No text becomes one of these; they keep id 0 free, which hosts take for padding.
RESERVED = ("<pad>", "<eos>", "<bos>", "<unk>")

# The words of the miniature worlds and the seven languages spoken; a line counts as often as its number.
TRAINING_TEXT = (
    (9, "A red circle bounces fast on a white background."),
    (9, "A green square bounces slow on a grey background."),
    (9, "A blue triangle bounces fast on a teal background."),
    (9, "A yellow star bounces slow on a navy background."),
    (9, "a orange purple heart"),
    (9, "\n\nBackground Sound:\n<low notes>\n<middle notes>\n<high notes>"),
    (9, "A head with black hair and a red shirt talks fast in a high voice on a white background:"),
    (9, "A head with brown hair and a green shirt talks slow in a low voice on a white background:"),
    (9, "blond hair, red hair, a blue shirt, a yellow shirt, a top hat"),
    (20, "blond middle"),
    (20, " blond <middle"),
    (9, '\n\nDialogue:\n<head with black hair, English>: "hello"'),
    (9, "\n\nBackground Sound:\n<No prominent background sound>"),
    (9, "Mandarin Cantonese English Japanese Korean German French, Mandarin> French>"),
    (9, '"你 好" "早 晨" "hello" "こ ん に ち は" "안 녕" "hallo" "bonjour"'),
    (9, "blurry, noise, silence."),
    (2, "The person speaks in a calm voice, mouth opens and closes, light is soft, the camera is static."),
    (1, "你 好 ， 我 们 今 天 很 高 兴 。 你 好 ， 世 界 。"),
    (1, "こ ん に ち は 、 今 日 は い い 天 気 で す 。 コ ン ニ チ ハ 。"),
    (1, "안 녕 하 세 요 , 오 늘 은 날 씨 가 좋 아 요 ."),
    (1, "Hallo, ich freue mich sehr, dich heute zu sehen. Schöne Grüße, es ist ein großer Tag."),
    (1, "Bonjour, je suis très heureux de vous voir. Ça va bien, il fait beau aujourd'hui, à bientôt."),
)


def tiny_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """Return a tokenizer of at most `vocab_size` tokens that any text survives, the same one every time.

    Every byte is a token, so there is no unknown text; merges make single tokens of the miniature world's
    words, until the training text has nothing left to merge (some 690 tokens). Raises ValueError below 260,
    256 bytes and 4 reserved tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(RESERVED) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, bytes and reserved, got {vocab_size}")
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[tuple[str, ...]] = Counter()
    for times, line in TRAINING_TEXT:
        for word, _ in pre_tokenizer.pre_tokenize_str(line):
            words[tuple(word)] += times
    merges = most_frequent_merges(words, vocab_size - smallest)
    tokens = dict.fromkeys([*RESERVED, *alphabet, *(first + second for first, second in merges)])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def most_frequent_merges(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """Return up to `count` byte-pair merges, each the most frequent pair after those before it.

    `words` counts words as tuples of symbols. Of equally frequent pairs the alphabetically first is taken.
    """
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:
            break
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[_merge(word, best)] += times
        words = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols: list[str] = []
    for symbol in word:
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return tuple(symbols)
