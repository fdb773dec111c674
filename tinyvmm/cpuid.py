"""What CPUID tells each vCPU: what this KVM supports, with topology put right.

KVM_GET_SUPPORTED_CPUID answers with the APIC ids and cache sharing of whichever host CPU ran the
call. Every vCPU here is one core with one thread in one package, so the leaves that describe
topology are written anew (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E):

    1           APIC id, count of logical CPUs, hypervisor bit, TSC-deadline timer
    4           cores in the package, threads that share each cache (Intel)
    0xB, 0x1F   the x2APIC id and its fields, thread and core (Intel)
    0x80000008  cores in the package (AMD)
    0x8000001D  as leaf 4 (AMD)
    0x8000001E  extended APIC id, core id (AMD)
"""

from tinyvmm.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2

_HTT = 1 << 28  # leaf 1 EDX
_TSC_DEADLINE = 1 << 24  # leaf 1 ECX
_HYPERVISOR = 1 << 31  # leaf 1 ECX
_LEVEL_THREAD, _LEVEL_CORE = 1, 2  # leaf 0xB ECX[15:8]
_LAST_LEVEL_CACHE = 3  # leaf 4 EAX[7:5]


def for_vcpu(
    supported: list[kvm_cpuid_entry2], apic_id: int, cpus: int, *, tsc_deadline: bool
) -> list[kvm_cpuid_entry2]:
    """Return the leaves for the vCPU `apic_id` of a machine of `cpus`; `supported` is unchanged.

    `tsc_deadline` says that the local APIC is KVM's own and has that timer (api.rst,
    KVM_GET_SUPPORTED_CPUID: the bit is never reported, user space must add it).
    """
    id_bits = (cpus - 1).bit_length()
    leaves = []
    for entry in supported:
        if entry.function in {0xB, 0x1F}:
            continue
        leaf = kvm_cpuid_entry2.from_buffer_copy(entry)
        if leaf.function == 1:
            leaf.ebx = leaf.ebx & 0xFFFF | cpus << 16 | apic_id << 24
            leaf.ecx |= _HYPERVISOR
            if tsc_deadline:
                leaf.ecx |= _TSC_DEADLINE
            leaf.edx = leaf.edx | _HTT if cpus > 1 else leaf.edx & ~_HTT
        elif leaf.function in {4, 0x8000001D} and leaf.eax & 0x1F:
            shared = cpus if leaf.eax >> 5 & 7 == _LAST_LEVEL_CACHE else 1
            # A field of six bits; for more cores there is leaf 0xB.
            cores = min(cpus, 64) - 1 << 26 if leaf.function == 4 else 0
            leaf.eax = leaf.eax & 0x3FFF | shared - 1 << 14 | cores
        elif leaf.function == 0x80000008:
            leaf.ecx = leaf.ecx & ~0xF0FF | id_bits << 12 | cpus - 1
        elif leaf.function == 0x8000001E:
            leaf.eax, leaf.ebx, leaf.ecx = apic_id, apic_id, 0
        leaves.append(leaf)
    for function in {entry.function for entry in supported} & {0xB, 0x1F}:
        leaves += _extended_topology(function, apic_id, cpus, id_bits)
    return leaves


def _extended_topology(
    function: int, apic_id: int, cpus: int, id_bits: int
) -> list[kvm_cpuid_entry2]:
    levels = ((0, 1, _LEVEL_THREAD), (id_bits, cpus, _LEVEL_CORE), (0, 0, 0))
    return [
        kvm_cpuid_entry2(
            function=function,
            index=index,
            flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=shift,
            ebx=count,
            ecx=level << 8 | index,
            edx=apic_id,
        )
        for index, (shift, count, level) in enumerate(levels)
    ]
