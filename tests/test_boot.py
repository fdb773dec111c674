"""What stands in RAM when a kernel is entered, read back as the boot protocol and the SDM say."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm import boot, layout
from tinyvmm.boot import load, load_kernel, memory_map
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files.bootparam import E820_ACPI, E820_RAM, BootParams
from tinyvmm.kernel_files.kernel_image import Kernel, Segment
from tinyvmm.kernel_files.kernel_image import Layout as KernelLayout
from tinyvmm.memory import GuestMemory

MIB = 1 << 20
GIB = 1 << 30
GPA = 16 * MIB


def kernel_of(code: bytes, memory_len: int = MIB, setup_header: bytes = b"") -> Kernel:
    segments = (Segment(GPA, 0, len(code)),)
    return Kernel("test", code, KernelLayout(segments, GPA + memory_len, GPA), setup_header, "")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory(64 * MIB)
    yield memory
    memory.close()


def boot_params(memory: GuestMemory) -> BootParams:
    params = BootParams()
    params.page[:] = memory.read(layout.BOOT_PARAMS_GPA, 4096)
    return params


def walk(memory: GuestMemory, cr3: int, address: int) -> tuple[int, int]:
    """Translate as the SDM describes 4-level paging (4.5); (physical address, ANDed flags)."""
    table, flags = cr3, ~0
    for shift in (39, 30, 21):
        index = address >> shift & 511
        (entry,) = struct.unpack("<Q", memory.read(table + 8 * index, 8))
        assert entry & 1, f"not present at bit {shift}"
        flags &= entry & 0xFFF
        table = entry & 0x000F_FFFF_FFFF_F000
        if entry & 1 << 7 and shift == 21:
            return table + (address & (1 << 21) - 1), flags | 1 << 7
    raise AssertionError("no large page")


@given(st.integers(0, 4 * GIB - 1))
def test_the_page_tables_map_the_first_4_gib_to_themselves_writable(address: int) -> None:
    memory = GuestMemory(MIB)
    tables = boot.identity_page_tables(layout.PAGE_TABLES_GPA)
    assert len(tables) == 6 * 4096
    memory.write(layout.PAGE_TABLES_GPA, tables)
    physical, flags = walk(memory, layout.PAGE_TABLES_GPA, address)
    memory.close()
    assert physical == address
    assert flags & 0b11 == 0b11


def test_the_gdt_has_the_two_descriptors_that_boot_rst_demands(memory: GuestMemory) -> None:
    entry = load(memory, kernel_of(b"\xf4"))
    gdt = memory.read(entry.gdt_gpa, entry.gdt_limit + 1)
    for selector, executable, long_mode in ((0x10, 1, 1), (0x18, 0, 0)):
        (descriptor,) = struct.unpack_from("<Q", gdt, selector)
        base = descriptor >> 16 & 0xFF_FFFF | descriptor >> 56 << 24
        limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
        assert (base, limit) == (0, 0xF_FFFF)
        assert descriptor >> 55 & 1  # G: the limit counts pages
        assert descriptor >> 53 & 1 == long_mode
        assert descriptor >> 47 & 1  # present
        assert descriptor >> 45 & 3 == 0  # ring 0
        assert descriptor >> 43 & 1 == executable
        assert descriptor >> 41 & 1  # readable code, writable data


def test_the_kernel_is_told_what_the_loader_did(memory: GuestMemory) -> None:
    entry = load(memory, kernel_of(b"\xf4"), cmdline="quiet lpj=1", acpi_rsdp_gpa=0xE0000)
    params = boot_params(memory)
    assert entry.rip == GPA
    assert entry.rsi == layout.BOOT_PARAMS_GPA
    assert memory.read(params["cmd_line_ptr"], 12) == b"quiet lpj=1\0"
    assert params["ext_cmd_line_ptr"] == 0
    assert params["acpi_rsdp_addr"] == 0xE0000
    assert params["type_of_loader"] == 0xFF
    assert params["sentinel"] == 0
    assert (params["ramdisk_image"], params["ramdisk_size"]) == (0, 0)


def test_the_kernels_own_setup_header_is_handed_on(memory: GuestMemory) -> None:
    own = BootParams()
    own["jump"] = 0x6AEB
    own["version"] = 0x020C
    own["initrd_addr_max"] = 0x37FF_FFFF
    own["cmdline_size"] = 100
    own["loadflags"] = 0x81
    load(memory, kernel_of(b"\xf4", setup_header=own.setup_header))
    params = boot_params(memory)
    for name in ("version", "initrd_addr_max", "cmdline_size"):
        assert params[name] == own[name]
    assert params["loadflags"] == 0x01  # CAN_USE_HEAP would promise a heap


sizes = st.integers(1, 8192).map(lambda pages: pages * MIB)


class Region(NamedTuple):
    gpa: int
    size: int
    offset: int = 0


@given(sizes)
def test_the_memory_map_is_sorted_disjoint_and_holds_all_ram_but_the_first_mib(size: int) -> None:
    low = min(size, layout.MMIO_HOLE_GPA)
    regions = [Region(0, low)]
    if size > low:
        regions.append(Region(layout.RAM_ABOVE_4G_GPA, size - low))
    entries = memory_map(regions)
    end = 0
    for gpa, length, _ in entries:
        assert gpa >= end
        assert length > 0
        end = gpa + length
    usable = sum(length for _, length, kind in entries if kind == E820_RAM)
    assert usable == size - MIB + layout.LOW_RAM_END
    assert (layout.ACPI_GPA, layout.ACPI_END - layout.ACPI_GPA, E820_ACPI) in entries


def test_the_memory_map_stands_in_boot_params(memory: GuestMemory) -> None:
    load(memory, kernel_of(b"\xf4"))
    params = boot_params(memory)
    entries = list(
        struct.iter_unpack("<QQI", params.page[0x2D0 : 0x2D0 + 20 * params["e820_entries"]])
    )
    assert entries == memory_map(memory.regions)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(max_size=9000), max_size=4), st.sampled_from([MIB, 40 * MIB]))
def test_the_initrd_is_whole_high_aligned_and_clear_of_the_kernel(
    memory: GuestMemory, archives: list[bytes], memory_len: int
) -> None:
    load(memory, kernel_of(b"\xf4", memory_len), initrd=archives)
    params = boot_params(memory)
    gpa, length = params["ramdisk_image"], params["ramdisk_size"]
    assert gpa % 4096 == 0
    assert length < sum(len(a) + 4 for a in archives) or length == 0
    position = gpa
    for archive in archives:  # each starts at a multiple of four, as init/initramfs.c wants
        assert memory.read(position, len(archive)) == archive
        position += len(archive) + -len(archive) % 4
    assert position == gpa + length
    if length:
        assert gpa >= GPA + memory_len
        assert 0 <= memory.size - (gpa + length) < 4096


def test_the_initrd_stays_below_the_address_the_kernel_allows(memory: GuestMemory) -> None:
    own = BootParams()
    own["jump"] = 0x6AEB
    own["initrd_addr_max"] = 32 * MIB - 1
    load(memory, kernel_of(b"\xf4", setup_header=own.setup_header), initrd=[bytes(5000)])
    assert boot_params(memory)["ramdisk_image"] == 32 * MIB - 8192


@pytest.mark.parametrize(
    ("size", "initrd"), [(8 * MIB, 0), (17 * MIB - 4096, 0), (18 * MIB, 2 * MIB), (MIB, 0)]
)
def test_too_little_ram_is_refused_with_the_remedy(size: int, initrd: int) -> None:
    memory = GuestMemory(size)
    with pytest.raises(ConfigError, match=r"MiB.*--memory"):
        load(memory, kernel_of(b"\xf4"), initrd=[bytes(initrd)])
    memory.close()


def test_an_initrd_that_fits_no_machine_is_not_answered_with_more_memory(
    memory: GuestMemory,
) -> None:
    own = BootParams()
    own["jump"] = 0x6AEB
    own["initrd_addr_max"] = 18 * MIB
    with pytest.raises(ConfigError, match="make the initramfs smaller"):
        load(memory, kernel_of(b"\xf4", setup_header=own.setup_header), initrd=[bytes(2 * MIB)])


def test_ram_that_the_kernel_just_fits_is_enough() -> None:
    memory = GuestMemory(17 * MIB)
    assert load(memory, kernel_of(b"\xf4")).rip == GPA
    memory.close()


def test_a_command_line_may_be_as_long_as_the_kernel_says_and_no_longer(
    memory: GuestMemory,
) -> None:
    load(memory, kernel_of(b"\xf4"), cmdline="x" * 2047)
    with pytest.raises(ConfigError, match=r"2048 bytes.*takes 2047.*--append"):
        load(memory, kernel_of(b"\xf4"), cmdline="x" * 2048)
    with pytest.raises(ConfigError, match="NUL"):
        load(memory, kernel_of(b"\xf4"), cmdline="a\0b")


@pytest.mark.kvm
def test_a_real_processor_takes_the_state_and_finds_what_it_was_told() -> None:
    from tinyvmm.machine import Machine
    from tinyvmm.vcpu import StopCause

    class Port:
        name = "port"
        written: list[int] = []  # noqa: RUF012 - one use

        def read(self, offset: int, size: int) -> int:
            raise AssertionError

        def write(self, offset: int, size: int, value: int) -> None:
            self.written.append(value)

    code = bytes.fromhex(
        "8b8602020000 e7e0"  # mov eax, [rsi + header]; out 0xe0, eax
        "8b8628020000 8b00 e7e0"  # mov eax, [rsi + cmd_line_ptr]; mov eax, [rax]; out 0xe0, eax
        "b818000000 8ed8 8ec0 8ed0"  # mov eax, 0x18; mov ds, eax; mov es, eax; mov ss, eax
        "6a10 488d0503000000 50 48cb"  # push 0x10; lea rax, [rip + 3]; push rax; retfq
        "8cc8 e7e0 f4"  # mov eax, cs; out 0xe0, eax; hlt
    )
    port = Port()
    with Machine(memory=32 * MIB, irqchip=False) as machine:
        machine.ports.add(0xE0, 4, port)
        entry = load(machine.memory, kernel_of(code), cmdline="ro!!")
        machine.enter_long_mode(entry)
        machine.start()
        assert machine.wait(timeout=30) == StopCause.HALT
    assert port.written == [0x53726448, int.from_bytes(b"ro!!", "little"), 0x10]


def test_debians_kernel_is_in_ram_as_its_own_program_headers_say(tmp_path: Path) -> None:
    import lzma

    from tinyvmm.images import kernels

    installed = [k for k in kernels.list_() if k.vmlinuz.endswith("/vmlinuz")]
    if not installed:
        pytest.skip("no kernel in the store: tinyvmm kernel fetch")
    data = Path(installed[0].vmlinuz).read_bytes()
    if b"\xfd7zXZ\0" not in data:
        pytest.skip("the kernel in the store is not packed with xz, as Debian's are")
    vmlinux = lzma.LZMADecompressor().decompress(data[data.index(b"\xfd7zXZ\0") :])
    memory = GuestMemory(256 * MIB)
    for _ in range(2):
        with load_kernel(installed[0].vmlinuz, str(tmp_path)) as kernel:
            load(memory, kernel)
            assert kernel.version == installed[0].version
        (phoff,) = struct.unpack_from("<Q", vmlinux, 32)
        (phnum,) = struct.unpack_from("<H", vmlinux, 56)
        for index in range(phnum):
            header = struct.unpack_from("<IIQQQQQ", vmlinux, phoff + 56 * index)
            kind, _, offset, _, gpa, length, _ = header
            if kind == 1:
                assert memory.read(gpa, length) == vmlinux[offset : offset + length]
    memory.close()
