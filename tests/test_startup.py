"""What a run has imported when its guest begins: nothing that is for others to ask it."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.test_kernel_image import make_vmlinux, write

ROOT = Path(__file__).parent.parent
TO_THE_FIRST_KVM_RUN = """
import gc, os, sys
from tinyvmm.cli.main import main
from tinyvmm.lab import probe
from tinyvmm.machine import Machine

def report(self):
    print(*sys.modules, flush=True)
    print(*[of.__name__ for of in tuple.__subclasses__() if is_ours(of)], flush=True)
    print(sum(generation["collections"] for generation in gc.get_stats()) - before, flush=True)
    self.close()
    os._exit(0)

def is_ours(tuples):
    return hasattr(tuples, "_field_defaults") and tuples.__module__.startswith("tinyvmm.")

Machine.start = report
probe.missing_for_linux = lambda: None  # the guest does not run
before = sum(generation["collections"] for generation in gc.get_stats())
sys.exit(main(["run", "--kernel", sys.argv[1], "--", "true"]))
"""
ASKED_BY_NOBODY_YET = """
import sys
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.methods.supervised import Supervised

run = Supervised("vsock")
server = ControlServer(sys.argv[1], run.methods)
assert "tinyvmm.methods.supervisor" not in sys.modules
print("listens", flush=True)
sys.stdin.read()
server.close()
"""
LATER = {
    "tinyvmm.guest.modules",
    "tinyvmm.inside",
    "tinyvmm.instances.control",
    "tinyvmm.instances.control_schema",
    "tinyvmm.instances.exec_client",
    "tinyvmm.instances.watching",
    "tinyvmm.methods.exec_streams",
    "tinyvmm.methods.inspection",
    "tinyvmm.methods.shares",
    "tinyvmm.methods.supervisor",
}
"""For whoever asks; for the first run with a kernel."""
NEVER = {"asyncio", "dataclasses", "inspect", "pathlib", "shutil", "subprocess", "tempfile"}
"""Large, and used on no way that each run takes."""


@pytest.mark.kvm
def test_what_nobody_has_asked_for_is_not_imported_before_the_guest_runs(tmp_path: Path) -> None:
    kernel = write(tmp_path / "vmlinux", make_vmlinux())
    command = [sys.executable, "-S", "-c", TO_THE_FIRST_KVM_RUN, kernel]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules, compiled, collections = done.stdout.splitlines()
    loaded = set(modules.split())
    assert "tinyvmm.command.turn" in loaded
    assert loaded & (LATER | NEVER) == set()
    assert collections == "0"  # of garbage that there cannot be
    # the base of the others, and what is made for each request: see named.py
    assert sys.version_info >= (3, 14) or set(compiled.split()) == {
        "NamedTuple",
        "Qid",
        "_Field",
        "Chain",
    }


def test_many_first_requests_at_once_are_answered_while_the_machine_starts(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    command = [sys.executable, "-c", ASKED_BY_NOBODY_YET, path]
    states: list[str] = []

    def ask() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            together.wait()
            sock.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "status"}\n')
            with sock.makefile() as lines:
                states.append(json.loads(lines.readline())["result"]["state"])

    together = threading.Barrier(8)
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        clients = [threading.Thread(target=ask) for _ in range(together.parties)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        process.communicate()
    assert states == ["starting"] * together.parties
    assert process.returncode == 0
