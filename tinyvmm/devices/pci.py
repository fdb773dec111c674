"""PCI: configuration space, one bus of functions, and the two ways a guest gets at them.

Follows the PCI Local Bus Specification 3.0 (chapter 6: configuration space, 6.8: MSI-X) and, for
memory-mapped configuration, PCI Express Base 7.2.2 ("ECAM"). Names are <linux/pci_regs.h>'s.

A `Function` is 256 bytes of configuration space with a mask of the bits a guest may change, a chain
of capabilities and one 32-bit memory BAR. Where the BAR is, and whether it answers at all
(PCI_COMMAND_MEMORY), is told to `on_map`. Functions sit in the 32 slots of a `PciBus`, which is
itself no device; `Ecam` and `ConfigPorts` are, and lead to it:

    Ecam          4 KiB a function, at  slot << 15 | register
    ConfigPorts   0xCF8 takes 1 << 31 | slot << 11 | register; 0xCFC..0xCFF are that register

A guest reads ten registers for each that it writes, and looks for most of them again and again. So
the bus keeps configuration space in memory, laid out as ECAM has it, which a machine may show to
its guest, read-only: then reads are no exits. That ends when reading comes to do something: see
`Function.passive`.

Linux wants the ports even where there is ECAM: without them it says that it has no way to PCI at
all, and only later, from ACPI, learns better. It goes on to prefer them, but in PCI segment 0 only,
which is all they can reach; so acpi.py has it find this bus in another.

Model: a bus 0 with a host bridge. Not emulated: interrupt pins (MSI-X is all there is), I/O and
64-bit BARs, bridges, power management, extended capabilities, functions past 0.

Threads: all vCPU threads. The bus's one lock guards every configuration space behind it.
"""

import ctypes
import mmap
import threading
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import Device

PCI_VENDOR_ID = 0x00
PCI_DEVICE_ID = 0x02
PCI_COMMAND = 0x04
PCI_STATUS = 0x06
PCI_REVISION_ID = 0x08
PCI_CLASS_PROG = 0x09
PCI_HEADER_TYPE = 0x0E
PCI_BASE_ADDRESS_0 = 0x10
PCI_SUBSYSTEM_VENDOR_ID = 0x2C
PCI_SUBSYSTEM_ID = 0x2E
PCI_CAPABILITY_LIST = 0x34
PCI_INTERRUPT_LINE = 0x3C

PCI_COMMAND_MEMORY = 1 << 1
PCI_COMMAND_MASTER = 1 << 2
PCI_COMMAND_INTX_DISABLE = 1 << 10
PCI_STATUS_CAP_LIST = 1 << 4

PCI_CLASS_BRIDGE_HOST = 0x0600

CONFIG_LEN = 256  # of 4096: there are no extended capabilities, and beyond these all reads 0
SLOTS = 32
_SLOT_LEN = 1 << 15  # in ECAM: eight functions of 4 KiB
_PAGE_LEN = 1 << 12
_CAPABILITIES = 0x40
_U32 = 0xFFFF_FFFF


