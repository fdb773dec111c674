"""Linux's own client at `tinyvmm serve`, in every version of the protocol it speaks.

The lab's kernel mounts the server three times over: at a Unix socket, over TCP, and on a descriptor
that is connected already; all at once, with sizes of message of their own. What a shell then does
in one mount is looked at in the directory itself, or in another mount.
"""

from typing import NamedTuple

import pytest

from tests.linux.conftest import MAIN, Runner
from tinyvmm.guest.modules import closure
from tinyvmm.images import kernels
from tinyvmm.lab.lab import Lab, python_command

pytestmark = pytest.mark.linux

SIZE = 1 << 20

# bash, for /dev/tcp. $1 is the version; then the modules to insert, a --, the steps, another --,
# and the server's command. A NUL ends the output of each step.
SCRIPT = r"""
version=$1; shift
while [ "$1" != -- ]; do insmod "$1" 2>/dev/null; shift; done; shift
while [ "$1" != -- ]; do steps+=("$1"); shift; done; shift
export LC_ALL=C D=/tmp/served M=/tmp/unix N=/tmp/tcp O=/tmp/fd
mkdir -p $D $M $N $O && mount -t tmpfs served $D && cd $D || exit 1
echo hello > motd; ln -s motd link; mkdir dir; head -c 1048576 /dev/urandom > big
ip link set lo up; rm -f /tmp/says
"$@" --listen unix:/tmp/socket --listen tcp:127.0.0.1:5640 --shared $D > /tmp/says &
server=$!
trap 'cd /; kill $server; umount -l $M $N $O $D' EXIT
until [ -s /tmp/says ]; do kill -0 $server || exit 1; sleep 0.2; done
options=version=$version,uname=root
mount -t 9p -o trans=unix,$options /tmp/socket $M || exit 1
mount -t 9p -o trans=tcp,port=5640,msize=8192,$options 127.0.0.1 $N || exit 1
exec 3<>/dev/tcp/127.0.0.1/5640
mount -t 9p -o trans=fd,rfdno=3,wfdno=3,msize=65536,$options none $O || exit 1
exec 3>&-
cd $M
for step in "${steps[@]}"; do eval "$step" 2>&1; printf '\0'; done
cd /
umount $M && umount $N && umount $O && kill $server && wait $server && echo served well
trap - EXIT
umount $D
"""


class Step(NamedTuple):
    """A command in the Unix socket's mount, and what it says by version of the protocol."""

    command: str
    says: str | dict[str, str]


def versions(plain: str, u: str, linux: str | None = None) -> dict[str, str]:
    return {"9p2000": plain, "9p2000.u": u, "9p2000.L": u if linux is None else linux}


DENIED = "sh: 1: cannot create big: Permission denied\n"
# 9P2000 knows no links and no devices, and v9fs does not ask for them then: v9fs_vfs_mkspecial of
# fs/9p/vfs_inode.c gives EPERM. A symbolic link of the server's is, to this client, a file that
# cannot be opened.
REFUSED = "Operation not permitted\n"

