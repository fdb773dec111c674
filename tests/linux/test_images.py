"""An image runs: its layers are the root, its configuration the command, owners are right."""

import os
import shutil
import stat
import tarfile
from pathlib import Path

import pytest

from tests.linux.conftest import MAIN, ROOT, Runner
from tests.oci import Entry, directory, entry, image, layer, symlink
from tests.test_oci_unpack import seen, union
from tinyvmm.fileserver import ownership
from tinyvmm.fileserver.union import open_tree
from tinyvmm.images.oci import tree_writer
from tinyvmm.images.oci.pull import pull
from tinyvmm.images.oci.store import Store
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

APPLETS = (
    "sh",
    "ls",
    "cat",
    "id",
    "stat",
    "readlink",
    "find",
    "chown",
    "chmod",
    "touch",
    "env",
    "ln",
)
# What runs in the machine, and is in no entrypoint, as `podman exec` has it.
FROM_PYTHON = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import tinyvmm
with tinyvmm.Machine(image=sys.argv[1], env={{"GREETING": "good day"}}) as machine:
    ask = "id; pwd; echo $GREETING $KEPT $HOME; cat /home/app/secret; touch /etc/x || echo no"
    machine.run(["sh", "-c", ask + "; ls /opaque"], stderr=tinyvmm.DEVNULL, check=True)
    print(machine.run(["id", "-u"], user="root", capture_output=True, text=True).stdout, end="")
"""
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
PASSWD = b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"
GROUP = b"root:x:0:\napp:x:1001:\nextra:x:7:app\n"


def base() -> list[Entry]:
    busybox = shutil.which("busybox")
    assert busybox is not None
    return [
        directory("bin"),
        entry("bin/busybox", Path(busybox).read_bytes(), mode=0o755),
        *[symlink(f"bin/{name}", "busybox") for name in APPLETS],
        directory("etc"),
        entry("etc/passwd", PASSWD),
        entry("etc/group", GROUP),
        directory("home/app", 0o750, (1000, 1001)),
        entry("home/app/secret", b"s3cret\n", mode=0o600, owner=(1000, 1001)),
        entry("home/other", b"", mode=0o600, owner=(1234, 5678)),
        symlink("home/link", "other", owner=(1000, 1001)),
        entry("null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
        entry(
            "bin/su",
            b"",
            mode=0o4755,
            pax={"SCHILY.xattr.security.capability": os.fsdecode(CAPABILITY)},
        ),
        entry("gone"),
        entry("opaque/old"),
    ]


def test_an_image_unpacked_by_nobody_in_particular_runs_as_it_was_meant(
    guest: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an ordinary user unpacks it: nothing in the store belongs to whom it does in the guest."""
    monkeypatch.setattr(tree_writer, "must_pretend", lambda: True)
    where = guest.directory("images")
    store = Store(str(where / "tinyvmm/images"))
    name = image(
        where / "lay",
        layer(*base()),
        layer(entry(".wh.gone"), entry("opaque/.wh..wh..opq"), entry("opaque/new")),
        config={
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["echo the image says so"],
            "Env": ["GREETING=hello", "KEPT=1"],
            "WorkingDir": "/made/here",
            "User": "app",
            "Volumes": {"/volume": {}},
        },
    )
    found = pull(name, store)
    (where / "tinyvmm/kernels").symlink_to(Path("~/.local/share/tinyvmm/kernels").expanduser())
    kept = where / "kept"
    kept.mkdir()
    monkeypatch.setattr(ownership, "must_pretend", lambda: True)
    open_tree([], [("/", str(kept))]).close()  # a write tree of such a user's from now on

    def run(*arguments: str) -> list[str]:
        command = python_command(MAIN, ["run", "--no-lab", "--image", found.id, *arguments])
        done = guest.program(["env", f"XDG_DATA_HOME={where}", *command])
        assert (done.status, done.stderr) == (0, b""), done
        return done.stdout.decode().splitlines()

    questions = {
        "who": "id",
        "where": "pwd",
        "env": "echo $GREETING $KEPT $HOME",
        "path": "echo $PATH",
        "secret": "cat /home/app/secret",
        "owners": "stat -c '%n %u:%g %a %F' /home/app /home/app/secret /home/other /home/link",
        "link": "readlink /home/link",
        "device": "stat -c '%F %t:%T' /null; echo x > /null",
        "set-id": "stat -c '%u %a' /bin/su",
        "whiteouts": "ls /gone /opaque 2>&1",
        "types": "find /home /null -type c -o -type l",
        "volume": "stat -c %F /volume",
        "writes": "touch /home/app/new && stat -c '%u:%g' /home/app/new",
        "made": "ln -s to /home/app/made && stat -c '%u:%g %F' /home/app/made",
        "forbidden": "touch /etc/x 2>&1 || true",
    }
    lines = [f"echo '=={what}'; {command}" for what, command in questions.items()]
    answers: dict[str, list[str]] = {}
    options = ("--env", "GREETING=good day", "--write", str(kept))
    for line in run(*options, "--", "\n".join(lines)):
        if line.startswith("=="):
            answers[line[2:]] = []
        else:
            answers[list(answers)[-1]].append(line)
    assert answers == {
        "who": ["uid=1000(app) gid=1001(app) groups=7(extra),1001(app)"],
        "where": ["/made/here"],
        "env": ["good day 1 /home/app"],
        "path": ["/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "secret": ["s3cret"],
        "owners": [
            "/home/app 1000:1001 750 directory",
            "/home/app/secret 1000:1001 600 regular file",
            "/home/other 1234:5678 600 regular empty file",
            "/home/link 1000:1001 777 symbolic link",
        ],
        "link": ["other"],
        "device": ["character special file 1:3"],
        "set-id": ["0 4755"],
        "whiteouts": ["ls: /gone: No such file or directory", "/opaque:", "new"],
        "types": ["/home/link", "/null"],
        "volume": ["directory"],
        "writes": ["1000:1001"],
        "made": ["1000:1001 symbolic link"],
        "forbidden": ["touch: /etc/x: Permission denied"],
    }
    with union(kept) as tree:
        made = seen(tree, "home/app/made")
        assert (stat.S_ISLNK(made.st_mode), made.st_uid, made.st_gid) == (True, 1000, 1001)
        assert seen(tree, "home/app/new").st_uid == 1000
    assert (kept / "home/app/made").read_text() == "to"  # here, a file
    # And as a disk, which is made of the same trees.
    script = (
        f"echo $0 $# $HOME; pwd; {questions['owners']}; {questions['device']}; "
        "chown 5:6 /home/other && stat -c %u:%g /home/other; ls /opaque"
    )
    assert run(
        *("--root-mode", "erofs", "--entrypoint", '["/bin/sh", "-c"]', "--user", "0"),
        *("--workdir", "/home", "--", script, "zero", "one"),
    ) == ["zero 1 /root", "/home", *answers["owners"], *answers["device"], "5:6", "new"]
    # And from Python, as the root of a machine that commands are run in.
    code = ["env", f"XDG_DATA_HOME={where}", *python_command(FROM_PYTHON, [found.id])]
    done = guest.program(code)
    assert (done.status, done.stderr) == (0, b""), done
    assert done.stdout.decode().splitlines() == [
        *(*answers["who"], *answers["where"], *answers["env"], *answers["secret"]),
        *("no", "new", "0"),
    ]
