"""The console's ports against a driver that behaves as Linux's does, and some that do not."""

import fcntl
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from select import EPOLLIN

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import EVENT_IDX, NEEDS_RESET, WRITE, Driver, Queue, Ram
from tinyvmm.devices.virtio import console
from tinyvmm.devices.virtio.console import OUTPUT_MAX, ConsolePort, VirtioConsole
from tinyvmm.session import write_all
from tinyvmm.streams import PortInput, PortOutput, Sender
from tinyvmm.views import Views

HEADER = Path("/usr/include/linux/virtio_console.h")
DEVICE_READY, PORT_ADD, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 0, 1, 3, 4, 5, 6, 7
NO_ID = 0xFFFF_FFFF


class Guest:
    """A driver of the console that answers control messages as drivers/char/virtio_console.c."""

    def __init__(self, *names: str, without: int = 0, ram: Ram | None = None) -> None:
        self.ports = [ConsolePort(name) for name in names]
        self.device = VirtioConsole(self.ports)
        self.driver = Driver(self.device, ram)
        self.without = without
        self.start()

    def start(self) -> None:
        self.queues = self.driver.start(without=self.without)
        self.post_control()

    def post_control(self, count: int = 16, length: int = 64) -> None:
        for _ in range(count):
            self.queues[2].add([], [length])
        self.queues[2].kick()

    def say(self, port: int, event: int, value: int = 1) -> None:
        queue = self.queues[3]
        queue.send([struct.pack("<IHH", port, event, value)], [])
        (used,) = queue.used()  # Linux spins for it
        queue.filled(*used)

    def hear(self) -> list[tuple[int, int, int, bytes]]:
        """Return the control messages that came, and post their buffers again."""
        messages = self.queues[2].collect()
        self.post_control(len(messages))
        return [(*struct.unpack_from("<IHH", message), message[8:]) for message in messages]

    def plug(self) -> None:
        """Take every port, and open it."""
        self.say(NO_ID, DEVICE_READY)
        for port, event, _, _ in self.hear():
            assert event == PORT_ADD
            self.say(port, PORT_READY)
        self.hear()
        for port in range(1, len(self.ports) + 1):
            self.say(port, PORT_OPEN)

    def receiveq(self, port: int) -> Queue:
        return self.queues[2 * port + 2]

    def transmitq(self, port: int) -> Queue:
        return self.queues[2 * port + 3]


def plugged(*names: str, without: int = 0) -> Guest:
    guest = Guest(*names, without=without)
    guest.plug()
    return guest


# --- the control queues -----------------------------------------------------------------------


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_events_are_numbered_as_in_the_kernels_header() -> None:
    defined = dict(
        re.findall(r"^#define (VIRTIO_CONSOLE_\w+)\s+(\d+)", HEADER.read_text(), re.MULTILINE)
    )
    for name in ("DEVICE_READY", "PORT_ADD", "PORT_READY", "PORT_OPEN", "PORT_NAME"):
        number = int(defined[f"VIRTIO_CONSOLE_{name}"])
        assert getattr(console, f"VIRTIO_CONSOLE_{name}") == number
        assert globals()[name] == number
    multiport = int(defined["VIRTIO_CONSOLE_F_MULTIPORT"])
    assert 1 << multiport == console.VIRTIO_CONSOLE_F_MULTIPORT


def test_configuration_counts_port_0_and_ours_and_each_has_two_queues() -> None:
    guest = Guest("a", "b", "c")
    mmio = guest.driver.mmio
    assert mmio.read(0x104, 4) == 4
    assert mmio.read(0x100, 4) == 0  # no size is offered
    assert len(guest.queues) == 2 * (4 + 1)
    assert guest.driver.read(0x008) == 3
    assert guest.driver.offered() & 0xFF == 1 << 1


def test_ports_are_added_named_and_opened_in_the_order_a_driver_asks() -> None:
    guest = Guest("in", "out")
    guest.say(NO_ID, DEVICE_READY)
    assert guest.hear() == [(1, PORT_ADD, 1, b""), (2, PORT_ADD, 1, b"")]
    guest.say(2, PORT_READY)
    assert guest.hear() == [(2, PORT_NAME, 1, b"out"), (2, PORT_OPEN, 1, b"")]
    guest.say(1, PORT_READY)
    assert guest.hear() == [(1, PORT_NAME, 1, b"in"), (1, PORT_OPEN, 1, b"")]


