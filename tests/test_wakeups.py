"""Nobody sleeps for ever: a console's ports, whose bells, buffers and bytes come at any moment.

A guest that sleeps until it is interrupted, a device whose doorbells are eventfds, and a host that
waits for each answer before it says more: one wakeup lost anywhere, and all of them wait.
"""

import os
import random
import select
import socket
import struct
import threading
from queue import SimpleQueue
from typing import Any, cast

import pytest

from tests.test_virtio_console import PORT_OPEN, Guest
from tests.virtio_driver import EVENT_IDX, Line, Ram
from tinyvmm.eventfds import Doorbells
from tinyvmm.session import write_all
from tinyvmm.streams import CHUNK, PortInput, PortOutput, Receiver, Sender

ROUNDS = int(os.environ.get("WAKEUPS", "300"))
DEADLINE = 60.0  # seconds for one answer, of a computer that is busy
SIZES = (1, 1, 7, 500, 4096, 4097, 30_000, 70_000)  # about Linux's page, LITTLE and CHUNK
BUFFER_LEN = 4096


class Interrupt(Line):
    """A line that wakes whoever waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.news: SimpleQueue[bool] = SimpleQueue()

    def set(self, level: bool) -> None:
        super().set(level)
        self.news.put(level)


class Echo:
    """A guest on a thread of its own that says again what it hears, and sleeps in between.

    It gives few buffers or many, and closes its port now and then.
    """

    def __init__(self, without: int) -> None:
        self.dice = random.Random(without)  # noqa: S311 (no secret)
        self.guest = Guest("in", "out", without=without, ram=Ram(4 << 20))
        self.guest.plug()
        self.guest.driver.interrupted()
        self.interrupt = Interrupt()
        device = self.guest.device
        self.errors: list[BaseException] = []
        self.doorbells = Doorbells(
            cast("Any", None), device, len(device.queues), self.errors.append
        )
        device.watcher = self.doorbells
        self.guest.driver.mmio._irq = self.interrupt
        self.guest.driver.write = self._write  # type: ignore[method-assign]
        self.doorbells.start()
        self.over = False
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _write(self, offset: int, value: int) -> None:
        """Ring as KVM does; all else goes where it went."""
        if offset == 0x050:
            os.eventfd_write(self.doorbells._fds[value], 1)
        else:
            self.guest.driver.mmio.write(offset, 4, value)

    def _main(self) -> None:
        guest, dice = self.guest, self.dice
        heard, said = guest.receiveq(1), guest.transmitq(2)
        ram, mark = guest.driver.ram, guest.driver.ram.mark()
        to_say: list[bytes] = []
        while not self.over:
            to_say += heard.collect()
            for used in said.used():
                said.filled(*used)
            while to_say and said.free:
                said.send([to_say.pop(0)], [])
            if not (heard.in_flight or said.in_flight or to_say):
                ram.rewind(mark)
            if not heard.in_flight and ram.mark() < ram.size // 2:
                for _ in range(dice.choice((1, 1, 2, 5, 30))):
                    heard.add([], [dice.choice((BUFFER_LEN, BUFFER_LEN, 10))])
                heard.kick()
                if not dice.randrange(20):
                    self._reopen()
            elif not heard.has_used() and not said.has_used():
                self.interrupt.news.get()
                guest.driver.write(0x064, guest.driver.read(0x060))

    def _reopen(self) -> None:
        control = self.guest.queues[3]
        for value in (0, 1):
            control.send([struct.pack("<IHH", 1, PORT_OPEN, value)], [])
            while not control.has_used():  # as Linux does
                pass
            for used in control.used():
                control.filled(*used)

    def end(self) -> None:
        self.over = True
        self.interrupt.news.put(True)
        self.thread.join()
        self.doorbells.close()
        assert self.errors == []


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("without", [0, EVENT_IDX])
def test_whoever_waits_for_an_answer_has_one(without: int, kind: str) -> None:
    echo = Echo(without)
    dice = random.Random(kind)  # noqa: S311 (no secret)
    ours, theirs = socket.socketpair()
    heard, say = os.pipe() if kind == "pipe" else (theirs.fileno(), ours.fileno())
    stdin, stdout = PortInput(echo.guest.ports[0]), PortOutput(echo.guest.ports[1])
    receiver, sender = Receiver.of(heard), Sender.of(theirs.fileno())
    assert receiver is not None
    assert sender is not None
    stdout.pass_to(sender.send)

    def relay_input() -> None:
        while True:
            data = stdin.attend(receiver)
            if data is None:
                select.select([heard], [], [])
                data = os.read(heard, CHUNK)
            if not data:
                return
            stdin.write(data)

    def relay_output() -> None:
        while data := stdout.read():
            write_all(theirs.fileno(), data)

    threads = [threading.Thread(target=work, daemon=True) for work in (relay_input, relay_output)]
    for thread in threads:
        thread.start()
    ours.settimeout(DEADLINE)
    for number in range(ROUNDS):
        words = bytes([number % 251]) * dice.choice(SIZES)
        writer = threading.Thread(target=write_all, args=(say, words), daemon=True)
        writer.start()
        left = len(words)
        while left:
            got = ours.recv(left)
            assert got == words[: len(got)]
            left -= len(got)
        writer.join()
    if kind == "pipe":
        os.close(say)
    else:
        ours.shutdown(socket.SHUT_WR)
    stdout.finish()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    stdin.release()
    stdout.release()
    echo.end()
    receiver.close()
    sender.close()
    ours.close()
    theirs.close()
    if kind == "pipe":
        os.close(heard)
