"""Bytes in, a driver's doings out: what fuzzer and corpus test play against a virtio device.

As in ninep_session.py an input is a program: a head byte that chooses device, features and queue
size, then steps: registers touched in any width, descriptors and ring indices written wherever they
point, kicks, what the host does at its end, late replies, states saved and loaded.

The first devices of a head byte have a host's end here that the steps may move; the others are all
that tests/bad_guests.py lists.

Held to, whatever the input: nothing is raised; the interrupt line says what InterruptStatus says;
no byte of RAM is changed that the driver has not given to the device, in a descriptor to write or a
used ring; what a console keeps has its limit; a device that is reset answers a proper driver again.
"""

import json
from collections.abc import Callable
from typing import Any

from tests.bad_guests import VIRTIO, Made
from tests.virtio_driver import INDIRECT_TABLE, WRITE, Driver, Queue, Ram
from tinyvmm.devices.virtio.console import OUTPUT_MAX, ConsolePort, VirtioConsole
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.views import Views

STEPS_MAX = 80
RAM_LEN = 1 << 14
LINE = 16  # bytes; changes of RAM are looked for by the line
REQUESTS_MAX = 500  # then the machine is stopped, as a ring may fill itself for ever

HEAD_DEVICE, HEAD_NO_EVENT_IDX, HEAD_NO_INDIRECT, HEAD_SMALL = 3, 1 << 2, 1 << 3, 1 << 4
HEAD_RAW = 1 << 5
HEAD_MORE = 6  # from this bit on: more of the device's number
PLACE = 40  # what a port takes at once

OTHERS = [make for name, make in VIRTIO.items() if name not in {"rng", "console", "9p"}]

VALUES = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 0xFFF, 0x1000, 0xFFFF),
    *(0x1_0000, 0x10_0000, 0x10_2000, 0x10_3FFF, 0x10_4000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF),
    *(0xFFFF_0000, 0x0F, 0x4F, 0xC0, 0x8F),
)
OFFSETS = (
    *(0x000, 0x004, 0x008, 0x00C, 0x010, 0x014, 0x020, 0x024, 0x030, 0x034, 0x038, 0x044, 0x050),
    *(0x060, 0x064, 0x070, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4, 0x0AC, 0x0B0, 0x0FC, 0x100),
    *(0x101, 0x102, 0x104, 0x10A, 0x1FF, 0xFFC, 0xFFF, 0x07F, 0x051),
)


class Later:
    """A request that is answered when a step says so."""

    def __init__(self, session: "Session", data: bytes) -> None:
        self.session = session
        self.data = data

    def start(self, later: Callable[[Callable[[], bytes | None]], None]) -> None:
        self.session.waiting.append(lambda: later(lambda: self.data))


class Session:
    """Answers with the request backwards, at once or later as its first byte says."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.requests = 0
        self.halt: Callable[[], None] = lambda: None

    def submit(self, request: list[memoryview], reply: list[memoryview]) -> Any:
        self.requests += 1
        if self.requests > REQUESTS_MAX:
            self.halt()
        data = b"".join(view[:64] for view in request[:64])[::-1]
        if data[-1:] and data[-1] & 1:
            return Later(self, data)
        rest = data
        for view in reply:
            part, rest = rest[: len(view)], rest[len(view) :]
            view[: len(part)] = part
        return len(data) - len(rest)

    def close(self) -> None:
        """Keep what waits: its replies may still come, and must not arrive."""

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to go on with."""


class Place:
    """Nothing on disk is needed; the fuzzer gives a directory to every target."""

    def __init__(self, path: str) -> None:
        self.path = path


