"""Exits a second: our loop, our loop beside a busy thread, and a minimal loop in C.

The same guest for all three: `out 0xf4, al; jmp`. Ours dispatches to a device on the bus; C only
looks at the reason and counts, so it is the limit of what this KVM can do.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from tinyvmm.machine import Machine

GUEST = bytes.fromhex("baf400 ee ebfd")
ROUNDS, SECONDS = 7, 0.6

C_LOOP = r"""
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
  double seconds = atof(argv[1]);
  int system = open("/dev/kvm", O_RDWR), vm = ioctl(system, KVM_CREATE_VM, 0);
  unsigned char *ram = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  memcpy(ram + 0x1000, "\xba\xf4\x00\xee\xeb\xfd", 6);
  struct kvm_userspace_memory_region region = {0, 0, 0, 1 << 20, (unsigned long)ram};
  ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
  int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  struct kvm_run *run = mmap(0, ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0),
                             PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  struct kvm_sregs sregs;
  ioctl(vcpu, KVM_GET_SREGS, &sregs);
  sregs.cs.base = sregs.cs.selector = 0;
  ioctl(vcpu, KVM_SET_SREGS, &sregs);
  struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
  ioctl(vcpu, KVM_SET_REGS, &regs);
  long count = 0;
  double start = now(), end;
  do {
    for (int i = 0; i < 1000; i++, count++)
      if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO) return 1;
    end = now();
  } while (end - start < seconds);
  printf("%f\n", count / (end - start));
  return 0;
}
"""


class Counter:
    """A device that counts writes."""

    name = "counter"

    def __init__(self) -> None:
        self.count = 0

    def read(self, offset: int, size: int) -> int:
        """Answer 0."""
        del offset, size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Count."""
        del offset, size, value
        self.count += 1


def ours(*, busy: bool) -> float:
    counter, stop = Counter(), threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number = number * 3 + 1 & 0xFFFF

    with Machine(memory=1 << 20, irqchip=False) as machine:
        machine.ports.add(0xF4, 4, counter)
        machine.boot_real_mode(GUEST)
        thread = threading.Thread(target=work)
        if busy:
            thread.start()
        machine.start()
        sleep(0.05)
        begin, before = perf_counter(), counter.count
        sleep(SECONDS)
        rate = (counter.count - before) / (perf_counter() - begin)
        stop.set()
    if busy:
        thread.join()
    return rate


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "loop"
        subprocess.run(
            ["gcc", "-O2", "-x", "c", "-o", str(program), "-"],
            input=C_LOOP,
            text=True,
            check=True,
        )

        def c_loop() -> float:
            command = [str(program), str(SECONDS)]
            return float(subprocess.run(command, check=True, capture_output=True).stdout)

        subjects: dict[str, Callable[[], float]] = {
            "C loop": c_loop,
            "ours": lambda: ours(busy=False),
            "ours, busy thread": lambda: ours(busy=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(ROUNDS):
            for name, measure in subjects.items():
                rates[name].append(measure())
    base = median(rates["C loop"])
    for name, values in rates.items():
        print(f"{name:20} {median(values):9.0f} exits/s   {median(values) / base:.2f} of C")
    sys.stdout.flush()
