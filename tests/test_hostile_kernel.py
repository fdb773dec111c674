"""Kernel files made to hurt whoever loads them: bombs, sparse giants, headers that contradict."""

import gzip
import os
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm.boot import load, load_kernel
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files.kernel_image import kernel_version
from tinyvmm.kernel_files.kernel_payload import PayloadError, unpack
from tinyvmm.memory import GuestMemory

MIB = 1 << 20


def bzimage_header(payload_offset: int, payload_length: int, syssize: int) -> bytearray:
    """The two sectors of a bzImage's boot sector and setup code, for protocol 2.15 and x86-64."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, syssize)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<H4sH", setup, 0x200, 0x6AEB, b"HdrS", 0x020F)
    struct.pack_into("<H", setup, 0x236, 1)
    struct.pack_into("<II", setup, 0x248, payload_offset, payload_length)
    return setup


@pytest.mark.parametrize("announced", [0, 1, 4096])
def test_a_payload_takes_no_more_memory_than_it_announces(announced: int) -> None:
    bomb = gzip.compress(bytes(64 * MIB))[:-4] + announced.to_bytes(4, "little")
    tracemalloc.start()
    try:
        with suppress(PayloadError):
            assert len(unpack(bomb)) == announced
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


def test_a_payload_larger_than_any_kernel_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    length = (1 << 30) + 1
    path.write_bytes(bzimage_header(0, length, (length + 15) // 16))
    os.truncate(path, 2 << 30)  # sparse: costs whoever made it nothing
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="damaged"):
            load_kernel(str(path), str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


def test_program_headers_at_the_end_of_a_sparse_giant_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    size = 1 << 40
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    ehdr = struct.pack("<16sHHIQQQ", ident, 2, 62, 1, 16 * MIB, size - 56, 0)
    path.write_bytes(ehdr + struct.pack("<IHHHHHH", 0, 64, 56, 1, 0, 0, 0))
    os.truncate(path, size)
    with pytest.raises(ConfigError):
        load_kernel(str(path), str(tmp_path))


def test_a_damaged_stream_is_an_error_of_the_file_and_not_of_the_decoder(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(zlib.compress(os.urandom(4096)) * 3))
    packed[40:60] = bytes(20)
    path = tmp_path / "vmlinuz"
    protected = bytes(packed) + bytes(-len(packed) % 16)
    path.write_bytes(bzimage_header(0, len(packed), len(protected) // 16) + protected)
    with pytest.raises(ConfigError, match="damaged"):
        load_kernel(str(path), str(tmp_path))


U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFF_FFFF), st.integers(0, (1 << 64) - 1)
NEAR = st.one_of(st.integers(0, 1 << 33), U64, st.sampled_from([(1 << 64) - 1, 1 << 63, 1 << 32]))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    phoff=st.one_of(st.just(64), NEAR),
    phnum=st.one_of(st.integers(1, 3), U16),
    entry=NEAR,
    segments=st.lists(st.tuples(U32 | st.just(1), NEAR, NEAR, NEAR, NEAR), min_size=1, max_size=3),
)
def test_any_program_headers_load_within_ram_or_are_one_config_error(
    phoff: int,
    phnum: int,
    entry: int,
    segments: list[tuple[int, int, int, int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    data = struct.pack("<16sHHIQQQ", ident, 2, 62, 1, entry, phoff, 0)
    data += struct.pack("<IHHHHHH", 0, 64, 56, phnum, 0, 0, 0)
    for kind, offset, gpa, filesz, memsz in segments:
        data += struct.pack("<IIQQQQQQ", kind, 5, offset, gpa, gpa, filesz, memsz, 0x1000)
    path = tmp_path_factory.getbasetemp() / "vmlinux"
    path.write_bytes(data + bytes(4096))
    _load_or_refuse(path)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(header=st.binary(min_size=0x9F, max_size=0x9F), keep=st.integers(0, 2))
def test_any_setup_header_loads_within_ram_or_is_one_config_error(
    header: bytes, keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = bzimage_header(0, 64, 512)
    mixed = bytearray(image)
    mixed[0x1F1:0x290] = header
    mixed[0x1FE:0x208] = image[0x1FE:0x208]
    mixed[0x236:0x238] = image[0x236:0x238]
    if keep:  # so that more than the sizes' first check is met
        mixed[0x1F1:0x1F8] = image[0x1F1:0x1F8]
    if keep > 1:
        mixed[0x248:0x250] = image[0x248:0x250]
        mixed[0x25C:0x260] = bytes(4)
    path = tmp_path_factory.getbasetemp() / "vmlinuz"
    path.write_bytes(mixed + bytes(8192))
    _load_or_refuse(path)


def _load_or_refuse(path: Path) -> None:
    memory = GuestMemory(64 * MIB)
    refused = ""
    try:
        with load_kernel(str(path), str(path.parent)) as kernel:
            entry = load(memory, kernel, initrd=[bytes(4096)], cmdline="quiet")
            assert 0 < entry.rip < 64 * MIB
        kernel_version(str(path))
    except ConfigError as error:
        refused = str(error)
    finally:
        memory.close()
    assert "\n" not in refused
