"""`tinyvmm run` whose guest can turn its own balloon: what a host would do, when a test wants it.

A device on three ports, of bytes, as /dev/port reads and writes them. In steps of 4 MiB:

    0x520  W  how large the balloon is to be          R  how large it is
    0x521  W  ask the guest's driver for statistics   R  the total memory it told; 255 until then
    0x522  W  whether the next driver is offered DEFLATE_ON_OOM   R  whether it is
"""

import sys
import threading
from typing import Any

from tinyvmm.cli.main import main
from tinyvmm.devices.device import Device, IrqLine
from tinyvmm.devices.virtio import balloon
from tinyvmm.devices.virtio.balloon import VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VirtioBalloon

STEP = 22
OFFER = 2
UNKNOWN = 255


class Known(VirtioBalloon):
    """A balloon that can be found."""

    made: "Known"

    def __init__(self, memory: Any, size: int = 0) -> None:
        super().__init__(memory, size)
        Known.made = self


class Knob(Device):
    """Turns it; the interrupt is never raised, but Linux is to know of it."""

    PORTS = (0x520, 3)
    HID = "KNOB0001"
    name = "knob"

    def __init__(self, irq: IrqLine) -> None:
        self.irq = irq
        self.total = UNKNOWN

    def read(self, offset: int, size: int) -> int:
        del size
        if offset == OFFER:
            return int(bool(Known.made.features & VIRTIO_BALLOON_F_DEFLATE_ON_OOM))
        return self.total if offset else Known.made.actual >> STEP

    def write(self, offset: int, size: int, value: int) -> None:
        del size
        if offset == OFFER:
            Known.made.features &= ~VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            Known.made.features |= VIRTIO_BALLOON_F_DEFLATE_ON_OOM if value else 0
        elif offset:
            self.total = UNKNOWN
            threading.Thread(target=self.ask, daemon=True).start()  # the CPU that asks must go on
        else:
            Known.made.resize(value << STEP)

    def ask(self) -> None:
        stats = Known.made.stats(timeout=120)
        self.total = UNKNOWN if stats is None else stats["total"] >> STEP


def run() -> int:
    vars(balloon)["VirtioBalloon"] = Known  # which the run imports once it needs it
    return main()


if __name__ == "__main__":
    sys.exit(run())
