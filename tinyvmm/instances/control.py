r"""The control socket of a machine: JSON-RPC 2.0 over a Unix stream socket, one line a message.

    > {"jsonrpc": "2.0", "id": 1, "method": "status"}\n
    < {"jsonrpc": "2.0", "id": 1, "result": {"state": "running", ...}}\n
    < {"jsonrpc": "2.0", "method": "trace_record", "params": {...}}\n

What methods there are is in supervisor.py, and docs/control.md describes them. Who may connect is
for control_server.py to say, which listens. The server notifies a client of what it has asked to be
told. A message without an id gets no answer; arrays of messages are not understood.

Threads: each client has one, which reads a line and does as it says, one after the other. A method
that may have to wait is marked `remote(waits=True)`: it runs on a thread of its own, so that it
holds up nobody, and answers when it is done; those of one `lane` wait in line for each other.
What a client does not read is kept for it by another thread, and no lock is held meanwhile.

Everything is bounded: the clients (control_server.py), a line (`LINE_MAX`), what a client may have
under way (`CALLS_MAX`, `CALLS_BYTES_MAX`), and what waits for it to read (`UNREAD_MAX`): beyond
that no more of its requests are read, and `Client.notify` refuses. So a client that floods, reads
nothing, or never ends its line stops nobody but itself.

Specification: JSON-RPC 2.0, sections 4 and 5.
"""

import json
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from tinyvmm.errors import ConfigError, TinyvmmError

if TYPE_CHECKING:
    from tinyvmm.instances.control_server import ControlServer

LINE_MAX = 1 << 20
CALLS_MAX = 128  # of one client that wait
CALLS_BYTES_MAX = 4 << 20  # of all their lines
UNREAD_MAX = 4 << 20
CLOSE_TIMEOUT = 2.0  # seconds for a client to read what it is owed when the server closes

# JSON-RPC 2.0, section 5.1
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
REFUSED = -32000  # the machine cannot do it; the message says why
BUSY = -32001  # there is too much under way: ask again later

Method = Callable[..., Any]
MethodT = TypeVar("MethodT", bound=Method)


class InvalidParamsError(Exception):
    """What a method was given is not what it takes; the text says what."""


class Remote(NamedTuple):
    """How a method is called by a client."""

    waits: bool = False
    lane: str | None = None
    """Calls of one client with the same lane, and value of `lane_by`, are made one by one."""
    lane_by: str | None = None
    """The name of a parameter."""
    client: bool = False
    """Whether it takes the `Client` that calls, as `client`."""


def remote(
    *,
    waits: bool = False,
    lane: str | None = None,
    lane_by: str | None = None,
    client: bool = False,
) -> Callable[[MethodT], MethodT]:
    """Mark a method with how it is called; see Remote."""

    def mark(method: MethodT) -> MethodT:
        method.__dict__["remote"] = Remote(waits, lane, lane_by, client)
        return method

    return mark


def how(method: Method) -> Remote:
    """Return how a method is called."""
    found: Remote = getattr(method, "remote", _AT_ONCE)
    return found


_AT_ONCE = Remote()


def check(method: Method, params: Mapping[str, Any]) -> None:
    """Raise InvalidParamsError if a method cannot be called so."""
    from tinyvmm.instances.control_schema import problem_of

    problem = problem_of(method, params)
    if problem is not None:
        raise InvalidParamsError(problem)


