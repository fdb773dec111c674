"""The examples' devices, tried without a guest; tests/linux shows them to Linux."""

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.crc_device import CrcDevice
from examples.dice_port import Dice
from examples.pattern_rng import FILL_MAX, PatternRng
from tests.virtio_driver import NEEDS_RESET, Driver

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
