"""virtio network device: Ethernet frames between the guest and a backend: virtio 1.2, section 5.1.

Device ID 1. Queues receiveq1 (0) and transmitq1 (1). A chain is a header of 12 bytes (struct
virtio_net_hdr) and a frame. A backend that knows the header itself (a tap) is handed it as it is,
and then checksums and segmentation may be left to it (F_CSUM, F_HOST_TSO4 and so on); to another
the device hands bare frames, and gives the guest headers that say nothing.

Back-pressure is honest both ways. A frame that the backend does not take now stays in the
transmitq, and a guest's sender waits. Without receive buffers nothing is read from the backend: its
queue fills, and drops what it must.

Not emulated: several queue pairs, the control queue (so no filters: the guest gets every frame),
mergeable buffers, UFO, announcements, RSS. F_STATUS always says that the link is up.

Threads: vCPU threads or the device's own through the transport, the backend's through `readable`
and `writable`; all hold the device's lock. The backend is called with it held, and does not wait.
"""

import struct
from collections.abc import Sequence
from typing import Protocol

from tinyvmm.devices.virtio.device import DRIVER_OK, VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.views import cut, scatter, size_of

VIRTIO_ID_NET = 1
VIRTIO_NET_F_CSUM = 1 << 0
VIRTIO_NET_F_GUEST_CSUM = 1 << 1
VIRTIO_NET_F_MTU = 1 << 3
VIRTIO_NET_F_MAC = 1 << 5
VIRTIO_NET_F_GUEST_TSO4 = 1 << 7
VIRTIO_NET_F_GUEST_TSO6 = 1 << 8
VIRTIO_NET_F_HOST_TSO4 = 1 << 11
VIRTIO_NET_F_HOST_TSO6 = 1 << 12
VIRTIO_NET_F_STATUS = 1 << 16
VIRTIO_NET_S_LINK_UP = 1 << 0
OFFLOADS = (
    VIRTIO_NET_F_CSUM
    | VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_HOST_TSO4
    | VIRTIO_NET_F_HOST_TSO6
)

RECEIVE, TRANSMIT = 0, 1
QUEUE_SIZE = 256
HEADER_LEN = 12
FRAME_MIN = 14  # Ethernet's header
FRAME_MAX = 14 + 65535  # with segmentation; without, what the MTU says
_NO_OFFLOAD = struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, 1)  # of one buffer

_config = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu


class Backend(Protocol):
    """Where frames come from and go to."""

    vnet_header: bool
    """Whether frames have a struct virtio_net_hdr in front, here too."""

    def send(self, views: Sequence[memoryview]) -> bool:
        """Take a frame; False if that cannot be now, and then `writable` will be called."""

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Fill `views` with the next frame and return its length, None if there is none now.

        A frame too long for `views` is dropped, and the one after it given.
        """

    def watch(self, *, readable: bool) -> None:
        """Say when frames are there, by `readable`, or do not."""

    def use(self, features: int) -> None:
        """The driver accepted these features; of the offloads the guest will take those of them."""


class VirtioNet(VirtioDevice):
    """A network interface with address `mac`; `mtu` in bytes tells the guest what frames may be."""

    def __init__(self, backend: Backend, mac: bytes, *, mtu: int | None = None) -> None:
        features = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS
        features |= VIRTIO_NET_F_MTU if mtu is not None else 0
        features |= OFFLOADS if backend.vnet_header else 0
        super().__init__(
            "virtio-net",
            VIRTIO_ID_NET,
            queue_sizes=(QUEUE_SIZE, QUEUE_SIZE),
            features=features,
            config=_config.pack(mac, VIRTIO_NET_S_LINK_UP, 1, mtu or 0),
        )
        self._backend = backend

    def set_status(self, value: int) -> None:
        """Take the driver's status; from DRIVER_OK on the backend knows what it accepted."""
        with self.lock:
            before = self.running
            if value & DRIVER_OK and not before:
                self._backend.use(self.driver_features)
            super().set_status(value)

    def reset(self) -> None:
        """Forget the driver: nobody reads the backend."""
        super().reset()
        self._backend.watch(readable=False)

    def handle(self, queue: Virtqueue) -> None:
        """Send what frames there are, or note that there is room for what comes."""
        if queue.index == RECEIVE:
            self._backend.watch(readable=True)
            self.readable()  # frames that the backend has read already, nothing will tell of
        else:
            self._transmit(queue)

    def _transmit(self, queue: Virtqueue) -> None:
        skipped = 0 if self._backend.vnet_header else HEADER_LEN
        while (chain := queue.pop()) is not None:
            length = size_of(chain.readable) - HEADER_LEN
            if FRAME_MIN <= length <= FRAME_MAX and not self._backend.send(
                cut(chain.readable, skipped)
            ):
                queue.unpop()
                return
            queue.push(chain, 0)  # also what is no frame: then it is gone

    def writable(self) -> None:
        """The backend takes frames again. Any thread."""
        with self.lock:
            if self.running:
                self._transmit(self.queues[TRANSMIT])

    def readable(self) -> None:
        """Frames are there. Any thread."""
        with self.lock:
            queue = self.queues[RECEIVE]
            while self.running:
                chain = queue.pop()
                if chain is None:  # until there is room; the driver will tell
                    self._backend.watch(readable=False)
                    return
                if size_of(chain.writable) < HEADER_LEN + FRAME_MIN:
                    self.fail("receiveq: a buffer without room for a frame")
                    return
                written = self._receive(chain.writable)
                if written is None:
                    queue.unpop()
                    return
                queue.push(chain, written)

    def _receive(self, views: list[memoryview]) -> int | None:
        """Fill a buffer with header and frame; the bytes written, None if there is no frame."""
        if self._backend.vnet_header:
            count = self._backend.receive(views)
            if count is not None:
                scatter(views, b"\1\0", 10)  # num_buffers
            return count
        count = self._backend.receive(cut(views, HEADER_LEN))
        if count is None:
            return None
        scatter(views, _NO_OFFLOAD)
        return HEADER_LEN + count
