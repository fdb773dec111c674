"""A layer becomes a tree: what entries mean, and that none leads out of it or fills our memory."""

import gzip
import io
import os
import resource
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oci import Entry, directory, entry, hard_link, symlink, tar_of
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.tree import Node, Tree
from tinyvmm.fileserver.union import open_tree
from tinyvmm.fileserver.written import list_changes
from tinyvmm.images.layer import write_layer
from tinyvmm.images.oci import unpack as unpacking
from tinyvmm.images.oci.tree_writer import LayerError
from tinyvmm.images.oci.unpack import Unpacked, open_compressed, unpack

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root gives files away")
both = pytest.mark.parametrize("pretend", [pytest.param(False, marks=needs_root), True])
MIB = 1 << 20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


def put(tree: Path, *entries: Entry, pretend: bool | None = None) -> Unpacked:
    return unpack(io.BytesIO(tar_of(*entries)), str(tree), pretend=pretend)


def find(root: Tree, path: str) -> Node:
    node = root.root()
    for name in path.split("/"):
        inner = node.walk(os.fsencode(name))
        node.close()
        node = inner
    return node


@contextmanager
def union(*paths: Path) -> Iterator[Tree]:
    tree = open_tree([("/", str(path)) for path in paths], [])
    try:
        yield tree
    finally:
        tree.close()


def seen(tree: Tree, path: str) -> os.stat_result:
    node = find(tree, path)
    try:
        return node.stat()
    finally:
        node.close()


def names(tree: Tree, path: str = "") -> dict[bytes, int]:
    """The entries of a directory, and their DT_* types."""
    node = find(tree, path) if path else tree.root()
    try:
        listing = node.open(os.O_RDONLY)
        try:
            return {e[3]: e[2] for e in listing.readdir(0) if e[3] not in {b".", b".."}}
        finally:
            listing.close()
    finally:
        node.close()


# --- what entries mean ----------------------------------------------------------------------------


