# ruff: noqa: D205, D400 - a message's docstring is its wire grammar, which ends where it ends
"""9P2000.L: every message as its wire grammar, and the codec that follows from it.

A message is a class whose docstring is its grammar, in the notation of Plan 9's section 5 of the
manual, and whose annotations name and type the same fields for readers and type checkers. Nothing
else is written per message: `encode` and `decode` read the grammar. The .L messages are those of
Linux's <net/9p/9p.h> and net/9p/client.c; the rest are Plan 9's intro(5), in the form .L gives
them (attach and auth carry `n_uname`).

The notation: `fid[4]` is an unsigned little-endian integer of 4 bytes; `name[s]` a string, two
bytes of length and that many bytes; `qid[13]` a qid; `nwname[2] nwname*(wname[s])` a counted list;
`count[4] data[count]` counted bytes. A count is not a field: it follows from what it counts.

No I/O and no policy here. Strings are bytes, since a file name is. Whatever does not fit the
grammar to the last byte raises `ProtocolError`, and nothing else does. Messages are immutable
tuples that know their names; no thread can hurt another's.

Read `Twalk` and `Rread` first, then the machinery at the top.
"""

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform


class ProtocolError(ValueError):
    """Bytes that are no message, or a message that no bytes can carry."""


class Qid(NamedTuple):
    """The server's identity of a file: type[1] version[4] path[8]"""

    type: int
    version: int
    path: int


Views = Sequence[memoryview]
Data = bytes | list[memoryview]  # counted bytes; views when decoded in place

HEADER = struct.Struct("<IBH")  # size[4] type[1] tag[2]
QID = struct.Struct("<BIQ")

# --- what a message is ----------------------------------------------------------------------


@dataclass_transform(frozen_default=True)
class Record(tuple[Any, ...]):
    """Fields on the wire, by name or position; the docstring of a subclass is its grammar."""

    __slots__ = ()
    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Give each annotated field its place in the tuple."""
        cls.fields = tuple(cls.__annotations__)
        for place, name in enumerate(cls.fields):
            setattr(cls, name, property(itemgetter(place)))

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Take every field, by position or by name; TypeError otherwise."""
        if named:
            rest = cls.fields[len(values) :]
            if len(rest) != len(named) or not all(name in named for name in rest):
                raise TypeError(f"{cls.__name__} takes {', '.join(cls.fields)}")
            values += tuple([named[name] for name in rest])
        if len(values) != len(cls.fields):
            raise TypeError(f"{cls.__name__} takes {', '.join(cls.fields)}")
        return tuple.__new__(cls, values)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), tuple(self)))

    def __repr__(self) -> str:
        pairs = [f"{name}={_show(value)}" for name, value in zip(self.fields, self, strict=True)]
        return f"{type(self).__name__}({', '.join(pairs)})"


def _show(value: Any) -> str:
    if isinstance(value, list) or (isinstance(value, bytes) and len(value) > 300):
        size = sum([len(view) for view in value]) if isinstance(value, list) else len(value)
        return f"<{size} bytes>"
    return repr(value)


class Message(Record):
    """A 9P message. T-messages ask, R-messages answer; `number` is type[1] on the wire."""

    number: ClassVar[int]

    def __init_subclass__(cls, number: int) -> None:
        """Enter the message under its number."""
        super().__init_subclass__()
        cls.number = number
        MESSAGES[number] = cls


R = TypeVar("R", bound=Record)
MESSAGES: dict[int, type[Message]] = {}


# --- the messages: the session's, Plan 9's, then .L's ---------------------------------------

NOTAG = 0xFFFF  # the tag of Tversion
NOFID = 0xFFFF_FFFF  # no afid: nobody authenticates
NONUNAME = 0xFFFF_FFFF  # n_uname not given
MAXWELEM = 16  # names in one Twalk
VERSION = b"9P2000.L"

QTDIR = 0x80  # qid types, the top bits of Plan 9's mode
QTSYMLINK = 0x02
QTFILE = 0x00

P9_GETATTR_BASIC = 0x7FF  # mode..blocks: what a stat(2) gives

P9_LOCK_TYPE_RDLCK, P9_LOCK_TYPE_WRLCK, P9_LOCK_TYPE_UNLCK = 0, 1, 2
P9_LOCK_SUCCESS, P9_LOCK_BLOCKED, P9_LOCK_ERROR, P9_LOCK_GRACE = 0, 1, 2, 3
P9_LOCK_FLAGS_BLOCK, P9_LOCK_FLAGS_RECLAIM = 1 << 0, 1 << 1


