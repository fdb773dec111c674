"""Trees of files as a stream of entries, read from this computer and written to it: tinyvmm cp.

    walk_host(path)      ──┐                        ┌──> save(entries, path)
    tree_tar.read(file)  ──┼──> Iterator[Entry] ────┼──> tree_tar.write(entries, file)
    guest_files.walk(...) ─┘                        └──> guest_files.put(...)

A directory comes before what is in it, and all of that comes before anything else; the first entry
is the tree itself, its path (). An entry's `pieces` are to be read before the next entry is asked
for. Where a tree came from a guest nothing of it is believed, and `save` is where that counts: a
path has no component that leads elsewhere, no symbolic link is followed, nothing gets set-id bits,
and no device is made.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from tinyvmm.errors import ConfigError

PIECE = 1 << 17  # bytes of a file at once
_KEPT_XATTRS = ("user.", "security.capability", "system.posix_acl_")
Path = tuple[str, ...]
Pieces = Callable[[], Iterator[tuple[int, bytes]]]


def no_pieces() -> Iterator[tuple[int, bytes]]:
    """Give the content of what has none."""
    return iter(())


class Entry(NamedTuple):
    """A file of whatever kind; times in nanoseconds since 1970."""

    path: Path
    mode: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    rdev: int = 0
    target: str = ""
    """Of a symbolic link."""
    link: Path | None = None
    """The path of an earlier entry that is the same file."""
    xattrs: Mapping[str, bytes] = {}
    pieces: Pieces = no_pieces
    """Offset and data of what a regular file holds, in order; the rest is zeros."""

    def __str__(self) -> str:
        return "/".join(self.path) or "."


# --- from this computer -----------------------------------------------------------------------
def walk_host(top: str) -> Iterator[Entry]:
    """Give the tree at `top`. ConfigError, which names it, for what cannot be read."""
    # A directory's path is held once, however many names are in it.
    seen: dict[tuple[int, int], tuple[Path, str]] = {}
    todo: list[tuple[Path, Iterator[str]]] = [((), iter(("",)))]
    while todo:
        parent, names = todo[-1]
        last = next(names, None)
        if last is None:
            todo.pop()
            continue
        path = (*parent, last) if last else ()
        name = os.path.join(top, *path)
        try:
            found = os.lstat(name)
            target = os.readlink(name) if stat.S_ISLNK(found.st_mode) else ""
            if stat.S_ISDIR(found.st_mode):
                todo.append((path, iter(sorted(os.listdir(name)))))
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from None
        link = None
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            above, known = seen.setdefault((found.st_dev, found.st_ino), (parent, last))
            if (above, known) != (parent, last):
                link = (*above, known)
        yield Entry(
            path=path,
            mode=found.st_mode,
            uid=found.st_uid,
            gid=found.st_gid,
            size=found.st_size if stat.S_ISREG(found.st_mode) else 0,
            atime_ns=found.st_atime_ns,
            mtime_ns=found.st_mtime_ns,
            rdev=found.st_rdev,
            target=target,
            link=link,
            xattrs=_xattrs(name),
            pieces=_reader(name, found.st_size) if stat.S_ISREG(found.st_mode) else no_pieces,
        )


def _xattrs(name: str) -> dict[str, bytes]:
    """Return the extended attributes that a copy keeps; none where there is no such thing."""
    found = {}
    with suppress(OSError):
        for key in os.listxattr(name, follow_symlinks=False):
            if key.startswith(_KEPT_XATTRS):
                found[key] = os.getxattr(name, key, follow_symlinks=False)
    return found


def _reader(name: str, size: int) -> Pieces:
    def pieces() -> Iterator[tuple[int, bytes]]:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                yield from _pieces(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from None

    return pieces


def _pieces(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Give what is in a file, up to `size`, without its holes (lseek(2), SEEK_DATA)."""
    offset = end = 0
    while offset < size:
        if offset >= end:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from there on
                    return
                raise
            end = os.lseek(fd, offset, os.SEEK_HOLE)
        data = os.pread(fd, min(PIECE, end - offset, size - offset), offset)
        if not data:
            return
        yield offset, data
        offset += len(data)


# --- to this computer -------------------------------------------------------------------------
def save(entries: Iterable[Entry], top: str, warn: Callable[[str], None]) -> None:
    """Make the tree at `top`, whose parent is there; directories that are there are added to.

    Files are replaced as a whole. Owners are kept if we are root. ConfigError names what failed.
    """
    _Saver(top, warn).save(entries)


