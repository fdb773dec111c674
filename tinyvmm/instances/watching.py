"""Looking on while a machine runs: traces for a client of its control socket, and device debugging.

A client that asks for a trace is notified of each record from then on. What it reads too slowly is
dropped and counted, never waited for: records come from vCPU threads. Devices in debugging, chosen
by a regular expression of their names, leave the last of what they do in a log.
"""

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from tinyvmm import trace
from tinyvmm.errors import ConfigError
from tinyvmm.instances.control import Client, remote
from tinyvmm.instances.control_schema import limits

if TYPE_CHECKING:
    from tinyvmm.machine import Machine

LOG_LINES = 2000
NAMES_KNOWN = 1024
PATTERN_MAX = 200

Pattern = Annotated[str, limits(maxLength=PATTERN_MAX)]
Kinds = list[Annotated[str, limits(enum=tuple(sorted(trace.KINDS)))]]


class Names:
    """Those names that a regular expression matches as a whole.

    The expression is a client's, and matching holds the interpreter: so what can take exponential
    time, a repeated group, or much of polynomial time, many repetitions, is refused.
    """

    def __init__(self, pattern: str | None) -> None:
        """ConfigError for what is no such expression; None matches nothing."""
        self._known: dict[str, bool] = {}
        self._compiled = None
        if pattern is None:
            return
        repeated = re.search(r"\)[*+?{]", pattern)
        if repeated or len(re.findall(r"[*+?{]", pattern)) > 4 or len(pattern) > PATTERN_MAX:
            raise ConfigError(f"{pattern!r} is too much: no repeated groups, 4 repetitions at most")
        try:
            self._compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None

    def __contains__(self, name: str) -> bool:
        if self._compiled is None:
            return False
        found = self._known.get(name)
        if found is None:
            found = self._compiled.fullmatch(name[:256]) is not None
            if len(self._known) < NAMES_KNOWN:
                self._known[name] = found
        return found


class TraceRecord(TypedDict):
    """Something happened between guest and machine; so many before it were `lost`."""

    time: float
    device: str | None
    kind: str
    text: str
    record: dict[str, Any]
    lost: int


class _Trace:
    """What one client wants to be told."""

    def __init__(
        self,
        client: Client,
        kinds: list[str],
        names: Names | None,
        name_of: Callable[[trace.Record], str | None],
    ) -> None:
        self._client = client
        self._kinds = [(kind, trace.KINDS[kind]) for kind in kinds]
        self._names = names
        self._name_of = name_of
        self._lost = 0

    def __call__(self, record: trace.Record) -> None:
        kind = next((kind for kind, is_kind in self._kinds if is_kind(record)), None)
        if kind is None:
            return
        name = self._name_of(record)
        if self._names is not None and (name is None or name not in self._names):
            return
        if not self._client.has_room:
            self._lost += 1
            return
        told: TraceRecord = {
            "time": time.time(),
            "device": name,
            "kind": kind,
            "text": trace.text(record),
            "record": trace.fields(record),
            "lost": self._lost,
        }
        if self._client.notify("trace_record", told):
            self._lost = 0
        else:
            self._lost += 1


class Watching:
    """Traces and debugging of the machine that `machine` returns, if there is one."""

    def __init__(self, machine: "Callable[[], Machine | None]") -> None:
        self._machine = machine
        self._lock = threading.Lock()  # guards _traces, and that _debug is watching
        self._traces: dict[Client, _Trace] = {}
        self.debugged = Names(None)
        self._pattern: str | None = None
        self._log: deque[str] = deque(maxlen=LOG_LINES)

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return every method by its name on the wire."""
        return {
            "trace": self.subscribe,
            "untrace": self.unsubscribe,
            "device_debug": self.device_debug,
            "debug_log": self.debug_log,
        }

    @remote(client=True)
    def subscribe(
        self,
        *,
        client: Client,
        kinds: Kinds | None = None,
        device: Pattern | None = None,
    ) -> None:
        """Notify this client of each `trace_record` of these kinds, or all, from now on.

        `device` is a regular expression: only records of devices whose whole name matches.
        """
        names = None if device is None else Names(device)
        watcher = _Trace(
            client, list(trace.KINDS if kinds is None else kinds), names, self._name_of
        )
        with self._lock:
            old = self._traces.get(client)
            self._traces[client] = watcher
        if old is not None:
            trace.unwatch(old)
        trace.watch(watcher)
        client.when_gone(self._gone)

    @remote(client=True)
    def unsubscribe(self, *, client: Client) -> None:
        """End what `trace` began."""
        with self._lock:
            old = self._traces.pop(client, None)
        if old is not None:
            trace.unwatch(old)

    def _gone(self, client: Client) -> None:
        self.unsubscribe(client=client)

    def device_debug(self, *, pattern: Pattern | None) -> list[str]:
        """Debug those devices whose whole name matches, and no other; null for none.

        What they do from now on is kept in `debug_log`. Returns their names.
        """
        self.debugged = names = Names(pattern)
        with self._lock:
            trace.unwatch(self._debug)
            if pattern is not None:
                trace.watch(self._debug)
        machine = self._machine()
        if machine is None:
            return []
        buses = (machine.ports, machine.mmio)
        found = [device.name for device in machine.virtio_devices]
        found += [device.name for bus in buses for _, _, device in bus.ranges]
        return sorted({name for name in found if name in names})

    def debug_log(self, *, clear: bool = False) -> list[str]:
        """Return what debugged devices did, the last 2,000 lines of it."""
        lines = list(self._log)
        if clear:
            self._log.clear()
        return lines

    def close(self) -> None:
        """End every trace."""
        for client in list(self._traces):
            self.unsubscribe(client=client)
        trace.unwatch(self._debug)

    def _debug(self, record: trace.Record) -> None:
        name = self._name_of(record)
        if name is not None and name in self.debugged:
            self._log.append(f"{time.time():.6f} {name}: {trace.text(record)}")

    def _name_of(self, record: trace.Record) -> str | None:
        """Return the name of the device that a record is of."""
        if isinstance(record, trace.Message):
            return record.device
        if isinstance(record, trace.NineP):
            return f"virtio-9p {record.session}"
        machine = self._machine()
        if machine is None:
            return None
        bus = machine.ports if record.space == "port" else machine.mmio
        found = bus.find(record.address, record.size)
        return None if found is None else found[0].name
