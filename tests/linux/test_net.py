"""The network interface with Linux's own driver: over a tap, and through passt."""

import hashlib
import os
import shlex
from pathlib import Path

import pytest

from tests.linux.conftest import LONG, MAIN, Runner, interpreter
from tinyvmm.images import kernels
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

MOVER = MAIN.replace("tinyvmm.cli.main import main", "tests.linux.device_mover import run as main")
SIZE = 2 << 20

# Where the VMM runs: a tap with an address, and a default route that leads to it, because passt
# wants to stand for an interface that has one. All in a network namespace of its own.
HOST = """
set -e
cd {directory}
trap 'kill $pids 2> /dev/null || :' EXIT
test -e /dev/net/tun || insmod {tun}
ip link set lo up
ip tuntap add vm0 mode tap multi_queue
ip address add 192.0.2.1/24 dev vm0
ip address add 198.51.100.1/32 dev lo
ip link set vm0 up
socat -U TCP-LISTEN:8000,fork,reuseaddr OPEN:input,rdonly > /dev/null 2>&1 &
pids=$!
socat -u TCP-LISTEN:8001,reuseaddr CREATE:output > /dev/null 2>&1 &
pids="$pids $!"
{tap}
{web} > /dev/null 2>&1 &
pids="$pids $!"
ip route add default via 192.0.2.9 dev vm0
timeout 1200 sh -c '
until test -s greeting; do
  socat -u TCP:127.0.0.1:8080 CREATE:greeting || sleep 0.5
done
socat -t 60 - TCP:127.0.0.1:8081 < input > digest' 2> /dev/null | {user}
"""

# The last command ends before all it sent has been acknowledged: the machine waits for that.
# Each processor sends by its own pair of queues, and the tap answers by the pair that asked. Then
# the guest says on the control queue that it uses one, and all goes by that. What the second asks
# is behind the gateway, and meanwhile every device is saved and made anew of that, twice.
TAP_GUEST = """
cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
cat /etc/resolv.conf
ethtool -k eth0 | grep -E '^(tx-checksumming|tcp-segmentation-offload):'
carried() {
  for way in rx tx; do for pair in 0 1; do
    ethtool -S eth0 | grep -q "${way}_queue_${pair}_packets: [1-9][0-9]" && echo $1 $way $pair
  done; done
}
taskset -c 0 socat -u TCP:192.0.2.1:8000 - | sha256sum
move() { printf 1 | dd of=/dev/port bs=1 seek=1328 conv=notrunc status=none; }
{ taskset -c 1 socat -u TCP:198.51.100.1:8000 - > /tmp/data; } &
for turn in 1 2; do
  while [ $(stat -c %s /tmp/data) -lt $((turn * 500000)) ]; do :; done
  move
done
wait
sha256sum < /tmp/data
echo moves=$(echo $(dd if=/dev/port bs=1 skip=1328 count=1 status=none | od -An -tu1))
carried both
ethtool -L eth0 combined 1
echo /sys/class/net/eth0/queues/*
taskset -c 1 socat -u OPEN:/tmp/data TCP:192.0.2.1:8001
"""

# A server that speaks first, and one that answers when all has come; then what everybody does.
USER_GUEST = """
cat /etc/resolv.conf
socat TCP-LISTEN:81,fork,reuseaddr EXEC:sha256sum &
socat -U TCP-LISTEN:80,fork,reuseaddr SYSTEM:"echo to whoever asks" &
socat -u TCP:10.0.2.2:8000 - | sha256sum
cd /tmp && mkdir -p lists/partial
echo "deb [trusted=yes] http://10.0.2.2:8002/ ./" > sources.list
apt-get -o Dir::Etc::SourceList=/tmp/sources.list -o Dir::Etc::SourceParts=- \\
  -o Dir::State::Lists=/tmp/lists -o Acquire::GzipIndexes=false \\
  -o APT::Sandbox::User=root update > log 2>&1 || cat log
cat lists/*_Packages
cat  # until the host has been answered
"""

PACKAGES = "Package: proof\nVersion: 1\nArchitecture: all\nFilename: proof.deb\nSize: 1\n"


def test_bytes_go_both_ways_over_a_tap_and_through_passt(guest: Runner) -> None:
    directory = guest.directory("net")
    data = os.urandom(SIZE)
    (directory / "input").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    repository = directory / "repository"
    repository.mkdir()
    (repository / "Packages").write_text(PACKAGES)
    installed = kernels.default()
    assert installed is not None
    assert installed.modules is not None

    def run(script: str, *net: str, main: str = MAIN) -> str:
        words = ("run", "--no-lab", *net, "--", "sh", "-c", script)
        return shlex.join(python_command(main, words))

    tap = "tap=vm0,mac=52:54:00:12:34:56,mtu=1400,queues=2,address=192.0.2.2/24"
    tap += ",gateway=192.0.2.1,dns=192.0.2.1"
    more = ("--cpus", "2", "--device", "tests.linux.device_mover:Mover")
    script = HOST.format(
        directory=directory,
        tun=Path(installed.modules) / "kernel/drivers/net/tun.ko",
        tap=run(TAP_GUEST, *more, "--net", tap, main=MOVER),
        web=shlex.join([interpreter(), "-m", "http.server", "8002", "-d", str(repository)]),
        user=run(USER_GUEST, "--publish", "127.0.0.1:8080:80", "--publish", "8081:81", "--net"),
    )
    done = guest.program(["unshare", "-n", "sh", "-c", script], timeout=LONG)
    assert (done.status, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [
        "52:54:00:12:34:56",
        "1400",
        "nameserver 192.0.2.1",
        "tx-checksumming: on",
        "tcp-segmentation-offload: on",
        f"{digest}  -",
        f"{digest}  -",
        "moves=2",
        "both rx 0",
        "both rx 1",
        "both tx 0",
        "both tx 1",
        "/sys/class/net/eth0/queues/rx-0 /sys/class/net/eth0/queues/tx-0",
        "nameserver 10.0.2.3",
        f"{digest}  -",
        *PACKAGES.splitlines(),
    ]
    assert (directory / "output").read_bytes() == data
    assert (directory / "greeting").read_text() == "to whoever asks\n"
    assert (directory / "digest").read_text() == f"{digest}  -\n"