@both
def test_owners_modes_times_and_kinds_are_the_layers_in_the_guest(
    tree: Path, pretend: bool
) -> None:
    put(
        tree,
        directory("d", 0o2750, (5, 6)),
        entry("d/f", b"data", mode=0o4711, owner=(1000, 1001)),
        entry("d/secret", b"x", mode=0, owner=(7, 8)),
        symlink("d/link", "f", owner=(9, 10)),
        symlink("d/plain", "f"),
        entry("d/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666, owner=(0, 6)),
        entry("d/disk", kind=tarfile.BLKTYPE, device=(8, 1), mode=0o660),
        entry("d/fifo", kind=tarfile.FIFOTYPE, mode=0o600, owner=(1, 1)),
        pretend=pretend,
    )
    with union(tree) as guest:
        found = {
            name: seen(guest, name)
            for name in ("d", "d/f", "d/secret", "d/link", "d/plain", "d/null", "d/disk", "d/fifo")
        }
        assert {n: (stat.S_IFMT(s.st_mode), s.st_uid, s.st_gid) for n, s in found.items()} == {
            "d": (stat.S_IFDIR, 5, 6),
            "d/f": (stat.S_IFREG, 1000, 1001),
            "d/secret": (stat.S_IFREG, 7, 8),
            "d/link": (stat.S_IFLNK, 9, 10),
            "d/plain": (stat.S_IFLNK, 0, 0),
            "d/null": (stat.S_IFCHR, 0, 6),
            "d/disk": (stat.S_IFBLK, 0, 0),
            "d/fifo": (stat.S_IFIFO, 1, 1),
        }
        assert stat.S_IMODE(found["d"].st_mode) == 0o2750
        assert stat.S_IMODE(found["d/f"].st_mode) == 0o4711
        assert stat.S_IMODE(found["d/secret"].st_mode) == 0
        assert found["d/null"].st_rdev == os.makedev(1, 3)
        assert found["d/disk"].st_rdev == os.makedev(8, 1)
        assert {s.st_mtime_ns for s in found.values()} == {10**18}
        link = find(guest, "d/link")
        assert link.readlink() == b"f"
        link.close()
        types = {name: dtype << 12 for name, dtype in names(guest, "d").items()}
        assert types == {
            n.encode()[2:]: stat.S_IFMT(s.st_mode) for n, s in found.items() if n != "d"
        }


def test_what_is_only_pretended_does_no_harm_on_the_host(tree: Path) -> None:
    put(
        tree,
        entry("su", b"#!/bin/sh", mode=0o6755),
        entry("disk", kind=tarfile.BLKTYPE, device=(8, 0), mode=0o666),
        pretend=True,
    )
    assert stat.S_IMODE((tree / "su").stat().st_mode) == 0o755
    assert stat.S_ISREG((tree / "disk").lstat().st_mode)
    assert (tree / "su").stat().st_uid == os.geteuid()


@both
def test_a_pretended_tree_is_copied_up_as_what_it_is(
    tree: Path, tmp_path: Path, pretend: bool
) -> None:
    put(
        tree,
        entry("f", b"data", mode=0o640, owner=(0, 0) if not ROOT else (12, 34)),
        symlink("l", "target", owner=(0, 0) if not ROOT else (5, 5)),
        pretend=pretend,
    )
    upper = tmp_path / "upper"
    upper.mkdir()
    union = open_tree([("/", str(tree))], [("/", str(upper))])
    try:
        node = find(union, "f")
        node.setattr(0x20, mtime_ns=5)  # SETATTR_MTIME: now
        assert stat.S_IMODE(node.stat().st_mode) == 0o640
        assert (node.stat().st_uid, node.stat().st_gid) == ((12, 34) if ROOT else (0, 0))
        node.close()
        link = find(union, "l")
        link.setattr(0x20, mtime_ns=5)
        assert link.readlink() == b"target"
        assert link.stat().st_uid == (5 if ROOT else 0)
        link.close()
    finally:
        union.close()
    assert os.readlink(upper / "l") == "target"


@both
def test_extended_attributes_come_and_ours_are_nobodys_to_give(tree: Path, pretend: bool) -> None:
    pax = {
        "SCHILY.xattr.user.note": "a=b\nc",
        "SCHILY.xattr.security.capability": os.fsdecode(
            bytes.fromhex("0100000200040000000000000000000000000000")
        ),
        "SCHILY.xattr.user.overlay.whiteout": "y",
        "SCHILY.xattr.user.containers.override_stat": "0:0:4755",
        "SCHILY.xattr.user.tinyvmm.xattr.security.x": "y",
    }
    put(tree, entry("f", owner=(3, 3), mode=0o600, pax=pax), pretend=pretend)
    with union(tree) as guest:
        node = find(guest, "f")
        assert node.getxattr(b"user.note") == b"a=b\nc"
        assert node.getxattr(b"security.capability")[0] == 1
        assert sorted(node.listxattr()) == [b"security.capability", b"user.note"]
        assert (node.stat().st_uid, stat.S_IMODE(node.stat().st_mode)) == (3, 0o600)
        node.close()


def test_hard_links_are_one_file(tree: Path) -> None:
    put(tree, entry("a", b"1"), symlink("s", "a"), hard_link("d/b", "a"), hard_link("t", "/s"))
    assert (tree / "a").stat().st_ino == (tree / "d/b").stat().st_ino
    assert os.readlink(tree / "t") == "a"
    assert (tree / "s").lstat().st_nlink == 2


def test_whiteouts_and_opaque_directories_hide_what_is_below_and_nothing_beside(
    tmp_path: Path,
) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    low.mkdir()
    high.mkdir()
    put(
        low,
        entry("gone"),
        entry("kept"),
        entry("dir/old"),
        entry("opaque/old"),
        entry("whole/old"),
        entry("replaced/old"),
        entry("again/old"),
        entry(".wh..wh.plnk/1"),
    )
    put(
        high,
        entry(".wh.gone"),
        entry("dir/.wh.old"),
        entry("dir/new"),
        entry("opaque/.wh..wh..opq"),
        entry("opaque/new"),
        entry(".wh.whole"),
        entry("again/new"),
        entry(".wh.again"),  # of what this layer has made: only what is below goes
        entry(".wh.replaced"),
        entry("replaced/new"),  # and the other way round
        entry(".wh..wh.aufs"),
    )
    with union(low, high) as guest:
        assert set(names(guest)) == {b"kept", b"dir", b"opaque", b"again", b"replaced"}
        for path in ("dir", "opaque", "again", "replaced"):
            assert set(names(guest, path)) == {b"new"}, path


def test_of_entries_with_one_name_the_last_counts(tree: Path) -> None:
    put(
        tree,
        entry("a", b"first"),
        entry("a", b"second"),
        directory("b"),
        entry("b/c/d"),
        entry("b", b"now a file"),
        symlink("e", "/etc"),
        directory("e"),
        entry("e/passwd", b"ours"),
        directory("f", 0o700),
        entry("f/x"),
        directory("f", 0o711),
    )
    assert (tree / "a").read_bytes() == b"second"
    assert (tree / "b").read_bytes() == b"now a file"
    assert not (tree / "e").is_symlink()
    assert (tree / "e/passwd").read_bytes() == b"ours"
    assert (tree / "f/x").exists()
    with union(tree) as guest:
        assert stat.S_IMODE(seen(guest, "f").st_mode) == 0o711


def test_directories_keep_their_times_though_they_are_filled_later(tree: Path) -> None:
    put(tree, directory("d"), entry("d/f"), directory("d/e"), entry("d/e/g"))
    assert (tree / "d").stat().st_mtime_ns == (tree / "d/e").stat().st_mtime_ns == 10**18


def test_times_are_kept_to_the_nanosecond(tree: Path) -> None:
    put(tree, entry("f", pax={"mtime": "1234567890.123456789"}), entry("g", pax={"mtime": "-1.5"}))
    assert (tree / "f").stat().st_mtime_ns == 1234567890123456789
    assert (tree / "g").stat().st_mtime_ns == -1_500_000_000


@given(
    st.lists(
        st.binary(min_size=1, max_size=20).filter(
            lambda n: not set(b"/\0") & set(n) and n not in {b".", b".."} and n[:4] != b".wh."
        ),
        unique=True,
        max_size=8,
    )
)
@settings(max_examples=30, deadline=None)
def test_names_of_any_bytes_arrive(given_names: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        put(Path(path), *[entry(name, name) for name in given_names])
        assert set(os.listdir(os.fsencode(path))) == set(given_names)


def test_the_end_may_lack_its_padding_but_nothing_before_it_may_be_broken(tree: Path) -> None:
    """Umoci leaves out what follows the last file's data."""
    tar = tar_of(entry("a", b"first"), entry("b", b"last"))
    done = unpack(io.BytesIO(tar[: 512 * 3 + 4]), str(tree))
    assert (done.size, (tree / "b").read_bytes()) == (9, b"last")
    for broken in (
        tar[: 512 * 3 + 3],  # a byte of data is missing
        tar[: 512 * 2 + 100],  # the second header is cut
        tar[:1024] + b"x" * 512 + tar[1024:],  # or none
    ):
        with pytest.raises(LayerError):
            unpack(io.BytesIO(broken), str(tree))


def test_gnu_tar_and_our_reader_agree_on_sparse_files(tree: Path, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(20 * MIB)
        file.seek(7 * MIB)
        file.write(b"middle")
    for form in ("gnu", "pax"):
        tar = tmp_path / f"{form}.tar"
        command = ["tar", "-C", str(tmp_path), "-cSf", str(tar), f"--format={form}", "sparse"]
        subprocess.run(command, check=True)
        with tar.open("rb") as stream:
            unpack(stream, str(tree))
        assert (tree / "sparse").read_bytes() == source.read_bytes()
        assert (tree / "sparse").stat().st_blocks * 512 < MIB


# --- what is meant to do harm ---------------------------------------------------------------------

OUTSIDE = "outside"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("../outside", b"x")], r"\.\."),
        ([entry("a/../../outside", b"x")], r"\.\."),
        ([symlink("l", ".."), entry("l/outside", b"x")], "no directory"),
        ([symlink("l", "/tmp"), entry("l/x/y", b"x")], "no directory"),
        ([directory("d"), symlink("d/l", "../.."), directory("d/l/x")], "no directory"),
        ([symlink("l", ".."), hard_link("h", "l/secret")], "no file of the layer"),
        ([hard_link("h", "../secret")], r"\.\."),
        ([hard_link("h", "/etc/passwd")], "no file of the layer"),
        ([hard_link("h", "h")], "no file of the layer"),
        ([directory("d"), hard_link("h", "d")], "no file of the layer"),
        ([entry("f"), entry(".wh.x"), hard_link("h", ".wh.x")], "whiteout"),
        ([entry("f"), entry("f/x")], "no directory"),
        ([entry(".wh...")], "hides no name"),
        ([entry(".wh..")], "hides no name"),
        ([entry(".wh.")], "hides no name"),
        ([symlink("l", ".."), entry("l/.wh.secret")], "no directory"),
        ([symlink("l", ".."), entry("l/.wh..wh..opq")], "no directory"),
        ([entry("/", b"x")], "root"),
        ([entry("/".join("d" * 300))], "deeper"),
        ([entry("n" * 256)], "name"),
        ([symlink("l", "")], "target"),
        ([entry("x", kind=b"Z")], "unknown type"),
        ([entry("x", owner=(1 << 32, 0))], "no user"),
        ([entry("x", owner=(-2, 0))], "no user"),
        ([entry("x", pax={"size": "99999999999999999999"})], "many"),
    ],
)
@both
def test_what_leads_out_is_refused_in_one_line_and_changes_nothing_outside(
    tmp_path: Path, entries: list[Entry], words: str, pretend: bool
) -> None:
    tree = tmp_path / "in" / "tree"
    tree.mkdir(parents=True)
    secret = tmp_path / "in" / "secret"
    secret.write_text("secret")
    with pytest.raises(LayerError, match=words) as told:
        put(tree, *entries, pretend=pretend)
    assert "\n" not in str(told.value)
    assert set(os.listdir(tmp_path / "in")) == {"tree", "secret"}
    assert secret.read_text() == "secret"
    assert secret.stat().st_nlink == 1


