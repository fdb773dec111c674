"""The control socket: JSON-RPC 2.0 to the letter, and clients that mean no good."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import wait_for
from tinyvmm.errors import ConfigError
from tinyvmm.instances import control
from tinyvmm.instances.control import ControlClient
from tinyvmm.instances.control_schema import limits
from tinyvmm.instances.control_server import CLIENTS_MAX, ControlServer


class Served:
    """A server of a few methods."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.release = threading.Event()
        self.calls: list[int] = []
        self.notified: list[int] = []
        self.left: list[control.Client] = []
        self.server = ControlServer(
            self.path,
            lambda: {
                "add": self.add,
                "refuse": self.refuse,
                "wait": self.wait,
                "echo": self.echo,
                "order": self.order,
                "told": self.told,
                "broken": self.broken,
                "large": lambda: "x" * 300_000,
            },
        )

    def add(self, *, a: int, b: int = 1) -> int:
        self.calls.append(a)
        return a + b

    def refuse(self) -> None:
        raise ConfigError("not today")

    @control.remote(waits=True)
    def wait(self) -> str:
        self.release.wait(60)
        return "waited"

    def echo(
        self,
        *,
        words: list[str] | None = None,
        small: Annotated[int, limits(minimum=1, maximum=9)] = 1,
        ratio: float = 0.5,
        on: bool = False,
    ) -> list[Any]:
        return [words, small, ratio, on]

    @control.remote(waits=True, lane="order", lane_by="which")
    def order(self, *, turn: int, which: str) -> None:
        time.sleep(0.02 if turn % 2 else 0)
        self.calls.append(turn)
        if which == "slow":
            self.release.wait(60)

    @control.remote(client=True)
    def told(self, *, count: int, client: control.Client) -> int:
        """Say so many things; how many of them the client had room for."""
        client.when_gone(self.left.append)
        fit = sum(client.notify("thing", {"x": "y" * 10_000}) for _ in range(count))
        self.notified.append(count)
        return fit

    def broken(self) -> None:
        raise ZeroDivisionError("ours")

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        sock.settimeout(60)
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
    wait_for(lambda: not any(t.name.startswith("control") for t in threading.enumerate()))


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
        (request("add", a="1"), control.INVALID_PARAMS, 7),
        (request("add", a=True), control.INVALID_PARAMS, 7),
        (request("echo", small=10), control.INVALID_PARAMS, 7),
        (request("echo", words=["a", 1]), control.INVALID_PARAMS, 7),
        (request("echo", words="a"), control.INVALID_PARAMS, 7),
        (request("echo", on=1), control.INVALID_PARAMS, 7),
        (request("told", count=1, client=1), control.INVALID_PARAMS, 7),
        (b'{"jsonrpc": "2.0", "id": NaN, "method": "add"}', control.PARSE_ERROR, None),
        (b'{"jsonrpc": "2.0", "id": [1], "method": "add"}', control.INVALID_REQUEST, None),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "\xff"}', control.PARSE_ERROR, None),
        (request("echo", words=["\ud800"]), control.PARSE_ERROR, None),
    ],
)
def test_what_is_wrong_has_its_code(served: Served, line: bytes, code: int, number: Any) -> None:
    answer = served.ask(line)
    assert (answer["error"]["code"], answer["id"]) == (code, number)
    assert answer["error"]["message"]


def test_bytes_that_are_no_text_go_both_ways(served: Served) -> None:
    assert served.ask(request("echo", words=["\udcff"]))["result"][0] == ["\udcff"]


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


def test_calls_that_wait_hold_up_no_other_of_their_client(served: Served) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        for number in range(20):
            sock.sendall(request("wait", number) + b"\n")
        sock.sendall(request("add", 99, a=1) + b"\n")
        assert json.loads(lines.readline()) == {"jsonrpc": "2.0", "id": 99, "result": 2}
        served.release.set()
        assert {json.loads(lines.readline())["id"] for _ in range(20)} == set(range(20))


