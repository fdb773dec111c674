"""Interrupts and doorbells that the kernel carries: irqfd and ioeventfd.

Documentation/virt/kvm/api.rst: KVM_IRQFD, KVM_IOEVENTFD, KVM_SET_GSI_ROUTING.

An *irqfd* is an eventfd whose events raise a GSI; whoever can write 8 bytes to it can interrupt the
guest. GSIs below 24 are the pins of the interrupt controllers. An MSI-X vector gets a number of its
own above, and KVM's table of routes says which message to which local APIC that number is:
`MsiRoutes` keeps the table, `MsiLine` is one vector.

An *ioeventfd* is an address whose writes become events: the vCPU that rings a doorbell goes on with
the guest at once, and the thread of a `Doorbells` serves the queue. Whether that is quicker than to
serve it inline, on the vCPU's thread and at the price of an exit: docs/decisions/0004. Where the
kernel answers, there are `Bells` alone: vhost.py.

Threads: a vCPU's thread sets routes and places doorbells; any thread fires a line; each `Doorbells`
has one of its own, which is inside `VirtioDevice.notify` or what `watch` was given, or asleep.
`MsiRoutes` has a lock for its table, taken with an Msix's held; doorbells are placed under the lock
of the PCI bus.
"""

import os
import select
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from tinyvmm import kvm, trace
from tinyvmm.errors import KvmError
from tinyvmm.layout import GSI_COUNT

_PIC_PINS = 8  # of each of the two


