"""One client at the other end of a stream: bytes to messages, a session, messages to bytes.

The thread of a connection reads what has come, has the session answer every whole message of it,
and sends the answers, together where several were asked for together. Nothing is handed to another
thread but what the session says may have to wait; the reply of that is sent by the thread it was
waited for on. Requests are read into one buffer and replies are made in another, both used again
and again: file data goes from the file into the reply and from the request into the file.

What a client can cost us is bounded. A message of more than was agreed is not read. A client that
does not read its replies is not read either. One that asks for too much at once is held: its
requests are kept until others are answered, then left in the socket. Only Tflush and Tversion pass
those that are held, because a client whose requests hang has no other way to give them up.

What is no 9P at all ends the connection, with one trace record: after a wrong size nothing can be
understood. A client that has sent its last request (a half-closed stream) gets all its replies.

Threads: `serve` runs on the connection's own thread, `_later` on any. `_lock` guards the session,
the order of bytes on the stream, and everything below it.
"""

import socket
import struct
from collections import deque
from contextlib import suppress
from errno import EAGAIN
from math import inf
from threading import Condition, RLock
from time import monotonic

from tinyvmm import ninep, trace
from tinyvmm.fileserver.session import Finish, Session, Waiting

IN_FLIGHT_MAX = 64  # requests that wait; each may hold msize bytes
HELD_MAX = 1 << 20  # bytes of requests kept beyond those
FIRST_MAX = 8192  # bytes of a message before any size was agreed
READ_AHEAD = 64 * 1024  # bytes read beyond a largest message, and replies sent at once
GREETING = 10  # seconds a client has to say Tversion
LINGER = 30.0  # seconds to wait for the last replies of a client that asks no more

_AT_ONCE = 1e-3  # seconds: 0 would be for ever

_SIZE = struct.Struct("<I")


