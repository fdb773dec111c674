"""What can be asked of a machine that runs: the methods of its control socket.

A `Supervisor` answers for one `tinyvmm run`, which is a `Supervised` (supervised.py), whatever
machine that has. Its methods are called by the control socket's clients, each on its own thread;
what they need of the session they post to it, and what they need of the machine is made for any
thread. docs/control.md lists them, with the types of what goes in and comes out.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from tinyvmm.errors import ConfigError
from tinyvmm.guest.protocol import SIGNAL, WINSIZE
from tinyvmm.instances.control import Client, remote
from tinyvmm.instances.control_schema import limits
from tinyvmm.instances.watching import Watching
from tinyvmm.methods.inspection import Inspection, decode
from tinyvmm.methods.shares import Shares
from tinyvmm.methods.supervised import Supervised, Turn, Way
from tinyvmm.session import STATUS_SIGNAL, Result

if TYPE_CHECKING:
    from tinyvmm.guest.execution import Execution
    from tinyvmm.methods.exec_streams import Command

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


class Supervisor:
    """Answers for one `tinyvmm run`."""

    def __init__(self, run: Supervised) -> None:
        self._run = run
        self._watching = Watching(lambda: None if run.turn is None else run.turn.machine)
        self._inspection = Inspection(lambda: run.machine, self._watching)
        self._shares = Shares(lambda: _way(run.now()).host, self, self._modules)

    def detach(self) -> None:
        """Let go of what the machine that ends has got while it ran."""
        self._shares.close()

    def close(self) -> None:
        """Let go of what is looked at: the run has ended."""
        self._watching.close()

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
        turn = self._run.turn
        state = "starting" if turn is None else "paused" if turn.machine.paused else "running"
        if self._run.result is not None:
            state = "ended"
        return {
            "state": state,
            "uptime": time.monotonic() - self._run.began,
            "pid": os.getpid(),
            "vsock": self._run.vsock_path,
        }

    @remote(waits=True, client=True)
    def wait(self, *, timeout: Seconds | None = None, client: Client | None = None) -> Ended | None:
        """Wait for the end of the run; null after `timeout` seconds."""
        if client is not None:
            client.when_gone(self._look)
        run = self._run
        with run.changed:
            run.changed.wait_for(
                lambda: run.result is not None or (client is not None and client.gone), timeout
            )
            if run.result is None:
                return None
            return {"status": run.result.status, "message": run.result.message}

    def _look(self, _client: Client) -> None:
        """Have whoever waits look whether it still does."""
        with self._run.changed:
            self._run.changed.notify_all()
        turn = self._run.turn
        if turn is not None:
            turn.executor.look()

    @remote(waits=True, lane="machine")
    def pause(self, *, cpu: Annotated[int, limits(minimum=0)] | None = None) -> None:
        """Take every vCPU, or one, out of the guest."""
        self._run.now().machine.pause(self._cpu(cpu))

    @remote(waits=True, lane="machine")
    def resume(self, *, cpu: Annotated[int, limits(minimum=0)] | None = None) -> None:
        """Let the guest, or one of its vCPUs, go on."""
        self._run.now().machine.resume(self._cpu(cpu))

    @remote(waits=True)
    def stop(self, *, time: Seconds = STOP_TIMEOUT) -> Ended | None:
        """Ask the command to end, then press the power button, and end the machine after `time`.

        The button comes when half of it is over; a command that is no init has no use for that.
        """
        turn = self._run.turn
        if turn is not None:  # else it starts, or is just ending
            turn.machine.resume()
            turn.session.send(SIGNAL, self._run.stop_signal)
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
            self._run.shut(_KILLED)
        else:
            self._run.now().session.send(SIGNAL, number)

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
        turn = self._run.now()
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
        streams = _way(self._run.now()).streams
        streams.write(streams.find(client, stream), decode(data), eof=eof)

    @remote(waits=True, client=True)
    def exec_signal(self, *, client: Client, stream: Name, signal: str | int) -> None:
        """Send a command of this client's a signal, by name or number."""
        streams = _way(self._run.now()).streams
        streams.tell(streams.find(client, stream), SIGNAL, signal_number(signal))

    @remote(waits=True, client=True)
    def exec_resize(self, *, client: Client, stream: Name, rows: Size, columns: Size) -> None:
        """Tell the terminal of a command of this client's its size."""
        streams = _way(self._run.now()).streams
        streams.tell(streams.find(client, stream), WINSIZE, rows | columns << 16)

    @remote(waits=True)
    def calls(self, *, port: Port) -> Calls:
        """Start guest/calls.py, which connects to `port` of the vsock socket: guest_calls.py."""
        turn = self._run.now()
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
        executor = self._run.now().executor
        if client is None:
            status = executor.wait(pid, timeout)
        else:
            client.when_gone(self._look)
            status = executor.wait(pid, timeout, lambda: client.gone)
        return None if status is None else exit_status(status)

    def execs(self) -> Execs:
        """List what `exec` started: process ids that run, and the statuses of what has ended."""
        executor = self._run.now().executor
        ends = {str(pid): exit_status(status) for pid, status in executor.ends().items()}
        return {"running": executor.running(), "ended": ends}

    @remote(waits=True, lane="stdin")
    def stdin_(self, *, data: Base64 = "", eof: bool = False) -> None:
        """Write to the machine's command's stdin (base64), and perhaps end it."""
        rest = memoryview(decode(data))
        with self._run.input_lock:
            if self._run.input is None:
                raise ConfigError("the command's stdin is not kept open; run it with --interactive")
            poller = select.poll()
            poller.register(self._run.input, select.POLLOUT)
            while rest and self._run.result is None:
                try:
                    rest = rest[os.write(self._run.input, rest) :]
                except BlockingIOError:
                    poller.poll(200)
                except BrokenPipeError:
                    return  # the session is over
        if eof:
            self._run.close_input()

    def resize(self, *, rows: Size, columns: Size) -> None:
        """Tell the machine's command's terminal its size."""
        self._run.now().session.send(WINSIZE, rows | columns << 16)

    def console(self) -> str:
        """Return the last of what the kernel printed."""
        return self._run.now().console().decode(errors="replace")

    # --- how ------------------------------------------------------------------------------

    def _cpu(self, number: int | None) -> int | None:
        vcpus = len(self._run.now().machine.vcpus)
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

        context = self._run.context
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

    def _when_ended(self, turn: Turn, way: Way, pid: int, command: "Command | None" = None) -> None:
        """Once a program has ended remove what clients left that died before theirs connected."""
        from tinyvmm.instances.exec_client import FIRST_PORT, PORTS

        def act() -> None:
            if command is not None:
                way.streams.ended(command)
            way.host.tidy(range(FIRST_PORT, FIRST_PORT + PORTS))

        turn.executor.when_ended(pid, act)

    def _vsock_modules(self, way: Way) -> Sequence[tuple[str, bytes]]:
        """Return what a program has to insert before it can connect."""
        from tinyvmm.guest.init import VSOCK_MODULES

        return () if way.vsock.running else self._modules(VSOCK_MODULES)

    def _modules(self, names: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        return () if self._run.context is None else self._run.context.modules(names)


def _way(turn: Turn) -> Way:
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
