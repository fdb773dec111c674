"""The ACPI tables, held to Intel's own compiler: iasl writes the same bytes from plain ASL."""

import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm import layout
from tinyvmm.acpi import DeviceNode, VirtioMmioNode, build_tables
from tinyvmm.devices import power

needs_iasl = pytest.mark.skipif(not shutil.which("iasl"), reason="iasl is not installed")

GPA = 0xE_0000


def nodes(count: int) -> list[VirtioMmioNode]:
    return [VirtioMmioNode(0xD000_0000 + i * 0x1000, 0x1000, 10 + i) for i in range(count)]


OWN = (
    DeviceNode("CRCD0001", 0xD800_0000, 0x1000, port=False, gsi=23),
    DeviceNode("ABC0002", 0x500, 255, port=True, gsi=None),
)


class Tables(NamedTuple):
    """Tables by signature, found as an operating system finds them."""

    rsdp: bytes
    by_signature: dict[str, bytes]


def follow(blob: bytes, gpa: int = GPA) -> Tables:
    """Follow the pointers from the RSDP (ACPI 6.5, 5.2.5.3)."""

    def table(table_gpa: int) -> bytes:
        offset = table_gpa - gpa
        assert 0 <= offset < len(blob)
        length: int = struct.unpack_from("<I", blob, offset + 4)[0]
        assert offset + length <= len(blob)
        return blob[offset : offset + length]

    xsdt = table(struct.unpack_from("<Q", blob, 24)[0])
    found = [table(pointer) for (pointer,) in struct.iter_unpack("<Q", xsdt[36:])]
    tables = {t[:4].decode(): t for t in [xsdt, *found]}
    dsdt = table(struct.unpack_from("<Q", tables["FACP"], 140)[0])
    return Tables(blob[:36], {**tables, "DSDT": dsdt})


MACHINES = {
    "one processor, nothing else": build_tables(GPA, cpus=1, virtio=[], uart=False),
    "a usual one": build_tables(GPA, cpus=2, virtio=nodes(3), uart=True),
    "all there can be": build_tables(GPA, cpus=255, virtio=nodes(14), uart=True, pci=1),
    "one with devices of the user's own": build_tables(GPA, cpus=1, virtio=nodes(1), devices=OWN),
    "as many devices as there can be": build_tables(GPA, cpus=255, devices=OWN[:1] * 64),
}
machines = pytest.mark.parametrize("blob", MACHINES.values(), ids=MACHINES)


# --- structure --------------------------------------------------------------------------------


@given(st.integers(0, layout.ACPI_END >> 4), st.integers(1, 255), st.integers(0, 14), st.booleans())
def test_every_checksum_is_zero_and_every_table_aligned(
    where: int, cpus: int, virtio: int, uart: bool
) -> None:
    gpa = where << 4
    blob = build_tables(gpa, cpus=cpus, virtio=nodes(virtio), uart=uart)
    rsdp, tables = follow(blob, gpa)
    assert rsdp[:8] == b"RSD PTR "
    assert rsdp[15] == 2
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0)
    assert set(tables) == {"XSDT", "FACP", "APIC", "DSDT"}
    for table in tables.values():
        assert sum(table) & 0xFF == 0
        assert blob.index(table) % 16 == 0


def test_the_largest_machine_fits_the_place_kept_for_it() -> None:
    for name in ("all there can be", "as many devices as there can be"):
        assert len(MACHINES[name]) < (layout.ACPI_END - layout.ACPI_GPA) / 2


# --- held to iasl -----------------------------------------------------------------------------


