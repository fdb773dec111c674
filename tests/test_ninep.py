"""The 9P codec: properties of every message, then bytes written by hand from the specification."""

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm import ninep
from tinyvmm.ninep import (
    Dirent,
    Message,
    ProtocolError,
    Qid,
    Rgetattr,
    Rlerror,
    Rread,
    Rreaddir,
    Rversion,
    Rwalk,
    Tattach,
    Tclunk,
    Tlcreate,
    Tread,
    Tversion,
    Twalk,
    Twrite,
)

KINDS = sorted(ninep.MESSAGES.values(), key=lambda kind: kind.number)
every_message = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

qids = st.builds(
    Qid, st.integers(0, 255), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
)
tags = st.integers(0, 0xFFFF)


def values_of(record: type[ninep.Record]) -> st.SearchStrategy[Any]:
    """Any record of this kind, from its grammar as a reader sees it, not as the codec parses it."""
    grammar = (record.__doc__ or "").split("\n\n")[0]
    widths = {"1": 8, "2": 16, "4": 32, "8": 64}
    fields = {}
    for name in record.fields:
        if re.search(rf"\*\({name}\[s\]\)", grammar):
            strategy: st.SearchStrategy[Any] = st.lists(st.binary(max_size=20), max_size=20).map(
                tuple
            )
        elif re.search(rf"\*\({name}\[13\]\)", grammar):
            strategy = st.lists(qids, max_size=20).map(tuple)
        elif re.search(rf"\b{name}\[13\]", grammar):
            strategy = qids
        elif re.search(rf"\b{name}\[s\]", grammar):
            strategy = st.binary(max_size=300)
        elif width := re.search(rf"\b{name}\[([1248])\]", grammar):
            strategy = st.integers(0, (1 << widths[width[1]]) - 1)
        else:
            assert re.search(rf"count\[4\] {name}\[count\]", grammar), name
            strategy = st.binary(max_size=300)
        fields[name] = strategy
    return st.fixed_dictionaries(fields).map(lambda named: record(**named))


messages = st.one_of([values_of(kind) for kind in KINDS])


