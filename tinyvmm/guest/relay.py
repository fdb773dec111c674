"""The second half of PID 1, as machine code: start the command, carry its bytes, end the guest.

    host                    PID 1                         command
    port 1 ── read ──> stdin relay  ── write ──> pipe ──> 0
    port 2 <── write ── stdout relay <── read ── pipe <── 1
    port 3 <── write ── stderr relay <── read ── pipe <── 2
    port 4 <─ STARTED, EXITED ─  ─ SIGNAL, WINSIZE ─>

A relay is one row of a table: where it reads, where it writes, which of the two descriptors is the
command's side, and a buffer with the bytes between `POSITION` and `LENGTH` still to be written. A
relay with an empty buffer waits to read, one with bytes waits to write; so a slow reader slows its
writer, in both directions, and never another stream. With a terminal there are two rows, both on
the master side of the pseudo terminal.

What poll(2) says of a virtio port (drivers/char/virtio_console.c, port_fops_poll): POLLHUP, always
and without being asked, while the host has it closed; reading then gives 0 once the data is gone,
writing EAGAIN. So a relay never polls a descriptor it has no use for, and an output port that is
hung up ends its relay: the command gets SIGPIPE, as if it wrote to a closed pipe.

Each function appends one routine. Registers in a routine: rbx the relay's row, r12 its two struct
pollfd; the rest is free for all.
"""

import errno
import struct
from collections.abc import Sequence

from tinyvmm.guest import abi, programs, report, unsent
from tinyvmm.guest.asm import (
    Address,
    at,
    ax,
    byte,
    dl,
    dword,
    eax,
    ecx,
    edi,
    edx,
    esi,
    ptr,
    qword,
    r12,
    r12d,
    r13,
    r13d,
    rax,
    rbx,
    rdi,
    rdx,
    rsi,
    word,
)
from tinyvmm.guest.elf import Program
from tinyvmm.guest.protocol import (
    EXEC_FAILED,
    EXECUTE,
    EXITED,
    GOODBYE,
    RECORD_LEN,
    SETUP_FAILED,
    SIGNAL,
    STARTED,
    WINSIZE,
)
from tinyvmm.guest.report import EVENTS, HUNG_UP, POLLFD_LEN, REVENTS
from tinyvmm.named import NamedTuple

BUFFER_LEN = 1 << 15  # what the port's driver copies at most in one write

# One row of the table of relays.
IN, OUT, COMMAND_END, POSITION, LENGTH, BUFFER = range(0, 48, 8)
ROW_LEN = 48
FINISHED = -1  # in IN: the relay has ended

# What is polled: two struct pollfd, then two for each relay.
CONTROL_POLLFD, CHILDREN_POLLFD, RELAY_POLLFDS = 0, 8, 16

SIGNALFD_SIGINFO_LEN = 128
LAST_WORDS_MS = 2_000  # for a killed process to give up its end of a pipe


class User(NamedTuple):
    """Whom a command runs as."""

    uid: int
    gid: int
    groups: Sequence[int] = ()


class Command(NamedTuple):
    """What to start and how; as in init.InitConfig."""

    paths: Sequence[str]
    argv: Sequence[str]
    env: Sequence[str]
    cwd: str
    terminal: bool
    user: User | None = None
    sync: bool = True
    await_goodbye: bool = False
    merged: bool = False
    """Whether its stderr is its stdout."""
    idle: bool = False
    """Execute nothing: wait for a signal that ends it. For a guest whose commands come later."""
    alone: bool = True
    """Whether the guest is there for this command, and ends with it: so it is for PID 1."""
    own_init: bool = False
    """Whether the command is an init, and becomes PID 1: we go on as its child."""
    unsent_ms: int = 0
    """How long to wait at the end for what TCP has still to send (unsent.py); 0 for not."""


class Relay(NamedTuple):
    """Where a row's descriptors are kept; `end` is the one on the command's side, to be closed."""

    source: Address
    sink: Address
    end: Address | None


