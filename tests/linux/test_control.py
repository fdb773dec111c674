"""The control socket of a machine that runs Linux, and very many commands in it."""

import json
import os
import sys
from typing import Any

import pytest

from tests.linux.conftest import ROOT, Runner, interpreter

pytestmark = pytest.mark.linux

REFUSALS = ("give its whole path", "no such directory", "which is private")
FILES_MAX = 100  # that the guest's kernel may have open besides: it counts by the batch
GROWTH_MAX = 8 << 20  # bytes of the machine's process, which remembers how 1,024 commands ended
STEPS = ROOT / "tests" / "linux" / "control_steps.py"


def do(guest: Runner, commands: int, kills: int, *more: str, timeout: float = 400) -> Any:
    """Do the steps; what came of them."""
    script = (
        'd=$(mktemp -d) && "$0" -I -S "$1" "$2" "$d" "$3" "$4" $5; rc=$?; rm -rf "$d"; exit $rc'
    )
    words = [interpreter(), str(STEPS), str(ROOT), str(commands), str(kills), " ".join(more)]
    done = guest.program(["sh", "-c", script, *words], timeout=timeout)
    assert (done.status, done.stderr) == (0, b""), (done.stdout, done)
    return json.loads(done.stdout)


def check_soak(found: dict[str, Any], kills: int) -> None:
    """Every command ended as it should, and nothing is left of any."""
    assert "wrong" not in found
    assert found["statuses"] == [5]
    assert 0 < found["killed"] <= kills // 2
    assert found["commands_killed"] > 0
    before, after = found["processes"]
    assert {"(sleep)", "(busybox)"} <= set(before)
    assert before == after
    assert not [process for process in after if process.endswith(" Z")]
    was, now = found["files"]
    assert now < was + FILES_MAX
    was, now = found["overhead"]
    assert now < was + GROWTH_MAX
    assert found["sockets"] == []
    assert found["removed"] == [0, []]


def test_a_machine_is_watched_changed_and_given_commands(guest: Runner) -> None:
    found = do(guest, 40, 16, "ask")
    assert (found["started"], found["status"]) == (0, "running")
    assert found["run"] == ["in\nerr\n", 3]
    assert found["sizes"].split() == ["11", "22", "33", "44"]
    assert found["signalled"] == 137
    assert found["rip"] >> 47 in (
        0,
        0x1FFFF,
    )  # canonical, and with PG and PE below a kernel's state
    assert found["rip"] > 0xFFFF
    assert found["cr0"] & 0x8000_0001 == 0x8000_0001  # PG and PE
    assert found["traced"] == [["9p"], True]
    assert (found["debugged"], found["log"]) == (["virtio-9p root"], True)
    assert all(exits > 0 for exits in found["exits"])
    assert found["requests"] > 100
    assert 0 < found["memory"]["resident"] < found["memory"]["given"] == 256 << 20

    assert found["added"]["guest"] == "/mnt/a/b"
    assert found["read"] == ["from the host\n", 0]
    assert found["wrote"] == ["", 0]
    assert found["there"] == "from the guest\n"
    assert "is shared already" in found["twice"]
    text, status = found["readonly"]
    assert text.startswith("from the host\n")
    assert "Read-only file system" in text
    assert status != 0
    assert found["listed"] == ["/mnt/a/b", "/mnt/ro"]
    assert "/mnt/a/b is in use in the guest" in found["busy"]
    assert found["gone"] == 0
    assert found["empty"] == ["/mnt/a/b:\n\n/mnt/ro:\n", 0]
    assert found["unlisted"] == []
    for text, why in zip(found["refused"], REFUSALS, strict=True):
        assert why in text
    check_soak(found, 16)


@pytest.mark.skipif("TINYVMM_SOAK_EXECS" not in os.environ, reason="long: make soak-exec")
def test_a_thousand_commands_and_killed_clients_leave_nothing(guest: Runner) -> None:
    count = int(os.environ["TINYVMM_SOAK_EXECS"])
    kills = max(4, count // 20)
    found = do(guest, count - kills, kills, timeout=300 + 30 * count)
    seconds = " and ".join(f"{spent:g}" for spent in found["seconds"])
    was, now = (size >> 10 for size in found["overhead"])
    sys.stderr.write(
        f"{count - kills} commands on connections, {found['commands_killed']} of them killed, and "
        f"{kills} clients, {found['killed']} of them killed: {seconds} s; "
        f"{found['ended']} ends known, memory {now - was:+} KiB, guest's files {found['files']}\n"
    )
    check_soak(found, kills)
