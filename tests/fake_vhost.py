"""The kernel's side of vhost-vsock, for where there is none: tests/test_vhost.py."""

import errno
from typing import Any

from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.devices.virtio.vhost_vsock import VIRTIO_VSOCK_F_SEQPACKET

RING_FEATURES = 1 << 32 | 1 << 29 | 1 << 28


class Kernel:
    """The kernel's side, which remembers, and plays it when told to."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.features = RING_FEATURES | VIRTIO_VSOCK_F_SEQPACKET
        self.eventfds: dict[int, tuple[int, int, int]] = {}
        self.base = [0, 0]
        self.refuses = False
        self.closed = self.running = False

    def set_features(self, features: int) -> None:
        self.log.append(("features", features))

    def set_ring(self, ring: Virtqueue, kick: int, call: int, err: int) -> None:
        self.log.append(("ring", ring.index, ring.last_avail))
        self.eventfds[ring.index] = kick, call, err
        self.base[ring.index] = ring.last_avail

    def set_call(self, index: int, fd: int) -> None:
        self.log.append(("call", index))
        kick, _, err = self.eventfds[index]
        self.eventfds[index] = kick, fd, err

    def set_running(self, running: bool) -> None:
        if self.refuses:
            raise OSError(errno.EFAULT, "VHOST_VSOCK_SET_RUNNING: Bad address")
        self.running = running
        self.log.append("run" if running else "stop")

    def ring_base(self, index: int) -> int:
        return self.base[index]

    def close(self) -> None:
        self.log.append("close")
        self.closed, self.running = True, False
