"""A linked program is an ELF file the kernel runs, and the numbers in abi.py are the kernel's."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvmm.guest import abi
from tinyvmm.guest.asm import at, ecx, edi, qword, rax, rbx, rcx, rdi, rdx, rsi
from tinyvmm.guest.elf import Program

HEADERS = [
    "linux/memfd.h",
    "asm/unistd_64.h",
    "fcntl.h",
    "sys/mman.h",
    "linux/mount.h",
    "sys/mount.h",
    "poll.h",
    "signal.h",
    "sys/signalfd.h",
    "sys/wait.h",
    "sys/resource.h",
    "asm/ioctls.h",
    "sys/socket.h",
    "linux/sockios.h",
    "linux/if.h",
    "linux/route.h",
    "linux/vm_sockets.h",
    "netinet/tcp.h",
    "linux/reboot.h",
]


def test_every_number_of_the_abi_is_the_headers(tmp_path: Path) -> None:
    names = [name for name in vars(abi) if name.isupper()]
    values = {name: getattr(abi, name) for name in names}
    c_names = [
        "sizeof(struct ifreq)"
        if name == "SIZEOF_IFREQ"
        else name.replace("SYS_", "__NR_").lower().replace("__nr_", "__NR_")
        if name.startswith("SYS_")
        else name
        for name in names
    ]
    lines = [f"#include <{header}>" for header in HEADERS] + ["#include <stdio.h>", "int main() {"]
    lines += [f'printf("%lld\\n", (long long)({name}));' for name in c_names] + ["}"]
    (tmp_path / "abi.c").write_text("#define _GNU_SOURCE\n" + "\n".join(lines))
    subprocess.run(["gcc", "-o", tmp_path / "abi", tmp_path / "abi.c"], check=True)
    output = subprocess.run([tmp_path / "abi"], check=True, capture_output=True, text=True).stdout
    assert dict(zip(names, map(int, output.split()), strict=True)) == values


def run(p: Program, directory: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    path = directory / "program"
    path.write_bytes(p.link())
    path.chmod(0o755)
    return subprocess.run([path, *arguments], check=False, capture_output=True)


@settings(max_examples=20, deadline=None)
@given(text=st.binary(max_size=5000), code=st.integers(0, 255))
def test_a_program_writes_its_constants_and_exits_with_its_code(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, code: int
) -> None:
    p = Program()
    p.label("_start")
    p.system_call(abi.SYS_WRITE, 1, p.constant(text), len(text))
    p.system_call(abi.SYS_EXIT, code)
    # One file is not enough: a program still running elsewhere could keep it busy.
    result = run(p, tmp_path_factory.mktemp("elf"))
    assert (result.stdout, result.returncode) == (text, code)


def test_variables_start_as_zero_and_can_be_written(tmp_path: Path) -> None:
    p = Program()
    p.variable("first")
    p.variable("many", 100_000)
    p.label("_start")
    p.mov(rcx, 100_000 // 8)
    p.xor(edi, edi)
    p.label("sum")  # of 1, 2, ... 12500, stored and read again
    p.cmp(qword[at("many") + 99_992], 0)
    p.jne("wrong")
    p.add(qword["first"], rcx)
    p.dec(rcx)
    p.jne("sum")
    p.mov(rax, qword["first"])
    p.cmp(rax, 12_500 * 12_501 // 2)
    p.jne("wrong")
    p.mov(qword[at("many") + 99_992], rax)
    p.mov(edi, 42)
    p.label("wrong")
    p.system_call(abi.SYS_EXIT, rdi)
    assert run(p, tmp_path).returncode == 42


def test_strings_become_an_array_that_execve_takes(tmp_path: Path) -> None:
    p = Program()
    p.label("_start")
    argv, env = p.strings(["printf", "%s|%s|%s\n", "one", "", "\udcff"]), p.strings([])
    p.system_call(abi.SYS_EXECVE, p.string("/usr/bin/printf"), argv, env)
    p.system_call(abi.SYS_EXIT, 1)
    assert run(p, tmp_path).stdout == b"one||\xff\n"


def test_the_executable_says_it_is_one_of_two_segments_and_no_interpreter(tmp_path: Path) -> None:
    p = Program()
    p.variable("v", 10)
    p.label("_start")
    p.system_call(abi.SYS_EXIT, 0)
    (tmp_path / "program").write_bytes(p.link())
    command = ["readelf", "-hlW", str(tmp_path / "program")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in output.splitlines() if line.split()[:1] == ["LOAD"]]
    assert "EXEC (Executable file)" in output
    assert "INTERP" not in output
    assert [row[6:] for row in rows] == [["R", "E", "0x1000"], ["RW", "0x1000"]]
    assert int(rows[1][5], 16) == 16


def test_a_string_with_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        Program().string("a\0b")


def test_arguments_of_a_system_call_are_loaded_from_left_to_right(tmp_path: Path) -> None:
    # exit(rsi) after loading rdi from rsi: the first is taken before the second is overwritten
    p = Program()
    p.label("_start")
    p.mov(rsi, 5)
    p.load(rdi, rsi)
    p.load(rbx, 2)
    p.add(rdi, rbx)
    p.mov(ecx, 7)
    p.load(rdx, 0)
    p.system_call(abi.SYS_EXIT, rdi, 99)
    assert run(p, tmp_path).returncode == 7