@both
def test_absolute_names_are_below_the_root(tree: Path, pretend: bool) -> None:
    put(tree, entry("/etc/tinyvmm-test", b"x"), entry("//a/./b", b"y"), pretend=pretend)
    assert (tree / "etc/tinyvmm-test").read_bytes() == b"x"
    assert (tree / "a/b").read_bytes() == b"y"
    assert not Path("/etc/tinyvmm-test").exists()


def test_a_symlink_out_is_the_guests_business(tree: Path) -> None:
    put(tree, symlink("l", "/etc/passwd"), entry("l", b"a file now"))
    assert (tree / "l").read_bytes() == b"a file now"
    assert not (tree / "l").is_symlink()


def test_ten_gigabytes_of_zeros_take_no_room(tree: Path) -> None:
    """As gzip has them, in 10 MB. A hundredth of that here, for the time it takes."""
    blob = io.BytesIO(gzip.compress(tar_of(entry("zeros", bytes(100 * MIB)))))
    assert len(blob.getvalue()) < MIB
    assert unpack(open_compressed(blob), str(tree)).size == 100 * MIB
    assert (tree / "zeros").stat().st_size == 100 * MIB
    assert (tree / "zeros").stat().st_blocks * 512 < MIB


def test_a_sparse_file_of_a_terabyte_is_made_at_once_and_takes_no_room(
    tree: Path, tmp_path: Path
) -> None:
    source = tmp_path / "huge"
    with source.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"middle")
    tar = tmp_path / "huge.tar"
    subprocess.run(["tar", "-C", str(tmp_path), "-cSf", str(tar), "huge"], check=True)
    with tar.open("rb") as stream:
        unpack(stream, str(tree))
    assert (tree / "huge").stat().st_size == 1 << 40
    assert (tree / "huge").stat().st_blocks * 512 < MIB


