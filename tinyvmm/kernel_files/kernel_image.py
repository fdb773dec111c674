"""Kernel files: a bzImage or an ELF vmlinux in, what to load where out.

A bzImage is a boot sector, real-mode setup code and, `setup_sects` later, a protected-mode part: a
small decompressor wrapped around a payload, which is a compressed ELF vmlinux followed by its size
in four bytes (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"). `open_image` tells
three kinds apart: a vmlinux, which is loaded as its program headers say; a bzImage whose payload we
can unpack into one (kernel_payload.py); and a bzImage that must unpack itself.

Nothing in a kernel file is trusted: every offset and length is checked against what there is, and
whatever is wrong is one ConfigError that names the file.
"""

import os
from struct import unpack_from

from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files.bootparam import (
    BOOT_FLAG,
    HDRS_MAGIC,
    SETUP_HEADER,
    SETUP_HEADER_END_MAX,
    XLF_KERNEL_64,
    BootParams,
)
from tinyvmm.layout import HIGH_RAM_GPA, PAGE_SIZE, RAM_ABOVE_4G_GPA
from tinyvmm.named import NamedTuple

ZERO_GAP = 1 << 16  # shorter runs of zeros cost less to copy than another system call
PROTOCOL_MIN = 0x020C  # 2.12 brought xloadflags
STARTUP_64 = 0x200  # the 64-bit entry point, in the protected-mode part

ELF_MAGIC = b"\x7fELF"
ELFCLASS64 = 2
ELFDATA2LSB = 1
ET_EXEC = 2
ET_DYN = 3
EM_X86_64 = 62
PT_LOAD = 1
EHDR_LEN = 64
PHDR_LEN = 56
PHDRS_END_MAX = 16 << 20  # linkers put them behind the ELF header; the most there can be is 3.5 MiB


class Segment(NamedTuple):
    """`length` bytes at `offset` of the source, to be copied to guest-physical `gpa`."""

    gpa: int
    offset: int
    length: int


class Layout(NamedTuple):
    """What to load and where; RAM below `memory_end` is the kernel's; `entry` is guest-physical."""

    segments: tuple[Segment, ...]
    memory_end: int
    entry: int


class Image(NamedTuple):
    """A kernel file understood: ready to load by `layout`, or a payload to unpack first.

    Exactly one of `layout` (offsets into the file) and `payload` is set. `setup_header` and
    `version` come from a bzImage; a vmlinux has neither.
    """

    layout: Layout | None
    payload: bytes
    setup_header: bytes
    version: str


class Kernel:
    """A kernel ready to load: `segments` of `source`, a descriptor (ours to close) or bytes.

    Segments rise and do not overlap. RAM below `memory_end` is the kernel's own, and has to be zero
    where no segment writes it. `entry` is the guest-physical address of the 64-bit entry point.
    `setup_header` and `version` are the bzImage's; a vmlinux has neither.
    """

    __slots__ = ("entry", "memory_end", "path", "segments", "setup_header", "source", "version")

    def __init__(
        self, path: str, source: int | bytes, layout: Layout, setup_header: bytes, version: str
    ) -> None:
        self.path = path
        self.source = source
        self.segments, self.memory_end, self.entry = layout
        self.setup_header = setup_header
        self.version = version

    def close(self) -> None:
        """Let go of the source; the kernel cannot be loaded any more."""
        source, self.source, self.segments = self.source, b"", ()
        if isinstance(source, int):
            os.close(source)

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_kernel(path: str) -> tuple[int, os.stat_result]:
    """Open a kernel file and stat it; ConfigError if it cannot be read or is no regular file."""
    import stat

    hint = "give a vmlinuz or vmlinux file"
    try:
        # O_NONBLOCK: a FIFO is refused below, not waited for
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ConfigError(f"kernel {path}: there is no such file; {hint}") from None
    except PermissionError:
        raise ConfigError(
            f"kernel {path}: no permission to read it; make it readable (sudo chmod a+r) "
            "or get another with: tinyvmm kernel fetch"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"kernel {path!r}: cannot be opened ({error}); {hint}") from None
    status = os.fstat(fd)
    why = None
    if stat.S_ISDIR(status.st_mode):
        why = "is a directory"
    elif not stat.S_ISREG(status.st_mode):
        why = "is not a regular file"
    elif status.st_size == 0:
        why = "is empty"
    if why:
        os.close(fd)
        raise ConfigError(f"kernel {path}: {why}; {hint}")
    return fd, status