def pieces(data: bytes, cuts: Sequence[int]) -> list[memoryview]:
    """The bytes as a descriptor chain would hold them: writable memory, cut anywhere."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    starts = [0, *ends]
    return [
        memoryview(bytearray(data[start:end])) for start, end in zip(starts, ends, strict=False)
    ]


# --- every message --------------------------------------------------------------------------


def test_the_messages_are_those_of_the_kernel_header_for_this_dialect() -> None:
    # <net/9p/9p.h>, enum p9_msg_t; Terror and Tlerror are numbers never sent, and 106..127 keep
    # five pairs and Rerror for the older dialects.
    requests = {8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 32, 40, 50, 52, 54, 70, 72, 74, 76}
    requests |= {100, 102, 104, 108, 110, 116, 118, 120, 122}
    assert set(ninep.MESSAGES) == requests | {number + 1 for number in requests} | {7}


@every_message
def test_grammar_names_and_types_every_annotated_field(kind: type[Message]) -> None:
    ninep.codec_of(kind)  # AssertionError where they disagree


@every_message
@given(st.data(), tags)
@settings(max_examples=40, deadline=None)
def test_what_is_encoded_decodes_to_itself(
    kind: type[Message], data: st.DataObject, tag: int
) -> None:
    message = data.draw(values_of(kind))
    wire = ninep.encode(message, tag)
    assert int.from_bytes(wire[:4], "little") == len(wire)
    assert wire[4] == kind.number
    assert int.from_bytes(wire[5:7], "little") == tag
    assert ninep.decode(wire) == (tag, message)
    assert ninep.encode(message, tag) == wire


@every_message
@given(st.data())
@settings(max_examples=10, deadline=None)
def test_every_truncation_and_trailing_junk_is_refused(
    kind: type[Message], data: st.DataObject
) -> None:
    wire = ninep.encode(data.draw(values_of(kind)), 1)
    for end in range(len(wire)):
        with pytest.raises(ProtocolError):
            ninep.decode(wire[:end])
        cut = max(end, 4).to_bytes(4, "little") + wire[4:end]  # a size that agrees
        with pytest.raises(ProtocolError):
            ninep.decode(cut)
    with pytest.raises(ProtocolError):
        ninep.decode(wire + b"\0")
    with pytest.raises(ProtocolError):
        ninep.decode((len(wire) + 1).to_bytes(4, "little") + wire[4:] + b"\0")


@given(st.sampled_from(KINDS), st.binary(max_size=200), tags)
@settings(max_examples=1000, deadline=None)
def test_any_body_is_a_message_that_encodes_to_the_same_bytes_or_a_protocol_error(
    kind: type[Message], body: bytes, tag: int
) -> None:
    wire = ninep.HEADER.pack(7 + len(body), kind.number, tag) + body
    try:
        got_tag, message = ninep.decode(wire)
    except ProtocolError:
        return
    assert type(message) is kind
    assert ninep.encode(message, got_tag) == wire


@given(messages, st.data())
@settings(max_examples=500, deadline=None)
def test_a_message_with_bytes_changed_is_a_message_or_a_protocol_error(
    message: Message, data: st.DataObject
) -> None:
    wire = bytearray(ninep.encode(message, 3))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        tag, other = ninep.decode(bytes(wire))
    except ProtocolError:
        return
    assert ninep.encode(other, tag) == bytes(wire)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        tag, message = ninep.decode(data)
    except ProtocolError:
        return
    assert ninep.encode(message, tag) == data


@given(st.binary(max_size=100))
def test_any_bytes_are_directory_entries_or_a_protocol_error(data: bytes) -> None:
    try:
        entries = ninep.decode_records(Dirent, data)
    except ProtocolError:
        return
    assert ninep.encode_records(entries) == data


@given(st.lists(values_of(Dirent), max_size=10))
def test_directory_entries_decode_to_themselves(entries: list[Dirent]) -> None:
    wire = ninep.encode_records(entries)
    assert ninep.decode_records(Dirent, wire) == entries
    assert b"".join([ninep.encode_dirent(*entry) for entry in entries]) == wire


# --- descriptor chains ----------------------------------------------------------------------


@given(messages, tags, st.lists(st.integers(0, 80), max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_message_cut_into_views_anywhere_decodes_as_when_whole(
    message: Message, tag: int, cuts: list[int]
) -> None:
    wire = ninep.encode(message, tag)
    views = pieces(wire, cuts)
    got_tag, got = ninep.decode_views(views, len(wire))
    assert ninep.encode(got, got_tag) == wire
    if not isinstance(message, Twrite):
        assert got == message
    with pytest.raises(ProtocolError):
        ninep.decode_views(views, len(wire) - 1)


@given(st.binary(min_size=1, max_size=100), st.lists(st.integers(0, 80), max_size=6))
def test_the_data_of_a_write_stays_in_its_memory(data: bytes, cuts: list[int]) -> None:
    views = pieces(ninep.encode(Twrite(1, 2, data), 3), cuts)
    _, message = ninep.decode_views(views, 1000)
    assert isinstance(message, Twrite)
    assert isinstance(message.data, list)
    assert b"".join(message.data) == data
    memory = {id(view.obj) for view in views}
    assert all(id(piece.obj) in memory for piece in message.data)


@given(st.data(), st.lists(st.integers(0, 120), max_size=6))
@settings(max_examples=300, deadline=None)
def test_views_of_any_bytes_are_a_message_or_a_protocol_error(
    data: st.DataObject, cuts: list[int]
) -> None:
    body = data.draw(st.binary(max_size=100))
    number = data.draw(st.sampled_from([Twrite.number, Twalk.number, Tread.number, 0]))
    size = data.draw(st.sampled_from([len(body) + 7, len(body), 0, 1 << 31]))
    wire = ninep.HEADER.pack(size, number, 1) + body
    wire = wire[: data.draw(st.integers(0, len(wire)))]
    try:
        tag, message = ninep.decode_views(pieces(wire, cuts), 1000)
    except ProtocolError:
        return
    assert ninep.encode(message, tag) == wire


def test_no_views_at_all_are_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        ninep.decode_views([], 100)


@given(st.integers(0, 60), st.integers(0, 60), st.lists(st.integers(0, 50), max_size=5))
def test_cut_gives_the_same_bytes_as_a_slice(start: int, count: int, cuts: list[int]) -> None:
    data = bytes(range(50))
    assert b"".join(ninep.cut(pieces(data, cuts), start, count)) == data[start : start + count]


@given(st.binary(max_size=60), st.lists(st.integers(0, 50), max_size=5))
def test_scatter_fills_the_first_bytes_and_no_others(data: bytes, cuts: list[int]) -> None:
    views = pieces(bytes(50), cuts)
    if len(data) > 50:
        with pytest.raises(ProtocolError):
            ninep.scatter(views, data)
    else:
        assert ninep.scatter(views, data) == len(data)
        assert b"".join(views) == data + bytes(50 - len(data))


@given(st.binary(max_size=60), st.lists(st.integers(0, 80), max_size=5))
def test_a_reply_finished_around_its_data_is_the_reply_encoded(
    data: bytes, cuts: list[int]
) -> None:
    views = pieces(bytes(80), cuts)
    place = ninep.room(views, Rread, len(data))
    ninep.scatter(place, data)
    size = ninep.encode_views(views, Rread(place), 9, 80)
    assert b"".join(views)[:size] == ninep.encode(Rread(data), 9)
    with pytest.raises(ProtocolError):
        ninep.encode_views(views, Rread(place), 9, size - 1)


@given(messages, st.lists(st.integers(0, 80), max_size=5))
@settings(deadline=None)
def test_a_reply_is_written_across_views_as_it_is_encoded(
    message: Message, cuts: list[int]
) -> None:
    wire = ninep.encode(message, 4)
    views = pieces(bytes(len(wire)), cuts)
    assert ninep.encode_views(views, message, 4, len(wire)) == len(wire)
    assert b"".join(views) == wire
    with pytest.raises(ProtocolError):
        ninep.encode_views(pieces(bytes(len(wire) - 1), cuts), message, 4, len(wire))


# --- golden bytes: intro(5), <net/9p/9p.h> and the format strings of net/9p/client.c ---------


@pytest.mark.parametrize(
    ("message", "tag", "wire"),
    [
        (Tversion(8192, b"9P2000.L"), 0xFFFF, "15000000 64 ffff 00200000 0800 3950323030302e4c"),
        (Rversion(8192, b"unknown"), 0xFFFF, "14000000 65 ffff 00200000 0700 756e6b6e6f776e"),
        (
            Tattach(0, ninep.NOFID, b"root", b"/", 0),
            1,
            "1c000000 68 0100 00000000 ffffffff 0400 726f6f74 0100 2f 00000000",
        ),
        (
            Twalk(1, 2, (b"usr", b"lib")),
            0x0203,
            "1b000000 6e 0302 01000000 02000000 0200 0300 757372 0300 6c6962",
        ),
        (
            Rwalk((Qid(0x80, 7, 0x0102030405060708),)),
            5,
            "16000000 6f 0500 0100 80 07000000 0807060504030201",
        ),
        (Rlerror(2), 5, "0b000000 07 0500 02000000"),
        (
            Tlcreate(3, b"f", 0o100102, 0o644, 100),
            0,
            "1a000000 0e 0000 03000000 0100 66 42800000 a4010000 64000000",
        ),
        (
            Tread(4, 1 << 32, 512),
            9,
            "17000000 74 0900 04000000 0000000001000000 00020000",
        ),
        (Rread(b"abc"), 9, "0e000000 75 0900 03000000 616263"),
        (
            Twrite(4, 1, b"abc"),
            9,
            "1a000000 76 0900 04000000 0100000000000000 03000000 616263",
        ),
        (Tclunk(0xDEADBEEF), 1, "0b000000 78 0100 efbeadde"),
        (
            ninep.Tgetlock(1, 2, 3, 4, 5, b"vm"),
            0,
            "24000000 36 0000 01000000 02 0300000000000000 0400000000000000 05000000 0200 766d",
        ),
        (
            Rreaddir(ninep.encode_records([Dirent(Qid(0, 1, 2), 3, 8, b"x")])),
            0,
            "24000000 29 0000 19000000 00 01000000 0200000000000000 0300000000000000 08 0100 78",
        ),
        (
            ninep.Tunlinkat(1, b"d", 0x200),
            0,
            "12000000 4c 0000 01000000 0100 64 00020000",
        ),
    ],
)
def test_golden_bytes(message: Message, tag: int, wire: str) -> None:
    expected = bytes.fromhex(wire)
    assert ninep.encode(message, tag) == expected
    assert ninep.decode(expected) == (tag, message)


def test_getattr_reply_has_the_size_the_kernel_reads() -> None:
    # p9pdu_vreadf 'A': q Q d u g then fifteen q: 8 + 13 + 3*4 + 15*8 after the header.
    reply = Rgetattr(0x7FF, Qid(0, 0, 0), *range(3), *range(15))
    assert len(ninep.encode(reply, 0)) == 7 + 8 + 13 + 12 + 120


# --- messages as Python objects -------------------------------------------------------------


def test_messages_of_different_kinds_with_equal_fields_differ() -> None:
    assert Tclunk(1) == Tclunk(1)
    assert Tclunk(1) != ninep.Tremove(1)
    assert len({Tclunk(1), Tclunk(1), ninep.Tremove(1)}) == 2


def test_fields_are_taken_by_place_or_by_name_and_all_are_needed() -> None:
    assert Tread(1, count=3, offset=2) == Tread(1, 2, 3)
    for bad in ({"fid": 1, "offset": 2}, {"fid": 1, "offset": 2, "counts": 3}):
        with pytest.raises(TypeError, match="fid, offset, count"):
            Tread(**bad)
    with pytest.raises(TypeError):
        Tread(1, 2, 3, 4)  # type: ignore[call-arg]


def test_messages_show_print_copy_and_pickle() -> None:
    message = Twalk(1, 2, (b"etc",))
    assert repr(message) == "Twalk(fid=1, newfid=2, wname=(b'etc',))"
    assert copy.copy(message) == message
    assert pickle.loads(pickle.dumps(message)) == message  # noqa: S301 (our own bytes)
    with pytest.raises(AttributeError):
        message.fid = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "message",
    [
        Tclunk(-1),
        Tclunk(1 << 32),
        Twalk(1, 2, (b"x" * 65536,)),
        Tversion(1, b"v" * 65536),
        Rwalk((Qid(0, 0, 0),) * 65536),
        Rwalk((Qid(256, 0, 0),)),
    ],
    ids=repr,
)
def test_what_does_not_fit_the_wire_is_a_protocol_error(message: Message) -> None:
    with pytest.raises(ProtocolError):
        ninep.encode(message, 0)


def test_the_codec_stands_alone() -> None:
    code = (
        "import sys, tinyvmm.ninep as n; print([m for m in sys.modules if m.startswith('tinyvmm')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['tinyvmm', 'tinyvmm.ninep']"
