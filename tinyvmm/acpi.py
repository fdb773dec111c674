"""The ACPI tables: how the guest learns what the board has.

Follows the ACPI specification 6.5, chapters 5.2 (tables) and 20 (AML). The machine is "hardware
reduced" (4.1): no fixed registers, no system-management mode, no legacy timers to describe.

    RSDP -> XSDT -> FADT -> DSDT     sleep, reset; the devices, in AML
                 -> MADT             processors and the IOAPIC
                 -> MCFG             where PCI configuration space is, if there is PCI

The DSDT says where each virtio-mmio device is ("LNRO0005", by which Linux's virtio_mmio driver
finds them) and each device of the user's own, and describes the UART, the clock, and a power button
that a Generic Event Device signals. AML is written by a few functions, each of which encodes one
term to bytes.

A surprising fact: a Linux that finds reduced hardware supposes EFI and resets through it. Without
EFI it jumps to a BIOS, which hangs here; `reboot=a` on its command line makes it use RESET_REG.
"""

import struct
from collections.abc import Sequence

from tinyvmm.devices import power, rtc
from tinyvmm.layout import (
    COM1_GSI,
    COM1_PORT,
    IOAPIC_GPA,
    LOCAL_APIC_GPA,
    PCI_CONFIG_PORT,
    PCI_ECAM_GPA,
    PCI_ECAM_LEN,
    PCI_WINDOW_END,
    PCI_WINDOW_GPA,
    POWER_GSI,
    POWER_PORT,
    RTC_PORT,
)
from tinyvmm.named import NamedTuple

OEM_ID = b"TINYVM"
OEM_TABLE_ID = b"TINYVMM "
CREATOR_ID = b"TVMM"


class VirtioMmioNode(NamedTuple):
    """A virtio-mmio device: its registers' address and length in bytes, and its interrupt."""

    gpa: int
    length: int
    gsi: int


class DeviceNode(NamedTuple):
    """A device of the user's own: `length` ports or bytes of memory from `base`, an interrupt."""

    hid: str
    base: int
    length: int
    port: bool
    gsi: int | None


def build_tables(
    gpa: int,
    *,
    cpus: int,
    virtio: Sequence[VirtioMmioNode] = (),
    uart: bool = True,
    pci: int | None = None,
    devices: Sequence[DeviceNode] = (),
) -> bytes:
    """Return all tables, to be put at `gpa` (a multiple of 16), where the RSDP then is.

    Processors have the local APIC ids 0 to cpus - 1. `pci` is the segment group in which
    the PCI bus is said to be; None if there is none.
    """
    out = bytearray(_align(_RSDP_LEN))

    def place(table: bytes) -> int:
        where = gpa + len(out)
        out.extend(table.ljust(_align(len(table)), b"\0"))
        return where

    dsdt = place(_table(b"DSDT", 2, _dsdt_aml(virtio, devices, uart=uart, pci=pci)))
    tables = [place(_fadt(dsdt, uart=uart)), place(_madt(cpus))]
    if pci is not None:
        tables.append(place(_mcfg(pci)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    out[:_RSDP_LEN] = _rsdp(xsdt)
    return bytes(out)


# --- tables (5.2) -----------------------------------------------------------------------------

_RSDP_LEN = 36


def _align(length: int) -> int:
    return length + 15 & ~15


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _rsdp(xsdt_gpa: int) -> bytes:
    """Root System Description Pointer (5.2.5.3), revision 2, with its two checksums."""
    first = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, 0))
    first[8] = _checksum(first)
    whole = first + struct.pack("<IQB3x", _RSDP_LEN, xsdt_gpa, 0)
    whole[32] = _checksum(whole)
    return bytes(whole)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A System Description Table: the common header (5.2.6), then `body`."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        36 + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        1,
        CREATOR_ID,
        1,
    )
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _io_register(port: int) -> bytes:
    """Generic Address Structure (5.2.3.2) of a byte in port space."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


FADT_WBINVD = 1 << 0
FADT_PWR_BUTTON = 1 << 4  # there is none among the fixed registers
FADT_SLP_BUTTON = 1 << 5
FADT_RESET_REG_SUP = 1 << 10
FADT_HW_REDUCED_ACPI = 1 << 20
IAPC_LEGACY_DEVICES = 1 << 0
IAPC_VGA_NOT_PRESENT = 1 << 2


def _fadt(dsdt_gpa: int, *, uart: bool) -> bytes:
    """Fixed ACPI Description Table (5.2.9), revision 6.5: no fixed hardware but reset and sleep."""
    body = bytearray(276 - 36)

    def put(offset: int, data: bytes) -> None:
        body[offset - 36 : offset - 36 + len(data)] = data

    put(108, struct.pack("<B", rtc.CENTURY))
    # The bit for an 8042 stays clear: Linux then looks for no keyboard.
    put(109, struct.pack("<H", IAPC_VGA_NOT_PRESENT | (IAPC_LEGACY_DEVICES if uart else 0)))
    flags = FADT_WBINVD | FADT_PWR_BUTTON | FADT_SLP_BUTTON
    put(112, struct.pack("<I", flags | FADT_RESET_REG_SUP | FADT_HW_REDUCED_ACPI))
    put(116, _io_register(POWER_PORT + power.RESET) + bytes((power.RESET_VALUE,)))
    put(131, b"\x05")  # minor version
    put(140, struct.pack("<Q", dsdt_gpa))
    put(244, _io_register(POWER_PORT + power.SLEEP_CONTROL))
    put(256, _io_register(POWER_PORT + power.SLEEP_STATUS))
    put(268, b"TINYVMM\0")
    return _table(b"FACP", 6, bytes(body))


def _madt(cpus: int) -> bytes:
    """Multiple APIC Description Table (5.2.12): local APICs, their NMI pins, the IOAPIC."""
    body = struct.pack("<II", LOCAL_APIC_GPA, 0)
    for apic_id in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, apic_id, apic_id, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_GPA, 0)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI on LINT1 of every processor
    return _table(b"APIC", 5, body)


def _mcfg(segment: int) -> bytes:
    """Memory-mapped configuration space (PCI Firmware Specification 3.2, table 4-2): bus 0."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", PCI_ECAM_GPA, segment, 0, 0))


