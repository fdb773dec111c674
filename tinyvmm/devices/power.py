r"""ACPI power control: sleep registers, a reset register, and a power button.

Model: the registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 "Sleep Control and Status
Registers", 4.8.3.6 "Reset Register"), and an event register of our own that the DSDT's Generic
Event Device reads (ACPI 6.5, 5.6.9). Ports 0x600 to 0x603, GSI 9, level-triggered.

A guest that writes SLP_EN with the type of \_S5 to SLEEP_CONTROL_REG has powered off; that type is
`SLP_TYP_S5`, which the DSDT states. `press_power_button` raises the interrupt; reading EVENT says
why and lowers it.

Not emulated: sleep states other than S5. WAK_STS is never set: nothing here wakes up.

Threads: vCPUs, and any thread for `press_power_button`; `_lock` guards EVENT and the line.
"""

import threading
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import IrqLine
from tinyvmm.devices.register import Register, RegisterDevice

SLP_EN = 1 << 5
SLP_TYP_SHIFT = 2
SLP_TYP_MASK = 7
SLP_TYP_S5 = 5
RESET_VALUE = 1
EVENT_POWER_BUTTON = 1 << 0

SLEEP_CONTROL, SLEEP_STATUS, RESET, EVENT = range(4)  # offsets, for the ACPI tables


class PowerControl(RegisterDevice):
    r"""The registers behind \_S5, reset and the power button."""

    name = "power"
    length = 4
    REGISTERS = (
        Register("SLEEP_CONTROL_REG", SLEEP_CONTROL),
        Register("SLEEP_STATUS_REG", SLEEP_STATUS),
        Register("RESET_REG", RESET, access="W"),
        Register("EVENT", EVENT, access="R"),
    )

    def __init__(
        self, irq: IrqLine, on_poweroff: Callable[[], None], on_reset: Callable[[], None]
    ) -> None:
        """Call `on_poweroff` or `on_reset`, on the vCPU's thread, when the guest asks for it."""
        super().__init__()
        self._irq = irq
        self._on_poweroff = on_poweroff
        self._on_reset = on_reset
        self._lock = threading.Lock()

    def press_power_button(self) -> None:
        """Ask the guest to shut itself down; what it makes of that is its own affair."""
        with self._lock:
            self.values["EVENT"] |= EVENT_POWER_BUTTON
            self._irq.set(True)

    def write_SLEEP_CONTROL_REG(self, value: int) -> None:
        """Power off if this enables S5."""
        self.values["SLEEP_CONTROL_REG"] = value & ~SLP_EN
        if value & SLP_EN and value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLP_TYP_S5:
            self._on_poweroff()

    def write_SLEEP_STATUS_REG(self, value: int) -> None:
        """Clear WAK_STS, which is never set: writing it has no effect."""

    def write_RESET_REG(self, value: int) -> None:
        """Reset, if the value is the FADT's RESET_VALUE."""
        if value == RESET_VALUE:
            self._on_reset()

    def read_EVENT(self) -> int:
        """Say what happened, and lower the interrupt."""
        with self._lock:
            event, self.values["EVENT"] = self.values["EVENT"], 0
            self._irq.set(False)
            return event

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned, and drive the line accordingly."""
        with self._lock:
            super().load(state)
            self._irq.set(self.values["EVENT"] != 0)
