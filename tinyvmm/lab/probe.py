"""Can this KVM run Linux? Ask it, with a guest that executes in ring 0 what Linux needs there.

Some KVMs run ring 0 by interpreting it, and stop with KVM_EXIT_INTERNAL_ERROR at an instruction
they lack. The probe takes milliseconds: 64-bit mode, an IDT with one vector, then one instruction
after the other, each followed by a port write that says how far it came. An instruction that
CPUID does not offer is left out, because Linux leaves it out too. A KVM that has the processor run
ring 0 lacks nothing, so it is not asked.
"""

import os

from tinyvmm import kvm
from tinyvmm.errors import KvmError
from tinyvmm.layout import GDT_GPA, PAGE_TABLES_GPA
from tinyvmm.machine import Machine
from tinyvmm.named import NamedTuple

CODE_GPA = 0x1_0000
IDT_GPA = 0x1_2000
HANDLER_GPA = 0x1_3000
DATA_GPA = 0x1_4000  # 64-byte aligned, as XSAVE demands
STACK_GPA = 0x1_8000
PROGRESS_PORT = 0xF4

# What Linux shows of the KVMs that use VMX and SVM, built in or not; it has only one KVM at a time.
HARDWARE = ("/sys/module/kvm_intel", "/sys/module/kvm_amd")

_CR4_OSXSAVE = 1 << 18


class Trial(NamedTuple):
    """An instruction, its encoding, and the CPUID bit that offers it: (leaf, register, bit)."""

    name: str
    code: str
    offered: tuple[int, str, int] | None = None


TRIALS = (
    Trial("int3", "cc"),  # static keys and alternatives are patched under its cover
    Trial("cmpxchg16b", "48 0f c7 0e", (1, "ecx", 13)),  # [rsi]: the slab allocator
    Trial("popcnt", "f3 48 0f b8 c0", (1, "ecx", 23)),
    Trial("stac", "0f 01 cb", (7, "ebx", 20)),  # every copy from and to user space
    Trial("clac", "0f 01 ca", (7, "ebx", 20)),
    Trial("xsave", "31 d2 b8 03 00 00 00 48 0f ae 26", (1, "ecx", 26)),  # task switches
    Trial("xrstor", "31 d2 b8 03 00 00 00 48 0f ae 2e", (1, "ecx", 26)),
)


def offered_trials(leaves: list[kvm.kvm_cpuid_entry2]) -> list[Trial]:
    """Return the trials whose instruction CPUID offers."""
    registers = {leaf.function: leaf for leaf in reversed(leaves)}  # subleaf 0 wins

    def is_offered(trial: Trial) -> bool:
        if trial.offered is None:
            return True
        leaf, register, bit = trial.offered
        return leaf in registers and bool(getattr(registers[leaf], register) >> bit & 1)

    return [trial for trial in TRIALS if is_offered(trial)]


def missing_for_linux() -> str | None:
    """Return what keeps Linux from running on this KVM, or None if nothing was found.

    ConfigError where there is no usable KVM at all.
    """
    with kvm.System() as system:
        if any(map(os.path.exists, HARDWARE)):
            return None
        return first_failure(offered_trials(system.supported_cpuid()))


def first_failure(trials: list[Trial]) -> str | None:
    """Return which of `trials` this KVM cannot execute in ring 0, and how that shows, or None."""
    from tinyvmm import boot

    reached = 0
    with Machine(memory=1 << 20, irqchip=False) as machine:
        memory, vcpu = machine.memory, machine.vcpus[0]
        code = bytearray.fromhex("0f 01 1c 25") + (IDT_GPA - 16).to_bytes(4, "little")  # lidt
        for number, trial in enumerate(trials, start=1):
            code += bytes.fromhex(trial.code) + bytes((0xB0, number, 0xE6, PROGRESS_PORT))
        code.append(0xF4)  # hlt
        memory.write(CODE_GPA, code)
        memory.write(HANDLER_GPA, b"\x48\xcf")  # iretq
        memory.write(IDT_GPA + 3 * 16, _interrupt_gate(HANDLER_GPA))
        memory.write(
            IDT_GPA - 16, (16 * 16 - 1).to_bytes(2, "little") + IDT_GPA.to_bytes(8, "little")
        )
        memory.write(GDT_GPA, boot.GDT)
        memory.write(PAGE_TABLES_GPA, boot.identity_page_tables(PAGE_TABLES_GPA))
        entry = boot.Entry(
            CODE_GPA, DATA_GPA, STACK_GPA, PAGE_TABLES_GPA, GDT_GPA, len(boot.GDT) - 1
        )
        machine.enter_long_mode(entry, extra_cr4=_CR4_OSXSAVE)
        handle = vcpu.handle
        while True:
            try:
                reason = handle.run()
            except KvmError as error:
                return f"{error} at {trials[reached].name}"
            if reason == kvm.KVM_EXIT_HLT and reached == len(trials):
                return None
            if reason != kvm.KVM_EXIT_IO or reached == len(trials):
                return f"it cannot execute {trials[min(reached, len(trials) - 1)].name} in ring 0"
            reached += 1


def _interrupt_gate(handler_gpa: int) -> bytes:
    """Encode a 64-bit interrupt gate (Intel SDM volume 3A, 6.14.1)."""
    from struct import pack

    return pack("<HHBBHII", handler_gpa & 0xFFFF, 0x10, 0, 0x8E, handler_gpa >> 16 & 0xFFFF, 0, 0)
