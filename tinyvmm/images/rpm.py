"""RPM packages, read by ourselves: lead, signature, header, and a cpio archive, compressed.

The format is that of rpm.org's documentation ("RPM V4 Package format") and of the Linux Standard
Base (Core 5.0, chapter 22), all numbers big-endian:

    lead        96 bytes, of which only the magic still matters
    signature   a header structure, padded to 8 bytes
    header      a header structure; of its tags we need the payload's format and compressor
    payload     to the end of the file: a cpio archive of the "new ASCII" kind (cpio(5), "newc")

A header structure is 8E AD E8 01, four reserved bytes, the number of index entries and the length
of their data; an entry is tag, type, offset and count. rpm's own signature check is not ours to do:
for a package from elsewhere the user answers.
"""

import os
import struct
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from typing import IO, Any, NamedTuple

from tinyvmm.images.package import (
    COPY_LEN,
    PackageError,
    Source,
    Unpacking,
    check_name,
    open_package,
)
from tinyvmm.images.progress import Progress
from tinyvmm.kernel_files import zstd

LEAD_MAGIC = b"\xed\xab\xee\xdb"
LEAD_LEN = 96
HEADER_MAGIC = b"\x8e\xad\xe8\x01"
HEADER = struct.Struct(">4s4xII")
ENTRY = struct.Struct(">IIII")
HEADER_LEN_MAX = 64 << 20  # rpm's own limit is 256 MiB; a kernel's is below 2
ENTRIES_MAX = 1 << 16
RPMTAG_PAYLOADFORMAT = 1124
RPMTAG_PAYLOADCOMPRESSOR = 1125
_WANTED = {RPMTAG_PAYLOADFORMAT, RPMTAG_PAYLOADCOMPRESSOR}
RPM_STRING_TYPE = 6
STRING_LEN_MAX = 64
CPIO_MAGICS = (b"070701", b"070702")
CPIO_STRIPPED = b"07070X"  # sizes are in the header: files of 4 GiB and more
CPIO_HEADER_LEN = 110
CPIO_END = "TRAILER!!!"
NAME_LEN_MAX = 4096
LINKED_LEN_MAX = 64 << 20  # of files with several names, which are read whole
_S_IFMT, _S_IFREG = 0o170000, 0o100000


class CpioEntry(NamedTuple):
    """A member: its contents, `length` bytes, follow in the stream."""

    name: str
    mode: int
    length: int
    identity: tuple[int, int, int]
    """Device and inode: what names of one file have in common."""
    nlink: int


