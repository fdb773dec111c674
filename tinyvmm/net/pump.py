"""The thread that waits for a backend's descriptor, and tells the device.

A backend asks it for what it wants to be told of; the device's lock is held then, or nobody's.
"""

import os
import select
import threading
from collections.abc import Callable
from typing import Protocol


class Device(Protocol):
    """What is used of devices.virtio.net.Pair."""

    def readable(self) -> None:
        """Frames are there."""

    def writable(self) -> None:
        """Frames are taken again."""


class Pump:
    """Waits for `fd` to be readable (`want_read`) and, once each time, writable (`want_write`)."""

    def __init__(
        self,
        fd: int,
        drain: Callable[[], None] | None = None,
        on_wake: Callable[[], None] | None = None,
    ) -> None:
        """Make it, asleep.

        `drain` is called before the device is told that `fd` is readable, `on_wake` before it is
        told because of `wake`.
        """
        self._fd = fd
        self._drain = drain
        self._on_wake = on_wake
        self._events = 0
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self._end, self._wake = os.eventfd(0, flags), os.eventfd(0, flags)
        self._epoll.register(self._end, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread: threading.Thread | None = None

    def start(self, device: Device, on_error: Callable[[BaseException], None]) -> None:
        """Begin to tell `device`; `on_error` takes a bug of ours."""

        def main() -> None:
            try:
                self._main(device)
            except BaseException as error:  # noqa: BLE001 (a thread's end must reach the machine)
                on_error(error)

        self._thread = threading.Thread(target=main, name="net", daemon=True)
        self._thread.start()

    def want_read(self, wanted: bool) -> None:
        """Tell, or do not tell, that there is something to read; any thread."""
        self._change(select.EPOLLIN if wanted else 0, select.EPOLLIN)

    def want_write(self) -> None:
        """Tell once that there is room to write; any thread."""
        self._change(select.EPOLLOUT, select.EPOLLOUT)

    def wake(self) -> None:
        """Tell that there is something to read that did not come from `fd`; any thread."""
        os.eventfd_write(self._wake, 1)

    def _change(self, events: int, mask: int) -> None:
        with self._lock:
            before, after = self._events, self._events & ~mask | events
            self._events = after
            if self._epoll.closed or before == after:
                return
            if not before:
                self._epoll.register(self._fd, after)
            elif not after:
                self._epoll.unregister(self._fd)
            else:
                self._epoll.modify(self._fd, after)

    def _main(self, device: Device) -> None:
        while True:
            for fd, events in self._epoll.poll():
                if fd == self._end:
                    return
                if fd == self._wake:
                    os.eventfd_read(fd)
                    if self._on_wake is not None:
                        self._on_wake()
                    device.readable()
                    continue
                if events & select.EPOLLOUT:
                    self._change(0, select.EPOLLOUT)
                    device.writable()
                if events & ~select.EPOLLOUT:
                    if self._drain is not None:
                        self._drain()
                    device.readable()

    def close(self) -> None:
        """End the thread."""
        os.eventfd_write(self._end, 1)
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._epoll.close()
        os.close(self._end)
        os.close(self._wake)
