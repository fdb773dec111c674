"""A small assembler for x86-64: enough of it to write PID 1 and test guests in Python.

One method per instruction, destination first, as in Intel's manual (volume 2, where each opcode
below is found). Operands are registers, integers, labels (strings) and memory:

    a = Assembler()
    a.label("copy")
    a.mov(al, byte[rsi + rcx])
    a.mov(byte[rdi + rcx * 1 + 8], al)
    a.cmp(qword["count"], 0)         # a label is addressed relative to RIP
    a.jne("copy")                    # labels may be used before they are defined
    code = a.assemble()

How to read it: operands first, then the encoder (prefixes, opcode, ModRM, SIB, displacement,
immediate: one function, `_instruction`), then the instructions as a table in the class body, each
made by the function for its group. Where Intel leaves a choice the encoding is the one GNU as takes
in 64-bit mode, except that a jump to a label not yet seen is always the long form.

`bits` is 64, 32 or 16: the mode the processor will be in. In 16-bit mode memory is addressed by
a constant or a label only.
"""

import struct
from collections.abc import Callable
from typing import TypeAlias


class Register:
    """A general register: `size` in bytes, `code` as encoded (8 to 15 need a REX prefix)."""

    __slots__ = ("code", "name", "size")

    def __init__(self, name: str, code: int, size: int) -> None:
        self.name, self.code, self.size = name, code, size

    def __add__(self, other: "int | Register | Address") -> "Address":
        return Address(base=self) + other

    def __sub__(self, disp: int) -> "Address":
        return Address(base=self, disp=-disp)

    def __mul__(self, scale: int) -> "Address":
        return Address(index=self, scale=scale)

    def __repr__(self) -> str:
        return self.name


class Address:
    """An effective address: base + index * scale + disp, or a label + disp."""

    __slots__ = ("base", "disp", "index", "label", "scale")

    def __init__(
        self,
        base: Register | None = None,
        index: Register | None = None,
        scale: int = 1,
        disp: int = 0,
        label: str | None = None,
    ) -> None:
        if scale not in {1, 2, 4, 8}:
            raise ValueError(f"scale is 1, 2, 4 or 8, not {scale}")
        if index is not None and index.code == 4:
            raise ValueError(f"{index} cannot be an index")
        self.base, self.index, self.scale, self.disp, self.label = base, index, scale, disp, label

    def __add__(self, other: "int | Register | Address") -> "Address":
        if isinstance(other, int):
            return Address(self.base, self.index, self.scale, self.disp + other, self.label)
        if isinstance(other, Register):
            other = Address(base=other)
        if self.base and other.base and not self.index and not other.index:
            other = Address(index=other.base, disp=other.disp)
        if (self.base and other.base) or (self.index and other.index):
            raise ValueError("an address has one base and one index")
        index = self if self.index else other
        disp = self.disp + other.disp
        return Address(self.base or other.base, index.index, index.scale, disp)

    def __sub__(self, disp: int) -> "Address":
        return self + -disp


class Memory:
    """Memory of `size` bytes (0: whatever the other operand says) at an address."""

    __slots__ = ("address", "size")

    def __init__(self, address: Address, size: int) -> None:
        self.address, self.size = address, size


