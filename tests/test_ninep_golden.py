"""The bytes of every message, beside those of three implementations that share nothing with ours.

The kernel's: `p9pdu_vwritef` of net/9p/protocol.c, written again here in Python, with the format
strings of net/9p/client.c. Then two of PyPI: `py9p`, the module in `p9fs`, which knows .u and some
of .L, and `pyroute2.plan9`, which knows 9P2000. Where either leaves the specification, a test says
how, so that nobody takes it for our mistake; the specification is Plan 9's manual, section 5.
"""

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py9p import py9p  # type: ignore[import-untyped] # has no types
from pyroute2 import plan9  # type: ignore[import-untyped] # has no types

from tests.ninep_messages import FORMS, each_form, every_message, tags, values_of
from tinyvmm import ninep
from tinyvmm.ninep import (
    NINEP2000,
    NINEP2000_L,
    NINEP2000_U,
    Dialect,
    Dirent,
    Message,
    Qid,
    Rgetattr,
    Rlerror,
    Rread,
    Rreaddir,
    Rversion,
    Rwalk,
    Stat,
    Tattach,
    Tclunk,
    Tlcreate,
    Tread,
    Tversion,
    Twalk,
    Twrite,
)

# --- the kernel -----------------------------------------------------------------------------

# What p9_client_rpc is given and p9pdu_readf expects, in net/9p/client.c; for Tauth, which Linux
# never sends, the format of Tattach without a fid. `?` goes on in .u and .L only.
FORMATS = {
    "Tversion": "ds",
    "Rversion": "ds",
    "Tauth": "dss?u",
    "Rauth": "Q",
    "Tattach": "ddss?u",
    "Rattach": "Q",
    "Rerror": "s?d",
    "Rlerror": "d",
    "Tflush": "w",
    "Rflush": "",
    "Twalk": "ddT",
    "Rwalk": "R",
    "Topen": "db",
    "Ropen": "Qd",
    "Tlopen": "dd",
    "Rlopen": "Qd",
    "Tcreate": "dsdb?s",
    "Rcreate": "Qd",
    "Tlcreate": "dsddg",
    "Rlcreate": "Qd",
    "Tread": "dqd",
    "Rread": "D",
    "Twrite": "dqD",
    "Rwrite": "d",
    "Tclunk": "d",
    "Rclunk": "",
    "Tremove": "d",
    "Rremove": "",
    "Tstat": "d",
    "Rstat": "wS",
    "Twstat": "dwS",
    "Rwstat": "",
    "Tstatfs": "d",
    "Rstatfs": "ddqqqqqqd",
    "Tsymlink": "dssg",
    "Rsymlink": "Q",
    "Tmknod": "dsdddg",
    "Rmknod": "Q",
    "Trename": "dds",
    "Rrename": "",
    "Treadlink": "d",
    "Rreadlink": "s",
    "Tgetattr": "dq",
    "Rgetattr": "qQdugqqqqqqqqqqqqqqq",  # its A
    "Tsetattr": "dddugqqqqq",  # its dI
    "Rsetattr": "",
    "Txattrwalk": "dds",
    "Rxattrwalk": "q",
    "Txattrcreate": "dsqd",
    "Rxattrcreate": "",
    "Treaddir": "dqd",
    "Rreaddir": "D",
    "Tfsync": "dd",
    "Rfsync": "",
    "Tlock": "dbdqqds",
    "Rlock": "b",
    "Tgetlock": "dbqqds",
    "Rgetlock": "bqqds",
    "Tlink": "dds",
    "Rlink": "",
    "Tmkdir": "dsdg",
    "Rmkdir": "Q",
    "Trenameat": "dsds",
    "Rrenameat": "",
    "Tunlinkat": "dsd",
    "Runlinkat": "",
}


