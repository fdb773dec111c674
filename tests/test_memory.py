"""Guest RAM: what is inside can be viewed, what is not cannot."""

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm import memory as memory_module
from tinyvmm.errors import ConfigError
from tinyvmm.layout import MMIO_HOLE_GPA, PAGE_SIZE, RAM_ABOVE_4G_GPA
from tinyvmm.memory import GuestMemory, MemoryRangeError

LARGE = MMIO_HOLE_GPA + (1 << 20)  # sparse: costs nothing until touched


def test_ram_is_one_memfd_that_others_can_map() -> None:
    memory = GuestMemory(1 << 20)
    memory.write(0x1234, b"hello")
    with mmap.mmap(memory.fd, 1 << 20) as other:
        assert other[0x1234:0x1239] == b"hello"
    memory.close()
    memory.close()
    with pytest.raises(MemoryRangeError):
        memory.view(0x1234, 1)


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/sys/kernel/mm/transparent_hugepage"),
    reason="only who may mount gets huge pages, of a kernel that has them",
)
def test_ram_has_huge_pages_and_gives_back_small_ones() -> None:
    memory = GuestMemory(64 << 20)
    for gpa in range(0, memory.size, 2 << 20):
        memory.write(gpa, b"x")
    with open("/proc/self/smaps") as file:
        mapped = [int(line.split()[1]) for line in file if line.startswith("ShmemPmdMapped")]
    assert max(mapped) >= 2048
    assert memory.discard(memory.view(0, PAGE_SIZE)) == PAGE_SIZE
    assert memory.read(0, 1) == b"\0"
    assert memory.read(2 << 20, 1) == b"x"
    memory.close()


def test_without_the_right_to_mount_ram_is_a_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_syscall", lambda *_arguments: -1)
    memory = GuestMemory(1 << 20)
    assert "memfd:tinyvmm-ram" in os.readlink(f"/proc/self/fd/{memory.fd}")
    memory.close()


def test_ram_continues_above_the_hole() -> None:
    memory = GuestMemory(LARGE)
    low, high = memory.regions
    assert (low.gpa, low.size) == (0, MMIO_HOLE_GPA)
    assert (high.gpa, high.size) == (RAM_ABOVE_4G_GPA, 1 << 20)
    memory.write(RAM_ABOVE_4G_GPA, b"above")
    assert os.pread(memory.fd, 5, high.offset) == b"above"
    assert high.hva - low.hva == high.offset
    memory.close()


def test_what_is_discarded_is_the_hosts_again_and_reads_as_zeros() -> None:
    memory = GuestMemory(LARGE)
    for gpa in (0x10_0000, RAM_ABOVE_4G_GPA):
        memory.write(gpa, bytes([7]) * 0x10000)
        before = memory.resident
        assert memory.discard(memory.view(gpa + 1, 0x8000)) == 0x7000  # the whole pages of it
        assert before - memory.resident == 0x7000
        expected = b"\7" * 0x1000 + bytes(0x7000) + b"\7" * 0x8000
        assert memory.read(gpa, 0x10000) == expected
        assert memory.discard(memory.view(gpa, PAGE_SIZE - 1)) == 0
        assert memory.discard(memory.view(gpa, 0)) == 0
    assert memory.discard(memory.view(MMIO_HOLE_GPA - PAGE_SIZE, PAGE_SIZE)) == PAGE_SIZE
    memory.close()


def test_what_is_not_this_memorys_cannot_be_discarded() -> None:
    memory, other = GuestMemory(1 << 20), GuestMemory(1 << 20)
    for foreign in (other.view(0, PAGE_SIZE), memoryview(bytearray(3 * PAGE_SIZE))):
        with pytest.raises(MemoryRangeError):
            memory.discard(foreign)
    view = memory.view(0, PAGE_SIZE)
    memory.close()
    assert memory.discard(view) == 0  # nothing is left to give back
    other.close()


@given(gpa=st.integers(-(1 << 65), 1 << 65), length=st.integers(-8, 1 << 40))
def test_a_view_is_given_exactly_where_there_is_ram(gpa: int, length: int) -> None:
    memory = GuestMemory(LARGE)
    inside = length >= 0 and any(
        region.gpa <= gpa and gpa + length <= region.gpa + region.size for region in memory.regions
    )
    try:
        assert len(memory.view(gpa, length)) == length
        assert inside
    except MemoryRangeError:
        assert not inside
    memory.close()


@given(
    base=st.sampled_from([0, MMIO_HOLE_GPA, RAM_ABOVE_4G_GPA, RAM_ABOVE_4G_GPA + (1 << 20)]),
    before=st.integers(0, 4096),
    length=st.integers(0, 8192),
)
def test_no_view_crosses_an_edge(base: int, before: int, length: int) -> None:
    memory = GuestMemory(LARGE)
    gpa = base - before
    inside = any(r.gpa <= gpa and gpa + length <= r.gpa + r.size for r in memory.regions)
    if inside:
        memory.view(gpa, length)
    else:
        with pytest.raises(MemoryRangeError):
            memory.view(gpa, length)
    memory.close()


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, PAGE_SIZE, (1 << 20) + 1, 1 << 62])
def test_an_impossible_size_is_one_clear_line(size: int) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        GuestMemory(size)
