"""Fixtures that several test files share."""

from pathlib import Path

import pytest
import torch

from happyhorse.pony import write_pony

torch.set_num_threads(1)  # tests are small and run side by side: more threads only wait for each other


@pytest.fixture(scope="session")
def pony_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature models, written once."""
    folder = tmp_path_factory.mktemp("pony")
    write_pony(folder)
    return folder