class MsiRoutes:
    """KVM's table of routes: those of the controllers' pins, and one for each vector in use."""

    def __init__(self, vm: kvm.VM) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._pins = [
            kvm.irqchip_route(gsi, kvm.KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(GSI_COUNT)
        ]
        for chip in (kvm.KVM_IRQCHIP_PIC_MASTER, kvm.KVM_IRQCHIP_PIC_SLAVE):
            self._pins += [
                kvm.irqchip_route(_PIC_PINS * chip + pin, chip, pin) for pin in range(_PIC_PINS)
            ]
        self._messages: dict[int, kvm.kvm_irq_routing_entry] = {}
        self._lines: list[MsiLine] = []

    def line(self) -> "MsiLine":
        """Return a new vector, which leads nowhere yet."""
        with self._lock:
            line = MsiLine(self, GSI_COUNT + len(self._lines))
            self._lines.append(line)
            return line

    def attach(self, fd: int, gsi: int) -> None:
        """Have the events of `fd` raise `gsi`."""
        self._vm.irqfd(fd, gsi)

    def set(self, gsi: int, address: int, data: int) -> bool:
        """Lead `gsi` to a message; False where KVM will not have it."""
        with self._lock:
            before = self._messages.pop(gsi, None)
            self._messages[gsi] = kvm.msi_route(gsi, address, data)
            try:
                self._vm.set_gsi_routing([*self._pins, *self._messages.values()])
            except KvmError as error:
                if trace.hook is not None:
                    trace.hook(trace.Message("msi", f"{data:#x} to {address:#x}: {error}"))
                del self._messages[gsi]
                if before is not None:
                    self._messages[gsi] = before
                return False
            return True

    def close(self) -> None:
        """Close every line's eventfd."""
        for line in self._lines:
            line.close()


class MsiLine:
    """One MSI-X vector; what devices/msix.py calls a MessageLine."""

    def __init__(self, routes: MsiRoutes, gsi: int) -> None:
        self._routes = routes
        self._gsi = gsi
        self._fd = -1
        self._message: tuple[int, int] | None = None

    def route(self, address: int, data: int) -> None:
        """Send this from now on; nothing, if no local APIC could be meant."""
        if self._message == (address, data):
            return
        if not self._attached():
            return
        self._message = (address, data) if self._routes.set(self._gsi, address, data) else None

    def _attached(self) -> bool:
        """Have an eventfd; most vectors of most devices are never used. False if there is none.

        A guest may have taken our last descriptor, and then only misses this interrupt of its.
        """
        if self._fd < 0:
            try:
                self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as error:
                if trace.hook is not None:
                    trace.hook(trace.Message("msi", f"no eventfd for a vector: {error.strerror}"))
                return False
            self._routes.attach(self._fd, self._gsi)
        return True

    def fire(self) -> None:
        """Send the message."""
        if self._message is not None:
            os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return the eventfd, for whom fires by itself; -1 if it leads nowhere."""
        return -1 if self._message is None else self._fd

    def close(self) -> None:
        """Close the eventfd, and with it the irqfd."""
        self._message = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Notified(Protocol):
    """Whoever has queues: a VirtioDevice."""

    name: str

    def notify(self, index: int) -> None:
        """Serve queue `index`."""


class Bells:
    """The doorbells of one device: where they are, and the eventfds of whoever answers them."""

    def __init__(self, vm: kvm.VM, fds: Sequence[int]) -> None:
        """Have a bell for each of `fds`, those of the first queues, not yet at any address."""
        self._vm = vm
        self._fds = fds
        self._placed: list[tuple[int, int, int, int | None]] = []

    def place_pci(self, gpa: int | None, stride: int) -> None:
        """Have bell n at `gpa` + n * `stride`, for writes of any length; None takes them away."""
        self._place(
            [(fd, gpa + index * stride, 0, None) for index, fd in enumerate(self._fds)]
            if gpa is not None
            else []
        )

    def place_mmio(self, gpa: int) -> None:
        """Have all bells at `gpa`, where the 32-bit value written is the bell's number."""
        self._place([(fd, gpa, 4, index) for index, fd in enumerate(self._fds)])

    def _place(self, wanted: list[tuple[int, int, int, int | None]]) -> None:
        for where in self._placed:
            self._vm.ioeventfd(*where, remove=True)
        self._placed = []
        for where in wanted:
            self._vm.ioeventfd(*where)
            self._placed.append(where)


class Doorbells(Bells):
    """The doorbells of one device, and the thread that answers them.

    The same thread hears of what else the device waits for, if that is a descriptor: two threads
    that pass on a stream each way meet at the interpreter's lock for each answer.
    """

    def __init__(
        self, vm: kvm.VM, device: Notified, count: int, on_error: Callable[[BaseException], None]
    ) -> None:
        """Make `count` doorbells, not yet at any address; `on_error` takes a bug of ours."""
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        super().__init__(vm, [os.eventfd(0, flags) for _ in range(count)])
        self._name = device.name
        self._on_error = on_error
        self._thread: threading.Thread | None = None
        self._end = os.eventfd(0, flags)
        self._untold = [self._end]  # until the thread is told to end
        notify = device.notify
        self._calls: dict[int, Callable[[], None]] = {
            fd: partial(notify, index) for index, fd in enumerate(self._fds)
        }
        self.poller = select.epoll()
        # By its edges an eventfd is heard each time it is written to, and need not be read.
        for fd in (*self._fds, self._end):
            self.poller.register(fd, select.EPOLLIN | select.EPOLLET)

    def start(self) -> None:
        """Start to answer."""
        self._thread = threading.Thread(target=self._main, name=f"io {self._name}", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        calls, wait = self._calls, self.wait
        try:
            while True:
                for fd, _ in wait():
                    call = calls.get(fd)
                    if call is not None:
                        call()
                    elif fd == self._end:  # the last of them: what rang before has been answered
                        return
        except BaseException as error:  # noqa: BLE001 (a thread's end must reach the machine)
            self._on_error(error)

    def wait(self) -> list[tuple[int, int]]:
        """Sleep until a bell rings; (descriptor, events) of each."""
        return self.poller.poll()

    def watch(self, fd: int, call: Callable[[], None], events: int = select.EPOLLIN) -> bool:
        """Have the thread `call` whenever `fd` is ready for any of `events`, epoll's.

        In place of what it was watched for before. False if epoll will not. From any thread.
        """
        known = fd in self._calls
        self._calls[fd] = call
        try:
            if known:
                self.poller.modify(fd, events)
            else:
                self.poller.register(fd, events)
        except OSError:  # as all that epoll may have are in use
            del self._calls[fd]
            return False
        return True

    def unwatch(self, fd: int) -> None:
        """Do so no more; only a call that has begun goes on. From any thread."""
        if self._calls.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def finish(self) -> None:
        """Return when all that rang has been answered and the thread has ended.

        The guest must not run any more. From any thread, and harmless when done twice.
        """
        with suppress(IndexError):  # somebody else has
            os.eventfd_write(self._untold.pop(), 1)
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the thread and close the eventfds; the guest must not run any more."""
        self.finish()
        self._calls.clear()
        self.poller.close()
        for fd in (*self._fds, self._end):
            os.close(fd)
