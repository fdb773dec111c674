"""virtio socket device whose packets the host's kernel carries: virtio 1.2, section 5.10; vhost.py.

To the guest it is what vsock.py is. But rx and tx are served by the host's kernel, between the
guest and AF_VSOCK of the host, and no packet passes through here: the guest's doorbells are the
kernel's `kicks`, and where the transport has an eventfd for a queue's interrupt (an MSI-X vector
that may fire) the kernel writes that. Where it has none (MMIO, whose InterruptStatus is ours; a
masked vector; MSI-X turned off) the kernel writes one of ours, and a thread interrupts.

Left to do is to say when. `_settle` is called by whatever may change that: the kernel serves while
the driver runs the device, both queues are ready, and the machine is not paused. A ring that the
kernel finds broken is told by an eventfd, and has the device need a reset.

Offered is what the kernel offers: SEQPACKET too, where it has that. Connections do not outlive
`save` and `load`, nor a reset by the driver: the descriptor is opened anew, so that the host's
sockets are told as well. To `save` what goes on, `suspend` it before.

Threads: vCPU threads through the transport, `suspend` and `resume` from any, and one of its own for
the eventfds; all hold the device's lock. The thread is joined without.
"""

import os
import select
import threading
from collections.abc import Callable
from typing import Any, Protocol

from tinyvmm import trace
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.devices.virtio.vsock_device import EVENT, RX, TX, VsockDevice
from tinyvmm.errors import ConfigError

VIRTIO_VSOCK_F_SEQPACKET = 1 << 1
_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class Kernel(Protocol):
    """The kernel's side: vhost.VhostVsock. Methods raise OSError or ValueError."""

    features: int

    def set_features(self, features: int) -> None:
        """Go by these."""

    def set_ring(self, ring: Virtqueue, kick: int, call: int, err: int) -> None:
        """Say all there is to know of a ring that is stopped, and its eventfds."""

    def set_call(self, index: int, fd: int) -> None:
        """Interrupt by eventfd `fd` from now on."""

    def set_running(self, running: bool) -> None:
        """Begin to serve the rings, or stop."""

    def ring_base(self, index: int) -> int:
        """Return which chain is next in a ring that is stopped."""

    def close(self) -> None:
        """Stop for ever."""


