"""Clients that are silent for longer than is wished, in a time that passes as the test says.

So no computer is too slow for them, and what must not happen at one moment is tried at that moment.
"""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from errno import EAGAIN
from pathlib import Path

import pytest

from tests.served import HANG, Gate, Service, gated
from tests.waiting import wait_for
from tinyvmm import ninep, trace
from tinyvmm.fileserver import connection
from tinyvmm.fileserver.client import Client, File
from tinyvmm.fileserver.connection import Connection
from tinyvmm.fileserver.session import Session

IDLE = 60


class TimedSocket(socket.socket):
    """The server's end of a stream, whose timer goes by a clock of the test's."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(fileno=end.detach())
        self.now = 1000.0
        self.patience = 0.0  # as it was set, 0 for ever
        self.expired = 0  # how often it was not enough
        self.waiting = False
        self.hung_up = threading.Event()
        self.before_sending: Callable[[], None] = lambda: None

    def setsockopt(self, level: int, option: int, value: object) -> None:  # type: ignore[override]
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_RCVTIMEO)
        assert isinstance(value, bytes)
        seconds, microseconds = struct.unpack("@ll", value)
        self.patience = seconds + microseconds / 1e6

    def recv_into(self, buffer: memoryview) -> int:  # type: ignore[override]
        began = self.now
        while not select.select([self], [], [], 0.01)[0]:
            self.waiting = True
            if 0 < self.patience <= self.now - began:
                self.waiting = False
                self.expired += 1
                raise BlockingIOError(EAGAIN, os.strerror(EAGAIN))
        self.waiting = False
        return super().recv_into(buffer)

    def sendall(self, data: memoryview) -> None:  # type: ignore[override]
        self.before_sending()
        super().sendall(data)

    def shutdown(self, how: int) -> None:
        self.hung_up.set()
        super().shutdown(how)


class Conversation:
    """A client, and a server that hangs up after IDLE seconds of its silence."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, theirs = socket.socketpair()
        self.sock = TimedSocket(theirs)
        monkeypatch.setattr(connection, "monotonic", lambda: self.sock.now)
        self.server = Connection(self.sock, Session(service.tree), idle=IDLE)
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()
        ours.settimeout(HANG)
        self.client = Client(ours)
        self.root = self.client.attach()

    def wait_until_heard(self) -> None:
        """Wait until the server waits for us."""
        wait_for(lambda: self.sock.waiting)
        with self.server._lock:  # and has sent what there was
            pass

    def pass_time(self, seconds: float) -> None:
        """Have so much time pass while the server waits for us."""
        self.wait_until_heard()
        self.sock.now += seconds

    def expire(self, seconds: float) -> None:
        """Have so much time pass that the server looks up."""
        before = self.sock.expired
        self.pass_time(seconds)
        wait_for(lambda: self.sock.expired > before)

    def read_slowly(self) -> int:
        """Ask for what waits at the gate; gives the tag."""
        file: File = self.root.walk(b"slow").open()
        return self.client.send(ninep.Tread(file.fid, 0, 4))

    def close(self) -> None:
        self.client.close()
        self.thread.join(HANG)
        assert not self.thread.is_alive()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    yield from gated(monkeypatch)


@pytest.fixture
def conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Conversation]:
    service = Service(tmp_path)
    conversation = Conversation(service, monkeypatch)
    yield conversation
    conversation.close()
    service.close()


def assert_is_hung_up_on(conversation: Conversation) -> None:
    with pytest.raises(ConnectionError):
        conversation.client.receive()


def test_whoever_says_something_in_time_is_not_hung_up_on_until_he_is_silent(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[trace.Record] = []
    for _ in range(3):
        conversation.pass_time(IDLE - 1)
        conversation.root.walk(b"motd").close()
    monkeypatch.setattr(trace, "hook", said.append)
    conversation.expire(IDLE)
    assert_is_hung_up_on(conversation)
    assert [record.message for record in said if isinstance(record, trace.Message)] == [
        "nothing heard for too long"
    ]


def test_who_waits_for_us_may_be_silent_for_any_time(
    conversation: Conversation, gate: Gate
) -> None:
    tag = conversation.read_slowly()
    gate.wait_until_reached()
    for _ in range(3):
        conversation.expire(IDLE)
    conversation.wait_until_heard()
    gate.passes.release()
    assert conversation.client.wait(tag) == ninep.Rread(b"slow")


def test_silence_counts_from_the_reply_that_was_waited_for(
    conversation: Conversation, gate: Gate
) -> None:
    tag = conversation.read_slowly()
    gate.wait_until_reached()
    conversation.pass_time(IDLE - 1)
    gate.passes.release()
    assert conversation.client.wait(tag) == ninep.Rread(b"slow")
    conversation.expire(IDLE - 1)  # its last request is nearly two minutes old
    conversation.wait_until_heard()
    assert conversation.sock.patience == 1
    conversation.root.walk(b"motd").close()
    conversation.wait_until_heard()
    assert conversation.sock.patience == IDLE
    conversation.expire(IDLE)
    assert_is_hung_up_on(conversation)


def test_a_reply_on_its_way_is_not_cut_off(conversation: Conversation, gate: Gate) -> None:
    sock = conversation.sock
    tag = conversation.read_slowly()
    gate.wait_until_reached()
    conversation.wait_until_heard()

    def take_long() -> None:
        sock.now += IDLE
        wait_for(lambda: sock.expired > 0)
        sock.hung_up.wait(0.3)  # it would have been by then

    sock.before_sending = take_long
    gate.passes.release()
    assert conversation.client.wait(tag) == ninep.Rread(b"slow")
    sock.before_sending = lambda: None
    conversation.root.walk(b"motd").close()
