"""The lab: this computer's files with a real /dev/kvm, where this computer has none.

A QEMU machine (qemu.py) without hardware help runs a stock kernel with kvm_amd. Its root is the
host's / over virtio-9p, read-only, under an overlay that forgets; directories named as shares are
the host's own, read-write, at the same path. Whatever runs there sees what it would see here, and
KVM besides: Python about 30 times slower, but every KVM ioctl answered by the real thing.

    run_in_lab(argv)     one command; streams, signals, terminal and status as for `tinyvmm run`
    reexec(arguments)    this very program, in the lab
    Lab                  a lab that stays up and runs one command after the other, for tests
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from tinyvmm.errors import ConfigError, TinyvmmError
from tinyvmm.guest.init import (
    ROOT_9P_OPTIONS,
    STANDARD_MOUNTS,
    InitConfig,
    Mount,
    build_init,
    describe_step,
    lower_9p,
    overlay_root,
    search_path,
)
from tinyvmm.guest.initramfs import Archive
from tinyvmm.guest.modules import closure
from tinyvmm.guest.protocol import EXEC_FAILED, GOODBYE, RECORD, SETUP_FAILED, STARTED
from tinyvmm.lab.qemu import MIB, ROOT_TAG, Hardware, Qemu, find_program, kernel_file
from tinyvmm.session import HostFiles, Result, Session, host_files, write_all
from tinyvmm.streams import SocketOutput

MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd")
# Linux measures the TSC twice, and a busy computer may be 500 ppm off at first and late with the
# second. KVM allows 250 between the two, and above them forgets the guest's TSC without a word: its
# timers then come late by as long as it has been up (arch/x86/kvm/x86.c, set_tsc_khz).
PARAMETERS = {"kvm": "tsc_tolerance_ppm=20000"}
MEMORY = 4096 * MIB
MEMORY_MIN = 256 * MIB
CPUS_MAX = 64  # more than any computer can emulate side by side
BOOT_TIMEOUT = 120.0  # seconds to STARTED; a few are usual
SILENCE_MAX = 90.0  # seconds without a sign of life; lab_agent.py sends one every few
POWER_OFF_TIMEOUT = 10.0  # seconds from GOODBYE to the end of QEMU
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

ROOT = overlay_root(lower_9p(ROOT_TAG, ROOT_9P_OPTIONS))
# Not cache=loose: the host changes these files as well. mmap: or a shared mapping would fail.
SHARE_OPTIONS = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap"


class LabError(TinyvmmError):
    """The lab itself failed: it did not come up, died, or could not run the command."""


class LabHungError(LabError):
    """The lab as a whole no longer answers."""


def default_cpus() -> int:
    """Return how many processors a lab has by default: two for nested SMP, four at most."""
    return min(4, max(2, len(os.sched_getaffinity(0))))


def default_memory() -> int:
    """Return how many bytes of RAM a lab has by default; never more than half of the host's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MEMORY, physical // 2 // MIB * MIB)


class _Plan(NamedTuple):
    """A lab about to be started: what PID 1 shall do, and on what."""

    config: InitConfig
    hardware: Hardware
    kernel: str
    modules: str


def _plan(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    shares: Sequence[str],
    memory: int | None,
    cpus: int | None,
    kernel: str | None,
    terminal: tuple[int, int] | None = None,
    agent: bool = False,
) -> _Plan:
    """Decide everything; ConfigError for what cannot be. `agent`: the command is lab_agent.py."""
    from tinyvmm.images import kernels

    find_program()
    if not argv:
        raise ConfigError("no command: give one behind --, e.g. tinyvmm lab -- ls /dev/kvm")
    cpus = default_cpus() if cpus is None else cpus
    hardware = Hardware(
        default_memory() if memory is None else memory,
        cpus,
        [_share(path) for path in shares],
        ticks=cpus == 1 or not agent,  # the agent has the processors wake each other
    )
    if hardware.memory < MEMORY_MIN:
        raise ConfigError(f"the lab cannot do with less than {MEMORY_MIN // MIB}M; give it more")
    if not 1 <= hardware.cpus <= CPUS_MAX:
        raise ConfigError(f"the lab cannot have {cpus} processors; give it 1 to {CPUS_MAX}")
    environment = dict(os.environ if env is None else env)
    environment.setdefault("PATH", DEFAULT_PATH)
    installed = kernels.find(kernel, root=kernels.LAB)
    if installed.modules is None:
        raise ConfigError(
            f"kernel {installed.version}: the lab needs its modules, kvm_amd above all, and there "
            "are none with it; get a whole kernel with: tinyvmm kernel fetch"
        )
    mounts = [
        Mount(f"share{number}", path, "9p", data=SHARE_OPTIONS)
        for number, path in enumerate(hardware.shares)
    ]
    config = InitConfig(
        commands=search_path(argv[0], environment["PATH"]),
        argv=argv,
        env=[f"{name}={value}" for name, value in environment.items()],
        cwd=os.getcwd() if cwd is None else cwd,
        modules=[
            f"/modules/{module.name}.ko {PARAMETERS.get(module.name, '')}".rstrip()
            for module in closure(installed.modules, MODULES)
        ],
        root=ROOT,
        mounts=(*STANDARD_MOUNTS, *mounts),
        hostname="lab",
        terminal=terminal,
        await_goodbye=True,
    )
    return _Plan(config, hardware, installed.vmlinuz, installed.modules)


