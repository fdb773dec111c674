"""The methods of a machine's control socket, asked of a tiny guest through the socket itself."""

import json
import os
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control_docs import described
from tests.waiting import wait_for
from tinyvmm import layout, trace
from tinyvmm.devices.virtio.balloon import VirtioBalloon
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.devices.virtio.vsock import VirtioVsock
from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import ENDED, ENDED_STATUS, EXECUTED, SIGNAL, STARTED, WINSIZE
from tinyvmm.inside.executor import Executor
from tinyvmm.instances.control import ControlClient
from tinyvmm.instances.control_schema import check
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.instances.exec_client import FIRST_PORT
from tinyvmm.machine import Machine
from tinyvmm.methods.supervised import Context, Supervised
from tinyvmm.session import Result
from tinyvmm.vsock_host import VsockHost

# mov dx, 0x3ff; again: in al, dx; inc bx; jmp again
CODE = bytes.fromhex("baff03ec43ebfc")
METHODS = described()["methods"]


class Session:
    """What of a session the supervisor uses; keeps what it was told."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.ended: list[Result] = []
        self.on_end: Any = None

    def send(self, kind: int, value: int, _data: bytes = b"") -> None:
        self.sent.append((kind, value))

    def end(self, result: Result) -> None:
        self.ended.append(result)
        if self.on_end is not None:
            self.on_end(result)


class Run:
    """A machine with its supervisor and control socket."""

    def __init__(self, path: Path) -> None:
        self.path = str(path / "control")
        self.vsock_host = VsockHost(str(path / "vsock"))
        self.machine = machine = Machine(memory=2 << 20, cpus=2, transport="mmio")
        machine.add_board(console=lambda _: None)
        machine.add_virtio(VirtioRng())
        machine.add_virtio(VirtioBalloon(machine.memory))
        vsock = VirtioVsock(3, self.vsock_host)
        machine.add_virtio(vsock)
        machine.boot_real_mode(CODE)
        self.session = Session()
        self.supervised = Supervised(self.vsock_host.path, keep_stdin=True)
        self.executor = Executor(self.session.send)
        self.server = ControlServer(self.path, self.supervised.methods)
        self.supervised.attach(
            machine,
            self.session,  # type: ignore[arg-type]
            self.executor,
            lambda: b"kernel says\xff",
            (vsock, self.vsock_host),
        )
        machine.start()

    def close(self) -> None:
        self.supervised.detach()
        self.supervised.end(Result(0, "exited"))
        self.server.close()
        self.machine.close()
        self.vsock_host.close()
        if self.supervised.stdin is not None:
            os.close(self.supervised.stdin)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.close()
    assert trace.hook is None
    wait_for(lambda: not any(t.name.startswith("control") for t in threading.enumerate()))


class Asker(ControlClient):
    """Checks each answer against the schema."""

    def call(self, method: str, **params: Any) -> Any:
        result = super().call(method, **params)
        assert check(METHODS[method]["result"], result, method) is None
        return result


@pytest.fixture
def ask(run: Run) -> Iterator[Asker]:
    with Asker(run.path) as client:
        yield client


def test_status_and_pause(run: Run, ask: Asker) -> None:
    status = ask.call("status")
    assert (status["state"], status["pid"]) == ("running", os.getpid())
    ask.call("pause")
    assert ask.call("status")["state"] == "paused"
    assert [vcpu["paused"] for vcpu in ask.call("vcpus")] == [True, True]
    ask.call("resume", cpu=0)
    assert ask.call("status")["state"] == "running"
    assert [vcpu["paused"] for vcpu in ask.call("vcpus")] == [False, True]
    with pytest.raises(ConfigError, match="there is no vCPU 7: the machine has 2"):
        ask.call("pause", cpu=7)
    ask.call("resume")
    assert run.machine.cause == ""


def test_registers_and_steps_of_one_vcpu_while_the_others_run(ask: Asker) -> None:
    with pytest.raises(ConfigError, match="vCPU 0 runs: pause it first"):
        ask.call("registers")
    ask.call("pause", cpu=0)
    registers = ask.call("registers", cpu=0)
    while not registers["rbx"]:  # it has not begun yet
        ask.call("resume", cpu=0)
        ask.call("pause", cpu=0)
        registers = ask.call("registers", cpu=0)
    assert 0x1003 <= registers["rip"] < 0x1000 + len(CODE)
    assert registers["rdx"] == 0x3FF
    sregs = ask.call("sregs")
    assert sregs["cs"]["base"] == 0
    assert set(sregs["gdt"]) >= {"base", "limit"}
    places = set()
    for _ in range(6):
        assert ask.call("step")
        places.add(ask.call("registers")["rip"])
    assert places == {0x1003, 0x1004, 0x1005}


def test_memory_is_read_and_written(ask: Asker) -> None:
    assert b64decode(ask.call("memory_read", gpa=0x1000, length=len(CODE))) == CODE
    ask.call("memory_write", gpa=0x8000, data=b64encode(b"hello").decode())
    assert b64decode(ask.call("memory_read", gpa=0x8000, length=5)) == b"hello"
    info = ask.call("memory_info")
    assert info == {"size": 2 << 20, "regions": [{"gpa": 0, "size": 2 << 20}]}
    with pytest.raises(ConfigError, match="not within"):
        ask.call("memory_read", gpa=0, length=1 << 30)
    with pytest.raises(ConfigError):
        ask.call("memory_read", gpa=(2 << 20) - 4, length=8)
    with pytest.raises(ConfigError, match="no base64"):
        ask.call("memory_write", gpa=0, data="é")


def test_devices_are_listed_with_their_place_and_state(ask: Asker) -> None:
    devices = {device["name"]: device for device in ask.call("devices", state=True)}
    assert {"uart", "rtc", "virtio-rng", "virtio-vsock"} <= set(devices)
    assert devices["uart"]["ranges"] == [{"bus": "port", "base": layout.COM1_PORT, "length": 8}]
    assert devices["uart"]["running"] is None
    assert devices["virtio-rng"]["running"] is False
    assert devices["virtio-rng"]["requests"] == [0]
    assert devices["virtio-rng"]["state"]["status"] == 0
    json.dumps(devices)
    names = [device["name"] for device in ask.call("devices", pattern="virtio-(rng|vsock)")]
    assert names == ["virtio-rng", "virtio-vsock"]


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|b)*", ".*.*.*.*.*", "(", "a" * 201])
def test_expressions_that_could_take_for_ever_are_refused(ask: Asker, pattern: str) -> None:
    with pytest.raises(ConfigError):
        ask.call("devices", pattern=pattern)


def test_a_device_is_debugged_by_the_pattern_of_its_name(ask: Asker) -> None:
    assert ask.call("device_debug", pattern="ua.*") == ["uart"]
    wait_for(lambda: len(ask.call("debug_log")) == 2000)
    line = ask.call("debug_log", clear=True)[-1]
    assert "uart: port 0x03ff -> 0x00" in line
    debugged = {device["name"]: device["debug"] for device in ask.call("devices")}
    assert debugged["uart"]
    assert not debugged["rtc"]
    assert ask.call("device_debug", pattern="nothing") == []
    assert ask.call("device_debug", pattern=None) == []
    assert trace.hook is None


def test_a_trace_is_told_as_it_happens_and_ends_with_its_client(run: Run, ask: Asker) -> None:
    ask.call("trace", kinds=["port"], device="uart")
    method, told = ask.notification()
    assert method == "trace_record"
    schema = described()["notifications"]["trace_record"]["params"]
    assert check(schema, told, "") is None
    assert told["record"] == {
        "record": "Access",
        "space": "port",
        "direction": "read",
        "address": 0x3FF,
        "size": 1,
        "value": told["record"]["value"],
    }
    ask.call("untrace")
    assert trace.hook is None
    with Asker(run.path) as other:
        other.call("trace", device="rtc")
        other.call("trace", kinds=["9p"])
        assert trace.hook is not None
    wait_for(lambda: trace.hook is None)
    with pytest.raises(ConfigError, match="is none of 9p, device, mmio, port"):
        ask.call("trace", kinds=["everything"])


def test_what_a_slow_reader_misses_is_counted_and_the_guest_goes_on(run: Run, ask: Asker) -> None:
    def counter() -> int:
        ask.call("pause", cpu=0)
        value: int = ask.call("registers")["rbx"]
        ask.call("resume", cpu=0)
        return value

    with Asker(run.path) as slow:
        slow.call("trace", kinds=["port"])
        (watcher,) = run.supervised.supervisor()._watching._traces.values()
        wait_for(lambda: watcher._lost > 0)
        before = counter()
        wait_for(lambda: counter() != before)
        lost = 0
        while not lost:
            lost = slow.notification()[1]["lost"]
        assert ask.call("status")["state"] == "running"


def test_counters_count(ask: Asker) -> None:
    before = after = ask.call("stats")

    def count() -> bool:
        nonlocal after
        after = ask.call("stats")
        if after["cpu_time"] <= before["cpu_time"]:
            return False
        exits = after["vcpus"][0]["exits"]  # None before Linux 5.14
        return exits is None or exits > before["vcpus"][0]["exits"]

    wait_for(count)
    assert after["memory"]["given"] == 2 << 20
    assert 0 < after["memory"]["resident"] <= 2 << 20
    assert after["memory"]["overhead"] > 1 << 20
    assert after["threads"] >= threading.active_count()  # KVM has some of its own
    assert after["requests"]["virtio-rng"] == [0]
    for vcpu in after["vcpus"]:
        assert (vcpu["exits"] is None) == (vcpu["kvm"] == {})


def test_the_balloon(ask: Asker) -> None:
    assert ask.call("balloon", size=1 << 20) == {"actual": 0}
    with pytest.raises(ConfigError, match="the guest has no 4194304 bytes"):
        ask.call("balloon", size=4 << 20)


def test_signals_sizes_and_the_console(run: Run, ask: Asker) -> None:
    ask.call("kill", signal="hup")
    ask.call("resize", rows=30, columns=100)
    assert run.session.sent == [(SIGNAL, 1), (WINSIZE, 30 | 100 << 16)]
    ask.call("kill")
    assert run.session.ended == [Result(137, "signal")]
    assert ask.call("console") == "kernel says\ufffd"
    with pytest.raises(ConfigError, match="'NONE' is no signal"):
        ask.call("kill", signal="NONE")


def test_a_command_that_reads_nothing_holds_up_neither_its_writers_connection_nor_the_end(
    run: Run, ask: Asker
) -> None:
    data = b64encode(b"x" * 60_000).decode()
    for number in range(5):  # more than the pipe holds
        request = {"jsonrpc": "2.0", "id": f"in{number}", "method": "stdin"}
        line = json.dumps({**request, "params": {"data": data}})
        ask._sock.sendall(line.encode() + b"\n")
    for _ in range(5):
        ask._sock.sendall(b'{"jsonrpc": "2.0", "id": "status", "method": "status"}\n')
    assert sorted(ask._receive()["id"] for _ in range(6)) == ["in0", *["status"] * 5]
    run.supervised.end(Result(0, "exited"))  # which closes the pipe


def test_stopping_asks_first_and_then_ends(run: Run, ask: Asker) -> None:
    run.session.on_end = run.supervised.end
    assert ask.call("wait", timeout=0.01) is None
    assert ask.call("stop", time=0.05) == {"status": 137, "message": None}
    assert run.session.sent == [(SIGNAL, 15)]
    assert ask.call("wait") == {"status": 137, "message": None}
    assert ask.call("status")["state"] == "ended"


def test_a_machine_that_starts_or_is_just_ending_is_killed_too(run: Run, ask: Asker) -> None:
    turn = run.supervised.turn
    run.supervised.turn = None
    with pytest.raises(ConfigError, match="the machine does not run"):
        ask.call("kill", signal="HUP")
    ask.call("kill")
    assert run.session.ended == []
    assert turn is not None
    assert turn.way is not None
    run.supervised.attach(*turn[:4], (turn.way.vsock, turn.way.host))
    assert run.session.ended == [Result(137, "signal")]


def test_whoever_waits_and_leaves_is_waited_for_no_more(run: Run) -> None:
    run.executor.on_record(STARTED, 2)
    with Asker(run.path) as client:
        client._sock.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "wait"}\n')
        client.call("status")
        assert any(thread.name == "control call" for thread in threading.enumerate())
    wait_for(lambda: not any(t.name == "control call" for t in threading.enumerate()))


def start_programs_as_70(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the guest be up, and each program that is asked for begin as process 70."""

    def answer(*_: object) -> None:
        threading.Timer(0, run.executor.on_record, (EXECUTED, 70)).start()

    monkeypatch.setattr(run.executor, "_send", answer)
    run.supervised.begin(Context([], "/", None, lambda _: ()))  # type: ignore[arg-type]
    run.executor.on_record(STARTED, 2)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("calls", {"port": FIRST_PORT}),
        ("exec", {"argv": ["true"], "port": FIRST_PORT}),
        ("exec", {"argv": ["true"]}),
    ],
)
def test_the_end_of_any_program_removes_what_a_killed_client_left(
    run: Run, ask: Asker, monkeypatch: pytest.MonkeyPatch, method: str, params: dict[str, Any]
) -> None:
    start_programs_as_70(run, monkeypatch)
    left = Path(f"{run.vsock_host.path}_{FIRST_PORT}")
    assert ask.call(method, **params)["pid"] == 70
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    run.executor.on_record(ENDED, 70)
    assert left.exists()
    run.executor.on_record(ENDED_STATUS, 0)
    assert not left.exists()


def test_what_is_asked_while_the_machine_reboots_is_asked_of_one_machine(
    run: Run, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_programs_as_70(run, monkeypatch)
    before = run.supervised.now()
    assert before.way is not None
    vsock = before.way.vsock, before.way.host
    used: list[object] = []

    def reboot() -> Any:
        """Give the machine of now, and have another one from then on."""
        turn = run.supervised.turn
        run.supervised.attach(run.machine, before.session, Executor(run.session.send), bytes, vsock)
        after = run.supervised.turn
        assert after is not None
        assert after.way is not None
        monkeypatch.setattr(after.way.streams, "open", used.append)
        monkeypatch.setattr(after.way.streams, "ended", used.append)
        return turn

    monkeypatch.setattr(run.supervised, "now", reboot)
    assert ask.call("exec", argv=["true"])["pid"] == 70
    run.executor.on_record(ENDED, 70)
    run.executor.on_record(ENDED_STATUS, 0)
    assert used == []
    before.way.streams.close()
