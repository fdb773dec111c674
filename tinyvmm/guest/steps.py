"""Setup as a table: one `Step` is one system call, and all become code in the same few lines.

A step that fails ends the program and tells the host its index and errno (relay.emit_failure); what
it tried to do is in `says`.
"""

import errno
import struct
from collections.abc import Sequence
from typing import TypeAlias

from tinyvmm.errors import ConfigError
from tinyvmm.guest import abi, relay
from tinyvmm.guest.asm import Address, Memory, ebx, qword, rax
from tinyvmm.guest.elf import Argument, Program
from tinyvmm.named import NamedTuple


class Value(NamedTuple):
    """An argument that is the content of a variable: 4 or 8 bytes at an offset."""

    variable: str
    offset: int = 0
    size: int = 8


class Place(NamedTuple):
    """An argument that is the address of a variable."""

    variable: str


StepArgument: TypeAlias = int | str | bytes | Value | Place
ANYTHING = tuple(range(1, 134))  # every errno there is


class Step(NamedTuple):
    """One system call of the setup. A str is passed as a C string, bytes by their address."""

    says: str
    number: int
    arguments: tuple[StepArgument, ...]
    into: str | None = None
    """The variable that keeps the result."""
    tolerates: tuple[int, ...] = ()
    """What errors are as good as success."""
    patience_ms: int = 0
    """How long to try again while the answer is ENOENT or ENXIO: devices arrive when they do."""


def check_command(
    paths: Sequence[str],
    argv: Sequence[str],
    env: Sequence[str],
    cwd: str,
    *,
    idle: bool = False,
) -> None:
    """Raise ConfigError for what can't be passed to a program."""
    for text in (*paths, *argv, *env, cwd):
        if "\0" in text:
            raise ConfigError(f"{text!r} holds a NUL, which no program can be given; remove it")
    if not idle and not (paths and argv):
        raise ConfigError("there is no command to run; give one after --")


def birth_steps(
    terminal: tuple[int, int] | None, *, idle: bool = False, own_init: bool = False
) -> list[Step]:
    """From there to the command's birth: signals, its streams, vfork; relay.py goes on.

    An `idle` child executes nothing, so it needs memory of its own: fork. So does one that goes on
    beside an init, with a pipe on which it sees the parent's execve.
    """
    every_signal, only_sigchld = b"\xff" * 8, struct.pack("<Q", 1 << (abi.SIGCHLD - 1))
    return [
        Step("block signals", abi.SYS_RT_SIGPROCMASK, (abi.SIG_SETMASK, every_signal, 0, 8)),
        Step(
            "make a descriptor of SIGCHLD",
            abi.SYS_SIGNALFD4,
            (-1, only_sigchld, 8, abi.SFD_NONBLOCK | abi.SFD_CLOEXEC),
            into="children",
        ),
        *(_terminal_steps(terminal) if terminal else _pipe_steps()),
        # A vforked parent sleeps until its child has executed a program or ended, and they share
        # memory meanwhile: when it wakes, it can simply read whether execve failed.
        *(
            [Step("make a pipe", abi.SYS_PIPE2, (Place("exec pipe"), abi.O_CLOEXEC))]
            if own_init
            else []
        ),
        Step(
            "start a process",
            abi.SYS_FORK if idle or own_init else abi.SYS_VFORK,
            (),
            into="command",
        ),
    ]


def _pipe_steps() -> list[Step]:
    """Three pipes; only our ends of them do not block."""
    steps: list[Step] = []
    for name, our_end in (("stdin", 4), ("stdout", 0), ("stderr", 0)):
        pipe = f"{name} pipe"
        ours = Value(pipe, our_end, 4)
        steps += [
            Step(f"make the {pipe}", abi.SYS_PIPE2, (Place(pipe), abi.O_CLOEXEC)),
            Step(f"unblock the {pipe}", abi.SYS_FCNTL, (ours, abi.F_SETFL, abi.O_NONBLOCK)),
        ]
    return steps


def _terminal_steps(size: tuple[int, int]) -> list[Step]:
    """A pseudo terminal: `master` is ours, `terminal` the command's."""
    flags = abi.O_RDWR | abi.O_NOCTTY | abi.O_CLOEXEC
    master = Value("master")
    winsize = struct.pack("<4H", *size, 0, 0)
    return [
        Step("open /dev/ptmx", abi.SYS_OPEN, ("/dev/ptmx", flags | abi.O_NONBLOCK), into="master"),
        Step("unlock the terminal", abi.SYS_IOCTL, (master, abi.TIOCSPTLCK, bytes(4))),
        Step("open the terminal", abi.SYS_IOCTL, (master, abi.TIOCGPTPEER, flags), into="terminal"),
        Step("size the terminal", abi.SYS_IOCTL, (master, abi.TIOCSWINSZ, winsize)),
    ]


def emit_step(p: Program, index: int, step: Step) -> None:
    """Make the system call, again if it has patience, and go on unless it failed."""
    again, failed, done = (f"step {index} {what}" for what in ("again", "failed", "done"))
    if step.patience_ms:
        p.mov(ebx, step.patience_ms)
    p.label(again)
    p.system_call(step.number, *(_argument(p, argument) for argument in step.arguments))
    if step.into:
        p.mov(qword[step.into], rax)
    if step.tolerates is not ANYTHING:
        p.test(rax, rax)
        p.jns(done)
        for error in step.tolerates:
            p.cmp(rax, -error)
            p.je(done)
        if step.patience_ms:
            p.cmp(rax, -errno.ENOENT)
            p.je(f"step {index} wait")
            p.cmp(rax, -errno.ENXIO)
            p.jne(failed)
            p.label(f"step {index} wait")
            p.dec(ebx)
            p.js(failed)
            p.call("nap")
            p.jmp(again)
        p.label(failed)
        relay.emit_failure(p, index, step.says)
    p.label(done)


def _argument(p: Program, argument: StepArgument) -> Argument:
    match argument:
        case str():
            return p.string(argument)
        case bytes():
            return p.constant(argument)
        case Value(variable, offset, size):
            return Memory(Address(label=variable, disp=offset), size)
        case Place(variable):
            return variable
        case _:
            return argument
