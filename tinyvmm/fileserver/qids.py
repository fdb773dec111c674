"""Qid paths: one 64-bit number for each file of a tree, whatever host file systems it spans.

    63      48 47                                0
    +---------+-----------------------------------+
    | index   | inode number                      |   index: of the pair (space, st_dev)
    +---------+-----------------------------------+
    | 0xFFFE  | hash of a place: parent and name  |   `place_path`
    +---------+-----------------------------------+
    | 0xFFFF  | running number                    |   inode numbers past 48 bits
    +---------+-----------------------------------+

The first pair seen gets index 0, so on one host file system a guest sees the host's own inode
numbers (v9fs adds 2). A space keeps apart trees that show one host directory at two places.
Guarded by the tree's lock.
"""

import stat

_INO_BITS = 48
INO_MASK = (1 << _INO_BITS) - 1
BY_PLACE = 0xFFFE << _INO_BITS
_NUMBERED = 0xFFFF << _INO_BITS

QID_TYPES = {stat.S_IFDIR: 0x80, stat.S_IFLNK: 0x02}
"""Qid types (QTDIR, QTSYMLINK) by S_IFMT; everything else is QTFILE, 0."""


class QidPaths:
    """The qid paths given out by one tree."""

    def __init__(self) -> None:
        self._bases: dict[tuple[int, int], int] = {}
        self._numbered: dict[tuple[int, int, int], int] = {}

    def path(self, space: int, dev: int, ino: int) -> int:
        """The path of inode `ino` on host device `dev`, seen in `space`."""
        base = self._bases.get((space, dev))
        if base is None:
            base = len(self._bases) << _INO_BITS
            self._bases[space, dev] = base
        if ino <= INO_MASK and base < BY_PLACE:
            return base | ino
        key = (space, dev, ino)
        path = self._numbered.get(key)
        if path is None:
            path = self._numbered[key] = _NUMBERED | len(self._numbered)
        return path


def place_path(parent_path: int, name: bytes) -> int:
    """A path for what is known by its place only; the same for as long as this process runs."""
    return BY_PLACE | (hash((parent_path, name)) & INO_MASK)


def version_of(mtime_ns: int, ctime_ns: int, size: int) -> int:
    """A qid version that changes when the file does, and is never 0 ("do not cache")."""
    return (hash((mtime_ns, ctime_ns, size)) & 0xFFFF_FFFF) or 1
