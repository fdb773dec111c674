"""The network device from the driver's side, and its backends: a stream of frames, a tap, passt."""

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from time import sleep

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import NEEDS_RESET, Driver, Queue
from tinyvmm.devices.virtio.net import (
    FRAME_MAX,
    OFFLOADS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VirtioNet,
)
from tinyvmm.errors import ConfigError
from tinyvmm.net import options
from tinyvmm.net.passt import BACKLOG_MAX, Frames, Passt
from tinyvmm.net.tap import Tap

MAC = bytes.fromhex("525400123456")
NO_HEADER = bytes(12)
PASST = bytes.fromhex("9a5554000001")
GUEST_IP, PASST_IP = bytes((10, 0, 2, 15)), bytes((10, 0, 2, 2))
FRAME = b"\xff" * 6 + MAC + b"\x08\x00" + b"payload of a frame"


class Wire:
    """A backend that does as it is told."""

    def __init__(self, *, vnet_header: bool = False) -> None:
        self.vnet_header = vnet_header
        self.sent: list[bytes] = []
        self.frames: deque[bytes] = deque()
        self.room = 1 << 30  # frames it takes
        self.watched = False
        self.features = 0
        self.enabled = False

    def send(self, views: Sequence[memoryview]) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.sent.append(b"".join(views))
        return True

    def receive(self, views: Sequence[memoryview]) -> int | None:
        if not self.frames:
            return None
        frame, done = self.frames.popleft(), 0
        for view in views:
            piece = frame[done : done + len(view)]
            view[: len(piece)] = piece
            done += len(piece)
        return done

    def watch(self, *, readable: bool) -> None:
        self.watched = readable

    def use(self, features: int) -> None:
        self.features = features

    def enable(self, *, on: bool) -> None:
        self.enabled = on


def plugged(wire: Wire, **keywords: int) -> tuple[VirtioNet, Driver]:
    device = VirtioNet([wire], MAC, **keywords)
    driver = Driver(device)
    driver.start()
    return device, driver


def test_it_says_what_it_is() -> None:
    driver = Driver(VirtioNet([Wire()], MAC, mtu=1400))
    assert driver.read(0x008) == 1
    config = b"".join(driver.mmio.read(0x100 + i, 1).to_bytes(1, "little") for i in range(12))
    assert config == MAC + struct.pack("<HHH", 1, 1, 1400)
    wanted = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS | VIRTIO_NET_F_MTU
    assert driver.offered() & 0xFF_FFFF == wanted
    assert not Driver(VirtioNet([Wire()], MAC)).offered() & VIRTIO_NET_F_MTU


def test_offloads_are_the_backends_to_offer() -> None:
    wire = Wire(vnet_header=True)
    driver = Driver(VirtioNet([wire], MAC))
    assert driver.offered() & OFFLOADS == OFFLOADS
    driver.start(without=1 << 7)
    assert wire.features & OFFLOADS == OFFLOADS & ~(1 << 7)


@given(cuts=st.lists(st.integers(0, 12 + len(FRAME)), max_size=5))
@settings(deadline=None)
def test_frames_go_out_in_any_framing_without_their_headers(cuts: list[int]) -> None:
    wire = Wire()
    _, driver = plugged(wire)
    data = NO_HEADER + FRAME
    places = sorted({0, *cuts, len(data)})
    pieces = [data[a:b] for a, b in pairwise(places)]
    driver.queues[1].send(pieces, [])
    assert wire.sent == [FRAME]
    assert [length for _, length in driver.queues[1].used()] == [0]


def test_a_backend_that_knows_headers_gets_them() -> None:
    wire = Wire(vnet_header=True)
    _, driver = plugged(wire)
    driver.queues[1].send([b"\1" * 12, FRAME], [])
    assert wire.sent == [b"\1" * 12 + FRAME]


