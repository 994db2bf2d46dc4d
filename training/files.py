"""Files that training makes: written whole or not at all, and read again with errors that name them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object], elsewhere: str) -> None:
    """Let `write` make a file, which then takes the place of `path` at once.

    Raises OSError where that fails, which advises giving `elsewhere`, such as "another folder".
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with naming(path, elsewhere):
            write(temporary)
            with temporary.open("rb+") as file:  # a power cut must not leave an empty one
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path, elsewhere: str) -> Iterator[None]:
    """Raise what goes wrong in writing as an OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as the latter, and so what a device did wrong
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
        raise OSError(
            f"{path} could not be written ({reason}); free some space or give {elsewhere}, then run again"
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises ValueError where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and run again") from error