def test_calls_of_a_lane_are_made_in_their_order_and_lanes_beside_each_other(
    served: Served,
) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        sock.sendall(request("order", turn=1000, which="slow") + b"\n")
        for number in range(20):
            sock.sendall(request("order", number, turn=number, which="quick") + b"\n")
        assert [json.loads(lines.readline())["id"] for _ in range(20)] == list(range(20))
        assert [number for number in served.calls if number < 1000] == list(range(20))


def test_more_calls_than_may_wait_are_refused_at_once(served: Served) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        for number in range(control.CALLS_MAX + 3):
            sock.sendall(request("wait", number) + b"\n")
        busy = [json.loads(lines.readline()) for _ in range(3)]
        assert {answer["error"]["code"] for answer in busy} == {control.BUSY}
        served.release.set()
        for _ in range(control.CALLS_MAX):
            assert json.loads(lines.readline())["result"] == "waited"
        sock.sendall(request("wait", 1) + b"\n")
        assert json.loads(lines.readline())["result"] == "waited"


def test_notifications_come_between_answers_and_end_when_nobody_reads_them(
    served: Served,
) -> None:
    with ControlClient(served.path) as client:
        assert client.call("told", count=3) == 3
        assert client.call("add", a=1) == 2
        assert [client.notification() for _ in range(3)] == [("thing", {"x": "y" * 10_000})] * 3
    wait_for(lambda: len(served.left) == 1)
    with served.connect() as deaf, deaf.makefile("rb") as lines:
        deaf.sendall(request("told", count=1000) + b"\n")
        wait_for(lambda: served.notified == [3, 1000])
        assert served.ask(request("add", a=1))["result"] == 2
        told = 0
        while "method" in (message := json.loads(lines.readline())):
            told += 1
        assert message["result"] == told
        assert control.UNREAD_MAX // 11_000 < told < 1000
    wait_for(lambda: len(served.left) == 2)


def test_whoever_leaves_while_a_call_waits_is_gone(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(request("told", count=0) + b"\n" + request("wait") + b"\n")
        assert sock.recv(100)
    wait_for(lambda: len(served.left) == 1)
    assert served.left[0].gone
    assert not served.left[0].notify("thing", {})


def test_a_client_that_has_no_more_to_say_gets_its_answers(served: Served) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        sock.sendall(request("wait") + b"\n")
        sock.shutdown(socket.SHUT_WR)
        served.release.set()
        assert json.loads(lines.readline())["result"] == "waited"
        assert lines.readline() == b""


def test_a_bug_is_told_to_the_client_and_to_us(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    answer = served.ask(request("broken"))
    assert answer["error"]["code"] == control.INTERNAL_ERROR
    assert "ZeroDivisionError: ours" in answer["error"]["message"]
    assert seen[0].exc_type is ZeroDivisionError


def test_other_users_are_turned_away(served: Served) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    os.chmod(served.path, 0o666)
    script = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect(sys.argv[1]); s.sendall(sys.argv[2].encode() + b'\\n'); print(s.recv(100))"
    )
    copy = f"/tmp/tinyvmm-control-test-{os.getpid()}"
    os.link(served.path, copy)
    try:
        argv = [sys.executable, "-c", script, copy, request("add", a=1).decode()]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    finally:
        os.unlink(copy)
    assert served.calls == []
    assert done.stdout in {"", "b''\n"}, done


def test_a_line_without_an_end_costs_its_client_the_connection(served: Served) -> None:
    with served.connect() as sock, sock.makefile("rb") as lines:
        sock.sendall(b"x" * (control.LINE_MAX + 1))
        assert json.loads(lines.readline())["error"]["code"] == control.PARSE_ERROR
        assert lines.readline() == b""
    assert served.ask(request("add", a=1))["result"] == 2


def test_more_clients_than_there_may_be_are_turned_away_until_some_leave(served: Served) -> None:
    held = [served.connect() for _ in range(CLIENTS_MAX)]
    for sock in held:
        sock.sendall(request("add", a=1) + b"\n")
        assert sock.recv(100)
    with served.connect() as late, late.makefile("rb") as lines:
        assert json.loads(lines.readline())["error"]["code"] == control.BUSY
        assert lines.readline() == b""
    for sock in held:
        sock.close()

    def welcome() -> bool:
        try:
            return served.ask(request("add", a=1)) is not None
        except OSError:
            return False

    wait_for(welcome)


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