def test_what_is_no_frame_is_given_back_and_gone() -> None:
    wire = Wire()
    _, driver = plugged(wire)
    transmit = driver.queues[1]
    long = b"x" * (FRAME_MAX + 1)
    for pieces in ([b"x"], [NO_HEADER], [NO_HEADER + b"x" * 13], [NO_HEADER, long]):
        transmit.send(pieces, [])
    assert wire.sent == []
    assert len(transmit.used()) == 4
    assert not driver.status & NEEDS_RESET


def test_a_backend_that_takes_nothing_keeps_the_guest_waiting() -> None:
    wire = Wire()
    device, driver = plugged(wire)
    wire.room = 2
    transmit = driver.queues[1]
    for number in range(5):
        transmit.send([NO_HEADER, FRAME + bytes((number,))], [])
    assert len(transmit.used()) == 2
    wire.room = 10
    device.pairs[0].writable()
    assert wire.sent == [FRAME + bytes((number,)) for number in range(5)]
    assert len(transmit.used()) == 3


def test_frames_come_in_with_a_header_that_says_nothing() -> None:
    wire = Wire()
    device, driver = plugged(wire)
    receive = driver.queues[0]
    receive.send([], [5, 9, 2000])
    assert wire.watched
    wire.frames.append(FRAME)
    device.pairs[0].readable()
    (data,) = receive.collect()
    assert data == bytes(10) + b"\1\0" + FRAME


def test_headers_of_the_backends_come_in_as_they_are_but_for_the_count() -> None:
    wire = Wire(vnet_header=True)
    device, driver = plugged(wire)
    driver.queues[0].send([], [2000])
    wire.frames.append(b"\1\1" + b"\7" * 10 + FRAME)
    device.pairs[0].readable()
    (data,) = driver.queues[0].collect()
    assert data == b"\1\1" + b"\7" * 8 + b"\1\0" + FRAME


def test_without_buffers_the_backend_is_not_read() -> None:
    wire = Wire()
    device, driver = plugged(wire)
    receive = driver.queues[0]
    receive.send([], [2000])
    wire.frames.extend([FRAME, FRAME + b"2"])
    device.pairs[0].readable()
    assert not wire.watched
    assert len(wire.frames) == 1
    assert receive.collect() == [bytes(10) + b"\1\0" + FRAME]
    receive.send([], [2000])  # which has been read already, and is there at once
    assert receive.collect() == [bytes(10) + b"\1\0" + FRAME + b"2"]
    receive.send([], [2000])
    assert wire.watched


def test_a_buffer_too_small_for_any_frame_is_the_drivers_fault() -> None:
    wire = Wire()
    device, driver = plugged(wire)
    driver.queues[0].send([], [20])
    wire.frames.append(FRAME)
    device.pairs[0].readable()
    assert driver.status & NEEDS_RESET
    assert list(wire.frames) == [FRAME]


def test_a_reset_device_reads_and_writes_nothing() -> None:
    wire = Wire()
    device, driver = plugged(wire)
    driver.queues[0].send([], [2000])
    driver.write(0x070, 0)
    assert not wire.watched
    wire.frames.append(FRAME)
    device.pairs[0].readable()
    device.pairs[0].writable()
    assert list(wire.frames) == [FRAME]


def test_frames_that_wait_survive_save_and_load() -> None:
    wire = Wire()
    wire.room = 0
    device, driver = plugged(wire)
    driver.queues[1].send([NO_HEADER, FRAME], [])
    driver.mmio.load(driver.mmio.save())
    wire.room = 1
    device.pairs[0].writable()
    assert wire.sent == [FRAME]


# --- several pairs of queues ------------------------------------------------------------------


def several(count: int, *, without: int = 0) -> tuple[VirtioNet, Driver, list[Wire]]:
    wires = [Wire() for _ in range(count)]
    device = VirtioNet(wires, MAC)
    driver = Driver(device)
    driver.start(without=without, size=16)
    return device, driver, wires


def command(queue: Queue, data: bytes) -> list[bytes]:
    queue.send([data[:1], data[1:]], [1])
    return queue.collect()


