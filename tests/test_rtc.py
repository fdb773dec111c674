"""The CMOS clock, held to the host's calendar."""

import calendar
import datetime as dt
import time

from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.devices.rtc import Rtc

UTC = dt.UTC
INDEX, DATA = 0, 1
REG_A, REG_B, REG_C, REG_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
SET, BINARY, HOURS_24 = 0x80, 0x04, 0x02
MODES = st.sampled_from([0, BINARY, HOURS_24, BINARY | HOURS_24])
# Four digits of year, whatever else: up to the end of 9999.
MOMENTS = st.integers(0, calendar.timegm((9999, 12, 31, 23, 59, 59)))


class Chip:
    """The clock as a driver sees it, at a moment the test chooses."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.device = Rtc(clock=lambda: self.now)

    def inb(self, index: int) -> int:
        self.device.write(INDEX, 1, index)
        return self.device.read(DATA, 1)

    def outb(self, index: int, value: int) -> None:
        self.device.write(INDEX, 1, index)
        self.device.write(DATA, 1, value)

    def time(self) -> dt.datetime:
        """Read it as the data sheet says, from whatever mode register B is in."""
        mode = self.inb(REG_B)

        def number(value: int) -> int:
            return value if mode & BINARY else int(f"{value:02x}")

        hours = self.inb(4)
        if mode & HOURS_24:
            hour = number(hours)
        else:
            hour = number(hours & 0x7F) % 12 + (12 if hours & 0x80 else 0)
        year = number(self.inb(CENTURY)) * 100 + number(self.inb(9))
        month, day = number(self.inb(8)), number(self.inb(7))
        minute, second = number(self.inb(2)), number(self.inb(0))
        return dt.datetime(year, month, day, hour, minute, second, tzinfo=UTC)

    def set_time(self, moment: dt.datetime) -> None:
        mode = self.inb(REG_B)

        def field(value: int) -> int:
            return value if mode & BINARY else int(f"{value}", 16)

        self.outb(REG_B, mode | SET)
        hour = moment.hour
        hours = field(hour) if mode & HOURS_24 else field(hour % 12 or 12) | (hour >= 12) << 7
        self.outb(0, field(moment.second))
        self.outb(2, field(moment.minute))
        self.outb(4, hours)
        self.outb(7, field(moment.day))
        self.outb(8, field(moment.month))
        self.outb(9, field(moment.year % 100))
        self.outb(CENTURY, field(moment.year // 100))
        self.outb(REG_B, mode)


def moment(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, tz=UTC)


@given(MOMENTS, st.floats(0, 0.875), MODES)
def test_the_time_reads_right_in_every_mode(seconds: int, fraction: float, mode: int) -> None:
    chip = Chip(seconds + fraction)
    chip.outb(REG_B, mode)
    assert chip.time() == moment(int(chip.now))
    assert chip.inb(6) == moment(int(chip.now)).isoweekday() % 7 + 1  # Sunday is 1


def test_the_12_hour_clock_has_no_hour_0() -> None:
    # data sheet, table 3: hours 1 to 12, with bit 7 for the afternoon
    told = []
    for hour in (0, 1, 11, 12, 13, 23):
        chip = Chip(hour * 3600)
        chip.outb(REG_B, 0)
        told.append(chip.inb(4))
    assert told == [0x12, 0x01, 0x11, 0x92, 0x81, 0x91]


def test_after_reset_it_is_what_linux_expects() -> None:
    chip = Chip(0)
    assert chip.inb(REG_B) & (SET | BINARY | HOURS_24) == HOURS_24
    assert chip.inb(REG_D) & 0x80, "the battery is good"
    assert chip.inb(REG_A) & 0x70 == 0x20, "32.768 kHz"


@given(MOMENTS, MOMENTS, MODES, st.integers(0, 100_000))
def test_a_time_set_runs_on_from_there(host: int, wanted: int, mode: int, later: int) -> None:
    wanted = min(wanted, calendar.timegm((9999, 1, 1, 0, 0, 0)))
    chip = Chip(host)
    chip.outb(REG_B, mode)
    chip.set_time(moment(wanted))
    assert chip.time() == moment(wanted)
    chip.now += later
    assert chip.time() == moment(wanted + later)


@given(st.lists(st.integers(0, 0xFF), min_size=8, max_size=8), MODES)
def test_nonsense_in_the_fields_never_breaks_the_clock(fields: list[int], mode: int) -> None:
    chip = Chip(1_700_000_000)
    chip.outb(REG_B, mode | SET)
    for index, value in zip((0, 2, 4, 6, 7, 8, 9, CENTURY), fields, strict=True):
        chip.outb(index, value)
    chip.outb(REG_B, mode)
    assert 1970 <= chip.time().year <= 10_000


@given(st.integers(0, 0xFF))
def test_an_update_is_never_seen_in_progress(value: int) -> None:
    chip = Chip(0.999_999)
    chip.outb(REG_A, value)
    assert not chip.inb(REG_A) & 0x80


def test_fields_stand_still_while_set_is_on() -> None:
    chip = Chip(1_000_000_000)
    chip.outb(REG_B, SET | HOURS_24)
    before = [chip.inb(index) for index in (0, 2, 4, 7, 8, 9)]
    chip.now += 86_399
    assert [chip.inb(index) for index in (0, 2, 4, 7, 8, 9)] == before
    chip.outb(REG_B, HOURS_24)


@given(st.binary(min_size=114, max_size=114))
def test_the_rest_is_memory_but_for_the_century(data: bytes) -> None:
    chip = Chip(0)
    places = [index for index in range(0x0E, 0x80) if index != CENTURY]
    for index, value in zip(places, data, strict=False):
        chip.outb(index, value)
    assert bytes(chip.inb(index) for index in places) == data[: len(places)]


def test_bit_7_of_the_index_masks_nmi_and_selects_nothing() -> None:
    chip = Chip(0)
    chip.outb(0x0E, 0x5A)
    assert chip.inb(0x8E) == 0x5A


def test_no_interrupt_is_ever_reported() -> None:
    chip = Chip(0)
    chip.outb(REG_B, 0x70 | HOURS_24)
    chip.outb(REG_C, 0xFF)
    assert chip.inb(REG_C) == 0


def test_by_default_it_tells_the_host_s_time() -> None:
    chip = Chip(0)
    chip.device = Rtc()
    before = int(time.time())
    told, again = chip.time(), chip.time()
    while told != again:  # a second ended while it was read
        told, again = again, chip.time()
    assert before <= told.timestamp() <= time.time()
