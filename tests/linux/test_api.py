"""Machines from Python on a real kernel; the pytest plugin with a real guest."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.linux.conftest import LONG, PATIENCE, ROOT, Runner, interpreter
from tinyvmm import Machine

pytestmark = pytest.mark.linux

CHECKS = ROOT / "tests" / "linux" / "api_checks.py"


def test_machines_are_used_as_subprocesses_are(guest: Runner) -> None:
    done = guest.program([interpreter(), "-I", "-S", str(CHECKS), str(ROOT)], timeout=LONG)
    assert (done.status, done.stderr) == (0, b""), done
    found = json.loads(done.stdout)
    machine = found["machine"]
    assert machine.pop("missing").endswith("command not found in the guest: 'nothing-there'")
    assert machine == {
        "awaited": ["nobody\n", "root\n"],
        "objects": [0, "himade when opened\n"],
        "broken": [1, "cat: /broken: Input/output error\n"],
        "merged": [3, "in\ne\no\nw\n"],
        "timeout": 2,
        "checked": 1,
        "thread": [0, 1, 2, 3, 4],
        "rip": 1,  # in the kernel's half
        "memory": "abcd",
        "trace": True,
        "copied": 100_000,
        "seen": True,
    }
    assert found["alone"] == {
        "said": "in\n/usr\n",
        "diff": ["A /added", "C ", "C /changed", "D /gone"],
        "opened": True,
    }
    assert found["left"] == {"descriptors": [], "threads": [], "directories": []}


def test_what_the_page_on_python_shows_is_so(guest: Runner) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks)
    done = guest.program([interpreter(), "-I", "-S", "-c", program], timeout=PATIENCE)
    assert (done.status, done.stderr) == (0, b""), done


@pytest.mark.in_vm
def test_a_marked_test_has_a_kernel_of_its_own_and_this_tree(tmp_path: Path) -> None:
    assert os.uname().nodename == "tinyvmm"
    assert os.geteuid() == 0
    assert Path("/proc/1/comm").read_text() == "init\n"
    (tmp_path / "file").write_text("under it")
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    assert list(tmp_path.iterdir()) == []
    assert Path(__file__).read_text().endswith("# the end\n")


@pytest.mark.in_vm
@pytest.mark.xfail(raises=ZeroDivisionError, strict=True, reason="so it is known to have run")
def test_a_marked_test_fails_here_as_it_does_there() -> None:
    assert os.uname().nodename != "tinyvmm" or 1 // 0


def test_a_fixture_is_a_machine_on_this_tree(vm: Machine) -> None:
    done = vm.run(["cat", __file__], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("# the end\n")


# the end
