"""virtio entropy device: virtio 1.2, section 5.4. The model for every other: read it first.

Device ID 4. One queue, requestq, of chains the device fills with random bytes. No feature bits, no
configuration space. The bytes are the host kernel's (getrandom). Not emulated: nothing is left out.

Threads: the vCPU's that kicked, with the device's lock held.
"""

import os

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue

VIRTIO_ID_RNG = 4
# The device may fill less than it is given (5.4.6.2); Linux asks for a cache line at a time.
FILL_MAX = 4096


class VirtioRng(VirtioDevice):
    """A source of entropy; it has no state and no thread of its own."""

    def __init__(self) -> None:
        super().__init__("virtio-rng", VIRTIO_ID_RNG, queue_sizes=(8,))

    def handle(self, queue: Virtqueue) -> None:
        """Fill what chains there are."""
        while (chain := queue.pop()) is not None:
            filled = 0
            for buffer in chain.writable:
                part = buffer[: FILL_MAX - filled]
                part[:] = os.urandom(len(part))
                filled += len(part)
            queue.push(chain, filled)