def _share(path: str) -> str:
    real = os.path.realpath(path)
    if not os.path.isdir(real):
        raise ConfigError(f"cannot share {path} with the lab: it is not a directory; make it first")
    if real == "/":
        raise ConfigError("cannot share / with the lab: it would be no lab; name a directory in it")
    return real


def _start(plan: _Plan) -> Qemu:
    archive = Archive()
    for module in closure(plan.modules, MODULES):
        archive.add_file(f"modules/{module.name}.ko", module.read())
    archive.add_file("init", build_init(plan.config), mode=0o755)
    kernel = kernel_file(plan.kernel)
    try:
        return Qemu(plan.hardware, kernel, archive.finish())
    finally:
        os.close(kernel)


# --- one command -------------------------------------------------------------------------------


def run_in_lab(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    shares: Sequence[str] = (),
    memory: int | None = None,
    cpus: int | None = None,
    kernel: str | None = None,
    timeout: float | None = None,
    terminal: bool | None = None,
    files: HostFiles | None = None,
) -> int:
    """Run a command in a new lab, as if here, and return its exit status for a shell.

    `env` and `cwd` default to ours, `memory` (bytes) and `cpus` to what suits; `shares` are host
    directories the command may change. `timeout` (seconds) ends it with 124. `terminal` gives the
    command one of its own; by default if our stdin and stdout are terminals. Why a lab failed is
    said on stderr. ConfigError for what cannot be done. Main thread, and it alone, because the
    lab dies with the thread that starts it.
    """
    from tinyvmm.terminal import Terminal, is_terminal_session

    tty = Terminal() if (is_terminal_session() if terminal is None else terminal) else None
    plan = _plan(
        argv,
        env=env,
        cwd=cwd,
        shares=shares,
        memory=memory,
        cpus=cpus,
        kernel=kernel,
        terminal=tty.size() if tty else None,
    )
    with _start(plan) as qemu:
        ports = qemu.ports()

        def power_off() -> None:
            """Let QEMU pass on all output, then end it."""
            for output in (ports.stdout, ports.stderr):
                if isinstance(output, SocketOutput):
                    output.settle()
            ports.control_in.write(RECORD.pack(GOODBYE, 0))
            if not qemu.wait(POWER_OFF_TIMEOUT):
                qemu.kill()

        session = Session(
            ports,
            command=argv[0],
            timeout=timeout,
            boot_timeout=BOOT_TIMEOUT,
            terminal=tty,
            describe_step=lambda step: describe_step(plan.config, step),
            on_end=lambda: _in_background(power_off),
            files=files,
        )

        def watch() -> None:
            qemu.wait()
            session.stopped(message="the lab ended before its command did")

        _in_background(watch)
        result = session.run()
        if result.message is not None:
            _say(result, qemu, host_files() if files is None else files)
    return result.status


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name=work.__name__, daemon=True).start()


def _say(result: Result, qemu: Qemu, files: HostFiles) -> None:
    lines = [f"tinyvmm: lab: {result.message}"]
    if result.reason in {"machine", "boot", "setup"}:
        lines += [f"  {line}" for line in qemu.last_words().splitlines()]
    if files.stderr is not None:
        write_all(files.stderr, "".join(f"{line}\n" for line in lines).encode())


# --- this program, in the lab ------------------------------------------------------------------


