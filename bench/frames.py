"""What a frame costs in virtio-net alone: no guest, a driver that has filled its rings beforehand.

How Linux lays buffers out is what is compared: a frame of 64 KiB to send in 17 pieces and a small
one; received into one buffer of 17 pages, or cut into as many buffers of a page each, which is what
VIRTIO_NET_F_MRG_RXBUF would make of it (the price of each piece is that of a frame of its size).
"""

import struct
from collections.abc import Callable, Sequence
from time import perf_counter_ns

from tinyvmm.devices.virtio.net import RECEIVE, TRANSMIT, VirtioNet
from tinyvmm.memory import GuestMemory

MAC = b"\x52\0\0\0\0\1"
DESC_GPA, AVAIL_GPA, USED_GPA, TABLES_GPA, BUFFER_GPA = range(0x10_0000, 0x60_0000, 0x10_0000)
SIZE, ROUNDS = 256, 50
NEXT, WRITE, INDIRECT = 1, 2, 4
HEADER_LEN, PAGE = 12, 4096


class Wire:
    """A backend that takes every frame, and has `count` of `length` bytes."""

    vnet_header = False

    def __init__(self) -> None:
        self.count = 0
        self.frame = b""

    def send(self, views: Sequence[memoryview]) -> bool:
        """Take it."""
        del views
        return True

    def receive(self, views: Sequence[memoryview]) -> int | None:
        """Give one, as passt's backend does."""
        from tinyvmm.views import scatter

        if not self.count:
            return None
        self.count -= 1
        return scatter(views, self.frame)

    def watch(self, *, readable: bool) -> None:
        """Do nothing."""

    def use(self, features: int) -> None:
        """Do nothing."""

    def enable(self, *, on: bool) -> None:
        """Do nothing."""


def cost(direction: int, pieces: Sequence[int], length: int) -> float:
    """Return the microseconds for each frame, its buffers being `pieces` behind one descriptor."""
    memory = GuestMemory(16 << 20)
    wire = Wire()
    wire.frame = bytes(length)
    device = VirtioNet([wire], MAC)
    device.attach(memory, lambda _: None)
    device.set_status(1 | 2)
    device.driver_features = device.features
    device.set_status(1 | 2 | 8)
    queue = device.queues[direction]
    queue.desc_gpa, queue.avail_gpa, queue.used_gpa = DESC_GPA, AVAIL_GPA, USED_GPA
    device.enable_queue(queue)
    write = WRITE if direction == RECEIVE else 0
    for head in range(SIZE):
        table = TABLES_GPA + 16 * 32 * head
        for place, piece in enumerate(pieces):
            more = NEXT if place + 1 < len(pieces) else 0
            entry = struct.pack("<QIHH", BUFFER_GPA, piece, write | more, place + 1)
            memory.write(table + 16 * place, entry)
        whole = struct.pack("<QIHH", table, 16 * len(pieces), INDIRECT, 0)
        memory.write(DESC_GPA + 16 * head, whole)
        memory.write(AVAIL_GPA + 4 + 2 * head, struct.pack("<H", head))
    device.set_status(1 | 2 | 8 | 4)
    pair = device.pairs[0]
    serve: Callable[[], None] = pair.readable if direction == RECEIVE else pair.transmit
    best = 1 << 62
    for turn in range(1, ROUNDS + 1):
        memory.write(AVAIL_GPA + 2, struct.pack("<H", SIZE * turn & 0xFFFF))
        wire.count = SIZE
        begun = perf_counter_ns()
        serve()
        best = min(best, perf_counter_ns() - begun)
    device.detach()
    memory.close()
    return best / SIZE / 1000


def main() -> None:
    """Measure and print."""
    pages = [HEADER_LEN, *[PAGE] * 17]
    small, large = 66, 65_000
    pieces = -(-large // PAGE)
    lines = [
        ("send 66 bytes", cost(TRANSMIT, [HEADER_LEN, small], small)),
        ("send 65,000 bytes", cost(TRANSMIT, [HEADER_LEN, *[large // 17] * 17], large)),
        ("receive 66 bytes, 17 pages", cost(RECEIVE, pages, small)),
        ("receive 65,000, 17 pages", cost(RECEIVE, pages, large)),
        ("receive 66 bytes, 1 page", cost(RECEIVE, [PAGE], small)),
        ("receive 65,000, 1 page each", pieces * cost(RECEIVE, [PAGE], PAGE - HEADER_LEN)),
    ]
    print(f"{'microseconds for each':32}")
    for what, each in lines:
        print(f"{what:32}{each:8.1f}")
