"""What a guest wrote to its own RAM or disk, read from there while it runs.

Where the root, or a pack, is an overlay of the guest's (mounts.py, pack_mounts.py), its changes lie
in the overlay's upper directory, which no path leads to any more once PID 1 has moved to the root.
So PID 1 holds each upper directory open, and here it is found behind /proc/1/fd; which overlay it
belongs to, /proc/1/mountinfo says (proc(5)). The form is overlayfs's (whiteout.py); a directory
renamed from below has its contents there still, so of that one all is given as the guest sees it.

Whether a name is added or changed is told by the read trees of this computer: what only a pack has
beneath counts as added. As all that comes from a guest, none of this is believed beyond what
guest_files.py checks.
"""

import os
import stat
from collections.abc import Generator, Iterator, Sequence
from io import BufferedReader, RawIOBase
from typing import IO

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.maps import Path
from tinyvmm.fileserver.tree import Node
from tinyvmm.fileserver.union import open_tree
from tinyvmm.fileserver.whiteout import PRIVATE_XATTRS
from tinyvmm.fileserver.written import ADDED, CHANGED, Change, Deleted, find_below, names_below
from tinyvmm.inside.guest_calls import Guest, entries, read_file, readlinkat
from tinyvmm.inside.guest_files import walk
from tinyvmm.mountinfo import mounts, unescape
from tinyvmm.tree_entries import Entry

OPAQUE, REDIRECT = "trusted.overlay.opaque", "trusted.overlay.redirect"
_MOUNTINFO_MAX = 1 << 20
_FD = "/proc/1/fd"


class GuestChange:
    """A file in the guest that it changed; good until the next one is asked for."""

    implied = False

    def __init__(
        self, kind: str, path: bytes, entry: Entry, st: os.stat_result, *, opaque: bool
    ) -> None:
        self.kind = kind
        self.path = path
        self.opaque = opaque
        self.stat: os.stat_result | None = st
        self._entry = entry

    def xattrs(self) -> dict[bytes, bytes]:
        """Return its extended attributes, those of layers left out."""
        found = {os.fsencode(name): value for name, value in self._entry.xattrs.items()}
        return {name: v for name, v in found.items() if not name.startswith(PRIVATE_XATTRS)}

    def target(self) -> bytes:
        """Return what a symbolic link holds."""
        return os.fsencode(self._entry.target)

    def open(self) -> IO[bytes]:
        """Open a regular file's contents, to read once from the beginning on."""
        return BufferedReader(_Contents(self._entry), 1 << 17)


class _Contents(RawIOBase):
    """The contents of an entry: its pieces, and zeros where there are none, `size` bytes."""

    def __init__(self, entry: Entry) -> None:
        self._pieces = entry.pieces()
        self._size = entry.size
        self._at = 0
        self._offset = 0
        self._data = b""

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill `buffer` with what comes next."""
        while self._offset + len(self._data) <= self._at:
            piece = next(self._pieces, None)
            self._offset, self._data = piece or (self._size, b"")
            if piece is None:
                break
        count = min(len(buffer), self._size - self._at)
        if self._at < self._offset:
            count = min(count, self._offset - self._at)
            buffer[:count] = bytes(count)
        else:
            start = self._at - self._offset
            piece_data = self._data[start : start + count]
            count = len(piece_data)
            buffer[:count] = piece_data
        self._at += count
        return count


def list_guest_changes(
    guest: Guest, reads: Sequence[tuple[Path, Path]]
) -> Generator[Change, None, None]:
    """List what is in the guest's upper directories, above the read trees of this computer.

    Nothing if it has none. ConfigError for what cannot be read.
    """
    found = uppers(guest)
    if not found:
        return
    below = open_tree(reads, [])
    try:
        for mounted, upper in found:
            yield from _Lister(guest, below.root(), mounted, upper).changes()
    finally:
        below.close()


def uppers(guest: Guest) -> list[tuple[str, str]]:
    """Return where overlays of PID 1's making are, and a path to the upper directory of each."""
    try:
        overlays = _overlays(read_file(guest, "/proc/1/mountinfo", _MOUNTINFO_MAX))
        found = []
        for name in sorted(entries(guest, _FD)):
            (link,) = guest.all([readlinkat(f"{_FD}/{name}")])
            upper = os.fsdecode(link.data.partition(b"\0")[0]) if link.result > 0 else ""
            if upper in overlays:
                found.append((overlays[upper], f"{_FD}/{name}/."))
    except OSError as error:
        raise ConfigError(f"cannot find what the guest wrote: {error.strerror}") from None
    return sorted(found)


