"""Many requests in flight: who waits delays nobody, and Tflush retires who waits.

The tree here is one file whose reads wait for the test's word. A server that answers one request
after the other would hang in every one of these tests.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from errno import EIO, ENOMEM, EPROTO
from pathlib import Path

import pytest

from tests import served
from tests.virtio_driver import Driver, Queue
from tests.waiting import wait_for
from tinyvmm import ninep, trace
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.fileserver.host import HostNode, HostTree
from tinyvmm.fileserver.hostfile import HostFile
from tinyvmm.fileserver.pool import Pool
from tinyvmm.fileserver.session import IN_FLIGHT_MAX, Finish, Session, Waiting
from tinyvmm.ninep import NOFID, Message

HANG = 120.0  # seconds; nothing here takes one
QUICK, SLOW = 1, 2  # fids


class Gate(served.Gate):
    """Where slow reads wait; the test opens it for one at a time, or for all."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[str] = []


class GatedFile(HostFile):
    """A file that reads, writes and syncs only when the gate opens."""

    def __init__(self, fd: int, gate: Gate) -> None:
        super().__init__(fd, 0, lambda: None)
        self.gate = gate

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> None:
        del buffers, offset

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> None:
        del buffers, offset

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        self.gate.wait()
        return super().readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        self.gate.wait()
        return super().writev(buffers, offset)

    def close(self) -> None:
        self.gate.closed.append("file")
        super().close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.passes.release(1000)


