"""The 9P codec: properties of every message, then bytes written by hand from the specification."""

import copy
import pickle
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ninep_messages import (
    DIALECTS,
    every_dialect,
    every_message,
    messages,
    pieces,
    spoken,
    tags,
    values_of,
)
from tinyvmm import ninep
from tinyvmm.ninep import (
    NINEP2000_L,
    Dialect,
    Dirent,
    Message,
    ProtocolError,
    Qid,
    Record,
    Rread,
    Rwalk,
    Stat,
    Tattach,
    Tclunk,
    Tread,
    Tversion,
    Twalk,
    Twrite,
)
from tinyvmm.views import scatter

# --- every message --------------------------------------------------------------------------


def test_each_dialect_has_the_messages_its_specification_lists() -> None:
    # intro(5) of Plan 9, which .u only extends; for .L enum p9_msg_t of <net/9p/9p.h> less those
    # that its client sends in the older dialects only (p9_client_* in net/9p/client.c). Terror and
    # Tlerror are numbers never sent.
    plan9 = set(range(100, 128)) - {106}
    asked = {8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 32, 40, 50, 52, 54, 70, 72, 74, 76}
    asked |= {100, 102, 104, 108, 110, 116, 118, 120, 122}
    assert set(ninep.NINEP2000.messages) == plan9
    assert set(ninep.NINEP2000_U.messages) == plan9
    assert set(NINEP2000_L.messages) == asked | {number + 1 for number in asked} | {7}


@every_message
@given(st.data(), tags)
@settings(max_examples=25, deadline=None)
def test_what_is_encoded_decodes_to_itself(
    kind: type[Message], dialect: Dialect, data: st.DataObject, tag: int
) -> None:
    message = data.draw(values_of(kind, dialect))
    wire = dialect.encode(message, tag)
    assert int.from_bytes(wire[:4], "little") == len(wire)
    assert wire[4] == kind.number
    assert int.from_bytes(wire[5:7], "little") == tag
    assert dialect.decode(wire) == (tag, message)
    assert dialect.decode(bytearray(wire)) == (tag, message)
    assert dialect.encode(message, tag) == wire


@every_message
@given(st.data())
@settings(max_examples=8, deadline=None)
def test_every_truncation_and_trailing_junk_is_refused(
    kind: type[Message], dialect: Dialect, data: st.DataObject
) -> None:
    wire = dialect.encode(data.draw(values_of(kind, dialect)), 1)
    for end in range(len(wire)):
        with pytest.raises(ProtocolError):
            dialect.decode(wire[:end])
        cut = max(end, 4).to_bytes(4, "little") + wire[4:end]  # a size that agrees
        with pytest.raises(ProtocolError):
            dialect.decode(cut)
    with pytest.raises(ProtocolError):
        dialect.decode(wire + b"\0")
    with pytest.raises(ProtocolError):
        dialect.decode((len(wire) + 1).to_bytes(4, "little") + wire[4:] + b"\0")


@every_message
@given(st.binary(max_size=200), tags)
@settings(max_examples=25, deadline=None)
def test_any_body_is_a_message_that_encodes_to_the_same_bytes_or_a_protocol_error(
    kind: type[Message], dialect: Dialect, body: bytes, tag: int
) -> None:
    wire = ninep.HEADER.pack(7 + len(body), kind.number, tag) + body
    try:
        got_tag, message = dialect.decode(wire)
    except ProtocolError:
        return
    assert type(message) is kind
    assert dialect.encode(message, got_tag) == wire


@given(spoken, st.data())
@settings(max_examples=200, deadline=None)
def test_a_message_with_bytes_changed_is_a_message_or_a_protocol_error(
    said: tuple[Dialect, Message], data: st.DataObject
) -> None:
    dialect, message = said
    wire = bytearray(dialect.encode(message, 3))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        tag, other = dialect.decode(bytes(wire))
    except ProtocolError:
        return
    assert dialect.encode(other, tag) == bytes(wire)


@given(st.sampled_from(DIALECTS), st.binary(max_size=100))
@settings(deadline=None)
def test_any_bytes_are_a_message_or_a_protocol_error(dialect: Dialect, data: bytes) -> None:
    try:
        tag, message = dialect.decode(data)
    except ProtocolError:
        return
    assert dialect.encode(message, tag) == data


@every_dialect
@pytest.mark.parametrize(
    "body",
    [
        b"\x6e\0\0" + bytes(8) + b"\xff\xff",  # Twalk of 65,535 names
        b"\x6f\0\0\xff\xff",  # Rwalk of as many qids
        b"\x75\0\0\xff\xff\xff\xff",  # Rread of 4 GiB
        b"\x76\0\0" + bytes(12) + b"\xff\xff\xff\xff",  # Twrite of them
        b"\x64\xff\xff" + bytes(4) + b"\xff\xff",  # Tversion with a long string
        b"\x7d\0\0\xff\xff\xff\xff" + bytes(60),  # Rstat
    ],
)
def test_a_count_beyond_the_message_costs_no_memory(dialect: Dialect, body: bytes) -> None:
    for size in (4 + len(body), 0xFFFF_FFFF):
        wire = size.to_bytes(4, "little") + body
        with pytest.raises(ProtocolError):  # and compile, which may take memory
            dialect.decode(wire)
        tracemalloc.start()
        with pytest.raises(ProtocolError):
            dialect.decode(wire)
        assert tracemalloc.get_traced_memory()[1] < 10_000
        tracemalloc.stop()


