"""The files of the miniature."""

from pathlib import Path

import pytest
import torch
from full_disk import disk_of

from happyhorse.pony import FILES, untrained, write_part


@pytest.mark.parametrize("name", ["distill", "video_vae"])
def test_the_same_weights_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    module = untrained(name, torch.Generator().manual_seed(0))
    for folder in ("a", "b"):
        write_part(tmp_path / folder, name, module, "a note")
    assert (tmp_path / "a" / FILES[name]).read_bytes() == (tmp_path / "b" / FILES[name]).read_bytes()


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    module = untrained("audio_vae", torch.Generator().manual_seed(0))
    with disk_of(1), pytest.raises(OSError, match="full"):
        write_part(tmp_path, "audio_vae", module, "a note")
    assert not list((tmp_path / "audio_vae").iterdir())
