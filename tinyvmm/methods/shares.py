"""Host directories shared with a guest that runs already: added and removed while it does.

There is no device to plug in. The guest's kernel is asked (guest_calls.py) to connect an AF_VSOCK
socket to a port of the host, where our file server serves the directory on that very stream, and
then to mount it: v9fs speaks over any descriptor (trans=fd, net/9p/trans_fd.c). So there can be
any number, and nothing of the guest's image is needed.

Removing unmounts it in the guest; with `lazy` its name goes at once, even while programs use it,
and what they still want of it is an I/O error, because this side ends too.

Threads: methods come on threads of the control socket's clients, one at a time by `_lock`. Each
share has a thread that answers the guest. `take` is called by the vsock device with its lock held.
"""

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from tinyvmm.errors import ConfigError
from tinyvmm.instances.control import remote
from tinyvmm.instances.control_schema import limits
from tinyvmm.roots.mounts import CACHES, Shared, arrange, open_shared

if TYPE_CHECKING:
    from tinyvmm.fileserver.connection import Connection
    from tinyvmm.fileserver.host import HostTree
    from tinyvmm.fileserver.union import UnionTree
    from tinyvmm.inside.guest_calls import Call, Guest
    from tinyvmm.instances.exec_client import Caller
    from tinyvmm.vsock_host import VsockHost

MODULES = ("9p", "9pnet_fd?")  # before Linux 5.17 the latter was a part of 9pnet
SHARES_MAX = 64
FIRST_PORT, PORTS = 1 << 28, 1 << 28  # exec_streams.py has those above
END_TIMEOUT = 5.0  # seconds for the guest to hang up after unmounting

Path = Annotated[str, limits(maxLength=4095)]
Cache = Annotated[str, limits(enum=CACHES)]


class ShareInfo(TypedDict):
    """A host directory that was shared while the machine ran, at a path of the guest's."""

    guest: str
    host: str
    readonly: bool
    cache: str


