"""A second console device, whose port is /dev/hvc0 in the guest; test_vsock.py asks its size."""

from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole

ROWS, COLS = 43, 132


class Hvc(VirtioConsole):
    """A console of this size, of which nobody reads what is written to it."""

    def __init__(self) -> None:
        self.port = ConsolePort("hvc", console=True)
        self.port.resize(ROWS, COLS)
        self.port.on_output = self._drop
        super().__init__([self.port])

    def _drop(self) -> None:
        while self.port.take_output():  # Linux spins until a console's output has been taken
            pass
