"""The host's side of one command in a guest: its stdin, stdout, stderr, signals and exit status.

PID 1 in the guest (tinyvmm/guest/init.py) relays between the command and four virtio console
ports; a `Session` relays between those ports and this process. It knows no machine: each port is
an `Input` or an `Output` of tinyvmm/streams.py.

    port 1  stdin    host to guest: bytes, then end of file
    port 2  stdout   guest to host: bytes
    port 3  stderr   guest to host: bytes
    port 4  control  both ways: records of 8 bytes, kind and value, little-endian

The order of events: nothing is sent before STARTED, because Linux drops what arrives at a port
that nobody has opened. Then all streams flow. After EXITED the output ports are read until they
are empty: everything the command wrote was queued before EXITED, but on other queues.

Threads: one for each stream, all daemons, asleep in a system call or on a lock except to move
data, so a consumer that stops reading our stdout delays nothing else. What they notice they post
to `_events` (a deque: append and popleft are atomic) and then write a byte to the wake pipe, on
which the main thread sleeps. Only the main thread, in `run`, changes the session's state, and
only there do Python's signal handlers execute.
"""

import errno
import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from tinyvmm.guest.protocol import (
    EXEC_FAILED,
    EXITED,
    RECORD,
    SETUP_FAILED,
    SIGNAL,
    STARTED,
    WINSIZE,
)
from tinyvmm.named import NamedTuple
from tinyvmm.streams import (
    CHUNK,
    ConsolePort,
    Input,
    Output,
    PortInput,
    PortOutput,
    Receiver,
    Sender,
)

if TYPE_CHECKING:
    from tinyvmm.terminal import Terminal

STATUS_TIMEOUT = 124  # the statuses of timeout(1) and the shells
STATUS_NOT_EXECUTABLE = 126
STATUS_NOT_FOUND = 127
STATUS_SIGNAL = 128  # plus the signal's number
STATUS_MACHINE_FAILED = 255

# A guest may send records faster than they can be looked at: then its port waits.
RECORDS_AT_ONCE = 256
STOP_PATIENCE = 10.0  # seconds, for a command that was asked to end
BATCHES_WAITING = 2

INPUT_PATIENCE = 1.0  # seconds, for a read(2) that turns out to wait although there was something


class Result(NamedTuple):
    """How a session ended.

    `status` is the exit status for a shell; `reason` is one of "exited", "killed", "exec",
    "setup", "machine", "timeout", "boot", "signal", "escape", "output"; `message` is one line for
    stderr, or None when the status says it all.
    """

    status: int
    reason: str
    message: str | None = None


class Ports(NamedTuple):
    """The four ports of a machine; control is one port in two directions."""

    stdin: Input
    stdout: Output
    stderr: Output
    control: Output
    control_in: Input

    @classmethod
    def of(cls, consoles: Sequence[ConsolePort]) -> Self:
        """Those over the ports of a console: stdin, stdout, stderr and control."""
        stdin, stdout, stderr, control = consoles
        return cls(
            PortInput(stdin),
            PortOutput(stdout),
            PortOutput(stderr),
            PortOutput(control),
            PortInput(control),
        )


class HostFiles(NamedTuple):
    """This process's ends: descriptors, or None for one that was closed when it started."""

    stdin: int | None
    stdout: int | None
    stderr: int | None


def host_files() -> HostFiles:
    """Return descriptors 0, 1 and 2, without those that were closed at the start.

    A closed 0 may since have been reused for any file; Python looked at start-up.
    """
    return HostFiles(
        None if sys.__stdin__ is None else 0,
        None if sys.__stdout__ is None else 1,
        None if sys.__stderr__ is None else 2,
    )


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to `fd`, which may be non-blocking because somebody else made it so.

    Raises OSError as os.write does.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()


def result_of(
    kind: int, value: int, command: str, describe_step: Callable[[int], str]
) -> Result | None:
    """Return how `command` ended, if a record of the guest's says so."""
    if kind == EXITED:
        number = value & 0x7F  # wait(2): 0x80 is the core dump flag
        if number:
            return Result(STATUS_SIGNAL + number, "killed")
        return Result(value >> 8 & 0xFF, "exited")
    if kind == EXEC_FAILED:
        if value == errno.ENOENT:
            text = f"{command}: command not found in the guest"
            return Result(STATUS_NOT_FOUND, "exec", text)
        text = f"{command}: {os.strerror(value & 0xFFFF)}, in the guest"
        return Result(STATUS_NOT_EXECUTABLE, "exec", text)
    if kind == SETUP_FAILED:
        step, number = value >> 16, value & 0xFFFF
        text = f"the guest could not {describe_step(step)}: {os.strerror(number)}"
        return Result(STATUS_MACHINE_FAILED, "setup", text)
    return None


