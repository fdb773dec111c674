"""The state of machines on disk: names, locks, ends, and processes that died."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tinyvmm.cli.main import main
from tinyvmm.errors import ConfigError
from tinyvmm.instances import control, registry
from tinyvmm.instances.control import ControlClient
from tinyvmm.instances.control_server import ControlServer
from tinyvmm.instances.registry import Instance, State


def state(name: str = "", **more: Any) -> State:
    made = State(name, os.getpid(), ["true"], 1 << 30, 1, 1000.0, keep=True)
    return made._replace(**more)


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "tinyvmm"


NOBODY = 65534

HOLDER = """
import os, sys
from tinyvmm.instances.registry import Instance, State
instance = Instance(State(sys.argv[1], os.getpid(), ["x"], 1, 1, 1.0, keep=sys.argv[2] == "keep"))
print(instance.state.name, flush=True)
if sys.stdin.readline() == "end\\n":
    instance.end(3, "so it was")
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Have another process run a machine."""
    made = []

    def hold(name: str, keep: str = "keep") -> "subprocess.Popen[str]":
        made.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, name, keep],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        process = made[-1]
        assert process.stdout is not None
        assert process.stdout.readline().strip() == name
        return process

    yield hold
    for process in made:
        process.kill()
        process.communicate()


def test_a_machine_is_seen_while_it_runs_and_after(base: Path) -> None:
    instance = Instance(state("web", command=["sleep", "9"]))
    (found,) = registry.list_()
    assert found == instance.state
    assert found.running
    assert os.stat(instance.path).st_mode & 0o777 == 0o700
    instance.update(kernel="6.1")
    assert registry.find("web").kernel == "6.1"
    instance.end(5, "why", b"last words")
    (found,) = registry.list_()
    assert (found.status, found.message, found.running) == (5, "why", False)
    assert (base / "web" / "console").read_bytes() == b"last words"
    registry.remove("web")
    assert registry.list_() == []
    assert list(base.iterdir()) == []


def test_what_nobody_asked_to_keep_leaves_nothing(base: Path) -> None:
    instance = Instance(state(keep=False))
    assert re.fullmatch("vm-[0-9a-f]{8}", instance.state.name)
    instance.end(0, None)
    assert list(base.iterdir()) == []


def test_a_name_is_taken_until_it_is_removed(hold: Hold) -> None:
    process = hold("web")
    with pytest.raises(ConfigError, match="a machine named web runs"):
        Instance(state("web"))
    with pytest.raises(ConfigError, match="machine web runs"):
        registry.remove("web")
    process.communicate("end\n")
    with pytest.raises(ConfigError, match="tinyvmm rm web"):
        Instance(state("web"))
    registry.remove("web")
    Instance(state("web")).end(0, None)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "-x", "n" * 65, "ü"])
def test_what_is_no_name_is_refused(name: str) -> None:
    assert registry.read(name) is None
    if name:
        with pytest.raises(ConfigError, match="is no name"):
            Instance(state(name))


def test_a_killed_process_is_told_apart_and_forgotten_unless_kept(hold: Hold, base: Path) -> None:
    kept, forgotten = hold("kept"), hold("forgotten", "no")
    assert [found.running for found in registry.list_()] == [True, True]
    for process in (kept, forgotten):
        process.send_signal(signal.SIGKILL)
        process.wait()
    (found,) = registry.list_()
    assert (found.name, found.status) == ("kept", 255)
    assert "killed" in (found.message or "")
    assert [path.name for path in base.iterdir()] == ["kept"]
    with pytest.raises(ConfigError, match="no machine is named forgotten"):
        registry.find("forgotten")


def test_waiting_lasts_as_long_as_the_machine(hold: Hold) -> None:
    process = hold("web")
    found: list[State | None] = []
    waiter = threading.Thread(target=lambda: found.append(registry.wait("web")))
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    process.communicate("end\n")
    waiter.join()
    assert found[0] is not None
    assert (found[0].status, found[0].message) == (3, "so it was")


@pytest.mark.parametrize("act", [registry.read, registry.remove, lambda _: registry.list_()])
def test_who_looks_at_a_dead_machine_does_no_harm_to_the_next_of_its_name(
    hold: Hold, monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]
) -> None:
    kept = hold("web")
    kept.kill()
    kept.wait()
    unlocked = registry._unlocked
    made: list[Instance] = []

    @contextmanager
    def late(here: str) -> Iterator[bool]:
        """As `_unlocked`, and between its look at the lock and at the state others are quicker."""
        with ExitStack() as held:
            answer = held.enter_context(unlocked(here))
            if not made:
                monkeypatch.setattr(registry, "_unlocked", unlocked)
                held.close()
                shutil.rmtree(registry.path_of("web"))
                made.append(Instance(state("web")))
            yield answer

    monkeypatch.setattr(registry, "_unlocked", late)
    with suppress(ConfigError):  # there is nothing to remove any more
        act("web")
    assert sorted(os.listdir(made[0].path)) == ["lock", "state"]
    assert registry.find("web").running
    made[0].end(0, None)


def test_who_forgets_a_machine_leaves_the_next_of_its_name_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Instance(state("web")).end(0, None)
    unlink = os.unlink
    made: list[Instance] = []

    def late(path: str) -> None:
        if not made:
            monkeypatch.setattr(os, "unlink", unlink)
            registry.remove("web")  # somebody else is quicker
            made.append(Instance(state("web")))
        unlink(path)

    monkeypatch.setattr(os, "unlink", late)
    registry.remove("web")
    assert registry.find("web").running
    made[0].end(0, None)


@pytest.mark.parametrize("left", [["lock"], ["lock", "console"], []])
def test_a_name_is_free_whose_machine_was_only_half_removed(base: Path, left: list[str]) -> None:
    Instance(state("web")).end(0, None)
    for path in (base / "web").iterdir():
        if path.name not in left:
            path.unlink()
    assert registry.read("web") is None
    Instance(state("web")).end(0, None)


def test_who_waits_beside_another_is_told_that_the_machine_was_killed(
    hold: Hold, base: Path
) -> None:
    process = hold("web")
    found: list[State | None] = []
    waiter = threading.Thread(target=lambda: found.append(registry.wait("web")))
    with open(base / "web" / "lock", "rb") as another:
        waiter.start()
        process.kill()
        process.wait()
        fcntl.flock(another, fcntl.LOCK_SH)  # as one who waits too, and is told first
        waiter.join(0.2)
    waiter.join(30)
    assert [state and state.status for state in found] == [255]


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as one, but for the error
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_killed_machine_is_told_of_on_a_full_disk_too(hold: Hold) -> None:
    process = hold("web")
    process.kill()
    process.wait()
    with full_disk():
        assert [found.status for found in registry.list_()] == [255]
    assert registry.find("web").status == 255


def test_an_end_that_cannot_be_kept_is_said_and_counts_as_killed() -> None:
    instance = Instance(state("web"))
    with full_disk(), pytest.raises(ConfigError, match="cannot keep how web ended: File too large"):
        instance.end(0, None, b"last words")
    assert registry.find("web").status == 255


def test_a_machine_that_cannot_be_made_leaves_nothing(base: Path) -> None:
    refused = pytest.raises(ConfigError, match=r"cannot make a machine in .*: File too large")
    with full_disk(), refused:
        Instance(state("web"))
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("words", [["stop", "web"], ["rm", "--force", "web"]])
@pytest.mark.parametrize("how", ["asked", "by itself", "late"])
def test_a_machine_that_is_gone_as_soon_as_it_ends_has_been_stopped(
    words: list[str], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    instance = Instance(state("web", keep=False))

    def end(**_: object) -> None:
        instance.end(0, None)

    def refuse(**_: object) -> None:
        instance.end(0, None)
        raise ConfigError("the machine does not run")

    how_to_end = refuse if how == "by itself" else end
    methods = {"stop": how_to_end, "kill": how_to_end}
    monkey = pytest.MonkeyPatch()
    monkey.setattr(control, "check", lambda *_: None)
    servers: list[ControlServer] = []
    starter = threading.Timer(
        0.2 if how == "late" else 0.0,
        lambda: servers.append(ControlServer(instance.file("control"), lambda: methods)),
    )
    starter.start()
    if how != "late":
        starter.join()
    try:
        assert main(words) == 0
    finally:
        starter.join()
        servers[0].close()
        monkey.undo()
    assert capsys.readouterr().out == "web\n"


def test_a_machine_that_ends_while_it_is_listed_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "list_", lambda: [state("web")])
    assert main(["ps"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("web ")
    assert main(["ps", "--json"]) == 0


def test_of_many_who_want_a_name_one_gets_it() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, "one", "keep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    # Each holds on until its stdin ends, the others fail at once.
    while sum(process.poll() is None for process in processes) > 1:
        continue
    ends = [process.communicate("end\n") for process in processes]
    assert sum(output == "one\n" for output, _ in ends) == 1
    assert sum("a machine named one" in errors for _, errors in ends) == 5


def test_a_directory_that_others_can_reach_is_refused(base: Path) -> None:
    base.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="others can reach"):
        registry.directory()


def test_without_a_runtime_directory_there_is_one_for_each_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert registry.directory() == f"/tmp/tinyvmm-{os.geteuid()}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_other_users_have_machines_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else is told nothing, and reaches nothing even where the directories are open."""
    top = tmp_path_factory.mktemp("run")
    base = top / "tinyvmm"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(top))
    instance = Instance(state("web"))
    server = ControlServer(instance.file("control"), lambda: {"status": lambda: "status of root's"})
    theirs = base.parent / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    for path in (top, top.parent, top.parent.parent):  # pytest's own are for us alone
        path.chmod(0o755)

    def look() -> dict[str, str]:
        found = {}
        found["ours"] = said(lambda: str(registry.list_()))
        found["state"] = said((base / "web" / "state").read_text)
        found["control"] = said(lambda: call(instance.file("control")))
        os.environ["XDG_RUNTIME_DIR"] = str(theirs)
        found["theirs"] = said(lambda: str([one.name for one in registry.list_()]))
        mine = Instance(state("web"))  # the name is free there
        found["named"] = said(lambda: registry.find("web").name)
        found["mode"] = oct(os.stat(mine.path).st_mode & 0o777)
        mine.end(0, None)
        return found

    try:
        found = as_nobody(look)
        assert "which others can reach" in found["ours"]
        assert found["state"].startswith("PermissionError")
        assert "Permission denied" in found["control"]
        assert (found["theirs"], found["named"], found["mode"]) == ("[]", "web", "0o700")
        # Were every mode as open as can be, the socket would still know who is calling.
        for path in (base, base / "web", base / "web" / "control"):
            path.chmod(0o777)
        found = as_nobody(lambda: {"control": said(lambda: call(instance.file("control")))})
        assert "hung up" in found["control"]
        assert call(instance.file("control")) == "status of root's"
    finally:
        server.close()
        instance.end(0, None)


def said(ask: Callable[[], str]) -> str:
    """The answer, or what went wrong."""
    try:
        return ask()
    except (ConfigError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def call(path: str) -> str:
    with ControlClient(path) as client:
        return str(client.call("status"))


def as_nobody(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `work` finds in a process of another user's."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which it has no use for
        pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(write_end, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, str] = json.loads(answer)
    return found


def test_a_damaged_state_is_named(base: Path) -> None:
    instance = Instance(state("web"))
    (base / "web" / "state").write_text("{")
    with pytest.raises(ConfigError, match="web"):
        registry.list_()
    instance.end(0, None)
