"""qcow2 images, for reading: QEMU's docs/interop/qcow2.txt, versions 2 and 3.

The disk is cut into clusters of 2^cluster_bits bytes. Two levels of tables, big-endian, say where
each one is: cluster n is in entry n modulo 2^(cluster_bits - 3) of the L2 table that entry
n / 2^(cluster_bits - 3) of the L1 table leads to. An L2 entry says one of four things: the cluster
is at an offset of this file; it is zeros; it is compressed (raw deflate) somewhere in this file;
or nothing, and then it is what the backing image has there, zeros where that ends or there is none.

What is refused, with the remedy: encryption, external data files, extended L2 entries, zstd, images
marked corrupt. Not looked at: refcounts, internal snapshots, bitmaps.

An image may come from anybody. Header fields are checked at once, table entries as they are used; a
bad one is an I/O error of that read. Memory is bounded whatever the image says: the L1 table is not
kept, of L2 tables at most TABLES_LEN bytes, and one decompressed cluster.

Threads: any; `_lock` guards tables and caches, and is not held while data is read.
"""

import os
import struct
import sys
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from errno import EIO
from typing import NamedTuple, Protocol

from tinyvmm.disks import files
from tinyvmm.disks.raw import check_size
from tinyvmm.errors import ConfigError
from tinyvmm.views import cut

MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
HEADER_V3 = struct.Struct(">QQQII")  # what version 3 has behind it
HEADER_LEN = HEADER.size + HEADER_V3.size
EXTENSION = struct.Struct(">II")
BACKING_FORMAT = 0xE279_2ACA
OURS = 0x7469_6E79
"""Of overlay.py; QEMU leaves alone what it does not know."""

INCOMPATIBLE = ("dirty", "corrupt", "external data file", "compression type", "extended L2")
_DIRTY = 1 << 0  # the refcounts may be wrong, which no reader minds

COPIED = 1 << 63
COMPRESSED = 1 << 62
ALL_ZEROS = 1 << 0
OFFSET_MASK = (1 << 56) - (1 << 9)

CLUSTER_BITS = range(9, 22)
NAME_MAX = 1023
L1_MAX = 32 << 20  # bytes, as QEMU has it
TABLES_LEN = 4 << 20


class Header(NamedTuple):
    """What the start of an image says."""

    version: int
    size: int
    cluster_bits: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    incompatible: int
    autoclear: int
    refcount_order: int
    backing: str | None
    extensions: dict[int, bytes]


