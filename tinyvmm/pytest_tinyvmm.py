r"""A pytest plugin: tests with virtual machines, and tests that run in one.

    def test_a_service(vm):                    # a tinyvmm.Machine on this computer's files
        assert vm.run(["id", "-u"], capture_output=True).stdout == b"0\n"

    @pytest.mark.in_vm                         # all of the test runs in the guest, as root
    def test_mounting(tmp_path):
        subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)

`vm` is one machine for all tests, `fresh_vm` one for each. A test marked in_vm runs, with its
fixtures, in a pytest of the guest's, which sees the same files: this computer's, where what it
writes is forgotten. Its reports come back, so that it fails here as it failed there.

Where this computer's KVM cannot run Linux, the tests that need a machine run in the lab
(tinyvmm/lab/lab.py), all in one pytest there, and are reported here; unless the ini option
`tinyvmm_without_kvm` is `skip` or `fail`. In the lab a `-s` or a debugger is of no use.

How: a *worker* is another pytest, of the same tests, that reads which files to look into and then
which tests to run, and writes their reports, in JSON lines. There is one in the guest, fed as tests
come up, and one in the lab, fed with all at once; that one may have one in a guest in turn.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tinyvmm.process import Process
    from tinyvmm.vm import Machine

WORKER = "--tinyvmm-worker"
INI = "tinyvmm_without_kvm"
GUEST, LAB = "guest", "lab"
CHOICES = ("lab", "skip", "fail")
LAB_TIMEOUT = 1800.0  # seconds for all tests that run in the lab


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options."""
    group = parser.getgroup("tinyvmm", "virtual machines")
    group.addoption(WORKER, dest="tinyvmm_worker", metavar="WHERE", help="for our own use")
    group.addoption("--vm-memory", default="1G", metavar="SIZE", help="RAM of the vm fixtures (1G)")
    text = "where KVM cannot run Linux: run tests with machines in the lab, skip, or fail them"
    parser.addini(INI, text, default="lab")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Iterator[None]:
    """Before anything is captured, put a worker's streams where no test finds them."""
    if early_config.known_args_namespace.tinyvmm_worker:
        _streams.extend((os.dup(0), os.dup(1)))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        os.close(null)
    return (yield)


_streams: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    """Register our marker; a worker's own plugin, too."""
    config.addinivalue_line("markers", "in_vm: run this test in a virtual machine")
    if config.getini(INI) not in CHOICES:
        raise pytest.UsageError(f"{INI}: give {', '.join(CHOICES)}")
    worker = config.getoption("tinyvmm_worker")
    if worker:
        config.pluginmanager.register(Worker(config), "tinyvmm-worker")
    if worker != GUEST:
        config.pluginmanager.register(Dispatcher(config), "tinyvmm-dispatcher")


# --- fixtures ---------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def vm(request: pytest.FixtureRequest) -> "Iterator[Machine]":
    """A machine on this computer's files, the same for all tests."""
    yield from _machine(request.config)


@pytest.fixture
def fresh_vm(request: pytest.FixtureRequest) -> "Iterator[Machine]":
    """A machine on this computer's files, for this test."""
    yield from _machine(request.config)


def _machine(config: pytest.Config) -> "Iterator[Machine]":
    from tinyvmm import Machine

    with Machine(memory=config.getoption("--vm-memory")) as machine:
        yield machine


# --- where a test runs ------------------------------------------------------------------------
def _needs_machine(item: pytest.Item) -> bool:
    return in_vm(item) or any(_is_ours(item, name) for name in ("vm", "fresh_vm"))


def _is_ours(item: pytest.Item, name: str) -> bool:
    """Whether a test uses a fixture of that name which is this module's, and nobody else's."""
    if name not in getattr(item, "fixturenames", ()):
        return False
    info: Any = getattr(item, "_fixtureinfo", None)  # what pytest itself will go by
    found = info.name2fixturedefs.get(name) if info is not None else None
    return not found or found[-1].func.__module__ == __name__


def in_vm(item: pytest.Item) -> bool:
    """Whether a test is to run in a guest."""
    return item.get_closest_marker("in_vm") is not None