# --- AML terms (20.2) -------------------------------------------------------------------------

_ZERO, _ONE = b"\x00", b"\x01"
_LOCAL0 = b"\x60"


def _integer(value: int) -> bytes:
    if value in {0, 1}:
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit an AML integer")


def _string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\0"


def _eisa_id(text: str) -> bytes:
    """`PNP0501` as the compressed integer of 19.3.4: 5 bits a letter, big-endian."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


def _package_length(payload: bytes) -> bytes:
    """PkgLength (20.2.4) of `payload` and of itself."""
    for extra in range(4):
        length = len(payload) + 1 + extra
        if extra == 0 and length < 1 << 6:
            return bytes((length,))
        if extra and length < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | length & 0xF,)) + (length >> 4).to_bytes(extra, "little")
    raise ValueError("an AML package is too long")


def _packaged(opcode: bytes, payload: bytes) -> bytes:
    return opcode + _package_length(payload) + payload


def _name(name: bytes, value: bytes) -> bytes:
    return b"\x08" + name + value


def _scope(name: bytes, *terms: bytes) -> bytes:
    return _packaged(b"\x10", name + b"".join(terms))


def _device(name: bytes, *terms: bytes) -> bytes:
    return _packaged(b"\x5b\x82", name + b"".join(terms))


def _method(name: bytes, arguments: int, *terms: bytes) -> bytes:
    serialized = 1 << 3
    return _packaged(b"\x14", name + bytes((arguments | serialized,)) + b"".join(terms))


def _if(condition: bytes, *terms: bytes) -> bytes:
    return _packaged(b"\xa0", condition + b"".join(terms))


def _and(left: bytes, right: bytes) -> bytes:
    return b"\x7b" + left + right + _ZERO  # no target


def _store(source: bytes, target: bytes) -> bytes:
    return b"\x70" + source + target


def _notify(target: bytes, value: int) -> bytes:
    return b"\x86" + target + _integer(value)


def _package(*elements: bytes) -> bytes:
    return _packaged(b"\x12", bytes((len(elements),)) + b"".join(elements))


def _port_field(region: bytes, port: int, field: bytes) -> bytes:
    """An OperationRegion of one port, and a Field of its byte."""
    system_io, byte_access = b"\x01", b"\x01"
    declared = b"\x5b\x80" + region + system_io + _integer(port) + _integer(1)
    return declared + _packaged(b"\x5b\x81", region + byte_access + field + b"\x08")


# --- resource descriptors (6.4) ---------------------------------------------------------------


def _crs(*descriptors: bytes) -> bytes:
    """`_CRS`: a buffer of descriptors and the end tag."""
    data = b"".join(descriptors) + b"\x79\x00"
    return _name(b"_CRS", _packaged(b"\x11", _integer(len(data)) + data))


def _memory(gpa: int, length: int) -> bytes:
    """32-bit fixed memory range, writable."""
    return struct.pack("<BHBII", 0x86, 9, 1, gpa, length)


def _bus_numbers(first: int, last: int) -> bytes:
    """Word address space: the buses behind a bridge, which it produces (6.4.3.5.3)."""
    count = last - first + 1
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, count)


def _memory_window(gpa: int, end: int) -> bytes:
    """DWord address space: memory that a bridge passes on, read and write (6.4.3.5.2)."""
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, 0x0C, 1, 0, gpa, end - 1, 0, end - gpa)


def _ports(base: int, length: int) -> bytes:
    """I/O ports, 16-bit decode."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def _interrupt(gsi: int, *, edge: bool = False) -> bytes:
    """Extended interrupt: consumed, active high, exclusive, level-triggered unless `edge`."""
    return struct.pack("<BHBBI", 0x89, 6, 1 | edge << 1, 1, gsi)


