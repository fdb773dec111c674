"""Console device (virtio 1.2, section 5.3) with several ports: byte streams between guest and host.

Model: device ID 3, VIRTIO_CONSOLE_F_MULTIPORT. Port i has a receive and a transmit queue; two
control queues carry the messages by which ports come, are named, open and close. Linux shows port
i of the virtio device v as /dev/vport<v>p<i>. Interrupt: the transport's.

    queues: port 0 rx, tx; control rx, tx; port 1 rx, tx; port 2 rx, tx; ...

Port 0 is the one a driver without multiport would use: its queues exist, it is never added. Not
emulated: console ports (hvc), resize, emergency write.

Two rules of Linux's driver shape this file (drivers/char/virtio_console.c): data for a port that
nobody in the guest has open is thrown away, so the host waits until it knows of a reader; and a
reader sees end of file when we close the port, but only after it has read what came before.

Threads: `take_output`, `put_input` and `close` come from host threads, the rest from vCPUs; all
take the device's lock. `on_output` and `on_space` are called with it held, so they must only wake
somebody.
"""

from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain

VIRTIO_CONSOLE_F_MULTIPORT = 1 << 1

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY = 0, 1, 2, 3
CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 4, 5, 6, 7
CONTROL = Struct("<IHH")  # struct virtio_console_control: id, event, value
CONTROL_RX, CONTROL_TX = 2, 3

QUEUE_SIZE = 64
CONTROL_MAX = 256  # messages kept for a driver that gives no buffers for them
OUTPUT_MAX = 1 << 20  # bytes in one chain; a chain could name all of RAM many times over
_CONFIG = Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr


def _nobody() -> None:
    """Stand in for the owner of a port."""


class ConsolePort:
    """One byte stream each way; the host's end of it.

    `on_output` is called when the guest has sent something, `on_space` when it has made room.
    """

    def __init__(self, name: str) -> None:
        """Make a port that the guest will see under `name`."""
        self.name = name
        self.on_output: Callable[[], None] = _nobody
        self.on_space: Callable[[], None] = _nobody
        self._device: VirtioConsole | None = None
        self._number = 0
        self._host_open = True

    def take_output(self) -> bytes:
        """Take one buffer of what the guest sent; b"" if there is none.

        What nobody takes stays in the guest's queue, and when that is full its writers wait.
        """
        return b"" if self._device is None else self._device.take(self._number)

    def put_input(self, data: bytes | memoryview) -> int:
        """Copy `data` into buffers the guest has posted; how many bytes found room."""
        return 0 if self._device is None else self._device.put(self._number, data)

    def close(self) -> None:
        """Let the guest's reader see end of file, after what was put before."""
        self._host_open = False
        if self._device is not None:
            self._device.announce(self._number, PORT_OPEN, 0)

    def attach(self, device: "VirtioConsole", number: int) -> None:
        """Become port `number` of `device`."""
        self._device, self._number = device, number

    def is_open(self) -> bool:
        """Whether the host's end is open."""
        return self._host_open


class VirtioConsole(VirtioDevice):
    """A console with the ports given, numbered from 1."""

    name = "console"
    device_id = 3
    features = VIRTIO_CONSOLE_F_MULTIPORT

    def __init__(self, ports: Sequence[ConsolePort]) -> None:
        super().__init__()
        self._ports = dict(enumerate(ports, start=1))
        self.queue_sizes = (QUEUE_SIZE,) * (2 * (len(ports) + 1) + 2)
        self._control: deque[bytes] = deque()  # messages for the driver, not yet delivered
        for number, port in self._ports.items():
            port.attach(self, number)

    def config(self) -> bytes:
        """Return struct virtio_console_config."""
        return _CONFIG.pack(0, 0, len(self._ports) + 1, 0)

    def handle_queue(self, index: int) -> None:
        """Serve the control queues; wake the owner of a port."""
        if index == CONTROL_TX:
            self.drain(index, self._control_message)
        elif index == CONTROL_RX:
            self._deliver_control()
        else:
            port = self._ports.get((index - 2) // 2)
            if port is not None:
                wake = port.on_output if index % 2 else port.on_space
                wake()

    def on_reset(self) -> None:
        """Forget undelivered messages: the next driver asks anew."""
        self._control.clear()

    # --- data, for ConsolePort ------------------------------------------------------------------

    def take(self, number: int) -> bytes:
        """Take the next non-empty buffer that the guest sent to a port."""
        index = 2 * number + 3
        with self.lock:
            data = b""
            while not data and (chain := self.pop(index)) is not None:
                data = self._gather(chain)
                self.queues[index].push(chain, 0)
            if data:
                self.interrupt_if_needed(index)
            return data

    def put(self, number: int, data: bytes | memoryview) -> int:
        """Copy what fits into the buffers that the guest has posted for a port."""
        index = 2 * number + 2
        rest = memoryview(data)
        with self.lock:
            while rest and (chain := self.pop(index)) is not None:
                written = _fill(chain, rest)
                self.queues[index].push(chain, written)
                rest = rest[written:]
            if len(rest) < len(data):
                self.interrupt_if_needed(index)
            return len(data) - len(rest)

    def _gather(self, chain: Chain) -> bytes:
        """Copy a chain's readable buffers, unless the copy would be too large to be honest."""
        if sum(map(len, chain.readable)) > OUTPUT_MAX:
            self.needs_reset(f"more than {OUTPUT_MAX} bytes in one chain")
            return b""
        return b"".join(chain.readable)

    # --- control messages -------------------------------------------------------------------------

    def announce(self, number: int, event: int, value: int, text: bytes = b"") -> None:
        """Send the driver a message about a port, now or when it has room for it."""
        with self.lock:
            if self.is_live() and len(self._control) < CONTROL_MAX:
                self._control.append(CONTROL.pack(number, event, value) + text)
                self._deliver_control()

    def _deliver_control(self) -> None:
        while self._control and (chain := self.pop(CONTROL_RX)) is not None:
            message = self._control.popleft()
            self.queues[CONTROL_RX].push(chain, _fill(chain, memoryview(message)))
        self.interrupt_if_needed(CONTROL_RX)

    def _control_message(self, chain: Chain) -> int:
        """Take a message from the driver; nonsense is ignored."""
        message = self._gather(chain)
        if len(message) < CONTROL.size:
            return 0
        number, event, value = CONTROL.unpack_from(message)
        if event == DEVICE_READY and value == 1:
            for each in self._ports:
                self.announce(each, PORT_ADD, 0)
        elif event == PORT_READY and value == 1 and number in self._ports:
            port = self._ports[number]
            self.announce(number, PORT_NAME, 0, port.name.encode())
            self.announce(number, PORT_OPEN, int(port.is_open()))
        return 0

    def save(self) -> dict[str, Any]:
        """Return the queues' state and undelivered messages."""
        return {**super().save(), "control": [message.hex() for message in self._control]}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        super().load(state)
        self._control = deque(bytes.fromhex(message) for message in state["control"])


def _fill(chain: Chain, data: memoryview) -> int:
    """Copy the beginning of `data` into the chain's writable buffers; how much that was."""
    written = 0
    for buffer in chain.writable:
        part = data[written : written + len(buffer)]
        buffer[: len(part)] = part
        written += len(part)
    return written