class Dispatcher:
    """Runs the tests that run elsewhere, and reports them here."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._places: dict[pytest.Item, str] = {}  # of those that do not run here: GUEST or LAB
        self._from_lab: dict[str, list[Any]] | None = None
        self._why = ""
        self._guest: Remote | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """See which tests need what is not here."""
        needy = [item for item in items if _needs_machine(item)]
        problem = _problem() if needy else None
        if problem is None:
            self._places = {item: GUEST for item in items if in_vm(item)}
            return
        choice = self._config.getini(INI)
        if choice == "skip":
            for item in needy:
                item.add_marker(pytest.mark.skip(reason=problem))
            return
        self._places = dict.fromkeys(needy, LAB)
        if choice == "fail":
            self._from_lab, self._why = {}, problem

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> object:
        """Report a test that runs elsewhere; None for one that runs here.

        A runner keeps what the next test needs: so it has to know the next that is its own.
        """
        hook = item.ihook
        place = self._places.get(item)
        following = self._following(place, item, nextitem)
        if place is None:
            if following is nextitem:
                return None
            return hook.pytest_runtest_protocol(item=item, nextitem=following)
        reports = self._lab_reports(item) if place == LAB else self._guest_reports(item, following)
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _following(
        self, place: str | None, item: pytest.Item, nextitem: pytest.Item | None
    ) -> pytest.Item | None:
        """Return the next test in the same place."""
        if nextitem is None or self._places.get(nextitem) == place:
            return nextitem
        items = item.session.items
        rest = items[items.index(nextitem) :]
        return next((other for other in rest if self._places.get(other) == place), None)

    def _lab_reports(self, item: pytest.Item) -> Sequence[Any]:
        if self._from_lab is None:
            self._from_lab = {}
            try:
                for nodeid, reports in run_in_lab(self._config, list(self._places)):
                    self._from_lab.setdefault(nodeid, []).extend(reports)
            except _Failed as failed:
                self._why = str(failed)
            else:
                self._why = "the lab's pytest did not report this test"
        return self._from_lab.get(item.nodeid) or [_failure(item, self._why)]

    def _guest_reports(self, item: pytest.Item, nextitem: pytest.Item | None) -> Sequence[Any]:
        try:
            if self._guest is None:
                self._guest = Remote(self._config, list(self._places))
            return self._guest.run(item.nodeid, nextitem.nodeid if nextitem is not None else None)
        except _Failed as failed:
            self.pytest_sessionfinish()
            return [_failure(item, str(failed))]

    def pytest_sessionfinish(self) -> None:
        """End the guest."""
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()


class _Failed(Exception):  # noqa: N818 (never leaves this module)
    """A worker could not do its work."""


def _problem() -> str | None:
    """Why machines cannot run here, or None."""
    from tinyvmm.errors import ConfigError
    from tinyvmm.vm import check_runs_linux

    try:
        check_runs_linux()
    except ConfigError as error:
        return str(error)
    return None


def _failure(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "setup"
    )


# --- the worker's other side ------------------------------------------------------------------
def worker_argv(config: pytest.Config, kind: str) -> list[str]:
    """Return the command of a worker of the same tests: with our arguments, but no report."""
    in_venv = sys.prefix != sys.base_prefix
    # Outside of one, by its real path: a wrapper of it may take seconds in the lab.
    python = sys.executable if in_venv else os.path.realpath(sys.executable)
    ours = ["-p", __name__, f"{WORKER}={kind}", "-p", "no:cacheprovider"]
    # A worker's own worker is another kind than itself, and the last word counts.
    given = [text for text in map(str, config.invocation_params.args) if WORKER not in text]
    if config.pluginmanager.hasplugin("xdist"):
        given += ["-n", "0"]  # whoever distributes tests has given this one its own
    return [python, "-m", "pytest", *ours, *given]


class Remote:
    """The worker in a guest."""

    def __init__(self, config: pytest.Config, items: Sequence[pytest.Item]) -> None:
        """Boot, to run some of `items`; _Failed if it does not come up."""
        from tinyvmm import PIPE, Machine, TinyvmmError

        self._config = config
        self._machine = Machine(memory=config.getoption("--vm-memory"))
        self._process: Process | None = None
        try:
            self._machine.start()
            self._process = self._machine.popen(
                worker_argv(config, GUEST),
                stdin=PIPE,
                stdout=PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ,
                cwd=os.fspath(config.invocation_params.dir),
                text=True,
            )
            if self._process.stdin is not None:
                self._process.stdin.write(_files(items))
                self._process.stdin.flush()
        except (TinyvmmError, OSError) as error:
            self.close()
            raise _Failed(str(error)) from error

    def run(self, nodeid: str, following: str | None) -> list[Any]:
        """Run a test and return its reports; _Failed if the worker does not go on."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise _Failed("the guest has ended")
        said: list[str] = []
        try:
            process.stdin.write(_order(nodeid, following))
            process.stdin.flush()
            for line in process.stdout:
                found = _parse(self._config, line)
                if found is None:
                    said.append(line)
                else:
                    return found[1]
        except OSError as error:
            said.append(str(error))
        raise _Failed(f"the guest's pytest ended:\n{''.join(said)}{self._machine.console_tail()}")

    def close(self) -> None:
        """End the guest."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.abandon()
        self._machine.close()


def run_in_lab(
    config: pytest.Config, items: Sequence[pytest.Item]
) -> Iterator[tuple[str, list[Any]]]:
    """Run tests in a lab; the reports of each. _Failed if the lab or its pytest failed."""
    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.errors import TinyvmmError
    from tinyvmm.lab.lab import Lab

    script = _files(items)
    for number, item in enumerate(items):
        # The next that runs where this one does: in a guest of the lab's, or beside that.
        rest = (other.nodeid for other in items[number + 1 :] if in_vm(other) == in_vm(item))
        script += _order(item.nodeid, next(rest, None))
    try:
        prepare_kernel(None)[0].close()  # fetched, unpacked and cached here, where it is quick
        with Lab() as lab:
            done = lab.run(
                worker_argv(config, LAB),
                stdin=script.encode(),
                cwd=os.fspath(config.invocation_params.dir),
                timeout=LAB_TIMEOUT,
            )
    except TinyvmmError as error:
        raise _Failed(
            f"this computer's KVM cannot run Linux, and the lab failed: {error}"
        ) from error
    said = []
    reported = 0
    for line in done.stdout.decode(errors="replace").splitlines():
        found = _parse(config, line)
        if found is None:
            said.append(line)
        else:
            reported += 1
            yield found
    if reported < len(items):
        words = "\n".join([*said, done.stderr.decode(errors="replace")])
        late = f" after {LAB_TIMEOUT:g} s" if done.timed_out else ""
        raise _Failed(f"the lab's pytest ended{late} with status {done.status}:\n{words}")


_PREFIX = "tinyvmm-reports "


def _files(items: Sequence[pytest.Item]) -> str:
    """Say which files the tests are in: a worker takes long enough without looking into others."""
    return f"{json.dumps(sorted({os.fspath(item.path) for item in items}))}\n"


def _order(nodeid: str, following: str | None) -> str:
    """Say which test to run, and which comes next: fixtures that it needs stay up."""
    return f"{json.dumps([nodeid, following])}\n"


def _parse(config: pytest.Config, line: str) -> tuple[str, list[Any]] | None:
    """Return the test and the reports of a worker's line; None if it is none."""
    if not line.startswith(_PREFIX):
        return None
    data = json.loads(line.removeprefix(_PREFIX))
    for report in data["reports"]:
        if isinstance(report["longrepr"], list):  # of a skipped test: where, and why
            report["longrepr"] = tuple(report["longrepr"])
    restore = config.hook.pytest_report_from_serializable
    return data["nodeid"], [restore(config=config, data=report) for report in data["reports"]]


