"""virtio socket device: stream sockets between guest and host: virtio 1.2, section 5.10.

What guest and driver see of it is in vsock_device.py, and what a packet says in
vsock_connection.py. The host is CID 2. Every chain is one packet, a header of 44 bytes and perhaps
data. Read `_packet`, what the guest may say, then `_fill` and `_send_data`, what we say to it.

A connection is two ports, ours and the guest's. Either side opens it (REQUEST, then RESPONSE or
RST). Flow control is by credit (5.10.6.3): each side says how large its buffer is and how much of
what it got it has passed on, and never is sent more than that leaves room for. Our buffer is filled
only where the host's socket does not take data at once; what goes to the guest waits in the host's
socket, not here. SHUTDOWN ends one direction or both; RST is the last word.

The tx queue is not served while too many answers wait for rx buffers (5.10.6.1.2), so a guest that
asks and never listens costs nothing. Neither does one that ignores credit: it gets RST.

Not emulated: datagrams and SEQPACKET; connections between guests. Connections do not outlive
`save` and `load`: the guest is told by the event VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.

Threads: the doorbells' and vCPU threads through the transport, the host's, which may be the first
as well, through the methods that say so; all hold the device's lock. A `Peer` and the `Dialer` are
called with it held, and do not wait.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from tinyvmm.devices.virtio.queue import Chain, Virtqueue
from tinyvmm.devices.virtio.vsock_connection import (
    U32,
    VIRTIO_VSOCK_OP_CREDIT_REQUEST,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN,
    VIRTIO_VSOCK_SHUTDOWN_RCV,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
    VIRTIO_VSOCK_TYPE_STREAM,
    VMADDR_CID_HOST,
    Connection,
    Peer,
    header,
)
from tinyvmm.devices.virtio.vsock_device import EVENT, QUEUE_SIZE, RX, TX, VsockDevice
from tinyvmm.views import cut, scatter, size_of

CONNECTIONS_MAX = 1024
# Of a connection, as long as there are not more than FEW, and of those that come then: 60 MiB in
# all. Linux sends packets of 64 KiB, and waits for none as long as there is room for the next.
BUF_ALLOC, BUF_ALLOC_MANY, FEW = 256 << 10, 32 << 10, 128
BATCH = 64 << 10  # bytes of rx buffers that are filled at a time, and then shown to the driver
TAKEN = 4  # packets of the guest that are taken at a time, and then given back
# After how many times that is said which is to be said, so that who gets room need not wait till
# there are no more packets; and how often they are taken once the guest is to halt: a ring full.
BATCHES_ANSWERED, BATCHES_LAST = 16, QUEUE_SIZE // TAKEN
ANSWERS_MAX = 256  # packets that wait for an rx buffer, before tx has to wait
FIRST_HOST_PORT = 1 << 30  # of connections that the host opens
_BOTH = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND


class Dialer(Protocol):
    """Who connects the guest to the host's services."""

    def dial(self, port: int) -> Peer | None:
        """Connect to what listens at `port` of the host; None if nobody does."""


