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
from errno import EEXIST, ENOTEMPTY
from typing import Any

from tinyvmm.errors import ConfigError
from tinyvmm.named import NamedTuple

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAKING = ".making-"
WRITES = "writes"
_BRIEFLY = 0.01  # seconds
_TRIES = 100
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
        self._lock = -1
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
        except BaseException as error:
            _forget(making)
            if self._lock >= 0:
                os.close(self._lock)
            if isinstance(error, OSError):
                why = error.strerror
                raise ConfigError(f"cannot make a machine in {base}: {why}") from None
            raise

    def _claim(self, making: str) -> None:
        list_()  # forgets what dead processes left behind and nobody asked to keep
        for _ in range(_TRIES):
            try:
                os.rename(making, self.path)
            except OSError as error:
                if error.errno not in {ENOTEMPTY, EEXIST}:
                    raise
            else:
                return
            found = read(self.state.name)
            if found is not None:
                what = (
                    "runs" if found.running else "has ended, but is kept: tinyvmm rm " + found.name
                )
                raise ConfigError(f"a machine named {found.name} {what}")
            time.sleep(_BRIEFLY)  # it is just being removed
        raise ConfigError(f"cannot use the name {self.state.name}: remove {self.path}")

    def file(self, name: str) -> str:
        """Return the path of one of its files."""
        return os.path.join(self.path, name)

    def update(self, **changes: Any) -> None:
        """Change what others read of it."""
        self.state = self.state._replace(**changes)
        _write_state(self.path, self.state)

    def end(self, status: int, message: str | None, console: bytes = b"") -> None:
        """Tell how it ended, and forget it if nobody asked to keep it.

        ConfigError if that cannot be kept: then it counts as killed.
        """
        try:
            if self.state.keep:
                self._keep(status, message, console)
            else:
                _forget(self.path)
        finally:
            os.close(self._lock)

    def _keep(self, status: int, message: str | None, console: bytes) -> None:
        for name in ("control", "vsock"):
            with suppress(FileNotFoundError):
                os.unlink(self.file(name))
        try:
            with open(self.file("console"), "wb") as file:
                file.write(console)
            self.update(status=status, message=message, ended=time.time())
        except OSError as error:
            name = self.state.name
            raise ConfigError(f"cannot keep how {name} ended: {error.strerror}") from None


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
    path = path_of(name)
    with _pinned(path) as here:
        return None if here is None else _look(here, path)


def _look(here: str, path: str) -> State | None:
    """Read the state of the machine in `here`, and if its process has died, tell or remove it."""
    state = _read_state(here, path)
    if state is not None and not state.running:
        return state
    with _unlocked(here) as unlocked:
        if not unlocked:
            return state
        state = _read_state(here, path)  # it may have told its end meanwhile
        if state is not None and not state.running:
            return state
        if state is not None and state.keep:
            lost = "the process that ran it was killed"
            state = state._replace(status=STATUS_LOST, ended=time.time(), message=lost)
            with suppress(OSError):  # a full disk: whoever looks next says the same
                _write_state(here, state)
            return state
        _remove(here, path)  # perhaps for somebody who died over it
    return None


def find(name: str) -> State:
    """Return what is known of a machine; ConfigError if there is none of that name."""
    state = read(name)
    if state is None:
        raise ConfigError(f"no machine is named {name}; see tinyvmm ps --all")
    return state


def path_of(name: str, *file: str) -> str:
    """Return the path of a machine's directory, or of a file in it."""
    return os.path.join(directory(), name, *file)


def remove(name: str) -> None:
    """Forget a machine that has ended; ConfigError if it runs."""
    path = path_of(find(name).name)
    with _pinned(path) as here:
        state = None if here is None else _look(here, path)
        if here is None or state is None:
            return  # somebody else was quicker
        if state.running:
            raise ConfigError(f"machine {name} runs: tinyvmm stop {name}, or rm --force")
        _remove(here, path)


def wait(name: str) -> State | None:
    """Wait for the end of a machine; None if it was not kept, or there is none of that name."""
    state = read(name)
    while state is not None and state.running:
        try:
            fd = os.open(path_of(name, "lock"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)
        state = read(name)
        time.sleep(_BRIEFLY)  # others who wait may just hold the lock of one that was killed
    return state


@contextmanager
def _pinned(path: str) -> Iterator[str | None]:
    """Give a path that stays with this directory, whoever removes it and takes its name.

    None if there is none.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


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


def _forget(path: str) -> None:
    """Remove a directory of this process's own."""
    with _pinned(path) as here:
        if here is not None:
            _remove(here, path)


def _remove(here: str, path: str) -> None:
    """Remove a machine's directory, which has no others in it; somebody else may be at it too.

    The state goes last but for the lock: whoever finds none, and nobody who holds the lock, goes on
    with it.
    """
    from tinyvmm.scratch import remove_kept

    remove_kept(os.path.join(path, WRITES), os.path.join(here, WRITES))
    with suppress(FileNotFoundError):
        for name in os.listdir(here):
            if name not in {"state", "lock"}:
                _unlink(here, name)
        _unlink(here, "state")
        _unlink(here, "lock")
        with suppress(OSError):  # something came into it meanwhile: the next look finds it again
            os.rmdir(path)


def _unlink(here: str, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(here, name))


def _forget_unlocked(path: str) -> None:
    """Remove what a process left that died while it made a machine."""
    with suppress(OSError), _pinned(path) as here:
        if here is None or time.time() - os.stat(here).st_mtime < 60:
            return  # its lock may be about to be taken
        with _unlocked(here) as unlocked:
            if unlocked:
                _remove(here, path)


def _write_state(path: str, state: State) -> None:
    temporary = os.path.join(path, f"state.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(state._asdict(), file)
    os.replace(temporary, os.path.join(path, "state"))


def _read_state(here: str, path: str) -> State | None:
    try:
        with open(os.path.join(here, "state"), encoding="utf-8") as file:
            fields: Mapping[str, Any] = json.load(file)
        state = State(**fields)
        return state._replace(reads=_tuples(state.reads), writes=_tuples(state.writes))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the state of {path}: {why}; remove it") from None


def _tuples(pairs: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """As they were before they were JSON."""
    return tuple(tuple(pair) for pair in pairs)