# pipe2 stores the read end, then the write end.
PIPES = (
    Relay(at("stdin port"), at("stdin pipe") + 4, at("stdin pipe") + 4),
    Relay(at("stdout pipe"), at("stdout port"), at("stdout pipe")),
    Relay(at("stderr pipe"), at("stderr port"), at("stderr pipe")),
)
# The end of stdin must not hang up a terminal, so that relay closes nothing.
TERMINAL = (
    Relay(at("stdin port"), at("master"), None),
    Relay(at("master"), at("stdout port"), at("master")),
)
# The command's descriptors 0, 1 and 2; closed in PID 1 once the command has them.
PIPE_ENDS = (at("stdin pipe"), at("stdout pipe") + 4, at("stderr pipe") + 4)
TERMINAL_ENDS = (at("terminal"),) * 3

VARIABLES = {
    "incoming": RECORD_LEN,  # from the host, of which there are
    "incoming len": 8,
    "siginfo": SIGNALFD_SIGINFO_LEN,
    "wait status": 8,  # of whoever ended last
    "exit status": 8,  # of the command
    "exec error": 8,
    "ending": 8,  # the command has ended
    "foreground": 8,
    "winsize": 8,
    "digits": 4,
}


def emit(p: Program, command: Command) -> None:
    """Everything from vfork's return to power off. The setup before it ends by falling in here."""
    relays = TERMINAL if command.terminal else PIPES
    for name, size in VARIABLES.items():
        p.variable(name, size)
    p.variable("relays", ROW_LEN * len(relays))
    p.variable("buffers", BUFFER_LEN * len(relays))
    p.variable("polls", RELAY_POLLFDS + 2 * POLLFD_LEN * len(relays))
    if command.own_init:
        p.variable("exec pipe")
    if not command.terminal:
        for name in ("stdin pipe", "stdout pipe", "stderr pipe"):
            p.variable(name)
    _start(p, command, relays)
    _loop(p, relays, command)
    _end(p, command)
    _setup_failed(p)
    _prepare(p)
    _pump(p)
    _finish(p)
    _reap(p, command)
    _read_control(p, command)
    if command.alone:
        programs.emit(p)
    if command.unsent_ms:
        unsent.emit(p, command.unsent_ms, terminal=command.terminal)
    report.emit(p)


def _start(p: Program, command: Command, relays: Sequence[Relay]) -> None:
    """After vfork, or fork: the child gets ready, the parent goes on in `_fill`.

    An init has to be PID 1, so there it is the other way round, after fork.
    """
    ends = TERMINAL_ENDS if command.terminal else PIPE_ENDS
    streams = (ends[0], ends[1], ends[1]) if command.merged else ends
    p.cmp(qword["command"], 0)
    (p.je if command.own_init else p.jne)("relaying side")
    p.system_call(abi.SYS_SETSID)
    for fd, end in enumerate(streams):
        p.system_call(abi.SYS_DUP2, dword[end], fd)
    if command.terminal:
        p.system_call(abi.SYS_IOCTL, 0, abi.TIOCSCTTY, 0)
    p.system_call(abi.SYS_RT_SIGPROCMASK, abi.SIG_SETMASK, p.constant(bytes(8)), 0, 8)
    p.system_call(abi.SYS_CHDIR, p.string(command.cwd))
    if command.user is not None and not command.idle:
        _become(p, command.user)
    if command.idle:
        p.label("idle")
        p.system_call(abi.SYS_PAUSE)
        p.jmp("idle")
    else:
        _execute(p, command)
    _fill(p, relays, ends, command)


