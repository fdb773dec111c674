"""virtio block device: virtio 1.2, section 5.2; numbers as in <linux/virtio_blk.h>.

Device ID 2. One request queue or several, all alike. A request is a chain: a header of 16 bytes
{ le32 type, le32 reserved, le64 sector }, data to write, room for data read, and in the very last
byte the device may write, the status. How that is cut into descriptors says nothing (2.7.4.2).
Sectors are of 512 bytes whatever the block size. IN, OUT, FLUSH, DISCARD, WRITE_ZEROES and GET_ID
are known, all else is UNSUPP; what cannot be done is IOERR: a range not within the disk, data of
no whole sectors, a write to a read-only disk, an error of the host's.

Not emulated: geometry, topology but for the best size of a request, CONFIG_WCE, lifetime, secure
erase, zones.

Where a request runs: reads and writes at once, on the thread that answers the doorbell, with the
device's lock held. Unless the user says otherwise that is a thread of the device's, because a
kernel has many requests in flight, and goes on with its own work (docs/decisions/0004). `preadv`
and `pwritev` take the guest's own RAM and let other threads run meanwhile. What waits for a real
disk, FLUSH, or may take its time, DISCARD and WRITE_ZEROES, goes to the device's one worker, which
holds the lock only to give the chain back.

What a flush covers: every write whose chain was given back before the flush was made available
(5.2.6.2). Writes are in the disk's hands before their chain is given back, so nothing needs to be
waited for. A driver that does not accept FLUSH has each write flushed before it is given back.

A reset forgets the tasks that wait. The one under way cannot be taken back, and would disturb the
next driver's data: no request of that driver is looked at until it has ended.
"""

import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from tinyvmm import trace
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain, Virtqueue
from tinyvmm.errors import ConfigError
from tinyvmm.views import cut, scatter, size_of

VIRTIO_ID_BLOCK = 2
SECTOR = 512

VIRTIO_BLK_F_SIZE_MAX = 1 << 1
VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_TOPOLOGY = 1 << 10
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14

VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1 << 0
VIRTIO_BLK_ID_BYTES = 20

QUEUES_MAX = 16
QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2  # header and status have a descriptor each
SIZE_MAX = 128 << 10
REQUEST_MAX = SEG_MAX * SIZE_MAX  # so that no request holds the lock for long
DISCARD_SECTORS_MAX = 1 << 22
DISCARD_SEG_MAX = 32
DISCARD_SECTOR_ALIGNMENT = 8  # a block of most file systems of the host
ZEROES_SECTORS_MAX = 1 << 17  # which the host may have to write

_header = struct.Struct("<IIQ")
# 5.2.4, from capacity to write_zeroes_may_unmap; all 0 are geometry, writeback, and of the topology
# all but opt_io_size, which counts blocks of blk_size.
_config = struct.Struct("<QII4xI4xI2xHIIIIIB3x")
_LEAVE = 1 << 32  # what an eventfd counts to only when the worker is to end
_range = struct.Struct("<QII")  # of DISCARD and WRITE_ZEROES: sector, num_sectors, flags


class Disk(Protocol):
    """What holds the sectors. Offsets and lengths are in bytes, within `size`, whole sectors.

    Each method may raise OSError. Reads and writes come one at a time; the others may run on
    another thread meanwhile.
    """

    size: int
    read_only: bool

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from `offset` on."""

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` to `offset` and on."""

    def flush(self) -> None:
        """Make everything written so far outlive a power cut."""

    def discard(self, offset: int, length: int) -> None:
        """Forget these bytes; what they read as from now on is nobody's business."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Have these bytes read as zeros, giving up the space if `unmap`."""


class _Task(NamedTuple):
    """What the worker is to do, for which request of which driver.

    Of the chain it has only the status: a chain may name a thousand buffers, and many may wait.
    """

    work: Callable[[], None]
    queue: Virtqueue
    chain: Chain
    written: int