def test_what_claims_more_than_there_may_be_is_refused_before_it_is_read(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "LAYER_MAX", MIB)
    huge = tarfile.TarInfo("huge")
    huge.size = 10 << 30
    with pytest.raises(LayerError, match="claims 10737418240 bytes"):
        unpack(io.BytesIO(huge.tobuf()), str(tree))
    with pytest.raises(LayerError, match="more than"):
        put(tree, entry("a", bytes(700_000)), entry("b", bytes(700_000)))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_header_that_claims_gigabytes_does_not_fill_our_memory(tree: Path, kind: bytes) -> None:
    class Endless:
        def __init__(self, head: bytes) -> None:
            self.head = head
            self.given = 0

        def read(self, size: int) -> bytes:
            data, self.head = self.head[:size], self.head[size:]
            self.given += size
            return data or b"9" * size

        def close(self) -> None:
            """Nothing is open."""

    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 7 << 30
    stream = Endless(info.tobuf(format=tarfile.GNU_FORMAT))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LayerError, match="header of more than"):
        unpack(stream, str(tree))
    assert stream.given < 10 * MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_bytes_a_layer_has_it_is_unpacked_or_refused(data: st.DataObject) -> None:
    import tempfile

    good = bytearray(
        tar_of(
            directory("d"),
            entry("d/f", b"data", pax={"SCHILY.xattr.user.a": "b", "path": "d/long"}),
            symlink("d/s", "f"),
            hard_link("d/h", "d/long"),
            entry("d/.wh.x"),
        )
    )
    places = st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255))
    for where, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        good[where] = value
    # Most damage is found out by the header's checksum: make it right again.
    for start in range(0, len(good), 512):
        block = good[start : start + 512]
        if data.draw(st.booleans()) and any(block):
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            good[start + 148 : start + 156] = b"%06o\0 " % total
    with tempfile.TemporaryDirectory() as path:
        inside = os.path.join(path, "tree")
        os.mkdir(inside)
        with suppress(ConfigError, OSError):  # the point: nothing else
            unpack(io.BytesIO(bytes(good)), inside)
        assert os.listdir(path) == ["tree"]


