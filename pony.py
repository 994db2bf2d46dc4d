"""The pony: the same networks in miniature, laid out like the published files.

For now its weights are random, drawn from a fixed seed: its films are noise. They show that everything works,
nothing else.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .model.audio_vae import AudioVAE, published_config
from .model.checkpoint import storage_dtype
from .model.config import PONY, VARIANTS, Config
from .model.geometry import FILM_RATE
from .model.text_encoder import TextEncoder
from .model.tiny_tokenizer import tiny_tokenizer
from .model.transformer import JointTransformer
from .model.video_decoder import VideoDecoder
from .model.video_vae import VideoVAE

VERSION = "random-1"
NOTE = "random weights: the film is noise"


def ensure_pony(folder: Path) -> Path:
    """Return `folder`, written first if it does not exist; the files appear all at once or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write_pony(work)
            work.replace(folder)
        except OSError:
            if not folder.exists():  # else another process was faster with the same files
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def write_pony(folder: Path, seed: int = 0) -> None:
    """Write all parts of the miniature, with random weights, into the existing `folder`."""
    tokenizer = tiny_tokenizer(PONY.text_encoder.vocab_size).to_str()
    for index, variant in enumerate(VARIANTS):
        config = PONY.transformers[variant]
        _write(
            folder / variant,
            "transformer",
            JointTransformer(config),
            config,
            seed + index,
            {"variant": variant},
        )
    text_encoder = TextEncoder(PONY.text_encoder)
    _write(folder / "text_encoder", "text_encoder", text_encoder, PONY.text_encoder, seed + 4)
    (folder / "text_encoder" / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    _write(
        folder / "turbo_vae", "video_decoder", VideoDecoder(PONY.video_decoder), PONY.video_decoder, seed + 5
    )
    _write(
        folder, "video_vae", VideoVAE(PONY.video_vae), PONY.video_vae, seed + 6, name="wan22_vae.safetensors"
    )
    _write(folder / "audio_vae", "audio_vae", AudioVAE(PONY.audio_vae), PONY.audio_vae, seed + 7)
    pretransform = {"type": "autoencoder", "config": published_config(PONY.audio_vae)}
    published = {"sample_rate": FILM_RATE, "model": {"pretransform": pretransform}}
    (folder / "audio_vae" / "model_config.json").write_text(json.dumps(published), encoding="utf-8")


def _write(
    folder: Path,
    part: str,
    module: nn.Module,
    config: Config,
    seed: int,
    metadata: dict[str, str] | None = None,
    name: str = "model.safetensors",
) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    linears = torch.bfloat16 if part == "transformer" else torch.float32
    prefix = "pretransform.model." if part == "audio_vae" else ""
    state = {
        prefix + key: random_weight(key, tensor, generator).to(storage_dtype(part, key, linears))
        for key, tensor in module.state_dict().items()
    }
    folder.mkdir(exist_ok=True)
    header = {"format": "pt", "config": json.dumps(config.to_dict()), "note": NOTE, **(metadata or {})}
    save_file(state, folder / name, header)


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
