"""Guest RAM: one memfd mapped shared, seen below and above the hole that devices live in.

A guest-physical address (gpa) is valid where a `Region` holds it; `view` is the only way to reach
the bytes, and it checks its range every time, because most addresses come from the guest. One memfd
means that RAM can later be handed to another process, saved with its holes, or mapped privately.

Where the host lets us, it has huge pages. The guest's first touch of a page is an exit, of which
there are up to 512 times fewer then; a stock kernel that boots on small pages makes 23,000.

Any thread may call anything here: regions never change while the memory is open.
"""

import ctypes
import errno
import mmap
import os

from tinyvmm.errors import ConfigError
from tinyvmm.layout import MMIO_HOLE_GPA, PAGE_SIZE, RAM_ABOVE_4G_GPA
from tinyvmm.named import NamedTuple

MIN_SIZE = 1 << 20
HUGE_PAGE_SIZE = 2 << 20

FALLOC_FL_KEEP_SIZE = 1 << 0
FALLOC_FL_PUNCH_HOLE = 1 << 1
_libc = ctypes.CDLL(None, use_errno=True)
# Not mmap.madvise(MADV_REMOVE), which keeps the interpreter lock while the kernel frees pages.
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class MemoryRangeError(ValueError):
    """A range of guest-physical addresses that is not wholly RAM of one region."""


class Region(NamedTuple):
    """`size` bytes at guest-physical `gpa`, at `offset` of the memfd and `hva` in this process."""

    gpa: int
    size: int
    offset: int
    hva: int


class GuestMemory:
    """All RAM of one guest; `size` in bytes, `fd` the memfd, `regions` by rising gpa."""

    def __init__(self, size: int) -> None:
        """Reserve `size` bytes; the host commits a page when it is first touched.

        ConfigError if the size is not whole pages, too small, or more than the host will map.
        """
        if size < MIN_SIZE or size % PAGE_SIZE:
            raise ConfigError(f"memory of {size} bytes: give whole pages, 1M or more")
        self.size = size
        self.fd = _huge_file() if size >= HUGE_PAGE_SIZE else -1
        if self.fd < 0:
            self.fd = os.memfd_create("tinyvmm-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            mapping = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        except (OSError, OverflowError) as error:
            os.close(self.fd)
            raise ConfigError(
                f"cannot map {size >> 20} MiB of guest memory: {error}; give a smaller --memory"
            ) from None
        hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._all = memoryview(mapping)
        low = min(size, MMIO_HOLE_GPA)
        self._low = low
        self._high_end = RAM_ABOVE_4G_GPA + size - low
        self.regions: tuple[Region, ...] = (Region(0, low, 0, hva),)
        if size > low:
            self.regions += (Region(RAM_ABOVE_4G_GPA, size - low, low, hva + low),)

    def view(self, gpa: int, length: int) -> memoryview:
        """Return `length` writable bytes at `gpa`; MemoryRangeError if they are not all RAM."""
        if gpa >= 0 and length >= 0:
            end = gpa + length
            if end <= self._low:
                return self._all[gpa:end]
            if gpa >= RAM_ABOVE_4G_GPA and end <= self._high_end:
                start = gpa - RAM_ABOVE_4G_GPA + self._low
                return self._all[start : start + length]
        raise MemoryRangeError(f"{length} bytes at {gpa:#x} are not RAM")

    def read(self, gpa: int, length: int) -> bytes:
        """Copy `length` bytes out of RAM."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into RAM at `gpa`."""
        self.view(gpa, len(data))[:] = data

    def discard(self, buffer: memoryview) -> int:
        """Give the pages that lie wholly in `buffer`, which `view` gave, back to the host.

        They read as zeros until they are written again. Returns how many bytes those are.
        MemoryRangeError if `buffer` is no part of this memory.
        """
        length = buffer.nbytes
        if length < PAGE_SIZE or self.fd < 0:
            return 0
        hva = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        start = hva - self.regions[0].hva
        if not 0 <= start <= start + length <= self.size:
            raise MemoryRangeError(f"{length} bytes at {hva:#x} of this process are no guest's RAM")
        first, end = -(-start // PAGE_SIZE) * PAGE_SIZE, (start + length) // PAGE_SIZE * PAGE_SIZE
        if first >= end:
            return 0
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        while _fallocate(self.fd, mode, first, end - first):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, f"fallocate: {os.strerror(number)}")
        return end - first

    @property
    def resident(self) -> int:
        """How many bytes of the host's memory this RAM takes now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the memfd; the mapping goes when the last view of it does."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
            self._all = memoryview(b"")
            self._low = self._high_end = -1
            self.regions = ()


# --- huge pages -------------------------------------------------------------------------------

# <asm/unistd_64.h>, <linux/mount.h>
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6


def _huge_file() -> int:
    """Return a descriptor of a file in a tmpfs of its own, with huge pages; -1 if we may not.

    Most computers give none to memfds (shmem_enabled in /sys/kernel/mm/transparent_hugepage), but
    let a tmpfs have them, and whoever may mount has a tmpfs: fsopen(2). It goes with the file.
    """
    context = _syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    mount = -1
    try:
        # without the limit of half the RAM, beyond which a guest's access would be our SIGBUS
        for key, value in ((b"huge", b"within_size"), (b"size", b"0"), (b"nr_inodes", b"0")):
            if _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key, value, 0) < 0:
                return -1
        if _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            return -1
        mount = _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
        if mount < 0:
            return -1
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    except OSError:
        return -1
    finally:
        for fd in (mount, context):
            if fd >= 0:
                os.close(fd)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    return int(_libc.syscall(number, *arguments))
