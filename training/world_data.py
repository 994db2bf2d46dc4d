"""The pony's training data: latents of clips of the two worlds, and batches of them with their captions."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..model.packing import Latents
from ..model.prompt import Tokenizer
from ..model.stream_writer import write_tensors
from .data.clip import SIZE
from .data.pool import Progress, to_video, training_clip, training_clip_attributes
from .data.world import Head, body, caption
from .files import read_tensors
from .flow import Batch

BODY_ONLY = 0.15  # share of batches whose captions are the first part alone
LOOKED_AT = 32  # clips at most, spread over all, whose latents tell data from other data

Encode = Callable[[Tensor], Tensor]  # video [B, 3, F, H, W] or waveform [B, 2, N] -> latents


def encode_clips(
    path: Path,
    count: int,
    encoders: Mapping[str, Encode],
    made_with: str,
    size: tuple[int, int] = SIZE,
    progress: Progress = lambda _done, _total: None,
) -> Mapping[str, Tensor]:
    """Latents of the first `count` training clips of `size`, read from `path` or else made and written there.

    `encoders` take the "video" [1, 3, F, H, W] and the "audio" [1, 2, N] of a clip; of 96 x 96 pixels come
    [count, 48, 13, 6, 6] and [count, 51, 64], float16. Raises ValueError where the file holds another number
    of clips, or those of other networks: `made_with` names them.
    """
    if not path.exists():
        found: dict[str, Tensor] = {}  # made whole: small tensors that stay would break up the free memory
        for index in range(count):
            clip = training_clip(index, size)
            parts = {"video": to_video(clip.frames), "audio": torch.from_numpy(clip.sound)[None]}
            for name, encode in encoders.items():
                latents = encode(parts[name])[0].half()
                if name not in found:
                    found[name] = latents.new_empty(count, *latents.shape)
                found[name][index] = latents
            progress(index + 1, count)
        write_tensors(path, found, {"made_with": made_with})
        del found
    latents, metadata = read_tensors(path)
    told = metadata.get("made_with")
    if told != made_with:
        raise ValueError(f"{path} was made with other networks ({told}, now {made_with}); delete it")
    if any(len(part) != count for part in latents.values()):
        number = len(next(iter(latents.values())))
        raise ValueError(f"{path} holds {number} clips, {count} were asked for; delete it")
    return latents


class WorldData:
    """Batches of `size` films whose captions have one length in tokens; even ones bounce, odd ones talk."""

    def __init__(self, latents: Mapping[str, Tensor], tokenizer: Tokenizer, size: int, seed: int) -> None:
        self.latents, self.size, self.seed = latents, size, seed
        self.tokens: list[dict[str, list[int]]] = []  # of each clip's whole caption and of its body alone
        self.groups: dict[tuple[bool, int], list[int]] = {}  # world, length of the caption -> clips
        for index in range(len(latents["video"])):
            attributes = training_clip_attributes(index)
            texts = {"caption": caption(attributes), "body": body(attributes)}
            self.tokens.append({name: tokenizer.encode(text)[0] for name, text in texts.items()})
            group = isinstance(attributes, Head), len(self.tokens[-1]["caption"])
            self.groups.setdefault(group, []).append(index)

    @property
    def fingerprint(self) -> str:
        """Changes with the captions as tokens, the order, and the latents, a few of which it looks at."""
        found = zlib.crc32(json.dumps([self.tokens, self.size, self.seed]).encode())
        for name, latents in sorted(self.latents.items()):
            some = latents[:: -(-len(latents) // LOOKED_AT)].contiguous()
            found = zlib.crc32(f"{name} {latents.dtype} {list(latents.shape)}".encode(), found)
            found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), found)
        return f"{found:08x}"

    def batch(self, index: int) -> Batch:
        """Batch number `index`, with captions as tokens."""
        random = Random(f"{self.seed} batch {index}")
        groups = [clips for (talks, _), clips in sorted(self.groups.items()) if talks == bool(index % 2)]
        clips = random.choices(random.choices(groups, [len(group) for group in groups])[0], k=self.size)
        text = "body" if random.random() < BODY_ONLY else "caption"
        video, audio = (self.latents[name][torch.tensor(clips)].float() for name in ("video", "audio"))
        return Batch(Latents(video, audio), torch.tensor([self.tokens[clip][text] for clip in clips]))
