"""A virtio device without its transport (virtio 1.2, chapter 2): status, features, queues.

A device type is a subclass that says what it is (`device_id`, `features`, `queue_sizes`), gives its
configuration space, and handles a queue when the driver has added something. rng.py is the model.
The transport (mmio.py) attaches itself, and turns register accesses into the calls below.

Threads: vCPU threads come in through the transport, host threads through the device's own methods.
`lock`, one for each device, guards everything in the device and its queues; both kinds take it.
"""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

from tinyvmm import trace
from tinyvmm.devices.device import GuestMemory
from tinyvmm.devices.virtio.queue import Chain, QueueError, Virtqueue

ACKNOWLEDGE = 1 << 0
DRIVER = 1 << 1
DRIVER_OK = 1 << 2
FEATURES_OK = 1 << 3
DEVICE_NEEDS_RESET = 1 << 6
FAILED = 1 << 7

VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32
COMMON_FEATURES = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1


class VirtioDevice:
    """The base of every virtio device."""

    name: ClassVar[str]
    device_id: ClassVar[int]
    """Chapter 5: "Virtio Device ID"."""
    features: int = 0
    """The type's own feature bits; those of the queue are added to them."""
    queue_sizes: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queues: list[Virtqueue] = []
        self.status = 0
        self.driver_features = 0
        self._interrupt: Callable[[bool], None] = _nowhere

    # --- for the type -------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return the configuration space as it is now."""
        return b""

    def handle_queue(self, index: int) -> None:
        """Look for chains in queue `index`; with `lock` held."""
        raise NotImplementedError

    def on_reset(self) -> None:
        """Forget what the driver had set; with `lock` held."""

    def drain(self, index: int, handle: Callable[[Chain], int]) -> None:
        """Let `handle` serve every chain of a queue and return the length it wrote."""
        queue = self.queues[index]
        while (chain := self.pop(index)) is not None:
            queue.push(chain, handle(chain))
        self.interrupt_if_needed(index)

    def pop(self, index: int) -> Chain | None:
        """Take the next chain of a queue; None also when the driver broke its rules."""
        if not self.is_live():
            return None
        try:
            return self.queues[index].pop()
        except QueueError as error:
            self.needs_reset(str(error))
            return None

    def interrupt_if_needed(self, index: int) -> None:
        """Tell the driver of used buffers, if it wants to be told."""
        if self.queues[index].needs_interrupt():
            self._interrupt(False)

    def needs_reset(self, why: str) -> None:
        """Stop serving, and ask the driver to start over (2.1.2)."""
        if trace.hook is not None:
            trace.hook(trace.Message(self.name, f"DEVICE_NEEDS_RESET: {why}"))
        self.status |= DEVICE_NEEDS_RESET
        if self.status & DRIVER_OK:
            self._interrupt(True)

    def is_live(self) -> bool:
        """Whether the driver is ready and has not broken anything since."""
        return self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK

    # --- for the transport ----------------------------------------------------------------------

    def attach(self, memory: GuestMemory, interrupt: Callable[[bool], None]) -> None:
        """Make the queues; `interrupt` is called with False for buffers, True for the rest."""
        self.queues = [Virtqueue(memory, size) for size in self.queue_sizes]
        self._interrupt = interrupt

    def offered_features(self) -> int:
        """Return every feature bit of this device."""
        return self.features | COMMON_FEATURES

    def set_status(self, value: int) -> None:
        """Take what the driver writes to the status; 0 resets (2.1, 3.1.1)."""
        if value == 0:
            self.reset()
            return
        if value & FEATURES_OK and not self.status & FEATURES_OK:
            unknown = self.driver_features & ~self.offered_features()
            if unknown or not self.driver_features & VIRTIO_F_VERSION_1:
                value &= ~FEATURES_OK
        # A driver only ever adds bits, and cannot withdraw our request for a reset.
        self.status |= value & ~DEVICE_NEEDS_RESET
        if not self.status & FEATURES_OK:
            self.status &= ~DRIVER_OK
        if self.is_live():
            for index in range(len(self.queues)):
                self.notify(index)

    def set_driver_features(self, half: int, value: int) -> None:
        """Take 32 bits of the features that the driver accepts; only before FEATURES_OK."""
        if half in {0, 1} and not self.status & FEATURES_OK:
            shift = 32 * half
            kept = self.driver_features & ~(0xFFFF_FFFF << shift)
            self.driver_features = kept | value << shift

    def enable_queue(self, index: int) -> None:
        """Start queue `index`, as the driver has set it up."""
        features = self.driver_features
        try:
            self.queues[index].enable(
                event_idx=bool(features & VIRTIO_F_EVENT_IDX),
                indirect=bool(features & VIRTIO_F_INDIRECT_DESC),
            )
        except QueueError as error:
            self.needs_reset(str(error))

    def notify(self, index: int) -> None:
        """Tell the device that the driver has added to queue `index`; any number is allowed."""
        if index < len(self.queues) and self.queues[index].ready and self.is_live():
            self.handle_queue(index)

    def reset(self) -> None:
        """Return to the state of a device nobody has touched."""
        self.status = 0
        self.driver_features = 0
        for queue in self.queues:
            queue.reset()
        self.on_reset()

    def save(self) -> dict[str, Any]:
        """Return status, features and queues; a type adds its own."""
        return {
            "status": self.status,
            "driver_features": self.driver_features,
            "queues": [queue.save() for queue in self.queues],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        self.status, self.driver_features = state["status"], state["driver_features"]
        for queue, saved in zip(self.queues, state["queues"], strict=True):
            queue.load(saved)


def _nowhere(configuration: bool) -> None:
    """Stand in for the transport's interrupt until there is one."""