# --- the DSDT ---------------------------------------------------------------------------------


def _dsdt_aml(
    virtio: Sequence[VirtioMmioNode], own: Sequence[DeviceNode], *, uart: bool, pci: int | None
) -> bytes:
    devices = [_virtio_device(index, node) for index, node in enumerate(virtio)]
    if pci is not None:
        devices += _pci_host_bridge(pci)
    if uart:
        edge = _interrupt(COM1_GSI, edge=True)
        devices.append(_isa_device(b"COM1", "PNP0501", _ports(COM1_PORT, 8), edge))
    devices.append(_isa_device(b"RTC_", "PNP0B00", _ports(RTC_PORT, 2)))
    devices += _power_button()
    devices += [_own_device(index, node) for index, node in enumerate(own)]
    s5 = _name(b"\\_S5_", _package(_integer(power.SLP_TYP_S5), _ZERO, _ZERO, _ZERO))
    return s5 + _scope(b"\\_SB_", *devices)


def _virtio_device(index: int, node: VirtioMmioNode) -> bytes:
    return _device(
        b"VR%02X" % index,
        _name(b"_HID", _string("LNRO0005")),
        _name(b"_UID", _integer(index)),
        _name(b"_CCA", _ONE),
        _crs(_memory(node.gpa, node.length), _interrupt(node.gsi)),
    )


def _own_device(index: int, node: DeviceNode) -> bytes:
    where = (_ports if node.port else _memory)(node.base, node.length)
    interrupt = () if node.gsi is None else (_interrupt(node.gsi),)
    return _device(
        b"DV%02X" % index,
        _name(b"_HID", _string(node.hid)),
        _name(b"_UID", _integer(index)),
        _crs(where, *interrupt),
    )


def _pci_host_bridge(segment: int) -> list[bytes]:
    """A PCI Express root with one bus, and what reserves its configuration space.

    Linux believes MCFG only if the space it names is a motherboard resource as well.
    """
    return [
        _device(
            b"PCI0",
            _name(b"_HID", _eisa_id("PNP0A08")),
            _name(b"_CID", _eisa_id("PNP0A03")),
            _name(b"_UID", _ZERO),
            _name(b"_SEG", _integer(segment)),
            _name(b"_BBN", _ZERO),
            _name(b"_CCA", _ONE),
            _crs(
                _bus_numbers(0, 0),
                _ports(PCI_CONFIG_PORT, 8),
                _memory_window(PCI_WINDOW_GPA, PCI_WINDOW_END),
            ),
        ),
        _device(
            b"MRES",
            _name(b"_HID", _eisa_id("PNP0C02")),
            _name(b"_UID", _ZERO),
            _crs(_memory(PCI_ECAM_GPA, PCI_ECAM_LEN)),
        ),
    ]


def _isa_device(name: bytes, hid: str, *descriptors: bytes) -> bytes:
    return _device(name, _name(b"_HID", _eisa_id(hid)), _name(b"_UID", _ZERO), _crs(*descriptors))


def _power_button() -> list[bytes]:
    """A control-method power button, and the event device whose interrupt announces it."""
    pressed = _and(_LOCAL0, _integer(power.EVENT_POWER_BUTTON))
    return [
        _device(b"PWRB", _name(b"_HID", _eisa_id("PNP0C0C")), _name(b"_UID", _ZERO)),
        _device(
            b"GED_",
            _name(b"_HID", _string("ACPI0013")),
            _name(b"_UID", _ZERO),
            _crs(_interrupt(POWER_GSI)),
            _port_field(b"EVRG", POWER_PORT + power.EVENT, b"EVNT"),
            _method(
                b"_EVT",
                1,
                _store(b"EVNT", _LOCAL0),
                _if(pressed, _notify(b"PWRB", 0x80)),
            ),
        ),
    ]
