"""virtio console device with many ports: virtio 1.2, section 5.3.

Device ID 3. A port is a stream each way; in a Linux guest port n of console device i is the
character device /dev/vport<i>p<n>. Queues, from the driver's point of view:

    0, 1            receiveq and transmitq of port 0
    2, 3            control receiveq and transmitq
    2n + 2, 2n + 3  receiveq and transmitq of port n, from 1 on

Port 0 is what a driver without VIRTIO_CONSOLE_F_MULTIPORT would use; its queues exist, the port is
never added. `ConsolePort` is the host's end of a port, `VirtioConsole` all of them together.

On the control queues travel messages `{le32 id, le16 event, le16 value}`. The driver begins with
DEVICE_READY; each port is then offered with PORT_ADD, and once the driver answers PORT_READY, given
its PORT_NAME and opened (PORT_OPEN 1). The driver says by PORT_OPEN whether a process has the port
open. Linux throws away what arrives for a port that nobody has open, so nothing is sent before.

A port may be a console (hvc) of the guest: it is told so by CONSOLE_PORT, and how large the host's
terminal is, whenever that changes, by RESIZE. A device with a console offers VIRTIO_CONSOLE_F_SIZE,
without which Linux makes nothing of RESIZE; the configuration has the size of the first.

Flow control is the queues' own. Output stays in the transmitq, and a writer in the guest blocks,
until the host takes it; input goes as far as the buffers in the receiveq. A driver that resets the
device has sent what is in its transmitqs, so that is kept for the host: Linux resets every device
on its way to power off, with a program's last words perhaps still there.

Not emulated: VIRTIO_CONSOLE_F_EMERG_WRITE, removal of ports. A driver without F_MULTIPORT finds a
device with nothing to say.

Output goes one of two ways. Who has a place that takes bytes without waiting says so by `pass_to`:
then they are on their way by whoever hears the driver's kick, and no other thread is woken for it:
all of them where the device has a thread of its own, only a few on a vCPU's. Many of those, what
such a place leaves, and all output where there is none, are for a thread of the host's to
`take_output`, which `on_output` tells. Who may take time passes on many chains at a time, straight
from the guest's RAM and while the driver need not kick; `take_output` returns what has to be waited
for.
Until it has found nothing, whatever else comes is for it as well: so the stream keeps its order.
Input comes by `put_input` from any thread. The device's own, which answers the doorbells, may be
the one that finds it (`watch`): then a byte there and back wakes no thread but that.

Threads: vCPU threads and the doorbells' through the transport, any host thread through the methods
of a port; all hold the device's lock. `on_output`, `on_space` and what `pass_to` has been given are
called with it held: the first two may call the port's methods, and none may wait for another
thread.
"""

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import Chain, Virtqueue
from tinyvmm.views import Views, cut, scatter, size_of

VIRTIO_ID_CONSOLE = 3
VIRTIO_CONSOLE_F_SIZE = 1 << 0
VIRTIO_CONSOLE_F_MULTIPORT = 1 << 1

VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7

CONTROL_RX, CONTROL_TX = 2, 3
_control = struct.Struct("<IHH")  # virtio_console_control: id, event, value
_resize = struct.Struct("<HH")  # virtio_console_resize: cols, rows; older Linux reads rows first
_config = struct.Struct("<HHII")  # virtio_console_config: cols, rows, max_nr_ports, emerg_wr

# Linux fills every receiveq with pages and sends at most 32 KiB at a time.
PORT_QUEUE_SIZE = 32
CONTROL_QUEUE_SIZE = 16
UNUSED_QUEUE_SIZE = 2
# Of a port, in one chain and kept over resets. Far above what a driver sends, but descriptors may
# name the same RAM again and again.
OUTPUT_MAX = 16 << 20
SIZE_MAX = 0xFFFF
# Bytes that are passed on by a vCPU's thread that hears a kick, and at a time by any other: to wake
# one takes as long as a few thousand bytes do, and whoever sends more has more to send, which the
# guest may prepare meanwhile. How often, before others get the lock or the next kick is heard: by
# the vCPU's, the device's and the host's threads.
NOW_MAX, BATCH_MAX = 4 << 10, 128 << 10
BATCHES_NOW, BATCHES_OWN, BATCHES = 2, 8, 16
NOTHING, MORE, FULL = range(3)  # what is left to be passed on; FULL: for a thread
IOV_MAX = 1024  # UIO_MAXIOV of <linux/uio.h>
KEPT_COST = 64  # what keeping a chain's data takes besides the data