def a_console(*, size: tuple[int, int] | None = None) -> tuple[Guest, ConsolePort]:
    guest = Guest("plain", "hvc")
    port = guest.ports[1] = ConsolePort("hvc", console=True)
    if size is not None:
        port.resize(*size)
    guest.device = VirtioConsole(guest.ports)
    guest.driver = Driver(guest.device)
    guest.start()
    guest.say(NO_ID, DEVICE_READY)
    guest.hear()
    return guest, port


def test_a_console_is_told_to_be_one_and_its_size_before_anything_else() -> None:
    guest, port = a_console(size=(24, 80))
    guest.say(2, PORT_READY)
    assert guest.hear() == [
        (2, CONSOLE_PORT, 1, b""),
        (2, RESIZE, 1, struct.pack("<HH", 80, 24)),
        (2, PORT_NAME, 1, b"hvc"),
        (2, PORT_OPEN, 1, b""),
    ]
    assert guest.driver.offered() & 0xFF == 3  # F_SIZE
    assert [guest.driver.mmio.read(at, 2) for at in (0x100, 0x102)] == [80, 24]
    port.resize(50, 132)
    assert [guest.driver.mmio.read(at, 2) for at in (0x100, 0x102)] == [132, 50]
    assert guest.hear() == [(2, RESIZE, 1, struct.pack("<HH", 132, 50))]


def test_of_many_sizes_a_slow_driver_hears_the_last() -> None:
    guest, port = a_console()
    guest.say(2, PORT_READY)
    assert [event for _, event, _, _ in guest.hear()] == [CONSOLE_PORT, PORT_NAME, PORT_OPEN]
    for _ in range(16):  # the buffers that it has posted
        guest.ports[1].resize(1, 1)
    for cols in range(1000):
        port.resize(24, cols)
    assert len(guest.device.save()["pending"]) == 1
    guest.hear()
    assert guest.hear() == [(2, RESIZE, 1, struct.pack("<HH", 999, 24))]


def test_a_size_given_before_the_driver_came_survives_save_load_and_a_reset() -> None:
    guest, port = a_console()
    port.resize(30, 100)
    assert guest.hear() == []
    state = json.loads(json.dumps(guest.driver.mmio.save()))
    port.resize(1, 1)
    guest.driver.mmio.load(state)
    assert port.size == (30, 100)
    guest.driver.write(0x070, 0)
    guest.start()
    guest.say(2, PORT_READY)
    assert (2, RESIZE, 1, struct.pack("<HH", 100, 30)) in guest.hear()


def test_what_is_no_console_or_no_size_is_our_own_mistake() -> None:
    guest, port = a_console()
    with pytest.raises(ValueError, match="no console"):
        guest.ports[0].resize(24, 80)
    for rows, cols in ((-1, 80), (24, 65536)):
        with pytest.raises(ValueError, match="a terminal of"):
            port.resize(rows, cols)


def test_a_driver_that_failed_to_add_a_port_or_itself_hears_nothing_of_it() -> None:
    guest = Guest("a")
    guest.say(NO_ID, DEVICE_READY, 0)
    guest.say(1, PORT_READY, 0)
    assert guest.hear() == []


def test_messages_wait_for_buffers_each_once_however_often_a_driver_asks() -> None:
    guest = Guest("a", "b")
    guest.driver.write(0x070, 0)
    guest.queues = guest.driver.start()
    for _ in range(100):
        guest.say(NO_ID, DEVICE_READY)
        guest.say(1, PORT_READY)
    guest.post_control()
    assert [(port, event) for port, event, _, _ in guest.hear()] == [
        (1, PORT_ADD),
        (2, PORT_ADD),
        (1, PORT_NAME),
        (1, PORT_OPEN),
    ]


@given(
    messages=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=20),
            st.tuples(
                st.sampled_from((0, 1, 2, 3, NO_ID)), st.integers(0, 9), st.integers(0, 2)
            ).map(lambda fields: struct.pack("<IHH", *fields)),
        ),
        max_size=30,
    ),
    buffers=st.integers(0, 16),
)
@settings(deadline=None)
def test_any_control_messages_are_survived_and_kept_in_bounds(
    messages: list[bytes], buffers: int
) -> None:
    guest = Guest("a", "b")
    guest.driver.write(0x070, 0)
    guest.queues = guest.driver.start()
    guest.post_control(buffers)
    for message in messages:
        guest.queues[3].send([message], [])
        guest.queues[3].collect()
    assert not guest.driver.status & NEEDS_RESET
    assert len(guest.device.save()["pending"]) <= 4 * 2
    assert len(guest.queues[2].used()) <= buffers


