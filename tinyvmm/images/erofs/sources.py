"""Directories of the host that an image is made of: found again, and united.

A tree has more directories than a process has descriptors, and a path can be redirected by a
rename. So each directory is remembered as a name in its parent and the inode it was; when it is
wanted again it is opened by way of its parents, one component at a time and never through a
symlink, and must be that inode still. The last ones used stay open.

`list_directory` unites layers as the 9P root does (fileserver/union_view.py): the first layer
searched wins, a whiteout hides what is below, directories are merged until one is opaque.

Not thread-safe: guarded by the lock of the image.
"""

import os
import stat
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from errno import ESTALE
from typing import NamedTuple

from tinyvmm.fileserver.beside import Notes, presented
from tinyvmm.fileserver.hostfile import dtype_of, fd_path, os_error
from tinyvmm.fileserver.maps import MapPoint
from tinyvmm.fileserver.whiteout import is_whiteout, layer_xattr

OPEN_MAX = 64  # directories kept open
_OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NONE = 0xFFFF_FFFF

DT_DIR = stat.S_IFDIR >> 12
_DT_CHR = stat.S_IFCHR >> 12
_DT_REG = stat.S_IFREG >> 12


class HostDirectories:
    """Directories by number, in 24 bytes each and their names."""

    def __init__(self) -> None:
        self._parents = array("I")
        self._names: list[bytes] = []
        self._devs = array("Q")
        self._inodes = array("Q")
        self._roots: dict[int, int] = {}  # descriptors, which stay open
        self._notes: dict[int, Notes] = {}  # of roots whose trees keep things beside their files
        self._open: OrderedDict[int, int] = OrderedDict()

    def add_root(self, fd: int, name: bytes, notes: Notes | None = None) -> int:
        """Take over the O_PATH descriptor of a tree's root, called `name` in messages."""
        st = os.fstat(fd)
        number = self._add(_NONE, name, st)
        self._roots[number] = fd
        if notes is not None:
            self._notes[number] = notes
        return number

    def inode(self, number: int) -> tuple[int, int]:
        """Return the directory's (st_dev, st_ino)."""
        return self._devs[number], self._inodes[number]

    def notes(self, number: int) -> Notes | None:
        """Return what the directory's tree keeps beside its files (fileserver/beside.py)."""
        if not self._notes:
            return None
        while self._parents[number] != _NONE:
            number = self._parents[number]
        return self._notes.get(number)

    def stat(self, number: int) -> os.stat_result:
        """Return what the directory is in the guest; OSError if it is not there."""
        fd, notes = self.fd(number), self.notes(number)
        st = os.fstat(fd)
        return st if notes is None else presented(fd, st, notes)

    def add(self, parent: int, name: bytes) -> tuple[int, os.stat_result]:
        """Open the directory `name` in `parent`: its number and its stat; OSError if there is none.

        It is open afterwards, so looking into it takes no more system calls to find it.
        """
        fd = os.open(name, _OPEN, dir_fd=self.fd(parent))
        try:
            st = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        number = self._add(parent, name, st)
        self._keep(number, fd)
        notes = self.notes(number)
        return number, st if notes is None else presented(fd, st, notes)

    def _add(self, parent: int, name: bytes, st: os.stat_result) -> int:
        self._parents.append(parent)
        self._names.append(name)
        self._devs.append(st.st_dev)
        self._inodes.append(st.st_ino)
        return len(self._names) - 1

    def fd(self, number: int) -> int:
        """Return an O_PATH descriptor, good until the next call here; OSError if it is not there.

        ESTALE says that another directory has its name now.
        """
        fd = self._roots.get(number)
        if fd is None:
            fd = self._open.get(number)
            if fd is None:
                return self._reopen(number)
            self._open.move_to_end(number)
        return fd

    def _reopen(self, number: int) -> int:
        way = []
        while number not in self._roots and number not in self._open:
            way.append(number)
            number = self._parents[number]
        fd = self._roots[number] if number in self._roots else self._open[number]
        for step in reversed(way):
            fd = os.open(self._names[step], _OPEN, dir_fd=fd)
            st = os.fstat(fd)
            if (st.st_dev, st.st_ino) != (self._devs[step], self._inodes[step]):
                os.close(fd)
                raise os_error(ESTALE)
            self._keep(step, fd)
        return fd

    def _keep(self, number: int, fd: int) -> None:
        self._open[number] = fd
        if len(self._open) > OPEN_MAX:
            os.close(self._open.popitem(last=False)[1])

    def path(self, number: int) -> bytes:
        """Return the path it had, for messages."""
        names = []
        while number != _NONE:
            names.append(self._names[number])
            number = self._parents[number]
        return os.path.join(*reversed(names))

    def close(self) -> None:
        """Close every descriptor."""
        for fd in (*self._open.values(), *self._roots.values()):
            os.close(fd)
        self._open.clear()
        self._roots.clear()


class Listing(NamedTuple):
    """The names in a directory, sorted, and what each is."""

    names: list[bytes]
    types: dict[bytes, int]
    """DT_* of each; 0 for what was gone before that could be found out."""
    layers: dict[bytes, list[int]] | None
    """Which of the directory's layers have the name; None if there is but one layer."""


def list_directory(
    directories: HostDirectories, layers: Sequence[int], *, verbatim: bool = False
) -> Listing:
    """Unite the layers of a directory, the first searched first; OSError if one is not readable.

    With `verbatim` whiteouts are files like others, and hide nothing more than their name.
    """
    if len(layers) == 1:
        return _list_one(fd_path(directories.fd(layers[0])), verbatim=verbatim)
    found: dict[bytes, list[int]] = {}
    types: dict[bytes, int] = {}
    closed: set[bytes] = set()  # names that lower layers have no say in
    for index, number in enumerate(layers):
        path = fd_path(directories.fd(number))
        marked = not verbatim and layer_xattr(path, b"opaque") is not None
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name in closed:
                    continue
                kind = dtype_of(entry)
                if kind == DT_DIR:
                    types[name] = kind
                    found.setdefault(name, []).append(index)
                    lowest = verbatim or index + 1 == len(layers)
                    if not lowest and layer_xattr(entry.path, b"opaque") == b"y":
                        closed.add(name)
                    continue
                closed.add(name)
                hidden = not verbatim and _is_whiteout(entry, kind, marked=marked)
                if name not in found and not hidden:
                    types[name] = kind
                    found[name] = [index]
    return Listing(sorted(found), types, found)


def _list_one(path: bytes, *, verbatim: bool) -> Listing:
    types = {}
    marked: bool | None = None
    with os.scandir(path) as entries:
        for entry in entries:
            kind = dtype_of(entry)
            if not verbatim and kind == _DT_CHR and _is_whiteout(entry, kind, marked=False):
                continue
            if not verbatim and kind == _DT_REG:
                if marked is None:
                    marked = layer_xattr(path, b"opaque") is not None
                if marked and _is_whiteout(entry, kind, marked=True):
                    continue
            types[entry.name] = kind
    return Listing(sorted(types), types, None)


def _is_whiteout(entry: os.DirEntry[bytes], kind: int, *, marked: bool) -> bool:
    """Whether an entry says that its name is gone; files can only in a directory so `marked`."""
    if kind == _DT_CHR or (marked and kind == _DT_REG):
        return is_whiteout(entry.path, entry.stat(follow_symlinks=False))
    return False


def point_listing(listing: Listing, point: MapPoint | None) -> Listing:
    """Add the directories that maps put into this one."""
    if point is None or not point.below:
        return listing
    types = listing.types | dict.fromkeys(point.below, DT_DIR)
    return listing._replace(names=sorted(types), types=types)
