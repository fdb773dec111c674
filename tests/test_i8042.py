"""The keyboard controller that is only there to reset the machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.devices.i8042 import I8042

DATA, STATUS = 0, 4
OBF, CMDDAT, AUXDATA = 0x01, 0x08, 0x20


class Port:
    def __init__(self) -> None:
        self.resets = 0
        self.device = I8042(self.reset)

    def reset(self) -> None:
        self.resets += 1

    def command(self, command: int, *arguments: int) -> int | None:
        """The answer, or None; asserts that it is there at once, as status says."""
        self.device.write(STATUS, 1, command)
        for argument in arguments:
            self.device.write(DATA, 1, argument)
        if not self.device.read(STATUS, 1) & OBF:
            return None
        answer = self.device.read(DATA, 1)
        assert not self.device.read(STATUS, 1) & OBF
        return answer


@pytest.fixture
def port() -> Port:
    return Port()


@given(st.integers(0, 0xFF))
def test_only_a_pulse_of_line_0_resets(command: int) -> None:
    port = Port()
    port.command(command)
    assert port.resets == (command >= 0xF0 and command & 1 == 0)


@given(st.integers(0, 0xFF))
def test_the_output_port_s_bit_0_holds_the_processor_in_reset(value: int) -> None:
    port = Port()
    port.command(0xD1, value)
    assert port.resets == (value & 1 == 0)


def test_self_test_passes_and_answers_once(port: Port) -> None:
    assert port.command(0xAA) == 0x55


@given(st.integers(0, 0xFF))
def test_the_command_byte_reads_back(value: int) -> None:
    port = Port()
    assert port.command(0x60, value) is None
    assert port.command(0x20) == value


def test_disabling_and_enabling_ports_shows_in_the_command_byte(port: Port) -> None:
    port.command(0x60, 0x00)
    port.command(0xA7)
    port.command(0xAD)
    assert port.command(0x20) == 0x30
    port.command(0xA8)
    assert port.command(0x20) == 0x10
    port.command(0xAE)
    assert port.command(0x20) == 0x00


def test_linux_concludes_without_waiting_that_there_is_no_mouse(port: Port) -> None:
    # i8042_check_aux() in drivers/input/serio/i8042.c: the loop must answer from the mouse's side
    # or time out after half a second; a wrong byte, then a failed test, end the search.
    port.device.write(STATUS, 1, 0xD3)
    port.device.write(DATA, 1, 0x5A)
    assert port.device.read(STATUS, 1) & (OBF | AUXDATA) == OBF | AUXDATA
    assert port.device.read(DATA, 1) != 0x5A
    assert port.command(0xA9) not in {None, 0x00, 0xFA, 0xFF}


@pytest.mark.parametrize("byte", [0xF2, 0xFF, 0xED])
def test_a_keyboard_command_is_not_understood(port: Port, byte: int) -> None:
    port.device.write(DATA, 1, byte)
    assert port.device.read(STATUS, 1) & (OBF | AUXDATA) == OBF
    assert port.device.read(DATA, 1) == 0xFE


def test_status_tells_command_from_data(port: Port) -> None:
    port.device.write(STATUS, 1, 0x60)
    assert port.device.read(STATUS, 1) & CMDDAT
    port.device.write(DATA, 1, 0)
    assert not port.device.read(STATUS, 1) & CMDDAT


def test_nobody_answers_between_data_and_status(port: Port) -> None:
    assert [port.device.read(offset, 1) for offset in (1, 2, 3)] == [0xFF] * 3
