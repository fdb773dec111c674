"""A tar archive as a stream of entries, and the other way round (tree_entries.py); - of tinyvmm cp.

Archives are read and written once, from beginning to end, so that pipes will do; written in the pax
format (POSIX.1-2001), with what does not fit it, the holes of files, as zeros. Extended attributes
whose names are no text, or hold a =, are left out: no record could hold them.
"""

import io
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import BinaryIO

from tinyvmm.errors import ConfigError
from tinyvmm.tree_entries import PIECE, Entry, Path, Pieces, no_pieces

XATTR = "SCHILY.xattr."  # as tar(1) of GNU and libarchive have them
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
}
DAMAGE = (
    *(tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, ValueError, TypeError, OverflowError, LookupError),
)
"""What tarfile raises for an archive that is damaged, or none; it does not check all of it."""
TYPES = {stat.S_IFREG: tarfile.REGTYPE, **{kind: type_ for type_, kind in _KINDS.items()}}
"""A member's type by st_mode's; a socket is none."""


def read(file: BinaryIO) -> Iterator[Entry]:
    """Give the members of an archive, whatever it is compressed with; ConfigError if it is none.

    The first entry is the directory they are in, and directories that have no member are made up.
    """
    known: set[Path] = {()}
    yield _directory(())
    with _told(), tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            path = _path(member.name)
            if not path:
                continue
            for length in range(1, len(path)):
                if path[:length] not in known:
                    known.add(path[:length])
                    yield _directory(path[:length])
            known.add(path)
            yield _entry(archive, member, path)


@contextmanager
def _told() -> Iterator[None]:
    """Make ConfigError of what tarfile raises for an archive that is damaged or none."""
    try:
        yield
    except (*DAMAGE, OSError) as error:
        raise ConfigError(f"cannot read the tar archive: {error}") from None


def _directory(path: Path) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755, 0, 0, 0, 0, 0)


def _path(name: str) -> Path:
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if "\0" in name:
        raise ConfigError(f"the tar archive holds {name!r}, which is no name")
    if ".." in parts:
        raise ConfigError(f"the tar archive holds {name!r}, which leads out of it")
    return parts


def _target(member: tarfile.TarInfo) -> str:
    if "\0" in member.linkname:
        raise ConfigError(f"the tar archive holds {member.name!r}, which leads nowhere")
    return member.linkname


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Entry:
    kind = _KINDS.get(member.type, stat.S_IFREG)
    when = _nanoseconds(member, "mtime", member.mtime)
    prefix = len(XATTR)
    return Entry(
        path=path,
        mode=kind | member.mode & 0o7777,
        uid=member.uid,
        gid=member.gid,
        size=member.size if member.isreg() else 0,
        atime_ns=_nanoseconds(member, "atime", member.mtime),
        mtime_ns=when,
        rdev=os.makedev(member.devmajor, member.devminor) if member.isdev() else 0,
        target=_target(member) if member.issym() else "",
        link=_path(member.linkname) if member.islnk() else None,
        xattrs={
            key[prefix:]: value.encode(errors="surrogateescape")
            for key, value in member.pax_headers.items()
            if key.startswith(XATTR)
        },
        pieces=_reader(archive, member) if member.isreg() else no_pieces,
    )


def _nanoseconds(member: tarfile.TarInfo, name: str, otherwise: float) -> int:
    """Return a time, which tarfile has as a float: that would be 200 ns too coarse."""
    try:
        when = Decimal(member.pax_headers.get(name, otherwise)) * 10**9
        if abs(when) < 1 << 63:
            return int(when)
    except ArithmeticError:  # also of what is no number
        pass
    raise ConfigError(f"cannot read the tar archive: {member.name} has no time")


def _reader(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Pieces:
    def pieces() -> Iterator[tuple[int, bytes]]:
        with _told():
            file = archive.extractfile(member)
            offset = 0
            while file is not None and (data := file.read(PIECE)):
                yield offset, data
                offset += len(data)

    return pieces


def write(entries: Iterable[Entry], top: str, file: BinaryIO) -> None:
    """Write an archive whose members are in a directory named `top`, as podman's is."""
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            kind = stat.S_IFMT(entry.mode)
            if kind not in TYPES:
                continue  # a socket
            member = tarfile.TarInfo("/".join((top, *entry.path)))
            member.type = TYPES[kind]
            member.mode = entry.mode & 0o7777
            member.uid, member.gid = entry.uid, entry.gid
            member.linkname = entry.target
            member.devmajor, member.devminor = os.major(entry.rdev), os.minor(entry.rdev)
            member.pax_headers = {
                XATTR + name: value.decode(errors="surrogateescape")
                for name, value in entry.xattrs.items()
                if is_keyword(name)
            }
            for name, when in (("mtime", entry.mtime_ns), ("atime", entry.atime_ns)):
                member.pax_headers[name] = format(Decimal(when).scaleb(-9), "f")
            if entry.link is not None:
                member.type = tarfile.LNKTYPE
                member.linkname = "/".join((top, *entry.link))
            elif kind == stat.S_IFREG:
                member.size = entry.size
            archive.addfile(member, _Content(entry))


def is_keyword(name: str) -> bool:
    """Whether a pax record can be of this name: it is UTF-8, and ends where a = is."""
    return name.isprintable() and "=" not in name


class _Content(io.RawIOBase):
    """What a file holds, with zeros where it holds nothing."""

    def __init__(self, entry: Entry) -> None:
        self._pieces = entry.pieces()
        self._position = 0
        self._size = entry.size
        self._piece = (0, b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        wanted = min(size if size >= 0 else self._size, self._size - self._position)
        result = bytearray(wanted)
        end = self._position + wanted
        while True:
            offset, data = self._piece
            low, high = max(offset, self._position), min(offset + len(data), end)
            if low < high:
                at = low - self._position
                result[at : at + high - low] = data[low - offset : high - offset]
            if offset + len(data) >= end:
                break
            following = next(self._pieces, None)
            if following is None:
                self._piece = (self._size, b"")
                break
            self._piece = following
        self._position = end
        return bytes(result)
