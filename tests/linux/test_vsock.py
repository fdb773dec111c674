"""vsock with Linux's own driver: programs on both sides, socat in the guest; and a console."""

import os
from pathlib import Path

import pytest

from tests.linux.conftest import MAIN, Runner, interpreter
from tests.own_hvc import COLS, ROWS
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

TALK = Path(__file__).parent / "vsock_talk.py"
SHORT = int(TALK.read_text().partition("SHORT = ")[2].split()[0])

GUEST = """
socat VSOCK-LISTEN:1024,fork,backlog=64 EXEC:cat &
socat VSOCK-LISTEN:1025,fork SYSTEM:sha256sum &
echo "cid $(socat -V | grep -c VSOCK), $(stty -F /dev/hvc0 size)"
echo "from the guest" | socat -t 60 - VSOCK-CONNECT:2:5000
socat -u /dev/null VSOCK-CONNECT:2:5001 2>&1 | grep -o 'Connection re[a-z ]*'
cat
"""


def test_programs_on_both_sides_talk(guest: Runner) -> None:
    where = Path(f"/tmp/tinyvmm-vsock-{os.getpid()}")  # no file system of the lab's that is shared
    devices = ("--vsock", str(where), "--device", "tests.own_hvc:Hvc")
    run = ("run", "--no-lab", *devices, "--", "sh", "-c", GUEST)
    command = [interpreter(), str(TALK), str(where), *python_command(MAIN, run)]
    done = guest.program(command, timeout=400)
    assert (done.status, done.stderr) == (0, b"")
    found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert found == {
        "guest": f"cid 1, {ROWS} {COLS}",
        "asked": "from the guest",
        "told": "from the host",
        "refused": "Connection reset by peer",
        "ok": "OK",
        "echo": "True",
        "half closed": "True",
        "nobody": "b''",
        "short": str(SHORT),
        "left behind": "0",
        "status": "0",
        "socket": "False",
    }
