"""The examples' devices, tried without a guest; tests/linux shows them to Linux."""

import errno
import json
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.build_manifest import manifest
from examples.crc_device import CrcDevice
from examples.dice_port import Dice
from examples.failing_root import Failing
from examples.pattern_rng import FILL_MAX, PatternRng
from examples.write_diff import write_diff
from tests.test_session import connect
from tests.virtio_driver import NEEDS_RESET, Driver
from tinyvmm import Access, ninep
from tinyvmm.fileserver.union import open_tree
from tinyvmm.fileserver.watched import WatchedTree

ID, DATA, CRC, RESET, COUNT = 0x00, 0x04, 0x08, 0x0C, 0x10


@given(st.lists(st.binary(min_size=4, max_size=4), max_size=20))
def test_the_crc_device_computes_what_zlib_does(words: list[bytes]) -> None:
    device = CrcDevice()
    device.write(DATA, 4, 1)
    device.write(RESET, 4, 0)
    for word in words:
        device.write(DATA, 4, int.from_bytes(word, "little"))
    assert device.read(CRC, 4) == zlib.crc32(b"".join(words))
    assert device.read(COUNT, 4) == 4 * len(words)


def test_the_crc_device_saved_between_two_words_goes_on_elsewhere() -> None:
    device, other = CrcDevice(), CrcDevice()
    device.write(DATA, 4, 0x1234)
    other.load(json.loads(json.dumps(device.save())))
    other.write(DATA, 4, 0x5678)
    assert other.read(CRC, 4) == zlib.crc32(b"\x34\x12\0\0\x78\x56\0\0")


def test_the_crc_device_answers_other_widths_with_all_ones() -> None:
    device = CrcDevice()
    for offset, size in ((ID, 1), (CRC, 8), (DATA, 4), (0x14, 4), (0xFFF, 1)):
        assert device.read(offset, size) == (1 << 8 * size) - 1
        device.write(offset, size, 7) if (offset, size) != (DATA, 4) else None
    assert device.read(ID, 4).to_bytes(4, "little") == b"CRC1"
    assert device.read(COUNT, 4) == 0


@given(sides=st.integers(1, 255), seed=st.integers(0, 255))
def test_dice_have_their_sides_and_fall_alike_from_one_beginning(sides: int, seed: int) -> None:
    dice, again = Dice(sides), Dice(sides, seed=99)
    for die in (dice, again):
        die.write(0, 1, seed)
    throws = [dice.read(0, 1) for _ in range(20)]
    assert set(throws) <= set(range(1, sides + 1))
    again.load(json.loads(json.dumps(again.save())))
    assert throws == [again.read(0, 1) for _ in range(20)]


def test_every_side_of_a_die_comes_up_and_one_without_sides_is_refused() -> None:
    die = Dice()
    assert {die.read(0, 1) for _ in range(200)} == {1, 2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match="0 sides"):
        Dice(0)


@given(rooms=st.lists(st.integers(1, 3000), min_size=1, max_size=5), text=st.text(min_size=1))
def test_the_pattern_is_the_text_again_and_again(rooms: list[int], text: str) -> None:
    driver = Driver(PatternRng(text))
    queue = driver.start()[0]
    queue.send([], rooms)
    (data,) = queue.collect()
    length = min(sum(rooms), FILL_MAX)
    assert data == (text.encode() * length)[:length]
    assert not driver.status & NEEDS_RESET


def test_a_pattern_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        PatternRng("")


def test_a_failing_disk_refuses_what_it_is_to_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "read").mkdir()
    (tmp_path / "read" / "bad").write_bytes(b"words")
    (tmp_path / "read" / "good").write_bytes(b"words")
    (tmp_path / "write").mkdir()
    inner = open_tree([("/", str(tmp_path / "read"))], [("/", str(tmp_path / "write"))])
    client = connect(WatchedTree(inner, Failing({"/bad"}, room=8)))
    for fid, name in ((1, b"bad"), (2, b"good")):
        client.walk(0, fid, name)
        client.open(fid, os.O_RDWR)
    client.fails(ninep.Tread(1, 0, 5), errno.EIO)
    assert client.read(2, 0, 5) == b"words"
    assert client.write(2, b"12345678") == 8
    client.fails(ninep.Twrite(2, 0, b"9"), errno.ENOSPC)
    client.session.close()
    inner.close()


def test_a_manifest_is_of_the_files_that_were_opened_to_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("read", "written"):
        (tmp_path / name).write_bytes(b"")

    def run(
        argv: list[str], *, on_access: Callable[[Access], None], **_more: object
    ) -> subprocess.CompletedProcess[bytes]:
        for access in (
            Access("open", f"{tmp_path}"),
            Access("open", f"{tmp_path}/read"),
            Access("open", f"{tmp_path}/written", flags=os.O_WRONLY),
            Access("walk", f"{tmp_path}/missing"),
        ):
            on_access(access)
        return subprocess.CompletedProcess(argv, 3)

    monkeypatch.setattr("tinyvmm.run", run)
    assert manifest(["cc"]) == (3, {f"{tmp_path}/read"})


def test_a_diff_of_writes_is_of_what_was_added_changed_and_deleted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command is a client of the server's that the guest would be one of."""
    for name in ("changed", "gone", "read"):
        (tmp_path / name).write_bytes(b"old")
    above = [os.fsencode(part) for part in tmp_path.parts[1:]]

    def run(argv: list[str], *, write: str) -> subprocess.CompletedProcess[bytes]:
        tree = open_tree([("/", "/")], [("/", write)])
        client = connect(tree)
        client.walk(0, 1, *above)
        client.walk(1, 2, b"changed")
        client.open(2, os.O_WRONLY)
        client.write(2, b"new")
        client.walk(1, 3, b"read")
        client.open(3)
        client.read(3)
        client.ask(ninep.Tunlinkat(1, b"gone", 0), ninep.Runlinkat)
        client.ask(ninep.Tlcreate(1, b"added", os.O_WRONLY, 0o644, 0), ninep.Rlcreate)
        client.session.close()
        tree.close()
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr("tinyvmm.run", run)
    lines = [line for line in write_diff(["sh"]) if str(tmp_path) in line]
    assert sorted(lines) == [
        f"A {tmp_path}/added",
        f"C {tmp_path}",
        f"C {tmp_path}/changed",
        f"D {tmp_path}/gone",
    ]
    assert (tmp_path / "changed").read_bytes() == b"old"
