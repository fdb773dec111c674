"""tinyvmm.Machine and what it runs, as subprocess has it; the guest is this computer."""

import gc
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import tinyvmm
from tests import oci
from tests.local_guest import LocalGuests
from tests.local_guest import local_guests as local_guests  # noqa: PLC0414 (a fixture)
from tests.local_guest import runtime as runtime  # noqa: PLC0414 (a fixture)
from tests.waiting import with_time_enough
from tinyvmm import DEVNULL, PIPE, STDOUT, ConfigError, Machine, MachineError
from tinyvmm import process as process_module
from tinyvmm.cli.main import main
from tinyvmm.fileserver.objects import ObjectTree
from tinyvmm.process import Process
from tinyvmm.session import Result
from tinyvmm.vm_options import run_options


@pytest.fixture
def vm(local_guests: LocalGuests) -> Iterator[Machine]:
    del local_guests
    with Machine() as vm:
        yield vm


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


# What subprocess.run does with the same arguments, this does too.
@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (sh("echo out; echo err >&2; exit 3"), {"capture_output": True}),
        (sh("cat; exit 1"), {"input": b"in\r\n", "stdout": PIPE}),
        (sh("cat"), {"input": "gr\u00fcn\r\n", "stdout": PIPE, "text": True}),
        (sh("cat"), {"input": "gr\u00fcn", "stdout": PIPE, "encoding": "latin-1"}),
        (sh("cat | wc -c"), {"input": b"x" * 300_000, "stdout": PIPE}),
        (sh("yes | head -c 300000"), {"capture_output": True}),
        (sh("kill -TERM $$"), {"stdout": DEVNULL}),
        (sh("for i in 1 2 3; do echo $i; echo e$i >&2; done"), {"stdout": PIPE, "stderr": STDOUT}),
        (sh("echo gone >&2; pwd"), {"stderr": DEVNULL, "stdout": PIPE, "cwd": "/usr"}),
        (sh("cat"), {"stdin": DEVNULL, "stdout": PIPE}),
        (sh("exit 0"), {"check": True}),
    ],
)
def test_run_gives_what_subprocess_does(
    vm: Machine, argv: list[str], options: dict[str, object]
) -> None:
    def run(where: object) -> tuple[object, ...]:
        done = where.run(argv, **options)  # type: ignore[attr-defined]
        return done.args, done.returncode, done.stdout, done.stderr

    assert run(vm) == run(subprocess)


def test_a_status_that_is_checked_raises_what_subprocess_does(vm: Machine) -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        vm.run(sh("echo so; exit 5"), check=True, capture_output=True, text=True)
    assert (raised.value.returncode, raised.value.stdout) == (5, "so\n")


def test_what_cannot_be_executed_raises_what_subprocess_does(vm: Machine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="command not found in the guest: 'nothing-there'"):
        vm.run(["nothing-there"])
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(PermissionError, match="data"):
        vm.run([str(tmp_path / "data")])


def test_contradictions_are_refused_as_subprocess_does(vm: Machine) -> None:
    with pytest.raises(ValueError, match="stdin and input"):
        vm.run(["true"], input=b"", stdin=PIPE)
    with pytest.raises(ValueError, match="capture_output"):
        vm.run(["true"], capture_output=True, stderr=STDOUT)
    with pytest.raises(ValueError, match="STDOUT"):
        vm.run(["true"], stdout=STDOUT)
    with pytest.raises(TypeError, match="list of words"):
        vm.run("true")
    with pytest.raises(ConfigError, match="no command"):
        vm.run([])


def test_arguments_there_are_none_of_are_refused_as_subprocess_does(vm: Machine) -> None:
    calls: list[Any] = [Machine, lambda **given: tinyvmm.run(["true"], **given)]
    for act in calls:
        with pytest.raises(TypeError, match="unexpected keyword argument 'memroy'"):
            act(memroy="1G")
    calls = [vm.run, vm.popen]
    for call in calls:
        with pytest.raises(TypeError, match="unexpected keyword argument 'umask'"):
            call(["true"], umask=0o22)


