"""The pytest plugin, in a pytest of its own whose machines, and whose lab, are this computer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.local_guest import runtime as runtime  # noqa: PLC0414 (a fixture)

ROOT = Path(__file__).parent.parent

CONFTEST = """
import os, pathlib, subprocess, sys
import pytest
from tests import local_guest
from tinyvmm.errors import ConfigError
from tinyvmm.lab.lab import Completed

patch = pytest.MonkeyPatch()

class Lab:
    def __enter__(self):
        return self
    def __exit__(self, *exc):
        pass
    def run(self, argv, *, stdin, cwd, timeout):
        print("the lab starts")
        done = subprocess.run(argv, input=stdin, capture_output=True, cwd=cwd)
        return Completed(done.returncode, done.stdout, done.stderr, False)

def pytest_configure(config):
    os.environ["WHERE"] = worker = config.getoption("tinyvmm_worker") or "here"
    local_guest.replace_machines(pathlib.Path(os.environ["SOCKETS"]), patch)
    if worker == "here" and "NO_KVM" in os.environ:
        def refuse():
            raise ConfigError("this KVM is none")
        patch.setattr("tinyvmm.vm.check_runs_linux", refuse)
        patch.setattr("tinyvmm.lab.lab.Lab", Lab)
        patch.setattr("tinyvmm.command.run.prepare_kernel", lambda _: [open(os.devnull)])
"""

TESTS = """
import os, subprocess
import pytest

@pytest.fixture(scope="module")
def made():
    print("made", os.getpid())
    yield os.getpid()

def test_here():
    assert os.environ["WHERE"] == "here"

@pytest.mark.in_vm
def test_passes(tmp_path, made):
    assert os.environ["WHERE"] == "guest"
    subprocess.run(["sh", "-c", "echo to the real stdout; cat"], check=True)
    assert made == os.getpid()

@pytest.mark.in_vm
@pytest.mark.parametrize("number", [1, 2])
def test_fails(number, made):
    print("seen on stdout")
    words = {"number": number}
    assert words == {"number": 1}, "the numbers differ"

@pytest.mark.in_vm
@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

def test_with_a_machine(vm):
    assert vm.run(["echo", "hi"], capture_output=True).stdout == b"hi\\n"

def test_with_the_same(vm, fresh_vm):
    assert vm.running and fresh_vm.running and vm is not fresh_vm
"""


def pytest_there(
    tmp_path: Path, runtime: Path, *arguments: str, ini: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = --strict-markers\n{ini}\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tinyvmm.pytest_tinyvmm", "-rs", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SOCKETS": str(runtime), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_marked_test_runs_in_the_guest_and_is_reported_as_if_here(
    tmp_path: Path, runtime: Path
) -> None:
    done = pytest_there(tmp_path, runtime)
    assert "1 failed, 5 passed, 1 skipped" in done.stdout, done
    # As if it had run here: its line, the rewritten assertion, what it printed.
    assert "test_it.py:24: AssertionError" in done.stdout
    assert "assert {'number': 2} == {'number': 1}" in done.stdout
    assert "the numbers differ" in done.stdout
    assert "seen on stdout" in done.stdout
    assert "not today" in done.stdout
    assert done.returncode == 1
    assert os.listdir(runtime) == []


def test_without_a_kvm_for_linux_all_of_them_run_in_one_lab(tmp_path: Path, runtime: Path) -> None:
    done = pytest_there(tmp_path, runtime, "-s", NO_KVM="1")
    assert "1 failed, 5 passed, 1 skipped" in done.stdout, done
    assert "assert {'number': 2} == {'number': 1}" in done.stdout
    assert done.stdout.count("the lab starts") == 1


def test_where_tests_are_distributed_a_worker_does_all_of_its_own(
    tmp_path: Path, runtime: Path
) -> None:
    for env in ({}, {"NO_KVM": "1"}):
        done = pytest_there(tmp_path, runtime, "-n", "1", **env)
        assert "1 failed, 5 passed, 1 skipped" in done.stdout, done


def test_a_fixture_of_that_name_that_is_the_tests_own_needs_no_machine(
    tmp_path: Path, runtime: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/test_own.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def vm():\n"
        "    return 7\n"
        "def test_own(vm):\n"
        "    assert vm == 7\n"
    )
    done = pytest_there(tmp_path, runtime, "-s", "own", NO_KVM="1")
    assert "1 passed" in done.stdout, done
    assert "the lab starts" not in done.stdout


def test_without_a_kvm_tests_may_be_skipped_or_failed_and_say_why(
    tmp_path: Path, runtime: Path
) -> None:
    ini = "tinyvmm_without_kvm = {}"
    done = pytest_there(tmp_path, runtime, ini=ini.format("skip"), NO_KVM="1")
    assert "1 passed, 6 skipped" in done.stdout, done
    assert "this KVM is none" in done.stdout
    done = pytest_there(tmp_path, runtime, ini=ini.format("fail"), NO_KVM="1")
    assert "1 passed, 6 errors" in done.stdout, done
    assert "this KVM is none" in done.stdout
    done = pytest_there(tmp_path, runtime, ini=ini.format("hope"))
    assert "tinyvmm_without_kvm: give lab, skip, fail" in done.stderr
    assert done.returncode == pytest.ExitCode.USAGE_ERROR


def test_a_guest_whose_pytest_dies_fails_its_tests_with_what_it_said(
    tmp_path: Path, runtime: Path
) -> None:
    dies = "\n@pytest.mark.in_vm\ndef test_dies():\n    os.write(2, b'last words');os._exit(3)\n"
    (tmp_path / "test_dies.py").write_text(f"import os, pytest\n{dies}")
    done = pytest_there(tmp_path, runtime, "test_dies.py")
    assert "1 error" in done.stdout, done
    assert "the guest's pytest ended" in done.stdout


def test_a_worker_looks_into_no_file_without_tests_for_it(tmp_path: Path, runtime: Path) -> None:
    looked = tmp_path / "looked"
    (tmp_path / "test_other.py").write_text(
        "import os\n"
        f"with open({str(looked)!r}, 'a') as file:\n"
        "    print(os.environ['WHERE'], file=file)\n"
        "def test_nothing(): pass\n"
    )
    done = pytest_there(tmp_path, runtime, NO_KVM="1")
    assert "1 failed, 6 passed, 1 skipped" in done.stdout, done.stdout
    assert looked.read_text() == "here\n"


def test_the_plugin_is_found_by_its_entry_point() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = "tinyvmm.pytest_tinyvmm"
    assert project["entry-points"]["pytest11"] == {ours: ours}


def test_loading_the_plugin_loads_no_machine() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import tinyvmm.pytest_tinyvmm;"
        "print([name for name in set(sys.modules) - before if name.startswith('tinyvmm.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "['tinyvmm.pytest_tinyvmm']\n"