def python_command(code: str, arguments: Sequence[str]) -> list[str]:
    """Return how to run `code` with this Python so that it starts as quickly as it can.

    By its real path, as a wrapper of it may take seconds in the lab; without site, the environment
    or the current directory.
    """
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", code, *arguments]


def reexec(
    arguments: Sequence[str], *, shares: Sequence[str] = (), timeout: float | None = None
) -> int:
    """Run `tinyvmm ARGUMENTS` in a lab and return its exit status, as `run_in_lab`."""
    import compileall

    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # What is not compiled here is compiled there, 30 times slower. Where it cannot be kept, it is.
    compileall.compile_dir(package, quiet=2)
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(package)!r}); sys.argv[0] = 'tinyvmm'; "
        "from tinyvmm.cli.main import main; sys.exit(main())"
    )
    return run_in_lab(python_command(code, arguments), shares=shares, timeout=timeout)


# --- many commands -----------------------------------------------------------------------------


class Completed(NamedTuple):
    """A command that has run: `status` as a shell shows it."""

    status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool


class Lab:
    """A lab that stays up: a context manager whose `run` executes one command after another.

    It starts with the first command, and anew after it had to be killed. One thread.
    """

    def __init__(
        self,
        *,
        shares: Sequence[str] = (),
        memory: int | None = None,
        cpus: int | None = None,
        kernel: str | None = None,
    ) -> None:
        self._shares = shares
        self._memory = memory
        self._cpus = cpus
        self._kernel = kernel
        self._qemu: Qemu | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the lab; the next command would start another."""
        if self._qemu is not None:
            self._qemu.close()
            self._qemu = None

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float = 120.0,
        pty: tuple[int, int] | None = None,
    ) -> Completed:
        """Run a command and return what it did.

        `env` adds to our environment. `timeout` is in seconds. A lab that gives no sign of life is
        killed: LabHungError. With `pty` (rows, columns) the command has a terminal,
        where `stdin` is typed and stdout is what it shows. LabError if the lab failed, naming the
        command; FileNotFoundError and the like are LabErrors too.
        """
        request = {
            "argv": list(argv),
            "env": {**os.environ, **(env or {})},
            "cwd": os.getcwd() if cwd is None else cwd,
            "timeout": timeout,
            "pty": pty,
            "stdin": len(stdin),
        }
        qemu = self._qemu or self._boot()
        to_agent, from_agent = qemu.sockets[0], qemu.sockets[1]
        for sock in (to_agent, from_agent):
            sock.settimeout(SILENCE_MAX)
        try:
            to_agent.sendall(json.dumps(request).encode() + b"\n" + stdin)
            with from_agent.makefile("rb") as answers:
                line = b"\n"
                while line == b"\n":  # a sign of life
                    line = answers.readline()
                if not line:
                    raise ConnectionError("it ended")
                answer = json.loads(line)
                stdout = answers.read(answer["stdout"])
                stderr = answers.read(answer["stderr"])
        except (OSError, ValueError) as error:
            words = qemu.last_words()
            self.close()
            kind = LabHungError if isinstance(error, TimeoutError) else LabError
            raise kind(
                f"the lab failed ({error}) while it ran {argv}; its console:\n{words}"
            ) from error
        if "error" in answer:
            raise LabError(f"the lab cannot run {argv}: {answer['error']}")
        status = answer["status"]
        return Completed(
            128 - status if status < 0 else status, stdout, stderr, answer["timed_out"]
        )

    def _boot(self) -> Qemu:
        agent = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lab_agent.py")
        plan = _plan(
            [os.path.realpath(sys.executable), "-I", "-S", agent, "/dev/kvm"],
            env=None,
            cwd="/",
            shares=self._shares,
            memory=self._memory,
            cpus=self._cpus,
            kernel=self._kernel,
            agent=True,
        )
        qemu = _start(plan)
        control = qemu.sockets[3]
        control.settimeout(BOOT_TIMEOUT)
        try:
            with control.makefile("rb") as records:
                record = records.read(RECORD.size)
            kind, value = RECORD.unpack(record) if len(record) == RECORD.size else (0, 0)
        except OSError as error:
            kind, value = 0, error.errno or 0
        if kind != STARTED:
            why = {
                SETUP_FAILED: f"could not {describe_step(plan.config, value >> 16)}",
                EXEC_FAILED: f"could not execute {sys.executable}",
            }.get(kind, "did not come up")
            words = qemu.last_words()
            qemu.close()
            raise LabError(f"the lab {why}; its console:\n{words}")
        self._qemu = qemu
        return qemu