class Tversion(Message, number=100):
    """size[4] Tversion tag[2] msize[4] version[s]

    Begin a session: agree on the dialect and the largest message. Every fid is forgotten.
    """

    msize: int
    version: bytes


class Rversion(Message, number=101):
    """size[4] Rversion tag[2] msize[4] version[s]"""

    msize: int
    version: bytes


class Tauth(Message, number=102):
    """size[4] Tauth tag[2] afid[4] uname[s] aname[s] n_uname[4]"""

    afid: int
    uname: bytes
    aname: bytes
    n_uname: int


class Rauth(Message, number=103):
    """size[4] Rauth tag[2] aqid[13]"""

    aqid: Qid


class Tattach(Message, number=104):
    """size[4] Tattach tag[2] fid[4] afid[4] uname[s] aname[s] n_uname[4]

    Make `fid` the root of the tree called `aname`, on behalf of a user.
    """

    fid: int
    afid: int
    uname: bytes
    aname: bytes
    n_uname: int


class Rattach(Message, number=105):
    """size[4] Rattach tag[2] qid[13]"""

    qid: Qid


class Rlerror(Message, number=7):
    """size[4] Rlerror tag[2] ecode[4]

    Any request has failed; `ecode` is a Linux errno.
    """

    ecode: int


class Tflush(Message, number=108):
    """size[4] Tflush tag[2] oldtag[2]

    Whoever asks no longer waits for the request of that tag.
    """

    oldtag: int


class Rflush(Message, number=109):
    """size[4] Rflush tag[2]"""


class Twalk(Message, number=110):
    """size[4] Twalk tag[2] fid[4] newfid[4] nwname[2] nwname*(wname[s])

    Make `newfid` the file found from `fid` by the names, one directory after the other.
    """

    fid: int
    newfid: int
    wname: tuple[bytes, ...]


class Rwalk(Message, number=111):
    """size[4] Rwalk tag[2] nwqid[2] nwqid*(wqid[13])"""

    wqid: tuple[Qid, ...]


class Tlopen(Message, number=12):
    """size[4] Tlopen tag[2] fid[4] flags[4]

    Open for reading or writing; `flags` are Linux's O_* as on x86.
    """

    fid: int
    flags: int


class Rlopen(Message, number=13):
    """size[4] Rlopen tag[2] qid[13] iounit[4]

    `iounit` is the most one Tread or Twrite may carry, 0 for whatever msize allows.
    """

    qid: Qid
    iounit: int


class Tlcreate(Message, number=14):
    """size[4] Tlcreate tag[2] fid[4] name[s] flags[4] mode[4] gid[4]

    Create a file in the directory `fid` and open it; `fid` then stands for the new file.
    """

    fid: int
    name: bytes
    flags: int
    mode: int
    gid: int


class Rlcreate(Message, number=15):
    """size[4] Rlcreate tag[2] qid[13] iounit[4]"""

    qid: Qid
    iounit: int


class Tread(Message, number=116):
    """size[4] Tread tag[2] fid[4] offset[8] count[4]"""

    fid: int
    offset: int
    count: int  # type: ignore[assignment]  # tuple.count is not missed


class Rread(Message, number=117):
    """size[4] Rread tag[2] count[4] data[count]"""

    data: Data


class Twrite(Message, number=118):
    """size[4] Twrite tag[2] fid[4] offset[8] count[4] data[count]"""

    fid: int
    offset: int
    data: Data


class Rwrite(Message, number=119):
    """size[4] Rwrite tag[2] count[4]"""

    count: int  # type: ignore[assignment]  # tuple.count is not missed


class Tclunk(Message, number=120):
    """size[4] Tclunk tag[2] fid[4]

    Forget the fid, and close what it has open.
    """

    fid: int


class Rclunk(Message, number=121):
    """size[4] Rclunk tag[2]"""


class Tremove(Message, number=122):
    """size[4] Tremove tag[2] fid[4]

    Remove the file, and clunk the fid even if that failed.
    """

    fid: int


class Rremove(Message, number=123):
    """size[4] Rremove tag[2]"""


class Tstatfs(Message, number=8):
    """size[4] Tstatfs tag[2] fid[4]"""

    fid: int


