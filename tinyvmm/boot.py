"""From a kernel file to a first instruction: what to put into RAM, and the state to enter it in.

Follows Documentation/arch/x86/boot.rst ("64-bit Boot Protocol"), zero-page.rst, and the Intel SDM
volume 3A for descriptors (3.4.5) and page tables (4.5). In reading order:

    kernel = load_kernel(path)                    a file understood, unpacked, its pieces known
    entry = load(memory, kernel, cmdline=...)     the pieces in RAM, and the first vCPU's registers

What Linux asks for at its 64-bit entry point is little: long mode with the kernel, boot_params and
the command line mapped where they are, flat segments 0x10 and 0x18, interrupts off, and the address
of boot_params in RSI. Nothing here knows KVM: `Entry` is plain numbers.
"""

import os
from collections.abc import Sequence
from struct import pack
from typing import Protocol

from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files.bootparam import (
    BOOT_FLAG,
    CAN_USE_HEAP,
    E820_ACPI,
    E820_RAM,
    E820_RESERVED,
    HDRS_MAGIC,
    LOADED_HIGH,
    TYPE_OF_LOADER_UNDEFINED,
    BootParams,
)
from tinyvmm.kernel_files.kernel_cache import KernelCache, default_dir
from tinyvmm.kernel_files.kernel_image import (
    Image,
    Kernel,
    Segment,
    open_image,
    open_kernel,
    truncated,
    unpack_image,
)
from tinyvmm.layout import (
    ACPI_END,
    ACPI_GPA,
    BOOT_PARAMS_GPA,
    CMDLINE_GPA,
    CMDLINE_MAX,
    GDT_GPA,
    HIGH_RAM_GPA,
    LOW_RAM_END,
    MMIO_HOLE_GPA,
    PAGE_SIZE,
    PAGE_TABLES_GPA,
)
from tinyvmm.named import NamedTuple

__all__ = ["Entry", "Kernel", "identity_page_tables", "load", "load_kernel", "memory_map"]

BOOT_CS = 0x10
BOOT_DS = 0x18
# Descriptors of 4 GiB, present, ring 0, already marked accessed: code is 64-bit execute/read, data
# is read/write.
GDT = pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PDE_LARGE = 1 << 7
LARGE_PAGE_SIZE = 2 << 20
IDENTITY_GIB = 4

# What a vmlinux, which has no setup header, would say in it (arch/x86/boot/header.S).
VMLINUX_CMDLINE_SIZE = 2047
VMLINUX_INITRD_ADDR_MAX = 0x7FFF_FFFF
VMLINUX_ALIGNMENT = 0x20_0000
PROTOCOL_2_15 = 0x020F

# For advice on --memory: what Linux needs beside itself to get anywhere, and round figures.
LINUX_NEEDS = 32 << 20
MEMORY_STEP = 64 << 20


