"""What a vsock packet says, and what is known of a connection: virtio 1.2, section 5.10.6.

vsock.py has what is done with them.
"""

import struct
from collections import deque
from collections.abc import Sequence
from typing import Protocol

VMADDR_CID_HOST = 2

VIRTIO_VSOCK_TYPE_STREAM = 1
VIRTIO_VSOCK_OP_REQUEST = 1
VIRTIO_VSOCK_OP_RESPONSE = 2
VIRTIO_VSOCK_OP_RST = 3
VIRTIO_VSOCK_OP_SHUTDOWN = 4
VIRTIO_VSOCK_OP_RW = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7
VIRTIO_VSOCK_SHUTDOWN_RCV = 1 << 0
VIRTIO_VSOCK_SHUTDOWN_SEND = 1 << 1

U32 = 0xFFFF_FFFF

# src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt
header = struct.Struct("<QQIIIHHIII")


class Peer(Protocol):
    """The host's end of a connection: a stream that never waits."""

    def accepted(self, host_port: int) -> None:
        """The guest has answered."""

    def send(self, views: Sequence[memoryview]) -> int:
        """Take some of the guest's bytes and return how many; OSError if none ever again."""

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Fill `views` with bytes for the guest: how many, 0 at the end, None if none are there.

        OSError if there never will be.
        """

    def end_output(self) -> None:
        """Let the host see the end of what the guest sent."""

    def watch(self, *, readable: bool, writable: bool) -> None:
        """Say when bytes are there, or can be taken: by `VirtioVsock.readable` and `writable`."""

    def close(self) -> None:
        """Be done with it, both ways."""


class Connection:
    """One connection: what was said, what is still to be, and the bytes in between."""

    def __init__(
        self, guest_port: int, host_port: int, peer: Peer | None, *, open_: bool, buf_alloc: int = 0
    ) -> None:
        self.guest_port, self.host_port = guest_port, host_port
        self.peer = peer
        self.open = open_  # both sides have agreed
        self.buf_alloc = buf_alloc  # the most that `waiting` may become
        self.watched = False, False  # what the peer watches for: see there
        self.waiting = bytearray()  # of the guest's bytes, for a host that does not take them yet
        self.received = self.forwarded = self.told = 0  # of them; `told` is the last fwd_cnt sent
        self.sent = 0  # to the guest
        self.guest_buf_alloc = self.guest_fwd_cnt = 0
        self.guest_shutdown = self.host_shutdown = 0  # VIRTIO_VSOCK_SHUTDOWN_*, as each side said
        self.answers: deque[int] = deque()  # operations to be sent; each at most once

    def credit(self) -> int:
        """How many more bytes the guest has room for; below 0 if it has taken some back."""
        return self.guest_buf_alloc - (self.sent - self.guest_fwd_cnt & U32)
