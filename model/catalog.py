"""Where the published files come from, and by which names they are found in one folder of models."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .weight_files import IN_FOLDERS


@dataclass(frozen=True)
class Source:
    """One part: names it is looked for by, in this order, and where it is published."""

    patterns: tuple[str, ...]
    origin: str


def _named(variant: str) -> tuple[str, ...]:
    return variant, f"{variant}*", f"*{variant}*.safetensors", f"*{variant}*.gguf"


_WEIGHTS = "GAIR/daVinci-MagiHuman"
SOURCES = {
    "base": Source(_named("base"), f"{_WEIGHTS}, folder base"),
    "distill": Source(_named("distill"), f"{_WEIGHTS}, folder distill"),
    "540p_sr": Source(_named("540p_sr"), f"{_WEIGHTS}, folder 540p_sr"),
    "1080p_sr": Source(_named("1080p_sr"), f"{_WEIGHTS}, folder 1080p_sr"),
    "text_encoder": Source(
        ("text_encoder", "t5gemma-9b-9b-ul2", "t5gemma*.safetensors", "t5gemma*.gguf", "text_encoder*.*"),
        "google/t5gemma-9b-9b-ul2 (shards 1-4, the index and tokenizer.json)",
    ),
    "video_vae": Source(
        ("wan22_vae.safetensors", "Wan2.2_VAE.pth", "[Ww]an2.2_[Vv][Aa][Ee].safetensors"),
        "Wan-AI/Wan2.2-TI2V-5B, file Wan2.2_VAE.pth",
    ),
    "video_decoder": Source(("turbo_vae",), f"{_WEIGHTS}, folder turbo_vae"),
    "audio_vae": Source(
        ("audio_vae", "stable-audio-open-1.0", "sd_audio.safetensors"),
        "stabilityai/stable-audio-open-1.0, files model_config.json and model.safetensors",
    ),
}


def look(part: str, folder: Path) -> list[Path]:
    """What may be `part` in `folder`, the likeliest first."""
    return [path for pattern in SOURCES[part].patterns for path in sorted(folder.glob(pattern))]


def parts_in(path: Path) -> list[Path]:
    """The parts in a folder of models, else the path itself."""
    if path.is_file() or any(path.glob("*.index.json")):
        return [path]
    found = list(dict.fromkeys(chain.from_iterable(look(name, path) for name in SOURCES)))
    alone = any(file.suffix in IN_FOLDERS for file in path.glob("*"))
    return found if len(found) > 1 or (found and not alone) else [path]


def find(part: str, folder: Path) -> Path:
    """The file or folder of `part` (for transformers: the variant) in `folder`; FileNotFoundError names its
    source.
    """
    source = SOURCES[part]
    if found := look(part, folder):
        return found[0]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder} to look for the {part.replace('_', ' ')} in; give the folder of "
            "the models (--models), or try the pony, which needs no files (--preset pony)"
        )
    raise FileNotFoundError(
        f"no {part.replace('_', ' ')} in {folder} (looked for {', '.join(source.patterns)}); "
        f"get it from {source.origin}, or name the file itself"
    )
