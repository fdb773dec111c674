"""A machine's terminal: the keys that leave it, one's own lent to it, and one that goes away."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
import time
import warnings
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.errors import ConfigError
from tinyvmm.instances import registry
from tinyvmm.instances.attach import DetachKeys, parse_keys
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.instances.output_log import OutputLog
from tinyvmm.instances.registry import Instance, State

ROOT = Path(__file__).parent.parent


def typed(keys: bytes, *pieces: bytes) -> tuple[bytes, bool]:
    """What is passed on of what is typed, and whether the keys were seen."""
    detach = DetachKeys(keys)
    passed = b""
    for piece in pieces:
        passed += detach.filter(piece)
        if detach.seen:
            break
    return passed, detach.seen


def test_the_keys_detach_however_they_come() -> None:
    keys = parse_keys("ctrl-p,ctrl-q")
    assert keys == b"\x10\x11"
    assert typed(keys, b"ls\n\x10\x11more") == (b"ls\n", True)
    assert typed(keys, b"a\x10", b"\x11") == (b"a", True)
    assert typed(keys, b"\x10", b"\x10", b"\x11") == (b"\x10", True)
    assert typed(keys, b"\x10", b"x", b"\x11") == (b"\x10x\x11", False)
    assert typed(b"aab", b"aaa", b"b") == (b"a", True)
    assert typed(b"", b"\x10\x11") == (b"\x10\x11", False)


@given(st.lists(st.sampled_from([b"a", b"b", b"ab", b"aa", b"x"]), max_size=20))
def test_nothing_is_lost_but_what_may_be_keys(pieces: list[bytes]) -> None:
    passed, seen = typed(b"aab", *pieces)
    whole = b"".join(pieces)
    assert seen == (b"aab" in whole)
    assert whole.startswith(passed)
    if seen:
        assert passed == whole.partition(b"aab")[0]
    else:
        assert whole[len(passed) :] in {b"", b"a", b"aa"}


def test_keys_have_podmans_names() -> None:
    assert parse_keys("ctrl-a,d") == b"\x01d"
    assert parse_keys("Ctrl-@,ctrl-[,ctrl-_,Z") == b"\x00\x1b\x1fZ"
    assert parse_keys("") == b""
    for bad in ("ctrl-", "ctrl-1", "escape", "a,", "ü"):
        with pytest.raises(ConfigError, match="no key"):
            parse_keys(bad)


# --- at a terminal ----------------------------------------------------------------------------
class Attachable:
    """A detached machine `web` that writes to its log, and notes what it is sent."""

    def __init__(self) -> None:
        state = State("web", os.getpid(), ["x"], 1, 1, 1.0, detached=True, keep=True)
        self.instance = Instance(state)
        self.log = OutputLog(self.instance.file("output"))
        self.stdin = b""
        self.sizes: list[tuple[int, int]] = []
        self.server = ControlServer(
            self.instance.file("control"), lambda: {"stdin": self.take, "resize": self.resize}
        )

    def take(self, *, data: str = "", eof: bool = False) -> None:
        self.stdin += b64decode(data) + (b"<eof>" if eof else b"")
        if b"hello" in b64decode(data):
            self.log.write("stdout", b"got hello\r\n")

    def resize(self, *, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    def close(self) -> None:
        self.server.close()
        self.log.close()
        self.instance.end(0, None)


@pytest.fixture
def attachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attachable]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    machine = Attachable()
    yield machine
    machine.close()


@pytest.mark.parametrize(("stdin", "sent"), [("<&-", b""), ("0>/dev/null", b"<eof>")])
def test_a_stdin_that_cannot_be_read_is_none(
    attachable: Attachable, stdin: str, sent: bytes
) -> None:
    command = ["sh", "-c", f'exec "$@" {stdin}', "sh", sys.executable, "-m", "tinyvmm", "attach"]
    with subprocess.Popen(
        [*command, "web"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        late = threading.Timer(60, process.kill)
        late.start()
        shown = b""
        while not shown:  # from when it looks on
            assert process.poll() is None, process.communicate()
            attachable.log.write("stdout", b"hello\n")
            if select.select([process.stdout], [], [], 0.1)[0]:
                shown = os.read(process.stdout.fileno(), 1000)
        attachable.instance.update(status=4, ended=1.0)
        _, errors = process.communicate()
        late.cancel()
    assert (process.returncode, errors, attachable.stdin) == (4, b"", sent)


def test_a_terminal_is_lent_and_taken_back(attachable: Attachable) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 20, 60, 0, 0))
    command = [sys.executable, "-m", "tinyvmm", "attach", "--detach-keys", "ctrl-a,d", "web"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not attachable.sizes and time.monotonic() < deadline:
            time.sleep(0.05)
        assert attachable.sizes == [(20, 60)]
        os.write(master, b"hello\x10\x11\x03\x01x")
        seen = b""
        while b"got hello" not in seen:
            seen += os.read(master, 1000)
        os.write(master, b"\x01")
        os.write(master, b"dmore")
        assert process.wait(30) == 0
        assert attachable.stdin == b"hello\x10\x11\x03\x01x"
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
    running = registry.read("web")
    assert running is not None
    assert running.running


LEAVES = """
import os, sys, time
from tinyvmm.cli import instance
from tinyvmm.cli.main import main

def run(args, options, warn, ready):
    ready("web")
    time.sleep(1)  # the terminal goes meanwhile
    with open(sys.argv[1], "w") as file:
        file.write(f"{os.getpid() == os.getsid(0)} {os.isatty(0)}")
    os._exit(0)

instance._run = run
sys.exit(instance._detach(None, None))
"""


def test_a_detached_machine_outlives_its_terminal(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: it executes at once
        pid, master = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", LEAVES, str(tmp_path / "told")])
    assert os.read(master, 100).startswith(b"web")
    os.waitpid(pid, 0)
    os.close(master)  # whoever had it for a terminal gets SIGHUP
    deadline = time.monotonic() + 30
    while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
        assert time.monotonic() < deadline, "it ended with its terminal"
        time.sleep(0.05)
    assert (tmp_path / "told").read_text() == "True False"
