"""Planning ahead of the guest: what it finds, when it stops, and what it keeps to itself."""

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.erofs_reader import Image, make_torture_tree, read_tree
from tests.test_erofs import content, find, reader
from tests.test_stalled_fuse import StallingFuse, fuse
from tests.waiting import wait_for
from tinyvmm.fileserver.stalling import waiting_places
from tinyvmm.images.erofs import ahead, plan
from tinyvmm.images.erofs.image import ErofsImage
from tinyvmm.images.erofs.plan import Plan

__all__ = ["fuse"]
Open = Callable[[Path], ErofsImage]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def opened(warnings: list[str]) -> Iterator[Open]:
    images = []

    def make(top: Path) -> ErofsImage:
        images.append(ErofsImage([("/", str(top))], warnings.append))
        return images[-1]

    yield make
    for image in images:
        image.close()


def names_in(top: Path) -> int:
    return 1 + sum(len(names) + len(files) for _, names, files in os.walk(top))


def make_directories(top: Path, depth: int) -> None:
    for name in ("a", "b", "c"):
        (top / name).mkdir()
        (top / name / "file").write_text(name)
        if depth > 1:
            make_directories(top / name, depth - 1)


def test_a_tree_is_planned_before_anybody_reads_it(tmp_path: Path, opened: Open) -> None:
    make_directories(tmp_path, 4)
    image = opened(tmp_path)
    assert image.plan.inodes == 1
    image.plan_ahead()
    wait_for(lambda: image.plan.inodes == names_in(tmp_path))
    assert {path: entry for path, (_, entry) in Image(reader(image)).tree().items()} == read_tree(
        tmp_path
    )
    assert image.plan.planned == 0


def test_who_reads_meanwhile_reads_the_same_tree(
    tmp_path: Path, opened: Open, warnings: list[str]
) -> None:
    make_torture_tree(tmp_path)
    make_directories(tmp_path, 4)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        image = opened(tmp_path)
        image.plan_ahead()
        found = Image(reader(image)).tree()
    finally:
        sys.setswitchinterval(before)
    assert {path: entry for path, (_, entry) in found.items()} == read_tree(tmp_path)
    assert warnings == []


def test_of_a_large_tree_it_plans_a_part_and_more_where_somebody_reads(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_directories(tmp_path, 5)
    monkeypatch.setattr(ahead, "AT_FIRST", 20)
    monkeypatch.setattr(ahead, "EACH_TIME", 20)
    unasked = []
    plan_one = Plan.plan_one

    def counted(self: Plan, left_out: frozenset[tuple[int, int]], *, newest: bool) -> bool:
        found = plan_one(self, left_out, newest=newest)
        if found:
            unasked.append(self.inodes)
        return found

    monkeypatch.setattr(Plan, "plan_one", counted)
    image = opened(tmp_path)
    image.plan_ahead()
    wait_for(lambda: image.plan.inodes > 20)
    assert image.plan.inodes < 40
    before = len(unasked)
    assert content(Image(reader(image)), b"/b/b/b/b/b/file") == b"b"
    assert image.plan.planned > 0
    wait_for(lambda: len(unasked) > before)
    assert image.plan.inodes < names_in(tmp_path)


def test_a_directory_of_many_names_waits_for_who_reads_it(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_SOON_MAX", 50)
    for name, count in (("few", 40), ("many", 60)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / str(number)).touch()
    image = opened(tmp_path)
    image.plan_ahead()
    wait_for(lambda: image.plan.inodes >= 43)
    image.close()
    assert image.plan.inodes == 43


def test_what_is_found_ahead_is_told_when_somebody_comes_there(
    tmp_path: Path, opened: Open, warnings: list[str]
) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for number in range(3):
        with (tmp_path / "deep" / "deeper" / f"large{number}").open("wb") as file:
            file.truncate(8 << 40)
    image = opened(tmp_path)
    image.plan_ahead()
    wait_for(lambda: image.plan.inodes == 6)
    assert warnings == []
    read = Image(reader(image))
    find(read, b"/deep/deeper/large0")
    assert [line.split(":")[0] for line in warnings] == [
        str(tmp_path / "deep" / "deeper" / f"large{number}") for number in (1, 2)
    ]
    find(read, b"/deep/deeper/large1")
    assert len(warnings) == 2


@pytest.mark.parametrize("unasked", [False, True])
def test_what_fails_once_is_no_empty_directory_for_ever(
    unasked: bool, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_directories(tmp_path, 2)
    failed = threading.Event()
    attributes = Plan._directory_xattrs

    def fail(self: Plan, layers: Sequence[int]) -> bytes:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "for a moment")
        return attributes(self, layers)

    image = opened(tmp_path)
    monkeypatch.setattr(Plan, "_directory_xattrs", fail)
    read = Image(reader(image))
    if unasked:
        image.plan_ahead()
        assert failed.wait(30)
    else:
        with pytest.raises(OSError, match="for a moment"):
            find(read, b"/c/c")
    assert content(read, b"/c/c/file") == b"c"


def test_where_looking_may_stall_nobody_looks_unasked(
    fuse: StallingFuse, tmp_path: Path, opened: Open
) -> None:
    (tmp_path / "beside" / "more").mkdir(parents=True)
    st = fuse.where.parent.stat()
    assert (st.st_dev, st.st_ino) in waiting_places()
    image = opened(tmp_path)
    image.plan_ahead()
    wait_for(lambda: image.plan.inodes >= 4)  # /, /beside, /beside/more, /tree
    time.sleep(0.05)
    assert image.plan.inodes == 4
