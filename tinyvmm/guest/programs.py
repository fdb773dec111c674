"""Programs that PID 1 is sent and starts: how one more command gets into a guest that runs.

A request is a program. The host builds a static executable, as it built PID 1, and sends it down
the control port behind an EXECUTE record; PID 1 keeps it in a file without a name (memfd_create(2))
and starts it, and tells of its start and its end. So the guest's root needs nothing for this,
neither a shell nor a libc, and PID 1 knows nothing of commands, environments and terminals:
execution.py says what such a program does.

Each function appends a part that relay.py jumps to.
"""

import errno

from tinyvmm.guest import abi
from tinyvmm.guest.asm import at, byte, dword, eax, edi, esi, ptr, qword, rax, rdi, rdx
from tinyvmm.guest.elf import Program
from tinyvmm.guest.protocol import ENDED, ENDED_STATUS, EXECUTED

PID_MAX_LIMIT = 1 << 22  # <linux/threads.h>
PIECE_LEN = 1 << 15  # what is read of a program at once
VARIABLES = {
    "program left": 8,  # bytes of it still to come
    "program": 8,  # its file; negative if it could not be made
    "program piece": PIECE_LEN,
    "executed pids": PID_MAX_LIMIT,  # by process id; memory that nobody touches costs nothing
}


def emit(p: Program) -> None:
    """Receive and start programs, and tell of their ends; each part is jumped to by relay.py."""
    for name, size in VARIABLES.items():
        p.variable(name, size)
    _execute(p)
    _read_program(p)
    _start_program(p)
    _ended(p)


def _execute(p: Program) -> None:
    """An EXECUTE record: the program follows."""
    p.label("execute")
    p.mov(eax, dword[at("incoming") + 4])
    p.mov(qword["program left"], rax)
    p.system_call(abi.SYS_MEMFD_CREATE, p.string("tinyvmm-exec"), abi.MFD_CLOEXEC)
    p.mov(qword["program"], rax)
    p.ret()


def _read_program(p: Program) -> None:
    """What has come of the program goes to its file; what it has no file or room for, nowhere."""
    p.label("read program")
    p.mov(rdx, qword["program left"])
    p.cmp(rdx, PIECE_LEN)
    p.jbe("piece sized")
    p.mov(rdx, PIECE_LEN)
    p.label("piece sized")
    p.system_call(abi.SYS_READ, qword["control"], "program piece", rdx)
    p.test(rax, rax)
    p.jle("program read")
    p.sub(qword["program left"], rax)
    p.cmp(qword["program"], 0)
    p.jl("piece written")
    p.system_call(abi.SYS_WRITE, qword["program"], "program piece", rax)
    p.test(rax, rax)  # memory takes all of it or none
    p.jns("piece written")
    p.push(rax)
    p.system_call(abi.SYS_CLOSE, qword["program"])
    p.pop(rax)
    p.mov(qword["program"], rax)
    p.label("piece written")
    p.cmp(qword["program left"], 0)
    p.je("start program")
    p.label("program read")
    p.ret()


def _start_program(p: Program) -> None:
    """All of it is there."""
    p.label("start program")
    p.mov(rax, qword["program"])
    p.test(rax, rax)
    p.js("tell executed")
    p.mov(rax, -errno.ESRCH)
    p.cmp(qword["ending"], 0)  # PID 1's command has ended, and with it everything
    p.jne("close program")
    p.mov(qword["exec error"], 0)
    p.system_call(abi.SYS_VFORK)
    p.test(rax, rax)
    p.je("program's process")
    p.js("close program")
    p.lea(rdi, ptr["executed pids"])
    p.add(rdi, rax)
    p.mov(byte[rdi], 1)
    p.cmp(qword["exec error"], 0)
    p.je("close program")
    p.mov(byte[rdi], 0)
    p.mov(rax, qword["exec error"])
    p.label("close program")
    p.push(rax)
    p.system_call(abi.SYS_CLOSE, qword["program"])
    p.pop(rax)
    p.label("tell executed")
    p.mov(edi, EXECUTED)
    p.mov(esi, eax)
    p.call("report")
    p.ret()

    p.label("program's process")
    argv, nothing = p.strings(["tinyvmm-exec"]), p.strings([])
    empty, flags = p.string(""), abi.AT_EMPTY_PATH
    p.system_call(abi.SYS_SETSID)
    p.system_call(abi.SYS_EXECVEAT, qword["program"], empty, argv, nothing, flags)
    p.mov(qword["exec error"], rax)
    p.system_call(abi.SYS_EXIT, 127)


def _ended(p: Program) -> None:
    """Process rax has ended, and it is not PID 1's command."""
    p.label("executed has ended")
    p.lea(rdi, ptr["executed pids"])
    p.add(rdi, rax)
    p.cmp(byte[rdi], 0)
    p.je("next child")
    p.mov(byte[rdi], 0)
    p.mov(edi, ENDED)
    p.mov(esi, eax)
    p.call("report")
    p.mov(edi, ENDED_STATUS)
    p.mov(esi, dword["wait status"])
    p.call("report")
    p.jmp("next child")
