"""A layer's tar, compressed or not, becomes a directory (OCI image-spec, layer.md).

The tar may be anything: names that lead out, links to write through, claims of terabytes. `tarfile`
reads the headers, tree_writer makes the files; here is what each entry means, whiteouts above all,
and how much of what is believed:

- a header (and what belongs to it: long names, pax records, maps of sparse files) takes 8 MiB of
  the archive at most, so that none can fill our memory;
- data takes LAYER_MAX bytes and ENTRIES_MAX files in all; zeros become holes, so that what claims
  to be large without being so takes no room.
"""

import gzip
import hashlib
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tarfile import HeaderError
from typing import IO, NamedTuple, Protocol, cast

from tinyvmm.fileserver.beside import Owner
from tinyvmm.fileserver.tree import NO_ID
from tinyvmm.fileserver.whiteout import NAME_OPAQUE, NAME_PREFIX
from tinyvmm.images.oci.tree_writer import (
    Attributes,
    LayerError,
    TreeWriter,
    clamp_time,
    shown,
    split,
)

LAYER_MAX = 64 << 30
ENTRIES_MAX = 8_000_000
HEADER_MAX = 8 << 20
BUFFER_LEN = 128 << 10
PIECE_LEN = 64 << 10
_ZEROS = bytes(PIECE_LEN)
_AUFS_PREFIX = NAME_PREFIX + NAME_PREFIX  # AUFS's own files, but for the opaque marker
_XATTR = "SCHILY.xattr."
_ENDS = {"EmptyHeaderError", "EOFHeaderError"}  # of an archive: no more bytes, or zeros
_KINDS = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Stream(Protocol):
    """Where a layer's bytes come from."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""

    def close(self) -> None:
        """Let go of it."""


class Unpacked(NamedTuple):
    """What became of a layer: the digest of its tar, and how many bytes its files have in all."""

    diff_id: str
    size: int


class _Measured:
    """The tar's bytes on their way to tarfile: hashed, counted, and no more than `limit` of them.

    `algorithm` is that of the diff_id to compare with.
    """

    def __init__(self, stream: Stream, algorithm: str) -> None:
        self._stream = stream
        self.digest = hashlib.new(algorithm)
        self.position = 0
        self.ended = False
        self.limit: int | None = HEADER_MAX + BUFFER_LEN

    def read(self, size: int) -> bytes:
        if self.limit is not None and self.position > self.limit:
            raise LayerError(f"a header of more than {HEADER_MAX >> 20} MiB")
        try:
            data = self._stream.read(size)
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LayerError(f"it cannot be decompressed: {error}") from None
        self.ended = not data and size > 0
        self.digest.update(data)
        self.position += len(data)
        if self.position > LAYER_MAX:
            raise LayerError(f"it has more than {LAYER_MAX >> 30} GiB")
        return data


def unpack(
    stream: Stream,
    path: str,
    *,
    algorithm: str = "sha256",
    pretend: bool | None = None,
    tell: Callable[[int], None] = lambda _: None,
) -> Unpacked:
    """Unpack the tar `stream` (not compressed) into the empty directory `path`.

    `pretend` is TreeWriter's; `tell` is called with bytes as they are done. Raises LayerError for
    what is wrong with the layer, OSError for what the host refuses.
    """
    measured = _Measured(stream, algorithm)
    size = 0
    try:
        with (
            TreeWriter(path, pretend=pretend) as writer,
            _open_tar(measured) as tar,
        ):
            for number, entry in enumerate(_entries(tar, measured)):
                if number >= ENTRIES_MAX:
                    raise LayerError(f"it has more than {ENTRIES_MAX} entries")
                before = measured.position
                size += _unpack_entry(tar, entry, writer)
                tell(measured.position - before)
            writer.finish()
    except tarfile.ReadError as error:
        if measured.position:
            raise LayerError(f"no tar, or a broken one: {error}") from None
        # no bytes at all is how some tools write a layer without changes
    except tarfile.TarError as error:
        raise LayerError(f"no tar, or a broken one: {error}") from None
    measured.limit = None
    while measured.read(BUFFER_LEN):  # what follows the end belongs to the digest
        pass
    return Unpacked(f"{algorithm}:{measured.digest.hexdigest()}", size)


class _Header(tarfile.TarInfo):
    """A header that is none is an error anywhere: tarfile takes it for the end, but for the first.

    Without this, what damage or a tool's fault makes unreadable would be missing and nobody told.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Header":
        """Read the next header."""
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ in _ENDS:
                raise
            raise LayerError(f"a broken header: {error}") from None


def _open_tar(measured: _Measured) -> tarfile.TarFile:
    with _broken_headers():  # the first is read here
        return tarfile.open(
            fileobj=cast("IO[bytes]", measured),  # `read` is all it needs
            mode="r|",
            bufsize=BUFFER_LEN,
            tarinfo=_Header,
            encoding="utf-8",
            errors="surrogateescape",
        )


@contextmanager
def _broken_headers() -> Iterator[None]:
    """Say of numbers that are none, in pax records, what they are."""
    try:
        yield
    except (ValueError, OverflowError, IndexError, KeyError) as error:
        raise LayerError(f"a broken header: {error}") from None


def _entries(tar: tarfile.TarFile, measured: _Measured) -> Iterator[tarfile.TarInfo]:
    while True:
        measured.limit = tar.offset + HEADER_MAX + BUFFER_LEN
        try:
            with _broken_headers():
                entry = tar.next()
        except tarfile.ReadError:
            if not measured.ended:
                raise
            return  # without the padding that some tools leave out at the end
        if entry is None:
            return
        measured.limit = None
        vars(tar)["members"] = []  # which would grow with the layer
        yield entry


