"""16550A UART: the guest kernel's own console. Read debug_exit.py first, then this.

Model: National Semiconductor PC16550D (data sheet, section 8 "Registers"), identified by Linux as
16550A. Ports 0x3F8 to 0x3FF, GSI 4.

The transmitter is infinitely fast: a byte written to THR is passed on at once, so THR is always
empty and "transmitter holding register empty" is due again after every byte. The receiver holds
what the host sends until the guest reads it; the FIFO's 16 bytes and its trigger levels only
matter for the rate of interrupts, so data is reported as soon as there is any.

Not emulated: baud rates and parity (values are stored), break, the FIFO's trigger levels, modem
signals other than through loopback, DMA mode.

Threads: the vCPUs call read and write, any host thread `receive`; `_lock` guards all state.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import IrqLine
from tinyvmm.devices.register import Register, RegisterDevice

IER_RDI, IER_THRI = 1 << 0, 1 << 1
IER_MASK = 0x0F
IIR_NO_INT, IIR_THRI, IIR_RDI = 0x01, 0x02, 0x04
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE_FIFO, FCR_CLEAR_RCVR = 1 << 0, 1 << 1
LCR_DLAB = 1 << 7
MCR_LOOP = 1 << 4
LSR_DR, LSR_THRE, LSR_TEMT = 1 << 0, 1 << 5, 1 << 6
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7

RECEIVE_MAX = 4096  # bytes kept for a guest that does not read


class Uart(RegisterDevice):
    """A serial port whose output goes to a function."""

    name = "uart"
    REGISTERS = (
        Register("RBR", 0x0, access="R", bank=0),
        Register("THR", 0x0, access="W", bank=0),
        Register("DLL", 0x0, bank=1, reset=0x0C),
        Register("IER", 0x1, bank=0),
        Register("DLM", 0x1, bank=1),
        Register("IIR", 0x2, access="R", reset=IIR_NO_INT),
        Register("FCR", 0x2, access="W"),
        Register("LCR", 0x3),
        Register("MCR", 0x4),
        Register("LSR", 0x5, access="R", reset=LSR_THRE | LSR_TEMT),
        Register("MSR", 0x6, access="R", reset=MSR_CTS | MSR_DSR | MSR_DCD),
        Register("SCR", 0x7),
    )

    def __init__(self, irq: IrqLine, output: Callable[[bytes], None]) -> None:
        """Drive `irq` and hand each byte written to `output`, on the writing vCPU's thread."""
        super().__init__()
        self._irq = irq
        self._output = output
        self._lock = threading.RLock()
        self._received: deque[int] = deque()
        self._thr_interrupt = False  # THR became empty and nobody has been told yet
        self._level = False

    def read(self, offset: int, size: int) -> int:
        """Answer a register read."""
        with self._lock:
            return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Perform a register write."""
        with self._lock:
            super().write(offset, size, value)

    def receive(self, data: bytes) -> int:
        """Let the guest receive `data`; how many bytes were taken, the rest found no room."""
        with self._lock:
            taken = data[: RECEIVE_MAX - len(self._received)]
            self._received.extend(taken)
            self._update_irq()
            return len(taken)

    # --- registers with side effects ----------------------------------------------------------

    def write_THR(self, value: int) -> None:
        """Transmit a byte, or in loopback receive it."""
        if self.values["MCR"] & MCR_LOOP:
            self.receive(bytes((value,)))
        else:
            self._output(bytes((value,)))
        self._thr_interrupt = True
        self._update_irq()

    def read_RBR(self) -> int:
        """Take the oldest byte received; 0 if there is none."""
        value = self._received.popleft() if self._received else 0
        self._update_irq()
        return value

    def write_IER(self, value: int) -> None:
        """Enable interrupts; enabling THRI while THR is empty makes one due."""
        if value & ~self.values["IER"] & IER_THRI:
            self._thr_interrupt = True
        self.values["IER"] = value & IER_MASK
        self._update_irq()

    def read_IIR(self) -> int:
        """Identify the most urgent interrupt; telling of THRI settles it."""
        pending = self._pending()
        if pending == IIR_THRI:
            self._thr_interrupt = False
            self._update_irq()
        fifo = IIR_FIFO_ENABLED if self.values["FCR"] & FCR_ENABLE_FIFO else 0
        return pending | fifo

    def write_FCR(self, value: int) -> None:
        """Control the FIFOs; the clear bits clear themselves."""
        if value & FCR_CLEAR_RCVR or (value ^ self.values["FCR"]) & FCR_ENABLE_FIFO:
            self._received.clear()
        self.values["FCR"] = value & ~0x06
        self._update_irq()

    def write_LCR(self, value: int) -> None:
        """Keep the line's format; DLAB swaps the first two registers for the divisor."""
        self.values["LCR"] = value
        self.select_bank(1 if value & LCR_DLAB else 0)

    def read_LSR(self) -> int:
        """Report an empty transmitter, and whether there is data."""
        return LSR_THRE | LSR_TEMT | (LSR_DR if self._received else 0)

    def read_MSR(self) -> int:
        """Report a connected peer; in loopback, our own outputs: RTS, DTR, OUT1, OUT2."""
        mcr = self.values["MCR"]
        if not mcr & MCR_LOOP:
            return self.values["MSR"]
        signals = ((1, MSR_CTS), (0, MSR_DSR), (2, MSR_RI), (3, MSR_DCD))
        return sum(signal for bit, signal in signals if mcr >> bit & 1)

    # --- interrupts -----------------------------------------------------------------------------

    def _pending(self) -> int:
        ier = self.values["IER"]
        if ier & IER_RDI and self._received:
            return IIR_RDI
        if ier & IER_THRI and self._thr_interrupt:
            return IIR_THRI
        return IIR_NO_INT

    def _update_irq(self) -> None:
        level = self._pending() != IIR_NO_INT
        if level != self._level:
            self._level = level
            self._irq.set(level)

    def save(self) -> dict[str, Any]:
        """Return registers, unread bytes and the pending interrupt."""
        with self._lock:
            received = list(self._received)
            return {**super().save(), "received": received, "thr": self._thr_interrupt}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned, and drive the line accordingly."""
        with self._lock:
            super().load(state)
            self._received = deque(state["received"])
            self._thr_interrupt = state["thr"]
            self._update_irq()