class Region(Protocol):
    """A stretch of guest RAM."""

    @property
    def gpa(self) -> int:
        """Guest-physical address."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    @property
    def offset(self) -> int:
        """Where it starts in the memfd."""


class Ram(Protocol):
    """What loading needs of guest memory, which has to be fresh: every byte zero."""

    fd: int

    @property
    def regions(self) -> Sequence[Region]:
        """All RAM, by rising address."""

    def view(self, gpa: int, length: int) -> memoryview:
        """Return writable bytes; ValueError if they are not all RAM."""


class Entry(NamedTuple):
    """The first vCPU's state: 64-bit mode, paging on, interrupts off, CS BOOT_CS, the rest BOOT_DS.

    Every value is a guest-physical address, save `gdt_limit`, which is the GDT's length less one.
    """

    rip: int
    rsi: int
    rsp: int
    cr3: int
    gdt_gpa: int
    gdt_limit: int


def load_kernel(path: str, cache_dir: str | None = None) -> Kernel:
    """Open the kernel at `path`: its unpacked form from the cache, or unpacked now and kept there.

    `cache_dir` defaults to XDG_CACHE_HOME/tinyvmm. ConfigError for anything that cannot be booted.
    """
    cache = KernelCache(cache_dir or default_dir())
    fd, status = open_kernel(path)
    try:
        kernel = cache.recall(path, status)
        if kernel is not None:
            return kernel
        image = open_image(path, fd, status.st_size)
        if image.layout is None:
            return _unpacked(path, status, image, cache)
        return Kernel(path, os.dup(fd), image.layout, image.setup_header, image.version)
    finally:
        os.close(fd)


def load(
    memory: Ram,
    kernel: Kernel,
    *,
    initrd: Sequence[bytes | bytearray | memoryview] = (),
    cmdline: str = "",
    acpi_rsdp_gpa: int = 0,
) -> Entry:
    """Put `kernel` and all it is told into fresh `memory`; return how the first vCPU enters it.

    The `initrd` archives are laid one behind the other, as Linux unpacks them. `acpi_rsdp_gpa` is
    where the RSDP is or will be. ConfigError if the RAM is too small or `cmdline` is too long.
    """
    params = _boot_params(kernel)
    encoded = _encode_cmdline(cmdline, params["cmdline_size"])
    initrd_gpa, initrd_len = _place_initrd(memory, kernel, params["initrd_addr_max"], initrd)

    _load_kernel_segments(memory, kernel)
    gpa = initrd_gpa
    for archive in initrd:
        memory.view(gpa, len(archive))[:] = archive
        gpa += _archive_len(archive)
    memory.view(CMDLINE_GPA, len(encoded))[:] = encoded
    memory.view(GDT_GPA, len(GDT))[:] = GDT
    page_tables = identity_page_tables(PAGE_TABLES_GPA)
    memory.view(PAGE_TABLES_GPA, len(page_tables))[:] = page_tables

    params["acpi_rsdp_addr"] = acpi_rsdp_gpa
    params["cmd_line_ptr"] = CMDLINE_GPA
    params["ramdisk_image"], params["ext_ramdisk_image"] = _low_and_high(initrd_gpa)
    params["ramdisk_size"], params["ext_ramdisk_size"] = _low_and_high(initrd_len)
    for gpa, size, kind in memory_map(memory.regions):
        params.add_e820(gpa, size, kind)
    memory.view(BOOT_PARAMS_GPA, PAGE_SIZE)[:] = params.page
    return Entry(
        rip=kernel.entry,
        rsi=BOOT_PARAMS_GPA,
        rsp=PAGE_TABLES_GPA - 16,  # unused memory; the kernel soon has a stack of its own
        cr3=PAGE_TABLES_GPA,
        gdt_gpa=GDT_GPA,
        gdt_limit=len(GDT) - 1,
    )


def memory_map(regions: Sequence[Region]) -> list[tuple[int, int, int]]:
    """Return the e820 map of a machine with this RAM, as (gpa, size, type)."""
    entries = [
        (0, LOW_RAM_END, E820_RAM),
        (LOW_RAM_END, 0xA_0000 - LOW_RAM_END, E820_RESERVED),
        (ACPI_GPA, ACPI_END - ACPI_GPA, E820_ACPI),
    ]
    for region in regions:
        start, end = max(region.gpa, HIGH_RAM_GPA), region.gpa + region.size
        if start < end:
            entries.append((start, end - start, E820_RAM))
    return entries


def identity_page_tables(gpa: int) -> bytes:
    """Return six tables, to be put at `gpa`, that map the first 4 GiB to itself by 2 MiB pages."""
    flags = PTE_PRESENT | PTE_WRITE
    pdpt_gpa = gpa + PAGE_SIZE
    pd_gpa = pdpt_gpa + PAGE_SIZE
    pml4 = pack("<Q", pdpt_gpa | flags)
    pdpt = pack("<4Q", *(pd_gpa + i * PAGE_SIZE | flags for i in range(IDENTITY_GIB)))
    large = range(flags | PDE_LARGE, IDENTITY_GIB << 30, LARGE_PAGE_SIZE)
    pds = pack(f"<{len(large)}Q", *large)
    return pml4.ljust(PAGE_SIZE, b"\0") + pdpt.ljust(PAGE_SIZE, b"\0") + pds


def _unpacked(path: str, status: os.stat_result, image: Image, cache: KernelCache) -> Kernel:
    """Return the kernel in a bzImage's payload, through the cache."""
    from tinyvmm.kernel_files.kernel_cache import SEGMENTS_MAX, digest_of

    digest = digest_of(image.payload, image.setup_header, image.version)
    kernel = cache.find(path, digest)
    if kernel is None:
        kernel = cache.store(unpack_image(path, image, SEGMENTS_MAX), digest)
    cache.remember(path, status, digest)
    return kernel


