"""virtio traditional memory balloon device: virtio 1.2, section 5.5.

Device ID 5. The host says how many 4 KiB pages it wants back (`num_pages` of the configuration
space); the driver takes that many from its kernel, tells their page frame numbers through inflateq,
and what they held is given back to the host. It says in `actual` how far it has come. When the
host wants fewer it takes pages back through deflateq and uses them again: they read as zeros.

    queue 0  inflateq      le32 page frame numbers: the host may have these
    queue 1  deflateq      le32 page frame numbers: in use again
    queue 2  statsq        { le16 tag, le64 val }[], kept until the host wants newer ones
    queue 3  free_page_vq  not offered; taken for reporting_vq, see below
    queue 4  reporting_vq  writable buffers that lie in free memory, free until they come back

With VIRTIO_BALLOON_F_PAGE_REPORTING the kernel tells by itself, again and again, what memory it has
free: what a guest once used and freed returns to the host without anybody asking. The specification
makes that queue 4. Linux (vp_find_vqs) numbers the queues that it uses without gaps, so there it is
queue 3, or 2 for a driver without statistics; here each of them will do.

VIRTIO_BALLOON_F_DEFLATE_ON_OOM lets the guest take pages back before it kills a process for want of
memory: the balloon is a wish, not a limit.

Not emulated: MUST_TELL_HOST (not needed: the host provides a page whenever it is touched again),
FREE_PAGE_HINT (a migration's helper), PAGE_POISON.

What the guest says may be false: it loses only what it had. Page frames that are not RAM are
ignored, and of one buffer no more than PFNS_MAX are looked at, the rest staying as they are.

Threads: `handle` on the one that its doorbells wake; `resize` and `stats` on any of the host's,
`stats` waiting without the lock (`_news`, a Condition on it) for the guest to answer.
"""

import struct
import threading
from typing import Any, Protocol

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain, Virtqueue

VIRTIO_ID_BALLOON = 5
VIRTIO_BALLOON_F_STATS_VQ = 1 << 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 1 << 2
VIRTIO_BALLOON_F_PAGE_REPORTING = 1 << 5
VIRTIO_BALLOON_PFN_SHIFT = 12
INFLATEQ, DEFLATEQ, STATSQ, REPORTING_VQ = 0, 1, 2, 4

# Linux tells 256 page frames, FreeBSD 1,024 at a time.
PFNS_MAX = 1 << 12
# Names of the tags (5.5.6.4), in order.
STAT_NAMES = (
    *("swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available"),
    *("disk_caches", "hugetlb_allocations", "hugetlb_failures"),
)
_STATS_LEN_MAX = 1024
_config = struct.Struct("<II")  # num_pages, actual
_stat = struct.Struct("<HQ")


class ReclaimableMemory(Protocol):
    """The guest's RAM, parts of which the host can have back."""

    def view(self, gpa: int, length: int) -> memoryview:
        """Return `length` writable bytes at `gpa`; ValueError if they are not all RAM."""

    def discard(self, buffer: memoryview) -> int:
        """Give the pages wholly in `buffer` back to the host; they then read as zeros."""