def p9pdu_vwritef(form: str, values: Iterator[Any], legacy: bool) -> bytes:
    """The kernel's way to write a message's body; `legacy` is plain 9P2000."""
    wire = b""
    for letter in form:
        if letter == "?":
            if legacy:
                break
        elif letter == "b":
            wire += struct.pack("B", next(values))
        elif letter == "w":
            wire += struct.pack("<H", next(values))
        elif letter in "dug":
            wire += struct.pack("<I", next(values))
        elif letter == "q":
            wire += struct.pack("<Q", next(values))
        elif letter == "s":
            string = next(values)
            wire += struct.pack("<H", len(string)) + string
        elif letter == "Q":
            wire += p9pdu_vwritef("bdq", iter(next(values)), legacy)
        elif letter == "D":
            data = next(values)
            wire += struct.pack("<I", len(data)) + data
        elif letter == "T":
            strings = next(values)
            form = "w" + "s" * len(strings)
            wire += p9pdu_vwritef(form, iter([len(strings), *strings]), legacy)
        elif letter == "R":
            qids = next(values)
            wire += p9pdu_vwritef("w" + "Q" * len(qids), iter([len(qids), *qids]), legacy)
        else:
            assert letter == "S"
            wire += p9pdu_vwritef("wwdQdddqssss?sugu", values, legacy)
    return wire


def kernel_values(message: Message, dialect: Dialect) -> Iterator[Any]:
    for value in message:
        if isinstance(value, Stat):
            # p9_client_statsize in net/9p/client.c counts all but size[2] itself
            size = 2 + 4 + 13 + 4 + 4 + 4 + 8 + sum([2 + len(text) for text in value[7:11]])
            if dialect is NINEP2000_U:
                size += 2 + len(value.extension) + 4 + 4 + 4
            yield from (size + 2, size, *value)
        else:
            yield value


@every_message
@given(st.data(), tags)
@settings(max_examples=15, deadline=None)
def test_a_message_has_the_bytes_the_kernel_would_write(
    kind: type[Message], dialect: Dialect, data: st.DataObject, tag: int
) -> None:
    message = data.draw(values_of(kind, dialect))
    values = kernel_values(message, dialect)
    body = p9pdu_vwritef(FORMATS[kind.__name__], values, dialect is NINEP2000)
    header = struct.pack("<IBH", 7 + len(body), kind.number, tag)
    assert dialect.encode(message, tag) == header + body
    assert dialect.decode(header + body) == (tag, message)


@given(values_of(Dirent, NINEP2000_L))
@settings(deadline=None)
def test_a_directory_entry_has_the_bytes_p9dirent_read_expects(entry: Dirent) -> None:
    assert ninep.encode_records([entry]) == p9pdu_vwritef("Qqbs", iter(entry), legacy=False)


# --- py9p -----------------------------------------------------------------------------------

EXTRAS = {"n_uname", "errno", "extension"}  # not in plain 9P2000

PLAN9 = [kind.__name__ for kind in NINEP2000.messages.values()]
PY9P_WRITES = [*PLAN9, "Rlerror", "Tlopen", "Tlcreate", "Tunlinkat", "Treaddir"]
# It reads nothing that only a .L client sends. Rgetattr and Rreaddir have tests of their own.
PY9P_READS = [*PLAN9, "Rlerror", "Rlopen", "Rlcreate", "Rmkdir"]
PY9P_NAMES = {
    "n_uname": "uidnum",
    "n_uid": "uidnum",
    "n_gid": "gidnum",
    "n_muid": "muidnum",
    "ecode": "errno",
    "dirfid": "fid",
}


