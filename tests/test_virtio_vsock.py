"""The vsock device from the driver's side, and its host's side with real sockets."""

import os
import resource
import shutil
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import NEEDS_RESET, WRITE, Driver, Queue
from tests.waiting import wait_for
from tinyvmm import vsock_host
from tinyvmm.devices.virtio.vsock import (
    ANSWERS_MAX,
    BUF_ALLOC,
    BUF_ALLOC_MANY,
    CONNECTIONS_MAX,
    FEW,
    FIRST_HOST_PORT,
    TAKEN,
    VirtioVsock,
)
from tinyvmm.errors import ConfigError
from tinyvmm.eventfds import Doorbells
from tinyvmm.vsock_host import VsockHost

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RCV, SEND = 1, 2
CID, HOST = 3, 2
HEADER = "<QQIIIHHIII"
HEADER_LEN = 44


class FakePeer:
    """A host's end that does as it is told."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room  # bytes it takes
        self.got = bytearray()
        self.to_send: deque[bytes] = deque()
        self.ended = self.closed = self.at_end = self.broken = False
        self.output_ended = False
        self.host_port: int | None = None
        self.watched = (False, False)
        self.reads: list[int] = []  # bytes that there was room for, each time
        self.breaks_after = 1 << 30  # reads

    def accepted(self, host_port: int) -> None:
        self.host_port = host_port

    def send(self, views: Sequence[memoryview]) -> int:
        if self.broken:
            raise BrokenPipeError
        data = b"".join(views)[: self.room]
        self.room -= len(data)
        self.got += data
        return len(data)

    def receive(self, views: Sequence[memoryview]) -> int | None:
        if self.broken or len(self.reads) >= self.breaks_after:
            raise ConnectionResetError
        self.reads.append(sum(map(len, views)))
        if not self.to_send:
            return 0 if self.at_end else None
        data, done = self.to_send.popleft(), 0
        for view in views:
            piece = data[done : done + len(view)]
            view[: len(piece)] = piece
            done += len(piece)
        if data[done:]:
            self.to_send.appendleft(data[done:])
        return done

    def end_output(self) -> None:
        self.output_ended = True

    def watch(self, *, readable: bool, writable: bool) -> None:
        self.watched = (readable, writable)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class FakeDialer:
    def __init__(self) -> None:
        self.listening: dict[int, FakePeer] = {}
        self.dialled: list[int] = []

    def dial(self, port: int) -> FakePeer | None:
        self.dialled.append(port)
        return self.listening.pop(port, None)


class Packet(NamedTuple):
    guest_port: int
    host_port: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes


class Guest:
    """A driver with rx buffers, and packets by name."""

    def __init__(self, device: VirtioVsock, buffers: int = 16, size: int = 4096) -> None:
        self.device = device
        self.driver = Driver(device)
        self.rx, self.tx, self.event = self.driver.start()
        self.size = size
        self.spare: list[int] = []  # buffers that came back
        self.buffers: dict[int, int] = {}
        self.backlog: deque[Packet] = deque()
        self.offer(buffers)

    def offer(self, count: int) -> None:
        ram, rx = self.driver.ram, self.rx
        for _ in range(count):
            gpa = self.spare.pop() if self.spare else ram.alloc(self.size, 1)
            token = rx.free.pop()
            rx.write_descriptor(token, gpa, self.size, WRITE)
            rx.in_flight[token] = ([token], [ram.view(gpa, self.size)])
            self.buffers[token] = gpa
            rx.publish(token)
        rx.kick()

    def say(
        self,
        guest_port: int,
        host_port: int,
        op: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        alloc: int = 1 << 20,
        count: int = 0,
        source: int = CID,
        target: int = HOST,
        kind: int = 1,
        length: int | None = None,
    ) -> None:
        said = len(data) if length is None else length
        head = struct.pack(
            HEADER, source, target, guest_port, host_port, said, kind, op, flags, alloc, count
        )
        mark = self.driver.ram.mark()
        token = self.tx.send([head, data] if data else [head], [])
        if self.tx.used() == [(token, 0)]:
            self.tx.filled(token, 0)
            self.driver.ram.rewind(mark)

    def heard(self, *, again: bool = True) -> list[Packet]:
        """What came, each buffer being offered again."""
        found: list[Packet] = []
        while True:
            used = self.rx.used()
            if not used:
                return found
            for token, length in used:
                data = self.rx.filled(token, length)
                self.spare.append(self.buffers.pop(token))
                fields = struct.unpack_from(HEADER, data)
                source, target, host_port, guest_port, size, kind, op, flags, alloc, fwd = fields
                assert (source, target, kind) == (HOST, CID, 1)
                assert size == length - HEADER_LEN
                packet = Packet(guest_port, host_port, op, flags, alloc, fwd, data[HEADER_LEN:])
                found.append(packet)
            if again:
                self.offer(len(used))

    def ops(self) -> list[int]:
        return [packet.op for packet in self.heard()]


def open_to_host(room: int = 1 << 30, **options: int) -> tuple[Guest, FakePeer, VirtioVsock]:
    """A connection that the guest opened: its port 1000, the host's 80."""
    dialer = FakeDialer()
    peer = dialer.listening[80] = FakePeer(room)
    device = VirtioVsock(CID, dialer)
    guest = Guest(device, **options)
    guest.say(1000, 80, REQUEST)
    (answer,) = guest.heard()
    assert answer == (1000, 80, RESPONSE, 0, BUF_ALLOC, 0, b"")
    return guest, peer, device


