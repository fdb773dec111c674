"""Programs that PID 1 is sent beside its command: run in a process namespace, over Unix sockets."""

import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pid1 import PATH, Guest, Start, needs_namespaces
from tests.pid1 import start as start  # noqa: PLC0414 (a fixture)
from tinyvmm.errors import ConfigError
from tinyvmm.guest import protocol
from tinyvmm.guest.execution import (
    Execution,
    build_execution,
    execution_steps,
    vsock_address,
)
from tinyvmm.guest.init import search_path
from tinyvmm.guest.protocol import STREAMS
from tinyvmm.guest.relay import User

pytestmark = needs_namespaces

FOREVER = ("sleep", "1000")


class Executed:
    """A command that was sent, and this side of its streams."""

    def __init__(self, guest: Guest, where: Path, *argv: str, **more: Any) -> None:
        path = str(where / f"exec{len(list(where.iterdir()))}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(4)
        address = struct.pack("<H", socket.AF_UNIX) + path.encode() + b"\0"
        execution = Execution(search_path(argv[0], PATH), argv, address, (f"PATH={PATH}",))
        self.execution = execution._replace(**more)
        send(guest, build_execution(self.execution))
        self.pid = expect(guest, protocol.EXECUTED)
        self.sockets = {name: listener.accept()[0] for name in STREAMS}
        listener.close()
        self.started = self.record()

    def record(self) -> tuple[int, int]:
        data = self.sockets["control"].recv(8, socket.MSG_WAITALL)
        kind, value = struct.unpack("<II", data)
        return kind, value

    def tell(self, kind: int, value: int) -> None:
        self.sockets["control"].sendall(struct.pack("<II", kind, value))

    def read(self, name: str) -> bytes:
        """All that comes, until the end."""
        data = b""
        while piece := self.sockets[name].recv(1 << 16):
            data += piece
        return data

    def finish(self, stdin: bytes = b"") -> tuple[bytes, bytes, int]:
        """Feed and end stdin, read what is written: output, errors, exit code."""

        def feed() -> None:
            try:
                self.sockets["stdin"].sendall(stdin)
                self.sockets["stdin"].shutdown(socket.SHUT_WR)
            except OSError:
                return  # the command has ended and wanted no more

        feeder = threading.Thread(target=feed)
        feeder.start()
        errors: list[bytes] = []
        reader = threading.Thread(target=lambda: errors.append(self.read("stderr")))
        reader.start()
        output = self.read("stdout")
        reader.join()
        feeder.join()
        kind, status = self.record()
        assert kind == protocol.EXITED
        self.close()
        return output, errors[0], os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()


def send(guest: Guest, program: bytes) -> None:
    data = struct.pack("<II", protocol.EXECUTE, len(program)) + program
    while data:
        data = data[os.write(guest.control, data) :]


def expect(guest: Guest, kind: int) -> int:
    found, value = guest.record()
    assert found == kind
    return value


def ended(guest: Guest) -> tuple[int, int]:
    """Process id and exit code of a program that has ended."""
    pid = expect(guest, protocol.ENDED)
    return pid, os.waitstatus_to_exitcode(expect(guest, protocol.ENDED_STATUS))


Execute = Callable[..., Executed]


@pytest.fixture
def guest(start: Start) -> Guest:
    return start(*FOREVER)


@pytest.fixture
def execute(guest: Guest, tmp_path: Path) -> Iterator[Execute]:
    made = []

    def execute(*argv: str, **more: Any) -> Executed:
        made.append(Executed(guest, tmp_path, *argv, **more))
        return made[-1]

    yield execute
    for executed in made:
        executed.close()


def test_streams_and_exit_code_are_its_own(guest: Guest, execute: Execute) -> None:
    data = os.urandom(300_000)
    executed = execute("sh", "-c", "cat; echo said >&2; exit 7")
    assert executed.started[0] == protocol.STARTED
    assert executed.finish(data) == (data, b"said\n", 7)
    assert ended(guest) == (executed.pid, 7)


def test_a_death_by_signal_is_told_to_both(guest: Guest, execute: Execute) -> None:
    executed = execute("sh", "-c", "kill -9 $$")
    assert executed.finish()[2] == -signal.SIGKILL
    assert ended(guest) == (executed.pid, 128 + signal.SIGKILL)


def test_a_command_that_is_not_there_says_so(guest: Guest, execute: Execute) -> None:
    executed = execute("no-such-command")
    assert executed.started == (protocol.EXEC_FAILED, errno.ENOENT)
    assert ended(guest)[0] == executed.pid


def test_environment_directory_user_and_umask(execute: Execute, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    executed = execute(
        "sh",
        "-c",
        "pwd; id -u; id -g; id -G; echo $WORD; umask; ps -o sid= -p $$ | grep -c $$",
        env=(f"PATH={PATH}", "WORD=a b"),
        cwd="/usr",
        user=User(1234, 77, (77, 88)),
        umask=0o27,
    )
    output = executed.finish()[0].decode().split("\n")
    assert output == ["/usr", "1234", "77", "77 88", "a b", "0027", "1", ""]


def test_a_terminal_has_its_size_and_follows_it(execute: Execute) -> None:
    executed = execute("sh", "-c", "stty size; read x; stty size; exit 4", terminal=(30, 90))
    stdout = executed.sockets["stdout"]
    assert stdout.recv(100).startswith(b"30 90")
    executed.tell(protocol.WINSIZE, 20 | 60 << 16)
    executed.sockets["stdin"].sendall(b"\n")
    assert b"20 60" in executed.read("stdout")
    assert executed.record() == (protocol.EXITED, 4 << 8)


def test_signals_reach_the_command(execute: Execute) -> None:
    executed = execute("sh", "-c", "trap 'echo got; exit 3' USR1; echo ready; sleep 99 & wait")
    assert executed.sockets["stdout"].recv(100) == b"ready\n"
    executed.tell(protocol.SIGNAL, signal.SIGUSR1)
    assert executed.finish()[::2] == (b"got\n", 3)


@pytest.mark.parametrize("how", ["close", "shut down"])
def test_a_command_outlives_whoever_asked_for_it(
    guest: Guest, execute: Execute, tmp_path: Path, how: str
) -> None:
    done = tmp_path / "done"
    executed = execute("sh", "-c", f"read x; sleep 0.1; echo yes > {done}; exit 9")
    if how == "close":
        executed.close()
    else:
        executed.sockets["control"].shutdown(socket.SHUT_WR)
        executed.sockets["stdin"].shutdown(socket.SHUT_WR)
    assert ended(guest) == (executed.pid, 9)
    assert done.read_text() == "yes\n"


def test_what_it_left_running_keeps_nobody_waiting(guest: Guest, execute: Execute) -> None:
    executed = execute("sh", "-c", "sleep 1000 & echo first; exit 2")
    assert executed.finish() == (b"first\n", b"", 2)
    assert ended(guest) == (executed.pid, 2)
    assert guest.process.poll() is None


def test_many_at_once(guest: Guest, execute: Execute) -> None:
    running = [execute("sh", "-c", f"read x; echo $x; exit {n}") for n in range(60)]
    for number, executed in enumerate(running):
        text = b"%d\n" % (number * number)
        assert executed.finish(text) == (text, b"", number)
    assert sorted(ended(guest) for _ in running) == sorted(
        (executed.pid, number) for number, executed in enumerate(running)
    )


def test_the_end_of_the_guests_command_ends_all(start: Start, tmp_path: Path) -> None:
    guest = start("sh", "-c", "read x")
    executed = Executed(guest, tmp_path, "sleep", "1000")
    guest.close("stdin")
    kind = value = 0
    while kind != protocol.EXITED:  # the end of the other may be told before
        kind, value = guest.record()
    assert value == 1 << 8
    assert executed.read("stdout") == b""
    executed.close()


def test_what_is_no_program_is_refused_and_nothing_is_lost(guest: Guest, execute: Execute) -> None:
    send(guest, b"no program at all" * 5000)
    assert expect(guest, protocol.EXECUTED) == -errno.ENOEXEC & 0xFFFF_FFFF
    executed = execute("echo", "still here")
    assert executed.finish()[0] == b"still here\n"
    assert ended(guest) == (executed.pid, 0)  # and not a word of the one that was none


def test_a_step_that_fails_is_told(guest: Guest, tmp_path: Path) -> None:
    address = struct.pack("<H", socket.AF_UNIX) + str(tmp_path / "nobody").encode() + b"\0"
    program = build_execution(Execution(("/bin/true",), ["true"], address))
    send(guest, program)
    pid = expect(guest, protocol.EXECUTED)
    assert ended(guest)[0] == pid
    steps = execution_steps(Execution(("x",), ["x"], vsock_address(5), modules=[("m", b"ko")]))
    assert [step.says for step in steps[:5]] == [
        "insert the kernel module m",
        "make a socket for control",
        "give control time to connect",
        "connect control",
        "unblock control",
    ]


def test_an_address_of_the_host() -> None:
    family, _, port, cid = struct.unpack("<HHII4x", vsock_address(4000))
    assert (family, port, cid) == (socket.AF_VSOCK, 4000, socket.VMADDR_CID_HOST)


def test_what_no_program_can_be_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="NUL"):
        build_execution(Execution(("/bin/true",), ["true", "a\0b"], vsock_address(1)))
