"""The split virtqueue, from the device's side (virtio 1.2, section 2.7).

The driver owns RAM; a queue is three areas of it:

    descriptor table   size * { addr u64, len u32, flags u16, next u16 }      the driver writes
    available ring     flags u16, idx u16, ring[size] u16, used_event u16     the driver writes
    used ring          flags u16, idx u16, ring[size] {id u32, len u32}, avail_event u16   we write

The driver links descriptors into a chain, puts the number of its first one (its head) into the
available ring and raises idx. We pop the chain, read its readable buffers, fill its writable ones,
put head and length into the used ring and raise idx there. Both indices count modulo 2^16 and are
never reset; a slot is the index modulo the size, which is a power of two.

Every number here but our own indices comes from a guest. `pop` checks each before it is used and
raises `QueueError` for what the specification forbids; the device then asks for a reset. Buffers
are memoryviews onto RAM, so no data is copied here.

With VIRTIO_F_RING_EVENT_IDX each side names the index at which it wants to hear of the other
(2.7.7, 2.7.10). The danger is a lost wake-up: we look for a chain, see none, say "tell me from
here", and the driver has added one in between, seen the old wish, and stays silent. So we look
again after saying it. x86 may let a load pass an earlier store, so a fence stands between; taking
a lock is a locked instruction, which is one. The same holds for our index and the driver's wish.

Threads: whoever calls holds the device's lock.
"""

import threading
from struct import Struct
from typing import Any, NamedTuple

from tinyvmm.devices.device import GuestMemory

VIRTQ_DESC_F_NEXT = 1 << 0
VIRTQ_DESC_F_WRITE = 1 << 1
VIRTQ_DESC_F_INDIRECT = 1 << 2
VIRTQ_AVAIL_F_NO_INTERRUPT = 1 << 0

CHAIN_MAX = 1024  # descriptors in a chain; also what ends a chain that is a loop

_descriptor = Struct("<QIHH")
_fence = threading.Lock()


class QueueError(Exception):
    """The driver broke the rules of the queue; the text says how."""