class Client:
    """One connection, on the server's side."""

    def __init__(self, server: "ControlServer", sock: socket.socket) -> None:
        self._server = server
        self._methods = server.methods()
        self._sock = sock
        self._changed = threading.Condition()  # guards all below
        self._unread: deque[memoryview] = deque()
        self._unread_len = 0
        self._writing = False
        self._calls = 0
        self._calls_len = 0
        self._lanes: dict[tuple[str, Any], deque[Callable[[], None]]] = {}
        self._when_gone: list[Callable[[Client], None]] = []
        self._when_room: list[Callable[[], None]] = []
        self.gone = False
        """Whether nobody is there any more to be told anything."""

    # --- for methods, on any thread ---------------------------------------------------------

    def notify(self, method: str, params: Mapping[str, Any]) -> bool:
        """Send a notification without waiting; False if the client has too much to read already."""
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        data = memoryview(json.dumps(message).encode() + b"\n")
        with self._changed:
            if self.gone or self._unread_len >= UNREAD_MAX:
                return False
            self._send(data)
            return True

    @property
    def has_room(self) -> bool:
        """Whether `notify` would send."""
        return self._unread_len < UNREAD_MAX // 2

    def when_room(self, act: Callable[[], None]) -> None:
        """Call `act` once when `has_room` or the client is gone; perhaps at once, on any thread."""
        with self._changed:
            if not self.has_room and not self.gone:
                self._when_room.append(act)
                return
        act()

    def when_gone(self, act: "Callable[[Client], None]") -> None:
        """Call `act` once when the client is gone; perhaps at once."""
        with self._changed:
            if not self.gone:
                if act not in self._when_gone:
                    self._when_gone.append(act)
                return
        act(self)

    # --- sending ----------------------------------------------------------------------------

    def _answer(self, answer: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(answer).encode() + b"\n")
        with self._changed:
            self._send(data)

    def _send(self, data: memoryview) -> None:
        """Send what can be sent, and leave the rest to a thread; the lock is held."""
        if self.gone:
            return
        if not self._writing:
            try:
                data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # it has gone, as reading will show
        if data:
            self._unread.append(data)
            self._unread_len += len(data)
            if not self._writing:
                self._writing = True
                threading.Thread(target=self._write, name="control out", daemon=True).start()

    def _write(self) -> None:
        """Send what was left, as the client reads it."""
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        while True:
            with self._changed:
                data = self._unread[0] if self._unread and not self.gone else None
                if data is None:
                    self._writing = False
                    self._changed.notify_all()
                    return
            poller.poll(1000)
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if self._server.closed_for > CLOSE_TIMEOUT:
                    self._leave()
                continue
            except OSError:
                self._leave()
                continue
            with self._changed:
                if self.gone:  # meanwhile, and what it had to read is forgotten
                    continue
                if sent == len(data):
                    self._unread.popleft()
                else:
                    self._unread[0] = data[sent:]
                self._unread_len -= sent
                acts: list[Callable[[], None]] = []
                if self.has_room:
                    acts, self._when_room = self._when_room, []
                self._changed.notify_all()
            for act in acts:
                act()

    def _leave(self) -> None:
        """Nothing reaches it any more; tell whom that concerns."""
        with self._changed:
            self.gone = True
            gone, self._when_gone = self._when_gone, []
            room, self._when_room = self._when_room, []
            self._unread.clear()
            self._unread_len = 0
            self._changed.notify_all()
        for act in gone:
            act(self)
        for done in room:
            done()

    # --- receiving: the client's thread -----------------------------------------------------

    def serve(self) -> None:
        """Do as it says until it has no more to say, or has gone."""
        try:
            with self._sock.makefile("rb") as lines:
                while line := lines.readline(LINE_MAX + 1):
                    if len(line) > LINE_MAX:
                        self._answer(_failure(None, PARSE_ERROR, f"a line past {LINE_MAX}"))
                        break
                    self._take(line)
                    with self._changed:
                        self._changed.wait_for(lambda: self.gone or self._unread_len < UNREAD_MAX)
        except OSError:
            self._leave()
        self._see_off()

    def _see_off(self) -> None:
        """It says no more: let it have its answers, unless it has gone altogether."""
        poller = select.poll()
        poller.register(self._sock, 0)  # that is POLLHUP: both directions are closed
        while not poller.poll(0) and self._server.closed_for <= CLOSE_TIMEOUT:
            with self._changed:
                if self._changed.wait_for(lambda: not self._calls and not self._writing, 0.1):
                    break
        self._leave()
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
        self._server.forget(self._sock)

    def _take(self, line: bytes) -> None:
        """Do as a message says, or see to it that somebody does."""
        try:
            message = _decoder.decode(line.decode())
            if b"\\u" in line:  # half of a pair, which is no character, can be written so
                json.dumps(message, ensure_ascii=False).encode(errors="surrogateescape")
        except (ValueError, RecursionError) as error:
            self._answer(_failure(None, PARSE_ERROR, f"no JSON: {error}"))
            return
        if not _is_request(message):
            number = message.get("id") if isinstance(message, dict) else None
            number = number if isinstance(number, str | int | float) else None
            self._answer(_failure(number, INVALID_REQUEST, "no request of JSON-RPC 2.0"))
            return
        method = self._methods.get(message["method"])
        if method is None:
            text = f"no method is named {message['method']!r}"
            self._reply(message, _failure(message.get("id"), METHOD_NOT_FOUND, text))
        elif how(method).waits:
            self._begin(method, message, len(line))
        else:
            self._reply(message, self._call(method, message))

    def _reply(self, message: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        if "id" in message:
            self._answer(answer)

    def _begin(self, method: Method, message: Mapping[str, Any], length: int) -> None:
        """Make a call that waits on a thread, or in the lane that it belongs to."""
        with self._changed:
            fits = self._calls < CALLS_MAX and self._calls_len + length <= CALLS_BYTES_MAX
            if fits:
                self._calls += 1
                self._calls_len += length
        if not fits:
            text = f"{CALLS_MAX} calls are under way already: await their answers"
            self._reply(message, _failure(message.get("id"), BUSY, text))
            return

        def make() -> None:
            try:
                self._reply(message, self._call(method, message))
            finally:
                with self._changed:
                    self._calls -= 1
                    self._calls_len -= length
                    self._changed.notify_all()

        work: Callable[[], None] = make
        traits = how(method)
        if traits.lane is not None:
            by = message.get("params", {}).get(traits.lane_by)
            lane = traits.lane, by if isinstance(by, int | str) else None
            with self._changed:
                line = self._lanes.get(lane)
                if line is not None:
                    line.append(work)
                    return
                self._lanes[lane] = deque([work])
            work = partial(self._run_lane, lane)
        threading.Thread(target=work, name="control call", daemon=True).start()

    def _run_lane(self, lane: tuple[str, Any]) -> None:
        while True:
            with self._changed:
                line = self._lanes[lane]
                if not line:
                    del self._lanes[lane]
                    return
                work = line.popleft()
            work()

    def _call(self, method: Method, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Call a method; the answer."""
        number = message.get("id")
        params = message.get("params", {})
        try:
            check(method, params)
            more = {"client": self} if how(method).client else {}
            result = method(**params, **more)
        except TinyvmmError as error:
            return _failure(number, REFUSED, str(error))
        except InvalidParamsError as error:
            return _failure(number, INVALID_PARAMS, str(error))
        except Exception as error:  # noqa: BLE001 (a bug of ours, told here and to the client)
            hook_args = (type(error), error, error.__traceback__, threading.current_thread())
            threading.excepthook(threading.ExceptHookArgs(hook_args))
            return _failure(number, INTERNAL_ERROR, f"a bug: {type(error).__name__}: {error}")
        return {"jsonrpc": "2.0", "id": number, "result": result}


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


_decoder = json.JSONDecoder(parse_constant=_no_number)


def _is_request(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("jsonrpc") == "2.0"
        and isinstance(message.get("method"), str)
        and isinstance(message.get("params", {}), dict)
        and isinstance(message.get("id"), str | int | float | None)
    )


def busy(text: str) -> bytes:
    """Return the line that tells a client, whoever asks nothing yet, that there is too much."""
    return json.dumps(_failure(None, BUSY, text)).encode() + b"\n"


def _failure(number: object, code: int, text: str) -> Mapping[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": text}}


class ControlClient:
    """One connection to a control socket; not for several threads at once."""

    def __init__(self, path: str) -> None:
        """Connect; ConfigError if nobody listens."""
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise ConfigError(f"cannot reach the machine at {path}: {error.strerror}") from None
        self._lines = self._sock.makefile("rb")
        self._number = 0
        self._notifications: deque[tuple[str, dict[str, Any]]] = deque()

    def call(self, method: str, **params: Any) -> Any:
        """Call a method and return its result; ConfigError with the machine's words if it fails."""
        self._number += 1
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"the machine hung up: {error.strerror or error}") from None
        while True:
            message = self._receive()
            if "method" in message:
                self._notifications.append((message["method"], message["params"]))
            elif "error" in message:
                raise ConfigError(message["error"]["message"])
            else:
                return message["result"]

    def notification(self) -> tuple[str, dict[str, Any]]:
        """Wait for the next notification: its method and params. ConfigError at the end."""
        while not self._notifications:
            message = self._receive()
            if "method" in message:
                return message["method"], message["params"]
        return self._notifications.popleft()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise ConfigError(f"the machine hung up: {error.strerror or error}") from None
        if not line.endswith(b"\n"):
            raise ConfigError("the machine hung up")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
