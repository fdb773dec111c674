"""virtio 9P transport device: a mount tag and a queue of 9P requests.

Device ID 9. One queue: a chain's readable part is one request (T-message), its writable part the
room for the reply. Configuration space, with VIRTIO_9P_MOUNT_TAG: `le16 tag_len, u8 tag[tag_len]`,
the name a guest mounts by (`mount -t 9p -o trans=virtio TAG DIR`). virtio 1.2 only reserves the ID;
layout and feature bit are those of <linux/virtio_9p.h>. The length in the used ring is the reply's
own size field; Linux refuses a reply where they differ.

The session answers what need not wait inline: on the thread of the vCPU that kicked, with the
device's lock held, which is quicker than to hand it over. What has to wait is answered on a thread
of the session's, and replies leave in whatever order they are ready. A request whose client gave up
(Tflush) is returned with a length of 0, which Linux's driver takes for "no reply"
(net/9p/trans_virtio.c, req_done).

`save` waits for those, and saves the session with the device: what a mounted guest's fids stand for
is found again in the same tree (fileserver/saved.py).

A late reply is written to guest memory under the lock, and not at all if the driver has reset the
device since: its buffers are then no longer ours.
"""

import struct
import threading
from collections.abc import Callable
from typing import Any, Protocol

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain, Virtqueue
from tinyvmm.errors import ConfigError
from tinyvmm.views import scatter, size_of

VIRTIO_ID_9P = 9
VIRTIO_9P_MOUNT_TAG = 1 << 0
QUEUE_SIZE = 128  # Linux's driver sizes its messages for 128 descriptors (VIRTQUEUE_NUM)
TAG_MAX = 255

Finish = Callable[[], bytes | None]


class Waiting(Protocol):
    """A request whose answer may take its time."""

    def start(self, later: Callable[[Finish], None]) -> None:
        """Begin; `later` will be called, once or more often, on any thread.

        What it is given shall be called with the lock held, and gives the reply; b"" if there is
        to be none, None if nothing is to be done.
        """


class NinePHandler(Protocol):
    """Whoever answers 9P requests; called with the device's lock held."""

    def submit(self, request: list[memoryview], reply: list[memoryview]) -> int | Waiting:
        """Answer into `reply`, giving the reply's length, 0 for none; or what is to be started."""

    def close(self) -> None:
        """Forget everything about the client."""

    def save(self) -> dict[str, Any]:
        """Return what there is to know of the client, in plain JSON types; nothing is in flight."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on with the client that `save` described."""


class Virtio9P(VirtioDevice):
    """The file server's door: one `session` behind one mount `tag`."""

    def __init__(self, tag: str, session: NinePHandler) -> None:
        """Serve `session` as `tag`; ConfigError if the tag is empty or too long."""
        name = tag.encode()
        if not 1 <= len(name) <= TAG_MAX:
            raise ConfigError(f"mount tag {tag!r}: give it 1 to {TAG_MAX} bytes")
        super().__init__(
            f"virtio-9p {tag}",
            VIRTIO_ID_9P,
            queue_sizes=(QUEUE_SIZE,),
            features=VIRTIO_9P_MOUNT_TAG,
            config=struct.pack("<H", len(name)) + name,
        )
        self._session = session
        self._resets = 0
        self._in_flight = 0  # chains to be given back later
        self._answered = threading.Condition(self.lock)

    def handle(self, queue: Virtqueue) -> None:
        """Answer what requests there are."""
        submit = self._session.submit
        while (chain := queue.pop()) is not None:
            size = submit(chain.readable, chain.writable)
            if isinstance(size, int):
                queue.push(chain, size)
            else:
                self._in_flight += 1
                size.start(self._later(queue, chain))

    def _later(self, queue: Virtqueue, chain: Chain) -> Callable[[Finish], None]:
        """How a late reply reaches this chain."""
        resets = self._resets

        def later(finish: Finish) -> None:
            with self.lock:
                reply = finish()
                if reply is None or resets != self._resets:
                    return
                self._in_flight -= 1
                self._answered.notify_all()
                if self.running:
                    fits = len(reply) <= size_of(chain.writable)
                    queue.push(chain, scatter(chain.writable, reply) if fits else 0)

        return later

    def reset(self) -> None:
        """Forget the driver, and the client with it."""
        super().reset()
        self._resets += 1
        self._in_flight = 0
        self._answered.notify_all()
        self._session.close()

    def save(self) -> dict[str, Any]:
        """Return the state, once every request has its reply; vCPUs must be paused."""
        with self._answered:
            while self._in_flight:
                self._answered.wait()
            return super().save() | {"session": self._session.save()}

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described; what fids stood for is looked up anew."""
        with self.lock:
            super().load(state)
            self._session.load(state["session"])
