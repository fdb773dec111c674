"""Commands over a control socket: the guest's side runs as processes of this computer."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control_docs import described
from tests.waiting import wait_for
from tinyvmm.errors import ConfigError
from tinyvmm.guest.execution import Execution
from tinyvmm.guest.init import search_path
from tinyvmm.instances import control
from tinyvmm.instances.control import Client, ControlClient, remote
from tinyvmm.instances.control_schema import check
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.methods.supervised import Supervised, Turn, Way
from tinyvmm.methods.supervisor import Supervisor
from tinyvmm.vsock_host import HostStream, VsockHost

PATH = os.environ["PATH"]
NOTIFICATIONS = described()["notifications"]


class Guest:
    """Starts programs as processes; what they connect to is dialled at the host."""

    def __init__(self, directory: Path, host: VsockHost) -> None:
        self.directory = directory
        self.host = host
        self.processes: list[subprocess.Popen[bytes]] = []
        self.acts: dict[int, Callable[[], None]] = {}
        self.listeners: list[socket.socket] = []
        self.connections: list[tuple[socket.socket, HostStream, list[threading.Thread]]] = []
        self.accepting: threading.Thread | None = None
        self.accepted: list[threading.Thread] = []  # all there have been of those
        self.unreachable = False

    def address(self, port: int) -> bytes:
        """Where a program connects to for `port` of the host."""
        path = str(self.directory / f"port{port}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(4)
        self.listeners.append(listener)
        if self.unreachable:
            path += "-not"
            self.accepting = None
        else:
            self.accepting = threading.Thread(target=self.accept, args=(listener, port))
            self.accepting.start()
            self.accepted.append(self.accepting)
        return struct.pack("<H", socket.AF_UNIX) + path.encode() + b"\0"

    def accept(self, listener: socket.socket, port: int) -> None:
        for _ in range(4):
            try:
                theirs, _ = listener.accept()
            except OSError:
                return
            stream = self.host.dial(port)
            assert stream is not None
            stream.sock.setblocking(True)
            pumps = [
                threading.Thread(target=pump, args=pair, daemon=True)
                for pair in ((theirs, stream.sock), (stream.sock, theirs))
            ]
            for thread in pumps:
                thread.start()
            self.connections.append((theirs, stream, pumps))

    def start(self, program: bytes) -> int:
        path = self.directory / f"program{len(self.processes)}"
        path.write_bytes(program)
        path.chmod(0o755)
        process = subprocess.Popen([path], start_new_session=True)
        self.processes.append(process)
        threading.Thread(target=self.reap, args=(process, self.accepting), daemon=True).start()
        return process.pid

    def reap(self, process: subprocess.Popen[bytes], accepting: threading.Thread | None) -> None:
        process.wait()
        if accepting is not None:  # AF_VSOCK connects no sooner than that
            accepting.join()
        while process.pid not in self.acts:
            time.sleep(0.01)
        self.acts[process.pid]()

    def when_ended(self, pid: int, act: Callable[[], None]) -> None:
        self.acts[pid] = act

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for listener in self.listeners:
            listener.shutdown(socket.SHUT_RDWR)  # whoever accepts does so no more
        for thread in self.accepted:
            thread.join()
        for listener in self.listeners:
            listener.close()
        for sock, stream, pumps in self.connections:
            for end in (sock, stream.sock):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in pumps:
                thread.join()
            sock.close()
            stream.close()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Machine(Supervisor):
    """A supervisor whose programs are made for this computer."""

    def __init__(self, directory: Path) -> None:
        run = Supervised(str(directory / "vsock"))
        super().__init__(run)
        self.host = VsockHost(run.vsock_path)
        self.guest = Guest(directory, self.host)
        self.way = Way(None, self.host)  # type: ignore[arg-type]
        run.turn = Turn(None, None, self.guest, bytes, self.way)  # type: ignore[arg-type]
        methods = {**self.methods(), "big": self.big}
        self.server = ControlServer(str(directory / "control"), lambda: methods)

    def _vsock_modules(self, way: Way) -> tuple[()]:
        return ()

    def _execution(self, argv: Any, port: int, env: Any, *_more: Any) -> Execution:
        terminal = _more[-1]
        size = None if terminal is None else (terminal[0], terminal[1])
        address = self.guest.address(port)
        env = [f"PATH={PATH}", *env]
        return Execution(search_path(argv[0], PATH), argv, address, env, "/", size)

    @remote(client=True)
    def big(self, *, client: Client) -> None:
        """Fill what the client has to read."""
        while client.notify("junk", {"x": "y" * 60_000}):
            pass

    def close(self) -> None:
        self.way.close()
        self.server.close()
        self.guest.close()
        self.host.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


class Asker(ControlClient):
    """Keeps what each stream said."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.said: dict[str, list[bytes]] = {}
        self.ends: dict[str, tuple[int, str | None]] = {}

    def listen(self) -> None:
        method, params = self.notification()
        if method == "junk":
            return
        assert check(NOTIFICATIONS[method]["params"], params, "") is None
        assert params["stream"] not in self.ends, "nothing follows the end"
        if method == "exec_output":
            said = self.said.setdefault(params["stream"], [b"", b"", b""])
            said[params["fd"]] += b64decode(params["data"])
        else:
            assert method == "exec_exited"
            self.ends[params["stream"]] = params["status"], params["message"]

    def finish(self, stream: str) -> tuple[bytes, bytes, int]:
        while stream not in self.ends:
            self.listen()
        _, out, err = self.said.get(stream, [b"", b"", b""])
        return out, err, self.ends[stream][0]

    def feed(self, stream: str, data: bytes, *, eof: bool = True) -> None:
        self.call("exec_stdin", stream=stream, data=b64encode(data).decode(), eof=eof)