class Script:
    """The input; beyond its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        at, self.at = self.at, self.at + 1
        return self.data[at] if at < len(self.data) else 0

    def take(self, count: int) -> bytes:
        at, self.at = self.at, self.at + count
        return self.data[at : at + count]

    def value(self) -> int:
        picked = self.byte()
        return picked if picked < 64 else VALUES[(picked - 64) % len(VALUES)]

    def gpa(self) -> int:
        """An address: mostly in RAM."""
        picked = self.byte()
        if picked < 240:
            return 0x10_0000 + (picked << 6) + self.byte()
        return (0, 0xF_FFF0, 0x10_3FF8, 0x10_4000, 1 << 63, (1 << 64) - 8)[picked % 6]


class Bench:
    """A device, its driver and what the host does at the other end."""

    def __init__(self, head: int) -> None:
        self.session = Session()
        self.ports: list[ConsolePort] = []
        self.taken = 0
        self.made: Made | None = None
        self.device = self._device(head & HEAD_DEVICE | head >> HEAD_MORE << 2)
        self.session.halt = self.device.halt
        self.driver = Driver(self.device, Ram(RAM_LEN))
        self.without = (head & HEAD_NO_EVENT_IDX and 1 << 29) | (
            head & HEAD_NO_INDIRECT and 1 << 28
        )
        self.size = 2 if head & HEAD_SMALL else 16
        self.queues: list[Queue] = []

    def _device(self, choice: int) -> VirtioDevice:
        if choice == 0:
            return VirtioRng()
        if choice == 1:
            return Virtio9P("tag", self.session)
        if choice > HEAD_DEVICE:
            self.made = OTHERS[(choice - HEAD_DEVICE - 1) % len(OTHERS)]()
            return self.made.device
        self.ports = [ConsolePort("a"), ConsolePort("b")]
        if choice == 3:
            for port in self.ports:
                port.on_output = lambda port=port: self.take(port)  # type: ignore[misc]
            self.ports[1].pass_to(self.send)
        return VirtioConsole(self.ports)

    def send(self, views: Views) -> int:
        """Take all of a few bytes, or a part."""
        size = sum(map(len, views))
        self.taken += min(size, PLACE)
        return min(size, PLACE)

    def take(self, port: ConsolePort) -> None:
        self.taken += len(port.take_output())

    def start(self) -> None:
        self.queues = self.driver.start(without=self.without, size=self.size)

    def queue(self, picked: int) -> Queue | None:
        return self.queues[picked % len(self.queues)] if self.queues else None

    def step(self, script: Script) -> None:
        step = script.byte() % 10
        mmio = self.driver.mmio
        if step == 0:
            offset, value = OFFSETS[script.byte() % len(OFFSETS)], script.value()
            mmio.write(offset, (4, 4, 4, 1, 2, 8)[script.byte() % 6], value)
        elif step == 1:
            offset, size = OFFSETS[script.byte() % len(OFFSETS)], (1, 2, 4, 8)[script.byte() % 4]
            assert mmio.read(offset, size) >= 0
        elif step == 2:
            self._describe(script)
        elif step == 3:
            self._publish(script)
        elif step == 4:
            mmio.write(0x050, 4, script.byte())
        elif step == 5:
            self._scribble(script)
        elif step == 6 and self.ports:
            self._host(script.byte())
        elif step == 7 and self.session.waiting:
            self.session.waiting.pop(script.byte() % len(self.session.waiting))()
        elif step == 8:
            mmio.load(json.loads(json.dumps(mmio.save())))
        elif step == 9:
            self.driver.ram.rewind(0)
            self.start()

    def _describe(self, script: Script) -> None:
        queue = self.queue(script.byte())
        index, gpa, length = script.byte(), script.gpa(), script.value()
        flags, following = script.byte() % 8, script.byte()
        if queue is not None:
            if gpa & 0x30 == 0x30:  # at a ring itself
                gpa = (queue.avail_gpa, queue.used_gpa, queue.desc_gpa)[gpa % 3] + gpa % 8
            queue.write_descriptor(index % queue.size, gpa, length, flags, following % 20)

    def _publish(self, script: Script) -> None:
        queue = self.queue(script.byte())
        head, ahead = script.byte(), script.byte()
        if queue is not None:
            for _ in range(ahead % 4):
                queue.publish(head % (queue.size + 1))
            if ahead > 250:
                self.driver.ram.put("<H", queue.avail_gpa + 2, script.value() & 0xFFFF)

    def _scribble(self, script: Script) -> None:
        gpa, data = script.gpa(), script.take(script.byte() % 32)
        start = gpa - self.driver.ram.base
        if 0 <= start <= RAM_LEN - len(data):
            self.driver.ram.data[start : start + len(data)] = data

    def _host(self, choice: int) -> None:
        port = self.ports[choice & 1]
        match choice >> 1 & 3:
            case 0:
                self.take(port)
            case 1:
                assert 0 <= port.put_input(bytes(choice)) <= choice
            case 2:
                port.close()
            case _:
                self.device.set_config(bytes([choice]) * 12)

    def settle(self) -> None:
        """Wait for what a thread of the device's own has been given to do: its `save` does."""
        if self.made is not None:
            self.device.save()

    def close(self) -> None:
        """Take it apart, as a machine does."""
        if self.made is not None:
            self.made.end()
        else:
            self.device.detach()

    def check(self) -> None:
        mmio = self.driver.mmio
        assert self.driver.line.level == bool(mmio.read(0x060, 4))
        for port in self.ports:
            assert sum(map(len, port.kept)) <= OUTPUT_MAX


