"""An init of the root's own is PID 1, and ours beside it: in a process namespace here."""

import os
import select
import signal
import time
from pathlib import Path

import pytest

from tests.pid1 import POWERED_OFF, Start, needs_namespaces
from tests.pid1 import start as start  # noqa: PLC0414 (a fixture)
from tests.test_execution import Executed, ended
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.host import HostTree
from tinyvmm.guest import protocol
from tinyvmm.own_init import resolve, stop_signal

INIT = """
trap 'echo going; exec 1>&-; sleep 0.5; exit 0' USR2
echo $$ $#; read line; echo got $line
while :; do sleep 0.1; done
"""


def read_until(fd: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        assert select.select([fd], [], [], 60)[0], f"nothing after {seen!r}"
        data = os.read(fd, 1 << 16)
        assert data, seen
        seen += data
    return seen


@needs_namespaces
def test_it_is_pid_1_and_has_its_streams_and_signals(start: Start) -> None:
    guest = start("sh", "-c", INIT, "init", "x", own_init=True)
    assert guest.started == (protocol.STARTED, 1)
    os.write(guest.stdin, b"a line\n")
    assert read_until(guest.stdout, b"line\n") == b"1 1\ngot a line\n"
    guest.send(protocol.SIGNAL, signal.SIGUSR2)
    assert read_until(guest.stdout, b"going\n")
    assert guest.process.wait(60) == 0  # and unshare with it: no power off of ours


@needs_namespaces
def test_programs_are_executed_beside_it(start: Start, tmp_path: Path) -> None:
    guest = start("sleep", "1000", own_init=True)
    executed = Executed(
        guest, tmp_path, "sh", "-c", "cat; tr '\\0' ' ' < /proc/$PPID/cmdline; exit 3"
    )
    assert executed.finish(b"in ") == (b"in tinyvmm-exec ", b"", 3)
    assert ended(guest) == (executed.pid, 3)
    look = Executed(guest, tmp_path, "sh", "-c", "cat /proc/1/cmdline /proc/2/cmdline")
    found = look.finish()[0].split(b"\0")
    assert found[:2] == [b"sleep", b"1000"]
    assert found[2].startswith(b"@")  # spared by systemd's shutdown until that is done
    assert ended(guest)[1] == 0


@needs_namespaces
def test_one_that_is_not_there_is_told_and_ends_it(start: Start) -> None:
    guest = start("no-such-init", own_init=True)
    assert guest.started == (protocol.EXEC_FAILED, 2)
    assert guest.process.wait(60) == POWERED_OFF


@needs_namespaces
def test_it_has_a_terminal(start: Start) -> None:
    guest = start("sh", "-c", "stty size; tty; sleep 1000", own_init=True, terminal=(20, 70))
    assert read_until(guest.stdout, b"\n").startswith(b"20 70")
    guest.close("control")
    time.sleep(0.1)


def test_which_init_it_is_shows_where_the_path_leads(tmp_path: Path) -> None:
    for path in ("usr/lib/systemd", "sbin", "usr/bin"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/systemd").touch()
    (tmp_path / "usr/bin/busybox").touch()
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "sbin/init").symlink_to("../lib/systemd/systemd")
    (tmp_path / "sbin/linuxrc").symlink_to("/../usr/./bin/busybox")
    (tmp_path / "sbin/loop").symlink_to("loop")
    (tmp_path / "sbin/other").touch()
    tree = HostTree(str(tmp_path))
    try:
        assert resolve(tree, "/sbin/init") == "/usr/lib/systemd/systemd"
        assert stop_signal(tree, "/sbin/init") == signal.SIGRTMIN + 4
        assert stop_signal(tree, "/sbin/linuxrc") == signal.SIGUSR2
        for other in ("/sbin/other", "/sbin/loop", "/none/at/all", "/"):
            assert stop_signal(tree, other) == signal.SIGPWR
    finally:
        tree.close()


@pytest.mark.parametrize("text", ["37", "RTMIN+4", "SIGRTMIN+3", "TERM"])
def test_a_signal_has_many_names(text: str) -> None:
    from tinyvmm.methods.supervisor import signal_number

    expected = {"37": 37, "RTMIN+4": signal.SIGRTMIN + 4, "SIGRTMIN+3": signal.SIGRTMIN + 3}
    assert signal_number(text) == expected.get(text, signal.SIGTERM)


_NINES = "9" * 5000
_NONE = ["", "0", "65", "-1", "RTMIN+", "RTMIN+99", "RTMIN+x", "TERM+1", "x", "\u0663"]


@pytest.mark.parametrize("text", [*_NONE, _NINES, f"RTMIN+{_NINES}"])
def test_what_is_no_signal_is_refused(text: str) -> None:
    from tinyvmm.methods.supervisor import signal_number

    with pytest.raises(ConfigError, match="is no signal"):
        signal_number(text)
