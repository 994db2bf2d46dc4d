"""What a LoRA file holds and how much of it fits, in words."""

from collections import Counter
from collections.abc import Iterable
from math import prod

from .config import TransformerConfig
from .lora import Match, counted, modalities_of
from .lora_formats import WORDS, LoraFile

SHOWN = 5


def describe_lora(lora: LoraFile) -> str:
    """One line on a file by itself: formats, ranks, alphas, dtypes and size."""
    kinds = Counter(WORDS[adapter.kind] for adapter in lora.adapters)
    ranks = {rank for adapter in lora.adapters if (rank := lora.rank(adapter)) is not None}
    alphas = {f"{alpha:g}" for adapter in lora.adapters if (alpha := lora.alpha(adapter)) is not None}
    doras = sum("magnitude" in adapter.keys for adapter in lora.adapters)
    tensors = lora.file.tensors.values()
    parts = [
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + (f" ({doras} DoRA)" if doras else ""),
        f"rank {_some(map(str, sorted(ranks)))}" if ranks else "no rank",
        f"alpha {_some(sorted(alphas, key=float))}" if alphas else "no alpha",
        ", ".join(sorted({tensor.dtype for tensor in tensors})),
        f"{sum(prod(tensor.shape) for tensor in tensors):,} values in "
        + counted(len(lora.file.tensors), "tensor"),
    ]
    return f"{lora.path.name}: {'; '.join(parts)}"


def describe_match(match: Match, config: TransformerConfig) -> str:
    """Lines on how a file fits a model: which kinds of weights it changes, where, and what is not used."""
    names = [place.name.removesuffix(".weight") for _, place in match.places]
    kinds = Counter(name.rpartition(".")[2] if name.startswith("block.") else name for name in names)
    owners = [modalities_of(name, config) for name in names]
    layers = sorted({layer for layer, _ in owners if layer is not None})
    copies = Counter(
        "one copy per modality" if len(modalities) > 1 else modalities[0] for _, modalities in owners
    )
    lines = [
        f"{len(names)} of {match.total} matched: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        f"{'layer' if len(layers) == 1 else 'layers'} {ranges(layers)}; "
        + ", ".join(f"{kind}: {count}" for kind, count in sorted(copies.items())),
    ]
    if match.unmatched:
        lines.append(f"not used, {counted(len(match.unmatched), 'key')}: {_some(match.unmatched)}")
    return "\n".join(lines)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as `0-3, 7`; none is `none`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in spans) or "none"


def _some(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:SHOWN]) + (", ..." if words[SHOWN:] else "")
