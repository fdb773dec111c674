"""The host's side of a session, with a guest played by a thread on the other end of the ports."""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm import session as session_module
from tinyvmm.eventfds import Doorbells
from tinyvmm.guest.protocol import EXEC_FAILED, EXITED, RECORD, SETUP_FAILED, SIGNAL, STARTED
from tinyvmm.session import HostFiles, Ports, Result, Session, write_all
from tinyvmm.streams import (
    CHUNK,
    LITTLE,
    PortInput,
    PortOutput,
    Receiver,
    SocketInput,
    SocketOutput,
)
from tinyvmm.views import Views


class GuestPort:
    """A console port seen from the guest: it queues buffers out and posts buffers for input."""

    def __init__(self) -> None:
        self.on_output: Callable[[], None] = lambda: None
        self.on_space: Callable[[], None] = lambda: None
        self.sent: deque[bytes] = deque()
        self.received = bytearray()
        self.capacity = 1 << 30
        self.closed = threading.Event()
        self.changed = threading.Condition()
        self.listened = threading.Event()
        self.passed_to: Callable[[Views], int] | None = None
        self.watcher: Doorbells | None = None

    def watch(self, fd: int, call: Callable[[], None]) -> bool:
        return self.watcher is not None and self.watcher.watch(fd, call)

    def unwatch(self, fd: int) -> None:
        assert self.watcher is not None
        self.watcher.unwatch(fd)

    def take_output(self) -> bytes:
        self.listened.set()
        return self.sent.popleft() if self.sent else b""

    def pass_to(self, send: Callable[[Views], int] | None) -> None:
        self.passed_to = send

    def put_input(self, data: bytes | memoryview, *, patient: bool = False) -> int:
        with self.changed:
            count = min(len(data), self.capacity)
            self.capacity -= count
            self.received += bytes(data[:count])
            self.changed.notify_all()
        return count

    def close(self) -> None:
        self.closed.set()

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self.on_output()

    def post(self, count: int) -> None:
        with self.changed:
            self.capacity += count
        self.on_space()

    def wait_for(self, count: int) -> bytes:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.received) >= count, timeout=60)
            return bytes(self.received[:count])


class Guest(NamedTuple):
    stdin: GuestPort
    stdout: GuestPort
    stderr: GuestPort
    control: GuestPort

    def record(self, kind: int, value: int = 0) -> None:
        self.control.send(RECORD.pack(kind, value))

    def ports(self) -> Ports:
        return Ports.of(self)


def device_thread(on_error: Callable[[BaseException], None]) -> Doorbells:
    """A device's own thread, without a machine."""
    device = SimpleNamespace(name="test", notify=lambda _index: None)
    thread = Doorbells(cast("Any", None), device, 0, on_error)
    thread.start()
    return thread


class Host:
    """A session whose host descriptors are pipes, and whose guest is a function in a thread.

    `own_thread`: the device has a thread that may read stdin.
    """

    def __init__(self, *, own_thread: bool = False) -> None:
        self.guest = Guest(GuestPort(), GuestPort(), GuestPort(), GuestPort())
        self.errors: list[BaseException] = []
        self.watcher = device_thread(self.errors.append) if own_thread else None
        self.guest.stdin.watcher = self.watcher
        self.stdin, self.to_stdin = os.pipe()
        self.from_stdout, self.stdout = os.pipe()
        self.from_stderr, self.stderr = os.pipe()
        self.files = HostFiles(self.stdin, self.stdout, self.stderr)

    def run(self, script: Callable[[Guest], None], **options: Any) -> Result:
        options.setdefault("files", self.files)
        session = Session(self.guest.ports(), command="prog", **options)
        failures: list[BaseException] = []

        def play() -> None:
            try:
                assert self.guest.control.listened.wait(60)  # signals are caught from here on
                script(self.guest)
            except BaseException as error:  # noqa: BLE001 - raised in the test's thread
                failures.append(error)
                session.stopped(message="the script failed")

        thread = threading.Thread(target=play)
        thread.start()
        result = session.run()
        thread.join()
        if failures:
            raise failures[0]
        return result

    def printed(self) -> tuple[bytes, bytes]:
        os.close(self.stdout)
        os.close(self.stderr)
        self.stdout = self.stderr = -1
        with open(self.from_stdout, "rb") as out, open(self.from_stderr, "rb") as err:
            self.from_stdout = self.from_stderr = -1
            return out.read(), err.read()

    def close(self) -> None:
        for fd in (self.stdin, self.to_stdin, self.from_stdout, self.stdout, self.from_stderr):
            if fd >= 0:
                os.close(fd)
        if self.stderr >= 0:
            os.close(self.stderr)
        if self.watcher is not None:
            self.watcher.close()
        assert self.errors == []


