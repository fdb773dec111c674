"""One client's session: requests in, replies out, files of a tree in between.

Follows intro(5) and the pages after it in section 5 of Plan 9's manual. This file has what every
dialect shares, the session itself and its common messages; what only 9P2000.L says is in linux.py,
what only 9P2000 and 9P2000.u say in plan9.py. Tversion settles which it is.
One method answers one message and has its name; read `submit`, then `Twalk`, then what you like.
`msize` limits every message of a session; `iounit` is left at 0, as much as msize allows.

A fid is a number the client chose for a file: `Fid` holds the tree's node and, once opened, the
open file. An extended attribute being read or written is an open file too (`XattrReader`,
`XattrWriter`), and so the same Tread, Twrite and Tclunk serve it.

Whatever a client sends is answered: with what it asked for, or with an error and a Linux errno. An
OSError from the tree is that answer. Any other exception is a bug of ours, so every number is held
to what system calls take before a tree sees it.

Many requests can be in flight. What need not wait is answered at once, which is quicker than to
hand it over; what might have to (a `Slow`) is done by a small pool, and its reply leaves when it is
ready, before or after those of other requests. Only the reply's making touches the session again,
and the memory of request and reply is never touched by the pool: so Tflush can retire a request at
once, however long its work may still hang in some file system.

Threads: the session has no lock. Its transport has one, and holds it around `submit`, around the
`finish` it is handed by `later` until that reply is sent, and around `close`.
"""

import os
from collections.abc import Callable, Sequence
from errno import (
    EBADF,
    EBUSY,
    EINVAL,
    EIO,
    EMFILE,
    EMSGSIZE,
    ENOENT,
    ENOMEM,
    EOPNOTSUPP,
    EPROTO,
    ESTALE,
)
from threading import Event
from typing import Any

from tinyvmm import ninep, trace
from tinyvmm.fileserver import linux, users
from tinyvmm.fileserver.fid import Answer, Fid, Slow, failure, offset_of
from tinyvmm.fileserver.locks import LockTable
from tinyvmm.fileserver.pool import Pool
from tinyvmm.fileserver.tree import AT_REMOVEDIR, Node, OpenFile, Tree
from tinyvmm.fileserver.xattr import XattrReader
from tinyvmm.ninep import Dialect, Message, Qid
from tinyvmm.views import cut, scatter, size_of

FIDS_MAX = 1 << 20  # v9fs keeps one for every name it has cached
IN_FLIGHT_MAX = 256  # requests that wait, each with up to msize bytes; flushed ones wait as well
XATTRS_MAX = 1024  # attributes open at once, each with up to 64 KiB
MSIZE_MIN = 256  # room for every reply of fixed size
MSIZE_MAX = 512 * 1024
READ_HEAD = 7 + 4  # size[4] Rread tag[2] count[4]

Finish = Callable[[], bytes | None]
"""Gives a late reply; b"" if there is to be none, None if that was said before."""
Later = Callable[[Finish], None]
"""How a transport takes a late reply, on any thread."""


class Waiting:
    """A request in flight that may have to wait, until `start` has had it answered."""

    __slots__ = ("_later", "_session", "_slow", "_value", "retired", "tag")

    def __init__(self, session: "Session", tag: int, slow: Slow) -> None:
        self._session = session
        self.tag = tag
        self._slow = slow
        self._value: Any = None
        self.retired = False
        slow.fid.busy += 1

    def start(self, later: Later) -> None:
        """Begin; the reply comes by `later`, on any thread: this one, if there can be no other."""
        self._later = later
        try:
            self._session.pool().submit(self._run)
        except OSError as error:
            if trace.hook is not None:
                text = "a request failed for want of a thread: this computer can start no more"
                trace.hook(trace.Message(self._session.name, text))
            self._value = error
            later(self._finish)

    def _run(self) -> None:
        """Do the work, on a thread of the pool."""
        try:
            self._value = self._slow.work()
        except OSError as error:
            self._value = error
        except BaseException:  # a bug of ours, to be seen; but the client need not hang by it
            self._value = failure(EIO)
            self._later(self._finish)
            raise
        self._later(self._finish)

    def retire(self) -> None:
        """Answer nothing, now; the work may still go on."""
        self.retired = True
        self._later(bytes)

    def _finish(self) -> bytes | None:
        slow, value = self._slow, self._value
        answer: Message | None = None
        try:
            if isinstance(value, OSError):
                raise value
            if not self.retired:
                answer = slow.finish(value)
            elif slow.drop is not None:
                slow.drop(value)
        except OSError as error:
            answer = self._session.error(error.errno or EIO)
        slow.fid.busy -= 1
        return self._session.finish(self, slow.fid, answer)


