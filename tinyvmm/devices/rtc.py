"""CMOS real-time clock: what time it is, and 114 bytes of memory.

Model: Motorola MC146818A (data sheet, "Registers"), with a century byte at 0x32 as the FADT names
it. Ports 0x70 (index; bit 7, the NMI mask, is ignored) and 0x71 (data). No interrupt: the ACPI
tables name none, so Linux offers no alarms instead of alarms that never come.

The time is the host's, in UTC, plus what the guest has set it off by. A guest sets it as the data
sheet demands: SET in register B, then the fields, then SET off. UIP in register A is never seen
set: there is no moment when a field is unstable, and a guest that reads all-ones here waits many
seconds for an update to end. Fields read one after another may still lie a second apart, so a
careful guest reads the seconds before and after, as on the real chip.

Not emulated: alarm, periodic and update-ended interrupts (their enable bits and the alarm's bytes
are stored, register C reads as none), daylight saving, the divider's reset, and fields written
while SET is off, which are lost.

Threads: vCPUs only; `_lock` guards index, memory and offset.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from tinyvmm.devices.device import Device

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
REG_A_DIVIDER = 0x26  # 32.768 kHz, 1024 Hz; UIP (bit 7) clear
REG_B_24_HOURS, REG_B_BINARY, REG_B_SET = 1 << 1, 1 << 2, 1 << 7
REG_D_VALID = 1 << 7
HOURS_PM = 1 << 7
TIME_FIELDS = frozenset((SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY))


class Rtc(Device):
    """Index and data port, over 128 bytes."""

    name = "rtc"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Tell the time of `clock`, in seconds since 1970 UTC."""
        self._clock = clock
        self._lock = threading.Lock()
        self._index = 0
        self._offset = 0
        self._cmos = bytearray(128)
        self._cmos[REG_A] = REG_A_DIVIDER
        self._cmos[REG_B] = REG_B_24_HOURS
        self._cmos[REG_D] = REG_D_VALID

    def read(self, offset: int, size: int) -> int:
        """Answer the byte under the index; the index itself cannot be read."""
        if size != 1 or offset != 1:
            return (1 << 8 * size) - 1
        with self._lock:
            index = self._index
            if index in TIME_FIELDS and not self._cmos[REG_B] & REG_B_SET:
                return self._time_fields()[index]
            return self._cmos[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the index, or write the byte under it."""
        if size != 1:
            return
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
            elif self._index == REG_B:
                self._write_reg_b(value)
            elif self._index == REG_A:
                self._cmos[REG_A] = value & 0x7F
            elif self._index not in {REG_C, REG_D}:
                self._cmos[self._index] = value

    def _write_reg_b(self, value: int) -> None:
        begins = value & ~self._cmos[REG_B] & REG_B_SET
        ends = self._cmos[REG_B] & ~value & REG_B_SET
        if begins:
            for index, field in self._time_fields().items():
                self._cmos[index] = field
        self._cmos[REG_B] = value
        if ends:
            self._set_time()

    def _time_fields(self) -> dict[int, int]:
        now = time.gmtime(self._clock() + self._offset)
        hours = now.tm_hour
        afternoon = 0
        if not self._cmos[REG_B] & REG_B_24_HOURS:
            afternoon = HOURS_PM if hours >= 12 else 0
            hours = hours % 12 or 12
        fields = {
            SECONDS: now.tm_sec,
            MINUTES: now.tm_min,
            HOURS: hours,
            WEEKDAY: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1
            DAY: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100,
        }
        encoded = {index: self._encode(value) for index, value in fields.items()}
        encoded[HOURS] |= afternoon
        return encoded

    def _set_time(self) -> None:
        """Take the fields the guest wrote as the time; nonsense leaves the clock as it was."""
        get = {index: self._decode(self._cmos[index]) for index in TIME_FIELDS}
        hours = get[HOURS]
        if not self._cmos[REG_B] & REG_B_24_HOURS:
            hours = self._decode(self._cmos[HOURS] & ~HOURS_PM) % 12
            hours += 12 if self._cmos[HOURS] & HOURS_PM else 0
        year = get[CENTURY] * 100 + get[YEAR]
        valid = 1970 <= year <= 9999 and 1 <= get[MONTH] <= 12 and 1 <= get[DAY] <= 31
        if not (valid and hours < 24 and get[MINUTES] < 60 and get[SECONDS] < 60):
            return
        days = _days_since_1970(year, get[MONTH], get[DAY])
        when = days * 86400 + hours * 3600 + get[MINUTES] * 60 + get[SECONDS]
        self._offset = when - int(self._clock())

    def _encode(self, value: int) -> int:
        return value if self._cmos[REG_B] & REG_B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._cmos[REG_B] & REG_B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def save(self) -> dict[str, Any]:
        """Return index, memory and the offset to the host's clock."""
        with self._lock:
            return {"index": self._index, "cmos": self._cmos.hex(), "offset": self._offset}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        with self._lock:
            self._index, self._offset = state["index"], state["offset"]
            self._cmos = bytearray.fromhex(state["cmos"])


def _days_since_1970(year: int, month: int, day: int) -> int:
    """Count days in the Gregorian calendar, in years that begin in March: leap days come last."""
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    leap_days = year // 4 - year // 100 + year // 400
    return year * 365 + leap_days + (153 * month + 2) // 5 + day - 1 - 719468