class _Sized:
    """`qword[rax + 8]`: the memory operand of that size there."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, where: Address | Register | str | int) -> Memory:
        if isinstance(where, Register):
            where = Address(base=where)
        elif isinstance(where, str):
            where = Address(label=where)
        elif isinstance(where, int):
            where = Address(disp=where)
        return Memory(where, self.size)


def _registers(names: str, size: int) -> list[Register]:
    return [Register(name, code, size) for code, name in enumerate(names.split())]


ptr, byte, word, dword, qword = (_Sized(size) for size in (0, 1, 2, 4, 8))


def at(label: str) -> Address:
    """The address of a label, to add to: `qword[at("table") + 8]`."""
    return Address(label=label)


# fmt: off
rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 = _registers(
    "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15", 8)
eax, ecx, edx, ebx, esp, ebp, esi, edi, r8d, r9d, r10d, r11d, r12d, r13d, r14d, r15d = _registers(
    "eax ecx edx ebx esp ebp esi edi r8d r9d r10d r11d r12d r13d r14d r15d", 4)
ax, cx, dx, bx, sp, bp, si, di, r8w, r9w, r10w, r11w, r12w, r13w, r14w, r15w = _registers(
    "ax cx dx bx sp bp si di r8w r9w r10w r11w r12w r13w r14w r15w", 2)
al, cl, dl, bl, spl, bpl, sil, dil, r8b, r9b, r10b, r11b, r12b, r13b, r14b, r15b = _registers(
    "al cl dl bl spl bpl sil dil r8b r9b r10b r11b r12b r13b r14b r15b", 1)
# fmt: on

RegMem: TypeAlias = Register | Memory
Operand: TypeAlias = Register | Memory | int
_FORMATS = {1: "<b", 2: "<h", 4: "<i", 8: "<q"}


def _fits(value: int, size: int) -> bool:
    """Whether `value`, sign extended from `size` bytes, is itself again."""
    half = 1 << (8 * size - 1)
    return -half <= value < half


def _immediate(value: int, size: int) -> bytes:
    """`value` as `size` little-endian bytes; both its signed and unsigned ranges are welcome."""
    try:
        return value.to_bytes(size, "little", signed=value < 0)
    except OverflowError:
        raise ValueError(f"{value:#x} does not fit {size} bytes") from None


def _signed(value: int, size: int) -> int:
    """`value` as the processor of that operand size sees it: 0xFFFFFFFF is -1 in 4 bytes."""
    if not _fits(value, size) and 0 <= value < 1 << (8 * size):
        return value - (1 << (8 * size))
    return value


# --- one function per group of instructions; each returns the method -----------------------
_None: TypeAlias = "Callable[[Assembler], None]"
_Unary: TypeAlias = "Callable[[Assembler, RegMem], None]"
_Binary: TypeAlias = "Callable[[Assembler, RegMem, Operand], None]"
_Shift: TypeAlias = "Callable[[Assembler, RegMem, Register | int], None]"
_Extend: TypeAlias = "Callable[[Assembler, Register, RegMem], None]"
_Jump: TypeAlias = "Callable[[Assembler, str], None]"


def _plain(code: str) -> _None:
    """No operands: the bytes themselves."""
    encoded = bytes.fromhex(code)

    def method(self: "Assembler") -> None:
        self.data(encoded)

    return method


def _arithmetic(digit: int) -> _Binary:
    """add, or, adc, sbb, and, sub, xor, cmp: opcodes 8 * digit + 0..5, or 80/81/83 /digit."""

    def method(self: "Assembler", dst: RegMem, src: Operand) -> None:
        if isinstance(src, int):
            size = self._size(dst)
            value = _signed(src, size)
            if size > 1 and _fits(value, 1):
                self._instruction(0x83, digit, dst, size, _immediate(value, 1))
            elif isinstance(dst, Register) and dst.code == 0:
                self._short_form(8 * digit + 4 + (size > 1), dst, self._wide(value, size))
            else:
                self._instruction(0x80 + (size > 1), digit, dst, size, self._wide(value, size))
        else:
            self._two_operands(8 * digit, dst, src)

    return method


def _unary(opcode: int, digit: int) -> _Unary:
    """One register or memory operand: opcode for bytes, opcode + 1 for the wider ones."""

    def method(self: "Assembler", operand: RegMem) -> None:
        size = self._size(operand)
        self._instruction(opcode + (size > 1), digit, operand, size)

    return method


def _shift(digit: int) -> _Shift:
    """shl, shr, sar: by a constant or by cl."""

    def method(self: "Assembler", dst: RegMem, by: Register | int) -> None:
        size = self._size(dst)
        wide = size > 1
        if isinstance(by, Register):
            if by is not cl:
                raise ValueError(f"a shift is by a constant or cl, not {by}")
            self._instruction(0xD2 + wide, digit, dst, size)
        elif by == 1:
            self._instruction(0xD0 + wide, digit, dst, size)
        else:
            self._instruction(0xC0 + wide, digit, dst, size, _immediate(by, 1))

    return method


def _extend(opcode: int) -> _Extend:
    """movzx, movsx: a byte or word source into a wider register."""

    def method(self: "Assembler", dst: Register, src: RegMem) -> None:
        if src.size not in {1, 2} or src.size >= dst.size:
            raise ValueError("the source is a byte or a word and narrower than the destination")
        self._instruction((0x0F, opcode + (src.size == 2)), dst, src, dst.size)

    return method


def _jump(short: int, near: tuple[int, ...]) -> _Jump:
    """A jump to a label: `short` opcode with 8 bits of distance, `near` with 32 (or 16)."""

    def method(self: "Assembler", label: str) -> None:
        back = self.labels.get(label)
        if back is not None and short and _fits(back - self.here - 2, 1):
            self.data(struct.pack("<Bb", short, back - self.here - 2))
            return
        self.data(bytes(near))
        self._reference(label, 2 if self.bits == 16 else 4, trailing=0)

    return method


def _jump_if(condition: int) -> _Jump:
    return _jump(0x70 + condition, (0x0F, 0x80 + condition))


class Assembler:
    """Collects instructions; `assemble` gives the bytes, to run at address `origin`."""

    def __init__(self, *, bits: int = 64, origin: int = 0) -> None:
        if bits not in {16, 32, 64}:
            raise ValueError(f"bits is 16, 32 or 64, not {bits}")
        self.bits = bits
        self.origin = origin
        self.labels: dict[str, int] = {}  # name -> address
        self._code = bytearray()
        self._references: list[tuple[int, int, str, int | None]] = []

    # --- the instructions -----------------------------------------------------------------
    add, or_, adc, sbb, and_, sub, xor, cmp = (_arithmetic(digit) for digit in range(8))
    not_, neg, mul, div, idiv = (_unary(0xF6, digit) for digit in (2, 3, 4, 6, 7))
    inc, dec = _unary(0xFE, 0), _unary(0xFE, 1)
    shl, shr, sar = _shift(4), _shift(5), _shift(7)
    movzx, movsx = _extend(0xB6), _extend(0xBE)

    jmp = _jump(0xEB, (0xE9,))
    call = _jump(0, (0xE8,))
    jo, jno, jb, jae, je, jne, jbe, ja = (_jump_if(condition) for condition in range(8))
    js, jns, jp, jnp, jl, jge, jle, jg = (_jump_if(condition) for condition in range(8, 16))

    ret, nop, hlt, int3, ud2 = (_plain(code) for code in ("C3", "90", "F4", "CC", "0F0B"))
    cli, sti, cld, std = (_plain(code) for code in ("FA", "FB", "FC", "FD"))
    syscall, cpuid, rdtsc = (_plain(code) for code in ("0F05", "0FA2", "0F31"))
    rdmsr, wrmsr, pause = (_plain(code) for code in ("0F32", "0F30", "F390"))
    rep_movsb, rep_stosb, lodsb = (_plain(code) for code in ("F3A4", "F3AA", "AC"))

    def mov(self, dst: RegMem, src: Operand) -> None:
        """Copy; a constant that needs all 64 bits goes to a register only."""
        if not isinstance(src, int):
            self._two_operands(0x88, dst, src)
            return
        size = self._size(dst)
        if isinstance(dst, Register) and (size < 8 or not _fits(src, 4)):
            self._short_form(0xB8 if size > 1 else 0xB0, dst, _immediate(src, size))
        else:
            immediate = self._wide(_signed(src, size), size)
            self._instruction(0xC6 + (size > 1), 0, dst, size, immediate)

    def lea(self, dst: Register, src: Memory) -> None:
        """The address of a memory operand."""
        self._instruction(0x8D, dst, src, dst.size)

    def test(self, dst: RegMem, src: Register | int) -> None:
        """Flags of dst & src."""
        size = self._size(dst)
        if isinstance(src, int):
            immediate = self._wide(_signed(src, size), size)
            if isinstance(dst, Register) and dst.code == 0:
                self._short_form(0xA8 + (size > 1), dst, immediate)
            else:
                self._instruction(0xF6 + (size > 1), 0, dst, size, immediate)
        else:
            self._two_operands(0x84, dst, src)

    def push(self, src: Register | int) -> None:
        """Push a register of the mode's own width, or a sign-extended constant."""
        if isinstance(src, Register):
            self._short_form(0x50, self._natural(src), b"", wide=False)
        elif _fits(src, 1):
            self.data(b"\x6a" + _immediate(src, 1))
        else:
            width = 2 if self.bits == 16 else 4
            self.data(b"\x68" + _immediate(_checked_signed(src, width), width))

    def pop(self, dst: Register) -> None:
        """Pop into a register of the mode's own width."""
        self._short_form(0x58, self._natural(dst), b"", wide=False)

    def jmp_to(self, target: RegMem) -> None:
        """Jump to the address in a register or in memory."""
        self._instruction(0xFF, 4, target, min(self._size(target), 4))

    def call_to(self, target: RegMem) -> None:
        """Call the address in a register or in memory."""
        self._instruction(0xFF, 2, target, min(self._size(target), 4))

    def int_(self, vector: int) -> None:
        """Software interrupt."""
        self.data(b"\xcd" + _immediate(vector, 1))

    def in_(self, dst: Register, port: Register | int) -> None:
        """Read al, ax or eax from a port: dx, or a constant below 256."""
        self._port_io(0xE4, dst, port)

    def out(self, port: Register | int, src: Register) -> None:
        """Write al, ax or eax to a port: dx, or a constant below 256."""
        self._port_io(0xE6, src, port)

    # --- labels and data ------------------------------------------------------------------
    @property
    def here(self) -> int:
        """The address of the next byte."""
        return self.origin + len(self._code)

    def label(self, name: str) -> None:
        """Define `name` as here."""
        self.define(name, self.here)

    def define(self, name: str, address: int) -> None:
        """Define `name` as an address, which may lie outside what is assembled."""
        if name in self.labels:
            raise ValueError(f"label {name!r} is defined twice")
        self.labels[name] = address

    def data(self, data: bytes) -> None:
        """Append bytes as they are."""
        self._code += data

    def address_of(self, label: str, size: int = 8) -> None:
        """Append the absolute address of a label, as `size` bytes."""
        self._reference(label, size, trailing=None)

    def align(self, boundary: int, fill: bytes = b"\0") -> None:
        """Append `fill` up to a multiple of `boundary`."""
        self.data(fill * (-self.here % boundary))

    def assemble(self) -> bytes:
        """The bytes, every reference filled in. Raises ValueError for an undefined label."""
        code = bytearray(self._code)
        for position, size, label, trailing in self._references:
            if label not in self.labels:
                raise ValueError(f"label {label!r} is used but not defined")
            value = self.labels[label] + struct.unpack_from(_FORMATS[size], code, position)[0]
            if trailing is not None:  # relative to the end of its instruction
                value -= self.origin + position + size + trailing
                if not _fits(value, size):
                    raise ValueError(f"label {label!r} is too far away")
            code[position : position + size] = _immediate(value, size)
        return bytes(code)

    # --- the encoder ----------------------------------------------------------------------
    def _instruction(
        self,
        opcode: int | tuple[int, ...],
        reg: Register | int,
        rm: RegMem,
        size: int,
        immediate: bytes = b"",
    ) -> None:
        """Append one instruction: [66] [REX] opcode ModRM [SIB] [displacement] [immediate].

        `reg` is the register operand or the digit that extends the opcode; `size` the operand
        size in bytes, which decides the prefixes (Intel volume 2, sections 2.1 and 2.2).
        """
        encoded = bytes((opcode,) if isinstance(opcode, int) else opcode)
        number = reg.code if isinstance(reg, Register) else reg
        modrm, extension, reference = self._modrm(number & 7, rm)
        rex = (size == 8) << 3 | (number >> 3) << 2 | extension
        self._prefixes(size, rex, reg, rm)
        self._code += encoded + modrm
        if reference is not None:
            label, disp = reference
            width = 2 if self.bits == 16 else 4
            self.data(struct.pack(_FORMATS[width], disp))
            at = len(self._code) - width
            trailing = len(immediate) if self.bits == 64 else None
            self._references.append((at, width, label, trailing))
        self._code += immediate

    def _prefixes(self, size: int, rex: int, *operands: RegMem | int) -> None:
        if size == (4 if self.bits == 16 else 2):
            self._code += b"\x66"
        for operand in operands:
            # spl, bpl, sil and dil are ah, ch, dh and bh unless there is a REX prefix.
            if isinstance(operand, Register) and operand.size == 1 and 4 <= operand.code < 8:
                rex |= 0x40
        if rex:
            if self.bits != 64:
                raise ValueError(f"needs 64-bit mode: {operands}")
            self._code.append(0x40 | rex)

    def _modrm(self, reg: int, rm: RegMem) -> tuple[bytes, int, tuple[str, int] | None]:
        """ModRM, SIB and displacement; REX bits X and B; the label still to be filled in."""
        if isinstance(rm, Register):
            return bytes([0xC0 | reg << 3 | rm.code & 7]), rm.code >> 3, None
        where = rm.address
        base, index, disp = where.base, where.index, where.disp
        if self.bits == 16:
            if base or index:
                raise ValueError("in 16-bit mode memory is addressed by constant or label")
            if where.label:
                return bytes([reg << 3 | 6]), 0, (where.label, disp)
            return bytes([reg << 3 | 6]) + _immediate(disp, 2), 0, None
        for register in (base, index):
            if register and register.size * 8 != self.bits:
                raise ValueError(f"{register} is no address in {self.bits}-bit mode")
        if where.label:  # RIP-relative in 64-bit mode, absolute in 32-bit mode
            return bytes([reg << 3 | 5]), 0, (where.label, disp)
        extension = (index.code >> 3) << 1 if index else 0
        scaled = "1248".index(str(where.scale)) << 6 | (index.code & 7 if index else 4) << 3
        if base is None:
            address = _immediate(_checked_signed(disp, 4), 4)
            if index is None and self.bits == 32:
                return bytes([reg << 3 | 5]) + address, 0, None
            return bytes([reg << 3 | 4, scaled | 5]) + address, extension, None
        extension |= base.code >> 3
        if disp == 0 and base.code & 7 != 5:  # [rbp] and [r13] have no form without displacement
            mod, address = 0x00, b""
        elif _fits(disp, 1):
            mod, address = 0x40, _immediate(disp, 1)
        else:
            mod, address = 0x80, _immediate(_checked_signed(disp, 4), 4)
        if index is None and base.code & 7 != 4:  # [rsp] and [r12] need a SIB byte
            return bytes([mod | reg << 3 | base.code & 7]) + address, extension, None
        return bytes([mod | reg << 3 | 4, scaled | base.code & 7]) + address, extension, None

    def _two_operands(self, opcode: int, dst: RegMem, src: RegMem) -> None:
        """Opcode + 1 if wider than a byte, + 2 if the destination is the register operand."""
        register, other, to_register = (src, dst, 0) if isinstance(src, Register) else (dst, src, 2)
        if not isinstance(register, Register) or other.size not in {0, register.size}:
            raise ValueError(
                f"one operand is a register and both are as wide: {dst.size}, {src.size}"
            )
        size = register.size
        self._instruction(opcode + to_register + (size > 1), register, other, size)

    def _short_form(
        self, opcode: int, register: Register, tail: bytes, *, wide: bool = True
    ) -> None:
        """Opcode with the register in its low three bits."""
        rex = (wide and register.size == 8) << 3 | register.code >> 3
        self._prefixes(register.size, rex, register)
        self.data(bytes([opcode + (register.code & 7)]) + tail)

    def _port_io(self, opcode: int, register: Register, port: Register | int) -> None:
        if register.code != 0 or register.size == 8:
            raise ValueError(f"port I/O is through al, ax or eax, not {register}")
        wide = register.size > 1
        self._prefixes(register.size, 0)
        if isinstance(port, int):
            if not 0 <= port < 256:
                raise ValueError(f"port {port:#x} needs dx")
            self.data(bytes([opcode + wide, port]))
        elif port is dx:
            self.data(bytes([opcode + 8 + wide]))
        else:
            raise ValueError(f"a port is a constant or dx, not {port}")

    def _reference(self, label: str, size: int, *, trailing: int | None) -> None:
        self._references.append((len(self._code), size, label, trailing))
        self.data(bytes(size))

    def _natural(self, register: Register) -> Register:
        if register.size * 8 != self.bits:
            raise ValueError(f"{register} is not {self.bits} bits wide")
        return register

    @staticmethod
    def _size(operand: RegMem) -> int:
        if operand.size == 0:
            raise ValueError("say byte[...], word[...], dword[...] or qword[...]")
        return operand.size

    @staticmethod
    def _wide(value: int, size: int) -> bytes:
        """An immediate of the operand's size; 64-bit operands have 32 bits, sign extended."""
        if size == 8 and not _fits(value, 4):
            raise ValueError(f"{value:#x} does not fit 32 signed bits")
        return _immediate(value, min(size, 4))


def _checked_signed(value: int, size: int) -> int:
    if not _fits(value, size):
        raise ValueError(f"{value:#x} does not fit {8 * size} signed bits")
    return value
