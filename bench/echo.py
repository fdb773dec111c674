"""What it costs that whoever sends back a byte is Python: the least that a device in Python can do.

A byte goes over a Unix socket to another process, which sleeps until it comes and sends it back: a
C program's thread in read(2), and Python in epoll, with three system calls and a few lines in
between, as a device's thread has them. Here, and in the lab, which is where vsock is measured:
there each process that wakes finds the emulated processor's translations of addresses gone.
"""

import os
import select
import socket
import subprocess
import sys
import tempfile
from statistics import median
from time import perf_counter_ns

from bench.links import C_PROGRAM
from bench.place import where_linux_runs

COUNT, ROUNDS = 300, 5


def serve(path: str) -> None:
    """Send back what comes at `path`, and say when it may come."""
    with socket.socket(socket.AF_UNIX) as listener, select.epoll() as poller:
        listener.bind(path)
        listener.listen()
        print("serving", flush=True)
        connection, _ = listener.accept()
        with connection:
            poller.register(connection, select.EPOLLIN)
            while True:
                for _fd, _events in poller.poll():
                    data = connection.recv(1)
                    if not data:
                        return
                    connection.sendmsg([data])


def once(command: list[str], path: str) -> float:
    """Return the microseconds for a byte there and back."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        if process.stdout is not None:
            process.stdout.readline()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.send(b"P")  # which is for the C program, and a byte for the other
            if command[0] == sys.executable:
                client.recv(1)
            for turn in range(-COUNT // 10, COUNT):
                if not turn:
                    began = perf_counter_ns()
                client.send(b"x")
                client.recv(1)
            took = perf_counter_ns() - began
        process.kill()
    os.unlink(path)
    return took / COUNT / 1000


def measure(program: str, root: str) -> list[tuple[float, float]]:
    """Return, of each round, the microseconds with the C program and with Python."""
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from bench import echo; echo.serve(sys.argv[1])"
    )
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "socket")
        ways = [program, "serve", "1", "1", "unix", path], [sys.executable, "-c", code, path]
        return [(once(ways[0], path), once(ways[1], path)) for _ in range(ROUNDS)]


def main() -> None:
    """Measure here and, where this computer's KVM cannot run Linux, in the lab, and print."""
    from bench.place import ROOT

    with tempfile.TemporaryDirectory() as directory:
        program = os.path.join(directory, "program")
        gcc = ["gcc", "-O2", "-static", "-pthread", "-o", program, str(C_PROGRAM)]
        subprocess.run(gcc, check=True)
        for where, rounds in (
            ("here", measure(program, ROOT)),
            ("where Linux runs", where_linux_runs(measure, program, ROOT, timeout=300)),
        ):
            in_c, in_python = (median(times) for times in zip(*rounds, strict=True))
            print(f"{where:18}{in_c:9.1f} us by C{in_python:9.1f} us by Python")
