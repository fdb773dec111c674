"""Trees in and out of a guest, and what a hostile one can do to whoever copies from it: nothing."""

import errno
import gc
import io
import itertools
import json
import os
import socket
import stat
import struct
import subprocess
import tarfile
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calls_here import MachineHere, ended, start
from tinyvmm import tree_tar
from tinyvmm.cli.main import main
from tinyvmm.errors import ConfigError
from tinyvmm.guest import abi
from tinyvmm.guest.calls import REQUEST
from tinyvmm.inside import guest_calls
from tinyvmm.inside.guest_calls import STAT, Answer, Call, Guest, openat, parse_stat
from tinyvmm.inside.guest_files import DEPTH_MAX, put, walk
from tinyvmm.inside.guest_processes import processes
from tinyvmm.inside.guest_writes import uppers
from tinyvmm.tree_entries import Entry, save, walk_host

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="owners are root's business")


@pytest.fixture
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    process, sock = start(tmp_path_factory.mktemp("calls"))
    with Guest(sock, timeout=60) as guest:
        yield guest
    assert ended(process)


def make_tree(top: Path) -> Path:
    """One of everything."""
    top.mkdir(parents=True)
    (top / "empty").touch()
    (top / "file").write_bytes(os.urandom(300_000))
    (top / "file").chmod(0o640)
    os.setxattr(top / "file", "user.word", b"a\0b")
    os.utime(top / "file", ns=(1_500_000_000_123_456_789, 1_400_000_000_987_654_321))
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 26)
        file.seek(1 << 25)
        file.write(b"in the middle")
    (top / "link").symlink_to("/nowhere/at all")
    os.link(top / "file", top / "same")
    os.mkfifo(top / "fifo", 0o600)
    deep = top / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "ümläut\n\udcff").write_text("x")
    (top / "a" / "b").chmod(0o1750)
    os.utime(top / "a", ns=(1, 2))
    for number in range(50):
        (deep / str(number)).write_text(str(number))
    if os.geteuid() == 0:
        os.chown(top / "file", 1234, 2345)
        os.chown(top / "link", 1, 2, follow_symlinks=False)
    return top


def describe(top: Path) -> dict[str, Any]:
    """What a tree is, for comparison."""
    found = {}
    inodes: dict[int, str] = {}
    for path in sorted([top, *top.rglob("*")]):
        name, status = str(path.relative_to(top)), path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        facts = [status.st_mode, status.st_uid, status.st_gid]
        if kind != stat.S_IFIFO:
            facts.append(status.st_mtime_ns)
        first = inodes.setdefault(status.st_ino, name)
        content: object = None
        if kind == stat.S_IFREG and status.st_size < 1 << 20:
            content = path.read_bytes(), os.listxattr(path)
        elif kind == stat.S_IFREG:
            subject = subprocess.run(["sha256sum", path], capture_output=True, check=True)
            content = subject.stdout.split()[0], status.st_blocks < 1000
        elif kind == stat.S_IFLNK:
            content = os.readlink(path)
        found[name] = (*facts, first, content)
    return found


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_a_tree_goes_in_and_comes_out_the_same(guest: Guest, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    put(guest, walk_host(str(tree)), str(tmp_path / "inside"))
    assert describe(tmp_path / "inside") == describe(tree)
    save(walk(guest, str(tmp_path / "inside")), str(tmp_path / "out"), no_warning)
    assert describe(tmp_path / "out") == describe(tree)
    # Once more over what is there: files are replaced, directories are not.
    (tmp_path / "out" / "file").write_text("other")
    (tmp_path / "out" / "more").write_text("stays")
    save(walk(guest, str(tmp_path / "inside")), str(tmp_path / "out"), no_warning)
    put(guest, walk_host(str(tree)), str(tmp_path / "inside"))
    assert (tmp_path / "out" / "more").read_text() == "stays"
    assert (tmp_path / "out" / "file").read_bytes() == (tree / "file").read_bytes()
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".tinyvmm")]


