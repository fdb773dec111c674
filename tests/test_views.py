"""Bytes that lie in several pieces."""

import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ninep_messages import pieces
from tinyvmm.views import cut, scatter, size_of

CUTS = st.lists(st.integers(0, 50), max_size=5)


@given(CUTS, st.integers(0, 60), st.integers(0, 60) | st.just(sys.maxsize))
@settings(deadline=None)
def test_cut_gives_the_same_bytes_as_a_slice(cuts: list[int], start: int, count: int) -> None:
    data = bytes(range(50))
    views = pieces(data, cuts)
    assert size_of(views) == 50
    assert b"".join(cut(views, start, count)) == data[start : start + count]
    assert b"".join(cut(views, start)) == data[start:]


@given(CUTS, st.binary(max_size=60), st.integers(0, 60))
@settings(deadline=None)
def test_scatter_fills_what_there_is_room_for_and_nothing_else(
    cuts: list[int], data: bytes, start: int
) -> None:
    views = pieces(bytes(50), cuts)
    room = max(50 - start, 0)
    fits = data[:room]
    assert scatter(views, data, start) == len(fits)
    assert b"".join(views) == (bytes(start) + fits + bytes(50))[:50]
