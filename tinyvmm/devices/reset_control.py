"""Reset Control Register: port 0xCF9, the chipset's way to reset a PC.

Model: Intel ICH9 data sheet, 13.7.5 "RST_CNT, Reset Control Register". Port 0xCF9, one byte that is
within the four of PCI's CONFIG_ADDRESS but another register when a single byte is accessed. A write
that raises bit 2 (RST_CPU) resets; bit 1 (SYS_RST) says whether soft or hard, which here is one.

Not emulated: FULL_RST (bit 3) is stored and means nothing more.

Threads: vCPUs only; one byte is read and written, which needs no lock.
"""

from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import Device

SYS_RST = 1 << 1
RST_CPU = 1 << 2
FULL_RST = 1 << 3


class ResetControl(Device):
    """The register; one port."""

    name = "reset-control"
    length = 1

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """Call `on_reset`, on the vCPU's thread, when the guest asks for it."""
        self._on_reset = on_reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """Give what was written; RST_CPU is never seen set."""
        del offset, size
        return self._value & ~RST_CPU

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on the rise of RST_CPU."""
        del offset, size
        before, self._value = self._value, value & (SYS_RST | RST_CPU | FULL_RST)
        if value & ~before & RST_CPU:
            self._on_reset()

    def save(self) -> dict[str, Any]:
        """Return the byte."""
        return {"value": self._value}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        self._value = state["value"]
