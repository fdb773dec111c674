"""The network interface with Linux's own driver: over a tap, and through passt."""

import hashlib
import os
import shlex
from pathlib import Path

import pytest

from tests.linux.conftest import MAIN, Runner
from tinyvmm.images import kernels
from tinyvmm.lab import python_command

pytestmark = pytest.mark.linux

SIZE = 2 << 20

# Where the VMM runs: a tap with an address, and a default route that leads to it, because passt
# wants to stand for an interface that has one. All in a network namespace of its own.
HOST = """
set -e
cd {directory}
trap 'kill $pids 2> /dev/null || :' EXIT
test -e /dev/net/tun || insmod {tun}
ip link set lo up
ip tuntap add vm0 mode tap
ip address add 192.0.2.1/24 dev vm0
ip link set vm0 up
socat -U TCP-LISTEN:8000,fork,reuseaddr OPEN:input,rdonly > /dev/null 2>&1 &
pids=$!
socat -u TCP-LISTEN:8001,reuseaddr CREATE:output > /dev/null 2>&1 &
pids="$pids $!"
{tap}
ip route add default via 192.0.2.9 dev vm0
{user}
"""

TAP_GUEST = """
cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
cat /etc/resolv.conf
socat -u TCP:192.0.2.1:8000 - | tee /tmp/data | sha256sum
socat -u OPEN:/tmp/data TCP:192.0.2.1:8001
"""

USER_GUEST = """
cat /etc/resolv.conf
socat -u TCP:10.0.2.2:8000 - | sha256sum
"""


def test_bytes_go_both_ways_over_a_tap_and_through_passt(guest: Runner) -> None:
    directory = guest.directory("net")
    data = os.urandom(SIZE)
    (directory / "input").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    installed = kernels.default()
    assert installed is not None
    assert installed.modules is not None

    def run(script: str, *net: str) -> str:
        words = ("run", "--no-lab", *net, "--", "sh", "-c", script)
        return shlex.join(python_command(MAIN, words))

    tap = "tap=vm0,mac=52:54:00:12:34:56,mtu=1400,address=192.0.2.2/24,dns=192.0.2.1"
    script = HOST.format(
        directory=directory,
        tun=Path(installed.modules) / "kernel/drivers/net/tun.ko",
        tap=run(TAP_GUEST, "--net", tap),
        user=run(USER_GUEST, "--net", "user"),
    )
    done = guest.program(["unshare", "-n", "sh", "-c", script], timeout=300)
    assert (done.status, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [
        "52:54:00:12:34:56",
        "1400",
        "nameserver 192.0.2.1",
        f"{digest}  -",
        "nameserver 10.0.2.3",
        f"{digest}  -",
    ]
    assert (directory / "output").read_bytes() == data