# --- dialects -------------------------------------------------------------------------------


EXTRAS: list[tuple[Message, str, object, bytes, str]] = [
    (ninep.Tauth(1, b"u", b"a"), "n_uname", 5, b"\5\0\0\0", ".u .L"),
    (Tattach(1, 2, b"u", b"a"), "n_uname", 5, b"\5\0\0\0", ".u .L"),
    (ninep.Rerror(b"no"), "errno", 2, b"\2\0\0\0", ".u"),
    (ninep.Tcreate(1, b"f", 0o644, 0), "extension", b"to", b"\2\0to", ".u"),
]


@pytest.mark.parametrize(("message", "field", "value", "more", "where"), EXTRAS)
def test_a_field_of_some_dialects_ends_the_message_there_and_is_its_default_elsewhere(
    message: Message, field: str, value: object, more: bytes, where: str
) -> None:
    changed = message.replace(**{field: value})
    forms = [dialect for dialect in DIALECTS if message.number in dialect.messages]
    assert len(forms) >= 2
    plain = ninep.NINEP2000.encode(message, 1)
    with pytest.raises(ProtocolError, match=field):
        ninep.NINEP2000.encode(changed, 1)
    for dialect in forms:
        if dialect.version == b"9P2000":
            assert dialect.decode(plain) == (1, message)
        else:
            assert dialect.version[6:].decode() in where.split()
            wire = dialect.encode(changed, 1)
            assert wire[4:] == plain[4:] + more
            assert dialect.decode(wire) == (1, changed)
            with pytest.raises(ProtocolError):
                dialect.decode(plain)


def test_a_message_of_another_dialect_is_refused_both_ways() -> None:
    for dialect in DIALECTS:
        for number, kind in ninep.MESSAGES.items():
            if number in dialect.messages:
                continue
            with pytest.raises(ProtocolError, match=dialect.version.decode()):
                dialect.decode(ninep.HEADER.pack(7, number, 1))
            fields: list[Any] = [0] * len(kind.fields)
            with pytest.raises(ProtocolError, match=kind.__name__):
                dialect.encode(kind(*fields), 1)


def test_the_bits_of_a_mode_begin_with_the_type_of_its_qid() -> None:
    for name in ("DIR", "APPEND", "EXCL", "MOUNT", "AUTH", "TMP", "SYMLINK", "LINK"):
        assert getattr(ninep, f"DM{name}") == getattr(ninep, f"QT{name}") << 24


def test_numbers_are_those_of_the_kernel_header() -> None:
    # <net/9p/9p.h>: enum p9_perm_t, p9_qid_t, p9_open_mode_t and the magic numbers after them
    perms = [0x80000000, 0x40000000, 0x20000000, 0x10000000, 0x08000000, 0x04000000, 0x02000000]
    perms += [0x01000000, 0x00800000, 0x00200000, 0x00100000, 0x00080000, 0x00040000, 0x00010000]
    names = "DIR APPEND EXCL MOUNT AUTH TMP SYMLINK LINK DEVICE NAMEDPIPE SOCKET SETUID SETGID"
    assert [getattr(ninep, f"DM{name}") for name in [*names.split(), "SETVTX"]] == perms
    modes = [ninep.OREAD, ninep.OWRITE, ninep.ORDWR, ninep.OEXEC, ninep.OTRUNC, ninep.ORCLOSE]
    assert [*modes, ninep.OAPPEND] == [0, 1, 2, 3, 0x10, 0x40, 0x80]
    assert (ninep.NOTAG, ninep.NOFID, ninep.MAXWELEM, ninep.IOHDRSZ) == (65535, 2**32 - 1, 16, 24)


# --- records in directories -----------------------------------------------------------------


@every_dialect
@given(st.sampled_from([Dirent, Stat]), st.binary(max_size=100))
@settings(deadline=None)
def test_any_bytes_are_directory_entries_or_a_protocol_error(
    dialect: Dialect, record: type[Record], data: bytes
) -> None:
    try:
        entries = dialect.decode_records(record, data)
    except ProtocolError:
        return
    assert dialect.encode_records(entries) == data


@given(st.lists(values_of(Dirent, NINEP2000_L), max_size=10))
@settings(deadline=None)
def test_directory_entries_decode_to_themselves(entries: list[Dirent]) -> None:
    wire = ninep.encode_records(entries)
    assert ninep.decode_records(Dirent, wire) == entries
    assert (
        b"".join(
            [
                ninep.pack_dirent(*qid, offset, dtype, len(name)) + name
                for qid, offset, dtype, name in entries
            ]
        )
        == wire
    )