@pytest.fixture
def ask(machine: Machine, tmp_path: Path) -> Iterator[Asker]:
    assert machine.guest
    with Asker(str(tmp_path / "control")) as client:
        yield client


def test_streams_and_status_of_a_command(ask: Asker) -> None:
    ask.call("exec", argv=["sh", "-c", "cat; echo err >&2; exit 7"], stream="a")
    ask.feed("a", b"hello ", eof=False)
    ask.feed("a", b"world")
    assert ask.finish("a") == (b"hello world", b"err\n", 7)


def test_several_share_a_connection_and_are_told_apart(ask: Asker) -> None:
    names = [f"s{number}" for number in range(12)]
    for name in names:
        ask.call("exec", argv=["sh", "-c", f"cat; echo {name} >&2"], stream=name)
    for name in reversed(names):
        ask.feed(name, name.encode() * 1000)
    for name in names:
        assert ask.finish(name) == (name.encode() * 1000, f"{name}\n".encode(), 0)


def test_a_stream_may_be_used_again_once_its_command_has_ended(ask: Asker) -> None:
    ask.call("exec", argv=["cat"], stream="a")
    with pytest.raises(ConfigError, match="stream 'a' is in use"):
        ask.call("exec", argv=["cat"], stream="a")
    ask.feed("a", b"")
    assert ask.finish("a")[2] == 0
    ask.ends.clear()
    ask.call("exec", argv=["sh", "-c", "exit 3"], stream="a")
    assert ask.finish("a")[2] == 3


def test_a_terminal_its_size_and_signals(ask: Asker) -> None:
    # What is typed goes another way than the size, and may be there first.
    resized = 'while [ "$(stty size)" = "11 22" ]; do sleep 0.02; done'
    ask.call("exec", argv=["sh", "-c", f"stty size; read x; {resized}; stty size"], stream="t",
             terminal=[11, 22])  # fmt: skip
    while b"11 22" not in b"".join(ask.said.get("t", [])):
        ask.listen()
    ask.call("exec_resize", stream="t", rows=33, columns=44)
    ask.feed("t", b"\n", eof=False)
    assert b"33 44" in ask.finish("t")[0]
    script = "trap 'echo got; exit 3' USR1; echo up; while :; do sleep 0.1; done"
    ask.call("exec", argv=["sh", "-c", script], stream="s")
    while b"up" not in b"".join(ask.said.get("s", [])):
        ask.listen()
    ask.call("exec_signal", stream="s", signal="USR1")
    assert ask.finish("s")[::2] == (b"up\ngot\n", 3)  # its sleep had the signal too


def test_what_cannot_be_started_says_so(machine: Machine, ask: Asker) -> None:
    ask.call("exec", argv=["nothing-there"], stream="a")
    assert ask.finish("a")[2] == 127
    assert ask.ends["a"][1] == "nothing-there: command not found in the guest"
    machine.guest.unreachable = True
    ask.call("exec", argv=["true"], stream="b")
    assert ask.finish("b")[2] == 255
    assert "could not connect back" in str(ask.ends["b"][1])
    for method, params in (("exec_stdin", {}), ("exec_signal", {"signal": 15})):
        with pytest.raises(ConfigError, match="no command of this client has the stream 'b'"):
            ask.call(method, stream="b", **params)
    with pytest.raises(ConfigError, match="a stream or a port, not both"):
        ask.call("exec", argv=["true"], stream="c", port=5)


