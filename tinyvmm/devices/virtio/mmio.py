"""The virtio-over-MMIO transport, version 2: virtio 1.2, section 4.2.

One page of guest-physical addresses: 32-bit registers below 0x100, the device's configuration space
from there. `REGISTERS` is the table of section 4.2.2. Registers take aligned 32-bit accesses only;
what else a driver does there reads as 0 and writes nothing. The configuration space takes any
width; what is written there goes to the device. What describes a queue is stored as it comes and
checked when QueueReady is set.

The guest is told of the page by an ACPI device LNRO0005. The interrupt is level triggered: the line
is high while InterruptStatus is not 0.

Not emulated: the legacy interface (version 1), shared memory regions (none exists), QueueReset
(VIRTIO_F_RING_RESET is not offered).

Threads: all vCPU threads; host threads come in through the device and `_interrupt`. The device's
lock guards the registers. `_irq_lock` alone guards InterruptStatus and the line, so that a vCPU
which acknowledges an interrupt need not wait for another one's request; it is taken last.
"""

import threading
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import GuestMemory, IrqLine
from tinyvmm.devices.register import Register, RegisterDevice
from tinyvmm.devices.virtio.device import (
    CONFIGURATION_CHANGE,
    FEATURES_OK,
    USED_BUFFER,
    VirtioDevice,
)
from tinyvmm.devices.virtio.queue import Virtqueue

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR_ID = int.from_bytes(b"tiny", "little")
CONFIG = 0x100
_U32 = 0xFFFF_FFFF


