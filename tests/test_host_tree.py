"""A HostTree serves one host directory live, and lets nobody out of it."""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.fileserver import qids
from tinyvmm.fileserver.host import HostNode, HostTree
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    NO_ID,
    SETATTR_ATIME,
    SETATTR_ATIME_SET,
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

UID, GID = os.getuid(), os.getgid()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away, which takes root")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[HostTree]:
    before = len(os.listdir("/proc/self/fd"))
    made = HostTree(str(tmp_path))
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def root(tree: HostTree) -> Iterator[HostNode]:
    node = tree.root()
    yield node
    node.close()
    assert list(tree.nodes) == [node.key], "a node was not closed"


def refusal(number: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def put(file: OpenFile, data: bytes, offset: int = 0) -> int:
    return file.writev([memoryview(data)], offset)


def get(file: OpenFile, count: int = 100, offset: int = 0) -> bytes:
    buffer = bytearray(count)
    return bytes(buffer[: file.readv([memoryview(buffer)], offset)])


def entries(directory: Node) -> list[bytes]:
    file = directory.open(os.O_RDONLY)
    try:
        return [name for _, _, _, name in file.readdir(0) if name not in {b".", b".."}]
    finally:
        file.close()


def test_it_is_what_a_session_expects_of_a_tree(tree: HostTree) -> None:
    as_interface: Tree = tree
    node = as_interface.root()
    assert node.qid().type == 0x80
    node.close()


def test_what_either_side_writes_the_other_reads(tmp_path: Path, root: HostNode) -> None:
    node, file = root.create(b"new", os.O_RDWR, 0o640, UID, GID)
    assert put(file, b"from the guest") == 14
    assert (tmp_path / "new").read_bytes() == b"from the guest"
    (tmp_path / "new").write_bytes(b"from the host!")
    assert get(file) == b"from the host!"
    assert stat.S_IMODE(node.stat().st_mode) == 0o640
    file.close()
    node.close()


def test_reads_and_writes_are_scattered_over_several_buffers(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    assert file.writev([memoryview(b"abc"), memoryview(b"defg")], 2) == 7
    parts = [bytearray(3), bytearray(4), bytearray(9)]
    assert file.readv([memoryview(part) for part in parts], 0) == 9
    assert bytes(b"".join(parts)[:9]) == b"\0\0abcdefg"
    file.fsync(datasync=True)
    file.fsync(datasync=False)
    file.close()
    node.close()


def test_modes_are_exact_whatever_the_umask(root: HostNode) -> None:
    old = os.umask(0o077)
    try:
        for name, mode in ((b"a", 0o666), (b"b", 0o777), (b"c", 0o4711), (b"d", 0)):
            node, file = root.create(name, os.O_RDWR, mode, NO_ID, NO_ID)
            assert stat.S_IMODE(node.stat().st_mode) == mode
            file.close()
            node.close()
            made = root.mkdir(b"dir-" + name, mode, NO_ID, NO_ID)
            assert stat.S_IMODE(made.stat().st_mode) == mode
            made.close()
    finally:
        os.umask(old)


@needs_root
def test_new_files_belong_to_whom_the_request_says(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o4755, 1234, 4321)
    made = [
        node,
        root.mkdir(b"d", 0o755, 1234, 4321),
        root.symlink(b"s", b"x", 1234, 4321),
        root.mknod(b"p", stat.S_IFIFO | 0o600, 0, 0, 1234, 4321),
        root.mknod(b"n", stat.S_IFCHR | 0o600, 1, 3, 1234, 4321),
    ]
    for one in made:
        got = one.stat()
        assert (got.st_uid, got.st_gid) == (1234, 4321)
        one.close()
    assert stat.S_IMODE(os.stat(file.fd or -1).st_mode) == 0o4755
    file.close()


def test_an_existing_file_is_opened_by_create_unless_it_must_be_new(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    put(file, b"kept")
    again, second = root.create(b"f", os.O_RDWR | os.O_CREAT, 0o600, UID, GID)
    assert again is node
    assert get(second) == b"kept"
    with refusal(errno.EEXIST):
        root.create(b"f", os.O_RDWR | os.O_EXCL, 0o600, UID, GID)
    for one in (file, second, node, again):
        one.close()


def test_an_unlinked_open_file_still_works(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    held = root.walk(b"f")
    root.unlink(b"f", 0)
    put(file, b"12345")
    held.setattr(SETATTR_SIZE | SETATTR_MODE, size=3, mode=0o400)
    got = held.stat()
    assert (got.st_size, got.st_nlink, stat.S_IMODE(got.st_mode)) == (3, 0, 0o400)
    assert get(file) == b"123"
    again = held.open(os.O_RDWR)  # opened after it lost its name, and against its mode
    put(again, b"9")
    assert get(file) == b"923"
    for one in (file, again, held, node):
        one.close()


def test_a_node_follows_its_file_through_a_rename_by_either_side(
    tmp_path: Path, root: HostNode
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "d").mkdir()
    node, directory = root.walk(b"a"), root.walk(b"d")
    root.rename(b"a", directory, b"b")
    assert node.stat().st_ino == (tmp_path / "d" / "b").stat().st_ino
    (tmp_path / "d" / "b").rename(tmp_path / "c")
    (tmp_path / "a").write_bytes(b"another")
    assert node.stat().st_size == 1
    node.close()
    directory.close()


def test_a_replaced_file_and_its_successor_are_two(root: HostNode) -> None:
    for name in (b"old", b"new"):
        made, file = root.create(name, os.O_RDWR, 0o600, UID, GID)
        put(file, name)
        file.close()
        made.close()
    old = root.walk(b"old")
    root.rename(b"new", root, b"old")
    new = root.walk(b"old")
    assert old.qid().path != new.qid().path
    for node, content in ((old, b"old"), (new, b"new")):
        file = node.open(os.O_RDONLY)
        assert get(file) == content
        file.close()
        node.close()


def test_hard_links_are_one_node(root: HostNode) -> None:
    node, file = root.create(b"a", os.O_RDWR, 0o600, UID, GID)
    root.link(b"b", node)
    other = root.walk(b"b")
    assert other is node
    assert node.stat().st_nlink == 2
    for one in (file, node, other):
        one.close()


def test_symlinks_are_never_followed(tmp_path: Path, root: HostNode) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_bytes(b"secret")
    outside.chmod(0o644)
    node = root.symlink(b"s", os.fsencode(outside), UID, GID)
    assert node.readlink() == os.fsencode(outside)
    for refused in (
        lambda: node.open(os.O_RDONLY),
        lambda: node.open(os.O_RDWR | os.O_TRUNC),
        lambda: node.walk(b"x"),
        lambda: root.create(b"s", os.O_RDWR, 0o600, UID, GID),
        lambda: node.setattr(SETATTR_MODE, mode=0o777),
        lambda: node.setattr(SETATTR_SIZE, size=0),
    ):
        with pytest.raises(OSError, match=r"."):
            refused()
    node.setattr(SETATTR_MTIME | SETATTR_MTIME_SET, mtime_ns=5)
    assert node.stat().st_mtime_ns == 5
    assert node.listxattr() == []
    assert outside.read_bytes() == b"secret"
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    assert outside.stat().st_mtime_ns != 5
    node.close()


@pytest.mark.parametrize("target", [b"x", b"../../..", b"/", b"a//b\n", b"\xff" * 300])
def test_symlinks_hold_any_content(root: HostNode, target: bytes) -> None:
    node = root.symlink(b"s", target, UID, GID)
    assert node.readlink() == target
    node.close()


def test_dot_dot_stops_at_the_root(tmp_path: Path, root: HostNode) -> None:
    up = root.walk(b"..")
    assert up is root
    up.close()
    (tmp_path / "d" / "e").mkdir(parents=True)
    d = root.walk(b"d")
    e = d.walk(b"e")
    (tmp_path / "d").rename(tmp_path.parent / f"{tmp_path.name}-moved-out")
    for _ in range(4):  # d lies outside now; the way up still ends at the root
        up = e.walk(b"..")
        e.close()
        e = up
    assert e is root
    e.close()
    d.close()


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"../x"])
def test_what_is_no_name_is_refused_everywhere(root: HostNode, name: bytes) -> None:
    for attempt in (
        lambda: root.create(name, os.O_RDWR, 0o600, UID, GID),
        lambda: root.mkdir(name, 0o700, UID, GID),
        lambda: root.symlink(name, b"x", UID, GID),
        lambda: root.mknod(name, stat.S_IFIFO, 0, 0, UID, GID),
        lambda: root.link(name, root),
        lambda: root.rename(name, root, b"x"),
        lambda: root.rename(b"x", root, name),
        lambda: root.unlink(name, 0),
        lambda: root.walk(name if name != b".." else b"./.."),
    ):
        with refusal(errno.EINVAL):
            attempt()


def test_names_are_bytes_of_any_kind(root: HostNode) -> None:
    names = [b"\n", b"\xff\xfe", b" ", b"-rf", b"\x7f\x01", b"x" * 255, "\u00e9".encode()]
    for name in names:
        node, file = root.create(name, os.O_RDWR, 0o600, UID, GID)
        file.close()
        node.close()
    assert sorted(entries(root)) == sorted(names)
    with refusal(errno.ENAMETOOLONG):
        root.mkdir(b"x" * 256, 0o700, UID, GID)


def test_special_files_are_made_and_looked_at_but_never_opened(root: HostNode) -> None:
    fifo = root.mknod(b"p", stat.S_IFIFO | 0o640, 0, 0, UID, GID)
    socket = root.mknod(b"s", stat.S_IFSOCK | 0o600, 0, 0, UID, GID)
    for node in (fifo, socket):
        with refusal(errno.EOPNOTSUPP):
            node.open(os.O_RDWR)
        node.setattr(SETATTR_MODE, mode=0o604)
        assert stat.S_IMODE(node.stat().st_mode) == 0o604
        node.close()


def test_a_host_that_swaps_symlinks_in_cannot_lead_a_walk_astray(
    tmp_path: Path, root: HostNode
) -> None:
    """What is walked to is a file below the root or a symlink, never a symlink's target."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"secret")
    inside = tmp_path / "d"
    inside.mkdir()
    (inside / "f").write_bytes(b"public")
    stop = threading.Event()

    def swap() -> None:
        while not stop.wait(0.0002):
            inside.rename(tmp_path / "d2")
            inside.symlink_to(outside)
            stop.wait(0.0002)
            inside.unlink()
            (tmp_path / "d2").rename(inside)

    thread = threading.Thread(target=swap)
    thread.start()
    opened = turned_away = 0
    try:
        while opened < 30 or turned_away < 30:
            try:
                d = root.walk(b"d")
            except FileNotFoundError:
                continue
            try:
                f = d.walk(b"f")
            except NotADirectoryError:
                turned_away += 1
                d.close()
                continue
            file = f.open(os.O_RDWR)
            assert get(file) == b"public"
            opened += 1
            for one in (file, f, d):
                one.close()
    finally:
        stop.set()
        thread.join()
    assert (outside / "f").read_bytes() == b"secret"


def test_attributes_change_together(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    put(file, b"12345")
    valid = SETATTR_MODE | SETATTR_UID | SETATTR_GID | SETATTR_SIZE
    valid |= SETATTR_ATIME | SETATTR_MTIME | SETATTR_ATIME_SET | SETATTR_MTIME_SET
    node.setattr(valid, 0o6755, UID, GID, 2, 111_222_333_444, 555_666_777_888)
    got = node.stat()
    assert stat.S_IMODE(got.st_mode) == 0o6755
    assert (got.st_size, got.st_atime_ns, got.st_mtime_ns) == (2, 111_222_333_444, 555_666_777_888)
    node.setattr(SETATTR_ATIME)  # now, and nothing else
    assert node.stat().st_mtime_ns == 555_666_777_888
    assert node.stat().st_atime_ns > 555_666_777_888
    file.close()
    node.close()


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_numbers_too_large_for_the_host_are_an_error_of_the_guest(
    root: HostNode, value: int
) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    for attempt in (
        lambda: put(file, b"x", value),
        lambda: get(file, 1, value),
        lambda: node.setattr(SETATTR_SIZE, size=value),
        lambda: node.setattr(SETATTR_MTIME | SETATTR_MTIME_SET, mtime_ns=value * 10**9),
        lambda: root.mknod(b"n", stat.S_IFCHR, value, value, UID, GID),
    ):
        with refusal(errno.EINVAL):
            attempt()
    file.close()
    node.close()


def test_extended_attributes_come_and_go(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    try:
        node.setxattr(b"user.a", b"1\0\xff", 0)
        assert node.listxattr() == [b"user.a"]
        assert node.getxattr(b"user.a") == b"1\0\xff"
        with refusal(errno.EEXIST):
            node.setxattr(b"user.a", b"", os.XATTR_CREATE)
        node.removexattr(b"user.a")
        with refusal(errno.ENODATA):
            node.getxattr(b"user.a")
        with refusal(errno.EINVAL):
            node.setxattr(b"user.\0", b"", 0)
    finally:
        file.close()
        node.close()


def test_directories_are_no_files_and_files_no_directories(root: HostNode) -> None:
    d = root.mkdir(b"d", 0o755, UID, GID)
    f, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    with refusal(errno.EISDIR):
        d.open(os.O_RDWR)
    with refusal(errno.EISDIR):
        root.unlink(b"d", 0)
    with refusal(errno.ENOTDIR):
        root.unlink(b"f", AT_REMOVEDIR)
    with refusal(errno.ENOTDIR):
        f.mkdir(b"x", 0o700, UID, GID)
    with refusal(errno.ENOTDIR):
        file.readdir(0)
    opened = d.open(os.O_RDONLY)
    with refusal(errno.EISDIR):
        get(opened)
    for one in (opened, d, file, f):
        one.close()


def test_a_large_directory_is_listed_once_and_whole_in_any_portions(
    tmp_path: Path, root: HostNode
) -> None:
    names = {b"%d" % number for number in range(10_000)}
    for name in names:
        os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT, 0o600))
    directory = root.open(os.O_RDONLY)
    cookie, seen = 0, []
    while True:
        portion = [entry for entry, _ in zip(directory.readdir(cookie), range(37), strict=False)]
        if not portion:
            break
        seen += [name for _, _, _, name in portion]
        cookie = portion[-1][1]
    assert sorted(seen) == sorted(names | {b".", b".."})
    directory.close()


def test_cookies_neither_skip_nor_repeat_what_stays(tmp_path: Path, root: HostNode) -> None:
    for number in range(500):
        (tmp_path / f"stay{number}").touch()
        (tmp_path / f"go{number}").touch()
    directory = root.open(os.O_RDONLY)
    seen: list[bytes] = []
    cookie = 0
    for step in range(200):
        portion = [entry for entry, _ in zip(directory.readdir(cookie), range(7), strict=False)]
        seen += [name for _, _, _, name in portion]
        if portion:
            cookie = portion[-1][1]
        (tmp_path / f"go{step}").unlink()
        (tmp_path / f"come{step}").touch()
    stayed = [name for name in seen if name.startswith(b"stay")]
    assert sorted(stayed) == sorted(b"stay%d" % number for number in range(500))
    assert len(seen) == len(set(seen))
    again = [entry[3] for entry in directory.readdir(0)]
    assert b"come0" in again
    assert b"go0" not in again
    directory.close()


def test_entries_carry_the_qid_a_walk_finds(tmp_path: Path, root: HostNode) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "s").symlink_to("x")
    directory = root.open(os.O_RDONLY)
    listed = {entry[3]: (entry[0].path, entry[0].type, entry[2]) for entry in directory.readdir(0)}
    for name, qid_type in ((b"f", 0), (b"d", 0x80), (b"s", 0x02)):
        node = root.walk(name)
        kind = stat.S_IFMT(node.stat().st_mode) >> 12
        assert listed[name] == (node.qid().path, qid_type, kind)
        node.close()
    directory.close()


def test_holes_and_sizes_past_four_gigabytes(root: HostNode) -> None:
    node, file = root.create(b"f", os.O_RDWR, 0o600, UID, GID)
    put(file, b"end", 5 << 30)
    got = node.stat()
    assert got.st_size == (5 << 30) + 3
    assert got.st_blocks < 1 << 20
    assert get(file, 5, (5 << 30) - 2) == b"\0\0end"
    file.close()
    node.close()


def test_appending_goes_to_the_end_wherever_that_is_now(tmp_path: Path, root: HostNode) -> None:
    (tmp_path / "log").write_bytes(b"one,")
    node = root.walk(b"log")
    file = node.open(os.O_WRONLY | os.O_APPEND)
    with (tmp_path / "log").open("ab") as host:
        host.write(b"two,")
    put(file, b"three", 0)
    assert (tmp_path / "log").read_bytes() == b"one,two,three"
    file.close()
    node.close()


def test_nodes_outlive_their_descriptors(tmp_path: Path) -> None:
    tree = HostTree(str(tmp_path))
    tree.descriptors.limit = 16
    root = tree.root()
    nodes = []
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"x" * number)
        nodes.append(root.walk(b"%d" % number))
    root.unlink(b"7", 0)
    root.rename(b"8", root, b"eight")
    for number in range(100, 200):
        (tmp_path / str(number)).write_bytes(b"")
        nodes.append(root.walk(b"%d" % number))
        assert len(tree.descriptors) <= 17
    assert [node.stat().st_size for node in nodes[:100]] == list(range(100))
    (tmp_path / "3").unlink()
    tree.descriptors.give_up_half()
    tree.descriptors.give_up_half()
    with pytest.raises(OSError, match=r"."):
        nodes[3].stat()
    for node in nodes:
        node.close()
    root.close()
    tree.close()


def test_a_process_out_of_descriptors_gets_an_error_and_goes_on(tmp_path: Path) -> None:
    import resource

    tree = HostTree(str(tmp_path))
    root = tree.root()
    for number in range(40):
        (tmp_path / str(number)).touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    nodes: list[Node] = []
    files: list[OpenFile] = []
    try:
        nodes = [root.walk(b"%d" % number) for number in range(40)]
        with refusal(errno.EMFILE):
            while True:
                files.append(nodes[0].open(os.O_RDONLY))
        files.pop().close()
        files.append(nodes[0].open(os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for file in files:
        file.close()
    for node in (*nodes, root):
        node.close()
    tree.close()


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(-2, 3), st.integers(0, 5), st.integers(0, 2**64 - 1)), unique=True
    )
)
def test_qid_paths_are_as_distinct_as_inodes(inodes: list[tuple[int, int, int]]) -> None:
    paths = qids.QidPaths()
    given_out = [paths.path(*inode) for inode in inodes]
    assert len(set(given_out)) == len(inodes)
    assert [paths.path(*inode) for inode in inodes] == given_out
    assert all(0 <= path < 1 << 64 for path in given_out)


@given(st.integers(), st.integers(), st.integers(0))
def test_qid_versions_are_never_zero(mtime: int, ctime: int, size: int) -> None:
    assert 0 < qids.version_of(mtime, ctime, size) < 1 << 32


def test_the_version_changes_with_the_file(tmp_path: Path, root: HostNode) -> None:
    (tmp_path / "f").write_bytes(b"1")
    node = root.walk(b"f")
    before = node.qid()
    os.utime(tmp_path / "f", ns=(1, 1))
    node.stat()
    assert node.qid().version != before.version
    assert node.qid().path == before.path
    node.close()
