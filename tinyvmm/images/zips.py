"""Files put into a zip archive, as fileserver/archives.py serves them.

A zip holds what PKWARE's APPNOTE.TXT and Info-ZIP's extra fields (proginfo/extrafld.txt) have room
for: Unix modes, symbolic links, owners ("ux", 0x7875) and times in seconds ("UT", 0x5455). It has
no room for extended attributes, devices, fifos and sockets, names that are not UTF-8, or that two
names are one file. The same files give the same bytes.
"""

import os
import stat
import struct
import time
import zipfile
from collections.abc import Callable, Iterable
from shutil import copyfileobj

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.archives import EXTENDED_TIME, UNIX, UNIX_OWNER
from tinyvmm.fileserver.written import DELETED, Change

_COPY_LEN = 1 << 20
_MS_DIRECTORY = 0x10
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time MS-DOS knows
_LAST = (2107, 12, 31, 23, 59, 58)


def write_zip(changes: Iterable[Change], path: str, warn: Callable[[str], None]) -> int:
    """Write the files to a new archive `path`; how many. `warn` takes a line about what is lost.

    ConfigError for what cannot be in a zip and is not to be missed.
    """
    count = attributes = 0
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for change in changes:
            shown = os.fsdecode(change.path)
            if change.kind == DELETED:
                raise ConfigError(
                    f"{shown} was deleted, which a zip cannot say: make an EROFS pack of it, "
                    "or a layer (.tar)"
                )
            attributes += bool(change.xattrs())
            if _add(archive, change):
                count += 1
            else:
                warn(f"{shown} is neither file, directory nor link: left out")
    if attributes:
        warn(f"extended attributes of {attributes} files are left out: a zip has no room for them")
    return count


def _add(archive: zipfile.ZipFile, change: Change) -> bool:
    st = change.stat
    if st is None:
        return False
    kind = stat.S_IFMT(st.st_mode)
    if kind not in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}:
        return False
    try:
        name = change.path[1:].decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{os.fsdecode(change.path)!r}: a name in a zip is UTF-8; make an EROFS pack of it"
        ) from None
    info = zipfile.ZipInfo(name + "/" if kind == stat.S_IFDIR else name, _ms_time(st.st_mtime))
    info.create_system = UNIX
    info.external_attr = st.st_mode << 16 | (_MS_DIRECTORY if kind == stat.S_IFDIR else 0)
    info.extra = _extra(st)
    if kind == stat.S_IFDIR:
        archive.writestr(info, b"")
    elif kind == stat.S_IFLNK:
        archive.writestr(info, change.target())
    else:
        info.compress_type = zipfile.ZIP_DEFLATED
        info.file_size = st.st_size
        with change.open() as contents, archive.open(info, "w") as member:
            copyfileobj(contents, member, _COPY_LEN)
    return True


def _ms_time(mtime: float) -> tuple[int, int, int, int, int, int]:
    """UTC, as the exact time is beside it, and local time would make other bytes elsewhere."""
    found = time.gmtime(min(max(mtime, 0), 1 << 32))[:6]
    return min(max(found, _EPOCH), _LAST)


def _extra(st: os.stat_result) -> bytes:
    seconds = min(max(int(st.st_mtime), -(1 << 31)), (1 << 31) - 1)
    return struct.pack("<HHBi", EXTENDED_TIME, 5, 1, seconds) + struct.pack(
        "<HHBBIBI", UNIX_OWNER, 11, 1, 4, st.st_uid, 4, st.st_gid
    )
