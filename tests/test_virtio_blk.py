"""The block device against a driver: what is read was written, and nobody gets beyond the disk."""

import errno
import itertools
import json
import os
import re
import struct
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_pci import Board
from tests.test_pci import Driver as PciDriver
from tests.virtio_driver import INDIRECT_TABLE, NEEDS_RESET, NEXT, WRITE, Driver, Queue, Ram
from tinyvmm import trace
from tinyvmm.devices.virtio import blk
from tinyvmm.devices.virtio.blk import VirtioBlk
from tinyvmm.disks import files
from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError
from tinyvmm.views import cut

HEADER = Path("/usr/include/linux/virtio_blk.h")
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
F_FLUSH = 1 << 9
SIZE = 64 * 512


class MemoryDisk:
    """A disk in memory that says what was asked of it; `gate` holds up what is slow."""

    def __init__(self, size: int = SIZE, *, read_only: bool = False) -> None:
        self.size = size
        self.read_only = read_only
        self.data = bytearray(size)
        self.calls: list[tuple[object, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error: OSError | None = None

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        self._may_fail()
        for view in views:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def write_from(self, views: Sequence[memoryview], offset: int) -> None:
        self._may_fail()
        data = b"".join(views)
        self.data[offset : offset + len(data)] = data
        self.calls.append(("write", offset, len(data)))

    def flush(self) -> None:
        self._slow("flush")

    def discard(self, offset: int, length: int) -> None:
        self._slow("discard", offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._slow("zeroes", offset, length, unmap)
        self.data[offset : offset + length] = bytes(length)

    def _slow(self, *call: object) -> None:
        self.begun.set()
        assert self.gate.wait(30)
        self._may_fail()
        self.calls.append(call)

    def _may_fail(self) -> None:
        if self.error is not None:
            raise self.error


class Bench:
    """A driver of a disk."""

    def __init__(self, disk: blk.Disk, ram: Ram | None = None, **more: int) -> None:
        self.device = VirtioBlk(disk, serial="serial-1", queues=more.pop("queues", 1))
        self.driver = Driver(self.device, ram)
        self.queues = self.driver.start(**more)
        self.queue = self.queues[0]

    def send(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        room: int = 0,
        queue: Queue | None = None,
    ) -> int:
        readable = [struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])]
        return (queue or self.queue).send(readable, [room, 1] if room else [1])

    def answers(self, queue: Queue | None = None) -> list[bytes]:
        """What came back: of each chain, data and status."""
        found = []
        queue = queue or self.queue
        for token, length in queue.used():
            whole = sum(len(view) for view in queue.in_flight[token][1])
            data = queue.filled(token, whole)
            assert length in {0, whole}
            found.append(data if length else data[-1:])
        return found

    def ask(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> bytes:
        """Do one request, however long it takes."""
        mark = self.driver.ram.mark()
        self.send(kind, sector, data, room)
        self.settle()
        (answer,) = self.answers()
        self.driver.ram.rewind(mark)
        return answer

    def settle(self) -> None:
        """Wait until the worker has nothing to do."""
        self.device.save()

    def close(self) -> None:
        self.device.detach()


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def bench(disk: MemoryDisk) -> "Bench":
    return Bench(disk)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> object:
    before = threading.active_count()
    made: list[VirtioBlk] = []
    init = VirtioBlk.__init__

    def remember(self: VirtioBlk, *args: object, **more: object) -> None:
        init(self, *args, **more)  # type: ignore[arg-type]
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtioBlk, "__init__", remember)
        yield None
    for device in made:
        device.detach()
    assert threading.active_count() <= before


def test_numbers_are_those_of_the_kernels_header() -> None:
    text = HEADER.read_text()
    for name, value in re.findall(r"#define (VIRTIO_BLK_[FTS]_\w+)\s+(\d+)", text):
        if hasattr(blk, name):
            number = 1 << int(value) if "_F_" in name else int(value)
            assert getattr(blk, name) == number, name
    assert "VIRTIO_BLK_T_IN\t\t0" in text


def test_the_configuration_is_laid_out_as_the_kernel_reads_it() -> None:
    device = VirtioBlk(MemoryDisk(), queues=3, opt_io_size=256 << 10)
    fields = "<QIIHBBIBBHIBBHIIIIIB"
    found = struct.unpack_from(fields, device.config)
    assert found == (
        *(64, blk.SIZE_MAX, blk.SEG_MAX, 0, 0, 0, 512, 0, 0, 0, 512, 0, 0, 3),
        *(blk.DISCARD_SECTORS_MAX, blk.DISCARD_SEG_MAX, 8, blk.ZEROES_SECTORS_MAX, 1, 1),
    )
    assert len(device.config) == 60
    assert len(device.queues) == 3


def test_only_a_disk_that_has_a_best_size_of_requests_offers_the_topology() -> None:
    assert not Driver(VirtioBlk(MemoryDisk())).offered() & 1 << 10
    assert Driver(VirtioBlk(MemoryDisk(), opt_io_size=4096)).offered() & 1 << 10


def test_a_read_only_disk_says_so_and_offers_no_way_to_change_it() -> None:
    offered = Driver(VirtioBlk(MemoryDisk(read_only=True))).offered()
    assert offered & 1 << 5
    assert not offered & (1 << 13 | 1 << 14)
    offered = Driver(VirtioBlk(MemoryDisk())).offered()
    assert not offered & 1 << 5
    assert offered & (1 << 13 | 1 << 14) == 1 << 13 | 1 << 14


@pytest.mark.parametrize("more", [{"queues": 0}, {"queues": 17}, {"serial": "x" * 21}])
def test_what_cannot_be_is_refused(more: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="give"):
        VirtioBlk(MemoryDisk(), **more)  # type: ignore[arg-type]


# --- requests ---------------------------------------------------------------------------------


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    marks = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


@given(
    sector=st.integers(0, 60),
    sectors=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    room_cuts=st.lists(st.integers(0, 3000), max_size=6),
    indirect=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_however_a_request_is_cut_what_was_written_is_read(
    sector: int, sectors: int, cuts: list[int], room_cuts: list[int], indirect: bool
) -> None:
    disk = MemoryDisk()
    bench = Bench(disk)
    data = bytes((7 * at + at // 256) % 251 for at in range(512 * sectors))
    request = struct.pack("<IIQ", OUT, 0, sector) + data
    bench.queue.send(pieces(request, cuts), [1], indirect=indirect)
    assert bench.answers() == [OK]
    assert disk.data == bytes(512 * sector) + data + bytes(SIZE - 512 * (sector + sectors))
    header = struct.pack("<IIQ", IN, 0, sector)
    room = [len(piece) for piece in pieces(bytes(len(data) + 1), room_cuts)]
    bench.queue.send(pieces(header, cuts), room, indirect=indirect)
    assert bench.answers() == [data + OK]


def test_get_id_gives_the_serial_padded_to_20_bytes(bench: Bench) -> None:
    assert bench.ask(GET_ID, room=20) == b"serial-1".ljust(20, b"\0") + OK
    assert bench.ask(GET_ID, room=19) == IOERR


@pytest.mark.parametrize("kind", [2, 3, 5, 9, 10, 14, 15, 255, 0xFFFF_FFFF])
def test_a_request_of_a_type_not_offered_is_unsupported(bench: Bench, kind: int) -> None:
    assert bench.ask(kind, data=bytes(512)) == UNSUPP


def test_a_header_cut_off_is_unsupported(bench: Bench) -> None:
    for length in (0, 1, 15):
        bench.queue.send([bytes(length)] if length else [], [1])
    assert bench.answers() == [UNSUPP] * 3


@pytest.mark.parametrize(
    ("sector", "length"),
    [(64, 512), (63, 1024), (0, 511), (0, 513), (0, 1), (1 << 55, 512), ((1 << 64) - 1, 512)],
)
def test_what_is_not_within_the_disk_or_no_whole_sectors_is_an_error(
    bench: Bench, disk: MemoryDisk, sector: int, length: int
) -> None:
    assert bench.ask(IN, sector, room=length) == IOERR
    assert bench.ask(OUT, sector, data=b"x" * length) == IOERR
    assert disk.calls == []
    assert bench.ask(IN, 63, room=512) == bytes(512) + OK


def test_a_request_of_more_than_the_limits_is_an_error_whatever_the_disk_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blk, "REQUEST_MAX", 4096)
    bench = Bench(MemoryDisk())
    assert bench.ask(IN, room=4096) == bytes(4096) + OK
    assert bench.ask(IN, room=4608) == IOERR


def test_nothing_is_written_to_a_read_only_disk() -> None:
    disk = MemoryDisk(read_only=True)
    bench = Bench(disk)
    assert bench.ask(OUT, data=bytes(512)) == IOERR
    assert bench.ask(DISCARD, data=struct.pack("<QII", 0, 1, 0)) == IOERR
    assert bench.ask(WRITE_ZEROES, data=struct.pack("<QII", 0, 1, 0)) == IOERR
    assert bench.ask(FLUSH) == OK
    assert disk.calls == [("flush",)]


def test_an_error_of_the_hosts_is_the_requests_and_told_in_the_trace(
    bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[trace.Record] = []
    monkeypatch.setattr(trace, "hook", told.append)
    disk.error = OSError(28, "No space left on device")
    for kind in (IN, OUT, FLUSH, WRITE_ZEROES):
        data = struct.pack("<QII", 0, 1, 0) if kind == WRITE_ZEROES else bytes(512)
        assert bench.ask(kind, data=data, room=512 if kind == IN else 0) == IOERR
    assert len([one for one in told if "No space" in str(one)]) == 4
    assert not bench.driver.status & NEEDS_RESET


def test_discards_and_zeroes_reach_the_disk_in_bytes(bench: Bench, disk: MemoryDisk) -> None:
    two = struct.pack("<QIIQII", 1, 2, 0, 60, 4, 0)
    assert bench.ask(DISCARD, data=two) == OK
    assert bench.ask(WRITE_ZEROES, data=struct.pack("<QII", 3, 5, 0)) == OK
    assert bench.ask(WRITE_ZEROES, data=struct.pack("<QII", 3, 5, 1)) == OK
    assert disk.calls == [
        ("discard", 512, 1024),
        ("discard", 30720, 2048),
        ("zeroes", 1536, 2560, False),
        ("zeroes", 1536, 2560, True),
    ]


@pytest.mark.parametrize(
    ("kind", "data", "answer"),
    [
        (DISCARD, struct.pack("<QII", 0, 1, 1), UNSUPP),  # unmap is WRITE_ZEROES' own
        (DISCARD, struct.pack("<QII", 0, 1, 2), UNSUPP),
        (WRITE_ZEROES, struct.pack("<QII", 0, 1, 3), UNSUPP),
        (DISCARD, b"", IOERR),
        (DISCARD, bytes(15), IOERR),
        (DISCARD, bytes(17), IOERR),
        (DISCARD, bytes(16 * 33), IOERR),
        (WRITE_ZEROES, bytes(32), IOERR),
        (DISCARD, struct.pack("<QII", 64, 1, 0), IOERR),
        (DISCARD, struct.pack("<QII", 0, 65, 0), IOERR),
        (WRITE_ZEROES, struct.pack("<QII", 1, 64, 0), IOERR),
        (DISCARD, struct.pack("<QII", (1 << 64) - 1, 1, 0), IOERR),
        (DISCARD, struct.pack("<QIIQII", 0, 1, 0, 64, 1, 0), IOERR),  # all of it or nothing
    ],
)
def test_a_range_that_is_wrong_changes_nothing(
    bench: Bench, disk: MemoryDisk, kind: int, data: bytes, answer: bytes
) -> None:
    assert bench.ask(kind, data=data) == answer
    assert disk.calls == []


def test_a_request_without_room_for_its_status_stops_the_device(bench: Bench) -> None:
    bench.queue.send([struct.pack("<IIQ", FLUSH, 0, 0)], [])
    assert bench.driver.status & NEEDS_RESET
    assert bench.queue.used() == []


# --- what is slow -----------------------------------------------------------------------------


def test_a_slow_flush_holds_up_nothing_else(bench: Bench, disk: MemoryDisk) -> None:
    disk.gate.clear()
    flush = bench.send(FLUSH)
    bench.send(OUT, 1, data=b"w" * 512)
    bench.send(IN, 1, room=512)
    assert [answer[-1:] for answer in bench.answers()] == [OK, OK]
    disk.gate.set()
    bench.settle()
    assert bench.queue.used() == [(flush, 1)]


def test_a_flush_comes_after_the_writes_before_it(bench: Bench, disk: MemoryDisk) -> None:
    for sector in range(8):
        bench.send(OUT, sector, data=bytes(512))
        bench.send(FLUSH)
    bench.settle()
    assert bench.answers() == [OK] * 16
    kinds = [call[0] for call in disk.calls]
    for number in range(8):
        flush = [at for at, kind in enumerate(kinds) if kind == "flush"][number]
        assert kinds[:flush].count("write") > number


def test_without_the_flush_feature_a_write_is_flushed_before_it_is_done(disk: MemoryDisk) -> None:
    bench = Bench(disk, without=F_FLUSH)
    disk.gate.clear()
    bench.send(OUT, data=b"w" * 512)
    assert bench.answers() == []
    disk.gate.set()
    bench.settle()
    assert bench.answers() == [OK]
    assert disk.calls == [("write", 0, 512), ("flush",)]
    assert bench.ask(DISCARD, data=struct.pack("<QII", 0, 1, 0)) == OK
    assert disk.calls[2:] == [("discard", 0, 512), ("flush",)]


def test_a_reset_forgets_what_waits_and_the_next_driver_waits_for_what_does_not(
    bench: Bench, disk: MemoryDisk
) -> None:
    disk.gate.clear()
    bench.send(WRITE_ZEROES, data=struct.pack("<QII", 0, 8, 0))
    bench.send(FLUSH)
    assert disk.begun.wait(30)
    (queue,) = bench.driver.start()
    ram = bytes(bench.driver.ram.data)
    bench.send(OUT, 2, data=b"n" * 512, queue=queue)
    assert queue.used() == []  # the zeroes would come on top
    disk.gate.set()
    bench.settle()
    assert bench.answers(queue) == [OK]
    assert bench.queue.used() == []
    assert disk.calls == [("zeroes", 0, 4096, False), ("write", 1024, 512)]
    assert disk.data[1024:1536] == b"n" * 512
    old = bench.queue.used_gpa - bench.driver.ram.base
    assert bench.driver.ram.data[old : old + 100] == ram[old : old + 100]


def test_a_device_that_leaves_waits_for_its_worker_and_no_longer(
    bench: Bench, disk: MemoryDisk
) -> None:
    disk.gate.clear()
    for _ in range(5):
        bench.send(FLUSH)
    assert disk.begun.wait(30)
    threading.Timer(0.05, disk.gate.set).start()
    bench.close()
    assert disk.calls == [("flush",)]
    assert bench.queue.used() == []


def test_a_ring_of_flushes_without_end_stops_the_device(bench: Bench, disk: MemoryDisk) -> None:
    disk.gate.clear()
    token = bench.send(FLUSH)
    for _ in range(300):
        bench.queue.publish(token)
        bench.driver.write(0x050, 0)
    assert bench.driver.status & NEEDS_RESET
    assert len(bench.device._tasks) <= blk.QUEUE_SIZE
    disk.gate.set()


def test_without_a_descriptor_for_its_worker_the_device_stops(
    bench: Bench, disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_value: int, _flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as context:
        context.setattr(os, "eventfd", none_left)
        bench.send(FLUSH)
    assert bench.driver.status & NEEDS_RESET
    assert disk.calls == []


def test_requests_that_wait_keep_none_of_their_many_buffers(disk: MemoryDisk) -> None:
    bench = Bench(disk)
    disk.gate.clear()
    ram, queue = bench.driver.ram, bench.queue
    header, status = ram.alloc(16), ram.alloc(1)
    ram.put("<IIQ", header, FLUSH, 0, 0)
    table = ram.alloc(16 * 1024)
    for place in range(1023):
        ram.put("<QIHH", table + 16 * place, header, 16, NEXT, place + 1)
    ram.put("<QIHH", table + 16 * 1023, status, 1, WRITE, 0)
    for head in range(queue.size):
        queue.write_descriptor(head, table, 16 * 1024, INDIRECT_TABLE)
        queue.publish(head)
    tracemalloc.start()
    try:
        queue.kick()
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    assert len(bench.device._tasks) >= queue.size - 1
    disk.gate.set()
    bench.settle()
    assert sorted(queue.used()) == [(head, 1) for head in range(queue.size)]


@pytest.mark.parametrize("queues", [1, 4])
def test_a_device_saved_in_mid_traffic_has_done_what_it_began(queues: int) -> None:
    disk = MemoryDisk()
    bench = Bench(disk, queues=queues, size=32)
    disk.gate.clear()
    for queue in bench.queues:
        bench.send(OUT, 3, data=b"3" * 512, queue=queue)
        bench.send(FLUSH, queue=queue)
        for token, length in queue.used():
            queue.filled(token, length)
    threading.Timer(0.05, disk.gate.set).start()
    state = json.loads(json.dumps(bench.driver.mmio.save()))
    assert state["interrupt_status"] == 1
    other = Bench(disk, bench.driver.ram, queues=queues, size=32)
    other.driver.features = bench.driver.features
    other.driver.mmio.load(state)
    assert other.driver.mmio.save() == state
    for queue in bench.queues:
        queue.driver = other.driver
        assert bench.answers(queue) == [OK]
        other.send(IN, 3, room=512, queue=queue)
        assert other.answers(queue) == [b"3" * 512 + OK]


def test_each_queue_is_served_for_itself() -> None:
    bench = Bench(MemoryDisk(), queues=3, size=16)
    for number, queue in enumerate(bench.queues):
        bench.send(OUT, number, data=bytes([number]) * 512, queue=queue)
    for number, queue in enumerate(bench.queues):
        bench.send(IN, number, room=512, queue=queue)
        assert bench.answers(queue) == [OK, bytes([number]) * 512 + OK]


def test_it_answers_behind_pci_and_interrupts_by_the_queues_vector() -> None:
    board = Board(VirtioBlk(MemoryDisk(), serial="pci"))
    driver = PciDriver(board)
    (table,) = driver.start()
    ram = board.ram
    gpa = ram.alloc(64)
    ram.put("<IIQ", gpa, GET_ID, 0, 0)
    ram.put("<QIHH", table, gpa, 16, NEXT, 1)
    ram.put("<QIHH", table + 16, gpa + 16, 21, WRITE, 0)
    avail = board.device.queues[0].avail_gpa
    ram.put("<HHH", avail, 0, 1, 0)
    board.device.notify(0)
    assert bytes(ram.view(gpa + 16, 21)) == b"pci".ljust(21, b"\0")
    assert len(board.sent) == 1


# --- hostile drivers --------------------------------------------------------------------------

GPAS = st.one_of(
    st.integers(0x10_0000, 0x10_FFFF),
    st.sampled_from([0, 0xF_FFF8, 0x10_FFF0, 0x11_0000, 1 << 63, (1 << 64) - 1]),
)
LENGTHS = st.one_of(st.integers(0, 2000), st.sampled_from([16, 512, 513, 0xFFFF_FFFF, 0x1_0000]))
DESCRIPTORS = st.tuples(st.integers(0, 15), GPAS, LENGTHS, st.integers(0, 7), st.integers(0, 20))
KINDS = st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("descriptor"), DESCRIPTORS),
        st.tuples(
            st.just("header"),
            st.tuples(GPAS, KINDS, st.one_of(st.integers(0, 70), st.just((1 << 64) - 1))),
        ),
        st.tuples(st.just("publish"), st.integers(0, 20)),
        st.tuples(st.just("kick"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("request"), st.tuples(KINDS, st.integers(0, 70), LENGTHS)),
    ),
    max_size=30,
)


@given(steps=STEPS)
@settings(deadline=None, max_examples=200)
def test_whatever_a_driver_does_the_device_answers_the_next_one(
    steps: list[tuple[str, object]],
) -> None:
    disk = MemoryDisk()
    bench = Bench(disk, Ram(1 << 16), size=16)
    do: dict[str, Callable[..., object]] = {
        "descriptor": lambda q, index, *rest: q.write_descriptor(index, *rest),
        "header": lambda q, gpa, kind, sector: (
            q.ram.put("<IIQ", gpa, kind, 0, sector) if 0x10_0000 <= gpa <= 0x10_FFF0 else None
        ),
        "publish": lambda q, head: q.publish(head),
        "kick": lambda q, index: bench.driver.write(0x050, index),
        "reset": lambda q, _: bench.driver.start(size=16),
        "request": lambda *arguments: ask(*arguments),  # noqa: PLW0108 (it is yet to come)
    }

    def ask(queue: Queue, kind: int, sector: int, length: int) -> None:
        if len(queue.free) < 3 or not 0 < length < 3000:
            return
        mark = queue.ram.mark()
        if queue.ram.size - mark > 8000:
            queue.send([struct.pack("<IIQ", kind, 0, sector), bytes(length)], [length, 1])

    try:
        for name, what in steps:
            if name == "reset":
                bench.driver.ram.rewind(0)
            arguments = what if isinstance(what, tuple) else (what,)
            do[name](bench.driver.queues[0], *arguments)
        bench.driver.ram.rewind(0)
        (bench.queue,) = bench.driver.start(size=16)
        assert bench.ask(IN, room=512)[-1:] == OK
        assert len(disk.data) == SIZE
    finally:
        bench.close()


# --- files ------------------------------------------------------------------------------------


def test_a_raw_disk_is_its_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * 256)
    disk = RawDisk(str(path))
    bench = Bench(disk)
    assert bench.ask(IN, 1, room=1024) == bytes(range(256)) * 4 + OK
    assert bench.ask(OUT, 2, data=b"w" * 1024) == OK
    assert bench.ask(WRITE_ZEROES, data=struct.pack("<QII", 8, 8, 1)) == OK
    assert bench.ask(DISCARD, data=struct.pack("<QII", 16, 8, 0)) == OK
    assert bench.ask(FLUSH) == OK
    bench.close()
    disk.close()
    data = path.read_bytes()
    assert data[:1024] == bytes(range(256)) * 4
    assert data[1024:2048] == b"w" * 1024
    assert data[4096:8192] == bytes(4096)
    assert len(data) == 65536


def test_moving_bytes_goes_on_after_a_short_read_or_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    data = bytes(range(250)) * 4
    path.write_bytes(data)
    real_read, real_write = os.preadv, os.pwritev

    def some(views: Sequence[memoryview]) -> list[memoryview]:
        return cut(views, 0, 7)

    monkeypatch.setattr(os, "preadv", lambda fd, v, at: real_read(fd, some(v), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: real_write(fd, some(v), at))
    room = bytearray(1200)
    views = [memoryview(room)[a:b] for a, b in ((0, 3), (3, 500), (500, 501), (501, 1200))]
    with path.open("r+b") as file:
        files.read_all(file.fileno(), views, 100)
        assert room == data[100:] + bytes(300)
        files.write_all(file.fileno(), views, 50)
    assert path.read_bytes()[50:] == room