class Session:
    """One command's session with a machine that is about to start.

    `command` is its name, for messages. `timeout` and `boot_timeout` are seconds from `run` to
    the end, and to STARTED. With `terminal` the user's terminal is raw from STARTED on. `sinks`, by
    name, take what is written instead of our own stdout and stderr. `forward` are the signals that
    go to the command rather than end the session. `stops` says which signal asks the command to end
    instead of one that we get; the session ends `STOP_PATIENCE` later, or at a second one, as it
    does at once for a signal that is in neither. `on_record` sees each record (protocol.py) first.
    `describe_step` turns SETUP_FAILED's step into words. `on_end` is called in the thread of
    `run`, once, when the command's end is known and its last output not yet all read.
    """

    def __init__(
        self,
        ports: Ports,
        *,
        command: str,
        timeout: float | None = None,
        boot_timeout: float | None = None,
        terminal: "Terminal | None" = None,
        describe_step: Callable[[int], str] = "step {}".format,
        on_end: Callable[[], None] | None = None,
        files: HostFiles | None = None,
        sinks: Mapping[str, Callable[[bytes], None]] | None = None,
        forward: Collection[int] = (),
        stops: Mapping[int, int] | None = None,
        on_record: Callable[[int, int], None] | None = None,
    ) -> None:
        self._ports = ports
        self._command = command
        self._timeout = timeout
        self._boot_timeout = boot_timeout
        self._terminal = terminal
        self._describe_step = describe_step
        self._on_end = on_end
        self._files = files if files is not None else host_files()
        self._sinks = sinks or {}
        self._forward = forward
        self._stops = stops or {}
        self._stopping: tuple[float, Result] | None = None  # when to end, and how
        self._on_every_record = on_record

        self._events: deque[tuple[str, Any]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_lock = threading.Lock()  # guards _wake_write against use after close
        # Closing the write end tells the stdin thread to stop, which then closes the read end.
        self._quit_read, self._quit_write = os.pipe2(os.O_CLOEXEC)
        self._input_may_flow = threading.Event()
        self._records = threading.Condition()  # guards _to_send
        self._to_send: deque[bytes] = deque()
        self._sender: threading.Thread | None = None
        self._senders: list[Sender] = []
        self._input_thread: threading.Thread | None = None
        self._room_for_records = threading.Semaphore(BATCHES_WAITING)

        self.on_started: Callable[[int], None] = _nothing
        """Called in the thread of `run` with the command's process id in the guest."""
        self._begin = 0.0
        self._started = False
        self._interrupts = 0
        self._result: Result | None = None  # known, while output may still have to be drained
        self._machine_result: Result | None = None
        self._abandon = False  # nothing is worth waiting for any more
        self._streams = {"stdout", "stderr"}  # those not yet at their end
        self._control_open = True

    # --- what other threads call -------------------------------------------------------------

    def stopped(self, status: int = STATUS_MACHINE_FAILED, message: str | None = None) -> None:
        """Tell that the machine stopped by itself; it decides only if the command's end did not.

        Any thread. Everything the guest sent before must be readable from the ports already.
        """
        self._post("stopped", Result(status, "machine", message))

    def send(self, kind: int, value: int, data: bytes = b"") -> None:
        """Send PID 1 a record, and what belongs to it. Any thread."""
        self._post("message", RECORD.pack(kind, value) + data)

    def end(self, result: Result) -> None:
        """End now, whatever is still under way. Any thread."""
        self._post("ordered", result)

    def _post(self, kind: str, value: Any = None) -> None:
        self._events.append((kind, value))
        with self._wake_lock:
            if self._wake_write < 0:
                return  # the session is over
            try:
                os.write(self._wake_write, b"\0")
            except BlockingIOError:
                return  # a full pipe wakes as well

    # --- the main thread ---------------------------------------------------------------------

    def run(self) -> Result:
        """Relay until the command's end, the machine's, the timeout or a signal; say which.

        Main thread (elsewhere signals are left alone). On return the machine may still be up, and
        is no longer touched.
        """
        begin = self._begin = monotonic()
        restore_signals = self._catch_signals()
        try:
            self._start(self._relay_control)
            self._start_output("stdout", self._ports.stdout, self._files.stdout)
            self._start_output("stderr", self._ports.stderr, self._files.stderr)
            self._input_thread = self._start(self._relay_input)
            while not self._done():
                self._sleep(begin)
                for _ in range(len(self._events)):  # no more: the next deadline may be due
                    if self._abandon:
                        break
                    kind, value = self._events.popleft()
                    getattr(self, "_on_" + kind)(value)
        finally:
            if self._terminal is not None:
                self._terminal.restore()
            restore_signals()
            self._finish()
        if self._result is None:
            raise AssertionError("a session ended without a result")
        return self._result

    def _done(self) -> bool:
        return self._result is not None and (self._abandon or not self._streams)

    def _sleep(self, begin: float) -> None:
        deadline = self._next_deadline()
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        wait_ms = None if deadline is None else max(0, 1000 * (begin + deadline[0] - monotonic()))
        if self._events:
            wait_ms = 0
        if poller.poll(wait_ms):
            os.read(self._wake_read, 4096)
        if deadline is not None and monotonic() - begin >= deadline[0]:
            self._give_up(deadline[1])

    def _next_deadline(self) -> tuple[float, Result] | None:
        candidates = [] if self._stopping is None else [self._stopping]
        if self._timeout is not None:
            late = f"timed out after {self._timeout:g} s: the machine was stopped"
            candidates.append((self._timeout, Result(STATUS_TIMEOUT, "timeout", late)))
        if self._boot_timeout is not None and not self._started and self._result is None:
            late = f"the guest did not start the command within {self._boot_timeout:g} s"
            candidates.append((self._boot_timeout, Result(STATUS_MACHINE_FAILED, "boot", late)))
        return min(candidates, default=None)

    def _give_up(self, result: Result) -> None:
        """End now, whatever is still under way."""
        self._result = result
        self._abandon = True

    def _end(self, result: Result) -> None:
        """End with `result` once the output that precedes it has been passed on."""
        if self._result is not None:
            return
        self._result = result
        self._stop_input()
        self._ports.stdout.finish()
        self._ports.stderr.finish()
        if self._on_end is not None:
            self._on_end()

    def _stop_input(self) -> None:
        """Stop reading our stdin: what follows belongs to whoever reads it next."""
        if self._quit_write >= 0:
            os.close(self._quit_write)
            self._quit_write = -1
        self._input_may_flow.set()
        self._ports.stdin.release()

    def _finish(self) -> None:
        self._stop_input()
        for port in self._ports:
            port.release()
        for sender in self._senders:
            sender.close()
        with self._wake_lock:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_write = -1
        with self._records:
            self._to_send.append(b"")
            self._records.notify()
        self._room_for_records.release()
        if self._input_thread is not None:  # whoever gave us the descriptor may now close it
            self._input_thread.join(INPUT_PATIENCE)

    # --- events ------------------------------------------------------------------------------

    def _on_records(self, records: bytes) -> None:
        for kind, value in RECORD.iter_unpack(records):
            self._on_record(kind, value)
        self._room_for_records.release()

    def _on_record(self, kind: int, value: int) -> None:
        if self._on_every_record is not None:
            self._on_every_record(kind, value)
        if kind == STARTED:
            self._started = True
            if self._terminal is not None:
                self._terminal.enter_raw()
            self._input_may_flow.set()
            self.on_started(value)
        else:
            result = result_of(kind, value, self._command, self._describe_step)
            if result is not None:
                self._end(result)
        # Any other kind is from a newer PID 1 and says nothing about the command's end.

    def _on_control_closed(self, _: None) -> None:
        self._control_open = False
        self._settle()

    def _on_stopped(self, result: Result) -> None:
        self._machine_result = result
        self._ports.control.finish()
        self._settle()

    def _settle(self) -> None:
        # The command's own end may still be in the control port: it takes precedence.
        if self._machine_result is not None and not self._control_open:
            self._end(self._machine_result)

    def _on_drained(self, name: str) -> None:
        self._streams.discard(name)

    def _on_output_error(self, failure: tuple[str, OSError]) -> None:
        name, error = failure
        if error.errno == errno.EPIPE:
            self._give_up(Result(STATUS_SIGNAL + signal.SIGPIPE, "output"))
        else:
            text = f"cannot write {name}: {os.strerror(error.errno or 0)}"
            self._give_up(Result(1, "output", text))

    def _on_escape(self, _: None) -> None:
        self._give_up(Result(STATUS_SIGNAL + signal.SIGINT, "escape", "stopped by Ctrl-]"))

    def _on_crash(self, error: BaseException) -> None:
        raise error

    def _on_message(self, data: bytes) -> None:
        self._send(data)

    def _on_ordered(self, result: Result) -> None:
        self._give_up(result)

    def _on_signal(self, number: int) -> None:
        if number in self._stops and self._started and self._stopping is None:
            if self._result is None:
                self._send(RECORD.pack(SIGNAL, self._stops[number]))
            late = Result(STATUS_SIGNAL + number, "signal")
            self._stopping = monotonic() - self._begin + STOP_PATIENCE, late
        elif number in self._stops and self._stopping is not None:
            self._give_up(Result(STATUS_SIGNAL + number, "signal"))
        elif number == signal.SIGINT:
            self._interrupts += 1
            if self._started and self._interrupts == 1 and self._result is None:
                self._send(RECORD.pack(SIGNAL, signal.SIGINT))
            else:
                self._give_up(Result(STATUS_SIGNAL + number, "signal"))
        elif number in {signal.SIGWINCH, signal.SIGCONT}:
            if self._terminal is not None and self._started:
                if number == signal.SIGCONT:
                    self._terminal.enter_raw()
                rows, columns = self._terminal.size()
                self._send(RECORD.pack(WINSIZE, rows | columns << 16))
        elif number in self._forward and self._started and self._result is None:
            self._send(RECORD.pack(SIGNAL, number))
        else:
            self._give_up(Result(STATUS_SIGNAL + number, "signal"))

    def _catch_signals(self) -> Callable[[], None]:
        """Direct signals to `_events`; return what undoes it. Ignored signals stay ignored."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *self._forward}
        if self._terminal is not None:
            wanted |= {signal.SIGWINCH, signal.SIGCONT}

        def handler(number: int, _: FrameType | None) -> None:
            self._events.append(("signal", number))

        # The C-level handler writes the wake-up byte whichever thread the kernel picked.
        old_fd = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        old = {
            n: signal.signal(n, handler) for n in wanted if signal.getsignal(n) != signal.SIG_IGN
        }

        def restore() -> None:
            for number, previous in old.items():
                signal.signal(number, previous)
            signal.set_wakeup_fd(old_fd)

        return restore

    # --- records to the guest ----------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        """Queue a message for the guest: the main thread never blocks on a port."""
        with self._records:
            self._to_send.append(data)
            self._records.notify()
        if self._sender is None:
            self._sender = self._start(self._relay_records)

    def _relay_records(self) -> None:
        while True:
            with self._records:
                while not self._to_send:
                    self._records.wait()
                record = self._to_send.popleft()
            if not record:
                return
            self._ports.control_in.write(record)

    # --- the relay threads -------------------------------------------------------------------

    def _start(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        def body() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                self._post("crash", error)

        thread = threading.Thread(target=body, name=work.__name__.strip("_"), daemon=True)
        thread.start()
        return thread

    def _relay_control(self) -> None:
        pending = b""
        while data := self._ports.control.read():
            pending += data
            whole = len(pending) - len(pending) % RECORD.size
            batch = RECORDS_AT_ONCE * RECORD.size
            for start in range(0, whole, batch):
                self._room_for_records.acquire()
                if self._wake_write < 0:
                    return  # the session is over
                self._post("records", pending[start : min(start + batch, whole)])
            pending = pending[whole:]
        self._post("control_closed")

    def _start_output(self, name: str, output: Output, fd: int | None) -> None:
        if fd is not None and name not in self._sinks:
            sender = Sender.of(fd)
            if sender is not None:
                self._senders.append(sender)
                output.pass_to(sender.send)
        self._start(self._relay_output, name, output, fd)

    def _relay_output(self, name: str, output: Output, fd: int | None) -> None:
        sink = self._sinks.get(name)
        while data := output.read():
            if sink is None and fd is None and name == "stderr":
                continue  # closed on purpose: nobody wants to know
            try:
                if sink is not None:
                    sink(data)
                else:
                    write_all(-1 if fd is None else fd, data)
            except OSError as error:
                self._post("output_error", (name, error))
                return
        self._post("drained", name)

    def _relay_input(self) -> None:
        self._input_may_flow.wait()
        escape = receiver = None
        if self._terminal is not None:
            from tinyvmm.terminal import EscapeKeys

            escape = EscapeKeys()
        elif self._files.stdin is not None:
            receiver = Receiver.of(self._files.stdin)
        try:
            while data := self._next_input(receiver):
                if escape is not None and escape.seen(data):
                    self._post("escape")
                self._ports.stdin.write(data)
        finally:
            os.close(self._quit_read)
            if receiver is not None:
                receiver.close()
        self._ports.stdin.close()

    def _next_input(self, receiver: Receiver | None) -> bytes:
        """Return the next bytes that the machine has not taken by itself; b"" at the end."""
        data = self._ports.stdin.attend(receiver) if receiver is not None else None
        return self._read_input() if data is None else data

    def _read_input(self) -> bytes:
        """Return the next bytes of our stdin; b"" at its end, or at the session's."""
        fd = self._files.stdin
        if fd is None:
            return b""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._quit_read, select.POLLIN)
        while True:
            if any(ready == self._quit_read for ready, _ in poller.poll()):
                return b""
            try:
                return os.read(fd, CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                # EIO: a background job without a terminal to stop for; EISDIR: a directory.
                # Reading fails for the guest's command too: for it the input is at its end.
                return b""


def _nothing(_pid: int) -> None:
    """Nobody wants to know."""
