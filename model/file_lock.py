"""Locks on files, which the system takes off when the file is closed or the process ends, however it ends."""

import errno
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

# what some network folders answer
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, *(() if fcntl else (errno.EINVAL,)))


def try_lock(file: IO[Any]) -> bool:
    """Lock a file that has just been opened, unless it is locked already; returns whether it was free.

    Raises OSError where that fails, with an errno of `NO_LOCKS` where the file system has no locks.
    """
    try:
        if fcntl is None:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as Windows calls it
        return False
    return True
