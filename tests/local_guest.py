"""A machine whose guest is this computer: all of tinyvmm.Machine but the machine.

`run_command` is replaced by a function that makes no machine, but answers as one does; programs
that the guest is sent are run here, and connect to Unix sockets instead of vsock's.
"""

import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from tinyvmm import vm, vm_guest
from tinyvmm.command.options import RunOptions
from tinyvmm.methods.supervised import Context, Supervised
from tinyvmm.session import HostFiles, Result


class LocalSession:
    """What is used of a Session."""

    def __init__(self) -> None:
        self.on_started: Callable[[int], None] = lambda _pid: None
        self.over = threading.Event()
        self.result = Result(0, "exited")
        self.sent: list[tuple[int, int]] = []

    def end(self, result: Result) -> None:
        if not self.over.is_set():
            self.result = result
        self.over.set()

    def send(self, kind: int, value: int, data: bytes = b"") -> None:
        assert not data
        self.sent.append((kind, value))


class LocalExecutor:
    """Runs programs as processes of this computer."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, program: bytes) -> int:
        fd = os.memfd_create("program")
        os.write(fd, program)
        path = f"/proc/{os.getpid()}/fd/{fd}"
        os.set_inheritable(fd, True)
        process = subprocess.Popen(
            ["program"],
            executable=path,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(fd)
        self.processes[process.pid] = process
        return process.pid

    def wait(self, pid: int, timeout: float | None) -> int | None:
        try:
            return self.processes[pid].wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def when_ended(self, pid: int, tell: Callable[[], None]) -> None:
        del pid, tell

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Running:
    """What is used of a device: its driver is up."""

    running = True


class LocalGuests:
    """Every machine that was made."""

    def __init__(self) -> None:
        self.options: list[RunOptions] = []
        self.sessions: list[LocalSession] = []
        self.executors: list[LocalExecutor] = []
        self.board: Any = SimpleNamespace(paused=False)
        self.failure: BaseException | None = None

    def run_command(
        self,
        options: RunOptions,
        warn: Callable[[str], None],
        supervised: Supervised | None = None,
        sinks: Any = None,
        *,
        files: HostFiles | None = None,
        on_session: Callable[[Any], None],
    ) -> Result:
        del warn, sinks, files
        if self.failure is not None:
            raise self.failure
        assert supervised is not None
        session, executor = LocalSession(), LocalExecutor()
        self.options.append(options)
        self.sessions.append(session)
        self.executors.append(executor)
        tree: Any = options.root
        supervised.begin(Context(options.env, options.cwd, tree, lambda _: ()))
        on_session(session)
        host: Any = SimpleNamespace(close=lambda: None)
        attached: tuple[Any, ...] = (
            self.board,
            session,
            executor,
            lambda: b"booted\n",
            (Running(), host),
        )
        supervised.attach(*attached)
        session.on_started(1)
        session.over.wait()
        supervised.detach()
        executor.close()
        return session.result


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Where machines have their sockets."""
    with TemporaryDirectory(dir="/tmp") as short:
        yield Path(short)


@pytest.fixture
def local_guests(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> LocalGuests:
    """Machines are this computer."""
    return replace_machines(runtime, monkeypatch)


def replace_machines(short: Path, monkeypatch: pytest.MonkeyPatch) -> LocalGuests:
    """Have machines of this process be this computer, with their sockets in `short`."""
    guests = LocalGuests()

    def address(port: int) -> bytes:
        (found,) = short.glob(f"*/writes/vsock_{port}")
        return struct.pack("<H", socket.AF_UNIX) + bytes(found) + b"\0"

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.setattr(vm_guest, "run_command", guests.run_command)
    monkeypatch.setattr(vm, "check_runs_linux", lambda: None)
    monkeypatch.setattr("tinyvmm.guest.execution.vsock_address", address)
    return guests
