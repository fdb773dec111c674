"""What is said of a machine and of commands, by name: the arguments of `run`, `popen`, `Machine`.

Each is declared once, with its type; what it means and its default say the classes' docstrings.
`run_options` makes of a machine's what command/ takes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypedDict

from tinyvmm.command.options import RunOptions
from tinyvmm.errors import ConfigError
from tinyvmm.options import environment, parse_size
from tinyvmm.process_streams import CompleteOptions, StreamOptions
from tinyvmm.roots.contents import Root, open_root
from tinyvmm.roots.mounts import Shared

if TYPE_CHECKING:
    from tinyvmm.fileserver.watched import Access


class MachineOptions(TypedDict, total=False):
    """What a machine is made of.

    `memory` (1G): bytes, or text like "512M". `root`: this computer's / if None, or a directory of
    it, or a dict, an archive, a tree, as roots/contents.py says. `image`: or an OCI image, as for
    --image, with the environment, directory and user that it says; `pull`: as for --pull.
    `read`: further read-only directories, by their place in the guest. `write`: the directory that
    keeps what the guest writes to /, or such directories by their place; else that is private, and
    forgotten. `shared`: host directories live on both sides, by their place in the guest. `disks`:
    images, as for `tinyvmm run --disk`. `env`, `user`: of every command. `net`: "user" or
    "tap=...", as for --net. `publish`: ports, as for --publish: "8080:80". `kernel`, `append`:
    another kernel, and more of its command line. `cache`: what the guest may remember of its root,
    as for --cache. `console` takes what the kernel prints. `on_access` sees, and may refuse, each
    access to the root's files: fileserver/watched.py.
    """

    memory: int | str
    cpus: int
    root: Root
    image: str | None
    pull: str
    read: Mapping[str, str] | None
    write: Mapping[str, str] | str | None
    shared: Sequence[Shared] | Mapping[str, str]
    disks: Sequence[str]
    env: Mapping[str, str] | None
    user: str | None
    net: str | None
    publish: Sequence[str]
    hostname: str
    kernel: str | None
    append: str
    cache: str | None
    console: Callable[[bytes], None] | None
    on_access: "Callable[[Access], None] | None"


class CommandOptions(StreamOptions, total=False):
    """What `Machine.popen` takes.

    `cwd` is / unless given; `env` is on top of the machine's; `user` is USER[:GROUP], names or
    numbers of the guest; the machine's, or root, if None.
    """

    cwd: str | None
    env: Mapping[str, str] | None
    user: str | None


class RunCommandOptions(CommandOptions, CompleteOptions, total=False):
    """What `Machine.run` takes."""


class OwnMachineOptions(StreamOptions, MachineOptions, total=False):
    """What `popen` takes. `cwd` is this directory where the guest's root is this computer's."""

    cwd: str | None


class RunOwnOptions(OwnMachineOptions, CompleteOptions, total=False):
    """What `run` takes."""


def check_names(given: Mapping[str, object], known: type) -> None:
    """TypeError, as of a call, for an argument that there is none of in a TypedDict."""
    for name in given:
        if name not in known.__optional_keys__:  # type: ignore[attr-defined]
            raise TypeError(f"got an unexpected keyword argument {name!r}")


def check_args(args: Sequence[str], least: int = 1) -> list[str]:
    """Return a command's words; ConfigError for none, TypeError for what is no list of words."""
    if isinstance(args, str | bytes):
        raise TypeError(f"give the command as a list of words, as there is no shell: {args!r}")
    argv = [os.fsdecode(word) for word in args]
    if len(argv) < least:
        raise ConfigError("no command: give a list of at least one word")
    return argv


def run_options(
    given: MachineOptions,
    cleanup: ExitStack,
    args: Sequence[str] | None = None,
    cwd: str | None = None,
) -> RunOptions:
    """Return what run_command takes, to run `args`, or if None to wait for what it is sent.

    Until `cleanup` the tree of the root is open, and the image of it held. ConfigError for what
    cannot be.
    """
    write = given.get("write")
    shared = given.get("shared", ())
    if isinstance(write, str):
        write = {"/": write}
    if isinstance(shared, Mapping):
        shared = [Shared(place, host) for place, host in shared.items()]
    memory = given.get("memory", "1G")
    net = _net(given.get("net"))
    source = _root if given.get("image") is None else _image
    root = source(given, cleanup, args, cwd)
    return root._replace(
        memory=parse_size(memory) if isinstance(memory, str) else memory,
        cpus=given.get("cpus", 1),
        reads=[*root.reads, *_absolute(given.get("read"))],
        writes=_absolute(write),
        cache=given.get("cache") or root.cache,
        on_access=given.get("on_access"),
        shared=shared,
        disks=_disks(given.get("disks", ())),
        kernel=given.get("kernel"),
        append=given.get("append", ""),
        console=given.get("console"),
        hostname=given.get("hostname", "tinyvmm"),
        net=net,
        publish=_publish(given.get("publish", ()), net),
    )


def _variables(given: MachineOptions) -> list[str]:
    return [f"{name}={value}" for name, value in (given.get("env") or {}).items()]


def _root(
    given: MachineOptions, cleanup: ExitStack, args: Sequence[str] | None, cwd: str | None
) -> RunOptions:
    """Return what comes from the root: this computer's, or one made of objects."""
    root, user = given.get("root"), given.get("user")
    opened = open_root(root, cleanup)
    if opened.tree is not None and (given.get("write") is not None or given.get("read")):
        raise ConfigError("read and write are for a root of this computer's directories")
    if cwd is None:
        cwd = os.getcwd() if root is None and args is not None else "/"
    return RunOptions(
        argv=() if args is None else check_args(args),
        reads=[("/", opened.path)],
        root=opened.tree,
        cache=opened.cache,
        private_writes="server" if opened.tree is None else "guest",
        env=environment(_variables(given), home=user is None),
        cwd=cwd,
        user=user,
    )


def _image(
    given: MachineOptions, cleanup: ExitStack, args: Sequence[str] | None, cwd: str | None
) -> RunOptions:
    """Return what comes from an image, pulled if need be, and held until `cleanup`."""
    if given.get("root") is not None:
        raise ConfigError("root and image: the root is one or the other")
    from tinyvmm.images.oci.prepare import prepare

    found = prepare(
        given.get("image") or "",
        # No words are the image's own; but where nothing is run, it needs to have none.
        ["-"] if args is None else check_args(args, 0),
        cleanup,
        policy=given.get("pull", "missing"),
        env=_variables(given),
        workdir=cwd,
        user=given.get("user"),
    )
    return RunOptions(
        argv=() if args is None else found.command.argv,
        reads=found.reads,
        directories=found.directories,
        env=found.command.env,
        cwd=found.command.workdir,
        user=found.command.user,
    )


def _absolute(maps: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [(place, os.path.abspath(host)) for place, host in (maps or {}).items()]


def _disks(given: Sequence[str]) -> Any:
    if not given:
        return ()
    from tinyvmm.disks.opening import parse_disk

    return [parse_disk(text) for text in given]


def _net(given: str | None) -> Any:
    if given is None:
        return None
    from tinyvmm.net.options import parse_net

    return parse_net(given)


def _publish(given: Sequence[str], net: Any) -> Any:
    if not given:
        return ()
    from tinyvmm.net.options import check_kind, parse_publish

    check_kind(net)
    return [parse_publish(text) for text in given]