def test_a_control_message_may_come_in_pieces() -> None:
    guest = Guest("a")
    message = struct.pack("<IHH", NO_ID, DEVICE_READY, 1)
    guest.queues[3].send([message[:1], message[1:5], message[5:]], [])
    assert guest.hear() == [(1, PORT_ADD, 1, b"")]


def test_a_control_buffer_too_small_for_a_message_stops_the_device() -> None:
    guest = Guest("a")
    guest.driver.write(0x070, 0)
    guest.queues = guest.driver.start()
    guest.queues[2].send([], [7])
    guest.queues[3].send([struct.pack("<IHH", NO_ID, DEVICE_READY, 1)], [])
    assert guest.driver.status & NEEDS_RESET


# --- output -----------------------------------------------------------------------------------


@given(
    sent=st.lists(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=3), max_size=9),
    indirect=st.booleans(),
)
@settings(deadline=None)
def test_output_comes_as_it_was_sent_one_buffer_at_a_time(
    sent: list[list[bytes]], indirect: bool
) -> None:
    guest = plugged("a", "b")
    for pieces in sent:
        guest.transmitq(2).send(pieces, [], indirect=indirect)
    assert guest.ports[0].take_output() == b""
    assert [guest.ports[1].take_output() for _ in sent] == [b"".join(each) for each in sent]
    assert guest.ports[1].take_output() == b""
    assert [length for _, length in guest.transmitq(2).used()] == [0] * len(sent)


def test_output_nobody_takes_stays_with_the_driver() -> None:
    guest = plugged("a")
    queue = guest.transmitq(1)
    while queue.free:
        queue.send([b"data"], [])
    guest.driver.write(0x070, guest.driver.status)
    assert queue.used() == []
    assert guest.ports[0].take_output() == b"data"
    assert len(queue.used()) == 1
    assert guest.driver.interrupted()


def test_on_output_is_called_when_the_queue_had_been_found_empty_and_may_take_at_once() -> None:
    guest = plugged("a")
    port = guest.ports[0]
    taken = []
    port.on_output = lambda: taken.append(port.take_output())
    for _ in range(3):
        guest.transmitq(1).send([b"x"], [])
        taken.append(port.take_output())
    assert taken == [b"x", b""] * 3


