"""Where the BARs of PCI functions answer: on the bus of memory, with their doorbells.

A guest may put a BAR where something else answers. Then that goes on answering, and the BAR waits:
a kernel that gives out addresses by itself, function by function and all of them on, is past such a
moment with the next one that it moves.

Threads: vCPU threads, which hold the lock of the PCI bus.
"""

from typing import TYPE_CHECKING

from tinyvmm import trace
from tinyvmm.bus import Bus, BusDevice
from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.eventfds import Bells


class Bar:
    """What answers a BAR of `length` bytes, and its bells, which begin at `notify` in it."""

    def __init__(
        self, device: BusDevice, length: int, bells: "Bells | None", notify: int, stride: int
    ) -> None:
        self.device = device
        self.length = length
        self.bells = bells
        self.notify = notify
        self.stride = stride


class Bars:
    """The BARs of one bus."""

    def __init__(self, mmio: Bus) -> None:
        """Have them on `mmio`."""
        self._mmio = mmio
        self._waiting: dict[Bar, int] = {}  # and where for

    def move(self, bar: Bar, gpa: int | None) -> None:
        """Have `bar` at `gpa` from now on, or as soon as nothing else is there; None: nowhere."""
        self._waiting.pop(bar, None)
        self._mmio.remove(bar.device)
        if bar.bells is not None:
            bar.bells.place_pci(None, bar.stride)
        if gpa is not None:
            self._waiting[bar] = gpa
        for other, wanted in list(self._waiting.items()):
            self._place(other, wanted, tell=other is bar)

    def _place(self, bar: Bar, gpa: int, *, tell: bool) -> None:
        try:
            self._mmio.add(gpa, bar.length, bar.device)
        except ConfigError as error:
            if tell and trace.hook is not None:
                trace.hook(trace.Message(bar.device.name, str(error)))
            return
        del self._waiting[bar]
        if bar.bells is not None:
            bar.bells.place_pci(gpa + bar.notify, bar.stride)