class ConsolePort:
    """The host's end of one port; it comes to life when given to a VirtioConsole."""

    def __init__(self, name: str, *, console: bool = False) -> None:
        """Make a port called `name` in the guest (/sys/class/virtio-ports/*/name).

        `console`: it is a console of the guest's, /dev/hvc0 and so on.
        """
        self.name = name
        self.console = console
        self.size: tuple[int, int] | None = None
        """Rows and columns of the host's terminal; None if nothing is known of one."""
        self.on_output: Callable[[], None] = _nothing
        """Called when the driver has sent something that `take_output` will return."""
        self.on_space: Callable[[], None] = _nothing
        """Called when `put_input` may succeed again."""
        self.id = 0
        self.ready = False  # the driver knows the port
        self.guest_open = False  # a process in the guest has it open
        self.closed = False  # by us
        self.kept: deque[bytes] = deque()  # output that is no longer in the queue
        self.send: Callable[[Views], int] | None = None  # see pass_to
        self.relayed = False  # what `take_output` gave last is perhaps not yet where it goes
        self.most = 0  # how many buffers the driver has had for us at a time, as far as we know
        self._console: VirtioConsole | None = None

    def attach(self, console: "VirtioConsole", port_id: int) -> None:
        """Become port `port_id` of `console`."""
        self._console = console
        self.id = port_id

    def take_output(self) -> bytes:
        """Return what one buffer of the guest holds and give it back; b"" if none waits."""
        return self._console.take_output(self) if self._console is not None else b""

    def pass_to(self, send: Callable[[Views], int] | None) -> None:
        """Have `send` take what the driver sends, as far as it does at once; None ends that.

        It is given what some buffers of the guest hold, and returns how many bytes it took without
        waiting. Once this returns, what was there before is called no more.
        """
        if self._console is None:
            self.send = send
        else:
            self._console.pass_port_to(self, send)

    def put_input(self, data: bytes | memoryview, *, patient: bool = False) -> int:
        """Copy as much of `data` as the driver's buffers hold and return its length.

        Less than all means to wait for `on_space`: the driver has no buffer more, or nobody has the
        port open. That is called once there is a buffer; to be `patient` is to have it called when
        there are about half as many as the driver has had for us, which may never be.
        """
        if self._console is None:
            return 0
        return self._console.put_input(self, data, patient=patient)

    def watch(self, fd: int, call: Callable[[], None]) -> bool:
        """Have the device's own thread `call` whenever `fd` can be read; False if it has none.

        From any thread; the device's lock is not held.
        """
        watcher = self._console.watcher if self._console is not None else None
        return watcher is not None and watcher.watch(fd, call)

    def unwatch(self, fd: int) -> None:
        """Do so no more; a call that has begun may go on. Whoever closes `fd` does this before."""
        if self._console is not None and self._console.watcher is not None:
            self._console.watcher.unwatch(fd)

    def resize(self, rows: int, cols: int) -> None:
        """Tell a console's readers that the terminal has this size now; at most 65535 each.

        ValueError if the port is no console, or there is no such size.
        """
        if not self.console:
            raise ValueError(f"port {self.name} is no console")
        if not (0 <= rows <= SIZE_MAX and 0 <= cols <= SIZE_MAX):
            raise ValueError(f"a terminal of {rows} rows and {cols} columns")
        if self._console is None:
            self.size = rows, cols
        else:
            self._console.resize_port(self, rows, cols)

    def close(self) -> None:
        """Let the guest's reader see end of file after what was put; no more can be."""
        if self._console is None:
            self.closed = True
        else:
            self._console.close_port(self)