class VhostVsock(VsockDevice):
    """The device; the host knows the guest as `cid`."""

    ioeventfd = True

    def __init__(
        self, cid: int, open_kernel: Callable[[], Kernel], on_error: Callable[[BaseException], None]
    ) -> None:
        """Open the kernel's side, as at each reset; ConfigError from there.

        `on_error` takes a bug of ours, on the device's thread.
        """
        self._open_kernel = open_kernel
        self._kernel: Kernel | None = open_kernel()
        super().__init__(cid, features=VIRTIO_VSOCK_F_SEQPACKET)
        self.features &= self._kernel.features
        self._on_error = on_error
        self._begun = self._serving = self._suspended = self._closed = False
        self.kicks = tuple(os.eventfd(0, _FLAGS) for _ in (RX, TX))
        self._calls = tuple(os.eventfd(0, _FLAGS) for _ in (RX, TX))
        self._routes = [-1, -1]  # of each queue, the transport's eventfd, if there is one now
        self._err = os.eventfd(0, _FLAGS)
        self._end = os.eventfd(0, _FLAGS)
        self._thread: threading.Thread | None = None

    # --- when the kernel serves -------------------------------------------------------------

    def _settle(self) -> None:
        """Have the kernel serve if it is to, and only then; the lock is held."""
        ready = self.queues[RX].ready and self.queues[TX].ready
        wanted = self.running and ready and not (self._suspended or self._closed)
        if wanted == self._serving:
            return
        try:
            if wanted:
                self._start()
            else:
                self._stop()
        except (OSError, ValueError, ConfigError) as error:
            self.fail(f"vhost: {error}")

    def _start(self) -> None:
        if self._kernel is None:
            self._kernel = self._open_kernel()
        kernel = self._kernel
        self._begun = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="vhost-vsock", daemon=True)
            self._thread.start()
        kernel.set_features(self.driver_features)
        for index in (RX, TX):
            route = self._routes[index]
            call = self._calls[index] if route < 0 else route
            kernel.set_ring(self.queues[index], self.kicks[index], call, self._err)
        kernel.set_running(True)
        self._serving = True
        for kick in self.kicks:  # what was kicked while it did not serve was not heard
            os.eventfd_write(kick, 1)

    def _stop(self) -> None:
        self._serving = False
        if self._kernel is None:
            return
        self._kernel.set_running(False)
        for index in (RX, TX):
            self.queues[index].take_over(self._kernel.ring_base(index))

    # --- what the transport calls -----------------------------------------------------------

    def handle(self, queue: Virtqueue) -> None:
        """Pass a kick on that came as an exit; the event queue is served here."""
        self._settle()
        if queue.index == EVENT:
            self.flush_event()
        elif self._serving:
            os.eventfd_write(self.kicks[queue.index], 1)

    def enable_queue(self, queue: Virtqueue) -> None:
        """Begin to use `queue`."""
        with self.lock:
            super().enable_queue(queue)
            self._settle()

    def disable_queue(self, queue: Virtqueue) -> None:
        """Stop to use `queue`; the kernel needs both."""
        with self.lock:
            if queue.index != EVENT and self._serving:
                try:
                    self._stop()
                except OSError as error:
                    self.fail(f"vhost: {error}")
            super().disable_queue(queue)

    def route(self, index: int, fd: int) -> None:
        """Have the kernel interrupt for queue `index` by `fd`, or through us for -1."""
        with self.lock:
            if index == EVENT or self._routes[index] == fd:
                return
            self._routes[index] = fd
            if self._serving and self._kernel is not None:
                try:
                    self._kernel.set_call(index, self._calls[index] if fd < 0 else fd)
                except OSError as error:
                    self.fail(f"vhost: {error}")

    def fail(self, why: str) -> None:
        """Stop until reset."""
        super().fail(why)
        self._settle()

    def reset(self) -> None:
        """Forget the driver, and end what it had with the host."""
        if self._begun:
            self._begun = self._serving = False
            if self._kernel is not None:
                self._kernel.close()
                self._kernel = None
            if not self._closed:
                try:
                    self._kernel = self._open_kernel()
                except ConfigError as error:  # somebody may have taken the CID; at DRIVER_OK again
                    if trace.hook is not None:
                        trace.hook(trace.Message(self.name, str(error)))
        super().reset()

    # --- pause, and the end -----------------------------------------------------------------

    def suspend(self) -> None:
        """Have the kernel leave the guest's RAM alone."""
        with self.lock:
            self._suspended = True
            self._settle()

    def resume(self) -> None:
        """Have it go on."""
        with self.lock:
            self._suspended = False
            self._settle()

    def load(self, state: dict[str, Any]) -> None:
        """Become what `save` described."""
        with self.lock:
            super().load(state)
            self._settle()

    def save(self) -> dict[str, Any]:
        """Return the state; where the kernel serves, as of a moment ago."""
        with self.lock:
            suspended = self._suspended
            self.suspend()
            state = super().save()
            if not suspended:
                self.resume()
            return state

    def detach(self) -> None:
        """Leave the transport."""
        self.close()
        super().detach()

    def close(self) -> None:
        """Close every descriptor and end the thread; harmless when done twice. Without the lock."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self.reset()
            if self._kernel is not None:
                self._kernel.close()
                self._kernel = None
            os.eventfd_write(self._end, 1)
        if self._thread is not None:
            self._thread.join()
        for fd in (*self.kicks, *self._calls, self._err, self._end):
            os.close(fd)

    # --- what the kernel tells --------------------------------------------------------------

    def _main(self) -> None:
        """Interrupt where the kernel cannot, and hear of broken rings; the device's thread."""
        poller = select.poll()
        for fd in (*self._calls, self._err, self._end):
            poller.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in poller.poll():
                    if fd == self._end:
                        return
                    os.eventfd_read(fd)
                    with self.lock:
                        if fd == self._err:
                            self._broken()
                        else:
                            self._interrupt(self._calls.index(fd))
        except BaseException as error:  # noqa: BLE001 (a thread's end must reach the machine)
            self._on_error(error)

    def _broken(self) -> None:
        if self._serving:  # else it is of before a reset
            self.fail("vhost: the kernel cannot use a ring")
