"""Packs: made, fetched over real HTTP, kept by name, and served or mounted as what they were."""

import errno
import http.server
import json
import os
import socket
import stat
import struct
import subprocess
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.erofs_reader import Entry, read_image
from tests.test_written import NAME, Machine, ended, machine
from tinyvmm.cli.main import main
from tinyvmm.command.checks import with_packs
from tinyvmm.command.init import init_config
from tinyvmm.command.options import RunOptions
from tinyvmm.disks.opening import DiskOptions
from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver import ownership
from tinyvmm.fileserver.objects import ObjectTree
from tinyvmm.fileserver.tree import AT_REMOVEDIR, SETATTR_MODE, Node
from tinyvmm.fileserver.union import open_tree
from tinyvmm.fileserver.written import list_changes
from tinyvmm.guest.archive import ModuleArchive
from tinyvmm.guest.init import Filesystem, Mkdir, Mount, disk_name
from tinyvmm.images import packs
from tinyvmm.images.erofs.image import ErofsImage
from tinyvmm.images.oci import tree_writer
from tinyvmm.images.packs import Pack
from tinyvmm.images.selection import Selection, select
from tinyvmm.roots import pack_mounts
from tinyvmm.roots.erofs_root import RootDisks
from tinyvmm.roots.pack_mounts import PackMap

__all__ = ["ended", "machine"]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data/tinyvmm/packs"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    top = tmp_path / "tools"
    for name, data in {
        "bin/tool": "#!/bin/sh\n",
        "lib/a.py": "a",
        "lib/a.pyc": "compiled",
        "lib/deep/b.py": "b",
        "share/doc/readme": "read me",
        "été": "summer",
    }.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(data)
    (top / "bin/tool").chmod(0o4755)
    (top / "bin/link").symlink_to("tool")
    (top / "empty").mkdir(mode=0o700)
    os.utime(top / "bin/tool", (1_500_000_000, 1_500_000_001))
    return top


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="trusted attributes are root's")


def files(top: Path, **patterns: list[str]) -> list[str]:
    selection = Selection(patterns.get("include", ()), patterns.get("exclude", ()))
    changes = select(list_changes([], [("/", str(top))]), selection)
    return [os.fsdecode(change.path)[1:] for change in changes]


def create(*arguments: str) -> int:
    return main(["pack", "create", *arguments])


