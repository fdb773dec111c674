"""Linux guests for the tests: on this computer's KVM where it can run them, else in one lab.

Where neither works the tests fail: a run of this directory in which no Linux ran proves nothing.
"""

import compileall
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.lab.lab import Completed, Lab, LabError, python_command

ROOT = Path(__file__).parent.parent.parent
MAIN = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'tinyvmm'; "
    "from tinyvmm.cli.main import main; sys.exit(main())"
)

PATIENCE = 600.0  # seconds for a command; only a hang takes as long, however busy the computer is
LONG = 1500.0  # for one that does very much

FAILED_LABS: list[str] = []
"""What became of labs that failed as a whole; each was replaced by another, once a command."""
TRIPLE_FAULT = b"the guest crashed before the command ended: triple fault"
REBOOT_BY_TRIPLE_FAULT = "reboot=t"  # of the kernel's command line


def linux_runs_here() -> bool:
    from tinyvmm.lab.probe import missing_for_linux

    try:
        return missing_for_linux() is None
    except ConfigError:
        return False


class Runner:
    """Runs programs where KVM can run Linux: in `lab`, or here if that is None."""

    def __init__(self, lab: Lab | None, shared: Path) -> None:
        self.lab = lab
        self.shared = shared  # a directory that both sides can write
        self._standing: list[list[str]] = []  # what every lab of now has to have had done

    def program(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        timeout: float = PATIENCE,
        pty: tuple[int, int] | None = None,
        cwd: str | Path = ROOT,
    ) -> Completed:
        if self.lab is not None:
            # QEMU's emulation of SVM fails now and then, whatever runs in it (docs/lab.md): the lab
            # hangs, or ends, or a guest of it has a triple fault. Then the command is repeated,
            # once and in a new lab, and it is reported: a fault of ours comes again. A command that
            # hangs in a lab that lives is another matter: that ends by `timeout`.
            try:
                completed = self.lab.run(argv, stdin=stdin, timeout=timeout, pty=pty, cwd=str(cwd))
            except LabError as error:
                FAILED_LABS.append(str(error))
            else:
                crashed = completed.status == 255 and TRIPLE_FAULT in completed.stderr
                if not crashed or REBOOT_BY_TRIPLE_FAULT in argv:
                    return completed
                FAILED_LABS.append(f"a triple fault in a guest that ran {argv}")
                self.lab.close()
            for make in self._standing:
                self.lab.run(make, timeout=PATIENCE)
            return self.lab.run(argv, stdin=stdin, timeout=timeout, pty=pty, cwd=str(cwd))
        if pty is not None:
            quoted = " ".join(f"'{word}'" for word in argv)
            argv = [
                "script",
                "-qec",
                f"stty rows {pty[0]} cols {pty[1]}; exec {quoted}",
                os.devnull,
            ]
        done = subprocess.run(
            argv, input=stdin, capture_output=True, timeout=timeout, cwd=cwd, check=False
        )
        status = done.returncode
        return Completed(
            128 - status if status < 0 else status, done.stdout, done.stderr, timed_out=False
        )

    def tinyvmm(
        self,
        *arguments: str,
        stdin: bytes = b"",
        timeout: float = PATIENCE,
        pty: tuple[int, int] | None = None,
        cwd: str | Path = ROOT,
    ) -> Completed:
        """Run `tinyvmm ARGUMENTS`."""
        command = python_command(MAIN, arguments)
        return self.program(command, stdin=stdin, timeout=timeout, pty=pty, cwd=cwd)

    def run(
        self,
        *arguments: str,
        stdin: bytes = b"",
        timeout: float = PATIENCE,
        pty: tuple[int, int] | None = None,
        cwd: str | Path = ROOT,
    ) -> Completed:
        """Run `tinyvmm run --no-lab ARGUMENTS`."""
        return self.tinyvmm(
            "run", "--no-lab", *arguments, stdin=stdin, timeout=timeout, pty=pty, cwd=cwd
        )

    @contextmanager
    def standing(self, make: str, undo: str) -> Iterator[None]:
        """While this lasts, what the shell command `make` makes is there, in a new lab too."""
        command = ["sh", "-ec", make]
        done = self.program(command)
        assert done.status == 0, done
        self._standing.append(command)
        try:
            yield
        finally:
            self._standing.remove(command)
            self.program(["sh", "-c", undo])

    def directory(self, name: str) -> Path:
        """A new directory that both sides can write; `name` and a number, as files share a lab."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.shared))
        path.chmod(0o755)
        return path


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Where `tinyvmm run` works."""
    from tinyvmm.command.run import prepare_kernel

    shared = tmp_path_factory.mktemp("shared")
    prepare_kernel(None)[0].close()  # fetched, unpacked and cached here, where it is quick
    if linux_runs_here():
        yield Runner(None, shared)
        return
    # The lab sees these files, and would compile them anew for itself, thirty times slower.
    compileall.compile_dir(ROOT / "tinyvmm", quiet=2)
    with Lab(shares=[str(shared)]) as lab:
        yield Runner(lab, shared)


def interpreter() -> str:
    return os.path.realpath(sys.executable)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what became of labs to whoever started this process, if it is one of several."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["failed_labs"] = FAILED_LABS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    FAILED_LABS.extend(getattr(node, "workeroutput", {}).get("failed_labs", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell of labs that failed."""
    for words in FAILED_LABS:
        terminalreporter.section("a lab failed, and another took its place")
        terminalreporter.write_line(words)
