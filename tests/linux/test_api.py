"""Machines from Python on a real kernel; the pytest plugin with a real guest."""

import json
import re
import sys

import pytest

from tests.linux.conftest import ROOT, Runner, interpreter

pytestmark = pytest.mark.linux

CHECKS = ROOT / "tests" / "linux" / "api_checks.py"


def test_machines_are_used_as_subprocesses_are(guest: Runner) -> None:
    done = guest.program([interpreter(), "-I", "-S", str(CHECKS), str(ROOT)], timeout=400)
    assert (done.status, done.stderr) == (0, b""), done
    found = json.loads(done.stdout)
    machine = found["machine"]
    assert machine.pop("missing").endswith("command not found in the guest: 'nothing-there'")
    assert machine == {
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
        "left": True,
        "seen": True,
    }
    assert found["alone"] == {
        "run": [4, "in\n/usr\n", "e\n"],
        "diff": ["A /added", "C ", "C /changed", "D /gone"],
        "manifest": [0, True, True],
        "awaited": ["a\n", "b\n"],
    }
    assert found["descriptors"]["more"] <= 0
    assert found["threads"] == {"left": []}
    assert found["directories"] == {"left": []}


def test_what_the_page_on_python_shows_is_so(guest: Runner) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks)
    done = guest.program([interpreter(), "-I", "-S", "-c", program], timeout=240)
    assert (done.status, done.stderr) == (0, b""), done


MARKED = """
import os, subprocess
import pytest

@pytest.mark.in_vm
def test_mounts(tmp_path):
    assert os.uname().nodename == "tinyvmm"
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)

@pytest.mark.in_vm
def test_fails():
    value = os.uname().nodename
    assert value == "here"
"""


def test_a_marked_test_runs_in_a_guest_and_fails_as_if_here(guest: Runner) -> None:
    where = guest.directory("in-vm")
    (where / "test_it.py").write_text(MARKED)
    (where / "pytest.ini").write_text("[pytest]\n")
    plain = ["env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", sys.executable, "-m", "pytest"]
    done = guest.program([*plain, "-p", "tinyvmm.pytest_tinyvmm"], cwd=where, timeout=400)
    output = done.stdout.decode()
    assert "1 failed, 1 passed" in output, done
    assert "AssertionError: assert 'tinyvmm' == 'here'" in output
    assert "test_it.py:13: AssertionError" in output
