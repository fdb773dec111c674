"""`tinyvmm.Machine` and `tinyvmm.run`: virtual machines that are used as subprocesses are.

    import tinyvmm

    done = tinyvmm.run(["uname", "-r"], capture_output=True, text=True, timeout=30)
    with tinyvmm.Machine(memory="512M", root={"hello.txt": b"hi", "bin": "/bin"}) as vm:
        vm.run(["cat", "/hello.txt"])

This Machine is a Linux guest that stays up and runs one command after another, or many at once. The
board that it is on, RAM, vCPUs and devices, is another: tinyvmm/machine.py, for who builds one.

What there is to give, vm_options.py says. The guest runs in this process, so functions which are
files, and `on_access`, are called here: on other threads, while the guest waits.

Threads: everything here may be called from any thread, by several at once.
"""

import logging
import os
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from tinyvmm.command.run import run_command
from tinyvmm.errors import ConfigError, MachineError
from tinyvmm.process import Process, complete
from tinyvmm.process_streams import Ends, take_complete, take_streams
from tinyvmm.session import Result, Session
from tinyvmm.vm_guest import Cpu, Guest, Memory
from tinyvmm.vm_options import (
    CommandOptions,
    MachineOptions,
    OwnMachineOptions,
    RunCommandOptions,
    RunOwnOptions,
    check_args,
    check_names,
    run_options,
)

if TYPE_CHECKING:
    from tinyvmm.inside import guest_calls
    from tinyvmm.recording import Recording

_log = logging.getLogger("tinyvmm")


def run(
    args: Sequence[str], **options: Unpack[RunOwnOptions]
) -> "subprocess.CompletedProcess[Any]":
    """Run a command in a machine of its own, and return what subprocess.run would.

    `timeout` (seconds) is for all of it, the guest's boot included. `options` are those of
    subprocess.run, as far as process_streams.py has them, `cwd`, and what `Machine` takes. Of an
    `image`, `args` are what podman run's are: its entrypoint's arguments, if it has one; and with
    none of them it is the image's own command. Raises what subprocess.run does, FileNotFoundError
    too if the guest has no such command; ConfigError for what cannot be done, MachineError if the
    machine ended before the command did.
    """
    given, rest = take_complete(options)
    return complete(popen(args, **rest), given)


def popen(args: Sequence[str], **options: Unpack[OwnMachineOptions]) -> Process:
    """Start a command in a machine of its own; return it when it runs. As `run`, for the rest.

    `timeout` (seconds) is for its start.
    """
    check_names(options, OwnMachineOptions)
    check_runs_linux()
    streams, rest = take_streams(options)
    cwd = rest.pop("cwd", None)
    machine: MachineOptions = cast("MachineOptions", rest)
    with ExitStack() as cleanup:
        made = run_options(machine, cleanup, args, cwd)
        kept = cleanup.pop_all()

    def launch(ends: Ends, take: Callable[[Session], None]) -> Result:
        with kept:
            wanted = made._replace(merged=ends.merged)
            return run_command(
                wanted, _log.warning, sinks=ends.sinks, files=ends.files, on_session=take
            )

    try:
        return Process(args, launch, **streams)
    except BaseException:
        kept.close()  # if it was not even launched
        raise