def _boot_params(kernel: Kernel) -> BootParams:
    """Return boot_params with the kernel's own setup header, or one made up for a vmlinux."""
    params = BootParams(kernel.setup_header)
    if not kernel.setup_header:
        params["boot_flag"] = BOOT_FLAG
        params["header"] = HDRS_MAGIC
        params["version"] = PROTOCOL_2_15
        params["loadflags"] = LOADED_HIGH
        params["initrd_addr_max"] = VMLINUX_INITRD_ADDR_MAX
        params["kernel_alignment"] = VMLINUX_ALIGNMENT
        params["cmdline_size"] = VMLINUX_CMDLINE_SIZE
    params["type_of_loader"] = TYPE_OF_LOADER_UNDEFINED
    params["loadflags"] &= ~CAN_USE_HEAP  # the heap is the real-mode code's, which never runs
    return params


def _encode_cmdline(cmdline: str, cmdline_size: int) -> bytes:
    """Return the command line as Linux reads it, zero-terminated."""
    encoded = os.fsencode(cmdline)
    size_max = min(cmdline_size, CMDLINE_MAX - 1)
    if len(encoded) > size_max:
        raise ConfigError(
            f"kernel command line: {len(encoded)} bytes, but this kernel takes {size_max}; "
            "shorten --append"
        )
    if b"\0" in encoded or b"\n" in encoded:
        raise ConfigError(
            "kernel command line: holds a NUL or a line break; take it out of --append"
        )
    return encoded + b"\0"


def _place_initrd(
    memory: Ram,
    kernel: Kernel,
    initrd_addr_max: int,
    initrd: Sequence[bytes | bytearray | memoryview],
) -> tuple[int, int]:
    """Return where the archives go and their length: (0, 0) for none. Checks the kernel's room too.

    The initrd is as high as it can be, out of the way of a kernel that unpacks or moves itself.
    """
    low = memory.regions[0]
    initrd_len = sum(_archive_len(archive) for archive in initrd)
    top = min(low.gpa + low.size, initrd_addr_max + 1)
    gpa = (top - initrd_len) & -PAGE_SIZE
    if gpa >= kernel.memory_end:
        return (gpa, initrd_len) if initrd_len else (0, 0)
    needed = kernel.memory_end + initrd_len
    what = f"kernel {kernel.path}: with its initramfs needs {(needed >> 20) + 1} MiB of RAM"
    if needed >= min(initrd_addr_max, MMIO_HOLE_GPA):
        raise ConfigError(f"{what}, which no PC has in one piece; make the initramfs smaller")
    advice = (needed + LINUX_NEEDS) // MEMORY_STEP + 1
    raise ConfigError(
        f"{what}, there are {low.size >> 20}; give --memory {advice * MEMORY_STEP >> 20}M or more"
    )


def _archive_len(archive: bytes | bytearray | memoryview) -> int:
    """Return an archive's length with the zeros after it: Linux wants each to start at 4 bytes."""
    return (len(archive) + 3) & -4


def _load_kernel_segments(memory: Ram, kernel: Kernel) -> None:
    """Copy the kernel into RAM.

    From file to memfd by sendfile(2), which needs no page fault per page: half the time of reading
    into the mapping. The memfd's file position is used by nobody else.
    """
    source = kernel.source
    for segment in kernel.segments:
        target = memory.view(segment.gpa, segment.length)
        if isinstance(source, bytes):
            target[:] = memoryview(source)[segment.offset : segment.offset + segment.length]
        else:
            _send(memory, kernel.path, source, segment)


def _send(memory: Ram, path: str, source: int, segment: Segment) -> None:
    gpa, offset, left = segment
    region = next(r for r in memory.regions if r.gpa <= gpa < r.gpa + r.size)
    os.lseek(memory.fd, region.offset + gpa - region.gpa, os.SEEK_SET)
    # sendfile reads ahead timidly: on a file that is not in memory this doubles its pace
    os.posix_fadvise(source, offset, left, os.POSIX_FADV_WILLNEED)
    while left:
        try:
            sent = os.sendfile(memory.fd, source, offset, left)
        except OSError as error:
            raise ConfigError(
                f"kernel {path}: cannot be copied into RAM ({error.strerror}); "
                "is there enough free memory?"
            ) from None
        if not sent:
            raise truncated(path)
        offset += sent
        left -= sent


def _low_and_high(value: int) -> tuple[int, int]:
    """Return the two 32-bit halves that boot_params keeps of an address or a length."""
    return value & 0xFFFF_FFFF, value >> 32