class Rstatfs(Message, number=9):
    """size[4] Rstatfs tag[2] type[4] bsize[4] blocks[8] bfree[8] bavail[8] files[8] ffree[8]
    fsid[8] namelen[4]
    """

    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    fsid: int
    namelen: int


class Tsymlink(Message, number=16):
    """size[4] Tsymlink tag[2] fid[4] name[s] symtgt[s] gid[4]"""

    fid: int
    name: bytes
    symtgt: bytes
    gid: int


class Rsymlink(Message, number=17):
    """size[4] Rsymlink tag[2] qid[13]"""

    qid: Qid


class Tmknod(Message, number=18):
    """size[4] Tmknod tag[2] dfid[4] name[s] mode[4] major[4] minor[4] gid[4]"""

    dfid: int
    name: bytes
    mode: int
    major: int
    minor: int
    gid: int


class Rmknod(Message, number=19):
    """size[4] Rmknod tag[2] qid[13]"""

    qid: Qid


class Trename(Message, number=20):
    """size[4] Trename tag[2] fid[4] dfid[4] name[s]

    The older way of Trenameat.
    """

    fid: int
    dfid: int
    name: bytes


class Rrename(Message, number=21):
    """size[4] Rrename tag[2]"""


class Treadlink(Message, number=22):
    """size[4] Treadlink tag[2] fid[4]"""

    fid: int


class Rreadlink(Message, number=23):
    """size[4] Rreadlink tag[2] target[s]"""

    target: bytes


class Tgetattr(Message, number=24):
    """size[4] Tgetattr tag[2] fid[4] request_mask[8]"""

    fid: int
    request_mask: int


class Rgetattr(Message, number=25):
    """size[4] Rgetattr tag[2] valid[8] qid[13] mode[4] uid[4] gid[4] nlink[8] rdev[8] size[8]
    blksize[8] blocks[8] atime_sec[8] atime_nsec[8] mtime_sec[8] mtime_nsec[8] ctime_sec[8]
    ctime_nsec[8] btime_sec[8] btime_nsec[8] gen[8] data_version[8]
    """

    valid: int
    qid: Qid
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    atime_sec: int
    atime_nsec: int
    mtime_sec: int
    mtime_nsec: int
    ctime_sec: int
    ctime_nsec: int
    btime_sec: int
    btime_nsec: int
    gen: int
    data_version: int


class Tsetattr(Message, number=26):
    """size[4] Tsetattr tag[2] fid[4] valid[4] mode[4] uid[4] gid[4] size[8] atime_sec[8]
    atime_nsec[8] mtime_sec[8] mtime_nsec[8]
    """

    fid: int
    valid: int
    mode: int
    uid: int
    gid: int
    size: int
    atime_sec: int
    atime_nsec: int
    mtime_sec: int
    mtime_nsec: int


class Rsetattr(Message, number=27):
    """size[4] Rsetattr tag[2]"""


class Txattrwalk(Message, number=30):
    """size[4] Txattrwalk tag[2] fid[4] newfid[4] name[s]

    Make `newfid` readable as one attribute, or as the list of names if `name` is empty.
    """

    fid: int
    newfid: int
    name: bytes


class Rxattrwalk(Message, number=31):
    """size[4] Rxattrwalk tag[2] size[8]"""

    size: int


class Txattrcreate(Message, number=32):
    """size[4] Txattrcreate tag[2] fid[4] name[s] attr_size[8] flags[4]

    Make `fid` writable as one attribute, which is set when `fid` is clunked.
    """

    fid: int
    name: bytes
    attr_size: int
    flags: int


class Rxattrcreate(Message, number=33):
    """size[4] Rxattrcreate tag[2]"""


class Treaddir(Message, number=40):
    """size[4] Treaddir tag[2] fid[4] offset[8] count[4]

    Entries after `offset`, which is 0 or what an earlier entry gave.
    """

    fid: int
    offset: int
    count: int  # type: ignore[assignment]  # tuple.count is not missed


class Rreaddir(Message, number=41):
    """size[4] Rreaddir tag[2] count[4] data[count]"""

    data: Data


class Tfsync(Message, number=50):
    """size[4] Tfsync tag[2] fid[4] datasync[4]"""

    fid: int
    datasync: int


class Rfsync(Message, number=51):
    """size[4] Rfsync tag[2]"""


class Tlock(Message, number=52):
    """size[4] Tlock tag[2] fid[4] type[1] flags[4] start[8] length[8] proc_id[4] client_id[s]"""

    fid: int
    type: int
    flags: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


