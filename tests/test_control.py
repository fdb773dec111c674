"""The control socket: JSON-RPC 2.0 to the letter, and clients that mean no good."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm import control
from tinyvmm.control import ControlClient, ControlServer
from tinyvmm.errors import ConfigError


class Served:
    """A server of a few methods."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.release = threading.Event()
        self.calls: list[int] = []
        self.server = ControlServer(
            self.path,
            {
                "add": self.add,
                "refuse": self.refuse,
                "wait": self.wait,
                "large": lambda: "x" * 300_000,
            },
        )

    def add(self, *, a: int, b: int = 1) -> int:
        self.calls.append(a)
        return a + b

    def refuse(self) -> None:
        raise ConfigError("not today")

    def wait(self) -> str:
        self.release.wait(30)
        return "waited"

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        sock.settimeout(20)
        return sock

    def ask(self, line: bytes) -> Any:
        with self.connect() as sock, sock.makefile("rb") as lines:
            sock.sendall(line + b"\n")
            answer = lines.readline()
            return json.loads(answer) if answer else None


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "control")
    yield served
    served.release.set()
    served.server.close()
    until(lambda: not any(t.name == "control" for t in threading.enumerate()))


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def request(method: str, number: Any = 7, **params: Any) -> bytes:
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    return json.dumps(message).encode()


def test_a_method_is_called_and_answers(served: Served) -> None:
    assert served.ask(request("add", a=2, b=3)) == {"jsonrpc": "2.0", "id": 7, "result": 5}
    with ControlClient(served.path) as client:
        assert client.call("add", a=1) == 2
        assert client.call("add", a=5) == 6
        with pytest.raises(ConfigError, match="not today"):
            client.call("refuse")
        assert client.call("add", a=5) == 6


def test_only_this_user_may_write_to_it(served: Served) -> None:
    assert os.stat(served.path).st_mode & 0o777 == 0o600


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot reach the machine"):
        ControlClient(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("line", "code", "number"),
    [
        (b"no json", control.PARSE_ERROR, None),
        (b"[" * 5000, control.PARSE_ERROR, None),
        (b"[]", control.INVALID_REQUEST, None),
        (b"1", control.INVALID_REQUEST, None),
        (b'{"jsonrpc": "1.0", "id": 3, "method": "add"}', control.INVALID_REQUEST, 3),
        (b'{"jsonrpc": "2.0", "id": 3, "method": 5}', control.INVALID_REQUEST, 3),
        (
            b'{"jsonrpc": "2.0", "id": 3, "method": "add", "params": [1]}',
            control.INVALID_REQUEST,
            3,
        ),
        (request("nothing"), control.METHOD_NOT_FOUND, 7),
        (request("add"), control.INVALID_PARAMS, 7),
        (request("add", a=1, c=1), control.INVALID_PARAMS, 7),
        (request("refuse"), control.REFUSED, 7),
    ],
)
def test_what_is_wrong_has_its_code(served: Served, line: bytes, code: int, number: Any) -> None:
    answer = served.ask(line)
    assert (answer["error"]["code"], answer["id"]) == (code, number)
    assert answer["error"]["message"]


def test_a_notification_is_done_and_not_answered(served: Served) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        sock.sendall(b'{"jsonrpc": "2.0", "method": "add", "params": {"a": 77}}\n')
        sock.sendall(b'{"jsonrpc": "2.0", "method": "nothing"}\n' + request("add", a=1) + b"\n")
        assert json.loads(lines.readline())["result"] == 2
    assert served.calls == [77, 1]


def test_a_slow_call_and_a_client_that_reads_nothing_delay_nobody(served: Served) -> None:
    with served.connect() as slow, served.connect() as deaf, slow.makefile("rb") as lines:
        slow.sendall(request("wait") + b"\n")
        deaf.setblocking(False)
        for _ in range(20):
            deaf.sendall(request("large") + b"\n")
        for number in range(20):
            assert served.ask(request("add", a=number))["result"] == number + 1
        served.release.set()
        assert json.loads(lines.readline())["result"] == "waited"


def test_a_line_without_an_end_costs_its_client_the_connection(served: Served) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        sock.sendall(b"x" * (control.LINE_MAX + 1))
        assert json.loads(lines.readline())["error"]["code"] == control.PARSE_ERROR
        assert lines.readline() == b""
    assert served.ask(request("add", a=1))["result"] == 2


def test_more_clients_than_there_may_be_are_turned_away_until_some_leave(served: Served) -> None:
    held = [served.connect() for _ in range(control.CLIENTS_MAX)]
    for sock in held:
        sock.sendall(request("add", a=1) + b"\n")
        assert sock.recv(100)
    with served.connect() as late:
        assert late.recv(1) == b""
    for sock in held:
        sock.close()

    def welcome() -> bool:
        try:
            return served.ask(request("add", a=1)) is not None
        except OSError:
            return False

    until(welcome)


@given(st.lists(st.binary(max_size=80), max_size=5))
@settings(deadline=None, max_examples=60)
def test_any_bytes_get_an_answer_or_none_and_the_next_client_is_served(
    lines: list[bytes],
) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"tinyvmm-control-{os.getpid()}"
    served = Served(path)
    try:
        with served.connect() as sock:
            sock.sendall(b"\n".join(lines))
            sock.shutdown(socket.SHUT_WR)
            data = b""
            while piece := sock.recv(1 << 16):
                data += piece
        for line in data.splitlines():
            assert json.loads(line)["jsonrpc"] == "2.0"
        assert served.ask(request("add", a=1))["result"] == 2
    finally:
        served.server.close()
        path.unlink()
