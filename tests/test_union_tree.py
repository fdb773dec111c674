"""A UnionTree: read trees never change, write trees hold plain files, and guests cannot tell."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver import ownership, writetree
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_MTIME,
    SETATTR_MTIME_SET,
    SETATTR_SIZE,
    SETATTR_UID,
    Node,
    OpenFile,
    Tree,
)
from tinyvmm.fileserver.union import UnionTree, open_tree

UID, GID = os.getuid(), os.getgid()
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(
    not ROOT, reason="only root makes device nodes and gives files away"
)
as_user = pytest.mark.skipif(ROOT, reason="nothing is forbidden to root")
Maps = list[tuple[str, Path]]


class Layers:
    """Two read trees and a write tree in a temporary directory, and unions of them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.lower, self.middle, self.upper = top / "lower", top / "middle", top / "upper"
        for path in (self.lower, self.middle, self.upper):
            path.mkdir()
        self.trees: list[UnionTree] = []

    def mount(self, reads: Maps | None = None, writes: Maps | None = None) -> UnionTree:
        self.unmount()
        tree = open_tree(
            [(at, str(path)) for at, path in reads or [("/", self.lower), ("/", self.middle)]],
            [(at, str(path)) for at, path in [("/", self.upper)] if writes is None]
            + [(at, str(path)) for at, path in writes or []],
        )
        self.trees.append(tree)
        return tree

    def unmount(self) -> None:
        for tree in self.trees:
            tree.close()
        self.trees.clear()


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    before = len(os.listdir("/proc/self/fd"))
    made = Layers(tmp_path)
    yield made
    made.unmount()
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.rglob(".tinyvmm-work")) == []


