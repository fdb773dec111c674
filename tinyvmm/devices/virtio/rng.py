"""Entropy device (virtio 1.2, section 5.4): the model of a virtio device. Read it first.

Model: device ID 4; one queue, requestq; no features, no configuration. Each buffer the driver adds
is filled with random bytes from the host's kernel and given back. Not emulated: nothing.
"""

import os

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain

REQUESTQ = 0
REQUEST_MAX = 4096  # bytes for one request; a device may give fewer than were asked for


class VirtioRng(VirtioDevice):
    """Random bytes for whoever asks."""

    name = "rng"
    device_id = 4
    queue_sizes = (64,)

    def handle_queue(self, index: int) -> None:
        """Fill what the driver has added."""
        self.drain(index, self._fill)

    def _fill(self, chain: Chain) -> int:
        written = 0
        for buffer in chain.writable:
            length = min(len(buffer), REQUEST_MAX - written)
            buffer[:length] = os.urandom(length)
            written += length
        return written
