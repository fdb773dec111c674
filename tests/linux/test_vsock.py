"""vsock with Linux's own driver, ours and the host's kernel's: programs on both sides, socat in the
guest; and a console.
"""

import os
from pathlib import Path

import pytest

from tests.linux.conftest import LONG, MAIN, ROOT, Runner, interpreter
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
    done = guest.program(command, timeout=LONG)
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


VHOST_TALK = Path(__file__).parent / "vhost_talk.py"
MOVER = MAIN.replace("tinyvmm.cli.main import main", "tests.linux.device_mover import run as main")
VHOST_GUEST = """
socat VSOCK-LISTEN:1024,fork,backlog=64 EXEC:cat 2> /dev/null &
echo ready
echo "from the guest" | socat -t 60 - VSOCK-CONNECT:2:5000
socat -u /dev/null VSOCK-CONNECT:2:5001 2>&1 | grep -o 'Connection re[a-z ]*'
read -r word || exit 0
printf 1 | dd of=/dev/port bs=1 seek=1328 conv=notrunc status=none
echo $word
cat
"""


def test_the_hosts_kernel_carries_it_through_pauses_and_moves(guest: Runner) -> None:
    run = ("run", "--no-lab", "--device", "tests.linux.device_mover:Mover")
    command = [interpreter(), "-I", "-S", str(VHOST_TALK), str(ROOT), *python_command(MOVER, run)]
    done = guest.program([*command, "--", VHOST_GUEST], timeout=LONG)
    assert done.stderr.decode() == (
        "tinyvmm: --vsock vhost: another guest of this computer has CID 7: give one of its own "
        "(--vsock vhost,cid=8)\n"
    )
    assert done.status == 0
    found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert "run it without --vsock vhost" in found.pop("exec")
    assert found == {
        "guest": "ready",
        "asked": r"[7, b'from the guest\n']",
        "told": "from the host",
        "refused": "Connection reset by peer",
        "echo": "[True, True]",  # and nothing comes while the machine is paused
        "short": f"[{SHORT}, 0]",
        "taken": "[125, b'']",
        "moved": "move",
        "old": "reset",
        "new": "[True, True]",
        "status": "0",
        "mmio": "[True, True]",
        "mmio status": "0",
    }
