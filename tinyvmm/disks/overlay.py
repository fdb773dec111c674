"""An overlay: takes what a guest writes to a disk whose base image stays as it is.

It is a qcow2 image of version 3 with the base as its backing file, so qemu-img can inspect, convert
and commit it; but one whose layout never changes. All its tables are made at once, the file being
sparse, with room for twice as many clusters as the disk has:

    cluster 0        header, backing file's name; an extension (OURS) with the base's size and mtime
    refcount table   leads to every refcount block
    refcount blocks  one 16-bit count a cluster
    L1 table         leads to every L2 table
    L2 tables        at first all 0: everything is the base's
    data             grows at the end of the file

So a cluster written for the first time is put at the end, filled up from the base; its count goes
from 0 to 1 and never changes again; and its L2 entry is written at an address known beforehand.
Discarded clusters become holes where they are, or, if they were the base's, entries of zeros.

Power cuts. On the host's disk no L2 entry may lead to a cluster that is not there yet, or data that
was safe in the base would be lost with it. So new entries are kept in memory (`_new`); `flush`
syncs what they lead to, writes them, and syncs them. An entry is 8 aligned bytes, so it is written
or not. A power cut or a kill leaves all that was flushed, of later writes any or none, and perhaps
clusters that are counted and not used, which `qemu-img check` calls leaks.

Threads: any; `_lock` guards the tables and `_new` and is held while data is written, `_flushing`
has one flush at a time, and is never taken under `_lock`.
"""

import os
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from errno import EIO, ENOSPC

from tinyvmm.disks import files, qcow2
from tinyvmm.disks.qcow2 import (
    ALL_ZEROS,
    BELOW,
    COMPRESSED_DATA,
    COPIED,
    DATA,
    OFFSET_MASK,
    Header,
    Qcow2Image,
    Source,
)
from tinyvmm.errors import ConfigError
from tinyvmm.views import cut

CLUSTER_BITS = 16
_REFCOUNT_ORDER = 4  # 16 bits
_NEW_MAX = 1 << 16  # entries kept between flushes: 4 GiB of the disk
_identity = struct.Struct(">QQ")  # of the base: size of the disk, mtime in nanoseconds