class VirtioBlk(VirtioDevice):
    """A disk."""

    ioeventfd = True

    def __init__(
        self, disk: Disk, *, serial: str = "", queues: int = 1, opt_io_size: int = 0
    ) -> None:
        """Offer `disk`, which somebody else closes; ConfigError for odd `serial` or `queues`.

        `opt_io_size` is how many bytes are best read at once, if it is anything: Linux reads twice
        as many ahead.
        """
        self._disk = disk
        self._serial = serial.encode()
        if len(self._serial) > VIRTIO_BLK_ID_BYTES or not serial.isprintable():
            raise ConfigError(f"serial {serial!r}: give it at most {VIRTIO_BLK_ID_BYTES} bytes")
        if not 1 <= queues <= QUEUES_MAX:
            raise ConfigError(f"{queues} queues: give 1 to {QUEUES_MAX}")
        features = VIRTIO_BLK_F_SIZE_MAX | VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE
        features |= VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_MQ
        if opt_io_size:
            features |= VIRTIO_BLK_F_TOPOLOGY
        if disk.read_only:
            features |= VIRTIO_BLK_F_RO
        else:
            features |= VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES
        config = _config.pack(
            disk.size // SECTOR,
            SIZE_MAX,
            SEG_MAX,
            SECTOR,  # blk_size
            opt_io_size // SECTOR,
            queues,
            DISCARD_SECTORS_MAX,
            DISCARD_SEG_MAX,
            DISCARD_SECTOR_ALIGNMENT,
            ZEROES_SECTORS_MAX,
            1,  # max_write_zeroes_seg
            1,  # write_zeroes_may_unmap
        )
        self._tasks: deque[_Task] = deque()
        self._unfinished = 0  # of them, with that in the worker's hands
        self._stale = False  # that one is of a driver that has gone
        self._worker: threading.Thread | None = None
        self._bell = -1  # wakes it
        super().__init__(
            "virtio-blk",
            VIRTIO_ID_BLOCK,
            queue_sizes=(QUEUE_SIZE,) * queues,
            features=features,
            config=config,
        )
        self._finished = threading.Condition(self.lock)

    def notify(self, index: int) -> None:
        """Serve a queue, then wake the worker if there is something for it to do.

        Without the lock, and by an eventfd, whose write lets go of the interpreter's: who wakes
        while another holds one of the two waits for it 40 us, four times what a flush costs so.
        """
        super().notify(index)
        if self._tasks:
            os.eventfd_write(self._bell, 1)

    def handle(self, queue: Virtqueue) -> None:
        """Serve what requests there are."""
        if self._stale:
            return  # `_finish` will be back
        while self.running and (chain := queue.pop()) is not None:
            if not chain.writable:
                self.fail(f"queue {queue.index}: a request without room for its status")
            else:
                self._request(queue, chain)

    def _request(self, queue: Virtqueue, chain: Chain) -> None:
        """Do one request, or have the worker do it."""
        kind, sector, data = _parse(chain.readable)
        *room, last = chain.writable
        if len(last) > 1:
            room.append(last[:-1])
        status = VIRTIO_BLK_S_OK
        written = nothing = 0 if room else 1  # the status, unless there is room before it
        work: Callable[[], None] | None = None
        try:
            if kind == VIRTIO_BLK_T_IN:
                length = size_of(room)
                self._disk.read_into(room, self._place(sector, length))
                written = length + 1
            elif kind == VIRTIO_BLK_T_OUT:
                self._must_write()
                self._disk.write_from(data, self._place(sector, size_of(data)))
                if not self.driver_features & VIRTIO_BLK_F_FLUSH:
                    work = self._disk.flush
            elif kind == VIRTIO_BLK_T_FLUSH:
                work = self._disk.flush
            elif kind == VIRTIO_BLK_T_GET_ID:
                length = _scatter(room, self._serial.ljust(VIRTIO_BLK_ID_BYTES, b"\0"))
                written = length + 1 if size_of(room) == length else length
            elif kind in {VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES}:
                work = self._ranges(kind, data)
            else:
                status = VIRTIO_BLK_S_UNSUPP
        except OSError as error:
            status, written = self._failed(error), nothing
        except _Unsupported:
            status = VIRTIO_BLK_S_UNSUPP
        if work is None:
            _reply(queue, chain, status, written)
        else:
            only_status = Chain(chain.head, [], [last[-1:]])
            self._later(_Task(work, queue, only_status, written))

    def _must_write(self) -> None:
        if self._disk.read_only:
            raise OSError("a write to a read-only disk")

    def _place(self, sector: int, length: int) -> int:
        """Return the offset of a request's data; OSError if the data cannot be there."""
        if length % SECTOR or length > REQUEST_MAX:
            raise OSError(f"{length} bytes of data")
        offset = sector * SECTOR
        if offset + length > self._disk.size:
            raise OSError(f"{length} bytes at sector {sector}, which is not within the disk")
        return offset

    def _ranges(self, kind: int, data: list[memoryview]) -> Callable[[], None]:
        """Return what to do for a DISCARD or WRITE_ZEROES, once all of it is known to be right."""
        self._must_write()
        is_discard = kind == VIRTIO_BLK_T_DISCARD
        count, rest = divmod(size_of(data), _range.size)
        if rest or not 1 <= count <= (DISCARD_SEG_MAX if is_discard else 1):
            raise OSError(f"{count} ranges and {rest} bytes")
        sectors_max = DISCARD_SECTORS_MAX if is_discard else ZEROES_SECTORS_MAX
        ranges = list(_range.iter_unpack(b"".join(data)))
        for sector, sectors, flags in ranges:
            # 5.2.6.2: no flag but unmap, and that only with WRITE_ZEROES
            if flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP or (flags and is_discard):
                raise _Unsupported
            if sectors > sectors_max or (sector + sectors) * SECTOR > self._disk.size:
                raise OSError(f"a range of {sectors} sectors at {sector}")
        write_through = not self.driver_features & VIRTIO_BLK_F_FLUSH

        def work() -> None:
            for sector, sectors, flags in ranges:
                if is_discard:
                    self._disk.discard(sector * SECTOR, sectors * SECTOR)
                else:
                    self._disk.write_zeroes(sector * SECTOR, sectors * SECTOR, bool(flags))
            if write_through:
                self._disk.flush()

        return work

    def _failed(self, error: OSError) -> int:
        if trace.hook is not None:
            trace.hook(trace.Message(self.name, f"IOERR: {error}"))
        return VIRTIO_BLK_S_IOERR

    # --- the worker -------------------------------------------------------------------------

    def _later(self, task: _Task) -> None:
        """Have a task for the worker, which `notify` wakes; there is one from the first task on."""
        if len(self._tasks) >= QUEUE_SIZE * len(self.queues):
            self.fail("more requests at a time than there are descriptors")
            return
        if self._worker is None:
            try:
                self._bell = os.eventfd(0, os.EFD_CLOEXEC)
            except OSError as error:  # a guest may have taken our last descriptor
                self.fail(f"no eventfd for what takes its time: {error.strerror}")
                return
            self._worker = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._worker.start()
        self._tasks.append(task)
        self._unfinished += 1

    def _work(self) -> None:
        """Do task after task, the lock not held, until the device leaves its transport."""
        bell, tasks = self._bell, self._tasks
        while os.eventfd_read(bell) < _LEAVE:
            while tasks:
                try:
                    task = tasks.popleft()
                except IndexError:  # a reset was quicker
                    break
                status = VIRTIO_BLK_S_OK
                try:
                    task.work()
                except OSError as error:
                    status = self._failed(error)
                self._finish(task, status)

    def _finish(self, task: _Task, status: int) -> None:
        """Answer a request, or go on with the next driver's if this one's driver is gone."""
        with self._finished:
            self._unfinished -= 1
            self._finished.notify_all()
            stale, self._stale = self._stale, False
            if not self.running:
                return
            if not stale:
                _reply(task.queue, task.chain, status, task.written)
                return
            for queue in self.queues:
                self.handle(queue)

    # --- the driver's coming and going ------------------------------------------------------

    def reset(self) -> None:
        """Forget the driver and what waits for the worker."""
        super().reset()
        with suppress(IndexError):  # the worker takes from the other end meanwhile
            while True:
                self._tasks.pop()
                self._unfinished -= 1
        self._stale = self._unfinished > 0

    def detach(self) -> None:
        """Leave the transport, and end the worker; no other thread is in `notify` any more."""
        super().detach()
        with self.lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            os.eventfd_write(self._bell, _LEAVE)
            worker.join()  # for no longer than one task takes
            os.close(self._bell)

    def save(self) -> dict[str, Any]:
        """Return the state, once the worker has done what it was given; vCPUs must be paused."""
        with self._finished:
            while self._unfinished:
                self._finished.wait()
            return super().save()


