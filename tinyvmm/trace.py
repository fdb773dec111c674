"""Tracing: one hook, typed records, no cost when off.

Whoever wants to watch sets `hook` to a function of one record. A place worth watching says

    if trace.hook is not None:
        trace.hook(trace.Access("port", "write", 0x3F8, 1, 0x41))

so that a machine nobody watches pays one attribute load. Records are tuples with a name and named
fields: `text` renders one for people, `_asdict()` for programs. The hook is called on the thread
where the event happened, vCPU threads included, and must not raise.
"""

from collections.abc import Callable
from typing import NamedTuple


class Access(NamedTuple):
    """A guest's access to an address that left KVM: `space` is "port" or "mmio"."""

    space: str
    direction: str
    address: int
    size: int
    value: int


class Unclaimed(NamedTuple):
    """An access no device answers: reads gave all-ones, writes were dropped."""

    space: str
    direction: str
    address: int
    size: int
    value: int


class Message(NamedTuple):
    """Anything a device wants to say of its guest, e.g. why it set DEVICE_NEEDS_RESET."""

    device: str
    message: str


Record = Access | Unclaimed | Message

hook: Callable[[Record], None] | None = None


def text(record: Record) -> str:
    """Render one record as a line for people."""
    if isinstance(record, Message):
        return f"{record.device}: {record.message}"
    kind = "" if isinstance(record, Access) else " (nobody's)"
    arrow = "->" if record.direction == "read" else "<-"
    digits = record.size * 2
    return f"{record.space} {record.address:#06x} {arrow} {record.value:#0{digits + 2}x}{kind}"