def create(fd: int, base: Source, base_path: str, base_format: str) -> None:
    """Write an empty overlay for `base` into the empty file `fd`, its header last."""
    cluster = 1 << CLUSTER_BITS
    data_clusters = -(-base.size // cluster)
    l2_tables = -(-data_clusters // (cluster // 8))
    l1 = -(-8 * l2_tables // cluster)
    if 8 * l2_tables > qcow2.L1_MAX:
        raise ConfigError(f"disk {base_path} is too large for an overlay")
    blocks = table = 1
    while True:  # tables have to be counted as well
        before = 1 + table + blocks + l1 + l2_tables
        needed = -(-2 * (before + 2 * data_clusters) // cluster)
        if needed <= blocks and 8 * blocks <= table * cluster:
            break
        blocks = max(blocks, needed)
        table = -(-8 * blocks // cluster)
    name = os.fsencode(base_path)
    if len(name) > qcow2.NAME_MAX:
        raise ConfigError(f"disk {base_path}: too long a name for an overlay's header")
    extensions = _extension(qcow2.BACKING_FORMAT, base_format.encode())
    extensions += _extension(qcow2.OURS, identity(base)) + _extension(0, b"")
    l1_at = (1 + table + blocks) * cluster
    l2_at = l1_at + l1 * cluster
    header = qcow2.HEADER.pack(
        qcow2.MAGIC,
        3,
        qcow2.HEADER_LEN + len(extensions),
        len(name),
        CLUSTER_BITS,
        base.size,
        0,
        l2_tables,
        l1_at,
        cluster,
        table,
        0,
        0,
    )
    header += qcow2.HEADER_V3.pack(0, 0, 0, _REFCOUNT_ORDER, qcow2.HEADER_LEN)
    os.ftruncate(fd, l2_at + l2_tables * cluster)
    _put(fd, _numbers(range((1 + table) * cluster, l1_at, cluster)), cluster)
    _put(fd, b"\0\1" * before, (1 + table) * cluster)
    _put(
        fd, _numbers(range(l2_at | COPIED, (l2_at + l2_tables * cluster) | COPIED, cluster)), l1_at
    )
    os.fsync(fd)
    _put(fd, header + extensions + name, 0)
    os.fsync(fd)


def identity(base: Source) -> bytes:
    """Return what tells this base from another, and from itself once it has been changed."""
    st = os.fstat(base.fd)
    return _identity.pack(base.size, st.st_mtime_ns if stat.S_ISREG(st.st_mode) else 0)


def _extension(kind: int, data: bytes) -> bytes:
    return qcow2.EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def _numbers(values: range) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def _put(fd: int, data: bytes, offset: int) -> None:
    files.write_all(fd, [memoryview(data)], offset)


class OverlayDisk(Qcow2Image):
    """A base, and what was written since."""

    read_only = False

    def __init__(
        self, fd: int, path: str, header: Header, base: Source, *, durable: bool = True
    ) -> None:
        """Go on with the overlay in `fd`; ConfigError if it is not of the layout above."""
        super().__init__(fd, path, header, base)
        self._new: dict[int, int] = {}
        self._flushing = threading.Lock()
        self._durable = durable
        problem = self._check(header)
        if problem is not None:
            raise ConfigError(
                f"overlay {path}: {problem}, so it can be read but not written; give another file"
            )
        end = os.fstat(fd).st_size
        self._next = -(-end // self._cluster) * self._cluster

    def _check(self, header: Header) -> str | None:
        """Find the tables; what is not as `create` makes it, or None."""
        if header.version < 3 or header.refcount_order != _REFCOUNT_ORDER:
            return "made by another program"
        if header.snapshots or header.incompatible or header.autoclear:
            return "it has snapshots or bitmaps, or was not closed properly by another program"
        cluster = self._cluster
        table = self._read_numbers(header.refcount_offset, header.refcount_clusters * cluster // 8)
        blocks = [place for place in table if place]
        self._counts = blocks[0] if blocks else 0
        expected = range(self._counts, self._counts + len(blocks) * cluster, cluster)
        if not self._counts or blocks != list(expected) or table[: len(blocks)] != blocks:
            return "its refcount blocks are not in a row"
        self._capacity = len(blocks) * (cluster // 2)
        tables = self._read_numbers(self._l1_offset, -(-self.size // (cluster * (cluster // 8))))
        first = tables[0] & OFFSET_MASK
        if tables != [
            place | COPIED for place in range(first, first + len(tables) * cluster, cluster)
        ]:
            return "its L2 tables are not in a row"
        self._l2_offset = first
        self._data_start = first + len(tables) * cluster
        if (
            first % cluster
            or self._counts % cluster
            or self._data_start > os.fstat(self.fd).st_size
        ):
            return "its tables are not within it"
        return None

    def _read_numbers(self, offset: int, count: int) -> list[int]:
        if offset > OFFSET_MASK or 8 * count > qcow2.L1_MAX:
            return [0]
        data = os.pread(self.fd, 8 * count, offset)
        return list(struct.unpack(f">{len(data) // 8}Q", data[: len(data) // 8 * 8])) or [0]

    def _entry(self, index: int) -> int:
        entry = self._new.get(index)
        return super()._entry(index) if entry is None else entry

    # --- writing ----------------------------------------------------------------------------

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` to `offset` and on."""
        with self._lock:
            at = 0
            for run in self._runs(offset, sum([len(view) for view in views])):
                part = cut(views, at, run.length)
                if run.kind == DATA:
                    files.write_all(self.fd, part, self._own(run.host))
                else:
                    self._write_new(part, offset + at, run.length)
                at += run.length
        self._bound()

    def _own(self, host: int) -> int:
        """Return a place in the file if it is among the data, whatever an L2 table says."""
        if not self._data_start <= host < self._next:
            raise OSError(EIO, f"{self.path}: an L2 entry leads to {host:#x}")
        return host

    def _write_new(self, views: Sequence[memoryview], offset: int, length: int) -> None:
        """Write where there is no cluster of ours yet; what the first and last lack is copied."""
        cluster = self._cluster
        start = offset - offset % cluster
        end = -(-(offset + length) // cluster) * cluster
        count = (end - start) >> self._bits
        host = self._next
        number = host >> self._bits
        if number + count > self._capacity:
            raise OSError(ENOSPC, f"{self.path} has no more room for changes")
        before, after = bytearray(offset - start), bytearray(end - offset - length)
        if before:
            super().read_into([memoryview(before)], start)
        if after:
            super().read_into([memoryview(after)], offset + length)
        _put(self.fd, b"\0\1" * count, self._counts + 2 * number)
        files.write_all(self.fd, [memoryview(before), *views, memoryview(after)], host)
        self._next = host + (end - start)
        first = start >> self._bits
        for index in range(count):
            self._new[first + index] = host + index * cluster | COPIED

    def discard(self, offset: int, length: int) -> None:
        """Give space back; parts of clusters that are still the base's stay as they are."""
        self._clear(offset, length, lambda host, piece: files.punch_hole(self.fd, host, piece))

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Have these bytes read as zeros."""

        def zero(host: int, piece: int) -> None:
            files.zero_range(self.fd, host, piece, unmap=unmap)

        for at, part in self._clear(offset, length, zero):
            self.write_from([memoryview(bytes(part))], at)

    def _clear(
        self, offset: int, length: int, clear_own: Callable[[int, int], object]
    ) -> list[tuple[int, int]]:
        """Clear our clusters with `clear_own` and hide the base's; return the parts that remain."""
        cluster = self._cluster
        remain: list[tuple[int, int]] = []
        with self._lock:
            for run in self._runs(offset, length):
                end = offset + run.length
                if run.kind == DATA:
                    clear_own(self._own(run.host), run.length)
                elif run.kind in {BELOW, COMPRESSED_DATA}:
                    first = -(-offset // cluster)
                    # The disk may end within its last cluster.
                    last = (end + cluster - 1 if end == self.size else end) // cluster
                    for index in range(first, last):
                        self._new[index] = ALL_ZEROS
                    middle = (first * cluster, last * cluster) if first < last else (end, end)
                    parts = ((offset, middle[0]), (middle[1], end))
                    remain += [(start, stop - start) for start, stop in parts if start < stop]
                offset = end
        self._bound()
        return remain

    # --- keeping ----------------------------------------------------------------------------

    def flush(self) -> None:
        """Make everything written so far outlive a power cut."""
        with self._flushing:
            with self._lock:
                entries = dict(self._new)
            self._sync()
            if entries:
                with self._lock:
                    self._write_entries(entries)
                self._sync()

    def _sync(self) -> None:
        if self._durable:
            os.fdatasync(self.fd)

    def _write_entries(self, entries: dict[int, int]) -> None:
        """Write L2 entries, those side by side at once; they stay new if that fails."""
        indices = sorted(entries)
        at = 0
        while at < len(indices):
            end = at + 1
            while end < len(indices) and indices[end] == indices[end - 1] + 1:
                end += 1
            values = [entries[index] for index in indices[at:end]]
            _put(
                self.fd, struct.pack(f">{len(values)}Q", *values), self._l2_offset + 8 * indices[at]
            )
            for index, value in zip(indices[at:end], values, strict=True):
                table = self._tables.get(index // (self._cluster // 8))
                if table:
                    table[index % (self._cluster // 8)] = value
                if self._new.get(index) == value:
                    del self._new[index]
            at = end

    def _bound(self) -> None:
        if len(self._new) > _NEW_MAX:
            self.flush()

    def close(self) -> None:
        """Keep what is written, then close; ConfigError if it cannot be kept."""
        try:
            if self.fd >= 0 and self._durable:
                self.flush()
        except OSError as error:
            raise ConfigError(
                f"overlay {self.path}: what the guest had not flushed could not be kept: "
                f"{error.strerror}; its last flush stands"
            ) from None
        finally:
            super().close()


# --- files --------------------------------------------------------------------------------------


def open_overlay(path: str, base: Source, base_path: str, base_format: str) -> OverlayDisk:
    """Go on with the overlay at `path`, or begin one; `base` is closed with it.

    ConfigError if it cannot be, or belongs to another base.
    """
    if not os.path.lexists(path):
        _begin(path, base, base_path, base_format)
    fd = files.open_image(path, writable=True)
    try:
        return _go_on(fd, path, base, base_path)
    except BaseException:
        os.close(fd)
        raise


def _go_on(fd: int, path: str, base: Source, base_path: str) -> OverlayDisk:
    header = qcow2.read_header(fd, path)
    if header.extensions.get(qcow2.OURS) != identity(base) or header.size != base.size:
        raise ConfigError(
            f"overlay {path} was not made for {base_path} as it is now: give the base it was "
            f"made for ({header.backing}), unchanged, or another file"
        )
    return OverlayDisk(fd, path, header, base)


def _begin(path: str, base: Source, base_path: str, base_format: str) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(
            f"cannot make the overlay {path}: {error.strerror}; name a file in a directory "
            "that you can write"
        ) from None
    try:
        create(fd, base, base_path, base_format)
        holder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(holder)  # the name is to be found again, too
        finally:
            os.close(holder)
    except OSError as error:
        os.unlink(path)
        raise ConfigError(f"cannot make the overlay {path}: {error.strerror}") from None
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def open_ephemeral(base: Source, base_path: str, base_format: str) -> OverlayDisk:
    """Begin an overlay in a file without a name, in $TMPDIR; `base` is closed with it."""
    try:
        with tempfile.TemporaryFile(prefix="tinyvmm-disk-") as file:
            create(file.fileno(), base, base_path, base_format)
            fd = os.dup(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"cannot keep what the guest writes to {base_path} in {tempfile.gettempdir()}: "
            f"{error.strerror}; set TMPDIR"
        ) from None
    header = qcow2.read_header(fd, base_path)
    return OverlayDisk(fd, f"{base_path}'s overlay", header, base, durable=False)
