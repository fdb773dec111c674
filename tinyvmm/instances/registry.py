"""The machines of this user: where each keeps its state, and who is alive.

A machine is a directory of mode 0700, named as it is, under `directory()`:

    lock      held (flock(2)) by the process that runs the machine, for as long as that lives
    state     JSON: what it is and how it ended; replaced as a whole by rename(2)
    control   the control socket (control.py)
    vsock     the Unix socket in front of the guest's AF_VSOCK, and vsock_N (vsock_host.py)
    output    what a detached machine's command wrote (output_log.py)
    console   the last of what the kernel printed, once it has ended
    writes    a link to what the guest wrote, where nothing else keeps it (scratch.py)

Nobody asks a process id whether it lives, since numbers are used again: a lock dies with its
holder. A directory is made under another name, its lock taken, and then renamed: so whoever finds
one unlocked knows that its process is gone, and whoever is late with a name is told.
"""

import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from tinyvmm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAKING = ".making-"
WRITES = "writes"
STATUS_LOST = 255  # of a machine whose process was killed


class State(NamedTuple):
    """What is known of a machine; times in seconds since 1970, sizes in bytes."""

    name: str
    pid: int
    """Of the process that runs it."""
    command: list[str]
    memory: int
    cpus: int
    created: float
    kernel: str = ""
    detached: bool = False
    keep: bool = False
    """Whether it stays known once it has ended, until `rm`."""
    status: int | None = None
    """The exit status, once it has ended."""
    ended: float | None = None
    message: str | None = None
    """Why it ended, where the status does not say it all."""
    reads: Sequence[Sequence[str]] = ()
    """(guest path, host path) of the trees its root was made of."""
    in_memory: bool = False
    """Whether what it wrote to / was in its own memory."""
    writes: Sequence[Sequence[str]] = ()
    """As `reads`: the directories that keep what it wrote."""
    upper: str = ""
    """The disk that keeps it, over a root of EROFS."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.status is None


def directory() -> str:
    """Return the directory of this user's machines, made if need be; ConfigError if it cannot be.

    $XDG_RUNTIME_DIR/tinyvmm (XDG Base Directory Specification), or where there is none
    /tmp/tinyvmm-UID: gone after a reboot, as the machines are.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    uid = os.geteuid()
    path = os.path.join(base, "tinyvmm") if os.path.isabs(base) else f"/tmp/tinyvmm-{uid}"
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
    except OSError as error:
        raise ConfigError(
            f"cannot keep machines in {path}: {error.strerror}; set XDG_RUNTIME_DIR"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise ConfigError(
            f"cannot keep machines in {path}, which others can reach: "
            "remove it, or set XDG_RUNTIME_DIR"
        )
    return path


class Instance:
    """A machine of ours while this process runs it; `path` is its directory."""

    def __init__(self, state: State) -> None:
        """Take `state.name`, or one that is free if it is empty; ConfigError if that is taken."""
        if state.name and not _NAME.fullmatch(state.name):
            raise ConfigError(
                f"{state.name!r} is no name: give letters, digits, _ . and -, 64 at most"
            )
        base = directory()
        making = os.path.join(base, _MAKING + os.urandom(6).hex())
        try:
            os.mkdir(making, 0o700)
            self._lock = os.open(
                os.path.join(making, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            )
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.state = state if state.name else state._replace(name="vm-" + os.urandom(4).hex())
            self.path = os.path.join(base, self.state.name)
            _write_state(making, self.state)
            self._claim(making)
        except OSError as error:
            _remove(making)
            raise ConfigError(f"cannot make a machine in {base}: {error.strerror}") from None

    def _claim(self, making: str) -> None:
        list_()  # forgets what dead processes left behind and nobody asked to keep
        try:
            os.rename(making, self.path)
        except OSError as error:
            _remove(making)
            found = read(self.state.name)
            if found is None:
                raise ConfigError(
                    f"cannot use the name {self.state.name}: {error.strerror}"
                ) from None
            what = "runs" if found.running else "has ended, but is kept: tinyvmm rm " + found.name
            raise ConfigError(f"a machine named {found.name} {what}") from None

    def file(self, name: str) -> str:
        """Return the path of one of its files."""
        return os.path.join(self.path, name)

    def update(self, **changes: Any) -> None:
        """Change what others read of it."""
        self.state = self.state._replace(**changes)
        _write_state(self.path, self.state)

    def end(self, status: int, message: str | None, console: bytes = b"") -> None:
        """Tell how it ended, and forget it if nobody asked to keep it."""
        if self.state.keep:
            with open(self.file("console"), "wb") as file:
                file.write(console)
            self.update(status=status, message=message, ended=time.time())
            for name in ("control", "vsock"):
                with suppress(FileNotFoundError):
                    os.unlink(self.file(name))
        else:
            _remove(self.path)
        os.close(self._lock)


def list_() -> list[State]:
    """Return what is known of every machine, by name; those that were killed are told apart."""
    found = []
    base = directory()
    for name in sorted(os.listdir(base)):
        if name.startswith(_MAKING):
            _forget_unlocked(os.path.join(base, name))
        elif (state := read(name)) is not None:
            found.append(state)
    return found


def read(name: str) -> State | None:
    """Return what is known of a machine, None if there is none of that name."""
    if not _NAME.fullmatch(name):
        return None
    path = os.path.join(directory(), name)
    state = _read_state(path)
    if state is None or not state.running:
        return state
    with _unlocked(path) as unlocked:
        if not unlocked:
            return state
        state = _read_state(path)  # it may have told its end meanwhile
        if state is None or not state.running:
            return state
        lost = "the process that ran it was killed"
        state = state._replace(status=STATUS_LOST, ended=time.time(), message=lost)
        if state.keep:
            _write_state(path, state)
        else:
            _remove(path)
            return None
    return state


def find(name: str) -> State:
    """Return what is known of a machine; ConfigError if there is none of that name."""
    state = read(name)
    if state is None:
        raise ConfigError(f"no machine is named {name}; see tinyvmm ps --all")
    return state


def path_of(name: str, file: str) -> str:
    """Return the path of a file of a machine."""
    return os.path.join(directory(), name, file)


def remove(name: str) -> None:
    """Forget a machine that has ended; ConfigError if it runs."""
    if find(name).running:
        raise ConfigError(f"machine {name} runs: tinyvmm stop {name}, or rm --force")
    _remove(path_of(name, ""))


def wait(name: str) -> State | None:
    """Wait for the end of a machine; None if it was not kept."""
    find(name)
    try:
        fd = os.open(path_of(name, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)
    return read(name)


@contextmanager
def _unlocked(path: str) -> Iterator[bool]:
    """Say whether nobody holds the lock, and hold it meanwhile if so."""
    try:
        fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False  # it is being removed
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    """Remove a machine's directory, which has no others in it; somebody else may be at it too."""
    from tinyvmm.scratch import remove_kept

    remove_kept(os.path.join(path, WRITES))
    with suppress(FileNotFoundError):
        for name in os.listdir(path):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(path, name))
        with suppress(OSError):  # something came into it meanwhile: the next look finds it again
            os.rmdir(path)


def _forget_unlocked(path: str) -> None:
    """Remove what a process left that died while it made a machine."""
    with suppress(OSError):
        if time.time() - os.lstat(path).st_mtime < 60:
            return  # its lock may be about to be taken
        with _unlocked(path) as unlocked:
            if unlocked:
                _remove(path)


def _write_state(path: str, state: State) -> None:
    temporary = os.path.join(path, f"state.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(state._asdict(), file)
    os.replace(temporary, os.path.join(path, "state"))


def _read_state(path: str) -> State | None:
    try:
        with open(os.path.join(path, "state"), encoding="utf-8") as file:
            fields: Mapping[str, Any] = json.load(file)
        state = State(**fields)
        return state._replace(reads=_tuples(state.reads), writes=_tuples(state.writes))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"cannot read the state of {path}: {error}; remove it") from None


def _tuples(pairs: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """As they were before they were JSON."""
    return tuple(tuple(pair) for pair in pairs)
