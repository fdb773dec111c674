"""`tinyvmm run` whose guest has every virtio device saved, and made anew of that, at its word.

One port, 0x530: a write has transports, devices and a file server's sessions go through JSON while
the guest uses them; how often they have, it reads.
"""

import json
import sys
from typing import Any, ClassVar

from tinyvmm.cli.main import main
from tinyvmm.devices.device import Device, IrqLine
from tinyvmm.devices.virtio import pci
from tinyvmm.devices.virtio.pci import VirtioPci


class Movable(VirtioPci):
    """A transport, and its device, that can be found."""

    made: ClassVar[list["Movable"]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Movable.made.append(self)


class Mover(Device):
    """Moves them; the interrupt is never raised, but Linux is to know of it."""

    PORTS = (0x530, 1)
    HID = "MOVE0001"
    name = "mover"

    def __init__(self, irq: IrqLine) -> None:
        self.irq = irq
        self.moves = 0

    def read(self, offset: int, size: int) -> int:
        del offset, size
        return self.moves

    def write(self, offset: int, size: int, value: int) -> None:
        del offset, size, value
        for transport in Movable.made:
            device = transport.device
            with device.lock:  # a thread of its own may serve it
                device.suspend()  # or the kernel
                transport.load(json.loads(json.dumps(transport.save())))
                device.resume()
        self.moves += 1


def run() -> int:
    vars(pci)["VirtioPci"] = Movable  # which the machine imports once it needs it
    return main()


if __name__ == "__main__":
    sys.exit(run())