class Connection:
    """A client and its session, which the connection closes."""

    def __init__(self, sock: socket.socket, session: Session, idle: int = 0) -> None:
        """Take over `sock`, a blocking stream; `idle` seconds of silence, if not 0, end it."""
        self._sock = sock
        self._session = session
        self._idle = idle
        self._lock = RLock()
        self._changed = Condition(self._lock)  # fewer waiting, fewer held, or broken
        self._waiting = 0
        self._held: deque[bytes] = deque()
        self._held_size = 0
        self._replied = -inf  # when the last request that had waited was answered
        self._replies = memoryview(bytearray(FIRST_MAX + READ_AHEAD))
        self._filled = 0  # bytes of replies not sent yet; 0 whenever nobody has the lock
        self._submitting = False
        self._broken = False  # nothing can be sent any more

    def serve(self) -> None:
        """Answer until the client leaves, or `end` is called."""
        try:
            self._serve()
            with self._lock:
                self._changed.wait_for(lambda: self._broken or not self._busy(), LINGER)
        except ninep.ProtocolError as error:
            self._say(f"no 9P: {error}")
        except OSError as error:
            if error.errno == EAGAIN:
                self._say("nothing heard for too long")
        finally:
            self.end()
            with self._lock:
                self._session.close()
            self._sock.close()

    def end(self) -> None:
        """Have `serve` return soon, whatever it is waiting for; any thread may call."""
        self._broken = True
        with suppress(OSError):  # the client was quicker
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes who reads or sends, and has the lock
        if self._lock.acquire(timeout=1):
            self._changed.notify_all()
            self._lock.release()

    # --- requests ---------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Read and answer until nothing more will come."""
        sock, session = self._sock, self._session
        buffer = memoryview(bytearray(FIRST_MAX))
        start = end = 0
        limit = FIRST_MAX
        greeted = False
        deadline = monotonic() + GREETING
        _time_out(sock, GREETING)
        while count := self._receive(buffer[end:]):
            end += count
            with self._lock:
                while end - start >= 4:
                    (size,) = _SIZE.unpack_from(buffer, start)
                    if not ninep.HEADER.size <= size <= limit:
                        raise ninep.ProtocolError(f"a message of {size} bytes, {limit} at most")
                    if end - start < size:
                        break
                    request = buffer[start : start + size]
                    start += size
                    if request[4] == ninep.Tversion.number:
                        self._begin(request)
                        greeted = True
                        limit = session.msize
                        rest = buffer[start:end]
                        buffer = memoryview(bytearray(limit + READ_AHEAD))
                        start, end = 0, len(rest)
                        buffer[:end] = rest
                        _time_out(sock, self._idle)
                    elif greeted:
                        self._take(request)
                    else:
                        raise ninep.ProtocolError(f"a message of type {request[4]} first")
                self._send_replies()
            if not greeted:  # a byte now and then is not enough
                _time_out(sock, max(deadline - monotonic(), _AT_ONCE))
            if start == end:
                start = end = 0
            elif len(buffer) - start < limit:
                end -= start
                buffer[:end] = buffer[start : start + end]
                start = 0

    def _receive(self, room: memoryview) -> int:
        """Read what there is; gives 0 when no more will come."""
        sock, left = self._sock, 0.0
        while True:
            try:
                count = sock.recv_into(room)
            except ConnectionError:
                return 0
            except BlockingIOError:
                left = self._patience()
                if left <= 0:
                    raise
                _time_out(sock, max(left, _AT_ONCE))
                continue
            if left:
                _time_out(sock, self._idle)
            return count

    def _patience(self) -> float:
        """Seconds for which a client that was silent for so long may go on."""
        with self._lock:  # no reply is on its way to it
            if self._busy():
                return self._idle
            return self._replied + self._idle - monotonic()  # it had none to begin with until then

    def _begin(self, request: memoryview) -> None:
        """Answer a Tversion, which ends all that was before it."""
        self._held.clear()
        self._held_size = 0
        self._answer(request)
        self._send_replies()
        self._replies = memoryview(bytearray(self._session.msize + READ_AHEAD))

    def _take(self, request: memoryview) -> None:
        """Answer a request, or hold it until others have been answered."""
        if not self._held and self._waiting < IN_FLIGHT_MAX:
            self._answer(request)
        elif request[4] == ninep.Tflush.number:
            self._flush_held(request)
            self._answer(request)
            self._answer_held()
        else:
            self._held.append(bytes(request))
            self._held_size += len(request)
            while self._held_size > HELD_MAX and not self._broken:
                self._send_replies()
                self._changed.wait()

    def _flush_held(self, request: memoryview) -> None:
        """Forget the request of which this Tflush tells the tag, if it is a held one."""
        oldtag = request[7:9]
        kept = [held for held in self._held if held[5:7] != oldtag]
        self._held = deque(kept)
        self._held_size = sum([len(held) for held in kept])

    def _answer_held(self) -> None:
        """Answer the requests held, as many as can be now."""
        while self._held and self._waiting < IN_FLIGHT_MAX:
            request = self._held.popleft()
            self._held_size -= len(request)
            self._answer(memoryview(request))
            self._changed.notify()

    def _busy(self) -> bool:
        return self._waiting > 0 or bool(self._held)

    # --- replies ----------------------------------------------------------------------------------

    def _answer(self, request: memoryview) -> None:
        """Have the session answer, or begin to."""
        self._submitting = True
        size = self._session.submit([request], [self._replies[self._filled :]])
        self._submitting = False
        if isinstance(size, Waiting):
            self._waiting += 1
            size.start(self._later)
            return
        self._filled += size
        if self._filled >= READ_AHEAD:
            self._send_replies()

    def _later(self, finish: Finish) -> None:
        """Send the reply of a request that waited; on the thread that did."""
        with self._lock:
            reply = finish()
            if reply is None:
                return
            self._waiting -= 1
            self._changed.notify()
            if not self._submitting:  # else it is retired by the request being answered now
                self._send(reply)
                self._answer_held()
                self._send_replies()
            self._replied = monotonic()

    def _send_replies(self) -> None:
        """Send the replies made."""
        if self._filled:
            filled, self._filled = self._filled, 0
            self._send(self._replies[:filled])

    def _send(self, data: bytes | memoryview) -> None:
        if self._broken:
            return
        try:
            self._sock.sendall(data)
        except OSError:
            self.end()

    def _say(self, what: str) -> None:
        if trace.hook is not None:
            trace.hook(trace.Message(f"9P {self._session.name}", what))


def _time_out(sock: socket.socket, seconds: float) -> None:
    """Fail with EAGAIN after so many seconds of silence, 0 for never.

    By the kernel's own timer: Python's would cost one more system call a message.
    """
    timeval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
