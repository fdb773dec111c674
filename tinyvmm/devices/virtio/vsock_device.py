"""What both vsock devices are, whoever carries their packets: virtio 1.2, section 5.10.

Device ID 19, queues rx (0), tx (1) and event (2); the configuration space is the guest's CID. The
event queue tells the guest, once, that all connections are gone: after `load`.
"""

import struct
from typing import Any

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.views import scatter

VIRTIO_ID_VSOCK = 19
CID_MIN, CID_MAX = 3, 0xFFFF_FFFE
VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0
RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 128


class VsockDevice(VirtioDevice):
    """A vsock device without what carries its packets."""

    def __init__(self, cid: int, *, features: int = 0) -> None:
        super().__init__(
            "virtio-vsock",
            VIRTIO_ID_VSOCK,
            queue_sizes=(QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE),
            features=features,
            config=struct.pack("<Q", cid),
        )
        self.cid = cid
        self._transport_reset = False

    def reset(self) -> None:
        """Forget the driver."""
        super().reset()
        self._transport_reset = False

    def flush_event(self) -> None:
        """Tell the guest what there is to be told, once it has a buffer for it."""
        queue = self.queues[EVENT]
        if self._transport_reset and (chain := queue.pop()) is not None:
            self._transport_reset = False
            data = struct.pack("<I", VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)
            queue.push(chain, scatter(chain.writable, data))

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described; the guest is told that its connections are gone."""
        with self.lock:
            super().load(state)
            self._transport_reset = self.running
            if self.running:
                self.flush_event()
