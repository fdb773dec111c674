"""The smallest device there is: a guest writes a number, and the run ends with it.

Port 0xF4, as hobby kernels know it from QEMU's isa-debug-exit. Read this file first.
"""

from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import Device


class DebugExit(Device):
    """Port 0xF4, 4 ports, no interrupt; any write of 1, 2 or 4 bytes ends the run.

    Not emulated: nothing, there is nothing more to it. Reads give 0.
    """

    name = "debug-exit"

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        """Call `on_exit` with the value written, on the vCPU's thread."""
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Answer 0."""
        del offset, size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run."""
        del offset, size
        self._on_exit(value)

    def save(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back an empty state."""