def unpack(path: str, into: Unpacking, progress: Progress) -> None:
    """Take out of a .rpm what `into` wants of it; PackageError, or OSError if writing fails."""
    import lzma
    import zlib

    with open_package(path) as file:
        compressor = read_compressor(path, file)
        told = _Told(file, f"unpacking {os.path.basename(path)}", progress)
        payload = _decompressed(path, told, compressor)
        try:
            _unpack_cpio(path, payload, into)
            while payload.read(COPY_LEN):  # to the end, where the checksum is
                pass
        except OSError as error:
            if error.errno is not None:  # a real one, from writing
                raise
            raise PackageError(path, f"is damaged ({error}); download it again") from None
        except (ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise PackageError(path, f"is damaged ({error}); download it again") from None
        finally:
            payload.close()


def read_compressor(path: str, file: IO[bytes]) -> str:
    """Return what the payload is compressed with; `file` then stands at its beginning."""
    if file.read(LEAD_LEN)[:4] != LEAD_MAGIC:
        raise PackageError(path, "is not a .rpm; give one, a .deb or a vmlinuz")
    _read_header(path, file, aligned=True)
    tags = _read_header(path, file, aligned=False)
    kind = tags.get(RPMTAG_PAYLOADFORMAT, "cpio")
    if kind != "cpio":
        raise PackageError(path, f"holds a payload of format {kind!r}; give a package with cpio")
    return tags.get(RPMTAG_PAYLOADCOMPRESSOR, "gzip")


def _read_header(path: str, file: IO[bytes], *, aligned: bool) -> dict[int, str]:
    """Return what we want of the string tags of the header structure that comes next."""
    head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise PackageError(path, "is cut short; download it again")
    magic, count, data_len = HEADER.unpack(head)
    if magic != HEADER_MAGIC or count > ENTRIES_MAX or data_len > HEADER_LEN_MAX:
        raise PackageError(path, "is damaged: it has no header where one must be")
    index, data = file.read(count * ENTRY.size), file.read(data_len)
    padding = -(HEADER.size + len(index) + data_len) % 8 if aligned else 0
    if len(index) < count * ENTRY.size or len(data) + len(file.read(padding)) < data_len + padding:
        raise PackageError(path, "is cut short; download it again")
    strings = {}
    for tag, kind, offset, _count in ENTRY.iter_unpack(index):
        if kind == RPM_STRING_TYPE and tag in _WANTED:  # others may all be one that is endless
            text = data[offset : offset + STRING_LEN_MAX].partition(b"\0")[0]
            strings[tag] = text.decode("utf-8", "replace")
    return strings


class _Told:
    """The package's file, read forwards, telling how far it is."""

    def __init__(self, file: IO[bytes], what: str, progress: Progress) -> None:
        self._file = file
        self._len = os.fstat(file.fileno()).st_size
        self._what = what
        self._progress = progress

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._progress(self._what, self._file.tell(), self._len)
        return data


def _decompressed(path: str, source: _Told, compressor: str) -> Any:
    """Return the payload as a file to read forwards, whatever it was compressed with."""
    import bz2
    import gzip
    import lzma

    file: Any = source
    if compressor == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compressor in {"xz", "lzma"}:
        return lzma.LZMAFile(file)
    if compressor == "bzip2":
        return bz2.BZ2File(file)
    if compressor == "zstd":
        return zstd.Reader(source)
    raise PackageError(path, f"is compressed with {compressor!r}, which nothing here unpacks")


# --- cpio ----------------------------------------------------------------------------------------


def cpio_entries(source: Source) -> Iterator[tuple[CpioEntry, "_Contents"]]:
    """List a cpio archive in "newc" form; ValueError if it is none. Contents may be read or not."""
    while True:
        header = _exactly(source, CPIO_HEADER_LEN)
        if header[:6] == CPIO_STRIPPED:
            raise ValueError("a file of 4 GiB or more is in it")
        if header[:6] not in CPIO_MAGICS:
            raise ValueError("its payload is no cpio archive")
        ino, mode, _, _, nlink, _, length, major, minor, _, _, name_len, _ = (
            int(header[at : at + 8], 16) for at in range(6, CPIO_HEADER_LEN, 8)
        )
        if not 0 < name_len <= NAME_LEN_MAX:
            raise ValueError(f"a name of {name_len} bytes is in it")
        padded = name_len + -(CPIO_HEADER_LEN + name_len) % 4
        name = os.fsdecode(_exactly(source, padded)[: name_len - 1])
        if name == CPIO_END:
            return
        contents = _Contents(source, length)
        yield CpioEntry(name, mode, length, (major, minor, ino), nlink), contents
        contents.skip()


class _Contents:
    """A member's contents, of which there are `left` bytes still to come."""

    def __init__(self, source: Source, length: int) -> None:
        self._source = source
        self._padding = -length % 4
        self.left = length

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""
        data = self._source.read(min(size, self.left))
        if self.left and not data:
            raise EOFError("it ends within a file")
        self.left -= len(data)
        return data

    def read_all(self) -> bytes:
        """Return all that is still to come."""
        return b"".join(iter(lambda: self.read(self.left), b""))

    def skip(self) -> None:
        """Go to the next member."""
        while self.read(COPY_LEN):
            pass
        _exactly(self._source, self._padding)


def _unpack_cpio(path: str, payload: Source, into: Unpacking) -> None:
    """Take every regular file. Of names of one file, cpio has the contents with the last only."""
    waiting: dict[tuple[int, int, int], list[str]] = {}
    for entry, contents in cpio_entries(payload):
        name = entry.name.removeprefix("/")  # some packages' names are absolute
        check_name(path, name)
        if entry.mode & _S_IFMT != _S_IFREG:
            continue
        if entry.nlink > 1 and not entry.length:
            waiting.setdefault(entry.identity, []).append(name)
            continue
        others = waiting.pop(entry.identity, ()) if entry.nlink > 1 else ()
        if not others:
            into.take(path, name, entry.length, partial(_itself, contents))
            continue
        if entry.length > LINKED_LEN_MAX:
            raise PackageError(path, f"holds {name!r} of {entry.length >> 20} MiB, several times")
        data = contents.read_all()
        for one in (*others, name):
            into.take(path, one, len(data), partial(BytesIO, data))
    for names in waiting.values():
        for name in names:
            into.take(path, name, 0, partial(BytesIO, b""))


def _itself(contents: _Contents) -> _Contents:
    return contents


def _exactly(source: Source, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.read(size - len(data))
        if not more:
            raise EOFError("it ends too early")
        data += more
    return data