# --- the worker's side ------------------------------------------------------------------------
class Worker:
    """In a worker: runs the tests that it is told, and reports them on the real stdout."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._reports: list[Any] = []
        orders, answers = _streams
        self._orders: IO[str] = os.fdopen(orders, "r", encoding="utf-8")
        self._answers: IO[str] = os.fdopen(answers, "w", encoding="utf-8")
        self._files = set(json.loads(self._orders.readline() or "[]"))

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Look into no file that has none of the tests."""
        beside = collection_path.name in {"__init__.py", "conftest.py"}
        if beside or collection_path.is_dir() or os.fspath(collection_path) in self._files:
            return None
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what the orders say."""
        with self._orders, self._answers:
            items = {item.nodeid: item for item in session.items}
            for line in self._orders:
                nodeid, following = json.loads(line)
                item, nextitem = items[nodeid], items.get(following)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
                self._answer(item)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a report."""
        serialize = self._config.hook.pytest_report_to_serializable
        self._reports.append(serialize(config=self._config, report=report))

    def _answer(self, item: pytest.Item) -> None:
        reports, self._reports = self._reports, []
        text = json.dumps({"nodeid": item.nodeid, "reports": reports})
        self._answers.write(f"\n{_PREFIX}{text}\n")  # a progress bar may be on the same stream
        self._answers.flush()
