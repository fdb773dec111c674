"""What can be asked of a machine that runs: the methods of its control socket.

A `Supervisor` belongs to one `tinyvmm run`, and outlives a reboot: each machine that this makes is
given to `attach`. Its methods are called by the control socket's clients, each on its own thread;
what they need of the session they post to it, and what they need of the machine is made for any
thread. docs/control.md lists them, with the types of what goes in and comes out.
"""

import os
import signal
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.executor import Executor
from tinyvmm.guest.protocol import SIGNAL, STARTED, WINSIZE
from tinyvmm.session import STATUS_SIGNAL, Result

if TYPE_CHECKING:
    from tinyvmm.devices.virtio.device import VirtioDevice
    from tinyvmm.fileserver.tree import Tree
    from tinyvmm.guest.execution import Execution
    from tinyvmm.machine import Machine
    from tinyvmm.session import Session

MEMORY_AT_ONCE = 512 << 10  # bytes of RAM in one answer
INPUT_MAX = 1 << 16  # bytes of one `stdin`
STOP_TIMEOUT = 10.0  # podman's


class Context(NamedTuple):
    """What every machine of one run has in common."""

    env: Sequence[str]
    cwd: str
    root: "Tree"
    modules: Callable[[], Sequence[tuple[str, bytes]]]
    """The kernel's vsock modules that are not inserted at boot."""


class _Turn(NamedTuple):
    machine: "Machine"
    session: "Session"
    executor: Executor
    console: Callable[[], bytes]
    vsock: "VirtioDevice"


