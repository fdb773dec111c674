"""Bytes in, a 9P conversation out: what the fuzzer and the corpus test play against a session.

`play` reads its input as a small program: a head byte that chooses tree, dialect and sizes, then
steps. A step is a message (its number, then one byte or a few for each field of its grammar), raw
bytes, or something the host does to the tree meanwhile. Numbers and names are mostly picked from
tables of those that have meaning or make trouble, so that a random input gets far; what a byte
picks must stay as it is, or the corpus loses its sense. The messages are encoded here, from their
grammars, and not by the codec that is tested.

Held to, whatever the input: nothing is raised; every reply decodes in the dialect agreed, under the
request's tag, and is within msize and the room there was; a request answered with nothing had no
room for an error; when all is closed no descriptor is left open; nothing outside the tree has
changed, nor inside the read trees of a union.
"""

import contextlib
import os
import re
import shutil
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tinyvmm import ninep
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Session, Waiting
from tinyvmm.fileserver.union import UnionTree, open_tree

STEPS_MAX = 64
HANG = 60  # seconds until a request that waits is taken for lost

# The head byte.
HEAD_UNION, HEAD_DIALECT, HEAD_RAW, HEAD_SMALL = 1 << 0, 3 << 1, 1 << 3, 1 << 4
HEAD_FEW = 1 << 5  # descriptors: those not in use are given up all the time
VERSIONS = (b"9P2000.L", b"9P2000.L", b"9P2000.u", b"9P2000")

# Steps that are no message.
RAW, HOST, ROOM, DRAIN, DAMAGE = 255, 254, 253, 252, 251
ROOMS = (0, 6, 7, 11, 20, 24, 100, 4096)

NUMBERS = (
    *(0, 1, 2, 0o644, 0o444, 0, stat.S_IFREG | 0o600, stat.S_IFDIR | 0o700, stat.S_IFIFO | 0o600),
    *(stat.S_IFCHR | 0o600, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFLNK | 0o777, 0o4755, 0o2755),
    *(os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_TRUNC, os.O_CREAT | os.O_EXCL | os.O_RDWR, 3),
    *(os.O_DIRECTORY, os.O_WRONLY | os.O_APPEND, os.O_TMPFILE, os.O_PATH, 0x200, 0x100, 0xFF, 4),
    *(8, 16, 64, 255, 256, 4095, 4096, 8192, 0xFFFF, 1 << 16, (1 << 16) + 1, (1 << 31) - 1),
    *(1 << 31, (1 << 32) - 1, (1 << 32) - 2, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 2),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1, 0x8000_01ED, 0x0200_01A4, 0x0100_01A4),
    *(0x0080_01A4, 0x0020_01A4, 0x0010_01A4, 0x0008_01ED, 0x4000_01A4, 0x2000_01A4, 10**9, 5),
)
NAMES = (
    *(b"file", b"dir", b"sub", b"deep", b"link", b"out", b"outdir", b"..", b".", b"", b"new"),
    *(b"new2", b"fifo", b"hard", b"ro", b"loop", b"\xff\xfe", b"a\nb", b"n" * 255, b"n" * 256),
    *(b"a/b", b"/", b"../..", b"a\0b", b".wh.file", b".wh..wh..opq", b".tinyvmm", b"gone", b"both"),
    *(b"user.x", b"user.overlay.opaque", b"trusted.overlay.whiteout", b"user.tinyvmm.root"),
    *(b"system.posix_acl_access", b"security.capability", b"user.containers.override_stat"),
    *(b"user.", b"x", b"9P2000", b"9P2000.u", b"9P2000.L", b"9P2000.x", b"unknown", b"s" * 4096),
    *(
        b"t" * 70000,
        b"../canary/secret",
        b"c 1 3",
        b"b 8 0",
        b"1",
        b"0",
        b"root",
        b"empty",
        b"secret",
    ),
)
LENGTHS = (0, 1, 5, 100, 4096, 8168, 8169, 70000)

REQUESTS = {number: kind for number, kind in ninep.MESSAGES.items() if kind.__name__[0] == "T"}
REQUEST_NUMBERS = (
    *(8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 32, 40, 50, 52, 54, 70, 72, 74, 76),
    *(100, 102, 104, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126),
)
_FIELD = re.compile(r"(\w+)\[(\w+)\](?:\{([.\w,]*)\})?|(\w+)\*\((\w+)\[s\]\)")


