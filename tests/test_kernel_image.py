"""Kernel files made here, whole, damaged and of the wrong kind, and what is read out of them."""

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tinyvmm.boot import load, load_kernel
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files.kernel_image import Segment, kernel_version, skip_zeros
from tinyvmm.memory import GuestMemory

MIB = 1 << 20
CODE = bytes(range(256)) * 40 + b"Linux version 6.1.0-56-test (builder) #1 SMP\n"
DATA = b"\x90" * 5000
CODE_GPA, DATA_GPA = 16 * MIB, 18 * MIB


def make_vmlinux(
    segments: tuple[tuple[int, bytes, int], ...] = (
        (CODE_GPA, CODE, 1 * MIB),
        (DATA_GPA, DATA, 2 * MIB),
    ),
    entry: int = CODE_GPA,
    machine: int = 62,
    elf_class: int = 2,
) -> bytes:
    """An ELF file with these PT_LOAD segments of (gpa, bytes, memory length)."""
    offset = 64 + 56 * len(segments)
    headers, body = b"", b""
    for gpa, data, memory_len in segments:
        place = offset + len(body), gpa | 0xFFFF_FFFF_8000_0000, gpa, len(data), memory_len
        headers += struct.pack("<IIQQQQQQ", 1, 5, *place, 0x1000)
        body += data
    ident = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    ehdr = struct.pack("<16sHHIQQQ", ident, 2, machine, 1, entry, 64, 0)
    ehdr += struct.pack("<IHHHHHH", 0, 64, 56, len(segments), 0, 0, 0)
    return ehdr + headers + body


def make_bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    xloadflags: int = 1,
    release: bytes = b"6.1.0-56-test (builder) #1 SMP",
    pref_address: int = CODE_GPA,
    init_size: int = 8 * MIB,
) -> bytes:
    """A bzImage around `payload`: two setup sectors, 0x200 bytes before the 64-bit entry."""
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<H4sH", setup, 0x200, 0x6AEB, b"HdrS", version)
    struct.pack_into("<H", setup, 0x20E, 0x400 - 0x200)
    setup[0x211] = 1
    setup[0x400 : 0x400 + len(release)] = release
    stub = b"\xf4" * 0x300
    protected = stub + payload
    protected += bytes(-len(protected) % 16)
    struct.pack_into("<I", setup, 0x1F4, len(protected) // 16)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<IBBHI", setup, 0x230, 0x20_0000, 1, 21, xloadflags, 2047)
    struct.pack_into("<II", setup, 0x248, len(stub), len(payload))
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup + protected)


def with_size(packed: bytes, plain: bytes) -> bytes:
    return packed + len(plain).to_bytes(4, "little")


def x86_xz(plain: bytes) -> bytes:
    """As scripts/xz_wrap.sh packs an x86 kernel: BCJ filter, CRC32, 32 MiB dictionary."""
    chain = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    return lzma.compress(plain, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=chain)


def lz4_legacy(plain: bytes) -> bytes:
    """The lz4 program's work if it is here, else a frame of one block of literals."""
    if shutil.which("lz4"):
        done = subprocess.run(["lz4", "-l", "-9"], input=plain, capture_output=True, check=True)
        return done.stdout
    more = len(plain) - 15
    block = b"\xf0" + b"\xff" * (more // 255) + bytes([more % 255]) + plain
    return b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda plain: gzip.compress(plain, mtime=0),
    "bzip2": lambda plain: with_size(bz2.compress(plain), plain),
    "xz": lambda plain: with_size(x86_xz(plain), plain),
    "lzma": lambda plain: with_size(lzma.compress(plain, lzma.FORMAT_ALONE), plain),
    "lz4": lambda plain: with_size(lz4_legacy(plain), plain),
}


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("form", sorted(PACKERS))
def test_a_bzimage_in_each_format_loads_as_the_vmlinux_inside(form: str, tmp_path: Path) -> None:
    vmlinux = make_vmlinux()
    path = write(tmp_path / "vmlinuz", make_bzimage(PACKERS[form](vmlinux)))
    for _ in range(2):  # unpacked, then from the cache
        with load_kernel(path, str(tmp_path)) as kernel:
            memory = GuestMemory(64 * MIB)
            entry = load(memory, kernel)
            assert memory.read(CODE_GPA, len(CODE)) == CODE
            assert memory.read(DATA_GPA, len(DATA)) == DATA
            assert not any(memory.read(DATA_GPA + len(DATA), 1 * MIB))
            assert entry.rip == CODE_GPA
            assert kernel.memory_end == DATA_GPA + 2 * MIB
            assert kernel.version == "6.1.0-56-test"
            memory.close()


def test_a_vmlinux_loads_straight_from_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vmlinux", make_vmlinux())
    with load_kernel(path, str(tmp_path / "cache")) as kernel:
        memory = GuestMemory(64 * MIB)
        assert load(memory, kernel).rip == CODE_GPA
        assert memory.read(CODE_GPA, len(CODE)) == CODE
        assert memory.read(DATA_GPA, len(DATA)) == DATA
        memory.close()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("payload", [b"\x89LZO" + bytes(3000), b"whatever " * 99], ids=["lzo", "?"])
