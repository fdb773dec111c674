"""What a guest wrote: its write trees, entry by entry, beside the read trees beneath them.

    A  added: the read trees have nothing of that name
    C  changed: they have, and the guest sees this instead; directories on the way to a change too
    D  deleted: they have, and the guest sees nothing

Directories come before what is in them, names in their order as bytes. A write tree may be in use
meanwhile: it is read as it is found, one component at a time and never through a link, and what
vanishes on the way is passed over. `ChangedFile` is good until the next one is asked for.
"""

import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import IO, Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.beside import XATTR_PREFIX, notes_of, read_link
from tinyvmm.fileserver.hostfile import fd_path, open_path
from tinyvmm.fileserver.maps import Path
from tinyvmm.fileserver.ownership import Owners
from tinyvmm.fileserver.tree import Node
from tinyvmm.fileserver.union import open_tree
from tinyvmm.fileserver.whiteout import PRIVATE_XATTRS
from tinyvmm.fileserver.writetree import WrittenNames
from tinyvmm.ninep import QTDIR

ADDED, CHANGED, DELETED = "A", "C", "D"


class Change(Protocol):
    """One entry of what a guest wrote."""

    kind: str
    """ADDED, CHANGED or DELETED."""
    path: bytes
    """In the guest, from / on."""
    stat: os.stat_result | None
    """As the guest sees it; None for what is deleted."""
    opaque: bool
    """Whether it is a directory that hides all that was there."""
    implied: bool
    """Whether it is deleted because a directory above is opaque."""

    def xattrs(self) -> dict[bytes, bytes]:
        """Return its extended attributes, those of layers left out."""

    def target(self) -> bytes:
        """Return what a symbolic link holds."""

    def open(self) -> IO[bytes]:
        """Open a regular file's contents."""


class Deleted:
    """A name that the guest sees no more."""

    kind = DELETED
    stat: os.stat_result | None = None
    opaque = False

    def __init__(self, path: bytes, *, implied: bool) -> None:
        self.path = path
        self.implied = implied

    def xattrs(self) -> dict[bytes, bytes]:
        """None: there is nothing."""
        return {}

    def target(self) -> bytes:
        """FileNotFoundError: there is nothing."""
        raise FileNotFoundError(self.path)

    def open(self) -> IO[bytes]:
        """FileNotFoundError: there is nothing."""
        raise FileNotFoundError(self.path)


class Kept:
    """A directory that is remembered for longer than its lister does."""

    def __init__(self, change: Change) -> None:
        self.kind = change.kind
        self.path = change.path
        self.stat = change.stat
        self.opaque = change.opaque
        self.implied = change.implied
        self._xattrs = change.xattrs()

    def xattrs(self) -> dict[bytes, bytes]:
        """Return its extended attributes, as they were."""
        return self._xattrs

    def target(self) -> bytes:
        """IsADirectoryError: it is one."""
        raise IsADirectoryError(self.path)

    def open(self) -> IO[bytes]:
        """IsADirectoryError: it is one."""
        raise IsADirectoryError(self.path)


class ChangedFile:
    """A file of a write tree, by an O_PATH descriptor that its lister closes."""

    implied = False

    def __init__(
        self, kind: str, path: bytes, fd: int, st: os.stat_result, *, opaque: bool, noted: bool
    ) -> None:
        """`noted` says that the tree keeps things beside its files."""
        self.kind = kind
        self.path = path
        self.stat: os.stat_result | None = st
        self.opaque = opaque
        self._fd = fd
        self._noted = noted

    def xattrs(self) -> dict[bytes, bytes]:
        """Return its extended attributes, those of layers left out."""
        path = fd_path(self._fd)
        found = {}
        for shown in os.listxattr(path):
            name = os.fsencode(shown)
            if self._noted:
                name = name.removeprefix(XATTR_PREFIX)
            if not name.startswith(PRIVATE_XATTRS):
                with suppress(OSError):  # gone meanwhile
                    found[name] = os.getxattr(path, shown)
        return found

    def target(self) -> bytes:
        """Return what a symbolic link holds."""
        return read_link(self._fd)

    def open(self) -> IO[bytes]:
        """Open a regular file's contents."""
        return open(os.open(fd_path(self._fd), os.O_RDONLY | os.O_CLOEXEC), "rb")


