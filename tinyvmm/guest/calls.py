"""System calls from afar: a program that PID 1 is sent, and that calls the kernel for the host.

`build_calls` makes a static executable that

1. inserts the kernel's vsock modules, which it brings along, if nobody has yet;
2. connects once to a port of the host, and maps `ARENA_LEN` bytes at the address `ARENA`, for what
   the calls' arguments point to;
3. reads a request, makes its system call, answers; and again, until the host hangs up.

    request   REQUEST, then in_len bytes, which go to the beginning of the arena
    answer    ANSWER, then out_len bytes of the arena, from out_offset

A request holds the call's number and its six arguments as the kernel takes them, so a pointer is
`ARENA` and an offset. Bit N of `flags` says that argument N is the number of a slot: one of `SLOTS`
places that keep results. Each result goes to slot `into`; so an open(2) and what is done with its
descriptor can be sent at once, without waiting for the answers in between; where the first failed,
the rest is given -errno for a descriptor, which is EBADF. out_len is out_max, or 0 if the call
failed; with `OUT_IS_RESULT` the result if that is less: what read(2) read.

What the program can do, root of the guest can. It believes the host, as all of the guest must; the
host's side, guest_calls.py, does not believe the guest. If it cannot connect it exits with errno.
"""

from collections.abc import Sequence
from struct import Struct

from tinyvmm.guest import abi
from tinyvmm.guest.asm import at, dword, eax, edi, edx, ptr, qword, rax, rbx, rcx, rdx, rsi, word
from tinyvmm.guest.elf import ARGUMENTS, Program
from tinyvmm.guest.execution import connect_steps, module_steps
from tinyvmm.guest.steps import Step, emit_step

ARENA = 0x10_0000_0000
ARENA_LEN = 1 << 18
SLOTS = 64
REQUEST = Struct("<Q6QIIIHH")
"""number, six arguments, in_len, out_offset, out_max, flags, into"""
ANSWER = Struct("<qQ")
"""the result or -errno, out_len"""
OUT_IS_RESULT = 1 << 15

_ARGUMENT, _IN_LEN, _OUT_OFFSET, _OUT_MAX, _FLAGS, _INTO = 8, 56, 60, 64, 68, 70
_IOVEC_LEN = 16  # struct iovec: base, length


def build_calls(address: bytes, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The executable; `address` and `modules` are as in execution.Execution."""
    p = Program()
    for name, size in (
        ("socket", 8),
        ("request", REQUEST.size),
        ("slots", 8 * SLOTS),
        ("answer", ANSWER.size),
        ("iovecs", 2 * _IOVEC_LEN),
    ):
        p.variable(name, size)
    p.label("_start")
    for index, step in enumerate(_steps(address, modules)):
        emit_step(p, index, step)
    _receive_request(p)
    _call(p)
    _answer(p)
    _ends(p)
    return p.link()


def _steps(address: bytes, modules: Sequence[tuple[str, bytes]]) -> list[Step]:
    rights, flags = abi.PROT_READ | abi.PROT_WRITE, abi.MAP_PRIVATE | abi.MAP_ANONYMOUS
    arena = (ARENA, ARENA_LEN, rights, flags | abi.MAP_FIXED, -1, 0)
    return [
        *module_steps(modules),
        *connect_steps("the host", "socket", address),
        Step("map the arena", abi.SYS_MMAP, arena),
        Step("set the umask", abi.SYS_UMASK, (0,)),  # modes are the host's business
    ]


def _receive_request(p: Program) -> None:
    p.label("next request")
    p.lea(rsi, ptr["request"])
    p.mov(edx, REQUEST.size)
    p.call("receive")
    p.load(rsi, ARENA)
    p.mov(edx, dword[at("request") + _IN_LEN])
    p.cmp(edx, ARENA_LEN)
    p.ja("leave")
    p.call("receive")


def _call(p: Program) -> None:
    """Take arguments from slots, make the call, and keep its result: in rbx, and in a slot."""
    for number in range(len(ARGUMENTS)):
        argument, plain = qword[at("request") + _ARGUMENT * (number + 1)], f"plain {number}"
        p.test(word[at("request") + _FLAGS], 1 << number)
        p.je(plain)
        p.mov(eax, dword[argument.address])
        p.and_(eax, SLOTS - 1)
        p.lea(rcx, ptr["slots"])
        p.mov(rax, qword[rcx + rax * 8])
        p.mov(argument, rax)
        p.label(plain)
    for number, register in enumerate(ARGUMENTS):
        p.mov(register, qword[at("request") + _ARGUMENT * (number + 1)])
    p.mov(rax, qword["request"])
    p.syscall()
    p.mov(rbx, rax)
    p.movzx(eax, word[at("request") + _INTO])
    p.and_(eax, SLOTS - 1)
    p.lea(rcx, ptr["slots"])
    p.mov(qword[rcx + rax * 8], rbx)


def _answer(p: Program) -> None:
    """One writev(2), which on a blocking stream takes all, or the host has gone."""
    p.xor(edx, edx)
    p.test(rbx, rbx)
    p.js("answer sized")
    p.mov(edx, dword[at("request") + _OUT_MAX])
    p.test(word[at("request") + _FLAGS], OUT_IS_RESULT)
    p.je("answer sized")
    p.cmp(rdx, rbx)
    p.jbe("answer sized")
    p.mov(rdx, rbx)
    p.label("answer sized")
    p.mov(qword["answer"], rbx)
    p.mov(qword[at("answer") + 8], rdx)
    p.lea(rax, ptr["answer"])
    p.mov(qword["iovecs"], rax)
    p.mov(qword[at("iovecs") + 8], ANSWER.size)
    p.load(rax, ARENA)
    p.mov(rcx, rax)
    p.mov(eax, dword[at("request") + _OUT_OFFSET])
    p.add(rcx, rax)
    p.mov(qword[at("iovecs") + _IOVEC_LEN], rcx)
    p.mov(qword[at("iovecs") + _IOVEC_LEN + 8], rdx)
    p.lea(rbx, ptr[rdx + ANSWER.size])
    p.system_call(abi.SYS_WRITEV, qword["socket"], "iovecs", 2)
    p.cmp(rax, rbx)
    p.je("next request")


def _ends(p: Program) -> None:
    p.label("leave")
    p.xor(edi, edi)
    p.label("exit")
    p.load(rax, abi.SYS_EXIT_GROUP)
    p.syscall()

    p.label("setup failed")  # -errno in eax: steps.py
    p.neg(eax)
    p.mov(edi, eax)
    p.jmp("exit")

    p.label("receive")  # edx bytes to rsi
    p.test(edx, edx)
    p.je("received")
    p.system_call(abi.SYS_READ, qword["socket"], rsi, rdx)
    p.test(rax, rax)
    p.jle("leave")
    p.add(rsi, rax)
    p.sub(rdx, rax)
    p.jmp("receive")
    p.label("received")
    p.ret()