def refusal(number: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def find(tree: Tree, path: str) -> Node:
    node = tree.root()
    for name in path.split("/"):
        if name:
            step = node.walk(name.encode())
            node.close()
            node = step
    return node


def read(tree: Tree, path: str) -> bytes:
    node = find(tree, path)
    file = node.open(os.O_RDONLY)
    try:
        return get(file, 1 << 16)
    finally:
        file.close()
        node.close()


def get(file: OpenFile, count: int = 100, offset: int = 0) -> bytes:
    buffer = bytearray(count)
    return bytes(buffer[: file.readv([memoryview(buffer)], offset)])


def put(file: OpenFile, data: bytes, offset: int = 0) -> int:
    return file.writev([memoryview(data)], offset)


def write(tree: Tree, path: str, data: bytes) -> None:
    where, _, name = path.rpartition("/")
    directory = find(tree, where)
    node, file = directory.create(name.encode(), os.O_WRONLY | os.O_TRUNC, 0o644, UID, GID)
    assert put(file, data) == len(data)
    for one in (file, node, directory):
        one.close()


def within(tree: Tree, path: str, do: Callable[[Node], object]) -> None:
    node = find(tree, path)
    try:
        do(node)
    finally:
        node.close()


def entries(tree: Tree, path: str) -> list[bytes]:
    node = find(tree, path)
    file = node.open(os.O_RDONLY)
    try:
        return sorted(name for _, _, _, name in file.readdir(0) if name not in {b".", b".."})
    finally:
        file.close()
        node.close()


def remove(tree: Tree, path: str, flags: int = 0) -> None:
    where, _, name = path.rpartition("/")
    within(tree, where, lambda directory: directory.unlink(name.encode(), flags))


def rename(tree: Tree, old: str, new: str) -> None:
    (where, _, name), (there, _, newname) = old.rpartition("/"), new.rpartition("/")
    target = find(tree, there)
    try:
        within(tree, where, lambda node: node.rename(name.encode(), target, newname.encode()))
    finally:
        target.close()


def mkdir(tree: Tree, path: str) -> None:
    where, _, name = path.rpartition("/")
    within(tree, where, lambda node: node.mkdir(name.encode(), 0o755, UID, GID).close())


# --- merging and maps -----------------------------------------------------------------------------
def test_later_read_trees_win_and_directories_are_united(layers: Layers) -> None:
    for where, files in ((layers.lower, "ab"), (layers.middle, "bc")):
        (where / "d").mkdir()
        for name in files:
            (where / "d" / name).write_text(where.name)
    tree = layers.mount()
    assert entries(tree, "d") == [b"a", b"b", b"c"]
    assert [read(tree, f"d/{name}") for name in "abc"] == [b"lower", b"middle", b"middle"]


def test_a_file_over_a_directory_and_the_other_way_round(layers: Layers) -> None:
    (layers.lower / "x").mkdir()
    (layers.lower / "x" / "hidden").touch()
    (layers.middle / "x").write_text("file")
    (layers.lower / "y").write_text("file")
    (layers.middle / "y").mkdir()
    tree = layers.mount()
    assert read(tree, "x") == b"file"
    assert entries(tree, "y") == []
    assert entries(tree, "") == [b"x", b"y"]


def test_maps_apply_at_whole_components_and_the_longest_wins(layers: Layers) -> None:
    (layers.lower / "data").mkdir()
    (layers.lower / "data" / "masked").touch()
    (layers.lower / "database").mkdir()
    (layers.lower / "database" / "seen").touch()
    (layers.middle / "set").touch()
    tree = layers.mount([("/", layers.lower), ("/data/", layers.middle)])
    assert entries(tree, "data") == [b"set"]
    assert entries(tree, "database") == [b"seen"]


def test_a_map_needs_no_directory_to_appear_in(layers: Layers) -> None:
    (layers.middle / "set").touch()
    tree = layers.mount([("/", layers.lower), ("/srv/deep/data", layers.middle)])
    assert entries(tree, "") == [b"srv"]
    assert entries(tree, "srv/deep/data") == [b"set"]
    node = find(tree, "srv/deep")
    assert stat.S_ISDIR(node.stat().st_mode)
    assert node.qid().type == 0x80
    assert node.listxattr() == []
    assert node.statfs().f_bsize
    node.close()
    write(tree, "srv/deep/beside", b"x")  # and becomes real when written to
    assert (layers.upper / "srv" / "deep" / "beside").read_bytes() == b"x"
    assert entries(tree, "srv/deep") == [b"beside", b"data"]


def test_a_map_over_a_file_hides_it(layers: Layers) -> None:
    (layers.lower / "data").write_text("a file")
    tree = layers.mount([("/", layers.lower), ("/data", layers.middle)])
    assert entries(tree, "") == [b"data"]
    assert entries(tree, "data") == []


def test_map_points_can_be_neither_removed_nor_renamed(layers: Layers) -> None:
    tree = layers.mount([("/", layers.lower), ("/srv/data", layers.middle)])
    with refusal(errno.EBUSY):
        remove(tree, "srv/data", AT_REMOVEDIR)
    with refusal(errno.EBUSY):
        rename(tree, "srv", "elsewhere")
    mkdir(tree, "new")
    with refusal(errno.EBUSY):
        rename(tree, "new", "srv/data")
    with refusal(errno.EEXIST):
        mkdir(tree, "srv")


def test_each_write_tree_takes_what_lies_at_and_below_its_place(layers: Layers) -> None:
    out = layers.top / "out"
    out.mkdir()
    tree = layers.mount(
        [("/", layers.lower), ("/data", layers.middle)], [("/", layers.upper), ("/data", out)]
    )
    write(tree, "etc", b"1")
    write(tree, "data/x", b"2")
    assert os.listdir(layers.upper) == ["etc"]
    assert os.listdir(out) == ["x"]
    with refusal(errno.EXDEV):
        rename(tree, "etc", "data/etc")


def test_what_no_write_tree_covers_is_read_only(layers: Layers) -> None:
    (layers.lower / "f").write_text("x")
    (layers.lower / "data").mkdir()
    tree = layers.mount([("/", layers.lower)], [("/data", layers.upper)])
    node = find(tree, "f")
    for attempt in (
        lambda: node.open(os.O_RDWR),
        lambda: node.setattr(SETATTR_MODE, mode=0),
        lambda: node.setxattr(b"user.x", b"", 0),
        lambda: write(tree, "g", b""),
        lambda: remove(tree, "f"),
        lambda: rename(tree, "f", "g"),
        lambda: mkdir(tree, "d"),
    ):
        with refusal(errno.EROFS):
            attempt()
    node.close()
    write(tree, "data/x", b"y")
    assert (layers.upper / "x").read_bytes() == b"y"


def test_a_union_without_a_write_tree_reads(layers: Layers) -> None:
    (layers.lower / "f").write_text("x")
    tree = layers.mount(writes=[])
    assert read(tree, "f") == b"x"
    with refusal(errno.EROFS):
        write(tree, "f", b"")


def test_a_union_of_nothing_is_an_empty_directory(layers: Layers) -> None:
    tree = open_tree([], [])
    assert entries(tree, "") == []
    tree.close()


def test_the_root_looks_like_what_it_covers_until_it_is_changed(layers: Layers) -> None:
    layers.lower.chmod(0o755)
    layers.upper.chmod(0o700)
    tree = layers.mount([("/", layers.lower)])
    root = tree.root()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    root.setattr(SETATTR_MODE, mode=0o1777)
    assert stat.S_IMODE(root.stat().st_mode) == 0o1777
    root.close()
    root = layers.mount([("/", layers.lower)]).root()
    assert stat.S_IMODE(root.stat().st_mode) == 0o1777
    assert root.listxattr() == []
    root.close()


# --- what the write tree looks like ---------------------------------------------------------------
def test_what_a_guest_creates_lies_in_the_write_tree_under_its_own_name(layers: Layers) -> None:
    (layers.lower / "etc").mkdir(mode=0o711)
    (layers.lower / "etc").chmod(0o711)
    tree = layers.mount()
    write(tree, "etc/probe", b"hello")
    layers.unmount()
    assert sorted(path.relative_to(layers.upper) for path in layers.upper.rglob("*")) == [
        Path("etc"),
        Path("etc/probe"),
    ]
    assert (layers.upper / "etc" / "probe").read_bytes() == b"hello"
    assert stat.S_IMODE((layers.upper / "etc").stat().st_mode) == 0o711
    assert not (layers.lower / "etc" / "probe").exists()


def test_looking_leaves_no_trace_in_the_write_tree(layers: Layers) -> None:
    (layers.lower / "f").write_text("x")
    tree = layers.mount()
    assert read(tree, "f") == b"x"
    with refusal(errno.ENOENT):
        find(tree, "nothing")
    layers.unmount()
    assert os.listdir(layers.upper) == []


def test_removing_makes_whiteouts_that_last(layers: Layers) -> None:
    for where in (layers.lower, layers.middle):
        (where / "f").touch()
        (where / "d").mkdir()
        (where / "d" / where.name).touch()
    tree = layers.mount()
    remove(tree, "f")
    remove(tree, "d/lower")
    remove(tree, "d/middle")
    with refusal(errno.ENOTEMPTY):
        write(tree, "d/new", b"")
        remove(tree, "d", AT_REMOVEDIR)
    remove(tree, "d/new")
    remove(tree, "d", AT_REMOVEDIR)
    assert entries(tree, "") == []
    tree = layers.mount()
    assert entries(tree, "") == []
    with refusal(errno.ENOENT):
        find(tree, "f")
    write(tree, "f", b"back")
    mkdir(tree, "d")
    assert entries(tree, "d") == []
    tree = layers.mount()
    assert read(tree, "f") == b"back"
    assert entries(tree, "d") == []


def need_device_whiteouts(where: Path) -> None:
    """Skip where a device 0:0 cannot be made (on overlayfs itself, and before Linux 5.8)."""
    try:
        os.mknod(where / "probe", stat.S_IFCHR, os.makedev(0, 0))
    except PermissionError:
        pytest.skip("this file system has no whiteout devices")
    (where / "probe").unlink()


def test_whiteouts_have_the_form_overlayfs_gives_them(layers: Layers) -> None:
    need_device_whiteouts(layers.top)
    (layers.lower / "f").touch()
    (layers.lower / "d").mkdir()
    tree = layers.mount()
    remove(tree, "f")
    remove(tree, "d", AT_REMOVEDIR)
    mkdir(tree, "d")
    mark = os.stat(layers.upper / "f")
    assert (stat.S_IFMT(mark.st_mode), mark.st_rdev) == (stat.S_IFCHR, 0)
    prefix = "trusted" if ROOT else "user"
    assert os.getxattr(layers.upper / "d", f"{prefix}.overlay.opaque") == b"y"


@needs_root
def test_the_kernels_overlayfs_sees_what_the_guest_saw(layers: Layers) -> None:
    for name in ("kept", "gone", "replaced"):
        (layers.lower / name).mkdir()
        (layers.lower / name / "below").touch()
        (layers.lower / f"{name}-file").write_text("lower")
    tree = layers.mount([("/", layers.lower)])
    remove(tree, "gone/below")
    remove(tree, "gone", AT_REMOVEDIR)
    remove(tree, "gone-file")
    rename(tree, "replaced", "moved")
    mkdir(tree, "replaced")
    write(tree, "replaced-file", b"upper")
    write(tree, "kept/above", b"")
    rename(tree, "kept-file", "moved/file")
    seen = {path: entries(tree, path) for path in ("", "kept", "moved", "replaced")}
    layers.unmount()
    work, target = layers.top / "work", layers.top / "target"
    work.mkdir()
    target.mkdir()
    options = f"lowerdir={layers.lower},upperdir={layers.upper},workdir={work}"
    script = 'mount -t overlay overlay -o "$1" "$2" || exit 77; cd "$2"; shift 2; ls -A -1 "$@"'
    for path, expected in seen.items():
        listing = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", options, str(target), f"./{path}"],
            capture_output=True,
            check=False,
        )
        if listing.returncode == 77:
            pytest.skip(f"no overlayfs here: {listing.stderr.decode()}")
        assert sorted(listing.stdout.split()) == expected
    shutil.rmtree(work)  # which holds directories of mode 0