class VirtioConsole(VirtioDevice):
    """The device: its ports have the ids 1, 2... in the order given."""

    ioeventfd = True  # who writes much has more to write, who writes little waits for an answer
    one_vector = True  # each port has two queues, and a start would set up as many

    def __init__(self, ports: Sequence[ConsolePort]) -> None:
        sizes = [UNUSED_QUEUE_SIZE] * 2 + [CONTROL_QUEUE_SIZE] * 2
        consoles = [port for port in ports if port.console]
        super().__init__(
            "virtio-console",
            VIRTIO_ID_CONSOLE,
            queue_sizes=sizes + [PORT_QUEUE_SIZE] * (2 * len(ports)),
            features=VIRTIO_CONSOLE_F_MULTIPORT | (VIRTIO_CONSOLE_F_SIZE if consoles else 0),
        )
        self.ports = dict(enumerate(ports, 1))
        self._first_console = consoles[0] if consoles else None
        self.config = self._configuration()
        for port_id, port in self.ports.items():
            port.attach(self, port_id)
        # Each message is here at most once, and one RESIZE a port, so there are at most six a port.
        self._pending: deque[bytes] = deque()

    def set_status(self, value: int) -> None:
        """Take the driver's status; where that is a reset, first keep what it has sent."""
        with self.lock:
            if not value:
                for port in self.ports.values():
                    self._keep_output(port)
            super().set_status(value)

    def halt(self) -> None:
        """Go on: what the guest has sent is still to be taken, and nothing here repeats itself."""

    def reset(self) -> None:
        """Forget what the driver knew and had open; what the host closed stays closed."""
        super().reset()
        self._pending.clear()
        for port in self.ports.values():
            port.ready = port.guest_open = False
            port.most = 0

    def handle(self, queue: Virtqueue) -> None:
        """Serve the control queues, and pass on that a port's queue has moved."""
        index = queue.index
        if index > CONTROL_TX:
            port = self.ports[index // 2 - 1]
            if not index & 1:
                port.on_space()
            elif port.send is None or not (port.relayed or self._passed_on(port)):
                port.on_output()
        elif index == CONTROL_TX:
            while (chain := queue.pop()) is not None:
                message = b"".join(view[: _control.size] for view in chain.readable)
                queue.push(chain, 0)
                if len(message) >= _control.size:
                    self._control(*_control.unpack_from(message))
        elif index == CONTROL_RX:
            self._flush()

    # --- control ----------------------------------------------------------------------------

    def _control(self, port_id: int, event: int, value: int) -> None:
        if event == VIRTIO_CONSOLE_DEVICE_READY:
            if value:
                for known in self.ports:
                    self._send(known, VIRTIO_CONSOLE_PORT_ADD)
            return
        port = self.ports.get(port_id)
        if port is None:
            return
        if event == VIRTIO_CONSOLE_PORT_READY and value:
            port.ready = True
            if port.console:
                self._send(port_id, VIRTIO_CONSOLE_CONSOLE_PORT)
                self._send_size(port)
            self._send(port_id, VIRTIO_CONSOLE_PORT_NAME, 1, port.name.encode())
            self._send(port_id, VIRTIO_CONSOLE_PORT_OPEN, int(not port.closed))
        elif event == VIRTIO_CONSOLE_PORT_OPEN:
            port.guest_open = bool(value)
            if value:
                port.on_space()

    def _send(self, port_id: int, event: int, value: int = 1, more: bytes = b"") -> None:
        message = _control.pack(port_id, event, value) + more
        if message not in self._pending:
            self._pending.append(message)
        self._flush()

    def _flush(self) -> None:
        """Send what control messages there are buffers for."""
        queue = self.queues[CONTROL_RX]
        while self._pending and (chain := queue.pop()) is not None:
            message = memoryview(self._pending.popleft())
            written = scatter(chain.writable, message)
            queue.push(chain, written)
            if written < len(message):
                self.fail(f"control receiveq: a buffer of {written} bytes")

    # --- the ports' side --------------------------------------------------------------------

    def take_output(self, port: ConsolePort) -> bytes:
        """See ConsolePort.take_output."""
        left = MORE
        for _ in range(BATCHES if port.send is not None else 0):
            if left == MORE:
                with self.lock:  # which is for others in between
                    left = self._pass_on(port, BATCH_MAX, now=False)
        with self.lock:
            data = port.kept.popleft() if port.kept else self._next_output(port)
            port.relayed = bool(data)
            return data

    def _passed_on(self, port: ConsolePort) -> bool:
        """Send what it is not worth to wake another thread for; whether that was all."""
        own = self.watcher is not None
        left = MORE
        for _ in range(BATCHES_OWN if own else BATCHES_NOW):
            left = self._pass_on(port, BATCH_MAX if own else NOW_MAX, now=not own)
            if left != MORE:
                break
        port.relayed = left != NOTHING
        return not port.relayed

    def pass_port_to(self, port: ConsolePort, send: Callable[[Views], int] | None) -> None:
        """See ConsolePort.pass_to."""
        with self.lock:
            port.send = send

    def _pass_on(self, port: ConsolePort, most: int, *, now: bool) -> int:
        """Have `port.send` take the next chains, of about `most` bytes: NOTHING, MORE or FULL.

        What it leaves of one chain is kept, and the others stay in the queue. `now`: if that is
        more than `most`, it is all left to a thread; else it is copied, and what is left is kept.
        """
        if port.send is None or port.kept:
            return FULL
        queue = self._transmitq(port)
        chains = queue.gather(most, OUTPUT_MAX) if self.running else []
        if not chains:
            chains = self._next_chains(port, queue, most)
        views = [view for chain in chains for view in chain.readable]
        size = size_of(views)
        if not chains:
            return NOTHING
        if now and size > most:
            queue.unpop(len(chains))
            return FULL
        if now:
            return self._copy_on(port, port.send, chains, b"".join(views))
        taken = port.send(views)
        if taken < size:
            queue.push_read(self._taken(port, chains, taken))
            return FULL
        return NOTHING if queue.push_read(chains, expect=True) else MORE

    def _next_chains(self, port: ConsolePort, queue: Virtqueue, most: int) -> list[Chain]:
        """Take the next chains, of several buffers too, up to about `most` bytes in all."""
        chains: list[Chain] = []
        count = size = 0
        # As many as there are, but at least one try, which asks for a kick. None is asked for
        # before `send` is done: the guest would be kept waiting for that.
        for _ in range(min(queue.waiting, queue.size) or 1):
            chain = self._pop_output(port, queue)
            if chain is None:
                break
            count += len(chain.readable)
            if chains and count > IOV_MAX:
                queue.unpop()
                break
            chains.append(chain)
            size += size_of(chain.readable)
            if size >= most:
                break
        return chains

    def _copy_on(
        self, port: ConsolePort, send: Callable[[Views], int], chains: Sequence[Chain], data: bytes
    ) -> int:
        """Have `send` take `data` of `chains` last of all: whoever answers meets nobody here."""
        left = NOTHING if self._transmitq(port).push_read(chains, expect=True) else MORE
        taken = send((memoryview(data),))
        if taken < len(data):
            port.kept.append(data[taken:])
            left = FULL
        return left

    def _taken(self, port: ConsolePort, chains: Sequence[Chain], taken: int) -> Sequence[Chain]:
        """Return those of which bytes are among the first `taken`; the queue has the others again.

        The last one's other bytes are kept.
        """
        end = 0
        for number, chain in enumerate(chains):
            if end >= taken:
                self._transmitq(port).unpop(len(chains) - number)
                return chains[:number]
            end += size_of(chain.readable)
            if end > taken:
                views = chain.readable
                port.kept.append(b"".join(cut(views, size_of(views) - (end - taken))))
        return chains

    def _transmitq(self, port: ConsolePort) -> Virtqueue:
        return self.queues[2 * port.id + 3]

    def _next_output(self, port: ConsolePort) -> bytes:
        queue = self._transmitq(port)
        chain = self._pop_output(port, queue)
        if chain is None:
            return b""
        data = b"".join(chain.readable)
        queue.push(chain, 0)
        return data

    def _pop_output(self, port: ConsolePort, queue: Virtqueue) -> Chain | None:
        if not self.running or (chain := queue.pop()) is None:
            return None
        if not 1 <= size_of(chain.readable) <= OUTPUT_MAX:
            self.fail(f"port {port.id}: a chain without data, or past {OUTPUT_MAX} bytes of it")
            return None
        return chain

    def _keep_output(self, port: ConsolePort) -> None:
        room = OUTPUT_MAX - sum(map(len, port.kept)) - KEPT_COST * len(port.kept)
        while (data := self._next_output(port)) and len(data) + KEPT_COST <= room:
            room -= len(data) + KEPT_COST
            port.kept.append(data)
        if port.kept:
            port.on_output()

    def put_input(self, port: ConsolePort, data: bytes | memoryview, *, patient: bool) -> int:
        """See ConsolePort.put_input."""
        with self.lock:
            if not self.running or not port.guest_open or port.closed:
                return 0
            rest = memoryview(data)
            queue = self.queues[2 * port.id + 2]
            port.most = max(port.most, queue.waiting) if patient else 0
            while rest := rest[queue.fill(rest) :]:
                chain = queue.pop()
                if chain is None:
                    if not self.running or port.most < 2 or queue.expect(port.most // 2):
                        break
                    continue
                written = scatter(chain.writable, rest)
                if not written:
                    self.fail(f"port {port.id}: a receive buffer without room")
                    break
                queue.push(chain, written)
                rest = rest[written:]
            return len(data) - len(rest)

    def resize_port(self, port: ConsolePort, rows: int, cols: int) -> None:
        """See ConsolePort.resize."""
        with self.lock:
            port.size = rows, cols
            if port is self._first_console:
                self.set_config(self._configuration())
            if self.running and port.ready:
                self._send_size(port)

    def _configuration(self) -> bytes:
        rows, cols = (self._first_console and self._first_console.size) or (0, 0)
        return _config.pack(cols, rows, len(self.ports) + 1, 0)

    def _send_size(self, port: ConsolePort) -> None:
        """Send the size, in place of one that has not been sent yet."""
        if port.size is None:
            return
        head = _control.pack(port.id, VIRTIO_CONSOLE_RESIZE, 1)
        for message in [message for message in self._pending if message.startswith(head)]:
            self._pending.remove(message)
        self._send(port.id, VIRTIO_CONSOLE_RESIZE, 1, _resize.pack(*reversed(port.size)))

    def close_port(self, port: ConsolePort) -> None:
        """See ConsolePort.close."""
        with self.lock:
            if not port.closed:
                port.closed = True
                if self.running and port.ready:
                    self._send(port.id, VIRTIO_CONSOLE_PORT_OPEN, 0)

    # --- state ------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the state, with what driver and host know of each port."""
        with self.lock:
            return super().save() | {
                "pending": [message.hex() for message in self._pending],
                "ports": [
                    {
                        "ready": port.ready,
                        "guest_open": port.guest_open,
                        "closed": port.closed,
                        "size": port.size and list(port.size),
                        "kept": [data.hex() for data in port.kept],
                    }
                    for port in self.ports.values()
                ],
            }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described."""
        with self.lock:
            super().load(state)
            self._pending.extend(bytes.fromhex(message) for message in state["pending"])
            for port, known in zip(self.ports.values(), state["ports"], strict=True):
                port.ready, port.guest_open = known["ready"], known["guest_open"]
                port.closed = known["closed"]
                port.size = known["size"] and tuple(known["size"])
                port.kept = deque(bytes.fromhex(data) for data in known["kept"])


def _nothing() -> None:
    """Do nothing."""
