"""The pony's training data."""

from pathlib import Path

import pytest
import torch

from happyhorse.model.prompt import Tokenizer
from happyhorse.model.tiny_tokenizer import tiny_tokenizer
from happyhorse.training.data.pool import training_clip_attributes
from happyhorse.training.data.world import Bounce, is_held_out
from happyhorse.training.world_data import WorldData, encode_clips


def world_data(count: int = 200, added: float = 0.0, size: int = 6, seed: int = 0) -> WorldData:
    # the latents say which clip they are of
    numbers = torch.arange(float(count)) + added
    latents = {"video": numbers.view(-1, 1, 1, 1, 1), "audio": numbers.view(-1, 1, 1)}
    return WorldData(latents, Tokenizer(tiny_tokenizer(512)), size, seed)


@pytest.fixture
def data() -> WorldData:
    return world_data()


def test_batches_take_turns_between_the_worlds_and_match_their_captions(data: WorldData) -> None:
    for index in range(12):
        batch = data.batch(index)
        assert batch.text.shape[0] == 6
        for clip, sound, tokens in zip(batch.clean.video, batch.clean.audio, batch.text, strict=True):
            attributes = training_clip_attributes(int(clip.item()))
            assert sound.item() == clip.item()
            assert isinstance(attributes, Bounce) == (index % 2 == 0)
            assert tokens.tolist() in data.tokens[int(clip.item())].values()
        again = data.batch(index)
        assert torch.equal(again.text, batch.text) and torch.equal(again.clean.video, batch.clean.video)


def test_other_data_has_another_fingerprint(data: WorldData) -> None:
    assert world_data().fingerprint == data.fingerprint
    changes = ({"count": 199}, {"added": 1.0}, {"size": 5}, {"seed": 1})
    assert len({data.fingerprint, *(world_data(**change).fingerprint for change in changes)}) == 5


def test_training_clips_are_never_held_out() -> None:
    assert not any(is_held_out(training_clip_attributes(index)) for index in range(300))


def test_latents_are_made_once(tmp_path: Path) -> None:
    made = []

    def encode_video(film: torch.Tensor) -> torch.Tensor:
        made.append(film.shape)
        return torch.full((1, 2), film.mean())

    def encode_audio(sound: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3), sound.square().mean())

    path = tmp_path / "latents.safetensors"
    encoders = {"video": encode_video, "audio": encode_audio}
    first = encode_clips(path, 3, encoders, "these")
    assert made == [(1, 3, 49, 96, 96)] * 3
    assert first["video"].shape == (3, 2) and first["audio"].shape == (3, 3)
    again = encode_clips(path, 3, encoders, "these")
    assert len(made) == 3 and torch.equal(again["video"], first["video"])
    with pytest.raises(ValueError, match=r"holds 3 clips, 4 were asked for; delete it"):
        encode_clips(path, 4, encoders, "these")
    with pytest.raises(ValueError, match=r"other networks \(these, now others\); delete it"):
        encode_clips(path, 3, encoders, "others")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"latents\.safetensors cannot be read .*; delete it and run again"):
        encode_clips(path, 3, encoders, "these")
