"""`tinyvmm attach`: one's own terminal for that of a detached machine's command, for a while.

What the command writes is read from the machine's log as it grows (output_log.py), what is typed
goes through the control socket. So any number can attach, come and go, and a slow one stops nobody.
Ctrl-P Ctrl-Q, or other keys, detach, as with podman; without a terminal, the end of stdin is the
command's.
"""

import os
import select
import signal
import sys
import threading
from base64 import b64encode
from types import FrameType

from tinyvmm.errors import ConfigError
from tinyvmm.instances import registry
from tinyvmm.instances.control import ControlClient
from tinyvmm.instances.exec_client import connect
from tinyvmm.instances.output_log import read_pieces
from tinyvmm.session import write_all
from tinyvmm.terminal import Terminal, is_terminal_session

DETACH_KEYS = b"\x10\x11"  # Ctrl-P Ctrl-Q
CHUNK = 32 << 10
_CONTROLS = "abcdefghijklmnopqrstuvwxyz@[\\]^_"


class DetachKeys:
    """Holds back what may be the beginning of `keys`; without keys nothing detaches."""

    def __init__(self, keys: bytes = DETACH_KEYS) -> None:
        self._keys = keys
        self._held = b""
        self.seen = False

    def filter(self, data: bytes) -> bytes:
        """Return what is to be passed on; sets `seen` when the keys are complete."""
        data = self._held + data
        if not self._keys:
            return data
        before, keys, _ = data.partition(self._keys)
        if keys:
            self.seen = True
            return before
        longest = min(len(data), len(self._keys) - 1)
        held = next(n for n in range(longest, -1, -1) if data.endswith(self._keys[:n]))
        self._held = data[len(data) - held :]
        return data[: len(data) - held]


def parse_keys(text: str) -> bytes:
    r"""Parse `ctrl-p,ctrl-q`, podman's form: letters, or ctrl- and one of a-z @ [ \ ] ^ _.

    Nothing at all for no keys; ConfigError for what is no key.
    """
    keys = b""
    for key in text.split(",") if text else ():
        letter = key.lower().removeprefix("ctrl-")
        if letter == key.lower() and len(key) == 1 and key.isascii() and key.isprintable():
            keys += key.encode()
        elif letter != key.lower() and len(letter) == 1 and letter in _CONTROLS:
            keys += bytes([ord(letter.upper()) & 0x1F])
        else:
            raise ConfigError(f"{key!r} is no key: give e.g. ctrl-p,ctrl-q")
    return keys


def attach(name: str, *, stdin: bool = True, keys: bytes = DETACH_KEYS) -> int:
    """Show what machine `name` writes from now on and send what is typed; the exit status.

    That of its command when it ends, 0 once detached. ConfigError if there is nothing to attach to.
    """
    state = registry.find(name)
    if not state.detached:
        raise ConfigError(f"machine {name} is not detached: it has a terminal of its own")
    with connect(name) as client:
        log = registry.path_of(name, "output")
        reader = _Reader(name, log, os.path.getsize(log))
        terminal = Terminal() if stdin and is_terminal_session() else None
        wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        reader.start(woken)
        try:
            if terminal is not None:
                terminal.enter_raw()
            detached = _pass_on(
                client, terminal, wake, woken, reader, stdin=stdin, keys=DetachKeys(keys)
            )
        finally:
            if terminal is not None:
                terminal.restore()
            reader.stop()
            os.close(wake)
            os.close(woken)
    if detached:
        return 0
    ended = registry.wait(name) if registry.read(name) is not None else None
    return 0 if ended is None or ended.status is None else ended.status


class _Reader:
    """Copies the log to stdout and stderr, on a thread of its own."""

    def __init__(self, name: str, log: str, start: int) -> None:
        self._name = name
        self._log = log
        self._start = start
        self._stopping = False
        self.finished = False

    def start(self, woken: int) -> None:
        self._thread = threading.Thread(target=self._main, args=(woken,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()

    def _main(self, woken: int) -> None:
        for piece in read_pieces(self._log, follow=self._going, start=self._start):
            write_all(1 if piece.stream == "stdout" else 2, piece.data)
        self.finished = True
        os.write(woken, b"\0")

    def _going(self) -> bool:
        if self._stopping:
            return False
        state = registry.read(self._name)
        return state is not None and state.running


def _pass_on(
    client: ControlClient,
    terminal: Terminal | None,
    wake: int,
    woken: int,
    reader: _Reader,
    *,
    stdin: bool,
    keys: DetachKeys,
) -> bool:
    """Send what is typed until the machine's end (False) or the detach keys (True)."""
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    if stdin and sys.__stdin__ is not None:  # else 0 was closed, and may be any file by now
        poller.register(0, select.POLLIN)

    def resized(_number: int, _frame: FrameType | None) -> None:
        os.write(woken, b"\0")

    old = signal.signal(signal.SIGWINCH, resized) if terminal is not None else None
    try:
        size = None
        while not reader.finished:
            if terminal is not None and terminal.size() != size:
                size = terminal.size()
                client.call("resize", rows=size[0], columns=size[1])
            for fd, _ in poller.poll():
                if fd == wake:
                    os.read(wake, CHUNK)
                    continue
                try:
                    data = os.read(0, CHUNK)
                except OSError:  # a terminal that hung up, or what cannot be read
                    data = b""
                typed = data if terminal is None else keys.filter(data)
                if typed:
                    client.call("stdin", data=b64encode(typed).decode())
                if keys.seen:
                    return True
                if not data:
                    poller.unregister(0)
                    client.call("stdin", eof=True)
        return False
    finally:
        if old is not None:
            signal.signal(signal.SIGWINCH, old)