def use_pairs(queue: Queue, count: int) -> list[bytes]:
    return command(queue, struct.pack("<BBH", 4, 0, count))


def test_each_pair_has_two_queues_and_the_control_queue_comes_last() -> None:
    _, driver, _ = several(3)
    assert driver.features & (VIRTIO_NET_F_MQ | VIRTIO_NET_F_CTRL_VQ) == 1 << 22 | 1 << 17
    assert len(driver.queues) == 7
    assert driver.mmio.read(0x108, 2) == 3  # max_virtqueue_pairs
    assert not Driver(VirtioNet([Wire()], MAC)).offered() & (1 << 22 | 1 << 17)


def test_one_pair_is_used_until_the_driver_asks_for_more() -> None:
    _, driver, wires = several(3)
    for receive in driver.queues[0:6:2]:
        receive.send([], [2000])
    assert [(wire.enabled, wire.watched) for wire in wires] == [(True, True), *[(False, False)] * 2]
    assert use_pairs(driver.queues[6], 2) == [b"\0"]
    assert [wire.enabled for wire in wires] == [True, True, False]
    assert [wire.watched for wire in wires] == [True, True, False]
    driver.write(0x070, 0)
    assert [wire.enabled for wire in wires] == [True, False, False]


def test_each_pair_has_its_own_way() -> None:
    device, driver, wires = several(2)
    assert use_pairs(driver.queues[4], 2) == [b"\0"]
    for number, wire in enumerate(wires):
        receive, transmit = driver.queues[2 * number : 2 * number + 2]
        transmit.send([NO_HEADER, FRAME + bytes((number,))], [])
        assert wire.sent == [FRAME + bytes((number,))]
        receive.send([], [2000])
        wire.frames.append(FRAME + b"back" + bytes((number,)))
        device.pairs[number].readable()
        assert receive.collect() == [bytes(10) + b"\1\0" + FRAME + b"back" + bytes((number,))]


def test_a_pair_given_up_gets_no_more_frames() -> None:
    device, driver, wires = several(2)
    use_pairs(driver.queues[4], 2)
    driver.queues[2].send([], [2000])
    assert use_pairs(driver.queues[4], 1) == [b"\0"]
    wires[1].frames.append(FRAME)
    device.pairs[1].readable()
    assert driver.queues[2].collect() == []
    assert not wires[1].watched


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<BBH", 4, 0, 0), struct.pack("<BBH", 4, 0, 4), struct.pack("<BBH", 4, 1, 1),
        struct.pack("<BBH", 1, 0, 1), b"\0\0\1", b"\4\0", bytes(4096), b"\4\0\1\0\0",
    ],
)  # fmt: skip
def test_other_commands_are_answered_by_an_error(data: bytes) -> None:
    _, driver, wires = several(3)
    assert command(driver.queues[6], data) == [b"\1"]
    assert [wire.enabled for wire in wires] == [True, False, False]
    assert not driver.status & NEEDS_RESET


def test_without_mq_the_control_queue_is_the_third_and_there_is_one_pair() -> None:
    _, driver, wires = several(3, without=VIRTIO_NET_F_MQ)
    assert use_pairs(driver.queues[2], 1) == [b"\1"]
    driver.queues[3].send([NO_HEADER, FRAME], [])
    assert wires[1].sent == []
    assert use_pairs(driver.queues[6], 1) == []


def test_pairs_in_use_survive_save_and_load() -> None:
    wires = [Wire(vnet_header=True) for _ in range(3)]
    wires[1].room = 0
    driver = Driver(VirtioNet(wires, MAC))
    driver.start(size=16)
    use_pairs(driver.queues[6], 2)
    driver.queues[2].send([], [2000])
    driver.queues[3].send([NO_HEADER, FRAME], [])
    state = driver.mmio.save()
    others = [Wire(vnet_header=True) for _ in range(3)]
    other = Driver(VirtioNet(others, MAC), driver.ram)
    other.mmio.load(state)
    assert [(wire.enabled, wire.watched) for wire in others] == [
        *[(True, True)] * 2,
        (False, False),
    ]
    assert others[0].features & OFFLOADS == OFFLOADS
    assert others[1].sent == [NO_HEADER + FRAME]  # which the first had not taken


