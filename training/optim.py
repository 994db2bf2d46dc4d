"""Optimizers, the learning rate over a run, and the moving average of weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5 (Keller Jordan's Muon, 2024)
NEWTON_SCHULZ_STEPS = 5
OUTER_PARTS = ("embed", "head", "final_linear")  # in names of embeddings and of last layers


class Muon(Optimizer):
    """Momentum whose matrices are orthogonalised before they are added (Keller Jordan's Muon, 2024).

    A parameter [out, ...] is taken as the matrix [out, rest]. Where it has an attribute `copies`, it holds so
    many matrices stacked along its rows, each orthogonalised on its own. `lr` is about the spectral norm of
    an update, which for matrices taller than wide is scaled by sqrt(rows / columns).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                _check(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient. There is no `closure`."""
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients before its step")
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = [self._momentum(parameter, group["momentum"]) for parameter in trained]
            for parameter, update in zip(trained, orthogonalised(updates), strict=True):
                rows, columns = update.shape[-2:]
                scale = max(1.0, rows / columns) ** 0.5
                parameter.add_(
                    update.reshape(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * scale
                )

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient as matrices [copies, rows, columns]."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        copies = getattr(parameter, "copies", 1)
        return parameter.grad.lerp(average, momentum).reshape(copies, len(parameter) // copies, -1)


def _check(parameter: nn.Parameter) -> None:
    shape, copies = list(parameter.shape), getattr(parameter, "copies", 1)
    if parameter.ndim < 2:
        raise ValueError(
            f"Muon: a parameter has shape {shape}, it needs 2 or more dimensions; use Adam for it"
        )
    if len(parameter) % copies:
        raise ValueError(f"Muon: a parameter has shape {shape}, whose rows are not {copies} equal copies")


def orthogonalised(updates: list[Tensor]) -> list[Tensor]:
    """Near the closest semi-orthogonal matrices (singular values 0.7 to 1.2) of [copies, rows, columns].

    Matrices of one shape are computed together.
    """
    by_shape: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, update in enumerate(updates):
        by_shape.setdefault((update.shape[-2:], update.device), []).append(index)
    results = list(updates)
    for indices in by_shape.values():
        group = [updates[index] for index in indices]
        parts = _newton_schulz(torch.cat(group)).split([len(update) for update in group])
        for index, part in zip(indices, parts, strict=True):
            results[index] = part
    return results


def _newton_schulz(matrices: Tensor) -> Tensor:
    """[batch, rows, columns] with all singular values brought near 1.

    Every step multiplies x by a polynomial of its Gram matrix x x^T, so the steps are done on that small
    square matrix alone: several times faster than on a long x. It squares the condition, hence float32.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.mT if tall else x
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], device=x.device)
    product = identity
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or convolution between hidden layers, which Muon trains best."""
    return (
        parameter.ndim >= 2
        and min(len(parameter), parameter[0].numel()) > 1
        and not any(part in name for part in OUTER_PARTS)
    )


def optimizers(
    module: nn.Module, muon_lr: float, adam_lr: float, betas: tuple[float, float] = (0.9, 0.99)
) -> list[Optimizer]:
    """Muon for the hidden matrices and convolutions of `module`, Adam for its other trainable parameters."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    hidden = [parameter for name, parameter in trained if is_hidden(name, parameter)]
    others = [parameter for name, parameter in trained if not is_hidden(name, parameter)]
    result: list[Optimizer] = []
    if hidden:
        result.append(Muon(hidden, muon_lr))
    if others:
        result.append(Adam(others, adam_lr, betas))
    return result


def scale_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times the one its optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def decayed(step: int, steps: int, flat: float = 0.6, warmup: int = 20) -> float:
    """The learning rate at `step` (0-based) of `steps` as a share of the full one.

    It rises linearly for `warmup` steps, stays at 1 until the share `flat` of the run, then falls linearly
    to 0, which it would reach at `steps`.
    """
    rising = (step + 1) / max(1, warmup)
    falling = (steps - step) / max(1.0, (1 - flat) * steps)
    return max(0.0, min(1.0, rising, falling))


class Ema:
    """Exponential moving average, in float32, of the trainable parameters of a module.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)): early, bad weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.averages = {
            name: parameter.detach().float().clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the present weights of `module`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = dict(module.named_parameters())
        for name, average in self.averages.items():
            average.lerp_(weights[name].detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give `module`, which has the same parameters, the averages as its weights."""
        weights = dict(module.named_parameters())
        for name, average in self.averages.items():
            weights[name].copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates they have seen."""
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; raises ValueError where it has other parameters."""
        if state["averages"].keys() != self.averages.keys():
            differing = sorted(state["averages"].keys() ^ self.averages.keys())
            raise ValueError(
                f"the moving average is of other parameters (e.g. {differing[0]}); start a new run"
            )
        self.updates = state["updates"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])