class VirtioMmio(RegisterDevice):
    """One virtio device on the memory bus; answers 0x1000 bytes."""

    QUEUE_NOTIFY = 0x050  # whose writes may become events, and never be seen here
    REGISTERS = (
        Register("MagicValue", 0x000, 4, "R", MAGIC),
        Register("Version", 0x004, 4, "R", VERSION),
        Register("DeviceID", 0x008, 4, "R"),
        Register("VendorID", 0x00C, 4, "R", VENDOR_ID),
        Register("DeviceFeatures", 0x010, 4, "R"),
        Register("DeviceFeaturesSel", 0x014, 4, "W"),
        Register("DriverFeatures", 0x020, 4, "W"),
        Register("DriverFeaturesSel", 0x024, 4, "W"),
        Register("QueueSel", 0x030, 4, "W"),
        Register("QueueNumMax", 0x034, 4, "R"),
        Register("QueueNum", 0x038, 4, "W"),
        Register("QueueReady", 0x044, 4, "RW"),
        Register("QueueNotify", QUEUE_NOTIFY, 4, "W"),
        Register("InterruptStatus", 0x060, 4, "R"),
        Register("InterruptACK", 0x064, 4, "W"),
        Register("Status", 0x070, 4, "RW"),
        Register("QueueDescLow", 0x080, 4, "W"),
        Register("QueueDescHigh", 0x084, 4, "W"),
        Register("QueueDriverLow", 0x090, 4, "W"),
        Register("QueueDriverHigh", 0x094, 4, "W"),
        Register("QueueDeviceLow", 0x0A0, 4, "W"),
        Register("QueueDeviceHigh", 0x0A4, 4, "W"),
        Register("SHMSel", 0x0AC, 4, "W"),
        # The length of a region that does not exist is -1, and none does.
        Register("SHMLenLow", 0x0B0, 4, "R", _U32),
        Register("SHMLenHigh", 0x0B4, 4, "R", _U32),
        Register("SHMBaseLow", 0x0B8, 4, "R", _U32),
        Register("SHMBaseHigh", 0x0BC, 4, "R", _U32),
        Register("ConfigGeneration", 0x0FC, 4, "R"),
    )

    def __init__(self, device: VirtioDevice, memory: GuestMemory, irq: IrqLine) -> None:
        """Give `device` its registers, the guest's `memory` and an interrupt line."""
        self.name = device.name
        self.device = device
        self.write_QueueNotify: Callable[[int], None] = device.notify  # hot: no frame in between
        self._irq = irq
        self._irq_lock = threading.Lock()
        self._interrupt_status = 0
        super().__init__()
        device.attach(memory, self._interrupt)

    def read_other(self, offset: int, size: int) -> int:
        """Read the configuration space, which is 0 past its end."""
        start = offset - CONFIG
        if start < 0:
            return 0
        return int.from_bytes(self.device.config[start : start + size], "little")

    def write_other(self, offset: int, size: int, value: int) -> None:
        """Hand a write to the configuration space to the device."""
        if offset >= CONFIG:
            with self.device.lock:
                self.device.write_config(offset - CONFIG, size, value)

    # --- identity and features --------------------------------------------------------------

    def read_DeviceID(self) -> int:
        """Say which kind of device this is."""
        return self.device.device_id

    def read_DeviceFeatures(self) -> int:
        """Offer the 32 features that DeviceFeaturesSel chooses."""
        sel = self.values["DeviceFeaturesSel"]
        return self.device.features >> 32 * sel & _U32 if sel < 2 else 0

    def write_DriverFeatures(self, value: int) -> None:
        """Take the 32 features that DriverFeaturesSel chooses.

        None past the 64th was offered; what is accepted there is kept in one place, to be refused.
        """
        with self.device.lock:
            if not self.device.status & FEATURES_OK:
                shift = 32 * min(self.values["DriverFeaturesSel"], 2)
                kept = self.device.driver_features & ~(_U32 << shift)
                self.device.driver_features = kept | value << shift

    # --- queues -----------------------------------------------------------------------------

    def _queue(self) -> Virtqueue | None:
        sel = self.values["QueueSel"]
        return self.device.queues[sel] if sel < len(self.device.queues) else None

    def read_QueueNumMax(self) -> int:
        """Return the greatest size of the queue, 0 if there is no such queue."""
        queue = self._queue()
        return queue.size_max if queue is not None else 0

    def read_QueueReady(self) -> int:
        """Return 1 while the queue is in use."""
        queue = self._queue()
        return int(queue is not None and queue.ready)

    def write_QueueReady(self, value: int) -> None:
        """Begin (1) or end (0) to use the queue."""
        with self.device.lock:
            queue = self._queue()
            if queue is None:
                return
            if value & 1:
                self.device.enable_queue(queue)
            else:
                self.device.disable_queue(queue)

    def write_QueueNum(self, value: int) -> None:
        """Take the queue's size."""
        with self.device.lock:
            queue = self._queue()
            if queue is not None and not queue.ready:
                queue.size = value

    def write_QueueDescLow(self, value: int) -> None:
        """Take the descriptor table's address."""
        self._set_address("desc_gpa", 0, value)

    def write_QueueDescHigh(self, value: int) -> None:
        """Take the descriptor table's address."""
        self._set_address("desc_gpa", 32, value)

    def write_QueueDriverLow(self, value: int) -> None:
        """Take the available ring's address."""
        self._set_address("avail_gpa", 0, value)

    def write_QueueDriverHigh(self, value: int) -> None:
        """Take the available ring's address."""
        self._set_address("avail_gpa", 32, value)

    def write_QueueDeviceLow(self, value: int) -> None:
        """Take the used ring's address."""
        self._set_address("used_gpa", 0, value)

    def write_QueueDeviceHigh(self, value: int) -> None:
        """Take the used ring's address."""
        self._set_address("used_gpa", 32, value)

    def _set_address(self, name: str, shift: int, value: int) -> None:
        """Set 32 bits of an address of the selected queue, unless it is in use."""
        with self.device.lock:
            queue = self._queue()
            if queue is not None and not queue.ready:
                kept = getattr(queue, name) & ~(_U32 << shift)
                setattr(queue, name, kept | value << shift)

    # --- status and interrupts --------------------------------------------------------------

    def read_Status(self) -> int:
        """Return the device status."""
        return self.device.status

    def write_Status(self, value: int) -> None:
        """Take more status bits, or 0 to reset device and transport."""
        with self.device.lock:
            self.device.set_status(value)
            if not value:
                for register in self.REGISTERS:
                    self.values[register.name] = register.reset
                self.write_InterruptACK(_U32)

    def read_InterruptStatus(self) -> int:
        """Say why the line is high."""
        return self._interrupt_status

    def write_InterruptACK(self, value: int) -> None:
        """Clear bits of InterruptStatus, and the line with the last."""
        with self._irq_lock:
            before = self._interrupt_status
            self._interrupt_status = before & ~value
            if before and not before & ~value:
                self._irq.set(False)

    def _interrupt(self, source: int) -> None:
        bits = USED_BUFFER if source >= 0 else CONFIGURATION_CHANGE
        with self._irq_lock:
            before = self._interrupt_status
            self._interrupt_status = before | bits
            if not before:
                self._irq.set(True)

    def read_ConfigGeneration(self) -> int:
        """Return a number that changes with the configuration space."""
        return self.device.config_generation

    # --- state ------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the state of transport and device."""
        with self.device.lock:
            device = self.device.save()  # first: it may end what it has begun, and interrupt
            return super().save() | {
                "interrupt_status": self._interrupt_status,
                "device": device,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described, the interrupt line included."""
        with self.device.lock:
            super().load(state)
            self.device.load(state["device"])
            with self._irq_lock:
                self._interrupt_status = state["interrupt_status"]
                self._irq.set(bool(self._interrupt_status))