def open_image(path: str, fd: int, file_len: int) -> Image:
    """Understand the open kernel file `fd`; ConfigError for anything we could not boot."""
    from tinyvmm.kernel_files.kernel_payload import VMLINUX_SIZE_MAX, find_decoder

    head = _pread(path, fd, min(PAGE_SIZE, file_len), 0)
    if head[:4] == ELF_MAGIC:
        return Image(
            parse_vmlinux(path, _with_program_headers(path, fd, head), file_len), b"", b"", ""
        )
    params = read_setup_header(path, head)
    setup_len = _setup_len(params)
    protected_len = params["syssize"] * 16
    if setup_len + protected_len > file_len or not protected_len:
        raise truncated(path)
    version = _version_in_setup(fd, params)
    offset, length = params["payload_offset"], params["payload_length"]
    if offset + length > protected_len:
        raise damaged(path, "its payload reaches past its end")
    if length > VMLINUX_SIZE_MAX:
        raise damaged(path, f"its payload has {length >> 20} MiB")
    payload = _pread(path, fd, length, setup_len + offset)
    if find_decoder(payload):
        return Image(None, payload, params.setup_header, version)
    layout = _self_unpacking(path, params, setup_len, protected_len)
    return Image(layout, b"", params.setup_header, version)


def kernel_version(path: str) -> str:
    """Return the release a kernel file states, what `uname -r` will say in the guest.

    It stands in a bzImage's setup code, and in the banner "Linux version ..." of a vmlinux.
    ConfigError if the file is no kernel or does not say.
    """
    fd, status = open_kernel(path)
    try:
        head = _pread(path, fd, min(PAGE_SIZE, status.st_size), 0)
        if head[:4] == ELF_MAGIC:
            version = _version_in_banner(fd, status.st_size)
        else:
            version = _version_in_setup(fd, read_setup_header(path, head))
    finally:
        os.close(fd)
    if not version:
        raise ConfigError(
            f"kernel {path}: states no version; give a complete Linux kernel, or run one that is "
            f"no Linux by itself: tinyvmm run --no-root --kernel {path}"
        )
    return version


def read_setup_header(path: str, head: bytes) -> BootParams:
    """Return a bzImage's setup header, given the file's first page.

    ConfigError unless it is one for x86-64, with a boot protocol of 2.12 or later.
    """
    if head[0x1FE:0x200] == b"\x55\xaa" and len(head) < SETUP_HEADER_END_MAX:
        raise truncated(path)
    params = BootParams(head[SETUP_HEADER:SETUP_HEADER_END_MAX])
    if params["boot_flag"] != BOOT_FLAG or params["header"] != HDRS_MAGIC:
        raise not_a_kernel(path)
    version = params["version"]
    if version < PROTOCOL_MIN:
        raise ConfigError(
            f"kernel {path}: boot protocol {version >> 8}.{version & 0xFF:02} is too old, "
            "2.12 is needed; use Linux 3.8 or later"
        )
    if not params["xloadflags"] & XLF_KERNEL_64:
        raise ConfigError(f"kernel {path}: is a 32-bit kernel; use one built for x86-64")
    return BootParams(params.setup_header)  # and nothing of what follows it in the file


