"""What a guest wrote, listed and made a layer of: written by a union, read by OCI's rules."""

import gzip
import json
import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver import ownership
from tinyvmm.fileserver.tree import AT_REMOVEDIR, NO_ID, SETATTR_MODE, Node
from tinyvmm.fileserver.union import UnionTree, open_tree
from tinyvmm.fileserver.written import list_changes
from tinyvmm.images.changed_tree import write_directory
from tinyvmm.images.layer import write_layer
from tinyvmm.tree_tar import XATTR

ODD = b"a\nb\xff\xe9 \\"


class Machine:
    """A union, as a guest's root, over a read tree; and its paths."""

    def __init__(self, directory: Path) -> None:
        self.read, self.write = directory / "read", directory / "write"
        for path, text in (
            ("etc/passwd", "root"),
            ("etc/group", "root"),
            ("etc/ssl/cert", "c"),
            ("srv/old/a", "a"),
            ("srv/old/sub/b", "b"),
            ("srv/kept", "k"),
        ):
            (self.read / path).parent.mkdir(parents=True, exist_ok=True)
            (self.read / path).write_text(text)
        self.write.mkdir()
        self.reads = [("/", str(self.read))]
        self.writes = [("/", str(self.write))]
        self.tree = open_tree(self.reads, self.writes)

    def at(self, path: str) -> Node:
        node: Node = self.tree.root()
        for name in path.split("/"):
            if name:
                inner = node.walk(name.encode())
                node.close()
                node = inner
        return node

    def file(self, path: str, name: bytes, data: bytes = b"x", mode: int = 0o644) -> None:
        directory = self.at(path)
        node, file = directory.create(name, os.O_RDWR | os.O_TRUNC, mode, NO_ID, NO_ID)
        file.writev([memoryview(data)], 0)
        for each in (file, node, directory):
            each.close()

    def remove(self, path: str, name: str, flags: int = 0) -> None:
        directory = self.at(path)
        directory.unlink(name.encode(), flags)
        directory.close()

    def mkdir(self, path: str, name: str) -> None:
        directory = self.at(path)
        directory.mkdir(name.encode(), 0o755, NO_ID, NO_ID).close()
        directory.close()

    def changes(self) -> list[str]:
        return [f"{c.kind} {os.fsdecode(c.path)}" for c in list_changes(self.reads, self.writes)]

    def layer(self, path: Path, *, compress: bool = False) -> list[str]:
        """Write it to `path`; what was warned of."""
        warned: list[str] = []
        changes = list_changes(self.reads, self.writes)
        self.made = write_layer(changes, str(path), warned.append, compress=compress)
        return warned


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.tree.close()


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return {info.name: info for info in archive.getmembers()}


def test_a_machine_that_wrote_nothing_changed_nothing(machine: Machine) -> None:
    assert machine.changes() == []


def test_what_is_added_changed_and_deleted_is_told_apart(machine: Machine) -> None:
    machine.file("etc", b"new")
    machine.file("etc", b"passwd", b"changed")
    machine.remove("etc", "group")
    machine.remove("srv", "kept")
    machine.file("", b"top")
    machine.remove("", "top")
    machine.mkdir("", "var")
    assert machine.changes() == [
        "C /etc",
        "D /etc/group",
        "A /etc/new",
        "C /etc/passwd",
        "C /srv",
        "D /srv/kept",
        "A /var",
    ]


def test_a_directory_made_anew_has_lost_what_was_in_it(machine: Machine, tmp_path: Path) -> None:
    machine.remove("srv/old", "a")
    machine.remove("srv/old/sub", "b")
    machine.remove("srv/old", "sub", AT_REMOVEDIR)
    machine.remove("srv", "old", AT_REMOVEDIR)
    machine.mkdir("srv", "old")
    machine.mkdir("srv/old", "sub")
    machine.file("srv/old", b"c")
    assert machine.changes() == [
        "C /srv",
        "C /srv/old",
        "D /srv/old/a",
        "A /srv/old/c",
        "C /srv/old/sub",
        "D /srv/old/sub/b",
    ]
    machine.layer(tmp_path / "x.tar")
    found = list(members(tmp_path / "x.tar"))
    assert "srv/old/.wh..wh..opq" in found
    assert not [name for name in found if name.endswith((".wh.a", ".wh.b"))]


