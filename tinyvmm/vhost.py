"""vhost: virtqueues that the host's kernel serves. <linux/vhost.h>, <linux/vhost_types.h>.

A device of ours takes a chain off a ring, does what it says and puts it back, each time in Python.
Where both ends of the data are in the host's kernel anyway, a socket of its or a tap, the kernel
can do that itself, beside the guest and without us: that is vhost. A VMM keeps what is rare, the
registers, features, interrupt vectors, and hands over what is not:

    guest's CPU                         the kernel's thread                       guest's CPU
    writes a doorbell                   reads and writes rings and                is interrupted
       └─ ioeventfd ─> "kick" eventfd ─> buffers in the guest's RAM ─> "call" eventfd ─> irqfd ─┘

Four things must be known to serve a ring, and each is an ioctl on a descriptor of /dev/vhost-*:

1. whose memory: VHOST_SET_OWNER makes it this process's, once and before all else, and
   VHOST_SET_MEM_TABLE says where in it each piece of the guest's RAM is. Descriptors hold
   guest-physical addresses; the kernel translates, and refuses what the table does not have.
2. what was agreed: VHOST_SET_FEATURES, of those that VHOST_GET_FEATURES offers.
3. each ring: its size (VHOST_SET_VRING_NUM), where it is (_ADDR, addresses of *ours*, unlike those
   in it), which chain is next (_BASE), and three eventfds: _KICK, which the guest's doorbell
   writes, _CALL, which interrupts it, _ERR, which says that the ring is not what it should be.
4. that it may begin: differs by device. VHOST_VSOCK_SET_RUNNING for a vsock.

To stop is the fourth undone; after that the kernel does not touch the RAM any more, and
VHOST_GET_VRING_BASE says which chain would have been next. The used idx is in RAM. That is all
there is to know of a ring, so it may be served by somebody else, or here again later: what pause,
save and load are made of. Size and base can be changed only while stopped; where it calls, always.

Threads: whoever calls holds the lock of the device that it serves.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.kvm import Struct, c_struct, s32, u32, u64
from tinyvmm.memory import Region


@c_struct(size=8)
class vhost_vring_state(Struct):
    """A number `num` of ring `index`."""

    index: u32 = 0
    num: u32 = 0


@c_struct(size=8)
class vhost_vring_file(Struct):
    """A descriptor for ring `index`; -1 for none."""

    index: u32 = 0
    fd: s32 = 0


@c_struct(size=40)
class vhost_vring_addr(Struct):
    """Where ring `index` is, in this process."""

    index: u32 = 0
    flags: u32 = 0
    desc_user_addr: u64 = 0
    used_user_addr: u64 = 0
    avail_user_addr: u64 = 0
    log_guest_addr: u64 = 0


@c_struct(size=32)
class vhost_memory_region(Struct):
    """Where a piece of the guest's RAM is in this process; sizes in bytes, all page-aligned."""

    guest_phys_addr: u64 = 0
    memory_size: u64 = 0
    userspace_addr: u64 = 0
    flags_padding: u64 = 0


@c_struct(size=8)
class vhost_memory(Struct):
    """What is in front of `nregions` vhost_memory_regions."""

    nregions: u32 = 0
    padding: u32 = 0


VHOST_VIRTIO = 0xAF
_NONE, _WRITE, _READ = 0, 1, 2  # <asm-generic/ioctl.h>


def _ioc(direction: int, number: int, size: int = 0) -> int:
    return direction << 30 | size << 16 | VHOST_VIRTIO << 8 | number


_STATE = ctypes.sizeof(vhost_vring_state)
_FILE = ctypes.sizeof(vhost_vring_file)
VHOST_GET_FEATURES = _ioc(_READ, 0x00, 8)
VHOST_SET_FEATURES = _ioc(_WRITE, 0x00, 8)
VHOST_SET_OWNER = _ioc(_NONE, 0x01)
VHOST_SET_MEM_TABLE = _ioc(_WRITE, 0x03, ctypes.sizeof(vhost_memory))
VHOST_SET_VRING_NUM = _ioc(_WRITE, 0x10, _STATE)
VHOST_SET_VRING_ADDR = _ioc(_WRITE, 0x11, ctypes.sizeof(vhost_vring_addr))
VHOST_SET_VRING_BASE = _ioc(_WRITE, 0x12, _STATE)
VHOST_GET_VRING_BASE = _ioc(_READ | _WRITE, 0x12, _STATE)
VHOST_SET_VRING_KICK = _ioc(_WRITE, 0x20, _FILE)
VHOST_SET_VRING_CALL = _ioc(_WRITE, 0x21, _FILE)
VHOST_SET_VRING_ERR = _ioc(_WRITE, 0x22, _FILE)
VHOST_VSOCK_SET_GUEST_CID = _ioc(_WRITE, 0x60, 8)
VHOST_VSOCK_SET_RUNNING = _ioc(_WRITE, 0x61, 4)


class Ring(Protocol):
    """What is to be known of a ring; a Virtqueue is one. Its addresses are guest-physical."""

    index: int
    size: int
    desc_gpa: int
    avail_gpa: int
    used_gpa: int
    last_avail: int


