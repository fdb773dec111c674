"""virtio network device: Ethernet frames between the guest and a backend: virtio 1.2, section 5.1.

Device ID 1. Queues receiveq1 (0) and transmitq1 (1), receiveq2 (2) and so on, and behind the last
pair, where there are several, the control queue, by which the driver says how many it uses: one
until it does. A chain is a header of 12 bytes (struct
virtio_net_hdr) and a frame. A backend that knows the header itself (a tap) is handed it as it is,
and then checksums and segmentation may be left to it (F_CSUM, F_HOST_TSO4 and so on); to another
the device hands bare frames, and gives the guest headers that say nothing.

Back-pressure is honest both ways. A frame that the backend does not take now stays in the
transmitq, and a guest's sender waits. Without receive buffers nothing is read from the backend: its
queue fills, and drops what it must.

Not emulated: filters (the guest gets every frame) and whatever else the control queue might do,
mergeable buffers, UFO, announcements, RSS. F_STATUS always says that the link is up.

Threads: vCPU threads or the device's own through the transport, each backend's through `readable`
and `writable` of its `Pair`; all hold the device's lock. A backend is called with it held, and does
not wait.
"""

import struct
from collections.abc import Sequence
from typing import Any, Protocol

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
VIRTIO_NET_F_CTRL_VQ = 1 << 17
VIRTIO_NET_F_MQ = 1 << 22
VIRTIO_NET_S_LINK_UP = 1 << 0
VIRTIO_NET_CTRL_MQ = 4
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET = 0
VIRTIO_NET_OK, VIRTIO_NET_ERR = 0, 1
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
CONTROL_QUEUE_SIZE = 64
PAIRS_MAX = 16
HEADER_LEN = 12
FRAME_MIN = 14  # Ethernet's header
FRAME_MAX = 14 + 65535  # with segmentation; without, what the MTU says
_NO_OFFLOAD = struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, 1)  # of one buffer

_config = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
_pairs_set = struct.Struct("<BBH")  # class, command, virtqueue_pairs


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

    def enable(self, *, on: bool) -> None:
        """Be one of those in use, of several that lead to the same place, or be none."""


class Pair:
    """A receiveq, its transmitq and the backend that both lead to; a pump.Device."""

    def __init__(self, device: "VirtioNet", number: int, backend: Backend) -> None:
        self.backend = backend
        self._device = device
        self._receiveq = device.queues[2 * number + RECEIVE]
        self._transmitq = device.queues[2 * number + TRANSMIT]
        self.enabled = False

    def enable(self, *, on: bool) -> None:
        """Have frames come here, or not; the lock is held."""
        self.enabled = on
        self.backend.enable(on=on)
        self.backend.watch(readable=on and self._device.running)

    def receive(self) -> None:
        """Note that there is room for what comes; the lock is held."""
        if self.enabled:
            self.backend.watch(readable=True)
            self.readable()  # frames that the backend has read already, nothing will tell of

    def transmit(self) -> None:
        """Send what frames there are; the lock is held."""
        queue, send = self._transmitq, self.backend.send
        bare = not self.backend.vnet_header
        while (chain := queue.pop()) is not None:
            views = chain.readable
            length = size_of(views) - HEADER_LEN
            if FRAME_MIN <= length <= FRAME_MAX and not send(_bare(views) if bare else views):
                queue.unpop()
                return
            queue.push(chain, 0)  # also what is no frame: then it is gone

    def writable(self) -> None:
        """The backend takes frames again. Any thread."""
        with self._device.lock:
            if self._device.running:
                self.transmit()

    def readable(self) -> None:
        """Frames are there. Any thread."""
        device, queue = self._device, self._receiveq
        with device.lock:
            while device.running and self.enabled:
                chain = queue.pop()
                if chain is None:  # until there is room; the driver will tell
                    self.backend.watch(readable=False)
                    return
                if size_of(chain.writable) < HEADER_LEN + FRAME_MIN:
                    device.fail("receiveq: a buffer without room for a frame")
                    return
                written = self._receive(chain.writable)
                if written is None:
                    queue.unpop()
                    return
                queue.push(chain, written)

    def _receive(self, views: list[memoryview]) -> int | None:
        """Fill a buffer with header and frame; the bytes written, None if there is no frame."""
        if self.backend.vnet_header:
            count = self.backend.receive(views)
            if count is not None:
                scatter(views, b"\1\0", 10)  # num_buffers
            return count
        count = self.backend.receive(_bare(views))
        if count is None:
            return None
        scatter(views, _NO_OFFLOAD)
        return HEADER_LEN + count


