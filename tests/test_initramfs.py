"""An archive says what was put into it, to a parser written from the specification and to cpio."""

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.guest.initramfs import Archive

needs_cpio = pytest.mark.skipif(not shutil.which("cpio"), reason="cpio is not installed")


class Entry(NamedTuple):
    mode: int
    data: bytes
    device: tuple[int, int]
    inode: int


def parse(archive: bytes) -> list[tuple[str, Entry]]:
    """Every entry before the last trailer, as buffer-format.rst describes them."""
    entries, at = [], 0
    while at < len(archive):
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[i : i + 8], 16) for i in range(at + 6, at + 110, 8)]
        ino, mode, uid, gid, nlink, mtime, size, _, _, major, minor, name_len, check = fields
        assert (uid, gid, mtime, check) == (0, 0, 0, 0)
        name = os.fsdecode(archive[at + 110 : at + 110 + name_len - 1])
        assert archive[at + 110 + name_len - 1] == 0
        start = -(-(at + 110 + name_len) // 4) * 4
        at = -(-(start + size) // 4) * 4
        if name == "TRAILER!!!":
            assert size == 0
            continue
        assert nlink == (2 if stat.S_ISDIR(mode) else 1)
        entries.append((name, Entry(mode, archive[start : start + size], (major, minor), ino)))
    assert at == len(archive)
    return entries


names = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=()), min_size=1, max_size=30
).filter(lambda name: name not in {".", "..", "TRAILER!!!"} and encodable(name))


def encodable(name: str) -> bool:
    try:
        return os.fsdecode(os.fsencode(name)) == name
    except UnicodeEncodeError:
        return False


@given(st.dictionaries(names, st.binary(max_size=50)), st.integers(0, 0o7777))
def test_files_come_back_with_name_mode_and_content(files: dict[str, bytes], mode: int) -> None:
    archive = Archive()
    for name, data in files.items():
        archive.add_file(name, data, mode)
    entries = parse(archive.finish())
    assert [(name, entry.data) for name, entry in entries] == list(files.items())
    assert all(entry.mode == stat.S_IFREG | mode for _, entry in entries)
    assert len({entry.inode for _, entry in entries}) == len(files)


@given(st.lists(st.lists(names, min_size=1, max_size=4), max_size=5))
def test_every_directory_comes_once_and_before_what_is_in_it(paths: list[list[str]]) -> None:
    archive = Archive()
    for path in paths:
        archive.add_directory("/".join(path))
    seen: set[str] = set()
    for name, _ in parse(archive.finish()):
        assert name not in seen
        assert not os.path.dirname(name) or os.path.dirname(name) in seen
        seen.add(name)
    assert seen >= {"/".join(path) for path in paths}


def test_the_directories_of_a_file_a_link_and_a_device_are_made() -> None:
    archive = Archive().add_file("/a/b/file", b"1").add_symlink("c/link", "../a")
    archive.add_device("/dev/console", stat.S_IFCHR | 0o600, 5, 1)
    entries = dict(parse(archive.finish()))
    assert list(entries) == ["a", "a/b", "a/b/file", "c", "c/link", "dev", "dev/console"]
    assert entries["c/link"][:2] == (stat.S_IFLNK | 0o777, b"../a")
    assert entries["dev/console"][:3] == (stat.S_IFCHR | 0o600, b"", (5, 1))


def test_archives_can_follow_each_other_and_an_archive_can_be_continued() -> None:
    first = Archive().add_file("one", b"1")
    both = first.finish() + Archive().add_file("two", b"22").finish()
    assert [name for name, _ in parse(both)] == ["one", "two"]
    first.add_file("three", b"333")
    assert [name for name, _ in parse(first.finish())] == ["one", "three"]


def test_equal_content_gives_equal_bytes() -> None:
    def make() -> bytes:
        return Archive().add_directory("d").add_file("d/f", b"x").finish()

    assert make() == make()


@pytest.mark.parametrize("name", ["", "/", "TRAILER!!!", "a\0b"])
def test_a_name_no_entry_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Archive().add_file(name, b"")


def test_a_device_needs_a_device_mode() -> None:
    with pytest.raises(ValueError, match="S_IFCHR"):
        Archive().add_device("dev/null", 0o666, 1, 3)


@needs_cpio
def test_cpio_lists_and_unpacks_it(tmp_path: Path) -> None:
    archive = Archive().add_file("bin/run", os.urandom(4097), 0o755).add_symlink("init", "bin/run")
    archive.add_directory("empty", 0o700).add_device("dev/null", stat.S_IFCHR | 0o666, 1, 3)
    archive.add_file("odd", b"123")
    data = archive.finish()
    listing = subprocess.run(["cpio", "-itv"], input=data, check=True, capture_output=True).stdout
    lines = [line.split() for line in listing.decode().splitlines()]
    assert [(line[0], " ".join(line[9 if line[0][0] == "c" else 8 :])) for line in lines] == [
        ("drwxr-xr-x", "bin"),
        ("-rwxr-xr-x", "bin/run"),
        ("lrwxrwxrwx", "init -> bin/run"),
        ("drwx------", "empty"),
        ("drwxr-xr-x", "dev"),
        ("crw-rw-rw-", "dev/null"),
        ("-rw-r--r--", "odd"),
    ]
    unpack = ["cpio", "-id", "--quiet", "--no-preserve-owner", "bin*", "init", "odd"]
    subprocess.run(unpack, input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "init").read_bytes() == dict(parse(data))["bin/run"].data
    assert (tmp_path / "odd").read_bytes() == b"123"
