"""A private directory that goes away: what a guest writes when nobody asked to keep it.

Each run makes `tinyvmm-scratch-XXXXXXXX` under $TMPDIR and holds a lock (flock(2)) on it. A run
that was killed outright could not remove its own; the lock died with it, so the next run can tell
and does.

What the guest of a machine with a name wrote stays as long as the machine is known: a link in the
machine's directory and one here, `machine`, lead to each other, and while both do, it is kept.
"""

import fcntl
import os
import stat
from contextlib import suppress

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.removal import remove_whole

_PREFIX = "tinyvmm-scratch-"
_KEEPER = "machine"
_WRITES = "writes"


class ScratchDirectory:
    """A new directory at `path` until `close`, inside a locked one of mode 0700."""

    def __init__(self, parent: str | None = None, kept_by: str | None = None) -> None:
        """Make it under `parent` ($TMPDIR, else /tmp), after removing what dead runs left there.

        `kept_by` is the path of a link to make: `close` then leaves all as it is until
        `remove_kept`.
        """
        self._kept = kept_by is not None
        parent = parent or os.environ.get("TMPDIR") or "/tmp"
        self._base = os.path.join(parent, _PREFIX + os.urandom(6).hex())
        self.path = os.path.join(self._base, _WRITES)
        try:
            _remove_stale(parent)
            os.mkdir(self._base, 0o700)
            os.mkdir(self.path, 0o755)
            if kept_by is not None:
                os.symlink(kept_by, os.path.join(self._base, _KEEPER))
                os.symlink(self._base, kept_by)
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
            if not self._kept:
                _remove(self._base)
            os.close(fd)


def kept_writes(kept_by: str) -> str | None:
    """Return the directory of what was written, which the link `kept_by` keeps; None for none."""
    base = _kept_base(kept_by)
    return None if base is None else os.path.join(base, _WRITES)


def remove_kept(kept_by: str, link: str | None = None) -> None:
    """Remove what the link `kept_by` keeps, if there is any; `link` is where it is found by now."""
    base = _kept_base(kept_by, link)
    if base is not None:
        _remove(base)


def _kept_base(kept_by: str, link: str | None = None) -> str | None:
    try:
        base = os.readlink(link or kept_by)
        back = os.readlink(os.path.join(base, _KEEPER))
        found = os.lstat(base)
    except OSError:
        return None
    # What cleans /tmp may have removed ours, and somebody else made another of that name.
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return base if ours and back == kept_by and os.path.basename(base).startswith(_PREFIX) else None


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
                if os.fstat(fd).st_uid == os.geteuid() and not _is_kept(path):
                    _remove(path)
                os.close(fd)


def _is_kept(path: str) -> bool:
    try:
        return _kept_base(os.readlink(os.path.join(path, _KEEPER))) == path
    except OSError:
        return False


def _remove(path: str) -> None:
    try:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(path, _KEEPER))
        os.rmdir(os.path.join(path, _WRITES))  # the common case: nothing was written
        os.rmdir(path)
    except OSError:
        with suppress(OSError):
            fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                remove_whole(os.fsencode(os.path.basename(path)), fd)
            finally:
                os.close(fd)
