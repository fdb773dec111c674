"""What a `tinyvmm.Machine` has inside: its guest while it runs, and views of its RAM and vCPUs.

A `Guest` is a run (command/run.py) on a thread of its own, in which nothing runs but what it is
sent: its supervisor answers here as it would over a control socket. A `Machine` keeps one, and so
does whatever is under way in it; `Memory` and `Cpu` are what `Machine.memory` and `Machine.cpus`
give.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

from tinyvmm.command.options import GUEST_CID
from tinyvmm.command.run import run_command
from tinyvmm.errors import ConfigError, MachineError
from tinyvmm.instances import exec_client
from tinyvmm.methods.supervised import Supervised
from tinyvmm.process import Task
from tinyvmm.process_streams import Ends
from tinyvmm.scratch import ScratchDirectory
from tinyvmm.session import HostFiles, Result, Session
from tinyvmm.vm_options import MachineOptions, run_options

if TYPE_CHECKING:
    from tinyvmm.machine import Machine as Board
    from tinyvmm.vcpu import Vcpu

_NOBODY = HostFiles(None, None, None)
_CLOSED = Result(0, "closed")
_log = logging.getLogger("tinyvmm")
_PLACE_MAX = 50
_LAST_WORDS = 5.0  # seconds from the end of a command's streams to that of its machine


class Registers(NamedTuple):
    """A vCPU's general registers (struct kvm_regs)."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class Cpu:
    """One vCPU."""

    def __init__(self, guest: "Guest", number: int) -> None:
        self._guest = guest
        self.number = number

    @property
    def regs(self) -> Registers:
        """Its registers now; a machine that is not paused is, for a moment."""
        return self._guest.at_rest(
            lambda board: Registers._make(
                getattr(board.vcpus[self.number].handle.get_regs(), name)
                for name in Registers._fields
            )
        )

    def step(self) -> bool:
        """Execute one instruction of a paused machine; False if it waits for an interrupt."""
        return self._vcpu().step()

    def _vcpu(self) -> "Vcpu":
        board = self._guest.board
        if not board.paused:
            raise ConfigError("the machine runs: pause it first")
        return board.vcpus[self.number]

    def __repr__(self) -> str:
        return f"<Cpu {self.number}>"


class Memory:
    """The guest's RAM. An index or slice of guest-physical addresses is of RAM, or an IndexError.

    What the guest writes meanwhile is seen as it is written; pause it for more.
    """

    def __init__(self, guest: "Guest") -> None:
        self._guest = guest

    def __len__(self) -> int:
        return self._guest.board.memory.size

    @overload
    def __getitem__(self, where: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, where: slice) -> bytes: ...
    def __getitem__(self, where: SupportsIndex | slice) -> int | bytes:
        if not isinstance(where, slice):
            gpa = where.__index__()
            return self._read(gpa, 1)[0]
        gpa, length = _range(where)
        return self._read(gpa, length)

    def _read(self, gpa: int, length: int) -> bytes:
        try:
            return self._guest.board.memory.read(gpa, length)
        except ValueError as error:
            raise IndexError(str(error)) from None

    def __setitem__(self, where: slice, data: bytes) -> None:
        gpa, length = _range(where)
        if len(data) != length:
            raise ValueError(f"{len(data)} bytes for {length} bytes of RAM")
        try:
            self._guest.board.memory.write(gpa, data)
        except ValueError as error:
            raise IndexError(str(error)) from None


def _range(where: slice) -> tuple[int, int]:
    if where.start is None or where.stop is None or where.step is not None:
        raise IndexError("give the first address and the one behind the last")
    return where.start, max(0, where.stop - where.start)


class Guest:
    """What runs; kept by a Machine, and by what is under way in it."""

    def __init__(self, given: MachineOptions) -> None:
        """Begin to boot, on a thread of its own."""
        with ExitStack() as cleanup:
            options = run_options(given, cleanup)
            directory = ScratchDirectory(_socket_place())
            cleanup.callback(directory.close)
            self.supervised = Supervised(os.path.join(directory.path, "vsock"))
            options = options._replace(vsock=(self.supervised.vsock_path, GUEST_CID))
            kept = cleanup.pop_all()

        supervised = self.supervised

        def launch(take: Callable[[Session], None]) -> Result:
            return run_command(options, _log.warning, supervised, files=_NOBODY, on_session=take)

        self.task = Task(launch, kept.close, "machine")

    def await_start(self) -> None:
        """Return when it is up."""
        self.task.started.wait()
        self.check_running()

    def check_running(self) -> None:
        """Raise what ended it, if it has ended: MachineError, or the ConfigError of its making."""
        if not self.task.ended.is_set():
            return
        if self.task.error is not None:
            raise self.task.error
        raise MachineError(self._end())

    def _end(self) -> str:
        result = self.task.result
        if result is None or result is _CLOSED:
            return "the machine is closed"
        return result.message or f"the machine has ended, with status {result.status}"

    @property
    def board(self) -> "Board":
        """The board of now."""
        try:
            return self.supervised.machine
        except ConfigError:
            raise MachineError(self._end()) from None

    def at_rest(self, look: "Callable[[Board], Registers]") -> Registers:
        """Look at a machine that is paused, or is for as long."""
        board = self.board
        if board.paused:
            return look(board)
        board.pause()
        try:
            return look(board)
        finally:
            board.resume()

    def console(self) -> str:
        """Return the last that the kernel printed."""
        try:
            return self.supervised.now().console().decode(errors="replace")
        except ConfigError:
            return self.supervised.last_console.decode(errors="replace")

    def call(self, method: str, **params: Any) -> Any:
        """Call a control method: so this is an exec_client.Caller."""
        return self.supervised.supervisor().call(method, **params)

    def execute(
        self,
        argv: Sequence[str],
        ends: Ends,
        take: Callable[[Session], None],
        *,
        env: Sequence[str],
        cwd: str | None,
        user: str | None,
    ) -> Result:
        """Run a command; how it ended."""
        try:
            result = exec_client.execute_with(
                self,
                argv,
                env=env,
                cwd=cwd,
                user=user,
                merged=ends.merged,
                files=ends.files,
                sinks=ends.sinks,
                on_session=take,
            )
        except ConfigError:
            if self.task.ended.wait(0):
                self.check_running()
            raise
        if result.reason == "machine" and self.task.ended.wait(_LAST_WORDS):
            return result._replace(message=self._end())
        return result

    def close(self) -> None:
        """End it and wait until nothing is left."""
        self.supervised.shut(_CLOSED)
        self.task.kill(_CLOSED)
        self.task.join()


def _socket_place() -> str:
    """Where sockets can be: their paths have 107 bytes at most (unix(7)); $TMPDIR may be longer."""
    place = os.environ.get("XDG_RUNTIME_DIR", "")
    return place if os.path.isdir(place) and len(place) < _PLACE_MAX else "/tmp"
