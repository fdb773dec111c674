"""Before PID 1 says goodbye: wait for what closed TCP connections have still to send.

A program writes, closes and ends, and Linux goes on sending for it. In a machine that ends with its
command nobody would: so PID 1, which has ended every process by then, asks /proc/net/tcp (and tcp6)
whether a connection is in a state in which bytes, if only the closing FIN, have not been
acknowledged: FIN_WAIT1, CLOSING or LAST_ACK (RFC 9293, section 3.3.2). It asks again after 1 ms, 2,
4 and so on until there is none.

It is a courtesy with an end: a peer that never acknowledges, a host that has gone, a signal from
the host or an interrupt key at the terminal each end the wait, and the command's status stands.
Loopback is no case of its own: there both ends have been closed, which settles it at once.

Each function appends one routine; they may change any register.
"""

from tinyvmm.guest import abi
from tinyvmm.guest.asm import (
    at,
    byte,
    dword,
    eax,
    ebx,
    ptr,
    r12,
    r14,
    r14d,
    r15d,
    rax,
    rdi,
    rdx,
    rsi,
    word,
)
from tinyvmm.guest.elf import Program
from tinyvmm.guest.protocol import SIGNAL
from tinyvmm.guest.report import EVENTS, HUNG_UP, POLLFD_LEN, REVENTS

LONGEST_NAP_MS = 50
INTERRUPT = 3  # Ctrl-C: c_cc[VINTR] as every terminal begins
TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
# The column `st` (net/ipv4/tcp_ipv4.c, get_tcp4_sock; tcp_ipv6.c) is two hexadecimal digits, and
# the only one of two that begins with 0: a look for it needs no count of columns.
UNSENT = tuple(
    int.from_bytes(b" %02X " % state, "little")
    for state in (abi.TCP_FIN_WAIT1, abi.TCP_LAST_ACK, abi.TCP_CLOSING)
)
# More than the kernel's page, of which a read gives whole lines (fs/seq_file.c, seq_read_iter).
PIECE_LEN = 1 << 13


def emit(p: Program, patience_ms: int, *, terminal: bool) -> None:
    """The routine `await acknowledged`, which takes about `patience_ms` at most."""
    p.variable("tail polls", 2 * POLLFD_LEN)
    p.variable("tail piece", PIECE_LEN)
    _await_acknowledged(p, patience_ms, terminal=terminal)
    _look_for_unsent(p)
    if terminal:
        _read_keys(p)


def _await_acknowledged(p: Program, patience_ms: int, *, terminal: bool) -> None:
    """Every process has been killed: wait until all are gone, and their connections done."""
    p.label("await acknowledged")
    for number, name in enumerate(("control", "stdin port")[: 1 + terminal]):
        pollfd = at("tail polls") + number * POLLFD_LEN
        p.mov(eax, dword[name])
        p.mov(dword[pollfd], eax)
        p.mov(dword[pollfd + EVENTS], abi.POLLIN)
    p.mov(dword["incoming"], 0)
    p.mov(r14d, 1)
    p.mov(r15d, patience_ms)

    p.label("ask tcp")
    p.call("reap")
    p.test(rax, rax)  # 0 if there are children yet, whose connections are not closed
    p.je("not acknowledged")
    for table in TABLES:
        p.lea(rdi, ptr[p.string(table)])
        p.call("look for unsent")
        p.test(ebx, ebx)
        p.jne("not acknowledged")
    p.label("acknowledged")
    p.ret()

    p.label("not acknowledged")
    p.cmp(r15d, 0)
    p.jle("acknowledged")
    p.system_call(abi.SYS_POLL, "tail polls", 1 + terminal, r14)
    p.sub(r15d, r14d)
    p.shl(r14d, 1)
    p.cmp(r14d, LONGEST_NAP_MS)
    p.jbe("looked at the host")
    p.mov(r14d, LONGEST_NAP_MS)
    p.label("looked at the host")
    p.test(word[at("tail polls") + REVENTS], HUNG_UP)
    p.jne("acknowledged")
    p.test(word[at("tail polls") + REVENTS], abi.POLLIN)
    p.je("nothing said")
    p.call("read control")
    p.cmp(dword["incoming"], SIGNAL)
    p.je("acknowledged")
    p.label("nothing said")
    if terminal:
        p.call("read keys")
        p.test(ebx, ebx)
        p.jne("acknowledged")
    p.jmp("ask tcp")


def _look_for_unsent(p: Program) -> None:
    """Say in ebx whether the table at path rdi has a connection with something to send."""
    p.label("look for unsent")
    p.xor(ebx, ebx)
    p.system_call(abi.SYS_OPEN, rdi, abi.O_RDONLY | abi.O_CLOEXEC)
    p.test(rax, rax)
    p.js("looked")  # no IPv6, or no /proc any more
    p.mov(r12, rax)
    p.label("read table")
    p.system_call(abi.SYS_READ, r12, "tail piece", PIECE_LEN)
    p.test(rax, rax)
    p.jle("close table")
    p.lea(rsi, ptr["tail piece"])
    p.lea(rdx, ptr[rsi + rax - 3])
    p.label("next place")
    p.cmp(rsi, rdx)
    p.jae("read table")
    p.mov(eax, dword[rsi])
    p.add(rsi, 1)
    for state in UNSENT:
        p.cmp(eax, state)
        p.je("unsent")
    p.jmp("next place")
    p.label("unsent")
    p.mov(ebx, 1)
    p.label("close table")
    p.system_call(abi.SYS_CLOSE, r12)
    p.label("looked")
    p.ret()


def _read_keys(p: Program) -> None:
    """Say in ebx whether the interrupt key is among what was typed; nobody else reads it now."""
    p.label("read keys")
    p.xor(ebx, ebx)
    stdin = at("tail polls") + POLLFD_LEN
    p.test(word[stdin + REVENTS], HUNG_UP)
    p.je("keys may come")
    p.mov(dword[stdin], -1)
    p.label("keys may come")
    p.test(word[stdin + REVENTS], abi.POLLIN)
    p.je("keys read")
    p.system_call(abi.SYS_READ, dword["stdin port"], "tail piece", PIECE_LEN)
    p.test(rax, rax)
    p.jle("keys read")
    p.lea(rsi, ptr["tail piece"])
    p.lea(rdx, ptr[rsi + rax])
    p.label("next key")
    p.cmp(byte[rsi], INTERRUPT)
    p.je("interrupted")
    p.add(rsi, 1)
    p.cmp(rsi, rdx)
    p.jb("next key")
    p.label("keys read")
    p.ret()
    p.label("interrupted")
    p.mov(ebx, 1)
    p.ret()
