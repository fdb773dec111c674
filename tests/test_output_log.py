"""What a detached command wrote: in order, byte for byte, as it grows."""

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.instances.output_log import STREAMS, OutputLog, read_pieces

PIECES = st.lists(st.tuples(st.sampled_from(STREAMS), st.binary(max_size=300)), max_size=20)


@settings(deadline=None, max_examples=50)
@given(pieces=PIECES)
def test_pieces_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, bytes]]
) -> None:
    path = str(tmp_path_factory.mktemp("log") / "output")
    log = OutputLog(path)
    for stream, data in pieces:
        log.write(stream, data)
    found = list(read_pieces(path))
    assert [(piece.stream, piece.data) for piece in found] == pieces
    assert [piece.when for piece in found] == sorted(piece.when for piece in found)
    log.close()


def test_half_a_piece_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "output"
    whole = b"stdout 5 6\nhello\n"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert list(read_pieces(str(path))) == []
    path.write_bytes(whole)
    assert [piece.data for piece in read_pieces(str(path))] == [b"hello\n"]


def test_a_follower_sees_all_until_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "output")
    log = OutputLog(path)
    running = True
    seen: list[bytes] = []

    def follow() -> None:
        seen.extend(piece.data for piece in read_pieces(path, follow=lambda: running))

    reader = threading.Thread(target=follow)
    reader.start()
    for number in range(30):
        log.write("stdout", b"%d" % number)
    log.write("stderr", b"last")
    running = False
    reader.join()
    assert seen == [b"%d" % number for number in range(30)] + [b"last"]
    log.close()


def test_a_full_disk_ends_the_log_and_nothing_else() -> None:
    log = OutputLog("/dev/full")
    log.write("stdout", b"x")
    log.write("stdout", b"y")
    log.close()
