"""What every virtio device is, whatever transport carries it: virtio 1.2, sections 2.1 to 2.6.

A device is an ID, feature bits, the sizes of its queues, a configuration space of a few bytes, and
what it does with one chain: a subclass gives those to `__init__` and writes `handle`. rng.py is the
smallest that is whole. The transport (mmio.py) turns register accesses into the methods below.

The driver starts a device by raising bits of the status: ACKNOWLEDGE, DRIVER, its features,
FEATURES_OK (refused, by not reading back, if it accepted what was not offered), the queues, then
DRIVER_OK. No queue is touched before. If the driver breaks a rule the device raises
DEVICE_NEEDS_RESET and does nothing more until the driver resets it by writing 0.

Threads: vCPU threads come in through the transport, or a thread of the device's where doorbells
are eventfds (`ioeventfd`), host threads through what a device offers them
(a console's ports). `lock`, one RLock a device, guards everything here and the queues. A chain is
taken, handled and given back within one hold of it, so a reset never finds one in between.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from select import EPOLLIN
from typing import Any, Protocol

from tinyvmm import trace
from tinyvmm.devices.device import GuestMemory
from tinyvmm.devices.virtio.queue import (
    VIRTIO_F_RING_EVENT_IDX,
    VIRTIO_F_RING_INDIRECT_DESC,
    Virtqueue,
    VirtqueueError,
)

ACKNOWLEDGE = 1 << 0
DRIVER = 1 << 1
DRIVER_OK = 1 << 2
FEATURES_OK = 1 << 3
DEVICE_NEEDS_RESET = 1 << 6
FAILED = 1 << 7
_DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

VIRTIO_F_VERSION_1 = 1 << 32
RING_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_RING_EVENT_IDX | VIRTIO_F_RING_INDIRECT_DESC

# Why the driver is interrupted: the bits of InterruptStatus (4.2.2) and of the ISR (4.1.4.5).
USED_BUFFER = 1 << 0
CONFIGURATION_CHANGE = 1 << 1

CONFIGURATION = -1
"""The source of an interrupt that is not a queue's."""


class Watcher(Protocol):
    """The thread that answers the doorbells of a device: it has ears for other descriptors, too."""

    def watch(self, fd: int, call: Callable[[], None], events: int = EPOLLIN) -> bool:
        """`call`, without any lock, whenever `fd` is ready for any of `events`, epoll's.

        False if that cannot be heard of.
        """

    def unwatch(self, fd: int) -> None:
        """Do so no more; only a call that has begun goes on."""


