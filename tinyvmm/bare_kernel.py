"""Kernels that are not Linux: PVH and multiboot, what their files ask for and what they are told.

Both are entered in 32-bit protected mode without paging, segments flat, interrupts off, with the
address of a description in EBX. In reading order:

    kernel = read_kernel(path)                       a file understood
    entry = load(memory, kernel, modules=...)        it, its modules and the description in RAM

**Multiboot** (Multiboot Specification 0.6.96): a header of the kernel's own in the file's first
8 KiB says what it wants (3.1); EAX holds a magic number, EBX points to the information structure
(3.3). **PVH** (Xen's include/public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc): an ELF note
names the entry point, and EBX points to struct hvm_start_info.

Not supported: multiboot's video modes (a kernel that demands one is refused), symbol tables,
drives, APM; kernels below 1 MiB.
"""

import os
from collections.abc import Sequence
from struct import Struct, pack, unpack_from
from typing import NamedTuple

from tinyvmm.boot import Ram, memory_map
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files import elf_image
from tinyvmm.kernel_files.kernel_image import Segment, open_kernel
from tinyvmm.layout import (
    ACPI_GPA,
    BOOT_PARAMS_GPA,
    CMDLINE_GPA,
    CMDLINE_MAX,
    HIGH_RAM_GPA,
    LOW_RAM_END,
    PAGE_SIZE,
    PAGE_TABLES_GPA,
)
from tinyvmm.regular import regular

