"""A virtual machine monitor in sixty lines: memory, a vCPU, and a loop around KVM_RUN.

The guest is eleven bytes of 16-bit code: it writes the alphabet to a port, letter by letter, and
halts. Runs on any /dev/kvm: python -m examples.hello_vm
"""

import ctypes
import mmap

from tinyvmm import kvm

GUEST = bytes.fromhex(
    "b0 41"  #    mov al, 'A'
    "e6 f4"  #    out 0xf4, al      leaves the guest: KVM_EXIT_IO
    "fe c0"  #    inc al
    "3c 5b"  #    cmp al, 'Z' + 1
    "75 f8"  #    jne -8
    "f4"  #       hlt               leaves it for good: KVM_EXIT_HLT
)
ENTRY = 0x1000

# Guest RAM is ordinary memory of ours. The guest sees it at the address we say, here 0.
ram = mmap.mmap(-1, 0x10000)
ram[ENTRY : ENTRY + len(GUEST)] = GUEST
hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))

with kvm.System() as system, system.create_vm() as vm:
    vm.set_user_memory_region(slot=0, gpa=0, size=len(ram), hva=hva)
    with vm.create_vcpu(0) as vcpu:
        # After reset a CPU begins in real mode at 0xFFFFFFF0; we want it at our code.
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm.kvm_regs(rip=ENTRY, rflags=1 << 1))

        text = ""
        while (reason := vcpu.run()) == kvm.KVM_EXIT_IO:
            # struct kvm_run is shared with the kernel: it says which port, and where the data is.
            io = kvm.kvm_run_io.from_buffer_copy(vcpu.run_area, kvm.KVM_RUN_UNION)
            assert (io.port, io.direction) == (0xF4, kvm.KVM_EXIT_IO_OUT)
            text += chr(vcpu.run_area[io.data_offset])
        assert reason == kvm.KVM_EXIT_HLT

print(text)