# --- a stream of frames -----------------------------------------------------------------------


@pytest.fixture
def stream() -> Iterator[tuple[Frames, socket.socket, list[str]]]:
    ours, theirs = socket.socketpair()
    told: list[str] = []
    frames = Frames(ours, lambda: told.append("ended"))
    yield frames, theirs, told
    frames.close()
    theirs.close()


Stream = tuple[Frames, socket.socket, list[str]]


def room(size: int = 70_000) -> memoryview:
    return memoryview(bytearray(size))


def test_a_frame_follows_its_length(stream: Stream) -> None:
    frames, theirs, _ = stream
    assert frames.send([memoryview(b"abc"), memoryview(b"def")])
    assert theirs.recv(100) == b"\0\0\0\6abcdef"
    theirs.sendall(b"\0\0\0\5")
    buffer = room()
    frames.drain()
    assert frames.receive([buffer]) is None
    theirs.sendall(b"hello\0\0\0\2xy")
    frames.drain()
    assert frames.receive([buffer[:2], buffer[2:]]) == 5
    assert bytes(buffer[:5]) == b"hello"
    assert frames.receive([buffer]) == 2


def test_a_frame_too_long_for_the_buffer_is_dropped(stream: Stream) -> None:
    frames, theirs, _ = stream
    theirs.sendall(b"\0\0\0\4long\0\0\0\2ok")
    frames.drain()
    buffer = room(3)
    assert frames.receive([buffer]) == 2
    assert bytes(buffer[:2]) == b"ok"


def test_a_reader_that_stops_is_waited_for_and_no_frame_is_torn(stream: Stream) -> None:
    frames, theirs, _ = stream
    sent = 0
    frame = memoryview(bytes(range(256)) * 200)
    while frames.send([frame]):
        sent += 1
    theirs.setblocking(False)
    got = b""
    while len(got) < sent * (4 + len(frame)):
        try:
            got += theirs.recv(1 << 20)
        except BlockingIOError:
            if frames.send([frame]):
                sent += 1
    assert got[: sent * (4 + len(frame))] == (struct.pack(">I", len(frame)) + bytes(frame)) * sent


@pytest.mark.parametrize("last", [b"", b"\xff\xff\xff\xff", b"\0\0\0\5hal"])
def test_the_other_ends_end_is_told_once(stream: Stream, last: bytes) -> None:
    frames, theirs, told = stream
    theirs.sendall(last)
    theirs.close()
    frames.drain()
    frames.drain()
    assert frames.receive([room()]) is None
    assert frames.send([memoryview(b"into the void")])
    assert told == ["ended"]


def test_a_thread_tells_the_device_of_both(stream: Stream) -> None:
    frames, theirs, _ = stream
    errors: list[BaseException] = []
    device = VirtioNet([frames], MAC)
    driver = Driver(device)
    receive, transmit = driver.start()
    frames.pump.start(device.pairs[0], errors.append)
    with device.lock:
        receive.send([], [2000])
    theirs.sendall(struct.pack(">I", len(FRAME)) + FRAME)
    found: list[bytes] = []
    for _ in range(3000):
        with device.lock:
            found += receive.collect()
        if found:
            break
        sleep(0.01)
    assert found == [bytes(10) + b"\1\0" + FRAME]
    with device.lock:
        transmit.send([NO_HEADER, FRAME], [])
    assert theirs.recv(100) == struct.pack(">I", len(FRAME)) + FRAME
    device.detach()
    assert errors == []


