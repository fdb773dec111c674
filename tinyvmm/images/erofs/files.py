"""What an image's data blocks hold: stretches of them, in rows of arrays.

A row is 46 bytes and the file's name, so that a tree of a million files fits into memory.
"""

import os
from array import array
from bisect import bisect_right
from typing import NamedTuple

MEMORY = 0xFFFF_FFFF
"""In place of a directory's number: the blocks hold what was made here, not a file's data."""


class Identity(NamedTuple):
    """What a file was when it was planned, and has to be when it is read."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int


def identity(st: os.stat_result) -> Identity:
    """Return the identity of the file with this stat."""
    return Identity(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


class Files:
    """Every stretch of data blocks, by its first block, ascending; one row of arrays each."""

    def __init__(self) -> None:
        self.starts = array("I")
        self.directories = array("I")  # of the host; or MEMORY
        self._names_at = array("Q")
        self._names = bytearray()
        self._devs = array("Q")
        self._inodes = array("Q")
        self.sizes = array("Q")
        self._mtimes = array("q")
        self._ctimes = array("q")

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, start: int, directory: int, name: bytes, st: os.stat_result) -> None:
        """Add a file whose data begins in block `start`."""
        self._row(start, directory, name, st.st_size)
        self._devs.append(st.st_dev)
        self._inodes.append(st.st_ino)
        self._mtimes.append(st.st_mtime_ns)
        self._ctimes.append(st.st_ctime_ns)

    def add_memory(self, start: int, size: int) -> None:
        """Add blocks of our own making."""
        self._row(start, MEMORY, b"", size)
        for column in (self._devs, self._inodes, self._mtimes, self._ctimes):
            column.append(0)

    def _row(self, start: int, directory: int, name: bytes, size: int) -> None:
        self.starts.append(start)
        self.directories.append(directory)
        self._names_at.append(len(self._names))
        self._names += name
        self.sizes.append(size)

    def name(self, row: int) -> bytes:
        """Return the name of a row's file."""
        end = self._names_at[row + 1] if row + 1 < len(self._names_at) else len(self._names)
        return bytes(self._names[self._names_at[row] : end])

    def identity(self, row: int) -> Identity:
        """Return what a row's file was when it was planned."""
        return Identity(
            self._devs[row],
            self._inodes[row],
            self.sizes[row],
            self._mtimes[row],
            self._ctimes[row],
        )

    def find(self, block: int) -> int:
        """Return the row that begins at `block` or is the last before it; -1 if there is none."""
        return bisect_right(self.starts, block) - 1
