"""What can be asked of a machine that runs: the methods of its control socket.

A `Supervisor` belongs to one `tinyvmm run`, and outlives a reboot: each machine that this makes is
given to `attach`. Its methods are called by the control socket's clients, each on its own thread;
what they need of the session they post to it, and what they need of the machine is made for any
thread. docs/control.md lists them, with the types of what goes in and comes out.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import SIGNAL, STARTED, WINSIZE
from tinyvmm.inside.executor import Executor
from tinyvmm.instances.control import Client, remote
from tinyvmm.instances.control_schema import limits
from tinyvmm.instances.watching import Watching
from tinyvmm.methods.inspection import Inspection, decode
from tinyvmm.methods.shares import Shares
from tinyvmm.session import STATUS_SIGNAL, Result

if TYPE_CHECKING:
    from tinyvmm.devices.virtio.device import VirtioDevice
    from tinyvmm.fileserver.tree import Tree
    from tinyvmm.guest.execution import Execution
    from tinyvmm.guest.relay import User
    from tinyvmm.machine import Machine
    from tinyvmm.methods.exec_streams import Command, ExecStreams
    from tinyvmm.session import Session
    from tinyvmm.vsock_host import VsockHost

INPUT_MAX = 1 << 16  # bytes of one `stdin`
STOP_TIMEOUT = 10.0  # podman's

Seconds = Annotated[float, limits(minimum=0, maximum=1 << 32)]
Size = Annotated[int, limits(minimum=1, maximum=0xFFFF)]
Port = Annotated[int, limits(minimum=1, maximum=(1 << 32) - 2)]
Base64 = Annotated[str, limits(maxLength=INPUT_MAX // 3 * 4 + 4)]
Name = Annotated[str, limits(maxLength=64)]


class Status(TypedDict):
    """Whether it is up ("starting", "running", "paused", "ended"), since how many seconds."""

    state: str
    uptime: float
    pid: int
    vsock: str


class Ended(TypedDict):
    """How the run ended: an exit status as a shell's, and perhaps why."""

    status: int
    message: str | None


class Started(TypedDict):
    """A command that was started: its process id, and what its program does before it."""

    pid: int
    steps: list[str]


class Calls(TypedDict):
    """What serves system calls was started: its process id."""

    pid: int


class Execs(TypedDict):
    """Process ids that run, and the exit statuses of what has ended."""

    running: list[int]
    ended: dict[str, int]


class Context(NamedTuple):
    """What every machine of one run has in common."""

    env: Sequence[str]
    cwd: str
    root: "Tree"
    modules: Callable[[Sequence[str]], Sequence[tuple[str, bytes]]]
    """What these kernel modules and theirs need that was not inserted at boot."""
    account: "User | None" = None
    """Whom a command runs as that names nobody; None for root."""


class _Turn(NamedTuple):
    machine: "Machine"
    session: "Session"
    executor: Executor
    console: Callable[[], bytes]
    way: "_Way | None"


class _Way(NamedTuple):
    """How a program in the guest connects to us: by a vsock of ours."""

    vsock: "VirtioDevice"
    host: "VsockHost"
    streams: "ExecStreams"