class VirtioBalloon(VirtioDevice):
    """A balloon in `memory`, at first as large as `size` bytes."""

    ioeventfd = True  # to free megabytes takes its time, and meanwhile the guest can do other work

    def __init__(self, memory: ReclaimableMemory, size: int = 0) -> None:
        super().__init__(
            "virtio-balloon",
            VIRTIO_ID_BALLOON,
            queue_sizes=(128, 128, 2, 64, 64),
            features=VIRTIO_BALLOON_F_STATS_VQ
            | VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | VIRTIO_BALLOON_F_PAGE_REPORTING,
            config=_config.pack(_pages(size), 0),
        )
        self._reclaimable = memory
        self._news = threading.Condition(self.lock)
        self._stats: dict[str, int] = {}
        self._stats_count = 0
        self._stats_chain: Chain | None = None
        self.reclaimed = 0
        """How many bytes the host has got back by it so far."""

    # --- for the host -----------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """Ask the guest to have `size` bytes in the balloon; from any thread."""
        with self.lock:
            self.set_config(_config.pack(_pages(size), self._actual_pages))

    @property
    def actual(self) -> int:
        """How many bytes the guest says are in the balloon."""
        return self._actual_pages << VIRTIO_BALLOON_PFN_SHIFT

    def stats(self, timeout: float = 1.0) -> dict[str, int] | None:
        """Ask the guest about its memory: by name, in bytes or counts of events.

        None if it does not answer within `timeout` seconds. From any thread but a vCPU's.
        """
        with self._news:
            count = self._stats_count
            if self._stats_chain is not None:
                chain, self._stats_chain = self._stats_chain, None
                self.queues[STATSQ].push(chain, 0)
            elif not self.running:
                return None
            if not self._news.wait_for(lambda: self._stats_count != count, timeout):
                return None
            return dict(self._stats)

    @property
    def _actual_pages(self) -> int:
        return int(_config.unpack(self.config)[1])

    # --- for the driver ---------------------------------------------------------------------

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take `actual`, all that a driver may write (5.5.6.1)."""
        if (offset, size) == (4, 4):
            self.config = self.config[:4] + struct.pack("<I", value & 0xFFFF_FFFF)

    def handle(self, queue: Virtqueue) -> None:
        """Take what the guest gives, says, or takes back."""
        index = queue.index
        while (chain := queue.pop()) is not None:
            if index == STATSQ and self.driver_features & VIRTIO_BALLOON_F_STATS_VQ:
                self._take_stats(queue, chain)
                continue
            if index == INFLATEQ:
                self._inflate(chain)
            elif index != DEFLATEQ:
                for buffer in chain.writable:
                    self.reclaimed += self._reclaimable.discard(buffer)
            queue.push(chain, 0)

    def _inflate(self, chain: Chain) -> None:
        """Give the pages named back to the host, neighbours together."""
        data = _head(chain.readable, 4 * PFNS_MAX)
        frames = sorted(set(struct.unpack(f"<{len(data) // 4}I", data[: len(data) & ~3])))
        start = 0
        for place in range(1, len(frames) + 1):
            if place == len(frames) or frames[place] != frames[place - 1] + 1:
                self._discard(frames[start], place - start)
                start = place

    def _discard(self, frame: int, count: int) -> None:
        gpa, length = frame << VIRTIO_BALLOON_PFN_SHIFT, count << VIRTIO_BALLOON_PFN_SHIFT
        try:
            buffer = self._reclaimable.view(gpa, length)
        except ValueError:
            if count > 1:  # some of it may be RAM, up to its end or from its beginning
                half = count // 2
                self._discard(frame, half)
                self._discard(frame + half, count - half)
            return
        self.reclaimed += self._reclaimable.discard(buffer)

    def _take_stats(self, queue: Virtqueue, chain: Chain) -> None:
        """Remember what the guest says; its buffer goes back when more is wanted (5.5.6.3)."""
        if self._stats_chain is not None:  # two, where only one may be: keep the newer
            queue.push(self._stats_chain, 0)
        self._stats_chain = chain
        data = _head(chain.readable, _STATS_LEN_MAX)
        told = _stat.iter_unpack(data[: len(data) // _stat.size * _stat.size])
        self._stats = {STAT_NAMES[tag]: value for tag, value in told if tag < len(STAT_NAMES)}
        self._stats_count += 1
        self._news.notify_all()

    # --- state ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the driver: it has nothing in the balloon, and has told nothing."""
        super().reset()
        self.config = self.config[:4] + bytes(4)
        self._stats_chain = None
        self._stats = {}

    def save(self) -> dict[str, Any]:
        """Return the state; of a buffer that is kept, its head is all `push` needs."""
        with self.lock:
            kept = self._stats_chain
            return super().save() | {
                "stats": dict(self._stats),
                "stats_head": None if kept is None else kept.head,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described."""
        with self.lock:
            super().load(state)
            self._stats = dict(state["stats"])
            head = state["stats_head"]
            self._stats_chain = None if head is None else Chain(head, [], [])


def _pages(size: int) -> int:
    pages = size >> VIRTIO_BALLOON_PFN_SHIFT
    if not 0 <= pages < 1 << 32:
        raise ValueError(f"a balloon of {size} bytes")
    return pages


def _head(buffers: list[memoryview], most: int) -> bytes:
    """Copy the first `most` bytes of what the driver wrote."""
    data = bytearray()
    for buffer in buffers:
        data += buffer[: most - len(data)]
    return bytes(data)