# --- opening ----------------------------------------------------------------------------------


def test_it_says_who_the_guest_is() -> None:
    device = VirtioVsock(0x1234_5678, FakeDialer())
    driver = Driver(device)
    assert driver.read(0x008) == 19
    assert driver.mmio.read(0x100, 8) == 0x1234_5678
    assert len(driver.start()) == 3


def test_a_port_nobody_listens_at_is_refused() -> None:
    dialer = FakeDialer()
    guest = Guest(VirtioVsock(CID, dialer))
    guest.say(1000, 81, REQUEST)
    assert [(p.guest_port, p.host_port, p.op) for p in guest.heard()] == [(1000, 81, RST)]
    assert dialer.dialled == [81]


def test_the_host_connects_when_the_guest_agrees() -> None:
    device = VirtioVsock(CID, FakeDialer())
    guest = Guest(device)
    peer = FakePeer()
    assert device.connect(peer, 22) is not None
    (request,) = guest.heard()
    assert (request.guest_port, request.op) == (22, REQUEST)
    assert request.host_port == FIRST_HOST_PORT
    assert peer.host_port is None
    guest.say(22, request.host_port, RESPONSE)
    assert peer.host_port == request.host_port
    peer.to_send.append(b"hello")
    device.readable(peer)
    assert [p.data for p in guest.heard()] == [b"hello"]


def test_the_host_is_told_when_the_guest_refuses() -> None:
    device = VirtioVsock(CID, FakeDialer())
    guest = Guest(device)
    peer = FakePeer()
    device.connect(peer, 22)
    (request,) = guest.heard()
    guest.say(22, request.host_port, RST)
    assert peer.closed
    assert guest.heard() == []


def test_nobody_connects_to_a_guest_without_a_driver() -> None:
    assert VirtioVsock(CID, FakeDialer()).connect(FakePeer(), 22) is None


# --- data and credit --------------------------------------------------------------------------


def test_bytes_go_both_ways_in_any_framing() -> None:
    guest, peer, device = open_to_host()
    guest.say(1000, 80, RW, b"to the host")
    assert peer.got == b"to the host"
    peer.to_send.append(b"x" * 10_000)
    device.readable(peer)
    packets = guest.heard()
    device.readable(peer)
    packets += guest.heard()
    assert b"".join(p.data for p in packets) == b"x" * 10_000
    assert {p.op for p in packets} == {RW}
    assert packets[-1].fwd_cnt == 11


def test_what_the_host_does_not_take_is_kept_and_counted() -> None:
    guest, peer, device = open_to_host(room=10)
    guest.say(1000, 80, RW, b"0123456789abcdef")
    assert peer.got == b"0123456789"
    assert peer.watched == (True, True)
    guest.say(1000, 80, CREDIT_REQUEST)
    (credit,) = guest.heard()
    assert (credit.op, credit.fwd_cnt) == (CREDIT_UPDATE, 10)
    peer.room = 100
    device.writable(peer)
    assert peer.got == b"0123456789abcdef"
    assert peer.watched == (True, False)