def test_an_archive_is_what_tar_reads_and_writes(guest: Guest, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    with (tree / "sparse").open("wb") as file:
        file.truncate(5_000_000)
    made = io.BytesIO()
    tree_tar.write(walk(guest, str(tree)), "tree", made)
    (tmp_path / "by-tar").mkdir()
    extract = ["tar", "--extract", "--same-permissions", "--same-owner", "--xattrs"]
    subprocess.run(extract, input=made.getvalue(), cwd=tmp_path / "by-tar", check=True)
    ours, theirs = describe(tree), describe(tmp_path / "by-tar" / "tree")
    assert theirs.keys() == ours.keys()
    for name in ("file", "link", "a", "a/b", "a/b/c/7"):
        assert theirs[name][:4] == ours[name][:4], name
        assert theirs[name][-1] == ours[name][-1], name
    archive = subprocess.run(
        ["tar", "--create", "--xattrs", "--format=pax", "--gzip", "tree"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout
    (tmp_path / "inside").mkdir()
    put(guest, tree_tar.read(io.BytesIO(archive)), str(tmp_path / "inside"))
    ours = describe(tree)
    theirs = describe(tmp_path / "inside" / "tree")
    ours.pop("sparse"), theirs.pop("sparse")  # its hole is written out
    assert theirs == ours


@pytest.mark.parametrize("name", ["../x", "a/../../x"])
def test_an_archive_that_leads_out_of_itself_is_refused(name: str) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ConfigError, match="leads out"):
        list(tree_tar.read(io.BytesIO(made.getvalue())))
    with pytest.raises(ConfigError, match="tar archive"):
        list(tree_tar.read(io.BytesIO(b"no archive at all" * 100)))


@settings(deadline=None, max_examples=200)
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["path", "linkpath", "size", "uid", "mtime", "atime", "hdrcharset", "GNU.sparse.map"]
        ),
        st.sampled_from(["nan", "1e999999999", "-inf", "-1", "1.5", "a\0b", "../x", "9" * 30, "x"]),
    ),
    kind=st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]),
    damage=st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=3),
    end=st.integers(0, 1 << 14),
)
def test_whatever_is_in_an_archive_it_is_read_or_a_config_error(
    headers: dict[str, str], kind: bytes, damage: list[tuple[int, int]], end: int
) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.pax_headers = kind, "c", headers
            member.size = 600 * (kind == tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(bytes(600)))
    data = bytearray(made.getvalue()[:end])
    for where, value in damage:
        if where < len(data):
            data[where] = value
    with suppress(ConfigError):
        for entry in tree_tar.read(io.BytesIO(data)):
            assert "\0" not in entry.target.join(entry.path)
            for offset, piece in islice(entry.pieces(), 3):
                assert offset + len(piece) <= 1200


def test_a_guest_that_is_full_says_so(guest: Guest, tmp_path: Path) -> None:
    tree = Entry((), stat.S_IFREG | 0o644, 0, 0, 5, 0, 0, pieces=lambda: iter([(0, b"12345")]))
    with pytest.raises(ConfigError, match="cannot make /dev/full/x: Not a directory"):
        put(guest, [tree], "/dev/full/x")

    class Full:
        def each(self, calls: Iterable[Call]) -> Iterator[Answer]:
            for call in calls:
                short = REQUEST.unpack(call.request)[0] == abi.SYS_PWRITE64
                yield Answer(3 if short else 0, b"", call.what)

        def all(self, calls: Iterable[Call]) -> list[Answer]:
            return [Answer(-errno.ENOENT, b"", call.what) for call in calls]

    with pytest.raises(ConfigError, match="No space left"):
        put(cast("Guest", Full()), [tree], str(tmp_path / "x"))


