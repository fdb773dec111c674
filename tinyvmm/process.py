"""A command in a guest, to be used as a subprocess.Popen is.

A `Task` is a session (session.py) on a thread of its own, from its start to its end; a `Process` is
a task with pipes. What the session writes to, or reads from, process_streams.py makes of what the
caller has given.

Two things differ, because a guest cannot share our descriptors and bytes must be carried. stdin is
empty unless something is given: a relay has to read ahead, and would take what others are to read.
And output is on its way until `wait` returns.

Threads: a process may be used from any, one at a time but for `kill` and `send_signal`; the task's
own does all the carrying, so that nobody has to read or wait for the command to go on.
"""

import codecs
import io
import os
import selectors
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EACCES, ENOENT
from time import monotonic
from types import TracebackType
from typing import IO, Any, Self, Unpack

from tinyvmm.errors import MachineError
from tinyvmm.guest.protocol import SIGNAL
from tinyvmm.process_streams import OUTPUTS, Completion, Ends, StreamOptions, open_ends
from tinyvmm.session import (
    STATUS_NOT_FOUND,
    STATUS_SIGNAL,
    Result,
    Session,
)

PIPE_PATIENCE = 0.5  # seconds for a killed command's output to be read
KILL_PATIENCE = 10.0  # and for its end, before it is given up
_KILLED = Result(STATUS_SIGNAL + signal.SIGKILL, "signal")


class Task:
    """A session on a thread of its own; `launch` runs it and is handed what takes the session."""

    def __init__(
        self,
        launch: Callable[[Callable[[Session], None]], Result],
        cleanup: Callable[[], None],
        name: str,
    ) -> None:
        """Start it; `cleanup` is called on its thread when it has ended."""
        self.pid = 0
        """The command's process id in the guest, once it has started."""
        self.error: BaseException | None = None
        """What `launch` raised."""
        self.result: Result | None = None
        self.started = threading.Event()
        """The command runs, or never will."""
        self.ended = threading.Event()
        self._launch = launch
        self._cleanup = cleanup
        self._lock = threading.Lock()  # guards the two below
        self._session: Session | None = None
        self._killed: Result | None = None
        # A daemon: at the interpreter's exit nobody waits for a guest.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def send(self, kind: int, value: int) -> None:
        """Send the guest a record; nothing if the session has ended, or not begun."""
        with self._lock:
            if self._session is not None:
                self._session.send(kind, value)

    def kill(self, result: Result = _KILLED) -> None:
        """End the session now, or as soon as there is one."""
        with self._lock:
            self._killed = result
            if self._session is not None:
                self._session.end(result)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _main(self) -> None:
        try:
            self.result = self._launch(self._on_session)
        except BaseException as error:  # noqa: BLE001 (whoever waits raises it)
            self.error = error
        finally:
            with self._lock:
                self._session = None
            self._cleanup()
            self.started.set()
            self.ended.set()

    def _on_session(self, session: Session) -> None:
        session.on_started = self._on_started
        with self._lock:
            self._session = session
            if self._killed is not None:
                session.end(self._killed)

    def _on_started(self, pid: int) -> None:
        self.pid = pid
        self.started.set()