@pytest.mark.parametrize(
    "options", [{"stdin": STDOUT}, {"stdout": 9999}, {"encoding": "none"}, {"errors": "none"}]
)
def test_a_command_whose_streams_cannot_be_leaves_nothing_open(
    local_guests: LocalGuests, options: dict[str, object]
) -> None:
    del local_guests

    before = len(os.listdir("/proc/self/fd"))
    closed = []
    original = ObjectTree.close

    def close(self: ObjectTree) -> None:
        closed.append(self)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectTree, "close", close)
        with pytest.raises((ValueError, OSError, LookupError)):
            tinyvmm.run(["true"], root={"a": b""}, **{"stdout": PIPE, **options})  # type: ignore[arg-type]
    assert len(closed) == 1
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("script", ["echo some; exec sleep 100", "echo some; yes"])
def test_a_timeout_kills_the_command_and_gives_what_came(
    vm: Machine, local_guests: LocalGuests, script: str
) -> None:
    def run(timeout: float) -> bytes:
        with pytest.raises(subprocess.TimeoutExpired) as raised:
            vm.run(sh(script), timeout=timeout, stdout=PIPE)
        assert raised.value.timeout == timeout
        return raised.value.output or b""

    assert with_time_enough(run).startswith(b"some\n")
    *_, process = local_guests.executors[0].processes.values()
    assert process.wait(60) in {128 + signal.SIGKILL, 128 + signal.SIGPIPE}


