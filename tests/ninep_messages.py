"""Messages of every kind in every dialect, for hypothesis: what the codec's tests share."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import strategies as st

from tinyvmm import ninep
from tinyvmm.ninep import NINEP2000_L, Dialect, Message, Qid, Record, Stat

DIALECTS = list(ninep.DIALECTS.values())
FORMS = [(kind, dialect) for dialect in DIALECTS for kind in dialect.messages.values()]


def each_form(forms: list[tuple[type[Message], Dialect]]) -> pytest.MarkDecorator:
    """Run a test for each of these messages, each in its dialect."""
    names = [f"{kind.__name__}-{dialect.version.decode()}" for kind, dialect in forms]
    return pytest.mark.parametrize(("kind", "dialect"), forms, ids=names)


every_message = each_form(FORMS)
every_dialect = pytest.mark.parametrize(
    "dialect", DIALECTS, ids=lambda dialect: dialect.version.decode()
)

tags = st.integers(0, 0xFFFF)


def values_of(
    record: type[Record],
    dialect: Dialect,
    strings: st.SearchStrategy[bytes] | None = None,
    small: int = 255,
) -> st.SearchStrategy[Any]:
    """Any record of this kind, from its grammar as a reader sees it, not as the codec parses it.

    `strings` are what its strings are, `small` the most its integers of one byte are.
    """
    string = st.binary(max_size=300) if strings is None else strings
    short = st.binary(max_size=20) if strings is None else strings
    qid = st.builds(
        Qid, st.integers(0, small), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
    )
    grammar = (record.__doc__ or "").split("\n\n")[0]
    widths = {"1": 8, "2": 16, "4": 32, "8": 64}
    fields = {}
    for name in record.fields:
        marks = re.search(rf"\b{name}\[\w+\]\{{(.*?)\}}", grammar)
        if marks and dialect.version[6:].decode() not in marks[1].split(","):
            continue  # has its default
        if re.search(rf"\*\({name}\[s\]\)", grammar):
            strategy: st.SearchStrategy[Any] = st.lists(short, max_size=20).map(tuple)
        elif re.search(rf"\*\({name}\[13\]\)", grammar):
            strategy = st.lists(qid, max_size=20).map(tuple)
        elif re.search(rf"\b{name}\[13\]", grammar):
            strategy = qid
        elif re.search(rf"\b{name}\[s\]", grammar):
            strategy = string
        elif re.search(rf"\b{name}\[n\]", grammar):
            strategy = values_of(Stat, dialect, strings, small)
        elif width := re.search(rf"\b{name}\[([1248])\]", grammar):
            most = (1 << widths[width[1]]) - 1
            strategy = st.integers(0, small if width[1] == "1" else most)
        else:
            assert re.search(rf"count\[4\] {name}\[count\]", grammar), name
            strategy = st.binary(max_size=300)
        fields[name] = strategy
    return st.fixed_dictionaries(fields).map(lambda named: record(**named))


messages = st.one_of([values_of(kind, NINEP2000_L) for kind in NINEP2000_L.messages.values()])
spoken = st.sampled_from(DIALECTS).flatmap(
    lambda dialect: st.tuples(
        st.just(dialect),
        st.one_of([values_of(kind, dialect) for kind in dialect.messages.values()]),
    )
)
"""A dialect and a message in it."""


def pieces(data: bytes, cuts: Sequence[int]) -> list[memoryview]:
    """The bytes as a descriptor chain would hold them: writable memory, cut anywhere."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    starts = [0, *ends]
    return [
        memoryview(bytearray(data[start:end])) for start, end in zip(starts, ends, strict=False)
    ]
