"""EROFS images: made of host trees, read back by fsck.erofs, dump.erofs and a reader of our own."""

import errno
import io
import os
import re
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oci
from tests.erofs_reader import (
    CAPABILITY,
    Entry,
    Image,
    make_torture_tree,
    read_image,
    read_tree,
)
from tinyvmm.cli.main import main
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.tree import Node
from tinyvmm.fileserver.union import open_tree
from tinyvmm.images.erofs import format as erofs
from tinyvmm.images.erofs import image as image_module
from tinyvmm.images.erofs import sources
from tinyvmm.images.erofs.image import ErofsImage
from tinyvmm.images.erofs.plan import Plan
from tinyvmm.images.erofs.writer import write_image
from tinyvmm.images.oci.unpack import unpack

ROOT = os.geteuid() == 0


def fsck(image: Path) -> None:
    done = subprocess.run(["fsck.erofs", str(image)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("torture")
    make_torture_tree(top)
    return top


@pytest.fixture
def warnings() -> list[str]:
    return []


def reader(image: ErofsImage) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        """Ask for whole sectors, in pieces, as a driver does."""
        begin, end = offset // 512 * 512, -(-(offset + length) // 512) * 512
        room = bytearray(end - begin)
        half = len(room) // 1024 * 512
        image.read_into([memoryview(room)[:half], memoryview(room)[half:]], begin)
        return bytes(room[offset - begin : offset - begin + length])

    return read


@pytest.fixture
def lazily(warnings: list[str]) -> Iterator[Callable[[Sequence[tuple[str, str]]], Image]]:
    images = []

    def make(reads: Sequence[tuple[str, str]]) -> Image:
        images.append(ErofsImage(reads, warnings.append))
        return Image(reader(images[-1]))

    yield make
    for image in images:
        image.close()


# --- exactness --------------------------------------------------------------------------------


def test_an_image_in_a_file_is_the_tree_to_the_last_bit(torture: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    written = write_image([("/", str(torture))], str(image))
    assert read_image(image) == read_tree(torture)
    assert written.size == image.stat().st_size
    fsck(image)


def test_an_image_made_while_it_is_read_is_the_same_tree(
    torture: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image], warnings: list[str]
) -> None:
    found = lazily([("/", str(torture))]).tree()
    assert {path: entry for path, (_, entry) in found.items()} == read_tree(torture)
    assert warnings == []


@pytest.mark.skipif(not ROOT, reason="mounting is root's business")
def test_this_computers_kernel_finds_no_difference_either(torture: Path, tmp_path: Path) -> None:
    image, at = tmp_path / "image", tmp_path / "mnt"
    write_image([("/", str(torture))], str(image))
    at.mkdir()
    mount = ["mount", "-t", "erofs", "-o", "ro,loop", str(image), str(at)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no EROFS can be mounted here: {done.stderr[-200:]}")
    try:
        assert read_tree(at) == read_tree(torture)
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_a_directory_of_a_hundred_thousand_entries_has_each_once(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "many").mkdir(parents=True)
    wanted = {b"%05d" % number + b"x" * (number % 50) for number in range(100_000)}
    many = os.open(top / "many", os.O_RDONLY)
    for name in wanted:
        os.mknod(name, dir_fd=many)
    os.close(many)
    write_image([("/", str(top))], str(tmp_path / "image"))
    found = read_image(tmp_path / "image")
    assert {path.removeprefix(b"/many/") for path in found} == wanted | {b"", b"/many"}
    listed = subprocess.run(
        ["dump.erofs", "--path=/many/99999" + "x" * 49, str(tmp_path / "image")],
        capture_output=True,
        check=True,
    )
    assert b"regular file" in listed.stdout
    subprocess.run(["fsck.erofs", str(tmp_path / "image")], check=True, capture_output=True)


def test_names_of_one_file_lead_to_one_inode(torture: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    write_image([("/", str(torture))], str(image))
    data = image.read_bytes()
    tree = Image(lambda offset, length: data[offset : offset + length]).tree()
    names = (b"/plain", b"/linked", b"/directory/again")
    assert len({tree[name][0] for name in names}) == 1
    assert tree[b"/plain"][1].links == 3


def test_dump_erofs_sees_owner_mode_time_size_and_links(torture: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    write_image([("/", str(torture))], str(image))
    for name in ("plain", "bytes-4097", "directory", "symlink-3990", "sparse"):
        argv = ["dump.erofs", f"--path=/{name}", str(image)]
        env = {**os.environ, "TZ": "UTC"}
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
        told = done.stdout
        found = os.lstat(torture / name)
        when = datetime.fromtimestamp(found.st_mtime_ns // 10**9, tz=UTC)
        assert {
            "links": re.findall(r"Links: (\d+)", told),
            "owner": re.findall(r"Uid: (\d+)\s+Gid: (\d+)", told),
            "mode": re.findall(r"Access: (\d+)", told),
            "time": re.findall(r"Timestamp: (.+)", told),
        } == {
            "links": [str(found.st_nlink)],
            "owner": [(str(found.st_uid), str(found.st_gid))],
            "mode": [f"{found.st_mode & 0o777:04o}"],  # it tells no more of it
            "time": [f"{when:%Y-%m-%d %H:%M:%S}.{found.st_mtime_ns % 10**9:09}"],
        }
        if not stat.S_ISDIR(found.st_mode):
            assert re.findall(r"Size: (\d+)", told)[0] == str(found.st_size)


@pytest.mark.skipif(not ROOT, reason="fsck.erofs gives files to their owners")
def test_fsck_erofs_extracts_the_same_files(torture: Path, tmp_path: Path) -> None:
    image, out = tmp_path / "image", tmp_path / "out"
    write_image([("/", str(torture))], str(image))
    argv = ["fsck.erofs", f"--extract={out}", "--preserve", str(image)]
    subprocess.run(argv, capture_output=True, check=True)

    def taken_out(path: bytes, entry: Entry) -> tuple[object, ...]:
        """All but what it leaves behind: attributes, set-id bits, a link's owner and times."""
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFLNK:
            return path, kind, entry.content
        owner_and_mode = (entry.mode & 0o777, entry.uid, entry.gid)
        return path, kind, entry.rdev, entry.size, entry.content, owner_and_mode

    extracted = {taken_out(path, entry) for path, entry in read_tree(out).items()}
    assert extracted == {taken_out(path, entry) for path, entry in read_tree(torture).items()}


NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: not {b"/", b"\0"} & {bytes([byte]) for byte in name} and name not in {b".", b".."}
)
FILES = st.one_of(
    st.tuples(st.just("file"), st.binary(max_size=300), st.integers(1, 40)),
    st.tuples(st.just("symlink"), NAMES, st.integers(1, 200)),
)
TREES = st.recursive(
    st.dictionaries(NAMES, FILES, max_size=6),
    lambda trees: st.dictionaries(NAMES, st.one_of(FILES, trees), max_size=6),
    max_leaves=25,
)


def make_tree(top: bytes, tree: dict[bytes, object]) -> None:
    for name, what in tree.items():
        path = top + b"/" + name
        match what:
            case ("file", bytes(content), int(times)):
                Path(os.fsdecode(path)).write_bytes(content * times)
            case ("symlink", bytes(target), int(times)):
                os.symlink(target * times, path)
            case dict():
                os.mkdir(path)
                make_tree(path, what)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_any_tree_is_read_back_as_it_is(tree: dict[bytes, object]) -> None:
    with tempfile.TemporaryDirectory() as where:
        top, image = Path(where) / "top", Path(where) / "image"
        top.mkdir()
        make_tree(os.fsencode(top), tree)
        write_image([("/", str(top))], str(image))
        fsck(image)
        assert read_image(image) == read_tree(top)
        lazy = ErofsImage([("/", str(top))], pytest.fail)
        try:
            found = Image(reader(lazy)).tree()
        finally:
            lazy.close()
        assert {path: entry for path, (_, entry) in found.items()} == read_tree(top)


# --- the union --------------------------------------------------------------------------------


def read_union(reads: Sequence[tuple[str, str]]) -> dict[bytes, Entry]:
    """What the 9P root shows of it, from the file server's own nodes."""
    tree = open_tree(reads, [])
    found: dict[bytes, Entry] = {}

    def visit(path: bytes, node: Node) -> None:
        stat_ = node.stat()
        content = b""
        if stat.S_ISLNK(stat_.st_mode):
            content = node.readlink()
        elif stat.S_ISREG(stat_.st_mode):
            file = node.open(os.O_RDONLY)
            room = bytearray(stat_.st_size)
            file.readv([memoryview(room)], 0)
            file.close()
            content = bytes(room)
        else:
            file = node.open(os.O_RDONLY)
            names = [name for _, _, _, name in file.readdir(0)]
            file.close()
            for name in names:
                if name not in {b".", b".."}:
                    visit(path + b"/" + name, node.walk(name))
        xattrs = tuple(sorted((name, node.getxattr(name)) for name in node.listxattr()))
        mode, size = stat_.st_mode, 0 if stat.S_ISDIR(stat_.st_mode) else stat_.st_size
        who = (stat_.st_uid, stat_.st_gid)
        found[path] = Entry(mode, *who, 0, stat_.st_mtime_ns, 0, size, content, xattrs)
        node.close()

    visit(b"", tree.root())
    tree.close()
    return found


def same_union(reads: Sequence[tuple[str, str]], image: Image) -> set[bytes]:
    """Compare both, all but link counts and what has no time; the paths they have."""

    def plain(path: bytes, entry: Entry, content: bytes) -> Entry:
        when = 0 if path in made else entry.mtime_ns
        return entry._replace(links=0, mtime_ns=when, content=content)

    mapped = {os.fsencode(guest) for guest, _ in reads}
    expected = read_union(reads)
    found = {}
    made = {path for path in expected if not expected[path].mtime_ns or path not in mapped}
    made = {path for path in made if any(guest.startswith(path + b"/") for guest in mapped)}
    for path, (nid, entry) in image.tree().items():
        inode = image.inode(nid)
        content = b"" if stat.S_ISDIR(entry.mode) else b"".join(image.data(inode))
        found[path] = plain(path, entry, content)
    assert found == {path: plain(path, e, e.content) for path, e in expected.items()}
    return set(found)


@pytest.mark.skipif(not ROOT, reason="makes whiteouts")
def test_trees_are_united_as_the_9p_root_unites_them(
    tmp_path: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image]
) -> None:
    base, middle, top, data = (tmp_path / name for name in ("base", "middle", "top", "data"))
    for number, layer in enumerate((base, middle, top, data)):
        for name in ("both", "opaque", "cut", f"only{number}", "map"):
            (layer / name / "sub").mkdir(parents=True)
            (layer / name / "sub" / f"file{number}").write_text(str(number))
            (layer / name / "same").write_text(str(number))
    (base / "gone").mkdir()
    (base / "gone" / "file").touch()
    (base / "removed").touch()
    (base / "turned").mkdir()
    (base / "turned" / "file").touch()
    (top / "turned").write_text("a file now")
    for name in ("gone", "removed", "nothing"):
        os.mknod(middle / name, stat.S_IFCHR, os.makedev(0, 0))
    os.setxattr(top / "opaque", "trusted.overlay.opaque", b"y")
    os.setxattr(middle / "cut", "user.overlay.opaque", b"x")
    (middle / "cut" / "same").write_text("")
    os.setxattr(middle / "cut" / "same", "user.overlay.whiteout", b"y")
    (top / "cut" / "same").unlink()
    os.setxattr(top / "only2", "user.seen", b"yes")
    reads = [
        ("/", str(base)),
        ("/", str(middle)),
        ("/", str(top)),
        ("/map", str(data)),
        ("/new/place", str(data)),
        ("/both/sub/deep", str(data)),
    ]
    paths = same_union(reads, lazily(reads))
    assert b"/gone" not in paths
    assert b"/removed" not in paths
    assert b"/cut/same" not in paths
    assert b"/opaque/sub/file0" not in paths
    assert b"/both/sub/file0" in paths
    assert b"/new/place/only3/same" in paths


# --- a host that changes ----------------------------------------------------------------------


def test_what_is_kept_beside_the_files_of_layers_is_in_the_image(
    tmp_path: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image]
) -> None:
    """As an ordinary user unpacks layers: docs/images.md."""
    low, high = tmp_path / "low", tmp_path / "high"
    low.mkdir()
    high.mkdir()
    pax = {"SCHILY.xattr.security.capability": os.fsdecode(CAPABILITY)}
    base = [
        oci.directory("d", 0o2750, (5, 6)),
        oci.entry("d/f", b"data", mode=0o4711, owner=(1000, 1001), pax=pax),
        oci.symlink("d/link", "f", owner=(9, 10)),
        oci.symlink("plain", "d/f"),
        oci.entry("gone"),
    ]
    top = [oci.entry("d/g", owner=(70000, 1), mode=0o600), oci.entry(".wh.gone")]
    for path, entries in ((low, base), (high, top)):
        unpack(io.BytesIO(oci.tar_of(*entries)), str(path), pretend=True)
    reads = [("/", str(low)), ("/", str(high))]
    image = lazily(reads)
    assert same_union(reads, image) == {b""} | {
        *(b"/d", b"/d/f", b"/d/g", b"/d/link", b"/plain"),
    }
    entry = image.tree()[b"/d/f"][1]
    assert (entry.mode, entry.uid, entry.gid) == (stat.S_IFREG | 0o4711, 1000, 1001)
    assert entry.xattrs == ((b"security.capability", CAPABILITY),)


def test_a_device_that_only_stands_for_one_is_one_in_the_image(
    tmp_path: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image]
) -> None:
    null = oci.entry("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666, owner=(3, 4))
    unpack(io.BytesIO(oci.tar_of(null)), str(tmp_path), pretend=True)
    entry = lazily([("/", str(tmp_path))]).tree()[b"/null"][1]
    assert (entry.mode, entry.rdev) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (entry.uid, entry.gid) == (3, 4)


def find(image: Image, path: bytes) -> int:
    nid = image.root
    for name in path.split(b"/")[1:]:
        nid = {entry: to for entry, to, _ in image.directory(image.inode(nid))}[name]
    return int(nid)


def content(image: Image, path: bytes) -> bytes:
    return b"".join(image.data(image.inode(find(image, path))))


def replaced(path: Path) -> None:
    path.rename(path.with_name("old"))
    path.write_text("first")


def redirected(path: Path) -> None:
    path.rename(path.with_name("old"))
    path.symlink_to("old")


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": lambda path: path.write_text("other"),
    "cut": lambda path: os.truncate(path, 3),
    "replaced": replaced,
    "removed": Path.unlink,
    "redirected": redirected,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seen", [False, True], ids=["unread", "read"])
def test_a_file_that_changes_is_an_error_and_named(
    change: str,
    seen: bool,
    tmp_path: Path,
    lazily: Callable[[Sequence[tuple[str, str]]], Image],
    warnings: list[str],
) -> None:
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "file"
    path.write_text("first")
    (tmp_path / "other").write_text("untouched")
    image = lazily([("/", str(tmp_path))])
    inode = image.inode(find(image, b"/d/file"))
    if seen:
        assert content(image, b"/d/file") == b"first"
    CHANGES[change](path)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot be read"):
            b"".join(image.data(inode))
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert content(image, b"/other") == b"untouched"


@pytest.mark.parametrize("redirect", [False, True], ids=["renamed", "a symlink"])
def test_a_directory_is_the_one_it_was_or_none(
    redirect: bool,
    tmp_path: Path,
    lazily: Callable[[Sequence[tuple[str, str]]], Image],
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    monkeypatch.setattr(sources, "OPEN_MAX", 1)
    image = lazily([("/", str(tmp_path))])
    inodes = [image.inode(find(image, path)) for path in (b"/one/file", b"/two/file")]
    assert b"".join(image.data(inodes[1])) == b"two"
    (tmp_path / "one").rename(tmp_path / "moved")
    if redirect:
        (tmp_path / "one").symlink_to("moved")
    with pytest.raises(OSError, match="cannot be read"):
        b"".join(image.data(inodes[0]))
    assert len(warnings) == 1
    assert b"".join(image.data(inodes[1])) == b"two"


def test_what_goes_away_before_it_is_looked_at_is_no_file(
    tmp_path: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image], warnings: list[str]
) -> None:
    (tmp_path / "d").mkdir()
    for name in ("gone", "here"):
        (tmp_path / "d" / name).write_text(name)
    image = lazily([("/", str(tmp_path))])
    root = image.inode(image.root)  # which lists d
    (tmp_path / "d" / "gone").unlink()
    entries = {name: nid for name, nid, _ in image.directory(root)}
    entries = {name: nid for name, nid, _ in image.directory(image.inode(entries[b"d"]))}
    assert image.read(image.meta * 4096 + entries[b"gone"] * 32, 64) == bytes(64)
    assert content(image, b"/d/here") == b"here"
    assert warnings == []


def test_metadata_that_is_nowhere_yet_cannot_be_read(torture: Path) -> None:
    image = ErofsImage([("/", str(torture))], pytest.fail)
    with pytest.raises(OSError, match="not been planned"):
        image.read_into([memoryview(bytearray(4096))], 32 << 30)
    end = memoryview(bytearray(b"\1" * 8192))
    image.read_into([end[:4096], end[4096:]], image.size - 8192)
    assert bytes(end) == bytes(8192)
    with pytest.raises(OSError, match="beyond the end"):
        image.read_into([end[:4096], end[4096:]], image.size - 4096)
    with pytest.raises(OSError, match="Read-only"):
        image.write_from([memoryview(b"x" * 512)], 0)
    image.close()


def test_a_file_of_a_terabyte_is_read_at_once(
    tmp_path: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image]
) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"here")
    image = lazily([("/", str(tmp_path))])
    inode = image.inode(find(image, b"/large"))
    assert inode.entry.size == 1 << 40
    assert image.read(inode.block * 4096 + (1 << 39), 5) == b"here\0"


def test_files_beyond_what_an_image_can_hold_are_errors(
    tmp_path: Path, lazily: Callable[[Sequence[tuple[str, str]]], Image], warnings: list[str]
) -> None:
    for number in range(3):
        with (tmp_path / f"large{number}").open("wb") as file:
            file.truncate(8 << 40)
    (tmp_path / "small").write_text("small")
    image = lazily([("/", str(tmp_path))])
    inodes = [image.inode(find(image, b"/large%d" % number)) for number in range(3)]
    assert [inode.entry.size for inode in inodes] == [8 << 40] * 3
    assert sum(inode.block >= (1 << 32) - 1 for inode in inodes) == 2
    assert len(warnings) == 2
    assert "16 TiB" in warnings[0]
    assert content(image, b"/small") == b"small"


def test_a_directory_beyond_what_an_image_can_hold_is_an_error(
    tmp_path: Path,
    lazily: Callable[[Sequence[tuple[str, str]]], Image],
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = image_module._DATA_BLOCK + 2
    monkeypatch.setattr(image_module, "_LAST_BLOCK", end)
    (tmp_path / "large").mkdir()
    for number in range(400):
        (tmp_path / "large" / f"{number:0100}").touch()
    (tmp_path / "small").write_text("small")
    image = lazily([("/", str(tmp_path))])
    assert image.inode(find(image, b"/large")).block == end
    assert [line.partition(":")[0] for line in warnings] == [str(tmp_path / "large")]
    assert content(image, b"/small") == b"small"


@pytest.mark.parametrize(
    ("blocks", "why"), [(20, "large0 .*: more than 16 TiB"), (31, "has 16 TiB")]
)
def test_what_fits_into_no_image_is_refused_in_one_line(
    blocks: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of blocks for data, or behind those for metadata."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "large0").write_bytes(bytes(30 * 4096))
    monkeypatch.setattr(image_module, "_LAST_BLOCK", blocks)
    with pytest.raises(ConfigError, match=why) as refused:
        write_image([("/", str(tree))], str(tmp_path / "image"))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
    monkeypatch.undo()
    write_image([("/", str(tree))], str(tmp_path / "image"))


# --- the layout -------------------------------------------------------------------------------


def test_attributes_that_erofs_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"system\.nfs4_acl"):
        erofs.xattr_body([(b"system.nfs4_acl", b"")])
    with pytest.raises(ValueError, match=r"user\.large"):
        erofs.xattr_body([(b"user.large", bytes(65536))])
    assert erofs.xattr_body([]) == b""


def test_the_checksum_is_crc32c() -> None:
    block = erofs.superblock(root_nid=2, inodes=1, blocks=9, meta_block=1, uuid=bytes(16))
    assert len(block) == erofs.BLOCK
    assert erofs.crc32c(b"123456789") ^ 0xFFFF_FFFF == 0xE306_9283  # RFC 3720's polynomial


# --- the command ------------------------------------------------------------------------------


def test_image_build_writes_an_image_and_says_what_is_in_it(
    torture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "x.erofs"
    assert main(["image", "build", str(torture), "-o", str(image), "--name", "torture"]) == 0
    inodes = len({(os.lstat(path).st_ino) for path in (torture, *torture.rglob("*"))})
    assert f"{inodes} inodes, {image.stat().st_size} bytes" in capsys.readouterr().out
    fsck(image)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere", "-o", "x"], "/nowhere"),
        ([".", "-o", "/nowhere/x"], "cannot write /nowhere/x"),
        ([".", "-o", "x", "--name", "n" * 17], "17 bytes"),
    ],
)
def test_image_build_refuses_in_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["image", "build", *arguments]) == 125
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_a_tree_that_changes_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, image = tmp_path / "top", tmp_path / "image"
    top.mkdir()
    (top / "file").write_text("first")
    image.write_text("the old one")

    plan_all = Plan.plan_all

    def after(self: Plan) -> None:
        plan_all(self)
        (top / "file").write_text("second")

    monkeypatch.setattr(Plan, "plan_all", after)
    with pytest.raises(ConfigError, match="changed"):
        write_image([("/", str(top))], str(image))
    assert image.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "top"]


def test_a_directory_that_is_gone_when_its_attributes_are_read_is_an_error_of_its_own(
    lazily: Callable[[Sequence[tuple[str, str]]], Image],
    warnings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a file system that asks another computer for them."""
    top = tmp_path / "top"
    (top / "gone").mkdir(parents=True)
    (top / "neighbour").write_text("n")
    listxattr = os.listxattr
    status = (top / "gone").stat()

    def listed(path: bytes, *, follow_symlinks: bool = True) -> list[str]:
        if follow_symlinks and os.path.samestat(os.stat(path), status):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return listxattr(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "listxattr", listed)
    image = lazily([("/", str(top))])
    nids = {name: nid for name, nid, _ in image.directory(image.inode(image.root))}
    assert list(image.data(image.inode(nids[b"neighbour"]))) == [b"n"]
    assert image.inode(nids[b"gone"]).block == image.blocks  # beyond: EIO
    assert warnings == []  # what is gone nobody misses, unless all is to be there
    with pytest.raises(ConfigError, match="gone into the image: No such file"):
        write_image([("/", str(top))], str(tmp_path / "image"))
