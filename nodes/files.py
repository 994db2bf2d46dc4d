"""What the host's folders of models hold for each part, and where a choice of a Load node lies on disk."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from .. import pony
from ..model import catalog
from ..model.weight_files import PICKLES, files_of

log = logging.getLogger(__name__)
CHECKPOINTS = (".safetensors", ".sft", ".gguf", *PICKLES)
GGUF_FOLDERS = ("diffusion_models", "text_encoders")
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True)
class Part:
    """Where one part is looked for.

    `folders`: the host's folder types, with what a name in them must match; the first is where to put it.
    `older`: folders of models/ that other packs for these weights use. `sources`: a word in a file's name ->
    its name in the catalog. `ponies`: built-in choice -> its name in the catalog; "pony" means the first.
    """

    folders: Mapping[str, str]
    older: tuple[str, ...]
    sources: Mapping[str, str]
    ponies: Mapping[str, str]


_VARIANTS = {"distill": "distill", "base": "base", "540p": "540p_sr", "1080p": "1080p_sr"}
PARTS = {
    "transformer": Part(
        folders={"diffusion_models": r"^(?!.*turbo_?vae)"},
        older=("daVinci-MagiHuman",),
        sources=_VARIANTS,
        ponies={f"pony: {name}": name for name in _VARIANTS.values()},
    ),
    "text_encoder": Part(
        folders={"text_encoders": ""},
        older=("t5gemma-9b-9b-ul2",),
        sources={"t5gemma": "text_encoder"},
        ponies={"pony": "text_encoder"},
    ),
    "video_vae": Part(
        folders={"vae": r"^(?!.*(sd_audio|stable-audio))", "diffusion_models": r"turbo_?vae"},
        older=("daVinci-MagiHuman/turbo_vae", "wan_vae", "Wan2.2-TI2V-5B"),
        sources={"wan": "video_vae", "turbo": "video_decoder", "checkpoint-": "video_decoder"},
        ponies={"pony": "video_vae", "pony: turbo": "video_decoder"},
    ),
    "audio_vae": Part(
        folders={"vae": r"^(?!.*(wan_?2|turbo_?vae))", "audio_encoders": "audio", "checkpoints": "audio"},
        older=("stable-audio-open-1.0", "stable_audio"),
        sources={"audio": "audio_vae"},
        ponies={"pony": "audio_vae"},
    ),
}


def choices(part: str) -> list[str]:
    """What a Load node offers for a part: the built-in pony first, then files and folders; never raises.

    Names are relative to the folder they were found in (those of older packs: to models/), always with `/`.
    """
    try:
        found = set(_found(PARTS[part]))
    except Exception:  # one folder that cannot be read must not cost the host its list of all nodes
        log.warning("the files for the %s could not be listed", _words(part), exc_info=True)
        found = set()
    return [*PARTS[part].ponies, *sorted(found, key=str.lower)]


def resolve(part: str, choice: str) -> Path:
    """The file or folder of a choice; a pony is written first if it is not there yet.

    Raises FileNotFoundError that names the choice, the folders and where to get it.
    """
    if name := _pony(part, choice):
        return catalog.find(name, pony.pony_folder())
    path = _locate(part, choice)
    if path is None:
        raise FileNotFoundError(_missing(part, choice))
    return path


def problem(part: str, choice: object) -> str | None:
    """Why a choice cannot be loaded, as one sentence; None where its file is there. Nothing is written."""
    if not isinstance(choice, str) or not choice.strip():
        return f"the {_words(part)} must be the name of a file or folder, got {choice!r}"
    if _pony(part, choice) or _locate(part, choice):
        return None
    return _missing(part, choice)


def fingerprint(part: str, choice: str | None) -> str:
    """Changes when the file of a choice is replaced: names, sizes and times of what is on disk.

    A choice that comes by a link is None here, as the host has it before the graph runs.
    """
    if choice is None:
        return "linked"
    if _pony(part, choice):
        return f"{choice} {pony.version()}"
    path = _locate(part, choice)
    if path is None:
        return "missing"
    stats = [(file.name, file.stat()) for file in files_of(path)]
    return f"{path} " + " ".join(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)


def _pony(part: str, choice: str) -> str | None:
    ponies = PARTS[part].ponies
    return ponies.get(choice) or (next(iter(ponies.values())) if choice == "pony" else None)


def _locate(part: str, choice: str) -> Path | None:
    name = choice.replace("\\", "/")  # a workflow may come from another system
    if not {".", ".."}.isdisjoint(name.split("/")) or name.startswith("/") or PureWindowsPath(name).drive:
        return None  # only what lies in the folders of models
    for root in _roots(PARTS[part]):
        path = Path(root, name)
        try:
            if path.exists():
                return path
        except (OSError, ValueError):  # a name that no file can have
            continue
    return None


def _roots(part: Part) -> Iterator[str]:
    for kind in part.folders:
        yield from folder_paths.get_folder_paths(kind)
    yield folder_paths.models_dir  # the names of older packs' files begin with their folder


def _found(part: Part) -> Iterator[str]:
    for kind, wanted in part.folders.items():
        roots = folder_paths.get_folder_paths(kind)
        ggufs = _ggufs(roots) if kind in GGUF_FOLDERS else ()
        names = {name.replace("\\", "/") for name in (*folder_paths.get_filename_list(kind), *ggufs)}
        yield from _offered(_matching(sorted(names), wanted), roots)
    for folder in part.older:
        names = _walk(Path(folder_paths.models_dir), folder)
        wanted = next(iter(part.folders.values()))
        yield from _offered(_matching(names, wanted), [folder_paths.models_dir])


def _ggufs(roots: Iterable[str]) -> Iterator[str]:
    """The GGUF files of folders, which the host does not list."""
    for root in roots:
        for name in folder_paths.recursive_search(root, excluded_dir_names=[".git"])[0]:
            if name.lower().endswith(".gguf"):
                yield name


def _matching(names: Iterable[str], wanted: str) -> Iterator[str]:
    return (name for name in names if re.search(wanted, name, re.IGNORECASE))


def _walk(root: Path, folder: str) -> Iterator[str]:
    for parent, _, files in os.walk(root / folder):
        for file in files:
            if file.lower().endswith(CHECKPOINTS):
                yield (Path(parent) / file).relative_to(root).as_posix()


def _offered(files: Iterable[str], roots: Iterable[str]) -> Iterator[str]:
    """Of checkpoint files: the folders that are one checkpoint each, and the files that are part of none."""
    by_folder: dict[str, list[str]] = {}
    for file in files:
        path = PurePosixPath(file)
        if path.suffix.lower() in CHECKPOINTS:
            by_folder.setdefault(path.parent.as_posix(), []).append(path.name)
    for folder, names in by_folder.items():
        inside = set()
        if folder != "." and (len(names) == 1 or any(map(SHARD.search, names))):
            inside = next(filter(None, (_members(Path(root, folder)) for root in roots)), set())
        if inside:
            yield folder
        yield from (
            name if folder == "." else f"{folder}/{name}"
            for name in names
            if name not in inside and not SHARD.search(name)
        )


def _members(folder: Path) -> set[str]:
    """The files of the checkpoint that `folder` is as a whole; empty where it is none."""
    try:
        files = os.listdir(folder)  # noqa: PTH208  only the names are needed
    except OSError:
        return set()
    if sum(file.endswith(".safetensors.index.json") for file in files) == 1:
        return set(filter(SHARD.search, files))
    own = [file for file in files if file.lower().endswith(CHECKPOINTS)]
    turbo = any(file.startswith("Turbo") and file.endswith(".json") for file in files)
    return set(own) if own == ["model.safetensors"] or (turbo and len(own) == 1) else set()


def _missing(part: str, choice: str) -> str:
    known = PARTS[part]
    if choice.startswith("pony"):
        return f"there is no {_words(part)} {choice!r}; choose one of {', '.join(known.ponies)}"
    name = choice.replace("\\", "/")
    same = [other for other in choices(part) if other.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
    if same:
        return f"the {_words(part)} {choice!r} was not found, but {same[0]!r} was: choose it"
    kind = next(iter(known.folders))
    roots = folder_paths.get_folder_paths(kind)
    folder = next((root for root in roots if Path(root).name == kind), roots[0])
    named = {source for word, source in known.sources.items() if word in name.lower()}
    sources = named or dict.fromkeys(known.sources.values())
    origins = " or ".join(f"huggingface.co/{catalog.SOURCES[source].origin}" for source in sources)
    return (
        f"the {_words(part)} {choice!r} is not in {folder}, nor in any other folder of {kind}; "
        f"put it there (get it from {origins}), or choose another; the key R renews the list"
    )


def _words(part: str) -> str:
    return part.replace("_", " ")
