"""A running PID 1 for tests, in a process namespace of this computer instead of a guest.

FIFOs stand for the ports to and from the command, a raw pseudo terminal for the control port: like
a virtio port it carries both ways and hangs up when the host closes it. In a namespace, powering
off ends its PID 1 by SIGINT (reboot(2)), which `unshare` passes on.
"""

import os
import select
import signal
import struct
import subprocess
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyvmm.guest import protocol
from tinyvmm.guest.init import InitConfig, build_init, search_path

POWERED_OFF = -signal.SIGINT
UNSHARE = [
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    "--mount-proc",
    "--uts",
    "--net",
]
PATIENCE = 120.0  # seconds
PATH = "/usr/local/bin:/usr/bin:/bin"

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run([*UNSHARE, "true"], check=False).returncode != 0,
    reason="needs root and unshare(1) for a process namespace",
)


class Guest:
    """A running PID 1 and this side of its ports."""

    def __init__(self, directory: Path, config: InitConfig) -> None:
        prefix = str(directory / "port")
        # A file being executed cannot be written, so that each has its own.
        program = directory / "init"
        program.write_bytes(build_init(config._replace(port_prefix=prefix)))
        program.chmod(0o755)
        for number in (1, 2, 3):
            os.mkfifo(f"{prefix}{number}")
        self.control, slave = os.openpty()
        tty.setraw(slave)
        os.symlink(os.ttyname(slave), f"{prefix}4")
        both_ends = os.open(f"{prefix}1", os.O_RDWR)
        self.stdin = os.open(f"{prefix}1", os.O_WRONLY)
        self.stdout, self.stderr = (
            os.open(f"{prefix}{number}", os.O_RDONLY | os.O_NONBLOCK) for number in (2, 3)
        )
        self.process = subprocess.Popen([*UNSHARE, program], env={"PATH": PATH}, cwd="/")
        self.started = self.record()
        self.config = config
        os.close(both_ends)
        os.close(slave)
        for fd in (self.stdout, self.stderr):
            os.set_blocking(fd, True)

    def record(self) -> tuple[int, int]:
        data = b""
        while len(data) < 8:
            assert select.select([self.control], [], [], PATIENCE)[0], "no record"
            data += os.read(self.control, 8 - len(data))
        kind, value = struct.unpack("<II", data)
        return kind, value

    def send(self, kind: int, value: int) -> None:
        os.write(self.control, struct.pack("<II", kind, value))

    def close(self, name: str) -> None:
        fd = getattr(self, name)
        if fd >= 0:
            os.close(fd)
        setattr(self, name, -1)

    def finish(self, stdin: bytes = b"") -> tuple[bytes, bytes, int]:
        """Feed and end stdin, read what is written, wait: output, errors, wait status."""
        results = {"stdout": b"", "stderr": b""}

        def feed() -> None:
            try:
                with os.fdopen(self.stdin, "wb", buffering=0) as file:
                    self.stdin = -1
                    file.write(stdin)
            except BrokenPipeError:
                return  # the command did not want it

        def drain(name: str) -> None:
            chunks = []
            while chunk := os.read(getattr(self, name), 1 << 16):
                chunks.append(chunk)
            results[name] = b"".join(chunks)

        threads = [threading.Thread(target=drain, args=(name,)) for name in results]
        threads.append(threading.Thread(target=feed))
        for thread in threads:
            thread.start()
        kind, value = self.record()
        for thread in threads:
            thread.join()
        assert kind == protocol.EXITED
        assert self.process.wait() == POWERED_OFF
        return results["stdout"], results["stderr"], value

    def give_up(self) -> None:
        """Kill it, so that whoever waits for what it says is told, and where."""
        os.write(2, f"{self.process.args!r}: still runs after {PATIENCE:g} s\n".encode())
        self.process.kill()

    def destroy(self) -> None:
        for name in ("stdin", "stdout", "stderr", "control"):
            self.close(name)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def configure(*argv: str, **more: Any) -> InitConfig:
    config = InitConfig(search_path(argv[0], PATH), argv, (f"PATH={PATH}",), root=(), mounts=())
    return config._replace(sync=False, **more)


Start = Callable[..., Guest]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a command under PID 1; whatever happens, nothing is left of it afterwards."""
    guests = []

    def start(*argv: str, **more: Any) -> Guest:
        guest = Guest(tmp_path_factory.mktemp("guest"), configure(*argv, **more))
        late = threading.Timer(PATIENCE, guest.give_up)
        late.start()
        guests.append((guest, late))
        return guest

    yield start
    for guest, late in guests:
        late.cancel()
        late.join()
        guest.destroy()
