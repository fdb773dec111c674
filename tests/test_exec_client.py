"""`tinyvmm exec` from end to end but for the guest: its program runs as a process of ours."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.calls_here import MachineHere, unix_address
from tinyvmm.errors import ConfigError
from tinyvmm.guest.execution import Execution, build_execution, execution_steps
from tinyvmm.guest.init import search_path
from tinyvmm.instances import exec_client
from tinyvmm.instances.exec_client import execute
from tinyvmm.session import HostFiles

PATH = os.environ["PATH"]


class Machine(MachineHere):
    """One that executes commands."""

    broken = False

    def methods(self) -> dict[str, Callable[..., Any]]:
        return {**super().methods(), "exec": self.exec}

    def exec(
        self,
        *,
        argv: list[str],
        port: int,
        env: list[str],
        cwd: str | None,
        user: str | None,
        terminal: list[int] | None,
    ) -> dict[str, Any]:
        assert user is None
        size = None if terminal is None else (terminal[0], terminal[1])
        execution = Execution(
            search_path(argv[0], PATH),
            argv,
            unix_address("/nowhere") if self.broken else self.address(port),
            [f"PATH={PATH}", *env],
            cwd or "/",
            size,
        )
        steps = [step.says for step in execution_steps(execution)]
        return {"pid": self.start(build_execution(execution)), "steps": steps}

    def end(self, process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    machine = Machine(tmp_path)
    yield machine
    machine.close()


class Streams:
    """What a command writes, and a pipe for what it reads."""

    def __init__(self, stdin: bytes = b"") -> None:
        self.seen = {"stdout": b"", "stderr": b""}
        self.stdin, self.write = os.pipe()
        os.write(self.write, stdin)
        self.files = HostFiles(self.stdin, None, None)
        self.sinks = {name: self.sink(name) for name in self.seen}

    def sink(self, name: str) -> Any:
        def take(data: bytes) -> None:
            self.seen[name] += data

        return take

    def close(self) -> None:
        os.close(self.stdin)


def run(*argv: str, stdin: bytes = b"", **more: Any) -> tuple[int, bytes, bytes, str | None]:
    streams = Streams(stdin)
    os.close(streams.write)
    try:
        result = execute("web", argv, files=streams.files, sinks=streams.sinks, **more)
    finally:
        streams.close()
    return result.status, streams.seen["stdout"], streams.seen["stderr"], result.message


@pytest.mark.usefixtures("machine")
def test_streams_status_directory_and_environment() -> None:
    script = 'cat; echo "$WORD" >&2; pwd; exit 7'
    found = run("sh", "-c", script, stdin=b"in\n", env=["WORD=a b"], cwd="/usr")
    assert found == (7, b"in\n/usr\n", b"a b\n", None)
    found = run("sh", "-c", "kill -TERM $$")
    assert found[0] == 128 + signal.SIGTERM
    status, _, _, message = run("nothing-there")
    assert (status, message) == (127, "nothing-there: command not found in the guest")


@pytest.mark.usefixtures("machine")
def test_a_terminal_of_a_given_size() -> None:
    status, output, _, _ = run("sh", "-c", "stty size", size=(11, 22))
    assert (status, output) == (0, b"11 22\r\n")


@pytest.mark.usefixtures("machine")
def test_stdin_is_passed_on_only_where_it_is_wanted() -> None:
    ours = f"{sys.executable} -m tinyvmm exec"
    for options, said in (("", "1\n2\n"), ("-i", "1\n2\n3\n")):
        loop = f'while read x; do {ours} {options} web -- sh -c "echo $x; cat"; done'
        done = subprocess.run(
            ["sh", "-c", loop],
            input="1\n2\n3\n" if options else "1\n2\n",
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_a_time_limit_ends_this_side(machine: Machine) -> None:
    status, _, _, message = run("sleep", "100", timeout=0.3)
    assert (status, (message or "").split(":")[0]) == (124, "timed out after 0.3 s")
    assert machine.processes[0].poll() is None


def test_a_machine_that_ends_is_said(machine: Machine) -> None:
    def end(_output: bytes) -> None:
        os.killpg(machine.processes[0].pid, signal.SIGKILL)

    streams = Streams()
    os.close(streams.write)
    argv = ["sh", "-c", "echo up; exec sleep 100"]
    result = execute("web", argv, files=streams.files, sinks={**streams.sinks, "stdout": end})
    streams.close()
    told = "the machine ended before the command did"
    assert (result.status, result.message) == (255, told)


def test_a_guest_that_cannot_connect_is_said(machine: Machine) -> None:
    machine.broken = True
    with pytest.raises(ConfigError, match="could not connect back"):
        run("true")


def test_a_program_that_connects_late_and_ends_at_once_has_connected(tmp_path: Path) -> None:
    class Late:
        """A guest whose program connects just as we look whether it has ended: it has."""

        def call(self, method: str, **_: object) -> int:
            assert method == "exec_wait"
            for number in range(4):
                program.append(socket.socket(socket.AF_UNIX))
                program[-1].connect(f"{tmp_path}/vsock_{port}")
                program[-1].sendall(b"%d" % number)
            return 0

    program: list[socket.socket] = []
    with ExitStack() as cleanup:
        port, listener = exec_client.listen(f"{tmp_path}/vsock", cleanup)
        accepted = exec_client.accept(Late(), listener, 70, 4, cleanup)
        assert [sock.recv(10) for sock in accepted] == [b"0", b"1", b"2", b"3"]
        assert all(sock.gettimeout() is None for sock in accepted)
        for sock in program:
            sock.close()


def test_nothing_is_left_of_the_sockets(machine: Machine) -> None:
    run("true")
    machine.broken = True
    with pytest.raises(ConfigError):
        run("true")
    names = sorted(os.listdir(machine.instance.path))
    assert names == ["control", "lock", "state"]


def test_a_port_that_another_client_has_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [b"\1\0\0\0", b"\1\0\0\0", b"\2\0\0\0"]
    monkeypatch.setattr(os, "urandom", lambda _: numbers.pop(0))
    path = str(tmp_path / "vsock")
    with ExitStack() as cleanup:
        first, _ = exec_client.listen(path, cleanup)
        second, listener = exec_client.listen(path, cleanup)
        assert (first, second) == (exec_client.FIRST_PORT + 1, exec_client.FIRST_PORT + 2)
        assert listener.getsockname() == f"{path}_{second}"
    assert os.listdir(tmp_path) == []


def test_a_place_where_nobody_can_listen_is_said(tmp_path: Path) -> None:
    with ExitStack() as cleanup, pytest.raises(ConfigError, match=r"cannot listen at .*No such"):
        exec_client.listen(str(tmp_path / "gone" / "vsock"), cleanup)


def test_a_machine_that_is_not_there_or_has_ended(machine: Machine) -> None:
    with pytest.raises(ConfigError, match="no machine is named db"):
        exec_client.connect("db")
    machine.instance.update(status=3)
    with pytest.raises(ConfigError, match="has ended, with status 3"):
        exec_client.connect("web")
