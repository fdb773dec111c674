"""9P transport device: a channel that carries 9P requests and replies. The root filesystem's.

Model: device ID 9 (virtio 1.2, section 5 lists it as "9P transport"; its layout is that of
<linux/virtio_9p.h>): one queue, and a mount tag in the configuration space, by which the guest
names it: `mount -t 9p TAG /mnt -o trans=virtio`. A chain holds one request in its readable buffers
and room for the reply in its writable ones. Not emulated: nothing; what 9P means is the session's.

The reply's length in the used ring must equal its own size field: Linux refuses it otherwise.
Requests are served on the thread that notifies, one after the other: most are quicker to answer
than to hand over.
"""

from typing import Protocol

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain

VIRTIO_9P_MOUNT_TAG = 1 << 0


class NinePHandler(Protocol):
    """The session of a 9P server."""

    def handle(self, request: list[memoryview], reply: list[memoryview]) -> int:
        """Serve one request; the length of the reply written, 0 if there was no room for one."""


class Virtio9P(VirtioDevice):
    """A 9P channel with a tag."""

    name = "9p"
    device_id = 9
    features = VIRTIO_9P_MOUNT_TAG
    queue_sizes = (128,)

    def __init__(self, tag: str, session: NinePHandler) -> None:
        """Serve requests by `session`; the guest mounts it by `tag`."""
        super().__init__()
        self._tag = tag.encode()
        self._session = session

    def config(self) -> bytes:
        """Return struct virtio_9p_config: u16 tag_len, tag."""
        return len(self._tag).to_bytes(2, "little") + self._tag

    def handle_queue(self, index: int) -> None:
        """Serve every request the driver has added."""
        self.drain(index, self._serve)

    def _serve(self, chain: Chain) -> int:
        return self._session.handle(chain.readable, chain.writable)
