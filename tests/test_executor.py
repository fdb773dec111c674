"""Programs that a guest is sent: who waits for what, whatever the guest says."""

import errno
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import ENDED, ENDED_STATUS, EXECUTE, EXECUTED, STARTED
from tinyvmm.inside import executor
from tinyvmm.inside.executor import KEPT, Executor


class Guest:
    """Answers each program with the next of `answers`; keeps what it was sent."""

    def __init__(self, *answers: int) -> None:
        self.answers: Iterator[int] = iter(answers)
        self.sent: list[tuple[int, int, bytes]] = []
        self.executor = Executor(self.send)

    def send(self, kind: int, value: int, data: bytes) -> None:
        self.sent.append((kind, value, data))
        answer = next(self.answers, None)
        if answer is not None:
            threading.Timer(0, self.executor.on_record, (EXECUTED, answer)).start()

    def end(self, pid: int, status: int) -> None:
        self.executor.on_record(ENDED, pid)
        self.executor.on_record(ENDED_STATUS, status)


def test_a_program_is_sent_once_the_guest_is_up_and_its_end_is_kept() -> None:
    guest = Guest(70)
    found: list[int] = []
    caller = threading.Thread(target=lambda: found.append(guest.executor.start(b"program")))
    caller.start()
    caller.join(0.05)
    assert guest.sent == []
    guest.executor.on_record(STARTED, 2)
    caller.join()
    assert found == [70]
    assert guest.sent == [(EXECUTE, 7, b"program")]
    assert guest.executor.running() == [70]
    assert guest.executor.wait(70, 0.01) is None
    guest.end(70, 3 << 8)
    assert guest.executor.wait(70, None) == 3 << 8
    assert (guest.executor.running(), guest.executor.ends()) == ([], {70: 3 << 8})


def test_what_cannot_be_started_says_why() -> None:
    guest = Guest((1 << 32) - errno.ENOMEM)
    guest.executor.on_record(STARTED, 2)
    with pytest.raises(ConfigError, match="Cannot allocate memory"):
        guest.executor.start(b"x")


def test_a_guest_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "PATIENCE", 0.05)
    guest = Guest()
    with pytest.raises(ConfigError, match="not up yet"):
        guest.executor.start(b"x")
    guest.executor.on_record(STARTED, 2)
    with pytest.raises(ConfigError, match="does not answer"):
        guest.executor.start(b"x")
    # Its answer comes late, and is not taken for the next one's.
    monkeypatch.setattr(executor, "PATIENCE", 60.0)
    guest.executor.on_record(EXECUTED, 5)
    guest.answers = iter([6])
    assert guest.executor.start(b"y") == 6


def test_the_machines_end_ends_all_waiting() -> None:
    guest = Guest(9)
    guest.executor.on_record(STARTED, 2)
    pid = guest.executor.start(b"x")
    threading.Timer(0.05, guest.executor.close).start()
    assert guest.executor.wait(pid, None) is None
    with pytest.raises(ConfigError, match="has ended"):
        guest.executor.start(b"x")
    with pytest.raises(ConfigError, match="process id 10"):
        guest.executor.wait(10, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([STARTED, EXECUTED, ENDED, ENDED_STATUS, 99]), st.integers(0, 20)
        ),
        max_size=60,
    )
)
@settings(deadline=None)
def test_a_lying_guest_hurts_only_itself(records: list[tuple[int, int]]) -> None:
    guest = Guest()
    for kind, value in records:
        guest.executor.on_record(kind, value)
    assert guest.executor.running() == []
    assert guest.executor.ends() == {}


def test_what_is_remembered_is_bounded() -> None:
    guest = Guest(*range(1, KEPT + 20))
    guest.executor.on_record(STARTED, 2)
    for _ in range(KEPT + 10):
        pid = guest.executor.start(b"x")
        guest.end(pid, 0)
    assert len(guest.executor.ends()) == KEPT
