r"""Runs commands for `Lab` (lab.py), inside its machine, one after the other, until input ends.

Executed as a file by a bare interpreter, so it imports nothing of ours. Its argument, if it has
one, is the KVM device on which to keep machines meanwhile (keep_machines). A request is a line of
JSON followed by the command's stdin; an answer is a line of JSON followed by its output:

    {"argv": [...], "env": {...}, "cwd": "/", "timeout": 60, "pty": null, "stdin": 5}\nhello
    {"status": 0, "timed_out": false, "stdout": 5, "stderr": 0}\nhello

While the command runs an empty line is sent every HEARTBEAT seconds, by a thread that has just been
on every processor: a lab may hang as a whole, or one processor of it, under a command that would be
right to take its time.

`status` is as subprocess gives it: -N for signal N; `error` in its place says why there was no
command to run. `pty` may be [rows, columns]: then the command has a terminal of its own, what it
shows is stdout, and stdin is typed into it.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from typing import IO, Any

Json = dict[str, Any]

HEARTBEAT = 1.0  # seconds
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP = 0xAE01, 0xAE41, 0xAE60  # <linux/kvm.h>


def keep_machines(device: str) -> list[int]:
    """Make two idle machines with KVM, one with a local APIC, and return what keeps them.

    The first machine of all, the first virtual processor without a local APIC and the first whose
    APIC is off switch branches in the kernel's code on, some of them in its scheduler, and the last
    to go switches them off: by INT3, while other processors run there. QEMU may then go on with a
    translation of the INT3, for ever and on every processor. Nothing is switched while these live.
    """
    kvm = os.open(device, os.O_RDWR)
    kept = [kvm]
    for irqchip in (True, False):
        machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        if irqchip:
            fcntl.ioctl(machine, KVM_CREATE_IRQCHIP)
        kept += [machine, fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)]
    return kept


def main() -> None:
    """Serve until our stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request = json.loads(line)
        stdin = requests.read(request["stdin"])
        try:
            with heartbeat(answers):
                answer, stdout, stderr = run(request, stdin)
        except OSError as error:
            answer, stdout, stderr = {"error": str(error)}, b"", b""
        answer |= {"stdout": len(stdout), "stderr": len(stderr)}
        answers.write(json.dumps(answer).encode() + b"\n" + stdout + stderr)
        answers.flush()


@contextlib.contextmanager
def heartbeat(answers: IO[bytes]) -> Iterator[None]:
    """Send a sign of life of all processors from time to time.

    Each processor is visited from every other, too: one whose timer's interrupt QEMU lost sleeps or
    goes on with what it does until it gets another.
    """
    done = threading.Event()
    processors = sorted(os.sched_getaffinity(0))

    def beat(home: int) -> None:
        os.sched_setaffinity(0, {home})  # of this thread alone, and so its timer's
        while not done.wait(HEARTBEAT):
            for processor in (*processors, home):
                os.sched_setaffinity(0, {processor})
            if home == processors[0]:
                answers.write(b"\n")
                answers.flush()

    threads = [threading.Thread(target=beat, args=(home,)) for home in processors]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def run(request: Json, stdin: bytes) -> tuple[Json, bytes, bytes]:
    """Run one command to its end, or to its time limit's."""
    if request["pty"]:
        return run_in_terminal(request, stdin)
    with subprocess.Popen(
        request["argv"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=request["cwd"],
        env=request["env"],
        start_new_session=True,
    ) as child:
        try:
            stdout, stderr = child.communicate(stdin, request["timeout"])
            timed_out = False
        except subprocess.TimeoutExpired:
            end(child)
            stdout, stderr = child.communicate()
            timed_out = True
    return {"status": child.returncode, "timed_out": timed_out}, stdout, stderr


def run_in_terminal(request: Json, stdin: bytes) -> tuple[Json, bytes, bytes]:
    """Run one command with a pseudo-terminal as its stdin, stdout and stderr."""
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *request["pty"], 0, 0))
    deadline = monotonic() + request["timeout"]
    shown = b""
    child = subprocess.Popen(
        request["argv"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=request["cwd"],
        env=request["env"],
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no threads
    )
    os.close(slave)
    poller = select.poll()
    poller.register(master, select.POLLIN | (select.POLLOUT if stdin else 0))
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
        while (left := deadline - monotonic()) > 0:
            for _, event in poller.poll(1000 * left):
                if event & (select.POLLIN | select.POLLHUP):
                    shown += os.read(master, 65536)
                elif event & select.POLLOUT:
                    stdin = stdin[os.write(master, stdin[:256]) :]
                    if not stdin:
                        poller.modify(master, select.POLLIN)
    timed_out = monotonic() >= deadline
    if timed_out:
        end(child)
    os.close(master)
    return {"status": child.wait(), "timed_out": timed_out}, shown, b""


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill the command and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        keep_machines(path)
    main()
