"""What a device is, and what it may ask for.

A device knows no bus, no KVM and no machine. Whoever puts it somewhere decides where; it sees
offsets into its own range, and is handed the few collaborators it needs, described here as
protocols. It must answer every access a guest can make, of any width at any offset, without
raising: a guest can only break itself.
"""

from typing import Any, ClassVar, Protocol


class IrqLine(Protocol):
    """An interrupt line."""

    def set(self, level: bool) -> None:
        """Drive the line high or low; from any thread."""


class GuestMemory(Protocol):
    """The guest's RAM, by guest-physical address."""

    def view(self, gpa: int, length: int) -> memoryview:
        """Return `length` writable bytes at `gpa`; ValueError if they are not all RAM."""


class Device:
    """The base of every device: it answers an address range, and its state can be kept.

    Where the board's own devices are is said in layout.py and machine.py. One that a user adds with
    `run --device` says by itself what it needs: either PORTS, or MMIO_LEN.
    """

    name: str
    PORTS: ClassVar[tuple[int, int] | None] = None
    """The first port and how many there are."""
    MMIO_LEN: ClassVar[int] = 0
    """How many bytes of memory its registers take; the machine finds a place."""
    HID: ClassVar[str] = "TVMM0001"
    """The _HID by which the guest's ACPI knows it."""

    def read(self, offset: int, size: int) -> int:
        """Answer a read of `size` (1, 2, 4 or 8) bytes at `offset`; unsigned."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of `size` (1, 2, 4 or 8) bytes at `offset`."""
        raise NotImplementedError

    def save(self) -> dict[str, Any]:
        """Return the device's state in plain JSON types."""
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        raise NotImplementedError
