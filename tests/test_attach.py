"""The keys that leave a machine's terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.attach import DetachKeys, parse_keys
from tinyvmm.errors import ConfigError


def typed(keys: bytes, *pieces: bytes) -> tuple[bytes, bool]:
    """What is passed on of what is typed, and whether the keys were seen."""
    detach = DetachKeys(keys)
    passed = b""
    for piece in pieces:
        passed += detach.filter(piece)
        if detach.seen:
            break
    return passed, detach.seen


def test_the_keys_detach_however_they_come() -> None:
    keys = parse_keys("ctrl-p,ctrl-q")
    assert keys == b"\x10\x11"
    assert typed(keys, b"ls\n\x10\x11more") == (b"ls\n", True)
    assert typed(keys, b"a\x10", b"\x11") == (b"a", True)
    assert typed(keys, b"\x10", b"\x10", b"\x11") == (b"\x10", True)
    assert typed(keys, b"\x10", b"x", b"\x11") == (b"\x10x\x11", False)
    assert typed(b"aab", b"aaa", b"b") == (b"a", True)
    assert typed(b"", b"\x10\x11") == (b"\x10\x11", False)


@given(st.lists(st.sampled_from([b"a", b"b", b"ab", b"aa", b"x"]), max_size=20))
def test_nothing_is_lost_but_what_may_be_keys(pieces: list[bytes]) -> None:
    passed, seen = typed(b"aab", *pieces)
    whole = b"".join(pieces)
    assert seen == (b"aab" in whole)
    assert whole.startswith(passed)
    if seen:
        assert passed == whole.partition(b"aab")[0]
    else:
        assert whole[len(passed) :] in {b"", b"a", b"aa"}


def test_keys_have_podmans_names() -> None:
    assert parse_keys("ctrl-a,d") == b"\x01d"
    assert parse_keys("Ctrl-@,ctrl-[,ctrl-_,Z") == b"\x00\x1b\x1fZ"
    assert parse_keys("") == b""
    for bad in ("ctrl-", "ctrl-1", "escape", "a,", "ü"):
        with pytest.raises(ConfigError, match="no key"):
            parse_keys(bad)