# --- what a hostile guest may say ---------------------------------------------------------------
def file(*path: str, **more: Any) -> Entry:
    return Entry(path, stat.S_IFREG | 0o644, 0, 0, 0, 0, 0)._replace(**more)


def directory(*path: str, mode: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | mode, 0, 0, 0, 0, 0)


def link(target: str, *path: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, 0, 0, 0, 0, 0, target=target)


@pytest.mark.parametrize(
    "entries",
    [
        [directory(), file("..", "escaped")],
        [directory(), file("a/../../escaped")],
        [directory(), file("..")],
        [directory(), file("")],
        [directory(), file("a\0b")],
        [directory(), file("missing", "file")],
        [file("first")],
        [directory(), directory()],
        # A link, and then what is behind it.
        [directory(), link("../outside", "d"), directory("d"), file("d", "escaped")],
        [directory(), link("../outside", "d"), file("d", "escaped")],
        [directory(), link("../outside/there", "f"), file("x", link=("f", "y"))],
        [directory(), directory("d"), file("x", link=("..", "outside", "there"))],
        [directory(), file("x", link=("link-that-was-there", "there"))],
        [directory(), directory("link-that-was-there"), file("link-that-was-there", "escaped")],
        # Numbers that there cannot be.
        [directory(), file("x", size=1 << 62)],
        [directory(), file("x", mtime_ns=1 << 100)],
    ],
)
def test_nothing_leaves_the_tree(entries: list[Entry], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "there").write_text("as it was")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link-that-was-there").symlink_to(outside)
    with pytest.raises(ConfigError):
        save(entries, str(tmp_path / "top"), no_warning)
    assert os.listdir(outside) == ["there"]
    assert (outside / "there").read_text() == "as it was"
    assert (outside / "there").lstat().st_nlink == 1
    assert sorted(os.listdir(tmp_path)) == ["outside", "top"]
    assert not [name for name in os.listdir(tmp_path / "top") if name.startswith(".tinyvmm")]


