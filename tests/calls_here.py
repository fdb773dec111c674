"""guest/calls.py's program as a process of this computer, and a machine whose guest that is."""

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyvmm.guest.calls import build_calls
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.instances.registry import Instance, State


def unix_address(path: str) -> bytes:
    """struct sockaddr_un."""
    return struct.pack("<H", socket.AF_UNIX) + os.fsencode(path) + b"\0"


def start(directory: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The program, running here, and our end of its socket."""
    path = directory / "calls.socket"
    program = directory / "calls"
    program.write_bytes(build_calls(unix_address(str(path))))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        process = subprocess.Popen([program], cwd="/")
        return process, listener.accept()[0]


def ended(process: "subprocess.Popen[bytes]") -> bool:
    """Wait for the end that hanging up makes: by SIGPIPE, where answers were on their way."""
    return process.wait(60) in {0, -signal.SIGPIPE}


class MachineHere:
    """A machine `web` with a control socket, for `status`, `calls` and `exec_wait`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.instance = Instance(State("web", os.getpid(), ["x"], 1, 1, 1.0))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._server = ControlServer(self.instance.file("control"), self.methods)

    def methods(self) -> dict[str, Callable[..., Any]]:
        return {"status": self.status, "calls": self.calls, "exec_wait": self.exec_wait}

    def status(self) -> dict[str, str]:
        return {"vsock": self.instance.file("vsock")}

    def calls(self, *, port: int) -> dict[str, int]:
        return {"pid": self.start(build_calls(self.address(port)))}

    def address(self, port: int) -> bytes:
        """Where what the guest connects to `port` of the host leads."""
        return unix_address(self.instance.file(f"vsock_{port}"))

    def start(self, code: bytes) -> int:
        """Start a program of the guest's; its number stands for its process id."""
        program = self.directory / f"program{len(self.processes)}"
        program.write_bytes(code)
        program.chmod(0o755)
        self.processes.append(subprocess.Popen([program], cwd="/", start_new_session=True))
        return len(self.processes) - 1

    def exec_wait(self, *, pid: int, timeout: float) -> int | None:
        try:
            return self.processes[pid].wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def end(self, process: "subprocess.Popen[bytes]") -> None:
        assert ended(process)

    def close(self) -> None:
        self._server.close()
        for process in self.processes:
            self.end(process)
        self.instance.end(0, None)