class Place:
    """What takes bytes at once, so many as there is room for."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.got = bytearray()

    def send(self, views: Views) -> int:
        data = b"".join(views)[: self.room - len(self.got)]
        self.got += data
        return len(data)


class OwnThread:
    """The thread that a device has where its doorbells are eventfds."""

    def watch(self, fd: int, call: Callable[[], None], events: int = EPOLLIN) -> bool:
        del fd, call, events
        return True

    def unwatch(self, fd: int) -> None:
        pass


@pytest.fixture(params=[None, OwnThread()], ids=["a vCPU's thread", "a thread of its own"])
def watcher(request: pytest.FixtureRequest) -> OwnThread | None:
    """Whose thread hears the kicks."""
    watcher: OwnThread | None = request.param
    return watcher


def test_what_has_room_gets_output_before_the_kick_returns_and_nobody_is_woken(
    watcher: OwnThread | None,
) -> None:
    guest = plugged("a")
    guest.device.watcher = watcher
    port, place = guest.ports[0], Place(1 << 20)
    port.on_output = lambda: pytest.fail("woken")
    port.pass_to(place.send)
    for _ in range(3):
        guest.transmitq(1).send([b"one", b"two"], [])
    assert place.got == b"onetwo" * 3
    assert len(guest.transmitq(1).used()) == 3
    port.on_output = lambda: None
    port.pass_to(None)
    guest.transmitq(1).send([b"later"], [])
    assert place.got == b"onetwo" * 3
    assert port.take_output() == b"later"


@given(
    sent=st.lists(st.binary(min_size=1, max_size=20), max_size=60),
    rooms=st.lists(st.integers(0, 30), max_size=60),
    watcher=st.sampled_from([None, OwnThread()]),
)
@settings(deadline=None)
def test_output_keeps_its_order_whatever_a_place_takes_of_it(
    sent: list[bytes], rooms: list[int], watcher: OwnThread | None
) -> None:
    guest = plugged("a")
    guest.device.watcher = watcher
    port, place = guest.ports[0], Place(0)
    queue = guest.transmitq(1)
    port.pass_to(place.send)
    told = [False]
    port.on_output = lambda: told.__setitem__(0, True)

    def relay_one() -> bool:
        data = port.take_output()
        place.got += data
        place.room = max(place.room, len(place.got))
        return bool(data)

    for number, data in enumerate(sent):
        if not queue.free:
            while relay_one():
                pass
        for used in queue.used():
            queue.filled(*used)
        place.room += rooms[number] if number < len(rooms) else 0
        queue.send([data], [])
        if number % 3 == 0:
            relay_one()
    if len(place.got) < sum(map(len, sent)):
        assert told[0]
    while relay_one():
        pass
    assert bytes(place.got) == b"".join(sent)


def test_much_output_wakes_a_thread_once_which_has_it_passed_on_until_nothing_is_left() -> None:
    guest = plugged("a")
    port, queue, place = guest.ports[0], guest.transmitq(1), Place(1 << 20)
    woken = []
    port.on_output = lambda: woken.append(True)
    port.pass_to(place.send)
    for number in range(3):
        queue.send([bytes([number]) * 5000], [])
    assert (woken, bytes(place.got), queue.kicks) == ([True], b"", 1)
    assert port.take_output() == b""
    assert place.got == b"".join(bytes([number]) * 5000 for number in range(3))
    assert len(queue.used()) == 3
    queue.send([b"x"], [])
    assert (woken, bytes(place.got[-1:]), queue.kicks) == ([True], b"x", 2)


def test_much_output_wakes_nobody_where_the_device_has_a_thread() -> None:
    guest = plugged("a")
    guest.device.watcher = OwnThread()
    port, queue, place = guest.ports[0], guest.transmitq(1), Place(1 << 20)
    port.on_output = lambda: pytest.fail("woken")
    port.pass_to(place.send)
    for number in range(3):
        queue.add([bytes([number]) * 5000], [])
    queue.kick()
    assert place.got == b"".join(bytes([number]) * 5000 for number in range(3))
    assert len(queue.used()) == 3
    queue.send([b"x"], [])
    assert place.got[-1:] == b"x"


def test_output_that_a_place_has_no_room_for_stays_with_the_guest_but_for_one_chain(
    watcher: OwnThread | None,
) -> None:
    guest = plugged("a")
    guest.device.watcher = watcher
    port, queue, place = guest.ports[0], guest.transmitq(1), Place(25)
    port.pass_to(place.send)
    while queue.free:
        queue.send([b"ten bytes."], [])
    assert place.got == b"ten bytes." * 2 + b"ten b"
    assert list(port.kept) == [b"ytes."]
    for _ in range(5):
        queue.kick()
        guest.driver.write(0x050, queue.index)
    assert len(queue.used()) == 3
    assert guest.device.queues[queue.index].waiting == queue.size - 3
    assert port.take_output() == b"ytes."
    place.room += 12
    assert port.take_output() == b"n bytes."
    assert place.got[25:] == b"ten bytes.te"


def test_as_many_pieces_are_passed_on_at_a_time_as_a_system_call_takes() -> None:
    guest = Guest("a", ram=Ram(8 << 20))
    guest.plug()
    port, queue = guest.ports[0], guest.transmitq(1)
    counts = []
    port.pass_to(lambda views: counts.append(len(views)) or sum(map(len, views)))  # type: ignore[func-returns-value]
    for count in (400, 600, 1000, 24, 1):
        queue.add([bytes(10)] * count, [], indirect=True)
    queue.kick()
    assert port.take_output() == b""
    assert counts == [1000, 1024, 1]


@pytest.mark.parametrize("without", [0, EVENT_IDX])
def test_a_guest_that_always_has_more_does_not_keep_a_thread_in_the_device(
    monkeypatch: pytest.MonkeyPatch, without: int, watcher: OwnThread | None
) -> None:
    guest = plugged("a", without=without)
    guest.device.watcher = watcher
    port, queue, ram = guest.ports[0], guest.transmitq(1), guest.driver.ram
    head, view, place = queue.free[-1], ram.view, Place(1 << 20)
    woken = []

    def more(gpa: int, length: int) -> memoryview:
        queue.publish(head)  # another vCPU does, as soon as one was taken
        return view(gpa, length)

    port.pass_to(place.send)
    port.on_output = lambda: woken.append(True)
    queue.add([b"x"], [])
    monkeypatch.setattr(guest.device.queues[5], "_view", more)
    queue.kick()
    assert woken == [True]
    assert len(place.got) < 100
    assert port.take_output() == b"x"
    assert len(place.got) < 1000


def test_a_chain_without_data_or_with_too_much_of_it_stops_the_device() -> None:
    guest = plugged("a")
    guest.transmitq(1).send([], [10])
    assert guest.ports[0].take_output() == b""
    assert guest.driver.status & NEEDS_RESET

    guest = plugged("a")
    ram = guest.driver.ram
    table = ram.alloc(16 * 1024)
    for index in range(1024):
        more = index < 1023
        ram.put("<QIHH", table + 16 * index, ram.base, 1 << 20, more, index + more)
    guest.transmitq(1).write_descriptor(0, table, 16 * 1024, 4)
    guest.transmitq(1).publish(0)
    assert OUTPUT_MAX < 1024 << 20
    assert guest.ports[0].take_output() == b""
    assert guest.driver.status & NEEDS_RESET


# --- input ------------------------------------------------------------------------------------


@given(
    moves=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=30),
            st.lists(st.integers(1, 12), min_size=1, max_size=3),
            st.just(None),
        ),
        max_size=60,
    ),
    without=st.sampled_from((0, EVENT_IDX)),
)
@settings(deadline=None)
def test_input_arrives_whole_in_order_and_a_writer_that_waits_is_called(
    moves: list[bytes | list[int] | None], without: int
) -> None:
    guest = plugged("a", without=without)
    port, queue = guest.ports[0], guest.receiveq(1)
    waiting = bytearray()
    put = bytearray()
    got = bytearray()
    called = False

    def on_space() -> None:
        nonlocal called
        called = True

    port.on_space = on_space
    blocked = False
    for move in moves:
        if isinstance(move, bytes):
            waiting += move
        elif isinstance(move, list) and len(move) <= len(queue.free):
            called = False
            queue.send([], move)
            assert called or not blocked
        else:
            for data in queue.collect():
                got += data
        if called or not blocked:
            while waiting and (count := port.put_input(bytes(waiting))):
                put += waiting[:count]
                del waiting[:count]
            blocked = bool(waiting)
    for data in queue.collect():
        got += data
    assert got == put


def test_input_waits_until_somebody_has_the_port_open() -> None:
    guest = Guest("a")
    guest.say(NO_ID, DEVICE_READY)
    guest.say(1, PORT_READY)
    guest.receiveq(1).send([], [100])
    port = guest.ports[0]
    calls = []
    port.on_space = lambda: calls.append(port.put_input(b"data"))
    assert port.put_input(b"lost") == 0
    guest.say(1, PORT_OPEN, 1)
    assert calls == [4]
    guest.say(1, PORT_OPEN, 0)
    guest.receiveq(1).send([], [100])
    assert port.put_input(b"lost") == 0
    assert guest.receiveq(1).collect() == [b"data"]


def test_a_driver_is_asked_for_no_kick_while_nobody_waits_for_its_buffers() -> None:
    guest = plugged("a")
    queue = guest.receiveq(1)
    for _ in range(10):
        queue.send([], [10])
    assert queue.kicks == 1
    assert guest.ports[0].put_input(bytes(101)) == 100
    queue.collect()
    queue.send([], [10])
    assert queue.kicks == 2


def test_a_receive_buffer_without_room_stops_the_device() -> None:
    guest = plugged("a")
    guest.receiveq(1).send([b"readable"], [])
    assert guest.ports[0].put_input(b"data") == 0
    assert guest.driver.status & NEEDS_RESET


@pytest.mark.parametrize("wrong", ["address", "length", "empty", "readable", "head", "too many"])
def test_input_stops_at_a_buffer_that_breaks_a_rule_and_not_before(wrong: str) -> None:
    guest = plugged("a")
    queue, ram = guest.receiveq(1), guest.driver.ram
    for _ in range(2):
        queue.add([], [10])
    gpa = ram.alloc(10)
    descriptor = {
        "address": (0xFFFF_FFFF_FFFF_FFF0, 10, WRITE),
        "length": (gpa, 0xFFFF_FFFF, WRITE),
        "empty": (gpa, 0, WRITE),
        "readable": (gpa, 10, 0),
    }.get(wrong, (gpa, 10, WRITE))
    head = queue.free.pop()
    queue.write_descriptor(head, *descriptor)
    queue.publish(queue.size if wrong == "head" else head)
    if wrong == "too many":
        for _ in range(queue.size):
            queue.publish(head)
    put = guest.ports[0].put_input(bytes(range(100)))
    assert guest.driver.status & NEEDS_RESET
    assert put == (0 if wrong == "too many" else 20)
    assert [queue.filled(*used) for used in queue.used()] == (
        [] if wrong == "too many" else [bytes(range(10)), bytes(range(10, 20))]
    )
    assert bytes(ram.view(gpa, 10)) == bytes(10)
    assert guest.ports[0].put_input(b"more") == 0


@pytest.mark.parametrize("without", [0, EVENT_IDX])
def test_much_input_interrupts_for_the_first_buffer_and_the_last(without: int) -> None:
    guest = plugged("a", without=without)
    queue = guest.receiveq(1)
    for _ in range(5):
        queue.add([], [10])
    seen: list[int] = []
    guest.device.queues[queue.index].on_used = lambda: seen.append(len(queue.used()))
    assert guest.ports[0].put_input(bytes(45)) == 45
    assert seen == [1, 4]


def test_close_reaches_the_driver_after_all_that_was_put() -> None:
    guest = plugged("a")
    guest.receiveq(1).send([], [3, 3])
    guest.receiveq(1).send([], [100])
    port = guest.ports[0]
    assert port.put_input(b"last words") == 10
    port.close()
    assert guest.hear() == [(1, PORT_OPEN, 0, b"")]
    assert b"".join(guest.receiveq(1).collect()) == b"last words"
    guest.receiveq(1).send([], [100])
    assert port.put_input(b"more") == 0
    port.close()
    assert guest.hear() == []


def test_a_port_closed_before_the_driver_knew_it_comes_closed() -> None:
    for early in (True, False):
        port = ConsolePort("a")
        if early:
            port.close()
        guest = Guest()
        guest.ports = [port]
        guest.device = VirtioConsole(guest.ports)
        guest.driver = Driver(guest.device)
        guest.start()
        port.close()
        assert guest.hear() == []
        guest.say(NO_ID, DEVICE_READY)
        guest.say(1, PORT_READY)
        assert [message[1:3] for message in guest.hear()] == [
            (PORT_ADD, 1),
            (PORT_NAME, 1),
            (PORT_OPEN, 0),
        ]


# --- no device, no driver, another driver -----------------------------------------------------


def test_a_port_without_driver_or_device_has_nothing_and_takes_nothing() -> None:
    port = ConsolePort("alone")
    assert (port.take_output(), port.put_input(b"x")) == (b"", 0)
    VirtioConsole([port])
    assert (port.take_output(), port.put_input(b"x")) == (b"", 0)
    guest = plugged("a")
    guest.receiveq(1).send([], [10])
    guest.driver.write(0x070, 0)
    assert (guest.ports[0].take_output(), guest.ports[0].put_input(b"x")) == (b"", 0)


def test_the_next_driver_finds_everything_as_the_first_did() -> None:
    guest = plugged("a", "b")
    guest.ports[1].close()
    guest.start()
    guest.say(NO_ID, DEVICE_READY)
    guest.say(1, PORT_READY)
    guest.say(2, PORT_READY)
    assert [message[:3] for message in guest.hear()] == [
        (1, PORT_ADD, 1),
        (2, PORT_ADD, 1),
        (1, PORT_NAME, 1),
        (1, PORT_OPEN, 1),
        (2, PORT_NAME, 1),
        (2, PORT_OPEN, 0),
    ]
    guest.receiveq(1).send([], [10])
    assert guest.ports[0].put_input(b"x") == 0  # nobody has opened it again


@given(
    lives=st.lists(st.lists(st.binary(min_size=1, max_size=9), max_size=5), max_size=4),
    saved=st.booleans(),
)
@settings(deadline=None)
def test_what_a_driver_sent_before_it_reset_the_device_is_still_there_to_take(
    lives: list[list[bytes]], saved: bool
) -> None:
    guest = plugged("a")
    port = guest.ports[0]
    called = []
    port.on_output = lambda: called.append(True)
    for life, pieces in enumerate(lives, 1):
        for piece in pieces:
            guest.transmitq(1).send([piece], [])
        called.clear()
        guest.driver.write(0x070, 0)
        assert bool(called) == any(lives[:life])
        if saved:
            guest.driver.mmio.load(json.loads(json.dumps(guest.driver.mmio.save())))
        guest.start()
        guest.plug()
    guest.transmitq(1).send([b"last"], [])
    sent = [piece for pieces in lives for piece in pieces]
    assert [port.take_output() for _ in range(len(sent) + 2)] == [*sent, b"last", b""]


def test_loading_a_state_touches_neither_the_rings_nor_what_they_hold() -> None:
    guest = plugged("a")
    guest.transmitq(1).send([b"unsent"], [])
    state = guest.driver.mmio.save()
    ram = bytes(guest.driver.ram.data)
    guest.driver.mmio.load(state)
    assert guest.driver.ram.data == ram
    assert guest.ports[0].take_output() == b"unsent"


@pytest.mark.parametrize("size", [1, 30])
def test_resets_do_not_make_the_host_keep_more_than_its_limit(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(console, "OUTPUT_MAX", 3 * (console.KEPT_COST + size) + 10)
    guest = plugged("a")
    for _ in range(5):
        for _ in range(3):
            guest.transmitq(1).send([bytes(size)], [])
        guest.start()
        guest.plug()
    assert guest.driver.status & NEEDS_RESET == 0
    assert list(iter(guest.ports[0].take_output, b"")) == [bytes(size)] * 3


def test_messages_for_a_driver_that_is_gone_are_not_for_the_next() -> None:
    guest = Guest("a")
    guest.driver.write(0x070, 0)
    guest.queues = guest.driver.start()
    guest.say(NO_ID, DEVICE_READY)
    guest.start()
    assert guest.hear() == []


def test_kicks_of_queues_nobody_uses_do_nothing() -> None:
    guest = plugged("a")
    for index in range(-2 % 7, 10):
        guest.driver.write(0x050, index)
    guest.queues[0].send([], [10])
    guest.queues[1].send([b"x"], [])
    assert guest.queues[0].used() == guest.queues[1].used() == []
    assert not guest.driver.status & NEEDS_RESET


def test_ports_saved_and_loaded_go_on_with_undelivered_messages() -> None:
    guest = Guest("a", "b")
    guest.driver.write(0x070, 0)
    guest.queues = guest.driver.start()
    guest.post_control(6)
    guest.say(NO_ID, DEVICE_READY)
    for port in (1, 2):
        guest.say(port, PORT_READY)
        guest.say(port, PORT_OPEN)
    queue = guest.queues[2]
    assert len(queue.collect()) == 6
    guest.ports[0].close()
    guest.receiveq(2).send([], [10])
    state = json.loads(json.dumps(guest.driver.mmio.save()))
    again = [ConsolePort("a"), ConsolePort("b")]
    guest.device = VirtioConsole(again)
    guest.driver = Driver(guest.device, guest.driver.ram)
    guest.driver.features = queue.driver.features
    for each in guest.queues:
        each.driver = guest.driver
    guest.driver.mmio.load(state)
    assert guest.driver.mmio.save() == state
    assert again[1].put_input(b"on") == 2
    assert again[0].put_input(b"closed") == 0
    guest.post_control(1)
    assert [message[:3] for message in guest.hear()] == [(1, PORT_OPEN, 0)]
    assert guest.receiveq(2).collect() == [b"on"]


@pytest.mark.parametrize("without", [0, EVENT_IDX])
def test_two_threads_pass_a_megabyte_each_way_through_the_streams(without: int) -> None:
    guest = Guest("in", "out", without=without, ram=Ram(8 << 20))
    guest.plug()
    data = bytes(range(256)) * 4096
    stdin, stdout = PortInput(guest.ports[0]), PortOutput(guest.ports[1])
    received = bytearray()

    def write() -> None:
        stdin.write(data)
        stdin.close()

    def read() -> None:
        while piece := stdout.read():
            received.extend(piece)

    threads = [threading.Thread(target=target, daemon=True) for target in (write, read)]
    for thread in threads:
        thread.start()
    got = bytearray()
    sent = 0
    receiveq, transmitq = guest.receiveq(1), guest.transmitq(2)
    while len(got) < len(data) or sent < len(data):
        while receiveq.free:
            receiveq.send([], [4096])
        for piece in receiveq.collect():
            got += piece
        for used in transmitq.used():
            transmitq.filled(*used)
        while transmitq.free and sent < len(data):
            transmitq.send([data[sent : sent + 5000]], [])
            sent += 5000
    threads[0].join()
    stdout.finish()
    threads[1].join()
    assert bytes(got) == data
    assert bytes(received) == data
    assert [message[:3] for message in guest.hear()] == [(1, PORT_OPEN, 0)]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_slow_reader_of_a_pipe_or_socket_gets_every_byte_in_order(kind: str) -> None:
    if kind == "pipe":
        source, target = os.pipe()
    else:
        source, target = (end.detach() for end in socket.socketpair())
    guest = Guest("out", ram=Ram(8 << 20))
    guest.plug()
    output, sender = PortOutput(guest.ports[0]), Sender.of(target)
    assert sender is not None
    output.pass_to(sender.send)
    data = bytes(range(256)) * 4099
    received = bytearray()

    def relay() -> None:
        while piece := output.read():
            write_all(target, piece)
        os.close(target)

    def read() -> None:
        while piece := os.read(source, 3000):
            received.extend(piece)

    threads = [threading.Thread(target=work, daemon=True) for work in (relay, read)]
    threads[0].start()
    queue, sent = guest.transmitq(1), 0
    while sent < len(data):
        for used in queue.used():
            queue.filled(*used)
        if queue.free:
            queue.send([data[sent : sent + 5000]], [])
            sent += 5000
        elif not threads[1].ident:
            threads[1].start()  # everything was full
    output.finish()
    threads[0].join()
    output.release()
    sender.close()
    threads[1].join()
    os.close(source)
    assert bytes(received) == data


def test_a_patient_writer_is_called_when_the_driver_has_half_its_buffers_again() -> None:
    guest = plugged("a")
    port, queue = guest.ports[0], guest.receiveq(1)
    called = []
    port.on_space = lambda: called.append(True)
    for _ in range(8):
        queue.send([], [10])
    called.clear()
    assert port.put_input(bytes(100), patient=True) == 80
    for added in range(1, 5):
        queue.send([], [10])
        assert bool(called) == (added == 4)
    assert port.put_input(bytes(100), patient=True) == 40
    assert port.put_input(bytes(100)) == 0
    called.clear()
    queue.send([], [10])
    assert called


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_driver_that_has_fewer_buffers_than_before_is_not_waited_for(count: int) -> None:
    guest = plugged("a")
    queue, data, got = guest.receiveq(1), bytes(range(256)), bytearray()
    for _ in range(16):
        queue.send([], [10])
    stdin = PortInput(guest.ports[0])
    thread = threading.Thread(target=lambda: stdin.write(data), daemon=True)
    thread.start()
    while len(got) < 160:
        for piece in queue.collect():
            got += piece
    while len(got) < len(data):
        while len(queue.in_flight) < count:
            queue.send([], [10])
        for piece in queue.collect():
            got += piece
    thread.join()
    assert got == data


def test_a_file_and_a_closed_descriptor_may_wait_and_a_broken_pipe_takes_nothing(
    tmp_path: Path,
) -> None:
    with open(tmp_path / "file", "wb") as file:
        assert Sender.of(file.fileno()) is None
    source, target = os.pipe()
    flags = fcntl.fcntl(target, fcntl.F_GETFL)
    sender = Sender.of(target)
    assert sender is not None
    assert fcntl.fcntl(target, fcntl.F_GETFL) == flags  # which others may share
    assert sender.send([memoryview(b"a"), memoryview(b"b")]) == 2
    assert os.read(source, 10) == b"ab"
    os.close(source)
    assert sender.send([memoryview(b"lost")]) == 0
    sender.close()
    os.close(target)
    assert Sender.of(target) is None


def test_writable_descriptors_are_not_read_as_output() -> None:
    guest = plugged("a")
    queue = guest.transmitq(1)
    gpa = queue.ram.alloc(8)
    queue.ram.view(gpa, 8)[:] = b"readbufr"
    queue.write_descriptor(0, gpa, 4, 1, 1)
    queue.write_descriptor(1, gpa + 4, 4, WRITE)
    queue.publish(0)
    queue.kick()
    assert guest.ports[0].take_output() == b"read"
