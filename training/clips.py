"""A folder of clips with sound and captions -> batches of latents and text states, cached on disk.

Captions are in NAME.txt beside NAME.mp4, or all in captions.jsonl, one {"file": ..., "caption": ...} a line.
"""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..media import FILMS
from ..model.audio_vae import encode_driving_audio
from ..model.checkpoint import Checkpoint, load_tokenizer
from ..model.finite import check_finite
from ..model.geometry import FilmShape
from ..model.packing import Latents
from ..model.prompt import Tokenizer, encode_prompt
from ..model.run_block import RunBlock
from ..model.stream_writer import write_tensors
from ..model.weight_files import files_of
from ..sampler.parts import Parts, Progress, default_vae_dtype, part_dtype
from ..sampler.placement import Placement
from .clip_reader import check_clip, read_clip
from .files import naming, read_tensors
from .flow import Batch
from .generators import generator

log = logging.getLogger(__name__)
CAPTIONS = "captions.jsonl"
SHOWN = 5  # of what is wrong with the clips
SAMPLES = 512  # pieces of a checkpoint that tell it from another
ROLES = ("text_encoder", "video_vae", "audio_vae")

T, R = TypeVar("T"), TypeVar("R")
# use(role) is a context that gives a network, ready on its device, and the hook that runs its layers
Use = Callable[[str], AbstractContextManager[tuple[nn.Module, RunBlock]]]


@dataclass(frozen=True)
class Clip:
    """A film file and what is to be said of it."""

    path: Path
    caption: str


def find_clips(folder: Path) -> list[Clip]:
    """The clips of a folder with their captions, by name.

    Raises FileNotFoundError or ValueError for a folder without clips, and naming the clip for a caption that
    is missing, empty, given twice or for no clip.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give one that holds clips and their captions")
    paths = sorted(
        path
        for path in folder.iterdir()
        # "._" begins what macOS leaves beside a file on other systems' disks
        if path.suffix.lower() in FILMS and path.is_file() and not path.name.startswith("._")
    )
    if not paths:
        raise ValueError(
            f"{folder} holds no clips (folders in it are not searched); give the folder of the films "
            f"({', '.join(FILMS)}) and their captions"
        )
    listed = folder / CAPTIONS
    captions = _listed_captions(listed, {_composed(path.name) for path in paths}) if listed.exists() else {}
    stems = {_composed(path.stem) for path in paths}
    texts = sorted(path.name for path in folder.glob("[!.]*.txt") if _composed(path.stem) not in stems)
    if texts:
        log.warning(
            "%d texts in %s belong to no clip, the first is %s; only %s are looked for",
            len(texts), folder, texts[0], ", ".join(FILMS),
        )  # fmt: skip
    return _all(lambda path: Clip(path, _caption(path, captions.get(_composed(path.name)))), paths)


def _all(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results for all items, or one ValueError of what is wrong with the first of them."""
    results, problems = [], []
    for item in items:
        try:
            results.append(function(item))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - SHOWN} more are like these"] if len(problems) > SHOWN else []
        raise ValueError("; ".join([*problems[:SHOWN], *more]))
    return results


def _composed(name: str) -> str:
    """A name of a file as it is typed: some systems store its accents as letters of their own."""
    return unicodedata.normalize("NFC", name)


def _listed_captions(listed: Path, names: set[str]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(listed).split("\n"), start=1):  # captions may hold other line ends
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file"], entry["caption"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError("file and caption must be text")
            name = _composed(name)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{listed}, line {number}: expected {{"file": ..., "caption": ...}}, got {line[:60]!r} '
                f"({error})"
            ) from error
        if name not in names:
            raise ValueError(
                f"{listed}, line {number}: there is no clip {name!r} in the folder; correct the name"
            )
        if name in captions:
            raise ValueError(f"{listed}, line {number}: {name} has a caption already; keep one of the two")
        captions[name] = caption
    return captions