def test_credit_is_given_back_before_it_is_all_gone() -> None:
    guest, peer, _ = open_to_host()
    for _ in range(20):
        guest.say(1000, 80, RW, b"x" * (BUF_ALLOC // 16))
    updates = [p for p in guest.heard() if p.op == CREDIT_UPDATE]
    assert [p.fwd_cnt for p in updates] == [BUF_ALLOC // 2, BUF_ALLOC]
    assert len(peer.got) == 20 * (BUF_ALLOC // 16)


def test_a_guest_that_ignores_credit_is_cut_off() -> None:
    guest, peer, device = open_to_host(room=0)
    for _ in range(BUF_ALLOC // 4096):
        guest.say(1000, 80, RW, b"x" * 4096)
    assert guest.ops() == []
    guest.say(1000, 80, RW, b"x")
    assert guest.ops() == [RST]
    assert peer.closed
    assert device._connections == {}


def test_the_guest_is_never_sent_more_than_it_has_room_for() -> None:
    guest, peer, device = open_to_host()
    guest.say(1000, 80, CREDIT_UPDATE, alloc=5000, count=0)
    peer.to_send.append(b"x" * 20_000)
    device.readable(peer)
    assert sum(len(p.data) for p in guest.heard()) == 5000
    assert peer.watched == (False, False)
    device.readable(peer)
    assert guest.heard() == []
    guest.say(1000, 80, CREDIT_UPDATE, alloc=5000, count=3000)
    assert peer.watched == (True, False)
    device.readable(peer)
    assert sum(len(p.data) for p in guest.heard()) == 3000


def test_without_rx_buffers_the_hosts_bytes_stay_where_they_are() -> None:
    guest, peer, device = open_to_host(buffers=1)
    peer.to_send.append(b"x" * 10_000)
    device.readable(peer)
    assert len(guest.heard(again=False)[0].data) == 4096 - HEADER_LEN
    device.readable(peer)
    assert guest.heard() == []
    assert peer.watched == (False, False)
    guest.offer(1)
    assert peer.watched == (True, False)


def rx_events(guest: Guest) -> int:
    """How many of the rx buffers that came back the driver was interrupted for so far."""
    return guest.driver.ram.u16(guest.rx.used_gpa + 2) - guest.rx.last_used


def test_much_is_one_read_and_one_interrupt_for_many_buffers() -> None:
    guest, peer, device = open_to_host(buffers=16)
    full = 4096 - HEADER_LEN
    peer.to_send.append(data := os.urandom(10 * full + 5))
    interrupts: list[int] = []
    guest.device.queues[0].on_used = lambda: interrupts.append(rx_events(guest))
    device.readable(peer)
    assert interrupts == [1]  # with the first, the driver having said no more since
    assert peer.reads == [full, 15 * full]
    packets = guest.heard()
    assert [len(p.data) for p in packets] == [full] * 10 + [5]
    assert b"".join(p.data for p in packets) == data


def test_a_batch_that_ends_in_the_midst_of_a_buffer_leaves_the_others_to_what_comes_next() -> None:
    guest, peer, device = open_to_host(buffers=4)
    full = 4096 - HEADER_LEN
    for end in (full + 1, 1, 0):
        peer.to_send.append(data := os.urandom(full + end))
        device.readable(peer)
        packets = guest.heard(again=False)
        assert b"".join(p.data for p in packets) == data
        guest.offer(len(packets))
    assert device.queues[0].waiting == 4
    assert not guest.driver.status & NEEDS_RESET


@given(
    sizes=st.lists(
        st.lists(st.integers(1, 300), min_size=1, max_size=4).filter(lambda c: sum(c) > HEADER_LEN),
        min_size=1,
        max_size=12,
    ),
    indirect=st.booleans(),
    data=st.binary(min_size=1, max_size=4000),
    alloc=st.integers(1, 4000),
)
@settings(deadline=None)
def test_buffers_of_any_shape_are_filled_as_far_as_credit_goes(
    sizes: list[list[int]], indirect: bool, data: bytes, alloc: int
) -> None:
    guest, peer, device = open_to_host(buffers=1)
    peer.to_send.append(b"x")  # which takes up the buffer that there is
    device.readable(peer)
    assert guest.heard(again=False)[0].data == b"x"
    guest.say(1000, 80, CREDIT_UPDATE, alloc=alloc, count=1)
    for size in sizes:
        guest.rx.send([], size, indirect=indirect)
    peer.to_send.append(data)
    for _ in range(len(sizes) + 1):
        device.readable(peer)
    got, packets = b"", guest.rx.collect()
    for packet in packets:
        assert struct.unpack_from(HEADER, packet)[4] == len(packet) - HEADER_LEN > 0
        got += packet[HEADER_LEN:]
    room = sum(sum(size) - HEADER_LEN for size in sizes)
    assert got == data[: min(alloc, room)]
    assert device.queues[0].waiting == len(sizes) - len(packets)


def test_credit_that_runs_out_in_the_midst_of_a_batch_is_kept_to_the_byte() -> None:
    guest, peer, device = open_to_host(buffers=16)
    full = 4096 - HEADER_LEN
    credit = 5 * full + 7
    guest.say(1000, 80, CREDIT_UPDATE, alloc=credit)
    peer.to_send.append(bytes(20 * full))
    device.readable(peer)
    assert [len(p.data) for p in guest.heard()] == [full] * 5 + [7]
    assert peer.watched == (False, False)
    guest.say(1000, 80, CREDIT_UPDATE, alloc=credit, count=7)
    device.readable(peer)
    assert [len(p.data) for p in guest.heard()] == [7]


def test_a_host_that_breaks_off_in_the_midst_of_a_batch_has_all_before_it_delivered() -> None:
    guest, peer, device = open_to_host(buffers=8)
    full = 4096 - HEADER_LEN
    peer.to_send.append(bytes(full))
    peer.breaks_after = 1
    device.readable(peer)
    assert [(p.op, len(p.data)) for p in guest.heard()] == [(RW, full), (RST, 0)]
    assert peer.closed
    assert device.queues[0].waiting == 8


def test_a_reset_in_the_midst_of_a_batch_waits_for_its_end() -> None:
    guest, peer, device = open_to_host(buffers=8)
    full = 4096 - HEADER_LEN
    peer.to_send.append(bytes(3 * full))
    resetting = threading.Thread(target=guest.driver.write, args=(0x070, 0))
    order: list[str] = []

    def receive(views: Sequence[memoryview]) -> int | None:
        if not order:
            resetting.start()
        resetting.join(0.05)
        order.append("data" if resetting.is_alive() else "reset")
        return FakePeer.receive(peer, views)

    peer.receive = receive  # type: ignore[method-assign]
    device.readable(peer)
    resetting.join()
    assert order == ["data", "data"]
    assert peer.closed
    assert guest.driver.ram.u16(guest.rx.used_gpa + 2) == 4  # RESPONSE, and three of data
    device.readable(peer)  # as whoever has heard of it before
    assert len(order) == 2


def test_packets_of_the_guest_are_given_back_a_few_at_a_time() -> None:
    guest, peer, device = open_to_host()
    interrupts: list[int] = []
    device.queues[1].on_used = lambda: interrupts.append(len(peer.got))
    head = struct.pack(HEADER, CID, HOST, 1000, 80, 100, 1, RW, 0, 1 << 20, 0)
    for _ in range(TAKEN + 2):
        guest.tx.add([head, b"x" * 100], [])
    device.notify(1)
    assert interrupts == [TAKEN * 100]
    assert len(peer.got) == (TAKEN + 2) * 100
    assert len(guest.tx.used()) == TAKEN + 2


def test_many_connections_have_less_room_each() -> None:
    dialer = FakeDialer()
    device = VirtioVsock(CID, dialer)
    guest = Guest(device)
    room = []
    for port in range(CONNECTIONS_MAX):
        dialer.listening[80] = FakePeer()
        guest.say(port, 80, REQUEST)
        room += [answer.buf_alloc for answer in guest.heard()]
    assert room == [BUF_ALLOC] * FEW + [BUF_ALLOC_MANY] * (CONNECTIONS_MAX - FEW)
    assert sum(room) <= 64 << 20
    last = CONNECTIONS_MAX - 1
    for _ in range(8):  # of which none is read
        device._connections[last, 80].peer.room = 0  # type: ignore[union-attr]
        guest.say(last, 80, RW, bytes(BUF_ALLOC_MANY // 8))
    guest.say(last, 80, RW, b"x")
    assert guest.ops() == [RST]


# --- the end ----------------------------------------------------------------------------------


def test_each_direction_ends_by_itself() -> None:
    guest, peer, device = open_to_host()
    guest.say(1000, 80, SHUTDOWN, flags=SEND)
    assert peer.output_ended
    assert not peer.closed
    peer.to_send.append(b"still")
    device.readable(peer)
    peer.at_end = True
    device.readable(peer)
    packets = guest.heard()
    assert [(p.op, p.data, p.flags) for p in packets] == [(RW, b"still", 0), (SHUTDOWN, b"", SEND)]
    guest.say(1000, 80, SHUTDOWN, flags=RCV)
    assert guest.ops() == [RST]
    assert peer.closed


def test_what_was_sent_before_the_end_arrives_before_it() -> None:
    guest, peer, device = open_to_host(room=0)
    guest.say(1000, 80, RW, b"last words")
    guest.say(1000, 80, SHUTDOWN, flags=RCV | SEND)
    assert guest.ops() == []
    assert not peer.closed
    peer.room = 4
    device.writable(peer)
    assert not peer.closed
    peer.room = 100
    device.writable(peer)
    assert peer.got == b"last words"
    assert peer.closed
    assert guest.ops() == [RST]


def test_a_host_that_breaks_off_is_a_reset_for_the_guest() -> None:
    guest, peer, _ = open_to_host()
    peer.broken = True
    guest.say(1000, 80, RW, b"hello?")
    assert guest.ops() == [RST]
    guest, peer, device = open_to_host()
    peer.broken = True
    device.readable(peer)
    assert guest.ops() == [RST]
    assert peer.closed


def test_data_after_its_end_is_refused() -> None:
    guest, peer, _ = open_to_host()
    guest.say(1000, 80, SHUTDOWN, flags=SEND)
    guest.say(1000, 80, RW, b"more")
    assert guest.ops() == [RST]
    assert peer.got == b""


def test_a_driver_that_resets_closes_everything() -> None:
    guest, peer, device = open_to_host()
    other = FakePeer()
    device.connect(other, 22)
    guest.driver.write(0x070, 0)
    assert peer.closed
    assert other.closed
    assert (device._connections, device._by_peer, len(device._due)) == ({}, {}, 0)


def last_words(guest: Guest, count: int) -> None:
    """Have the guest send packets of one byte without a kick that anybody has heard."""
    for _ in range(count):
        head = struct.pack(HEADER, CID, HOST, 1000, 80, 1, 1, RW, 0, 1 << 20, 0)
        guest.tx.add([head, b"x"], [])


def test_what_the_guest_sent_before_a_reset_is_passed_on() -> None:
    guest, peer, _ = open_to_host()
    last_words(guest, 10)
    guest.driver.write(0x070, 0)
    assert peer.got == b"x" * 10
    assert peer.closed


def test_a_guest_that_is_to_halt_has_its_last_words_passed_on_and_nothing_said() -> None:
    guest, peer, device = open_to_host()
    last_words(guest, 60)
    device.halt()
    peer.to_send.append(b"too late")
    device.readable(peer)
    device.notify(1)
    assert peer.got == b"x" * 60
    assert guest.heard() == []
    assert device.unhalt()
    device.catch_up()
    device.readable(peer)
    assert [p.data for p in guest.heard()] == [b"too late"]


def test_a_guest_that_never_ends_is_halted_all_the_same() -> None:
    guest, peer, device = open_to_host()
    last_words(guest, 1)
    avail_idx = guest.tx.avail_gpa + 2

    def send(views: Sequence[memoryview]) -> int:
        ram = guest.driver.ram  # as a driver on another processor would
        ram.put("<H", avail_idx, ram.u16(avail_idx) + 1 & 0xFFFF)
        if not (sent := len(peer.got)) % 1000:
            device.halt()
        assert sent < 2000
        return FakePeer.send(peer, views)

    peer.send = send  # type: ignore[method-assign]
    token = guest.tx.in_flight.popitem()[0]
    for slot in range(guest.tx.size):
        guest.driver.ram.put("<H", guest.tx.avail_gpa + 4 + 2 * slot, token)
    peer.got += b"x"
    device.notify(1)
    assert 900 < len(peer.got) < 1200
    assert device.unhalt()


def test_thousands_of_connections_leave_nothing_behind() -> None:
    dialer = FakeDialer()
    device = VirtioVsock(CID, dialer)
    guest = Guest(device)
    for port in range(3000):
        dialer.listening[80] = peer = FakePeer()
        guest.say(port, 80, REQUEST)
        guest.say(port, 80, RW, b"x")
        guest.say(port, 80, SHUTDOWN, flags=RCV | SEND)
        assert peer.closed
        assert guest.ops() == [RESPONSE, RST]
    assert (device._connections, device._by_peer, len(device._due)) == ({}, {}, 0)
    assert not device._thirsty


# --- hostile guests ---------------------------------------------------------------------------


def test_there_is_a_limit_to_connections() -> None:
    dialer = FakeDialer()
    device = VirtioVsock(CID, dialer)
    guest = Guest(device)
    answers = []
    for port in range(CONNECTIONS_MAX + 2):
        dialer.listening[80] = FakePeer()
        guest.say(port, 80, REQUEST)
        answers += guest.ops()
    assert answers == [RESPONSE] * CONNECTIONS_MAX + [RST] * 2
    assert device.connect(FakePeer(), 22) is None


def test_a_guest_that_asks_and_never_listens_is_not_served_for_ever() -> None:
    device = VirtioVsock(CID, FakeDialer())
    guest = Guest(device, buffers=0)
    for port in range(ANSWERS_MAX + 100):
        head = struct.pack(HEADER, CID, HOST, port, 80, 0, 1, RW, 0, 0, 0)
        if not guest.tx.free:
            break
        guest.tx.send([head], [])
        for token, length in guest.tx.used():
            guest.tx.filled(token, length)
    assert len(device._due) == ANSWERS_MAX
    guest.offer(100)
    assert len(guest.heard()) >= ANSWERS_MAX


def test_an_rst_is_never_answered_by_one() -> None:
    guest = Guest(VirtioVsock(CID, FakeDialer()))
    guest.say(1, 2, RST)
    assert guest.heard() == []


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"kind": 2}, [RST]),
        ({"length": 5}, [RST]),
        ({"source": 4}, []),
        ({"target": 9}, []),
        ({"op": 99}, [RST]),
        ({"op": REQUEST}, [RST]),
        ({"op": 0}, [RST]),
    ],
)
def test_packets_that_make_no_sense(options: dict[str, int], answer: list[int]) -> None:
    guest, peer, _ = open_to_host()
    options = {"op": RW, **options}
    op = options.pop("op")
    guest.say(1000, 80, op, **options)  # type: ignore[arg-type]
    assert guest.ops() == answer
    assert peer.closed == bool(answer)


def test_an_rx_buffer_without_room_is_the_drivers_fault() -> None:
    guest, _, _ = open_to_host(size=HEADER_LEN)
    assert not guest.driver.status & NEEDS_RESET
    guest = Guest(VirtioVsock(CID, FakeDialer()), size=HEADER_LEN - 1)
    guest.say(1, 2, RW)
    assert guest.driver.status & NEEDS_RESET


NUMBERS = st.integers(0, 3) | st.integers(0, (1 << 32) - 1)
PACKETS = st.tuples(
    st.sampled_from([(1000, 80), (1000, 81), (22, FIRST_HOST_PORT), (5, 6)]),
    st.integers(0, 8),
    st.binary(max_size=60),
    st.fixed_dictionaries(
        {},
        optional={
            "flags": NUMBERS,
            "alloc": NUMBERS,
            "count": NUMBERS,
            "source": st.sampled_from([CID, 0, 9]),
            "kind": st.sampled_from([1, 1, 1, 2]),
            "length": NUMBERS,
        },
    ),
)


@given(st.lists(PACKETS, max_size=30), st.integers(0, 100))
@settings(deadline=None)
def test_whatever_the_guest_says_the_device_goes_on(
    packets: list[tuple[tuple[int, int], int, bytes, dict[str, int]]], room: int
) -> None:
    dialer = FakeDialer()
    device = VirtioVsock(CID, dialer)
    guest = Guest(device)
    device.connect(mine := FakePeer(), 22)
    for ports, op, data, options in packets:
        dialer.listening.setdefault(80, FakePeer(room)).to_send.append(data)
        guest.say(*ports, op, data, **options)
        for peer in list(device._by_peer):
            device.readable(peer)
            device.writable(peer)
        guest.heard()
        assert sum(len(c.waiting) for c in device._connections.values()) <= 2 * BUF_ALLOC
    assert not guest.driver.status & NEEDS_RESET
    guest.driver.write(0x070, 0)
    assert mine.closed
    assert device._connections == {}


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=3000), max_size=20),
    rooms=st.lists(st.integers(0, 5000), min_size=1, max_size=30),
    alloc=st.integers(1, 10_000),
)
@settings(deadline=None)
def test_bytes_arrive_complete_and_in_order_both_ways(
    chunks: list[bytes], rooms: list[int], alloc: int
) -> None:
    guest, peer, device = open_to_host(room=0)
    peer.to_send.extend(chunks)
    sent = received = 0
    got = b""
    whole = b"".join(chunks)
    told = 0
    for turn in range(20_000):
        peer.room += rooms[turn % len(rooms)] + 1
        if sent < len(whole):
            piece = whole[sent : sent + min(3000, BUF_ALLOC - (sent - told))]
            if piece:
                guest.say(1000, 80, RW, piece, alloc=alloc, count=received)
                sent += len(piece)
        else:
            guest.say(1000, 80, CREDIT_UPDATE, alloc=alloc, count=received)
        device.writable(peer)
        device.readable(peer)
        for packet in guest.heard():
            got += packet.data
            received += len(packet.data)
            told = packet.fwd_cnt
        assert len(got) - received <= alloc
        if got == peer.got == whole:
            break
    assert got == whole
    assert bytes(peer.got) == whole