def test_descriptors_are_closed_whatever_happens(tree: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LayerError):
        put(tree, entry("a/b/c/d"), entry("../x"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_without_attributes_is_named_with_a_remedy(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(ConfigError, match="set XDG_DATA_HOME"):
        put(tree, pretend=True)


# --- and back -------------------------------------------------------------------------------------


def test_what_commit_makes_of_a_tree_unpacks_as_that_tree(tmp_path: Path, tree: Path) -> None:
    put(
        tree,
        directory("d", 0o1777, (3, 4)),
        entry("d/f", b"data" * 1000, mode=0o4755, owner=(1, 2)),
        entry(b"d/n\xe9\xff", b"", pax={"SCHILY.xattr.user.a": "\udcff"}),
        hard_link("g", "d/f"),
        *([symlink("s", "d/f")] if ROOT else []),  # whose owner a write tree cannot note down
        entry("d/.wh.gone"),
        entry("o/.wh..wh..opq"),
    )
    below = tmp_path / "below"
    (below / "d").mkdir(parents=True)
    (below / "d/gone").touch()

    def written(path: Path) -> bytes:
        made = tmp_path / "layer.tar"
        write_layer(list_changes([("/", str(below))], [("/", str(path))]), str(made), print)
        return made.read_bytes()

    first = written(tree)
    again = tmp_path / "again"
    again.mkdir()
    unpack(io.BytesIO(first), str(again))
    assert written(again) == first
    with tarfile.open(fileobj=io.BytesIO(first), errors="surrogateescape") as tar:
        found = {member.name: member for member in tar}
    assert {"d/.wh.gone", "o/.wh..wh..opq"} <= set(found)
    assert (found["d/f"].uid, found["d/f"].mode) == (1, 0o4755)
