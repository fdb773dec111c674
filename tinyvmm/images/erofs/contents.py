"""The data of an image's files: opened when they are read, and never any other than was planned.

A file is found by its directory's descriptor and its name, and must be what it was when it was
planned: device, inode, size, time of change of its content and of its inode. The same is asked once
more after each read, so data that has changed meanwhile is not given to anybody. What does not
match is EIO, and is told of once, by its name. Mapped writes show in the times only when the host's
kernel gets to know of them: data written that way can be seen before that.

Not thread-safe: guarded by the lock of the image.
"""

import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from errno import EIO

from tinyvmm.disks import files
from tinyvmm.fileserver.hostfile import open_contents, open_path, os_error
from tinyvmm.images.erofs.files import Identity, identity
from tinyvmm.images.erofs.plan import Plan
from tinyvmm.views import size_of

OPEN_MAX = 128  # files kept open
_TOLD_MAX = 1000  # files complained of by name; the rest go by number


class Contents:
    """The files of a plan, the last used ones open."""

    def __init__(self, plan: Plan, warn: Callable[[str], None]) -> None:
        """`warn` takes one line about each file that cannot be read as it was planned."""
        self._plan = plan
        self._warn = warn
        self._open: OrderedDict[int, tuple[int, Identity]] = OrderedDict()  # by row
        self._told: set[int] = set()

    def read(self, row: int, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from the file's byte `offset`, and with zeros beyond its end.

        OSError if it is not the file it was.
        """
        try:
            fd, planned = self._opened(row)
            done = files.read_all(fd, views, offset)
            whole = min(size_of(views), planned.size - offset)
            if done < whole or identity(os.fstat(fd)) != planned:
                raise os_error(EIO)
        except OSError as error:
            self.forget(row)
            self._tell(row, error)
            raise OSError(EIO, f"{self.path(row)} cannot be read") from None

    def fd(self, row: int) -> int:
        """Return a descriptor of the file as it was planned, good until the next call here.

        OSError if it is not the file it was.
        """
        try:
            return self._opened(row)[0]
        except OSError as error:
            self._tell(row, error)
            raise

    def _opened(self, row: int) -> tuple[int, Identity]:
        """Return a descriptor of the file, and what the file has to be still."""
        found = self._open.get(row)
        if found is not None:
            self._open.move_to_end(row)
            return found
        plan = self._plan
        planned = plan.files.identity(row)
        above = plan.directories.fd(plan.files.directories[row])
        there = open_path(plan.files.name(row), above)
        try:
            st = os.fstat(there)
            if identity(st) != planned:
                raise os_error(EIO)
            fd = open_contents(there, stat.S_IFMT(st.st_mode), os.O_RDONLY, ours=False)
        finally:
            os.close(there)
        self._open[row] = fd, planned
        if len(self._open) > OPEN_MAX:
            os.close(self._open.popitem(last=False)[1][0])
        return fd, planned

    def path(self, row: int) -> str:
        """Return the path of a row's file, for messages."""
        plan = self._plan
        directory = plan.directories.path(plan.files.directories[row])
        return os.fsdecode(os.path.join(directory, plan.files.name(row)))

    def _tell(self, row: int, error: OSError) -> None:
        if row in self._told or len(self._told) >= _TOLD_MAX:
            return
        self._told.add(row)
        changed = error.errno == EIO or isinstance(error, FileNotFoundError)
        why = "it changed after the guest had seen it" if changed else error.strerror
        self._warn(f"{self.path(row)} gives the guest an error: {why}")

    def forget(self, row: int) -> None:
        """Close a file."""
        found = self._open.pop(row, None)
        if found is not None:
            os.close(found[0])

    def close(self) -> None:
        """Close every file."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()
