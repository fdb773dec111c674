"""Tracing: one hook, typed records, no cost when off.

Whoever wants to watch sets `hook` to a function of one record. A place worth watching says

    if trace.hook is not None:
        trace.hook(trace.Access("port", "write", 0x3F8, 1, 0x41))

so that a machine nobody watches pays one attribute load. Records are tuples with a name and named
fields: `text` renders one for people, `fields` for programs. The hook is called on the thread where
the event happened, vCPU threads included, and must not raise.
"""

import threading
from collections.abc import Callable
from typing import Any

from tinyvmm.named import NamedTuple


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


class NineP(NamedTuple):
    """A 9P message as it is taken or sent: a request, or the reply of the same tag."""

    session: str
    tag: int
    message: object


Record = Access | Unclaimed | Message | NineP

KINDS: dict[str, Callable[[Record], bool]] = {
    "9p": lambda record: isinstance(record, NineP),
    "port": lambda record: isinstance(record, Access | Unclaimed) and record.space == "port",
    "mmio": lambda record: isinstance(record, Access | Unclaimed) and record.space == "mmio",
    "device": lambda record: isinstance(record, Message),
}
"""What can be asked for by name."""

hook: Callable[[Record], None] | None = None

_lock = threading.Lock()  # guards _watchers
_watchers: tuple[Callable[[Record], None], ...] = ()


def watch(watcher: Callable[[Record], None]) -> None:
    """Have `watcher` see every record too, beside those that do already; from any thread."""
    with _lock:
        _set((*_watchers, watcher))


def unwatch(watcher: Callable[[Record], None]) -> None:
    """Undo `watch`; harmless if `watcher` does not see any."""
    with _lock:
        _set(tuple(other for other in _watchers if other != watcher))


def _set(watchers: tuple[Callable[[Record], None], ...]) -> None:
    global _watchers, hook
    _watchers = watchers
    hook = _tell if len(watchers) > 1 else watchers[0] if watchers else None


def _tell(record: Record) -> None:
    for watcher in _watchers:
        watcher(record)


def text(record: Record) -> str:
    """Render one record as a line for people."""
    if isinstance(record, Message):
        return f"{record.device}: {record.message}"
    if isinstance(record, NineP):
        return f"9p {record.session} {record.tag:5} {record.message!r}"
    kind = "" if isinstance(record, Access) else " (nobody's)"
    arrow = "->" if record.direction == "read" else "<-"
    digits = record.size * 2
    return f"{record.space} {record.address:#06x} {arrow} {record.value:#0{digits + 2}x}{kind}"


def fields(record: Record) -> dict[str, Any]:
    """Give a record as a dictionary of plain JSON types, `record` being what it is."""
    plain: dict[str, Any] = {"record": type(record).__name__, **record._asdict()}
    if isinstance(record, NineP):
        plain["message"] = repr(record.message)
    return plain
