"""MSI-X: interrupts as writes to memory, one for each of a function's vectors.

PCI Local Bus Specification 3.0, section 6.8.2. The table, in the function's BAR, has 16 bytes a
vector: where to write (low and high), what (data), and a word whose bit 0 masks it. A vector that
fires while masked is remembered in the pending bit array and fires when it is unmasked. On x86 the
write goes to the local APICs, and KVM performs it: each vector has a `MessageLine`.

Threads: vCPU threads write the table, any thread fires. `_lock` guards the table, and lines are
called with it held, so a vector once masked does not fire any more.
"""

import struct
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from tinyvmm.devices.device import Device

PCI_CAP_ID_MSIX = 0x11
PCI_MSIX_FLAGS_ENABLE = 1 << 15
PCI_MSIX_FLAGS_MASKALL = 1 << 14
ENTRY_LEN = 16
_MASKED = 1 << 0
_RESET_ENTRY = struct.pack("<IIII", 0, 0, 0, _MASKED)


class MessageLine(Protocol):
    """The way of one vector's message to the local APICs; called from any thread."""

    def route(self, address: int, data: int) -> None:
        """Write `data` to `address` from now on."""

    def fire(self) -> None:
        """Send the message; it has been routed before."""

    def fileno(self) -> int:
        """Return an eventfd whose events send the message; -1 if there is none."""


class Msix(Device):
    """The table, a vector for each of `lines`; as a device, the table's bytes."""

    def __init__(self, name: str, lines: Sequence[MessageLine]) -> None:
        """Make the vectors, all masked and MSI-X itself disabled."""
        self.name = f"{name} msi-x"
        self.vectors = vectors = len(lines)
        self._lines = lines
        self._lock = threading.Lock()
        self._table = bytearray(_RESET_ENTRY * vectors)
        self._pending = [False] * vectors
        self._flags = 0
        self._open = [False] * vectors  # may fire; the only thing looked at when one does

    @property
    def enabled(self) -> bool:
        """Whether the driver has turned MSI-X on."""
        return bool(self._flags & PCI_MSIX_FLAGS_ENABLE)

    def set_flags(self, flags: int) -> None:
        """Take the capability's Message Control."""
        with self._lock:
            self._flags = flags
            for vector in range(self.vectors):
                self._resolve(vector)

    def fire(self, vector: int) -> bool:
        """Interrupt by `vector`, or note that it is to be when it may; others are ignored.

        False, and nothing done, if the driver has not turned MSI-X on.
        """
        with self._lock:
            if 0 <= vector < self.vectors and self._open[vector]:
                self._lines[vector].fire()
                return True
            if not self.enabled:
                return False
            if 0 <= vector < self.vectors:
                self._pending[vector] = True
            return True

    def fileno(self, vector: int) -> int:
        """Return the eventfd that fires `vector`; -1 while it may not, or where there is none."""
        with self._lock:
            known = 0 <= vector < self.vectors and self._open[vector]
            return self._lines[vector].fileno() if known else -1

    def read(self, offset: int, size: int) -> int:
        """Answer a read of the table; 0 past its end."""
        with self._lock:
            return int.from_bytes(self._table[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take aligned writes of 4 or 8 bytes, which are all that is allowed."""
        if size not in {4, 8} or offset % size or offset + size > len(self._table):
            return
        with self._lock:
            self._table[offset : offset + size] = value.to_bytes(size, "little")
            self._resolve(offset // ENTRY_LEN)

    def _resolve(self, vector: int) -> None:
        low, high, data, control = struct.unpack_from("<IIII", self._table, ENTRY_LEN * vector)
        self._open[vector] = (
            self.enabled and not self._flags & PCI_MSIX_FLAGS_MASKALL and not control & _MASKED
        )
        if self._open[vector]:
            line = self._lines[vector]
            line.route(high << 32 | low, data)
            if self._pending[vector]:
                self._pending[vector] = False
                line.fire()

    def pending(self, offset: int, size: int) -> int:
        """Answer a read of the pending bit array."""
        with self._lock:
            bits = sum([1 << vector for vector, waits in enumerate(self._pending) if waits])
        return bits >> 8 * offset & (1 << 8 * size) - 1

    def reset(self) -> None:
        """Forget what is pending; table and enable bit are the driver's."""
        with self._lock:
            self._pending = [False] * self.vectors

    def save(self) -> dict[str, Any]:
        """Return table, flags and pending bits."""
        with self._lock:
            return {
                "table": self._table.hex(),
                "flags": self._flags,
                "pending": list(self._pending),
            }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        with self._lock:
            self._table[:] = bytes.fromhex(state["table"])
            self._pending = list(state["pending"])
            self._flags = state["flags"]
            for vector in range(self.vectors):
                self._resolve(vector)