def test_a_file_in_the_place_of_a_directory_is_a_change(machine: Machine) -> None:
    machine.remove("etc/ssl", "cert")
    machine.remove("etc", "ssl", AT_REMOVEDIR)
    machine.file("etc", b"ssl")
    assert machine.changes() == ["C /etc", "C /etc/ssl"]


def test_write_trees_at_other_places_are_told_of_as_the_guest_sees_them(
    machine: Machine, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    machine.tree.close()
    machine.writes = [("/srv/old", str(other))]
    machine.tree = open_tree(machine.reads, machine.writes)
    machine.file("srv/old", b"a", b"new")
    machine.file("srv/old/sub", b"z")
    assert machine.changes() == ["C /srv/old/a", "C /srv/old/sub", "A /srv/old/sub/z"]


@pytest.mark.parametrize("compress", [False, True])
def test_a_layer_has_all_that_a_file_is(machine: Machine, tmp_path: Path, compress: bool) -> None:
    machine.file("etc", ODD, b"odd", 0o4750)
    machine.file("srv", b"first", b"linked")
    srv = machine.at("srv")
    first = srv.walk(b"first")
    srv.link(b"second", first)
    srv.symlink(b"link", b"/no/\xff", NO_ID, NO_ID).close()
    srv.mknod(b"fifo", stat.S_IFIFO | 0o600, 0, 0, NO_ID, NO_ID).close()
    first.setxattr(b"user.note", b"\0\xff\n=", 0)
    first.setattr(1 << 5 | 1 << 8, mtime_ns=1_000_000_000_123_456_789)
    if os.geteuid() == 0:
        srv.mknod(b"null", stat.S_IFCHR | 0o666, 1, 3, 5, 70000).close()
    for node in (first, srv):
        node.close()
    machine.remove("etc", "group")
    path = tmp_path / ("x.tar.gz" if compress else "x.tar")
    assert machine.layer(path, compress=compress) == []
    found = members(path)
    odd = found[os.fsdecode(b"etc/" + ODD)]
    assert (odd.mode, odd.size) == (0o4750, 3)
    assert found["srv/second"].islnk()
    assert found["srv/second"].linkname == "srv/first"
    assert found["srv/link"].linkname == os.fsdecode(b"/no/\xff")
    assert found["srv/fifo"].isfifo()
    assert found["etc/.wh.group"].size == 0
    records = found["srv/first"].pax_headers
    assert records[f"{XATTR}user.note"].encode("utf-8", "surrogateescape") == b"\0\xff\n="
    assert records["mtime"] == "1000000000.123456789"
    if os.geteuid() == 0:
        null = found["srv/null"]
        assert (null.devmajor, null.devminor, null.uid, null.gid) == (1, 3, 5, 70000)
    data = path.read_bytes()
    plain = gzip.decompress(data) if compress else data
    assert machine.made.digest == f"sha256:{sha256(data).hexdigest()}"
    assert machine.made.diff_id == f"sha256:{sha256(plain).hexdigest()}"
    assert machine.made.size == len(data)
    assert machine.made.entries == len(found)


def test_gnu_tar_unpacks_the_layer_as_it_was(machine: Machine, tmp_path: Path) -> None:
    machine.file("etc", b"\xc3\xa9t\xc3\xa9", b"summer")
    machine.file("etc", ODD, b"odd")
    srv = machine.at("srv")
    node = srv.walk(b"kept")
    node.setxattr(b"user.note", b"value", 0)
    for each in (node, srv):
        each.close()
    machine.layer(tmp_path / "x.tar")
    out = tmp_path / "out"
    out.mkdir()
    command = ["tar", "-C", str(out), "--xattrs", "-xf", str(tmp_path / "x.tar")]
    subprocess.run(command, check=True, capture_output=True)
    inner = os.fsencode(out / "etc")
    assert sorted(os.listdir(inner)) == sorted([b"\xc3\xa9t\xc3\xa9", ODD])
    assert (out / "srv/kept").read_text() == "k"
    assert os.getxattr(out / "srv/kept", "user.note") == b"value"


def test_the_same_changes_give_the_same_bytes(machine: Machine, tmp_path: Path) -> None:
    machine.file("etc", b"new")
    for name in ("a.tar.gz", "b.tar.gz"):
        machine.layer(tmp_path / name, compress=True)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()


def test_what_a_layer_cannot_hold_is_said(machine: Machine, tmp_path: Path) -> None:
    machine.mkdir("", "run")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(machine.write / "run/s"))
        os.setxattr(machine.write / "run", b"user.\xff", b"x")
        assert machine.layer(tmp_path / "x.tar") == [
            "/run: attributes whose names a layer cannot hold are left out",
            "/run/s is a socket, which a layer cannot hold: left out",
        ]
    assert "A /run/s" in machine.changes()
    machine.file("run", b".wh.passwd")
    with pytest.raises(ConfigError, match=r"/run/\.wh\.passwd.*rename it"):
        machine.layer(tmp_path / "y.tar")
    assert not list(tmp_path.glob("y.tar*"))
    with pytest.raises(ConfigError, match="cannot write"):
        machine.layer(tmp_path / "none/x.tar")


