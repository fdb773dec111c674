"""i8042 keyboard controller: no keyboard, no mouse, and the classic way to reset a PC.

Model: the PC/AT's 8042 as in the IBM PC/AT Technical Reference ("Keyboard Controller"), with the
PS/2's commands for a second port. Ports 0x60 (data) and 0x64 (status, command); the ports between
belong to nobody. No interrupt: answers are polled for.

Command 0xFE pulses the CPU's reset line, which is one of Linux's ways to reboot. The ACPI tables
say that there is no 8042 (FADT, IAPC_BOOT_ARCH), so Linux looks for no keyboard; to anyone who
looks all the same, each question is answered at once, for an unanswered one costs half a second:
both ports' tests fail, and what is sent to a keyboard or mouse comes back as "not understood".

Not emulated: keyboard, mouse, A20 gate, the controller's RAM beyond its command byte.

Threads: vCPUs only; `_lock` guards the registers. `on_reset` is called without it.
"""

import threading
from collections.abc import Callable

from tinyvmm.devices.register import Register, RegisterDevice

STATUS_OBF = 1 << 0  # output buffer full: there is something to read at 0x60
STATUS_SYSTEM = 1 << 2  # self-test passed
STATUS_CMDDAT = 1 << 3  # the last write was a command
STATUS_UNLOCKED = 1 << 4  # the keyboard's lock
STATUS_AUXDATA = 1 << 5  # what is to be read is from the mouse
CTR_DEFAULT = 0x34  # both ports disabled, system flag
COMMAND_READ_CTR = 0x20
COMMAND_WRITE_CTR = 0x60
COMMAND_AUX_DISABLE = 0xA7
COMMAND_AUX_ENABLE = 0xA8
COMMAND_AUX_TEST = 0xA9
COMMAND_SELF_TEST = 0xAA
COMMAND_KBD_TEST = 0xAB
COMMAND_KBD_DISABLE = 0xAD
COMMAND_KBD_ENABLE = 0xAE
COMMAND_WRITE_OUTPUT_PORT = 0xD1
COMMAND_AUX_LOOP = 0xD3
COMMAND_AUX_SEND = 0xD4
COMMAND_PULSE = 0xF0  # to 0xFF: bits 0 to 3 that are 0 pulse output lines, bit 0 is reset
OUTPUT_NOT_RESET = 1 << 0
SELF_TEST_PASSED = 0x55
CLOCK_STUCK_LOW = 0x01
NOT_UNDERSTOOD = 0xFE
CTR_BITS = {  # command -> (bits of the command byte it clears, bits it sets)
    COMMAND_AUX_DISABLE: (0, 1 << 5),
    COMMAND_AUX_ENABLE: (1 << 5, 0),
    COMMAND_KBD_DISABLE: (0, 1 << 4),
    COMMAND_KBD_ENABLE: (1 << 4, 0),
}


class I8042(RegisterDevice):
    """The controller; five ports from 0x60."""

    name = "i8042"
    REGISTERS = (
        Register("DATA", 0x0),
        Register("STATUS", 0x4, access="R", reset=STATUS_SYSTEM | STATUS_UNLOCKED),
        Register("COMMAND", 0x4, access="W"),  # the last one, while it waits for its argument
        Register("CTR", 0x0, access="", reset=CTR_DEFAULT),  # the command byte; has no port
    )

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """Call `on_reset`, on the vCPU's thread, when the guest pulls the reset line."""
        super().__init__()
        self._on_reset = on_reset
        self._lock = threading.Lock()

    def read_DATA(self) -> int:
        """Take the answer; the last one again if there is none."""
        with self._lock:
            self.values["STATUS"] &= ~(STATUS_OBF | STATUS_AUXDATA)
            return self.values["DATA"]

    def write_COMMAND(self, value: int) -> None:
        """Perform a controller command, or wait for its argument."""
        with self._lock:
            self.values["STATUS"] |= STATUS_CMDDAT
            self.values["COMMAND"] = value
            if value in CTR_BITS:
                clear, set_ = CTR_BITS[value]
                self.values["CTR"] = self.values["CTR"] & ~clear | set_
            elif value == COMMAND_READ_CTR:
                self._answer(self.values["CTR"])
            elif value == COMMAND_SELF_TEST:
                self.values["CTR"] = CTR_DEFAULT
                self._answer(SELF_TEST_PASSED)
            elif value in {COMMAND_KBD_TEST, COMMAND_AUX_TEST}:
                self._answer(CLOCK_STUCK_LOW)
        if value >= COMMAND_PULSE and not value & OUTPUT_NOT_RESET:
            self._on_reset()

    def write_DATA(self, value: int) -> None:
        """Take a command's argument, or what is meant for a keyboard."""
        reset = False
        with self._lock:
            self.values["STATUS"] &= ~STATUS_CMDDAT
            command, self.values["COMMAND"] = self.values["COMMAND"], 0
            if command == COMMAND_WRITE_CTR:
                self.values["CTR"] = value
            elif command == COMMAND_WRITE_OUTPUT_PORT:
                reset = not value & OUTPUT_NOT_RESET
            elif command in {COMMAND_AUX_LOOP, COMMAND_AUX_SEND}:
                self._answer(NOT_UNDERSTOOD, STATUS_AUXDATA)
            else:
                self._answer(NOT_UNDERSTOOD)
        if reset:
            self._on_reset()

    def _answer(self, value: int, source: int = 0) -> None:
        self.values["DATA"] = value
        self.values["STATUS"] = self.values["STATUS"] & ~STATUS_AUXDATA | STATUS_OBF | source
