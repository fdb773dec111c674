"""16550A UART: the guest kernel's own console. Read debug_exit.py first, then this.

Model: National Semiconductor PC16550D (data sheet, section 8 "Registers"), which Linux identifies
as a 16550A. Ports 0x3F8 to 0x3FF, GSI 4.

The transmitter is infinitely fast: a byte written to THR is passed on at once, so THR is always
empty, and "THR empty" is due anew after every byte. The receiver keeps what the host sends until
the guest reads it, and reports it at once: fewer bytes than the FIFO's trigger level are reported
as a character time-out that has already passed.

Not emulated: baud rates and parity (values are stored), break, modem signals other than through
loopback, DMA mode. Accesses wider than a byte are nobody's.

Threads: vCPUs call read and write, any host thread `receive`; `_lock` guards what is received, what
is pending and the interrupt line. A write to THR while its interrupt is disabled, and a read of
LSR, take no lock: that is what a kernel's console does, twice a character. `output` is called
without the lock.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import IrqLine
from tinyvmm.devices.register import Register, RegisterDevice

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 1 << 0, 1 << 1, 1 << 2, 1 << 3
IER_MASK = 0x0F
IIR_MSI, IIR_NO_INT, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_RX_TIMEOUT = 0x0, 0x1, 0x2, 0x4, 0x6, 0xC
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE_FIFO, FCR_CLEAR_RCVR, FCR_CLEAR_XMIT = 1 << 0, 1 << 1, 1 << 2
FCR_TRIGGER_LEVELS = (1, 4, 8, 14)  # by bits 6 and 7
LCR_DLAB = 1 << 7
MCR_LOOP = 1 << 4
MCR_MASK = 0x1F
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 1 << 0, 1 << 1, 1 << 5, 1 << 6
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
MSR_DELTAS = 0x0F  # CTS, DSR or DCD changed, RI went from 1 to 0

RECEIVE_MAX = 4096  # bytes kept for a guest that does not read
LOOPBACK_MAX = 16  # the FIFO as the guest knows it


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
        Register("MSR", 0x6, access="R", reset=MSR_CONNECTED),
        Register("SCR", 0x7),
    )

    def __init__(self, irq: IrqLine, output: Callable[[bytes], None]) -> None:
        """Drive `irq` and hand each byte written to `output`, on the writing vCPU's thread."""
        super().__init__()
        self._irq = irq
        self._output = output
        self._lock = threading.Lock()
        self._received: deque[int] = deque()
        self._overrun = False  # a byte found the receiver full, and nobody has been told yet
        self._thr_interrupt = False  # THR became empty, and nobody has been told yet
        self._level = False

    def receive(self, data: bytes) -> int:
        """Let the guest receive `data`; return how many bytes were taken, the rest had no room.

        While the guest has the UART in loopback, its receiver is not connected and takes nothing.
        """
        with self._lock:
            if self.values["MCR"] & MCR_LOOP:
                return 0
            taken = data[: RECEIVE_MAX - len(self._received)]
            self._received.extend(taken)
            self._update_irq()
            return len(taken)

    # --- registers with side effects ----------------------------------------------------------

    def write_THR(self, value: int) -> None:
        """Transmit a byte, or in loopback receive it."""
        if not self.values["MCR"] & MCR_LOOP:
            self._output(bytes((value,)))
            self._thr_interrupt = True
            if not self.values["IER"] & IER_THRI:
                return
        with self._lock:
            if self.values["MCR"] & MCR_LOOP:
                self._loop_back(value)
            self._thr_interrupt = True
            self._update_irq()

    def _loop_back(self, value: int) -> None:
        if len(self._received) < LOOPBACK_MAX:
            self._received.append(value)
        else:
            self._overrun = True

    def read_RBR(self) -> int:
        """Take the oldest byte received; 0 if there is none."""
        with self._lock:
            value = self._received.popleft() if self._received else 0
            self._update_irq()
            return value

    def write_IER(self, value: int) -> None:
        """Enable interrupts; enabling THRI while THR is empty makes one due."""
        with self._lock:
            if value & ~self.values["IER"] & IER_THRI:
                self._thr_interrupt = True
            self.values["IER"] = value & IER_MASK
            self._update_irq()

    def read_IIR(self) -> int:
        """Identify the most urgent interrupt; telling of THRI settles it."""
        with self._lock:
            pending = self._pending()
            if pending == IIR_THRI:
                self._thr_interrupt = False
                self._update_irq()
            fifo = IIR_FIFO_ENABLED if self.values["FCR"] & FCR_ENABLE_FIFO else 0
            return pending | fifo

    def write_FCR(self, value: int) -> None:
        """Control the FIFOs; the clear bits clear themselves, and so does a change of mode."""
        with self._lock:
            if value & FCR_CLEAR_RCVR or (value ^ self.values["FCR"]) & FCR_ENABLE_FIFO:
                self._received.clear()
            self.values["FCR"] = value & ~(FCR_CLEAR_RCVR | FCR_CLEAR_XMIT)
            self._update_irq()

    def write_LCR(self, value: int) -> None:
        """Keep the line's format; DLAB swaps the first two registers for the divisor."""
        self.values["LCR"] = value
        self.select_bank(1 if value & LCR_DLAB else 0)

    def write_MCR(self, value: int) -> None:
        """Set the outputs, which in loopback are the inputs, whose changes MSR notes."""
        with self._lock:
            self.values["MCR"] = value = value & MCR_MASK
            inputs = _looped_back(value) if value & MCR_LOOP else MSR_CONNECTED
            before = self.values["MSR"]
            changed = (inputs ^ before) & ~MSR_RI | ~inputs & before & MSR_RI
            self.values["MSR"] = inputs | before & MSR_DELTAS | changed >> 4
            self._update_irq()

    def read_LSR(self) -> int:
        """Report an empty transmitter, whether there is data, and once that data was lost."""
        status = LSR_THRE | LSR_TEMT | (LSR_DR if self._received else 0)
        if self._overrun:
            with self._lock:
                self._overrun = False
                self._update_irq()
            status |= LSR_OE
        return status

    def read_MSR(self) -> int:
        """Report a connected peer, or in loopback our own outputs; and what changed since."""
        with self._lock:
            status = self.values["MSR"]
            self.values["MSR"] = status & ~MSR_DELTAS
            self._update_irq()
            return status

    # --- interrupts -----------------------------------------------------------------------------

    def _pending(self) -> int:
        """Return the IIR of the most urgent enabled interrupt (data sheet, table IV)."""
        ier = self.values["IER"]
        if ier & IER_RLSI and self._overrun:
            return IIR_RLSI
        if ier & IER_RDI and self._received:
            fcr = self.values["FCR"]
            trigger = FCR_TRIGGER_LEVELS[fcr >> 6] if fcr & FCR_ENABLE_FIFO else 1
            return IIR_RDI if len(self._received) >= trigger else IIR_RX_TIMEOUT
        if ier & IER_THRI and self._thr_interrupt:
            return IIR_THRI
        if ier & IER_MSI and self.values["MSR"] & MSR_DELTAS:
            return IIR_MSI
        return IIR_NO_INT

    def _update_irq(self) -> None:
        level = self._pending() != IIR_NO_INT
        if level != self._level:
            self._level = level
            self._irq.set(level)

    def save(self) -> dict[str, Any]:
        """Return registers, unread bytes and what is pending."""
        with self._lock:
            return {
                **super().save(),
                "received": list(self._received),
                "overrun": self._overrun,
                "thr": self._thr_interrupt,
            }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned, and drive the line accordingly."""
        with self._lock:
            super().load(state)
            self._received = deque(state["received"])
            self._overrun, self._thr_interrupt = state["overrun"], state["thr"]
            self._update_irq()


def _looped_back(mcr: int) -> int:
    """Return what MSR's inputs are in loopback: RTS, DTR, OUT1 and OUT2."""
    signals = ((1, MSR_CTS), (0, MSR_DSR), (2, MSR_RI), (3, MSR_DCD))
    return sum(signal for bit, signal in signals if mcr >> bit & 1)