class Machine:
    """A Linux guest that stays up: a context manager that leaves nothing behind.

    It is closed by `close`, at the end of its `with`, when nobody has it any more, or at the
    interpreter's exit.
    """

    def __init__(self, **options: Unpack[MachineOptions]) -> None:
        """Say what to make, as MachineOptions explains; `start`, or `with`, makes it."""
        check_names(options, MachineOptions)
        self._given = options
        self._lock = threading.Lock()  # guards the two below
        self._guest: Guest | None = None
        self._close: weakref.finalize[[], Machine] | None = None

    def start(self) -> Self:
        """Boot, and return when the guest is up. Once only.

        ConfigError for what cannot be made, MachineError if the guest ends before it is up.
        """
        check_runs_linux()
        with self._lock:
            if self._guest is not None:
                raise RuntimeError("a machine is started once")
            self._guest = guest = Guest(self._given)
            self._close = weakref.finalize(self, guest.close)
        try:
            guest.await_start()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the guest, whatever it does, and release all it had; harmless when done twice."""
        with self._lock:
            close = self._close
        if close is not None:
            close()

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._guest is not None and not self._guest.task.ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the guest has ended by itself, or is closed; False after `timeout` seconds."""
        return self._up(running=False).task.ended.wait(timeout)

    # --- commands ---------------------------------------------------------------------------

    def popen(self, args: Sequence[str], **options: Unpack[CommandOptions]) -> Process:
        """Start a command and return it while it runs, as subprocess.Popen does.

        Of its directory, environment and user CommandOptions tells, of the streams
        process_streams.py. `timeout` (seconds) is for its start. FileNotFoundError and
        PermissionError if the guest cannot execute it, MachineError if the guest ends or has ended,
        ConfigError for what cannot be done.
        """
        check_names(options, CommandOptions)
        guest = self._up()
        argv = check_args(args)
        streams, rest = take_streams(options)
        env = [f"{name}={value}" for name, value in (rest.get("env") or {}).items()]

        def launch(ends: Ends, take: Callable[[Session], None]) -> Result:
            return guest.execute(
                argv, ends, take, env=env, cwd=rest.get("cwd"), user=rest.get("user")
            )

        return Process(args, launch, owner=self, **streams)

    def run(
        self, args: Sequence[str], **options: Unpack[RunCommandOptions]
    ) -> "subprocess.CompletedProcess[Any]":
        """Run a command to its end and return what subprocess.run would, or raise it.

        Whatever comes between, a timeout or Ctrl-C, kills the command. As `popen`, for the rest.
        """
        given, rest = take_complete(options)
        return complete(self.popen(args, **rest), given)

    # --- the machine itself -----------------------------------------------------------------

    @property
    def memory(self) -> Memory:
        """RAM by guest-physical address: `vm.memory[gpa : gpa + 16]`."""
        return Memory(self._up())

    @property
    def cpus(self) -> Sequence[Cpu]:
        """The vCPUs: `vm.cpus[0].regs.rip`."""
        guest = self._up()
        return [Cpu(guest, number) for number in range(len(guest.board.vcpus))]

    def pause(self) -> None:
        """Take every vCPU out of the guest; commands wait."""
        self._up().board.pause()

    def resume(self) -> None:
        """Let the guest go on."""
        self._up().board.resume()

    def trace(self, *kinds: str) -> "Recording":
        """Record what happens in a `with`: of "9p", "port", "mmio", "device", or all of them.

        ConfigError for a kind there is none of. It is of all machines in this process.
        """
        from tinyvmm.recording import Recording

        self._up()
        return Recording(kinds)

    def console_tail(self) -> str:
        """Return the last that the guest's kernel printed, also once it has ended."""
        return self._up(running=False).console()

    def _up(self, *, running: bool = True) -> Guest:
        guest = self._guest
        if guest is None:
            raise MachineError("the machine has not been started: use it in a with, or start it")
        if running:
            guest.check_running()
        return guest

    # --- files ------------------------------------------------------------------------------

    def put(self, source: "str | os.PathLike[str]", dest: str) -> None:
        """Copy a file or a directory from here to `dest` in the guest, as `tinyvmm cp` does.

        It needs nothing of the guest's root. ConfigError names what could not be copied.
        """
        from tinyvmm.inside.guest_copy import copy_in

        with self._calls() as guest:
            copy_in(guest, os.fspath(source), _absolute_path(dest))

    def get(self, source: str, dest: "str | os.PathLike[str]") -> None:
        """Copy a file or a directory out of the guest to `dest` here, as `tinyvmm cp` does."""
        from tinyvmm.inside.guest_copy import copy_out

        with self._calls() as guest:
            copy_out(guest, _absolute_path(source), os.fspath(dest), _log.warning)

    def _calls(self) -> "guest_calls.Guest":
        from tinyvmm.inside.guest_calls import open_guest

        return open_guest(self._up())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "new" if self._guest is None else "running" if self.running else "ended"
        return f"<Machine, {state}>"


def _absolute_path(path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError(f"{path!r}: a path in the guest starts with a slash")
    return path


_problem: list[str | None] = []


def check_runs_linux() -> None:
    """ConfigError if this computer's KVM cannot run Linux, saying what can."""
    if not _problem:
        from tinyvmm.lab.probe import missing_for_linux

        _problem.append(missing_for_linux())
    if _problem[0] is not None:
        raise ConfigError(
            f"this KVM cannot run Linux: {_problem[0]}; run the program in the lab, where it can: "
            "tinyvmm lab -- python PROGRAM"
        )