def test_rights_and_devices_do_not_come_out(tmp_path: Path) -> None:
    told: list[str] = []
    entries = [
        directory(mode=0o6755),
        file("suid", mode=stat.S_IFREG | 0o6755, xattrs={"security.capability": b"x"}),
        file("disk", mode=stat.S_IFBLK | 0o666, rdev=os.makedev(8, 0)),
        file("mem", mode=stat.S_IFCHR | 0o666, rdev=os.makedev(1, 1)),
    ]
    save(entries, str(tmp_path / "top"), told.append)
    assert stat.S_IMODE((tmp_path / "top").lstat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "top" / "suid").lstat().st_mode) == 0o755
    assert os.listxattr(tmp_path / "top" / "suid") == []
    assert os.listdir(tmp_path / "top") == ["suid"]
    assert len(told) == 2


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="something else"):
        save([file()], str(tmp_path / "fifo"), no_warning)
    (tmp_path / "dir").mkdir()
    with pytest.raises(ConfigError, match="something else"):
        save([file()], str(tmp_path / "dir"), no_warning)
    with pytest.raises(ConfigError, match=r"File exists|Not a directory"):
        save([directory()], str(tmp_path / "fifo"), no_warning)


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")

    def pieces() -> Iterator[tuple[int, bytes]]:
        yield 0, b"new"
        raise ConfigError("the guest hung up")

    with pytest.raises(ConfigError, match="hung up"):
        save([file(size=6, pieces=pieces)], str(tmp_path / "old"), no_warning)
    assert (tmp_path / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


class Invented:
    """A guest that answers each call as `answer` does: by its number, and what it asks for."""

    def __init__(self, answer: Callable[[int, Call], tuple[int, bytes]]) -> None:
        self.answer = answer

    def each(self, calls: Iterable[Call]) -> Iterator[Answer]:
        for call in calls:
            yield Answer(*self.answer(REQUEST.unpack(call.request)[0], call), call.what)

    def all(self, calls: Iterable[Call]) -> list[Answer]:
        return list(self.each(calls))

    def do(self, call: Call) -> Answer:
        return self.all([call])[0].check()


def status(mode: int, size: int = 0, blocks: int = 0) -> bytes:
    return STAT.pack(1, 1, 1, mode, 0, 0, 0, size, 4096, blocks, *[0] * 6)


def dirent(name: bytes) -> bytes:
    return struct.pack("<QqHB", 1, 1, 20 + len(name), 4) + name + b"\0"


def test_a_tree_without_end_is_given_up() -> None:
    """Each directory holds another, or one holds ever more names."""
    asked = 0

    def deep(number: int, _call: Call) -> tuple[int, bytes]:
        nonlocal asked
        if number == abi.SYS_GETDENTS64:
            asked += 1
            return (24, dirent(b"down")) if asked % 2 else (0, b"")
        return (0, status(stat.S_IFDIR)) if number == abi.SYS_NEWFSTATAT else (0, b"")

    with pytest.raises(ConfigError, match=f"more than {DEPTH_MAX} levels"):
        list(walk(cast("Guest", Invented(deep)), "/"))

    def wide(number: int, _call: Call) -> tuple[int, bytes]:
        nonlocal asked
        if number == abi.SYS_GETDENTS64:
            asked += 1
            return 1, b"".join(dirent(b"%d" % (asked * 4000 + n)) for n in range(4000))
        return (0, status(stat.S_IFDIR)) if number == abi.SYS_NEWFSTATAT else (0, b"")

    with pytest.raises(ConfigError, match="given up"):
        list(walk(cast("Guest", Invented(wide)), "/"))


def peak_of(tree: Iterator[Entry]) -> int:
    """Go through a tree, keeping nothing: the bytes that took at most."""
    gc.collect()
    tracemalloc.start()
    try:
        deque(tree, maxlen=0)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_names_deep_down_are_held_once() -> None:
    """Not with the path of each, which is a list of all that is above."""
    depth, count = 150, 5_000
    shown: deque[list[bytes]] = deque([[dirent(b"down")], []] * depth)
    shown.append([dirent(b"%d" % number) for number in range(count)])
    inodes = itertools.count(1)

    def answer(number: int, call: Call) -> tuple[int, bytes]:
        if number == abi.SYS_GETDENTS64:
            batch = shown.popleft() if shown else []
            return len(batch), b"".join(batch)
        if number != abi.SYS_NEWFSTATAT:
            return 0, b""
        kind = stat.S_IFDIR if call.what.endswith(("down", "/top")) else stat.S_IFREG
        return 0, STAT.pack(1, next(inodes), 2, kind, *[0] * 12)

    tree = walk(cast("Guest", Invented(answer)), "/top")
    assert peak_of(tree) < 3 << 20
    assert next(inodes) > depth + count


def test_many_names_of_this_computer_deep_down_are_held_once(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 150)
    deep.mkdir(parents=True)
    for number in range(5_000):
        (deep / str(number)).touch()
    assert peak_of(walk_host(str(tmp_path))) < 3 << 20


@pytest.mark.parametrize(
    "names", [dirent(b".") + dirent(b".."), dirent(b"a") * 4000], ids=["none", "same"]
)
def test_a_directory_that_has_no_end_is_given_up(
    names: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of names that are left out, or the same ones again and again."""
    monkeypatch.setattr(guest_calls, "ENTRIES_MAX", 10_000)
    asked = 0

    def answer(number: int, _call: Call) -> tuple[int, bytes]:
        nonlocal asked
        if number == abi.SYS_GETDENTS64:
            asked += 1
            assert asked < 20_000, "it goes on for ever"
            return 1, names
        return (0, status(stat.S_IFDIR)) if number == abi.SYS_NEWFSTATAT else (0, b"")

    guest = cast("Guest", Invented(answer))
    for look in (lambda: list(walk(guest, "/")), lambda: processes(guest), lambda: uppers(guest)):
        asked = 0
        with pytest.raises(ConfigError, match="given up"):
            look()


@pytest.mark.parametrize(
    ("passwd", "numbers"),
    [(b"x:x:" + b"9" * 5000 + b":\n", b"1"), (b"", b"9" * 400)],
    ids=["uid", "time"],
)
def test_numbers_beyond_all_measure_are_none(passwd: bytes, numbers: bytes) -> None:
    """Python makes no number of more than 4300 digits, and no float of one of 400."""
    answers = {"/etc/passwd": passwd, "/proc/7/stat": b"7 (x) S 1" + (b" " + numbers) * 30}
    name, times = "", 0

    def answer(number: int, call: Call) -> tuple[int, bytes]:
        nonlocal name, times
        if number == abi.SYS_OPENAT:
            name, times = call.what, 0
        times += 1
        if number == abi.SYS_GETDENTS64:
            return 1, dirent(b"7") if times == 2 else b""
        if number == abi.SYS_NEWFSTATAT:
            return 0, status(stat.S_IFDIR)
        return 0, answers.get(name, b"") if number == abi.SYS_READ and times == 2 else b""

    guest = cast("Guest", Invented(answer))
    if passwd:
        assert [(p.pid, p.user) for p in processes(guest)] == [(7, "0")]
    else:
        with pytest.raises(ConfigError, match="/proc/7/stat is none"):
            processes(guest)


def test_a_stat_that_no_kernel_gives_is_refused() -> None:
    good = list(STAT.unpack(status(stat.S_IFREG)))
    assert parse_stat(STAT.pack(*good)).size == 0
    for index, value in ((4, 0xFFFF_FFFF), (5, 0xFFFF_FFFF), (6, 1 << 32), (7, -1), (11, 10**9)):
        bad = good.copy()
        bad[index] = value
        with pytest.raises(ConfigError, match="no struct stat"):
            parse_stat(STAT.pack(*bad))


def test_an_archive_holds_what_a_record_can_name() -> None:
    names = ("user.a", "user.\udcff", "user.b=c", "user.ü")
    entry = file("f", xattrs=dict.fromkeys(names, b"\xff"))
    out = io.BytesIO()
    tree_tar.write([directory(), entry], "top", out)
    out.seek(0)
    found = [e.xattrs for e in tree_tar.read(out)][-1]
    assert found == {"user.a": b"\xff", "user.ü": b"\xff"}


@pytest.mark.usefixtures("machine")
def test_a_name_does_nothing_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dir").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dir/\x1b[2J\x9b1m"))
        assert main(["cp", f"web:{tmp_path}/dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        "tinyvmm: \\x1b[2J\\x9b1m is a device or a socket: left out\n"
    )
    assert main(["cp", "web:/none\x1b[2J", str(tmp_path / "out")]) == 125
    assert "\x1b" not in capsys.readouterr().err


def test_a_file_is_no_longer_than_it_said(tmp_path: Path) -> None:
    def answer(number: int, call: Call) -> tuple[int, bytes]:
        if number == abi.SYS_NEWFSTATAT:
            return 0, status(stat.S_IFREG, size=300_000, blocks=1000)
        return (call.out_max, b"x" * call.out_max) if number == abi.SYS_PREAD64 else (0, b"")

    save(walk(cast("Guest", Invented(answer)), "/f"), str(tmp_path / "f"), no_warning)
    assert (tmp_path / "f").stat().st_size == 300_000

    def short(number: int, _call: Call) -> tuple[int, bytes]:
        if number == abi.SYS_NEWFSTATAT:
            return 0, status(stat.S_IFREG, size=1 << 40, blocks=1 << 40)
        return (1, b"x") if number == abi.SYS_PREAD64 else (0, b"")

    save(walk(cast("Guest", Invented(short)), "/f"), str(tmp_path / "f"), no_warning)
    assert (tmp_path / "f").stat().st_size == 1 << 40

    def no_extent(number: int, _call: Call) -> tuple[int, bytes]:
        return (0, status(stat.S_IFREG, size=100)) if number == abi.SYS_NEWFSTATAT else (0, b"")

    with pytest.raises(ConfigError, match="no extent"):
        save(walk(cast("Guest", Invented(no_extent)), "/f"), str(tmp_path / "f"), no_warning)


# --- tinyvmm cp and top ------------------------------------------------------------------------
@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineHere]:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    machine = MachineHere(tmp_path / "run")
    yield machine
    machine.close()


@pytest.mark.usefixtures("machine")
def test_where_a_copy_goes_is_as_with_podman(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("one")
    where = f"web:{inside}"
    for source, dest, made in [
        ("d/f", f"{where}/new", "new"),
        ("d/f", f"{where}", "f"),
        ("d/f", f"{where}/", "f"),
        ("d", f"{where}/e", "e/f"),
        ("d", f"{where}/e", "e/d/f"),
        ("d/.", f"{where}/g", "g/f"),
        ("d/.", f"{where}/e/d", "e/d/f"),
        ("d/", f"{where}", "d/f"),
    ]:
        assert main(["cp", source, dest]) == 0
        assert (inside / made).read_text() == "one", (source, dest)
    assert main(["cp", f"{where}/e", "out"]) == 0
    assert (tmp_path / "out" / "d" / "f").read_text() == "one"
    assert main(["cp", f"{where}/e/.", "out"]) == 0
    assert not (tmp_path / "out" / "e").exists()
    assert main(["cp", f"{where}/e", "out"]) == 0
    assert (tmp_path / "out" / "e" / "f").exists()
    assert main(["cp", "web:/proc/self/status", "status"]) == 0
    assert (
        "Name:\tcalls" in (tmp_path / "status").read_text()
        or "program" in (tmp_path / "status").read_text()
    )
    capsys.readouterr()
    for source, dest, says in [
        ("d/f", f"{where}/none/", "no directory that is there"),
        ("d/f", f"{where}/none/x", "No such file"),
        ("d", f"{where}/f", "is a file"),
        ("nothing", where, "there is no nothing"),
        (f"{where}/nothing", "x", "cannot read"),
        (f"{where}/f", "none/x", "cannot write to none"),
        (f"{where}/e", "d/f", "is a file"),
        ("d", "e", "neither"),
        (where, where, "both"),
        ("web:", "e", "NAME:PATH"),
        ("d", "db:/x", "no machine is named db"),
        (f"{where}/f", "/dev/null", "something else"),
    ]:
        assert main(["cp", source, dest]) == 125, (source, dest)
        told = capsys.readouterr().err
        assert says in told, told
        assert told.count("\n") == 1


@pytest.mark.usefixtures("machine")
def test_top_lists_the_guests_processes(capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen(["sleep", "1234"])
    try:
        assert main(["top", "--json", "web"]) == 0
        found = {entry["pid"]: entry for entry in json.loads(capsys.readouterr().out)}
        ours = found[process.pid]
        assert (ours["command"], ours["ppid"], ours["uid"]) == (
            "sleep 1234",
            os.getpid(),
            os.getuid(),
        )
        us = found[os.getpid()]
        assert us["cpu_time"] == pytest.approx(sum(os.times()[:2]), abs=1)
        with Path("/proc/self/statm").open() as statm:
            pages = int(statm.read().split()[1])
        assert us["resident"] == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.2)
        assert main(["top", "web"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["PID", "PPID", "USER", "S", "TIME", "RESIDENT", "COMMAND"]
        assert any("sleep 1234" in line for line in lines)
    finally:
        process.kill()
        process.wait()


def test_a_link_at_the_end_of_a_path_is_not_followed_by_open(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="link"):
        guest.do(openat(str(tmp_path / "link"), os.O_RDONLY | os.O_NOFOLLOW))
