"""What host and guest see of each other's changes, by kind of tree and cache policy.

In each guest a shell runs, in turn with one on the host (converse.py), so that what the guest has
cached before a change is known. A boot is slow: few boots, many checks.
"""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.linux.conftest import LONG, MAIN, Runner, interpreter
from tinyvmm.lab.lab import python_command

pytestmark = pytest.mark.linux

HERE = Path(__file__).parent
NO_ENTRY = os.strerror(errno.ENOENT)
READ_ONLY = os.strerror(errno.EROFS)


@pytest.fixture(scope="module")
def mapped(guest: Runner) -> str:
    """The program mapped.c."""
    program = guest.directory("mapped") / "mapped"
    source = HERE / "mapped.c"
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-static", "-o", program, source], check=True)
    return str(program)


@pytest.fixture
def host(guest: Runner) -> Iterator[str]:
    """An empty directory of the host that is its own, not a network file system."""
    path = "/tmp/tinyvmm-test-shared"
    with guest.standing(f"rm -rf {path}; mkdir -m 755 {path}", f"rm -rf {path}"):
        yield path


def converse(guest: Runner, options: list[str], steps: list[tuple[str, str]]) -> list[str]:
    """Run a guest's shell, doing `steps` ("guest" or "host", command): the output of each."""
    helper = str(HERE / "converse.py")
    tinyvmm = python_command(MAIN, ["run", "--no-lab", *options, "--", "sh"])
    done = guest.program([interpreter(), "-I", "-S", helper, json.dumps(steps), *tinyvmm])
    assert done.status == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["status"], found["rest"], found["stderr"]) == (0, "", ""), found
    outputs: list[str] = found["outputs"]
    return outputs


def test_both_sides_see_each_others_changes_of_a_shared_tree_at_once(
    guest: Runner, host: str, mapped: str
) -> None:
    there = "/made/for/this"
    expected = [
        # (who, what, and what it says)
        ("host", f"echo one > {host}/file; echo gone > {host}/gone", ""),
        ("guest", f"cd {there} && cat file gone", "one\ngone\n"),
        ("host", f"echo longer than one > {host}/file", ""),
        ("guest", "cat file; stat -c %s file", "longer than one\n16\n"),
        ("host", f"echo other > {host}/t; mv {host}/t {host}/file; chmod 640 {host}/file", ""),
        ("guest", "cat file; stat -c %a file", "other\n640\n"),
        ("host", f"rm {host}/gone", ""),
        ("guest", "cat gone; ls", f"cat: gone: {NO_ENTRY}\nfile\n"),
        # An open file is the same file, whatever it is called meanwhile.
        ("guest", "exec 3< file; read word <&3; echo $word", "other\n"),
        ("host", f"echo appended >> {host}/file; mv {host}/file {host}/moved", ""),
        ("guest", "read word <&3; echo $word; exec 3<&-; ls", "appended\nmoved\n"),
        ("guest", "echo from the guest > new; mkdir -m 711 dir; ln -s new link", ""),
        ("host", f"cd {host}; cat new link; stat -c %a dir", "from the guest\n" * 2 + "711\n"),
        ("guest", "rm link; mv new dir/; echo more >> dir/new", ""),
        ("host", f"cd {host}; ls; cat dir/new", "dir\nmoved\nfrom the guest\nmore\n"),
        ("guest", f"{mapped} mapped msync; stat -fc %T .; ls", "agreed\nv9fs\ndir\nmoved\n"),
        # The mount point was missing, so it was made: in the guest's private root only.
        ("host", "ls -d /made", f"ls: cannot access '/made': {NO_ENTRY}\n"),
        # With cache=none a mapping that is shared and written is refused; all else is the same.
        ("guest", f"cat /none/dir/new; {mapped} /none/mapped", "from the guest\nmore\nmmap: *\n"),
        ("host", f"rm -f {host}/mapped; echo again > {host}/dir/new", ""),
        ("guest", "cat /none/dir/new", "again\n"),
    ]
    options = ["--shared", f"{there}={host}", "--shared", f"/none={host},cache=none"]
    outputs = converse(guest, options, [(side, what) for side, what, _ in expected])
    for (_, what, says), output in zip(expected, outputs, strict=True):
        before, star, _ = says.partition("*")
        assert output.startswith(before) if star else output == says, (what, output)


