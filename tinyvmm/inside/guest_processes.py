"""The processes of a guest that runs, read from its /proc (proc(5)) by calls of its kernel."""

import os
import re
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.inside.guest_calls import (
    Call,
    Guest,
    Slot,
    close,
    entries,
    newfstatat,
    openat,
    parse_stat,
    read,
    read_file,
)

PROCESSES_MAX = 1 << 16
_HERTZ = 100  # USER_HZ of x86, <asm/param.h>
_PAGE_LEN = 4096
_PASSWD_MAX = 1 << 20
_COMMAND_MAX = 4096
_UID = re.compile(r"[0-9]{1,10}")


class Process(NamedTuple):
    """One process; sizes in bytes, times in seconds."""

    pid: int
    ppid: int
    uid: int
    user: str
    """Its name, or the number where it has none."""
    state: str
    """As of ps(1): R, S, D, T, Z, I..."""
    cpu_time: float
    started: float
    """After the guest's boot."""
    resident: int
    command: str
    """Its arguments, or its name in brackets if it has none, as a kernel thread."""


def processes(guest: Guest) -> list[Process]:
    """List the guest's processes; ConfigError if its /proc is none."""
    try:
        names = users(guest)
        pids = []
        for name in entries(guest, "/proc"):
            if name.isascii() and name.isdigit():
                pids.append(int(name))
            if len(pids) > PROCESSES_MAX:
                raise ConfigError("the guest shows processes without end")
    except OSError as error:
        raise ConfigError(f"cannot read /proc in the guest: {error.strerror}") from None
    calls = [call for pid in sorted(pids) for call in _calls(pid)]
    answers = guest.all(calls)
    step = len(_calls(1))
    found = []
    for number, pid in enumerate(sorted(pids)):
        ours = answers[number * step : (number + 1) * step]
        if any(answer.result < 0 for answer in ours):
            continue  # it has ended meanwhile
        uid = parse_stat(ours[0].data).uid
        found.append(_parse(pid, uid, names.get(uid, str(uid)), ours[2].data, ours[5].data))
    return found


def _calls(pid: int) -> list[Call]:
    file = Slot(1)
    calls = [newfstatat(f"/proc/{pid}", 0)]
    for name, length in (("stat", 1024), ("cmdline", _COMMAND_MAX)):
        calls += [
            openat(f"/proc/{pid}/{name}", os.O_RDONLY, into=1),
            read(file, length),
            close(file),
        ]
    return calls


def _parse(pid: int, uid: int, user: str, stat: bytes, command: bytes) -> Process:
    """Read /proc/PID/stat, whose second field is a name that may hold anything, and cmdline."""
    name, _, rest = stat.partition(b"(")[2].rpartition(b")")
    fields = rest.split()
    try:
        state, ppid = fields[0].decode("ascii"), int(fields[1])
        utime, stime, start, pages = (_count(fields[number]) for number in (11, 12, 19, 21))
    except (IndexError, ValueError):
        raise ConfigError(f"the guest's /proc/{pid}/stat is none") from None
    words = command.rstrip(b"\0").replace(b"\0", b" ") or b"[" + name + b"]"
    return Process(
        pid=pid,
        ppid=ppid,
        uid=uid,
        user=user,
        state=state,
        cpu_time=(utime + stime) / _HERTZ,
        started=start / _HERTZ,
        resident=pages * _PAGE_LEN,
        command=words.decode(errors="replace"),
    )


def _count(field: bytes) -> int:
    """Return a number of 64 bits at most; ValueError if it is none."""
    number = int(field)
    if number.bit_length() > 64:
        raise ValueError(f"{field!r} has more than 64 bits")
    return number


def users(guest: Guest) -> dict[int, str]:
    """Return the names in the guest's /etc/passwd (passwd(5)), none if it has no such file."""
    try:
        text = read_file(guest, "/etc/passwd", _PASSWD_MAX).decode(errors="replace")
    except OSError:
        return {}
    names: dict[int, str] = {}
    for line in text.splitlines():
        name, *rest = line.split(":")
        if len(rest) > 1 and _UID.fullmatch(rest[1]):
            names.setdefault(int(rest[1]), name)
    return names