def parse_vmlinux(path: str, head: bytes, file_len: int) -> Layout:
    """Return what the x86-64 vmlinux of `file_len` bytes wants loaded.

    `head` is its beginning, up to the end of the program headers at least. ConfigError if it is not
    such a kernel or is cut short.
    """
    if len(head) < EHDR_LEN:
        raise truncated(path)
    _check_is_x86_64(path, head)
    (e_type,) = unpack_from("<H", head, 16)
    e_entry, e_phoff = unpack_from("<QQ", head, 24)
    e_phentsize, e_phnum = unpack_from("<HH", head, 54)
    if e_type not in (ET_EXEC, ET_DYN) or e_phentsize != PHDR_LEN or not e_phnum:
        raise not_a_kernel(path)
    if e_phoff + e_phnum * PHDR_LEN > len(head):
        raise truncated(path)
    segments = []
    memory_end = free_gpa = HIGH_RAM_GPA
    entry_is_loaded = False
    phdrs = [unpack_from("<IIQQQQQ", head, e_phoff + i * PHDR_LEN) for i in range(e_phnum)]
    for p_type, _, p_offset, _, p_paddr, p_filesz, p_memsz in sorted(phdrs, key=lambda p: p[4]):
        if p_type != PT_LOAD or not p_memsz:
            continue
        memory_end = p_paddr + p_memsz
        if p_paddr < free_gpa or memory_end > RAM_ABOVE_4G_GPA or p_filesz > p_memsz:
            raise ConfigError(
                f"kernel {path}: wants {p_memsz:#x} bytes at {p_paddr:#x}, where no kernel can be; "
                "is it a program, not a kernel?"
            )
        if p_offset + p_filesz > file_len:
            raise truncated(path)
        if p_filesz:
            segments.append(Segment(p_paddr, p_offset, p_filesz))
        entry_is_loaded |= p_paddr <= e_entry < p_paddr + p_filesz
        free_gpa = memory_end
    if not entry_is_loaded:
        raise damaged(path, "it is entered where nothing is loaded")
    return Layout(tuple(segments), memory_end, e_entry)


def _check_is_x86_64(path: str, head: bytes) -> None:
    e_ident, _, e_machine = unpack_from("<16sHH", head)
    if e_ident[:4] != ELF_MAGIC:
        raise not_a_kernel(path)
    if e_ident[4] != ELFCLASS64 or e_ident[5] != ELFDATA2LSB or e_machine != EM_X86_64:
        raise ConfigError(
            f"kernel {path}: is an ELF file, but not for x86-64; use an x86-64 kernel"
        )


def unpack_image(path: str, image: Image, count_max: int) -> Kernel:
    """Return the kernel in a bzImage's payload, in at most `count_max` segments."""
    from tinyvmm.kernel_files.kernel_payload import PayloadError, unpack

    try:
        vmlinux = unpack(image.payload)
    except PayloadError as error:
        raise damaged(path, f"its payload {error}") from None
    layout = parse_vmlinux(path, vmlinux, len(vmlinux))
    layout = layout._replace(segments=skip_zeros(vmlinux, layout.segments, count_max))
    return Kernel(path, vmlinux, layout, image.setup_header, image.version)


def skip_zeros(data: bytes, segments: tuple[Segment, ...], count_max: int) -> tuple[Segment, ...]:
    """Return the parts of `segments` worth copying into RAM that is zero: at most `count_max`.

    Half of a distribution's vmlinux is zeros: room for .bss, padding between sections.
    """
    gap = ZERO_GAP
    while True:
        parts = [part for segment in segments for part in _nonzero_parts(data, segment, gap)]
        if len(parts) <= count_max:
            return tuple(parts)
        if gap > len(data):
            return segments
        gap *= 2


def _nonzero_parts(data: bytes, segment: Segment, gap: int) -> list[Segment]:
    """Split a segment at runs of zero pages longer than `gap` bytes."""
    zeros = bytes(PAGE_SIZE)
    view = memoryview(data)[segment.offset : segment.offset + segment.length]
    runs: list[list[int]] = []
    for start in range(0, segment.length, PAGE_SIZE):
        page = view[start : start + PAGE_SIZE]
        if page == zeros[: len(page)]:
            continue
        end = start + len(page)
        if runs and start - runs[-1][1] <= gap:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    return [Segment(segment.gpa + a, segment.offset + a, b - a) for a, b in runs]


