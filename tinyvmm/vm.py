"""`tinyvmm.Machine` and `tinyvmm.run`: virtual machines that are used as subprocesses are.

    import tinyvmm

    done = tinyvmm.run(["uname", "-r"], capture_output=True, text=True, timeout=30)
    with tinyvmm.Machine(memory="512M", root={"hello.txt": b"hi", "bin": "/bin"}) as vm:
        vm.run(["cat", "/hello.txt"])

This Machine is a Linux guest that stays up and runs one command after another, or many at once. The
board that it is on, RAM, vCPUs and devices, is another: tinyvmm/machine.py, for who builds one.

What a machine's root is made of, `root_tree` says. The guest runs in this process, so functions
which are files, and `on_access`, are called here: on other threads, while the guest waits.

Threads: everything here may be called from any thread, by several at once.
"""

import logging
import os
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    Self,
    SupportsIndex,
    TypedDict,
    Unpack,
    overload,
)

from tinyvmm.command.options import GUEST_CID, RunOptions
from tinyvmm.command.run import run_command
from tinyvmm.errors import ConfigError, MachineError
from tinyvmm.instances import exec_client
from tinyvmm.methods.supervisor import Supervisor
from tinyvmm.options import environment, parse_size
from tinyvmm.process import Ends, Given, Process, Task, complete
from tinyvmm.roots.contents import Root, open_root
from tinyvmm.roots.mounts import Shared
from tinyvmm.scratch import ScratchDirectory
from tinyvmm.session import HostFiles, Result, Session

if TYPE_CHECKING:
    from tinyvmm.fileserver.watched import Access
    from tinyvmm.inside.guest_calls import Guest
    from tinyvmm.machine import Machine as Board
    from tinyvmm.recording import Recording
    from tinyvmm.vcpu import Vcpu

_NOBODY = HostFiles(None, None, None)
_CLOSED = Result(0, "closed")
_log = logging.getLogger("tinyvmm")


class MachineOptions(TypedDict, total=False):
    """What a machine is made of; `Machine` says what each is."""

    memory: int | str
    cpus: int
    root: Root
    read: Mapping[str, str]
    write: Mapping[str, str] | str | None
    shared: Sequence[Shared] | Mapping[str, str]
    disks: Sequence[str]
    env: Mapping[str, str]
    user: str | None
    net: str | None
    publish: Sequence[str]
    hostname: str
    kernel: str | None
    append: str
    cache: str | None
    console: Callable[[bytes], None] | None
    on_access: "Callable[[Access], None] | None"


class CommandOptions(TypedDict, total=False):
    """What `Machine.popen` takes."""

    stdin: Given
    stdout: Given
    stderr: Given
    text: bool
    encoding: str | None
    errors: str | None
    cwd: str | None
    env: Mapping[str, str] | None
    user: str | None
    timeout: float | None


class CompleteOptions(CommandOptions, total=False):
    """What `Machine.run` takes."""

    input: str | bytes | None
    capture_output: bool
    check: bool


def run(
    args: Sequence[str],
    *,
    input: str | bytes | None = None,  # noqa: A002
    capture_output: bool = False,
    text: bool = False,
    timeout: float | None = None,
    check: bool = False,
    cwd: str | None = None,
    stdin: Given = None,
    stdout: Given = None,
    stderr: Given = None,
    encoding: str | None = None,
    errors: str | None = None,
    **machine: Unpack[MachineOptions],
) -> "subprocess.CompletedProcess[Any]":
    """Run a command in a machine of its own, and return what subprocess.run would.

    `timeout` (seconds) is for all of it, the guest's boot included. `cwd` is this directory where
    the guest's root is this computer's, else /. `machine` is what `Machine` takes. Raises what
    subprocess.run does, FileNotFoundError too if the guest has no such command; ConfigError for
    what cannot be done, MachineError if the machine ended before the command did.
    """
    stdin, stdout, stderr = check_streams(input, capture_output, stdin, stdout, stderr)
    process = popen(
        args,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=text,
        encoding=encoding,
        errors=errors,
        timeout=timeout,
        **machine,
    )
    return complete(process, input, timeout, check=check)