def _execute(p: Program, command: Command) -> None:
    """The child becomes the command, or leaves why it could not."""
    # As execvp(3): what is not there is passed over, a missing permission remembered. The parent
    # shares our memory, so the error goes there only when nothing is left to try.
    argv, env = p.strings(command.argv), p.strings(command.env)
    p.mov(r12, errno.ENOENT)
    p.lea(rbx, ptr[p.strings(command.paths)])
    p.label("next path")
    p.mov(rdi, qword[rbx])
    p.test(rdi, rdi)
    p.je("no command")
    p.add(rbx, 8)
    p.system_call(abi.SYS_EXECVE, rdi, argv, env)
    p.neg(rax)
    p.cmp(rax, errno.ENOENT)
    p.je("next path")
    p.cmp(rax, errno.ENOTDIR)
    p.je("next path")
    p.mov(r12, rax)
    p.cmp(rax, errno.EACCES)
    p.je("next path")
    p.label("no command")
    if command.own_init:  # we are PID 1, and cannot exit
        p.mov(edi, EXEC_FAILED)
        p.mov(esi, r12d)
        p.jmp("report and power off")
    else:
        p.mov(qword["exec error"], r12)
        p.system_call(abi.SYS_EXIT, 127)


def _fill(p: Program, relays: Sequence[Relay], ends: Sequence[Address], command: Command) -> None:
    """The relaying side: tell of the start, and fill the table of relays."""
    p.label("relaying side")
    if command.own_init:
        _await_init(p)
    else:
        p.mov(edi, EXEC_FAILED)
        p.mov(esi, dword["exec error"])
        p.test(esi, esi)
        p.jne("report and power off")
    p.mov(edi, STARTED)
    p.mov(esi, dword["command"])
    p.call("report")
    for end in dict.fromkeys(ends):
        p.system_call(abi.SYS_CLOSE, dword[end])
    for number, relay in enumerate(relays):
        row = at("relays") + number * ROW_LEN
        for field, variable in ((IN, relay.source), (OUT, relay.sink), (COMMAND_END, relay.end)):
            p.load(rax, dword[variable] if variable else FINISHED)
            p.mov(qword[row + field], rax)
        p.lea(rax, ptr[at("buffers") + number * BUFFER_LEN])
        p.mov(qword[row + BUFFER], rax)
    for pollfd, name in ((CONTROL_POLLFD, "control"), (CHILDREN_POLLFD, "children")):
        p.mov(eax, dword[name])
        p.mov(dword[at("polls") + pollfd], eax)
        p.mov(dword[at("polls") + pollfd + EVENTS], abi.POLLIN)


def _await_init(p: Program) -> None:
    """PID 1's child: wait until PID 1's execve has closed its end of the pipe."""
    p.mov(rax, qword["initial stack"])
    p.mov(rax, qword[rax + 8])
    p.mov(byte[rax], ord("@"))  # of argv[0]: systemd's shutdown spares who is marked so
    p.system_call(abi.SYS_SETSID)
    p.system_call(abi.SYS_CLOSE, dword[at("exec pipe") + 4])
    p.system_call(abi.SYS_READ, dword["exec pipe"], "digits", 1)
    p.mov(qword["command"], 1)


def _become(p: Program, user: User) -> None:
    """Take a user's ids, the last thing first that only root may do."""
    groups = struct.pack(f"<{len(user.groups)}I", *user.groups)
    for number, *arguments in (
        (abi.SYS_SETGROUPS, len(user.groups), p.constant(groups)),
        (abi.SYS_SETGID, user.gid),
        (abi.SYS_SETUID, user.uid),
    ):
        p.system_call(number, *arguments)
        p.mov(r12, rax)
        p.neg(r12)
        p.test(rax, rax)
        p.jne("no command")


