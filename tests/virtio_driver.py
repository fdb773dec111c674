"""The driver's side of virtio, played against a device without a guest.

`Ram` and `Line` are what a machine would hand a device. `Driver` finds a device through its MMIO
registers as virtio 1.2, section 4.2.3 says, and `Queue` is a driver's split queue, written from
section 2.7 and sharing no code and no constant with the package.

    driver = Driver(VirtioRng())
    queue = driver.start()[0]
    queue.send([], [64])                 # one chain: nothing to read, 64 bytes to fill; and a kick
    [(token, written)] = queue.used()
    queue.filled(token, written)
"""

import struct
from collections.abc import Sequence

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.mmio import VirtioMmio

VERSION_1 = 1 << 32
EVENT_IDX = 1 << 29
INDIRECT = 1 << 28

NEXT, WRITE, INDIRECT_TABLE = 1, 2, 4

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128


class Ram:
    """Guest RAM at `base`, which is not 0 so that a forgotten address does not work by luck."""

    def __init__(self, size: int = 1 << 20, base: int = 0x10_0000) -> None:
        self.base = base
        self.data = bytearray(size)
        self.whole = memoryview(self.data)
        self.size = size
        self._next = 0

    def view(self, gpa: int, length: int) -> memoryview:
        start = gpa - self.base
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"{length} bytes at {gpa:#x} are not RAM")
        return self.whole[start : start + length]

    def alloc(self, length: int, align: int = 16) -> int:
        """Return the gpa of `length` zeroed bytes."""
        start = -(-self._next // align) * align
        assert start + length <= self.size, "the test's RAM is full"
        self._next = start + length
        self.whole[start : start + length] = bytes(length)
        return self.base + start

    def mark(self) -> int:
        """Return a point for `rewind` to give everything allocated since back."""
        return self._next

    def rewind(self, mark: int) -> None:
        self._next = mark

    def u16(self, gpa: int) -> int:
        return int(struct.unpack_from("<H", self.data, gpa - self.base)[0])

    def put(self, form: str, gpa: int, *values: int) -> None:
        struct.pack_into(form, self.data, gpa - self.base, *values)


class Line:
    """An interrupt line that remembers."""

    def __init__(self) -> None:
        self.level = False
        self.rises = 0

    def set(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level


class Queue:
    """One queue of a driver. Tokens are head indices; buffers live until their token is freed."""

    def __init__(self, driver: "Driver", index: int, size: int) -> None:
        self.driver, self.index, self.size = driver, index, size
        self.ram = ram = driver.ram
        self.desc_gpa = ram.alloc(16 * size, 16)
        self.avail_gpa = ram.alloc(6 + 2 * size, 2)
        self.used_gpa = ram.alloc(6 + 8 * size, 4)
        self.avail_idx = self.last_used = self.kicked_idx = 0
        self.kicks = 0
        self.free = list(range(size))
        self.in_flight: dict[int, tuple[list[int], list[memoryview]]] = {}

    def jump(self, idx: int) -> None:
        """Let both sides be as if `idx` chains had passed through the queue already."""
        state = self.driver.mmio.save()
        mine = state["device"]["queues"][self.index]
        mine["last_avail"] = mine["used_idx"] = idx
        self.avail_idx = self.last_used = self.kicked_idx = idx
        self.ram.put("<H", self.avail_gpa + 2, idx)
        self.ram.put("<H", self.used_gpa + 2, idx)
        self.ram.put("<H", self.used_gpa + 4 + 8 * self.size, idx)
        self.ram.put("<H", self.avail_gpa + 4 + 2 * self.size, idx)
        self.driver.mmio.load(state)

    def write_descriptor(
        self, index: int, gpa: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        self.ram.put("<QIHH", self.desc_gpa + 16 * index, gpa, length, flags, following)

    def add(
        self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False
    ) -> int:
        """Make one chain available, and return its token."""
        ram = self.ram
        buffers: list[tuple[int, int, int]] = []
        room: list[memoryview] = []
        for data in readable:
            gpa = ram.alloc(len(data), 1)
            ram.view(gpa, len(data))[:] = data
            buffers.append((gpa, len(data), 0))
        for length in writable:
            gpa = ram.alloc(length, 1)
            room.append(ram.view(gpa, length))
            buffers.append((gpa, length, WRITE))
        if indirect:
            table = ram.alloc(16 * len(buffers))
            for place, (gpa, length, flags) in enumerate(buffers):
                more = NEXT if place + 1 < len(buffers) else 0
                ram.put("<QIHH", table + 16 * place, gpa, length, flags | more, place + 1)
            buffers = [(table, 16 * len(buffers), INDIRECT_TABLE)]
        taken = [self.free.pop() for _ in buffers]
        for place, (gpa, length, flags) in enumerate(buffers):
            if place + 1 < len(taken):
                self.write_descriptor(taken[place], gpa, length, flags | NEXT, taken[place + 1])
            else:
                self.write_descriptor(taken[place], gpa, length, flags)
        self.in_flight[taken[0]] = (taken, room)
        self.publish(taken[0])
        return taken[0]

    def publish(self, head: int) -> None:
        """Put a head into the available ring."""
        self.ram.put("<H", self.avail_gpa + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) % 65536
        self.ram.put("<H", self.avail_gpa + 2, self.avail_idx)

    def wants_kick(self) -> bool:
        """Whether the device asked to be told of what was added since the last call."""
        old, self.kicked_idx = self.kicked_idx, self.avail_idx
        if self.driver.features & EVENT_IDX:
            event = self.ram.u16(self.used_gpa + 4 + 8 * self.size)
            return (self.avail_idx - event - 1) % 65536 < (self.avail_idx - old) % 65536
        return not self.ram.u16(self.used_gpa) & 1

    def kick(self) -> bool:
        """Notify the device if it wants to be; whether it did."""
        wanted = self.wants_kick()
        if wanted:
            self.kicks += 1
            self.driver.write(0x050, self.index)
        return wanted

    def send(
        self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False
    ) -> int:
        token = self.add(readable, writable, indirect=indirect)
        self.kick()
        return token

    def has_used(self) -> bool:
        """Whether there is something to collect."""
        return self.last_used != self.ram.u16(self.used_gpa + 2)

    def used(self) -> list[tuple[int, int]]:
        """Collect (token, length) of the chains given back, and ask to be told of the next."""
        found = []
        while self.has_used():
            slot = self.used_gpa + 4 + 8 * (self.last_used % self.size)
            token, length = struct.unpack("<II", self.ram.view(slot, 8))
            found.append((token, length))
            self.last_used = (self.last_used + 1) % 65536
        self.ram.put("<H", self.avail_gpa + 4 + 2 * self.size, self.last_used)
        return found

    def filled(self, token: int, length: int) -> bytes:
        """Return what the device wrote into a chain, and take its descriptors back."""
        taken, room = self.in_flight.pop(token)
        self.free += taken
        data = b"".join(room)
        assert length <= len(data)
        return data[:length]

    def collect(self) -> list[bytes]:
        """Return what the device wrote into each chain it gave back."""
        return [self.filled(token, length) for token, length in self.used()]


class Driver:
    """A driver of one device behind VirtioMmio."""

    def __init__(self, device: VirtioDevice, ram: Ram | None = None) -> None:
        self.device = device
        self.ram = ram or Ram()
        self.line = Line()
        self.mmio = VirtioMmio(device, self.ram, self.line)
        self.features = 0
        self.queues: list[Queue] = []

    def read(self, offset: int) -> int:
        return self.mmio.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.mmio.write(offset, 4, value)

    @property
    def status(self) -> int:
        return self.read(0x070)

    def offered(self) -> int:
        features = 0
        for half in (0, 1):
            self.write(0x014, half)
            features |= self.read(0x010) << 32 * half
        return features

    def negotiate(self, features: int) -> bool:
        """Accept `features`; whether the device agreed."""
        self.write(0x070, 0)
        self.write(0x070, ACKNOWLEDGE)
        self.write(0x070, ACKNOWLEDGE | DRIVER)
        self.features = features
        for half in range(max(2, -(-features.bit_length() // 32))):
            self.write(0x024, half)
            self.write(0x020, features >> 32 * half & 0xFFFF_FFFF)
        self.write(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def set_up(self, index: int, size: int | None = None) -> Queue:
        """Give the device queue `index`, of the greatest size unless told otherwise."""
        self.write(0x030, index)
        queue = Queue(self, index, size or self.read(0x034))
        self.write(0x038, queue.size)
        for offset, gpa in (
            (0x080, queue.desc_gpa),
            (0x090, queue.avail_gpa),
            (0x0A0, queue.used_gpa),
        ):
            self.write(offset, gpa & 0xFFFF_FFFF)
            self.write(offset + 4, gpa >> 32)
        self.write(0x044, 1)
        return queue

    def start(self, *, without: int = 0, size: int | None = None) -> list[Queue]:
        """Do all a driver does, accepting every feature but those in `without`."""
        assert self.negotiate(self.offered() & ~without)
        self.queues = []
        index = 0
        while True:
            self.write(0x030, index)
            greatest = self.read(0x034)
            if not greatest:
                break
            self.queues.append(self.set_up(index, min(size or greatest, greatest)))
            index += 1
        self.write(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return self.queues

    def interrupted(self) -> bool:
        """Whether the device interrupted since the last call; acknowledges what it said."""
        causes = self.read(0x060)
        assert self.line.level == (causes != 0)
        self.write(0x064, causes)
        assert not self.line.level
        return causes != 0
