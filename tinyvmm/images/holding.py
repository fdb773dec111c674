"""Directories of a store that somebody uses: held by flock(2), so a hold dies with its holder."""

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import ExitStack


def hold(path: str, cleanup: "ExitStack") -> None:
    """Hold the directory at `path`, as others may too, until `cleanup`; OSError if it is gone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    cleanup.callback(os.close, fd)
    fcntl.flock(fd, fcntl.LOCK_SH)


def is_held(path: str) -> bool:
    """Whether somebody holds the directory; nobody one that is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
