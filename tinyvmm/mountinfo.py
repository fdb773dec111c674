"""The mount table, as the kernel tells it: proc_pid_mountinfo(5)."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from tinyvmm.named import NamedTuple

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount. `dev` is its files' st_dev; `kind` the type, without a subtype (`fuse.sshfs`)."""

    dev: int
    point: bytes
    kind: str
    options: bytes
    """The super block's; what is escaped in them still is."""


def mounts(table: Iterable[bytes]) -> Iterator[Mount]:
    """Parse the lines of a table; what is no such line is passed over: a guest may have written it.

    Optional fields stand before a ` - `, of which neither they nor an escaped name have one.
    """
    for line in table:
        where, _, what = line.partition(b" - ")
        fields, kind = where.split(b" ", 5), what.rstrip(b"\n").split(b" ")
        if len(fields) < 6 or len(kind) < 3:
            continue
        with suppress(ValueError, OverflowError):
            major, minor = map(int, fields[2].split(b":"))
            type_ = os.fsdecode(kind[0].partition(b".")[0])
            yield Mount(os.makedev(major, minor), unescape(fields[4]), type_, kind[2])


def unescape(field: bytes) -> bytes:
    """Undo the kernel's escapes: white space and its like are three octal digits there."""
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field)
