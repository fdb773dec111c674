"""Trace records of a while, for programs: what `Machine.trace` gives."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tinyvmm import trace
from tinyvmm.errors import ConfigError
from tinyvmm.grammar import Record


class Recording:
    """A context manager: between its beginning and its end, records are kept in `records`.

    Threads: records come on any; `records` may be read meanwhile.
    """

    def __init__(self, kinds: tuple[str, ...]) -> None:
        """Record the kinds that trace.KINDS names; all of them if there are none."""
        unknown = [kind for kind in kinds if kind not in trace.KINDS]
        if unknown:
            raise ConfigError(f"no trace is named {unknown[0]!r}: give {', '.join(trace.KINDS)}")
        self.records: list[trace.Record] = []
        self._wanted = [trace.KINDS[kind] for kind in kinds or trace.KINDS]

    def _keep(self, record: trace.Record) -> None:
        if any(wants(record) for wants in self._wanted):
            self.records.append(_of_now(record))

    def __enter__(self) -> Self:
        trace.watch(self._keep)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        trace.unwatch(self._keep)

    def __iter__(self) -> Iterator[trace.Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        return "\n".join(map(trace.text, self.records))


def _of_now(record: trace.Record) -> trace.Record:
    """Copy a message's data out of the guest's RAM, which is written again, and would be held."""
    if not isinstance(record, trace.NineP) or not isinstance(record.message, Record):
        return record
    values = [b"".join(value) if _is_views(value) else value for value in record.message]
    return record._replace(message=type(record.message)(*values))


def _is_views(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, memoryview) for item in value)