class VirtioVsock(VsockDevice):
    """The device: guest `cid` on one side, a `dialer` and `connect` on the other."""

    ioeventfd = True  # who sends much has more to send, and who asks has its answer by one thread

    def __init__(self, cid: int, dialer: Dialer) -> None:
        super().__init__(cid)
        self._dialer = dialer
        self._connections: dict[tuple[int, int], Connection] = {}  # by guest's and host's port
        self._by_peer: dict[Peer, Connection] = {}
        self._thirsty: set[Connection] = set()  # those that would read, were there rx buffers
        self._due: deque[Connection | tuple[int, int]] = deque()  # who has answers; RST to nobody
        self._next_port = FIRST_HOST_PORT
        self._halted = False

    @property
    def idle(self) -> bool:
        """Whether there is no connection, and nothing left to say of one."""
        return not (self._connections or self._by_peer or self._thirsty or self._due)

    def reset(self) -> None:
        """Forget the driver, and end what it had with the host."""
        super().reset()
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._due.clear()

    def set_status(self, value: int) -> None:
        """Take the driver's status; where that is a reset, first pass on what it has sent."""
        with self.lock:
            if not value and self.running:
                self.handle(self.queues[TX])
            super().set_status(value)

    def halt(self) -> None:
        """Say nothing more to the guest, and of what it says take a ring full: its last words."""
        self._halted = True
        self.queues[RX].halted = self.queues[EVENT].halted = True

    def unhalt(self) -> bool:
        """See VirtioDevice."""
        with self.lock:
            self._halted = False
            return super().unhalt()

    def handle(self, queue: Virtqueue) -> None:
        """Serve `queue`: packets from the guest, or room for packets to it."""
        if queue.index == EVENT:
            self.flush_event()
            return
        if queue.index == RX:
            self._fill()
            thirsty, self._thirsty = self._thirsty, set()
            for connection in thirsty:
                self._watch(connection)
        batches = 0
        while self._take_packets():
            batches += 1
            if batches <= BATCHES_ANSWERED:
                self._fill()
            elif self._halted and batches >= BATCHES_LAST:
                self.queues[TX].cut_short = True
                break
        self._fill()

    # --- what the guest says ----------------------------------------------------------------

    def _take_packets(self) -> bool:
        """Take a few packets and give them back together; whether there may be more."""
        tx, due = self.queues[TX], self._due
        chains: list[Chain] = []
        while len(chains) < TAKEN and len(due) < ANSWERS_MAX and (chain := tx.pop()) is not None:
            self._packet(chain)
            chains.append(chain)
        if chains:
            tx.push_read(chains)
        return len(chains) == TAKEN

    def _packet(self, chain: Chain) -> None:
        body = chain.readable
        if body and len(body[0]) == header.size:  # as Linux has it
            head: memoryview | bytes = body[0]
            body = body[1:]
        else:
            head = b"".join(cut(body, 0, header.size))
            body = cut(body, header.size)
        if len(head) < header.size:
            return
        source, target, guest_port, host_port, length, kind, op, flags, alloc, count = (
            header.unpack(head)
        )
        if (source, target) != (self.cid, VMADDR_CID_HOST):
            return  # to nobody we know of, who cannot answer
        connection = self._connections.get((guest_port, host_port))
        size = size_of(body)
        if size > length:
            body, size = cut(body, 0, length), length
        if kind != VIRTIO_VSOCK_TYPE_STREAM or size != length:
            self._refuse(connection, guest_port, host_port, op)
            return
        if connection is None:
            if op == VIRTIO_VSOCK_OP_REQUEST:
                self._request(guest_port, host_port, alloc, count)
            else:
                self._refuse(None, guest_port, host_port, op)
            return
        connection.guest_buf_alloc, connection.guest_fwd_cnt = alloc, count
        if op == VIRTIO_VSOCK_OP_RST:
            self._drop(connection)
        elif op == VIRTIO_VSOCK_OP_RESPONSE and not connection.open and connection.peer:
            connection.open = True
            connection.peer.accepted(host_port)
        elif not connection.open or op == VIRTIO_VSOCK_OP_REQUEST:
            self._refuse(connection, guest_port, host_port, op)
            return
        elif op == VIRTIO_VSOCK_OP_RW:
            self._data(connection, body, length)
        elif op == VIRTIO_VSOCK_OP_SHUTDOWN:
            connection.guest_shutdown |= flags & _BOTH
            self._settle(connection)
        elif op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            self._say(connection, VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        elif op != VIRTIO_VSOCK_OP_CREDIT_UPDATE:
            self._refuse(connection, guest_port, host_port, op)
            return
        self._watch(connection)

    def _request(self, guest_port: int, host_port: int, alloc: int, count: int) -> None:
        full = len(self._connections) >= CONNECTIONS_MAX
        peer = None if full else self._dialer.dial(host_port)
        if peer is None:
            self._refuse(None, guest_port, host_port, VIRTIO_VSOCK_OP_REQUEST)
            return
        connection = self._connection(guest_port, host_port, peer, open_=True)
        connection.guest_buf_alloc, connection.guest_fwd_cnt = alloc, count
        self._say(connection, VIRTIO_VSOCK_OP_RESPONSE)
        self._watch(connection)

    def _data(self, connection: Connection, body: list[memoryview], length: int) -> None:
        connection.received += length
        unheard = connection.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV
        ended = connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND
        excess = connection.received - connection.forwarded > connection.buf_alloc
        if connection.peer is None or unheard or ended or excess:
            self._abort(connection)
            return
        taken = 0
        if not connection.waiting and length:
            try:
                taken = connection.peer.send(body)
            except OSError:
                self._abort(connection)
                return
            self._forwarded(connection, taken)
        if taken < length:
            for view in cut(body, taken):
                connection.waiting += view

    def _refuse(
        self, connection: Connection | None, guest_port: int, host_port: int, op: int
    ) -> None:
        """Answer what makes no sense, unless it is the last word itself."""
        if connection is not None:
            self._abort(connection)
        elif op != VIRTIO_VSOCK_OP_RST:
            self._due.append((guest_port, host_port))

    # --- what becomes of a connection -------------------------------------------------------

    def _connection(
        self, guest_port: int, host_port: int, peer: Peer, *, open_: bool
    ) -> Connection:
        alloc = BUF_ALLOC if len(self._connections) < FEW else BUF_ALLOC_MANY
        connection = Connection(guest_port, host_port, peer, open_=open_, buf_alloc=alloc)
        self._connections[guest_port, host_port] = self._by_peer[peer] = connection
        return connection

    def _drop(self, connection: Connection) -> None:
        """Forget a connection: nobody says a word on it any more."""
        connection.answers.clear()
        self._connections.pop((connection.guest_port, connection.host_port), None)
        self._thirsty.discard(connection)
        peer, connection.peer = connection.peer, None
        if peer is not None:
            self._by_peer.pop(peer, None)
            peer.close()

    def _abort(self, connection: Connection) -> None:
        """Forget it, with a word to the guest."""
        self._drop(connection)
        self._due.append((connection.guest_port, connection.host_port))

    def _say(self, connection: Connection, op: int) -> None:
        if op not in connection.answers:
            connection.answers.append(op)
            if len(connection.answers) == 1:
                self._due.append(connection)

    def _forwarded(self, connection: Connection, count: int) -> None:
        connection.forwarded += count
        # The guest thinks that there is less room than there is; tell it before it must stop.
        if connection.forwarded - connection.told >= connection.buf_alloc // 2:
            self._say(connection, VIRTIO_VSOCK_OP_CREDIT_UPDATE)

    def _settle(self, connection: Connection) -> None:
        """Act upon what both sides have shut down, once what was sent before has been passed on."""
        if connection.waiting:
            return
        if connection.guest_shutdown == _BOTH:
            self._abort(connection)  # 5.10.6.6: a clean end is answered with RST
        elif connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND and connection.peer is not None:
            connection.peer.end_output()

    def _watch(self, connection: Connection) -> None:
        """Have the host's side wake us for what can be done now, and for nothing else."""
        if connection.peer is None:
            return
        heard = not (
            connection.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND
            or connection.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV
        )
        readable = connection.open and heard and connection.credit() > 0
        if readable and not self._has_room():
            readable = False
            self._thirsty.add(connection)
        wanted = readable, bool(connection.waiting)
        if wanted != connection.watched:
            connection.watched = wanted
            connection.peer.watch(readable=readable, writable=wanted[1])

    def _has_room(self) -> bool:
        """Whether there is an rx buffer; if not, the driver will tell of the next."""
        rx = self.queues[RX]
        if rx.waiting and not rx.halted:
            return True
        chain = rx.pop()
        if chain is not None:
            rx.unpop()
        return chain is not None

    # --- what the host says -----------------------------------------------------------------

    def connect(self, peer: Peer, port: int) -> Connection | None:
        """Open a connection to the guest's `port`; None if there can be none. Any thread."""
        with self.lock:
            if not self.running or len(self._connections) >= CONNECTIONS_MAX:
                return None
            while (port, self._next_port) in self._connections:
                self._next_port = self._next_port + 1 & U32 or FIRST_HOST_PORT
            connection = self._connection(port, self._next_port, peer, open_=False)
            self._next_port = self._next_port + 1 & U32 or FIRST_HOST_PORT
            self._say(connection, VIRTIO_VSOCK_OP_REQUEST)
            self._fill()
            return connection

    def readable(self, peer: Peer) -> None:
        """Bytes, or their end, are there for the guest. Any thread."""
        with self.lock:
            connection = self._by_peer.get(peer)
            if connection is None:
                return
            most = 1  # byte: the first buffer alone, as most have little to say
            while connection.peer is not None and (credit := connection.credit()) > 0:
                if not self._send_data(connection, connection.peer, credit, most):
                    break
                most = BATCH
            self._fill()
            self._watch(connection)

    def _send_data(self, connection: Connection, peer: Peer, credit: int, most: int) -> bool:
        """Fill some rx buffers, of about `most` bytes, with a packet of data each.

        At most `credit` bytes of data. Whether there may be more.
        """
        rx = self.queues[RX]
        buffers = rx.gather_writable(min(most, credit), header.size + 1)
        if not buffers:
            return self._send_packet(connection, peer, credit)
        views = [view[header.size :] for _, view in buffers]
        room = size_of(views)
        if room > credit:
            views, room = cut(views, 0, credit), credit
        left = count = self._receive(connection, peer, views)
        filled, length, head = [], 0, b""
        for (index, view), data in zip(buffers, views, strict=True):
            if not left:
                break
            if len(data) != length or left < length:
                length = min(len(data), left)
                head = self._header(connection, VIRTIO_VSOCK_OP_RW, length)
            view[: header.size] = head
            filled.append((index, header.size + length))
            left -= length
        rx.unpop(len(buffers) - len(filled))
        if filled:
            rx.push_written(filled)
        return count == room

    def _send_packet(self, connection: Connection, peer: Peer, credit: int) -> bool:
        """Fill an rx buffer of several parts, which Linux never has; as `_send_data`."""
        rx = self.queues[RX]
        chain = rx.pop()
        if chain is None:
            return False
        views = cut(chain.writable, header.size, credit)
        if not views:
            self.fail(f"rx: a buffer of {size_of(chain.writable)} bytes")
            return False
        count = self._receive(connection, peer, views)
        if not count:
            rx.unpop()
            return False
        scatter(chain.writable, self._header(connection, VIRTIO_VSOCK_OP_RW, count))
        rx.push(chain, header.size + count)
        return True

    def _receive(self, connection: Connection, peer: Peer, views: Sequence[memoryview]) -> int:
        """Fill views with data: how many bytes; 0 if there are none, and then see to an end."""
        try:
            count = peer.receive(views)
        except OSError:
            self._abort(connection)
            return 0
        if count == 0:
            connection.host_shutdown |= VIRTIO_VSOCK_SHUTDOWN_SEND
            self._say(connection, VIRTIO_VSOCK_OP_SHUTDOWN)
        connection.sent += count or 0
        return count or 0

    def writable(self, peer: Peer) -> None:
        """The host takes bytes again. Any thread."""
        with self.lock:
            connection = self._by_peer.get(peer)
            if connection is None or connection.peer is None:
                return
            try:
                with memoryview(connection.waiting) as waiting:
                    taken = connection.peer.send([waiting])
            except OSError:
                self._abort(connection)
            else:
                del connection.waiting[:taken]
                self._forwarded(connection, taken)
                self._settle(connection)
            self._fill()
            self._watch(connection)

    # --- to the guest -----------------------------------------------------------------------

    def _fill(self) -> None:
        """Send what is to be said, as far as there are rx buffers."""
        rx = self.queues[RX]
        while self._due and self.running:
            who = self._due[0]
            if isinstance(who, Connection) and not who.answers:
                self._due.popleft()  # it was dropped meanwhile, or has said it all
                continue
            chain = rx.pop()
            if chain is None:
                return
            if size_of(chain.writable) < header.size:
                self.fail("rx: a buffer without room for a header")
                return
            if isinstance(who, Connection):
                head = self._header(who, who.answers.popleft(), 0)
                if not who.answers:
                    self._due.popleft()
            else:
                self._due.popleft()
                gone = Connection(*who, None, open_=False)
                head = self._header(gone, VIRTIO_VSOCK_OP_RST, 0)
            scatter(chain.writable, head)
            rx.push(chain, header.size)

    def _header(self, connection: Connection, op: int, length: int) -> bytes:
        flags = connection.host_shutdown if op == VIRTIO_VSOCK_OP_SHUTDOWN else 0
        connection.told = connection.forwarded
        return header.pack(
            VMADDR_CID_HOST,
            self.cid,
            connection.host_port,
            connection.guest_port,
            length,
            VIRTIO_VSOCK_TYPE_STREAM,
            op,
            flags,
            connection.buf_alloc,
            connection.forwarded & U32,
        )
