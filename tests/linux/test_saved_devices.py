"""A Linux guest whose virtio devices are saved and loaded under it, root and all, goes on."""

import pytest

from tests.linux.conftest import MAIN, Runner
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

MOVER = MAIN.replace("tinyvmm.cli.main import main", "tests.linux.device_mover import run as main")

# What is shared is not cached in the guest: each byte that `read` takes is asked for.
SCRIPT = r"""
move() { printf 1 | dd of=/dev/port bs=1 seek=1328 conv=notrunc status=none; }
set -e
sector() { dd if=/dev/vda bs=512 count=1 skip=$1 iflag=direct status=none | head -c 5; echo; }
sector 1
cd /live
exec 3< lines 4>> log 5< gone
read -r word <&3; echo $word
echo one >&4
rm gone
mkdir -p a/b
cd a/b
move
sector 2
printf '%-512s' guest | dd of=/dev/vda bs=512 seek=3 oflag=direct conv=notrunc,fsync status=none
read -r word <&3; echo $word
echo two >&4
readlink /proc/self/cwd
echo made > here
mv /live/lines /live/a/renamed
mv /live/a /live/c
move
read -r word <&3; echo $word
echo three >&4
readlink /proc/self/cwd
ls
cat <&5 2>&1 || :
test "$(sha256sum < /usr/bin/sha256sum)" = "$1" && echo the root is there
head -c 1000 /dev/hwrng | wc -c
dmesg --level=emerg,alert,crit,err | grep -ciE 'virtio|9p' || :
echo moves=$(echo $(dd if=/dev/port bs=1 skip=1328 count=1 status=none | od -An -tu1))
"""


def test_open_files_working_directories_and_disks_stay_as_they_are(guest: Runner) -> None:
    live = guest.directory("live")
    (live / "lines").write_text("first\nsecond\nthird\n")
    (live / "gone").write_text("for ever")
    disk = live.parent / "saved.img"
    disk.write_bytes(b"".join((b"disk%d" % n).ljust(512) for n in range(64)))
    digest = guest.program(["sh", "-c", "sha256sum < /usr/bin/sha256sum"]).stdout.decode().strip()
    words = [
        "run",
        "--no-lab",
        "--shared",
        f"/live={live}",
        "--disk",
        str(disk),
        "--balloon",
        "32M",
    ]
    words += ["--device", "tests.linux.device_mover:Mover", "--", "sh", "-c", SCRIPT, "sh", digest]
    done = guest.program(python_command(MOVER, words))
    assert (done.status, done.stderr) == (0, b""), done
    assert done.stdout.decode().splitlines() == [
        "disk1",
        "first",
        "disk2",
        "second",
        "/live/a/b",
        "third",
        "/live/c/b",
        "here",
        "cat: -: Stale file handle",
        "the root is there",
        "1000",
        "0",
        "moves=2",
    ]
    assert disk.read_bytes()[3 * 512 : 4 * 512] == b"guest".ljust(512)
    assert (live / "log").read_text() == "one\ntwo\nthree\n"
    assert (live / "c" / "b" / "here").read_text() == "made\n"