class _Saver:
    """`_open` are the directories from the top to where we are: entry, descriptor, if it is new."""

    def __init__(self, top: str, warn: Callable[[str], None]) -> None:
        self._top = top
        self._warn = warn
        self._open: list[tuple[Entry, int, bool]] = []

    def save(self, entries: Iterable[Entry]) -> None:
        entry = None
        parent, self._name = os.path.split(self._top)
        try:
            self._parent = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot write to {parent}: {error.strerror}") from None
        try:
            for entry in entries:
                _check(entry.path)
                while self._open and self._open[-1][0].path != entry.path[:-1]:
                    self._leave()
                self._make(entry)
            while self._open:
                self._leave()
        except OSError as error:
            what = os.path.join(self._top, *(entry.path if entry else ()))
            raise ConfigError(f"cannot write {what}: {error.strerror}") from None
        except OverflowError as error:  # an owner or a time that there cannot be
            raise ConfigError(f"cannot write {entry}: {error}") from None
        finally:
            for _, fd, _ in self._open:
                os.close(fd)
            os.close(self._parent)

    def _make(self, entry: Entry) -> None:
        if bool(self._open) != bool(entry.path):
            raise ConfigError(f"{entry} comes before its directory")
        at = self._open[-1][1] if self._open else self._parent
        name = entry.path[-1] if entry.path else self._name
        if stat.S_ISDIR(entry.mode):
            self._enter(entry, at, name)
            return
        with suppress(FileNotFoundError):
            there = os.lstat(name, dir_fd=at).st_mode
            alike = stat.S_ISFIFO(there) and stat.S_ISFIFO(entry.mode)
            if not stat.S_ISREG(there) and not stat.S_ISLNK(there) and not alike:
                raise OSError(errno.EEXIST, "there is something else by that name")
        temporary = f".tinyvmm-{os.urandom(6).hex()}"
        try:
            if self._fill(entry, at, temporary):
                os.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=at)
            raise

    def _fill(self, entry: Entry, at: int, name: str) -> bool:
        """Make what is no directory, under a name that is not its own yet."""
        if entry.link is not None:
            self._link(entry.link, at, name)
        elif stat.S_ISREG(entry.mode):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=at)
            try:
                for offset, data in entry.pieces():
                    rest = memoryview(data)
                    while rest:
                        written = os.pwrite(fd, rest, offset)
                        offset += written  # noqa: PLW2901 (the rest goes behind it)
                        rest = rest[written:]
                os.ftruncate(fd, entry.size)
                _set_attributes(fd, entry)
            finally:
                os.close(fd)
        elif stat.S_ISLNK(entry.mode):
            os.symlink(entry.target, name, dir_fd=at)
            if os.geteuid() == 0:
                os.chown(name, entry.uid, entry.gid, dir_fd=at, follow_symlinks=False)
            times = entry.atime_ns, entry.mtime_ns
            os.utime(name, ns=times, dir_fd=at, follow_symlinks=False)
        elif stat.S_ISFIFO(entry.mode):
            os.mkfifo(name, entry.mode & 0o777, dir_fd=at)
        else:
            self._warn(f"{entry} is a device or a socket: left out")
            return False
        return True

    def _link(self, old: Path, at: int, name: str) -> None:
        """Link to what was saved before, along directories only."""
        _check(old)
        if not old:
            raise ConfigError("a tree cannot be a link to itself")
        fd = os.dup(self._open[0][1])
        try:
            for component in old[:-1]:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                down = os.open(component, flags, dir_fd=fd)
                os.close(fd)
                fd = down
            os.link(old[-1], name, src_dir_fd=fd, dst_dir_fd=at, follow_symlinks=False)
        finally:
            os.close(fd)

    def _enter(self, entry: Entry, at: int, name: str) -> None:
        new = True
        try:
            os.mkdir(name, 0o700, dir_fd=at)
        except FileExistsError:
            new = False
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if entry.path:  # whoever named the top meant what it leads to
            flags |= os.O_NOFOLLOW
        self._open.append((entry, os.open(name, flags, dir_fd=at), new))

    def _leave(self) -> None:
        """A directory gets its mode and times when nothing more comes into it."""
        entry, fd, new = self._open.pop()
        try:
            if new:
                _set_attributes(fd, entry)
        finally:
            os.close(fd)


def _set_attributes(fd: int, entry: Entry) -> None:
    if os.geteuid() == 0:
        os.fchown(fd, entry.uid, entry.gid)
    os.fchmod(fd, entry.mode & 0o1777)
    for name, value in entry.xattrs.items():
        if name.startswith("user."):  # others may be rights
            with suppress(OSError):  # not every file system has them
                os.setxattr(fd, name, value)
    os.utime(fd, ns=(entry.atime_ns, entry.mtime_ns))


def _check(path: Path) -> None:
    for component in path:
        if component in {"", ".", ".."} or "/" in component or "\0" in component:
            raise ConfigError(f"{'/'.join(path)!r} is no path inside a tree")