def test_a_client_that_does_not_read_holds_up_only_its_commands(
    machine: Machine, ask: Asker, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    script = f"head -c 9000000 /dev/zero; touch {done}"
    with Asker(str(tmp_path / "control")) as slow:
        slow.call("exec", argv=["sh", "-c", script], stream="much")
        time.sleep(1.0)
        assert not done.exists()  # it waits, and nothing grows
        ask.call("exec", argv=["echo", "hi"], stream="a")
        assert ask.finish("a") == (b"hi\n", b"", 0)
        out, _, status = slow.finish("much")
        assert (len(out), out.strip(b"\0"), status) == (9_000_000, b"", 0)
    assert done.exists()
    assert machine.way.streams


def test_what_there_is_no_room_for_is_told_later(ask: Asker) -> None:
    ask.call("exec", argv=["sh", "-c", "read x; echo out; exit 4"], stream="a")
    for method, params in (("big", {}), ("exec_stdin", {"stream": "a", "data": "Cg=="})):
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        ask._sock.sendall(json.dumps(message).encode() + b"\n")
    time.sleep(0.5)  # by now it has ended
    assert ask.finish("a") == (b"out\n", b"", 4)


def test_a_command_outlives_its_client(machine: Machine, tmp_path: Path) -> None:
    done = tmp_path / "done"
    with Asker(str(tmp_path / "control")) as client:
        script = f"echo up; read x; sleep 0.2; echo yes > {done}"
        client.call("exec", argv=["sh", "-c", script], stream="a")
        while "a" not in client.said:
            client.listen()
    machine.guest.processes[0].wait(30)
    assert done.read_text() == "yes\n"
    wait_for(lambda: not machine.way.streams._commands)


def test_with_neither_stream_nor_port_nobody_hears_it(
    machine: Machine, ask: Asker, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    ask.call("exec", argv=["sh", "-c", f"cat; echo said; echo yes > {done}"])
    machine.guest.processes[0].wait(30)
    assert done.read_text() == "yes\n"


def test_a_command_that_reads_nothing_holds_up_nothing_else(ask: Asker) -> None:
    ask.call("exec", argv=["sleep", "100"], stream="a")
    data = b64encode(b"x" * 60_000).decode()
    for number in range(20):
        message = {"jsonrpc": "2.0", "id": f"in{number}", "method": "exec_stdin",
                   "params": {"stream": "a", "data": data}}  # fmt: skip
        ask._sock.sendall(json.dumps(message).encode() + b"\n")
    ask.call("exec", argv=["echo", "hi"], stream="b")
    assert ask.finish("b")[0] == b"hi\n"
    ask.call("exec_signal", stream="a", signal="TERM")
    assert ask.finish("a")[2] == 128 + signal.SIGTERM


def test_the_end_of_the_machine_is_told(machine: Machine, ask: Asker) -> None:
    ask.call("exec", argv=["sh", "-c", "echo up; sleep 100"], stream="a")
    while "a" not in ask.said:
        ask.listen()
    machine.way.streams.close()
    assert ask.finish("a")[2] == 255
    assert ask.ends["a"][1] == "the machine ended before the command did"
    with pytest.raises(ConfigError, match="the machine has ended"):
        ask.call("exec", argv=["true"], stream="b")


def test_a_flood_of_signals_is_refused_before_it_fills_our_memory(ask: Asker) -> None:
    ask.call("exec", argv=["sh", "-c", "echo up; sleep 100"], stream="a")
    while "a" not in ask.said:
        ask.listen()
    for number in range(control.CALLS_MAX * 4):
        message = {"jsonrpc": "2.0", "id": number, "method": "exec_signal",
                   "params": {"stream": "a", "signal": "CONT"}}  # fmt: skip
        ask._sock.sendall(json.dumps(message).encode() + b"\n")
    answers = 0
    while answers < control.CALLS_MAX * 4:
        answers += "id" in ask._receive()
    ask.call("exec_signal", stream="a", signal="TERM")
    assert ask.finish("a")[2] == 128 + signal.SIGTERM