class _Share:
    """One of them and this side of its stream."""

    def __init__(self, item: Shared, port: int) -> None:
        self.item = item
        self.port = port
        self.cache = item.cache or ("loose" if item.readonly else "mmap")
        self._tree: HostTree | UnionTree = open_shared(item)
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None

    def take(self, sock: socket.socket) -> None:
        """Serve the directory on a stream, the first that comes."""
        from tinyvmm.fileserver.connection import Connection
        from tinyvmm.fileserver.session import Session

        if self._thread is not None:
            sock.close()
            return
        session = Session(self._tree, name=f"share {self.item.guest}")
        self._connection = Connection(sock, session)
        self._thread = threading.Thread(target=self._connection.serve, name="share", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the guest has hung up."""
        return self._thread is not None and not self._thread.is_alive()

    def end(self, timeout: float) -> None:
        """Wait for the guest to hang up, or do so ourselves, and close the directory."""
        if self._thread is not None and self._connection is not None:
            self._thread.join(timeout)
            self._connection.end()
            self._thread.join()
        self._tree.close()


class Shares:
    """Those of the machine that runs."""

    def __init__(
        self,
        host: "Callable[[], VsockHost]",
        caller: "Caller",
        modules: Callable[[Sequence[str]], Sequence[tuple[str, bytes]]],
    ) -> None:
        """`host` raises ConfigError if no machine runs; `caller` calls the machine's methods.

        `modules` gives what kernel modules of those names need that is not inserted yet.
        """
        self._host = host
        self._caller = caller
        self._modules = modules
        self._lock = threading.Lock()  # guards _shares, and one change at a time
        self._shares: dict[str, _Share] = {}
        self._asked: Guest | None = None  # by whoever has the lock
        self._closing = False

    @remote(waits=True, lane="shares")
    def share_add(
        self,
        *,
        guest: Path,
        host: Path,
        readonly: bool = False,
        cache: Cache | None = None,
    ) -> ShareInfo:
        """Share a host directory with the guest, which then has it at the path `guest`."""
        if not os.path.isabs(host):
            raise ConfigError(f"host directory {host!r}: give its whole path, from / on")
        (item,) = arrange([Shared(guest, host, readonly, cache)])
        with self._lock:
            self._forget_ended()
            if item.guest in self._shares:
                raise ConfigError(f"{item.guest} is shared already: share_remove it first")
            if len(self._shares) >= SHARES_MAX:
                raise ConfigError(f"there are {SHARES_MAX} shares already: remove one")
            port = FIRST_PORT + int.from_bytes(os.urandom(4), "little") % PORTS
            vsock = self._host()
            share = _Share(item, port)
            vsock.offer(port, share.take)
            try:
                self._mount(share)
            except BaseException:
                share.end(0)
                raise
            finally:
                vsock.withdraw(port)
            self._shares[item.guest] = share
            return _info(share)

    @remote(waits=True, lane="shares")
    def share_remove(self, *, guest: Path, lazy: bool = False) -> None:
        """Take back what `share_add` gave; with `lazy` also from programs that use it."""
        from tinyvmm.guest import abi
        from tinyvmm.inside.guest_calls import umount2

        guest = os.path.normpath(guest).replace("//", "/")
        with self._lock:
            self._forget_ended()
            share = self._shares.get(guest)
            if share is None:
                known = ", ".join(self._shares) or "nothing"
                raise ConfigError(f"nothing was shared at {guest} while it ran; there is {known}")
            with self._calls() as calls:
                try:
                    calls.do(umount2(guest, abi.MNT_DETACH if lazy else 0))
                except OSError as error:
                    if error.errno == errno.EBUSY:
                        text = f"{guest} is in use in the guest: end what uses it, or give lazy"
                        raise ConfigError(text) from None
                    if error.errno != errno.EINVAL:  # the guest has unmounted it by itself
                        text = f"the guest cannot unmount {guest}: {error.strerror}"
                        raise ConfigError(text) from None
            del self._shares[guest]
        share.end(0 if lazy else END_TIMEOUT)

    def shares(self) -> list[ShareInfo]:
        """List what `share_add` gave."""
        return [_info(share) for share in list(self._shares.values()) if not share.ended]

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return every method by its name on the wire."""
        return {
            "share_add": self.share_add,
            "share_remove": self.share_remove,
            "shares": self.shares,
        }

    def close(self) -> None:
        """End this side of all: the machine has ended."""
        self._closing = True
        asked = self._asked
        if asked is not None:  # it may never answer, and would keep the lock for a minute
            asked.give_up()
        with self._lock:
            shares, self._shares = self._shares, {}
            self._closing = False  # there may be another machine, after a reboot
        for share in shares.values():
            share.end(0)

    def _forget_ended(self) -> None:
        """Forget those that the guest has unmounted by itself."""
        for guest in [guest for guest, share in self._shares.items() if share.ended]:
            self._shares.pop(guest).end(0)

    @contextmanager
    def _calls(self) -> "Iterator[Guest]":
        """Ask the guest, until `close`; the lock is held."""
        from tinyvmm.inside.guest_calls import open_guest

        with open_guest(self._caller) as calls:
            self._asked = calls
            try:
                if self._closing:  # which has not seen it
                    raise ConfigError("the machine has ended")
                yield calls
            finally:
                self._asked = None

    def _mount(self, share: _Share) -> None:
        """Have the guest's kernel connect and mount; ConfigError if it cannot."""
        with self._calls() as calls:
            begun: list[str] = []
            try:
                for step in self._steps(calls, share):
                    begun.append(step)  # noqa: PERF402 (the last one is what failed)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise ConfigError(
                    f"cannot share {share.item.host}: the guest could not {begun[-1]}: {why}"
                ) from None

    def _steps(self, calls: "Guest", share: _Share) -> Iterator[str]:
        """Do one step after another; yield what the next one is."""
        from tinyvmm.guest import abi
        from tinyvmm.guest.execution import PATIENCE, vsock_address
        from tinyvmm.guest.init import v9fs_options
        from tinyvmm.inside.guest_calls import call, close, connect, make_socket, mkdirat, mount

        for name, module in self._modules(MODULES):
            yield f"insert the kernel module {name}"
            _unless_there(calls, call(abi.SYS_INIT_MODULE, module, len(module), "", what=name))
        above = share.item.guest.split("/")[1:]
        for end in range(1, len(above) + 1):
            path = "/" + "/".join(above[:end])
            yield f"make the directory {path}"
            _unless_there(calls, mkdirat(path, 0o755))
        yield "connect to this computer"
        fd = calls.do(make_socket(abi.AF_VSOCK, abi.SOCK_STREAM)).result
        option = (abi.AF_VSOCK, abi.SO_VM_SOCKETS_CONNECT_TIMEOUT, PATIENCE, len(PATIENCE))
        calls.all([call(abi.SYS_SETSOCKOPT, fd, *option, what="connect timeout")])
        calls.do(connect(fd, vsock_address(share.port)))
        yield f"mount it at {share.item.guest}"
        stream = f"trans=fd,rfdno={fd},wfdno={fd}"
        options = v9fs_options(share.cache).replace("trans=virtio", stream)
        flags = abi.MS_RDONLY if share.item.readonly else 0
        calls.do(mount("tinyvmm", share.item.guest, "9p", flags, options))
        calls.do(close(fd))


def _unless_there(calls: "Guest", wanted: "Call") -> None:
    """Make a call that may find its work done."""
    answer = calls.all([wanted])[0]
    if answer.result != -errno.EEXIST:
        answer.check()


def _info(share: _Share) -> ShareInfo:
    item = share.item
    return {
        "guest": item.guest,
        "host": item.host,
        "readonly": item.readonly,
        "cache": share.cache,
    }
