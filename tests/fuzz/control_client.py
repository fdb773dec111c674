"""Bytes in, a client's doings out: what fuzzer and corpus test play against a control socket.

An input is a program of steps: a line of any bytes; or a call of one of a machine's methods, its
parameters chosen from VALUES, some left out and some of names that there are none of; or a pause to
read. The client then shuts down its side, reads what comes and leaves.

Held to, whatever the input: no bug is met; every line that comes is one of JSON-RPC's; a request
gets one answer, and its result is as the schema says; no thread, watcher or command is left.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from tinyvmm import trace
from tinyvmm.bus import Bus
from tinyvmm.devices.rtc import Rtc
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.instances import control
from tinyvmm.instances.control_schema import check
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.memory import GuestMemory
from tinyvmm.methods.supervised import Context, Supervised, Turn, Way
from tinyvmm.session import Result

STEPS_MAX = 40
PATIENCE = 120.0  # seconds for what must come
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 7, 24, 80, 255, 4096, 65535, 1 << 20, 1 << 32, 1 << 64, -1),
    *(0.5, 1e300, "", "a", "b", "TERM", "9", "virtio-.*", "(a+)+", "rtc", "[", "aGVsbG8=", "!"),
    *("/", "/x", "\0", "é", "\ud800", "9p", "mmio", "A=b", "nobody", [], ["true"], ["sh", "-c"]),
    *(["a\0b"], ["A=b"], ["A"], [24, 80], [0, 0], ["9p", "port"], [["x"]], {}, {"a": 1}),
)
NAMES = ("nothing", "client", "self")


class Executor:
    """Starts nothing; what it is given ends at once."""

    def start(self, program: bytes) -> int:
        assert program[:4] == b"\x7fELF"
        return 100

    def when_ended(self, _pid: int, act: Any) -> None:
        act()

    def wait(self, pid: int, *_more: Any) -> int | None:
        return 3 << 8 if pid == 100 else None

    def look(self) -> None:
        """Nobody waits."""

    def ends(self) -> dict[int, int]:
        return {100: 3 << 8}

    def running(self) -> list[int]:
        return [101]


class Place:
    """A control socket in front of a machine that has no guest."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, f"control{os.getpid()}")
        self.memory = GuestMemory(1 << 20)
        self.server = ControlServer(self.path, dict)

    def close(self) -> None:
        """Take it away."""
        self.server.close()
        self.memory.close()

    def supervised(self) -> tuple[Supervised, Way]:
        """A new one, as a run that has just ended."""
        ports, mmio = Bus("port"), Bus("mmio")
        ports.add(0x70, 2, Rtc())
        host = SimpleNamespace(offer=lambda *_: None, withdraw=lambda _: None, tidy=lambda _: None)
        machine = SimpleNamespace(
            memory=self.memory, ports=ports, mmio=mmio, virtio_devices=(VirtioRng(),), vcpus=[],
            paused=False, pause=lambda _=None: None, resume=lambda _=None: None,
        )  # fmt: skip
        session = SimpleNamespace(send=lambda *_: None, end=lambda _: None)
        supervised = Supervised(f"{self.path}-vsock")
        root = SimpleNamespace()
        supervised.begin(Context(["PATH=/bin"], "/", cast("Any", root), lambda _: ()))
        way = Way(VirtioRng(), cast("Any", host))
        turn = (machine, session, Executor(), lambda: b"console", way)
        supervised.turn = Turn(*cast("Any", turn))
        supervised.result = Result(0, "exited")
        return supervised, way


class Steps:
    """The bytes of an input, taken one by one; zeros at its end."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)
        self.over = False

    def byte(self) -> int:
        found = next(self._data, None)
        self.over = found is None
        return found or 0

    def raw(self) -> bytes:
        return bytes(self.byte() for _ in range(self.byte() % 64))


def lines(steps: Steps, methods: dict[str, Any]) -> Iterator[tuple[bytes, str | None]]:
    """Each line to send, with the method if it is a proper request."""
    names = sorted(methods)
    for number in range(STEPS_MAX):
        kind = steps.byte()
        if steps.over:
            return
        if kind < 16:
            yield steps.raw(), None
            continue
        name = names[kind % len(names)]
        if name in {"calls", "exec", "share_add"} and steps.byte() % 4:
            name = "status"  # these take long
        params = {}
        for key in (*methods[name]["params"]["properties"], NAMES[kind % len(NAMES)]):
            chosen = steps.byte()
            if 0 < chosen <= len(VALUES):
                params[key] = VALUES[chosen - 1]
        message = {"jsonrpc": "2.0", "id": number, "method": name, "params": params}
        line = json.dumps(message).encode()
        yield line, None if b"\\ud800" in line else name  # half a character: then it is no JSON


def play(data: bytes, place: Place) -> None:
    """Play one input; AssertionError or an exception if it does harm."""
    supervised, way = place.supervised()
    described = supervised.supervisor().discover()
    place.server.methods = supervised.methods
    asked: dict[int, str] = {}
    bugs: list[Any] = []
    old, threading.excepthook = threading.excepthook, bugs.append
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(place.path)
            sock.settimeout(PATIENCE)
            reader = sock.makefile("rb")
            answers: list[dict[str, Any]] = []
            thread = threading.Thread(target=lambda: answers.extend(map(json.loads, reader)))
            thread.start()
            for number, (line, name) in enumerate(lines(Steps(data), described["methods"])):
                if name is not None:
                    asked[number] = name
                sock.sendall(line.replace(b"\n", b" ") + b"\n")
            sock.shutdown(socket.SHUT_WR)
            thread.join(PATIENCE)
            assert not thread.is_alive(), "it never ends"
            reader.close()
        judge(answers, asked, described)
    finally:
        way.close()
        supervised.end(Result(0, "exited"))
        threading.excepthook = old
    assert not bugs, bugs
    assert trace.hook is None
    deadline = time.monotonic() + PATIENCE
    while any(
        thread.name in {"control client", "control call"} for thread in threading.enumerate()
    ):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.001)
    assert not way.streams._commands


def judge(answers: list[dict[str, Any]], asked: dict[int, str], described: dict[str, Any]) -> None:
    """Say whether these are answers to what was asked."""
    seen: list[int] = []
    for answer in answers:
        assert answer["jsonrpc"] == "2.0"
        if "method" in answer:
            params = described["notifications"][answer["method"]]["params"]
            assert check(params, answer["params"], "") is None
            continue
        assert ("result" in answer) != ("error" in answer)
        if "error" in answer:
            assert answer["error"]["code"] != control.INTERNAL_ERROR, answer
        if answer["id"] in asked:
            seen.append(answer["id"])
            if "result" in answer:
                schema = described["methods"][asked[answer["id"]]]["result"]
                assert check(schema, answer["result"], "") is None, answer
    assert sorted(seen) == sorted(asked)
