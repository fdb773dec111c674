r"""The control socket of a machine: JSON-RPC 2.0 over a Unix stream socket, one line a message.

    > {"jsonrpc": "2.0", "id": 1, "method": "status"}\n
    < {"jsonrpc": "2.0", "id": 1, "result": {"state": "running", ...}}\n

What methods there are is in supervisor.py, and docs/control.md describes them. Only this user (and
root) may connect. Each client has a thread, which reads a line, does as it says and answers, so a
client that does not read its answers, or never ends its line, stops nobody but itself; there are
`CLIENTS_MAX` at most, and a line has `LINE_MAX` bytes at most. No lock is held while a client is
waited for. A message without an id gets no answer; arrays of messages are not understood.

Specification: JSON-RPC 2.0, sections 4 and 5.
"""

import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from tinyvmm.errors import ConfigError, TinyvmmError

LINE_MAX = 1 << 20
CLIENTS_MAX = 64
SEND_TIMEOUT = 30.0  # seconds that a client may leave an answer unread

# JSON-RPC 2.0, section 5.1
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
REFUSED = -32000  # the machine cannot do it; the message says why

Method = Callable[..., Any]


class ControlServer:
    """Serves `methods` at `path` until `close`."""

    def __init__(self, path: str, methods: Mapping[str, Method]) -> None:
        """Listen; each method takes the message's params as keyword arguments."""
        self._methods = methods
        self._listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            self._listener.bind(path)
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from None
        finally:
            os.umask(mask)
        self._listener.listen(CLIENTS_MAX)
        self._lock = threading.Lock()  # guards _clients and _closed
        self._clients: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Stop listening and hang up; what a client is being answered still reaches it."""
        with self._lock:
            self._closed = True
            clients = list(self._clients)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                continue  # it has gone again, or there are no descriptors left for it
            with self._lock:
                welcome = not self._closed and len(self._clients) < CLIENTS_MAX
                if welcome:
                    self._clients.add(client)
            if welcome and _may(client):
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
            else:
                self._forget(client)

    def _forget(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.discard(client)
        client.close()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client.makefile("rb") as lines:
                while line := lines.readline(LINE_MAX + 1):
                    if len(line) > LINE_MAX:
                        self._send(client, _failure(None, PARSE_ERROR, f"a line past {LINE_MAX}"))
                        return
                    answer = self._answer(line)
                    if answer is not None:
                        self._send(client, answer)
        except OSError:
            return  # it has gone, or reads nothing
        finally:
            self._forget(client)

    @staticmethod
    def _send(client: socket.socket, answer: Mapping[str, Any]) -> None:
        client.settimeout(SEND_TIMEOUT)
        client.sendall(json.dumps(answer).encode() + b"\n")
        client.settimeout(None)

    def _answer(self, line: bytes) -> Mapping[str, Any] | None:
        """Do as a message says; None if it wants no answer."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            return _failure(None, PARSE_ERROR, f"no JSON: {error}")
        number = message.get("id") if isinstance(message, dict) else None
        if not _is_request(message):
            return _failure(number, INVALID_REQUEST, "no request of JSON-RPC 2.0")
        method = self._methods.get(message["method"])
        if method is None:
            failure = METHOD_NOT_FOUND, f"no method is named {message['method']!r}"
        else:
            try:
                result = method(**message.get("params", {}))
            except TinyvmmError as error:
                failure = REFUSED, str(error)
            except TypeError as error:
                failure = INVALID_PARAMS, str(error)
            else:
                found = {"jsonrpc": "2.0", "id": number, "result": result}
                return found if "id" in message else None
        return _failure(number, *failure) if "id" in message else None


def _may(client: socket.socket) -> bool:
    """Whether the process at the other end is this user's or root's (unix(7), SO_PEERCRED)."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in {os.geteuid(), 0}


def _is_request(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("jsonrpc") == "2.0"
        and isinstance(message.get("method"), str)
        and isinstance(message.get("params", {}), dict)
        and isinstance(message.get("id"), str | int | float | None)
    )


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

    def call(self, method: str, **params: Any) -> Any:
        """Call a method and return its result; ConfigError with the machine's words if it fails."""
        self._number += 1
        request = {"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
            line = self._lines.readline()
        except OSError as error:
            raise ConfigError(f"the machine hung up: {error.strerror or error}") from None
        if not line:
            raise ConfigError("the machine hung up")
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"]["message"])
        return answer["result"]

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._sock.close()

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