class Rlock(Message, number=53):
    """size[4] Rlock tag[2] status[1]"""

    status: int


class Tgetlock(Message, number=54):
    """size[4] Tgetlock tag[2] fid[4] type[1] start[8] length[8] proc_id[4] client_id[s]"""

    fid: int
    type: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


class Rgetlock(Message, number=55):
    """size[4] Rgetlock tag[2] type[1] start[8] length[8] proc_id[4] client_id[s]"""

    type: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


class Tlink(Message, number=70):
    """size[4] Tlink tag[2] dfid[4] fid[4] name[s]"""

    dfid: int
    fid: int
    name: bytes


class Rlink(Message, number=71):
    """size[4] Rlink tag[2]"""


class Tmkdir(Message, number=72):
    """size[4] Tmkdir tag[2] dfid[4] name[s] mode[4] gid[4]"""

    dfid: int
    name: bytes
    mode: int
    gid: int


class Rmkdir(Message, number=73):
    """size[4] Rmkdir tag[2] qid[13]"""

    qid: Qid


class Trenameat(Message, number=74):
    """size[4] Trenameat tag[2] olddirfid[4] oldname[s] newdirfid[4] newname[s]"""

    olddirfid: int
    oldname: bytes
    newdirfid: int
    newname: bytes


class Rrenameat(Message, number=75):
    """size[4] Rrenameat tag[2]"""


class Tunlinkat(Message, number=76):
    """size[4] Tunlinkat tag[2] dirfid[4] name[s] flags[4]"""

    dirfid: int
    name: bytes
    flags: int


class Runlinkat(Message, number=77):
    """size[4] Runlinkat tag[2]"""


class Dirent(Record):
    """qid[13] offset[8] type[1] name[s]

    What Rreaddir's data is made of: `offset` goes on after this entry, `type` is a DT_*.
    """

    qid: Qid
    offset: int
    type: int
    name: bytes


# --- the codec ------------------------------------------------------------------------------
# A grammar is compiled, when first used, to runs: some integers, then at most one counted thing,
# whose count is the run's last integer. A qid is three of the integers.

_INTEGERS = {"1": "B", "2": "H", "4": "I", "8": "Q", "13": "BIQ"}

# How to take a counted thing from `data`, which may end too early: the taker may then give a place
# beyond the end, and what it took is thrown away.


def _take_bytes(data: bytes, at: int, count: int) -> tuple[bytes, int]:
    return data[at : at + count], at + count


def _take_strings(data: bytes, at: int, count: int) -> tuple[tuple[bytes, ...], int]:
    strings = []
    for _ in range(count):
        start = at + 2
        at = start + int.from_bytes(data[at:start], "little")
        strings.append(data[start:at])
    return tuple(strings), at


def _take_qids(data: bytes, at: int, count: int) -> tuple[tuple[Qid, ...], int]:
    end = at + count * QID.size
    qids = data[at:end] if end <= len(data) else b""
    return tuple([Qid._make(numbers) for numbers in QID.iter_unpack(qids)]), end


def _put_bytes(value: Data) -> tuple[int, bytes]:
    data = b"".join(value) if isinstance(value, list) else bytes(value)
    return len(data), data


def _put_strings(value: Sequence[bytes]) -> tuple[int, bytes]:
    pieces = [len(string).to_bytes(2, "little") + string for string in value]
    return len(pieces), b"".join(pieces)


def _put_qids(value: Sequence[Qid]) -> tuple[int, bytes]:
    return len(value), b"".join([QID.pack(*qid) for qid in value])


_Take = Callable[[bytes, int, int], tuple[Any, int]]
_Put = Callable[[Any], tuple[int, bytes]]
_COUNTED: dict[str, tuple[_Take | None, _Put | None]] = {
    "": (None, None),
    "bytes": (_take_bytes, _put_bytes),
    "strings": (_take_strings, _put_strings),
    "qids": (_take_qids, _put_qids),
}


class _Run:
    """Integers, then perhaps a counted thing: its struct, and how to take and put the thing."""

    __slots__ = ("put", "qids", "start", "stop", "struct", "take")

    def __init__(self, start: int, formats: list[str], counted: str) -> None:
        self.struct = struct.Struct("<" + "".join(formats))
        self.qids = [place for place, code in enumerate(formats) if code == "BIQ"]
        self.start = start  # its integers are fields start..stop; the counted thing is the next
        self.stop = start + len(formats) - bool(counted)
        self.take, self.put = _COUNTED[counted]


