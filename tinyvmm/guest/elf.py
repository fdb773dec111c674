r"""A program assembled in Python becomes a static ELF executable.

    p = Program()
    p.label("_start")
    p.system_call(SYS_WRITE, 1, p.string("hello\n"), 6)
    p.system_call(SYS_EXIT, 0)
    executable = p.link()

The file has two loadable segments: what was assembled (code and constants, read and execute) and,
after it, zeroed memory for variables (read and write, nothing in the file). Layouts follow the
System V ABI ("ELF-64 Object File Format") and <elf.h>; system calls the x86-64 psABI, appendix
A.2: the number in rax, arguments in rdi, rsi, rdx, r10, r8, r9, the result in rax, rcx and r11
lost.
"""

import struct
from collections.abc import Sequence
from typing import TypeAlias

from tinyvmm.guest.asm import (
    Assembler,
    Memory,
    Register,
    eax,
    edi,
    edx,
    esi,
    ptr,
    r8,
    r8d,
    r9,
    r9d,
    r10,
    r10d,
    rax,
    rdi,
    rdx,
    rsi,
)

BASE = 0x40_0000  # where a static executable customarily starts
PAGE = 0x1000
HEADERS_LEN = 64 + 2 * 56  # Elf64_Ehdr and two Elf64_Phdr
PT_LOAD = 1
PF_X, PF_W, PF_R = 1 << 0, 1 << 1, 1 << 2
ET_EXEC, EM_X86_64, EV_CURRENT = 2, 62, 1

ARGUMENTS = (rdi, rsi, rdx, r10, r8, r9)
_LOW_HALVES = {
    rax: eax,
    rdi: edi,
    rsi: esi,
    rdx: edx,
    r10: r10d,
    r8: r8d,
    r9: r9d,
}

Argument: TypeAlias = "int | str | Register | Memory"


class Program(Assembler):
    """An assembler with constants, variables and system calls; `link` gives the executable."""

    def __init__(self) -> None:
        super().__init__(origin=BASE + HEADERS_LEN)
        self._constants: dict[bytes, str] = {}
        self._arrays: list[tuple[str, list[str]]] = []
        self._variables: list[tuple[str, int]] = []

    def constant(self, data: bytes) -> str:
        """The label of read-only `data`; equal data is kept once."""
        return self._constants.setdefault(data, f"constant {len(self._constants)}")

    def string(self, text: str | bytes) -> str:
        """The label of a NUL-terminated string. Raises ValueError for an embedded NUL."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        if b"\0" in data:
            raise ValueError(f"a C string cannot hold a NUL: {text!r}")
        return self.constant(data + b"\0")

    def strings(self, texts: Sequence[str | bytes]) -> str:
        """The label of a NULL-terminated array of pointers to strings, as execve wants."""
        label = f"array {len(self._arrays)}"
        self._arrays.append((label, [self.string(text) for text in texts]))
        return label

    def variable(self, name: str, size: int = 8) -> str:
        """Reserve `size` zeroed, writable bytes under the label `name`."""
        self._variables.append((name, size))
        return name

    def load(self, register: Register, value: Argument) -> None:
        """Put an integer, a label's address, a register or memory into a 64-bit register."""
        if isinstance(value, str):
            self.lea(register, ptr[value])
        elif isinstance(value, Register):
            if value is not register:
                self.mov(register, value)
        elif isinstance(value, Memory) and value.size == 4:
            self.mov(_LOW_HALVES[register], value)  # clears the upper half
        elif value == 0:
            self.xor(_LOW_HALVES[register], _LOW_HALVES[register])
        else:
            self.mov(register, value)

    def system_call(self, number: int, *arguments: Argument) -> None:
        """Load the arguments from left to right, then call; the result or -errno is in rax."""
        for register, argument in zip(ARGUMENTS, arguments, strict=False):
            self.load(register, argument)
        self.load(rax, number)
        self.syscall()

    def link(self, entry: str = "_start") -> bytes:
        """The executable. Raises ValueError for labels used but not defined."""
        for label, strings in self._arrays:
            self.align(8)
            self.label(label)
            for string in strings:
                self.address_of(string)
            self.data(bytes(8))
        for data, label in self._constants.items():
            self.align(8)
            self.label(label)
            self.data(data)
        self._arrays.clear()
        self._constants.clear()
        image_len = self.here - BASE
        variables = end = BASE + -(-image_len // PAGE) * PAGE
        for name, size in self._variables:
            self.define(name, end)
            end += -(-size // 8) * 8
        image = self.assemble()
        return b"".join(
            (
                _file_header(self.labels[entry]),
                _program_header(PF_R | PF_X, BASE, image_len, image_len),
                _program_header(PF_R | PF_W, variables, 0, end - variables),
                image,
            )
        )


def _file_header(entry: int) -> bytes:
    """Elf64_Ehdr: 64-bit, little-endian, no sections."""
    identification = b"\x7fELF" + bytes([2, 1, EV_CURRENT]) + bytes(9)
    sizes = (64, 56, 2, 0, 0, 0)  # e_ehsize, e_phentsize, e_phnum, no sections
    return identification + struct.pack(
        "<HHIQQQI6H", ET_EXEC, EM_X86_64, EV_CURRENT, entry, 64, 0, 0, *sizes
    )


def _program_header(flags: int, vaddr: int, filesz: int, memsz: int) -> bytes:
    """Elf64_Phdr: both segments start at file offset 0; the second takes nothing from it."""
    return struct.pack("<IIQQQQQQ", PT_LOAD, flags, 0, vaddr, vaddr, filesz, memsz, PAGE)
