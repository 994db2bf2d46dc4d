"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from happyhorse.pony import write_pony


@pytest.fixture(scope="session")
def pony_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature models, written once."""
    folder = tmp_path_factory.mktemp("pony")
    write_pony(folder)
    return folder