def test_a_timeout_ends_what_writes_without_a_pause(
    vm: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, reads, read = time.monotonic(), 0, Process._read

    def read_and_await_more(self: Process, name: str, file: Any) -> bool:
        nonlocal reads
        reads += 1
        assert reads < 10
        done = read(self, name, file)
        select.select([file], [], [])
        return done

    monkeypatch.setattr(Process, "_read", read_and_await_more)
    monkeypatch.setattr(process_module, "monotonic", lambda: began + 50 * reads)
    with pytest.raises(subprocess.TimeoutExpired):
        vm.run(["yes"], timeout=100, stdout=PIPE)


def test_an_interrupt_kills_the_command(
    vm: Machine, local_guests: LocalGuests, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, carry = threading.Event(), Process._carry

    def carry_on(self: Process, end: float | None) -> None:
        runs.set()
        carry(self, end)

    def interrupt() -> None:
        assert runs.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Process, "_carry", carry_on)
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        vm.run(["sleep", "100"])
    interrupting.join()
    (process,) = local_guests.executors[0].processes.values()
    assert process.wait(60) == 128 + signal.SIGKILL


def test_a_process_is_talked_to_while_it_runs(vm: Machine) -> None:
    with vm.popen(["cat"], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.pid > 1
        for word in ("one\n", "two\n"):
            process.stdin.write(word)
            process.stdin.flush()
            assert process.stdout.readline() == word
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.stdin.close()
        assert process.wait(60) == 0


def test_communicate_goes_on_after_a_timeout(vm: Machine, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    process = vm.popen(sh(f"echo a; read go < {gate}; cat"), stdin=PIPE, stdout=PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(b"b\n", timeout=0.3)
    gate.write_text("on\n")
    assert process.communicate() == (b"a\nb\n", None)


def test_signals_reach_the_command(vm: Machine) -> None:
    process = vm.popen(
        sh("trap 'echo got; exit 7' USR1; echo up; while :; do :; done"), stdout=PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate()[0] == b"got\n"
    assert process.returncode == 7
    process = vm.popen(["sleep", "100"])
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def test_an_error_in_a_with_kills_the_process(vm: Machine) -> None:
    process = vm.popen(["sleep", "100"])
    with pytest.raises(ZeroDivisionError), process:
        _ = 1 // 0
    assert process.returncode == -signal.SIGKILL


def test_output_goes_to_files_of_the_callers(vm: Machine, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, (tmp_path / "in").open("w+b") as given:
        given.write(b"from a file\n")
        given.seek(0)
        process = vm.popen(sh("cat; echo oops >&2"), stdin=given, stdout=log.fileno(), stderr=log)
    process.wait(60)  # the files are closed: it has its own
    assert sorted((tmp_path / "log").read_bytes().splitlines()) == [b"from a file", b"oops"]


def test_a_reader_that_has_gone_ends_the_command_as_by_sigpipe(vm: Machine) -> None:
    process = vm.popen(["yes"], stdout=PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == -signal.SIGPIPE


def test_environment_and_user_are_the_machines_and_the_commands(local_guests: LocalGuests) -> None:
    with Machine(env={"A": "1", "B": "2"}, cpus=2, memory="64M") as vm:
        done = vm.run(sh("echo $A $B $C"), env={"B": "3", "C": "4"}, stdout=PIPE)
    assert done.stdout == b"1 3 4\n"
    (options,) = local_guests.options
    assert (options.cpus, options.memory, options.argv) == (2, 64 << 20, ())


def test_many_commands_run_at_once_from_many_threads(vm: Machine) -> None:
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        script = sh(f"read x; echo {number} $x")
        found[number] = vm.run(script, input=b"%d\n" % number, stdout=PIPE).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: b"%d %d\n" % (number, number) for number in range(20)}


# --- the machine's own life ---------------------------------------------------------------------
def leftovers(runtime: Path) -> list[str]:
    return os.listdir(runtime)


def test_a_closed_machine_leaves_nothing_and_says_so(
    local_guests: LocalGuests, runtime: Path
) -> None:
    del local_guests
    before = len(os.listdir("/proc/self/fd"))
    vm = Machine()
    with pytest.raises(MachineError, match="has not been started"):
        vm.run(["true"])
    with vm:
        assert vm.running
        assert leftovers(runtime)
        process = vm.popen(["sleep", "100"], stdout=PIPE)
    assert not vm.running
    with pytest.raises(MachineError, match="the machine is closed"):
        process.wait(60)
    assert process.stdout is not None
    process.stdout.close()
    with pytest.raises(MachineError, match="the machine is closed"):
        vm.run(["true"])
    with pytest.raises(RuntimeError, match="once"):
        vm.start()
    vm.close()
    assert leftovers(runtime) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_machine_that_nobody_has_is_closed(local_guests: LocalGuests, runtime: Path) -> None:
    vm = Machine().start()
    vm.run(["true"])
    del vm
    gc.collect()
    assert local_guests.sessions[0].over.is_set()
    assert leftovers(runtime) == []


def test_a_process_keeps_its_machine(local_guests: LocalGuests) -> None:
    process = Machine().start().popen(["sleep", "0.5"])
    gc.collect()
    assert process.wait(60) == 0
    del process
    gc.collect()
    assert local_guests.sessions[0].over.is_set()


def test_a_machine_ends_with_its_interpreter(runtime: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, '.'); import pytest, pathlib;"
        "from tests import local_guest;"
        f"tmp = pathlib.Path({str(runtime)!r}); patch = pytest.MonkeyPatch();"
        "local_guest.replace_machines(tmp, patch);"
        "import tinyvmm; vm = tinyvmm.Machine().start(); vm.popen(['sleep', '100']);"
        "print(len(list(tmp.iterdir())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    assert leftovers(runtime) == []


def test_a_guest_that_ends_is_said_to_whoever_waits(local_guests: LocalGuests) -> None:
    with Machine() as vm:
        process = vm.popen(["sleep", "100"])
        assert vm.console_tail() == "booted\n"
        local_guests.sessions[0].end(Result(255, "machine", "the guest's kernel panicked:\nno"))
        time.sleep(0.2)
        local_guests.executors[0].close()
        with pytest.raises(MachineError, match="panicked"):
            process.wait(60)
        assert vm.wait(60)
        with pytest.raises(MachineError, match="panicked"):
            vm.run(["true"])


def test_a_machine_that_cannot_be_made_raises_why(local_guests: LocalGuests, runtime: Path) -> None:
    local_guests.failure = ConfigError("there is no kernel; get one")
    with pytest.raises(ConfigError, match="get one"), Machine():
        pass
    assert leftovers(runtime) == []
    with pytest.raises(ConfigError, match="no size"), Machine(memory="lots"):
        pass


def test_a_kvm_that_cannot_run_linux_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinyvmm.vm._problem", ["it lacks things"])
    with pytest.raises(ConfigError, match=r"it lacks things; .* tinyvmm lab -- python"):
        tinyvmm.run(["true"])
    with pytest.raises(ConfigError, match="tinyvmm lab"), Machine():
        pass


# --- roots --------------------------------------------------------------------------------------
def test_a_root_is_this_computers_or_a_directory_or_made_of_objects(
    local_guests: LocalGuests, tmp_path: Path
) -> None:
    def made(**machine: object) -> tuple[object, ...]:
        with Machine(**machine):  # type: ignore[arg-type]
            options = local_guests.options[-1]
            names = []
            if options.root is not None:
                root = options.root.root()
                names = sorted(e[3].decode() for e in root.open(0).readdir(0) if e[3][:1] != b".")
                root.close()
            return options.reads, names, options.private_writes

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in-zip", b"x")
    assert made() == ([("/", "/")], [], "server")
    assert made(root=tmp_path) == ([("/", str(tmp_path))], [], "server")
    assert made(read={"/data": "/usr"})[0] == [("/", "/"), ("/data", "/usr")]
    assert made(root={"hello": b"hi", "bin": "/bin"})[1:] == (["bin", "hello"], "guest")
    assert made(root=zipfile.ZipFile(packed))[1] == ["in-zip"]
    tree = ObjectTree({"mine": b""})
    assert made(root=tree)[1] == ["mine"]
    tree.close()


def test_what_cannot_be_a_root_is_said(local_guests: LocalGuests) -> None:
    del local_guests
    for root, words in (
        ({"d": {"f": "text"}}, "/d/f: 'text' is no absolute path; give contents as bytes"),
        ({"f": 3}, "int cannot be served"),
        ({"f": "/not/there"}, "not there"),
    ):
        with pytest.raises(ConfigError, match=words), Machine(root=root):
            pass
    with pytest.raises(ConfigError, match="read and write"), Machine(root={}, write="out"):
        pass


def test_a_root_is_an_image_with_what_its_configuration_says(
    local_guests: LocalGuests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    config = {"Entrypoint": ["echo"], "Cmd": ["of the image"], "Env": ["A=1", "B=2"]}
    config |= {"WorkingDir": "/usr", "User": "1000:1000"}  # type: ignore[dict-item]
    name = oci.image(tmp_path / "lay", oci.layer(oci.entry("hello", b"hi")), config=config)
    with Machine(image=name, env={"B": "3"}) as vm:
        done = vm.run(sh("pwd; echo $A $B"), stdout=PIPE)  # as podman exec: no entrypoint
        (options,) = local_guests.options
        [(place, path)] = options.reads
        assert (place, Path(path, "hello").read_bytes()) == ("/", b"hi")
        assert main(["prune", "--all"]) == 0  # which leaves alone what is in use
        assert Path(path).exists()
    assert done.stdout == b"/usr\n1 3\n"
    assert (options.argv, options.cwd, options.user) == ((), "/usr", "1000:1000")
    assert main(["prune", "--all"]) == 0
    assert not Path(path).exists()
    with ExitStack() as cleanup:
        assert run_options({"image": name}, cleanup, []).argv == ["echo", "of the image"]
        assert run_options({"image": name}, cleanup, ["x"], "/tmp").argv == ["echo", "x"]
    with pytest.raises(ConfigError, match="root and image"), Machine(image=name, root="/"):
        pass
    with pytest.raises(ConfigError, match="is not here"), Machine(image="no-such", pull="never"):
        pass
    assert main(["prune", "--all"]) == 0  # nothing holds it
    assert os.listdir(tmp_path / "data/tinyvmm/images/layers") == []


# --- RAM, processors and traces -----------------------------------------------------------------
@pytest.mark.kvm
def test_memory_registers_and_steps_are_those_of_the_board(local_guests: LocalGuests) -> None:
    from tinyvmm.machine import Machine as Board

    with Board(memory=1 << 20, irqchip=False) as board:
        local_guests.board = board
        board.boot_real_mode(bytes.fromhex("b8 34 12 90 eb fe"))  # mov ax, 0x1234; nop; jmp $
        with Machine() as vm:
            assert len(vm.memory) == 1 << 20
            assert vm.memory[0x1000:0x1003] == b"\xb8\x34\x12"
            vm.memory[0x5000:0x5003] = b"abc"
            assert vm.memory[0x5001] == ord("b")
            for wrong in (slice(1 << 20, (1 << 20) + 4), slice(None, 4), slice(0, 8, 2)):
                with pytest.raises(IndexError):
                    vm.memory[wrong]
            with pytest.raises(ValueError, match="2 bytes for 3"):
                vm.memory[0:3] = b"ab"
            (cpu,) = vm.cpus
            assert cpu.regs.rip == 0x1000
            with pytest.raises(ConfigError, match="pause it first"):
                cpu.step()
            board.start()
            while cpu.regs.rip != 0x1004:
                time.sleep(0.001)
            assert cpu.regs.rax & 0xFFFF == 0x1234
            vm.pause()
            assert vm.cpus[0].regs.rip == 0x1004
            vm.resume()


def test_a_trace_is_recorded_for_a_while(vm: Machine) -> None:
    from tinyvmm import trace

    message, access = trace.Message("rng", "hello"), trace.Access("port", "read", 0x70, 1, 5)
    with vm.trace("device") as inner, vm.trace() as all_of_it:
        for record in (message, access):
            assert trace.hook is not None
            trace.hook(record)
    assert trace.hook is None
    assert list(inner) == [message]
    assert len(all_of_it) == 2
    assert str(inner) == "rng: hello"
    with pytest.raises(ConfigError, match="no trace is named 'disk'"):
        vm.trace("disk")


def test_what_is_recorded_stays_what_it_was_and_holds_no_ram(vm: Machine) -> None:
    from tinyvmm import ninep, trace

    ram = bytearray(b"as it was")
    with vm.trace("9p") as records:
        assert trace.hook is not None
        trace.hook(trace.NineP("root", 1, ninep.Rread([memoryview(ram)[:2], memoryview(ram)[2:]])))
        trace.hook(trace.NineP("root", 2, ninep.Twalk(1, 2, (b"etc", b"motd"))))
        trace.hook(trace.NineP("root", 3, ninep.Rread([])))
    ram[:] = b"all other"
    ram.clear()  # which would be a BufferError
    messages = [record.message for record in records if isinstance(record, trace.NineP)]
    assert messages == [
        ninep.Rread(b"as it was"),
        ninep.Twalk(1, 2, (b"etc", b"motd")),
        ninep.Rread(b""),
    ]


def test_importing_the_package_costs_nothing_and_names_are_there() -> None:
    code = "import tinyvmm; print(all(hasattr(tinyvmm, n) for n in dir(tinyvmm))); tinyvmm.nope"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n"
    assert "module 'tinyvmm' has no attribute 'nope'" in done.stderr


def test_files_go_in_and_come_out(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "file").write_bytes(b"words\n" * 1000)
    vm.put(tmp_path / "from", f"{tmp_path}/inside")
    done = vm.run(["cat", "inside/deep/file"], cwd=str(tmp_path), stdout=PIPE)
    assert done.stdout == b"words\n" * 1000
    vm.get(f"{tmp_path}/inside/deep/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"words\n" * 1000
    with pytest.raises(ConfigError, match="missing"):
        vm.get(f"{tmp_path}/missing", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="there is no"):
        vm.put(tmp_path / "missing", "/tmp")
    with pytest.raises(ConfigError, match="starts with a slash"):
        vm.get("relative", tmp_path)