def popen(
    args: Sequence[str],
    *,
    cwd: str | None = None,
    stdin: Given = None,
    stdout: Given = None,
    stderr: Given = None,
    text: bool = False,
    encoding: str | None = None,
    errors: str | None = None,
    timeout: float | None = None,
    **machine: Unpack[MachineOptions],
) -> Process:
    """Start a command in a machine of its own; return it when it runs. As `run`, for the rest.

    `timeout` (seconds) is for its start.
    """
    check_runs_linux()
    with ExitStack() as cleanup:
        options = _options(cleanup, machine, cwd)._replace(argv=check_args(args))
        kept = cleanup.pop_all()

    def launch(ends: Ends, take: Callable[[Session], None]) -> Result:
        with kept:
            wanted = options._replace(merged=ends.merged)
            return run_command(
                wanted, _log.warning, sinks=ends.sinks, files=ends.files, on_session=take
            )

    try:
        return Process(
            args,
            launch,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            timeout=timeout,
        )
    except BaseException:
        kept.close()  # if it was not even launched
        raise


class Machine:
    """A Linux guest that stays up: a context manager that leaves nothing behind.

    It is closed by `close`, at the end of its `with`, when nobody has it any more, or at the
    interpreter's exit.
    """

    def __init__(
        self,
        *,
        memory: int | str = "1G",
        cpus: int = 1,
        root: Root = None,
        read: Mapping[str, str] | None = None,
        write: Mapping[str, str] | str | None = None,
        shared: Sequence[Shared] | Mapping[str, str] = (),
        disks: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        net: str | None = None,
        publish: Sequence[str] = (),
        hostname: str = "tinyvmm",
        kernel: str | None = None,
        append: str = "",
        cache: str | None = None,
        console: Callable[[bytes], None] | None = None,
        on_access: "Callable[[Access], None] | None" = None,
    ) -> None:
        """Say what to make; `start`, or `with`, makes it.

        `memory`: bytes, or text like "512M". `root`: this computer's / if None, or a directory of
        it, or what `roots.root_tree` takes: a dict, an archive, a tree. `read`: further read-only
        directories, by their place in the guest. `write`: the directory that keeps what the guest
        writes to /, or such directories by their place; else that is private, and forgotten.
        `shared`: host directories live on both sides, by their place in the guest. `disks`: images,
        as for `tinyvmm run --disk`. `env`, `user`: of every command. `net`: "user" or "tap=...", as
        for --net. `publish`: ports, as for --publish: "8080:80". `kernel`, `append`: another
        kernel, and more of its command line. `cache`: what the guest may remember of its root, as
        for --cache. `console` takes what the kernel prints. `on_access` sees, and may refuse, each
        access to the root's files: fileserver/watched.py.
        """
        self._given: MachineOptions = {
            "memory": memory,
            "cpus": cpus,
            "root": root,
            "read": read or {},
            "write": write,
            "shared": shared,
            "disks": disks,
            "env": env or {},
            "user": user,
            "net": net,
            "publish": publish,
            "hostname": hostname,
            "kernel": kernel,
            "append": append,
            "cache": cache,
            "console": console,
            "on_access": on_access,
        }
        self._lock = threading.Lock()  # guards the two below
        self._guest: _Guest | None = None
        self._close: weakref.finalize[[], Machine] | None = None

    def start(self) -> Self:
        """Boot, and return when the guest is up. Once only.

        ConfigError for what cannot be made, MachineError if the guest ends before it is up.
        """
        check_runs_linux()
        with self._lock:
            if self._guest is not None:
                raise RuntimeError("a machine is started once")
            self._guest = guest = _Guest(self._given)
            self._close = weakref.finalize(self, guest.close)
        try:
            guest.await_start()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the guest, whatever it does, and release all it had; harmless when done twice."""
        with self._lock:
            close = self._close
        if close is not None:
            close()

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._guest is not None and not self._guest.task.ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the guest has ended by itself, or is closed; False after `timeout` seconds."""
        return self._up(running=False).task.ended.wait(timeout)

    # --- commands ---------------------------------------------------------------------------

    def popen(
        self,
        args: Sequence[str],
        *,
        stdin: Given = None,
        stdout: Given = None,
        stderr: Given = None,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> Process:
        """Start a command and return it while it runs, as subprocess.Popen does.

        `cwd` is / unless given; `env` is on top of the machine's; `user` is USER[:GROUP], names or
        numbers of the guest, root if None. Of the streams, process.py tells. `timeout` (seconds) is
        for its start. FileNotFoundError and PermissionError if the guest cannot execute it,
        MachineError if the guest ends or has ended, ConfigError for what cannot be done.
        """
        guest = self._up()
        argv = check_args(args)
        variables = [f"{name}={value}" for name, value in (env or {}).items()]

        def launch(ends: Ends, take: Callable[[Session], None]) -> Result:
            return guest.execute(argv, ends, take, env=variables, cwd=cwd, user=user)

        return Process(
            args,
            launch,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            owner=self,
            timeout=timeout,
        )

    def run(
        self,
        args: Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002
        capture_output: bool = False,
        text: bool = False,
        timeout: float | None = None,
        check: bool = False,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: Given = None,
        stdout: Given = None,
        stderr: Given = None,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> "subprocess.CompletedProcess[Any]":
        """Run a command to its end and return what subprocess.run would, or raise it.

        Whatever comes between, a timeout or Ctrl-C, kills the command. As `popen`, for the rest.
        """
        stdin, stdout, stderr = check_streams(input, capture_output, stdin, stdout, stderr)
        process = self.popen(
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
        )
        return complete(process, input, timeout, check=check)

    # --- the machine itself -----------------------------------------------------------------

    @property
    def memory(self) -> "Memory":
        """RAM by guest-physical address: `vm.memory[gpa : gpa + 16]`."""
        return Memory(self._up())

    @property
    def cpus(self) -> "Sequence[Cpu]":
        """The vCPUs: `vm.cpus[0].regs.rip`."""
        guest = self._up()
        return [Cpu(guest, number) for number in range(len(guest.board.vcpus))]

    def pause(self) -> None:
        """Take every vCPU out of the guest; commands wait."""
        self._up().board.pause()

    def resume(self) -> None:
        """Let the guest go on."""
        self._up().board.resume()

    def trace(self, *kinds: str) -> "Recording":
        """Record what happens in a `with`: of "9p", "port", "mmio", "device", or all of them.

        ConfigError for a kind there is none of. It is of all machines in this process.
        """
        from tinyvmm.recording import Recording

        self._up()
        return Recording(kinds)

    def console_tail(self) -> str:
        """Return the last that the guest's kernel printed, also once it has ended."""
        return self._up(running=False).console()

    def _up(self, *, running: bool = True) -> "_Guest":
        guest = self._guest
        if guest is None:
            raise MachineError("the machine has not been started: use it in a with, or start it")
        if running:
            guest.check_running()
        return guest

    # --- files ------------------------------------------------------------------------------

    def put(self, source: "str | os.PathLike[str]", dest: str) -> None:
        """Copy a file or a directory from here to `dest` in the guest, as `tinyvmm cp` does.

        It needs nothing of the guest's root. ConfigError names what could not be copied.
        """
        from tinyvmm.inside.guest_copy import copy_in

        with self._calls() as guest:
            copy_in(guest, os.fspath(source), _absolute_path(dest))

    def get(self, source: str, dest: "str | os.PathLike[str]") -> None:
        """Copy a file or a directory out of the guest to `dest` here, as `tinyvmm cp` does."""
        from tinyvmm.inside.guest_copy import copy_out

        with self._calls() as guest:
            copy_out(guest, _absolute_path(source), os.fspath(dest), _log.warning)

    def _calls(self) -> "Guest":
        from tinyvmm.inside.guest_calls import open_guest

        return open_guest(self._up())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "new" if self._guest is None else "running" if self.running else "ended"
        return f"<Machine, {state}>"


class Registers(NamedTuple):
    """A vCPU's general registers (struct kvm_regs)."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class Cpu:
    """One vCPU."""

    def __init__(self, guest: "_Guest", number: int) -> None:
        self._guest = guest
        self.number = number

    @property
    def regs(self) -> Registers:
        """Its registers now; a machine that is not paused is, for a moment."""
        return self._guest.at_rest(
            lambda board: Registers._make(
                getattr(board.vcpus[self.number].handle.get_regs(), name)
                for name in Registers._fields
            )
        )

    def step(self) -> bool:
        """Execute one instruction of a paused machine; False if it waits for an interrupt."""
        return self._vcpu().step()

    def _vcpu(self) -> "Vcpu":
        board = self._guest.board
        if not board.paused:
            raise ConfigError("the machine runs: pause it first")
        return board.vcpus[self.number]

    def __repr__(self) -> str:
        return f"<Cpu {self.number}>"


class Memory:
    """The guest's RAM. An index or slice of guest-physical addresses is of RAM, or an IndexError.

    What the guest writes meanwhile is seen as it is written; pause it for more.
    """

    def __init__(self, guest: "_Guest") -> None:
        self._guest = guest

    def __len__(self) -> int:
        return self._guest.board.memory.size

    @overload
    def __getitem__(self, where: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, where: slice) -> bytes: ...
    def __getitem__(self, where: SupportsIndex | slice) -> int | bytes:
        if not isinstance(where, slice):
            gpa = where.__index__()
            return self._read(gpa, 1)[0]
        gpa, length = _range(where)
        return self._read(gpa, length)

    def _read(self, gpa: int, length: int) -> bytes:
        try:
            return self._guest.board.memory.read(gpa, length)
        except ValueError as error:
            raise IndexError(str(error)) from None

    def __setitem__(self, where: slice, data: bytes) -> None:
        gpa, length = _range(where)
        if len(data) != length:
            raise ValueError(f"{len(data)} bytes for {length} bytes of RAM")
        try:
            self._guest.board.memory.write(gpa, data)
        except ValueError as error:
            raise IndexError(str(error)) from None


def _range(where: slice) -> tuple[int, int]:
    if where.start is None or where.stop is None or where.step is not None:
        raise IndexError("give the first address and the one behind the last")
    return where.start, max(0, where.stop - where.start)


class _Guest:
    """What runs; kept by a Machine, and by what is under way in it."""

    def __init__(self, given: MachineOptions) -> None:
        """Begin to boot, on a thread of its own."""
        with ExitStack() as cleanup:
            options = _options(cleanup, given, "/")
            directory = ScratchDirectory(_socket_place())
            cleanup.callback(directory.close)
            self.supervisor = Supervisor(os.path.join(directory.path, "vsock"))
            self._methods = self.supervisor.methods()
            options = options._replace(vsock=(self.supervisor.vsock_path, GUEST_CID))
            kept = cleanup.pop_all()

        supervisor = self.supervisor

        def launch(take: Callable[[Session], None]) -> Result:
            return run_command(options, _log.warning, supervisor, files=_NOBODY, on_session=take)

        self.task = Task(launch, kept.close, "machine")

    def await_start(self) -> None:
        """Return when it is up."""
        self.task.started.wait()
        self.check_running()

    def check_running(self) -> None:
        """Raise what ended it, if it has ended: MachineError, or the ConfigError of its making."""
        if not self.task.ended.is_set():
            return
        if self.task.error is not None:
            raise self.task.error
        raise MachineError(self._end())

    def _end(self) -> str:
        result = self.task.result
        if result is None or result is _CLOSED:
            return "the machine is closed"
        return result.message or f"the machine has ended, with status {result.status}"

    @property
    def board(self) -> "Board":
        """The board of now."""
        try:
            return self.supervisor.machine
        except ConfigError:
            raise MachineError(self._end()) from None

    def at_rest(self, look: "Callable[[Board], Registers]") -> Registers:
        """Look at a machine that is paused, or is for as long."""
        board = self.board
        if board.paused:
            return look(board)
        board.pause()
        try:
            return look(board)
        finally:
            board.resume()

    def console(self) -> str:
        """Return the last that the kernel printed."""
        try:
            return self.supervisor.console()
        except ConfigError:
            return self.supervisor.last_console.decode(errors="replace")

    def call(self, method: str, **params: Any) -> Any:
        """Call a control method: so this is an exec_client.Caller."""
        return self._methods[method](**params)

    def execute(
        self,
        argv: Sequence[str],
        ends: Ends,
        take: Callable[[Session], None],
        *,
        env: Sequence[str],
        cwd: str | None,
        user: str | None,
    ) -> Result:
        """Run a command; how it ended."""
        try:
            result = exec_client.execute_with(
                self,
                argv,
                env=env,
                cwd=cwd,
                user=user,
                merged=ends.merged,
                files=ends.files,
                sinks=ends.sinks,
                on_session=take,
            )
        except ConfigError:
            if self.task.ended.wait(0):
                self.check_running()
            raise
        if result.reason == "machine" and self.task.ended.wait(_LAST_WORDS):
            return result._replace(message=self._end())
        return result

    def close(self) -> None:
        """End it and wait until nothing is left."""
        self.supervisor.shut(_CLOSED)
        self.task.kill(_CLOSED)
        self.task.join()


_PLACE_MAX = 50
_LAST_WORDS = 5.0  # seconds from the end of a command's streams to that of its machine


def _absolute_path(path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError(f"{path!r}: a path in the guest starts with a slash")
    return path


def _socket_place() -> str:
    """Where sockets can be: their paths have 107 bytes at most (unix(7)); $TMPDIR may be longer."""
    place = os.environ.get("XDG_RUNTIME_DIR", "")
    return place if os.path.isdir(place) and len(place) < _PLACE_MAX else "/tmp"


def check_args(args: Sequence[str]) -> list[str]:
    """Return a command's words; ConfigError for none, TypeError for what is no list of words."""
    if isinstance(args, str | bytes):
        raise TypeError(f"give the command as a list of words, as there is no shell: {args!r}")
    argv = [os.fsdecode(word) for word in args]
    if not argv:
        raise ConfigError("no command: give a list of at least one word")
    return argv


def check_streams(
    given: str | bytes | None, capture_output: bool, stdin: Given, stdout: Given, stderr: Given
) -> tuple[Given, Given, Given]:
    """Return the streams of a `run`, as subprocess.run has them; ValueError for a contradiction."""
    if given is not None:
        if stdin is not None:
            raise ValueError("stdin and input cannot both be given")
        stdin = subprocess.PIPE
    if capture_output:
        if stdout is not None or stderr is not None:
            raise ValueError("stdout and stderr cannot be given with capture_output")
        stdout = stderr = subprocess.PIPE
    return stdin, stdout, stderr


_problem: list[str | None] = []


def check_runs_linux() -> None:
    """ConfigError if this computer's KVM cannot run Linux, saying what can."""
    if not _problem:
        from tinyvmm.lab.probe import missing_for_linux

        _problem.append(missing_for_linux())
    if _problem[0] is not None:
        raise ConfigError(
            f"this KVM cannot run Linux: {_problem[0]}; run the program in the lab, where it can: "
            "tinyvmm lab -- python PROGRAM"
        )


def _options(cleanup: ExitStack, given: MachineOptions, cwd: str | None) -> RunOptions:
    """Return what run_command takes; until `cleanup`, the tree of the root is open."""
    memory = given.get("memory", "1G")
    root = given.get("root")
    opened = open_root(root, cleanup)
    write = given.get("write")
    shared = given.get("shared", ())
    if opened.tree is not None and (write is not None or given.get("read")):
        raise ConfigError("read and write are for a root of this computer's directories")
    if isinstance(write, str):
        write = {"/": write}
    if isinstance(shared, Mapping):
        shared = [Shared(place, host) for place, host in shared.items()]
    if cwd is None:
        cwd = os.getcwd() if root is None else "/"
    net = _net(given.get("net"))
    return RunOptions(
        argv=(),
        memory=parse_size(memory) if isinstance(memory, str) else memory,
        cpus=given.get("cpus", 1),
        reads=[("/", opened.path), *_absolute(given.get("read"))],
        writes=_absolute(write),
        root=opened.tree,
        cache=given.get("cache") or opened.cache,
        private_writes="server" if opened.tree is None else "guest",
        on_access=given.get("on_access"),
        shared=shared,
        disks=_disks(given.get("disks", ())),
        env=environment(
            (f"{name}={value}" for name, value in given.get("env", {}).items()),
            home=given.get("user") is None,
        ),
        cwd=cwd,
        kernel=given.get("kernel"),
        append=given.get("append", ""),
        console=given.get("console"),
        user=given.get("user"),
        hostname=given.get("hostname", "tinyvmm"),
        net=net,
        publish=_publish(given.get("publish", ()), net),
    )


def _absolute(maps: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [(place, os.path.abspath(host)) for place, host in (maps or {}).items()]


def _disks(given: Sequence[str]) -> Any:
    if not given:
        return ()
    from tinyvmm.disks.opening import parse_disk

    return [parse_disk(text) for text in given]


def _net(given: str | None) -> Any:
    if given is None or given == "none":
        return None
    from tinyvmm.net.options import parse_net

    return parse_net(given)


def _publish(given: Sequence[str], net: Any) -> Any:
    if not given:
        return ()
    from tinyvmm.net.options import check_kind, parse_publish

    check_kind(net)
    return [parse_publish(text) for text in given]