def _loop(p: Program, relays: Sequence[Relay], command: Command) -> None:
    """Wait until something can be done, do it, and again; until the command has ended."""
    p.label("loop")
    p.xor(r13d, r13d)  # how many relays hold bytes
    _for_each_row(p, relays, "prepare")
    p.mov(rdx, -1)
    p.cmp(qword["ending"], 0)
    p.je("wait")
    # Every process is dead, so each pipe ends as soon as the host has taken what is in it. But one
    # that cannot die, waiting for a device, holds its pipe open: it gets LAST_WORDS_MS. Where the
    # others live on, their output is not this command's: what it wrote is in the pipes already.
    for number in range(1, len(relays)):
        p.cmp(qword[at("relays") + number * ROW_LEN + IN], FINISHED)
        p.jne("unfinished")
    p.jmp("end")
    p.label("unfinished")
    p.test(r13d, r13d)
    p.jne("wait")
    p.load(rdx, LAST_WORDS_MS if command.alone else 0)
    p.label("wait")
    p.system_call(abi.SYS_POLL, "polls", 2 + 2 * len(relays), rdx)
    p.test(rax, rax)
    p.je("end")
    p.js("loop")
    p.test(word[at("polls") + CONTROL_POLLFD + REVENTS], HUNG_UP)
    p.jne("end" if command.alone else "deserted")  # for PID 1, with the host its reason to go on
    p.test(word[at("polls") + CONTROL_POLLFD + REVENTS], abi.POLLIN)
    p.je("no record")
    p.call("read control")
    p.label("no record")
    p.test(word[at("polls") + CHILDREN_POLLFD + REVENTS], abi.POLLIN)
    p.je("no child")
    p.call("reap")
    p.label("no child")
    _for_each_row(p, relays, "pump")
    p.jmp("loop")
    if not command.alone:  # whoever asked for the command has gone; it is done in peace
        p.label("deserted")
        p.mov(dword[at("polls") + CONTROL_POLLFD], FINISHED)
        p.jmp("no record")


def _for_each_row(p: Program, relays: Sequence[Relay], routine: str) -> None:
    for number in range(len(relays)):
        p.lea(rbx, ptr[at("relays") + number * ROW_LEN])
        p.lea(r12, ptr[at("polls") + RELAY_POLLFDS + number * 2 * POLLFD_LEN])
        p.call(routine)


def _end(p: Program, command: Command) -> None:
    """Nothing is left to carry: end what still runs, report, power off."""
    p.label("end")
    if command.alone:
        p.system_call(abi.SYS_KILL, -1, abi.SIGKILL)
        if command.unsent_ms:
            p.call("await acknowledged")
        if command.sync:
            p.system_call(abi.SYS_SYNC)
    p.mov(edi, EXITED)
    p.mov(esi, dword["exit status"])
    p.label("report and power off")
    p.call("report")
    if command.await_goodbye:
        p.label("linger")
        p.mov(eax, dword["control"])
        p.mov(dword["control poll"], eax)
        p.mov(dword[at("control poll") + EVENTS], abi.POLLIN)
        p.system_call(abi.SYS_POLL, "control poll", 1, -1)
        p.test(word[at("control poll") + REVENTS], HUNG_UP)
        p.jne("power off")
        p.call("read control")
        p.jmp("linger")
    p.label("power off")
    if not command.alone:
        _leave(p)
        return
    magic = (abi.LINUX_REBOOT_MAGIC1, abi.LINUX_REBOOT_MAGIC2)
    p.system_call(abi.SYS_REBOOT, *magic, abi.LINUX_REBOOT_CMD_POWER_OFF, 0)
    p.call("nap")  # a board without power control; PID 1 must not exit
    p.jmp("power off")


def _leave(p: Program) -> None:
    """Exit as the command did, for PID 1 to tell: by its status, or its signal's 128 + N."""
    p.mov(eax, dword["exit status"])
    p.mov(edi, eax)
    p.shr(edi, 8)
    p.and_(eax, 0x7F)
    p.je("leave")
    p.lea(edi, ptr[rax + 128])
    p.label("leave")
    p.load(rax, abi.SYS_EXIT_GROUP)
    p.syscall()


def emit_failure(p: Program, index: int, says: str) -> None:
    """What follows step `index` when it fails, -errno in rax."""
    text = f"tinyvmm: cannot {says}: errno ".encode()
    p.mov(edi, index)
    p.lea(rsi, ptr[p.constant(text)])
    p.mov(edx, len(text))
    p.jmp("setup failed")