def served(path: str) -> dict[str, tuple[int, int, int, int, bytes]]:
    """What a client sees of a zip: mode, owner, group, mtime in seconds, content or target."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        tree = ObjectTree(archive, uid=0, gid=0)
        pending: list[tuple[str, Node]] = [("", tree.root())]
        while pending:
            name, node = pending.pop()
            st = node.stat()
            data = bytearray(100)
            if stat.S_ISLNK(st.st_mode):
                data[:] = node.readlink()
            elif stat.S_ISREG(st.st_mode):
                file = node.open(os.O_RDONLY)
                del data[file.readv([memoryview(data)], 0) :]
                file.close()
            else:
                data.clear()
                file = node.open(os.O_RDONLY)
                inner = [n for _, _, _, n in file.readdir(0) if n not in {b".", b".."}]
                file.close()
                pending += [(f"{name}/{os.fsdecode(n)}", node.walk(n)) for n in inner]
            found[name] = (st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns // 10**9, bytes(data))
            node.close()
        tree.close()
    return found


# --- making --------------------------------------------------------------------------------------


def test_a_zip_is_served_as_the_directory_was(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        os.chown(tools / "lib/a.py", 12, 70_000)
    assert create("tools", str(tools), "--format", "zip") == 0
    path, digest = capsys.readouterr().out.splitlines()
    pack = packs.find("tools")
    assert path == f"tools  {pack.path}"
    assert digest == f"sha256:{sha256(Path(pack.path).read_bytes()).hexdigest()}"
    found = served(pack.path)
    for name, (mode, uid, gid, mtime, data) in found.items():
        st = os.lstat(f"{tools}{name}")
        if name:
            assert (mode, uid, gid, mtime) == (st.st_mode, st.st_uid, st.st_gid, int(st.st_mtime))
        if stat.S_ISREG(mode):
            assert data == Path(f"{tools}{name}").read_bytes()
    assert found["/bin/link"][4] == b"tool"
    assert len(found) == 1 + len(list(tools.rglob("*")))


def test_an_erofs_pack_is_what_erofs_utils_read(tools: Path) -> None:
    assert create("tools", str(tools), "--exclude", "*.pyc", "--exclude", "share") == 0
    pack = packs.find("tools")
    assert pack.kind == packs.kind_of(pack.path) == "erofs"
    subprocess.run(["fsck.erofs", pack.path], check=True, capture_output=True)
    for name, there in {"/lib/a.py": True, "/lib/a.pyc": False, "/share": False}.items():
        dump = ["dump.erofs", f"--path={name}", pack.path]
        run = subprocess.run(dump, check=False, capture_output=True, text=True)
        assert ("Size: 1 " in run.stdout) == there, (name, run)


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ([], ["*.pyc", "share/doc", "bin", "été", "empty"],
         ["lib", "lib/a.py", "lib/deep", "lib/deep/b.py", "share"]),
        (["*.py"], [], ["lib", "lib/a.py", "lib/deep", "lib/deep/b.py"]),
        (["lib/deep", "/empty/"], [], ["empty", "lib", "lib/deep", "lib/deep/b.py"]),
        (["lib/*.py"], ["deep"], ["lib", "lib/a.py"]),
        (["share", "bin/t*"], [], ["bin", "bin/tool", "share", "share/doc", "share/doc/readme"]),
    ],
)  # fmt: skip
def test_patterns_say_what_is_in_a_pack(
    tools: Path, include: list[str], exclude: list[str], wanted: list[str]
) -> None:
    assert files(tools, include=include, exclude=exclude) == wanted


def test_what_a_machine_wrote_is_a_pack_a_zip_if_nothing_is_gone(
    ended: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create("writes", "--machine", "web", "--format", "zip") == 125
    assert "/etc/group was deleted, which a zip" in capsys.readouterr().err
    only = ["--include", "etc/new*"]
    for kind in packs.KINDS:
        assert create(kind, "--machine", "web", "--format", kind, *only) == 0
    new = "/etc/" + os.fsdecode(NAME)
    assert [name for name in served(packs.find("zip").path) if name] == ["/etc", new]
    assert {p.source for p in packs.list_()} == {"what web wrote"}
    assert main(["commit", "web", "-o", f"{tmp_path}/x.zip"]) == 125
    assert not (tmp_path / "x.zip").exists()
    assert main(["commit", "web", "-o", f"{tmp_path}/x.erofs"]) == 0
    found = read_image(tmp_path / "x.erofs")
    assert set(found) == {b"", b"/etc", os.fsencode(new), b"/etc/group"}
    assert is_whiteout(found[b"/etc/group"])


def is_whiteout(entry: Entry) -> bool:
    """As overlayfs has them: a character device 0:0."""
    return stat.S_ISCHR(entry.mode) and entry.rdev == 0


@pytest.mark.parametrize("held_by", ["us", "the guest"])
@pytest.mark.parametrize("pretend", [False, True])
def test_what_is_gone_is_gone_from_under_an_erofs_pack(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: bool, held_by: str
) -> None:
    monkeypatch.setattr(ownership, "must_pretend", lambda: pretend or os.geteuid() != 0)
    monkeypatch.setattr(tree_writer, "must_pretend", ownership.must_pretend)
    machine.tree.close()
    (tmp_path / "more").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/below").touch()
    machine.reads.append(("/mnt/data", str(tmp_path / "data")))
    machine.writes.append(("/mnt/data", str(tmp_path / "more")))
    machine.tree = open_tree(machine.reads, machine.writes)
    machine.file("etc", b"new", b"new")
    machine.remove("etc", "group")
    machine.remove("mnt/data", "below")
    for name in ("sub/b", "a"):
        machine.remove(os.path.dirname(f"srv/old/{name}"), os.path.basename(name))
    machine.remove("srv/old", "sub", AT_REMOVEDIR)
    machine.remove("srv", "old", AT_REMOVEDIR)
    machine.mkdir("srv", "old")
    machine.file("srv/old", b"again")
    old = machine.at("srv/old")
    old.setattr(SETATTR_MODE, mode=0o710)
    old.setxattr(b"user.x", b"1", 0)
    old.close()
    changes = list_changes(machine.reads, machine.writes)
    trees = machine.writes if held_by == "us" else []
    output = tmp_path / "out"
    output.mkdir()
    packs.write(packs.Files(changes, trees), str(output / "x.erofs"), "erofs", print)
    assert [path.name for path in output.iterdir()] == ["x.erofs"]
    found = read_image(output / "x.erofs")
    assert {path for path, entry in found.items() if is_whiteout(entry)} == {
        b"/etc/group",
        b"/mnt/data/below",
    }
    opaque = (b"trusted.overlay.opaque", b"y")
    assert {path for path, entry in found.items() if opaque in entry.xattrs} == {b"/srv/old"}
    assert stat.S_IMODE(found[b"/srv/old"].mode) == 0o710
    assert (b"user.x", b"1") in found[b"/srv/old"].xattrs
    plain = {path for path, entry in found.items() if stat.S_ISREG(entry.mode)}
    assert plain == {b"/etc/new", b"/srv/old/again"}
    assert found[b"/etc/new"].content == sha256(b"new").digest()
    subprocess.run(["fsck.erofs", str(output / "x.erofs")], check=True)
    if os.geteuid() == 0 and held_by == "us":
        assert_overlayfs_agrees(machine, output)


def assert_overlayfs_agrees(machine: Machine, where: Path) -> None:
    """This computer's kernel, with the pack over the first read tree, as a guest has it."""
    pack, merged = where / "pack", where / "merged"
    pack.mkdir()
    merged.mkdir()
    mount = ["mount", "-t", "erofs", "-o", "ro,loop", str(where / "x.erofs"), str(pack)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        return  # no EROFS here: tests/linux/test_packs.py has a kernel that does
    try:
        options = f"lowerdir={pack}:{machine.read}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
        subprocess.run(mount, check=True)
        try:
            assert sorted(os.listdir(merged / "etc")) == ["new", "passwd", "ssl"]
            assert not (merged / "etc/group").exists()
            assert os.listdir(merged / "srv/old") == ["again"]
            assert (merged / "srv/kept").read_text() == "k"
        finally:
            subprocess.run(["umount", str(merged)], check=True)
    finally:
        subprocess.run(["umount", str(pack)], check=True)


@needs_root
def test_what_is_gone_is_said_where_files_take_no_attributes_of_users(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a tmpfs of Linux 6.1."""
    machine.remove("etc", "group")
    machine.remove("srv", "kept")
    machine.remove("srv/old", "a")
    machine.remove("srv/old/sub", "b")
    machine.remove("srv/old", "sub", AT_REMOVEDIR)
    machine.remove("srv", "old", AT_REMOVEDIR)
    machine.mkdir("srv", "old")
    setxattr = os.setxattr

    def refuse(path: int | bytes, name: str | bytes, *more: Any, **named: Any) -> None:
        if os.fsencode(name).startswith(b"user."):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        setxattr(path, name, *more, **named)

    monkeypatch.setattr(os, "setxattr", refuse)
    for trees in (machine.writes, []):
        changes = list_changes(machine.reads, machine.writes)
        packs.write(packs.Files(changes, trees), str(tmp_path / "x.erofs"), "erofs", print)
        found = read_image(tmp_path / "x.erofs")
        assert {path for path, entry in found.items() if is_whiteout(entry)} == {
            b"/etc/group",
            b"/srv/kept",
        }
        assert (b"trusted.overlay.opaque", b"y") in found[b"/srv/old"].xattrs


def test_patterns_that_leave_nothing_are_told_of(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create("x", str(tools), "--include", "*.zzz") == 125
    assert "--include and --exclude leave nothing" in capsys.readouterr().err
    assert main(["pack", "list"]) == 0
    assert capsys.readouterr().out == ("no pack here yet; make one: tinyvmm pack create NAME DIR\n")


def test_what_a_zip_cannot_hold_is_said(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.setxattr(machine.read / "srv/kept", "user.note", b"x")
    os.mkfifo(machine.read / "fifo")
    assert create("z", str(machine.read), "--format", "zip") == 0
    assert capsys.readouterr().err.splitlines() == [
        "tinyvmm: /fifo is neither file, directory nor link: left out",
        "tinyvmm: extended attributes of 1 files are left out: a zip has no room for them",
    ]
    Path(os.fsdecode(os.fsencode(machine.read) + b"/\xff")).write_text("")
    assert create("y", str(machine.read), "--format", "zip") == 125
    assert "a name in a zip is UTF-8; make an EROFS pack" in capsys.readouterr().err
    assert [pack.name for pack in packs.list_()] == ["z"]


def test_a_zip_made_by_others_has_their_owners(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("x")
    os.utime(tmp_path / "in/file", (1_400_000_000, 1_400_000_001))
    command = ["python3", "-m", "zipfile", "-c", str(tmp_path / "p.zip"), str(tmp_path / "in")]
    subprocess.run(command, check=True)
    assert served(str(tmp_path / "p.zip"))["/in/file"][1:3] == (0, 0)


def test_extra_fields_cut_short_are_no_trouble(tmp_path: Path) -> None:
    whole = b"\x55\x54\x05\x00\x01\x01\x02\x03\x04\x75\x78\x0b\x00\x01\x04\x07\0\0\0\x04\x08\0\0\0"
    for length in range(len(whole) + 1):
        path = tmp_path / f"{length}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo("f")
            info.extra = whole[:length]
            archive.writestr(info, "")
        try:
            found = served(str(path))
        except zipfile.BadZipFile:
            continue  # zipfile has seen it, as open_trees then does
        _, uid, gid, mtime, _ = found["/f"]
        assert (uid, gid) in {(0, 0), (7, 8)}
        if length == len(whole):
            assert (uid, gid, mtime) == (7, 8, 0x04030201)


# --- the store -----------------------------------------------------------------------------------


def test_packs_are_listed_and_removed(
    tools: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create("b", str(tools)) == create("a", str(tools), "--format", "zip") == 0
    capsys.readouterr()
    assert main(["pack", "list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[1], *row[3:]) for row in rows] == [
        ("a", "zip", "kB", str(tools)),
        ("b", "erofs", "kB", str(tools)),
    ]
    assert main(["pack", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["a", "b"]
    assert main(["pack", "rm", "a", "c"]) == 125
    assert "pack rm c: no such pack here (a, b)" in capsys.readouterr().err
    assert main(["pack", "rm", "a", "b"]) == 0
    assert [p.name for p in store.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["", "..", ".lock", "a/b", "-x", "x" * 65])
def test_a_name_that_is_none_is_refused(name: str, tools: Path) -> None:
    source = packs.Files(list_changes([], [("/", str(tools))]), [("/", str(tools))])
    with pytest.raises(ConfigError, match="is no name"):
        packs.create(name, source, "x", "zip", print)


def test_a_name_that_is_taken_stays_what_it_was(
    tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create("tools", str(tools)) == 0
    before = packs.find("tools")
    assert create("tools", str(tools), "--format", "zip") == 125
    assert "a pack tools is here already: tinyvmm pack rm tools" in capsys.readouterr().err
    assert packs.find("tools") == before


def test_what_a_killed_process_left_is_cleared_away(tools: Path, store: Path) -> None:
    (store / ".draft-killed").mkdir(parents=True)
    assert create("tools", str(tools)) == 0
    assert sorted(p.name for p in store.iterdir()) == [".lock", "tools"]


def test_a_directory_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert create("x", "/nothing/there") == 125
    assert capsys.readouterr().err == (
        "tinyvmm: pack create x: /nothing/there is not there; name a directory\n"
    )
    assert create("x", "/etc/passwd") == 125
    assert "/etc/passwd is no directory" in capsys.readouterr().err
    assert packs.list_() == []


def test_what_cannot_be_read_is_the_directorys_fault_and_not_the_stores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tools: Path
) -> None:
    def write(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", b"/proc/self/fd/5")

    monkeypatch.setattr(packs, "write", write)
    assert create("x", str(tools)) == 125
    assert capsys.readouterr().err == (
        f"tinyvmm: pack create x: not all of {tools} can be read (Permission denied): "
        "--exclude what cannot\n"
    )


# --- fetching ------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server of a directory, on loopback."""
    directory = tmp_path / "served"
    directory.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            """As usual, but for some files that end too early."""
            if self.path not in {"/short", "/reset", "/gone"}:
                super().do_GET()
                return
            if self.path != "/gone":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b"PK\x03\x04")
            if self.path != "/short":  # close(2) resets it then: socket(7)
                option = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                self.connection.close()

    handler = partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()
        thread.join()


def test_a_pack_is_fetched_if_it_is_what_it_must_be(
    server: str, tools: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create("tools", str(tools)) == 0
    made = packs.find("tools")
    (tmp_path / "served/tools.erofs").write_bytes(Path(made.path).read_bytes())
    url = f"{server}/tools.erofs"
    assert main(["pack", "get", "far", url]) == 125
    assert "give its --sha256" in capsys.readouterr().err
    assert main(["pack", "get", "far", url, "--sha256", "0" * 64]) == 125
    assert f"its SHA-256 is {made.digest}, not 0000" in capsys.readouterr().err
    assert main(["pack", "get", "far", url, "--sha256", f"sha256:{made.digest.upper()}"]) == 0
    far = packs.find("far")
    assert (far.kind, far.digest, far.source) == ("erofs", made.digest, url)
    assert main(["pack", "get", "near", f"file://{made.path}"]) == 0
    assert packs.find("near").digest == made.digest
    assert sorted(p.name for p in store.iterdir()) == [".lock", "far", "near", "tools"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/missing", "File not found"),
        ("/short", "4 bytes of 100 came|IncompleteRead"),
        ("/reset", "get http://.*: Connection reset by peer$"),
        ("/gone", "get http://.*: Connection reset by peer$"),
        ("/text", "neither"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(
    server: str, tmp_path: Path, store: Path, path: str, why: str
) -> None:
    (tmp_path / "served/text").write_text("no pack")
    digest = sha256(b"no pack").hexdigest()
    with pytest.raises(ConfigError, match=why) as caught:
        packs.get("x", server + path, digest, lambda *_: None)
    assert "\n" not in str(caught.value)
    assert [p.name for p in store.iterdir()] == [".lock"]


def test_while_one_is_fetched_others_come_and_go(tools: Path, store: Path) -> None:
    assert create("tools", str(tools)) == 0
    slow, may_end = threading.Event(), threading.Event()

    def progress(*_: object) -> None:
        slow.set()
        assert may_end.wait(60)

    url = f"file://{packs.find('tools').path}"
    thread = threading.Thread(target=packs.get, args=("slow", url, None, progress))
    thread.start()
    try:
        assert slow.wait(60)
        packs.get("quick", url, None, lambda *_: None)
        packs.remove(["quick"])
        assert sorted(p.name for p in store.iterdir() if ".draft" not in p.name) == (
            [".lock", "tools"]
        )
    finally:
        may_end.set()
        thread.join()
    assert packs.find("slow").digest == packs.find("tools").digest
    assert sorted(p.name for p in store.iterdir()) == [".lock", "slow", "tools"]


def test_of_two_who_want_one_name_who_is_first_has_it(tools: Path, store: Path) -> None:
    assert create("tools", str(tools)) == 0
    url = f"file://{packs.find('tools').path}"

    def be_quicker(*_: object) -> None:
        assert create("same", str(tools), "--format", "zip") == 0

    with pytest.raises(ConfigError, match="a pack same is here already"):
        packs.get("same", url, None, be_quicker)
    assert packs.find("same").kind == "zip"
    assert sorted(p.name for p in store.iterdir()) == [".lock", "same", "tools"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "make room there, or set"), (errno.EROFS, "set XDG_DATA_HOME to .* can write")],
)
def test_what_cannot_be_stored_says_what_helps(
    tools: Path, store: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(json, "dump", fails)
    files = packs.Files(list_changes([], [("/", str(tools))]), [("/", str(tools))])
    with pytest.raises(ConfigError, match=f"pack store .*{os.strerror(number)}; {remedy}"):
        packs.create("tools", files, "x", "erofs", print)
    assert [p.name for p in store.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", packs.KINDS)
def test_what_is_cut_short_is_no_pack(
    kind: str, tools: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert create("tools", str(tools), "--format", kind) == 0
    whole = Path(packs.find("tools").path).read_bytes()
    short = tmp_path / "short"
    short.write_bytes(whole[:-20])
    capsys.readouterr()
    assert main(["pack", "get", "short", f"file://{short}"]) == 125
    assert "is cut short" in capsys.readouterr().err
    assert sorted(p.name for p in store.iterdir()) == [".lock", "tools"]


@pytest.mark.parametrize("path", ["/dev/zero", "/", ""])
def test_only_a_regular_file_is_a_pack(path: str, tmp_path: Path) -> None:
    """A device may never end, and a fifo never begin."""
    os.mkfifo(tmp_path / "fifo")
    path = path or str(tmp_path / "fifo")
    why = "Is a directory" if path == "/" else "no regular file; name one"
    with pytest.raises(ConfigError, match=f"pack get file://{path}: {why}"):
        packs.get("x", f"file://{path}", None, lambda *_: None)
    with pytest.raises(ConfigError, match=f"pack {path}: {why}"):
        packs.find(path)


@pytest.mark.parametrize(
    ("url", "digest", "why"),
    [
        ("ftp://x/y", "0" * 64, "begins with file: or http:"),
        ("tools.erofs", None, "begins with file: or http:"),
        ("http://x/y", "123", "no SHA-256"),
        ("file:///nothing/there", None, "there: No such file"),
        ("http://127.0.0.1:1/x", "0" * 64, "refused"),
        ("http:///x", "0" * 64, "pack get"),
    ],
)
def test_an_address_that_is_none_is_one_line(url: str, digest: str | None, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        packs.get("x", url, digest, lambda *_: None)


# --- in a machine --------------------------------------------------------------------------------


def test_a_pack_is_found_by_name_or_path(tools: Path, tmp_path: Path) -> None:
    assert create("tools", str(tools), "--format", "zip") == 0
    stored = packs.find("tools")
    assert pack_mounts.parse_pack("/opt//t/=tools") == PackMap("/opt/t", stored)
    found = pack_mounts.parse_pack(stored.path)
    assert found == PackMap("/", Pack(stored.path, stored.path, "zip", size=stored.size))
    with pytest.raises(
        ConfigError, match=r"pack nothing: neither a file nor a pack here \(tools\)"
    ):
        pack_mounts.parse_pack("nothing")
    (tmp_path / "text").write_text("x" * 2000)
    with pytest.raises(ConfigError, match="neither an EROFS image nor a zip"):
        pack_mounts.parse_pack(str(tmp_path / "text"))


def pack(kind: str, name: str = "p") -> Pack:
    return Pack(name, f"/{name}.{kind}", kind)


def mounted(steps: Sequence[Filesystem]) -> list[tuple[str, str, str, str]]:
    """What PID 1 mounts, where and as what; of an overlay what its layers are."""
    found = [step for step in steps if isinstance(step, Mount)]
    layers = [m.data.partition(",workdir")[0] if m.fstype == "overlay" else "" for m in found]
    return [(m.source, m.target, m.fstype, data) for m, data in zip(found, layers, strict=True)]


def root_of(packs: Sequence[PackMap], root: RootDisks | None = None, **more: Any) -> Any:
    """How PID 1 mounts a root with these packs, of a machine with a disk of its own."""
    options = RunOptions(("true",), packs=packs, disks=[DiskOptions("/vda")], **more)
    archive = ModuleArchive((), b"")
    return init_config(with_packs(options), archive, None, root).root


def given_packs() -> list[PackMap]:
    return [
        PackMap("/opt/x", pack("zip")),
        PackMap("/", pack("erofs")),
        PackMap("/", pack("erofs")),
    ]


BY_THEMSELVES = [
    ("pack0", "/packs/0", "9p", ""),
    ("/dev/vdb", "/packs/1", "erofs", ""),
    ("/dev/vdc", "/packs/2", "erofs", ""),
]


def test_the_guest_lays_packs_over_its_root_and_over_each_other() -> None:
    given = given_packs()
    assert [disk.read_only for disk in pack_mounts.disks(given)] == [True, True]
    steps = root_of(given)
    assert mounted(steps) == [
        *BY_THEMSELVES,
        ("root", "/newroot", "9p", ""),
        ("tmpfs", "/packs/writes", "tmpfs", ""),
        *over("/", "lowerdir=/packs/2:/packs/1:/newroot,upperdir=/packs/writes/0/upper"),
        *over("/opt/x", "lowerdir=/packs/0,upperdir=/packs/writes/1/upper"),
    ]
    assert Mkdir("/newroot/opt") in steps
    assert pack_mounts.modules(given) == ["virtio_blk", "erofs", "9pnet_virtio", "9p", "overlay"]
    assert mounted(root_of([])) == [("root", "/newroot", "9p", "")]
    assert pack_mounts.modules([]) == []


def over(guest: str, layers: str) -> list[tuple[str, str, str, str]]:
    return [("overlay", f"/newroot{guest}".rstrip("/"), "overlay", layers)]


def test_a_root_that_is_an_overlay_has_packs_as_further_layers(tmp_path: Path) -> None:
    """So what is written to them is kept where what is written is kept."""
    given = given_packs()
    elsewhere = [
        ("tmpfs", "/packs/writes", "tmpfs", ""),
        *over("/opt/x", "lowerdir=/packs/0,upperdir=/packs/writes/0/upper"),
    ]
    layers = "lowerdir=/packs/2:/packs/1:/lower,upperdir=/scratch/upper"
    assert mounted(root_of(given, private_writes="guest")) == [
        *BY_THEMSELVES,
        ("root", "/lower", "9p", ""),
        ("tmpfs", "/scratch", "tmpfs", ""),
        *over("/", layers),
        *elsewhere,
    ]
    (tmp_path / "disk").write_bytes(bytes(4096))
    image, upper = ErofsImage([("/", str(tmp_path))], print), RawDisk(str(tmp_path / "disk"))
    root = RootDisks(image, upper, 3)
    kept = {"root_mode": "erofs", "writes": [("/", str(tmp_path))]}
    assert mounted(root_of(given, root, **kept)) == [
        *BY_THEMSELVES,
        ("/dev/vdd", "/lower", "erofs", ""),
        ("/dev/vde", "/scratch", "ext4", ""),
        *over("/", layers),
        *elsewhere,
    ]
    assert "/packs/writes" not in str(root_of(given[1:], root, **kept))  # with nothing over it
    upper.close()
    image.close()


def test_what_is_to_be_kept_is_not_lost_in_a_pack() -> None:
    for guest, written in (("/", "/data"), ("/a", "/a/b"), ("/a", "/a"), ("/", "/")):
        remedy = ", or use --root-mode erofs$" if guest == written == "/" else "leave one out$"
        with pytest.raises(ConfigError, match=remedy):
            pack_mounts.check([PackMap(guest, pack("zip"))], [(written, "/host")], "9p")
    pack_mounts.check([PackMap("/a", pack("zip"))], [("/ab", "/host"), ("/", "/host")], "9p")


def test_a_zip_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    given = [PackMap("/", packs.find(str(tmp_path / "p.zip")))]
    with ExitStack() as cleanup, pytest.raises(ConfigError, match=r"p\.zip cannot be read"):
        pack_mounts.open_trees(given, cleanup)


def test_linux_names_its_disks_so() -> None:
    names = [disk_name(number) for number in (0, 25, 26, 701, 702)]
    assert names == ["vda", "vdz", "vdaa", "vdzz", "vdaaa"]
