"""The split virtqueue, device's side: virtio 1.2, section 2.7.

Three arrays in the guest's RAM, all little-endian, the first two written by the driver only and the
last by the device only:

    descriptor table   { le64 addr, le32 len, le16 flags, le16 next }[size]
    available ring     { le16 flags, le16 idx, le16 ring[size], le16 used_event }
    used ring          { le16 flags, le16 idx, { le32 id, le32 len }[size], le16 avail_event }

A buffer is a chain of descriptors: first what the device reads, then what it writes. The driver
puts the chain's head into the available ring and advances its idx; `pop` walks the chain. When the
device is done, `push` puts the head and the number of bytes written into the used ring and advances
that idx. Each idx counts freely modulo 2^16; the slot is idx modulo size, a power of two. A
descriptor with VIRTQ_DESC_F_INDIRECT names a table of descriptors elsewhere in RAM and is the last
of the direct ones.

With VIRTIO_F_EVENT_IDX each side says up to where it need not be told: the driver kicks us when its
idx passes avail_event, we interrupt it when ours passes used_event. `pop` asks for a kick only when
it finds the ring empty, so a busy device is not kicked at all.

Nothing here trusts the driver: every address, length, index and count is checked as it is used, and
each descriptor is read once. What breaks a rule is told to `on_error`, after which the owner must
not use the queue until reset; `pop` never raises.

Memory ordering. The guest's CPUs run beside this thread, so it matters in which order memory sees
our loads and stores. CPython performs them one after another, a 16-bit item of a memoryview being
one `mov`; x86 lets none of them pass another (Intel SDM 3A, 9.2) but for one case: a store may wait
in its buffer while a later load is done. Both event checks are that case. We store avail_event,
then load avail.idx; the driver stores avail.idx, then loads avail_event: without a barrier each may
see the other's old value, and the chain waits for ever. So it is with used.idx and used_event.
`_fence`, taking and giving back a lock nobody else wants, is the barrier: it is made with a LOCK
CMPXCHG, which no load or store passes. Nothing cheaper in the standard library is sure to have one.

Threads: whoever calls holds the lock of the device that owns the queue.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tinyvmm.devices.device import GuestMemory

VIRTIO_F_RING_INDIRECT_DESC = 1 << 28
VIRTIO_F_RING_EVENT_IDX = 1 << 29

VIRTQ_DESC_F_NEXT = 1 << 0
VIRTQ_DESC_F_WRITE = 1 << 1
VIRTQ_DESC_F_INDIRECT = 1 << 2
VIRTQ_AVAIL_F_NO_INTERRUPT = 1 << 0

# Drivers do chain more descriptors in an indirect table than the queue has (Linux, splicing a long
# pipe to a console port); something must end it, and IOV_MAX is what one system call takes.
INDIRECT_MAX = 1024

_DESCRIPTOR_LEN = 16
_descriptor = struct.Struct("<QIHH").unpack_from
_NO_RAM = memoryview(b"")


class VirtqueueError(ValueError):
    """The driver broke a rule of the queue."""


class Chain(NamedTuple):
    """One buffer of the driver: RAM to read, RAM to write, and the head that `push` returns."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class Virtqueue:
    """One queue: its registers (as the transport sees them), and once enabled, its rings."""

    def __init__(self, index: int, size_max: int, on_error: Callable[[str], None]) -> None:
        """Make queue `index`, of at most `size_max` entries; `on_error` takes what went wrong."""
        self.index = index
        self.size_max = size_max
        self.on_used: Callable[[], None] = _nobody
        """Interrupts the driver."""
        self.halted = False
        """Set from any thread, without the lock, to have `pop` find nothing any more."""
        self.cut_short = False
        """Set by a `pop` that found nothing only for that."""
        self.served = 0
        """How many chains were given back, in all."""
        self._on_error = on_error
        self._fence = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Go back to the state after reset, and let go of the guest's RAM."""
        self.size = self.size_max
        self.desc_gpa = self.avail_gpa = self.used_gpa = 0
        self.disable()

    def disable(self) -> None:
        """Stop using the rings; the registers stay."""
        self.ready = False
        self.last_avail = self.used_idx = 0
        self._table = self._avail = self._used = self._used_ring = _NO_RAM

    def enable(self, memory: GuestMemory, features: int) -> None:
        """Begin to use the rings at the addresses given, with the `features` negotiated.

        VirtqueueError if the size or an address is not what section 2.7 demands.
        """
        self._map(memory, features)
        if self._event_idx:
            self._used[self._avail_event] = self.last_avail

    def _map(self, memory: GuestMemory, features: int) -> None:
        size = self.size
        if not 1 <= size <= self.size_max or size & (size - 1):
            raise VirtqueueError(f"queue {self.index}: size {size}")
        if self.desc_gpa % 16 or self.avail_gpa % 2 or self.used_gpa % 4:
            raise VirtqueueError(f"queue {self.index}: rings not aligned")
        try:
            table = memory.view(self.desc_gpa, _DESCRIPTOR_LEN * size)
            avail = memory.view(self.avail_gpa, 6 + 2 * size)
            used = memory.view(self.used_gpa, 6 + 8 * size)
        except ValueError as error:
            raise VirtqueueError(f"queue {self.index}: {error}") from None
        self._view = memory.view
        self._table = table
        # Of each: [0] flags, [1] idx; then [2:2 + size] ring, [2 + size] used_event here,
        self._avail = avail.cast("H")
        # and [2 + 4 * size] avail_event here.
        self._used = used.cast("H")
        self._used_ring = used[4 : 4 + 8 * size].cast("Q")  # le32 id, le32 len
        self._mask = size - 1
        self._used_event = 2 + size
        self._avail_event = 2 + 4 * size
        self._event_idx = bool(features & VIRTIO_F_RING_EVENT_IDX)
        self._indirect = bool(features & VIRTIO_F_RING_INDIRECT_DESC)
        self.ready = True

    def pop(self) -> Chain | None:
        """Take the next available chain.

        None if there is none, and then the driver will kick for the next; None also if the queue is
        halted or not enabled, or the driver broke a rule and `on_error` has been told.
        """
        if not self.ready:
            return None
        if self.halted:
            self.cut_short = True
            return None
        last = self.last_avail
        avail = self._avail
        pending = (avail[1] - last) & 0xFFFF
        if not pending:
            if not self._event_idx:
                return None
            self._used[self._avail_event] = last
            with self._fence:
                pass
            pending = (avail[1] - last) & 0xFFFF
            if not pending:
                return None
        try:
            if pending > self.size:
                raise VirtqueueError(f"available idx is {pending} ahead")
            chain = self._walk(avail[2 + (last & self._mask)])
        except ValueError as error:  # VirtqueueError, or not RAM
            self._on_error(f"queue {self.index}: {error}")
            return None
        self.last_avail = (last + 1) & 0xFFFF
        return chain

    def _walk(self, head: int) -> Chain:
        table = self._table
        size = budget = self.size  # a chain longer than its table has a loop
        index = head
        direct = True
        view = self._view
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        while index < size and budget:
            gpa, length, flags, following = _descriptor(table, _DESCRIPTOR_LEN * index)
            if flags & VIRTQ_DESC_F_INDIRECT:
                # The device shall ignore VIRTQ_DESC_F_WRITE here (2.7.5.3.2).
                if not direct or not self._indirect or flags & VIRTQ_DESC_F_NEXT:
                    raise VirtqueueError(f"descriptor {index}: indirect where it must not be")
                size = budget = length // _DESCRIPTOR_LEN
                if length % _DESCRIPTOR_LEN or not 1 <= size <= INDIRECT_MAX:
                    raise VirtqueueError(f"descriptor {index}: indirect table of {length} bytes")
                table = view(gpa, length)
                index = 0
                direct = False
                continue
            if not length:
                raise VirtqueueError(f"descriptor {index}: no bytes")
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append(view(gpa, length))
            elif writable:
                raise VirtqueueError(f"descriptor {index}: readable after writable")
            else:
                readable.append(view(gpa, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
            index = following
            budget -= 1
        if budget:
            raise VirtqueueError(f"descriptor {index} of a table of {size}")
        raise VirtqueueError(f"the chain at {head} has a loop")

    @property
    def waiting(self) -> int:
        """How many chains `pop` would find by now; it asks for no kick."""
        return (self._avail[1] - self.last_avail) & 0xFFFF if self.ready else 0

    def expect(self, count: int) -> bool:
        """Have the driver kick only when there are `count` chains; False if there are by now."""
        if self.ready and self._event_idx:
            self._used[self._avail_event] = (self.last_avail + count - 1) & 0xFFFF
            with self._fence:
                pass
        return self.waiting < count

    def unpop(self, count: int = 1) -> None:
        """Have `pop` take the last `count` chains again, of which none was pushed."""
        self.last_avail = self.last_avail - count & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back with the first `written` bytes of its writable part filled.

        Interrupts the driver if it asked to be told of this one. A driver that has disabled the
        queue since `pop` gets nothing.
        """
        if not self.ready:
            return
        idx = self.used_idx
        self._used_ring[idx & self._mask] = chain.head | written << 32
        self._publish((idx + 1) & 0xFFFF)

    def fill(self, data: memoryview) -> int:
        """Copy `data` into the next chains and give them back: the number of bytes copied.

        This does what `pop` and `push` would, for several chains of one buffer each, which are what
        a stream's driver gives. It stops before any other, and where there is none; the first may
        be read by the driver while the others are filled.
        """
        if not self.ready or self.halted:
            return 0
        avail, used_ring, mask, size = self._avail, self._used_ring, self._mask, len(data)
        last, idx, done = self.last_avail, self.used_idx, 0
        count = (avail[1] - last) & 0xFFFF
        for _ in range(count if count <= self.size else 0):  # else `pop` says what is wrong
            head = avail[2 + (last & mask)]
            if done == size or head > mask:
                break
            gpa, length, flags, _ = _descriptor(self._table, _DESCRIPTOR_LEN * head)
            if flags != VIRTQ_DESC_F_WRITE or not length:
                break
            try:
                view = self._view(gpa, length)
            except ValueError:
                break
            length = min(length, size - done)
            view[:length] = data[done : done + length]
            used_ring[idx & mask] = head | length << 32
            last, idx = (last + 1) & 0xFFFF, (idx + 1) & 0xFFFF
            self.last_avail = last
            if not done:
                self._publish(idx)
            done += length
        if idx != self.used_idx:
            self._publish(idx)
        return done

    def gather(self, most: int, longest: int) -> list[Chain]:
        """Take the next chains of one buffer to read each, up to about `most` bytes in all.

        This does what `pop` would, for several. It stops before any other chain and one of more
        than `longest` bytes, and asks for no kick.
        """
        buffers = self._next_buffers(0, most, 1, longest)
        return [Chain(head, [view], []) for head, view in buffers]

    def gather_writable(self, most: int, shortest: int) -> list[tuple[int, memoryview]]:
        """Take the next chains of one buffer to fill each, as (head, RAM): `gather`'s opposite.

        It stops before any other chain and one of less than `shortest` bytes.
        """
        return self._next_buffers(VIRTQ_DESC_F_WRITE, most, shortest, 0xFFFF_FFFF)

    def _next_buffers(
        self, wanted: int, most: int, shortest: int, longest: int
    ) -> list[tuple[int, memoryview]]:
        buffers: list[tuple[int, memoryview]] = []
        if not self.ready or self.halted:
            return buffers
        avail, table, mask, last = self._avail, self._table, self._mask, self.last_avail
        count = (avail[1] - last) & 0xFFFF
        for _ in range(count if count <= self.size else 0):  # else `pop` says what is wrong
            head = avail[2 + (last & mask)]
            if head > mask:
                break
            gpa, length, flags, _ = _descriptor(table, _DESCRIPTOR_LEN * head)
            if flags != wanted or not shortest <= length <= longest:
                break
            try:
                buffers.append((head, self._view(gpa, length)))
            except ValueError:
                break
            last = (last + 1) & 0xFFFF
            most -= length
            if most <= 0:
                break
        self.last_avail = last
        return buffers

    def push_read(self, chains: Sequence[Chain], *, expect: bool = False) -> bool:
        """Give `chains` back, which were only read, and interrupt at most once, as `push` does.

        Whether that leaves none available; to `expect` is to have the driver kick for the next.
        """
        if not self.ready:
            return True
        idx = self.used_idx
        for chain in chains:
            self._used_ring[idx & self._mask] = chain.head
            idx = (idx + 1) & 0xFFFF
        self._publish(idx, expect=expect)
        return self._avail[1] == self.last_avail

    def push_written(self, buffers: Sequence[tuple[int, int]]) -> None:
        """Give chains back, each as its head and the bytes written; interrupt at most once."""
        if not self.ready:
            return
        idx = self.used_idx
        for head, written in buffers:
            self._used_ring[idx & self._mask] = head | written << 32
            idx = (idx + 1) & 0xFFFF
        self._publish(idx)

    def _publish(self, idx: int, *, expect: bool = False) -> None:
        """Show the driver the used ring up to `idx`; interrupt it if it asked for any of that.

        To `expect` is to have it kick for what is available next.
        """
        old, avail = self.used_idx, self._avail
        count = (idx - old) & 0xFFFF
        self._used[1] = self.used_idx = idx
        if expect and self._event_idx:
            self._used[self._avail_event] = self.last_avail
        self.served += count
        with self._fence:
            pass
        if self._event_idx:
            # vring_need_event(used_event, idx, old) of <linux/virtio_ring.h>.
            if (idx - avail[self._used_event] - 1) & 0xFFFF < count:
                self.on_used()
        elif count and not avail[0] & VIRTQ_AVAIL_F_NO_INTERRUPT:
            self.on_used()

    def take_over(self, last_avail: int) -> None:
        """Go on from `last_avail`, where somebody else stopped who served these rings."""
        if self.ready:
            self.last_avail = last_avail & 0xFFFF
            self.used_idx = self._used[1]

    def save(self) -> dict[str, Any]:
        """Return registers and positions; the rings themselves are in RAM."""
        return {
            "size": self.size,
            "ready": self.ready,
            "desc_gpa": self.desc_gpa,
            "avail_gpa": self.avail_gpa,
            "used_gpa": self.used_gpa,
            "last_avail": self.last_avail,
            "used_idx": self.used_idx,
        }

    def load(self, state: dict[str, Any], memory: GuestMemory, features: int) -> None:
        """Become what `save` described, over `memory`."""
        self.reset()
        self.size = state["size"]
        self.desc_gpa = state["desc_gpa"]
        self.avail_gpa = state["avail_gpa"]
        self.used_gpa = state["used_gpa"]
        self.last_avail = state["last_avail"]
        self.used_idx = state["used_idx"]
        if state["ready"]:
            self._map(memory, features)


def _nobody() -> None:
    """Interrupt nobody: there is no transport yet."""