class Wire:
    """The file object that py9p's marshaller sends to and receives from."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.at = 0

    def write(self, data: bytes) -> None:
        self.data += data

    def read(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]


class Py9p:
    """Messages through py9p, by the names it has for their fields."""

    def __init__(self, dialect: Dialect) -> None:
        self.marshal = py9p.Marshal9P(dotu=dialect is not NINEP2000)

    def encode(self, message: Message, tag: int) -> bytes:
        call = py9p.Fcall(message.number, tag)
        for name, value in zip(message.fields, message, strict=True):
            setattr(call, PY9P_NAMES.get(name, name), self.theirs(value))
        wire = Wire()
        self.marshal.send(wire, call)
        return wire.data

    def theirs(self, value: Any) -> Any:
        if isinstance(value, Qid):
            return py9p.Qid(*value)
        if isinstance(value, Stat):
            entry = py9p.Dir(self.marshal.dotu)
            for name, field in zip(value.fields, value, strict=True):
                setattr(entry, PY9P_NAMES.get(name, name), self.theirs(field))
            return [entry]
        if isinstance(value, tuple):
            return [self.theirs(item) for item in value]
        return value

    def decode(self, wire: bytes, kind: type[Message]) -> tuple[int, list[Any]]:
        stream = Wire(wire)
        call = self.marshal.recv(stream)
        assert stream.at == len(wire)
        assert call.type == kind.number
        names = [PY9P_NAMES.get(name, name) for name in kind.fields]
        return call.tag, [self.ours(getattr(call, name, None)) for name in names]

    def ours(self, value: Any) -> Any:
        if isinstance(value, py9p.Qid):
            return Qid(value.type, value.vers, value.path)
        if isinstance(value, list) and value and isinstance(value[0], py9p.Dir):
            (entry,) = value
            return Stat(
                *[self.ours(getattr(entry, PY9P_NAMES.get(name, name))) for name in Stat.fields]
            )
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, list):
            return tuple([self.ours(item) for item in value])
        return value


py9p_writes = each_form([form for form in FORMS if form[0].__name__ in PY9P_WRITES])
py9p_reads = each_form([form for form in FORMS if form[0].__name__ in PY9P_READS])


@py9p_writes
@given(st.data(), tags)
@settings(max_examples=15, deadline=None)
def test_py9p_writes_the_same_bytes(
    kind: type[Message], dialect: Dialect, data: st.DataObject, tag: int
) -> None:
    message = data.draw(values_of(kind, dialect))
    assert Py9p(dialect).encode(message, tag) == dialect.encode(message, tag)


words = st.text(st.characters(codec="ascii"), max_size=20).map(str.encode)


@py9p_reads
@given(st.data(), tags)
@settings(max_examples=15, deadline=None)
def test_py9p_reads_our_bytes_as_the_same_message(
    kind: type[Message], dialect: Dialect, data: st.DataObject, tag: int
) -> None:
    message = data.draw(values_of(kind, dialect, words, small=127))
    got_tag, values = Py9p(dialect).decode(dialect.encode(message, tag), kind)
    for name, ours, theirs in zip(kind.fields, message, values, strict=True):
        if dialect is NINEP2000 and name in EXTRAS:
            continue  # not on the wire
        if dialect is NINEP2000 and isinstance(ours, Stat):
            assert theirs[:11] == ours[:11]
        else:
            assert theirs == ours, name
    assert got_tag == tag


@given(values_of(ninep.Rgetattr, NINEP2000_L, small=127))
@settings(deadline=None)
def test_py9p_reads_our_attributes(message: ninep.Rgetattr) -> None:
    call = Py9p(NINEP2000_L).marshal.recv(Wire(NINEP2000_L.encode(message, 1)))
    (entry,) = call.stat
    assert Py9p(NINEP2000_L).ours(call.qid) == message.qid
    assert (entry.mode, entry.uid, entry.gid) == (message.mode, message.uid, message.gid)
    assert entry.length == message.size
    assert entry.atime == (message.atime_sec, message.atime_nsec)
    assert entry.mtime == (message.mtime_sec, message.mtime_nsec)
    assert entry.ctime == (message.ctime_sec, message.ctime_nsec)


@given(st.lists(values_of(Dirent, NINEP2000_L, words, small=127), max_size=5))
@settings(deadline=None)
def test_py9p_reads_our_directories(entries: list[Dirent]) -> None:
    message = Rreaddir(ninep.encode_records(entries))
    call = Py9p(NINEP2000_L).marshal.recv(Wire(ninep.encode(message, 1)))
    theirs = [(Py9p(NINEP2000_L).ours(e.qid), e.offset, e.type, e.name.encode()) for e in call.stat]
    assert theirs == [tuple(entry) for entry in entries]


@given(st.lists(values_of(Stat, NINEP2000_U, words, small=127), max_size=5))
@settings(deadline=None)
def test_py9p_reads_our_directories_of_stats(entries: list[Stat]) -> None:
    peer = Py9p(NINEP2000_U)
    peer.marshal.setBuffer(NINEP2000_U.encode_records(entries))
    peer.marshal.buf.seek(0)
    theirs: list[Any] = []
    peer.marshal.decstat(theirs)
    assert [peer.ours([entry]) for entry in theirs] == entries


def test_where_py9p_leaves_the_specification() -> None:
    # intro(5): "integers are unsigned"; it reads a byte as signed: every directory's qid is odd.
    _, (qid,) = Py9p(NINEP2000).decode(
        NINEP2000.encode(ninep.Rattach(Qid(ninep.QTDIR, 0, 0)), 1), ninep.Rattach
    )
    assert qid.type == ninep.QTDIR - 256
    # intro(5): a string is n[2] bytes; it counts the characters of a str, and writes its bytes.
    wire = Wire()
    call = py9p.Fcall(py9p.Tversion, 1)
    call.msize, call.version = 1, "\u00e9"
    Py9p(NINEP2000).marshal.send(wire, call)
    assert wire.data.endswith(b"\x01\x00\xc3\xa9")
    with pytest.raises(ninep.ProtocolError):
        NINEP2000.decode(wire.data)
    # net/9p/client.c sends the mask it is asked for and a new directory's gid; py9p its own.
    call = py9p.Fcall(py9p.Tgetattr, 1, 5)
    wire = Wire()
    Py9p(NINEP2000_L).marshal.send(wire, call)
    assert ninep.decode(wire.data) == (1, ninep.Tgetattr(5, py9p.GETATTR_DEFAULT))
    call = py9p.Fcall(py9p.Tmkdir, 1, 5)
    call.name, call.mode, call.gid = b"d", 0o755, 100
    wire = Wire()
    Py9p(NINEP2000_L).marshal.send(wire, call)
    assert ninep.decode(wire.data) == (1, ninep.Tmkdir(5, b"d", 0o755, 0))


# --- pyroute2 -------------------------------------------------------------------------------

PYROUTE2 = {
    name.removeprefix("msg_").capitalize(): kind
    for name, kind in vars(plan9).items()
    if name.startswith(("msg_t", "msg_r")) and name not in {"msg_terror", "msg_tcall", "msg_rcall"}
}
pyroute2_knows = pytest.mark.parametrize(
    "kind", [kind for kind in NINEP2000.messages.values() if kind.__name__ in PYROUTE2]
)


def pyroute2_value(value: Any) -> Any:
    if isinstance(value, Qid):
        return {"type": value.type, "vers": value.version, "path": value.path}
    if isinstance(value, Stat):
        fields = dict(zip(Stat.fields[:11], value[:11], strict=True))
        numbers = {name: field for name, field in fields.items() if isinstance(field, int)}
        texts = {name: field.decode() for name, field in fields.items() if isinstance(field, bytes)}
        qid = {
            "qid.type": value.qid.type,
            "qid.vers": value.qid.version,
            "qid.path": value.qid.path,
        }
        return {**numbers, **texts, **qid}
    if isinstance(value, tuple):
        return [pyroute2_value(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def pyroute2_pairs(message: Message) -> dict[str, Any]:
    pairs = zip(message.fields, message, strict=True)
    return {
        name: value if name == "data" else pyroute2_value(value)
        for name, value in pairs
        if name not in EXTRAS
    }


@pyroute2_knows
@given(st.data(), tags)
@settings(max_examples=15, deadline=None)
def test_pyroute2_writes_the_same_bytes_and_reads_ours(
    kind: type[Message], data: st.DataObject, tag: int
) -> None:
    message = data.draw(values_of(kind, NINEP2000, words))
    pairs = pyroute2_pairs(message)
    wire = NINEP2000.encode(message, tag)

    theirs = PYROUTE2[kind.__name__](wire)
    theirs.decode()
    got = {name: theirs[name] for name in pairs}
    if kind is ninep.Rauth:
        assert bytes(got["aqid"]) == wire[7:]  # as thirteen numbers
    else:
        if "stat" in got:
            assert got["stat"].pop("size") == len(wire) - 7 - 2 - 2 - 4 * ("fid" in got)
        assert got == pairs
    assert (theirs["header"]["tag"], theirs["header"]["type"]) == (tag, kind.number)

    if kind is ninep.Rauth:
        return  # it has no way to say thirteen numbers
    theirs = PYROUTE2[kind.__name__]()
    theirs["header"]["tag"] = tag
    for name, value in pairs.items():
        theirs[name] = value
    theirs.reset()
    theirs.encode()
    assert bytes(theirs.data) == wire


def test_where_pyroute2_leaves_the_specification() -> None:
    # It has no Tflush and Rflush (flush(5)), and no fields in Tcreate (open(5)) and Tremove.
    missing = {kind.__name__ for kind in NINEP2000.messages.values()} - set(PYROUTE2)
    assert missing == {
        "Tflush", "Rflush", "Tcreate", "Rcreate", "Tremove", "Rremove"
    }  # fmt: skip
    # intro(5): a string is n[2] bytes; it counts characters, and cuts the bytes to as many.
    theirs = plan9.msg_rerror()
    theirs["header"]["tag"] = 1
    theirs["ename"] = "\u00e9"
    theirs.reset()
    theirs.encode()
    assert bytes(theirs.data) == bytes.fromhex("0a000000 6b 0100 0100 c3")
    # error(5): ename is a text for people; its parser takes it for JSON.
    wire = NINEP2000.encode(ninep.Rerror(b"file does not exist"), 1)
    with pytest.raises(ValueError, match="Expecting value"):
        list(plan9.Marshal9P().parse(wire))


# --- by hand, from intro(5), <net/9p/9p.h> and the format strings of net/9p/client.c -----------


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
def test_bytes_written_by_hand(message: Message, tag: int, wire: str) -> None:
    expected = bytes.fromhex(wire)
    assert ninep.encode(message, tag) == expected
    assert ninep.decode(expected) == (tag, message)


@pytest.mark.parametrize(
    ("dialect", "message", "wire"),
    [
        (NINEP2000, ninep.Rerror(b"no"), "0b000000 6b 0100 0200 6e6f"),
        (NINEP2000_U, ninep.Rerror(b"no", 2), "0f000000 6b 0100 0200 6e6f 02000000"),
        (NINEP2000, ninep.Topen(1, ninep.ORDWR | ninep.OTRUNC), "0c000000 70 0100 01000000 12"),
        (
            NINEP2000,
            ninep.Tcreate(1, b"d", ninep.DMDIR | 0o755, ninep.OREAD),
            "13000000 72 0100 01000000 0100 64 ed010080 00",
        ),
        (
            NINEP2000_U,
            ninep.Tcreate(1, b"l", ninep.DMSYMLINK | 0o777, ninep.OREAD, b"to"),
            "17000000 72 0100 01000000 0100 6c ff010002 00 0200 746f",
        ),
        (
            NINEP2000,
            Tattach(0, ninep.NOFID, b"glenda", b""),
            "19000000 68 0100 00000000 ffffffff 0600 676c656e6461 0000",
        ),
        (
            NINEP2000,
            ninep.Rstat(Stat(1, 2, Qid(0, 3, 4), 0o644, 5, 6, 7, b"f", b"u", b"g", b"")),
            (
                "3d000000 7d 0100 3400 3200 0100 02000000 00 03000000 0400000000000000 a4010000"
                " 05000000 06000000 0700000000000000 0100 66 0100 75 0100 67 0000"
            ),
        ),
        (
            NINEP2000_U,
            ninep.Twstat(9, ninep.NULLDIR.replace(name=b"new")),
            (
                "4f000000 7e 0100 09000000 4200 4000 ffff ffffffff ff ffffffff ffffffffffffffff"
                " ffffffff ffffffff ffffffff ffffffffffffffff 0300 6e6577 0000 0000 0000 0000"
                " ffffffff ffffffff ffffffff"
            ),
        ),
    ],
)
def test_bytes_of_the_older_dialects_written_by_hand(
    dialect: Dialect, message: Message, wire: str
) -> None:
    expected = bytes.fromhex(wire)
    assert dialect.encode(message, 1) == expected
    assert dialect.decode(expected) == (1, message)


def test_getattr_reply_has_the_size_the_kernel_reads() -> None:
    # p9pdu_vreadf 'A': q Q d u g then fifteen q: 8 + 13 + 3*4 + 15*8 after the header.
    reply = Rgetattr(0x7FF, Qid(0, 0, 0), *range(3), *range(15))
    assert len(ninep.encode(reply, 0)) == 7 + 8 + 13 + 12 + 120
