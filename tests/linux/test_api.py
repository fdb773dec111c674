"""Machines from Python on a real kernel."""

import json
import re

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
    done = guest.program([interpreter(), "-I", "-S", "-c", program], timeout=240)
    assert (done.status, done.stderr) == (0, b""), done