def test_a_payload_we_cannot_unpack_boots_through_the_kernels_own_code(
    payload: bytes, tmp_path: Path
) -> None:
    image = make_bzimage(payload)
    with load_kernel(write(tmp_path / "vmlinuz", image), str(tmp_path)) as kernel:
        memory = GuestMemory(64 * MIB)
        entry = load(memory, kernel)
        assert entry.rip == CODE_GPA + 0x200  # startup_64
        assert memory.read(CODE_GPA, len(image) - 1536) == image[1536:]
        assert kernel.memory_end == CODE_GPA + 8 * MIB  # init_size
        memory.close()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"#!/bin/sh\nexit 0\n"), "not a Linux kernel"),
        (lambda path: path.write_bytes(b"\x7fELF"), "cut short"),
        (lambda path: path.write_bytes(bytes(0x1FE) + b"\x55\xaa"), "cut short"),
        (lambda path: path.write_bytes(bytes(1 << 16)), "not a Linux kernel"),
        (lambda path: path.write_bytes(make_vmlinux(machine=183)), "not for x86-64"),
        (lambda path: path.write_bytes(make_vmlinux(elf_class=1)), "not for x86-64"),
        (lambda path: path.write_bytes(make_bzimage(b"", xloadflags=0)), "32-bit kernel"),
        (lambda path: path.write_bytes(make_bzimage(b"", version=0x020A)), r"2\.10 is too old"),
        (lambda path: path.write_bytes(make_vmlinux(entry=5)), "damaged"),
        (lambda path: path.write_bytes(make_vmlinux(((0, CODE, MIB),), 0)), "is it a program"),
        (lambda path: path.write_bytes(make_bzimage(gzip.compress(b"hello"))), "cut short"),
        (lambda path: path.write_bytes(make_bzimage(b"\x1f\x8b" + bytes(99))), "damaged"),
        (lambda path: path.write_bytes(make_bzimage(b"x" * 99, init_size=10)), "damaged"),
        (lambda path: path.write_bytes(make_bzimage(b"x" * 99, pref_address=8)), "damaged"),
    ],
)
def test_what_is_no_kernel_is_refused_in_one_line_that_says_why(
    make: Callable[[Path], object], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "vmlinuz"
    make(path)
    with pytest.raises(ConfigError, match=why) as caught:
        load_kernel(str(path), str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_program_of_this_computer_is_not_taken_for_a_kernel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_kernel("/proc/self/exe", str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_kernel_without_read_permission_says_so(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_vmlinux())
    path.chmod(0)
    with pytest.raises(ConfigError, match="no permission"):
        load_kernel(str(path), str(tmp_path))


WHOLE = {form: make_bzimage(pack(make_vmlinux())) for form, pack in PACKERS.items()}
WHOLE["vmlinux"] = make_vmlinux()
WHOLE["self-unpacking"] = make_bzimage(b"\x89LZO" + bytes(500))
fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
@example("xz", 0.0)
def test_a_kernel_cut_short_anywhere_is_a_config_error(
    tmp_path: Path, form: str, part: float
) -> None:
    path = write(tmp_path / "vmlinuz", WHOLE[form][: int(len(WHOLE[form]) * part)])
    with pytest.raises(ConfigError):
        load_kernel(path, str(tmp_path / "cache"))


@fuzz
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_kernel_damaged_anywhere_loads_or_is_a_config_error(
    tmp_path: Path, form: str, damage: list[tuple[float, int]], headers: bool
) -> None:
    image = bytearray(WHOLE[form])
    reach = min(len(image), 0x270) if headers else len(image)
    for where, value in damage:
        image[int(where * (reach - 1))] = value
    path = write(tmp_path / "vmlinuz", bytes(image))
    memory = GuestMemory(32 * MIB)
    try:
        with load_kernel(path, path) as kernel:  # a file is no cache: each time unpacked anew
            load(memory, kernel, initrd=[bytes(100)], cmdline="quiet")
    except ConfigError:
        return
    finally:
        memory.close()


def test_a_payload_that_announces_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    vmlinux = make_vmlinux()
    payload = bz2.compress(vmlinux) + (len(vmlinux) + 1).to_bytes(4, "little")
    with pytest.raises(ConfigError, match="unpacks to"):
        load_kernel(write(tmp_path / "vmlinuz", make_bzimage(payload)), str(tmp_path))


def test_the_version_is_read_from_a_bzimage_and_from_a_vmlinux(tmp_path: Path) -> None:
    assert kernel_version(write(tmp_path / "a", make_bzimage(b""))) == "6.1.0-56-test"
    assert kernel_version(write(tmp_path / "b", make_vmlinux())) == "6.1.0-56-test"


@pytest.mark.parametrize("release", [b"", b"../../etc", b"/6.1", b".hidden", b"6.1/x", b"6\xff.1"])
def test_a_version_that_could_not_name_a_directory_is_none(release: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="states no version"):
        kernel_version(write(tmp_path / "vmlinuz", make_bzimage(b"", release=release)))


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.binary(max_size=20)), max_size=6),
    st.integers(1, 8),
)
def test_skipping_zeros_loses_nothing(pieces: list[tuple[int, bytes]], count_max: int) -> None:
    data = b"".join(bytes(zeros * 7) + piece for zeros, piece in pieces)
    whole = Segment(0x10_0000, 0, len(data))
    parts = skip_zeros(data, (whole,), count_max)
    assert len(parts) <= count_max
    rebuilt = bytearray(len(data))
    for gpa, offset, length in parts:
        assert gpa - whole.gpa == offset
        rebuilt[offset : offset + length] = data[offset : offset + length]
    assert rebuilt == data
