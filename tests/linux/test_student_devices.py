"""The balloon under Linux's own driver, and what a user's own devices are to Linux: one guest."""

import re

import pytest

from tests.linux.conftest import LONG, MAIN, Runner, interpreter
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

# Runs `tinyvmm run`, and tells its guest how much of the guest's RAM is there when it asks, in MiB:
# the guest sees this computer's files, but not its processes.
SUPERVISOR = r"""
import re, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", *sys.argv[1:]],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
)
def resident():
    with open(f"/proc/{child.pid}/status") as status:
        return int(re.search(r"^RssShmem:\s+(\d+) kB$", status.read(), re.M)[1]) >> 10
for line in child.stdout:
    if line == "?\n":
        child.stdin.write(f"{resident()}\n")
        child.stdin.flush()
    else:
        print(line, end="", flush=True)
sys.exit(child.wait())
"""

KNOB = MAIN.replace("tinyvmm.cli.main import main", "tests.linux.balloon_knob import run as main")

SCRIPT = r"""
ask() { echo '?'; read -r "$1"; }
ask before
head -c 200M /dev/zero > /dev/shm/large
ask used
rm /dev/shm/large

$1 -I -S examples/crc_guest.py
echo acpi=$(cat /sys/bus/acpi/devices/CRCD0001:00/hid /sys/bus/acpi/devices/DICE0001:00/uid)
echo thrown=$(echo $(dd if=/dev/port bs=1 skip=1280 count=1 status=none | od -An -tu1))
for irq in /sys/kernel/irq/*; do  # by the IOAPIC's pin, which Linux gives any number
  read -r pin < $irq/hwirq
  [ "$pin" = 23 ] && echo interrupt=$(cat $irq/chip_name $irq/type)
done
cd /sys/class/misc/hw_random
echo generators=$(cat rng_available)
echo virtio_rng.1 > rng_current
echo pattern=$(head -c 24 /dev/hwrng)
echo virtio_rng.0 > rng_current

n=0
while ask after; [ $after -gt $((before + 60)) ] && [ $n -lt 40 ]; do
  sleep 0.5; n=$((n + 1))
done
knob() { dd if=/dev/port bs=1 skip=$1 count=1 status=none | od -An -tu1; }
turn() { printf "\\$2" | dd of=/dev/port bs=1 seek=$1 count=1 conv=notrunc status=none; }
await() { n=0; until [ $(knob $1) $2 ] || [ $n -ge 60 ]; do sleep 0.1; n=$((n + 1)); done; }
await 1312 '-eq 16'
echo begun=$(echo $(knob 1312))
turn 1312 040; await 1312 '-eq 32'
echo larger=$(echo $(knob 1312))
turn 1313 1; await 1313 '-ne 255'
while read -r name kib _; do [ $name = MemTotal: ] && total=$((kib >> 12)); done < /proc/meminfo
echo total=$total told=$(echo $(knob 1313))
turn 1312 0; await 1312 '-eq 0'
echo empty=$(echo $(knob 1312))
echo before=$before
echo used=$used
echo after=$after
while read -r name count; do
  case $name in balloon_inflate|balloon_deflate) echo $name=$count;; esac
done < /proc/vmstat
for device in /sys/bus/virtio/devices/*; do
  read -r id < $device/device
  [ $id = 0x0005 ] && read -r accepted < $device/features && balloon=${device##*/}
done
echo accepted=$accepted
echo complaints=$(dmesg --level=emerg,alert,crit,err,warn | grep -ciE 'balloon|DV0|virtio|ACPI')

# Files that no memory can be had of leave the guest 40 MiB; a balloon takes 24, a command needs 24.
available() {
  while read -r name n _; do [ $name = MemAvailable: ] && echo $((n >> 10)); done < /proc/meminfo
}
killed() {
  while read -r name count; do [ $name = oom_kill ] && echo $1=$count; done < /proc/vmstat
}
mkdir /tmp/full && mount -t tmpfs -o huge=always,size=100% full /tmp/full
fallocate -l $(($(available) - 40))M /tmp/full/file
need() {
  turn 1312 006; await 1312 '-eq 6'
  (
    echo 1000 > /proc/self/oom_score_adj
    exec dd bs=24M count=1 if=/dev/zero of=/dev/null 2> /dev/null
  )
  echo $1=$?
  echo taken_back_$1=$((6 - $(knob 1312)))
  killed killed_$1
  turn 1312 0; await 1312 '-eq 0'
}
need offered
cd /sys/bus/virtio/drivers/virtio_balloon
echo $balloon > unbind
turn 1314 0
echo $balloon > bind
need refused 2> /dev/null  # where the shell says so
"""


def test_linux_takes_the_users_own_devices_and_gives_memory_back(guest: Runner) -> None:
    own = [KNOB, "run", "--no-lab", "--memory", "512M", "--balloon", "64M"]
    for device in (
        "examples.crc_device:CrcDevice",
        "examples.dice_port:Dice,sides=1",
        "tests.linux.balloon_knob:Knob",
        "examples.pattern_rng:PatternRng,text=abcd",
    ):
        own += ["--device", device]
    done = guest.program(
        python_command(SUPERVISOR, [*own, "--", "sh", "-c", SCRIPT, "sh", interpreter()]),
        timeout=LONG,
    )
    assert (done.status, done.stderr) == (0, b""), done
    told = dict(re.findall(r"^(\w+)=(.*)$", done.stdout.decode(), re.MULTILINE))

    assert told["gpa"] == "0xd8000000"
    assert told["id"] == "CRC1"
    assert told["count"] == "72"
    assert told["crc"] == "right"
    assert told["acpi"] == "CRCD0001 1"
    assert told["thrown"] == "1"
    assert told["interrupt"] == "IO-APIC level", done
    assert told["generators"] == "virtio_rng.0 virtio_rng.1"
    # It begins where the driver's own reading for the kernel's pool has left it.
    assert told["pattern"] in {("abcd" * 7)[start : start + 24] for start in range(4)}

    before, used, after = (int(told[name]) for name in ("before", "used", "after"))
    # 200 MiB, but what the guest touched before of huge pages holds some of them already.
    assert used > before + 140
    assert after < before + 61
    assert int(told["balloon_inflate"]) >= 128 << 20 >> 12
    assert (told["begun"], told["larger"], told["empty"]) == ("16", "32", "0")
    total, answer = told["total"].split(" told=")
    assert total == answer
    assert int(told["balloon_deflate"]) == 128 << 20 >> 12
    # Statistics, deflation before anybody is killed for want of memory, reports of free pages.
    assert [bit for bit, is_on in enumerate(told["accepted"][:24]) if is_on == "1"] == [1, 2, 5]
    assert told["complaints"] == "0"
    # The balloon is a wish: a command gets what it needs of it. Where it is none, it is killed.
    assert (told["offered"], told["killed_offered"]) == ("0", "0"), done
    assert int(told["taken_back_offered"]) >= 1
    assert (told["refused"], told["killed_refused"]) == ("137", "1"), done
    assert told["taken_back_refused"] == "0"