def test_frames_that_came_together_do_not_wait_for_more(stream: Stream) -> None:
    frames, theirs, _ = stream
    device = VirtioNet([frames], MAC)
    driver = Driver(device)
    receive, _ = driver.start()
    theirs.sendall(b"".join(struct.pack(">I", len(FRAME)) + FRAME for _ in range(3)))
    frames.drain()
    receive.send([], [2000])
    assert len(receive.collect()) == 1
    receive.send([], [2000])
    receive.send([], [2000])
    assert len(receive.collect()) == 2
    device.detach()


@given(
    lengths=st.lists(st.integers(0, 3000), max_size=8),
    cuts=st.lists(st.integers(0, 24_000), max_size=8),
)
@settings(deadline=None)
def test_frames_come_whole_however_the_stream_is_cut(lengths: list[int], cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    frames = Frames(ours, pytest.fail)
    wanted = [bytes((number,)) * length for number, length in enumerate(lengths)]
    data = b"".join(struct.pack(">I", len(frame)) + frame for frame in wanted)
    found: list[bytes] = []
    buffer = room()
    for start, end in pairwise(sorted({0, *[min(cut, len(data)) for cut in cuts], len(data)})):
        theirs.sendall(data[start:end])
        frames.drain()
        while (count := frames.receive([buffer[:7], buffer[7:]])) is not None:
            found.append(bytes(buffer[:count]))
    assert found == wanted
    frames.close()
    theirs.close()


def test_what_was_sent_last_is_read_before_the_end(stream: Stream) -> None:
    frames, theirs, _ = stream
    got: list[bytes] = []

    def read() -> None:
        sleep(0.05)
        got.extend((theirs.recv(100), theirs.recv(100)))

    reader = threading.Thread(target=read)
    reader.start()
    frames.send([memoryview(b"last words")])
    frames.end_output()
    reader.join()
    assert got == [b"\0\0\0\x0alast words", b""]


def test_frames_wait_for_the_guest_and_not_in_the_socket(stream: Stream) -> None:
    frames, theirs, _ = stream
    frame = struct.pack(">I", 60_000) + bytes(range(250)) * 240
    count = BACKLOG_MAX // 2 // 60_000
    for _ in range(count):
        theirs.sendall(frame)  # which would wait for ever, were nobody to read
        frames.drain()
    buffer = room()
    assert [frames.receive([buffer]) for _ in range(count + 1)] == [60_000] * count + [None]
    assert bytes(buffer[:60_000]) == frame[4:]


def test_a_guest_that_takes_nothing_has_no_more_than_a_limit_kept_for_it(stream: Stream) -> None:
    frames, theirs, _ = stream
    frame = struct.pack(">I", 60_000) + bytes(60_000)
    theirs.setblocking(False)
    sent = 0
    idle = 0
    data = b""
    while idle < 3:
        data = data or frame
        try:
            done = theirs.send(data)
        except BlockingIOError:
            frames.drain()
            idle += 1
        else:
            idle = 0
            sent += done
            data = data[done:]
    assert BACKLOG_MAX < sent < BACKLOG_MAX + (4 << 20)
    buffer = room()
    taken = 0
    while (count := frames.receive([buffer])) is not None:
        taken += count
        frames.drain()  # and it is read again
    assert taken == sent // len(frame) * 60_000


def test_a_guests_server_hears_that_its_connection_stands_once_passt_has_read_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinyvmm.net.passt._READ_TIMEOUT", 60.0)
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    frames = Frames(ours, pytest.fail, published=True)
    errors: list[BaseException] = []
    device = VirtioNet([frames], MAC)
    receive, transmit = Driver(device).start()
    frames.pump.start(device.pairs[0], errors.append)
    head = PASST + MAC + b"\x08\0\x45\0\0\x28" + bytes(4) + b"\x40\6\0\0" + GUEST_IP + PASST_IP
    syn_ack = head + struct.pack(">HHIIBBHHH", 22, 5000, 7, 9, 0x50, 0x12, 64240, 0, 0)
    with device.lock:
        receive.send([], [2000])
        transmit.send([NO_HEADER, syn_ack], [])
        transmit.send([NO_HEADER, FRAME], [])
    sleep(0.05)
    with device.lock:
        assert receive.collect() == []
        assert len(transmit.used()) == 1
    assert theirs.recv(1000)[4:] == syn_ack  # and nothing behind it
    assert theirs.recv(1000)[4:] == FRAME
    with device.lock:
        (answer,) = receive.collect()
    assert answer[12:26] == MAC + PASST + b"\x08\0"
    assert struct.unpack(">HHIIBB", answer[46:60]) == (5000, 22, 9, 8, 0x50, 0x10)
    device.detach()
    frames.close()
    theirs.close()
    assert errors == []


# --- a tap ------------------------------------------------------------------------------------

TAP_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import os, select, struct, subprocess
from tinyvmm.errors import ConfigError
from tinyvmm.net.tap import Tap
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
tap = Tap("probe0")
for features in range(0, 1 << 13, 2):  # of whatever a driver may accept
    if not features & ~0x182:
        tap.use(features)
tap.use(0)
for command in ("address add 192.0.2.1/24 dev probe0", "link set probe0 up",
                "neigh add 192.0.2.2 lladdr 52:54:00:12:34:56 dev probe0"):
    subprocess.run(["ip", *command.split()], check=True)
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.sendto(b"to the guest", ("192.0.2.2", 7))
    buffer = memoryview(bytearray(2000))
    while True:
        select.select([tap.fd], [], [])
        count = tap.receive([buffer[:5], buffer[5:]])
        if count and bytes(buffer[:count]).endswith(b"to the guest"):
            break
    frame = bytearray(buffer[12:count])
    assert frame[:6] == bytes.fromhex("525400123456")
    # Back as it came: addresses and ports exchanged leave every checksum right.
    frame[:12] = frame[6:12] + frame[:6]
    frame[26:34] = frame[30:34] + frame[26:30]
    frame[34:38] = frame[36:38] + frame[34:36]
    sock.settimeout(120)
    assert tap.send([memoryview(bytes(12)), memoryview(frame)])
    assert sock.recv(100) == b"to the guest"
assert tap.receive([buffer]) is None or True
tap.close()
taps = [Tap("several0", several=True) for _ in range(3)]
for command in ("address add 198.51.100.1/24 dev several0", "link set several0 up",
                "neigh add 198.51.100.2 lladdr 52:54:00:12:34:56 dev several0"):
    subprocess.run(["ip", *command.split()], check=True)

def got_by(taps):
    found = set()
    for number in range(200):  # flows, which the kernel spreads
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"to the guest", ("198.51.100.2", 1000 + number))
    for index, tap in enumerate(taps):
        while (count := tap.receive([buffer])) is not None:
            if bytes(buffer[:count]).endswith(b"to the guest"):
                found.add(index)
    return found