class Codec:
    """The grammar of one record, compiled; `head` is its first run behind a message header."""

    def __init__(self, record: type[Record]) -> None:
        """Compile; AssertionError if the grammar and the annotations disagree."""
        words = (record.__doc__ or "").partition("\n\n")[0].split()
        self.number = record.number if issubclass(record, Message) else 0
        if self.number:
            if words[:3] != ["size[4]", record.__name__, "tag[2]"]:
                raise AssertionError(f"{record.__name__}: no grammar (python -OO drops it)")
            del words[:3]

        names: list[str] = []
        formats: list[str] = []
        self.runs: list[_Run] = []
        for word in words:
            repeated, _, item = word.rpartition("*")  # nwname*(wname[s])
            name, _, kind = item.strip("()").rstrip("]").partition("[")
            counted = ""
            if repeated:
                counted = "strings" if kind == "s" else "qids"
                names[-1] = name  # in the place of its count, the integer before it
            elif names and kind == names[-1]:
                counted = "bytes"
                names[-1] = name
            elif kind == "s":
                counted = "bytes"
                names.append(name)
                formats.append("H")
            else:
                names.append(name)
                formats.append(_INTEGERS[kind])
            if counted:
                self.runs.append(_Run(len(names) - len(formats), formats, counted))
                formats = []
        if formats or not self.runs:
            self.runs.append(_Run(len(names) - len(formats), formats, ""))
        if tuple(names) != record.fields:
            raise AssertionError(f"{record.__name__}: grammar {names}, fields {record.fields}")

        # Most messages are one run with a qid at most: `head` packs and unpacks them whole.
        first = self.runs[0]
        self.kind: type[Any] = record
        self.head = struct.Struct(HEADER.format + first.struct.format[1:])
        self.unpack = struct.Struct("<7x" + first.struct.format[1:]).unpack
        self.short = len(self.runs) == 1 and first.take is None and len(first.qids) < 2
        self.qid_at = first.qids[0] if first.qids else -1

    def take(self, data: bytes, at: int = 0) -> tuple[list[Any], int]:
        """Read the fields from `at` on; gives them and where they end."""
        values: list[Any] = []
        for run in self.runs:
            values += run.struct.unpack_from(data, at)
            at += run.struct.size
            for place in run.qids:
                qid = slice(run.start + place, run.start + place + 3)
                values[qid] = [Qid._make(values[qid])]
            if run.take is not None:
                values[-1], at = run.take(data, at, values[-1])
        if at > len(data):
            raise ProtocolError(f"{at} bytes promised, {len(data)} there")
        return values, at

    def put(self, values: Sequence[Any]) -> bytes:
        """Write the fields."""
        body = b""
        for run in self.runs:
            numbers = [*values[run.start : run.stop]]
            for place in reversed(run.qids):
                numbers[place : place + 1] = numbers[place]
            if run.put is None:
                body += run.struct.pack(*numbers)
            else:
                count, counted = run.put(values[run.stop])
                body += run.struct.pack(*numbers, count) + counted
        return body


_codecs: dict[type[Record], Codec] = {}


_by_number: dict[int, Codec] = {}
_new = tuple.__new__  # a record of fields known to be all there


def codec_of(record: type[Record]) -> Codec:
    """Give the compiled grammar of a record, compiling it the first time."""
    codec = _codecs.get(record)
    if codec is None:
        codec = _codecs[record] = Codec(record)
        if codec.number:
            _by_number[codec.number] = codec
    return codec


def encode(message: Message, tag: int) -> bytes:
    """Give the message's bytes; ProtocolError if a field does not fit its place."""
    kind = type(message)
    codec = _codecs.get(kind) or codec_of(kind)
    try:
        if codec.short:
            at = codec.qid_at
            values = message if at < 0 else (*message[:at], *message[at], *message[at + 1 :])
            return codec.head.pack(codec.head.size, codec.number, tag, *values)
        body = codec.put(message)
        return HEADER.pack(HEADER.size + len(body), codec.number, tag) + body
    except (struct.error, OverflowError) as error:
        raise ProtocolError(f"{kind.__name__}: {error}") from None