class Supervisor:
    """Answers for one `tinyvmm run`; `vsock_path` is where its vsock socket is."""

    def __init__(self, vsock_path: str, *, keep_stdin: bool = False) -> None:
        self.vsock_path = vsock_path
        self.on_started: Callable[[], None] = _nothing
        """Called in the session's thread when the command runs."""
        self.last_console = b""
        """The last that the kernel printed, once the machine has ended."""
        self._context: Context | None = None
        self._turn: _Turn | None = None
        self._changed = threading.Condition()  # guards _turn, _result
        self._result: Result | None = None
        self._began = time.monotonic()
        self._input_lock = threading.Lock()  # guards the descriptor below
        self.stdin: int | None = None
        self._input: int | None = None
        if keep_stdin:
            self.stdin, self._input = os.pipe2(os.O_CLOEXEC)

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
        vsock: "VirtioDevice",
    ) -> None:
        """Answer for this machine from now on."""
        with self._changed:
            self._turn = _Turn(machine, session, executor, console, vsock)
            self._changed.notify_all()

    def detach(self) -> None:
        """Answer for no machine; return once nobody uses it any more."""
        with self._changed:
            turn, self._turn = self._turn, None
        if turn is not None:
            turn.executor.close()
            self.last_console = turn.console()

    def on_record(self, kind: int, _value: int) -> None:
        """See a record of the guest's."""
        if kind == STARTED:
            self.on_started()

    def end(self, result: Result) -> None:
        """Tell everybody who waits how the run ended."""
        with self._changed:
            self._result = result
            self._changed.notify_all()
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
            "resize": self.resize,
            "console": self.console,
            "devices": self.devices,
            "registers": self.registers,
            "step": self.step,
            "memory_info": self.memory_info,
            "memory_read": self.memory_read,
            "memory_write": self.memory_write,
            "balloon": self.balloon,
        }

    def status(self) -> dict[str, Any]:
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

    def wait(self, *, timeout: float | None = None) -> dict[str, Any] | None:
        """Wait for the end of the run; None after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._result is not None, timeout)
            if self._result is None:
                return None
            return {"status": self._result.status, "message": self._result.message}

    def pause(self) -> None:
        """Take every vCPU out of the guest."""
        self._now().machine.pause()

    def resume(self) -> None:
        """Let the guest go on."""
        self._now().machine.resume()

    def stop(self, *, time: float = STOP_TIMEOUT) -> dict[str, Any] | None:
        """Ask the command to end (SIGTERM), and end the machine if it has not after `time`."""
        turn = self._now()
        turn.machine.resume()
        turn.session.send(SIGNAL, signal.SIGTERM)
        if self.wait(timeout=max(0.0, float(time))) is None:
            killed = Result(STATUS_SIGNAL + signal.SIGKILL, "signal")
            turn.session.end(killed)
        return self.wait(timeout=STOP_TIMEOUT)

    def kill(self, *, signal: str | int = "KILL") -> None:
        """Send the command a signal, by name or number; KILL ends the machine."""
        turn = self._now()
        number = signal_number(signal)
        if number == _SIGKILL:
            turn.session.end(Result(STATUS_SIGNAL + number, "signal"))
        else:
            turn.session.send(SIGNAL, number)

    def exec(
        self,
        *,
        argv: list[str],
        port: int,
        env: list[str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: list[int] | None = None,
    ) -> dict[str, Any]:
        """Start another command; it connects to `port` of the vsock socket four times."""
        turn = self._now()
        from tinyvmm.guest.execution import build_execution, execution_steps

        execution = self._execution(turn, argv, port, env or [], cwd, user, terminal)
        pid = turn.executor.start(build_execution(execution))
        return {"pid": pid, "steps": [step.says for step in execution_steps(execution)]}

    def calls(self, *, port: int) -> dict[str, int]:
        """Start guest/calls.py, which connects to `port` of the vsock socket: guest_calls.py."""
        turn = self._now()
        from tinyvmm.guest.calls import build_calls
        from tinyvmm.guest.execution import vsock_address

        _check_port(port)
        program = build_calls(vsock_address(port), self._vsock_modules(turn))
        return {"pid": turn.executor.start(program)}

    def exec_wait(self, *, pid: int, timeout: float | None = None) -> int | None:
        """Wait for the end of a command that `exec` started: its exit status."""
        status = self._now().executor.wait(pid, timeout)
        return None if status is None else exit_status(status)

    def execs(self) -> dict[str, Any]:
        """List what `exec` started: process ids that run, and the statuses of what has ended."""
        executor = self._now().executor
        ends = {str(pid): exit_status(status) for pid, status in executor.ends().items()}
        return {"running": executor.running(), "ended": ends}

    def stdin_(self, *, data: str = "", eof: bool = False) -> None:
        """Write to the command's stdin (base64), and perhaps end it."""
        raw = _decode(data)
        if len(raw) > INPUT_MAX:
            raise ConfigError(f"{len(raw)} bytes at once: send {INPUT_MAX} at most")
        with self._input_lock:
            if self._input is None:
                raise ConfigError("the command's stdin is not kept open; run it with --interactive")
            rest = memoryview(raw)
            while rest:
                rest = rest[os.write(self._input, rest) :]
        if eof:
            self._close_input()

    def resize(self, *, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if not 0 < rows < 1 << 16 or not 0 < columns < 1 << 16:
            raise ConfigError(f"{rows} rows and {columns} columns are no size")
        self._now().session.send(WINSIZE, rows | columns << 16)

    def console(self) -> str:
        """Return the last of what the kernel printed."""
        return self._now().console().decode(errors="replace")

    def devices(self) -> list[dict[str, Any]]:
        """List the virtio devices."""
        return [
            {"name": device.name, "class": type(device).__name__, "running": device.running}
            for device in self._now().machine.virtio_devices
        ]

    def registers(self, *, cpu: int = 0) -> dict[str, int]:
        """Return a vCPU's general registers, for which the machine must be paused."""
        regs = self._paused().vcpus[self._cpu(cpu)].handle.get_regs()
        return {name: getattr(regs, name) for name in type(regs).__annotations__}

    def step(self, *, cpu: int = 0) -> bool:
        """Let one vCPU execute one instruction; False if it waits for an interrupt instead."""
        return self._paused().vcpus[self._cpu(cpu)].step()

    def memory_info(self) -> dict[str, Any]:
        """Say how much RAM there is, and where."""
        memory = self._now().machine.memory
        regions = [{"gpa": region.gpa, "size": region.size} for region in memory.regions]
        return {"size": memory.size, "regions": regions}

    def memory_read(self, *, gpa: int, length: int) -> str:
        """Copy out RAM (base64)."""
        if not 0 <= length <= MEMORY_AT_ONCE:
            raise ConfigError(f"{length} bytes at once: ask for {MEMORY_AT_ONCE} at most")
        try:
            return b64encode(self._now().machine.memory.read(gpa, length)).decode()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def memory_write(self, *, gpa: int, data: str) -> None:
        """Change RAM (base64)."""
        try:
            self._now().machine.memory.write(gpa, _decode(data))
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def balloon(self, *, size: int) -> dict[str, int]:
        """Ask the guest to give up so many bytes of its RAM; how many it has given up so far."""
        from tinyvmm.devices.virtio.balloon import VirtioBalloon

        machine = self._now().machine
        if not 0 <= size < machine.memory.size:
            raise ConfigError(f"the guest has no {size} bytes to give up")
        for device in machine.virtio_devices:
            if isinstance(device, VirtioBalloon):
                device.resize(size)
                return {"actual": device.actual}
        raise ConfigError("the machine has no balloon; run it with --balloon")

    # --- how ------------------------------------------------------------------------------

    def _now(self) -> _Turn:
        turn = self._turn
        if turn is None:
            raise ConfigError("the machine does not run")
        return turn

    def _paused(self) -> "Machine":
        machine = self._now().machine
        if not machine.paused:
            raise ConfigError("the machine runs: pause it first")
        return machine

    def _cpu(self, number: int) -> int:
        if not 0 <= number < len(self._now().machine.vcpus):
            raise ConfigError(f"there is no vCPU {number}")
        return number

    def _execution(
        self,
        turn: _Turn,
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
        if not argv or not all(isinstance(word, str) for word in (*argv, *env)):
            raise ConfigError("give a command and its environment as lists of strings")
        _check_port(port)
        if any("=" not in entry for entry in env):
            raise ConfigError("each variable of the environment is NAME=VALUE")
        variables = dict(entry.split("=", 1) for entry in context.env)
        account = None
        if user is not None:
            from tinyvmm.guest_users import resolve

            account = resolve(user, context.root)
            variables["HOME"] = account.home
        variables |= dict(entry.split("=", 1) for entry in env)
        size = None
        if terminal is not None:
            rows, columns = terminal
            size = rows & 0xFFFF, columns & 0xFFFF
        return Execution(
            commands=search_path(argv[0], variables.get("PATH", "/usr/bin:/bin")),
            argv=argv,
            address=vsock_address(port),
            env=[f"{name}={value}" for name, value in variables.items()],
            cwd=context.cwd if cwd is None else cwd,
            terminal=size,
            user=None if account is None else account.user,
            modules=self._vsock_modules(turn),
        )

    def _vsock_modules(self, turn: _Turn) -> Sequence[tuple[str, bytes]]:
        """Return what a program has to insert before it can connect."""
        if turn.vsock.running or self._context is None:
            return ()
        return self._context.modules()

    def _close_input(self) -> None:
        with self._input_lock:
            if self._input is not None:
                os.close(self._input)
                self._input = None


_SIGKILL = int(signal.SIGKILL)


def signal_number(given: str | int) -> int:
    """Return the number of a signal: `TERM`, `SIGTERM`, `15`; ConfigError if there is none."""
    text = str(given).upper()
    if text.isascii() and text.isdigit() and 0 < int(text) <= signal.SIGRTMAX:
        return int(text)
    name = text if text.startswith("SIG") else f"SIG{text}"
    if name not in signal.Signals.__members__:
        raise ConfigError(f"{given!r} is no signal; give e.g. TERM or 15")
    return int(signal.Signals[name])


def exit_status(status: int) -> int:
    """Return the exit status, as a shell's, of a status as from wait4(2)."""
    number = status & 0x7F
    return STATUS_SIGNAL + number if number else status >> 8 & 0xFF


def _check_port(port: int) -> None:
    if not 0 < port < (1 << 32) - 1:
        raise ConfigError(f"{port} is no vsock port")


def _decode(data: str) -> bytes:
    try:
        return b64decode(data, validate=True)
    except ValueError as error:
        raise ConfigError(f"no base64: {error}") from None


def _nothing() -> None:
    """Do nothing."""
