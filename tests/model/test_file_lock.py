"""Locks on files."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from happyhorse.model import file_lock
from happyhorse.model.file_lock import try_lock


def test_a_locked_file_is_free_again_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as first, path.open("ab") as second:
        assert try_lock(first) and not try_lock(second)
        first.close()
        assert try_lock(second)


@pytest.mark.parametrize("taken", [False, True])
def test_windows_own_locks_are_used_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    def locking(_file: int, _mode: int, num_bytes: int) -> None:
        assert num_bytes == 1
        if taken:
            raise PermissionError

    monkeypatch.setattr(file_lock, "fcntl", None)
    monkeypatch.setattr(file_lock, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    with (tmp_path / "lock").open("ab") as file:
        assert try_lock(file) != taken
