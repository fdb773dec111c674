"""A private directory that goes away: what a guest writes when nobody asked to keep it.

Each run makes `tinyvmm-XXXXXXXX` under $TMPDIR and holds a lock (flock(2)) on it. A run that was
killed outright could not remove its own; the lock died with it, so the next run can tell and does.
"""

import fcntl
import os
from contextlib import suppress

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.removal import remove_whole

_PREFIX = "tinyvmm-scratch-"


class ScratchDirectory:
    """A new directory at `path` until `close`, inside a locked one of mode 0700."""

    def __init__(self, parent: str | None = None) -> None:
        """Make it under `parent` ($TMPDIR, else /tmp), after removing what dead runs left there."""
        parent = parent or os.environ.get("TMPDIR") or "/tmp"
        self._base = os.path.join(parent, _PREFIX + os.urandom(6).hex())
        self.path = os.path.join(self._base, "writes")
        try:
            _remove_stale(parent)
            os.mkdir(self._base, 0o700)
            os.mkdir(self.path, 0o755)
        except OSError as error:
            raise ConfigError(
                f"cannot make a directory for the guest's writes in {parent}: {error.strerror}; "
                "set TMPDIR, or give --write DIR"
            ) from None
        self._fd = _lock(self._base)

    def close(self) -> None:
        """Remove the directory and all that is in it; harmless when done twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            _remove(self._base)
            os.close(fd)


def _lock(path: str) -> int | None:
    """Open and lock the directory; None if somebody alive holds it, or it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _remove_stale(parent: str) -> None:
    for name in os.listdir(parent):
        if name.startswith(_PREFIX):
            path = os.path.join(parent, name)
            fd = _lock(path)
            if fd is not None:
                if os.fstat(fd).st_uid == os.geteuid():
                    _remove(path)
                os.close(fd)


def _remove(path: str) -> None:
    try:
        os.rmdir(os.path.join(path, "writes"))  # the common case: nothing was written
        os.rmdir(path)
    except OSError:
        with suppress(OSError):
            fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                remove_whole(os.fsencode(os.path.basename(path)), fd)
            finally:
                os.close(fd)
