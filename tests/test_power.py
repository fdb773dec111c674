"""Power off, reset and the power button, as ACPI's registers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.devices.power import (
    EVENT,
    EVENT_POWER_BUTTON,
    RESET,
    RESET_VALUE,
    SLEEP_CONTROL,
    SLEEP_STATUS,
    SLP_TYP_S5,
    PowerControl,
)


class Board:
    def __init__(self) -> None:
        self.level = False
        self.events: list[str] = []
        self.device = PowerControl(
            self, lambda: self.events.append("poweroff"), lambda: self.events.append("reset")
        )

    def set(self, level: bool) -> None:
        self.level = level


@pytest.fixture
def board() -> Board:
    return Board()


@given(st.integers(0, 0xFF))
def test_only_sleep_enable_with_the_type_of_s5_powers_off(value: int) -> None:
    board = Board()
    board.device.write(SLEEP_CONTROL, 1, value)
    # ACPI 6.5, table 4.22: SLP_TYPx is bits 2 to 4, SLP_EN bit 5
    off = bool(value & 0x20) and (value & 0x1C) >> 2 == SLP_TYP_S5
    assert board.events == ["poweroff"] * off


@given(st.integers(0, 0xFF))
def test_only_the_reset_value_resets(value: int) -> None:
    board = Board()
    board.device.write(RESET, 1, value)
    assert board.events == ["reset"] * (value == RESET_VALUE)


def test_sleep_enable_is_write_only_and_nothing_ever_wakes(board: Board) -> None:
    board.device.write(SLEEP_CONTROL, 1, 0xFF)
    assert board.device.read(SLEEP_CONTROL, 1) & 0x20 == 0
    board.device.write(SLEEP_STATUS, 1, 0x80)
    assert board.device.read(SLEEP_STATUS, 1) == 0


def test_the_button_raises_the_line_until_the_event_is_read(board: Board) -> None:
    assert not board.level
    board.device.press_power_button()
    board.device.press_power_button()
    assert board.level
    assert board.device.read(EVENT, 1) == EVENT_POWER_BUTTON
    assert not board.level
    assert board.device.read(EVENT, 1) == 0
    assert board.events == []


def test_a_button_pressed_before_a_save_is_pressed_after_it(board: Board) -> None:
    board.device.press_power_button()
    other = Board()
    other.device.load(board.device.save())
    assert other.level
    assert other.device.read(EVENT, 1) == EVENT_POWER_BUTTON
