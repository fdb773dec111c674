"""i8042 keyboard controller: no keyboard, no mouse, and the classic way to reset a PC.

Model: the PC/AT's 8042 as described in the IBM PC/AT Technical Reference ("Keyboard Controller").
Ports 0x60 (data) and 0x64 (status, command); the ports between belong to nobody. No interrupt.

Command 0xFE pulses the CPU's reset line; Linux uses it as one of its ways to reboot. The ACPI
tables say that there is no 8042 (FADT, IAPC_BOOT_ARCH), so Linux does not look for a keyboard.

Not emulated: keyboard and mouse. What is sent to them is swallowed, as with none attached.

Threads: vCPUs only; `_lock` guards the pending answer.
"""

import threading
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.register import Register, RegisterDevice

STATUS_OBF = 1 << 0  # output buffer full: there is something to read at 0x60
STATUS_SYSTEM = 1 << 2  # self-test passed
CTR_DEFAULT = 0x34  # both ports disabled, system flag
COMMAND_READ_CTR = 0x20
COMMAND_WRITE_CTR = 0x60
COMMAND_SELF_TEST = 0xAA
COMMAND_WRITE_OUTPUT_PORT = 0xD1
COMMAND_PULSE_RESET = 0xFE
OUTPUT_PORT_NOT_RESET = 1 << 0
SELF_TEST_PASSED = 0x55


class I8042(RegisterDevice):
    """The controller; five ports from 0x60."""

    name = "i8042"
    REGISTERS = (
        Register("DATA", 0x0),
        Register("STATUS", 0x4, access="R", reset=STATUS_SYSTEM),
        Register("COMMAND", 0x4, access="W"),
        Register("CTR", 0x10, access="", reset=CTR_DEFAULT),  # reached through commands only
    )

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """Call `on_reset`, on the vCPU's thread, when the guest pulses the reset line."""
        super().__init__()
        self._on_reset = on_reset
        self._lock = threading.Lock()
        self._full = False

    def read_STATUS(self) -> int:
        """Say whether an answer waits."""
        return STATUS_SYSTEM | (STATUS_OBF if self._full else 0)

    def read_DATA(self) -> int:
        """Take the answer; the last one again if there is none."""
        self._full = False
        return self.values["DATA"]

    def write_DATA(self, value: int) -> None:
        """Take a command's argument; anything else is for a keyboard that is not there."""
        with self._lock:
            command, self.values["COMMAND"] = self.values["COMMAND"], 0
        if command == COMMAND_WRITE_CTR:
            self.values["CTR"] = value
        elif command == COMMAND_WRITE_OUTPUT_PORT and not value & OUTPUT_PORT_NOT_RESET:
            self._on_reset()

    def write_COMMAND(self, value: int) -> None:
        """Perform a controller command."""
        if value == COMMAND_PULSE_RESET:
            self._on_reset()
        with self._lock:
            self.values["COMMAND"] = value
            if value == COMMAND_READ_CTR:
                self.values["DATA"], self._full = self.values["CTR"], True
            elif value == COMMAND_SELF_TEST:
                self.values["DATA"], self._full = SELF_TEST_PASSED, True

    def save(self) -> dict[str, Any]:
        """Return registers and whether an answer waits."""
        return {**super().save(), "full": self._full}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        super().load(state)
        self._full = state["full"]