def test_a_link_in_the_write_tree_leads_nowhere_else(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")
    machine.mkdir("", "d")
    machine.file("d", b"f")
    changes = list_changes(machine.reads, machine.writes)
    assert next(changes).path == b"/d"
    (machine.write / "d").rename(machine.write / "moved")
    (machine.write / "d").symlink_to(tmp_path / "secret")  # as if the guest did, meanwhile
    assert [c.path for c in changes] == [b"/d/f"]


def test_deep_trees_and_vanished_ones_are_no_trouble(machine: Machine) -> None:
    directory: Node = machine.tree.root()
    for _ in range(300):
        inner = directory.mkdir(b"d", 0o755, NO_ID, NO_ID)
        directory.close()
        directory = inner
    directory.close()
    assert len(machine.changes()) == 300
    machine.reads = [("/", "/nothing/there")]
    with pytest.raises(ConfigError, match="read tree /nothing/there"):
        machine.changes()


def test_what_is_pretended_is_in_the_layer(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "must_pretend", lambda: True)
    machine.tree.close()
    machine.tree = open_tree(machine.reads, machine.writes)
    etc = machine.at("etc")
    etc.symlink(b"link", b"to", 5, 6).close()
    etc.mknod(b"null", stat.S_IFCHR | 0o666, 1, 3, 0, 7).close()
    etc.close()
    machine.file("etc", b"new")
    node = machine.at("etc/new")
    node.setattr(SETATTR_MODE | 6, mode=0o4755, uid=7, gid=8)
    node.close()
    machine.layer(tmp_path / "x.tar")
    info = members(tmp_path / "x.tar")["etc/new"]
    assert (info.uid, info.gid, info.mode) == (7, 8, 0o4755)
    assert not [name for name in info.pax_headers if "override_stat" in name]
    link, null = (members(tmp_path / "x.tar")[name] for name in ("etc/link", "etc/null"))
    assert (link.type, link.linkname, link.uid, link.gid) == (tarfile.SYMTYPE, "to", 5, 6)
    assert (null.type, null.devmajor, null.devminor, null.gid) == (tarfile.CHRTYPE, 1, 3, 7)


def snapshot(tree: UnionTree) -> dict[str, bytes | None]:
    """Every path of a tree, a file's with its contents."""
    found: dict[str, bytes | None] = {}
    pending: list[tuple[str, Node]] = [("", tree.root())]
    while pending:
        path, node = pending.pop()
        file = node.open(os.O_RDONLY)
        if node.stat().st_mode & stat.S_IFDIR:
            found[path] = None
            for _, _, _, name in file.readdir(0):
                if name not in {b".", b".."}:
                    pending.append((f"{path}/{os.fsdecode(name)}", node.walk(name)))
        else:
            data = bytearray(100)
            found[path] = bytes(data[: file.readv([memoryview(data)], 0)])
        file.close()
        node.close()
    return found


NAMES = st.sampled_from(["a", "b", "srv", "old", "sub"])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["file", "mkdir", "remove", "rmdir"]), st.lists(NAMES, max_size=2), NAMES
    ),
    max_size=12,
)


