"""A device's registers as data: a table that reads like the data sheet.

    class Uart(RegisterDevice):
        REGISTERS = (
            Register("RBR", 0x0, access="R", bank=0),
            Register("DLL", 0x0, bank=1),
            Register("SCR", 0x7),
        )

A register without further code is storage. What has a side effect is a method named after it:
`read_RBR(self) -> int`, `write_THR(self, value)`. Where one address holds different registers at
different times (a UART's divisor latch), each has a `bank`, and the device calls `select_bank`;
registers without a bank are in all of them.

The table is resolved once, when the device is made. An access is then one dictionary look-up by
offset and width, and one call; an access that no register matches in both goes to `read_other` or
`write_other`, which give all-ones and drop.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from tinyvmm.devices.device import Device
from tinyvmm.named import NamedTuple


class Register(NamedTuple):
    """One line of the data sheet; `width` in bytes, `access` "R", "W" or "RW"."""

    name: str
    offset: int
    width: int = 1
    access: str = "RW"
    reset: int = 0
    bank: int | None = None


class RegisterDevice(Device):
    """A device whose class declares `REGISTERS`; their stored values are in `values`."""

    REGISTERS: ClassVar[tuple[Register, ...]] = ()

    def __init__(self) -> None:
        self.values = {register.name: register.reset for register in self.REGISTERS}
        self._bank = 0
        banks = {register.bank or 0 for register in self.REGISTERS}
        self._read_banks = {bank: self._readers(bank) for bank in banks}
        self._write_banks = {bank: self._writers(bank) for bank in banks}
        self._reads, self._writes = self._read_banks[0], self._write_banks[0]

    def select_bank(self, bank: int) -> None:
        """Make the registers of `bank` the visible ones."""
        self._bank = bank
        self._reads, self._writes = self._read_banks[bank], self._write_banks[bank]

    def read(self, offset: int, size: int) -> int:
        """Answer a read with the register's handler or stored value."""
        reader = self._reads.get(offset << 4 | size)
        return self.read_other(offset, size) if reader is None else reader()

    def write(self, offset: int, size: int, value: int) -> None:
        """Hand `value` to the register's handler, or store it."""
        writer = self._writes.get(offset << 4 | size)
        if writer is None:
            self.write_other(offset, size, value)
        else:
            writer(value)

    def read_other(self, offset: int, size: int) -> int:
        """Answer a read that matches no register: all-ones, as on an empty bus."""
        del offset
        return (1 << 8 * size) - 1

    def write_other(self, offset: int, size: int, value: int) -> None:
        """Drop a write that matches no register."""

    def save(self) -> dict[str, Any]:
        """Return the stored values and the bank."""
        return {"values": dict(self.values), "bank": self._bank}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        self.values.update(state["values"])
        self.select_bank(state["bank"])

    def _visible(self, bank: int, access: str) -> list[Register]:
        return [
            register
            for register in self.REGISTERS
            if register.bank in {None, bank} and access in register.access
        ]

    def _readers(self, bank: int) -> dict[int, Callable[[], int]]:
        stored = self.values.__getitem__
        return {
            register.offset << 4 | register.width: getattr(
                self, f"read_{register.name}", partial(stored, register.name)
            )
            for register in self._visible(bank, "R")
        }

    def _writers(self, bank: int) -> dict[int, Callable[[int], None]]:
        store = self.values.__setitem__
        return {
            register.offset << 4 | register.width: getattr(
                self, f"write_{register.name}", partial(store, register.name)
            )
            for register in self._visible(bank, "W")
        }
