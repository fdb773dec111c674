"""Registers declared as data: storage, handlers, widths, access and banks."""

import json

from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.devices.register import Register, RegisterDevice


class Sheet(RegisterDevice):
    """A device with one register of each kind."""

    name = "sheet"
    REGISTERS = (
        Register("ID", 0x00, 4, "R", reset=0x1AF4),
        Register("SCRATCH", 0x04, 2),
        Register("DOOR", 0x08, 4, "W"),
        Register("COUNT", 0x08, 4, "R"),
        Register("DATA", 0x10, bank=0),
        Register("DIVISOR", 0x10, bank=1, reset=3),
        Register("SELECT", 0x11),
        Register("HIDDEN", 0x00, access="", reset=9),
    )

    def read_COUNT(self) -> int:
        self.values["COUNT"] += 1
        return self.values["COUNT"]

    def write_DOOR(self, value: int) -> None:
        self.values["DOOR"] = value ^ 0xFF

    def write_SELECT(self, value: int) -> None:
        self.values["SELECT"] = value
        self.select_bank(value & 1)


def test_a_register_starts_at_its_reset_value() -> None:
    sheet = Sheet()
    assert (sheet.read(0x00, 4), sheet.read(0x04, 2), sheet.values["HIDDEN"]) == (0x1AF4, 0, 9)


@given(st.integers(0, 0xFFFF))
def test_a_register_without_a_handler_is_storage(value: int) -> None:
    sheet = Sheet()
    sheet.write(0x04, 2, value)
    assert sheet.read(0x04, 2) == value


def test_a_handler_is_found_by_its_register_s_name() -> None:
    sheet = Sheet()
    sheet.write(0x08, 4, 0x0F)
    assert sheet.values["DOOR"] == 0xF0
    assert [sheet.read(0x08, 4) for _ in range(3)] == [1, 2, 3]


def test_a_read_only_register_swallows_writes() -> None:
    sheet = Sheet()
    sheet.write(0x00, 4, 0)
    assert sheet.read(0x00, 4) == 0x1AF4


@given(st.integers(0, 0x20), st.sampled_from([1, 2, 4, 8]))
def test_an_access_that_matches_no_register_in_offset_and_width_is_nobody_s(
    offset: int, size: int
) -> None:
    sheet = Sheet()
    if any(offset == r.offset and size == r.width for r in Sheet.REGISTERS if r.access):
        return
    before = sheet.save()
    assert sheet.read(offset, size) == (1 << 8 * size) - 1
    sheet.write(offset, size, 1)
    assert sheet.save() == before


def test_a_bank_shows_its_own_registers_and_those_of_all_banks() -> None:
    sheet = Sheet()
    sheet.write(0x10, 1, 0x55)
    sheet.write(0x11, 1, 1)
    assert sheet.read(0x10, 1) == 3
    sheet.write(0x10, 1, 4)
    sheet.write(0x11, 1, 2)
    assert sheet.read(0x10, 1) == 0x55
    assert sheet.values["DIVISOR"] == 4


def test_two_devices_of_a_class_share_nothing() -> None:
    one, other = Sheet(), Sheet()
    one.write(0x04, 2, 7)
    one.write(0x11, 1, 1)
    assert other.read(0x04, 2) == 0
    assert other.read(0x10, 1) == 0


def test_values_and_bank_survive_json() -> None:
    sheet, restored = Sheet(), Sheet()
    sheet.write(0x04, 2, 0x1234)
    sheet.write(0x11, 1, 1)
    restored.load(json.loads(json.dumps(sheet.save())))
    assert restored.read(0x04, 2) == 0x1234
    assert restored.read(0x10, 1) == 3
    restored.write(0x04, 2, 1)  # the handlers work on what was loaded
    assert restored.read(0x04, 2) == 1
