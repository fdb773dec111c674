"""docs/threads.md: every lock and every named thread is in it, and locks are taken in its order."""

import ast
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from tests.bad_guests import VIRTIO
from tests.test_chaos import DEVICES, ENDS, MEMORY, play
from tinyvmm import layout
from tinyvmm.devices.msix import PCI_MSIX_FLAGS_ENABLE, Msix
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "threads.md").read_text()
LOCKS = {"Lock", "RLock", "Condition"}
SOURCES = sorted((ROOT / "tinyvmm").rglob("*.py"))


def named(text: str) -> set[str]:
    """Return everything in backticks."""
    return set(re.findall(r"`([^`]+)`", text))


def order() -> list[str]:
    """Return what the table of locks names in its first column, from the top."""
    table = PAGE.partition("## What guards what")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    return [name for cell in first for name in re.findall(r"`([^`]+)`", cell)]


def called(node: ast.AST) -> str:
    """Return the name of what is called, without its module; "" if nothing is."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def made_in(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every assignment of something that is called: `Class.attribute`, or `module.name`."""

    def look(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Assign) and isinstance(child.value, ast.Call):
                target = child.targets[0]
                if isinstance(target, ast.Attribute):
                    yield f"{owner}.{target.attr}", child.value
                elif isinstance(target, ast.Name):
                    yield f"{owner}.{target.id}", child.value
            yield from look(child, child.name if isinstance(child, ast.ClassDef) else owner)

    return look(ast.parse(path.read_text()), path.stem)


def test_every_lock_has_a_row_or_its_reason() -> None:
    found = {name for path in SOURCES for name, call in made_in(path) if called(call) in LOCKS}
    assert len(found) > 40
    assert found - named(PAGE) == set()
    assert {name for name in order() if name.count(".") == 1} - found == set(), "is there no more"


def test_every_thread_with_a_name_is_there() -> None:
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if called(node) == "Thread" and isinstance(node, ast.Call):
                for given in node.keywords:
                    if given.arg == "name" and isinstance(given.value, ast.Constant):
                        found.add(given.value.value)
    assert len(found) > 10
    assert found - named(PAGE) == set()


class Watch:
    """Which lock was taken while which other one was held."""

    def __init__(self) -> None:
        self.held = threading.local()
        self.seen: dict[tuple[str, str], str] = {}
        self.names = {
            (str(path), call.lineno): name
            for path in SOURCES
            for name, call in made_in(path)
            if called(call) in LOCKS
        }

    def maker(self, make: Callable[[], Any]) -> Callable[[], Any]:
        """Return what makes locks that are watched, where they are ours."""

        def made() -> Any:
            frame = sys._getframe(1)
            while frame.f_code.co_filename == threading.__file__ and frame.f_back is not None:
                frame = frame.f_back
            name = self.names.get((frame.f_code.co_filename, frame.f_lineno))
            return make() if name is None else Watched(self, name, make())

        return made

    def take(self, lock: "Watched") -> None:
        """Note that this thread has it now."""
        own: list[Watched] = vars(self.held).setdefault("locks", [])
        if lock not in own:
            for other in own:
                self.seen.setdefault((other.name, lock.name), threading.current_thread().name)
        own.append(lock)

    def drop(self, lock: "Watched") -> None:
        """Note that it has it once less; one that has not may let go of a plain lock as well."""
        own: list[Watched] = vars(self.held).setdefault("locks", [])
        if lock in own:
            del own[len(own) - 1 - own[::-1].index(lock)]


class Watched:
    """A lock, or a reentrant one."""

    def __init__(self, watch: Watch, name: str, lock: Any) -> None:
        self.watch, self.name, self.lock = watch, name, lock

    def acquire(self, *how: Any, **more: Any) -> bool:
        taken = bool(self.lock.acquire(*how, **more))
        if taken:
            self.watch.take(self)
        return taken

    def release(self) -> None:
        self.watch.drop(self)
        self.lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return self in vars(self.watch.held).get("locks", [])

    def _release_save(self) -> int:
        count = int(self.watch.held.locks.count(self))
        for _ in range(count):
            self.release()
        return count

    def _acquire_restore(self, count: int) -> None:
        for _ in range(count):
            self.acquire()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Has every lock of ours that is made from now on watched."""
    watch = Watch()
    made = {"Lock": watch.maker(threading.Lock), "RLock": watch.maker(threading.RLock)}
    ours = [module for name, module in sys.modules.items() if name.startswith("tinyvmm.")]
    for module in (threading, *ours):
        for name, maker in made.items():
            if getattr(module, name, None) is getattr(threading, name) or module is threading:
                monkeypatch.setattr(module, name, maker)
    return watch


def route(device: VirtioDevice) -> None:
    """Have a vector of `device` lead to a message: the worst guest comes to that only by chance."""
    transport: Any = device._interrupt
    msix: Msix = transport.__self__.msix
    msix.set_flags(PCI_MSIX_FLAGS_ENABLE)
    for offset, value in ((0, layout.LOCAL_APIC_GPA), (4, 0), (8, 0x77), (12, 0)):
        msix.write(offset, 4, value)


@pytest.mark.kvm
def test_locks_are_taken_in_the_order_of_the_page(watch: Watch, build: Callable[..., str]) -> None:
    paused = threading.Event()

    def pause(machine: Machine) -> None:
        while not machine.cause:
            machine.pause()
            paused.set()
            machine.resume()
            sleep(0.02)  # or the guest would come to nothing

    made = [VIRTIO[name]() for name in DEVICES]
    try:
        with Machine(memory=MEMORY, cpus=2) as machine:
            machine.add_board(console=lambda data: None)
            play(machine, made, build("chaos"), 7)
            pauser = threading.Thread(target=pause, args=(machine,))
            pauser.start()
            assert machine.wait(ENDS) == StopCause.DEVICE
            pauser.join()
            route(made[0].device)
    finally:
        for one in made:
            one.end()
    assert paused.is_set()
    rank = {name: place for place, name in enumerate(order())}
    taken = {pair: who for pair, who in watch.seen.items() if "Machine._running" not in pair}
    assert {
        ("Machine._pause_lock", "Vcpu._gate"),
        ("PciBus.lock", "Bus._lock"),
        ("VirtioDevice.lock", "Msix._lock"),
        ("Msix._lock", "MsiRoutes._lock"),
    } <= taken.keys()
    wrong = {pair: who for pair, who in taken.items() if not rank[pair[0]] < rank[pair[1]]}
    assert wrong == {}