class Process:
    """A command in a guest: `stdin`, `stdout`, `stderr`, `pid` (the guest's), `returncode`."""

    def __init__(
        self,
        args: Sequence[str],
        launch: Callable[[Ends, Callable[[Session], None]], Result],
        *,
        owner: object = None,
        **streams: Unpack[StreamOptions],
    ) -> None:
        """Start `args` by `launch`, and return when it runs.

        FileNotFoundError and PermissionError if the guest has no such command, MachineError if its
        machine ends before, LookupError for no encoding, ConfigError for what cannot be done,
        TimeoutExpired if it takes longer than `timeout` seconds. `owner` is kept alive.
        """
        self.args = args
        self._began = monotonic()
        self._owner = owner
        self._encoding, self._errors = streams.get("encoding"), streams.get("errors")
        if self._encoding is not None:
            codecs.lookup(self._encoding)  # before there is anything to close
        codecs.lookup_error(self._errors or "strict")
        ends = open_ends(streams.get("stdin"), streams.get("stdout"), streams.get("stderr"))
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None
        self.stderr: IO[Any] | None = None
        self._text = streams.get("text", False) or (self._encoding, self._errors) != (None, None)
        for name, fd in ends.pipes.items():
            setattr(self, name, self._file(name, fd))
        self._input: memoryview | None = None  # what `communicate` has yet to write
        self._got: dict[str, list[bytes]] = {}  # and what it has read
        self._task = Task(lambda take: launch(ends, take), ends.close, f"exec {args[0]}")
        try:
            self._await_start(streams.get("timeout"))
        except BaseException:
            self._task.kill()
            self._close_files()
            self._task.ended.wait()
            raise

    def _await_start(self, timeout: float | None) -> None:
        if not self._task.started.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        if self._task.ended.is_set():
            self._raise_if_failed()

    def _file(self, name: str, fd: int) -> IO[Any]:
        writes = name == "stdin"
        file = open(fd, "wb" if writes else "rb", -1)  # noqa: SIM115 (the caller's to close)
        if not self._text:
            return file
        return io.TextIOWrapper(
            file, encoding=self._encoding, errors=self._errors, write_through=writes
        )

    @property
    def pid(self) -> int:
        """The command's process id in the guest."""
        return self._task.pid

    @property
    def returncode(self) -> int | None:
        """How it ended: its exit status, -N if signal N killed it; None while it runs.

        MachineError if its machine ended first.
        """
        if not self._task.ended.is_set():
            return None
        self._raise_if_failed()
        result = self._task.result
        if result is None:
            raise AssertionError("a task without a result")
        if result.reason in {"killed", "signal", "output"} and result.status > STATUS_SIGNAL:
            return STATUS_SIGNAL - result.status
        return result.status

    def _raise_if_failed(self) -> None:
        if self._task.error is not None:
            raise self._task.error
        result = self._task.result
        if result is None or result.message is None:
            return
        if result.reason == "exec":
            number = ENOENT if result.status == STATUS_NOT_FOUND else EACCES
            raise OSError(number, result.message.split(": ", 1)[1], self.args[0])
        raise MachineError(result.message)

    def left(self, timeout: float | None) -> float | None:
        """Return how many of `timeout` seconds since its start are left."""
        return None if timeout is None else max(0.0, timeout - (monotonic() - self._began))

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return `returncode`; TimeoutExpired after `timeout` seconds."""
        if not self._task.ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.returncode
        if code is None:
            raise AssertionError("a task that has ended has a result")
        return code

    def send_signal(self, number: int) -> None:
        """Send the command, and the processes of its group, a signal."""
        self._task.send(SIGNAL, int(number))

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def give_up(self) -> None:
        """End this side of it at once, and with it a machine of its own. From any thread."""
        self._task.kill()

    def abandon(self) -> None:
        """Kill it and wait until it has ended; if it does not end, go on without it."""
        self.kill()
        if not self._task.ended.wait(PIPE_PATIENCE):
            self._close_files()  # it may be waiting for somebody to read what it wrote
            if not self._task.ended.wait(KILL_PATIENCE):
                self._task.kill()
                self._task.ended.wait()
        self._close_files()

    # --- the streams --------------------------------------------------------------------------

    def communicate(
        self,
        input: str | bytes | None = None,  # noqa: A002
        timeout: float | None = None,
    ) -> tuple[Any, Any]:
        """Write `input`, read what comes to the end, wait; what came on stdout and stderr.

        None for what is no PIPE. TimeoutExpired after `timeout` seconds: nothing is lost, and it
        may be called again.
        """
        end = None if timeout is None else monotonic() + timeout
        self._begin(input)
        try:
            self._carry(end)
            self.wait(None if end is None else max(0.0, end - monotonic()))
        except subprocess.TimeoutExpired:
            raise subprocess.TimeoutExpired(
                self.args, timeout or 0, self._so_far("stdout"), self._so_far("stderr")
            ) from None
        self._close_files()
        return self._output("stdout"), self._output("stderr")

    def _begin(self, given: str | bytes | None) -> None:
        if self._input is None and self.stdin is not None:
            with suppress(BrokenPipeError):
                self.stdin.flush()
            if isinstance(given, str):
                given = given.encode(self._encoding or "utf-8", self._errors or "strict")
            self._input = memoryview(given or b"")
        for name in OUTPUTS:
            if getattr(self, name) is not None:
                self._got.setdefault(name, [])

    def _carry(self, end: float | None) -> None:
        """Write and read until all is written and read; TimeoutExpired at `end`."""
        with selectors.DefaultSelector() as selector:
            if self.stdin is not None and not self.stdin.closed:
                os.set_blocking(self.stdin.fileno(), False)
                selector.register(self.stdin, selectors.EVENT_WRITE, "stdin")
            for name in self._got:
                if not getattr(self, name).closed:
                    selector.register(getattr(self, name), selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select(None if end is None else max(0.0, end - monotonic())):
                    file: IO[Any] = key.fileobj  # type: ignore[assignment]
                    done = self._write(file) if key.data == "stdin" else self._read(key.data, file)
                    if done:
                        selector.unregister(file)
                        _close(file)
                if selector.get_map() and end is not None and monotonic() >= end:
                    raise subprocess.TimeoutExpired(self.args, 0)  # whatever more there is to read

    def _write(self, file: IO[Any]) -> bool:
        if self._input:
            try:
                self._input = self._input[os.write(file.fileno(), self._input[: 1 << 16]) :]
            except BrokenPipeError:
                return True  # the command wanted no more
            except BlockingIOError:
                return False
        return not self._input

    def _read(self, name: str, file: IO[Any]) -> bool:
        data = os.read(file.fileno(), 1 << 16)
        self._got[name].append(data)
        return not data

    def _so_far(self, name: str) -> bytes | None:
        return b"".join(self._got[name]) if name in self._got else None

    def _output(self, name: str) -> str | bytes | None:
        data = self._so_far(name)
        if data is None or not self._text:
            return data
        text = data.decode(self._encoding or "utf-8", self._errors or "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _close_files(self) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                _close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Close the pipes and wait; after an error, kill it."""
        if error is not None:
            self.abandon()
        self._close_files()
        self._task.ended.wait()

    def __repr__(self) -> str:
        state = "ended" if self._task.ended.is_set() else "runs"
        return f"<Process {list(self.args)}, {state}>"


def _close(file: IO[Any]) -> None:
    with suppress(BrokenPipeError):  # what the command did not want
        file.close()


def complete(process: Process, given: Completion) -> "subprocess.CompletedProcess[Any]":
    """Wait for a process as subprocess.run does: whatever comes between kills it.

    Its timeout is from its start on.
    """
    try:
        stdout, stderr = process.communicate(given.input, process.left(given.timeout))
    except subprocess.TimeoutExpired as expired:
        process.abandon()
        expired.timeout = given.timeout or 0
        raise
    except BaseException:
        process.abandon()
        raise
    code = process.wait()
    if given.check and code:
        raise subprocess.CalledProcessError(code, process.args, stdout, stderr)
    return subprocess.CompletedProcess(process.args, code, stdout, stderr)