class Field(NamedTuple):
    """A field on the wire: its kind is a width, "s", "n", "data" or "names"."""

    name: str
    kind: str


def grammar(record: type[ninep.Record], suffix: str) -> list[Field]:
    """The fields of a record in the dialect 9P2000`suffix`, a message's header left out."""
    text = (record.__doc__ or "").partition("\n\n")[0]
    fields: list[Field] = []
    for name, kind, dialects, repeated, _ in _FIELD.findall(text):
        if dialects and suffix not in dialects.split(","):
            continue
        if repeated:
            fields[-1] = Field(repeated, "names")
        elif fields and kind == fields[-1].name:
            fields[-1] = Field(name, "data")
        else:
            fields.append(Field(name, kind))
    return fields[2:] if issubclass(record, ninep.Message) else fields[1:]


class Script:
    """The input, taken piece by piece; beyond its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def more(self) -> bool:
        return self.at < len(self.data)

    def byte(self) -> int:
        at, self.at = self.at, self.at + 1
        return self.data[at] if at < len(self.data) else 0

    def take(self, count: int) -> bytes:
        at, self.at = self.at, self.at + count
        return self.data[at : at + count]

    def number(self, width: int, name: str) -> bytes:
        picked = self.byte()
        if name.endswith("fid") and picked < 250:
            value = picked % 6
        elif picked < 128:
            value = picked
        else:
            value = NUMBERS[(picked - 128) % len(NUMBERS)]
        return (value & (1 << 8 * width) - 1).to_bytes(width, "little")

    def name(self) -> bytes:
        picked = self.byte()
        return NAMES[picked % len(NAMES)] if picked < 200 else self.take(picked - 200)

    def payload(self) -> bytes:
        picked = self.byte()
        return bytes([picked]) * LENGTHS[picked % len(LENGTHS)]

    def field(self, field: Field, suffix: str) -> bytes:
        """The wire's bytes of one field."""
        if field.kind == "s":
            return _counted(self.name(), 2)
        if field.kind == "data":
            return _counted(self.payload(), 4)
        if field.kind == "names":
            names = [self.name() for _ in range(self.byte() % 20)]
            return len(names).to_bytes(2, "little") + b"".join(_counted(n, 2) for n in names)
        if field.kind == "n":
            rest = b"".join(self.field(f, suffix) for f in grammar(ninep.Stat, suffix))
            return _counted(_counted(rest, 2), 2)
        if field.kind == "13":
            return self.number(1, "") + self.number(4, "") + self.number(8, "")
        return self.number(int(field.kind), field.name)

    def message(self, number: int, suffix: str) -> bytes:
        """The bytes of a message of this number, as the grammar says."""
        tag = self.byte() % 8
        fields = grammar(REQUESTS[number], suffix)
        body = b"".join(self.field(field, suffix) for field in fields)
        return struct.pack("<IBH", 7 + len(body), number, tag) + body


def _counted(data: bytes, width: int) -> bytes:
    return (len(data) & (1 << 8 * width) - 1).to_bytes(width, "little") + data[: 1 << 8 * width]


# --- the trees --------------------------------------------------------------------------------


