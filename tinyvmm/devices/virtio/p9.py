"""virtio 9P transport device: a mount tag and a queue of 9P requests.

Device ID 9. One queue: a chain's readable part is one request (T-message), its writable part the
room for the reply. Configuration space, with VIRTIO_9P_MOUNT_TAG: `le16 tag_len, u8 tag[tag_len]`,
the name a guest mounts by (`mount -t 9p -o trans=virtio TAG DIR`). virtio 1.2 only reserves the ID;
layout and feature bit are those of <linux/virtio_9p.h>. The length in the used ring is the reply's
own size field; Linux refuses a reply where they differ.

Requests are answered inline, on the thread of the vCPU that kicked and with the device's lock held,
in the order they come: what is asked most is answered quicker than handed over. Not emulated:
replies out of order.
"""

import struct
from typing import Protocol

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.errors import ConfigError

VIRTIO_ID_9P = 9
VIRTIO_9P_MOUNT_TAG = 1 << 0
QUEUE_SIZE = 128  # Linux's driver sizes its messages for 128 descriptors (VIRTQUEUE_NUM)
TAG_MAX = 255


class NinePHandler(Protocol):
    """Whoever answers 9P requests."""

    def handle(self, request: list[memoryview], reply: list[memoryview]) -> int:
        """Answer `request` into `reply`; return the reply's length, 0 if it does not fit."""


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
        self._answer = session.handle

    def handle(self, queue: Virtqueue) -> None:
        """Answer what requests there are."""
        answer = self._answer
        while (chain := queue.pop()) is not None:
            queue.push(chain, answer(chain.readable, chain.writable))