def _self_unpacking(path: str, params: BootParams, setup_len: int, protected_len: int) -> Layout:
    """Return how to boot through the kernel's own decompressor: the 64-bit boot protocol proper."""
    gpa, init_size = params["pref_address"], params["init_size"]
    if gpa < HIGH_RAM_GPA or gpa % PAGE_SIZE or gpa + init_size > RAM_ABOVE_4G_GPA:
        raise damaged(path, f"it prefers to be at {gpa:#x}")
    if init_size < protected_len or protected_len <= STARTUP_64:
        raise damaged(path, f"it asks for {init_size:#x} bytes")
    segment = Segment(gpa, setup_len, protected_len)
    return Layout((segment,), gpa + init_size, gpa + STARTUP_64)


def _with_program_headers(path: str, fd: int, head: bytes) -> bytes:
    """Return enough of an ELF file's beginning to hold its program headers."""
    if len(head) < EHDR_LEN:
        raise truncated(path)
    _check_is_x86_64(path, head)  # or its fields are elsewhere
    (e_phoff,) = unpack_from("<Q", head, 32)
    (e_phnum,) = unpack_from("<H", head, 56)
    end = e_phoff + e_phnum * PHDR_LEN
    if end <= len(head):
        return head
    if end > os.fstat(fd).st_size:
        raise truncated(path)
    if end > PHDRS_END_MAX:
        raise damaged(path, f"its program headers are at {e_phoff:#x}")
    return _pread(path, fd, end, 0)


def _setup_len(params: BootParams) -> int:
    return ((params["setup_sects"] or 4) + 1) * 512


def _version_in_setup(fd: int, params: BootParams) -> str:
    """Return the first word of the string that `kernel_version` points to, "" if it has none."""
    offset = params["kernel_version"]
    if not offset or offset + 0x200 >= _setup_len(params):
        return ""
    text = os.pread(fd, 256, offset + 0x200).split(b"\0", 1)[0]
    return _release(text)


def _version_in_banner(fd: int, file_len: int) -> str:
    import mmap

    with mmap.mmap(fd, file_len, prot=mmap.PROT_READ) as data:
        found = data.find(banner := b"Linux version ")
        text = data[found + len(banner) : found + 256] if found >= 0 else b""
    return _release(text)


def _release(text: bytes) -> str:
    """Return the leading word of `text` if it can serve as a release, and as a file name."""
    word = (text.split(None, 1) or [b""])[0].decode("latin-1")
    harmless = all(c.isalnum() or c in "._+~-" for c in word) and word.isascii()
    return word if harmless and word[:1].isdigit() else ""


def _pread(path: str, fd: int, length: int, offset: int) -> bytes:
    """Read exactly `length` bytes; ConfigError if the file ends or fails before."""
    try:
        data = os.pread(fd, length, offset)
    except OSError as error:
        raise ConfigError(
            f"kernel {path}: cannot be read ({error.strerror}); copy it anew"
        ) from None
    if len(data) != length:
        raise truncated(path)
    return data


def truncated(path: str) -> ConfigError:
    """Return the error for a kernel file shorter than it says it is."""
    return ConfigError(f"kernel {path}: is cut short; copy or fetch it again")


def damaged(path: str, why: str) -> ConfigError:
    """Return the error for a kernel file that contradicts itself."""
    return ConfigError(f"kernel {path}: is damaged, {why}; copy or fetch it again")


def not_a_kernel(path: str) -> ConfigError:
    """Return the error for a file of another kind."""
    return ConfigError(
        f"kernel {path}: is not a Linux kernel (neither bzImage nor ELF vmlinux for x86-64); "
        "give a vmlinuz or vmlinux file"
    )