class Place:
    """A directory of our own with trees, and with what must stay as it is."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.canary = os.path.join(path, "canary")
        os.makedirs(os.path.join(self.canary, "sub"))
        _write(os.path.join(self.canary, "secret"), b"the canary's")
        self.tree = os.path.join(path, "tree")
        self.lower = os.path.join(path, "lower")

    def fill(self) -> None:
        """Make the trees anew."""
        for top in (self.tree, self.lower):
            shutil.rmtree(top, ignore_errors=True)
            os.mkdir(top)
        self._fill(self.tree)
        below = os.path.join(self.lower, "dir")
        os.mkdir(below)
        _write(os.path.join(below, "both"), b"below")
        _write(os.path.join(below, "gone"), b"below")
        with contextlib.suppress(OSError):
            os.mknod(os.path.join(self.tree, "dir", "gone"), stat.S_IFCHR, 0)

    def _fill(self, top: str) -> None:
        os.makedirs(os.path.join(top, "dir", "sub", "deep"))
        os.mkdir(os.path.join(top, "empty"))
        _write(os.path.join(top, "file"), b"hello")
        _write(os.path.join(top, "dir", "file"), b"hello again")
        _write(os.path.join(top, "dir", "both"), b"above")
        _write(os.path.join(top, "ro"), b"read only")
        os.chmod(os.path.join(top, "ro"), 0o444)
        os.link(os.path.join(top, "file"), os.path.join(top, "hard"))
        os.mkfifo(os.path.join(top, "fifo"))
        os.symlink("file", os.path.join(top, "link"))
        os.symlink("loop", os.path.join(top, "loop"))
        os.symlink(os.path.join(self.canary, "secret"), os.path.join(top, "out"))
        os.symlink(self.canary, os.path.join(top, "outdir"))
        _write(os.path.join(os.fsencode(top), b"\xff\xfe"), b"no text")

    def host_acts(self, choice: int) -> None:
        """Do to the shared tree what a host may do at any time; what fails, fails."""
        tree, name = self.tree, ("dir", "file", "new", "dir/sub", "empty", "hard")[choice % 6]
        path = os.path.join(tree, name)
        act = choice // 6 % 5
        # It, or the client, may have made a way out, which the host must not take itself.
        if os.path.islink(os.path.join(tree, "dir")) and (act == 4 or name == "dir/sub"):
            return
        with contextlib.suppress(OSError):
            if os.path.islink(path):
                os.unlink(path)
                act = 1
            match act:
                case 0:  # swap it for a way out
                    os.rename(path, os.path.join(tree, "aside"))
                    os.symlink(self.canary, path)
                case 1:
                    os.rename(os.path.join(tree, "aside"), path)
                case 2:
                    os.unlink(path)
                case 3:
                    _write(path, b"the host's")
                case _:
                    os.rename(path, os.path.join(tree, "dir", "moved"))

    def open(self, *, union: bool) -> HostTree | UnionTree:
        if not union:
            return HostTree(self.tree)
        upper = os.path.join(self.path, "upper")
        shutil.rmtree(upper, ignore_errors=True)
        os.mkdir(upper)
        return open_tree([("/", self.lower), ("/", self.tree)], [("/", upper)])


def _write(path: str | bytes, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def snapshot(top: str) -> list[tuple[object, ...]]:
    """All there is to know of the files below `top` but when they were read."""
    found: list[tuple[object, ...]] = []
    pending = [top]
    while pending:
        path = pending.pop()
        st = os.lstat(path)
        content: object = None
        if stat.S_ISDIR(st.st_mode):
            content = names = sorted(os.listdir(path))
            pending += [os.path.join(path, name) for name in names]
        elif stat.S_ISREG(st.st_mode):
            with open(path, "rb") as file:
                content = file.read()
        # Times of change and link counts are left out of where the host links files: nowhere here.
        change = (st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_mtime_ns, st.st_ctime_ns)
        found.append((path, change, content))
    return found


# --- the conversation -------------------------------------------------------------------------


class Conversation:
    """A session, and a client that checks every answer."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.reply = bytearray(session.msize_max + 64)
        self._lock = threading.Lock()
        self._late: list[Callable[[], bytes | None]] = []
        self._arrived = threading.Semaphore(0)
        self._started = 0
        self._submitter = 0  # the thread in the session, if one is

    @property
    def dialect(self) -> ninep.Dialect:
        dialect: ninep.Dialect = getattr(self.session, "dialect", ninep.NINEP2000_L)
        return dialect

    def ask(self, request: bytes, room: int | None = None) -> None:
        """Send one request; check the answer, if it comes at once."""
        session = self.session
        limit = session.msize
        room = len(self.reply) if room is None else room
        before = memoryview(bytearray(request))
        third = len(before) // 3
        views = [view for view in (before[:third], before[third:]) if len(view)]
        target = memoryview(self.reply)[:room]
        self._submitter = threading.get_ident()
        size = session.submit(views, [target[:11], target[11:]])
        self._submitter = 0
        if isinstance(size, Waiting):
            self._started += 1
            size.start(self._later)
            return
        assert 0 <= size <= min(room, max(limit, session.msize)), (size, room, limit)
        if not size:
            assert room < 256 or not self._answers(request), f"no answer to {request[:40]!r}"
            return
        self._check(bytes(self.reply[:size]), request)

    def _answers(self, request: bytes) -> bool:
        return len(request) >= 7

    def _check(self, reply: bytes, request: bytes | None) -> None:
        tag, message = self.dialect.decode(reply)
        if request is None:
            return
        if len(request) < 7:
            assert tag == ninep.NOTAG
            return
        assert tag in {int.from_bytes(request[5:7], "little"), ninep.NOTAG}, (tag, request[:40])
        assert message.number in {request[4] + 1, 7, 107}, (message, request[:40])

    def _later(self, finish: Callable[[], bytes | None]) -> None:
        if self._submitter == threading.get_ident():
            assert not finish()  # retired, by the request being answered
            return
        with self._lock:
            self._late.append(finish)
        self._arrived.release()

    def drain(self) -> None:
        """Take what late replies there are."""
        with self._lock:
            late, self._late = self._late, []
        for finish in late:
            reply = finish()
            if reply:
                assert len(reply) <= self.session.msize
                self._check(reply, None)

    def end(self) -> None:
        """Close the session and wait for all that still goes on."""
        self._submitter = threading.get_ident()
        self.session.close()
        self._submitter = 0
        for _ in range(self._started):
            assert self._arrived.acquire(timeout=HANG), "a request that waits was lost"
        self.drain()
        assert not self.session.fids