@pytest.fixture
def session(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    (tmp_path / "quick").write_bytes(b"quick as a flash")
    (tmp_path / "slow").write_bytes(b"slow and steady")
    opened = HostNode.open

    def open_gated(node: HostNode, flags: int) -> object:
        file = opened(node, flags)
        if node.name != b"slow":
            return file
        assert file.fd is not None
        fd, file.fd = file.fd, None
        return GatedFile(fd, gate)

    monkeypatch.setattr(HostNode, "open", open_gated)
    tree = HostTree(str(tmp_path))
    session = Session(tree)
    set_up(session)
    yield session
    session.close()
    tree.close()


def set_up(session: Session) -> None:
    for message in (
        ninep.Tversion(8192, ninep.VERSION),
        ninep.Tattach(0, NOFID, b"", b"", os.getuid()),
        ninep.Twalk(0, QUICK, (b"quick",)),
        ninep.Tlopen(QUICK, os.O_RDWR),
        ninep.Twalk(0, SLOW, (b"slow",)),
        ninep.Tlopen(SLOW, os.O_RDWR),
    ):
        answer = ask(session, message)
        assert not isinstance(answer, ninep.Rlerror), message


class Late:
    """A transport that keeps what comes late, and makes the reply when the test says so."""

    def __init__(self, waiting: Waiting) -> None:
        self.finishes: list[Finish] = []
        self.ready = threading.Semaphore(0)
        waiting.start(self.take)

    def take(self, finish: Finish) -> None:
        self.finishes.append(finish)
        self.ready.release()

    def reply(self) -> bytes | None:
        assert self.ready.acquire(timeout=HANG)
        return self.finishes.pop(0)()

    def answer(self) -> tuple[int, Message]:
        reply = self.reply()
        assert reply
        return ninep.decode(reply)


def submit(session: Session, message: Message, tag: int) -> Message | Late:
    reply = bytearray(8192)
    size = session.submit([memoryview(ninep.encode(message, tag))], [memoryview(reply)])
    if isinstance(size, Waiting):
        return Late(size)
    got, answer = ninep.decode(bytes(reply[:size]))
    assert got == tag
    return answer


def ask(session: Session, message: Message, tag: int = 1) -> Message:
    answer = submit(session, message, tag)
    assert not isinstance(answer, Late)
    return answer


def begin(session: Session, message: Message, tag: int) -> Late:
    late = submit(session, message, tag)
    assert isinstance(late, Late)
    return late


def test_a_read_that_waits_delays_nobody_else(session: Session, gate: Gate) -> None:
    late = begin(session, ninep.Tread(SLOW, 0, 100), 7)
    gate.wait_until_reached()
    assert ask(session, ninep.Tread(QUICK, 0, 5)) == ninep.Rread(b"quick")
    assert isinstance(ask(session, ninep.Tgetattr(SLOW, 1)), ninep.Rgetattr)
    assert ask(session, ninep.Twalk(0, 5, (b"slow",)))
    gate.passes.release()
    assert late.answer() == (7, ninep.Rread(b"slow and steady"))


def test_replies_leave_as_they_are_ready_not_as_they_were_asked_for(
    session: Session, gate: Gate
) -> None:
    asked = {tag: begin(session, ninep.Tread(SLOW, tag, 1), tag) for tag in (2, 3, 4)}
    gate.wait_until_reached(3)
    synced = begin(session, ninep.Tfsync(QUICK, 0), 9)
    assert synced.answer() == (9, ninep.Rfsync())  # asked last
    gate.passes.release(3)
    for tag, late in asked.items():
        assert late.answer() == (tag, ninep.Rread(b"slow and steady"[tag : tag + 1]))


def test_a_write_that_waits_keeps_the_data_it_was_asked_with(session: Session, gate: Gate) -> None:
    request = bytearray(ninep.encode(ninep.Twrite(SLOW, 0, b"SLOW"), 3))
    size = session.submit([memoryview(request)], [memoryview(bytearray(100))])
    assert isinstance(size, Waiting)
    late = Late(size)
    gate.wait_until_reached()
    request[:] = bytes(len(request))  # the guest's memory, used for something else
    gate.passes.release()
    assert late.answer() == (3, ninep.Rwrite(4))
    late = begin(session, ninep.Tread(SLOW, 0, 8), 4)
    gate.passes.release()
    assert late.answer()[1] == ninep.Rread(b"SLOW and")


def test_flush_retires_the_old_request_first_and_frees_its_tag(
    session: Session, gate: Gate
) -> None:
    old = begin(session, ninep.Tread(SLOW, 0, 4), 7)
    gate.wait_until_reached()
    assert ask(session, ninep.Tflush(7), 8) == ninep.Rflush()
    assert old.reply() == b""  # nothing but the word that there is to be no reply
    new = begin(session, ninep.Tread(SLOW, 5, 3), 7)  # the tag again, while the old still hangs
    gate.wait_until_reached()
    gate.passes.release(2)
    assert old.reply() is None
    assert new.answer() == (7, ninep.Rread(b"and"))


def test_flush_of_what_was_answered_or_never_asked_is_answered(session: Session) -> None:
    assert ask(session, ninep.Tflush(77)) == ninep.Rflush()
    assert ask(session, ninep.Tflush(1), 1) == ninep.Rflush()


def test_a_tag_in_flight_cannot_be_used_for_another_request_that_waits(
    session: Session, gate: Gate
) -> None:
    late = begin(session, ninep.Tread(SLOW, 0, 4), 7)
    assert ask(session, ninep.Tread(SLOW, 0, 4), 7) == ninep.Rlerror(EPROTO)
    gate.passes.release()
    assert late.answer() == (7, ninep.Rread(b"slow"))


def test_a_fid_clunked_under_a_read_is_closed_when_the_read_is_done(
    session: Session, gate: Gate
) -> None:
    late = begin(session, ninep.Tread(SLOW, 0, 4), 7)
    gate.wait_until_reached()
    assert ask(session, ninep.Tclunk(SLOW)) == ninep.Rclunk()
    assert gate.closed == []  # its descriptor could be another file's by now
    gate.passes.release()
    assert late.answer() == (7, ninep.Rread(b"slow"))
    assert gate.closed == ["file"]


def test_a_new_version_forgets_what_was_in_flight(session: Session, gate: Gate) -> None:
    late = begin(session, ninep.Tread(SLOW, 0, 4), 7)
    gate.wait_until_reached()
    assert isinstance(ask(session, ninep.Tversion(8192, ninep.VERSION)), ninep.Rversion)
    assert late.reply() == b""
    gate.passes.release()
    assert late.reply() is None
    assert gate.closed == ["file"]


def test_a_client_that_has_too_much_in_flight_is_told_and_then_served_again(
    session: Session, gate: Gate
) -> None:
    asked = [
        begin(session, ninep.Tread(SLOW, 0, 4), tag) for tag in range(100, 100 + IN_FLIGHT_MAX)
    ]
    assert ask(session, ninep.Tread(SLOW, 0, 4), 7) == ninep.Rlerror(ENOMEM)
    assert ask(session, ninep.Tread(QUICK, 0, 5), 7) == ninep.Rread(b"quick")
    gate.passes.release(IN_FLIGHT_MAX)
    for late in asked:
        assert late.answer()[1] == ninep.Rread(b"slow")
    late = begin(session, ninep.Tread(SLOW, 0, 4), 7)
    gate.passes.release()
    assert late.answer() == (7, ninep.Rread(b"slow"))


def test_what_goes_wrong_on_the_other_thread_is_the_answer(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError(ENOMEM, "")

    monkeypatch.setattr(GatedFile, "readv", fails)
    assert begin(session, ninep.Tread(SLOW, 0, 4), 7).answer() == (7, ninep.Rlerror(ENOMEM))


def test_a_bug_on_the_other_thread_is_seen_and_still_answered(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: object) -> int:
        raise ZeroDivisionError

    seen: list[type[BaseException]] = []
    monkeypatch.setattr(GatedFile, "readv", buggy)
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    asked = [begin(session, ninep.Tread(SLOW, 0, 4), tag) for tag in range(40)]
    assert [late.answer()[1] for late in asked] == [ninep.Rlerror(EIO)] * 40
    wait_for(lambda: seen == [ZeroDivisionError] * 40)


# --- over virtio --------------------------------------------------------------------------------


def start(device: Virtio9P, session: Session) -> Queue:
    queue = Driver(device).start()[0]
    set_up(session)  # not before: a driver begins with a reset, which forgets the client
    return queue


def test_a_guest_gets_quick_replies_past_a_slow_one(session: Session, gate: Gate) -> None:
    queue = start(Virtio9P("root", session), session)
    slow = queue.send([ninep.encode(ninep.Tread(SLOW, 0, 4), 1)], [100])
    gate.wait_until_reached()
    quick = queue.send([ninep.encode(ninep.Tread(QUICK, 0, 5), 2)], [100])
    assert queue.used() == [(quick, 16)]
    assert ninep.decode(queue.filled(quick, 16)) == (2, ninep.Rread(b"quick"))
    gate.passes.release()
    wait_for(lambda: session.fid(SLOW).busy == 0)
    assert queue.used() == [(slow, 15)]
    assert ninep.decode(queue.filled(slow, 15)) == (1, ninep.Rread(b"slow"))


def test_a_flushed_request_is_returned_once_and_without_a_reply(
    session: Session, gate: Gate
) -> None:
    queue = start(Virtio9P("root", session), session)
    slow = queue.send([ninep.encode(ninep.Tread(SLOW, 0, 4), 1)], [100])
    gate.wait_until_reached()
    flush = queue.send([ninep.encode(ninep.Tflush(1), 2)], [100])
    assert queue.used() == [(slow, 0), (flush, 7)]  # the old one first
    gate.passes.release()
    wait_for(lambda: session.fid(SLOW).busy == 0)
    assert queue.used() == []
    assert not any(queue.filled(slow, 100))


def test_a_late_reply_leaves_the_memory_of_a_reset_driver_alone(
    session: Session, gate: Gate
) -> None:
    driver = Driver(Virtio9P("root", session))
    queue = driver.start()[0]
    set_up(session)
    slow = queue.send([ninep.encode(ninep.Tread(SLOW, 0, 4), 1)], [100])
    gate.wait_until_reached()
    driver.mmio.write(0x070, 4, 0)
    gate.passes.release()
    wait_for(lambda: gate.closed == ["file"])
    assert not any(queue.filled(slow, 100))
    assert queue.used() == []


def test_work_that_waits_is_done_though_a_bug_has_ended_every_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    pool = Pool("pool", threads_max=1)
    gate, done = threading.Event(), threading.Event()

    def buggy() -> None:
        gate.wait(HANG)
        raise ZeroDivisionError

    pool.submit(buggy)
    pool.submit(done.set)
    gate.set()
    assert done.wait(HANG)
    pool.close()


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A computer that starts no threads while the list has anything."""
    none_left: list[bool] = []
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if none_left:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    yield none_left
    none_left.clear()


def test_where_no_more_threads_can_be_had_work_waits_for_those_there_are(
    session: Session, gate: Gate, no_threads: list[bool]
) -> None:
    first = begin(session, ninep.Tread(SLOW, 0, 4), 1)
    gate.wait_until_reached()
    no_threads.append(True)
    others = [begin(session, ninep.Tread(SLOW, 0, 4), tag) for tag in range(2, 10)]
    assert ask(session, ninep.Tread(QUICK, 0, 5)) == ninep.Rread(b"quick")
    gate.passes.release(9)
    for late in (first, *others):
        assert late.answer()[1] == ninep.Rread(b"slow")


def test_where_no_thread_at_all_can_be_had_a_request_fails_and_the_next_may_not(
    session: Session, gate: Gate, no_threads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[trace.Record] = []
    monkeypatch.setattr(trace, "hook", said.append)
    no_threads.append(True)
    assert begin(session, ninep.Tread(SLOW, 0, 4), 7).answer() == (7, ninep.Rlerror(ENOMEM))
    (told,) = [record for record in said if isinstance(record, trace.Message)]
    assert "can start no more" in told.message
    no_threads.clear()
    gate.passes.release()
    assert begin(session, ninep.Tread(SLOW, 0, 4), 7).answer() == (7, ninep.Rread(b"slow"))


def test_a_driver_is_told_too_that_no_thread_can_be_had(
    session: Session, no_threads: list[bool]
) -> None:
    queue = start(Virtio9P("root", session), session)
    no_threads.append(True)
    queue.send([ninep.encode(ninep.Tread(SLOW, 0, 4), 1)], [100])
    (reply,) = queue.collect()
    assert ninep.decode(reply[: int.from_bytes(reply[:4], "little")]) == (1, ninep.Rlerror(ENOMEM))