class Session:
    """A conversation with one client about one tree."""

    def __init__(
        self,
        tree: Tree,
        *,
        msize_max: int = MSIZE_MAX,
        fids_max: int = FIDS_MAX,
        lock_table: LockTable | None = None,
        name: str = "9p",
    ) -> None:
        """Serve `tree`, which stays the caller's; sessions of one server share `lock_table`.

        `name` is the session's in traces.
        """
        self.tree = tree
        self.msize_max = msize_max
        self.fids_max = fids_max
        self.name = name
        self.locks = lock_table or LockTable()
        self.msize = msize_max
        self.dialect = ninep.NINEP2000_L
        self._methods = METHODS | linux.METHODS
        self.fids: dict[int, Fid] = {}
        self._stale: set[int] = set()  # fids whose file was not found by `load`
        self._agreed = False  # on a version: nothing can be attached before
        self._reply: Sequence[memoryview] = ()
        self._in_flight: dict[int, Waiting] = {}
        self._unfinished = 0  # those in flight, and those retired whose work still goes on
        self._xattrs = 0  # fids that stand for an extended attribute
        self._pool: Pool | None = None

    # --- requests and replies ---------------------------------------------------------------------

    def submit(self, request: Sequence[memoryview], reply: Sequence[memoryview]) -> int | Waiting:
        """Answer one request into `reply`, giving the reply's size; or what is to be started.

        The size is 0 if not even an error fits `reply`.
        """
        tag = ninep.NOTAG
        self._reply = reply
        answer: Message
        try:
            tag, message = self.dialect.decode_views(request, self.msize)
            if trace.hook is not None:
                trace.hook(trace.NineP(self.name, tag, message))
            result = self._methods.get(message.number, Session.unsupported)(self, message)
            if isinstance(result, Slow):
                return self._wait(tag, result)
            answer = result
        except OSError as error:
            answer = self.error(error.errno or EIO)
        except ninep.ProtocolError:
            tag, answer = self._refuse(request)
        finally:
            self._reply = ()  # nobody may hold on to guest memory
        if trace.hook is not None:
            trace.hook(trace.NineP(self.name, tag, answer))
        try:
            return self.dialect.encode_views(reply, answer, tag, self.msize)
        except ninep.ProtocolError:
            return self._too_big(reply, tag)

    def handle(self, request: Sequence[memoryview], reply: Sequence[memoryview]) -> int:
        """Answer one request, however long it takes; for who has but one at a time."""
        size = self.submit(request, reply)
        if not isinstance(size, Waiting):
            return size
        ready = Event()
        finishes: list[Finish] = []

        def later(finish: Finish) -> None:
            finishes.append(finish)
            ready.set()

        size.start(later)
        ready.wait()
        late = finishes[0]() or b""
        if len(late) > size_of(reply):
            return self._too_big(reply, size.tag)
        return scatter(reply, late)

    def close(self) -> None:
        """End the session: forget every request and every fid, close every file."""
        in_flight, self._in_flight = self._in_flight, {}
        for waiting in in_flight.values():
            waiting.retire()
        fids, self.fids = self.fids, {}
        self._stale.clear()
        for fid in fids.values():
            try:
                self._release(fid)
            except OSError:
                continue  # nobody is left to be told
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _wait(self, tag: int, slow: Slow) -> Waiting:
        """Note a request in flight; its tag may not be used again until it has been answered."""
        if tag in self._in_flight:
            raise failure(EPROTO)
        if self._unfinished >= IN_FLIGHT_MAX:
            raise failure(ENOMEM)
        self._unfinished += 1
        waiting = self._in_flight[tag] = Waiting(self, tag, slow)
        return waiting

    def pool(self) -> Pool:
        """The threads that wait for this client."""
        if self._pool is None:
            self._pool = Pool("9P")
        return self._pool

    def finish(self, waited: Waiting, fid: Fid, answer: Message | None) -> bytes | None:
        """Take a request off the list; gives its reply's bytes, None if it was retired."""
        self._unfinished -= 1
        if fid.gone and not fid.busy:
            try:
                fid.close()
            except OSError as error:
                answer = self.error(error.errno or EIO)
        if waited.retired or answer is None:
            return None
        del self._in_flight[waited.tag]
        if trace.hook is not None:
            trace.hook(trace.NineP(self.name, waited.tag, answer))
        data = self.dialect.encode(answer, waited.tag)
        if len(data) > self.msize:
            data = self.dialect.encode(self.error(EMSGSIZE), waited.tag)
        return data

    def error(self, number: int) -> Message:
        """How this dialect says that a request has failed."""
        if self.dialect is ninep.NINEP2000_L:
            return ninep.Rlerror(number)
        text = os.strerror(number).encode()
        return ninep.Rerror(text, number if self.dialect is ninep.NINEP2000_U else 0)

    def _refuse(self, request: Sequence[memoryview]) -> tuple[int, Message]:
        """Answer what is no message, under its tag if it got that far."""
        head = b"".join(cut(request, 0, ninep.HEADER.size))
        if len(head) < ninep.HEADER.size:
            return ninep.NOTAG, self.error(EPROTO)
        _, number, tag = ninep.HEADER.unpack(head)
        return tag, self.error(EPROTO if number in self.dialect.messages else EOPNOTSUPP)

    def _too_big(self, reply: Sequence[memoryview], tag: int) -> int:
        """Answer that the answer does not fit, if at least that fits."""
        try:
            return self.dialect.encode_views(reply, self.error(EMSGSIZE), tag, self.msize)
        except ninep.ProtocolError:
            return 0

    # --- fids -----------------------------------------------------------------------------------

    def fid(self, number: int) -> Fid:
        """The fid of this number; EBADF if there is none, ESTALE if its file is not to be found."""
        fid = self.fids.get(number)
        if fid is None:
            raise failure(ESTALE if number in self._stale else EBADF)
        return fid

    def node(self, number: int) -> Node:
        """The file of this fid; EBADF if there is no such fid."""
        return self.fid(number).node

    def file(self, number: int) -> OpenFile:
        """The open file of this fid; EBADF if there is no such fid or it is not open."""
        file = self.fid(number).file
        if file is None:
            raise failure(EBADF)
        return file

    def unopened(self, number: int) -> Fid:
        """The fid of this number; EBADF if there is none, or it is open for I/O already."""
        fid = self.fid(number)
        if fid.file is not None:
            raise failure(EBADF)
        return fid

    def check_new(self, number: int) -> None:
        """EBADF if a new fid cannot have this number, EMFILE if there are too many already."""
        if number in self.fids or number in self._stale or number == ninep.NOFID:
            raise failure(EBADF)
        if len(self.fids) >= self.fids_max:
            raise failure(EMFILE)

    def parent_of(self, fid: Fid) -> Node:
        """Where the fid's file is to be found by the fid's name; ENOENT if it no longer is."""
        if fid.parent is None or fid.name == b"..":
            raise failure(EBUSY)
        found = fid.parent.walk(fid.name)
        try:
            if found.qid().path != fid.node.qid().path:
                raise failure(ENOENT)
        finally:
            found.close()
        return fid.parent

    def open_xattr(self, fid: Fid, file: XattrReader) -> None:
        """Let the fid stand for an extended attribute; EMFILE if there are too many that do."""
        if self._xattrs >= XATTRS_MAX:
            raise failure(EMFILE)
        self._xattrs += 1
        fid.file = file

    def _forget(self, number: int) -> Fid:
        try:
            fid = self.fid(number)
        finally:
            self._stale.discard(number)
        del self.fids[number]
        return fid

    def _release(self, fid: Fid) -> None:
        if fid.locked:
            self.locks.drop(fid.node.qid().path, fid)
        if isinstance(fid.file, XattrReader):
            self._xattrs -= 1
        try:
            if fid.doomed:
                is_directory = fid.node.qid().type & ninep.QTDIR
                self.parent_of(fid).unlink(fid.name, AT_REMOVEDIR if is_directory else 0)
        finally:
            fid.close()

    # --- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the client's fids and locks in plain JSON types; nothing may be in flight."""
        from tinyvmm.fileserver import saved

        return {
            "dialect": self.dialect.version.decode(),
            "agreed": self._agreed,
            "msize": self.msize,
            **saved.save(self.tree, self.fids, self._stale, self.locks),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on with the client that `save` described, on the same tree."""
        from tinyvmm.fileserver import saved

        self.close()
        self._speak(ninep.DIALECTS[state["dialect"].encode()])
        self._agreed, self.msize = state["agreed"], state["msize"]
        self.fids, self._stale = saved.load(self.tree, state, self.locks, self.dialect)
        self._xattrs = sum(isinstance(fid.file, XattrReader) for fid in self.fids.values())

    # --- beginning and end ----------------------------------------------------------------------

    def Tversion(self, m: ninep.Tversion) -> Message:
        """Begin anew, whatever was before."""
        self.close()
        dialect = understood(m.version)
        self._agreed = False
        if dialect is not None:
            self._speak(dialect)
        if m.msize < MSIZE_MIN:
            raise failure(EMSGSIZE)
        self._agreed = dialect is not None
        self.msize = min(m.msize, self.msize_max)
        return ninep.Rversion(self.msize, dialect.version if dialect else b"unknown")

    def _speak(self, dialect: Dialect) -> None:
        self.dialect = dialect
        if dialect is ninep.NINEP2000_L:
            self._methods = METHODS | linux.METHODS
        else:
            from tinyvmm.fileserver import plan9  # no guest that boots from us needs it

            self._methods = METHODS | plan9.METHODS

    def Tauth(self, m: ninep.Tauth) -> Message:
        """Say that nobody needs to authenticate: diod's clients take ENOENT alone for that."""
        del m
        raise failure(ENOENT)

    def Tattach(self, m: ninep.Tattach) -> Message:
        """Give a user the root, or the directory `aname` says, as a path from there."""
        if not self._agreed:
            raise failure(EPROTO)
        if m.afid != ninep.NOFID:
            raise failure(EBADF)  # Tauth makes none
        self.check_new(m.fid)
        node = self.tree.root()
        for name in m.aname.split(b"/"):
            if name:
                above = node
                try:
                    node = above.walk(name)
                finally:
                    above.close()
        uid = m.n_uname
        if uid == ninep.NONUNAME and self.dialect is not ninep.NINEP2000_L:
            uid = users.user_of(m.uname)
        self.fids[m.fid] = Fid(node, uid, None, b"")
        return ninep.Rattach(node.qid())

    def Tflush(self, m: ninep.Tflush) -> Message:
        """Retire the old request, if it has not been answered yet; then its tag is free.

        flush(5): nothing is sent for the old request behind the Rflush.
        """
        waiting = self._in_flight.pop(m.oldtag, None)
        if waiting is not None:
            waiting.retire()
        return ninep.Rflush()

    def Tclunk(self, m: ninep.Tclunk) -> Message:
        """Forget the fid; it is gone even if closing it fails."""
        self._release(self._forget(m.fid))
        return ninep.Rclunk()

    def Tremove(self, m: ninep.Tremove) -> Message:
        """Remove the file by the name it was walked to, and clunk the fid in any case."""
        fid = self._forget(m.fid)
        fid.doomed = True
        self._release(fid)
        return ninep.Rremove()

    # --- finding --------------------------------------------------------------------------------

    def Twalk(self, m: ninep.Twalk) -> Message:
        """Walk as far as the names lead; `newfid` changes only if that is the whole way.

        The manual wants `fid` unopened; v9fs clones and walks open ones too, for files whose name
        is gone, so only a `newfid` that is the open `fid` itself is refused.
        """
        fid = self.fid(m.fid)
        if m.newfid != m.fid:
            self.check_new(m.newfid)
        elif fid.file is not None:
            raise failure(EINVAL)
        if isinstance(fid.file, XattrReader):
            raise failure(EBADF)
        if not m.wname:
            if m.newfid != m.fid:
                parent = fid.parent and fid.parent.retain()
                self.fids[m.newfid] = Fid(fid.node.retain(), fid.uid, parent, fid.name)
            return ninep.Rwalk(())
        if len(m.wname) > ninep.MAXWELEM:
            raise failure(EINVAL)

        above, node = None, fid.node.retain()
        qids: list[Qid] = []
        try:
            for name in m.wname:
                if not name or name == b"." or b"/" in name or b"\0" in name:
                    raise failure(ENOENT)
                below = node.walk(name)
                if above is not None:
                    above.close()
                above, node = node, below
                qids.append(below.qid())
        except OSError:
            node.close()
            if above is not None:
                above.close()
            if not qids:
                raise
            return ninep.Rwalk(tuple(qids))
        walked = Fid(node, fid.uid, above, m.wname[-1])
        self.fids[m.newfid] = walked
        if m.newfid == m.fid:
            fid.close()
        return ninep.Rwalk(tuple(qids))

    # --- contents -------------------------------------------------------------------------------

    def Tread(self, m: ninep.Tread) -> Answer:
        """Read from the file straight into the reply, if what is asked for is at hand."""
        file = self.file(m.fid)
        offset = offset_of(m.offset)
        buffers = self.room(ninep.Rread, m.count)
        count = file.readv_now(buffers, offset)
        if count is not None:
            return ninep.Rread(cut(buffers, 0, count))
        wanted = sum([len(buffer) for buffer in buffers])

        def read() -> ninep.Data:
            data = memoryview(bytearray(wanted))
            return [data[: file.readv([data], offset)]]

        return Slow(self.fid(m.fid), read, ninep.Rread)

    def Twrite(self, m: ninep.Twrite) -> Answer:
        """Write from the request straight into the file, if that need not wait."""
        fid = self.fid(m.fid)
        file = fid.file
        if file is None:
            raise failure(EBADF)
        offset = offset_of(m.offset)
        if fid.set_id:
            fid.clear_set_id()
        views = m.data if isinstance(m.data, list) else [memoryview(m.data)]
        count = file.writev_now(views, offset)
        if count is not None:
            return ninep.Rwrite(count)
        data = memoryview(b"".join(views))
        return Slow(fid, lambda: file.writev([data], offset), ninep.Rwrite)

    def room(self, kind: type[Message], count: int) -> list[memoryview]:
        """Where the data of the reply goes: no more than asked, agreed or there."""
        return ninep.room(self._reply, kind, min(count, self.msize - READ_HEAD))

    def unsupported(self, m: Message) -> Message:
        """Refuse what is no request, or none we know."""
        del m
        raise failure(EOPNOTSUPP)


METHODS: dict[int, Callable[[Session, Any], Answer]] = {
    number: getattr(Session, kind.__name__)
    for number, kind in ninep.MESSAGES.items()
    if hasattr(Session, kind.__name__)
}


def understood(version: bytes) -> Dialect | None:
    """The dialect to answer a Tversion with, as version(5) says; None if we know none.

    What follows a period is an extension we may leave out, the last first; and of 9Pnnnn we may
    answer any that is earlier.
    """
    for dialect in (ninep.NINEP2000_L, ninep.NINEP2000_U, ninep.NINEP2000):
        if (version + b".").startswith(dialect.version + b"."):
            return dialect
    number = version.partition(b".")[0]
    later = len(number) == 6 and number[2:].isdigit() and number > b"9P2000"
    return ninep.NINEP2000 if later and number[:2] == b"9P" else None
