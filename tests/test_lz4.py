"""The LZ4 decoder against the lz4 program, against an encoder of our own, and against damage."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.kernel_files.lz4 import (
    LEGACY_BLOCK_SIZE,
    Lz4Error,
    decompress_block,
    decompress_legacy,
)

MAGIC = b"\x02\x21\x4c\x18"
needs_lz4 = pytest.mark.skipif(not shutil.which("lz4"), reason="needs the lz4 program")


def lz4(data: bytes, *options: str) -> bytes:
    return subprocess.run(
        ["lz4", "-l", *options, "-", "-"], input=data, capture_output=True, check=True
    ).stdout


def length_bytes(length: int) -> bytes:
    """What follows a token nibble of 15."""
    rest = length - 15
    return b"" if rest < 0 else b"\xff" * (rest // 255) + bytes([rest % 255])


def sequence(literals: bytes, distance: int = 0, match_len: int = 0) -> bytes:
    """One sequence, written as the block format describes it; the last one has no match."""
    token = min(len(literals), 15) << 4
    head = length_bytes(len(literals)) + literals
    if not match_len:
        return bytes([token]) + head
    token |= min(match_len - 4, 15)
    return bytes([token]) + head + distance.to_bytes(2, "little") + length_bytes(match_len - 4)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A block, and what it decodes to by the definition: a match copies byte by byte."""
    plain = bytearray()
    packed = b""
    for _ in range(draw(st.integers(0, 6))):
        literals = draw(st.binary(min_size=0 if plain else 1, max_size=40))
        plain += literals
        distance = draw(st.integers(1, len(plain)))
        match_len = draw(st.one_of(st.integers(4, 40), st.integers(250, 700)))
        for _ in range(match_len):
            plain.append(plain[-distance])
        packed += sequence(literals, distance, match_len)
    tail = draw(st.binary(max_size=300))
    return packed + sequence(tail), bytes(plain + tail)


@given(blocks())
def test_a_block_decodes_to_what_copying_byte_by_byte_gives(block: tuple[bytes, bytes]) -> None:
    packed, plain = block
    assert decompress_block(packed, len(plain)) == plain


@given(blocks(), st.data())
def test_a_block_never_gives_more_than_it_may(
    block: tuple[bytes, bytes], data: st.DataObject
) -> None:
    packed, plain = block
    size_max = data.draw(st.integers(0, len(plain)))
    if size_max < len(plain):
        with pytest.raises(Lz4Error):
            decompress_block(packed, size_max)


@given(blocks(), st.data())
def test_a_block_cut_or_changed_anywhere_gives_data_or_lz4_error(
    block: tuple[bytes, bytes], data: st.DataObject
) -> None:
    packed = bytearray(block[0])
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    del packed[data.draw(st.integers(0, len(packed))) :]
    try:
        assert len(decompress_block(bytes(packed), 1000)) <= 1000
    except Lz4Error:
        return


@needs_lz4
@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([b"abc", b"\0" * 500, b"kernel ", bytes(range(256))]), max_size=60))
def test_what_the_lz4_program_packs_comes_back(parts: list[bytes]) -> None:
    plain = b"".join(parts)
    assert decompress_legacy(lz4(plain, "-9"), len(plain)) == plain


@needs_lz4
def test_frames_of_several_blocks_and_several_frames_in_a_row_are_one_text() -> None:
    plain = b"".join(n.to_bytes(4, "little") for n in range((LEGACY_BLOCK_SIZE + 5000) // 4))
    packed = lz4(plain) + lz4(b"and more")
    assert decompress_legacy(packed, len(plain) + 8) == plain + b"and more"


def test_a_frame_packed_by_hand_decodes() -> None:
    block = sequence(b"abcd", 4, 9) + sequence(b"!")
    frame = MAGIC + len(block).to_bytes(4, "little") + block
    assert decompress_legacy(frame, 100) == b"abcdabcdabcda!"


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\x02\x21\x4c", b"\x04\x22\x4d\x18", MAGIC + b"\x09\0\0\0" + b"short"],
    ids=["empty", "half a magic", "the other frame format", "block past the end"],
)
def test_a_frame_that_is_none_is_refused(damaged: bytes) -> None:
    with pytest.raises(Lz4Error):
        decompress_legacy(damaged, 100)


def test_a_match_that_claims_gigabytes_is_refused_before_it_is_made() -> None:
    block = b"\x1fa\x01\x00" + b"\xff" * (8 << 20) + b"\x00"
    with pytest.raises(Lz4Error, match="more data"):
        decompress_block(block, 1 << 20)
