"""What a guest wrote as a directory of this computer: a read tree to lie over those it was above.

What is gone is a whiteout, a directory that hides what was there is opaque (whiteout.py); what this
computer does not let us make is kept beside the file (fileserver/beside.py). So a machine whose
read trees are those of the first and this one sees what the first machine's guest saw.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.beside import Owner
from tinyvmm.fileserver.written import DELETED, Change
from tinyvmm.images.oci.tree_writer import Attributes, TreeWriter, clamp_time

_PIECE = 1 << 20


def write_directory(changes: Iterable[Change], path: str, warn: Callable[[str], None]) -> int:
    """Make a directory `path` of changes; how many. It appears there whole, or not at all.

    `warn` takes a line about what is left out: sockets. ConfigError if `path` is there and not
    empty, or cannot be made.
    """
    path = os.path.abspath(path)
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise ConfigError(f"{path} is there, and is no empty directory: name another")
        os.mkdir(draft)
        try:
            count = fill_directory(changes, draft, warn)
            os.rename(draft, path)
        finally:
            if os.path.exists(draft):
                shutil.rmtree(draft)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    return count


def fill_directory(
    changes: Iterable[Change], path: str, warn: Callable[[str], None], *, for_image: bool = False
) -> int:
    """As `write_directory`, into a directory that is there and empty; OSError if it cannot be.

    With `for_image` what is gone is said in an image that is made of it, and not here.
    """
    count = 0
    linked: dict[tuple[int, int], bytes] = {}
    with TreeWriter(path) as writer:
        whiteout, opaque = writer.whiteout, writer.opaque
        if for_image:
            whiteout, opaque = writer.gone, writer.hides
            changes = said_once(changes)
        for change in changes:
            if change.kind == DELETED:
                if not change.implied:
                    whiteout(change.path[1:])
                    count += 1
            else:
                count += _add(writer, change, linked, warn)
                if change.opaque:
                    opaque(change.path[1:])
        writer.finish()
    return count


def said_once(changes: Iterable[Change]) -> Iterator[Change]:
    """Leave out what is gone below an opaque directory, of which nothing shows anyway.

    Overlayfs hides whiteouts only where it merges.
    """
    hidden = b""
    for change in changes:
        below = bool(hidden) and change.path.startswith(hidden)
        if change.kind == DELETED and below:
            continue
        if change.opaque and not below:
            hidden = change.path + b"/"
        yield change


class Gone:
    """What is gone of write trees, as trees to lie over them where an image is made of them all."""

    def __init__(self, trees: Sequence[tuple[str, str]], where: str) -> None:
        """Of `trees`, (guest path, host directory) each; made in the directory `where`."""
        guests = {os.fsencode(guest).rstrip(b"/") for guest, _ in trees}
        self._guests = sorted(guests, key=len, reverse=True)
        self._where = where
        self._writers: dict[bytes, TreeWriter] = {}
        self._above: list[tuple[bytes, Attributes]] = []  # directories on the way to here

    def note(self, change: Change) -> None:
        """Take the next change."""
        path, st = change.path, change.stat
        while self._above and not path.startswith(self._above[-1][0] + b"/"):
            self._above.pop()
        if change.kind == DELETED:
            if not change.implied:
                writer, inner = self._writer(path)
                writer.gone(inner)
        elif st is not None and stat.S_ISDIR(st.st_mode):
            self._above.append((path, _attributes(st, change)))
            if change.opaque:
                writer, inner = self._writer(path)
                writer.hides(inner)

    def _writer(self, path: bytes) -> tuple[TreeWriter, bytes]:
        """The writer of the tree that `path` is in, which has the way there; the path in it."""
        guest = next(guest for guest in self._guests if path.startswith(guest + b"/"))
        if guest not in self._writers:
            top = os.path.join(self._where, str(len(self._writers)))
            os.mkdir(top)
            self._writers[guest] = TreeWriter(top)
        writer = self._writers[guest]
        for above, attributes in self._above:
            if len(above) > len(guest):
                writer.directory(above[len(guest) + 1 :], attributes)
        return writer, path[len(guest) + 1 :]

    def close(self) -> list[tuple[str, str]]:
        """Return the trees, (guest path, host directory) each."""
        trees = []
        for number, (guest, writer) in enumerate(self._writers.items()):
            with writer:
                writer.finish()
            trees.append((os.fsdecode(guest) or "/", os.path.join(self._where, str(number))))
        return trees


def _add(
    writer: TreeWriter,
    change: Change,
    linked: dict[tuple[int, int], bytes],
    warn: Callable[[str], None],
) -> int:
    """Make one file; 0 if it is left out."""
    st, path = change.stat, change.path[1:]
    if st is None:
        return 0
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFSOCK:
        warn(f"{os.fsdecode(change.path)} is a socket, where nobody listens any more: left out")
        return 0
    attributes = _attributes(st, change)
    first = path
    if kind != stat.S_IFDIR and st.st_nlink > 1:
        first = linked.setdefault((st.st_dev, st.st_ino), path)
    if first != path:
        writer.link(path, first)
    elif kind == stat.S_IFDIR:
        writer.directory(path, attributes)
    elif kind == stat.S_IFREG:
        writer.file(path, attributes, _pieces(change), st.st_size)
    elif kind == stat.S_IFLNK:
        writer.symlink(path, attributes, change.target())
    else:
        writer.special(path, kind, attributes, st.st_rdev)
    return 1


def _attributes(st: os.stat_result, change: Change) -> Attributes:
    owner = Owner(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))
    return Attributes(owner, clamp_time(st.st_mtime_ns), change.xattrs())


def _pieces(change: Change) -> Iterator[tuple[int, bytes]]:
    """Give what a file holds, in order; zeros become holes."""
    offset = 0
    with change.open() as contents:
        while data := contents.read(_PIECE):
            if data.strip(b"\0"):
                yield offset, data
            offset += len(data)