class Vhost:
    """A descriptor of /dev/vhost-`kind`, ours, that knows the guest's RAM.

    Methods raise OSError, with the ioctl's name, for what the kernel refuses.
    """

    def __init__(self, kind: str, option: str, regions: Sequence[Region]) -> None:
        """Open it for `regions` of RAM; ConfigError, naming `option`, with the remedy."""
        self._regions = regions
        path = f"/dev/vhost-{kind}"
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError) as error:
            why = (
                f"does not exist: load its module (modprobe vhost_{kind})"
                if isinstance(error, FileNotFoundError)
                else "may not be opened: join its group (usermod -aG kvm USER) and log in anew"
            )
            raise ConfigError(f"{option}: {path} {why}") from None
        except OSError as error:
            raise ConfigError(f"{option}: cannot open {path}: {error.strerror}") from None
        try:
            self.ioctl("VHOST_SET_OWNER")
            self.ioctl("VHOST_SET_MEM_TABLE", memory_table(regions))
            offered = bytearray(8)
            self.ioctl("VHOST_GET_FEATURES", offered)
        except OSError as error:
            self.close()
            raise ConfigError(f"{option}: {path}: {error.strerror}") from None
        self.features = int.from_bytes(offered, "little")

    def ioctl(self, name: str, argument: Struct | bytearray | int = 0) -> None:
        """Issue the ioctl called `name`."""
        try:
            fcntl.ioctl(self.fd, globals()[name], argument)
        except OSError as error:
            number = error.errno or 0
            raise OSError(number, f"{name}: {os.strerror(number)}") from None

    def set_features(self, features: int) -> None:
        """Go by these features from now on."""
        self.ioctl("VHOST_SET_FEATURES", bytearray(features.to_bytes(8, "little")))

    def set_ring(self, ring: Ring, kick: int, call: int, err: int) -> None:
        """Say all there is to know of a ring that is stopped, and its eventfds.

        ValueError if it is not in RAM.
        """
        index = ring.index
        self.ioctl("VHOST_SET_VRING_NUM", vhost_vring_state(index=index, num=ring.size))
        self.ioctl("VHOST_SET_VRING_BASE", vhost_vring_state(index=index, num=ring.last_avail))
        addresses = vhost_vring_addr(
            index=index,
            desc_user_addr=self.hva(ring.desc_gpa),
            used_user_addr=self.hva(ring.used_gpa),
            avail_user_addr=self.hva(ring.avail_gpa),
        )
        self.ioctl("VHOST_SET_VRING_ADDR", addresses)
        self.ioctl("VHOST_SET_VRING_ERR", vhost_vring_file(index=index, fd=err))
        self.set_call(index, call)
        self.ioctl("VHOST_SET_VRING_KICK", vhost_vring_file(index=index, fd=kick))

    def set_call(self, index: int, fd: int) -> None:
        """Have ring `index` interrupt by eventfd `fd` from now on."""
        self.ioctl("VHOST_SET_VRING_CALL", vhost_vring_file(index=index, fd=fd))

    def ring_base(self, index: int) -> int:
        """Return which chain is next in ring `index`, which is stopped: what last_avail was."""
        state = vhost_vring_state(index=index)
        self.ioctl("VHOST_GET_VRING_BASE", state)
        return state.num

    def hva(self, gpa: int) -> int:
        """Return where in this process the guest's `gpa` is; ValueError if it is not RAM."""
        for region in self._regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return gpa - region.gpa + region.hva
        raise ValueError(f"{gpa:#x} is not RAM")

    def close(self) -> None:
        """Stop, and let go of everything; harmless when done twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class VhostVsock(Vhost):
    """/dev/vhost-vsock: the host's AF_VSOCK reaches the guest as `cid`, and the guest it as 2."""

    def __init__(self, cid: int, regions: Sequence[Region]) -> None:
        """Be `cid`, of which a host has one; ConfigError with the remedy if that cannot be."""
        super().__init__("vsock", "--vsock vhost", regions)
        try:
            self.ioctl("VHOST_VSOCK_SET_GUEST_CID", bytearray(cid.to_bytes(8, "little")))
        except OSError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"--vsock vhost: another guest of this computer has CID {cid}: give one of its "
                    f"own (--vsock vhost,cid={cid + 1})"
                ) from None
            raise ConfigError(f"--vsock vhost,cid={cid}: {error.strerror}") from None

    def set_running(self, running: bool) -> None:
        """Begin to serve the rings, or stop and not touch RAM any more."""
        self.ioctl("VHOST_VSOCK_SET_RUNNING", bytearray(int(running).to_bytes(4, "little")))


def memory_table(regions: Sequence[Region]) -> bytearray:
    """Return a struct vhost_memory with its regions."""
    table = bytearray(vhost_memory(nregions=len(regions)))
    for region in regions:
        table += bytes(
            vhost_memory_region(
                guest_phys_addr=region.gpa, memory_size=region.size, userspace_addr=region.hva
            )
        )
    return table
