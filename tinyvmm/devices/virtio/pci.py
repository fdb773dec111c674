"""The virtio-over-PCI transport, modern interface: virtio 1.2, section 4.1.

A PCI function whose vendor capabilities say where in its BAR the parts of the interface are:

    0x0000  common configuration    VIRTIO_PCI_CAP_COMMON_CFG   registers, section 4.1.4.3
    0x1000  ISR status              VIRTIO_PCI_CAP_ISR_CFG
    0x2000  device configuration    VIRTIO_PCI_CAP_DEVICE_CFG   the device's own
    0x3000  notifications           VIRTIO_PCI_CAP_NOTIFY_CFG   4 bytes a queue
    0x4000  MSI-X table
    0x5000  MSI-X pending bits

and once more through a window in configuration space (VIRTIO_PCI_CAP_PCI_CFG), for who has not
mapped the BAR. Each queue, and the configuration change, may have an MSI-X vector of its own, so
the driver knows why it was interrupted without asking: where MMIO needs a read and a write to the
device for each interrupt, each an exit to us, this needs none.

Not emulated: the legacy and transitional interfaces, interrupt pins (a driver that cannot do MSI-X
is not interrupted, and has the ISR to poll), notification data, queue reset, shared memory.

Threads: all vCPU threads; host threads come in through the device and `_interrupt`. The device's
lock guards the registers; the function's configuration space is guarded by its PciBus.
"""

import struct
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import Device, GuestMemory
from tinyvmm.devices.msix import (
    PCI_CAP_ID_MSIX,
    PCI_MSIX_FLAGS_ENABLE,
    PCI_MSIX_FLAGS_MASKALL,
    MessageLine,
    Msix,
)
from tinyvmm.devices.pci import Function
from tinyvmm.devices.register import Register, RegisterDevice
from tinyvmm.devices.virtio.device import (
    CONFIGURATION_CHANGE,
    FEATURES_OK,
    USED_BUFFER,
    VirtioDevice,
)
from tinyvmm.devices.virtio.queue import Virtqueue

PCI_VENDOR_ID_VIRTIO = 0x1AF4
PCI_DEVICE_ID_BASE = 0x1040  # plus the virtio device ID
# <linux/pci_ids.h>. Drivers go by the device ID; these are for people, who look at lists.
PCI_CLASS_OTHERS = 0xFF00
PCI_CLASSES = {
    1: 0x0200,  # network: PCI_CLASS_NETWORK_ETHERNET
    2: 0x0180,  # block: PCI_CLASS_STORAGE_OTHER
    3: 0x0780,  # console: PCI_CLASS_COMMUNICATION_OTHER
    19: 0x0780,  # vsock
}
PCI_CAP_ID_VNDR = 0x09

VIRTIO_PCI_CAP_COMMON_CFG = 1
VIRTIO_PCI_CAP_NOTIFY_CFG = 2
VIRTIO_PCI_CAP_ISR_CFG = 3
VIRTIO_PCI_CAP_DEVICE_CFG = 4
VIRTIO_PCI_CAP_PCI_CFG = 5
VIRTIO_MSI_NO_VECTOR = 0xFFFF

COMMON, ISR, CONFIG, NOTIFY, TABLE, PENDING = range(0, 0x6000, 0x1000)
BAR_LEN = 0x8000
NOTIFY_OFF_MULTIPLIER = 4
_PART_LEN = 0x1000
_CFG_DATA = 16  # of the window capability: pci_cfg_data
_U32 = 0xFFFF_FFFF


