"""The assembler agrees with GNU as, byte for byte where it says so, else by disassembly."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.guest import asm
from tinyvmm.guest.asm import (
    Address,
    Assembler,
    Memory,
    Register,
    al,
    at,
    ax,
    byte,
    cl,
    dl,
    dword,
    dx,
    eax,
    ebx,
    ecx,
    edi,
    ptr,
    qword,
    r12,
    rax,
    rbp,
    rbx,
    rcx,
    rdi,
    rsi,
    rsp,
    word,
)

needs_binutils = pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("objdump") and shutil.which("objcopy")),
    reason="binutils is not installed: nothing to compare with",
)

NAMES = {1: "BYTE PTR", 2: "WORD PTR", 4: "DWORD PTR", 8: "QWORD PTR"}
REGISTERS: dict[int, list[Register]] = {size: [] for size in (1, 2, 4, 8)}
for value in vars(asm).values():
    if isinstance(value, Register):
        REGISTERS[value.size].append(value)

Operand = Register | Memory | int
Operands = st.SearchStrategy[Operand]
Instruction = tuple[str, tuple[Operand, ...]]


def text_of(operand: Operand) -> str:
    """An operand in the syntax of GNU as with .intel_syntax noprefix."""
    if isinstance(operand, Memory):
        where = operand.address
        index = f"{where.index}*{where.scale}" if where.index else ""
        disp = hex(where.disp) if where.disp or not (where.base or where.index) else ""
        terms = [term for term in (str(where.base or ""), index, disp) if term]
        text = "[" + "+".join(terms).replace("+-", "-") + "]"
        if not where.base and not where.index:
            text = f"ds:{where.disp}"
        return f"{NAMES[operand.size]} {text}" if operand.size else text
    return str(operand)


def gnu_as(source: str, bits: int, directory: Path) -> bytes:
    """What GNU as makes of `source`."""
    text = f".intel_syntax noprefix\n.code{bits}\n{source}\n"
    target = "--64" if bits == 64 else "--32"
    subprocess.run(
        ["as", target, "-o", str(directory / "a.o"), "-"], input=text.encode(), check=True
    )
    command = [
        "objcopy",
        "-O",
        "binary",
        "-j",
        ".text",
        str(directory / "a.o"),
        str(directory / "a.bin"),
    ]
    subprocess.run(command, check=True)
    return (directory / "a.bin").read_bytes()


def disassemble(code: bytes, bits: int, directory: Path) -> list[str]:
    """Instructions as objdump prints them, without addresses and bytes."""
    file = directory / "d.bin"
    file.write_bytes(code)
    machine = {64: "i386:x86-64", 32: "i386", 16: "i8086"}[bits]
    command = ["objdump", "-D", "-b", "binary", "-m", machine, "-M", "intel", str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split("\t") for line in output.splitlines()]
    return [" ".join(line[2].split()) for line in lines if len(line) == 3]


def assemble(instructions: list[Instruction], bits: int = 64) -> bytes:
    a = Assembler(bits=bits)
    for mnemonic, operands in instructions:
        getattr(a, mnemonic)(*operands)
    return a.assemble()


def source_of(instructions: list[Instruction]) -> str:
    lines = []
    for mnemonic, operands in instructions:
        name = "movabs" if mnemonic == "mov" and is_long(operands) else mnemonic.rstrip("_")
        lines.append(f"{name} {', '.join(map(text_of, operands))}")
    return "\n".join(lines)


def is_long(operands: tuple[Operand, ...]) -> bool:
    value = operands[-1]
    return isinstance(value, int) and not -(1 << 31) <= value < 1 << 31 and operands[0] in qwords


# --- what to generate ------------------------------------------------------------------------
qwords = REGISTERS[8]
sizes = st.sampled_from([1, 2, 4, 8])


def register(size: int) -> st.SearchStrategy[Register]:
    return st.sampled_from(REGISTERS[size])


@st.composite
def memory(draw: st.DrawFn, size: int, registers: list[Register] | None = None) -> Memory:
    registers = registers or qwords
    base = draw(st.none() | st.sampled_from(registers))
    index = draw(st.none() | st.sampled_from([r for r in registers if r.code != 4]))
    scale = draw(st.sampled_from([1, 2, 4, 8])) if index else 1
    # An index without base and scale 1 is a base, and GNU as says so.
    if index and not base:
        scale = draw(st.sampled_from([4, 8]))
    disp = draw(
        st.sampled_from([0, 1, -1, 127, -128, 128, -129]) | st.integers(-(1 << 31), (1 << 31) - 1)
    )
    if not base and not index:
        disp = abs(disp) % (1 << 31)
    return Memory(Address(base, index, scale, disp), size)


def immediate(size: int) -> st.SearchStrategy[int]:
    bits = min(8 * size, 32) - 1
    edges = [0, 1, -1, 127, -128]
    if size > 1:
        edges += [128, -129]
    return st.sampled_from(edges) | st.integers(-(1 << bits), (1 << bits) - 1)


@st.composite
def instruction(draw: st.DrawFn) -> Instruction:
    size = draw(sizes)
    reg, mem, imm = register(size), memory(size), immediate(size)
    either = reg | mem
    kind = draw(st.integers(0, 8))
    if kind == 0:
        name = draw(
            st.sampled_from(["add", "or_", "adc", "sbb", "and_", "sub", "xor", "cmp", "mov"])
        )
        pairs: list[tuple[Operands, Operands]] = [(reg, reg), (reg, mem), (mem, reg), (either, imm)]
        to, source = draw(st.sampled_from(pairs))
        return name, (draw(to), draw(source))
    if kind == 1:
        return draw(st.sampled_from(["not_", "neg", "mul", "div", "idiv", "inc", "dec"])), (
            draw(either),
        )
    if kind == 2:
        by: st.SearchStrategy[Register | int] = st.just(cl) | st.integers(1, 8 * size - 1)
        return draw(st.sampled_from(["shl", "shr", "sar"])), (draw(either), draw(by))
    if kind == 3:
        narrow = draw(st.sampled_from([1, 2]))
        into = draw(register(draw(st.sampled_from([4, 8]))))
        return draw(st.sampled_from(["movzx", "movsx"])), (
            into,
            draw(register(narrow) | memory(narrow)),
        )
    if kind == 4:
        return "lea", (draw(register(draw(st.sampled_from([4, 8])))), draw(memory(0)))
    if kind == 5:
        return "test", (draw(either), draw(reg | imm))
    if kind == 6:
        name = draw(st.sampled_from(["push", "pop"]))
        if name == "push" and draw(st.booleans()):
            return name, (draw(immediate(4)),)
        return name, (draw(register(8)),)
    if kind == 7:
        return "mov", (draw(register(8)), draw(st.integers(-(1 << 63), (1 << 63) - 1)))
    accumulator = draw(st.sampled_from([al, ax, eax]))
    port = draw(st.just(dx) | st.integers(0, 255))
    if draw(st.booleans()):
        return "in_", (accumulator, port)
    return "out", (port, accumulator)


@needs_binutils
@settings(max_examples=60, deadline=None)
@given(st.lists(instruction(), min_size=1, max_size=60))
def test_every_64_bit_instruction_is_encoded_as_gnu_as_does(
    tmp_path_factory: pytest.TempPathFactory, instructions: list[Instruction]
) -> None:
    directory = tmp_path_factory.getbasetemp()
    ours, theirs = assemble(instructions), gnu_as(source_of(instructions), 64, directory)
    if ours != theirs:  # only then worth the time to say which instruction
        assert disassemble(ours, 64, directory) == disassemble(theirs, 64, directory)
    assert ours.hex(" ") == theirs.hex(" ")


FIXED = [
    "ret",
    "nop",
    "hlt",
    "int3",
    "ud2",
    "cli",
    "sti",
    "cld",
    "std",
    "syscall",
    "cpuid",
    "rdtsc",
    "rdmsr",
    "wrmsr",
    "pause",
]
STRING = {"rep_movsb": "rep movsb", "rep_stosb": "rep stosb", "lodsb": "lodsb"}


@needs_binutils
def test_instructions_without_operands_are_gnu_as_ones(tmp_path: Path) -> None:
    ours = assemble([(name, ()) for name in (*FIXED, *STRING)])
    assert ours == gnu_as("\n".join((*FIXED, *STRING.values())), 64, tmp_path)


@needs_binutils
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from([1, 2, 4]).flatmap(
            lambda size: st.tuples(
                st.sampled_from(["add", "sub", "xor", "cmp", "mov"]),
                st.tuples(
                    st.sampled_from(
                        [r for r in REGISTERS[size] if 0 < r.code < (4 if size == 1 else 8)]
                    ),
                    memory(size, REGISTERS[4][:8]) | immediate(size),
                ),
            )
        ),
        min_size=1,
    ),
)
def test_32_bit_code_disassembles_to_what_was_meant(
    tmp_path_factory: pytest.TempPathFactory, instructions: list[Instruction]
) -> None:
    directory = tmp_path_factory.getbasetemp()
    theirs = gnu_as(source_of(instructions), 32, directory)
    ours = assemble(instructions, bits=32)
    assert disassemble(ours, 32, directory) == disassemble(theirs, 32, directory)


@needs_binutils
def test_a_16_bit_guest_disassembles_to_what_was_meant(tmp_path: Path) -> None:
    a = Assembler(bits=16, origin=0x100)
    a.mov(dx, 0x3F8)
    a.mov(al, ord("!"))
    a.out(dx, al)
    a.out(0x80, ax)
    a.mov(eax, 0x12345678)
    a.mov(word[0x500], ax)
    a.add(byte[at("count") + 1], 3)
    a.jmp("end")
    a.nop()
    a.label("count")
    a.data(b"\x90\x90\x90")
    a.label("end")
    a.hlt()
    assert disassemble(a.assemble(), 16, tmp_path) == [
        "mov dx,0x3f8",
        "mov al,0x21",
        "out dx,al",
        "out 0x80,ax",
        "mov eax,0x12345678",
        "mov WORD PTR ds:0x500,ax",
        f"add BYTE PTR ds:{a.labels['count'] + 1:#x},0x3",
        f"jmp {a.labels['end'] - a.origin:#x}",
        "nop",
        "nop",
        "nop",
        "nop",
        "hlt",
    ]


JUMPS = [
    "jmp",
    "call",
    "jo",
    "jno",
    "jb",
    "jae",
    "je",
    "jne",
    "jbe",
    "ja",
    "js",
    "jns",
    "jp",
    "jnp",
    "jl",
    "jge",
    "jle",
    "jg",
]


@needs_binutils
@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(JUMPS), st.integers(0, 9), st.sampled_from([0, 1, 100, 130])),
        min_size=10,
        max_size=30,
    )
)
def test_jumps_reach_their_labels_forwards_and_backwards(
    tmp_path_factory: pytest.TempPathFactory, jumps: list[tuple[str, int, int]]
) -> None:
    a = Assembler(origin=0x1000)
    expected = []
    for number, (name, target, padding) in enumerate(jumps):
        if number < 10:
            a.label(str(number))
        getattr(a, name)(str(target))
        a.data(b"\x90" * padding)
        expected.append((name, target))
    # objdump takes the first byte to be at 0.
    wanted = [f"{name} {a.labels[str(target)] - a.origin:#x}" for name, target in expected]
    lines = disassemble(a.assemble(), 64, tmp_path_factory.getbasetemp())
    assert [line for line in lines if line != "nop"] == wanted


@needs_binutils
def test_labels_are_reached_relative_to_rip_whatever_follows_the_displacement(
    tmp_path: Path,
) -> None:
    a = Assembler()
    a.cmp(qword["x"], 0)
    a.mov(dword["x"], 0x12345678)
    a.mov(byte[at("x") + 1], 1)
    a.lea(rdi, ptr["x"])
    a.add(r12, qword["x"])
    a.jmp_to(qword["x"])
    a.call_to(rax)
    a.jmp_to(r12)
    a.label("x")
    a.address_of("x")
    code = a.assemble()
    end = len(code) - 8
    assert int.from_bytes(code[end:], "little") == a.labels["x"] == end
    comments = [f"# {end:#x}", f"# {end:#x}", f"# {end + 1:#x}", f"# {end:#x}", f"# {end:#x}"]
    lines = disassemble(code[:end], 64, tmp_path)
    assert [line[line.index("#") :] for line in lines[:5]] == comments
    assert lines[5].startswith("jmp QWORD PTR [rip+")
    assert lines[6:] == ["call rax", "jmp r12"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: a.mov(rax, ebx),  # two widths
        lambda a: a.mov(qword[rsi], qword[rdi]),  # memory to memory
        lambda a: a.add(ptr[rax], 1),  # how wide?
        lambda a: a.mov(al, 256),
        lambda a: a.add(rax, 1 << 31),  # no 64-bit immediates but in mov
        lambda a: a.mov(qword[rax], 1 << 40),
        lambda a: a.mov(rax, 1 << 64),
        lambda a: a.mov(rax, qword[ebx]),  # 32-bit address
        lambda a: a.mov(rax, qword[rbx + (1 << 31)]),
        lambda a: a.mov(rax, qword[rbx + rsp * 2]),
        lambda a: a.mov(rax, qword[rbx * 3]),
        lambda a: a.mov(rax, qword[rax + rbx + rcx]),
        lambda a: a.shl(rax, dl),
        lambda a: a.movzx(eax, ecx),
        lambda a: a.push(eax),
        lambda a: a.push(1 << 31),
        lambda a: a.in_(cl, dx),
        lambda a: a.out(256, al),
        lambda a: a.out(ax, al),
        lambda a: a.label("known"),
        lambda a: (a.jmp("nowhere"), a.assemble()),
    ],
)
def test_what_cannot_be_encoded_is_refused(wrong: Callable[[Assembler], object]) -> None:
    a = Assembler()
    a.label("known")
    with pytest.raises(ValueError, match=r"."):
        wrong(a)


def test_64_bit_registers_are_refused_in_32_bit_code_and_addresses_in_16_bit_code() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        Assembler(bits=32).mov(rax, rbx)
    with pytest.raises(ValueError, match="16-bit"):
        Assembler(bits=16).mov(ax, word[edi])
    with pytest.raises(ValueError, match="bits"):
        Assembler(bits=8)


def test_addresses_add_up_however_they_are_written() -> None:
    def encoding(address: Address) -> bytes:
        return assemble([("lea", (rax, ptr[address]))])

    assert encoding(rbx + rcx * 4 + 8) == encoding(rcx * 4 + rbx + 8) == encoding(rbx + 8 + rcx * 4)
    assert encoding(rbp - 8 + rcx) == encoding(rbp + rcx + -8)
    assert encoding(rbx + 8 - 8) == encoding(rbx + 0)