# --- state ------------------------------------------------------------------------------------


def test_connections_do_not_outlive_a_load_and_the_guest_is_told() -> None:
    guest, _, _ = open_to_host()
    state = guest.driver.mmio.save()
    token = guest.event.send([], [8])
    state["device"]["queues"] = guest.driver.mmio.save()["device"]["queues"]
    guest.driver.mmio.load(state)
    guest.event.kick()
    assert guest.event.used() == [(token, 4)]
    assert guest.event.filled(token, 4) == b"\0\0\0\0"
    guest.say(1000, 80, RW, b"x")
    assert guest.ops() == [RST]


# --- the host's sockets -----------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["its own thread", "the device's"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[VsockHost, Guest]]:
    """The sockets, and whose thread hears of them."""
    errors: list[BaseException] = []
    sockets = VsockHost(str(tmp_path / "vsock"))
    device = VirtioVsock(CID, sockets)
    doorbells = Doorbells(cast("Any", None), device, 0, errors.append)
    if request.param:
        device.watcher = doorbells
        doorbells.start()
    guest = Guest(device, buffers=64)
    sockets.start(device, errors.append)
    yield sockets, guest
    doorbells.close()
    device.detach()
    sockets.close()
    assert errors == []
    assert os.listdir(tmp_path) in ([], ["vsock_80"])


