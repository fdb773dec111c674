"""A virtio device that Linux already has a driver for: entropy that is none.

    python -m tinyvmm run --device examples.pattern_rng:PatternRng,text=abcd -- sh -c '
        echo virtio_rng.1 > /sys/class/misc/hw_random/rng_current; head -c 30 /dev/hwrng'

It claims the ID of the entropy device (virtio 1.2, section 5.4), so that Linux's virtio_rng takes
it, and fills what the driver asks for with the same text again and again. Good for a test that must
know what random numbers it gets, and for nothing else.
"""

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue

VIRTIO_ID_RNG = 4
FILL_MAX = 4096  # bytes of one request: a guest may ask for more than we want to make at once


class PatternRng(VirtioDevice):
    """One queue, no features, no configuration, nothing to save beyond what every device has."""

    def __init__(self, text: str = "tinyvmm ") -> None:
        if not text:
            raise ValueError("the text is empty")
        super().__init__("pattern-rng", VIRTIO_ID_RNG, queue_sizes=(8,))
        self.pattern = text.encode() * (FILL_MAX // len(text) + 1)

    def handle(self, queue: Virtqueue) -> None:
        """Fill what chains there are; each begins with the text's beginning."""
        while (chain := queue.pop()) is not None:
            filled = 0
            for buffer in chain.writable:
                part = self.pattern[filled : min(filled + len(buffer), FILL_MAX)]
                buffer[: len(part)] = part
                filled += len(part)
            queue.push(chain, filled)
