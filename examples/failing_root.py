"""How does a program behave when its disk fails? A root that says EIO, and ENOSPC when it is full.

    python -m examples.failing_root sh -c 'cat /etc/hostname; seq 100000 > /tmp/log'

What is in FAILS cannot be read; after ROOM bytes nothing more can be written, anywhere.
"""

import errno
import os
import sys
import threading

import tinyvmm

FAILS = {"/etc/hostname"}
ROOM = 1 << 16


class Failing:
    """Is asked before each access; what it raises is the program's error."""

    def __init__(self, fails: set[str], room: int) -> None:
        self._fails = fails
        self._room = room
        self._lock = threading.Lock()  # several accesses may come at once

    def __call__(self, access: tinyvmm.Access) -> None:
        """Raise what the disk says."""
        if access.op == "read" and access.path in self._fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if access.op == "write":
            with self._lock:
                self._room -= access.length
                if self._room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    # Without a cache in the guest an error is that of the very read(2) or write(2).
    failing = Failing(FAILS, ROOM)
    try:
        sys.exit(tinyvmm.run(sys.argv[1:], on_access=failing, cache="none").returncode)
    except tinyvmm.TinyvmmError as error:
        sys.exit(f"failing_root: {error}")