def test_a_read_only_shared_tree_refuses_writes_and_is_cached_as_documented(
    guest: Runner, host: str
) -> None:
    steps = [
        ("host", f"echo one > {host}/file"),
        ("guest", "cat /loose/file /fresh/file"),
        ("guest", "echo x > /loose/file; mkdir /loose/dir; rm /fresh/file"),
        # Whatever the guest's root makes of its mount, the server refuses.
        ("guest", "mount -o remount,rw /loose && echo x > /loose/new; chmod 777 /loose/file"),
        ("host", f"echo longer than one > {host}/file; ls {host}"),
        ("guest", "cat /fresh/file; cat /loose/file"),
        ("guest", "echo 3 > /proc/sys/vm/drop_caches; cat /loose/file"),
    ]
    options = ["--shared", f"/loose={host},ro", "--shared", f"/fresh={host},ro,cache=none"]
    _, first, refused, remounted, listing, after, forgotten = converse(guest, options, steps)
    assert first == "one\none\n"
    assert refused.count(READ_ONLY) == 3, refused
    assert remounted.count(READ_ONLY) == 2, remounted
    assert listing == "file\n"
    assert after.startswith("longer than one\n")  # then what the guest has cached, old or new
    assert forgotten == "longer than one\n"


@pytest.mark.parametrize("cache", ["loose", "mmap"])
def test_read_write_and_mmap_agree_on_the_root(guest: Runner, mapped: str, cache: str) -> None:
    flush = "msync" if cache == "mmap" else ""
    script = f"{mapped} /root/new {flush}; grep ' / ' /proc/mounts; ls /root/new"
    done = guest.run("--cache", cache, "--", "sh", "-c", script)
    agreed, mount, *_ = done.stdout.decode().splitlines()
    assert agreed == "agreed"
    assert mount.startswith("root / 9p rw,")
    assert f",{cache}," in mount
    assert NO_ENTRY.encode() in done.stderr


def test_private_writes_in_the_guest_leave_the_host_alone_and_carry_real_work(
    guest: Runner, mapped: str
) -> None:
    project = guest.directory("work")
    (project / "main.c").write_text('#include <stdio.h>\nint main(void) { return !puts("built"); }')
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    before = sorted(project.rglob("*"))
    script = [
        "set -e",
        "git config --global safe.directory '*'",
        # With hard links git refuses: overlayfs cannot keep a file's inode number when it is first
        # changed (or linked), as v9fs gives it no file handles to remember it by.
        f"git clone -q --no-hardlinks {project} /srv/clone",
        "cd /srv/clone; gcc -o built main.c; ./built; git status --short",
        f"cd {project}; gcc -o built main.c; echo '// more' >> main.c; git status --short",
        f"mv built other; rm main.c; {mapped} mapped",
        "perl -e 'rename(qw(.git renamed)) or die qq($!)'; cat renamed/HEAD; ls .git 2>&1 | wc -l",
        "stat -fc %T /; grep -c '^root /lower' /proc/mounts || true",
        "rm /etc/passwd; ls /etc/passwd 2>&1 | wc -l",
        # It may fill half of the RAM, and is then full, which harms nobody.
        "dd if=/dev/zero of=/big bs=1M count=600 2>&1 | grep -c 'No space'; rm /big; echo alive",
    ]
    options = ["--private-writes", "guest", "--memory", "1G"]
    done = guest.run(*options, "--", "sh", "-c", "\n".join(script), timeout=LONG)
    assert (done.status, done.stderr) == (0, b""), done
    assert done.stdout.decode().splitlines() == [
        "built",
        "?? built",
        " M main.c",
        "?? built",
        "agreed",
        "ref: refs/heads/main",
        "1",
        "overlayfs",
        "0",
        "1",
        "1",
        "alive",
    ]
    assert sorted(project.rglob("*")) == before
    assert Path("/etc/passwd").exists()


def test_what_cannot_be_shared_is_one_line(guest: Runner) -> None:
    done = guest.run("--shared", "/data=/nowhere", "--", "true")
    assert (done.status, done.stdout) == (125, b"")
    assert done.stderr == (
        b"tinyvmm: cannot share /nowhere: there is no such directory; "
        b"name a directory you can read\n"
    )
