"""EROFS images as Linux finds them, in a file and made while they are read; roots of EROFS."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.erofs_reader import LIST, make_torture_tree
from tests.linux.conftest import MAIN, ROOT, Runner
from tests.linux.test_instances import cli, do, ok, run, sh
from tinyvmm.command.run import prepare_kernel
from tinyvmm.guest.modules import closure
from tinyvmm.images import kernel_store, kernels
from tinyvmm.images.erofs.writer import write_image
from tinyvmm.lab.lab import Lab, python_command
from tinyvmm.roots.erofs_root import open_upper

pytestmark = pytest.mark.linux

# So many inodes of this computer's / are planned while the guest boots, the others as it looks. The
# usual 16,000 are a third of a second's work here, but kept a guest in the lab for half a minute.
AHEAD = 1 << 10
LESS_AHEAD = f"from tinyvmm.images.erofs import ahead; ahead.AT_FIRST = {AHEAD}; "
RUN = MAIN.replace("from tinyvmm.cli", f"{LESS_AHEAD}from tinyvmm.cli")

LISTS = f"""
list() {{ ( {LIST} ) }}
mkdir /mnt/image && mount -r -t erofs /dev/vda /mnt/image || exit 1
list /mnt/image > /dev/shm/image
cat /dev/shm/image; echo; echo END; list /t; echo; echo END
read -r _ _ kind _ < /proc/mounts; echo $kind
cat /etc/of-pack; echo written over >> /etc/of-pack
echo kept > /etc/kept; chmod 640 /etc/kept; mv /t/many /t/moved; rm /t/plain; echo $?
dmesg --level=emerg,alert,crit,err | grep -E 'erofs|vd[a-d]|EXT4|overlay'
"""
AGAIN = r"""
cat /etc/kept /etc/of-pack; ls /t/moved | wc -l; test -e /t/plain; echo $?; stat -c %a /etc/kept
while read -r source path kind _; do case $kind in 9p) echo no; esac; done < /proc/mounts
grep -c 9p /proc/filesystems
dmesg --level=emerg,alert,crit,err | grep -E 'erofs|vd[a-d]|EXT4|overlay'
"""


@pytest.fixture(scope="module")
def torture(guest: Runner) -> Path:
    top = guest.directory("erofs") / "torture"
    top.mkdir()
    make_torture_tree(top, many=300, sparse=2 << 20)
    return top


def test_linux_finds_no_difference_and_what_is_written_is_kept(
    guest: Runner, torture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, kept, packed, pack = (
        torture.with_name(name) for name in ("image", "kept", "packed", "pack.erofs")
    )
    kept.mkdir()
    (packed / "etc").mkdir(parents=True)
    (packed / "etc/of-pack").write_text("of a pack\n")
    write_image([("/", str(packed))], str(pack))
    open_upper(str(kept)).close()  # made here, where it is quick
    newest = kernels.default()
    assert newest is not None
    write_image([("/", str(torture))], str(image))
    here = subprocess.run(["sh", "-c", LIST, "sh", str(torture)], capture_output=True, check=False)
    assert here.stdout.count(b"\n") > 600, here
    there = guest.program(["sh", "-c", LIST, "sh", str(torture)])
    root = ["--root-mode", "erofs", "--memory", "512M", "--read", f"/t={torture}"]
    root += ["--write", str(kept), "--pack", str(pack)]  # which lies below what is kept
    arguments = [*root, "--kernel", newest.version, "--disk", f"{image},ro"]
    done = guest.program(
        python_command(RUN, ["run", "--no-lab", *arguments, "--", "sh", "-c", LISTS])
    )
    assert (done.status, done.stderr) == (1, b"")  # of grep: no complaint of the kernel's
    in_file, live, rest = done.stdout.split(b"\nEND\n")
    assert in_file == here.stdout
    assert live == there.stdout
    assert rest == b"overlay\nof a pack\n0\n"
    assert not (torture / "moved").exists()

    # From a store of the tests' own, which stays; what is in the user's is the user's business.
    monkeypatch.setenv("XDG_DATA_HOME", str(ROOT / ".cache/tests"))
    cloud = kernel_store.fetch(None, None, "cloud")
    prepare_kernel(cloud.version, ("virtio_pci",), "erofs")[0].close()  # here, where it is quick
    command = [*root, "--kernel", cloud.version, "--", "sh", "-c", AGAIN]
    store = f"XDG_DATA_HOME={ROOT / '.cache/tests'}"
    again = guest.program(["env", store, *python_command(RUN, ["run", "--no-lab", *command])])
    assert again.stderr == b""
    assert again.stdout == b"kept\nof a pack\nwritten over\n300\n1\n640\n0\n"


# Linux's own client, told by netlink for the one device and by ioctls for the other. $1 is the
# tree; then modules to insert, a --, and the server's command.
NBD = f"""
tree=$1; shift
while [ "$1" != -- ]; do insmod "$1" 2>/dev/null; shift; done; shift
list() {{ ( {LIST} ) }}
one=/tmp/nbd-unix two=/tmp/nbd-tcp says=/tmp/nbd-says
mkdir -p $one $two && ip link set lo up && rm -f $says /tmp/nbd-socket
"$@" --nbd unix:/tmp/nbd-socket --nbd tcp:127.0.0.1:10809 --read "$tree" > $says 2> $says.errors &
server=$!
until [ -s $says ]; do kill -0 $server || {{ cat $says.errors >&2; exit 1; }}; sleep 0.2; done
{{ nbd-client -unix /tmp/nbd-socket /dev/nbd0 -R &&
  nbd-client -nonetlink -readonly -name erofs 127.0.0.1 /dev/nbd1; }} > $says 2>&1 ||
  {{ cat $says >&2; exit 1; }}
