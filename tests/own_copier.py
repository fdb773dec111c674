"""A device that asks for all a machine has to give: tests/kernels/own.c drives it."""

from collections.abc import Callable

from tinyvmm.devices.device import GuestMemory, IrqLine
from tinyvmm.devices.register import Register, RegisterDevice

DONE, FAILED = 1, 2


class Copier(RegisterDevice):
    """Copies guest memory, interrupts when it has, and can end the run."""

    MMIO_LEN = 0x18
    REGISTERS = (
        Register("SOURCE", 0x00, 4),
        Register("TARGET", 0x04, 4),
        Register("LENGTH", 0x08, 4),
        Register("GO", 0x0C, 4, "W"),
        Register("STATUS", 0x10, 4),
        Register("EXIT", 0x14, 4, "W"),
    )
    name = "copier"

    def __init__(
        self, irq: IrqLine, memory: GuestMemory, on_exit: Callable[[int], None], limit: int = 4096
    ) -> None:
        super().__init__()
        self.irq, self.memory, self.on_exit, self.limit = irq, memory, on_exit, limit

    def write_GO(self, value: int) -> None:
        """Copy, and raise the line."""
        del value
        source, target, length = (self.values[name] for name in ("SOURCE", "TARGET", "LENGTH"))
        try:
            data = bytes(self.memory.view(source, min(length, self.limit)))
            self.memory.view(target, len(data))[:] = data
        except ValueError:
            self.values["STATUS"] = FAILED
        else:
            self.values["STATUS"] = DONE
            self.irq.set(True)

    def write_EXIT(self, value: int) -> None:
        """End the run."""
        self.on_exit(value)

    def write_STATUS(self, value: int) -> None:
        """Take note of what has been: the line falls."""
        self.values["STATUS"] = value
        self.irq.set(False)
