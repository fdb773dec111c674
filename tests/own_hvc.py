"""A second console device, whose port is /dev/hvc0 in the guest; test_vsock.py asks its size."""

from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole

ROWS, COLS = 43, 132


class Hvc(VirtioConsole):
    """A console of this size, with nobody at the other end."""

    def __init__(self) -> None:
        port = ConsolePort("hvc", console=True)
        port.resize(ROWS, COLS)
        super().__init__([port])