assert got_by(taps) == {{0, 1, 2}}
taps[2].enable(on=False)
assert got_by(taps) == {{0, 1}}
taps[2].enable(on=True)
assert got_by(taps) == {{0, 1, 2}}
for tap in taps:
    tap.close()
for name, more, several, words in (("one0", (), True, "leave queues= out"),
                                   ("many0", ("multi_queue",), False, "give queues=2")):
    subprocess.run(["ip", "tuntap", "add", name, "mode", "tap", *more], check=True)
    try:
        Tap(name, several=several)
    except ConfigError as error:
        assert words in str(error), error
    else:
        raise AssertionError(name)
Tap("many0", several=True).close()
taken = [Tap("many0", several=True) for _ in range(2)]
subprocess.run(["ip", "link", "del", "many0"], check=True)
taken[0].use(0x182)
taken[1].enable(on=False)
taken[1].enable(on=True)
for tap in taken:
    tap.close()
print("good")
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists(),
    reason="taps are root's, and need iproute2 and /dev/net/tun",
)
def test_a_tap_carries_frames_both_ways() -> None:
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", TAP_PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "good\n", "")


def test_a_tap_that_cannot_be_is_one_line() -> None:
    with pytest.raises(ConfigError, match="give a name of 1 to 15 bytes"):
        Tap("a/b")
    with pytest.raises(ConfigError, match="give a name"):
        Tap("x" * 16)


