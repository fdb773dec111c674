"""Where host directories appear in a union: `[GUEST=]HOST` maps, by longest prefix.

The maps become a small tree of `MapPoint`s, one for each guest path named by a map and for each
directory on the way to it. Guest paths are compared whole component by whole component: a map at
/data says nothing about /database. Directories mapped to one guest path are united, the later over
the earlier; a map deeper down hides what is mapped above it.
"""

import os
from collections.abc import Iterable, Iterator

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.beside import Notes, notes_of
from tinyvmm.fileserver.writetree import WriteTree

Path = str | bytes

UPPER = -1
"""In place of the number of a parent's lower layer: the parent's upper layer."""


class Layers:
    """The descriptors of one directory's layers, and how each was found."""

    __slots__ = ("found", "lowers", "notes", "upper", "veiled")

    def __init__(self) -> None:
        self.upper = -1
        self.lowers: list[int] = []
        self.notes: list[Notes | None] = []  # of each lower layer
        self.found: list[tuple[int, int, int]] = []  # the parent's layer, st_dev, st_ino
        self.veiled: os.stat_result | None = None  # of a write tree met in a read tree

    def add_upper(self, fd: int, st: os.stat_result) -> None:
        """Take over the upper layer's descriptor."""
        self.upper = fd
        self.found.insert(0, (UPPER, st.st_dev, st.st_ino))

    def add_lower(self, fd: int, st: os.stat_result, layer: int, notes: Notes | None) -> None:
        """Take over the descriptor found in the parent's lower `layer`, of a tree with `notes`."""
        self.lowers.append(fd)
        self.notes.append(notes)
        self.found.append((layer, st.st_dev, st.st_ino))

    def fds(self) -> list[int]:
        """The descriptors, the uppermost first: as many as `found`, in the same order."""
        return self.lowers if self.upper < 0 else [self.upper, *self.lowers]

    def drop_lowers(self) -> None:
        """Close the lower layers for good."""
        for fd in self.lowers:
            os.close(fd)
        self.lowers = []
        self.notes = []
        self.found = [entry for entry in self.found if entry[0] == UPPER]

    def close(self) -> None:
        """Close all layers."""
        if self.upper >= 0:
            os.close(self.upper)
        for fd in self.lowers:
            os.close(fd)
        self.upper = -1
        self.lowers = []


class MapPoint:
    """One directory of the guest that a map names or leads through."""

    def __init__(self, space: int) -> None:
        """Begin with nothing mapped; `space` tells inodes read here from others (see qids)."""
        self.space = space
        self.reads: list[tuple[int, Notes | None]] = []  # O_PATH; the first searched first
        self.write: WriteTree | None = None
        self.below: dict[bytes, MapPoint] = {}

    def add_layers(self, layers: Layers) -> None:
        """Add what is mapped here: descriptors of the roots for `layers` to own."""
        if self.write is not None:
            fd = os.dup(self.write.fd)
            layers.add_upper(fd, os.fstat(fd))
        for number, (read, notes) in enumerate(self.reads):
            fd = os.dup(read)
            layers.add_lower(fd, os.fstat(fd), number, notes)

    def close(self) -> None:
        """Close every tree mapped here and below."""
        for fd, _ in self.reads:
            os.close(fd)
        if self.write is not None:
            self.write.close()
        for point in self.below.values():
            point.close()

    def walk(self) -> "Iterator[MapPoint]":
        """This point and all below."""
        yield self
        for point in self.below.values():
            yield from point.walk()

    def writes(self) -> "Iterator[WriteTree]":
        """The write trees here and below."""
        return (point.write for point in self.walk() if point.write is not None)


def build_map(reads: Iterable[tuple[Path, Path]], writes: Iterable[tuple[Path, Path]]) -> MapPoint:
    """Open every host directory and arrange them; raises ConfigError for what cannot be mapped."""
    root = MapPoint(0)
    points = [root]
    try:
        for guest, host in reads:
            point = _point(root, points, guest)
            fd = _open_read(os.fsencode(host))
            point.reads.insert(0, (fd, notes_of(fd)))
        for guest, host in writes:
            point = _point(root, points, guest)
            _set_write(point, guest, WriteTree(os.fsencode(host), -len(points)))
            points.append(point)  # the next space is another's
    except BaseException:
        root.close()
        raise
    return root


def _set_write(point: MapPoint, guest: Path, write: WriteTree) -> None:
    if point.write is not None:
        write.close()
        shown = os.fsdecode(guest)
        raise ConfigError(f"two write trees at {shown}: each place in the guest can have one")
    point.write = write


def _point(root: MapPoint, points: list[MapPoint], guest: Path) -> MapPoint:
    shown = os.fsdecode(guest)
    if not shown.startswith("/"):
        raise ConfigError(f"map to {shown!r}: a path in the guest starts with a slash")
    point = root
    for name in os.fsencode(guest).split(b"/"):
        if name in {b"", b"."}:
            continue
        if name == b".." or b"\0" in name:
            raise ConfigError(f"map to {shown!r}: not a plain path in the guest")
        if name not in point.below:
            point.below[name] = MapPoint(len(points))
            points.append(point.below[name])
        point = point.below[name]
    return point


def _open_read(host: bytes) -> int:
    shown = os.fsdecode(host)
    try:
        fd = os.open(host, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"read tree {shown}: {reason}; name a directory you can read") from None
    try:
        os.close(os.open(b"/proc/self/fd/%d" % fd, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except NotADirectoryError:
        os.close(fd)
        raise ConfigError(f"read tree {shown}: a file; map the directory it is in") from None
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"read tree {shown}: {error.strerror}; name a directory you can read"
        ) from None
    return fd
