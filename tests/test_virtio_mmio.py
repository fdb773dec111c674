"""The MMIO transport, register by register, as a driver meets it."""

import json
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    EVENT_IDX,
    FAILED,
    FEATURES_OK,
    INDIRECT,
    NEEDS_RESET,
    VERSION_1,
    Driver,
    Line,
    Ram,
)
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.mmio import VirtioMmio
from tinyvmm.devices.virtio.queue import Virtqueue

HEADER = Path("/usr/include/linux/virtio_mmio.h")
CONFIG = bytes(range(0x11, 0x1C))  # 11 bytes: no width divides them all
HANG = 120.0  # seconds, after which a thread is taken to wait for ever


class Counter(VirtioDevice):
    """Gives every chain back and counts; `gate`, if set, is waited for first."""

    def __init__(self) -> None:
        super().__init__(
            "counter", 77, queue_sizes=(4, 8), features=1 << 3 | 1 << 40, config=CONFIG
        )
        self.handled = 0
        self.entered = threading.Event()
        self.gate: threading.Event | None = None

    def handle(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            self.entered.set()
            if self.gate is not None:
                self.gate.wait()
            self.handled += 1
            queue.push(chain, 0)


def counter() -> tuple[Driver, Counter]:
    device = Counter()
    return Driver(device), device


# --- the data sheet ---------------------------------------------------------------------------


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_every_register_is_where_the_kernels_header_says() -> None:
    defined = {
        name.replace("_", "")
        .lower()
        .replace("avail", "driver")
        .replace("queueused", "queuedevice"): int(offset, 16)
        for name, offset in re.findall(
            r"^#define VIRTIO_MMIO_(\w+)\s+(0x[0-9a-f]+)$", HEADER.read_text(), re.MULTILINE
        )
    }
    legacy = {"guestpagesize", "queuealign", "queuepfn", "config"}
    ours = {register.name.lower(): register.offset for register in VirtioMmio.REGISTERS}
    assert ours == {name: offset for name, offset in defined.items() if name not in legacy}


def test_the_first_registers_say_what_this_is() -> None:
    driver, _ = counter()
    assert driver.read(0x000).to_bytes(4, "little") == b"virt"
    assert driver.read(0x004) == 2
    assert driver.read(0x008) == 77
    assert driver.read(0x00C) != 0


def test_there_is_no_shared_memory_region() -> None:
    driver, _ = counter()
    driver.write(0x0AC, 0)
    assert [driver.read(offset) for offset in (0x0B0, 0x0B4)] == [0xFFFF_FFFF] * 2


def test_registers_take_no_width_but_four_bytes() -> None:
    driver, _ = counter()
    assert driver.mmio.read(0x000, 1) == driver.mmio.read(0x000, 8) == 0
    assert driver.mmio.read(0x002, 4) == 0
    driver.mmio.write(0x070, 1, ACKNOWLEDGE)
    driver.mmio.write(0x070, 8, ACKNOWLEDGE)
    assert driver.status == 0


@given(offset=st.integers(0, 0xEFF), size=st.sampled_from((1, 2, 4, 8)))
def test_configuration_space_reads_at_any_width_and_offset_and_ends_in_zeros(
    offset: int, size: int
) -> None:
    driver, _ = counter()
    expected = (CONFIG + bytes(0xF10))[offset : offset + size]
    assert driver.mmio.read(0x100 + offset, size) == int.from_bytes(expected, "little")


def test_configuration_space_ignores_writes() -> None:
    driver, _ = counter()
    driver.mmio.write(0x100, 4, 0)
    assert driver.mmio.read(0x100, 1) == CONFIG[0]


def test_a_configuration_change_counts_a_generation_and_interrupts_a_running_driver() -> None:
    driver, device = counter()
    before = driver.read(0x0FC)
    device.set_config(b"new")
    assert not driver.line.level
    driver.start()
    device.set_config(b"newer")
    assert driver.read(0x060) == 2
    assert driver.line.level
    assert driver.read(0x0FC) == before + 2
    assert driver.mmio.read(0x100, 8) == int.from_bytes(b"newer", "little")


# --- features ---------------------------------------------------------------------------------


def test_the_device_offers_its_own_features_and_the_queues() -> None:
    driver, _ = counter()
    assert driver.offered() == 1 << 3 | 1 << 40 | VERSION_1 | EVENT_IDX | INDIRECT
    driver.write(0x014, 2)
    assert driver.read(0x010) == 0
    driver.write(0x014, 0xFFFF_FFFF)
    assert driver.read(0x010) == 0


@given(accepted=st.sets(st.integers(0, 127)))
@settings(deadline=None)
def test_features_ok_stays_exactly_when_all_were_offered_and_version_1_is_among_them(
    accepted: set[int],
) -> None:
    driver, _ = counter()
    offered = driver.offered()
    features = sum(1 << bit for bit in accepted)
    assert driver.negotiate(features) == (not features & ~offered and bool(features & VERSION_1))


@given(subset=st.sets(st.sampled_from((3, 28, 29, 40))))
def test_any_subset_of_what_was_offered_is_accepted_with_version_1(subset: set[int]) -> None:
    driver, _ = counter()
    assert driver.negotiate(VERSION_1 | sum(1 << bit for bit in subset))


def test_features_cannot_change_after_features_ok() -> None:
    driver, device = counter()
    assert driver.negotiate(VERSION_1)
    driver.write(0x024, 0)
    driver.write(0x020, 1 << 5)
    assert device.driver_features == VERSION_1


def test_without_features_ok_there_is_no_driver_ok_and_no_queue() -> None:
    driver, device = counter()
    assert not driver.negotiate(0)
    driver.write(0x070, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER
    driver.set_up(0)
    assert driver.read(0x044) == 0
    driver.write(0x050, 0)
    assert device.handled == 0


# --- status -----------------------------------------------------------------------------------


def test_a_driver_adds_status_bits_and_only_reset_takes_them_away() -> None:
    driver, _ = counter()
    driver.start()
    driver.write(0x070, ACKNOWLEDGE)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    driver.write(0x070, 0xFF)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED
    driver.write(0x070, 0)
    assert driver.status == 0


def test_a_driver_cannot_set_or_clear_needs_reset() -> None:
    driver, device = counter()
    driver.start()
    driver.write(0x070, NEEDS_RESET | ACKNOWLEDGE)
    assert not driver.status & NEEDS_RESET
    with device.lock:
        device.fail("for the test")
    driver.write(0x070, ACKNOWLEDGE | DRIVER)
    assert driver.status & NEEDS_RESET


def test_reset_forgets_queues_features_selectors_and_interrupts() -> None:
    driver, device = counter()
    queues = driver.start()
    queues[1].send([b"x"], [])
    assert driver.line.level
    fresh = Driver(Counter()).mmio.save()
    driver.write(0x070, 0)
    assert not driver.line.level
    assert driver.mmio.save() == fresh
    driver.write(0x050, 1)
    assert device.handled == 1


def test_reset_waits_for_the_request_in_hand_and_no_chain_is_given_back_after_it() -> None:
    driver, device = counter()
    queue = driver.start()[0]
    device.gate = threading.Event()
    queue.add([b"x"], [])
    kick = threading.Thread(target=driver.write, args=(0x050, 0))
    kick.start()
    device.entered.wait()
    reset = threading.Thread(target=driver.write, args=(0x070, 0))
    reset.start()
    device.gate.set()
    kick.join()
    reset.join()
    assert driver.status == 0
    assert device.handled == 1
    assert not driver.line.level
    assert driver.start()[0].send([b"y"], []) is not None
    assert device.handled == 2


def test_an_interrupt_is_acknowledged_while_another_request_is_in_hand() -> None:
    driver, device = counter()
    queue = driver.start()[0]
    queue.send([b"x"], [])
    assert driver.line.level
    device.gate = threading.Event()
    device.entered.clear()
    queue.add([b"y"], [])
    kick = threading.Thread(target=driver.write, args=(0x050, 0))
    kick.start()
    device.entered.wait()
    acknowledge = threading.Thread(target=driver.interrupted)
    acknowledge.start()
    acknowledge.join(HANG)
    waited = acknowledge.is_alive()
    device.gate.set()
    kick.join()
    assert not waited


# --- queues -----------------------------------------------------------------------------------


def test_a_queue_that_does_not_exist_has_no_size_and_ignores_everything() -> None:
    driver, device = counter()
    driver.start()
    before = driver.mmio.save()["device"]
    for sel in (2, 3, 0xFFFF_FFFF):
        driver.write(0x030, sel)
        assert driver.read(0x034) == driver.read(0x044) == 0
        for offset in (0x038, 0x044, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4):
            driver.write(offset, 1)
        driver.write(0x050, sel)
    assert driver.mmio.save()["device"] == before
    assert device.handled == 0


def test_each_queue_has_its_own_greatest_size() -> None:
    driver, _ = counter()
    sizes = []
    for sel in (0, 1):
        driver.write(0x030, sel)
        sizes.append(driver.read(0x034))
    assert sizes == [4, 8]


def test_a_queue_in_use_does_not_move() -> None:
    driver, device = counter()
    queue = driver.start()[0]
    driver.write(0x030, 0)
    before = driver.mmio.save()
    for offset in (0x038, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4):
        driver.write(offset, 0xDEAD_BEEF)
    driver.write(0x044, 1)
    assert driver.mmio.save() == before
    queue.send([b"x"], [])
    assert device.handled == 1


def test_a_queue_can_be_stopped_and_started_elsewhere() -> None:
    driver, device = counter()
    old = driver.start()[0]
    driver.write(0x030, 0)
    driver.write(0x044, 0)
    assert driver.read(0x044) == 0
    old.add([b"x"], [])
    driver.write(0x050, 0)
    assert device.handled == 0
    driver.set_up(0).send([b"y"], [])
    assert device.handled == 1


def test_addresses_have_sixty_four_bits() -> None:
    base = 0x12_3456_7000
    driver = Driver(Counter(), Ram(base=base))
    queue = driver.start()[0]
    assert queue.desc_gpa >= base
    queue.send([b"x"], [])
    assert len(queue.used()) == 1


def test_chains_added_before_driver_ok_wait_for_it_even_if_the_kick_came_too_early() -> None:
    driver, device = counter()
    assert driver.negotiate(driver.offered())
    queue = driver.set_up(1)
    queue.send([b"early"], [])
    assert device.handled == 0
    driver.write(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    assert device.handled == 1


# --- interrupts -------------------------------------------------------------------------------


def test_the_line_is_high_until_every_cause_is_acknowledged() -> None:
    driver, device = counter()
    queue = driver.start(without=EVENT_IDX)[0]
    queue.send([b"x"], [])
    device.set_config(b"")
    queue.send([b"x"], [])
    assert driver.read(0x060) == 3
    assert driver.line.rises == 1
    driver.write(0x064, 1)
    assert driver.line.level
    driver.write(0x064, 2)
    assert not driver.line.level
    assert driver.read(0x060) == 0


def test_loading_drives_the_line_as_it_was() -> None:
    driver, _ = counter()
    quiet = driver.mmio.save()
    driver.start()[0].send([b"x"], [])
    raised = driver.mmio.save()
    driver.mmio.load(quiet)
    assert not driver.line.level
    driver.mmio.load(raised)
    assert driver.line.level
    assert driver.interrupted()


registers = st.sampled_from([register.offset for register in VirtioMmio.REGISTERS])
access = st.tuples(
    st.booleans(),
    st.one_of(registers, registers, st.integers(0, 0xFFF)),
    st.sampled_from((4, 4, 4, 1, 2, 8)),
    st.one_of(
        st.integers(0, 15),
        st.sampled_from((1, 3, 11, 15, 0x10_0000, 0x10_1000, 0x2000_0000, 0xFFFF_FFFF)),
        st.integers(0, (1 << 64) - 1),
    ),
)


@given(script=st.lists(access, max_size=80), started=st.booleans(), seed=st.binary(max_size=300))
@settings(deadline=None)
def test_random_accesses_never_raise_and_keep_the_line_true_to_the_status(
    script: list[tuple[bool, int, int, int]], started: bool, seed: bytes
) -> None:
    driver, _ = counter()
    if started:
        driver.start()
    driver.ram.view(driver.ram.base, len(seed))[:] = seed
    for write, offset, size, value in script:
        if write:
            driver.mmio.write(offset, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= driver.mmio.read(offset, size) < 1 << 8 * size
        assert driver.line.level == (driver.read(0x060) != 0)


@given(
    before=st.lists(access, max_size=30),
    after=st.lists(access, max_size=30),
    started=st.booleans(),
)
@settings(deadline=None)
def test_a_device_saved_as_json_and_loaded_elsewhere_answers_as_the_first(
    before: list[tuple[bool, int, int, int]],
    after: list[tuple[bool, int, int, int]],
    started: bool,
) -> None:
    def play(mmio: VirtioMmio, script: list[tuple[bool, int, int, int]]) -> list[int]:
        answers = []
        for write, offset, size, value in script:
            if write:
                mmio.write(offset, size, value & ((1 << 8 * size) - 1))
            else:
                answers.append(mmio.read(offset, size))
        return answers

    driver, _ = counter()
    if started:
        driver.start()[1].add([b"x"], [])
    play(driver.mmio, before)
    state = json.loads(json.dumps(driver.mmio.save()))
    other_ram, line = Ram(), Line()
    other_ram.data[:] = driver.ram.data
    other = VirtioMmio(Counter(), other_ram, line)
    other.load(state)
    assert line.level == driver.line.level
    everything = [(False, register.offset, 4, 0) for register in VirtioMmio.REGISTERS]
    assert play(other, after + everything) == play(driver.mmio, after + everything)
    assert other.save() == driver.mmio.save()
    assert other_ram.data == driver.ram.data