PROTOCOLS = ("linux", "pvh", "multiboot")
FILE_MAX = 512 << 20
# Descriptors of 4 GiB, present, ring 0, already marked accessed: 0x8 is 32-bit code, 0x10 data.
GDT = pack("<3Q", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

MULTIBOOT_SEARCH = 8192
MULTIBOOT_HEADER_MAGIC = 0x1BADB002
MULTIBOOT2_HEADER_MAGIC = 0xE85250D6
MULTIBOOT2_SEARCH = 32 << 10
MULTIBOOT_BOOTLOADER_MAGIC = 0x2BADB002
MULTIBOOT_PAGE_ALIGN = 1 << 0
MULTIBOOT_MEMORY_INFO = 1 << 1
MULTIBOOT_AOUT_KLUDGE = 1 << 16
_DEMANDS = 0xFFFF  # of the header's flags: what a loader must know or refuse (3.1.2)
MULTIBOOT_INFO_MEMORY = 1 << 0
MULTIBOOT_INFO_CMDLINE = 1 << 2
MULTIBOOT_INFO_MODS = 1 << 3
MULTIBOOT_INFO_MEM_MAP = 1 << 6
MULTIBOOT_INFO_BOOT_LOADER_NAME = 1 << 9

XEN_ELFNOTE_PHYS32_ENTRY = 18
XEN_HVM_START_MAGIC_VALUE = 0x336EC578

# Where the description goes: below 1 MiB, where no kernel is. First a block of a fixed layout,
# behind it the strings, then what is counted.
_INFO_GPA = BOOT_PARAMS_GPA
_LISTS_END = PAGE_TABLES_GPA  # two pages for the lists
_MODULES_MAX = 64
# Linkers put the file's headers on the page before 1 MiB, unless told otherwise (-n); ACPI's tables
# are far from there.
_KERNEL_GPA = HIGH_RAM_GPA - (64 << 10)
_LOADER_NAME = b"tinyvmm\0"

# flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4], mmap_length,
# mmap_addr, drives_length, drives_addr, config_table, boot_loader_name
_multiboot_info = Struct("<7I16x6I")
_multiboot_module = Struct("<4I")  # mod_start, mod_end, string, reserved
_multiboot_mmap = Struct("<IQQI")  # size of the rest, base, length, type
# magic, version, flags, nr_modules, modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr,
# memmap_entries, reserved
_hvm_start_info = Struct("<4I4Q2I")
_hvm_modlist_entry = Struct("<4Q")  # paddr, size, cmdline_paddr, reserved
_hvm_memmap_entry = Struct("<QQII")  # addr, size, type, reserved


class BareKernel(NamedTuple):
    """A kernel understood: `segments` of `data` to load, RAM below `memory_end` its own."""

    path: str
    protocol: str
    data: bytes
    segments: tuple[Segment, ...]
    memory_end: int
    entry: int


class Module(NamedTuple):
    """A file the kernel is given, with the words that go with it."""

    path: str
    words: str = ""


class BareEntry(NamedTuple):
    """How vCPU 0 begins: 32-bit protected mode, flat, paging and interrupts off."""

    rip: int
    rax: int
    rbx: int


def read_kernel(path: str, protocol: str | None = None) -> BareKernel | None:
    """Understand the file at `path`; None if it wants Linux's protocol (see boot.py).

    It is what it says it is, multiboot before PVH; or what `protocol` says, and then ConfigError if
    it is not. ConfigError also for a file that cannot be read, is damaged, or demands too much.
    """
    data = read_file(path, "kernel")
    header = _find_multiboot_header(data)
    if protocol == "linux":
        if header is not None:
            raise ConfigError(
                f"kernel {path}: is no Linux but a multiboot kernel; give --boot-protocol "
                "multiboot, or leave it out"
            )
        return None
    if header is not None and protocol in {None, "multiboot"}:
        return _multiboot_kernel(path, data, header)
    if protocol == "multiboot":
        _refuse_multiboot2(path, data)
        raise ConfigError(f"kernel {path}: has no multiboot header in its first 8 KiB")
    if data[:4] == elf_image.ELF_MAGIC:
        image = _parse_elf(path, data)
        for note in image.notes:
            if note.name == b"Xen\0" and note.type == XEN_ELFNOTE_PHYS32_ENTRY:
                if len(note.desc) not in {4, 8}:
                    raise ConfigError(f"kernel {path}: its PVH entry point is no number")
                entry = int.from_bytes(note.desc, "little")
                return _elf_kernel(path, "pvh", data, image, entry)
    if protocol == "pvh":
        raise ConfigError(f"kernel {path}: is no ELF file with a PVH entry point")
    _refuse_multiboot2(path, data)
    return None


def read_file(path: str, what: str) -> bytes:
    """Return a file's content; ConfigError, saying `what` it was to be, if it cannot be had."""
    if what == "kernel":
        fd = open_kernel(path)[0]  # which has much to say about what can be wrong
    else:
        try:
            fd = regular(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"{what} {path}: cannot be opened ({error.strerror})") from None
    with open(fd, "rb") as file:
        if os.fstat(fd).st_size > FILE_MAX:
            raise ConfigError(f"{what} {path}: is larger than {FILE_MAX >> 20} MiB")
        try:
            return file.read(FILE_MAX)
        except OSError as error:
            raise ConfigError(f"{what} {path}: cannot be read ({error.strerror})") from None


# --- what the files say -----------------------------------------------------------------------


def _find_multiboot_header(data: bytes) -> int | None:
    """Where the header is: at a multiple of 4, with a checksum that fits (3.1.1)."""
    end = min(len(data), MULTIBOOT_SEARCH) - 12
    for at in range(0, end + 1, 4):
        magic, flags, checksum = unpack_from("<III", data, at)
        if magic == MULTIBOOT_HEADER_MAGIC and not (magic + flags + checksum) & 0xFFFF_FFFF:
            return at
    return None


def _refuse_multiboot2(path: str, data: bytes) -> None:
    """Say so of a kernel for the other multiboot: Multiboot2 Specification 2.0, 3.1.1."""
    for at in range(0, min(len(data), MULTIBOOT2_SEARCH) - 15, 8):
        words = unpack_from("<4I", data, at)
        if words[0] == MULTIBOOT2_HEADER_MAGIC and not sum(words) & 0xFFFF_FFFF:
            raise ConfigError(
                f"kernel {path}: is for multiboot 2, which is not spoken here; give it a header of "
                "multiboot 1, or a PVH entry point"
            )


def _multiboot_kernel(path: str, data: bytes, at: int) -> BareKernel:
    (flags,) = unpack_from("<I", data, at + 4)
    unknown = flags & _DEMANDS & ~(MULTIBOOT_PAGE_ALIGN | MULTIBOOT_MEMORY_INFO)
    if unknown:
        what = "a video mode" if unknown == 1 << 2 else f"features {unknown:#x}"
        raise ConfigError(f"kernel {path}: demands {what} of its loader, which there is not here")
    if not flags & MULTIBOOT_AOUT_KLUDGE:
        if data[:4] != elf_image.ELF_MAGIC:
            raise ConfigError(
                f"kernel {path}: is no ELF file, nor says its multiboot header where it goes "
                "(bit 16); link it as ELF"
            )
        image = _parse_elf(path, data)
        return _elf_kernel(path, "multiboot", data, image, image.entry)
    if at + 32 > len(data):
        raise ConfigError(f"kernel {path}: is cut short; build or copy it again")
    header_addr, load_addr, load_end, bss_end, entry = unpack_from("<5I", data, at + 12)
    offset = at - (header_addr - load_addr)
    length = load_end - load_addr if load_end else len(data) - offset
    memory_end = max(bss_end, load_addr + length)
    if header_addr < load_addr or offset < 0 or length <= 0:
        raise ConfigError(f"kernel {path}: its multiboot header's addresses contradict each other")
    if offset + length > len(data):
        raise ConfigError(f"kernel {path}: is cut short; build or copy it again")
    _check_place(path, load_addr, memory_end)
    return BareKernel(
        path, "multiboot", data, (Segment(load_addr, offset, length),), memory_end, entry
    )


def _parse_elf(path: str, data: bytes) -> elf_image.ElfImage:
    try:
        return elf_image.parse(data)
    except elf_image.ElfError as error:
        raise ConfigError(f"kernel {path}: {error}; build or copy it again") from None


def _elf_kernel(
    path: str, protocol: str, data: bytes, image: elf_image.ElfImage, entry: int
) -> BareKernel:
    memory_end = max(load.gpa + load.memory_len for load in image.loads)
    _check_place(path, image.loads[0].gpa, memory_end)
    if not any(load.gpa <= entry < load.gpa + load.memory_len for load in image.loads):
        raise ConfigError(f"kernel {path}: is entered at {entry:#x}, where nothing is loaded")
    segments = tuple(Segment(load.gpa, load.offset, load.length) for load in image.loads)
    return BareKernel(path, protocol, data, segments, memory_end, entry)


def _check_place(path: str, start: int, end: int) -> None:
    if start < _KERNEL_GPA or end > 1 << 32:
        raise ConfigError(
            f"kernel {path}: wants to be at {start:#x} to {end:#x}; link it to 1 MiB or above"
        )


# --- into RAM ---------------------------------------------------------------------------------


def load(
    memory: Ram, kernel: BareKernel, *, modules: Sequence[Module] = (), cmdline: str = ""
) -> BareEntry:
    """Put `kernel`, `modules` and their description into fresh `memory`, ACPI's tables aside.

    ConfigError if the RAM is too small, or a module cannot be read.
    """
    low = memory.regions[0]
    if len(modules) > _MODULES_MAX:
        raise ConfigError(f"more than {_MODULES_MAX} modules: leave some out")
    contents = [read_file(module.path, "module") for module in modules]
    gpa = kernel.memory_end + PAGE_SIZE - 1 & -PAGE_SIZE
    places = []
    for content in contents:
        places.append((gpa, gpa + len(content)))
        gpa = gpa + len(content) + PAGE_SIZE - 1 & -PAGE_SIZE
    if gpa > low.gpa + low.size:
        raise ConfigError(
            f"kernel {kernel.path}: with its modules needs {gpa >> 20} MiB of RAM or more, there "
            f"are {low.size >> 20}; give a larger --memory"
        )
    for segment in kernel.segments:
        piece = memoryview(kernel.data)[segment.offset : segment.offset + segment.length]
        memory.view(segment.gpa, segment.length)[:] = piece
    for (start, end), content in zip(places, contents, strict=True):
        memory.view(start, end - start)[:] = content
    words = [os.fsencode(text) + b"\0" for text in (cmdline, *[m.words for m in modules])]
    strings = [CMDLINE_GPA]
    for text in words:
        strings.append(strings[-1] + len(text))
    if strings[-1] > CMDLINE_GPA + CMDLINE_MAX:
        raise ConfigError("the kernel's and its modules' words are too many; shorten --append")
    memory.view(CMDLINE_GPA, strings[-1] - CMDLINE_GPA)[:] = b"".join(words)
    named = [(*place, gpa) for place, gpa in zip(places, strings[1:], strict=False)]
    describe = _describe_multiboot if kernel.protocol == "multiboot" else _describe_pvh
    description = describe(memory, named)
    if _INFO_GPA + len(description) > _LISTS_END:
        raise AssertionError("the lists overflow their pages")
    memory.view(_INFO_GPA, len(description))[:] = description
    rax = MULTIBOOT_BOOTLOADER_MAGIC if kernel.protocol == "multiboot" else 0
    return BareEntry(kernel.entry, rax, _INFO_GPA)


def _describe_multiboot(memory: Ram, modules: list[tuple[int, int, int]]) -> bytes:
    """The information structure (3.3), behind it modules, memory map and our name."""
    mods = b"".join(_multiboot_module.pack(*module, 0) for module in modules)
    size = _multiboot_mmap.size - 4
    mmap = b"".join(_multiboot_mmap.pack(size, *entry) for entry in memory_map(memory.regions))
    low = memory.regions[0]
    mods_gpa = _INFO_GPA + _multiboot_info.size
    mmap_gpa = mods_gpa + len(mods)
    flags = MULTIBOOT_INFO_MEMORY | MULTIBOOT_INFO_CMDLINE | MULTIBOOT_INFO_MODS
    flags |= MULTIBOOT_INFO_MEM_MAP | MULTIBOOT_INFO_BOOT_LOADER_NAME
    info = _multiboot_info.pack(
        flags,
        LOW_RAM_END >> 10,
        low.gpa + low.size - HIGH_RAM_GPA >> 10,
        0xFFFF_FFFF,  # from no BIOS drive
        CMDLINE_GPA,
        len(modules),
        mods_gpa,
        len(mmap),
        mmap_gpa,
        0,
        0,
        0,
        mmap_gpa + len(mmap),
    )
    return info + mods + mmap + _LOADER_NAME


def _describe_pvh(memory: Ram, modules: list[tuple[int, int, int]]) -> bytes:
    """Struct hvm_start_info, version 1, behind it modules and memory map."""
    mods = b"".join(
        _hvm_modlist_entry.pack(start, end - start, words, 0) for start, end, words in modules
    )
    entries = [_hvm_memmap_entry.pack(*entry, 0) for entry in memory_map(memory.regions)]
    mods_gpa = _INFO_GPA + _hvm_start_info.size
    info = _hvm_start_info.pack(
        XEN_HVM_START_MAGIC_VALUE,
        1,
        0,
        len(modules),
        mods_gpa if modules else 0,
        CMDLINE_GPA,
        ACPI_GPA,
        mods_gpa + len(mods),
        len(entries),
        0,
    )
    return info + mods + b"".join(entries)