def _setup_failed(p: Program) -> None:
    """Tell the host on the control port, or if that is not open yet whoever sees the console."""
    p.label("setup failed")
    p.neg(eax)
    p.cmp(qword["control"], 0)
    p.jl("write to console")
    p.mov(esi, edi)
    p.shl(esi, 16)
    p.or_(esi, eax)
    p.mov(edi, SETUP_FAILED)
    p.jmp("report and power off")

    p.label("write to console")
    p.mov(r12, rsi)
    p.mov(r13d, edx)
    p.mov(ecx, 10)
    for place in (2, 1, 0):  # errno has at most three digits
        p.xor(edx, edx)
        p.div(ecx)
        p.add(dl, ord("0"))
        p.mov(byte[at("digits") + place], dl)
    p.mov(byte[at("digits") + 3], ord("\n"))
    mode = abi.O_WRONLY | abi.O_NOCTTY
    p.system_call(abi.SYS_OPEN, p.string("/dev/console"), mode)
    p.mov(rbx, rax)
    p.system_call(abi.SYS_WRITE, rbx, r12, r13)
    p.system_call(abi.SYS_WRITE, rbx, "digits", 4)
    p.jmp("power off")


def _prepare(p: Program) -> None:
    """Row rbx says in its struct pollfds, r12, what it waits for; r13 counts rows with bytes."""
    p.label("prepare")
    p.mov(dword[r12], -1)  # poll passes over negative descriptors
    p.mov(dword[r12 + EVENTS], 0)
    p.mov(dword[r12 + POLLFD_LEN], -1)
    p.mov(dword[r12 + POLLFD_LEN + EVENTS], 0)
    p.cmp(qword[rbx + IN], FINISHED)
    p.je("prepared")
    p.mov(eax, dword[rbx + OUT])  # asked for nothing, it still says if its reader has gone
    p.mov(dword[r12 + POLLFD_LEN], eax)
    p.mov(rax, qword[rbx + POSITION])
    p.cmp(rax, qword[rbx + LENGTH])
    p.jne("prepare to write")
    p.mov(eax, dword[rbx + IN])
    p.mov(dword[r12], eax)
    p.mov(dword[r12 + EVENTS], abi.POLLIN)
    p.ret()
    p.label("prepare to write")
    p.mov(dword[r12 + POLLFD_LEN + EVENTS], abi.POLLOUT)
    p.inc(r13d)
    p.label("prepared")
    p.ret()


def _pump(p: Program) -> None:
    """Row rbx reads if its buffer is empty, then writes what it can: once, to be fair to others."""
    p.label("pump")
    p.cmp(qword[rbx + IN], FINISHED)
    p.je("pumped")
    p.test(word[r12 + POLLFD_LEN + REVENTS], HUNG_UP)
    p.jne("finish")
    p.mov(ax, word[r12 + REVENTS])
    p.or_(ax, word[r12 + POLLFD_LEN + REVENTS])
    p.je("pumped")
    p.mov(rax, qword[rbx + POSITION])
    p.cmp(rax, qword[rbx + LENGTH])
    p.jne("write")
    p.system_call(abi.SYS_READ, qword[rbx + IN], qword[rbx + BUFFER], BUFFER_LEN)
    p.cmp(rax, -errno.EAGAIN)
    p.je("pumped")
    p.test(rax, rax)
    p.jle("finish")  # its end; or EIO, which is how the master side says that nobody has a terminal
    p.mov(qword[rbx + LENGTH], rax)
    p.mov(qword[rbx + POSITION], 0)
    p.label("write")
    p.mov(rsi, qword[rbx + BUFFER])
    p.add(rsi, qword[rbx + POSITION])
    p.mov(rdx, qword[rbx + LENGTH])
    p.sub(rdx, qword[rbx + POSITION])
    p.system_call(abi.SYS_WRITE, qword[rbx + OUT], rsi, rdx)
    p.cmp(rax, -errno.EAGAIN)
    p.je("pumped")
    p.test(rax, rax)
    p.js("finish")
    p.add(qword[rbx + POSITION], rax)
    p.label("pumped")
    p.ret()


