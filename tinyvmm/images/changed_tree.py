"""What a guest wrote as a directory of this computer: a read tree to lie over those it was above.

What is gone is a whiteout, a directory that hides what was there is opaque (whiteout.py); what this
computer does not let us make is kept beside the file (fileserver/beside.py). So a machine whose
read trees are those of the first and this one sees what the first machine's guest saw.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator

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


def fill_directory(changes: Iterable[Change], path: str, warn: Callable[[str], None]) -> int:
    """As `write_directory`, into a directory that is there and empty; OSError if it cannot be."""
    count = 0
    linked: dict[tuple[int, int], bytes] = {}
    with TreeWriter(path) as writer:
        for change in changes:
            if change.kind == DELETED:
                if not change.implied:
                    writer.whiteout(change.path[1:])
                    count += 1
            else:
                count += _add(writer, change, linked, warn)
        writer.finish()
    return count


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
    owner = Owner(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))
    attributes = Attributes(owner, clamp_time(st.st_mtime_ns), change.xattrs())
    first = path
    if kind != stat.S_IFDIR and st.st_nlink > 1:
        first = linked.setdefault((st.st_dev, st.st_ino), path)
    if first != path:
        writer.link(path, first)
    elif kind == stat.S_IFDIR:
        writer.directory(path, attributes)
        if change.opaque:
            writer.opaque(path)
    elif kind == stat.S_IFREG:
        writer.file(path, attributes, _pieces(change), st.st_size)
    elif kind == stat.S_IFLNK:
        writer.symlink(path, attributes, change.target())
    else:
        writer.special(path, kind, attributes, st.st_rdev)
    return 1


def _pieces(change: Change) -> Iterator[tuple[int, bytes]]:
    """Give what a file holds, in order; zeros become holes."""
    offset = 0
    with change.open() as contents:
        while data := contents.read(_PIECE):
            if data.strip(b"\0"):
                yield offset, data
            offset += len(data)