def _caption(path: Path, listed: str | None) -> str:
    beside = path.with_suffix(".txt")
    if beside.exists() and listed is not None:
        raise ValueError(f"{path} has two captions, in {beside.name} and in {CAPTIONS}; keep one of them")
    if listed is None and not beside.exists():
        raise ValueError(f"{path} has no caption; write it into {beside.name} beside it, or into {CAPTIONS}")
    caption = (_text(beside) if listed is None else listed).strip()
    if not caption:
        source = beside.name if listed is None else CAPTIONS
        raise ValueError(f"the caption of {path} in {source} is empty; describe what is to be seen and heard")
    return caption


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from error


@dataclass(frozen=True)
class ClipData:
    """Clips ready for training, a `flow.Data`: their files in the cache, and the negative prompt's states.

    A batch holds clips whose captions have one length; every epoch shuffles them anew. `fingerprint` changes
    with the clips, the captions, the negative prompt, what encoded them, and the order.
    """

    latents: tuple[Path, ...]
    texts: tuple[Path, ...]
    lengths: tuple[int, ...]  # tokens of each caption
    negative: Tensor
    batch_size: int
    seed: int
    fingerprint: str

    def batch(self, index: int) -> Batch:
        """Batch number `index` of the run, read from the cache."""
        by_length: dict[int, list[int]] = {}
        for clip, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(clip)
        count = sum(-(-len(clips) // self.batch_size) for clips in by_length.values())
        draw = generator(self.seed, "epoch", index // count)
        batches = []
        for clips in by_length.values():
            order = torch.randperm(len(clips), generator=draw).split(self.batch_size)
            batches += [[clips[i] for i in part] for part in order]
        chosen = batches[torch.randperm(count, generator=draw)[index % count]]
        films = [read_tensors(self.latents[clip])[0] for clip in chosen]
        texts = [read_tensors(self.texts[clip])[0]["text"].float() for clip in chosen]
        clean = Latents(*(torch.cat([film[stream] for film in films]) for stream in ("video", "audio")))
        return Batch(clean, torch.cat(texts))


@dataclass(frozen=True)
class Encoders:
    """What makes latents and text states: the networks by role, and `names` that tell them apart."""

    use: Use
    tokenizer: Tokenizer
    names: Mapping[str, str]

    @classmethod
    def of(
        cls,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device,
        dtype: torch.dtype,
        placements: str | Mapping[str, Sequence[Placement]] = "stage",
        progress: Progress = lambda stage, done, total: None,  # noqa: ARG005
    ) -> "Encoders":
        """Those of checkpoints by role (text_encoder, video_vae, audio_vae), loaded while they are used.

        `placements` as in `Parts`.
        """
        vae_dtype = default_vae_dtype(dtype, device)
        parts = Parts(
            {role: checkpoints[role] for role in ROLES}, device, placements, dtype, vae_dtype, progress
        )
        names = {
            role: _digest([file_identity(checkpoints[role].path), str(part_dtype(role, dtype, vae_dtype))])
            for role in ROLES
        }
        return cls(parts.use, load_tokenizer(checkpoints["text_encoder"]), names)


def prepare_clips(
    folder: Path,
    cache: Path,
    shape: FilmShape,
    encoders: Encoders,
    negative: str,
    device: torch.device,
    progress: Progress,
    batch_size: int = 1,
    seed: int = 0,
    check: Callable[[str], None] = lambda fingerprint: None,  # noqa: ARG005
) -> ClipData:
    """Encode what is not in `cache` yet, and return the data.

    Files of the cache are named after the contents of clip or caption, the size and length, and the
    networks' files and dtypes, so that nothing old is taken. Networks are let go of when all is encoded.
    `check` gets the fingerprint that the data will have, and may raise, before any of that work.
    Raises as `find_clips` and `read_clip`, and OSError where the cache cannot be written.
    """
    clips = find_clips(folder)
    with naming(cache, "another folder"):
        cache.mkdir(parents=True, exist_ok=True)
    size, names = asdict(shape), encoders.names
    texts = [
        cache / f"text-{_digest([text, names['text_encoder']])}.safetensors"
        for text in (*(clip.caption for clip in clips), negative)
    ]
    vaes = [names["video_vae"], names["audio_vae"]]
    latents = [cache / f"clip-{_digest([_content(clip.path), size, vaes])}.safetensors" for clip in clips]
    fingerprint = _digest([*([path.name for path in paths] for paths in (latents, texts)), batch_size, seed])
    check(fingerprint)
    _encode_clips(clips, latents, shape, encoders, device, progress)  # first, as what is wrong is wrong here
    _encode_texts(clips, negative, texts, encoders, progress)
    lengths = tuple(read_tensors(path)[0]["text"].shape[1] for path in texts[:-1])
    batches = sum(-(-lengths.count(length) // batch_size) for length in set(lengths))
    if batches > -(-len(clips) // batch_size):
        log.warning(
            "batches hold %.1f clips on average, not %d: only clips whose captions have the same number of "
            "tokens are computed at once; let an update have several batches instead (accumulation)",
            len(clips) / batches, batch_size,
        )  # fmt: skip
    states = read_tensors(texts[-1])[0]["text"].float()
    return ClipData(tuple(latents), tuple(texts[:-1]), lengths, states, batch_size, seed, fingerprint)


def _encode_texts(
    clips: list[Clip], negative: str, paths: list[Path], encoders: Encoders, progress: Progress
) -> None:
    captions = [(f"the caption of {clip.path}", clip.caption) for clip in clips]
    wanted = dict(zip(paths, [*captions, ("the negative prompt", negative)], strict=True))
    missing = {path: wanted[path] for path in wanted if not path.exists()}
    if not missing:
        return
    progress("captions", 0, len(missing))
    with torch.no_grad(), encoders.use("text_encoder") as (encoder, run_block):
        for done, (path, (name, text)) in enumerate(missing.items(), start=1):
            try:
                found = encode_prompt(encoder, encoders.tokenizer, text, run_block=run_block)
            except ValueError as error:
                raise ValueError(f"{name} cannot be used: {error}") from error
            if found.cut_text:
                log.warning("%s is too long; cut: %r", name, found.cut_text)
            write_tensors(path, {"text": found.states.half().cpu()})  # they have been rounded to it already
            progress("captions", done, len(missing))


def _encode_clips(
    clips: list[Clip],
    paths: list[Path],
    shape: FilmShape,
    encoders: Encoders,
    device: torch.device,
    progress: Progress,
) -> None:
    missing = {path: clip for path, clip in zip(paths, clips, strict=True) if not path.exists()}
    if not missing:
        return
    _all(lambda clip: check_clip(clip.path, shape), missing.values())  # all of them before hours of work
    progress("clips", 0, len(missing))
    with (
        torch.no_grad(),
        encoders.use("video_vae") as (video_vae, _),
        encoders.use("audio_vae") as (audio_vae, _),
    ):
        for done, (path, clip) in enumerate(missing.items(), start=1):
            frames, sound = read_clip(clip.path, shape)
            tensors = {
                "video": video_vae.encode(frames.to(device)).cpu(),
                "audio": encode_driving_audio(audio_vae, sound.to(device)).cpu(),
            }
            cure = "check the VAEs' files, or try float32"
            check_finite(tensors, f"encoding {clip.path}", cure)
            write_tensors(path, tensors)
            progress("clips", done, len(missing))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Tells a checkpoint from another by names, sizes and samples: to read it all would take minutes.

    Only what may be read of it counts, not a note that somebody puts beside it; a copy is the same.
    """
    return _digest([(file.name, file.stat().st_size, _sample(file)) for file in files_of(path)])


def _sample(path: Path) -> str:
    """A digest of the beginning of a file, which says what is in it, and of pieces all over."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for piece in range(SAMPLES):
            file.seek(size * piece // SAMPLES)
            digest.update(file.read(4096))
    return digest.hexdigest()
