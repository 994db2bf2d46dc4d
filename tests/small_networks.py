"""Small networks with random weights, random films for them, and what tests compare of trainings."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from happyhorse.model.config import TextEncoderConfig
from happyhorse.model.packing import Latents
from happyhorse.model.text_encoder import TextEncoder
from happyhorse.training.generators import generator

Module = TypeVar("Module", bound=nn.Module)

TEXT_CONFIG = TextEncoderConfig(
    vocab_size=20, hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=50.0,
    sliding_window=64, rope_theta=10000.0, rms_norm_eps=1e-6,
)  # fmt: skip
NEGATIVE = torch.tensor([[3, 1]])


def random_weight(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A value for a parameter that keeps activations near unit size, chosen by its name and shape."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bands":
        return tensor.clone()
    if leaf == "gamma":
        return torch.ones_like(tensor)
    if leaf == "weight_g":
        return torch.full_like(tensor, 0.6)
    if tensor.ndim < 2:  # biases, gains stored as an offset from 1, logarithms
        return torch.zeros_like(tensor)
    if "embed_tokens" in name:
        return torch.randn(tensor.shape, generator=generator)
    return torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5


def filled(module: Module, seed: int) -> Module:
    """The module with random weights."""
    draw = generator(seed, "weights")
    values = {name: random_weight(name, tensor, draw) for name, tensor in module.state_dict().items()}
    module.load_state_dict(values)
    return module


def text_encoder(seed: int = 1) -> TextEncoder:
    return filled(TextEncoder(TEXT_CONFIG), seed)


def random_latents(draw: torch.Generator, films: int = 2) -> Latents:
    video = torch.randn(films, 4, 3, 4, 4, generator=draw)
    return Latents(video, torch.randn(films, 9, 4, generator=draw))


def tensors(state: object) -> list[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for part in state for tensor in tensors(part)] if isinstance(state, list | tuple) else []