class VirtioDevice:
    """A virtio device without its transport."""

    ioeventfd = False
    """Whether queues are served on a thread of the device's own, or on that of the vCPU that kicks.

    docs/decisions/0004 says which suits what.
    """
    one_vector = False
    """Whether all queues interrupt by one MSI-X vector, where there are too many to set up each."""
    kicks: Sequence[int] = ()
    """The doorbells of the first queues, where not we answer but the kernel: eventfds; vhost.py."""

    def __init__(
        self,
        name: str,
        device_id: int,
        *,
        queue_sizes: Sequence[int],
        features: int = 0,
        config: bytes = b"",
    ) -> None:
        """Make device `device_id` (section 5), its `queue_sizes` being powers of two."""
        self.name = name
        self.device_id = device_id
        self.features = features | RING_FEATURES
        self.config = config
        self.config_generation = 0
        self.lock = threading.RLock()
        self.status = 0
        self.driver_features = 0
        self._interrupt: Callable[[int], None] = _nobody
        self._memory: GuestMemory | None = None
        self.watcher: Watcher | None = None
        """A thread of the device's own, where its doorbells are eventfds."""
        self.queues = [Virtqueue(index, size, self.fail) for index, size in enumerate(queue_sizes)]

    def handle(self, queue: Virtqueue) -> None:
        """Serve `queue`, which may have chains; the lock is held."""
        raise NotImplementedError

    def attach(self, memory: GuestMemory, interrupt: Callable[[int], None]) -> None:
        """Join a transport: `interrupt` takes the index of a queue, or CONFIGURATION."""
        self._memory = memory
        self._interrupt = interrupt
        for queue in self.queues:
            queue.on_used = partial(interrupt, queue.index)

    def halt(self) -> None:
        """Let vCPU threads out of `handle`: the machine stops, or pauses; without the lock.

        From any thread. A ring may fill itself for ever: a chain may ask for what moves its own
        available idx.
        """
        for queue in self.queues:
            queue.halted = True

    def unhalt(self) -> bool:
        """Serve again; whether there is something to `catch_up` on. From any thread."""
        with self.lock:
            for queue in self.queues:
                queue.halted = False
            return any(queue.cut_short for queue in self.queues)

    def catch_up(self) -> None:
        """Serve the queues that were left for a halt, as if they were kicked. From any thread."""
        for queue in self.queues:
            if queue.cut_short:
                queue.cut_short = False
                self.notify(queue.index)

    def suspend(self) -> None:
        """Stop what the kernel does by itself: every vCPU is paused. From any thread."""

    def resume(self) -> None:
        """Go on with that. From any thread."""

    def detach(self) -> None:
        """Leave the transport, forgetting the driver: the machine is being taken apart."""
        with self.lock:
            self.reset()
            self._memory = None
            self._interrupt = _nobody
            for queue in self.queues:
                queue.on_used = _nobody_used

    # --- what the transport calls -----------------------------------------------------------

    def notify(self, index: int) -> None:
        """The driver has made chains available in queue `index`; any number is harmless."""
        with self.lock:
            if self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK:
                queues = self.queues
                if index < len(queues):
                    self.handle(queues[index])

    def set_status(self, value: int) -> None:
        """Take the driver's write to the device status: more bits, or 0 for reset."""
        with self.lock:
            if not value:
                self.reset()
                return
            raised = value & _DRIVER_BITS & ~self.status
            if raised & FEATURES_OK and not self._features_ok():
                raised &= ~FEATURES_OK
            if raised & DRIVER_OK and not (self.status | raised) & FEATURES_OK:
                raised &= ~DRIVER_OK
            self.status |= raised
            if raised & DRIVER_OK:
                for queue in self.queues:  # a kick that came before was not heard
                    self.notify(queue.index)

    def _features_ok(self) -> bool:
        accepted = self.driver_features
        return bool(accepted & VIRTIO_F_VERSION_1) and not accepted & ~self.features

    def enable_queue(self, queue: Virtqueue) -> None:
        """Begin to use `queue` where the driver put it."""
        with self.lock:
            if queue.ready or not self.status & FEATURES_OK or self._memory is None:
                return
            try:
                queue.enable(self._memory, self.driver_features)
            except VirtqueueError as error:
                self.fail(str(error))

    def disable_queue(self, queue: Virtqueue) -> None:
        """Stop to use `queue`."""
        with self.lock:
            queue.disable()

    def route(self, index: int, fd: int) -> None:
        """Know of eventfd `fd` that it interrupts for queue `index`; -1 when nothing does but us.

        Only told to, and of use to, a device with `kicks`.
        """

    def reset(self) -> None:
        """Forget the driver; a subclass adds what it knows of it. The lock is held."""
        self.status = 0
        self.driver_features = 0
        for queue in self.queues:
            queue.reset()

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take the driver's write to the configuration space; a few devices have what it may write.

        The lock is held.
        """

    # --- what a device calls ----------------------------------------------------------------

    @property
    def running(self) -> bool:
        """True between DRIVER_OK and the first error or reset."""
        return self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK

    def fail(self, why: str) -> None:
        """Stop until reset, because the driver did what it must not; the lock is held."""
        if self.status & DEVICE_NEEDS_RESET:
            return
        if trace.hook is not None:
            trace.hook(trace.Message(self.name, f"needs a reset: {why}"))
        self.status |= DEVICE_NEEDS_RESET
        if self.status & DRIVER_OK:  # section 2.1.2
            self._interrupt(CONFIGURATION)

    def set_config(self, config: bytes) -> None:
        """Change the configuration space, and tell the driver; from any thread."""
        with self.lock:
            self.config = config
            self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
            if self.running:
                self._interrupt(CONFIGURATION)

    # --- state ------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the state in plain JSON types; the rings and buffers are in RAM."""
        with self.lock:
            return {
                "status": self.status,
                "driver_features": self.driver_features,
                "config": self.config.hex(),
                "config_generation": self.config_generation,
                "queues": [queue.save() for queue in self.queues],
            }

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described; the RAM attached holds what it held then."""
        with self.lock:
            if self._memory is None:
                raise RuntimeError(f"{self.name} has no transport yet")
            self.reset()
            self.status = state["status"]
            self.driver_features = state["driver_features"]
            self.config = bytes.fromhex(state["config"])
            self.config_generation = state["config_generation"]
            for queue, queue_state in zip(self.queues, state["queues"], strict=True):
                queue.load(queue_state, self._memory, self.driver_features)


def _nobody(_source: int) -> None:
    """Interrupt nobody: there is no transport."""


def _nobody_used() -> None:
    """Interrupt nobody: there is no transport."""