def _overlays(table: bytes) -> dict[str, str]:
    """Return upper directory -> mount point of each overlay (mountinfo.py)."""
    found = {}
    for mount in mounts(table.split(b"\n")):
        for option in mount.options.split(b","):
            if mount.kind == "overlay" and option.startswith(b"upperdir="):
                upper = unescape(option.removeprefix(b"upperdir="))
                found[os.fsdecode(upper)] = os.fsdecode(mount.point)
    return found


class _Lister:
    """Lists one upper directory."""

    def __init__(self, guest: Guest, below: Node, mounted: str, upper: str) -> None:
        self._guest = guest
        self._below = below
        self._mounted = mounted.rstrip("/")
        self._upper = upper
        self._files = 0
        self._inodes: dict[tuple[str, ...], int] = {}

    def changes(self) -> Iterator[Change]:
        """List it; the reference to `below` is given back."""
        hidden: list[tuple[str, ...]] = []  # directories nothing beneath shows in
        skipped: tuple[str, ...] | None = None
        try:
            for entry in walk(self._guest, self._upper, every_xattr=True):
                path = entry.path
                if not path or (skipped is not None and path[: len(skipped)] == skipped):
                    continue
                while hidden and path[: len(hidden[-1])] != hidden[-1]:
                    hidden.pop()
                if stat.S_ISCHR(entry.mode) and entry.rdev == 0:
                    # There is none where nothing is below, be it a pack's.
                    yield Deleted(self._path(path), implied=bool(hidden))
                    continue
                redirected = REDIRECT in entry.xattrs
                opaque = redirected or entry.xattrs.get(OPAQUE) == b"y"
                yield self._change(entry, path, opaque=opaque and stat.S_ISDIR(entry.mode))
                if redirected:
                    skipped = path
                    yield from self._whole(path)
                elif opaque:
                    hidden.append(path)
                if hidden and stat.S_ISDIR(entry.mode):
                    yield from self._gone(path)
        finally:
            self._below.close()

    def _whole(self, path: tuple[str, ...]) -> Iterator[Change]:
        """List all that is in a directory as the guest sees it."""
        seen = os.path.join(self._mounted or "/", *path)
        for entry in walk(self._guest, seen, every_xattr=True):
            if entry.path:
                yield self._change(entry, (*path, *entry.path), opaque=False)

    def _gone(self, path: tuple[str, ...]) -> Iterator[Change]:
        """List what beneath is hidden by a directory and has nothing in its place."""
        lower = find_below(self._below.retain(), self._path(path))
        if lower is None:
            return
        try:
            names = names_below(lower)
        finally:
            lower.close()
        if not names:
            return
        there = set(map(os.fsencode, entries(self._guest, os.path.join(self._upper, *path))))
        for name in sorted(names - there):
            yield Deleted(self._path(path) + b"/" + name, implied=True)

    def _change(self, entry: Entry, path: tuple[str, ...], *, opaque: bool) -> GuestChange:
        kind = CHANGED if self._is_below(path) else ADDED
        link = None if entry.link is None else (*path[: len(path) - len(entry.path)], *entry.link)
        number = self._inodes.get(link) if link is not None else None
        if number is None:
            self._files += 1
            number = self._files
        if not stat.S_ISDIR(entry.mode):
            self._inodes[path] = number
        st = os.stat_result(
            # What has other names is known only when they come: each may have some.
            (entry.mode, number, 0, 2, entry.uid, entry.gid, entry.size, *_seconds(entry)),
            {
                "st_atime_ns": entry.atime_ns,
                "st_mtime_ns": entry.mtime_ns,
                "st_ctime_ns": entry.mtime_ns,
                "st_rdev": entry.rdev,
            },
        )
        return GuestChange(kind, self._path(path), entry, st, opaque=opaque)

    def _is_below(self, path: tuple[str, ...]) -> bool:
        found = find_below(self._below.retain(), self._path(path))
        if found is not None:
            found.close()
        return found is not None

    def _path(self, path: tuple[str, ...]) -> bytes:
        return os.fsencode("/".join((self._mounted, *path)))


def _seconds(entry: Entry) -> tuple[int, int, int]:
    seconds = entry.mtime_ns // 10**9
    return (entry.atime_ns // 10**9, seconds, seconds)
