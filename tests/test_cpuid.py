"""What CPUID tells of topology, decoded as the manuals say, for any number of CPUs."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tinyvmm import cpuid
from tinyvmm.kvm import kvm_cpuid_entry2

# Leaves as some processor may report them, with everything about topology wrong for us: as if asked
# on CPU 0xAB of a host with two threads a core. Caches: data, instruction, then two unified.
_CACHES = [(1, 1), (2, 1), (3, 2), (3, 3)]  # type, level


def host(vendor: str) -> list[kvm_cpuid_entry2]:
    leaves = [
        kvm_cpuid_entry2(function=0, eax=0x1F),
        kvm_cpuid_entry2(function=1, eax=0x806F8, ebx=0xAB_10_08_00, ecx=1 << 21, edx=1 << 28),
        kvm_cpuid_entry2(function=0x80000008, eax=0x3030, ecx=0x7_0F),
    ]
    leaf = 4 if vendor == "intel" else 0x8000001D
    for index, (kind, level) in enumerate([*_CACHES, (0, 0)]):
        eax = kind | level << 5 | 0x3F << 14 | (0x1F << 26 if vendor == "intel" else 0)
        leaves.append(kvm_cpuid_entry2(function=leaf, index=index, flags=1, eax=eax, ebx=0x1C0003F))
    if vendor == "intel":
        for function in (0xB, 0x1F):
            for index, (shift, count, kind) in enumerate([(1, 2, 1), (7, 64, 2), (0, 0, 0)]):
                leaves.append(
                    kvm_cpuid_entry2(
                        function=function,
                        index=index,
                        flags=1,
                        eax=shift,
                        ebx=count,
                        ecx=kind << 8 | index,
                        edx=0xAB,
                    )
                )
    else:
        leaves.append(kvm_cpuid_entry2(function=0x8000001E, eax=0xAB, ebx=0x155, ecx=0x301))
    return leaves


def leaf(leaves: Sequence[kvm_cpuid_entry2], function: int, index: int = 0) -> kvm_cpuid_entry2:
    (found,) = [e for e in leaves if (e.function, e.index) == (function, index)]
    return found


def bits(value: int, high: int, low: int) -> int:
    return value >> low & (1 << high - low + 1) - 1


CPUS = st.integers(1, 255).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@given(CPUS, st.booleans())
def test_leaf_1_has_the_apic_id_and_the_count(given_cpus: tuple[int, int], deadline: bool) -> None:
    cpus, apic_id = given_cpus
    one = leaf(cpuid.for_vcpu(host("intel"), apic_id, cpus, tsc_deadline=deadline), 1)
    assert bits(one.ebx, 31, 24) == apic_id  # SDM 2A, CPUID, table 3-8
    assert bits(one.ebx, 15, 8) == 8  # the CLFLUSH line size is left alone
    assert bits(one.edx, 28, 28) == (cpus > 1)  # HTT
    if cpus > 1:
        assert bits(one.ebx, 23, 16) == cpus
    assert bits(one.ecx, 31, 31) == 1  # a hypervisor is there
    assert bits(one.ecx, 24, 24) == deadline
    assert bits(one.ecx, 21, 21) == 1


@given(CPUS)
def test_intels_leaves_agree_that_every_cpu_is_a_core(given_cpus: tuple[int, int]) -> None:
    cpus, apic_id = given_cpus
    leaves = cpuid.for_vcpu(host("intel"), apic_id, cpus, tsc_deadline=True)
    for index, (kind, level) in enumerate(_CACHES):
        four = leaf(leaves, 4, index)
        assert (bits(four.eax, 4, 0), bits(four.eax, 7, 5)) == (kind, level)
        sharing = bits(four.eax, 25, 14) + 1
        assert sharing == (cpus if level == 3 else 1)
        # The field has six bits: 63 stands for 64 or more, which leaf 0xB counts.
        assert bits(four.eax, 31, 26) + 1 == min(cpus, 64)
    for function in (0xB, 0x1F):
        thread, core, end = (leaf(leaves, function, index) for index in range(3))
        assert {thread.edx, core.edx, end.edx} == {apic_id}  # x2APIC ID
        assert (bits(thread.ecx, 15, 8), bits(core.ecx, 15, 8), bits(end.ecx, 15, 8)) == (1, 2, 0)
        assert [bits(e.ecx, 7, 0) for e in (thread, core, end)] == [0, 1, 2]
        assert bits(thread.ebx, 15, 0) == 1
        assert bits(core.ebx, 15, 0) == cpus
        assert bits(end.ebx, 15, 0) == 0
        # Shifted by that many bits, the ids of one core's threads are equal, and of the package's.
        ids = range(cpus)
        assert len({i >> bits(thread.eax, 4, 0) for i in ids}) == cpus
        assert len({i >> bits(core.eax, 4, 0) for i in ids}) == 1


@given(CPUS)
def test_amds_leaves_agree_that_every_cpu_is_a_core(given_cpus: tuple[int, int]) -> None:
    cpus, apic_id = given_cpus
    leaves = cpuid.for_vcpu(host("amd"), apic_id, cpus, tsc_deadline=False)
    sizes = leaf(leaves, 0x80000008)  # APM 3, E.4.7
    assert bits(sizes.ecx, 7, 0) + 1 == cpus
    assert 1 << bits(sizes.ecx, 15, 12) >= cpus  # ApicIdSize
    assert sizes.eax == 0x3030
    for index, (kind, level) in enumerate(_CACHES):
        cache = leaf(leaves, 0x8000001D, index)
        assert (bits(cache.eax, 4, 0), bits(cache.eax, 7, 5)) == (kind, level)
        assert bits(cache.eax, 25, 14) + 1 == (cpus if level == 3 else 1)
    topology = leaf(leaves, 0x8000001E)  # E.4.17
    assert topology.eax == apic_id  # ExtendedApicId
    assert bits(topology.ebx, 15, 8) == 0  # ThreadsPerCore less one
    assert bits(topology.ebx, 7, 0) == apic_id & 0xFF  # CoreId
    assert bits(topology.ecx, 10, 8) == 0  # NodesPerProcessor less one


@given(CPUS)
def test_what_the_host_supports_is_left_as_it_was(given_cpus: tuple[int, int]) -> None:
    before = host("intel")
    cpuid.for_vcpu(before, given_cpus[1], given_cpus[0], tsc_deadline=True)
    assert list(map(bytes, before)) == list(map(bytes, host("intel")))