STEPS = [
    Step("ls", "big\ndir\nlink\nmotd\n"),
    Step(
        "cat motd; stat -c '%F %s %a' motd dir | sed 's/directory [0-9]*/directory/'",
        "hello\nregular file 6 644\ndirectory 755\n",
    ),
    Step("for m in $M $N $O; do cmp $m/big $D/big && stat -c %s $m/big; done", f"{SIZE}\n" * 3),
    Step(
        "for m in $M $N $O; do cp $D/big $m/copy; cmp $D/copy $D/big && rm $m/copy; done; ls $D",
        "big\ndir\nlink\nmotd\n",
    ),
    # All clients at once, each a mount of its own.
    Step(
        "for m in $M $N $O; do { cmp $m/big $D/big; cp $m/big $m/by${m##*/}; } & "
        "all+=($!); done; wait ${all[@]}; "
        "for m in unix tcp fd; do cmp $D/by$m big && rm by$m && echo $m; done",
        "unix\ntcp\nfd\n",
    ),
    Step(
        "echo one > new; echo two >> new; cat $D/new; echo three > new; cat $N/new $D/new",
        "one\ntwo\nthree\nthree\n",
    ),
    Step("echo longer > $D/new; cat new $O/new; stat -c %s new", "longer\nlonger\n7\n"),
    Step(
        "mkdir -m 750 made; mv new renamed; mv renamed made/moved; "
        "stat -c '%a %F' $D/made; ls $D $D/made | cat",
        "750 directory\n/tmp/served:\nbig\ndir\nlink\nmade\nmotd\n\n/tmp/served/made:\nmoved\n",
    ),
    Step("echo over > other; mv other made/moved; cat $D/made/moved", "over\n"),
    Step(
        "mkdir made; rmdir made; cat nothing; cat made/moved/more",
        "mkdir: cannot create directory 'made': File exists\n"
        "rmdir: failed to remove 'made': Directory not empty\n"
        "cat: nothing: No such file or directory\n"
        "cat: made/moved/more: Not a directory\n",
    ),
    # Whole seconds even where the protocol has nanoseconds: notify_change of fs/attr.c cuts times
    # to the s_time_gran of alloc_super in fs/super.c, a second, which fs/9p leaves as it is in 6.1.
    Step(
        "chmod 604 made/moved; touch -d @1000000000.5 made/moved; "
        "for m in $M $D; do stat -c '%a %s %.1Y' $m/made/moved; done",
        "604 5 1000000000.0\n" * 2,
    ),
    Step(
        "truncate -s 3 made/moved; cat $D/made/moved; truncate -s 5000000000 made/moved; "
        "stat -c %s $D/made/moved made/moved",
        "ove5000000000\n5000000000\n",
    ),
    Step(
        "dd if=made/moved bs=1 skip=4999999990 status=none | od -An -tx1 | tr -d ' '",
        "00000000000000000000\n",
    ),
    Step("exec 4< made/moved; rm made/moved; head -c 3 <&4; exec 4<&-; ls $D/made", "ove"),
    Step(
        "for i in $(seq 300); do echo > $D/dir/a-rather-long-name-$i; done; "
        "for m in $M $N $O; do ls $m/dir | sort -u | wc -l; done",
        "300\n" * 3,
    ),
    Step("rm -r made $D/dir; ls $D", "big\nlink\nmotd\n"),
    Step(
        "name=$(printf %0255d 7); echo x > $name; ls $D | wc -c; rm $name; ls $D | wc -l",
        "270\n3\n",
    ),
    Step(
        "readlink link; cat link; stat -c %F link",
        versions(
            "cat: link: Too many levels of symbolic links\nregular file\n",
            "motd\nhello\nsymbolic link\n",
        ),
    ),
    Step(
        "ln -s 'to nowhere' made; readlink $D/made; rm -f made",
        versions(f"ln: failed to create symbolic link 'made': {REFUSED}", "to nowhere\n"),
    ),
    Step(
        "ln motd made; stat -c %h $D/motd; rm -f made",
        versions(f"ln: failed to create hard link 'made' => 'motd': {REFUSED}1\n", "2\n"),
    ),
    Step(
        "mkfifo made; stat -c %F $D/made made; rm -f made $D/made",
        versions(
            f"mkfifo: cannot create fifo 'made': {REFUSED}"
            "stat: cannot statx '/tmp/served/made': No such file or directory\n"
            "stat: cannot statx 'made': No such file or directory\n",
            "fifo\nfifo\n",
        ),
    ),
    Step(
        "mknod made c 1 3; stat -c '%F %t,%T' $D/made made; rm -f made $D/made",
        versions(
            f"mknod: made: {REFUSED}"
            "stat: cannot statx '/tmp/served/made': No such file or directory\n"
            "stat: cannot statx 'made': No such file or directory\n",
            "character special file 1,3\n" * 2,
        ),
    ),
    # In 9P2000 users are names: v9fs_vfs_setattr of fs/9p/vfs_inode.c sends a new owner to servers
    # of .u only, and says that all is well. Every user of the mount is then the one who attached.
    Step(
        "chown 5:6 motd; stat -c %u:%g $D/motd motd",
        versions("0:0\n4294967294:4294967294\n", "5:6\n5:6\n"),
    ),
    Step(
        "chmod 777 $D; setpriv --reuid 7 --regid 8 --clear-groups sh -c '"
        "echo mine > his; echo more >> big'; stat -c %u $D/his",
        versions(f"{DENIED}0\n", f"{DENIED}7\n"),
    ),
    Step(
        "stat -fc %T $M; test $(stat -fc %b $M) = $(stat -fc %b $D) && echo known",
        versions("v9fs\n", "v9fs\n", "v9fs\nknown\n"),
    ),
    Step("sync motd && flock motd echo locked", "locked\n"),
]


@pytest.mark.parametrize("version", ["9p2000", "9p2000.u", "9p2000.L"])
def test_linux_is_served_in_every_version_over_every_stream(guest: Runner, version: str) -> None:
    modules = kernels.find(None).modules
    assert modules is not None
    steps = [step.command for step in STEPS]
    arguments = [
        version,
        *[module.path for module in closure(modules, ("9p", "9pnet_fd"))],
        "--",
        *steps,
        "--",
        *python_command(MAIN, ["serve"]),
    ]
    command = ["bash", "-c", SCRIPT, "bash", *arguments]
    if guest.lab is not None:
        done = guest.program(command)
    else:  # to mount takes more than this computer may give
        with Lab() as lab:
            done = Runner(lab, guest.shared).program(command)
    assert (done.status, done.stderr) == (0, b""), done
    *outputs, last = done.stdout.decode().split("\0")
    assert last == "served well\n"
    assert len(outputs) == len(STEPS)
    wrong = [
        (step.command, output, says)
        for step, output in zip(STEPS, outputs, strict=True)
        if output != (says := step.says if isinstance(step.says, str) else step.says[version])
    ]
    assert wrong == []
