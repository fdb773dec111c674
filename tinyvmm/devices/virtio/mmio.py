"""The virtio MMIO transport, version 2 (virtio 1.2, section 4.2.2).

Model: a page of 32-bit registers, then the device's configuration space from 0x100. The guest is
told of it by an ACPI device LNRO0005. Interrupt: one line, level-triggered: high while
InterruptStatus is not 0.

Not emulated: legacy drivers (version 1), shared-memory regions (their length reads as all-ones, so
there are none), QueueReset.

Threads: vCPUs; every access is made with the device's lock held.
"""

from typing import Any

from tinyvmm.devices.device import GuestMemory, IrqLine
from tinyvmm.devices.register import Register, RegisterDevice
from tinyvmm.devices.virtio.device import FEATURES_OK, VirtioDevice
from tinyvmm.devices.virtio.queue import Virtqueue

MAGIC = int.from_bytes(b"virt", "little")
VENDOR_ID = int.from_bytes(b"TINY", "little")
CONFIG_OFFSET = 0x100
INTERRUPT_USED_BUFFER = 1 << 0
INTERRUPT_CONFIGURATION = 1 << 1
NO_SHARED_MEMORY = 0xFFFF_FFFF


class VirtioMmio(RegisterDevice):
    """A virtio device behind a page of registers."""

    REGISTERS = (
        Register("MagicValue", 0x000, 4, "R", MAGIC),
        Register("Version", 0x004, 4, "R", 2),
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
        Register("QueueNotify", 0x050, 4, "W"),
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
        Register("SHMLenLow", 0x0B0, 4, "R", NO_SHARED_MEMORY),
        Register("SHMLenHigh", 0x0B4, 4, "R", NO_SHARED_MEMORY),
        Register("SHMBaseLow", 0x0B8, 4, "R", NO_SHARED_MEMORY),
        Register("SHMBaseHigh", 0x0BC, 4, "R", NO_SHARED_MEMORY),
        Register("ConfigGeneration", 0x0FC, 4, "R"),
    )

    def __init__(self, device: VirtioDevice, memory: GuestMemory, irq: IrqLine) -> None:
        """Put `device` behind registers, its queues in `memory`, its interrupt on `irq`."""
        self.name = f"virtio-mmio {device.name}"
        self._device = device
        self._irq = irq
        super().__init__()
        self.values["DeviceID"] = device.device_id
        device.attach(memory, self._interrupt)

    def read(self, offset: int, size: int) -> int:
        """Answer a register or configuration read."""
        with self._device.lock:
            return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Perform a register write."""
        with self._device.lock:
            super().write(offset, size, value)

    def read_other(self, offset: int, size: int) -> int:
        """Answer from the configuration space; zeros behind its end and between registers."""
        if offset < CONFIG_OFFSET:
            return 0
        start = offset - CONFIG_OFFSET
        return int.from_bytes(self._device.config()[start : start + size], "little")

    def _queue(self) -> Virtqueue | None:
        """Return the queue that QueueSel names, if there is one."""
        index = self.values["QueueSel"]
        return self._device.queues[index] if index < len(self._device.queues) else None

    def _interrupt(self, configuration: bool) -> None:
        cause = INTERRUPT_CONFIGURATION if configuration else INTERRUPT_USED_BUFFER
        status = self.values["InterruptStatus"]
        self.values["InterruptStatus"] = status | cause
        if configuration:
            generation = self.values["ConfigGeneration"] + 1
            self.values["ConfigGeneration"] = generation & 0xFFFF_FFFF
        if not status:
            self._irq.set(True)

    # --- registers with side effects ----------------------------------------------------------

    def read_DeviceFeatures(self) -> int:
        """32 bits of the offered features: which, DeviceFeaturesSel says."""
        half = self.values["DeviceFeaturesSel"]
        return self._device.offered_features() >> 32 * half & 0xFFFF_FFFF if half < 2 else 0

    def write_DriverFeatures(self, value: int) -> None:
        """32 bits of the accepted features."""
        self._device.set_driver_features(self.values["DriverFeaturesSel"], value)

    def read_QueueNumMax(self) -> int:
        """The largest size of the queue, 0 if there is no such queue."""
        queue = self._queue()
        return queue.size_max if queue is not None else 0

    def write_QueueNum(self, value: int) -> None:
        """The size that the driver wants."""
        queue = self._queue()
        if queue is not None and not queue.ready:
            queue.size = value

    def read_QueueReady(self) -> int:
        """Whether the queue is in use."""
        queue = self._queue()
        return int(queue is not None and queue.ready)

    def write_QueueReady(self, value: int) -> None:
        """Start the queue, or stop it."""
        queue = self._queue()
        if queue is None:
            return
        if value & 1 and not queue.ready and self._device.status & FEATURES_OK:
            self._device.enable_queue(self.values["QueueSel"])
        elif not value & 1:
            queue.ready = False

    def write_QueueNotify(self, value: int) -> None:
        """The driver has added buffers to queue `value`."""
        self._device.notify(value)

    def write_InterruptACK(self, value: int) -> None:
        """The driver has seen these causes."""
        status = self.values["InterruptStatus"]
        left = self.values["InterruptStatus"] = status & ~value
        if status and not left:
            self._irq.set(False)

    def read_Status(self) -> int:
        """The device status."""
        return self._device.status

    def write_Status(self, value: int) -> None:
        """The driver's progress, or 0 for a reset."""
        self._device.set_status(value & 0xFF)
        if value == 0:
            self.write_InterruptACK(0xFFFF_FFFF)

    def _set_address(self, area: str, value: int, shift: int) -> None:
        queue = self._queue()
        if queue is not None and not queue.ready:
            kept = getattr(queue, area) & ~(0xFFFF_FFFF << shift)
            setattr(queue, area, kept | value << shift)

    def write_QueueDescLow(self, value: int) -> None:
        """The descriptor table's address, bits 0 to 31."""
        self._set_address("desc_gpa", value, 0)

    def write_QueueDescHigh(self, value: int) -> None:
        """The descriptor table's address, bits 32 to 63."""
        self._set_address("desc_gpa", value, 32)

    def write_QueueDriverLow(self, value: int) -> None:
        """The available ring's address, bits 0 to 31."""
        self._set_address("driver_gpa", value, 0)

    def write_QueueDriverHigh(self, value: int) -> None:
        """The available ring's address, bits 32 to 63."""
        self._set_address("driver_gpa", value, 32)

    def write_QueueDeviceLow(self, value: int) -> None:
        """The used ring's address, bits 0 to 31."""
        self._set_address("device_gpa", value, 0)

    def write_QueueDeviceHigh(self, value: int) -> None:
        """The used ring's address, bits 32 to 63."""
        self._set_address("device_gpa", value, 32)

    def save(self) -> dict[str, Any]:
        """Return the registers and the device's state."""
        with self._device.lock:
            return {**super().save(), "device": self._device.save()}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned, and drive the line accordingly."""
        with self._device.lock:
            super().load(state)
            self._device.load(state["device"])
            self._irq.set(self.values["InterruptStatus"] != 0)