def play(data: bytes, place: Place) -> None:
    """Play one input; AssertionError, or whatever is raised, if it finds something."""
    script = Script(data)
    head = script.byte()
    place.fill()
    kept = [place.canary, place.lower] + ([place.tree] if head & HEAD_UNION else [])
    before = [snapshot(top) for top in kept]
    descriptors = len(os.listdir("/proc/self/fd"))
    tree = place.open(union=bool(head & HEAD_UNION))
    if head & HEAD_FEW:
        tree.descriptors.limit = 2
    version = VERSIONS[(head & HEAD_DIALECT) >> 1]
    suffix = version.removeprefix(b"9P2000").decode()
    session = Session(tree, msize_max=300 if head & HEAD_SMALL else 8192)
    conversation = Conversation(session)
    try:
        for request in _greeting(version, suffix, head):
            conversation.ask(request)
        _steps(script, conversation, suffix, None if head & HEAD_UNION else place.host_acts)
        conversation.end()
        if isinstance(tree, HostTree):
            assert len(tree.nodes) == 1, tree.nodes
    finally:
        tree.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert [snapshot(top) for top in kept] == before


def _greeting(version: bytes, suffix: str, head: int) -> Iterator[bytes]:
    if head & HEAD_RAW:
        return
    body = struct.pack("<I", 8192) + _counted(version, 2)
    yield struct.pack("<IBH", 7 + len(body), 100, ninep.NOTAG) + body
    body = struct.pack("<II", 0, ninep.NOFID) + _counted(b"root", 2) + _counted(b"", 2)
    if suffix:
        body += struct.pack("<I", os.getuid())
    yield struct.pack("<IBH", 7 + len(body), 104, 1) + body


def _steps(
    script: Script,
    conversation: Conversation,
    suffix: str,
    host_acts: Callable[[int], None] | None,
) -> None:
    room: int | None = None
    damage = -1
    for _ in range(STEPS_MAX):
        if not script.more():
            break
        step = script.byte()
        if step == HOST:
            choice = script.byte()
            if host_acts is not None:
                host_acts(choice)
        elif step == ROOM:
            room = ROOMS[script.byte() % len(ROOMS)]
        elif step == DAMAGE:
            damage = script.byte()
        elif step == DRAIN:
            conversation.drain()
        else:
            if step == RAW:
                request = script.take(script.byte())
            else:
                number = step if step in REQUESTS else REQUEST_NUMBERS[step % len(REQUEST_NUMBERS)]
                request = script.message(number, suffix)
            if damage >= 0:
                at = damage % (len(request) or 1)
                request = request[:at] + bytes([damage ^ 0x55]) + request[at + 1 :]
            conversation.ask(request, room)
            room, damage = None, -1
