"""What every test may ask for, and why a test may be skipped."""

import faulthandler
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

# How long an example takes says how busy the computer is.
settings.register_profile("tinyvmm", deadline=None)
settings.load_profile("tinyvmm")


def kvm_problem() -> str | None:
    """Why tiny guests cannot run on this computer, or None."""
    from tinyvmm import kvm
    from tinyvmm.errors import ConfigError

    try:
        with kvm.System():
            return None
    except ConfigError as error:
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("kvm") for item in items):
        problem = kvm_problem()
        for item in items:
            if problem and item.get_closest_marker("kvm"):
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(autouse=True)
def nothing_leaks_descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `kvm` leaves as many descriptors open as it found."""
    if request.node.get_closest_marker("kvm") is None:
        yield
        return
    before = set(os.listdir("/proc/self/fd"))
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


SOURCES = Path(__file__).parent / "kernels"
THREADS_END = 60.0  # seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A thread that a test has left behind fails the run, which it would else keep from ending."""
    left = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not thread.daemon
    ]
    end = time.monotonic() + THREADS_END
    for thread in left:
        thread.join(max(0, end - time.monotonic()))
    left = [thread for thread in left if thread.is_alive()]
    if left:
        sys.stderr.write(f"\nthreads that tests left behind: {left}\n")
        faulthandler.dump_traceback(2, all_threads=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.add_cleanup(lambda: _leave(pytest.ExitCode.TESTS_FAILED))


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Builds a kernel of tests/kernels: `build("told", start="pvh")`."""
    if shutil.which("gcc") is None or shutil.which("ld") is None:
        pytest.skip("no gcc or ld here: apt-get install gcc binutils")
    where = tmp_path_factory.mktemp("kernels")
    options = ["-m32", "-ffreestanding", "-fno-pie", "-fno-stack-protector", "-mno-sse", "-O1"]
    options += ["-fno-asynchronous-unwind-tables", "-mgeneral-regs-only"]

    def made(name: str, start: str | None = "multiboot") -> str:
        kernel = where / f"{name}-{start}"
        if not kernel.exists():
            objects = []
            for source in (f"{start}.S" if start else f"{name}.S", f"{name}.c" if start else None):
                if source is not None:
                    objects.append(str(where / f"{source}.o"))
                    command = ["gcc", *options, "-c", str(SOURCES / source), "-o", objects[-1]]
                    subprocess.run(command, check=True)
            command = [
                "ld",
                "-m",
                "elf_i386",
                "-n",
                "--no-warn-rwx-segments",
                "-T",
                str(SOURCES / "link.ld"),
                *objects,
            ]
            subprocess.run([*command, "-o", str(kernel)], check=True)
        return str(kernel)

    return made
