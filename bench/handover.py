"""What it costs to hand a request from a device's thread to another, which answers it.

No guest: an eventfd is the doorbell, another the interrupt. The thread that the doorbell wakes
takes the device's lock and hands over; the worker takes that lock to answer. How the worker is
woken is what is compared, and whether the lock is still held then.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from statistics import median
from time import perf_counter_ns

COUNT, ROUNDS = 500, 5
SWITCH_INTERVAL = 1e-4  # as a machine's that runs

Calls = tuple[Callable[[], object], Callable[[], object]]
"""To wake the worker, and to wait for that."""


def nothing(_changed: threading.Condition, _bell: int) -> Calls:
    """Do not: the first thread answers."""
    return lambda: None, lambda: None


def condition(changed: threading.Condition, _bell: int) -> Calls:
    """A Condition on the device's lock."""
    tasks: deque[int] = deque()

    def wake() -> None:
        with changed:
            tasks.append(1)
            changed.notify()

    def wait() -> None:
        with changed:
            while not tasks:
                changed.wait()
            tasks.pop()

    return wake, wait


def queue(_changed: threading.Condition, _bell: int) -> Calls:
    """A SimpleQueue."""
    tasks: SimpleQueue[int] = SimpleQueue()
    return lambda: tasks.put(1), tasks.get


def eventfd(_changed: threading.Condition, bell: int) -> Calls:
    """An eventfd, whose write and read let go of the interpreter's lock."""
    return lambda: os.eventfd_write(bell, 1), lambda: os.eventfd_read(bell)


def measure(way: Callable[[threading.Condition, int], Calls], *, held: bool) -> float:
    """Return the median microseconds from a doorbell to its interrupt."""
    lock = threading.RLock()
    doorbell, interrupt, bell = fds = [os.eventfd(0) for _ in range(3)]
    wake, wait = way(threading.Condition(lock), bell)
    inline = way is nothing

    def serve() -> None:
        for _ in range(COUNT):
            os.eventfd_read(doorbell)
            with lock:
                if inline:
                    os.eventfd_write(interrupt, 1)
                elif held:
                    wake()
            if not inline and not held:
                wake()

    def answer() -> None:
        for _ in range(0 if inline else COUNT):
            wait()
            with lock:
                os.eventfd_write(interrupt, 1)

    threads = [threading.Thread(target=main) for main in (serve, answer)]
    for thread in threads:
        thread.start()
    times = []
    for _ in range(COUNT):
        begin = perf_counter_ns()
        os.eventfd_write(doorbell, 1)
        os.eventfd_read(interrupt)
        times.append(perf_counter_ns() - begin)
    for thread in threads:
        thread.join()
    for fd in fds:
        os.close(fd)
    return median(times) / 1000


def main() -> None:
    """Measure and print."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    found: dict[tuple[str, bool], list[float]] = {}
    try:
        for _ in range(ROUNDS):
            for way in (nothing, condition, queue, eventfd):
                for held in (True, False):
                    found.setdefault((way.__name__, held), []).append(measure(way, held=held))
    finally:
        sys.setswitchinterval(before)
    print(f"{'microseconds':12} {'lock held':>10} {'not held':>10}")
    for name in ("nothing", "condition", "queue", "eventfd"):
        with_it, without = (median(found[name, held]) for held in (True, False))
        print(f"{name:12} {with_it:10.1f} {without:10.1f}")


if __name__ == "__main__":
    main()