def until(guest: Guest, op: int) -> Packet:
    """Wait for a packet of this kind; those before it are of no interest."""
    for _ in range(3000):
        with guest.device.lock:
            guest.backlog.extend(guest.heard())
        while guest.backlog:
            packet = guest.backlog.popleft()
            if packet.op == op:
                return packet
        sleep(0.01)
    raise AssertionError(f"no packet with op {op}")


def ask(path: str, request: bytes) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(path)
    client.sendall(request)
    return client


def test_a_program_connects_by_asking(host: tuple[VsockHost, Guest]) -> None:
    sockets, guest = host
    with ask(sockets.path, b"CONN") as client:
        sleep(0.02)
        client.sendall(b"ECT 1024\nand more")
        request = until(guest, REQUEST)
        assert request.guest_port == 1024
        with guest.device.lock:
            guest.say(1024, request.host_port, RESPONSE)
        assert client.recv(100) == f"OK {request.host_port}\n".encode()
        assert until(guest, RW).data == b"and more"
        with guest.device.lock:
            guest.say(1024, request.host_port, RW, b"answer")
        assert client.recv(100) == b"answer"
        client.shutdown(socket.SHUT_WR)
        assert until(guest, SHUTDOWN).flags == SEND
        with guest.device.lock:
            guest.say(1024, request.host_port, SHUTDOWN, flags=RCV | SEND)
        assert client.recv(100) == b""
    assert os.stat(sockets.path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "request_", [b"CONNECT\n", b"connect 1\n", b"CONNECT 1x\n", b"CONNECT 4294967296\n", b"x" * 40]
)
def test_what_is_no_request_is_hung_up_on(host: tuple[VsockHost, Guest], request_: bytes) -> None:
    with ask(host[0].path, request_) as client:
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            return


