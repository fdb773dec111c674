"""Disks as Linux finds them: two boots, one to ask everything, one to be killed in the middle."""

import hashlib
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from tests.linux.conftest import LONG, MAIN, Runner, interpreter
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

KIB, MIB = 1 << 10, 1 << 20


def host(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()  # noqa: S324 (as md5sum in the guest)


# Builtins where they do, and no forgetting of caches: to start a program is what takes time there.
QUESTIONS = r"""
ask() { read -r value < "$2"; echo "$1=$value"; }
ask sectors /sys/block/vda/size
ask serial /sys/block/vda/serial
ask discard /sys/block/vda/queue/discard_max_bytes
ask zeroes /sys/block/vda/queue/write_zeroes_max_bytes
ask cache /sys/block/vda/queue/write_cache
ask vdb_ro /sys/block/vdb/ro
ask vdb_serial /sys/block/vdb/serial
set -- /sys/block/vda/mq/*; echo queues=$#
copy() { dd "$@" 2> /dev/null; }
taskset -c 1 dd if=/dev/vda of=/dev/null bs=4k count=9 iflag=direct 2> /dev/null
while read -r _ first second name; do  # only /dev/vda has a second queue
    case $name in *-req.1) echo second=$((first + second)) ;; esac
done < /proc/interrupts
echo vdb=$(md5sum < /dev/vdb)
copy if=/dev/zero of=/dev/vdb bs=512 count=1; echo vdb_write=$?
copy if=/dev/urandom of=/tmp/data bs=512 count=999
for disk in c d; do
    copy if=/tmp/data of=/dev/vd$disk bs=512 seek=333 conv=fsync
    blkdiscard -z -o 1M -l 512K /dev/vd$disk
    copy if=/dev/vd$disk of=/tmp/back iflag=direct bs=512 skip=333 count=999
    cmp /tmp/back /tmp/data; echo vd${disk}_back=$?
    copy if=/dev/vd$disk of=/tmp/zeroes iflag=direct bs=512K skip=2 count=1
    cmp -n 524288 /tmp/zeroes /dev/zero; echo vd${disk}_zeroes=$?
    echo vd$disk=$(md5sum < /dev/vd$disk)
done
mkfs.ext4 -q -E nodiscard /dev/vda; echo mkfs=$?
mkdir /tmp/a; mount /dev/vda /tmp/a; echo mount=$?
copy if=/dev/zero of=/tmp/a/large bs=1M count=12 conv=fsync
copy if=/dev/zero of=/tmp/a/kept bs=1M count=2 conv=fsync
rm /tmp/a/large
sync
fstrim /tmp/a; echo fstrim=$?
umount /tmp/a
echo errors=$(dmesg --level=emerg,alert,crit,err | grep -cE "vd[a-d]|EXT4|blk")
"""


def test_linux_uses_every_kind_of_disk(guest: Runner) -> None:
    where = guest.directory("disks")
    base, image, delta = where / "base.raw", where / "top.qcow2", where / "delta.qcow2"
    base.write_bytes(random.Random(1).randbytes(2 * MIB))  # noqa: S311
    before = base.read_bytes()
    more = ["-F", "raw", "-b", str(base)]
    host("qemu-img", "create", "-q", "-f", "qcow2", *more, str(image))
    host(
        "qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 300k", "-c", "write -z 1M 64k", str(image)
    )
    host("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(where / "truth"))
    plain = f"/dev/shm/tinyvmm-disk-{os.getpid()}"  # where there can be holes, wherever that is
    arguments = ["--cpus", "2", "--memory", "512M"]
    for disk in (
        f"{plain},serial=the first,queues=2",
        f"{image},format=qcow2,ro",
        f"{base},ephemeral",
        f"{base},overlay={delta}",
    ):
        arguments += ["--disk", disk]
    with guest.standing(f"truncate -s 24M {plain}", f"rm -f {plain}"):
        done = guest.run(*arguments, "--", "sh", "-c", QUESTIONS, timeout=LONG)
        host_blocks = guest.program(["stat", "-c", "%b", plain]).stdout
        checked = guest.program(["e2fsck", "-fn", plain])
    assert (done.status, done.stderr) == (0, b"")
    found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert found["sectors"] == str(24 * MIB // 512)
    assert found["serial"] == "the first"
    assert found["queues"] == "2"
    assert int(found["second"]) >= 9, "requests of the second processor go by its own queue"
    assert int(found["discard"]) > 0
    assert int(found["zeroes"]) > 0
    assert found["cache"] == "write back"
    assert found["vdb_ro"] == "1"
    assert found["vdb_serial"] == "disk1"
    assert found["vdb"].split()[0] == md5((where / "truth").read_bytes())
    assert found["vdb_write"] != "0"
    for disk in "cd":
        assert found[f"vd{disk}_back"] == "0"
        assert found[f"vd{disk}_zeroes"] == "0"
    assert base.read_bytes() == before
    host("qemu-img", "check", "-f", "qcow2", str(delta))
    host("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(delta), str(where / "written"))
    written = (where / "written").read_bytes()
    assert found["vdd"].split()[0] == md5(written) != md5(before)
    assert written[: 333 * 512] == before[: 333 * 512]
    assert (found["mkfs"], found["mount"], found["fstrim"]) == ("0", "0", "0")
    assert 2 * MIB <= 512 * int(host_blocks) < 10 * MIB  # of the 14 that were written, and more
    assert checked.status == 0, checked.stdout
    assert found["errors"] == "0"


WRITES = r"""
mkdir /tmp/raw /tmp/overlay
mkfs.ext4 -q /dev/vda && mount /dev/vda /tmp/raw && mount /dev/vdb /tmp/overlay || exit 1
i=0
while :; do
    i=$((i + 1))
    for name in raw overlay; do
        dd if=/dev/urandom of=/tmp/$name/f$i bs=8k count=$((1 + i % 7)) conv=fsync 2> /dev/null
        echo $name f$i $(md5sum < /tmp/$name/f$i)
    done
done
"""


def test_what_a_killed_machine_had_flushed_is_there(guest: Runner) -> None:
    where = guest.directory("killed")
    plain, base, delta = where / "plain.raw", where / "base.raw", where / "delta.qcow2"
    for image in (plain, base):
        image.touch()
        os.truncate(image, 32 * MIB)
    host("mkfs.ext4", "-q", str(base))
    before = base.read_bytes()
    chosen = random.Random(4)  # noqa: S311
    command = python_command(
        MAIN,
        [
            *("run", "--no-lab", "--disk", str(plain), "--disk", f"{base},overlay={delta}"),
            *("--", "sh", "-c", WRITES),
        ],
    )
    killer = Path(__file__).with_name("kill_disk.py")
    limits = [str(chosen.randrange(8, 20)), str(chosen.random() * 0.5)]
    done = guest.program([interpreter(), "-I", str(killer), *limits, *command])
    *lines, status = done.stdout.decode().splitlines()
    assert status == "status -9", done.stderr
    assert len(lines) >= 8
    host("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(delta), str(where / "overlay.raw"))
    assert base.read_bytes() == before
    for name, image in (("raw", plain), ("overlay", where / "overlay.raw")):
        # As a mount would: what is in the journal is put where it belongs.
        subprocess.run(["e2fsck", "-y", "-E", "journal_only", str(image)], check=False, timeout=240)
        host("e2fsck", "-fn", str(image))
        synced = re.findall(rf"^{name} (f\d+) (\w{{32}}) +-$", "\n".join(lines), re.MULTILINE)
        assert len(synced) >= 4
        for file, expected in synced:
            out = where / f"{name}-{file}"
            host("debugfs", "-R", f"dump {file} {out}", str(image))
            assert md5(out.read_bytes()) == expected, (name, file)
