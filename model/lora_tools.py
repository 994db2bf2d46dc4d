"""What is done to LoRA files: renamed for other programs, extracted from two checkpoints, merged into one."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, check_finite, check_finite_after_lora, check_names
from .config import TransformerConfig
from .convert import FAMILY
from .lora import Match, Place, Rows, Strengths, match, patches, rows_of, transformer_shapes
from .lora_formats import LOHA, WORDS, Adapter, LoraFile
from .stream_writer import DTYPE_NAMES, Entry, SafetensorsWriter, write_tensors

Progress = Callable[[int, int], None]
STOCK_PREFIX = "diffusion_model."
STOCK_ROLES = {"up": "lora_B.weight", "down": "lora_A.weight", "magnitude": "dora_scale"}
NOT_WEIGHTS = ("adapter.rope.bands",)
EXTRACTED_DTYPE = torch.bfloat16
EXACT_SVD = 512  # matrices with a shorter side than this are decomposed exactly
OVERSAMPLING, POWER_ITERATIONS = 16, 4
ERROR_ROWS = 1024


def convert_lora(lora: LoraFile, target: Path, config: TransformerConfig) -> Match:
    """Write a LoRA under the names that ComfyUI's own loaders take; returns how it fits the model.

    Separate q, k, v and gates become one layer, whose rank is the sum of theirs. What fits nowhere is left
    out. Raises ValueError where the file does not fit or cannot be written so, and OSError.
    """
    shapes = transformer_shapes(config)
    fitting = match(lora, config, shapes)
    by_name: dict[str, list[tuple[Adapter, Place]]] = {}
    for adapter, place in fitting.places:
        by_name.setdefault(place.name, []).append((adapter, place))
    tensors = {}
    for name, parts in by_name.items():
        stem, _, leaf = name.rpartition(".")
        if len(parts) == 1 and parts[0][1].section is None:
            found = _renamed(lora, parts[0][0])
        else:
            found = _fused(lora, parts, config, shapes[name])
        if leaf == "bias":
            found = {"diff_b": found["diff"]}
        elif leaf != "weight":
            stem = name
        tensors |= {f"{STOCK_PREFIX}{stem}.{role}": tensor for role, tensor in found.items()}
    # settings of PEFT would count a second time beside the alphas
    kept = {key: value for key, value in lora.file.metadata.items() if key != "lora_adapter_metadata"}
    write_tensors(target, tensors, kept)
    return fitting


def _renamed(lora: LoraFile, adapter: Adapter) -> dict[str, Tensor]:
    tensors = lora.tensors(adapter)
    alpha = lora.alpha(adapter)
    found = {STOCK_ROLES.get(role, role): tensor for role, tensor in tensors.items()}
    if alpha is not None and lora.rank(adapter) is not None:
        found["alpha"] = torch.tensor(alpha)
    return found


def _fused(
    lora: LoraFile, parts: Sequence[tuple[Adapter, Place]], config: TransformerConfig, shape: torch.Size
) -> dict[str, Tensor]:
    """One change of a linear_qkv made of those of its sections."""
    adapters = [adapter for adapter, _ in parts]
    kinds = {adapter.kind for adapter in adapters}
    whole = any(place.section is None for _, place in parts)
    dora = any("magnitude" in adapter.keys for adapter in adapters)
    if len(kinds) > 1 or kinds == {"lokr"} or dora or whole:
        what = "DoRA" if dora else " and ".join(sorted(WORDS[kind] for kind in kinds))
        names = ", ".join(adapter.stem for adapter in adapters[:4])
        raise ValueError(
            f"{lora.path}: {names} cannot become one layer, as {what} of single sections"
            f"{' beside the whole' if whole else ''}; use HappyHorse Load LoRA, which takes the file as it is"
        )
    shapes = {place.name: shape for _, place in parts}
    groups = [rows_of(lora, adapter, place, config, shapes) for adapter, place in parts]
    kind, given = kinds.pop(), [lora.tensors(adapter) for adapter in adapters]
    if kind == "diff":
        pieces = [(0, tensors["diff"], rows) for tensors, rows in zip(given, groups, strict=True)]
        return {"diff": _laid_out(pieces, shape)}
    scales = [lora.scale(adapter) for adapter in adapters]
    found: dict[str, Tensor] = {}
    for up, down in [("up", "down")] if kind == "lora" else [LOHA[:2], LOHA[2:]]:
        pieces, rank = [], 0
        for tensors, scale, rows in zip(given, scales, groups, strict=True):
            factor = tensors[up]
            if len(set(scales)) > 1 and not found:  # one alpha cannot tell them; float32, as they are rounded
                factor = factor.float() * scale
            pieces.append((rank, factor, rows))
            rank += factor.shape[1]
        found[STOCK_ROLES.get(up, up)] = _laid_out(pieces, (shape[0], rank))
        found[STOCK_ROLES.get(down, down)] = torch.cat([tensors[down] for tensors in given])
    if len(set(scales)) == 1 and scales[0] != 1:
        found["alpha"] = torch.tensor(scales[0] * rank)
    return found


def _laid_out(
    pieces: Sequence[tuple[int, Tensor, Sequence[tuple[Rows, ...]]]], shape: Sequence[int]
) -> Tensor:
    """A matrix that is zero but for pieces, each (first column, values, rows that each take the values)."""
    dtype = pieces[0][1].dtype if len({values.dtype for _, values, _ in pieces}) == 1 else torch.float32
    matrix = torch.zeros(*shape, dtype=dtype)
    for column, values, groups in pieces:
        for group in groups:
            parts = values.split([rows.stop - rows.start for rows in group])
            for rows, part in zip(group, parts, strict=True):
                matrix[rows.start : rows.stop, column : column + values.shape[1]] = part
    return matrix


def extract_lora(
    tuned: Checkpoint,
    base: Checkpoint,
    target: Path,
    rank: int,
    program: str,
    progress: Progress = lambda done, total: None,  # noqa: ARG005
) -> dict[str, float]:
    """Write the difference of two transformers as a LoRA of `rank`; all copies of a layer are one matrix.

    One weight at a time is in memory, as both are read twice: first for which weights differ, as only these
    are written, vectors as differences. Returns the relative error, in the Frobenius norm, by kind of weight
    that differs. Raises ValueError for checkpoints that are quantised, do not fit one another or do not
    differ, and OSError where the file cannot be written; then there is no new file.
    """
    shapes = transformer_shapes(tuned.config)
    for checkpoint in (tuned, base):
        if checkpoint.quantized:
            raise ValueError(
                f"{checkpoint.path} is quantised, and the LoRA would hold what its weights lost by rounding; "
                "extract from the dense file that it was made from"
            )
        check_names(checkpoint, checkpoint.build().state_dict())
    if shapes != transformer_shapes(base.config):
        raise ValueError(
            f"{tuned.path} and {base.path} are transformers of different sizes; give two of one size"
        )
    names = [name for name in shapes if name not in NOT_WEIGHTS]
    changed = []
    for done, name in enumerate(names):
        progress(done, 2 * len(names))
        if _difference(tuned, base, name).any():
            changed.append(name)
    if not changed:
        raise ValueError(f"{tuned.path} and {base.path} hold the same weights; give two that differ")
    entries = [entry for name in changed for entry in _extracted(name, shapes[name], rank)]
    metadata = {
        "format": "pt", "family": FAMILY, "rank": str(rank), "tuned": tuned.path.resolve().name,
        "base": base.path.resolve().name, "recipe": f"{program}, lora extract --rank {rank}",
    }  # fmt: skip
    squares: dict[str, list[float]] = {}
    with SafetensorsWriter(target, entries, metadata) as file:
        for done, name in enumerate(changed, 2 * len(names) - len(changed)):
            progress(done, 2 * len(names))
            delta = _difference(tuned, base, name)
            total = squares.setdefault(name.removesuffix(".weight").rpartition(".")[2], [0.0, 0.0])
            total[1] += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            written = _extracted(name, shapes[name], rank)
            if len(written) == 1:
                file.write(written[0][0], delta)
                continue
            up, down = low_rank(delta, rank)
            factors = [factor.to(EXTRACTED_DTYPE) for factor in (up, down)]
            total[0] += _remainder(delta, *factors)
            for (key, _, _), factor in zip(written, factors, strict=True):
                file.write(key, factor)
        progress(2 * len(names), 2 * len(names))
    return {kind: math.sqrt(left / size) for kind, (left, size) in squares.items()}


def _extracted(name: str, shape: torch.Size, rank: int) -> list[Entry]:
    stem, _, leaf = name.rpartition(".")
    if len(shape) != 2:
        return [(f"{STOCK_PREFIX}{stem}.{'diff' if leaf == 'weight' else 'diff_b'}", "F32", shape)]
    rank, dtype = min(rank, *shape), DTYPE_NAMES[EXTRACTED_DTYPE]
    return [
        (f"{STOCK_PREFIX}{stem}.lora_B.weight", dtype, (shape[0], rank)),
        (f"{STOCK_PREFIX}{stem}.lora_A.weight", dtype, (rank, shape[1])),
    ]


def _difference(tuned: Checkpoint, base: Checkpoint, name: str) -> Tensor:
    values = [checkpoint.read(name) for checkpoint in (tuned, base)]
    for checkpoint, tensor in zip((tuned, base), values, strict=True):
        check_finite(tensor, name, checkpoint)
    return values[0].to(torch.float32, copy=True).sub_(values[1])


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [rows, r] and down [r, columns] whose product is the nearest to a matrix; r is at most `rank`.

    Large matrices are decomposed by random projections, always with the same seed.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(EXACT_SVD, 2 * rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, rank + OVERSAMPLING, POWER_ITERATIONS)
        right = right.T
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank] * root.unsqueeze(1)


def _remainder(delta: Tensor, up: Tensor, down: Tensor) -> float:
    """The squared norm of what the factors leave of a change; uses it up."""
    total, down = 0.0, down.float()
    for part, rows in zip(delta.split(ERROR_ROWS), up.split(ERROR_ROWS), strict=True):
        left = part.addmm_(rows.float(), down, alpha=-1)
        total += float(torch.linalg.vector_norm(left, dtype=torch.float64)) ** 2
    return total


def merge_loras(
    checkpoint: Checkpoint,
    loras: Sequence[tuple[LoraFile, Strengths]],
    target: Path,
    program: str,
    progress: Progress = lambda done, total: None,  # noqa: ARG005
) -> int:
    """Write a transformer with LoRAs merged into it, in its own dtypes; returns how many weights changed.

    One weight at a time is in memory; what no LoRA changes is written as it is. Raises ValueError for a
    quantised checkpoint and for LoRAs that do not fit, and OSError where the file cannot be written; then
    there is no new file.
    """
    if checkpoint.quantized:
        raise ValueError(
            f"{checkpoint.path} is quantised, and merging would round its weights again; merge into the "
            "dense file, then make a quantised one of the result with happyhorse convert"
        )
    expected = checkpoint.build().state_dict()
    check_names(checkpoint, expected)
    shapes = {name: checkpoint.shape(name) for name in expected if name in checkpoint.names}
    changes = patches(loras, checkpoint.config, shapes)
    entries = [(name, _dtype(checkpoint, name), shape) for name, shape in shapes.items()]
    with SafetensorsWriter(target, entries, _merged_metadata(checkpoint, loras, program)) as file:
        for done, name in enumerate(shapes):
            progress(done, len(shapes))
            tensor = checkpoint.read(name)
            check_finite(tensor, name, checkpoint)
            if name in changes:
                values = tensor.to(torch.float32, copy=True)
                for patch in changes[name]:
                    values = patch(values)
                tensor = values.to(tensor.dtype)
                check_finite_after_lora(tensor, name, checkpoint)
            file.write(name, tensor)
        progress(len(shapes), len(shapes))
    return len(changes)


def _dtype(checkpoint: Checkpoint, name: str) -> str:
    stored = checkpoint.file.tensors[checkpoint.names[name]].dtype
    return DTYPE_NAMES.get(getattr(torch, stored, None), stored)  # pickles have torch's names


def _merged_metadata(
    checkpoint: Checkpoint, loras: Sequence[tuple[LoraFile, Strengths]], program: str
) -> dict[str, str]:
    merged = "; ".join(f"{lora.path.name}:{strengths}" for lora, strengths in loras)
    told = {
        "format": "pt",
        **{key: value for key, value in checkpoint.file.metadata.items() if key != "source_sha256"},
        "family": FAMILY,
        "variant": checkpoint.variant,
        "config": json.dumps(checkpoint.config.to_dict()),
        "recipe": f"{program}, lora merge into {checkpoint.path.resolve().name}: {merged}",
    }
    return {key: value for key, value in told.items() if value is not None}