class Source(Protocol):
    """A disk to read from."""

    size: int
    fd: int

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from `offset` on."""

    def close(self) -> None:
        """Let go of it."""


def read_header(fd: int, path: str) -> Header:
    """Parse and check the header of an image; ConfigError if it is none, or none for us."""

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"disk {path}: {why}")

    def damaged(what: str) -> ConfigError:
        return refuse(f"this is no sound qcow2 image ({what}); see qemu-img check {path}")

    head = os.pread(fd, HEADER_LEN, 0)
    if head[:4] != MAGIC:
        raise refuse("this is no qcow2 image; leave out format=qcow2")
    if len(head) < HEADER_LEN:
        raise damaged("it is cut off")
    _, version, name_at, name_len, cluster_bits, size, crypt, l1_size, l1_offset, *rest = (
        HEADER.unpack_from(head)
    )
    refcount_offset, refcount_clusters, snapshots, _ = rest
    incompatible = autoclear = 0
    refcount_order, header_len = 4, HEADER.size
    if version == 3:
        incompatible, _, autoclear, refcount_order, header_len = HEADER_V3.unpack_from(
            head, HEADER.size
        )
    elif version != 2:
        raise refuse(f"qcow2 of version {version}; qemu-img convert makes one of version 3")
    if cluster_bits not in CLUSTER_BITS:
        raise damaged(f"clusters of 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    if crypt:
        raise refuse("the image is encrypted; qemu-img convert makes a plain one of it")
    if incompatible & ~_DIRTY:
        bits = [bit for bit in range(1, 64) if incompatible >> bit & 1]
        words = [INCOMPATIBLE[bit] if bit < len(INCOMPATIBLE) else f"bit {bit}" for bit in bits]
        raise refuse(
            f"an incompatible feature ({', '.join(words)}); qemu-img convert -O qcow2 makes an "
            "image without, qemu-img check -r all mends a corrupt one"
        )
    check_size(path, size)
    tables = -(-size // (cluster * (cluster // 8)))
    if 8 * tables > L1_MAX or l1_size < tables or l1_offset % cluster or l1_offset > OFFSET_MASK:
        raise damaged("its L1 table")
    if version == 3 and not HEADER_LEN <= header_len <= cluster:
        raise damaged("its header's length")
    backing = None
    end = cluster
    if name_at:
        if name_at + name_len > cluster or not 0 < name_len <= NAME_MAX:
            raise damaged("its backing file's name")
        backing = os.fsdecode(os.pread(fd, name_len, name_at))
        end = name_at
        if "\0" in backing:
            raise damaged("its backing file's name")
    found = _extensions(os.pread(fd, end, 0)[header_len:])
    if found is None:
        raise damaged("a header extension")
    return Header(
        version,
        size,
        cluster_bits,
        l1_offset,
        refcount_offset,
        refcount_clusters,
        snapshots,
        incompatible,
        autoclear,
        refcount_order,
        backing,
        found,
    )


def _extensions(data: bytes) -> dict[int, bytes] | None:
    """Parse { be32 type, be32 length, data padded to 8 }..., which type 0 or the end ends."""
    found = {}
    at = 0
    while at + EXTENSION.size <= len(data):
        kind, length = EXTENSION.unpack_from(data, at)
        if not kind:
            break
        at += EXTENSION.size
        if length > len(data) - at:
            return None
        found[kind] = data[at : at + length]
        at += -(-length // 8) * 8
    return found


class Run(NamedTuple):
    """`length` bytes of the disk of one `kind`, DATA at `host` of the file.

    Of COMPRESSED_DATA `host` is the L2 entry; of BELOW and ZEROS it means nothing.
    """

    kind: str
    host: int
    length: int


DATA, COMPRESSED_DATA, BELOW, ZEROS = "data", "compressed", "below", "zeros"


class Qcow2Image:
    """An image, open and locked; `backing` is what it stands on, and closed with it."""

    read_only = True

    def __init__(self, fd: int, path: str, header: Header, backing: Source | None) -> None:
        self.fd = fd
        self.path = path
        self.size = header.size
        self.backing = backing
        self._version = header.version
        self._bits = header.cluster_bits
        self._cluster = 1 << header.cluster_bits
        self._l1_offset = header.l1_offset
        self._lock = threading.RLock()
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._tables_max = max(2, TABLES_LEN // self._cluster)
        self._inflated = (0, b"")

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from `offset` on."""
        length = sum([len(view) for view in views])
        runs = self._runs(offset, length)
        at = 0
        for run in runs:
            part = views if len(runs) == 1 else cut(views, at, run.length)
            if run.kind == DATA:
                files.read_all(self.fd, part, run.host)
            elif run.kind == BELOW:
                self._read_below(part, offset + at, run.length)
            elif run.kind == ZEROS:
                files.fill_zeros(part)
            else:
                self._read_compressed(part, run.host, (offset + at) % self._cluster)
            at += run.length

    def _read_below(self, views: Sequence[memoryview], offset: int, length: int) -> None:
        below = self.backing
        there = 0 if below is None else max(0, min(length, below.size - offset))
        if there and below is not None:
            below.read_into(cut(views, 0, there), offset)
        if there < length:
            files.fill_zeros(cut(views, there, length - there))

    def _read_compressed(self, views: Sequence[memoryview], entry: int, start: int) -> None:
        with self._lock:
            known, data = self._inflated
            if known != entry:
                data = self._inflate(entry)
                self._inflated = entry, data
        for view in views:
            view[:] = data[start : start + len(view)]
            start += len(view)

    def _inflate(self, entry: int) -> bytes:
        """Decompress a cluster: its entry has an offset, and above it the sectors behind its first.

        The offset takes 62 - (cluster_bits - 8) bits, and need not be that of a sector.
        """
        offset_bits = 62 - (self._bits - 8)
        host = entry & (1 << offset_bits) - 1
        sectors = (entry & COMPRESSED - 1) >> offset_bits
        length = (sectors + 1) * files.SECTOR - host % files.SECTOR
        try:
            packed = os.pread(self.fd, length, host)
            data = zlib.decompressobj(-15).decompress(packed, self._cluster)
        except zlib.error as error:
            raise OSError(EIO, f"{self.path}: compressed cluster at {host:#x}: {error}") from None
        if len(data) != self._cluster:
            raise OSError(EIO, f"{self.path}: compressed cluster at {host:#x}: too short")
        return data

    # --- where things are -------------------------------------------------------------------

    def _runs(self, offset: int, length: int) -> list[Run]:
        """Return where these bytes are, what lies together taken together."""
        runs: list[Run] = []
        with self._lock:
            while length:
                within = offset % self._cluster
                piece = min(self._cluster - within, length)
                kind, host = self._meaning(self._entry(offset >> self._bits))
                if kind == DATA:
                    host += within
                last = runs[-1] if runs else None
                if (
                    last is not None
                    and last.kind == kind
                    and (
                        kind in {ZEROS, BELOW} or (kind == DATA and last.host + last.length == host)
                    )
                ):
                    runs[-1] = Run(kind, last.host, last.length + piece)
                else:
                    runs.append(Run(kind, host, piece))
                offset += piece
                length -= piece
        return runs

    def _meaning(self, entry: int) -> tuple[str, int]:
        """Return the kind of a cluster and its place, by its L2 entry."""
        if entry & COMPRESSED:
            return COMPRESSED_DATA, entry
        if entry & ALL_ZEROS and self._version >= 3:
            return ZEROS, 0
        host = entry & OFFSET_MASK
        if not host:
            return BELOW, 0
        if host % self._cluster:
            raise OSError(EIO, f"{self.path}: L2 entry {entry:#x}")
        return DATA, host

    def _entry(self, index: int) -> int:
        """Return the L2 entry of cluster `index`; the lock is held."""
        table_index, within = divmod(index, self._cluster // 8)
        table = self._tables.get(table_index)
        if table is None:
            table = self._read_table(table_index)
            if len(self._tables) >= self._tables_max:
                self._tables.popitem(last=False)
            self._tables[table_index] = table
        else:
            self._tables.move_to_end(table_index)
        return table[within] if table else 0

    def _read_table(self, index: int) -> "array[int]":
        """Return L2 table `index`, an empty array for one that is not there."""
        place = self._table_offset(index)
        table = array("Q")
        if place:
            data = os.pread(self.fd, self._cluster, place)
            if place % self._cluster or len(data) < self._cluster:
                raise OSError(EIO, f"{self.path}: no L2 table at {place:#x}")
            table.frombytes(data)
            _swap(table)
        return table

    def _table_offset(self, index: int) -> int:
        """Return where L1 says that L2 table `index` is, 0 for nowhere."""
        data = os.pread(self.fd, 8, self._l1_offset + 8 * index)
        if len(data) < 8:
            raise OSError(EIO, f"{self.path}: the L1 table is cut off")
        return int.from_bytes(data, "big") & OFFSET_MASK

    # --- a disk that takes no writes --------------------------------------------------------

    def write_from(self, _views: Sequence[memoryview], _offset: int) -> None:
        """Refuse: a device asks no read-only disk for this."""
        raise OSError(EIO, f"{self.path} is read-only")

    def flush(self) -> None:
        """Do nothing, there being nothing to keep."""

    def discard(self, offset: int, _length: int) -> None:
        """Refuse."""
        self.write_from((), offset)

    def write_zeroes(self, offset: int, _length: int, _unmap: bool) -> None:
        """Refuse."""
        self.write_from((), offset)

    def close(self) -> None:
        """Close it and what it stands on; harmless when done twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        if self.backing is not None:
            self.backing.close()


def _swap(table: "array[int]") -> None:
    """Turn big-endian numbers into numbers, or back."""
    if sys.byteorder == "little":
        table.byteswap()
