# ruff: noqa: D205, D400, PLC0414 - a message's docstring is its wire grammar, which ends where it
# ends; and what is imported `as` itself is for others to find here
"""9P2000, 9P2000.u and 9P2000.L: every message as its wire grammar, and the codecs that follow.

A message is a class whose docstring is its grammar, in the notation of Plan 9's section 5 of the
manual (`tinyvmm.grammar` explains it), and whose annotations name and type the same fields for
readers and type checkers. Nothing else is written per message. The .L messages are those of
Linux's <net/9p/9p.h> and net/9p/client.c, as are the fields that .u adds; the rest are Plan 9's
intro(5) and the pages after it.

One class serves every dialect. `Tattach` has `n_uname[4]{.u,.L}`: on the wire in 9P2000.u and
9P2000.L, and always NONUNAME in plain 9P2000. A message that only some dialects know says so in
its class line. A `Dialect` encodes and decodes: `NINEP2000`, `NINEP2000_U`, `NINEP2000_L`; the
module's own `encode` and `decode` are those of 9P2000.L.

No I/O and no policy here. Strings are bytes, since a file name is. Whatever does not fit the
grammar to the last byte raises `ProtocolError`, and nothing else does. Messages are immutable
tuples that know their names; no thread can hurt another's. A `Framer` belongs to one thread.

Read `Twalk` and `Tcreate` first, then `Dialect` at the end.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

from tinyvmm.grammar import HEADER as HEADER
from tinyvmm.grammar import Decode, Take, decoder, encoder
from tinyvmm.grammar import ProtocolError as ProtocolError
from tinyvmm.grammar import Qid as Qid
from tinyvmm.grammar import Record as Record
from tinyvmm.views import Views, cut, scatter

Data = bytes | list[memoryview]  # counted bytes; views when decoded in place

PLAN9 = ("", ".u")  # messages that Linux's dialect replaced
LINUX = (".L",)  # what it has instead, and more


class Message(Record):
    """A 9P message. T-messages ask, R-messages answer; `number` is type[1] on the wire."""

    number: ClassVar[int]
    dialects: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, number: int, dialects: tuple[str, ...] = PLAN9 + LINUX) -> None:
        """Enter the message under its number."""
        super().__init_subclass__()
        cls.number = number
        cls.dialects = dialects
        MESSAGES[number] = cls


R = TypeVar("R", bound=Record)
MESSAGES: dict[int, type[Message]] = {}  # of every dialect; no two share a number


# --- numbers ----------------------------------------------------------------------------------

NOTAG = 0xFFFF  # the tag of Tversion
NOFID = 0xFFFF_FFFF  # no afid: nobody authenticates
NONUNAME = 0xFFFF_FFFF  # n_uname, n_uid, n_gid not given
MAXWELEM = 16  # names in one Twalk
VERSION = b"9P2000.L"
IOHDRSZ = 24  # msize less this is what Twrite and Rread surely have room for

# stat(5): what kind of file, in a qid's type and in the top byte of `mode`; .u has more of Unix.
QTDIR, DMDIR = 0x80, 0x8000_0000
QTAPPEND, DMAPPEND = 0x40, 0x4000_0000  # writes go to the end
QTEXCL, DMEXCL = 0x20, 0x2000_0000  # open once at a time
QTMOUNT, DMMOUNT = 0x10, 0x1000_0000
QTAUTH, DMAUTH = 0x08, 0x0800_0000
QTTMP, DMTMP = 0x04, 0x0400_0000  # not in backups
QTSYMLINK, DMSYMLINK = 0x02, 0x0200_0000  # .u
QTLINK, DMLINK = 0x01, 0x0100_0000  # .u: a hard link, in Tcreate
QTFILE = 0x00
DMDEVICE = 0x0080_0000  # the rest is .u's
DMNAMEDPIPE = 0x0020_0000
DMSOCKET = 0x0010_0000
DMSETUID = 0x0008_0000
DMSETGID = 0x0004_0000
DMSETVTX = 0x0001_0000

OREAD, OWRITE, ORDWR, OEXEC = 0, 1, 2, 3  # open(5): the low two bits of mode[1]
OTRUNC = 0x10
OCEXEC = 0x20  # of no concern to servers
ORCLOSE = 0x40  # remove on clunk
OAPPEND = 0x80  # .u

P9_GETATTR_BASIC = 0x7FF  # mode..blocks: what a stat(2) gives

P9_LOCK_TYPE_RDLCK, P9_LOCK_TYPE_WRLCK, P9_LOCK_TYPE_UNLCK = 0, 1, 2
P9_LOCK_SUCCESS, P9_LOCK_BLOCKED, P9_LOCK_ERROR, P9_LOCK_GRACE = 0, 1, 2, 3
P9_LOCK_FLAGS_BLOCK, P9_LOCK_FLAGS_RECLAIM = 1 << 0, 1 << 1


# --- the messages: the session's, Plan 9's, then .L's ---------------------------------------


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
    """size[4] Tauth tag[2] afid[4] uname[s] aname[s] n_uname[4]{.u,.L}"""

    afid: int
    uname: bytes
    aname: bytes
    n_uname: int = NONUNAME


class Rauth(Message, number=103):
    """size[4] Rauth tag[2] aqid[13]"""

    aqid: Qid


class Tattach(Message, number=104):
    """size[4] Tattach tag[2] fid[4] afid[4] uname[s] aname[s] n_uname[4]{.u,.L}

    Make `fid` the root of the tree called `aname`, on behalf of a user.
    """

    fid: int
    afid: int
    uname: bytes
    aname: bytes
    n_uname: int = NONUNAME


class Rattach(Message, number=105):
    """size[4] Rattach tag[2] qid[13]"""

    qid: Qid


class Rlerror(Message, number=7, dialects=LINUX):
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


class Rerror(Message, number=107, dialects=PLAN9):
    """size[4] Rerror tag[2] ename[s] errno[4]{.u}

    Any request has failed; `ename` says why, in words. .u adds a Unix errno, 0 for none.
    """

    ename: bytes
    errno: int = 0


class Topen(Message, number=112, dialects=PLAN9):
    """size[4] Topen tag[2] fid[4] mode[1]

    Open for reading or writing; `mode` is OREAD, OWRITE, ORDWR or OEXEC and bits beside it.
    """

    fid: int
    mode: int


class Ropen(Message, number=113, dialects=PLAN9):
    """size[4] Ropen tag[2] qid[13] iounit[4]"""

    qid: Qid
    iounit: int


class Tcreate(Message, number=114, dialects=PLAN9):
    """size[4] Tcreate tag[2] fid[4] name[s] perm[4] mode[1] extension[s]{.u}

    Create a file in the directory `fid` and open it; `fid` then stands for the new file. DMDIR in
    `perm` makes a directory; in .u other DM bits make what `extension` describes: the target of a
    symbolic link, `b major minor` or `c major minor`, the fid of a file to link to in decimal.
    """

    fid: int
    name: bytes
    perm: int
    mode: int
    extension: bytes = b""


class Rcreate(Message, number=115, dialects=PLAN9):
    """size[4] Rcreate tag[2] qid[13] iounit[4]"""

    qid: Qid
    iounit: int


class Stat(Record):
    """size[2] type[2] dev[4] qid[13] mode[4] atime[4] mtime[4] length[8] name[s] uid[s] gid[s]
    muid[s] extension[s]{.u} n_uid[4]{.u} n_gid[4]{.u} n_muid[4]{.u}

    What stat(5) tells of a file, and what reading a directory gives one of for each entry. `muid`
    is who last wrote to it; `extension` is as in Tcreate.
    """

    type: int
    dev: int
    qid: Qid
    mode: int
    atime: int
    mtime: int
    length: int
    name: bytes
    uid: bytes
    gid: bytes
    muid: bytes
    extension: bytes = b""
    n_uid: int = NONUNAME
    n_gid: int = NONUNAME
    n_muid: int = NONUNAME


class Tstat(Message, number=124, dialects=PLAN9):
    """size[4] Tstat tag[2] fid[4]"""

    fid: int


class Rstat(Message, number=125, dialects=PLAN9):
    """size[4] Rstat tag[2] stat[n]"""

    stat: Stat


class Twstat(Message, number=126, dialects=PLAN9):
    """size[4] Twstat tag[2] fid[4] stat[n]

    Change all that differs from NULLDIR, or nothing. NULLDIR itself asks for what fsync(2) does.
    """

    fid: int
    stat: Stat


class Rwstat(Message, number=127, dialects=PLAN9):
    """size[4] Rwstat tag[2]"""


NULLDIR = Stat(  # stat(5): every bit set, or no text, is "don't touch"
    type=0xFFFF,
    dev=0xFFFF_FFFF,
    qid=Qid(0xFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF),
    mode=0xFFFF_FFFF,
    atime=0xFFFF_FFFF,
    mtime=0xFFFF_FFFF,
    length=0xFFFF_FFFF_FFFF_FFFF,
    name=b"",
    uid=b"",
    gid=b"",
    muid=b"",
)


class Tlopen(Message, number=12, dialects=LINUX):
    """size[4] Tlopen tag[2] fid[4] flags[4]

    Open for reading or writing; `flags` are Linux's O_* as on x86.
    """

    fid: int
    flags: int


class Rlopen(Message, number=13, dialects=LINUX):
    """size[4] Rlopen tag[2] qid[13] iounit[4]

    `iounit` is the most one Tread or Twrite may carry, 0 for whatever msize allows.
    """

    qid: Qid
    iounit: int


class Tlcreate(Message, number=14, dialects=LINUX):
    """size[4] Tlcreate tag[2] fid[4] name[s] flags[4] mode[4] gid[4]

    Create a file in the directory `fid` and open it; `fid` then stands for the new file.
    """

    fid: int
    name: bytes
    flags: int
    mode: int
    gid: int


class Rlcreate(Message, number=15, dialects=LINUX):
    """size[4] Rlcreate tag[2] qid[13] iounit[4]"""

    qid: Qid
    iounit: int


class Tstatfs(Message, number=8, dialects=LINUX):
    """size[4] Tstatfs tag[2] fid[4]"""

    fid: int


class Rstatfs(Message, number=9, dialects=LINUX):
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


class Tsymlink(Message, number=16, dialects=LINUX):
    """size[4] Tsymlink tag[2] fid[4] name[s] symtgt[s] gid[4]"""

    fid: int
    name: bytes
    symtgt: bytes
    gid: int


class Rsymlink(Message, number=17, dialects=LINUX):
    """size[4] Rsymlink tag[2] qid[13]"""

    qid: Qid


class Tmknod(Message, number=18, dialects=LINUX):
    """size[4] Tmknod tag[2] dfid[4] name[s] mode[4] major[4] minor[4] gid[4]"""

    dfid: int
    name: bytes
    mode: int
    major: int
    minor: int
    gid: int


class Rmknod(Message, number=19, dialects=LINUX):
    """size[4] Rmknod tag[2] qid[13]"""

    qid: Qid


class Trename(Message, number=20, dialects=LINUX):
    """size[4] Trename tag[2] fid[4] dfid[4] name[s]

    The older way of Trenameat.
    """

    fid: int
    dfid: int
    name: bytes


class Rrename(Message, number=21, dialects=LINUX):
    """size[4] Rrename tag[2]"""


class Treadlink(Message, number=22, dialects=LINUX):
    """size[4] Treadlink tag[2] fid[4]"""

    fid: int


class Rreadlink(Message, number=23, dialects=LINUX):
    """size[4] Rreadlink tag[2] target[s]"""

    target: bytes


class Tgetattr(Message, number=24, dialects=LINUX):
    """size[4] Tgetattr tag[2] fid[4] request_mask[8]"""

    fid: int
    request_mask: int


class Rgetattr(Message, number=25, dialects=LINUX):
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


class Tsetattr(Message, number=26, dialects=LINUX):
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


class Rsetattr(Message, number=27, dialects=LINUX):
    """size[4] Rsetattr tag[2]"""


class Txattrwalk(Message, number=30, dialects=LINUX):
    """size[4] Txattrwalk tag[2] fid[4] newfid[4] name[s]

    Make `newfid` readable as one attribute, or as the list of names if `name` is empty.
    """

    fid: int
    newfid: int
    name: bytes


class Rxattrwalk(Message, number=31, dialects=LINUX):
    """size[4] Rxattrwalk tag[2] size[8]"""

    size: int


class Txattrcreate(Message, number=32, dialects=LINUX):
    """size[4] Txattrcreate tag[2] fid[4] name[s] attr_size[8] flags[4]

    Make `fid` writable as one attribute, which is set when `fid` is clunked.
    """

    fid: int
    name: bytes
    attr_size: int
    flags: int


class Rxattrcreate(Message, number=33, dialects=LINUX):
    """size[4] Rxattrcreate tag[2]"""


class Treaddir(Message, number=40, dialects=LINUX):
    """size[4] Treaddir tag[2] fid[4] offset[8] count[4]

    Entries after `offset`, which is 0 or what an earlier entry gave.
    """

    fid: int
    offset: int
    count: int  # type: ignore[assignment]  # tuple.count is not missed


class Rreaddir(Message, number=41, dialects=LINUX):
    """size[4] Rreaddir tag[2] count[4] data[count]"""

    data: Data


class Tfsync(Message, number=50, dialects=LINUX):
    """size[4] Tfsync tag[2] fid[4] datasync[4]"""

    fid: int
    datasync: int


class Rfsync(Message, number=51, dialects=LINUX):
    """size[4] Rfsync tag[2]"""


class Tlock(Message, number=52, dialects=LINUX):
    """size[4] Tlock tag[2] fid[4] type[1] flags[4] start[8] length[8] proc_id[4] client_id[s]"""

    fid: int
    type: int
    flags: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


class Rlock(Message, number=53, dialects=LINUX):
    """size[4] Rlock tag[2] status[1]"""

    status: int


class Tgetlock(Message, number=54, dialects=LINUX):
    """size[4] Tgetlock tag[2] fid[4] type[1] start[8] length[8] proc_id[4] client_id[s]"""

    fid: int
    type: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


class Rgetlock(Message, number=55, dialects=LINUX):
    """size[4] Rgetlock tag[2] type[1] start[8] length[8] proc_id[4] client_id[s]"""

    type: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


class Tlink(Message, number=70, dialects=LINUX):
    """size[4] Tlink tag[2] dfid[4] fid[4] name[s]"""

    dfid: int
    fid: int
    name: bytes


class Rlink(Message, number=71, dialects=LINUX):
    """size[4] Rlink tag[2]"""


class Tmkdir(Message, number=72, dialects=LINUX):
    """size[4] Tmkdir tag[2] dfid[4] name[s] mode[4] gid[4]"""

    dfid: int
    name: bytes
    mode: int
    gid: int


class Rmkdir(Message, number=73, dialects=LINUX):
    """size[4] Rmkdir tag[2] qid[13]"""

    qid: Qid


class Trenameat(Message, number=74, dialects=LINUX):
    """size[4] Trenameat tag[2] olddirfid[4] oldname[s] newdirfid[4] newname[s]"""

    olddirfid: int
    oldname: bytes
    newdirfid: int
    newname: bytes


class Rrenameat(Message, number=75, dialects=LINUX):
    """size[4] Rrenameat tag[2]"""


class Tunlinkat(Message, number=76, dialects=LINUX):
    """size[4] Tunlinkat tag[2] dirfid[4] name[s] flags[4]"""

    dirfid: int
    name: bytes
    flags: int


class Runlinkat(Message, number=77, dialects=LINUX):
    """size[4] Runlinkat tag[2]"""


class Dirent(Record):
    """qid[13] offset[8] type[1] name[s]

    What Rreaddir's data is made of: `offset` goes on after this entry, `type` is a DT_*.
    """

    qid: Qid
    offset: int
    type: int
    name: bytes


# --- dialects -------------------------------------------------------------------------------


class Dialect:
    """One version of the protocol: which messages there are, and their bytes.

    The functions that do it are made from the grammars (`tinyvmm.grammar`), each when first used.
    """

    def __init__(self, version: bytes) -> None:
        """Take the messages whose class says that this version has them."""
        self.version = version
        self.suffix = version.removeprefix(b"9P2000").decode()
        self.messages = {
            number: kind for number, kind in MESSAGES.items() if self.suffix in kind.dialects
        }
        self._encoders: dict[type[Record], Callable[..., bytes]] = {}
        self._decoders: dict[int, Decode] = {}
        self._takers: dict[type[Record], Take] = {}

    def __repr__(self) -> str:
        return f"<Dialect {self.version.decode()}>"

    def encode(self, message: Message, tag: int) -> bytes:
        """Give the message's bytes; ProtocolError if a field does not fit its place."""
        try:
            return self._encoders[type(message)](message, tag)
        except KeyError:
            self._encoder(type(message))
            return self.encode(message, tag)
        except (struct.error, OverflowError) as error:
            raise ProtocolError(f"{type(message).__name__}: {error}") from None

    def decode(self, data: bytes | bytearray | memoryview) -> tuple[int, Message]:
        """Give tag and message of exactly one message's bytes; ProtocolError otherwise."""
        if not isinstance(data, bytes):
            data = bytes(data)
        try:
            return self._decoders[data[4]](data)
        except KeyError:
            self._decoder(data[4])
            return self.decode(data)
        except (struct.error, IndexError) as error:
            raise ProtocolError(f"{len(data)} bytes: {error}") from None

    def _encoder(self, kind: type[Record]) -> None:
        if issubclass(kind, Message) and self.suffix not in kind.dialects:
            raise ProtocolError(f"{kind.__name__} is not in {self.version.decode()}")
        self._encoders.setdefault(kind, encoder(kind, self.suffix))

    def _decoder(self, number: int) -> None:
        if number not in self.messages:
            raise ProtocolError(f"type {number} is not in {self.version.decode()}")
        self._decoders.setdefault(number, decoder(self.messages[number], self.suffix))

    # A request or reply may lie in several views, cut anywhere. What is short is copied out or in;
    # the payload of Twrite, Rread and Rreaddir stays where it is.

    def decode_views(self, views: Views, limit: int) -> tuple[int, Message]:
        """Decode one request of `limit` bytes at most; the data of a Twrite is left in the views.

        Any other message is copied out first, so nothing can change it behind our back.
        """
        head: memoryview | bytes = views[0] if views else b""
        total = len(head) if len(views) < 2 else sum([len(view) for view in views])
        if total > limit:
            raise ProtocolError(f"{total} bytes where {limit} were agreed")
        if len(head) < HEADER.size:
            head = b"".join(cut(views, 0, HEADER.size))
        if len(head) < HEADER.size or head[4] != Twrite.number:
            return self.decode(b"".join(views))
        head = b"".join(cut(views, 0, TWRITE.size))
        if len(head) < TWRITE.size:
            raise ProtocolError(f"Twrite of {total} bytes")
        size, _, tag, fid, offset, count = TWRITE.unpack(head)
        if size != total or count != size - TWRITE.size:
            raise ProtocolError(f"Twrite: size {size}, count {count} in {total} bytes")
        return tag, Twrite(fid, offset, cut(views, TWRITE.size, count))

    def encode_views(self, reply: Views, message: Message, tag: int, limit: int) -> int:
        """Write a reply of `limit` bytes at most, give its size; ProtocolError if it does not fit.

        Data given as views is in its place already, where `room` said.
        """
        kind = type(message)
        if (kind is Rread or kind is Rreaddir) and type(message[0]) is list:
            count = sum([len(view) for view in message[0]])
            size = RREAD.size + count
            data = RREAD.pack(size, kind.number, tag, count)
        else:
            data = self.encode(message, tag)
            size = len(data)
        if size > limit:
            raise ProtocolError(f"{kind.__name__} of {size} bytes where {limit} were agreed")
        if scatter(reply, data) < len(data):
            raise ProtocolError(f"no room for {len(data)} bytes")
        return size

    def encode_records(self, records: Sequence[Record]) -> bytes:
        """Give the bytes of several records, as Rread or Rreaddir carry them from a directory."""
        for kind in {type(record) for record in records} - self._encoders.keys():
            self._encoder(kind)
        try:
            return b"".join([self._encoders[type(record)](record) for record in records])
        except (struct.error, OverflowError) as error:
            raise ProtocolError(str(error)) from None

    def decode_records(self, record: type[R], data: bytes | bytearray | memoryview) -> list[R]:
        """Take records until the bytes end; ProtocolError if they end in the midst of one."""
        take = self._takers.get(record)
        if take is None:
            take = self._takers.setdefault(record, decoder(record, self.suffix))
        try:
            return take(bytes(data))
        except struct.error as error:
            raise ProtocolError(str(error)) from None


