"""What stands for a full disk in tests."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """A limit on the size of files stands for a full disk: the same call fails, with another number."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
