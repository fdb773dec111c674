"""The 16550A, held to Linux's header and to what Linux's 8250 driver asks of one."""

import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.devices import uart
from tinyvmm.devices.uart import RECEIVE_MAX, Uart

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = EFR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

HEADER = Path("/usr/include/linux/serial_reg.h")


class Line:
    """An interrupt line that counts its rising edges."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set(self, level: bool) -> None:
        assert level != self.level, "driven to the level it has"
        self.level = level
        self.edges += level


class Port:
    """A UART as a driver sees it: a byte at a time."""

    def __init__(self) -> None:
        self.line = Line()
        self.output = bytearray()
        self.device = Uart(self.line, self.output.extend)

    def inb(self, register: int) -> int:
        return self.device.read(register, 1)

    def outb(self, register: int, value: int) -> None:
        self.device.write(register, 1, value)


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers")
def test_names_and_bits_are_those_of_linux() -> None:
    text = HEADER.read_text()
    defines = {
        name: int(value, 0)
        for name, value in re.findall(r"#define UART_(\w+)\s+(0x[0-9a-fA-F]+|\d+)\b", text)
    }
    ours = {"RBR": "RX", "THR": "TX", "IIR_FIFO_ENABLED": None}
    for register in Uart.REGISTERS:
        assert defines[ours.get(register.name) or register.name] == register.offset
    compared = 0
    for name, value in vars(uart).items():
        if re.match(r"(IER|IIR|FCR|LCR|MCR|LSR|MSR)_", name) and name in defines:
            assert defines[name] == value, name
            compared += 1
    assert compared >= 20


def test_linux_identifies_a_16550a(port: Port) -> None:
    # The steps of autoconfig() and autoconfig_16550a() in drivers/tty/serial/8250/8250_port.c.
    saved = port.inb(IER)
    port.outb(IER, 0)
    assert port.inb(IER) & 0x0F == 0
    port.outb(IER, 0x0F)
    assert port.inb(IER) & 0x0F == 0x0F
    port.outb(IER, saved)
    port.outb(MCR, 0x10 | 0x0A)  # loopback, OUT2, RTS: comes back as DCD and CTS
    assert port.inb(MSR) & 0xF0 == 0x90
    port.outb(MCR, 0)
    port.outb(LCR, 0xBF)
    port.outb(EFR, 0)
    port.outb(LCR, 0)
    port.outb(FCR, 0x01)
    assert port.inb(IIR) >> 6 == 3, "16550A: both FIFO bits"
    for lcr in (0x80, 0xBF):  # no enhanced feature register, or it would be a 16650
        port.outb(LCR, lcr)
        assert port.inb(EFR) != 0
    port.outb(LCR, 0)
    for mcr in (0, 0x10):  # bit 4 of the second register does not follow LOOP: no NS SuperIO
        port.outb(MCR, mcr)
        port.outb(LCR, 0xE0)
        assert not port.inb(2) & 0x10
        port.outb(LCR, 0)
    port.outb(MCR, 0)
    for lcr in (0x00, 0x80):  # no 64-byte FIFO, or it would be a 16750
        port.outb(LCR, lcr)
        port.outb(FCR, 0x21)
        assert port.inb(IIR) >> 5 == 6
    port.outb(LCR, 0)
    port.outb(IER, 0x40)  # no UUE, or it would be an XScale's
    assert port.inb(IER) & 0x40 == 0
    port.outb(IER, 0)
    # size_fifo(): 256 bytes into the loopback, as many come back as the FIFO holds
    port.outb(FCR, 0x07)
    port.outb(MCR, 0x10)
    for value in range(256):
        port.outb(THR, value)
    count = 0
    while port.inb(LSR) & 0x01:
        port.inb(RBR)
        count += 1
    assert count == 16
    assert port.output == b""


def test_linux_finds_no_transmit_bug(port: Port) -> None:
    # serial8250_do_startup(): the interrupt is due whenever THRI is enabled anew, and still due
    # after IIR has told of it once and THRI was toggled.
    for _ in range(2):
        port.outb(IER, 0x02)
        assert port.inb(LSR) & 0x60 == 0x60
        assert port.inb(IIR) & 0x0F == 0x02
        port.outb(IER, 0)
        assert port.inb(IIR) & 0x0F == 0x01


@given(st.binary(max_size=64))
def test_what_is_written_comes_out_byte_by_byte(data: bytes) -> None:
    port = Port()
    for value in data:
        assert port.inb(LSR) & 0x20
        port.outb(THR, value)
    assert port.output == data
    assert port.line.edges == 0


@given(st.binary(min_size=1, max_size=100), st.sampled_from([0, 0x01, 0x41, 0x81, 0xC1]))
def test_an_interrupt_driven_reader_gets_what_was_sent(data: bytes, fcr: int) -> None:
    port = Port()
    port.outb(FCR, fcr)
    port.outb(IER, 0x01)
    assert port.device.receive(data) == len(data)
    got = bytearray()
    while port.line.level:  # what the driver's handler does
        trigger = {0: 1, 0x01: 1, 0x41: 4, 0x81: 8, 0xC1: 14}[fcr]
        cause = 0x04 if len(data) - len(got) >= trigger else 0x0C
        assert port.inb(IIR) & 0x0F == cause
        assert port.inb(LSR) & 0x01
        got.append(port.inb(RBR))
    assert got == data
    assert port.inb(IIR) & 0x0F == 0x01
    assert not port.inb(LSR) & 0x01


def test_an_interrupt_driven_writer_is_asked_for_more_after_each_batch(port: Port) -> None:
    port.outb(FCR, 0x01)
    port.outb(IER, 0x02)
    for batch in range(3):
        assert port.line.level
        assert port.inb(IIR) & 0x0F == 0x02
        assert not port.line.level, "telling of it settles it"
        for _ in range(16):
            port.outb(THR, 0x41 + batch)
    assert port.output == b"A" * 16 + b"B" * 16 + b"C" * 16
    port.outb(IER, 0)
    assert not port.line.level


def test_received_data_is_more_urgent_than_an_empty_transmitter(port: Port) -> None:
    port.outb(IER, 0x03)
    port.device.receive(b"x")
    assert port.inb(IIR) & 0x0F == 0x04
    port.inb(RBR)
    assert port.inb(IIR) & 0x0F == 0x02


def test_a_guest_that_does_not_read_bounds_what_is_kept(port: Port) -> None:
    data = bytes(i & 0xFF for i in range(RECEIVE_MAX + 10))
    assert port.device.receive(data) == RECEIVE_MAX
    assert port.device.receive(b"more") == 0
    assert [port.inb(RBR) for _ in range(3)] == [0, 1, 2]
    assert port.device.receive(b"more") == 3


def test_reading_an_empty_receiver_gives_zero(port: Port) -> None:
    assert port.inb(RBR) == 0


def test_clearing_the_receiver_lowers_its_interrupt(port: Port) -> None:
    port.outb(FCR, 0x01)
    port.outb(IER, 0x01)
    port.device.receive(b"typed too early")
    assert port.line.level
    port.outb(FCR, 0x03)
    assert not port.line.level
    assert not port.inb(LSR) & 0x01


def test_the_divisor_hides_data_and_interrupt_enable(port: Port) -> None:
    port.outb(IER, 0x01)
    port.outb(LCR, 0x83)
    port.outb(DLL, 0x01)
    port.outb(DLM, 0x02)
    assert (port.inb(DLL), port.inb(DLM), port.inb(LCR)) == (0x01, 0x02, 0x83)
    assert port.output == b""
    port.outb(LCR, 0x03)
    assert port.inb(IER) == 0x01
    port.outb(THR, 0x41)
    assert port.output == b"A"


def test_loopback_sends_nothing_out_and_lets_nothing_in(port: Port) -> None:
    port.outb(FCR, 0x01)
    port.outb(MCR, 0x10)
    port.outb(THR, 0x5A)
    assert port.device.receive(b"x") == 0
    assert port.inb(RBR) == 0x5A
    assert not port.inb(LSR) & 0x01
    assert port.output == b""


def test_an_overrun_in_loopback_is_reported_once(port: Port) -> None:
    port.outb(IER, 0x04)
    port.outb(MCR, 0x10)
    for _ in range(17):
        port.outb(THR, 0)
    assert port.line.level
    assert port.inb(IIR) & 0x0F == 0x06
    assert port.inb(LSR) & 0x02
    assert not port.inb(LSR) & 0x02
    assert not port.line.level


def test_changed_modem_signals_interrupt_until_read(port: Port) -> None:
    port.outb(IER, 0x08)
    port.outb(MCR, 0x10)  # CTS, DSR and DCD fall
    assert port.line.level
    assert port.inb(IIR) & 0x0F == 0x00
    assert port.inb(MSR) == 0x0B
    assert port.inb(MSR) == 0x00
    assert not port.line.level
    port.outb(MCR, 0x14)  # RI rises, which is no event
    assert port.inb(MSR) == 0x40
    port.outb(MCR, 0x10)  # its end is
    assert port.inb(MSR) == 0x04


@given(st.integers(0, 0xFF))
def test_scratch_keeps_anything(value: int) -> None:
    port = Port()
    port.outb(SCR, value)
    assert port.inb(SCR) == value


def test_output_may_call_back_into_the_uart() -> None:
    def echo(data: bytes) -> None:
        device.receive(data)

    device = Uart(Line(), echo)
    device.write(IER, 1, 0x03)
    device.write(THR, 1, 0x41)
    assert device.read(RBR, 1) == 0x41


def test_bytes_sent_while_the_guest_reads_all_arrive_in_order(port: Port) -> None:
    data = bytes(range(256)) * 40
    port.outb(IER, 0x01)

    def send() -> None:
        rest = data
        while rest:
            rest = rest[port.device.receive(rest[:100]) :]

    sender = threading.Thread(target=send)
    sender.start()
    got = bytearray()
    while len(got) < len(data):
        if port.inb(LSR) & 0x01:
            got.append(port.inb(RBR))
    sender.join()
    assert got == data
    assert not port.line.level