class Supervisor:
    """Answers for one `tinyvmm run`; `vsock_path` is where its vsock socket is."""

    def __init__(self, vsock_path: str, *, keep_stdin: bool = False) -> None:
        self.vsock_path = vsock_path
        self.on_started: Callable[[], None] = _nothing
        """Called in the session's thread when the command runs."""
        self.last_console = b""
        """The last that the kernel printed, once the machine has ended."""
        self.stop_signal = int(signal.SIGTERM)
        self._context: Context | None = None
        self._turn: _Turn | None = None
        self._changed = threading.Condition()  # guards _turn, _result
        self._result: Result | None = None
        self._closing: Result | None = None
        self._began = time.monotonic()
        self._watching = Watching(lambda: None if self._turn is None else self._turn.machine)
        self._inspection = Inspection(lambda: self._now().machine, self._watching)
        self._shares = Shares(lambda: _way(self._now()).host, self, self._modules)
        self._input_lock = threading.Lock()  # guards the descriptor below
        self.stdin: int | None = None
        self._input: int | None = None
        if keep_stdin:
            self.stdin, self._input = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._input, False)

    # --- the run's side ---------------------------------------------------------------------

    def begin(self, context: Context) -> None:
        """Take what all machines of the run have in common."""
        self._context = context

    def attach(
        self,
        machine: "Machine",
        session: "Session",
        executor: Executor,
        console: Callable[[], bytes],
        vsock: "tuple[VirtioDevice, VsockHost] | None",
    ) -> None:
        """Answer for this machine from now on; without a vsock of ours, for less of it."""
        way = None
        if vsock is not None:
            from tinyvmm.methods.exec_streams import ExecStreams

            way = _Way(*vsock, ExecStreams(vsock[1]))
        with self._changed:
            self._turn = _Turn(machine, session, executor, console, way)
            self._changed.notify_all()
            if self._closing is not None:
                session.end(self._closing)

    def detach(self) -> None:
        """Answer for no machine; return once nobody uses it any more."""
        with self._changed:
            turn, self._turn = self._turn, None
        if turn is not None:
            turn.executor.close()
            if turn.way is not None:
                turn.way.streams.close()
            self._shares.close()
            self.last_console = turn.console()

    def shut(self, result: Result) -> None:
        """End the machine with `result` now, or as soon as there is one. Any thread."""
        with self._changed:
            self._closing = result
            if self._turn is not None:
                self._turn.session.end(result)

    @property
    def machine(self) -> "Machine":
        """The machine of now; ConfigError if none runs."""
        return self._now().machine

    def on_record(self, kind: int, _value: int) -> None:
        """See a record of the guest's."""
        if kind == STARTED:
            self.on_started()

    def end(self, result: Result) -> None:
        """Tell everybody who waits how the run ended."""
        with self._changed:
            self._result = result
            self._changed.notify_all()
        self._watching.close()
        self._close_input()

    # --- what can be asked ------------------------------------------------------------------

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return every method by its name on the wire."""
        return {
            "status": self.status,
            "wait": self.wait,
            "pause": self.pause,
            "resume": self.resume,
            "stop": self.stop,
            "kill": self.kill,
            "exec": self.exec,
            "exec_wait": self.exec_wait,
            "calls": self.calls,
            "execs": self.execs,
            "stdin": self.stdin_,
            "exec_stdin": self.exec_stdin,
            "exec_signal": self.exec_signal,
            "exec_resize": self.exec_resize,
            "resize": self.resize,
            "console": self.console,
            "rpc.discover": self.discover,
            **self._inspection.methods(),
            **self._watching.methods(),
            **self._shares.methods(),
        }

    def call(self, method: str, **params: Any) -> Any:
        """Call a method by its name on the wire, in this process; as ControlClient.call."""
        return self.methods()[method](**params)

    def discover(self) -> dict[str, Any]:
        """Describe every method and notification, in JSON Schema."""
        from tinyvmm.instances.control_schema import describe
        from tinyvmm.instances.watching import TraceRecord
        from tinyvmm.methods.exec_streams import ExecExited, ExecOutput

        notifications = {
            "trace_record": TraceRecord,
            "exec_output": ExecOutput,
            "exec_exited": ExecExited,
        }
        return describe(self.methods(), notifications)

    def status(self) -> Status:
        """Say whether it is up, and since when."""
        turn = self._turn
        state = "starting" if turn is None else "paused" if turn.machine.paused else "running"
        if self._result is not None:
            state = "ended"
        return {
            "state": state,
            "uptime": time.monotonic() - self._began,
            "pid": os.getpid(),
            "vsock": self.vsock_path,
        }

    @remote(waits=True, client=True)
    def wait(self, *, timeout: Seconds | None = None, client: Client | None = None) -> Ended | None:
        """Wait for the end of the run; null after `timeout` seconds."""
        if client is not None:
            client.when_gone(self._look)
        with self._changed:
            self._changed.wait_for(
                lambda: self._result is not None or (client is not None and client.gone), timeout
            )
            if self._result is None:
                return None
            return {"status": self._result.status, "message": self._result.message}

    def _look(self, _client: Client) -> None:
        """Have whoever waits look whether it still does."""
        with self._changed:
            self._changed.notify_all()
        turn = self._turn
        if turn is not None:
            turn.executor.look()

    @remote(waits=True, lane="machine")
    def pause(self, *, cpu: Annotated[int, limits(minimum=0)] | None = None) -> None:
        """Take every vCPU, or one, out of the guest."""
        self._now().machine.pause(self._cpu(cpu))

    @remote(waits=True, lane="machine")
    def resume(self, *, cpu: Annotated[int, limits(minimum=0)] | None = None) -> None:
        """Let the guest, or one of its vCPUs, go on."""
        self._now().machine.resume(self._cpu(cpu))

    @remote(waits=True)
    def stop(self, *, time: Seconds = STOP_TIMEOUT) -> Ended | None:
        """Ask the command to end, then press the power button, and end the machine after `time`.

        The button comes when half of it is over; a command that is no init has no use for that.
        """
        turn = self._turn
        if turn is not None:  # else it starts, or is just ending
            turn.machine.resume()
            turn.session.send(SIGNAL, self.stop_signal)
        if self.wait(timeout=time / 2) is None:
            if turn is not None and turn.machine.power is not None:
                turn.machine.power.press_power_button()
            self.wait(timeout=time / 2)
        if self.wait(timeout=0) is None:
            self.kill()
        return self.wait(timeout=STOP_TIMEOUT)

    def kill(self, *, signal: str | int = "KILL") -> None:
        """Send the command a signal, by name or number; KILL ends the machine."""
        number = signal_number(signal)
        if number == _SIGKILL:
            self.shut(_KILLED)
        else:
            self._now().session.send(SIGNAL, number)

    @remote(waits=True, client=True)
    def exec(
        self,
        *,
        argv: Annotated[list[str], limits(minItems=1)],
        stream: Name | None = None,
        port: Port | None = None,
        env: list[str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: Annotated[list[Size], limits(minItems=2, maxItems=2)] | None = None,
        merged: bool = False,
        client: Client | None = None,
    ) -> Started:
        """Start another command, with a terminal of so many rows and columns if they are given.

        If `merged`, its stderr is its stdout.

        With `stream`, a name of the client's choice, its streams are `exec_output`, `exec_stdin`
        and `exec_exited` of this connection. With `port` it connects to that port of the vsock
        socket four times: control, stdin, stdout, stderr. With neither nobody hears what it says.
        """
        turn = self._now()
        way = _way(turn)
        from tinyvmm.guest.execution import build_execution, execution_steps

        if port is not None and stream is not None:
            raise ConfigError("give a stream or a port, not both")
        command: Command | None = None
        if port is None:
            whose = None if stream is None else client
            command = way.streams.open(whose, stream or os.urandom(8).hex(), argv[0])
            port = command.port
        try:
            execution = self._execution(argv, port, env or [], cwd, user, terminal)
            modules = self._vsock_modules(way)
            execution = execution._replace(merged=merged, modules=modules)
            steps = [step.says for step in execution_steps(execution)]
            if command is not None:
                command.steps = steps
            pid = turn.executor.start(build_execution(execution))
        except BaseException:
            if command is not None:
                way.streams.forget(command)
            raise
        self._when_ended(turn, way, pid, command)
        return {"pid": pid, "steps": steps}

    @remote(waits=True, lane="exec_stdin", lane_by="stream", client=True)
    def exec_stdin(
        self, *, client: Client, stream: Name, data: Base64 = "", eof: bool = False
    ) -> None:
        """Write to the stdin of a command of this client's (base64), and perhaps end it.

        Answers when all of it is on its way, or wanted no more.
        """
        streams = _way(self._now()).streams
        streams.write(streams.find(client, stream), decode(data), eof=eof)

    @remote(waits=True, client=True)
    def exec_signal(self, *, client: Client, stream: Name, signal: str | int) -> None:
        """Send a command of this client's a signal, by name or number."""
        streams = _way(self._now()).streams
        streams.tell(streams.find(client, stream), SIGNAL, signal_number(signal))

    @remote(waits=True, client=True)
    def exec_resize(self, *, client: Client, stream: Name, rows: Size, columns: Size) -> None:
        """Tell the terminal of a command of this client's its size."""
        streams = _way(self._now()).streams
        streams.tell(streams.find(client, stream), WINSIZE, rows | columns << 16)

    @remote(waits=True)
    def calls(self, *, port: Port) -> Calls:
        """Start guest/calls.py, which connects to `port` of the vsock socket: guest_calls.py."""
        turn = self._now()
        way = _way(turn)
        from tinyvmm.guest.calls import build_calls
        from tinyvmm.guest.execution import vsock_address

        program = build_calls(vsock_address(port), self._vsock_modules(way))
        pid = turn.executor.start(program)
        self._when_ended(turn, way, pid)
        return {"pid": pid}

    @remote(waits=True, client=True)
    def exec_wait(
        self, *, pid: int, timeout: Seconds | None = None, client: Client | None = None
    ) -> int | None:
        """Wait for the end of a command that `exec` started: its exit status."""
        executor = self._now().executor
        if client is None:
            status = executor.wait(pid, timeout)
        else:
            client.when_gone(self._look)
            status = executor.wait(pid, timeout, lambda: client.gone)
        return None if status is None else exit_status(status)

    def execs(self) -> Execs:
        """List what `exec` started: process ids that run, and the statuses of what has ended."""
        executor = self._now().executor
        ends = {str(pid): exit_status(status) for pid, status in executor.ends().items()}
        return {"running": executor.running(), "ended": ends}

    @remote(waits=True, lane="stdin")
    def stdin_(self, *, data: Base64 = "", eof: bool = False) -> None:
        """Write to the machine's command's stdin (base64), and perhaps end it."""
        rest = memoryview(decode(data))
        with self._input_lock:
            if self._input is None:
                raise ConfigError("the command's stdin is not kept open; run it with --interactive")
            poller = select.poll()
            poller.register(self._input, select.POLLOUT)
            while rest and self._result is None:
                try:
                    rest = rest[os.write(self._input, rest) :]
                except BlockingIOError:
                    poller.poll(200)
                except BrokenPipeError:
                    return  # the session is over
        if eof:
            self._close_input()

    def resize(self, *, rows: Size, columns: Size) -> None:
        """Tell the machine's command's terminal its size."""
        self._now().session.send(WINSIZE, rows | columns << 16)

    def console(self) -> str:
        """Return the last of what the kernel printed."""
        return self._now().console().decode(errors="replace")

    # --- how ------------------------------------------------------------------------------

    def _now(self) -> _Turn:
        turn = self._turn
        if turn is None:
            raise ConfigError("the machine does not run")
        return turn

    def _cpu(self, number: int | None) -> int | None:
        vcpus = len(self._now().machine.vcpus)
        if number is not None and number >= vcpus:
            raise ConfigError(f"there is no vCPU {number}: the machine has {vcpus}")
        return number

    def _execution(
        self,
        argv: Sequence[str],
        port: int,
        env: Sequence[str],
        cwd: str | None,
        user: str | None,
        terminal: Sequence[int] | None,
    ) -> "Execution":
        from tinyvmm.guest.execution import Execution, vsock_address
        from tinyvmm.guest.init import search_path

        context = self._context
        if context is None:
            raise AssertionError("a machine without a context")
        if any("=" not in entry for entry in env):
            raise ConfigError("each variable of the environment is NAME=VALUE")
        variables = dict(entry.split("=", 1) for entry in context.env)
        account = context.account
        if user is not None:
            from tinyvmm.inside.guest_users import resolve

            found = resolve(user, context.root)
            account, variables["HOME"] = found.user, found.home
        variables |= dict(entry.split("=", 1) for entry in env)
        size = None
        if terminal is not None:
            size = terminal[0], terminal[1]
        return Execution(
            commands=search_path(argv[0], variables.get("PATH", "/usr/bin:/bin")),
            argv=argv,
            address=vsock_address(port),
            env=[f"{name}={value}" for name, value in variables.items()],
            cwd=context.cwd if cwd is None else cwd,
            terminal=size,
            user=account,
        )

    def _when_ended(
        self, turn: _Turn, way: _Way, pid: int, command: "Command | None" = None
    ) -> None:
        """Once a program has ended remove what clients left that died before theirs connected."""
        from tinyvmm.instances.exec_client import FIRST_PORT, PORTS

        def act() -> None:
            if command is not None:
                way.streams.ended(command)
            way.host.tidy(range(FIRST_PORT, FIRST_PORT + PORTS))

        turn.executor.when_ended(pid, act)

    def _vsock_modules(self, way: _Way) -> Sequence[tuple[str, bytes]]:
        """Return what a program has to insert before it can connect."""
        from tinyvmm.guest.init import VSOCK_MODULES

        return () if way.vsock.running else self._modules(VSOCK_MODULES)

    def _modules(self, names: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        return () if self._context is None else self._context.modules(names)

    def _close_input(self) -> None:
        with self._input_lock:
            if self._input is not None:
                os.close(self._input)
                self._input = None


def _way(turn: _Turn) -> _Way:
    """Return the way to us that its guest has; ConfigError if it has none."""
    if turn.way is None:
        raise ConfigError(
            "the guest's vsock is this computer's own, and nothing more can be started or "
            "mounted in it: run it without --vsock vhost for that"
        )
    return turn.way


_DIGITS_MAX = 3  # of a signal's number
_SIGKILL = int(signal.SIGKILL)
_KILLED = Result(STATUS_SIGNAL + _SIGKILL, "signal")


def signal_number(given: str | int) -> int:
    """Return a signal's number: `TERM`, `SIGTERM`, `15`, `RTMIN+3`; ConfigError for none."""
    text = str(given).upper()
    number = 0
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX:
        number = int(text)
    elif not text.isdigit():
        name, plus, more = (text if text.startswith("SIG") else f"SIG{text}").partition("+")
        number = signal.Signals.__members__.get(name, 0)
        if plus:
            counted = more.isascii() and more.isdigit() and len(more) <= _DIGITS_MAX
            number = number + int(more) if counted and name == "SIGRTMIN" else 0
    if not 0 < number <= signal.SIGRTMAX:
        raise ConfigError(f"{given!r} is no signal; give e.g. TERM or 15")
    return int(number)


def exit_status(status: int) -> int:
    """Return the exit status, as a shell's, of a status as from wait4(2)."""
    number = status & 0x7F
    return STATUS_SIGNAL + number if number else status >> 8 & 0xFF


def _nothing() -> None:
    """Do nothing."""