def _finish(p: Program) -> None:
    """Row rbx is done, and the command learns it: end of its input, or nobody reads its output."""
    p.label("finish")
    p.mov(qword[rbx + IN], FINISHED)
    p.mov(qword[rbx + POSITION], 0)
    p.mov(qword[rbx + LENGTH], 0)
    p.system_call(abi.SYS_CLOSE, qword[rbx + COMMAND_END])
    p.mov(qword[rbx + COMMAND_END], FINISHED)
    p.ret()


def _reap(p: Program, command: Command) -> None:
    """Every child that has ended: the command, programs of EXECUTE, and PID 1's orphans."""
    p.label("reap")
    p.system_call(abi.SYS_READ, qword["children"], "siginfo", SIGNALFD_SIGINFO_LEN)
    p.label("next child")
    p.system_call(abi.SYS_WAIT4, -1, "wait status", abi.WNOHANG, 0)
    p.test(rax, rax)
    p.jle("reaped")
    p.cmp(rax, qword["command"])
    p.jne("executed has ended" if command.alone else "next child")
    p.mov(eax, dword["wait status"])
    p.mov(dword["exit status"], eax)
    p.mov(qword["ending"], 1)
    if command.alone:
        p.system_call(abi.SYS_KILL, -1, abi.SIGKILL)
    p.lea(rbx, ptr["relays"])
    p.call("finish")  # the first row: nobody is left to read stdin
    p.jmp("next child")
    p.label("reaped")
    p.ret()


def _read_control(p: Program, command: Command) -> None:
    """Read what is missing of a record from the host; when it is whole, do as it says."""
    terminal = command.terminal
    p.label("read control")
    if command.alone:
        p.cmp(qword["program left"], 0)
        p.jne("read program")
    p.lea(rsi, ptr["incoming"])
    p.add(rsi, qword["incoming len"])
    p.mov(rdx, RECORD_LEN)
    p.sub(rdx, qword["incoming len"])
    p.system_call(abi.SYS_READ, qword["control"], rsi, rdx)
    p.test(rax, rax)
    p.jle("obeyed" if command.alone else "nothing read")
    p.add(qword["incoming len"], rax)
    p.cmp(qword["incoming len"], RECORD_LEN)
    p.jne("obeyed")
    p.mov(qword["incoming len"], 0)
    p.mov(eax, dword["incoming"])
    p.cmp(eax, GOODBYE)
    p.je("power off")
    p.cmp(eax, SIGNAL)
    p.je("signal")
    if command.alone:
        p.cmp(eax, EXECUTE)
        p.je("execute")
    if terminal:
        p.cmp(eax, WINSIZE)
        p.jne("obeyed")
        p.mov(eax, dword[at("incoming") + 4])  # already laid out as ws_row and ws_col
        p.mov(dword["winsize"], eax)
        p.system_call(abi.SYS_IOCTL, qword["master"], abi.TIOCSWINSZ, "winsize")
    p.label("obeyed")
    p.ret()
    if not command.alone:  # a socket's end: no hang-up, and yet whoever asked has gone
        p.label("nothing read")
        p.jl("obeyed")
        p.mov(dword[at("polls") + CONTROL_POLLFD], FINISHED)
        p.ret()

    p.label("signal")
    p.mov(edi, dword["command"])
    # An init alone says what a signal means; an idle process may not have a group yet.
    if command.own_init or command.idle:
        p.system_call(abi.SYS_KILL, rdi, dword[at("incoming") + 4])
        p.ret()
        return
    if terminal:  # to the group in the foreground, as a key would; the command's if there is none
        p.mov(dword["foreground"], edi)
        p.system_call(abi.SYS_IOCTL, qword["master"], abi.TIOCGPGRP, "foreground")
        p.mov(edi, dword["foreground"])
    p.neg(rdi)
    p.system_call(abi.SYS_KILL, rdi, dword[at("incoming") + 4])
    p.ret()