def list_changes(
    reads: Sequence[tuple[Path, Path]], writes: Sequence[tuple[Path, Path]]
) -> Generator[Change, None, None]:
    """List what is in the write trees, (guest path, host directory) each, above the read trees.

    ConfigError for a tree that cannot be read.
    """
    below = open_tree(reads, [])
    try:
        for guest, host in sorted(writes):
            try:
                fd = os.open(host, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise ConfigError(
                    f"what the guest wrote to {os.fsdecode(guest)} cannot be read: "
                    f"{os.fsdecode(host)}: {error.strerror}"
                ) from None
            prefix = os.fsencode(guest).rstrip(b"/")
            lister = _Lister(WrittenNames(fd), Owners(notes_of(fd)))
            yield from lister.below(fd, prefix, find_below(below.root(), prefix))
    finally:
        below.close()


class _Level:
    """A directory being listed: its descriptor, what is below it, and the names still to come."""

    def __init__(self, fd: int, path: bytes, lower: Node | None, *, hidden: bool) -> None:
        self.fd = fd
        self.path = path
        self.lower = lower
        self.hidden = hidden
        """Whether the guest sees nothing of `lower`."""
        self.there: set[bytes] = set()
        self.names: list[bytes] = []

    def close(self) -> None:
        os.close(self.fd)
        if self.lower is not None:
            self.lower.close()


class _Lister:
    """Lists one write tree, with a stack of its own: a guest may dig deeper than ours goes."""

    def __init__(self, names: WrittenNames, owners: Owners) -> None:
        self._names = names
        self._owners = owners

    def below(self, fd: int, path: bytes, lower: Node | None) -> Iterator[Change]:
        """List what is in the directory `fd`; it and `lower` are ours to close."""
        stack = [self._level(fd, path, lower, hidden=self._names.is_opaque(fd))]
        try:
            while stack:
                level = stack[-1]
                if not level.names:
                    stack.pop().close()
                    continue
                name = level.names.pop()
                if name not in level.there:
                    yield Deleted(level.path + b"/" + name, implied=level.hidden)
                    continue
                with suppress(FileNotFoundError):
                    inner = yield from self._entry(level, name)
                    if inner is not None:
                        stack.append(inner)
        finally:
            for level in stack:
                level.close()

    def _entry(self, level: _Level, name: bytes) -> Generator[Change, None, _Level | None]:
        """Give the entry `name`; return the level of a directory."""
        fd = open_path(name, level.fd)
        lower = _entry_of(level.lower, name)
        try:
            st = self._owners.presented(fd, os.fstat(fd))
            is_directory = stat.S_ISDIR(st.st_mode)
            opaque = is_directory and self._names.is_opaque(fd)
            kind = ADDED if lower is None else CHANGED
            path = level.path + b"/" + name
            noted = self._owners.notes is not None
            yield ChangedFile(kind, path, fd, st, opaque=opaque, noted=noted)
            if not is_directory:
                return None
            inner = self._level(fd, path, lower, hidden=opaque or level.hidden)
            fd, lower = -1, None
            return inner
        finally:
            if fd >= 0:
                os.close(fd)
            if lower is not None:
                lower.close()

    def _level(self, fd: int, path: bytes, lower: Node | None, *, hidden: bool) -> _Level:
        """Read the directory `fd`; it and `lower` become the level's."""
        level = _Level(fd, path, lower, hidden=hidden)
        try:
            level.there, gone = self._names.index(fd)
            if lower is not None and hidden:
                gone |= names_below(lower) - level.there
            elif lower is None:
                gone = set()
        except BaseException:
            level.close()
            raise
        level.names = sorted(level.there | gone, reverse=True)
        return level


def find_below(node: Node, path: bytes) -> Node | None:
    """Return the node at `path` from `node` on, whose reference is taken over."""
    here: Node | None = node
    for name in path.split(b"/"):
        if name and here is not None:
            inner = _entry_of(here, name)
            here.close()
            here = inner
    return here


def _entry_of(directory: Node | None, name: bytes) -> Node | None:
    """Return an entry of the read trees, None if there is none."""
    if directory is None or not directory.qid().type & QTDIR:
        return None
    try:
        return directory.walk(name)
    except OSError:
        return None  # not there, or not to be seen


def names_below(directory: Node) -> set[bytes]:
    """Return the names in a directory of the read trees; none if it is none."""
    if not directory.qid().type & QTDIR:
        return set()
    file = directory.open(os.O_RDONLY)
    try:
        return {name for _, _, _, name in file.readdir(0)} - {b".", b".."}
    finally:
        file.close()
