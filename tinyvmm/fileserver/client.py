"""A 9P client: the other half of the protocol, for tests, benches and small programs.

`connect` gives a `Client`; its `attach` gives the root as a `File`, which is a fid with methods:

    with connect("unix:/run/9p") as client, client.attach() as root:
        with root.walk(b"etc", b"motd") as file:
            file.open(os.O_RDONLY)
            print(file.read(100))

It speaks every dialect that `ninep` has. What the server refuses is an OSError: with its errno,
where the dialect has one, else with EIO and the server's words.

`Client.ask` sends one request and waits for the answer. `send` and `wait` come apart, so that many
requests can be in flight. Who only sends, to a server that waits for its replies to be read, waits
for ever: `ask_all` keeps a window. One thread.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from errno import EIO, ENOENT
from typing import Self, TypeVar

from tinyvmm import ninep
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.address import parse_address
from tinyvmm.ninep import NINEP2000_L, NOFID, NONUNAME, NOTAG, Dialect, Message, Qid

MSIZE = 512 * 1024
WINDOW = 32  # requests in flight that `ask_all` keeps
_READ_AHEAD = 64 * 1024
_SIZE = struct.Struct("<I")

M = TypeVar("M", bound=Message)


def connect(address: str, *, dialect: Dialect = NINEP2000_L, msize: int = MSIZE) -> "Client":
    """Connect to `unix:PATH` or `tcp:HOST:PORT`; ConfigError if nobody is there."""
    parsed = parse_address(address)
    why = ""
    for family, where in parsed.resolve():
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.connect(where)
        except OSError as error:
            sock.close()
            why = error.strerror or str(error)
            continue
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Client(sock, dialect=dialect, msize=msize)
    raise ConfigError(f"cannot connect to {parsed}: {why}; start a server there first")


class Client:
    """One connection to a server; a context manager that closes it."""

    def __init__(
        self, sock: socket.socket, *, dialect: Dialect = NINEP2000_L, msize: int = MSIZE
    ) -> None:
        """Take over `sock`, a stream, and agree on a version; OSError if that is not to be had."""
        self._sock = sock
        self.dialect = dialect
        self.msize = msize
        self._buffer = memoryview(bytearray(msize + _READ_AHEAD))
        self._start = self._end = 0  # of what was read and not looked at
        self._replies: dict[int, Message] = {}  # by tag, for who waits later
        self._tags = _Numbers()
        self.fids = _Numbers()
        try:
            self._agree()
        except BaseException:
            sock.close()
            raise

    def _agree(self) -> None:
        version = self.dialect.version
        self._sock.sendall(self.dialect.encode(ninep.Tversion(self.msize, version), NOTAG))
        answer = self.receive()[1]
        if not isinstance(answer, ninep.Rversion) or answer.version != version:
            raise OSError(EIO, f"the server does not speak {version.decode()}")
        self.msize = min(self.msize, answer.msize)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave; the server forgets every fid."""
        self._sock.close()

    # --- requests and replies ---------------------------------------------------------------------

    def ask(self, request: Message, kind: type[M]) -> M:
        """Send a request and return its reply, of this kind; OSError if it was refused."""
        reply = self.wait(self.send(request))
        if not isinstance(reply, kind):
            raise ninep.ProtocolError(f"{reply} to {request}")
        return reply

    def ask_all(self, requests: Iterable[Message], window: int = WINDOW) -> Iterator[Message]:
        """Send requests before earlier ones are answered; gives the replies in their order."""
        tags: list[int] = []
        for request in requests:
            if len(tags) >= window:
                yield self.wait(tags.pop(0))
            tags.append(self.send(request))
        for tag in tags:
            yield self.wait(tag)

    def send(self, request: Message) -> int:
        """Send a request and return its tag."""
        tag = self._tags.take()
        self._sock.sendall(self.dialect.encode(request, tag))
        return tag

    def wait(self, tag: int) -> Message:
        """Return the reply to the request of this tag; OSError if it was refused."""
        reply = self._replies.pop(tag, None)
        while reply is None:
            got, found = self.receive()
            if got == tag:
                reply = found
            else:
                self._replies[got] = found
        self._tags.give_back(tag)
        if isinstance(reply, ninep.Rlerror):
            raise OSError(reply.ecode, os.strerror(reply.ecode))
        if isinstance(reply, ninep.Rerror):
            raise OSError(reply.errno or EIO, reply.ename.decode(errors="replace"))
        return reply

    def flush(self, tag: int) -> Message | None:
        """Give up the request of this tag; gives its reply if that was quicker."""
        self.ask(ninep.Tflush(tag), ninep.Rflush)
        self._tags.give_back(tag)
        return self._replies.pop(tag, None)

    def receive(self) -> tuple[int, Message]:
        """Take the next message off the stream; ProtocolError if it is none."""
        while True:
            have = self._end - self._start
            if have >= 4:
                (size,) = _SIZE.unpack_from(self._buffer, self._start)
                if not ninep.HEADER.size <= size <= self.msize:
                    raise ninep.ProtocolError(f"a reply of {size} bytes, {self.msize} at most")
                if have >= size:
                    at, self._start = self._start, self._start + size
                    return self.dialect.decode(bytes(self._buffer[at : self._start]))
            self._fill()

    def _fill(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._start < self.msize:
            rest = self._buffer[self._start : self._end]
            self._start, self._end = 0, len(rest)
            self._buffer[: self._end] = rest
        count = self._sock.recv_into(self._buffer[self._end :])
        if not count:
            raise ConnectionError("the server hung up")
        self._end += count

    # --- files ------------------------------------------------------------------------------------

    def attach(self, aname: bytes = b"", uname: bytes = b"", n_uname: int = NONUNAME) -> "File":
        """Return the root, or what the server calls `aname`, on behalf of a user."""
        fid = self.fids.take()
        if self.dialect is ninep.NINEP2000:
            n_uname = NONUNAME
        request = ninep.Tattach(fid, NOFID, uname, aname, n_uname)
        try:
            return File(self, fid, self.ask(request, ninep.Rattach).qid)
        except OSError:
            self.fids.give_back(fid)
            raise


class File:
    """A fid, until it is closed or removed; a context manager that closes it."""

    def __init__(self, client: Client, fid: int, qid: Qid) -> None:
        """Made by `attach` and `walk`."""
        self.client = client
        self.fid = fid
        self.qid = qid
        self._linux = client.dialect is NINEP2000_L
        self._gone = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Clunk the fid, once."""
        if not self._gone:
            self._end(ninep.Tclunk(self.fid))

    def remove(self) -> None:
        """Remove the file; the fid is gone even if that fails."""
        self._end(ninep.Tremove(self.fid))

    def _end(self, request: Message) -> None:
        self._gone = True
        try:
            self.client.ask(request, Message)
        finally:
            self.client.fids.give_back(self.fid)

    def walk(self, *names: bytes) -> "File":
        """The file found from here by the names; a second fid for this one if there are none."""
        client = self.client
        fid = client.fids.take()
        found = File(client, self.fid, self.qid)
        try:
            for start in range(0, max(len(names), 1), ninep.MAXWELEM):
                found = found._step(fid, names[start : start + ninep.MAXWELEM])
        except OSError:
            if found.fid == fid:
                found.close()
            else:
                client.fids.give_back(fid)
            raise
        return found

    def _step(self, fid: int, names: tuple[bytes, ...]) -> "File":
        qids = self.client.ask(ninep.Twalk(self.fid, fid, names), ninep.Rwalk).wqid
        if len(qids) < len(names):
            raise OSError(ENOENT, os.strerror(ENOENT), names[len(qids)])
        return File(self.client, fid, qids[-1] if qids else self.qid)

    def open(self, flags: int = os.O_RDONLY) -> Self:
        """Make it ready to be read or written; `flags` are O_*, of which Plan 9 knows few."""
        if self._linux:
            self.qid = self.client.ask(ninep.Tlopen(self.fid, flags), ninep.Rlopen).qid
        else:
            request = ninep.Topen(self.fid, _plan9_mode(flags))
            self.qid = self.client.ask(request, ninep.Ropen).qid
        return self

    def create(
        self, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644, gid: int = NONUNAME
    ) -> Self:
        """Create and open a file in this directory; the fid then stands for that."""
        if self._linux:
            made = ninep.Tlcreate(self.fid, name, flags | os.O_CREAT, mode, gid)
            self.qid = self.client.ask(made, ninep.Rlcreate).qid
        else:
            request = ninep.Tcreate(self.fid, name, mode, _plan9_mode(flags))
            self.qid = self.client.ask(request, ninep.Rcreate).qid
        return self

    def mkdir(self, name: bytes, mode: int = 0o755, gid: int = NONUNAME) -> None:
        """Create a directory in this one."""
        if self._linux:
            self.client.ask(ninep.Tmkdir(self.fid, name, mode, gid), ninep.Rmkdir)
            return
        with self.walk() as made:
            request = ninep.Tcreate(made.fid, name, ninep.DMDIR | mode, ninep.OREAD)
            self.client.ask(request, ninep.Rcreate)

    def stat(self) -> ninep.Rgetattr | ninep.Stat:
        """What the dialect tells of a file."""
        if self._linux:
            request = ninep.Tgetattr(self.fid, ninep.P9_GETATTR_BASIC)
            return self.client.ask(request, ninep.Rgetattr)
        return self.client.ask(ninep.Tstat(self.fid), ninep.Rstat).stat

    def read(self, count: int = -1, offset: int = 0) -> bytes:
        """Read `count` bytes, or all there are from `offset` on."""
        most = self.client.msize - ninep.IOHDRSZ
        if 0 <= count <= most:
            return self._read(count, offset)
        pieces: list[bytes] = []
        while count:
            piece = self._read(most if count < 0 else min(most, count), offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            count -= len(piece) if count > 0 else 0
        return b"".join(pieces)

    def _read(self, count: int, offset: int) -> bytes:
        data = self.client.ask(ninep.Tread(self.fid, offset, count), ninep.Rread).data
        return data if isinstance(data, bytes) else b"".join(data)

    def write(self, data: bytes, offset: int = 0) -> int:
        """Write all of `data`; gives its size, less if the server took less."""
        most = self.client.msize - ninep.IOHDRSZ
        done = 0
        while done < len(data):
            request = ninep.Twrite(self.fid, offset + done, data[done : done + most])
            count = self.client.ask(request, ninep.Rwrite).count
            if not count:
                break
            done += count
        return done

    def names(self) -> Iterator[bytes]:
        """The names in this directory, which is open; of .L without `.` and `..`."""
        return self._linux_names() if self._linux else self._plan9_names()

    def _linux_names(self) -> Iterator[bytes]:
        offset = 0
        while True:
            request = ninep.Treaddir(self.fid, offset, self.client.msize - ninep.IOHDRSZ)
            data = self.client.ask(request, ninep.Rreaddir).data
            assert isinstance(data, bytes)  # noqa: S101 - as `decode` gives it
            entries = self.client.dialect.decode_records(ninep.Dirent, data)
            if not entries:
                return
            yield from [entry.name for entry in entries if entry.name not in {b".", b".."}]
            offset = entries[-1].offset

    def _plan9_names(self) -> Iterator[bytes]:
        offset = 0
        while data := self._read(self.client.msize - ninep.IOHDRSZ, offset):
            for stat in self.client.dialect.decode_records(ninep.Stat, data):
                yield stat.name
            offset += len(data)


class _Numbers:
    """Tags or fids that are free; the smallest ones first, so that there are few."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give_back(self, number: int) -> None:
        self._free.append(number)


def _plan9_mode(flags: int) -> int:
    """As open(5) has it: what of open(2)'s flags it knows."""
    mode = flags & os.O_ACCMODE
    if flags & os.O_TRUNC:
        mode |= ninep.OTRUNC
    if flags & os.O_APPEND:
        mode |= ninep.OAPPEND
    return mode
