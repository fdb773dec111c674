"""Listens at a machine's control socket: for clients, whom control.py serves.

Only this user (and root) may connect, and no more than `CLIENTS_MAX` at once. Most machines have no
client at all: so what serves one is imported when the first is there, on that client's thread.
"""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.instances.control import Method

CLIENTS_MAX = 256


class ControlServer:
    """Serves `methods` at `path` until `close`."""

    def __init__(self, path: str, methods: Callable[[], Mapping[str, "Method"]]) -> None:
        """Listen; `methods` is called for each client, on its thread.

        Each method takes the message's params as keyword arguments.
        """
        self.methods = methods
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
        self._lock = threading.Lock()  # guards _clients
        self._clients: set[socket.socket] = set()
        self._closed: float | None = None
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Stop listening and hang up; what a client is being answered still reaches it."""
        with self._lock:
            self._closed = time.monotonic()
            clients = list(self._clients)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)

    @property
    def closed_for(self) -> float:
        """For how many seconds it has been closed."""
        return 0.0 if self._closed is None else time.monotonic() - self._closed

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._closed is not None:
                    return
                time.sleep(0.05)  # it has gone again, or there are no descriptors left for it
                continue
            with self._lock:
                welcome = self._closed is None and len(self._clients) < CLIENTS_MAX
                if welcome:
                    self._clients.add(client)
            if welcome and _may(client):
                serve = partial(self._serve, client)
                threading.Thread(target=serve, name="control client", daemon=True).start()
                continue
            if not welcome:
                from tinyvmm.instances.control import busy

                with suppress(OSError):
                    line = busy(f"{CLIENTS_MAX} clients are here already")
                    client.send(line, socket.MSG_DONTWAIT)
            self.forget(client)

    def _serve(self, sock: socket.socket) -> None:
        try:
            from tinyvmm.instances.control import Client

            client = Client(self, sock)
        except OSError:  # no descriptors are left to import with: it may ask again
            self.forget(sock)
            return
        client.serve()

    def forget(self, client: socket.socket) -> None:
        """Hang up."""
        with self._lock:
            self._clients.discard(client)
        client.close()


def _may(client: socket.socket) -> bool:
    """Whether the process at the other end is this user's or root's (unix(7), SO_PEERCRED)."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in {os.geteuid(), 0}