def decode(data: bytes) -> tuple[int, Message]:
    """Give tag and message of exactly one message's bytes; ProtocolError for anything else."""
    data = bytes(data)
    try:
        size, number, tag = HEADER.unpack_from(data)
        if size != len(data) or number not in MESSAGES:
            raise ProtocolError(f"size {size}, type {number} in {len(data)} bytes")
        codec = _by_number.get(number) or codec_of(MESSAGES[number])
        kind = codec.kind
        if codec.short and codec.qid_at < 0:
            return tag, _new(kind, codec.unpack(data))
        values, end = codec.take(data, HEADER.size)
    except struct.error as error:
        raise ProtocolError(str(error)) from None
    if end != size:
        raise ProtocolError(f"{kind.__name__}: {size - end} bytes too many")
    return tag, _new(kind, values)


# --- messages in descriptor chains ----------------------------------------------------------
# A request or reply may lie in several views, cut anywhere. What is short is copied out or in;
# the payload of Twrite, Rread and Rreaddir stays where it is.


def cut(views: Views, start: int, count: int) -> list[memoryview]:
    """Give the views' bytes from `start` on, `count` at most, as views of the same memory."""
    pieces = []
    for view in views:
        size = len(view)
        if start >= size:
            start -= size
            continue
        if count <= 0:
            break
        piece = view[start : start + count] if start or count < size else view
        pieces.append(piece)
        count -= len(piece)
        start = 0
    return pieces


def scatter(views: Views, data: bytes) -> int:
    """Copy `data` into the views, from their first byte on; ProtocolError if it does not fit."""
    size = len(data)
    if views and size <= len(views[0]):
        views[0][:size] = data
        return size
    done = 0
    for view in views:
        piece = data[done : done + len(view)]
        view[: len(piece)] = piece
        done += len(piece)
    if done < size:
        raise ProtocolError(f"{size} bytes do not fit {done}")
    return done


def decode_views(views: Views, limit: int) -> tuple[int, Message]:
    """Decode one request of `limit` bytes at most; the data of a Twrite is left in the views."""
    head: memoryview | bytes = views[0] if views else b""
    total = len(head) if len(views) < 2 else sum([len(view) for view in views])
    if total > limit:
        raise ProtocolError(f"{total} bytes where {limit} were agreed")
    if len(head) < HEADER.size:
        head = b"".join(cut(views, 0, HEADER.size))
    if len(head) < HEADER.size or head[4] != Twrite.number:
        return decode(b"".join(views))
    twrite = codec_of(Twrite).head
    try:
        size, _, tag, fid, offset, count = twrite.unpack(b"".join(cut(views, 0, twrite.size)))
    except struct.error as error:
        raise ProtocolError(str(error)) from None
    if size != total or count != size - twrite.size:
        raise ProtocolError(f"Twrite: size {size}, count {count} in {total} bytes")
    return tag, Twrite(fid, offset, cut(views, twrite.size, count))


def room(reply: Views, kind: type[Message], count: int) -> list[memoryview]:
    """Where the data of a reply of this kind belongs: `count` bytes, fewer if the views end."""
    return cut(reply, codec_of(kind).head.size, count)


def encode_views(reply: Views, message: Message, tag: int, limit: int) -> int:
    """Write a reply of `limit` bytes at most, give its size; ProtocolError if it does not fit.

    Data given as views is in its place already, where `room` said.
    """
    kind = type(message)
    if (kind is Rread or kind is Rreaddir) and isinstance(message[0], list):
        head = codec_of(kind).head
        count = sum([len(view) for view in message[0]])
        size = head.size + count
        data = head.pack(size, kind.number, tag, count)
    else:
        data = encode(message, tag)
        size = len(data)
    if size > limit:
        raise ProtocolError(f"{kind.__name__} of {size} bytes where {limit} were agreed")
    scatter(reply, data)
    return size


_pack_dirent = struct.Struct("<BIQQBH").pack


def encode_dirent(qid: Qid, offset: int, dtype: int, name: bytes) -> bytes:
    """Give the bytes of one Dirent, in the quick way a long directory needs."""
    return _pack_dirent(*qid, offset, dtype, len(name)) + name


def encode_records(records: Sequence[Record]) -> bytes:
    """Give the bytes of several records, as Rreaddir carries them."""
    return b"".join([codec_of(type(record)).put(record) for record in records])


def decode_records(record: type[R], data: bytes) -> list[R]:
    """Take records until the bytes end; ProtocolError if they end in the midst of one."""
    codec = codec_of(record)
    records = []
    at = 0
    while at < len(data):
        try:
            values, at = codec.take(data, at)
        except struct.error as error:
            raise ProtocolError(str(error)) from None
        records.append(_new(record, values))
    return records