@pytest.mark.parametrize("dialect", [ninep.NINEP2000, ninep.NINEP2000_U], ids=["9P2000", ".u"])
@given(st.data())
@settings(deadline=None)
def test_a_directory_of_stat_records_decodes_to_itself_and_no_part_of_it_does(
    dialect: Dialect, data: st.DataObject
) -> None:
    stats = data.draw(st.lists(values_of(Stat, dialect), min_size=1, max_size=5))
    wire = dialect.encode_records(stats)
    assert dialect.decode_records(Stat, wire) == stats
    last = 2 + int.from_bytes(dialect.encode_records(stats[-1:])[:2], "little")
    for end in range(len(wire) - last + 1, len(wire)):
        with pytest.raises(ProtocolError):
            dialect.decode_records(Stat, wire[:end])


# --- streams --------------------------------------------------------------------------------


@given(st.lists(spoken, max_size=5), st.lists(st.integers(0, 900), max_size=8))
@settings(deadline=None)
def test_a_stream_gives_the_same_messages_whole_in_pieces_and_byte_by_byte(
    said: list[tuple[Dialect, Message]], cuts: list[int]
) -> None:
    wires = [dialect.encode(message, 1) for dialect, message in said]
    stream = b"".join(wires)
    assert list(ninep.Framer(1 << 20).feed(stream)) == wires
    for parts in (pieces(stream, cuts), pieces(stream, range(len(stream)))):
        framer = ninep.Framer(max([len(wire) for wire in wires], default=7))
        assert [message for part in parts for message in framer.feed(part)] == wires
        assert framer.pending == 0


@given(spoken, st.binary(min_size=1, max_size=40))
@settings(deadline=None)
def test_what_follows_a_message_in_a_stream_is_not_part_of_it(
    said: tuple[Dialect, Message], junk: bytes
) -> None:
    wire = said[0].encode(said[1], 1)
    framer = ninep.Framer(len(wire))
    assert next(framer.feed(wire + junk)) == wire
    assert framer.pending == len(junk)


@given(st.lists(st.binary(max_size=30), max_size=10), st.integers(7, 100))
@settings(deadline=None)
def test_any_stream_gives_messages_no_larger_than_msize_or_a_protocol_error(
    parts: list[bytes], msize: int
) -> None:
    framer = ninep.Framer(msize)
    stream = b"".join(parts)
    got = b""
    try:
        for part in parts:
            for message in framer.feed(part):
                assert 7 <= len(message) <= msize
                got += message
            assert framer.pending < max(msize, 4)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            list(framer.feed(b""))
    else:
        assert framer.pending == len(stream) - len(got)
    assert stream.startswith(got)


def test_an_msize_agreed_on_holds_from_the_next_message_on() -> None:
    version, large = ninep.encode(Tversion(64, b"9P2000.L"), 0xFFFF), bytes([65]) + bytes(64)
    framer = ninep.Framer(4096)
    stream = framer.feed(version + large)
    assert next(stream) == version
    framer.msize = 64
    with pytest.raises(ProtocolError, match="65 bytes where 64"):
        next(stream)


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
@settings(deadline=None)
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


@given(st.binary(max_size=60), st.lists(st.integers(0, 80), max_size=5))
@settings(deadline=None)
def test_a_reply_finished_around_its_data_is_the_reply_encoded(
    data: bytes, cuts: list[int]
) -> None:
    views = pieces(bytes(80), cuts)
    place = ninep.room(views, Rread, len(data))
    scatter(place, data)
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


# --- messages as Python objects -------------------------------------------------------------


def test_messages_of_different_kinds_with_equal_fields_differ() -> None:
    assert Tclunk(1) == Tclunk(1)
    assert Tclunk(1) != ninep.Tremove(1)
    assert len({Tclunk(1), Tclunk(1), ninep.Tremove(1)}) == 2


def test_fields_are_taken_by_place_or_by_name_and_all_are_needed() -> None:
    assert Tread(1, count=3, offset=2) == Tread(1, 2, 3)
    assert Tattach(0, 1, uname=b"u", aname=b"a").n_uname == ninep.NONUNAME
    assert Tread(1, 2, 3).replace(offset=5) == Tread(1, 5, 3)
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
    ids=lambda message: repr(message)[:40],
)
def test_what_does_not_fit_the_wire_is_a_protocol_error(message: Message) -> None:
    with pytest.raises(ProtocolError):
        ninep.encode(message, 0)


def test_the_codec_stands_alone() -> None:
    code = "import sys, tinyvmm.ninep; print(sorted(m for m in sys.modules if m[:7] == 'tinyvmm'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['tinyvmm', 'tinyvmm.grammar', 'tinyvmm.ninep', 'tinyvmm.views']"
