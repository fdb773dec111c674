"""What is in a guest's upper directory, by calls of a kernel: this computer's, for a guest's."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.calls_here import ended, start
from tests.erofs_reader import read_image
from tests.test_written import STEPS, Machine, do, machine
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.tree import AT_REMOVEDIR
from tinyvmm.fileserver.written import Change
from tinyvmm.guest.init import InitConfig, Mount, setup_steps, upper_directories
from tinyvmm.images import packs
from tinyvmm.images.layer import write_layer
from tinyvmm.inside import guest_writes
from tinyvmm.inside.guest_calls import Guest, read_file
from tinyvmm.inside.guest_writes import list_guest_changes, uppers
from tinyvmm.roots.mounts import root_mounts

__all__ = ["machine"]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    (tmp_path / "calls").mkdir()
    process, sock = start(tmp_path / "calls")
    with Guest(sock) as made:
        yield made
    assert ended(process)


def listed(
    guest: Guest, machine: Machine, monkeypatch: pytest.MonkeyPatch, at: str = "/"
) -> Iterator[Change]:
    """What is listed of the machine's write tree, as if it were the upper directory of `at`."""
    monkeypatch.setattr(guest_writes, "uppers", lambda _: [(at, f"{machine.write}/.")])
    return list_guest_changes(guest, machine.reads)


def lines(changes: Iterator[Change]) -> list[str]:
    return [f"{c.kind} {os.fsdecode(c.path)}" for c in changes]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has trusted.* attributes")