def do(machine: Machine, steps: list[tuple[str, list[str], str]]) -> None:
    """Have the guest do these things, or fail to."""
    for step, path, name in steps:
        where = "/".join(path)
        try:
            if step == "file":
                machine.file(where, name.encode(), step.encode())
            elif step == "mkdir":
                machine.mkdir(where, name)
            else:
                machine.remove(where, name, AT_REMOVEDIR if step == "rmdir" else 0)
        except OSError:
            continue


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(steps=STEPS)
def test_the_list_is_the_difference_and_the_layer_makes_it_again(
    steps: list[tuple[str, list[str], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    reading = open_tree(machine.reads, [])
    before = snapshot(reading)
    reading.close()
    do(machine, steps)
    after = snapshot(machine.tree)
    listed = {line[2:]: line[0] for line in machine.changes()}
    assert {p for p, kind in listed.items() if kind == "A"} == set(after) - set(before)
    gone = {p for p in set(before) - set(after) if p.rpartition("/")[0] in after}
    # Of a directory that is gone, or is a file now, what was in it is not listed.
    gone = {p for p in gone if after[p.rpartition("/")[0]] is None}
    assert {p for p, kind in listed.items() if kind == "D"} == gone
    changed = {p for p in set(before) & set(after) if before[p] != after[p]}
    assert changed <= {p for p, kind in listed.items() if kind == "C"}
    layer = machine.write.parent / "x.tar"
    machine.layer(layer)
    machine.tree.close()
    assert apply(before, layer) == after
    over = str(machine.write.parent / "over")
    write_directory(list_changes(machine.reads, machine.writes), over, print)
    reading = open_tree([*machine.reads, ("/", over)], [])
    assert snapshot(reading) == after
    reading.close()


def apply(tree: dict[str, bytes | None], layer: Path) -> dict[str, bytes | None]:
    """What a layer makes of a tree, by the image specification's words."""
    made = dict(tree)

    def drop(path: str, *, itself: bool) -> None:
        for known in [p for p in made if p.startswith(path + "/") or (itself and p == path)]:
            del made[known]

    with tarfile.open(layer) as archive:
        infos = archive.getmembers()
        for info in infos:  # what is gone is gone of the lower layers only
            directory, _, name = f"/{info.name}".rpartition("/")
            if name == ".wh..wh..opq":
                drop(directory, itself=False)
            elif name.startswith(".wh."):
                drop(f"{directory}/{name[4:]}", itself=True)
        for info in infos:
            path = f"/{info.name}"
            if "/.wh." in path:
                continue
            if info.isdir():
                if made.get(path, b"") is not None:
                    drop(path, itself=True)
                made[path] = None
            else:
                drop(path, itself=True)
                file = archive.extractfile(info)
                made[path] = file.read() if file else b""
    return made


def test_a_directory_of_the_changes_has_all_that_a_file_is(
    machine: Machine, tmp_path: Path
) -> None:
    machine.file("etc", ODD, b"odd", 0o4750)
    machine.file("srv", b"first", b"linked")
    srv = machine.at("srv")
    first = srv.walk(b"first")
    srv.link(b"second", first)
    srv.symlink(b"link", b"/no/\xff", NO_ID, NO_ID).close()
    first.setxattr(b"user.note", b"x", 0)
    if os.geteuid() == 0:
        srv.mknod(b"null", stat.S_IFCHR | 0o666, 1, 3, 5, 70000).close()
    for node in (first, srv):
        node.close()
    over = str(tmp_path / "over")
    count = write_directory(list_changes(machine.reads, machine.writes), over, print)
    assert count == len(machine.changes())
    seen = open_tree([*machine.reads, ("/", over)], [])
    for change in list_changes(machine.reads, machine.writes):
        stats = []
        for tree in (machine.tree, seen):
            here: Node = tree.root()
            for name in change.path.split(b"/")[1:]:
                inner = here.walk(name)
                here.close()
                here = inner
            st = here.stat()
            stats.append((st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, st.st_rdev))
            if change.path == b"/srv/first":
                assert here.getxattr(b"user.note") == b"x"
            here.close()
        assert stats[0] == stats[1], change.path
    seen.close()
    assert os.path.samefile(f"{over}/srv/first", f"{over}/srv/second")
    with pytest.raises(ConfigError, match="no empty directory"):
        write_directory([], over, print)
    (tmp_path / "empty").mkdir()
    assert write_directory([], str(tmp_path / "empty"), print) == 0
    assert not list(tmp_path.glob("*.tmp"))


# --- the commands --------------------------------------------------------------------------------


@pytest.fixture
def ended(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine named web, which has ended and was kept."""
    from tests.test_instances import state
    from tinyvmm.instances.registry import WRITES, Instance
    from tinyvmm.scratch import ScratchDirectory

    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    instance = Instance(state("web", keep=True, reads=tuple(machine.reads)))
    scratch = ScratchDirectory(str(tmp_path), kept_by=instance.file(WRITES))
    machine.tree.close()
    machine.writes = [("/", scratch.path)]
    machine.tree = open_tree(machine.reads, machine.writes)
    machine.file("etc", NAME)
    machine.remove("etc", "group")
    machine.tree.close()
    scratch.close()
    instance.end(0, None)
    return machine


# A control sequence in 7 bits, a letter, one in 8 bits, and text the other way round.
NAME = b"new\n\x1b\xc3\xa9\xc2\x9b\xe2\x80\xae"


def run(*argv: str) -> int:
    from tinyvmm.cli.main import main

    return main(argv)


def test_what_an_ended_machine_wrote_is_listed_and_committed_until_rm(
    ended: Machine, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run("diff", "web") == 0
    shown = b"A /etc/new\\x0a\\x1b\xc3\xa9\\xc2\\x9b\\xe2\\x80\\xae\n"
    assert capfdbinary.readouterr().out == b"C /etc\nD /etc/group\n" + shown
    assert run("diff", "web", "--json") == 0
    records = json.loads(capfdbinary.readouterr().out)
    assert records[-1] == {"kind": "A", "path": "/etc/" + os.fsdecode(NAME)}
    output = str(tmp_path / "layer.tar.gz")
    assert run("commit", "web", "-o", output) == 0
    assert capfdbinary.readouterr().out.startswith(f"{output}  3 entries  ".encode())
    assert "etc/.wh.group" in members(Path(output))
    assert run("commit", "web", "-o", f"{tmp_path}/over/") == 0
    assert capfdbinary.readouterr().out.endswith(b"over/  3 entries\n")
    scratch = Path(ended.writes[0][1]).parent
    assert scratch.exists()
    assert run("rm", "web") == 0
    assert not scratch.exists()


def test_what_cannot_be_committed_is_one_line(
    ended: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert run("commit", "web", "-o", str(tmp_path / "x.doc")) == 125
    assert "says what to make" in capsys.readouterr().err
    assert run("diff", "none") == 125
    assert "no machine is named none" in capsys.readouterr().err
    shutil.rmtree(Path(ended.writes[0][1]).parent)
    assert run("diff", "web") == 125
    assert "was in its own memory, or is gone" in capsys.readouterr().err


def test_where_what_was_written_to_a_disk_can_be_seen_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_instances import state
    from tinyvmm.instances.registry import Instance

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    Instance(state("web", keep=True, in_memory=True, upper="/kept/upper.ext4")).end(0, None)
    assert run("diff", "web") == 125
    said = capsys.readouterr().err
    assert "on the disk /kept/upper.ext4" in said
    assert "--root-mode erofs --write /kept --" in said
    assert said.count("\n") == 1


def test_what_is_kept_outlives_other_runs_and_goes_with_its_keeper(tmp_path: Path) -> None:
    from tinyvmm.scratch import ScratchDirectory, kept_writes, remove_kept

    link = str(tmp_path / "writes")
    scratch = ScratchDirectory(str(tmp_path), kept_by=link)
    (Path(scratch.path) / "file").write_text("x")
    scratch.close()
    ScratchDirectory(str(tmp_path)).close()
    assert kept_writes(link) == scratch.path
    assert (Path(scratch.path) / "file").exists()
    os.unlink(link)  # the machine's directory is gone, as after a reboot
    assert kept_writes(link) is None
    ScratchDirectory(str(tmp_path)).close()
    assert not os.path.exists(scratch.path)
    again = ScratchDirectory(str(tmp_path), kept_by=link)
    again.close()
    remove_kept(link)
    assert not os.path.exists(again.path)


def test_a_link_that_nothing_answers_keeps_and_removes_nothing(tmp_path: Path) -> None:
    from tinyvmm.scratch import kept_writes, remove_kept

    (tmp_path / "tinyvmm-scratch-x/writes").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "tinyvmm-scratch-x")
    assert kept_writes(str(tmp_path / "link")) is None
    remove_kept(str(tmp_path / "link"))
    assert (tmp_path / "tinyvmm-scratch-x").exists()
