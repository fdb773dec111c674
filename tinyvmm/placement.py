"""Where a device of the user's own goes: its ports, or free memory, and its interrupt.

The board's own devices have their places in layout.py; what this finds is what those leave over.
A device with registers in memory gets the next free range of the area that begins at
DEVICE_MMIO_GPA, aligned to its length rounded up to a power of two, and so on pages of its own: a
guest's program may map them without seeing another device. Interrupts are given from GSI 23
downwards.
"""

import operator
import re
from collections.abc import Sequence

from tinyvmm import layout
from tinyvmm.acpi import DeviceNode
from tinyvmm.devices.device import Device
from tinyvmm.errors import ConfigError

DEVICES_MAX = 64
PORTS_MAX = 255  # an I/O port descriptor has a byte for it (ACPI 6.5, 6.4.2.5)
_HID = re.compile(r"[A-Z]{3}[0-9A-F]{4}|[A-Z0-9]{4}[0-9A-F]{4}")


def place(device: Device, gsi: int | None, others: Sequence[DeviceNode]) -> DeviceNode:
    """Find a place for `device` beside `others`; ConfigError if what it declares cannot be had."""
    what = type(device).__name__
    if len(others) >= DEVICES_MAX:
        raise ConfigError(f"{what}: more than {DEVICES_MAX} devices: leave one out")
    if not (isinstance(device.HID, str) and _HID.fullmatch(device.HID)):
        raise ConfigError(f"{what}: HID {device.HID!r} is none: make it like ABCD0123")
    if (device.PORTS is None) == (not device.MMIO_LEN):
        raise ConfigError(f"{what}: give the class either PORTS = (first, count) or MMIO_LEN")
    if not isinstance(device.MMIO_LEN, int):
        raise ConfigError(f"{what}: MMIO_LEN {device.MMIO_LEN!r} is no length")
    if device.PORTS is None:
        base = _free_range(what, device.MMIO_LEN, others)
        return DeviceNode(device.HID, base, device.MMIO_LEN, port=False, gsi=gsi)
    try:
        first, count = map(operator.index, device.PORTS)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{what}: PORTS {device.PORTS!r}: give two numbers, (first, count)"
        ) from None
    if not (1 <= count <= PORTS_MAX and 0 <= first <= 0x10000 - count):
        raise ConfigError(
            f"{what}: PORTS {first:#x}, {count}: 1 to {PORTS_MAX} ports below 0x10000"
        )
    for taken, taken_count in layout.IN_KERNEL_PORTS:
        if first < taken + taken_count and taken < first + count:
            raise ConfigError(f"{what}: port {taken:#x} is KVM's own: give it others")
    return DeviceNode(device.HID, first, count, port=True, gsi=gsi)


def _free_range(what: str, length: int, others: Sequence[DeviceNode]) -> int:
    if length < 0:
        raise ConfigError(f"{what}: MMIO_LEN {length} is no length")
    align = max(layout.PAGE_SIZE, 1 << (length - 1).bit_length())
    ends = [node.base + node.length for node in others if not node.port]
    base = -(-max([layout.DEVICE_MMIO_GPA, *ends]) // align) * align
    if base + length > layout.DEVICE_MMIO_END:
        raise ConfigError(f"{what}: no room for {length:#x} bytes of registers: make MMIO_LEN less")
    return base


def free_gsi(used: Sequence[DeviceNode], virtio_mmio: int) -> int:
    """Return an interrupt line beside those `used` and those of so many virtio-mmio devices."""
    gsi = min([layout.GSI_COUNT, *(node.gsi for node in used if node.gsi is not None)]) - 1
    if gsi < layout.VIRTIO_GSI + virtio_mmio:
        raise ConfigError("more devices than interrupt lines: leave one out")
    return gsi