@needs_root
@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(steps=STEPS)
def test_the_guests_upper_directory_tells_what_our_write_tree_does(
    steps: list[tuple[str, list[str], str]],
    guest: Guest,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = Machine(tmp_path_factory.mktemp("machine"))
    do(made, steps)
    made.tree.close()
    with pytest.MonkeyPatch.context() as patch:
        ours = {line: c.opaque for line, c in keyed(made)}
        theirs = {f"{c.kind} {c.path!r}": c.opaque for c in listed(guest, made, patch)}
    assert theirs == ours


def keyed(made: Machine) -> Iterator[tuple[str, Change]]:
    from tinyvmm.fileserver.written import list_changes

    for change in list_changes(made.reads, made.writes):
        yield f"{change.kind} {change.path!r}", change


@needs_root
def test_a_layer_made_in_the_guest_is_the_one_made_here(
    machine: Machine, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.file("etc", b"a\nb\xff", b"odd", 0o4750)
    machine.file("srv", b"first", b"linked" * 100_000)
    srv = machine.at("srv")
    first = srv.walk(b"first")
    srv.link(b"second", first)
    srv.symlink(b"link", b"/no/\xff", 0, 0).close()
    first.setxattr(b"user.note", b"\0\xff", 0)
    srv.mknod(b"null", stat.S_IFCHR | 0o666, 1, 3, 5, 70000).close()
    for node in (first, srv):
        node.close()
    with (machine.write / "srv/first").open("r+b") as file:
        file.truncate(3_000_000)  # a hole
    machine.remove("srv/old", "a")
    machine.remove("srv/old/sub", "b")
    machine.remove("srv/old", "sub", AT_REMOVEDIR)
    machine.remove("srv", "old", AT_REMOVEDIR)
    machine.mkdir("srv", "old")
    machine.tree.close()
    machine.layer(tmp_path / "here.tar")
    write_layer(listed(guest, machine, monkeypatch), str(tmp_path / "there.tar"), print)
    assert (tmp_path / "there.tar").read_bytes() == (tmp_path / "here.tar").read_bytes()


@needs_root
def test_a_directory_renamed_from_below_is_given_as_the_guest_sees_it(
    machine: Machine, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.tree.close()
    merged = tmp_path / "merged"
    for name, data in {"moved/a": b"a", "moved/sub/b": b"b", "moved/new": b"new"}.items():
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
        (merged / name).write_bytes(data)
    moved = machine.write / "moved"
    moved.mkdir()
    (moved / "new").write_bytes(b"new")
    os.setxattr(moved, "trusted.overlay.redirect", b"/srv/old")
    (machine.write / "srv").mkdir()
    os.mknod(machine.write / "srv/old", stat.S_IFCHR, 0)
    machine.reads = [(str(merged), str(machine.read))]  # so that the guest's paths are there
    found = listed(guest, machine, monkeypatch, at=str(merged))
    changes = [(c.kind, os.fsdecode(c.path).removeprefix(str(merged)), c.opaque) for c in found]
    assert changes == [
        ("A", "/moved", True),
        ("A", "/moved/a", False),
        ("A", "/moved/new", False),
        ("A", "/moved/sub", False),
        ("A", "/moved/sub/b", False),
        ("C", "/srv", False),
        ("D", "/srv/old", False),
    ]


def test_contents_with_holes_are_read_in_any_pieces(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "up/file"
    path.parent.mkdir()
    data = bytearray(5_000_000)
    data[1_000_000:1_000_010] = b"0123456789"
    data[4_999_999] = 7
    with path.open("wb") as file:
        for at in (1_000_000, 4_999_999):
            file.seek(at)
            file.write(data[at : at + 10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guest_writes, "uppers", lambda _: [("/opt", str(tmp_path / "up"))])
        (tmp_path / "read").mkdir()
        for change in list_guest_changes(guest, [("/", str(tmp_path / "read"))]):
            assert (change.kind, change.path) == ("A", b"/opt/file")
            with change.open() as contents:
                assert contents.read(1_000_005) == data[:1_000_005]
                assert contents.read() == data[1_000_005:]


def test_overlays_are_found_by_what_process_1_holds_open(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "fd"
    held.mkdir()
    (held / "3").symlink_to("/dev/null")
    (held / "7").symlink_to("/scratch/upper")
    (held / "9").symlink_to("/packs/writes/0/upper")
    (held / "10").symlink_to("/somebody/elses")
    info = (
        "22 1 0:20 / / rw,relatime - overlay overlay "
        "rw,lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work\n"
        "30 22 0:9 / /proc rw - proc proc rw\n"
        "31 22 0:30 / /opt/a\\040b rw - overlay overlay rw,upperdir=/packs/writes/0/upper\n"
        "32 22 0:31 / /var/lib/docker rw shared:7 - overlay overlay rw,upperdir=/elsewhere\n"
        "33 broken\n"
    )
    (tmp_path / "mountinfo").write_text(info)
    monkeypatch.setattr(guest_writes, "_FD", str(held))
    monkeypatch.setattr(
        guest_writes, "read_file", lambda g, _, n: read_file(g, str(tmp_path / "mountinfo"), n)
    )
    assert uppers(guest) == [("/", f"{held}/7/."), ("/opt/a b", f"{held}/9/.")]
    (tmp_path / "mountinfo").unlink()
    with pytest.raises(ConfigError, match="cannot find what the guest wrote"):
        uppers(guest)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A real overlay over `read`, its upper directory as under a root of EROFS: where it is."""
    read, scratch, merged = (tmp_path / name for name in ("read", "scratch", "merged"))
    for path in (read / "etc", read / "t/sub", scratch / "upper", scratch / "work", merged):
        path.mkdir(parents=True)
    for name in ("etc/passwd", "t/a", "t/sub/b"):
        (read / name).write_text(name)
    layers = f"lowerdir={read},upperdir={scratch}/upper,workdir={scratch}/work,redirect_dir=on"
    mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no overlay here: {done.stderr}")
    yield merged
    subprocess.run(["umount", "-l", merged], check=True)


@needs_root
def test_what_overlayfs_writes_is_found_behind_an_open_upper_directory(
    guest: Guest, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (overlay / "etc/new").write_text("new")
    (overlay / "etc/passwd").unlink()
    (overlay / "t/a").unlink()
    (overlay / "t/sub").rename(overlay / "t/moved")
    fd = os.open(tmp_path / "scratch/upper", os.O_RDONLY | os.O_DIRECTORY)
    try:
        monkeypatch.setattr(guest_writes, "_FD", f"/proc/{os.getpid()}/fd")
        monkeypatch.setattr(
            guest_writes, "read_file", lambda g, _, n: read_file(g, "/proc/self/mountinfo", n)
        )
        assert (str(overlay), f"/proc/{os.getpid()}/fd/{fd}/.") in uppers(guest)
        found = list_guest_changes(guest, [(str(overlay), str(tmp_path / "read"))])
        assert [line.replace(str(overlay), "") for line in lines(found)] == [
            "C /etc",
            "A /etc/new",
            "D /etc/passwd",
            "C /t",
            "D /t/a",
            "A /t/moved",
            "A /t/moved/b",
            "D /t/sub",
        ]
    finally:
        os.close(fd)


def test_process_1_holds_the_upper_directories_of_its_overlays_open() -> None:
    root = [
        *root_mounts(None, "guest"),
        Mount("overlay", "/newroot/x", "overlay", data="lowerdir=/a"),
    ]
    assert upper_directories(root) == ["/scratch/upper"]
    says = [step.says for step in setup_steps(InitConfig(["/x"], ["x"], root=root))]
    assert says.index("open /scratch/upper") < says.index("move the root")


@needs_root
def test_an_erofs_pack_is_made_of_what_only_the_guest_has(
    machine: Machine, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.file("etc", b"new", b"new")
    srv = machine.at("srv")
    srv.mknod(b"null", stat.S_IFCHR | 0o666, 1, 3, 5, 70000).close()
    srv.close()
    path = str(tmp_path / "x.erofs")
    packs.write(packs.Files(listed(guest, machine, monkeypatch), []), path, "erofs", print)
    dump = subprocess.run(
        ["dump.erofs", "--path=/srv/null", path], capture_output=True, text=True, check=True
    )
    assert "Uid: 5   Gid: 70000" in dump.stdout
    machine.remove("etc", "group")
    packs.write(packs.Files(listed(guest, machine, monkeypatch), []), path, "erofs", print)
    whiteout = read_image(Path(path))[b"/etc/group"]
    assert stat.S_ISCHR(whiteout.mode)
    assert whiteout.rdev == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calls", "read", "write", "x.erofs"]
