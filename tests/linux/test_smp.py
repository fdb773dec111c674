"""Several processors under Linux: what they are told, coming and going, and all of them at work."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.linux.conftest import Runner
from tinyvmm.lab import Lab

pytestmark = pytest.mark.linux

CPUS = 3  # more than the lab has
WORK = 512 << 10

SCRIPT = r"""
cd /sys/devices/system/cpu
say() { echo "$1=$2"; }
say count "$(nproc)"
say apicids "$(sed -n 's/^apicid.*: //p' /proc/cpuinfo | tr '\n' ' ')"
say cores "$(sed -n 's/^core id.*: //p' /proc/cpuinfo | tr '\n' ' ')"
say cores_each "$(sed -n 's/^cpu cores.*: //p' /proc/cpuinfo | sort -u)"
say packages "$(cat cpu*/topology/physical_package_id | sort -u)"
say threads "$(cat cpu[0-9]/topology/thread_siblings_list | tr '\n' ' ')"
say siblings "$(cat cpu[0-9]/topology/core_siblings_list | sort -u)"

taskset -c 2 sh -c 'echo; exec yes' > /dev/null & busy=$!
sleep 0.5
echo 0 > cpu1/online; echo 0 > cpu2/online
say fewer "$(cat online)"
echo 1 > cpu2/online; echo 1 > cpu1/online
kill $busy
say again "$(cat online)"
say runs_on "$(for c in 0 1 2; do
  taskset -c $c sh -c 'read -r line < /proc/self/stat; set -- ${line##*)}; shift 36; echo $1'
done | tr '\n' ' ')"

# All devices at once, from every processor: the root and a shared directory, randomness, output.
for c in 0 1 2; do
  taskset -c $c sh -c "
    cat /live/input | sha256sum > /live/sum$c
    head -c 65536 /dev/hwrng | wc -c > /live/random$c
    dd if=/live/input of=/var/tmp/copy$c bs=64k 2> /dev/null; cp /var/tmp/copy$c /live/copy$c" &
  taskset -c $c cat /live/input >&2 &
done
wait
say sums "$(cat /live/sum* | cut -d' ' -f1 | sort -u)"
say random "$(cat /live/random* | sort -u)"
say copies "$(sha256sum /live/copy? | cut -d' ' -f1 | sort -u)"
say complaints "$(dmesg | grep -ciE 'rcu.*stall|soft lockup|blocked for more|BUG:')"
say errors "$(dmesg --level=emerg,alert,crit,err | grep -vc 'PCI: Fatal')"
"""


@pytest.fixture
def on_one_cpu(guest: Runner) -> Iterator[Runner]:
    """A lab of one processor, for a guest of several.

    In a lab of two such a guest dies in one run of three: a page of its kernel is found not present
    right after a VMRUN, or it panics. QEMU's own VMM (`-accel kvm -smp 3`) dies there as often, so
    it is the emulation of SVM, on threads of which each is a processor. With one it never did.
    """
    if guest.lab is None:
        yield guest
        return
    with Lab(shares=[str(guest.shared)], cpus=1) as lab:
        yield Runner(lab, guest.shared)


def test_processors_are_told_apart_come_and_go_and_work_at_once(on_one_cpu: Runner) -> None:
    guest = on_one_cpu
    live = guest.directory("smp")
    data = os.urandom(WORK)
    (live / "input").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    done = guest.run(
        "--cpus",
        str(CPUS),
        "--shared",
        f"/live={live}",
        "--",
        "sh",
        "-c",
        SCRIPT,
        timeout=400,
    )
    assert done.status == 0
    found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert found == {
        "count": "3",
        "apicids": "0 1 2 ",
        "cores": "0 1 2 ",
        "cores_each": "3",
        "packages": "0",
        "threads": "0 1 2 ",
        "siblings": "0-2",
        "fewer": "0",
        "again": "0-2",
        "runs_on": "0 1 2 ",
        "sums": digest,
        "random": "65536",
        "copies": digest,
        "complaints": "0",
        "errors": "0",
    }
    # Four programs write at once: every byte comes, in each one's own order.
    assert len(done.stderr) == CPUS * WORK
    assert Counter(done.stderr) == Counter(data * CPUS)
    assert all((live / f"copy{cpu}").read_bytes() == data for cpu in range(CPUS))
    assert not Path("/var/tmp/copy0").exists()