class _Unsupported(Exception):  # noqa: N818 (no error: an answer)
    """The request is one for UNSUPP."""


def _parse(readable: list[memoryview]) -> tuple[int, int, list[memoryview]]:
    """Return type and sector of a request, and the data behind its header; type -1 if cut off."""
    if readable and len(readable[0]) >= _header.size:
        first = readable[0]
        kind, _, sector = _header.unpack_from(first)
        rest = readable[1:]
        return kind, sector, rest if len(first) == _header.size else [first[16:], *rest]
    header = b"".join(cut(readable, 0, _header.size))
    if len(header) < _header.size:
        return -1, 0, []
    kind, _, sector = _header.unpack(header)
    return kind, sector, cut(readable, _header.size)


def _scatter(views: list[memoryview], data: bytes) -> int:
    """Put all of `data` into `views` and return its length; OSError if it does not fit."""
    if size_of(views) < len(data):
        raise OSError(f"room for {size_of(views)} of {len(data)} bytes")
    return scatter(views, data)


def _reply(queue: Virtqueue, chain: Chain, status: int, written: int) -> None:
    """Give a chain back with its status.

    `written` counts bytes from the start (2.7.8.2), so the status only behind a full room.
    """
    last = chain.writable[-1]
    last[len(last) - 1] = status
    queue.push(chain, written)
