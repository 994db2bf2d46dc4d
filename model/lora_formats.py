"""LoRA files: how trainers name and shape their tensors, and the change of a weight that these stand for.

Formats: LoRA as PEFT, diffusers and kohya write it, LoHa, LoKr, DoRA on top of any of these, and plain
differences. Opening a file reads names and shapes only; tensors are read layer by layer.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .quant import find_quantized
from .weight_files import WeightFile, open_weights

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
UNDERSCORED = ("lora_unet_", "lycoris_")  # behind these, dots are written as underscores
KEY = re.compile(
    r"(?P<stem>.+)\.(?:lora_(?P<half>A|B|down|up)(?:(?:\.\w+)?\.weight)?"
    r"|(?P<role>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|alpha|dora_scale|diff|diff_b|w_norm)"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.\w+){0,2})"
)
HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
DAMAGED = "the file is damaged, download it again"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
PLAIN = {
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2",
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),  # pickles have these
}  # fmt: skip
WORDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "diff": "difference"}


@dataclass(frozen=True)
class Change:
    """A change of a weight as its factors, all two-dimensional but a difference, which may be a vector.

    lora: up [rows, r], down [r, columns]; loha: two such pairs, whose products are multiplied; lokr: two
    matrices, whose Kronecker product it is; diff: the change itself. All of it counts `scale` times.
    `magnitude` is DoRA's, [rows, 1] or [1, columns]: the norms of the weight's rows or columns afterwards.
    """

    kind: str
    factors: tuple[Tensor, ...]
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds."""
        return self.factors if self.magnitude is None else (*self.factors, self.magnitude)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Change":
        """The same with other copies of `tensors`."""
        count = len(self.factors)
        magnitude = None if self.magnitude is None else tensors[count]
        return replace(self, factors=tuple(tensors[:count]), magnitude=magnitude)

    def to(self, device: torch.device | str) -> "Change":
        """The same on another device."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the change before scaling, float32, the caller's own."""
        if self.kind == "diff":
            return self.factors[0][start:stop].to(torch.float32, copy=True)
        if self.kind == "lokr":
            left, right = (factor.float() for factor in self.factors)
            row = torch.arange(start, stop, device=left.device)
            outer = left[row // len(right)].unsqueeze(2) * right[row % len(right)].unsqueeze(1)
            return outer.flatten(1)
        ups, downs = self.factors[::2], self.factors[1::2]
        products = [up[start:stop].float() @ down.float() for up, down in zip(ups, downs, strict=True)]
        return products[0] if len(products) == 1 else products[0].mul_(products[1])


@dataclass(frozen=True)
class Adapter:
    """One layer of a LoRA file: `stem` as the file calls it, and its tensors' keys by role."""

    stem: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """lora, loha, lokr or diff."""
        if "diff" in self.keys:
            return "diff"
        return next((kind for start, kind in (("hada", "loha"), ("lokr", "lokr"))
                     if any(role.startswith(start) for role in self.keys)), "lora")  # fmt: skip

    @property
    def target(self) -> str:
        """The layer's name without prefixes; behind `lora_unet_` still with underscores."""
        name = self.stem
        while prefix := next(filter(name.startswith, (*PREFIXES, *UNDERSCORED)), None):
            name = name.removeprefix(prefix)
        return name


class LoraFile:
    """An opened LoRA: its `adapters`, and `unknown`, the keys of the file that belong to none."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        adapters: dict[str, Adapter] = {}
        unknown = []
        for key in file.tensors:
            match = KEY.fullmatch(key)
            if match is None:
                unknown.append(key)
                continue
            stem, role = _stem_and_role(match)
            keys = adapters.setdefault(stem, Adapter(stem)).keys
            if role in keys:
                raise ValueError(f"{self.path} names {role} of {stem} twice: {keys[role]} and {key}")
            keys[role] = key
        if not adapters:
            first = f" ({', '.join(unknown[:3])}, ...)" if unknown else ""
            raise ValueError(
                f"{self.path} holds no LoRA: none of its {len(unknown)} tensors{first} is called like one, "
                "such as ....lora_A.weight or ....lora_down.weight; give a LoRA file"
            )
        self.adapters, self.unknown = tuple(adapters.values()), tuple(unknown)
        self._settings = _adapter_settings(file)
        scaled = {name for name, stored in find_quantized(file)[0].items() if stored.scale}
        for adapter in self.adapters:
            self._check_roles(adapter)
            for role, key in adapter.keys.items():
                self._check_tensor(role, key, key in scaled)

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def _check_roles(self, adapter: Adapter) -> None:
        roles = adapter.keys.keys() - {"alpha", "magnitude"}
        needed: set[str] = {"lora": {"down", "up"}, "loha": set(LOHA), "diff": {"diff"}}.get(
            adapter.kind
        ) or {role for side in ("lokr_w1", "lokr_w2")
              for role in ((side,) if side in roles else (f"{side}_a", f"{side}_b"))}  # fmt: skip
        problem = [f"lacks {role}" for role in sorted(needed - roles)]
        problem += [f"also has {role}" for role in sorted(roles - needed)]
        if problem:
            raise ValueError(
                f"{self.path}: {adapter.stem} has {', '.join(sorted(adapter.keys.values()))} but "
                f"{problem[0]}; the file is incomplete or of an unknown format"
            )

    def _check_tensor(self, role: str, key: str, scaled: bool) -> None:
        info = self.file.tensors[key]
        shape, count = list(info.shape), math.prod(info.shape)
        if role == "alpha" and count != 1:
            raise ValueError(f"{self.path}: {key} must be one number, got the shape {shape}; {DAMAGED}")
        if not count:
            raise ValueError(f"{self.path}: {key} has the shape {shape}, which holds nothing; {DAMAGED}")
        if not shape and role not in ("alpha", "diff"):
            raise ValueError(f"{self.path}: {key} must be a matrix, got a single number; {DAMAGED}")
        if scaled or (role != "alpha" and info.dtype not in PLAIN):
            found = f"{info.dtype} with a scale" if scaled else info.dtype
            raise ValueError(
                f"{self.path}: {key} is stored in {found}, but a LoRA must be a "
                ".safetensors file of float32, bfloat16, float16 or float8 values without scales; "
                "use the file that this one was made from"
            )

    def shape(self, adapter: Adapter) -> tuple[int, ...]:
        """The shape of the weight that an adapter changes; raises ValueError where its factors do not fit."""
        shapes = {role: self._shape(adapter, role) for role in adapter.keys if role != "alpha"}
        if adapter.kind == "diff":
            return shapes["diff"]
        if wrong := [role for role, shape in shapes.items() if len(shape) != 2 and role != "magnitude"]:
            found = list(shapes[wrong[0]])
            raise ValueError(f"{self.path}: {adapter.keys[wrong[0]]} must be a matrix, got the shape {found}")
        if adapter.kind == "lokr":
            left, right = (
                self._product(adapter, shapes, side) if side not in shapes else shapes[side]
                for side in ("lokr_w1", "lokr_w2")
            )
            return left[0] * right[0], left[1] * right[1]
        if adapter.kind == "lora":
            return self._pair(adapter, shapes, "up", "down")
        first = self._product(adapter, shapes, "hada_w1")
        if first != (second := self._product(adapter, shapes, "hada_w2")):
            raise ValueError(
                f"{self.path}: the two products of {adapter.stem} have the shapes {list(first)} and "
                f"{list(second)}, which must be one; the file is damaged"
            )
        return first

    def _shape(self, adapter: Adapter, role: str) -> tuple[int, ...]:
        shape = self.file.tensors[adapter.keys[role]].shape
        while len(shape) > 2 and shape[-1] == 1:  # as for a convolution of one pixel
            shape = shape[:-1]
        return shape

    def _product(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
        return self._pair(adapter, shapes, f"{name}_a", f"{name}_b")

    def _pair(
        self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], up: str, down: str
    ) -> tuple[int, int]:
        (rows, rank), (other, columns) = shapes[up], shapes[down]
        if rank != other:
            raise ValueError(
                f"{self.path}: the ranks of {adapter.keys[up]} {list(shapes[up])} and {adapter.keys[down]} "
                f"{list(shapes[down])} differ, {rank} and {other}; the file is damaged"
            )
        return rows, columns

    def rank(self, adapter: Adapter) -> int | None:
        """The rank by which alpha is divided; None where nothing is factored, and alpha does not count."""
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if role in adapter.keys:
                return self.file.tensors[adapter.keys[role]].shape[0]
        return None

    def alpha(self, adapter: Adapter) -> float | None:
        """What the change is multiplied by, times the rank; None for the rank itself.

        From the file, else from PEFT's settings: in the header, or adapter_config.json beside the file.
        """
        if "alpha" in adapter.keys:
            return float(self._read(adapter.keys["alpha"]).float().mean())
        return _peft_alpha(self._settings, adapter.target, self.rank(adapter))

    def read(self, adapter: Adapter) -> Change:
        """Read a change; raises ValueError for NaN or infinite values."""
        tensors = self.tensors(adapter)
        return Change(
            adapter.kind, _factors(adapter.kind, tensors), self.scale(adapter), tensors.get("magnitude")
        )

    def scale(self, adapter: Adapter) -> float:
        """What the product of the factors is multiplied by."""
        rank, alpha = self.rank(adapter), self.alpha(adapter)
        return 1.0 if rank is None or alpha is None else alpha / rank

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Read an adapter's tensors, without alpha, by role; raises as `read`."""
        shape = self.shape(adapter)
        tensors = {
            role: self._read(key).reshape(self._shape(adapter, role))
            for role, key in adapter.keys.items()
            if role != "alpha"
        }
        if "magnitude" in tensors:
            tensors["magnitude"] = self._magnitude(adapter, tensors["magnitude"], shape)
        return tensors

    def _magnitude(self, adapter: Adapter, magnitude: Tensor, shape: tuple[int, ...]) -> Tensor:
        # PEFT writes a vector of one value per row
        found = list(magnitude.shape)
        magnitude = magnitude.unsqueeze(1) if magnitude.ndim == 1 else magnitude
        if len(shape) != 2 or tuple(magnitude.shape) not in ((shape[0], 1), (1, shape[1])):
            raise ValueError(
                f"{self.path}: {adapter.keys['magnitude']} has the shape {found}, but {adapter.stem} is "
                f"{list(shape)}; there must be one value per row or per column"
            )
        return magnitude

    def _read(self, key: str) -> Tensor:
        tensor = self.file.read(key)
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(
                f"{self.path}: {key} holds NaN or infinite values; the file is damaged, download it again"
            )
        return tensor


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA; raises FileNotFoundError or ValueError that say what is wrong with the file."""
    if not path.exists():
        raise FileNotFoundError(f"the LoRA {path} does not exist; check its name")
    return LoraFile(open_weights(path))


def _stem_and_role(match: re.Match[str]) -> tuple[str, str]:
    stem, half, role = match["stem"], match["half"], match["role"]
    if half:
        return stem, HALVES[half]
    if role == "diff_b":
        return f"{stem}.bias", "diff"
    if role is None or role == "dora_scale":
        return stem, "magnitude"
    return stem, "diff" if role == "w_norm" else role


def _factors(kind: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    if kind == "lokr":
        return tuple(
            tensors[side] if side in tensors else tensors[f"{side}_a"].float() @ tensors[f"{side}_b"].float()
            for side in ("lokr_w1", "lokr_w2")
        )
    roles = {"lora": ("up", "down"), "loha": LOHA, "diff": ("diff",)}[kind]
    return tuple(tensors[role] for role in roles)


def _adapter_settings(file: WeightFile) -> Mapping[str, Any]:
    """PEFT's settings of the transformer's adapter; empty where the file comes without."""
    text = file.metadata.get("lora_adapter_metadata")  # diffusers' place for them
    beside = (file.path if file.path.is_dir() else file.path.parent) / "adapter_config.json"
    source = file.path
    if (
        text is None
        and beside.exists()
        and (file.path.is_dir() or file.path.name.startswith("adapter_model."))
    ):
        source, text = beside, beside.read_bytes()
    try:
        settings = {} if text is None else json.loads(text)
        # diffusers puts the part's name before each: transformer.lora_alpha
        found = {name.removeprefix("transformer."): value for name, value in settings.items()}
        alpha = found.get("lora_alpha")
        found["lora_alpha"] = None if alpha is None else float(alpha)
        found["alpha_pattern"] = {
            re.compile(rf"(.*\.)?({pattern})"): float(value)
            for pattern, value in (found.get("alpha_pattern") or {}).items()
        }
        if not all(map(math.isfinite, (*found["alpha_pattern"].values(), found["lora_alpha"] or 0))):
            raise ValueError("an alpha is not finite")
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{source}: its settings of the LoRA cannot be used ({error})") from error
    return found


def _peft_alpha(settings: Mapping[str, Any], target: str, rank: int | None) -> float | None:
    named = (value for pattern, value in settings["alpha_pattern"].items() if pattern.fullmatch(target))
    alpha = next(named, settings["lora_alpha"])
    if alpha is None or rank is None:
        return None
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