class VirtioNet(VirtioDevice):
    """A network interface with address `mac`; `mtu` in bytes tells the guest what frames may be.

    Of several `backends`, which lead to the same place, each gets a pair of queues.
    """

    ioeventfd = True

    def __init__(self, backends: Sequence[Backend], mac: bytes, *, mtu: int | None = None) -> None:
        pairs = len(backends)
        features = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS
        features |= VIRTIO_NET_F_MTU if mtu is not None else 0
        features |= OFFLOADS if backends[0].vnet_header else 0
        sizes = [QUEUE_SIZE] * (2 * pairs)
        if pairs > 1:
            features |= VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ
            sizes.append(CONTROL_QUEUE_SIZE)
        super().__init__(
            "virtio-net",
            VIRTIO_ID_NET,
            queue_sizes=sizes,
            features=features,
            config=_config.pack(mac, VIRTIO_NET_S_LINK_UP, pairs, mtu or 0),
        )
        self.pairs = [Pair(self, number, backend) for number, backend in enumerate(backends)]
        self._enable(1)

    def _enable(self, count: int) -> None:
        """Use the first `count` pairs and no other."""
        for number, pair in enumerate(self.pairs):
            pair.enable(on=number < count)

    def set_status(self, value: int) -> None:
        """Take the driver's status; from DRIVER_OK on the backend knows what it accepted."""
        with self.lock:
            if value & DRIVER_OK and not self.running:
                self.pairs[0].backend.use(self.driver_features)
            super().set_status(value)

    def reset(self) -> None:
        """Forget the driver: nobody reads the backends, and there is one pair."""
        super().reset()
        self._enable(1)

    def handle(self, queue: Virtqueue) -> None:
        """Serve `queue`: a pair's, or the control queue, which comes behind the last there may be.

        Without VIRTIO_NET_F_MQ there may be one (5.1.2).
        """
        several = self.driver_features & VIRTIO_NET_F_MQ
        pair, direction = divmod(queue.index, 2)
        if (pair and not several) or pair == len(self.pairs):
            if queue.index == 2 * (len(self.pairs) if several else 1):
                self._control(queue)
        elif direction == RECEIVE:
            self.pairs[pair].receive()
        else:
            self.pairs[pair].transmit()

    def _control(self, queue: Virtqueue) -> None:
        """Carry out commands: class, command, its data; and room for one byte, the answer."""
        if not self.driver_features & VIRTIO_NET_F_CTRL_VQ:
            return
        while (chain := queue.pop()) is not None:
            command = b"".join(cut(chain.readable, 0, _pairs_set.size + 1))
            done = len(command) == _pairs_set.size and self._command(*_pairs_set.unpack(command))
            answer = VIRTIO_NET_OK if done else VIRTIO_NET_ERR
            queue.push(chain, scatter(chain.writable, bytes((answer,))))

    def _command(self, kind: int, command: int, count: int) -> bool:
        """Carry out VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (5.1.6.5.6.1); False for any other."""
        wanted = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)
        most = len(self.pairs) if self.driver_features & VIRTIO_NET_F_MQ else 0
        if (kind, command) != wanted or not 1 <= count <= most:
            return False
        self._enable(count)
        return True

    # --- state ------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the state, with how many pairs are in use."""
        with self.lock:
            return super().save() | {"pairs": sum(pair.enabled for pair in self.pairs)}

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described, and go on where that stopped."""
        with self.lock:
            super().load(state)
            if self.running:
                self.pairs[0].backend.use(self.driver_features)
            self._enable(state["pairs"])
            for pair in self.pairs:
                pair.writable()


def _bare(views: list[memoryview]) -> list[memoryview]:
    """Give what lies behind the header."""
    first = views[0]
    if len(first) == HEADER_LEN:  # as Linux has it when it receives,
        return views[1:]
    if len(first) > HEADER_LEN:  # and when it sends
        return [first[HEADER_LEN:], *views[1:]]
    return cut(views, HEADER_LEN)
