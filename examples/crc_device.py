"""A device with registers in memory: it computes CRC-32, a word at a time.

    python -m tinyvmm run --device examples.crc_device:CrcDevice -- python3 examples/crc_guest.py

    offset  name   access
    0x00    ID     R       "CRC1"
    0x04    DATA   W       takes four bytes, lowest first
    0x08    CRC    R       of all that came since the last reset
    0x0C    RESET  W       any value: begin anew
    0x10    COUNT  R       bytes taken since

Registers answer 32-bit accesses; others read as all-ones. With it comes examples/crc_guest.py, a
program for the guest that drives it, and tests/test_examples.py, which needs no guest.
"""

import zlib

from tinyvmm.devices.register import Register, RegisterDevice


class CrcDevice(RegisterDevice):
    """One page of registers, found by the guest as ACPI device CRCD0001; no interrupt."""

    MMIO_LEN = 0x1000
    HID = "CRCD0001"
    REGISTERS = (
        Register("ID", 0x00, 4, "R", int.from_bytes(b"CRC1", "little")),
        Register("DATA", 0x04, 4, "W"),
        Register("CRC", 0x08, 4, "R"),
        Register("RESET", 0x0C, 4, "W"),
        Register("COUNT", 0x10, 4, "R"),
    )

    def write_DATA(self, value: int) -> None:
        """Go on with four more bytes."""
        self.values["CRC"] = zlib.crc32(value.to_bytes(4, "little"), self.values["CRC"])
        self.values["COUNT"] = (self.values["COUNT"] + 4) & 0xFFFF_FFFF

    def write_RESET(self, value: int) -> None:
        """Begin anew, whatever the value."""
        del value
        self.values["CRC"] = self.values["COUNT"] = 0