def iasl(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["iasl", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_iasl
@machines
@pytest.mark.parametrize("signature", ["XSDT", "FACP", "APIC", "DSDT", "MCFG"])
def test_iasl_reads_each_table_and_writes_it_again(
    blob: bytes, signature: str, tmp_path: Path
) -> None:
    tables = follow(blob).by_signature
    if signature == "MCFG" and blob is not MACHINES["all there can be"]:
        assert "MCFG" not in tables
        return
    table = tables[signature]
    (tmp_path / "ours.dat").write_bytes(table)
    assert "Warning" not in iasl(tmp_path, "-d", "ours.dat")
    # -oa: no optimisation, so that the same source gives the same bytes
    said = iasl(tmp_path, "-we", "-oa", "-p", "theirs", "ours.dsl")
    assert "0 Errors, 0 Warnings, 0 Remarks" in said
    # All but the checksum, and who compiled it.
    theirs = (tmp_path / "theirs.aml").read_bytes()
    assert theirs[:9] == table[:9]
    assert theirs[10:28] == table[10:28]
    assert theirs[36:] == table[36:]


ASL_START = r"""
DefinitionBlock ("", "DSDT", 2, "TINYVM", "TINYVMM ", 1)
{
    Name (\_S5, Package () { 5, Zero, Zero, Zero })
    Scope (\_SB)
    {
"""
ASL_VIRTIO = """
        Device (VR%(index)02X)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, %(uid)s)
            Name (_CCA, One)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, %(gpa)#x, %(length)#x)
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { %(gsi)d }
            })
        }
"""
ASL_PCI = """
        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A08"))
            Name (_CID, EisaId ("PNP0A03"))
            Name (_UID, Zero)
            Name (_SEG, %(segment)s)
            Name (_BBN, Zero)
            Name (_CCA, One)
            Name (_CRS, ResourceTemplate ()
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0, 0, 0, 0, 1)
                IO (Decode16, 0xCF8, 0xCF8, 1, 8)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed,
                    NonCacheable, ReadWrite, 0, 0xE1000000, 0xEFFFFFFF, 0, 0x0F000000)
            })
        }
        Device (MRES)
        {
            Name (_HID, EisaId ("PNP0C02"))
            Name (_UID, Zero)
            Name (_CRS, ResourceTemplate () { Memory32Fixed (ReadWrite, 0xE0000000, 0x100000) })
        }
"""
ASL_UART = """
        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501"))
            Name (_UID, Zero)
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x3F8, 0x3F8, 1, 8)
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 4 }
            })
        }
"""
ASL_END = """
        Device (RTC)
        {
            Name (_HID, EisaId ("PNP0B00"))
            Name (_UID, Zero)
            Name (_CRS, ResourceTemplate () { IO (Decode16, 0x70, 0x70, 1, 2) })
        }
        Device (PWRB)
        {
            Name (_HID, EisaId ("PNP0C0C"))
            Name (_UID, Zero)
        }
        Device (GED)
        {
            Name (_HID, "ACPI0013")
            Name (_UID, Zero)
            Name (_CRS, ResourceTemplate ()
            {
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { 9 }
            })
            OperationRegion (EVRG, SystemIO, 0x603, One)
            Field (EVRG, ByteAcc, NoLock, Preserve) { EVNT, 8 }
            Method (_EVT, 1, Serialized)
            {
                Store (EVNT, Local0)
                If (And (Local0, One)) { Notify (PWRB, 0x80) }
            }
        }
"""
ASL_OWN = """
        Device (DV00)
        {
            Name (_HID, "CRCD0001")
            Name (_UID, Zero)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xD8000000, 0x1000)
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { 23 }
            })
        }
        Device (DV01)
        {
            Name (_HID, "ABC0002")
            Name (_UID, One)
            Name (_CRS, ResourceTemplate () { IO (Decode16, 0x500, 0x500, 1, 255) })
        }
"""


def asl_integer(value: int) -> str:
    """`value` as one writes it for the shortest encoding."""
    return {0: "Zero", 1: "One"}.get(value) or str(value)


@needs_iasl
@pytest.mark.parametrize(
    ("virtio", "uart", "pci", "own"),
    [
        (0, False, None, False),
        (1, True, None, False),
        (0, True, 0, True),
        (14, True, 1, True),
    ],
)
def test_the_dsdt_is_what_iasl_compiles_from_the_source_we_mean(
    virtio: int, uart: bool, pci: int | None, own: bool, tmp_path: Path
) -> None:
    devices = "".join(
        ASL_VIRTIO % {"index": index, "uid": asl_integer(index), **node._asdict()}
        for index, node in enumerate(nodes(virtio))
    )
    devices += "" if pci is None else ASL_PCI % {"segment": asl_integer(pci)}
    devices += ASL_UART if uart else ""
    (tmp_path / "dsdt.asl").write_text(
        ASL_START + devices + ASL_END + (ASL_OWN if own else "") + "}}"
    )
    iasl(tmp_path, "-oa", "-p", "theirs", "dsdt.asl")
    blob = build_tables(
        GPA, cpus=1, virtio=nodes(virtio), uart=uart, pci=pci, devices=OWN if own else ()
    )
    assert (tmp_path / "theirs.aml").read_bytes()[36:] == follow(blob).by_signature["DSDT"][36:]


def fields(tmp_path: Path, table: bytes) -> dict[str, str]:
    """The fields of a table as iasl names them; of several of one name, the last."""
    (tmp_path / "table.dat").write_bytes(table)
    iasl(tmp_path, "-d", "table.dat")
    lines = (tmp_path / "table.dsl").read_text().splitlines()
    pairs = (re.match(r"(?:\[\w+h \d+ +\d+\])? *([^:\[]+?) : (.*)", line) for line in lines)
    return {pair[1]: pair[2].strip() for pair in pairs if pair}


def registers(tmp_path: Path, table: bytes) -> dict[str, tuple[str, str, str]]:
    """Space, access width and address of each Generic Address Structure, as iasl reads them."""
    fields(tmp_path, table)
    text = (tmp_path / "table.dsl").read_text()
    pattern = (
        r" ([\w ]+) : \[Generic Address Structure\]\n"
        r".*Space ID : \w+ \[(\w+)\]\n.*\n.*\n.*Access Width : \w+ \[([^]]+)\]\n.*Address : (\w+)"
    )
    return {m[0].strip(): (m[1], m[2], m[3]) for m in re.findall(pattern, text)}


@needs_iasl
def test_the_fadt_says_reduced_hardware_and_where_reset_and_sleep_are(tmp_path: Path) -> None:
    fadt = follow(MACHINES["a usual one"]).by_signature["FACP"]
    read = fields(tmp_path, fadt)
    assert read["Hardware Reduced (V5)"] == "1"
    assert read["Reset Register Supported (V2)"] == "1"
    assert int(read["Value to cause reset"], 16) == power.RESET_VALUE
    assert read["8042 Present on ports 60/64 (V2)"] == "0"
    assert read["VGA Not Present (V4)"] == "1"
    assert read["CMOS RTC Not Present (V5)"] == "0"
    assert read["Legacy Devices Supported (V2)"] == "1"
    assert read["RTC Century Index"] == "32"
    found = registers(tmp_path, fadt)
    byte_port = ("SystemIO", "Byte Access:8")
    ports = {
        "Reset Register": layout.POWER_PORT + power.RESET,
        "Sleep Control Register": layout.POWER_PORT + power.SLEEP_CONTROL,
        "Sleep Status Register": layout.POWER_PORT + power.SLEEP_STATUS,
    }
    for name, port in ports.items():
        assert found.pop(name) == (*byte_port, f"{port:016X}")
    assert {address for _, _, address in found.values()} == {"0" * 16}, "nothing else is there"
    bare = follow(MACHINES["one processor, nothing else"]).by_signature["FACP"]
    assert fields(tmp_path, bare)["Legacy Devices Supported (V2)"] == "0"


@needs_iasl
def test_the_madt_lists_every_processor_and_the_ioapic(tmp_path: Path) -> None:
    madt = follow(MACHINES["all there can be"]).by_signature["APIC"]
    read = fields(tmp_path, madt)
    assert int(read["Local Apic Address"], 16) == layout.LOCAL_APIC_GPA
    assert int(read["Address"], 16) == layout.IOAPIC_GPA
    assert read["PC-AT Compatibility"] == "0"
    text = (tmp_path / "table.dsl").read_text()
    ids = [int(found, 16) for found in re.findall(r"Local Apic ID : (\w+)", text)]
    assert ids == list(range(255))
    assert len(re.findall(r"Processor Enabled : 1", text)) == 255
    assert text.count("[I/O APIC]") == 1


@needs_iasl
def test_the_mcfg_says_where_the_configuration_space_of_bus_0_is(tmp_path: Path) -> None:
    read = fields(tmp_path, follow(MACHINES["all there can be"]).by_signature["MCFG"])
    assert int(read["Base Address"], 16) == layout.PCI_ECAM_GPA
    assert (read["Segment Group Number"], read["Start Bus Number"]) == ("0001", "00")
    buses = int(read["End Bus Number"], 16) + 1
    assert buses << 20 == layout.PCI_ECAM_LEN  # 1 MiB a bus