def test_a_guest_that_refuses_closes_the_socket(host: tuple[VsockHost, Guest]) -> None:
    sockets, guest = host
    with ask(sockets.path, b"CONNECT 7\n") as client:
        request = until(guest, REQUEST)
        with guest.device.lock:
            guest.say(7, request.host_port, RST)
        assert client.recv(100) == b""


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_guest_that_connects_when_no_descriptors_are_left_is_refused(
    host: tuple[VsockHost, Guest],
) -> None:
    sockets, guest = host
    taken: list[socket.socket] = []
    sockets.offer(81, taken.append)
    with no_descriptors_left(), guest.device.lock:
        for number in (80, 81):
            guest.say(7, number, REQUEST)
            assert until(guest, RST).host_port == number
    guest.say(7, 81, REQUEST)
    assert until(guest, RESPONSE).host_port == 81
    taken.pop().close()


def test_a_program_that_comes_when_no_descriptors_are_left_waits_and_keeps_nobody_busy(
    host: tuple[VsockHost, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets, guest = host
    accept, tries = sockets._accept, 0

    def counted() -> None:
        nonlocal tries
        tries += 1
        accept()

    monkeypatch.setattr(sockets, "_accept", counted)
    with socket.socket(socket.AF_UNIX) as client:
        with no_descriptors_left():
            began = monotonic()
            client.connect(sockets.path)
            client.sendall(b"CONNECT 7\n")
            wait_for(lambda: tries > 3)
            found = tries
            assert found <= (monotonic() - began) / vsock_host._LOOK_AGAIN + 2
        assert until(guest, REQUEST).guest_port == 7


def test_the_guest_reaches_sockets_by_port(host: tuple[VsockHost, Guest]) -> None:
    sockets, guest = host
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{sockets.path}_80")
        listener.listen()
        with guest.device.lock:
            guest.say(1000, 80, REQUEST)
        assert until(guest, RESPONSE).host_port == 80
        server, _ = listener.accept()
        with server:
            data = os.urandom(1 << 20)
            sender = threading.Thread(target=server.sendall, args=(data,))
            sender.start()
            got = b""
            while len(got) < len(data):
                got += until(guest, RW).data
                with guest.device.lock:
                    guest.say(1000, 80, CREDIT_UPDATE, alloc=1 << 16, count=len(got))
            sender.join(30)
            assert got == data[: len(got)]
        assert until(guest, SHUTDOWN).flags == SEND


class Echoing:
    """A guest that accepts whoever comes, sends back what it gets, and hangs up when they do."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self.counts: dict[tuple[int, int], int] = {}  # bytes had of each connection
        self.refused = 0

    def _main(self) -> None:
        while not self._stop.wait(0.0002):
            with self._guest.device.lock:
                for packet in self._guest.heard():
                    self._answer(packet)

    def _answer(self, packet: Packet) -> None:
        ports = packet.guest_port, packet.host_port
        if packet.op == REQUEST:
            self.counts[ports] = 0
            self._guest.say(*ports, RESPONSE)
        elif packet.op == RW:
            self.counts[ports] += len(packet.data)
            self._guest.say(*ports, RW, packet.data, count=self.counts[ports])
        elif packet.op == SHUTDOWN:
            self._guest.say(*ports, SHUTDOWN, flags=RCV | SEND)
        elif packet.op == RST:
            del self.counts[ports]

    def __enter__(self) -> "Echoing":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_thousands_of_sockets_come_and_go_and_leave_nothing_behind(
    host: tuple[VsockHost, Guest],
) -> None:
    sockets, guest = host
    before, threads = descriptors(), threading.active_count()
    with Echoing(guest) as echoing:
        for number in range(2000):
            with ask(sockets.path, b"CONNECT 1024\n") as client:
                word = b"%d" % number
                if number % 3:  # one in three is gone before the guest has answered
                    assert client.recv(100).startswith(b"OK ")
                    client.sendall(word)
                    assert client.recv(100) == word
        wait_for(lambda: not echoing.counts and descriptors() <= before)
    assert descriptors() <= before
    assert threading.active_count() <= threads
    assert guest.device.idle


def test_many_at_once_are_all_served(host: tuple[VsockHost, Guest]) -> None:
    sockets, guest = host
    with Echoing(guest):
        clients = [ask(sockets.path, b"CONNECT 7\nhello") for _ in range(100)]
        for client in clients:
            got = b""
            while not got.endswith(b"hello"):
                got += client.recv(100)
            assert got.startswith(b"OK ")
        for client in clients:
            client.close()
        wait_for(lambda: guest.device.idle)


def test_what_listeners_left_that_died_is_removed_and_nothing_else(tmp_path: Path) -> None:
    sockets = VsockHost(str(tmp_path / "vsock"))
    ports = range(1000, 2000)
    dead = ["vsock_1000", "vsock_1999", "vsock_999", "vsock_2000", "vsock_x", "other_1000"]
    for name in (*dead, "vsock_1001", "vsock_1002"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name))
        if name == "vsock_1001":
            listener.listen(1)
            living = listener
        elif name == "vsock_1002":
            bound = listener  # and about to listen
        else:
            listener.close()
    (tmp_path / "vsock_1003").touch()
    sockets.tidy(ports)
    with living, bound:
        living.setblocking(False)
        with pytest.raises(BlockingIOError):
            living.accept()  # it was not disturbed
    kept = ["vsock_1001", "vsock_1002", "vsock_1003", *dead[2:]]
    assert sorted(os.listdir(tmp_path)) == sorted(["vsock", *kept])
    sockets.tidy(ports)
    assert sorted(os.listdir(tmp_path)) == sorted(["vsock", "vsock_1003", *dead[2:]])
    shutil.rmtree(tmp_path)
    sockets.tidy(ports)
    sockets.close()


def test_a_path_in_use_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "vsock").touch()
    with pytest.raises(ConfigError, match=r"cannot listen there .* give another path"):
        VsockHost(str(tmp_path / "vsock"))
    with pytest.raises(ConfigError, match="cannot listen there"):
        VsockHost(str(tmp_path / ("x" * 200)))


def test_queues_of_the_driver_are_as_linux_has_them() -> None:
    assert [queue.size for queue in VirtioVsock(CID, FakeDialer()).queues] == [128] * 3
    assert isinstance(Guest(VirtioVsock(CID, FakeDialer())).rx, Queue)