class Chain(NamedTuple):
    """A descriptor chain: its head, then the buffers to read and the buffers to fill, in order."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class Virtqueue:
    """One queue of a device. The transport sets sizes and addresses, then calls `enable`."""

    def __init__(self, memory: GuestMemory, size_max: int) -> None:
        """Make a queue of at most `size_max` (a power of two) entries, not yet enabled."""
        self._memory = memory
        self.size_max = size_max
        self.reset()

    def reset(self) -> None:
        """Return to the state before the driver set anything."""
        self.size = self.size_max
        self.desc_gpa = self.driver_gpa = self.device_gpa = 0
        self.ready = False
        self._last_avail = 0
        self._used_idx = 0
        self._signalled = 0  # our used idx when we last decided about an interrupt
        self._event_idx = self._indirect = False
        nothing = memoryview(b"")
        self._desc = self._avail = self._used = self._used_ring = nothing

    def enable(self, *, event_idx: bool, indirect: bool) -> None:
        """Start using the areas; QueueError if size or addresses cannot be."""
        size = self.size
        if not 0 < size <= self.size_max or size & (size - 1):
            raise QueueError(f"queue size {size} is no power of two up to {self.size_max}")
        if self.desc_gpa % 16 or self.driver_gpa % 2 or self.device_gpa % 4:
            raise QueueError("an area of the queue is not aligned")  # 2.7, the table of alignments
        try:
            self._desc = self._memory.view(self.desc_gpa, 16 * size)
            self._avail = self._memory.view(self.driver_gpa, 6 + 2 * size).cast("H")
            used = self._memory.view(self.device_gpa, 6 + 8 * size)
        except ValueError as error:
            raise QueueError(f"an area of the queue is outside RAM: {error}") from None
        self._used = used.cast("H")
        self._used_ring = used[4 : 4 + 8 * size].cast("I")
        self._event_idx, self._indirect = event_idx, indirect
        self.ready = True

    def pop(self) -> Chain | None:
        """Take the next chain, or None where there is none; then the driver tells us of the next.

        QueueError if the driver broke the rules.
        """
        if not self.ready:
            return None
        last = self._last_avail
        avail = self._avail
        if avail[1] == last:
            if not self._event_idx:
                return None
            self._used[2 + 4 * self.size] = last  # avail_event
            with _fence:
                pass
            if avail[1] == last:
                return None
        size = self.size
        if avail[1] - last & 0xFFFF > size:
            raise QueueError(f"available index {avail[1]} is more than {size} ahead of {last}")
        head = avail[2 + (last & size - 1)]
        chain = self._walk(head)
        self._last_avail = last + 1 & 0xFFFF
        return chain

    def _walk(self, head: int) -> Chain:
        """Collect the buffers of the chain that begins with descriptor `head`."""
        view = self._memory.view
        unpack_from = _descriptor.unpack_from
        table, count, index = self._desc, self.size, head
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        try:
            for _ in range(CHAIN_MAX):
                if index >= count:
                    raise QueueError(f"descriptor {index} of {count}")
                gpa, length, flags, following = unpack_from(table, index * 16)
                if flags & VIRTQ_DESC_F_INDIRECT:
                    if not self._indirect or table is not self._desc or flags & VIRTQ_DESC_F_NEXT:
                        raise QueueError("an indirect table where none may be")  # 2.7.5.3.1
                    table, count, index = view(gpa, length), length // 16, 0
                    if not count or length % 16:
                        raise QueueError(f"an indirect table of {length} bytes")
                    continue
                if flags & VIRTQ_DESC_F_WRITE:
                    writable.append(view(gpa, length))
                elif writable:
                    raise QueueError("a readable buffer behind a writable one")  # 2.7.4.2
                else:
                    readable.append(view(gpa, length))
                if not flags & VIRTQ_DESC_F_NEXT:
                    return Chain(head, readable, writable)
                index = following
        except ValueError as error:
            raise QueueError(f"a buffer outside RAM: {error}") from None
        raise QueueError(f"a chain of more than {CHAIN_MAX} descriptors")

    def push(self, chain: Chain, length: int) -> None:
        """Give `chain` back, with `length` bytes written into its writable buffers."""
        if not self.ready:
            return  # reset while the request was under way: nobody waits for it any more
        index = self._used_idx
        slot = 2 * (index & self.size - 1)
        ring = self._used_ring
        ring[slot], ring[slot + 1] = chain.head, length
        self._used_idx = index = index + 1 & 0xFFFF
        self._used[1] = index  # x86 keeps stores in order: the entry is seen before the index

    def needs_interrupt(self) -> bool:
        """Say whether the driver wants to hear of what was pushed since the last call."""
        new, old = self._used_idx, self._signalled
        if not self.ready or new == old:
            return False
        self._signalled = new
        with _fence:
            pass
        if self._event_idx:
            used_event = self._avail[2 + self.size]
            return new - used_event - 1 & 0xFFFF < new - old & 0xFFFF
        return not self._avail[0] & VIRTQ_AVAIL_F_NO_INTERRUPT

    def save(self) -> dict[str, Any]:
        """Return sizes, addresses and indices."""
        return {
            "size": self.size,
            "desc": self.desc_gpa,
            "driver": self.driver_gpa,
            "device": self.device_gpa,
            "ready": self.ready,
            "last_avail": self._last_avail,
            "used_idx": self._used_idx,
            "signalled": self._signalled,
            "event_idx": self._event_idx,
            "indirect": self._indirect,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned; the RAM must be the one it was saved with."""
        self.reset()
        self.size = state["size"]
        self.desc_gpa, self.driver_gpa = state["desc"], state["driver"]
        self.device_gpa = state["device"]
        if state["ready"]:
            self.enable(event_idx=state["event_idx"], indirect=state["indirect"])
        self._last_avail, self._used_idx = state["last_avail"], state["used_idx"]
        self._signalled = state["signalled"]
