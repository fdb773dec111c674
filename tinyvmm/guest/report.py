"""How PID 1 speaks to the host: routines that write a record to the control port, or wait for it.

Each function appends what it is called after. A routine takes its arguments where a system call
would (edi, esi, edx) and may change any register but r12 to r15; `await host` changes rbx as well.
"""

import errno
import struct

from tinyvmm.guest import abi
from tinyvmm.guest.asm import at, dword, eax, ebx, edi, edx, esi, qword, rax, rdx, word
from tinyvmm.guest.elf import Program
from tinyvmm.guest.protocol import RECORD_LEN

# struct pollfd: int fd; short events, revents
EVENTS, REVENTS, POLLFD_LEN = 4, 6, 8
HUNG_UP = abi.POLLERR | abi.POLLHUP | abi.POLLNVAL

NAP_NS = 1_000_000
PATIENCE_NAPS = 30_000  # for the host to open the control port


def emit(p: Program) -> None:
    """All routines below."""
    p.variable("record", RECORD_LEN)
    p.variable("control poll", POLLFD_LEN)
    _report(p)
    _await_host(p)


def _report(p: Program) -> None:
    """Write the record edi, esi to the host, waiting for room as long as it is there."""
    p.label("report")
    p.mov(dword["record"], edi)
    p.mov(dword[at("record") + 4], esi)
    p.label("write record")
    p.system_call(abi.SYS_WRITE, qword["control"], "record", RECORD_LEN)
    p.cmp(rax, -errno.EAGAIN)
    p.jne("reported")
    p.mov(rdx, -1)
    p.call("poll control")
    p.test(word[at("control poll") + REVENTS], HUNG_UP)
    p.je("write record")
    p.label("reported")
    p.ret()

    p.label("poll control")  # until it can be written to, or for edx milliseconds
    p.mov(eax, dword["control"])
    p.mov(dword["control poll"], eax)
    p.mov(dword[at("control poll") + EVENTS], abi.POLLOUT)
    p.system_call(abi.SYS_POLL, "control poll", 1, rdx)
    p.ret()


def _await_host(p: Program) -> None:
    """Wait until the host has opened the control port, which it does after the other three.

    A port appears before the message that the host has it open; read too early, an open stdin
    would look ended. Messages arrive in order, so the control port's speaks for all.
    """
    p.label("await host")
    p.mov(ebx, PATIENCE_NAPS)
    p.label("ask host")
    p.xor(edx, edx)
    p.call("poll control")
    p.test(word[at("control poll") + REVENTS], HUNG_UP)
    p.je("reported")
    p.call("nap")
    p.dec(ebx)
    p.jns("ask host")
    p.jmp("power off")

    p.label("nap")
    p.system_call(abi.SYS_NANOSLEEP, p.constant(struct.pack("<QQ", 0, NAP_NS)), 0)
    p.ret()