def _unpack_entry(tar: tarfile.TarFile, entry: tarfile.TarInfo, writer: TreeWriter) -> int:
    """Make of one entry what it says; how many bytes of data it has."""
    path = os.fsencode(entry.name)
    names = split(path)
    if any(name.startswith(_AUFS_PREFIX) for name in names) and names[-1] != NAME_OPAQUE:
        return 0
    if names and names[-1].startswith(NAME_PREFIX):
        _unpack_whiteout(names, path, writer)
        return 0
    attributes = _attributes(entry, path)
    if entry.isreg():
        if entry.sparse is None and entry.size > LAYER_MAX:
            raise LayerError(f"entry {shown(path)} claims {entry.size} bytes: too many")
        writer.file(path, attributes, _pieces(tar, entry, path), entry.size)
        return entry.size
    if entry.isdir():
        writer.directory(path, attributes)
    elif entry.issym():
        writer.symlink(path, attributes, os.fsencode(entry.linkname))
    elif entry.islnk():
        target = os.fsencode(entry.linkname)
        if any(name.startswith(NAME_PREFIX) for name in split(target)):
            raise LayerError(f"hard link {shown(path)} leads to a whiteout, {shown(target)}")
        writer.link(path, target)
    elif entry.type in _KINDS:
        writer.special(path, _KINDS[entry.type], attributes, _device(entry, path))
    else:
        raise LayerError(f"entry {shown(path)} is of an unknown type, {entry.type!r}")
    return 0


def _unpack_whiteout(names: list[bytes], path: bytes, writer: TreeWriter) -> None:
    name = names[-1]
    if name == NAME_OPAQUE:
        writer.opaque(b"/".join(names[:-1]))
    else:
        hidden = name.removeprefix(NAME_PREFIX)
        if hidden in {b"", b".", b".."}:
            raise LayerError(f"whiteout {shown(path)} hides no name")
        writer.whiteout(b"/".join([*names[:-1], hidden]))


def _pieces(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, path: bytes
) -> Iterator[tuple[int, bytes]]:
    """The parts of a file that are not zeros: (offset, data) each."""
    contents = tar.extractfile(entry)
    if contents is None:
        return
    # Of a stream's file only what is below its buffer can be sought, forward.
    raw = cast("io.BufferedReader[io.RawIOBase]", contents).raw
    for start, length in _extents(entry, path):
        raw.seek(start)
        offset, end = start, start + length
        while offset < end:
            data = raw.read(min(PIECE_LEN, end - offset)) or b""
            if not data:
                raise LayerError(f"entry {shown(path)} ends before its end")
            if data != _ZEROS[: len(data)]:
                yield offset, data
            offset += len(data)


def _extents(entry: tarfile.TarInfo, path: bytes) -> list[tuple[int, int]]:
    """Where a file has data, as the map of a sparse one says: (offset, length) each, in order."""
    if entry.sparse is None:
        return [(0, entry.size)]
    given = cast("list[tuple[int, int]]", entry.sparse)
    extents = [(start, length) for start, length in given if length]  # padded with empty ones
    end = 0
    for start, length in extents:
        if start < end or length < 0 or start + length > entry.size:
            raise LayerError(f"entry {shown(path)} has a map of a sparse file that is none")
        end = start + length
    if sum(length for _, length in extents) > LAYER_MAX:
        raise LayerError(f"entry {shown(path)} claims too many bytes")
    return extents


def _attributes(entry: tarfile.TarInfo, path: bytes) -> Attributes:
    for number in (entry.uid, entry.gid):
        if not 0 <= number < NO_ID:
            raise LayerError(f"entry {shown(path)} belongs to {number}, which is no user")
    xattrs = {
        key.removeprefix(_XATTR).encode("utf-8", "surrogateescape"): os.fsencode(value)
        for key, value in entry.pax_headers.items()
        if key.startswith(_XATTR)
    }
    return Attributes(Owner(entry.uid, entry.gid, entry.mode & 0o7777), _mtime_ns(entry), xattrs)


def _mtime_ns(entry: tarfile.TarInfo) -> int:
    """The time to the nanosecond, which tarfile's float has not."""
    text = entry.pax_headers.get("mtime")
    if text is None:
        return clamp_time(int(entry.mtime) * 10**9)
    whole, _, part = text.partition(".")
    try:
        fraction = int((part + "000000000")[:9]) if part else 0
        return clamp_time(int(whole) * 10**9 + (-fraction if whole.startswith("-") else fraction))
    except ValueError:
        return 0


def _device(entry: tarfile.TarInfo, path: bytes) -> int:
    if entry.type == tarfile.FIFOTYPE:
        return 0
    try:
        return os.makedev(entry.devmajor, entry.devminor)
    except (OverflowError, ValueError):
        raise LayerError(
            f"device {shown(path)} has no number that is one: {entry.devmajor}:{entry.devminor}"
        ) from None


def open_compressed(file: IO[bytes]) -> Stream:
    """Return what a file's bytes are when decompressed: gzip, zstd, or as they are.

    ConfigError if it is zstd and there is nothing here to decompress it.
    """
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if magic == b"\x28\xb5\x2f\xfd":
        from tinyvmm.kernel_files import zstd

        return zstd.Reader(file)
    return file
