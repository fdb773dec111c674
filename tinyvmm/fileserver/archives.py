"""Zip and tar archives as what an ObjectTree is made of: dicts of `Entry`s.

The standard library reads both; members are unpacked when they are read. Names are made relative
and plain (`./a`, `/a` and `a//` are all `a`); one with `..` in it is refused. Of several members of
one name the last counts, as in unpacking them all.

The archive stays its opener's, who must not read it by other means while the tree is served.
"""

import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import IO

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.contents import Member
from tinyvmm.fileserver.entry import TARGET_MAX, Entry, Special, Symlink

UNIX = 3  # "version made by", its upper byte: APPNOTE.TXT, 4.4.2.2
# Extra fields (APPNOTE.TXT 4.5; Info-ZIP's proginfo/extrafld.txt): a time, and an owner.
EXTENDED_TIME, UNIX_OWNER = 0x5455, 0x7875
_SPECIAL = {tarfile.FIFOTYPE: stat.S_IFIFO, tarfile.CHRTYPE: stat.S_IFCHR}
_SPECIAL[tarfile.BLKTYPE] = stat.S_IFBLK

Found = tuple[str, bytes, Entry]
"""A member: what to call it in an error, its name, what it is."""


def of_zip(archive: zipfile.ZipFile) -> Entry:
    """The root directory of a zip archive."""
    return _directory(_zip_members(archive))


def of_tar(archive: tarfile.TarFile) -> Entry:
    """The root directory of a tar archive."""
    file = archive.fileobj
    if file is None or not getattr(file, "seekable", bool)():
        raise ConfigError(
            f"{_name_of(archive)} can be read once only: open it with tarfile.open(FILE), "
            "without a | in the mode"
        )
    return _directory(_tar_members(archive))


def _directory(members: Iterable[Found]) -> Entry:
    """Put members into directories; those on the way need no member of their own."""
    top = Entry({})
    for what, name, entry in members:
        steps = _steps(what, name)
        above = top
        for step in steps[:-1]:
            files = _files(above)
            inner = files.get(step)
            if inner is None or not isinstance(inner.content, dict):
                inner = files[step] = Entry({})
            above = inner
        old = _files(above).get(steps[-1]) if steps else top
        if isinstance(entry.content, dict):
            if old is not None and isinstance(old.content, dict):
                entry.content = old.content
        elif not steps:
            raise ConfigError(f"{what}: a file cannot be the root; take it out of the archive")
        if steps:
            _files(above)[steps[-1]] = entry
        else:
            top = entry
    return top


def _files(directory: Entry) -> dict[bytes, Entry]:
    assert isinstance(directory.content, dict)  # noqa: S101 - for who reads, and the type checker
    return directory.content


def _steps(what: str, name: bytes) -> list[bytes]:
    steps = [step for step in name.split(b"/") if step not in {b"", b"."}]
    if b".." in steps:
        raise ConfigError(f"{what}: the name leads out of the archive; make it again without ..")
    return steps


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Found]:
    for info in archive.infolist():
        what = f"member {info.filename!r} of {archive.filename or 'the zip'}"
        mode = info.external_attr >> 16 if info.create_system == UNIX else 0
        content: object
        if info.is_dir():
            content = {}
        elif stat.S_ISLNK(mode) and info.file_size <= TARGET_MAX:
            content = Symlink(_read(what, archive, info))
        else:
            content = Member(what, info.file_size, _zip_opener(archive, info), Lock())
        name = info.filename.encode(errors="surrogateescape")
        mtime_ns, uid, gid = _zip_extra(info)
        if mtime_ns is None:
            mtime_ns = _zip_time(info)
        # Without a Unix mode, or with an empty one, it is as for anything else.
        entry = Entry(content, mode=stat.S_IMODE(mode) or None, mtime_ns=mtime_ns, uid=uid, gid=gid)
        yield what, name, entry


def _read(what: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{what} cannot be read: {error}; make the archive again") from None


def _zip_opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(info)


def _zip_extra(info: zipfile.ZipInfo) -> tuple[int | None, int | None, int | None]:
    """Return the time in nanoseconds, the owner and the group that extra fields tell."""
    mtime_ns = uid = gid = None
    extra = info.extra
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == EXTENDED_TIME and len(field) >= 5 and field[0] & 1:
            mtime_ns = struct.unpack_from("<i", field, 1)[0] * 10**9
        elif kind == UNIX_OWNER and field[:1] == b"\1":
            uid_end = 2 + field[1] if len(field) > 1 else 0
            gid_len = field[uid_end] if 0 < uid_end < len(field) else 0
            if gid_len and uid_end + 1 + gid_len <= len(field):
                uid = int.from_bytes(field[2:uid_end], "little") & 0xFFFF_FFFF
                gid_bytes = field[uid_end + 1 : uid_end + 1 + gid_len]
                gid = int.from_bytes(gid_bytes, "little") & 0xFFFF_FFFF
    return mtime_ns, uid, gid


def _zip_time(info: zipfile.ZipInfo) -> int | None:
    import time  # zips keep local time, in steps of two seconds

    try:
        return int(time.mktime((*info.date_time, 0, 0, -1))) * 10**9
    except (OverflowError, ValueError):
        return None


def _tar_members(archive: tarfile.TarFile) -> Iterator[Found]:
    lock = Lock()  # all members are read through one file
    known: dict[tuple[bytes, ...], Entry] = {}
    for info in archive.getmembers():
        what = f"member {info.name!r} of {_name_of(archive)}"
        name = _tar_name(archive, info.name)
        entry = None
        if info.islnk():
            entry = known.get(tuple(_steps(what, _tar_name(archive, info.linkname))))
        if entry is None:
            content = _tar_content(archive, info, what, lock)
            entry = Entry(
                content,
                mode=stat.S_IMODE(info.mode),
                uid=info.uid,
                gid=info.gid,
                mtime_ns=_tar_time(info),
            )
            known[tuple(_steps(what, name))] = entry
        yield what, name, entry


def _tar_content(archive: tarfile.TarFile, info: tarfile.TarInfo, what: str, lock: Lock) -> object:
    if info.isdir():
        return {}
    if info.issym():
        return Symlink(_tar_name(archive, info.linkname))
    if info.type in _SPECIAL:
        return Special(_SPECIAL[info.type], os.makedev(info.devmajor, info.devminor))
    if info.islnk():
        raise ConfigError(f"{what} is a link to what the archive has not; make it again, whole")
    return Member(what, info.size, _tar_opener(archive, info), lock)


def _tar_opener(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def opener() -> IO[bytes]:
        opened = archive.extractfile(info)
        if opened is None:
            raise OSError("no contents")
        return opened

    return opener


def _tar_time(info: tarfile.TarInfo) -> int | None:
    try:
        return round(info.mtime * 10**9)
    except (OverflowError, ValueError):  # a pax header may say "inf" or "nan"
        return None


def _tar_name(archive: tarfile.TarFile, name: str) -> bytes:
    return name.encode(archive.encoding or "utf-8", "surrogateescape")


def _name_of(archive: tarfile.TarFile) -> str:
    return os.fsdecode(archive.name) if archive.name else "the tar"
