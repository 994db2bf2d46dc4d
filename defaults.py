"""What the command line takes where an option is not given."""

import argparse
from pathlib import Path

import torch

from .pony import pony_folder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def compute_dtype(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What the transformers' linears and the text encoder compute in."""
    if options.dtype:
        return DTYPES[options.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def default_device() -> torch.device:
    """The accelerator of this machine, else the CPU."""
    if torch.accelerator.is_available():  # a build for an accelerator may run on a machine without one
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def models_folder(options: argparse.Namespace) -> Path:
    """The folder of models asked for; the pony's is written first if it is not there."""
    if options.models is None and options.preset == "pony":
        return pony_folder()
    return options.models or Path("models")
