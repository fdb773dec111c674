"""A tap: a network interface of the host's whose other end is a descriptor of ours.

Documentation/networking/tuntap.rst, <linux/if_tun.h>. With IFF_VNET_HDR each frame has a struct
virtio_net_hdr in front, so the two kernels agree between themselves on checksums and segmentation,
and we pass frames on as they are. One read is one frame, and one write.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from tinyvmm.devices.virtio.net import (
    HEADER_LEN,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
)
from tinyvmm.errors import ConfigError
from tinyvmm.net.pump import Pump

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 1 << 0
TUN_F_TSO4 = 1 << 1
TUN_F_TSO6 = 1 << 2
IFNAMSIZ = 16

_OFFLOADS = (
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
)


class Tap:
    """The tap `name`, which is made if there is none and we may; `Backend` of a VirtioNet.

    `several`: one queue of it, of as many as are opened so. The kernel spreads what it sends over
    those that are enabled.
    """

    vnet_header = True

    def __init__(self, name: str, *, several: bool = False) -> None:
        """Attach to it; ConfigError with the remedy if that cannot be."""
        if not 1 <= len(name.encode()) < IFNAMSIZ or "/" in name:
            raise ConfigError(f"tap {name!r}: give a name of 1 to {IFNAMSIZ - 1} bytes")
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"tap {name}: cannot open /dev/net/tun ({error.strerror}); modprobe tun, as root"
            ) from None
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if several else 0)
        request = struct.pack("16sH22x", name.encode(), flags)
        try:
            fcntl.ioctl(self.fd, TUNSETIFF, bytearray(request))
            fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_LEN))
        except OSError as error:
            os.close(self.fd)
            remedy = _remedy(name, error.errno, several=several)
            raise ConfigError(f"tap {name}: {error.strerror}; {remedy}") from None
        self._several = several
        self._enabled = True
        self.pump = Pump(self.fd)

    def send(self, views: Sequence[memoryview]) -> bool:
        """Write a frame with its header."""
        try:
            os.writev(self.fd, views)
        except BlockingIOError:
            self.pump.want_write()
            return False
        except OSError:
            return True  # no frame that this interface takes, or it is down: lost, as on a wire
        return True

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Read a frame with its header."""
        try:
            return os.readv(self.fd, views)
        except BlockingIOError:
            return None
        except OSError:
            self.pump.want_read(False)  # it was taken away
            return None

    def watch(self, *, readable: bool) -> None:
        """See Backend.watch."""
        self.pump.want_read(readable)

    def use(self, features: int) -> None:
        """Let the host's kernel leave to the guest what the guest offered to do."""
        flags = sum(flag for feature, flag in _OFFLOADS if features & feature)
        if not flags & TUN_F_CSUM:
            flags = (
                0  # a driver has to accept this for the others (5.1.3.1), and the kernel insists
            )
        self._set(TUNSETOFFLOAD, flags)

    def enable(self, *, on: bool) -> None:
        """See Backend.enable."""
        if self._several and on != self._enabled:
            self._enabled = on
            flags = IFF_ATTACH_QUEUE if on else IFF_DETACH_QUEUE
            self._set(TUNSETQUEUE, struct.pack("16sH22x", b"", flags))

    def _set(self, request: int, argument: int | bytes) -> None:
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:
            if error.errno not in {errno.EBADFD, errno.EINVAL}:
                raise
            self.pump.want_read(False)  # it was taken away

    def close(self) -> None:
        """Stop, and let go of the interface."""
        self.pump.close()
        os.close(self.fd)


def _remedy(name: str, number: int | None, *, several: bool) -> str:
    """Return what to do when attaching has failed with this errno."""
    if number == errno.EBUSY:
        return "it is in use"
    if number == errno.EINVAL:  # it is there, and of the other sort
        return "it has one queue: leave queues= out" if several else "it has several: give queues=2"
    more = " multi_queue" if several else ""
    return f"make it for yourself: ip tuntap add {name} mode tap{more} user $USER"