# --- passt ------------------------------------------------------------------------------------


def reaches_out() -> bool:
    """Whether passt has something to stand for: an interface with a default route."""
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    return any(line.split()[1] == "00000000" for line in lines)


@pytest.mark.skipif(
    shutil.which("passt") is None or not reaches_out(),
    reason="passt is not installed, or this computer has no default route",
)
def test_passt_answers_for_the_gateway() -> None:
    told: list[str] = []
    asked = bytes((10, 0, 2, 2))
    arp = b"\xff" * 6 + MAC + struct.pack(">HHHBBH", 0x806, 1, 0x800, 6, 4, 1)
    arp += MAC + bytes((10, 0, 2, 15)) + bytes(6) + asked
    where = ["--ipv4-only", "--address", "10.0.2.15", "--netmask", "255.255.255.0"]
    passt = Passt([*where, "--gateway", "10.0.2.2"], told.append, mac=MAC, gateway=asked)
    try:
        buffer = room()
        assert passt.frames.send([memoryview(arp)])
        for _ in range(3000):
            passt.frames.drain()
            count = passt.frames.receive([buffer])
            if count is not None and bytes(buffer[12:14]) == b"\x08\x06":
                break
            sleep(0.01)
        assert bytes(buffer[:6]) == MAC
        assert bytes(buffer[28:32]) == asked
    finally:
        passt.close()
    assert told == []


def test_without_passt_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"cannot run passt .* apt-get install passt"):
        Passt([], pytest.fail, mac=MAC, gateway=bytes(4))


# --- what the user says -----------------------------------------------------------------------


def test_options_are_read() -> None:
    user = options.parse_net("user,mac=52:54:00:12:34:56,mtu=1400")
    assert user is not None
    assert (user.kind, user.mac, user.mtu, user.address) == ("user", MAC, 1400, "10.0.2.15/24")
    text = "tap=br0,address=192.0.2.2/24,gateway=192.0.2.1,dns=1.1.1.1,dns=9.9.9.9"
    tap = options.parse_net(text)
    assert tap is not None
    assert tap[1:-1] == ("br0", None, None, "192.0.2.2/24", "192.0.2.1", ("1.1.1.1", "9.9.9.9"))
    plain, wide = options.parse_net("tap"), options.parse_net("tap,queues=4")
    assert plain is not None
    assert plain.address is None
    assert wide == plain._replace(queues=4)
    assert options.parse_net("none") is None
    assert options.random_mac()[0] & 3 == 2


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("bridge", "give user, tap, tap=NAME or none"),
        ("user=x", "give user, tap, tap=NAME or none"),
        ("tap=", "give user, tap, tap=NAME or none"),
        ("tap,mac=1", "mac=1: give six bytes of one station, e.g. 52:54:"),
        ("tap,mac=01:00:5e:00:00:01", "give six bytes of one station"),
        ("user,mtu=10", "mtu=10: give 68 to 65535"),
        ("user,mtu=x", "give 68 to 65535"),
        ("tap,address=300.0.0.1/24", "give an IPv4 address and its network, e.g. 192.0.2.2/24"),
        ("tap,address=192.0.2.2", "give an IPv4 address and its network"),
        ("tap,gateway=x", "gateway=x: give an IPv4 address, e.g."),
        ("tap,dns=", "dns=: give an IPv4 address, e.g."),
        ("user,address=192.0.2.2/24", "user has no option 'address'; its options: mac=, mtu="),
        ("tap,colour=red", "tap has no option 'colour'; its options: mac=, mtu=, queues=, addr"),
        ("tap,queues=0", "queues=0: give 1 to 16"),
        ("tap,queues=17", "queues=17: give 1 to 16"),
        ("user,queues=2", "passt has one queue; use a tap"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^--net {re.escape(text)}: .*{re.escape(remedy)}"):
        options.parse_net(text)