def play(data: bytes, place: Place) -> None:
    """Play one input; AssertionError, or whatever is raised, if it finds something."""
    del place
    script = Script(data)
    head = script.byte()
    bench = Bench(head)
    try:
        _play(bench, script)
    finally:
        bench.close()


def _play(bench: Bench, script: Script) -> None:
    data = script.data
    if data[:1] and not data[0] & HEAD_RAW:
        bench.start()
    for _ in range(STEPS_MAX):
        if script.at >= len(data):
            break
        ram = bench.driver.ram
        if data[script.at] % 10 in {1, 4, 6, 7}:  # the driver itself writes nothing
            before, given = bytes(ram.data), _given(bench)
            bench.step(script)
            bench.settle()
            if before != ram.data:
                changed = {
                    at
                    for at in range(0, RAM_LEN, LINE)
                    if before[at : at + LINE] != ram.data[at : at + LINE]
                }
                assert given is None or changed <= given, sorted(changed - given)
        else:
            bench.step(script)
            bench.settle()
        bench.check()
    for waiting in bench.session.waiting:
        waiting()
    _serves_again(bench)


def _given(bench: Bench) -> set[int] | None:
    """The lines of RAM that the device may write; None where that may change on the way.

    It may if the device is given a table of descriptors to write: what it then finds is as good.
    """
    ram = bench.driver.ram
    lines: set[int] = set()
    tables: set[int] = set()
    for queue in bench.device.queues:
        if not queue.ready:
            continue
        _add(lines, ram, queue.used_gpa, 6 + 8 * queue.size)
        _add(tables, ram, queue.desc_gpa, 16 * queue.size)
        for index in range(queue.size):
            gpa, length, flags = _descriptor(ram, queue.desc_gpa - ram.base + 16 * index)
            if flags & INDIRECT_TABLE:
                if 16 <= length <= 1024 * 16 and _add(tables, ram, gpa, length):
                    for start in range(gpa - ram.base, gpa - ram.base + length - 15, 16):
                        inner_gpa, inner_len, inner_flags = _descriptor(ram, start)
                        if inner_flags & WRITE:
                            _add(lines, ram, inner_gpa, inner_len)
            elif flags & WRITE:
                _add(lines, ram, gpa, length)
    return None if lines & tables else lines


def _descriptor(ram: Ram, start: int) -> tuple[int, int, int]:
    gpa = int.from_bytes(ram.data[start : start + 8], "little")
    length = int.from_bytes(ram.data[start + 8 : start + 12], "little")
    return gpa, length, int.from_bytes(ram.data[start + 12 : start + 14], "little")


def _add(lines: set[int], ram: Ram, gpa: int, length: int) -> bool:
    """Add what is RAM as a whole; whether it is."""
    start = gpa - ram.base
    inside = start >= 0 and start + length <= RAM_LEN
    if inside:
        lines.update(range(start // LINE * LINE, start + length, LINE))
    return inside


def _serves_again(bench: Bench) -> None:
    """Reset, the device works for a driver that behaves."""
    for queue in bench.device.queues:
        queue.halted = False
    bench.driver.ram.rewind(0)
    bench.without, bench.size = 0, 16
    bench.start()
    assert bench.driver.status == 0x0F
    if bench.made is not None:
        assert bench.made.works(bench.queues)
        return
    if not bench.ports:
        token = bench.queues[0].send([bytes(8)] if bench.session.requests else [], [16])
        assert [used[0] for used in bench.queues[0].used()] == [token]