mount -t erofs -o ro /dev/nbd0 $one && mount -t erofs -o ro /dev/nbd1 $two || exit 1
blockdev --getro /dev/nbd0 /dev/nbd1
list $one; echo; echo END; list "$tree"; echo; echo END
cmp $one/bytes-70000 $two/bytes-70000 && echo alike
echo changed >> "$tree/bytes-8192"
cat $two/bytes-8192 2>&1 >/dev/null | sed 's/.*: //'
cmp $two/plain "$tree/plain" && echo goes on
umount $one && umount $two
nbd-client -d /dev/nbd0 > $says; nbd-client -d /dev/nbd1 > $says
kill $server; wait $server
echo "status $?"; cat $says.errors; rm -f $says*
"""


CHANGED = " gives the guest an error: it changed after the guest had seen it"


def test_linux_mounts_what_serve_nbd_serves(guest: Runner, torture: Path) -> None:
    tree = torture.with_name("served")
    subprocess.run(["cp", "-a", str(torture), str(tree)], check=True)
    modules = kernels.find(None).modules
    assert modules is not None
    needed = [module.path for module in closure(modules, ("nbd", "crc32c_generic?", "erofs"))]
    server = python_command(MAIN, ["serve"])
    command = ["bash", "-c", NBD, "bash", str(tree), *needed, "--", *server]
    if guest.lab is not None:
        done = guest.program(command)
    else:  # it takes more than this computer may give
        with Lab(shares=[str(guest.shared)]) as lab:
            done = Runner(lab, guest.shared).program(command)
    assert (done.status, done.stderr) == (0, b""), done
    mounted, itself, rest = done.stdout.split(b"\nEND\n")
    assert itself.count(b"\n") > 600
    assert mounted == b"1\n1\n" + itself  # the devices are read-only
    assert rest.decode().splitlines() == [
        "alike",
        "Input/output error",
        "goes on",
        "status 0",
        f"tinyvmm: {tree}/bytes-8192{CHANGED}",
    ]


WRITE = "echo new > /srv/new; rm /etc/passwd /t/a; mv /t/sub /t/moved"
CHANGES = """\
C /etc
D /etc/passwd
C /srv
A /srv/new
C /t
D /t/a
A /t/moved
A /t/moved/b
D /t/sub
"""
# The inode of a file is read, not yet its data; of another of 1 TiB a block in the midst.
LOOKS = r"""
stat -c %s /t/changes
dd if=/t/huge bs=4096 skip=$((1 << 27)) count=1 2>/dev/null | tr -d '\0'
"""
EIO = "cat: /t/changes: Input/output error\n"
NAMES = (
    "etc/ etc/.wh.passwd srv/ srv/new t/ t/.wh.a t/.wh.sub t/moved/ t/moved/.wh..wh..opq t/moved/b"
)


def test_what_is_written_over_it_is_listed_and_committed_from_ram_and_from_a_disk(
    guest: Runner,
) -> None:
    top = guest.directory("erofs-writes")
    read, kept = top / "read", top / "kept"
    (read / "sub").mkdir(parents=True)
    (read / "a").write_text("a")
    (read / "sub/b").write_text("b")
    (read / "changes").write_text("first")
    with (read / "huge").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"in the midst")
    kept.mkdir()
    open_upper(str(kept)).close()  # made here, where it is quick
    script: list[tuple[dict[str, Any], Any]] = []
    for name, more in (("ram", ()), ("disk", ("--write", str(kept)))):
        root = ("--root-mode", "erofs", "--memory", "512M", "--read", f"/t={read}", *more)
        script += [
            (run("-d", "--name", name, *root, "--", "sleep", "1000"), ok(f"{name}\n")),
            (cli("exec", name, "--", "sh", "-ec", LOOKS), ok("5\nin the midst")),
            (sh(f"printf other > {read}/changes"), ok()),
            (cli("exec", name, "--", "cat", "/t/changes"), ok("", EIO, 1)),
            (cli("exec", name, "--", "sh", "-ec", WRITE), ok()),
            (cli("diff", name), ok(CHANGES)),
            (cli("commit", name, "-o", f"/tmp/{name}.tar"), 0),
            (sh(f"tar -tf /tmp/{name}.tar | LC_ALL=C sort"), ok("\n".join(NAMES.split()) + "\n")),
            (cli("kill", name), 0),
            (cli("wait", name), ok("137\n")),
            (cli("logs", name), ok("", f"tinyvmm: {read}/changes{CHANGED}\n")),
            (cli("diff", name), 125),
        ]
    found = do(guest, [step for step, _ in script])
    for (step, expected), got in zip(script, found, strict=True):
        seen = got["status"] if isinstance(expected, int) else got
        assert seen == expected, (step, got, [one["stderr"] for one in found])
    ram, disk = found[len(found) // 2 - 1], found[-1]
    assert "was in its own memory" in ram["stderr"]
    assert f"on the disk {kept}/upper.ext4" in disk["stderr"]
