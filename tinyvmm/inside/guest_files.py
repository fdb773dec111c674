"""Trees of files in and out of a guest that runs, by calls of its kernel (guest_calls.py).

`put` makes entries (tree_entries.py) in the guest, `walk` gives those of a tree in it. Calls are
sent ahead of their answers, so that many small files cost few round trips.

A guest may be hostile, and a tree that it shows need not exist: it is given up beyond `ENTRIES_MAX`
entries or `DEPTH_MAX` directories in each other; no file goes on beyond the size that was told
first, and names are checked as they come. What it cannot do beside that is tree_entries.save's
business.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.inside.guest_calls import (
    ENTRIES_MAX,
    PIECE,
    Call,
    Guest,
    Slot,
    Stat,
    close,
    entries,
    fchmodat,
    fchownat,
    ftruncate,
    lgetxattr,
    linkat,
    llistxattr,
    lseek,
    lsetxattr,
    mkdirat,
    mknodat,
    newfstatat,
    openat,
    parse_stat,
    pread64,
    pwrite64,
    read_file,
    readlinkat,
    symlinkat,
    unlinkat,
    utimensat,
)
from tinyvmm.tree_entries import Entry, Path, Pieces, no_pieces

DEPTH_MAX = 200
_XATTRS_MAX = 64  # of one file
_AT_ONCE = 256  # entries of a directory that are looked at before they are given
_FILE = Slot(1)

# What may fail without harm: what is to be replaced is not there; a directory is there already;
# not every file system keeps owners, and few keep extended attributes.
_ABSENT = frozenset({errno.ENOENT})
_PRESENT = frozenset({errno.EEXIST})
_OWNERS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EINVAL})
_XATTRS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENODATA, errno.E2BIG, errno.ERANGE})
_NONE: frozenset[int] = frozenset()


class _Step(NamedTuple):
    call: Call
    tolerates: frozenset[int] = _NONE
    expects: int = 0  # the least result that is success


# --- in ---------------------------------------------------------------------------------------
def put(guest: Guest, tree: Iterable[Entry], top: str) -> None:
    """Make a tree at `top`, whose parent is there; directories that are there are added to.

    Files are replaced. ConfigError names what failed.
    """
    waiting: deque[_Step] = deque()

    def calls() -> Iterator[Call]:
        for step in _steps(tree, top, existing=existing):
            waiting.append(step)
            yield step.call

    existing = look(guest, top) is not None
    for answer in guest.each(calls()):
        step = waiting.popleft()
        if answer.result < step.expects and -answer.result not in step.tolerates:
            # A file system that is full takes the first part of a piece.
            error = -answer.result if answer.result < 0 else errno.ENOSPC
            raise ConfigError(f"cannot make {answer.what}: {os.strerror(error)}")


def look(guest: Guest, path: str) -> Stat | None:
    """Return what `path` leads to, None if that is nothing."""
    (answer,) = guest.all([newfstatat(path, 0)])
    if answer.result < 0:
        if -answer.result in {errno.ENOENT, errno.ENOTDIR}:
            return None
        raise ConfigError(f"cannot look at {path}: {os.strerror(-answer.result)}")
    return parse_stat(answer.data)


def _steps(tree: Iterable[Entry], top: str, *, existing: bool) -> Iterator[_Step]:
    directories = []
    for entry in tree:
        path = os.path.join(top, *entry.path)
        if stat.S_ISDIR(entry.mode):
            yield _Step(mkdirat(path, 0o700), _PRESENT)
            yield _Step(openat(path, os.O_RDONLY | os.O_DIRECTORY, into=1))
            yield _Step(close(_FILE))
            if entry.path or not existing:
                directories.append((path, entry))
            continue
        if stat.S_ISSOCK(entry.mode):
            continue  # nobody would listen there
        yield _Step(unlinkat(path), _ABSENT)
        if entry.link is not None:
            yield _Step(linkat(os.path.join(top, *entry.link), path))
            continue
        if stat.S_ISREG(entry.mode):
            yield from _write(entry, path)
        elif stat.S_ISLNK(entry.mode):
            yield _Step(symlinkat(entry.target, path))
        else:
            yield _Step(mknodat(path, stat.S_IFMT(entry.mode) | 0o600, entry.rdev))
        yield from _attributes(entry, path)
    for path, entry in reversed(directories):
        yield from _attributes(entry, path)


def _write(entry: Entry, path: str) -> Iterator[_Step]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    yield _Step(openat(path, flags, 0o600, into=1))
    end = 0
    for offset, data in entry.pieces():
        yield _Step(pwrite64(_FILE, data, offset)._replace(what=path), expects=len(data))
        end = offset + len(data)
    if entry.size > end:
        yield _Step(ftruncate(_FILE, entry.size)._replace(what=path))
    yield _Step(close(_FILE))


def _attributes(entry: Entry, path: str) -> Iterator[_Step]:
    yield _Step(fchownat(path, entry.uid, entry.gid), _OWNERS)
    if not stat.S_ISLNK(entry.mode):
        yield _Step(fchmodat(path, entry.mode & 0o7777), _OWNERS)
    for name, value in entry.xattrs.items():
        yield _Step(lsetxattr(path, name, value), _XATTRS)
    yield _Step(utimensat(path, entry.atime_ns, entry.mtime_ns), _OWNERS)


# --- out --------------------------------------------------------------------------------------
def walk(guest: Guest, top: str, *, every_xattr: bool = False) -> Iterator[Entry]:
    """Give the tree at `top` in the guest. ConfigError for what cannot be read.

    With `every_xattr` entries have all extended attributes, not just the user's.
    """
    answer = guest.all([newfstatat(top)])[0]
    if answer.result < 0:
        raise ConfigError(f"cannot read {top} in the guest: {os.strerror(-answer.result)}")
    # A directory's path is held once, whatever is in it: the guest may show a million names there.
    seen: dict[tuple[int, int], tuple[Path, str]] = {}
    todo: list[tuple[Path, Iterator[tuple[str, Stat]]]] = []
    todo.append(((), iter([("", parse_stat(answer.data))])))
    count = 1
    while todo:
        parent, inside = todo[-1]
        following = next(inside, None)
        if following is None:
            todo.pop()
            continue
        name, found = following
        path = (*parent, name) if len(todo) > 1 else ()
        where = os.path.join(top, *path)
        entry = _entry(guest, where, path, found, b"" if every_xattr else b"user.")
        if stat.S_ISDIR(found.mode):
            names = _look_inside(guest, where, ENTRIES_MAX - count)
            count += len(names)
            if len(path) >= DEPTH_MAX:
                raise ConfigError(f"{top} in the guest has more than {DEPTH_MAX} levels: given up")
            todo.append((path, _look_at(guest, where, names)))
        elif found.nlink > 1:
            above, known = seen.setdefault((found.dev, found.ino), (parent, name))
            if (above, known) != (parent, name):
                entry = entry._replace(link=(*above, known))
        yield entry


def _look_inside(guest: Guest, path: str, limit: int) -> list[str]:
    """Return the names in a directory, sorted."""
    names: set[str] = set()
    try:
        for name in entries(guest, path):
            if len(names) >= limit:
                raise ConfigError(f"more than {ENTRIES_MAX} files in the guest: given up at {path}")
            names.add(name)
    except OSError as error:
        raise ConfigError(f"cannot read {path} in the guest: {error.strerror}") from None
    return sorted(names)


def _look_at(guest: Guest, path: str, names: list[str]) -> Iterator[tuple[str, Stat]]:
    """Give what is in a directory; what goes meanwhile was not there."""
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        answers = guest.all(newfstatat(os.path.join(path, name)) for name in some)
        for name, answer in zip(some, answers, strict=True):
            if answer.result >= 0:
                yield name, parse_stat(answer.data)


def _entry(guest: Guest, name: str, path: Path, found: Stat, prefix: bytes) -> Entry:
    names, target = guest.all([llistxattr(name), readlinkat(name)])
    keys = [os.fsdecode(key) for key in names.data.split(b"\0") if key and key.startswith(prefix)]
    values = guest.all(lgetxattr(name, key) for key in keys[:_XATTRS_MAX])
    size, pieces = 0, no_pieces
    if stat.S_ISREG(found.mode):
        size, pieces = found.size, _reader(guest, name, found)
        if size == 0 and not path:
            size, pieces = _unsized(guest, name)
    return Entry(
        path=path,
        mode=found.mode,
        uid=found.uid,
        gid=found.gid,
        size=size,
        atime_ns=found.atime_ns,
        mtime_ns=found.mtime_ns,
        rdev=found.rdev,
        target=os.fsdecode(target.data.partition(b"\0")[0]),
        xattrs={
            key: answer.data
            for key, answer in zip(keys, values, strict=False)
            if answer.result >= 0
        },
        pieces=pieces,
    )


def _unsized(guest: Guest, name: str) -> tuple[int, Pieces]:
    """Read what may be a file of /proc, which says it is empty."""
    try:
        data = read_file(guest, name, 8 * PIECE)
    except OSError as error:
        raise ConfigError(f"cannot read {name} in the guest: {error.strerror}") from None
    return len(data), lambda: iter([(0, data)])


def _reader(guest: Guest, name: str, found: Stat) -> Pieces:
    def pieces() -> Iterator[tuple[int, bytes]]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = guest.do(openat(name, flags)).result
            if found.blocks * 512 < found.size:
                for start, end in _extents(guest, fd, found.size):
                    for offset, data in _read(guest, fd, start, end):
                        if data.count(0) < len(data):  # over 9P nothing tells of a hole
                            yield offset, data
            else:
                yield from _read(guest, fd, 0, found.size)
            guest.do(close(fd))
        except OSError as error:
            raise ConfigError(f"cannot read {name} in the guest: {error.strerror}") from None

    return pieces


def _extents(guest: Guest, fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Give where there is data, not holes: lseek(2), SEEK_DATA."""
    end = 0
    while end < size:
        (found,) = guest.all([lseek(fd, end, os.SEEK_DATA)])
        if found.result == -errno.ENXIO:
            return
        start = found.check().result
        stop = guest.do(lseek(fd, start, os.SEEK_HOLE)).result
        if not end <= start < stop:
            raise ConfigError("the guest answered with no extent of a file")
        end = min(stop, size)
        if start < end:
            yield start, end


def _read(guest: Guest, fd: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Give the bytes from `start` to `end`, or where the file ends before."""
    over = False

    def calls() -> Iterator[Call]:
        for offset in range(start, end, PIECE):
            if over:
                return
            yield pread64(fd, min(PIECE, end - offset), offset)

    offset = start
    for answer in guest.each(calls()):
        data = answer.check().data
        over = over or len(data) < min(PIECE, end - offset)
        if data:
            yield offset, data
        offset += PIECE
