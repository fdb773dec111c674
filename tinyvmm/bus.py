"""An address space: which device answers which address.

A machine has two, ports (16 bits) and guest-physical memory (64 bits). The rules that hold for
every device live here once: an address nobody claims reads as all-ones and swallows writes, as on
the ISA and PCI buses; a device sees offsets into its own range; a value read is cut to the access's
width, and an access that straddles the end of a range belongs to nobody.

A range may move while the guest runs: a PCI function's BAR does. Look-ups need no lock, since the
lists they read are replaced and never changed; those who add and remove hold `_lock`.
"""

import threading
from typing import Protocol

from tinyvmm import trace
from tinyvmm.errors import ConfigError

# KVM splits an access that crosses a page, so odd widths do arrive; no device answers them.
_MASK = {size: (1 << 8 * size) - 1 for size in range(1, 9)}
_WIDTHS = frozenset((1, 2, 4, 8))
_BLOCK_SHIFT = 12


class BusDevice(Protocol):
    """What the bus asks of a device."""

    name: str

    def read(self, offset: int, size: int) -> int:
        """Answer a read of `size` bytes at `offset`."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of `size` bytes at `offset`."""


class Bus:
    """One address space, "port" or "mmio" by `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ranges: list[tuple[int, int, BusDevice]] = []  # (base, end, device), by base
        # The ranges that touch each 4 KiB block: a look-up is one dict access, then a short scan.
        self._blocks: dict[int, list[tuple[int, int, BusDevice]]] = {}
        self._lock = threading.Lock()

    def add(self, base: int, length: int, device: BusDevice) -> None:
        """Give `device` the addresses base..base+length-1; ConfigError if any is taken."""
        end = base + length
        with self._lock:
            for other_base, other_end, other in self.ranges:
                if base < other_end and other_base < end:
                    raise ConfigError(
                        f"{device.name} at {self.name} {base:#x} overlaps {other.name} "
                        f"at {other_base:#x}: give it another address"
                    )
            self.ranges = sorted([*self.ranges, (base, end, device)], key=lambda item: item[0])
            for block in _blocks(base, end):
                self._blocks[block] = [*self._blocks.get(block, ()), (base, end, device)]

    def remove(self, device: BusDevice) -> None:
        """Take away every range of `device`; harmless if it has none."""
        with self._lock:
            for base, end, owner in self.ranges:
                if owner is device:
                    for block in _blocks(base, end):
                        left = [item for item in self._blocks[block] if item[2] is not device]
                        if left:
                            self._blocks[block] = left
                        else:  # or a guest that moves a BAR all over would fill our memory
                            del self._blocks[block]
            self.ranges = [item for item in self.ranges if item[2] is not device]

    def find(self, address: int, size: int) -> tuple[BusDevice, int] | None:
        """Return the device that owns the whole access and the offset it sees, or None."""
        for base, end, device in self._blocks.get(address >> _BLOCK_SHIFT, ()):
            if base <= address and address + size <= end and size in _WIDTHS:
                return device, address - base
        return None

    def read(self, address: int, size: int) -> int:
        """Perform a guest's read of 1 to 8 bytes."""
        found = self.find(address, size)
        if found is None:
            value = _MASK[size]
            if trace.hook is not None:
                trace.hook(trace.Unclaimed(self.name, "read", address, size, value))
            return value
        value = found[0].read(found[1], size) & _MASK[size]
        if trace.hook is not None:
            trace.hook(trace.Access(self.name, "read", address, size, value))
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Perform a guest's write of 1 to 8 bytes."""
        found = self.find(address, size)
        if trace.hook is not None:
            kind = trace.Unclaimed if found is None else trace.Access
            trace.hook(kind(self.name, "write", address, size, value))
        if found is not None:
            found[0].write(found[1], size, value)


def _blocks(base: int, end: int) -> range:
    return range(base >> _BLOCK_SHIFT, (end - 1 >> _BLOCK_SHIFT) + 1)
