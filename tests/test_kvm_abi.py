"""kvm.py against the C compiler and <linux/kvm.h>: every struct, field and number."""

import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tinyvmm import kvm
from tinyvmm.machine import Machine

STRUCTS = [
    value
    for value in vars(kvm).values()
    if isinstance(value, type) and issubclass(value, kvm.Struct) and value is not kvm.Struct
]
# The union of struct kvm_run is declared in parts: our struct -> its member in C.
RUN_MEMBERS = {
    "kvm_run_io": "io",
    "kvm_run_mmio": "mmio",
    "kvm_run_fail_entry": "fail_entry",
    "kvm_run_internal": "internal",
    "kvm_run_system_event": "system_event",
}
NUMBERS = [
    name
    for name, value in vars(kvm).items()
    if name.startswith("KVM_") and isinstance(value, int) and name != "KVM_RUN_UNION"
]


def c_expressions() -> dict[str, int]:
    """Every fact we state, as a C expression and our value for it."""
    facts: dict[str, int] = {name: getattr(kvm, name) for name in NUMBERS}
    facts["offsetof(struct kvm_run, io)"] = kvm.KVM_RUN_UNION
    facts["sizeof(struct kvm_cpuid2)"] = 8
    facts["sizeof(struct kvm_msrs)"] = 8
    for struct in STRUCTS:
        name = struct.__name__
        member = RUN_MEMBERS.get(name)
        if member is None and name != "kvm_run":
            facts[f"sizeof(struct {name})"] = ctypes.sizeof(struct)
        for field, *_ in struct._fields_:
            descriptor = getattr(struct, field)
            if member is None:
                where, size = f"struct {name}, {field}", f"((struct {name} *)0)->{field}"
                offset = descriptor.offset
            else:
                where = f"struct kvm_run, {member}.{field}"
                size = f"((struct kvm_run *)0)->{member}.{field}"
                offset = kvm.KVM_RUN_UNION + descriptor.offset
            facts[f"offsetof({where})"] = offset
            facts[f"sizeof({size})"] = descriptor.size
    return facts


def wrong_facts(where: Path, header: str, facts: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Those C expressions for which the compiler, with `header`, has another value: both."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    lines = "\n".join(f'  printf("%lld\\n", (long long)({fact}));' for fact in facts)
    source = where / "abi.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <{header}>\n"
        f"int main(void) {{\n{lines}\n  return 0;\n}}\n"
    )
    subprocess.run([compiler, "-o", where / "abi", source], check=True)
    output = subprocess.run([where / "abi"], check=True, capture_output=True, text=True).stdout
    return {
        fact: (ours, int(theirs))
        for (fact, ours), theirs in zip(facts.items(), output.split(), strict=True)
        if ours != int(theirs)
    }


def test_every_size_offset_and_number_is_the_headers(tmp_path: Path) -> None:
    facts = c_expressions()
    assert wrong_facts(tmp_path, "linux/kvm.h", facts) == {}
    assert len(facts) > 200


def test_a_struct_refuses_what_ctypes_would_swallow() -> None:
    with pytest.raises(ValueError, match="no field 'rx'"):
        kvm.kvm_regs(rx=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="cannot hold"):
        kvm.kvm_irq_level(irq=1 << 32)
    with pytest.raises(ValueError, match="cannot hold"):
        kvm.kvm_regs(rax=-1)
    assert kvm.kvm_regs(rip=1 << 63).rip == 1 << 63


def test_a_missing_kvm_names_the_remedy(tmp_path: Path) -> None:
    from tinyvmm.errors import ConfigError

    with pytest.raises(ConfigError, match=r"does not exist.*modprobe"):
        kvm.System(str(tmp_path / "kvm"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not KVM: KVM_GET_API_VERSION"):
        kvm.System(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "no permission to open /dev/kvm: join its group"),
        (errno.EPERM, "no permission to open /dev/kvm: join its group"),
        (errno.ENOENT, "/dev/kvm does not exist: .*modprobe"),
        (errno.ENODEV, "cannot open /dev/kvm: No such device"),
    ],
)
def test_a_kvm_that_cannot_be_opened_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    from tinyvmm.errors import ConfigError

    before = os.listdir("/proc/self/fd")
    opened = os.open

    def refuse(path: str, flags: int, *arguments: int, **more: int) -> int:
        if path == "/dev/kvm":
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=remedy) as caught:
        kvm.System()
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=remedy):
        Machine(memory=1 << 20)
    assert len(os.listdir("/proc/self/fd")) == len(before)