@pytest.mark.parametrize("form", ["device", "xattr", "name"])
def test_every_form_of_whiteout_hides_and_can_be_replaced(
    layers: Layers, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form != "device":
        monkeypatch.setattr(writetree, "make_device_whiteout", lambda _name, _fd: False)
    if form == "name":
        monkeypatch.setattr(writetree, "make_xattr_whiteout", lambda _name, _fd: False)
        monkeypatch.setattr(writetree, "set_layer_xattr", lambda _path, _name, _value: False)
    for name in "abcde":
        (layers.lower / name).write_text("lower")
        (layers.lower / f"d{name}").mkdir()
        (layers.lower / f"d{name}" / "f").touch()
    tree = layers.mount()
    for name in "abcd":
        remove(tree, name)
        remove(tree, f"d{name}/f")
        remove(tree, f"d{name}", AT_REMOVEDIR)
    write(tree, "e", b"upper")
    remove(tree, "e")  # an upper file with a lower one below it
    assert entries(tree, "") == [b"de"]
    tree = layers.mount()
    assert entries(tree, "") == [b"de"]
    write(tree, "a", b"again")
    mkdir(tree, "b")
    mkdir(tree, "da")
    write(tree, "db", b"file")
    rename(tree, "a", "c")
    rename(tree, "da", "dc")
    rename(tree, "de", "d")
    write(tree, "d/g", b"")
    for _ in range(2):
        assert entries(tree, "") == [b"b", b"c", b"d", b"db", b"dc"]
        assert entries(tree, "b") == entries(tree, "dc") == []
        assert entries(tree, "d") == [b"f", b"g"]
        assert read(tree, "c") == b"again"
        assert read(tree, "db") == b"file"
        tree = layers.mount()
    layers.unmount()
    named = any(path.name.startswith(".wh.") for path in layers.upper.rglob("*"))
    assert named == (form == "name")


def test_layers_that_somebody_else_made_are_understood(layers: Layers) -> None:
    """An upper layer of overlayfs, whiteouts and all, as a read tree over another."""
    need_device_whiteouts(layers.top)
    for name in ("gone", "gone2", "kept"):
        (layers.lower / name).touch()
    (layers.lower / "d").mkdir()
    (layers.lower / "d" / "hidden").touch()
    os.mknod(layers.middle / "gone", stat.S_IFCHR, os.makedev(0, 0))
    (layers.middle / "gone2").touch()
    os.setxattr(layers.middle / "gone2", "user.overlay.whiteout", b"y")
    os.setxattr(layers.middle, "user.overlay.opaque", b"x")
    (layers.middle / "d").mkdir()
    os.setxattr(layers.middle / "d", "user.overlay.opaque", b"y")
    tree = layers.mount(writes=[])
    assert entries(tree, "") == [b"d", b"kept"]
    assert entries(tree, "d") == []
    for name in ("gone", "gone2", "d/hidden"):
        with refusal(errno.ENOENT):
            find(tree, name)


def test_our_marks_are_no_business_of_the_guest(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    tree = layers.mount()
    remove(tree, "d", AT_REMOVEDIR)
    mkdir(tree, "d")
    node = find(tree, "d")
    assert node.listxattr() == []
    with refusal(errno.ENODATA):
        node.getxattr(b"user.overlay.opaque")
    with refusal(errno.EPERM):
        node.setxattr(b"trusted.overlay.opaque", b"y", 0)
    with refusal(errno.EPERM):
        node.mknod(b"whiteout", stat.S_IFCHR, 0, 0, UID, GID)
    node.close()
    with refusal(errno.EPERM):
        mkdir(tree, ".tinyvmm-work")


def test_what_a_killed_machine_left_is_cleaned_up(layers: Layers) -> None:
    (layers.upper / ".tinyvmm-work" / "1").mkdir(parents=True)
    (layers.upper / ".tinyvmm-work" / "1" / "f").touch()
    (layers.upper / ".tinyvmm-work" / "s").symlink_to(layers.lower)
    (layers.lower / "f").touch()
    tree = layers.mount()
    assert entries(tree, "") == [b"f"]
    assert os.listdir(layers.upper) == []


def test_a_write_tree_inside_the_read_tree_is_no_trap(layers: Layers) -> None:
    (layers.lower / "out").mkdir()
    (layers.lower / "d").mkdir()
    tree = layers.mount([("/", layers.lower)], [("/", layers.lower / "out")])
    write(tree, "d/f", b"1")
    write(tree, "out/g", b"2")
    assert (layers.lower / "out" / "d" / "f").read_bytes() == b"1"
    assert (layers.lower / "out" / "out" / "g").read_bytes() == b"2"
    assert entries(tree, "out") == [b"g"]  # but what the host has there is not shown
    rename(tree, "out", "away")
    rename(tree, "d", "away/d")
    assert entries(tree, "") == [b"away"]
    assert entries(tree, "away") == [b"d", b"g"]


# --- copy-up --------------------------------------------------------------------------------------
def make_rich_file(path: Path) -> os.stat_result:
    with path.open("wb") as file:
        file.write(b"start")
        file.seek(32 << 20)
        file.write(b"middle")
        file.truncate(64 << 20)
    path.chmod(0o2751)
    os.setxattr(path, "user.note", b"\0kept")
    if ROOT:
        os.chown(path, 1234, 4321)
        path.chmod(0o6751)
    os.utime(path, ns=(1_111_111_111_222_333_444, 1_222_222_222_333_444_555))
    return path.stat()


def test_copy_up_keeps_everything(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    before = make_rich_file(layers.lower / "d" / "f")
    os.utime(layers.lower / "d", ns=(7, 8))
    if before.st_blocks * 512 >= 32 << 20:
        pytest.skip("no sparse files here")
    tree = layers.mount()
    node = find(tree, "d/f")
    qid = node.qid()
    node.setxattr(b"user.more", b"1", 0)
    for got in (node.stat(), (layers.upper / "d" / "f").stat()):
        assert (got.st_uid, got.st_gid) == (before.st_uid, before.st_gid)
        assert (got.st_size, got.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert got.st_blocks < (8 << 20) / 512
    assert node.stat().st_mode == before.st_mode
    assert (layers.upper / "d" / "f").stat().st_mode == before.st_mode & (~0 if ROOT else ~0o6000)
    assert node.qid() == qid
    assert sorted(node.listxattr()) == [b"user.more", b"user.note"]
    assert node.getxattr(b"user.note") == b"\0kept"
    file = node.open(os.O_RDONLY)
    assert get(file, 5) == b"start"
    assert get(file, 10, (32 << 20) - 2) == b"\0\0middle\0\0"
    file.close()
    node.close()
    assert (layers.upper / "d").stat().st_mtime_ns == 8
    if ROOT:  # others may not read without changing the access time
        assert (layers.lower / "d" / "f").stat() == before


def test_copy_up_falls_back_where_the_kernel_cannot_copy(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> int:
        raise OSError(errno.EXDEV, "no")

    real_seek = os.lseek

    def no_holes(fd: int, offset: int, whence: int) -> int:
        if whence in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise OSError(errno.EINVAL, "no")
        return real_seek(fd, offset, whence)

    monkeypatch.setattr(os, "copy_file_range", cannot)
    monkeypatch.setattr(os, "lseek", no_holes)
    content = os.urandom(3 << 20)
    (layers.lower / "f").write_bytes(content)
    tree = layers.mount()
    within(tree, "f", lambda node: node.setattr(SETATTR_MODE, mode=0o600))
    assert (layers.upper / "f").read_bytes() == content


def test_open_files_and_nodes_go_along_with_a_copy_up(layers: Layers) -> None:
    (layers.lower / "f").write_bytes(b"lower")
    tree = layers.mount()
    node, again = find(tree, "f"), find(tree, "f")
    reader = node.open(os.O_RDONLY)
    writer = again.open(os.O_RDWR)
    put(writer, b"UPPER!")
    assert get(reader) == b"UPPER!"
    assert node.stat().st_size == 6
    assert (layers.lower / "f").read_bytes() == b"lower"
    for one in (reader, writer, node, again):
        one.close()


def test_an_unlinked_lower_file_can_still_be_written(layers: Layers) -> None:
    (layers.lower / "f").write_bytes(b"lower")
    tree = layers.mount()
    node = find(tree, "f")
    reader = node.open(os.O_RDONLY)
    remove(tree, "f")
    assert node.stat().st_nlink == 0
    writer = node.open(os.O_RDWR)
    put(writer, b"UPPER!")
    assert get(reader) == b"UPPER!"
    node.setattr(SETATTR_SIZE, size=2)
    assert get(reader) == b"UP"
    assert entries(tree, "") == []
    for one in (reader, writer, node):
        one.close()
    layers.unmount()
    assert (layers.lower / "f").read_bytes() == b"lower"


def test_truncating_copies_no_contents(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    (layers.lower / "f").write_bytes(b"x" * 100)
    tree = layers.mount()
    monkeypatch.setattr(os, "copy_file_range", lambda *_: pytest.fail("copied"))
    node = find(tree, "f")
    file = node.open(os.O_WRONLY | os.O_TRUNC)
    assert node.stat().st_size == 0
    file.close()
    node.close()


def test_a_failed_copy_up_changes_nothing(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    (layers.lower / "f").write_bytes(b"lower")
    tree = layers.mount()
    told: list[bytes] = []
    tree.on_no_space = told.append

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        for _ in range(2):
            with refusal(errno.ENOSPC):
                within(tree, "f", lambda node: node.open(os.O_RDWR).close())
    assert told == [os.fsencode(layers.upper)]
    assert os.listdir(layers.upper / ".tinyvmm-work") == []
    assert read(tree, "f") == b"lower"
    write(tree, "f", b"upper")
    assert read(tree, "f") == b"upper"


def test_a_copy_up_that_finds_no_place_leaves_no_descriptor(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layers.lower / "f").write_bytes(b"lower")
    tree = layers.mount()
    node = find(tree, "f")
    readers = [node.open(os.O_RDONLY) for _ in range(3)]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with refusal(errno.ENOSPC):
            node.open(os.O_RDWR)
        before = os.listdir("/proc/self/fd")
        with refusal(errno.ENOSPC):
            node.open(os.O_RDWR)
        assert os.listdir("/proc/self/fd") == before
    assert os.listdir(layers.upper / ".tinyvmm-work") == []
    node.open(os.O_RDWR).close()
    for reader in readers:
        assert get(reader) == b"lower"
        reader.close()
    node.close()


def test_a_full_write_tree_is_told_to_the_guest_and_once_to_the_host(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = layers.mount()
    told: list[bytes] = []
    tree.on_no_space = told.append
    write(tree, "f", b"x")
    node = find(tree, "f")
    file = node.open(os.O_RDWR)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)
    for _ in range(3):
        with refusal(errno.ENOSPC):
            put(file, b"y")
    assert told == [os.fsencode(layers.upper)]
    file.close()
    node.close()


def test_a_rename_that_finds_no_space_for_a_whiteout_does_nothing(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layers.lower / "f").write_bytes(b"lower")
    (layers.lower / "d").mkdir()
    tree = layers.mount()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mknod", full)
        for name in ("f", "d"):
            with refusal(errno.ENOSPC):
                rename(tree, name, "new")
    for _ in range(2):
        assert entries(tree, "") == [b"d", b"f"]
        assert read(tree, "f") == b"lower"
        tree = layers.mount()


# --- names, links and identities ------------------------------------------------------------------
def test_renaming_a_lower_directory_takes_everything_along(layers: Layers) -> None:
    (layers.lower / "d" / "e").mkdir(parents=True)
    (layers.middle / "d" / "e").mkdir(parents=True)
    (layers.lower / "d" / "e" / "f").write_text("lower")
    (layers.middle / "d" / "g").symlink_to("nowhere")
    os.mkfifo(layers.lower / "d" / "p")
    tree = layers.mount()
    held, directory = find(tree, "d/e/f"), find(tree, "d/e")
    reader = held.open(os.O_RDONLY)
    qid = held.qid()
    mkdir(tree, "to")
    rename(tree, "d", "to/d2")
    assert entries(tree, "") == [b"to"]
    assert entries(tree, "to/d2") == [b"e", b"g", b"p"]
    assert held.qid() == qid
    within(tree, "to/d2/e/f", lambda node: node.setattr(SETATTR_SIZE, size=3))
    assert get(reader) == b"low"
    directory.mkdir(b"new", 0o700, UID, GID).close()
    assert entries(tree, "to/d2/e") == [b"f", b"new"]
    for one in (reader, held, directory):
        one.close()
    tree = layers.mount()
    assert entries(tree, "") == [b"to"]
    assert entries(tree, "to/d2/e") == [b"f", b"new"]
    assert (layers.lower / "d" / "e" / "f").read_text() == "lower"


def test_a_directory_cannot_be_moved_into_itself(layers: Layers) -> None:
    (layers.lower / "d" / "e").mkdir(parents=True)
    tree = layers.mount()
    with refusal(errno.EINVAL):
        rename(tree, "d", "d/e/x")
    with refusal(errno.ENOTEMPTY):
        rename(tree, "d/e", "d")


def test_names_given_by_the_guest_are_one_file(layers: Layers) -> None:
    (layers.lower / "f").write_bytes(b"x")
    tree = layers.mount()
    node = find(tree, "f")
    within(tree, "", lambda root: root.link(b"g", node))
    other = find(tree, "g")
    assert other.qid() == node.qid()
    assert node.stat().st_nlink == 2
    write(tree, "g", b"shared")
    assert read(tree, "f") == b"shared"
    node.close()
    other.close()


def test_names_the_host_gave_come_apart_when_one_is_written(layers: Layers) -> None:
    (layers.lower / "f").write_bytes(b"x")
    os.link(layers.lower / "f", layers.lower / "g")
    tree = layers.mount()
    f, g = find(tree, "f"), find(tree, "g")
    assert f.qid().path != g.qid().path
    assert f.stat().st_nlink == g.stat().st_nlink == 1
    write(tree, "f", b"changed")
    assert read(tree, "g") == b"x"
    f.close()
    g.close()


def test_one_host_directory_at_two_places_is_two(layers: Layers) -> None:
    (layers.lower / "srv").mkdir()
    (layers.lower / "srv" / "f").write_bytes(b"x")
    tree = layers.mount([("/", layers.lower), ("/data", layers.lower / "srv")])
    f, g = find(tree, "srv/f"), find(tree, "data/f")
    assert f.qid().path != g.qid().path
    write(tree, "data/f", b"changed")
    assert read(tree, "srv/f") == b"x"
    f.close()
    g.close()


def test_a_qid_outlives_its_node_and_its_file_does_not(layers: Layers) -> None:
    (layers.lower / "f").write_bytes(b"x")
    tree = layers.mount()
    node = find(tree, "f")
    qid = node.qid()
    node.close()
    write(tree, "f", b"y")
    node = find(tree, "f")
    assert node.qid() == qid
    root = tree.root()
    opened = root.open(os.O_RDONLY)
    assert [entry[0].path for entry in opened.readdir(0) if entry[3] == b"f"] == [qid.path]
    opened.close()
    root.close()
    inode = node.stat().st_ino
    node.close()
    remove(tree, "f")
    qids = {qid}
    for number in range(50):  # until the file system hands out the inode number again
        write(tree, "f", b"%d" % number)
        node = find(tree, "f")
        again = node.stat().st_ino == inode
        assert (node.qid() in qids) is False
        qids.add(node.qid())
        node.close()
        remove(tree, "f")
        if again and number > 2:
            break


def test_dot_dot_stops_at_the_root_and_follows_renames(layers: Layers) -> None:
    (layers.lower / "d" / "e").mkdir(parents=True)
    tree = layers.mount()
    root: Node = tree.root()
    up: Node = root.walk(b"..")
    assert up is root
    up.close()
    mkdir(tree, "x")
    e, x = find(tree, "d/e"), find(tree, "x")
    rename(tree, "d/e", "x/e")
    up = e.walk(b"..")
    assert up is x
    for one in (up, e, x, root):
        one.close()


def test_a_removed_directory_takes_no_entries(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    tree = layers.mount()
    node = find(tree, "d")
    remove(tree, "d", AT_REMOVEDIR)
    with refusal(errno.ENOENT):
        node.mkdir(b"x", 0o700, UID, GID)
    with refusal(errno.ENOENT):
        node.walk(b"x")
    assert stat.S_ISDIR(node.stat().st_mode)
    node.close()
    mkdir(tree, "d")
    assert entries(tree, "d") == []


def test_removing_everything_while_reading_it_misses_nothing(layers: Layers) -> None:
    for where, count in ((layers.lower, 400), (layers.middle, 300)):
        for number in range(count):
            (where / f"{where.name}{number}").touch()
            (where / f"both{number}").touch()
    tree = layers.mount()
    for number in range(200):
        write(tree, f"upper{number}", b"")
    root = tree.root()
    opened = root.open(os.O_RDONLY)
    cookie = 0
    seen: list[bytes] = []
    while portion := [e for e, _ in zip(opened.readdir(cookie), range(13), strict=False)]:
        cookie = portion[-1][1]
        for _, _, _, name in portion:
            seen.append(name)
            if name not in {b".", b".."}:
                root.unlink(name, 0)
    opened.close()
    root.close()
    assert len(seen) == len(set(seen)) == 2 + 400 + 400 + 300 + 200
    assert entries(tree, "") == []
    assert entries(layers.mount(), "") == []


def test_large_directories_are_listed_without_duplicates(layers: Layers) -> None:
    for where, numbers in ((layers.lower, range(6000)), (layers.middle, range(4000, 10_000))):
        for number in numbers:
            os.mknod(where / str(number), stat.S_IFREG | 0o600)
    tree = layers.mount()
    assert entries(tree, "") == sorted(b"%d" % number for number in range(10_000))


def test_nodes_outlive_their_descriptors(layers: Layers) -> None:
    for number in range(60):
        (layers.lower / f"d{number}").mkdir()
        (layers.lower / f"d{number}" / "f").write_bytes(b"x" * number)
    tree = layers.mount()
    tree.descriptors.limit = 16
    nodes = [find(tree, f"d{number}/f") for number in range(60)]
    remove(tree, "d7/f")
    rename(tree, "d8", "moved")
    write(tree, "d9/f", b"123")
    for number in range(60):
        find(tree, f"d{number}" if number != 8 else "moved").close()
        assert len(tree.descriptors) <= 20
    expected = [*range(60)]
    expected[9] = 3
    assert [node.stat().st_size for node in nodes] == expected
    for node in nodes:
        node.close()


# --- whom the files belong to ---------------------------------------------------------------------
@needs_root
def test_root_keeps_owners_and_devices(layers: Layers) -> None:
    os.mknod(layers.lower / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (layers.lower / "f").touch()
    os.chown(layers.lower / "f", 12, 34)
    os.symlink("x", layers.lower / "s")
    os.chown(layers.lower / "s", 56, 78, follow_symlinks=False)
    tree = layers.mount()
    within(tree, "null", lambda node: node.setattr(SETATTR_MODE, mode=0o600))
    for name in ("f", "s"):
        within(tree, name, lambda n: n.setattr(SETATTR_MTIME | SETATTR_MTIME_SET, mtime_ns=1))
    assert (layers.upper / "null").stat().st_rdev == os.makedev(1, 3)
    assert ((layers.upper / "f").stat().st_uid, (layers.upper / "f").stat().st_gid) == (12, 34)
    assert (layers.upper / "s").lstat().st_uid == 56
    within(tree, "f", lambda node: node.setattr(SETATTR_UID | SETATTR_GID, uid=9, gid=10))
    assert (layers.upper / "f").stat().st_uid == 9


@as_user
def test_what_a_user_may_not_read_is_refused_and_nothing_else(layers: Layers) -> None:
    (layers.lower / "secret").write_text("x")
    (layers.lower / "secret").chmod(0)
    (layers.lower / "closed").mkdir(mode=0)
    (layers.lower / "open").write_text("y")
    tree = layers.mount()
    assert entries(tree, "") == [b"closed", b"open", b"secret"]
    with refusal(errno.EACCES):
        read(tree, "secret")
    with refusal(errno.EACCES):
        find(tree, "closed/x")
    with refusal(errno.EACCES):
        entries(tree, "closed")
    assert read(tree, "open") == b"y"
    (layers.lower / "closed").chmod(0o700)


def test_without_privilege_owners_are_recorded_beside_the_files(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "must_pretend", lambda: True)
    (layers.lower / "f").touch(mode=0o600)
    tree = layers.mount()
    root = tree.root()
    made, file = root.create(b"new", os.O_RDWR, 0o4000, 1234, 4321)
    copied = find(tree, "f")
    copied.setattr(SETATTR_UID | SETATTR_GID | SETATTR_MODE, uid=9, gid=10, mode=0o6711)
    link = root.symlink(b"s", b"x", 5, 6)
    for node, expected in (
        (made, (0o104000, 1234, 4321)),
        (copied, (0o106711, 9, 10)),
        (link, (0o120777, 5, 6)),
    ):
        got = node.stat()
        assert (got.st_mode, got.st_uid, got.st_gid) == expected
        assert node.listxattr() == []
    for name in ("new", "f"):  # on the host: ours, usable, and lending nobody our identity
        on_host = (layers.upper / name).stat()
        assert (on_host.st_uid, on_host.st_gid) == (UID, GID)
        assert on_host.st_mode & 0o7600 == 0o600
    for one in (file, made, copied, link, root):
        one.close()
    tree = layers.mount()
    within(tree, "new", lambda node: node.open(os.O_RDWR).close())
    node = find(tree, "new")
    assert (node.stat().st_mode, node.stat().st_uid) == (0o104000, 1234)
    node.setattr(SETATTR_UID | SETATTR_GID, uid=UID, gid=GID)
    node.setattr(SETATTR_MODE, mode=0o644)
    assert os.listxattr(layers.upper / "new") == []
    node.close()


ATTRIBUTES = {b"security.capability", b"trusted.x", b"system.of_a_guest"}


def test_without_privilege_links_devices_and_attributes_are_what_the_guest_made_them(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Still so for the next machine, for who reads what this one wrote, and for root."""
    monkeypatch.setattr(ownership, "must_pretend", lambda: True)
    (layers.lower / "below").symlink_to("x")
    os.lchown(layers.lower / "below", UID, GID)
    tree = layers.mount()
    root = tree.root()
    made: list[Node] = [
        root.symlink(b"roots", b"to/x", 0, 0),
        root.symlink(b"his", b"to/y", 5, 6),
        root.symlink(b"given", b"to/z", 0, 0),
        root.mknod(b"null", stat.S_IFCHR | 0o666, 1, 3, 0, 7),
        root.mknod(b"disk", stat.S_IFBLK | 0o660, 8, 1, 0, 6),
        root.mknod(b"fifo", stat.S_IFIFO | 0o4600, 0, 0, 8, 9),
        root.mknod(b"socket", stat.S_IFSOCK | 0o700, 0, 0, 0, 0),
        root.mkdir(b"d", 0o755, 3, 3),
    ]
    file, opened = root.create(b"file", os.O_RDWR, 0o755, 1, 1)
    qid = made[2].qid()
    made[2].setattr(SETATTR_UID | SETATTR_GID, uid=70_000, gid=8)
    assert made[2].qid() == qid
    below = find(tree, "below")
    below.setattr(SETATTR_UID, uid=9)
    directory = find(tree, "d")
    root.rename(b"null", directory, b"moved")
    directory.link(b"linked", made[1])
    # No file system has the last of these, whoever asks.
    for attribute in ATTRIBUTES:
        file.setxattr(attribute, b"kept", 0)
        with refusal(errno.EEXIST):
            file.setxattr(attribute, b"other", os.XATTR_CREATE)
    assert set(file.listxattr()) == ATTRIBUTES
    for target, number in ((b"", errno.ENOENT), (b"x" * 4096, errno.ENAMETOOLONG)):
        with refusal(number):
            root.symlink(b"s", target, 5, 6)
    with refusal(errno.ELOOP):
        made[1].open(os.O_RDONLY)
    with refusal(errno.EOPNOTSUPP):
        made[3].open(os.O_RDWR)
    opened.close()
    for one in (file, *made, below, directory, root):
        one.close()
    tree.close()

    on_host = {path.name: stat.S_IFMT(path.lstat().st_mode) for path in layers.upper.iterdir()}
    assert (on_host.pop("roots"), on_host.pop("d")) == (stat.S_IFLNK, stat.S_IFDIR)
    assert set(on_host.values()) == {stat.S_IFREG}
    assert not [a for a in os.listxattr(layers.upper / "file") if not a.startswith("user.")]
    expected = {
        "roots": (stat.S_IFLNK | 0o777, 0, 0, 0, b"to/x"),
        "his": (stat.S_IFLNK | 0o777, 5, 6, 0, b"to/y"),
        "given": (stat.S_IFLNK | 0o777, 70_000, 8, 0, b"to/z"),
        "below": (stat.S_IFLNK | 0o777, 9, GID, 0, b"x"),
        "d/linked": (stat.S_IFLNK | 0o777, 5, 6, 0, b"to/y"),
        "d/moved": (stat.S_IFCHR | 0o666, 0, 7, os.makedev(1, 3), None),
        "disk": (stat.S_IFBLK | 0o660, 0, 6, os.makedev(8, 1), None),
        "fifo": (stat.S_IFIFO | 0o4600, 8, 9, 0, None),
        "socket": (stat.S_IFSOCK | 0o700, 0, 0, 0, None),
    }

    def seen(tree: UnionTree) -> None:
        for path, wanted in expected.items():
            node = find(tree, path)
            got = node.stat()
            target = node.readlink() if stat.S_ISLNK(got.st_mode) else None
            assert (got.st_mode, got.st_uid, got.st_gid, got.st_rdev, target) == wanted, path
            node.close()
        node = find(tree, "file")
        assert {node.getxattr(attribute) for attribute in ATTRIBUTES} == {b"kept"}
        node.close()
        for directory in ("", "d"):
            node = find(tree, directory)
            listing = node.open(os.O_RDONLY)
            types = {os.fsdecode(name): dtype << 12 for _, _, dtype, name in listing.readdir(0)}
            listing.close()
            node.close()
            for path, wanted in expected.items():
                where, _, name = path.rpartition("/")
                assert where != directory or types[name] == stat.S_IFMT(wanted[0]), path

    again = layers.mount()
    seen(again)
    again.close()
    layered = open_tree([("/", str(layers.lower)), ("/", str(layers.upper))], [])
    seen(layered)
    layered.close()
    monkeypatch.setattr(ownership, "must_pretend", lambda: False)
    as_root = layers.mount()
    seen(as_root)
    node = find(as_root, "file")
    for attribute in ATTRIBUTES:
        node.removexattr(attribute)
    assert node.listxattr() == []
    node.close()
    as_root.close()


def test_a_file_created_read_only_can_be_opened_for_writing_again(layers: Layers) -> None:
    tree = layers.mount()
    root = tree.root()
    node, file = root.create(b"object", os.O_RDWR, 0o444, UID, GID)
    second = node.open(os.O_RDWR)
    put(second, b"data")
    assert get(file) == b"data"
    assert stat.S_IMODE(node.stat().st_mode) == 0o444
    for one in (file, second, node, root):
        one.close()


# --- mistakes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reads", "writes", "expected"),
    [
        ([("/", "missing")], [], r"read tree \S+missing: No such file"),
        ([("/", "file")], [], r"read tree \S+file: a file; map the directory"),
        ([("data", "lower")], [], r"map to 'data': a path in the guest starts with a slash"),
        ([("/a/../b", "lower")], [], r"map to '/a/\.\./b': not a plain path"),
        ([], [("/", "missing")], r"write tree \S+missing: No such file"),
        ([], [("/", "file")], r"write tree \S+file: Not a directory"),
        ([], [("/", "lower"), ("/", "upper")], r"two write trees at /"),
        ([], [("/", "lower"), ("/d", "lower")], r"write tree \S+lower: in use"),
    ],
)
def test_a_map_that_cannot_be_is_refused_in_one_line(
    layers: Layers, reads: list[tuple[str, str]], writes: list[tuple[str, str]], expected: str
) -> None:
    (layers.top / "file").touch()
    with pytest.raises(ConfigError, match=expected) as caught:
        open_tree(
            [(at, str(layers.top / name)) for at, name in reads],
            [(at, str(layers.top / name)) for at, name in writes],
        )
    assert "\n" not in str(caught.value)


@as_user
def test_trees_a_user_may_not_use_are_refused_in_one_line(layers: Layers) -> None:
    (layers.lower / "closed").mkdir(mode=0)
    with pytest.raises(ConfigError, match=r"read tree .*Permission denied"):
        open_tree([("/", str(layers.lower / "closed"))], [])
    with pytest.raises(ConfigError, match=r"write tree .*not writable"):
        open_tree([], [("/", "/")])
    (layers.lower / "closed").chmod(0o700)


def test_a_write_tree_in_use_is_free_again_afterwards(layers: Layers) -> None:
    tree = layers.mount()
    with pytest.raises(ConfigError, match="in use by another machine"):
        open_tree([], [("/", str(layers.upper))])
    tree.close()
    open_tree([], [("/", str(layers.upper))]).close()