NINEP2000 = Dialect(b"9P2000")
NINEP2000_U = Dialect(b"9P2000.u")
NINEP2000_L = Dialect(b"9P2000.L")
DIALECTS = {dialect.version: dialect for dialect in (NINEP2000, NINEP2000_U, NINEP2000_L)}

encode = NINEP2000_L.encode
decode = NINEP2000_L.decode
decode_views = NINEP2000_L.decode_views
encode_views = NINEP2000_L.encode_views
encode_records = NINEP2000_L.encode_records
decode_records = NINEP2000_L.decode_records

pack_dirent = struct.Struct("<BIQQBH").pack
"""All of a Dirent but its name (qid, offset, type, the name's length): for long directories."""


# --- messages in pieces ---------------------------------------------------------------------

TWRITE = struct.Struct("<IBHIQI")  # all of a Twrite but its data
RREAD = struct.Struct("<IBHI")  # and of Rread and Rreaddir


def room(reply: Views, kind: type[Message], count: int) -> list[memoryview]:
    """Where the data of a reply of this kind belongs: `count` bytes, fewer if the views end."""
    assert kind is Rread or kind is Rreaddir  # noqa: S101 - nothing else carries data
    return cut(reply, RREAD.size, count)


class Framer:
    """Finds the messages in a stream of bytes, however they are cut.

    Set `msize` once it is agreed; it holds for every message not yet given out.
    """

    def __init__(self, msize: int) -> None:
        """Refuse messages of more than `msize` bytes."""
        self.msize = msize
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Take bytes in; give the messages that are whole now, one at a time.

        ProtocolError where a size cannot be right: nothing after it can be understood either, so
        every later call says the same. Until then no more is kept than one message and `data`.
        """
        self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[bytes]:
        buffer = self._buffer
        while len(buffer) >= 4:
            size = int.from_bytes(buffer[:4], "little")
            if not HEADER.size <= size <= self.msize:
                raise ProtocolError(f"a message of {size} bytes where {self.msize} were agreed")
            if len(buffer) < size:
                return
            message = bytes(buffer[:size])
            del buffer[:size]
            yield message

    @property
    def pending(self) -> int:
        """Bytes of a message that is not whole yet: a stream must not end while there are some."""
        return len(self._buffer)