class CommonConfiguration(RegisterDevice):
    """struct virtio_pci_common_cfg."""

    REGISTERS = (
        Register("device_feature_select", 0, 4),
        Register("device_feature", 4, 4, "R"),
        Register("driver_feature_select", 8, 4),
        Register("driver_feature", 12, 4),
        Register("config_msix_vector", 16, 2, "RW", VIRTIO_MSI_NO_VECTOR),
        Register("num_queues", 18, 2, "R"),
        Register("device_status", 20, 1),
        Register("config_generation", 21, 1, "R"),
        Register("queue_select", 22, 2),
        Register("queue_size", 24, 2),
        Register("queue_msix_vector", 26, 2),
        Register("queue_enable", 28, 2),
        Register("queue_notify_off", 30, 2, "R"),
        Register("queue_desc_low", 32, 4),
        Register("queue_desc_high", 36, 4),
        Register("queue_driver_low", 40, 4),
        Register("queue_driver_high", 44, 4),
        Register("queue_device_low", 48, 4),
        Register("queue_device_high", 52, 4),
    )

    def __init__(self, device: VirtioDevice, vectors: int) -> None:
        """Show `device`, whose interrupts may have `vectors` vectors."""
        self.name = device.name
        self._device = device
        self._vectors = vectors
        self.queue_vectors = [VIRTIO_MSI_NO_VECTOR] * len(device.queues)
        super().__init__()

    def read_other(self, offset: int, size: int) -> int:
        """There is nothing else: 0."""
        del offset, size
        return 0

    def reset(self) -> None:
        """Be as when the machine was made."""
        self.values.update((register.name, register.reset) for register in self.REGISTERS)
        self.queue_vectors = [VIRTIO_MSI_NO_VECTOR] * len(self._device.queues)

    # --- features and status ----------------------------------------------------------------

    def read_device_feature(self) -> int:
        """Offer the 32 features that device_feature_select chooses."""
        select = self.values["device_feature_select"]
        return self._device.features >> 32 * select & _U32 if select < 2 else 0

    def read_driver_feature(self) -> int:
        """Show what the driver accepted of those that driver_feature_select chooses."""
        select = self.values["driver_feature_select"]
        return self._device.driver_features >> 32 * select & _U32 if select < 2 else 0

    def write_driver_feature(self, value: int) -> None:
        """Take 32 features; what is accepted past the 64th is kept, to be refused."""
        device = self._device
        with device.lock:
            if not device.status & FEATURES_OK:
                shift = 32 * min(self.values["driver_feature_select"], 2)
                device.driver_features = device.driver_features & ~(_U32 << shift) | value << shift

    def write_config_msix_vector(self, value: int) -> None:
        """Take the vector of configuration changes; what there is none of reads as NO_VECTOR."""
        self.values["config_msix_vector"] = self._vector(value)

    def _vector(self, value: int) -> int:
        return value if value < self._vectors else VIRTIO_MSI_NO_VECTOR

    def read_num_queues(self) -> int:
        """Count the queues."""
        return len(self._device.queues)

    def read_device_status(self) -> int:
        """Return the device status."""
        return self._device.status

    def write_device_status(self, value: int) -> None:
        """Take more status bits, or 0 to reset device and transport."""
        with self._device.lock:
            self._device.set_status(value)
            if not value:
                self.reset()

    def read_config_generation(self) -> int:
        """Return a number that changes with the device configuration."""
        return self._device.config_generation & 0xFF

    # --- the selected queue -----------------------------------------------------------------

    def _queue(self) -> Virtqueue | None:
        select = self.values["queue_select"]
        return self._device.queues[select] if select < len(self._device.queues) else None

    def read_queue_size(self) -> int:
        """Return the queue's size, at first the greatest it can have; 0 if there is no queue."""
        queue = self._queue()
        return queue.size if queue is not None else 0

    def write_queue_size(self, value: int) -> None:
        """Take a smaller size."""
        with self._device.lock:
            queue = self._queue()
            if queue is not None and not queue.ready:
                queue.size = value

    def read_queue_msix_vector(self) -> int:
        """Return the queue's vector."""
        queue = self._queue()
        return VIRTIO_MSI_NO_VECTOR if queue is None else self.queue_vectors[queue.index]

    def write_queue_msix_vector(self, value: int) -> None:
        """Take the queue's vector."""
        with self._device.lock:
            queue = self._queue()
            if queue is not None:
                self.queue_vectors[queue.index] = self._vector(value)

    def read_queue_enable(self) -> int:
        """Return 1 while the queue is in use."""
        queue = self._queue()
        return int(queue is not None and queue.ready)

    def write_queue_enable(self, value: int) -> None:
        """Begin to use the queue; only a reset ends it (4.1.4.3.2)."""
        with self._device.lock:
            queue = self._queue()
            if queue is not None and value == 1:
                self._device.enable_queue(queue)

    def read_queue_notify_off(self) -> int:
        """Say where the queue is notified, in units of notify_off_multiplier."""
        queue = self._queue()
        return 0 if queue is None else queue.index

    def read_queue_desc_low(self) -> int:
        """Return the descriptor table's address."""
        return self._address("desc_gpa", 0)

    def read_queue_desc_high(self) -> int:
        """Return the descriptor table's address."""
        return self._address("desc_gpa", 32)

    def read_queue_driver_low(self) -> int:
        """Return the available ring's address."""
        return self._address("avail_gpa", 0)

    def read_queue_driver_high(self) -> int:
        """Return the available ring's address."""
        return self._address("avail_gpa", 32)

    def read_queue_device_low(self) -> int:
        """Return the used ring's address."""
        return self._address("used_gpa", 0)

    def read_queue_device_high(self) -> int:
        """Return the used ring's address."""
        return self._address("used_gpa", 32)

    def write_queue_desc_low(self, value: int) -> None:
        """Take the descriptor table's address."""
        self._set_address("desc_gpa", 0, value)

    def write_queue_desc_high(self, value: int) -> None:
        """Take the descriptor table's address."""
        self._set_address("desc_gpa", 32, value)

    def write_queue_driver_low(self, value: int) -> None:
        """Take the available ring's address."""
        self._set_address("avail_gpa", 0, value)

    def write_queue_driver_high(self, value: int) -> None:
        """Take the available ring's address."""
        self._set_address("avail_gpa", 32, value)

    def write_queue_device_low(self, value: int) -> None:
        """Take the used ring's address."""
        self._set_address("used_gpa", 0, value)

    def write_queue_device_high(self, value: int) -> None:
        """Take the used ring's address."""
        self._set_address("used_gpa", 32, value)

    def _address(self, name: str, shift: int) -> int:
        queue = self._queue()
        return 0 if queue is None else getattr(queue, name) >> shift & _U32

    def _set_address(self, name: str, shift: int, value: int) -> None:
        with self._device.lock:
            queue = self._queue()
            if queue is not None and not queue.ready:
                kept = getattr(queue, name) & ~(_U32 << shift)
                setattr(queue, name, kept | value << shift)

    # --- state ------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the registers and the queues' vectors."""
        return super().save() | {"queue_vectors": list(self.queue_vectors)}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        super().load(state)
        self.queue_vectors = list(state["queue_vectors"])