@pytest.fixture(params=[False, True], ids=["relayed", "own thread"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(own_thread=request.param)
    yield host
    host.close()


def wait_status(script: str) -> int:
    """Ask the kernel for a wait status."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], {})
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)],
)
def test_the_status_is_the_one_a_shell_would_show(host: Host, script: str, status: int) -> None:
    word = wait_status(script)

    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        g.record(EXITED, word)

    assert host.run(guest).status == status


@given(kind=st.integers(0, 2**32 - 1), value=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_no_record_of_a_guest_can_make_a_session_fail(kind: int, value: int) -> None:
    host = Host()
    try:

        def guest(g: Guest) -> None:
            g.record(kind, value)
            g.record(EXITED, 0)

        result = host.run(guest)
        assert 0 <= result.status <= 255
    finally:
        host.close()


def test_a_pipe_takes_output_at_once_until_the_session_has_ended(host: Host) -> None:
    def guest(g: Guest) -> None:
        assert g.stdout.listened.wait(60)
        send = g.stdout.passed_to
        assert send is not None
        assert send([memoryview(b"at "), memoryview(b"once")]) == 7
        g.record(STARTED, 2)
        g.record(EXITED, 0)

    assert host.run(guest).status == 0
    assert host.printed() == (b"at once", b"")
    assert host.guest.stdout.passed_to is host.guest.stderr.passed_to is None


def test_what_is_no_pipe_and_a_function_get_output_from_a_thread(
    host: Host, tmp_path: Path
) -> None:
    said: list[bytes] = []

    def guest(g: Guest) -> None:
        assert g.stdout.listened.wait(60)
        assert g.stderr.listened.wait(60)
        assert g.stdout.passed_to is g.stderr.passed_to is None
        g.stdout.send(b"a file")
        g.stderr.send(b"a function")
        g.record(STARTED, 2)
        g.record(EXITED, 0)

    with open(tmp_path / "out", "wb") as file:
        files = host.files._replace(stdout=file.fileno())
        host.run(guest, files=files, sinks={"stderr": said.append})
    assert (tmp_path / "out").read_bytes() == b"a file"
    assert said == [b"a function"]


def test_a_record_split_over_several_buffers_is_put_together(host: Host) -> None:
    def guest(g: Guest) -> None:
        whole = RECORD.pack(STARTED, 5) + RECORD.pack(EXITED, 3 << 8)
        for byte in whole:
            g.control.send(bytes([byte]))

    assert host.run(guest) == Result(3, "exited")


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (errno.ENOENT, 127, "prog: command not found in the guest"),
        (errno.EACCES, 126, "prog: Permission denied, in the guest"),
        (errno.ENOEXEC, 126, "prog: Exec format error, in the guest"),
    ],
)
def test_a_command_that_cannot_be_executed_is_named(
    host: Host, number: int, status: int, words: str
) -> None:
    result = host.run(lambda g: g.record(EXEC_FAILED, number))
    assert result == Result(status, "exec", words)


def test_a_failed_setup_names_the_step_and_the_reason(host: Host) -> None:
    result = host.run(
        lambda g: g.record(SETUP_FAILED, 3 << 16 | errno.ENODEV),
        describe_step=["", "", "", "mount the root"].__getitem__,
    )
    assert result.status == 255
    assert result.message == "the guest could not mount the root: No such device"


@given(
    out=st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    err=st.lists(st.binary(min_size=1, max_size=300), max_size=20),
)
@settings(deadline=None, max_examples=40)
def test_all_output_sent_before_the_end_arrives_apart_and_in_order(
    out: list[bytes], err: list[bytes]
) -> None:
    host = Host()
    try:

        def guest(g: Guest) -> None:
            g.stdout.sent.extend(out)  # queued, with nobody told: the end alone must bring it out
            g.stderr.sent.extend(err)
            g.record(EXITED, 0)

        assert host.run(guest).status == 0
        assert host.printed() == (b"".join(out), b"".join(err))
    finally:
        host.close()


@given(data=st.binary(max_size=2000), posts=st.lists(st.integers(1, 300), min_size=1))
@settings(deadline=None, max_examples=40)
def test_stdin_arrives_byte_exact_through_whatever_buffers_are_posted(
    data: bytes, posts: list[int]
) -> None:
    host = Host()
    try:
        host.guest.stdin.capacity = 0

        def guest(g: Guest) -> None:
            g.record(STARTED, 2)
            for count in posts:
                g.stdin.post(count)
            g.stdin.post(2000)
            assert g.stdin.closed.wait(60)
            g.record(EXITED, 0)

        os.write(host.to_stdin, data)
        os.close(host.to_stdin)
        host.to_stdin = -1
        host.run(guest)
        assert bytes(host.guest.stdin.received) == data
    finally:
        host.close()


def test_nothing_is_sent_to_the_guest_before_it_has_started(host: Host) -> None:
    os.write(host.to_stdin, b"early")
    early: list[bytes] = []

    def guest(g: Guest) -> None:
        assert not g.stdin.closed.wait(0.1)
        early.append(bytes(g.stdin.received))
        g.record(STARTED, 2)
        assert g.stdin.wait_for(5) == b"early"
        g.record(EXITED, 0)

    host.run(guest)
    assert early == [b""]


def test_a_stdin_that_was_never_open_is_at_its_end(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        assert g.stdin.closed.wait(60)
        g.record(EXITED, 0)

    assert host.run(guest, files=HostFiles(None, host.stdout, host.stderr)).status == 0


def test_a_directory_as_stdin_is_at_its_end(host: Host) -> None:
    directory = os.open("/", os.O_RDONLY)

    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        assert g.stdin.closed.wait(60)
        g.record(EXITED, 0)

    try:
        assert host.run(guest, files=HostFiles(directory, host.stdout, host.stderr)).status == 0
    finally:
        os.close(directory)


def test_input_typed_after_the_command_ended_is_left_to_the_next_reader(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        g.record(EXITED, 0)

    host.run(guest)
    names = {thread.name for thread in threading.enumerate()}
    for thread in threading.enumerate():
        if thread.name == "relay_input":
            thread.join(60)
            assert not thread.is_alive(), names
    os.write(host.to_stdin, b"mine")
    assert os.read(host.stdin, 100) == b"mine"


def test_a_consumer_that_has_gone_ends_the_session_as_sigpipe_would(host: Host) -> None:
    os.close(host.from_stdout)
    host.from_stdout = -1

    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        g.stdout.send(b"to nobody")

    assert host.run(guest) == Result(128 + signal.SIGPIPE, "output")


def test_an_output_that_cannot_be_written_says_why(host: Host) -> None:
    full = os.open("/dev/full", os.O_WRONLY)

    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        g.stdout.send(b"too much")

    try:
        result = host.run(guest, files=HostFiles(host.stdin, full, host.stderr))
    finally:
        os.close(full)
    assert result == Result(1, "output", "cannot write stdout: No space left on device")


def test_a_closed_stderr_swallows_and_a_closed_stdout_does_not(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        g.stderr.send(b"unheard")
        g.record(EXITED, 0)

    assert host.run(guest, files=HostFiles(host.stdin, host.stdout, None)).status == 0

    other = Host()
    try:
        result = other.run(
            lambda g: g.stdout.send(b"lost"), files=HostFiles(other.stdin, None, other.stderr)
        )
        assert result.reason == "output"
    finally:
        other.close()


def test_a_non_blocking_stdout_loses_nothing_and_stays_non_blocking() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = os.urandom(1 << 20)
    got = bytearray()

    def consume() -> None:
        while part := os.read(reader, 1 << 16):
            got.extend(part)

    thread = threading.Thread(target=consume)
    thread.start()
    write_all(writer, data)
    assert not os.get_blocking(writer)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert bytes(got) == data


def test_a_consumer_that_stops_reading_delays_neither_input_nor_signals(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        for _ in range(100):
            g.stdout.send(bytes(4096))  # far more than the pipe takes
        os.write(host.to_stdin, b"still here")
        assert g.stdin.wait_for(10) == b"still here"
        os.kill(os.getpid(), signal.SIGINT)
        assert g.control.wait_for(8) == RECORD.pack(SIGNAL, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    assert host.run(guest) == Result(128 + signal.SIGTERM, "signal")


def test_the_first_interrupt_reaches_the_command_and_the_second_kills(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        # A byte through stdin: only after it is STARTED known to have been seen.
        os.write(host.to_stdin, b"x")
        g.stdin.wait_for(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert g.control.wait_for(8) == RECORD.pack(SIGNAL, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert host.run(guest) == Result(130, "signal")


def test_an_interrupt_before_the_start_kills(host: Host) -> None:
    result = host.run(lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert result == Result(130, "signal")


def test_a_command_that_handles_the_interrupt_decides_the_status(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        os.write(host.to_stdin, b"x")
        g.stdin.wait_for(1)
        os.kill(os.getpid(), signal.SIGINT)
        g.control.wait_for(8)
        g.record(EXITED, 42 << 8)

    assert host.run(guest) == Result(42, "exited")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_ends_with_that_signals_status(host: Host, number: int) -> None:
    assert host.run(lambda _: os.kill(os.getpid(), number)) == Result(128 + number, "signal")


STOPS = {int(signal.SIGTERM): int(signal.SIGUSR2), int(signal.SIGINT): int(signal.SIGUSR2)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_told_to_end_asks_the_command_first(host: Host, number: int) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        os.write(host.to_stdin, b"x")
        g.stdin.wait_for(1)
        os.kill(os.getpid(), number)
        assert g.control.wait_for(8) == RECORD.pack(SIGNAL, signal.SIGUSR2)
        g.record(EXITED, 7 << 8)

    assert host.run(guest, stops=STOPS) == Result(7, "exited")


def test_being_told_twice_or_having_waited_ends_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(g: Guest) -> None:
        g.record(STARTED, 2)
        os.write(host.to_stdin, b"x")
        g.stdin.wait_for(1)
        os.kill(os.getpid(), signal.SIGTERM)
        g.control.wait_for(8)
        os.kill(os.getpid(), signal.SIGTERM)

    assert host.run(twice, stops=STOPS) == Result(143, "signal")
    monkeypatch.setattr("tinyvmm.session.STOP_PATIENCE", 0.2)

    def once(g: Guest) -> None:
        g.record(STARTED, 2)
        os.kill(os.getpid(), signal.SIGTERM)

    other = Host()
    try:
        assert other.run(once, stops=STOPS) == Result(143, "signal")
    finally:
        other.close()


def test_signal_handlers_are_put_back(host: Host) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    host.run(lambda g: g.record(EXITED, 0))
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert before == after


def test_a_signal_ignored_by_who_started_us_stays_ignored(host: Host) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        os.kill(os.getpid(), signal.SIGHUP)
        g.record(EXITED, 0)

    try:
        assert host.run(guest) == Result(0, "exited")
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_timeout_ends_with_124(host: Host) -> None:
    result = host.run(lambda g: g.record(STARTED, 2), timeout=0.05)
    assert (result.status, result.reason) == (124, "timeout")


def test_a_guest_that_never_starts_the_command_is_given_up(host: Host) -> None:
    result = host.run(lambda _: None, boot_timeout=0.05)
    assert (result.status, result.reason) == (255, "boot")


def test_the_boot_timeout_ends_with_the_start(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    monkeypatch.setattr(session_module, "monotonic", lambda: now)

    def guest(g: Guest) -> None:
        nonlocal now
        g.record(STARTED, 2)
        os.write(host.to_stdin, b"x")
        g.stdin.wait_for(1)
        now = 1000
        g.record(EXITED, 0)

    assert host.run(guest, boot_timeout=100).status == 0


def test_the_end_of_the_command_outranks_the_end_of_the_machine(host: Host) -> None:
    session = Session(host.guest.ports(), command="prog", files=host.files)
    session.stopped(message="powered off")
    host.guest.record(EXITED, 9 << 8)
    assert session.run() == Result(9, "exited")


def test_a_machine_that_stops_by_itself_decides_after_its_last_output(host: Host) -> None:
    session = Session(host.guest.ports(), command="prog", files=host.files)
    host.guest.stdout.sent.append(b"last words")
    session.stopped(255, "the guest panicked")
    assert session.run() == Result(255, "machine", "the guest panicked")
    assert host.printed() == (b"last words", b"")


def test_a_session_leaves_no_descriptor_open(host: Host) -> None:
    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        g.record(EXITED, 0)

    host.run(guest)
    for thread in threading.enumerate():
        if thread.name.startswith("relay"):
            thread.join(60)
    before = len(os.listdir("/proc/self/fd"))
    other = Host()
    opened = len(os.listdir("/proc/self/fd"))
    other.run(guest)
    for thread in threading.enumerate():
        if thread.name.startswith("relay"):
            thread.join(60)
    assert len(os.listdir("/proc/self/fd")) == opened
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_after_the_end_nobody_touches_the_machine(host: Host) -> None:
    gone = threading.Event()
    touched: list[str] = []

    class Watched(GuestPort):
        def take_output(self) -> bytes:
            if gone.is_set():
                touched.append("output")
            return super().take_output()

        def put_input(self, data: bytes | memoryview, *, patient: bool = False) -> int:
            if gone.is_set():
                touched.append("input")
            return super().put_input(data, patient=patient)

        def close(self) -> None:
            touched.append("close")

    host.guest = Guest(Watched(), Watched(), Watched(), Watched())
    host.guest.stdin.capacity = 0

    def guest(g: Guest) -> None:
        g.record(STARTED, 2)
        os.write(host.to_stdin, b"nobody has room for this")
        for _ in range(100):
            g.stdout.send(bytes(4096))  # the relay gets stuck in the full pipe
        os.kill(os.getpid(), signal.SIGTERM)

    assert host.run(guest).status == 143
    gone.set()
    os.set_blocking(host.from_stdout, False)
    for thread in threading.enumerate():
        while thread.name.startswith("relay") and thread.is_alive():
            with contextlib.suppress(BlockingIOError):
                os.read(host.from_stdout, 1 << 16)  # now it can go on, and must not
            thread.join(0.01)
    assert touched == []


def test_a_failing_relay_fails_the_session_instead_of_hanging_it(host: Host) -> None:
    class Broken(GuestPort):
        def take_output(self) -> bytes:
            raise RuntimeError("a bug of ours")

    ports = host.guest.ports()._replace(stdout=PortOutput(Broken()))
    session = Session(ports, command="prog", files=host.files)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        session.run()


# --- stdin read by the device's own thread -------------------------------------------------------


class Noting(GuestPort):
    """Notes which thread put what."""

    def __init__(self) -> None:
        super().__init__()
        self.put: list[tuple[str, int]] = []
        self.watched = threading.Event()

    def watch(self, fd: int, call: Callable[[], None]) -> bool:
        watched = super().watch(fd, call)
        self.watched.set()
        return watched

    def put_input(self, data: bytes | memoryview, *, patient: bool = False) -> int:
        self.put.append((threading.current_thread().name, len(data)))
        return super().put_input(data, patient=patient)


class Reader:
    """A `PortInput` with a thread that feeds it, as a session has."""

    def __init__(self, fd: int) -> None:
        self.errors: list[BaseException] = []
        self.port = Noting()
        self.port.watcher = device_thread(self.errors.append)
        self.input = PortInput(self.port)
        receiver = Receiver.of(fd)
        assert receiver is not None
        self.receiver = receiver
        self.thread = threading.Thread(target=self.feed, args=[fd], name="feeder")
        self.thread.start()

    def feed(self, fd: int) -> None:
        while True:
            data = self.input.attend(self.receiver)
            if data is None:
                data = os.read(fd, CHUNK)
            if not data:
                return
            self.input.write(data)

    def close(self) -> None:
        self.input.release()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.receiver.close()
        assert self.port.watcher is not None
        self.port.watcher.close()
        assert self.errors == []


def stream_pair(kind: str, where: Path) -> tuple[int, int]:
    """The descriptors to read from and to write to."""
    if kind == "socket":
        ours, its = socket.socketpair()
        return ours.detach(), its.detach()
    if kind == "pipe":
        return os.pipe()
    os.mkfifo(where / "fifo")
    source = os.open(where / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(source, True)
    return source, os.open(where / "fifo", os.O_WRONLY)


@pytest.fixture(params=["pipe", "fifo", "socket"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, int]]:
    source, target = stream_pair(request.param, tmp_path)
    yield source, target
    os.close(source)
    with contextlib.suppress(OSError):
        os.close(target)


def test_a_few_bytes_wake_only_the_devices_own_thread(pair: tuple[int, int]) -> None:
    source, target = pair
    reader = Reader(source)
    assert reader.port.watched.wait(60)
    sent = b""
    for number in range(20):
        sent += bytes([number])
        os.write(target, sent[-1:])
        assert reader.port.wait_for(len(sent)) == sent
    assert reader.port.put == [("io test", 1)] * 20
    os.write(target, bytes(CHUNK))  # many are for who may wait
    reader.port.wait_for(len(sent) + CHUNK)
    assert {name for name, size in reader.port.put if size > LITTLE} <= {"feeder"}
    os.close(target)
    reader.thread.join(60)
    assert not reader.thread.is_alive()  # at the end of the input
    reader.close()


def test_what_has_no_room_waits_in_the_feeding_thread_and_is_in_order(
    pair: tuple[int, int],
) -> None:
    source, target = pair
    reader = Reader(source)
    reader.port.capacity = 3
    os.write(target, b"ab")
    reader.port.wait_for(2)
    os.write(target, b"cde")
    assert reader.port.wait_for(3) == b"abc"
    os.write(target, b"fg")  # and is not read: the pipe fills
    time.sleep(0.1)
    assert bytes(reader.port.received) == b"abc"
    reader.port.post(100)
    assert reader.port.wait_for(7) == b"abcdefg"
    os.write(target, b"h")
    assert reader.port.wait_for(8) == b"abcdefgh"
    reader.close()


def test_what_comes_after_the_release_is_not_read(pair: tuple[int, int]) -> None:
    source, target = pair
    reader = Reader(source)
    os.write(target, b"x")
    reader.port.wait_for(1)
    reader.input.release()
    os.write(target, b"mine")
    reader.close()
    assert os.read(source, 100) == b"mine"
    assert bytes(reader.port.received) == b"x"


@pytest.mark.parametrize("data", [b"", b"last words"])
def test_a_named_pipe_whose_writer_has_gone_before_is_read_to_its_end(
    data: bytes, tmp_path: Path
) -> None:
    source, target = stream_pair("fifo", tmp_path)
    os.write(target, data)
    os.close(target)
    reader = Reader(source)
    reader.thread.join(60)
    assert not reader.thread.is_alive()
    assert bytes(reader.port.received) == data
    reader.close()
    os.close(source)


@given(pieces=st.lists(st.binary(min_size=1, max_size=3 * LITTLE), max_size=8))
@settings(deadline=None, max_examples=30)
def test_stdin_of_many_sizes_arrives_byte_exact(pieces: list[bytes]) -> None:
    host = Host(own_thread=True)
    try:
        host.guest.stdin.capacity = 0

        def guest(g: Guest) -> None:
            g.record(STARTED, 2)
            for piece in pieces:
                write_all(host.to_stdin, piece)
                g.stdin.post(len(piece) // 2)
            g.stdin.post(sum(map(len, pieces)))
            os.close(host.to_stdin)
            host.to_stdin = -1
            assert g.stdin.closed.wait(60)
            g.record(EXITED, 0)

        host.run(guest)
        assert bytes(host.guest.stdin.received) == b"".join(pieces)
    finally:
        host.close()


@pytest.mark.parametrize("kind", ["file", "terminal", "closed", "writing end", "datagrams"])
def test_what_may_wait_is_not_for_a_devices_thread(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    if kind == "file":
        fds = [os.open(tmp_path / "file", os.O_RDONLY)]
    elif kind == "terminal":
        fds = list(reversed(os.openpty()))
    elif kind == "writing end":
        fds = list(reversed(os.pipe()))
    else:
        fds = [end.detach() for end in socket.socketpair(type=socket.SOCK_DGRAM)]
    if kind == "closed":
        for fd in fds:
            os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    assert Receiver.of(fds[0]) is None
    assert len(os.listdir("/proc/self/fd")) == before
    if kind != "closed":
        for fd in fds:
            os.close(fd)


# --- over sockets -------------------------------------------------------------------------------


def socket_ports() -> tuple[Ports, list[socket.socket], list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(4)]
    ours = [a for a, _ in pairs]
    ports = Ports(
        SocketInput(ours[0]),
        SocketOutput(ours[1]),
        SocketOutput(ours[2]),
        SocketOutput(ours[3]),
        SocketInput(ours[3]),
    )
    return ports, ours, [b for _, b in pairs]


def test_over_sockets_a_slow_consumer_keeps_the_machine_until_it_has_everything(
    host: Host,
) -> None:
    ports, ours, theirs = socket_ports()
    _, stdout, _, control = theirs
    data = os.urandom(3 << 20)  # more than the socket and the pipe hold
    got = bytearray()
    settled = threading.Event()

    def settle() -> None:
        assert isinstance(ports.stdout, SocketOutput)
        ports.stdout.settle()
        settled.set()

    def guest() -> None:
        control.sendall(RECORD.pack(STARTED, 2))
        feeder = threading.Thread(target=stdout.sendall, args=(data,))
        feeder.start()
        control.sendall(RECORD.pack(EXITED, 0))
        assert not settled.wait(0.2)  # nobody reads yet
        threading.Thread(target=consume).start()
        assert settled.wait(60)
        feeder.join()
        for sock in theirs:
            sock.close()

    def consume() -> None:
        while part := os.read(host.from_stdout, 1 << 16):
            got.extend(part)

    thread = threading.Thread(target=guest)
    thread.start()
    session = Session(
        ports,
        command="prog",
        files=host.files,
        on_end=lambda: threading.Thread(target=settle).start(),
    )
    result = session.run()
    os.close(host.stdout)
    host.stdout = -1
    thread.join()
    for other in threading.enumerate():
        if other is not threading.main_thread() and not other.daemon:
            other.join(60)
    for sock in ours:
        sock.close()
    assert result == Result(0, "exited")
    assert bytes(got) == data


def test_over_sockets_input_is_byte_exact_and_ends_with_a_half_close(host: Host) -> None:
    ports, ours, theirs = socket_ports()
    stdin, _, _, control = theirs
    data = os.urandom(1 << 20)
    got = bytearray()

    def feed() -> None:
        write_all(host.to_stdin, data)
        os.close(host.to_stdin)
        host.to_stdin = -1

    def guest() -> None:
        control.sendall(RECORD.pack(STARTED, 2))
        while part := stdin.recv(1 << 16):
            got.extend(part)
        control.sendall(RECORD.pack(EXITED, 0))
        for sock in theirs:
            sock.close()

    threads = [threading.Thread(target=feed), threading.Thread(target=guest)]
    for thread in threads:
        thread.start()
    assert Session(ports, command="prog", files=host.files).run() == Result(0, "exited")
    for thread in threads:
        thread.join()
    for sock in ours:
        sock.close()
    assert bytes(got) == data