class Function:
    """One PCI function, without what is behind its BAR."""

    def __init__(
        self, vendor: int, device: int, class_code: int, *, bar_len: int = 0, subsystem: int = 0
    ) -> None:
        """Make a function of a 16-bit class; its BAR answers `bar_len` bytes, a power of two."""
        self.config: bytearray | memoryview = bytearray(CONFIG_LEN)
        self.writable = bytearray(CONFIG_LEN)
        self.bar_len = bar_len
        self.on_map: Callable[[int | None], None] = _nobody
        """Takes where the BAR answers from now on, or None: nowhere."""
        self._mapped: int | None = None
        self._capabilities_end = _CAPABILITIES
        self._last_link = PCI_CAPABILITY_LIST
        self.put(PCI_VENDOR_ID, 2, vendor)
        self.put(PCI_DEVICE_ID, 2, device)
        self.put(PCI_REVISION_ID, 1, 1)
        self.put(PCI_CLASS_PROG + 1, 2, class_code)
        self.put(PCI_SUBSYSTEM_VENDOR_ID, 2, vendor)
        self.put(PCI_SUBSYSTEM_ID, 2, subsystem)
        command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE
        self.put(PCI_COMMAND, 2, 0, writable=command)
        self.put(PCI_INTERRUPT_LINE, 1, 0, writable=0xFF)
        if bar_len:
            self.put(PCI_BASE_ADDRESS_0, 4, 0, writable=_U32 & ~(bar_len - 1))

    def put(self, offset: int, size: int, value: int, *, writable: int = 0) -> None:
        """Set a register, and which of its bits the guest may change."""
        self.config[offset : offset + size] = value.to_bytes(size, "little")
        self.writable[offset : offset + size] = writable.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """Give the value of a register."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def add_capability(self, number: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability with `body` behind its two bytes of head; gives its offset."""
        at = self._capabilities_end
        self.config[self._last_link] = at
        self.config[at : at + 2 + len(body)] = bytes((number, 0)) + body
        self.writable[at + 2 : at + 2 + len(writable)] = writable
        self._last_link = at + 1
        self._capabilities_end = at + 2 + len(body) + 3 & ~3
        self.put(PCI_STATUS, 2, PCI_STATUS_CAP_LIST)
        return at

    def place(self, gpa: int) -> None:
        """Give the BAR its first address, as firmware does, and enable it."""
        self.put(PCI_BASE_ADDRESS_0, 4, gpa, writable=_U32 & ~(self.bar_len - 1))
        self.write_config(PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)

    @property
    def passive(self) -> bool:
        """Whether reading configuration space does nothing but read; at first it must."""
        return True

    def read_config(self, offset: int, size: int) -> int:
        """Answer a read of configuration space."""
        return self.get(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Change what may be changed."""
        kept = self.get(offset, size)
        mask = int.from_bytes(self.writable[offset : offset + size], "little")
        if mask:
            changed = kept & ~mask | value & mask
            self.config[offset : offset + size] = changed.to_bytes(size, "little")
            self._remap()

    def _remap(self) -> None:
        if not self.bar_len:
            return
        where = None
        if self.get(PCI_COMMAND, 2) & PCI_COMMAND_MEMORY:
            where = self.get(PCI_BASE_ADDRESS_0, 4)
        if where != self._mapped:
            self._mapped = where
            self.on_map(where)

    def save(self) -> dict[str, Any]:
        """Return the configuration space."""
        return {"config": self.config.hex()}

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described; the BAR moves with it."""
        self.config[:] = bytes.fromhex(state["config"])
        self._remap()


def host_bridge() -> Function:
    """What is in slot 0 of every bus that hangs off a processor."""
    return Function(0x1B36, 0x0008, PCI_CLASS_BRIDGE_HOST)  # QEMU's generic PCIe host bridge


class PciBus:
    """The functions of bus 0, by slot."""

    def __init__(self) -> None:
        """Make a bus with a host bridge."""
        self.slots: list[Function] = []
        self.lock = threading.Lock()
        self.on_active: Callable[[], None] | None = None
        """Told, once, that reads are no longer `passive`, before there is one; `lock` is held."""
        self._memory = mmap.mmap(-1, SLOTS * _SLOT_LEN)
        self.add(host_bridge())

    def add(self, function: Function) -> int:
        """Plug `function` into the next slot; gives the slot, IndexError if there is none."""
        if len(self.slots) >= SLOTS:
            raise IndexError("every slot is taken")
        start = len(self.slots) * _SLOT_LEN
        space = memoryview(self._memory)[start : start + _SLOT_LEN]
        space[_PAGE_LEN:] = b"\xff" * (_SLOT_LEN - _PAGE_LEN)  # functions there are none of
        space[:CONFIG_LEN] = function.config
        function.config = space[:CONFIG_LEN]
        self.slots.append(function)
        return len(self.slots) - 1

    @property
    def passive(self) -> bool:
        """Whether reads do nothing but read."""
        return all(function.passive for function in self.slots)

    def memory(self) -> tuple[int, int]:
        """Return address and length of what ECAM has of the slots in use; the bus's own."""
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return hva, len(self.slots) * _SLOT_LEN

    def read(self, slot: int, offset: int, size: int) -> int:
        """Read configuration space; all-ones where there is no function."""
        if slot >= len(self.slots):
            return (1 << 8 * size) - 1
        with self.lock:
            return self.slots[slot].read_config(offset, size) if offset + size <= CONFIG_LEN else 0

    def write(self, slot: int, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        if slot < len(self.slots) and offset + size <= CONFIG_LEN:
            function = self.slots[slot]
            with self.lock:
                function.write_config(offset, size, value)
                self._tell(function)

    def _tell(self, function: Function) -> None:
        tell = self.on_active
        if tell is not None and not function.passive:
            self.on_active = None
            tell()

    def save_slots(self) -> list[dict[str, Any]]:
        """Return the configuration space of every function."""
        with self.lock:
            return [function.save() for function in self.slots]

    def load_slots(self, states: list[dict[str, Any]]) -> None:
        """Put back what `save_slots` returned."""
        with self.lock:
            for function, saved in zip(self.slots, states, strict=True):
                function.load(saved)
                self._tell(function)


class Ecam(Device):
    """Memory-mapped configuration space of one bus: 1 MiB."""

    name = "pci-ecam"

    def __init__(self, bus: PciBus) -> None:
        """Lead to `bus`."""
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        """Answer for function 0 of a slot."""
        if offset >> 12 & 7:
            return (1 << 8 * size) - 1
        return self._bus.read(offset >> 15, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Hand it to function 0 of a slot."""
        if not offset >> 12 & 7:
            self._bus.write(offset >> 15, offset & 0xFFF, size, value)

    def save(self) -> dict[str, Any]:
        """Return the configuration space of every function."""
        return {"slots": self._bus.save_slots()}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        self._bus.load_slots(state["slots"])


_RESET_CONTROL = (1, 1)  # offset and size: another register in the midst of CONFIG_ADDRESS


class ConfigPorts(Device):
    """Configuration mechanism #1: eight ports from 0xCF8."""

    name = "pci-config"

    def __init__(self, bus: PciBus, reset_control: Device | None = None) -> None:
        """Lead to `bus`; single bytes at 0xCF9 are `reset_control`'s."""
        self._bus = bus
        self._reset_control = reset_control
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        """CONFIG_ADDRESS as written, or what it leads to."""
        if offset == 0 and size == 4:
            return self._address
        if (offset, size) == _RESET_CONTROL and self._reset_control is not None:
            return self._reset_control.read(0, 1)
        target = self._target(offset)
        return (1 << 8 * size) - 1 if target is None else self._bus.read(*target, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a register, or write the chosen one."""
        if offset == 0 and size == 4:
            self._address = value & 0x80FF_FFFC
            return
        if (offset, size) == _RESET_CONTROL and self._reset_control is not None:
            self._reset_control.write(0, 1, value)
            return
        target = self._target(offset)
        if target is not None:
            self._bus.write(*target, size, value)

    def _target(self, offset: int) -> tuple[int, int] | None:
        address = self._address
        enabled, bus, function = address >> 31, address >> 16 & 0xFF, address >> 8 & 7
        if offset < 4 or not enabled or bus or function:
            return None
        return address >> 11 & 0x1F, (address & 0xFC) + offset - 4

    def save(self) -> dict[str, Any]:
        """Return CONFIG_ADDRESS."""
        return {"address": self._address}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        self._address = state["address"]


def _nobody(_gpa: int | None) -> None:
    """There is no bus yet."""
