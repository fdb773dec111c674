"""One more command in a guest that runs, `tinyvmm exec`: the program that PID 1 is sent for it.

`build_execution` makes a static executable of an `Execution`, which

1. inserts the kernel's vsock modules, which it brings along, if nobody has yet;
2. connects four times to one port of the host: control, stdin, stdout and stderr, in this order;
3. does for its command what PID 1 does for its own (relay.py), with those four for ports;
4. exits as the command did.

If the host closes control it goes on: the command is done in peace, with nobody to read what it
says. How the program gets there is in programs.py.
"""

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from tinyvmm.guest import abi, relay
from tinyvmm.guest.asm import qword
from tinyvmm.guest.elf import Program
from tinyvmm.guest.protocol import STREAMS
from tinyvmm.guest.steps import ANYTHING, Step, Value, birth_steps, check_command, emit_step

PATIENCE = struct.pack("<qq", 60, 0)
"""How long connecting may take: with Linux's 2 s, a busy computer is one that cannot be reached."""
VMADDR_CID_HOST = 2  # <linux/vm_sockets.h>


class Execution(NamedTuple):
    """What one such program does."""

    commands: Sequence[str]
    """Paths to try with execve, in order: from `init.search_path`."""
    argv: Sequence[str]
    address: bytes
    """struct sockaddr_vm of the host's port, or another of AF_VSOCK or AF_UNIX."""
    env: Sequence[str] = ()
    cwd: str = "/"
    terminal: tuple[int, int] | None = None
    """Rows and columns, or None to start it on three pipes."""
    user: relay.User | None = None
    merged: bool = False
    """Whether its stderr is its stdout."""
    modules: Sequence[tuple[str, bytes]] = ()
    """Kernel modules, name and content, in the order to insert them."""
    umask: int = 0o022


def vsock_address(port: int) -> bytes:
    """Return struct sockaddr_vm of a port of the host (vsock(7), <linux/vm_sockets.h>)."""
    return struct.pack("<HHII4x", abi.AF_VSOCK, 0, port, VMADDR_CID_HOST)


def module_steps(modules: Sequence[tuple[str, bytes]]) -> list[Step]:
    """Insert kernel modules, name and content, that may be there already."""
    return [
        Step(
            f"insert the kernel module {name}",
            abi.SYS_INIT_MODULE,
            (module, len(module), ""),
            tolerates=(errno.EEXIST,),
        )
        for name, module in modules
    ]


def connect_steps(name: str, into: str, address: bytes) -> list[Step]:
    """Connect a stream socket to `address`, and keep it in the variable `into`."""
    (family,) = struct.unpack_from("<H", address)
    kind = abi.SOCK_STREAM | abi.SOCK_CLOEXEC
    steps = [
        Step(f"make a socket for {name}", abi.SYS_SOCKET, (family, kind, 0), into=into),
        Step(f"connect {name}", abi.SYS_CONNECT, (Value(into), address, len(address))),
    ]
    if family == abi.AF_VSOCK:
        option = (abi.AF_VSOCK, abi.SO_VM_SOCKETS_CONNECT_TIMEOUT, PATIENCE, len(PATIENCE))
        patient = (Value(into), *option)
        says = f"give {name} time to connect"  # else Linux's own will do
        steps.insert(1, Step(says, abi.SYS_SETSOCKOPT, patient, tolerates=ANYTHING))
    return steps


def execution_steps(execution: Execution) -> list[Step]:
    """Every step from the first instruction to the command's birth."""
    steps = module_steps(execution.modules)
    for name in STREAMS:
        what = name if name == "control" else f"{name} port"
        steps += [
            *connect_steps(name, what, execution.address),
            Step(f"unblock {name}", abi.SYS_FCNTL, (Value(what), abi.F_SETFL, abi.O_NONBLOCK)),
        ]
    umask = Step("set the umask", abi.SYS_UMASK, (execution.umask,))
    return [*steps, umask, *birth_steps(execution.terminal)]


def build_execution(execution: Execution) -> bytes:
    """The executable. Raises ConfigError for what can't be passed to a program."""
    check_command(execution.commands, execution.argv, execution.env, execution.cwd)
    p = Program()
    steps = execution_steps(execution)
    for name in sorted({step.into for step in steps if step.into}):
        p.variable(name)
    p.label("_start")
    p.mov(qword["control"], -1)
    for index, step in enumerate(steps):
        emit_step(p, index, step)
    relay.emit(
        p,
        relay.Command(
            paths=execution.commands,
            argv=execution.argv,
            env=execution.env,
            cwd=execution.cwd,
            terminal=execution.terminal is not None,
            user=execution.user,
            merged=execution.merged,
            alone=False,
        ),
    )
    return p.link()
