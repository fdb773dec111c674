"""What a guest wrote as a layer of an OCI image: a tar archive of changes.

The form is the OCI image specification's (layer.md): paths without a leading slash; what is gone is
an empty file `.wh.NAME`, and a directory that hides what was there holds a `.wh..wh..opq`. Names of
one file are hard links, attributes are pax records `SCHILY.xattr.NAME`, times have nanoseconds.
Entries come in the order of their names, and nobody's name or clock is in the archive: the same
changes give the same bytes.
"""

import gzip
import os
import stat
import tarfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from hashlib import sha256
from typing import IO, NamedTuple, Protocol, cast

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.whiteout import NAME_OPAQUE, NAME_PREFIX
from tinyvmm.fileserver.written import DELETED, Change
from tinyvmm.images.draft import drafted
from tinyvmm.tree_tar import TYPES, XATTR, is_keyword


class Layer(NamedTuple):
    """A layer that was written."""

    digest: str
    """Of the file: sha256:HEX."""
    diff_id: str
    """Of the archive in it, not compressed."""
    size: int
    """Of the file, in bytes."""
    entries: int


def write_layer(
    changes: Iterable[Change], path: str, warn: Callable[[str], None], *, compress: bool = False
) -> Layer:
    """Write the layer to `path`, gzipped if `compress`; it appears there whole, or not at all.

    `warn` takes a line about what a layer cannot hold: sockets. ConfigError for what would be
    something else in a layer, or if `path` cannot be written.
    """
    try:
        with drafted(path) as draft, open(draft, "xb") as file:
            inner = outer = _Hashing(file)
            with ExitStack() as cleanup:
                if compress:
                    packed = cleanup.enter_context(
                        gzip.GzipFile(
                            filename="", mode="wb", fileobj=cast("IO[bytes]", outer), mtime=0
                        )
                    )
                    inner = _Hashing(packed)
                entries = write_tar(changes, inner, warn)
            file.flush()
        return Layer(outer.digest(), inner.digest(), outer.size, entries)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def write_tar(changes: Iterable[Change], file: "_Hashing", warn: Callable[[str], None]) -> int:
    """Write the archive to `file`; the number of its entries."""
    count = 0
    linked: dict[tuple[int, int], str] = {}
    with tarfile.open(  # type: ignore[call-overload]
        fileobj=file,
        mode="w|",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for change in changes:
            directory, _, name = change.path[1:].rpartition(b"/")
            if change.kind == DELETED:
                if not change.implied:
                    archive.addfile(_marker(directory, NAME_PREFIX + name))
                    count += 1
                continue
            if name.startswith(NAME_PREFIX):
                raise ConfigError(
                    f"{os.fsdecode(change.path)}: in a layer, a name that begins with .wh. says "
                    "that something is gone: rename it"
                )
            count += _add(archive, change, linked, warn)
            if change.opaque:
                archive.addfile(_marker(change.path[1:], NAME_OPAQUE))
                count += 1
    return count


def _add(
    archive: tarfile.TarFile,
    change: Change,
    linked: dict[tuple[int, int], str],
    warn: Callable[[str], None],
) -> int:
    """Add a file; 0 if a layer cannot hold it."""
    st = change.stat
    if st is None:
        return 0
    kind = stat.S_IFMT(st.st_mode)
    if kind not in TYPES:
        warn(f"{os.fsdecode(change.path)} is a socket, which a layer cannot hold: left out")
        return 0
    info = tarfile.TarInfo(_shown(change.path[1:]))
    info.type = TYPES[kind]
    info.mode = stat.S_IMODE(st.st_mode)
    info.uid, info.gid = st.st_uid, st.st_gid
    info.mtime = st.st_mtime_ns // 10**9
    xattrs = [(_shown(name), _shown(value)) for name, value in sorted(change.xattrs().items())]
    records = {XATTR + name: value for name, value in xattrs if is_keyword(name)}
    if len(records) < len(xattrs):
        warn(f"{os.fsdecode(change.path)}: attributes whose names a layer cannot hold are left out")
    if st.st_mtime_ns % 10**9:
        records["mtime"] = f"{info.mtime}.{st.st_mtime_ns % 10**9:09}"
    info.pax_headers = records
    if kind != stat.S_IFDIR and st.st_nlink > 1:
        first = linked.setdefault((st.st_dev, st.st_ino), info.name)
        if first != info.name:
            info.type, info.linkname, info.pax_headers = tarfile.LNKTYPE, first, {}
            archive.addfile(info)
            return 1
    if kind == stat.S_IFLNK:
        info.linkname = _shown(change.target())
    if kind in {stat.S_IFCHR, stat.S_IFBLK}:
        info.devmajor, info.devminor = os.major(st.st_rdev), os.minor(st.st_rdev)
    if kind != stat.S_IFREG:
        archive.addfile(info)
        return 1
    info.size = st.st_size
    with change.open() as contents:
        try:
            archive.addfile(info, contents)
        except OSError as error:
            if error.errno is not None:
                raise
            raise ConfigError(
                f"{os.fsdecode(change.path)} became shorter while it was read: try again"
            ) from None
    return 1


def _marker(directory: bytes, name: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo(_shown(directory + b"/" + name if directory else name))


def _shown(data: bytes) -> str:
    """As tarfile takes bytes, which gives them back as they were."""
    return data.decode("utf-8", "surrogateescape")


class _Writable(Protocol):
    """A file to write to."""

    def write(self, data: bytes, /) -> int:
        """Write it all."""

    def flush(self) -> None:
        """Write out what is held back."""


class _Hashing:
    """A file that is written, and its SHA-256."""

    def __init__(self, file: _Writable) -> None:
        self._file = file
        self._hash = sha256()
        self.size = 0

    def write(self, data: bytes, /) -> int:
        """Write it all."""
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Write out what is held back."""
        self._file.flush()

    def digest(self) -> str:
        """Return what has been written, as OCI names it."""
        return f"sha256:{self._hash.hexdigest()}"