class VirtioPci(Device):
    """One virtio device on a PCI bus: what its BAR answers, BAR_LEN bytes; and its `function`."""

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, make_line: Callable[[], MessageLine]
    ) -> None:
        """Give `device` a function, the guest's `memory`, and a line for each of its vectors."""
        self.name = device.name
        self.device = device
        vectors = 1 + (1 if device.one_vector else len(device.queues))
        self.common = CommonConfiguration(device, vectors)
        self.msix = Msix(device.name, [make_line() for _ in range(vectors)])
        self.function = VirtioFunction(self, vectors)
        self._isr = 0
        self._notify = device.notify
        device.attach(memory, self._interrupt)

    def read(self, offset: int, size: int) -> int:
        """Answer for the part of the BAR that `offset` is in."""
        part, offset = offset & -_PART_LEN, offset % _PART_LEN
        if part == COMMON:
            return self.common.read(offset, size)
        if part == ISR and not offset:
            with self.device.lock:  # reading takes (4.1.4.5)
                isr, self._isr = self._isr, 0
            return isr
        if part == CONFIG:
            return int.from_bytes(self.device.config[offset : offset + size], "little")
        if part == TABLE:
            return self.msix.read(offset, size)
        if part == PENDING:
            return self.msix.pending(offset, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Hand it to the part of the BAR that `offset` is in."""
        part = offset & -_PART_LEN
        if part == NOTIFY:
            self._notify((offset - NOTIFY) // NOTIFY_OFF_MULTIPLIER)
        elif part == COMMON:
            self.common.write(offset, size, value)
            if not self.device.status:  # reset, or not begun with
                self.msix.reset()
            self.reroute()
        elif part == CONFIG:
            with self.device.lock:
                self.device.write_config(offset - CONFIG, size, value)
        elif part == TABLE:
            self.msix.write(offset - TABLE, size, value)
            self.reroute()

    def reroute(self) -> None:
        """Tell a device whose queues the kernel serves what interrupts for each of them now."""
        device = self.device
        if device.kicks:
            with device.lock:
                for index, vector in enumerate(self.common.queue_vectors):
                    device.route(index, self.msix.fileno(vector))

    def _interrupt(self, source: int) -> None:
        """Interrupt for a queue, or for CONFIGURATION; the device's lock is held."""
        common = self.common
        if source >= 0:
            vector, bit = common.queue_vectors[source], USED_BUFFER
        else:
            vector, bit = common.values["config_msix_vector"], CONFIGURATION_CHANGE
        if not self.msix.fire(vector):
            self._isr |= bit

    def save(self) -> dict[str, Any]:
        """Return the state of transport and device; the function's is its bus's."""
        with self.device.lock:
            device = self.device.save()  # first: it may end what it has begun, and interrupt
            return {
                "common": self.common.save(),
                "msix": self.msix.save(),
                "isr": self._isr,
                "device": device,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described."""
        with self.device.lock:
            self.common.load(state["common"])
            self.msix.load(state["msix"])
            self._isr = state["isr"]
            self.reroute()
            self.device.load(state["device"])


class VirtioFunction(Function):
    """The PCI function of a virtio device: its capabilities, and the window to its BAR."""

    def __init__(self, transport: VirtioPci, vectors: int) -> None:
        """Describe the BAR of `transport`."""
        device = transport.device
        super().__init__(
            PCI_VENDOR_ID_VIRTIO,
            PCI_DEVICE_ID_BASE + device.device_id,
            PCI_CLASSES.get(device.device_id, PCI_CLASS_OTHERS),
            bar_len=BAR_LEN,
            subsystem=device.device_id,
        )
        self._transport = transport
        self._msix_at = self.add_capability(
            PCI_CAP_ID_MSIX,
            struct.pack("<HII", vectors - 1, TABLE, PENDING),
            struct.pack("<H", PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL),
        )
        self._add_part(VIRTIO_PCI_CAP_COMMON_CFG, COMMON, 56)
        self._add_part(VIRTIO_PCI_CAP_ISR_CFG, ISR, 1)
        if device.config:
            self._add_part(VIRTIO_PCI_CAP_DEVICE_CFG, CONFIG, len(device.config))
        notify_len = NOTIFY_OFF_MULTIPLIER * max(len(device.queues), 1)
        multiplier = struct.pack("<I", NOTIFY_OFF_MULTIPLIER)
        self._add_part(VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, notify_len, multiplier)
        # bar, offset, length and pci_cfg_data are the driver's to write.
        self._window_at = self._add_part(
            VIRTIO_PCI_CAP_PCI_CFG, 0, 0, bytes(4), b"\0\0\xff\0\0\0" + b"\xff" * 12
        )

    def _add_part(
        self, cfg_type: int, offset: int, length: int, more: bytes = b"", writable: bytes = b""
    ) -> int:
        """Append a struct virtio_pci_cap (4.1.4)."""
        head = struct.pack("<BBBB2xII", 16 + len(more), cfg_type, 0, 0, offset, length)
        return self.add_capability(PCI_CAP_ID_VNDR, head + more, writable)

    @property
    def passive(self) -> bool:
        """Not once a driver has opened the window: from then on reads lead to the BAR."""
        return not any(self.config[self._window_at + 4 : self._window_at + _CFG_DATA])

    def read_config(self, offset: int, size: int) -> int:
        """Read a register; pci_cfg_data is what the window shows."""
        if offset == self._window_at + _CFG_DATA:
            place = self._window(size)
            if place is not None:
                return self._transport.read(place, size)
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write a register; pci_cfg_data is what the window shows."""
        super().write_config(offset, size, value)
        if offset == self._window_at + _CFG_DATA:
            place = self._window(size)
            if place is not None:
                self._transport.write(place, size, value)
        flags_at = self._msix_at + 2
        if offset < flags_at + 2 and offset + size > flags_at:
            self._transport.msix.set_flags(self.get(flags_at, 2))
            self._transport.reroute()

    def _window(self, size: int) -> int | None:
        """Where in the BAR the window is; None unless it is just `size` bytes wide (4.1.4.9)."""
        at = self._window_at
        offset, length = self.get(at + 8, 4), self.get(at + 12, 4)
        if self.get(at + 4, 1) or length != size or offset % size or offset + size > BAR_LEN:
            return None
        return offset
