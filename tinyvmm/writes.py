"""What a machine's guest wrote, whether it runs or has ended: what `diff` and `commit` look at.

Where nothing else was asked for it is in a directory of this computer, which stays for as long as a
machine with a name is known (scratch.py), or in those of `run --write`. Of a machine that runs, the
guest first writes out what it still holds in memory (sync(2)), and is paused while we look.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tinyvmm import instances
from tinyvmm.control import ControlClient
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.written import Change, list_changes
from tinyvmm.instances import WRITES, State
from tinyvmm.scratch import kept_writes


class Written(NamedTuple):
    """What a machine wrote."""

    changes: Iterator[Change]
    trees: Sequence[tuple[str, str]]
    """(guest path, host directory) of the directories it is in."""


@contextmanager
def written(name: str, warn: Callable[[str], None]) -> Iterator[Written]:
    """List the changes that machine `name` made, while it stands still; `warn` takes a line.

    ConfigError if there is no such machine, or what it wrote is not to be had.
    """
    state = instances.find(name)
    writes = _write_trees(state)
    with ExitStack() as cleanup:
        if state.running:
            client = ControlClient(instances.path_of(name, "control"))
            cleanup.enter_context(client)
            _still(client, warn, cleanup)
        changes = list_changes([_pair(tree) for tree in state.reads], writes)
        cleanup.callback(changes.close)
        yield Written(changes, writes)


def _write_trees(state: State) -> list[tuple[str, str]]:
    writes = [_pair(tree) for tree in state.writes]
    kept = kept_writes(instances.path_of(state.name, WRITES))
    if kept is not None and not state.in_memory:
        writes.append(("/", kept))
    if not writes:
        raise ConfigError(
            f"machine {state.name}: what it wrote was in its own memory, or is gone from "
            "TMPDIR; leave out --private-writes guest, --root-mode erofs and --pack /=..., or keep "
            "it: --write DIR"
        )
    return writes


def _pair(tree: Sequence[str]) -> tuple[str, str]:
    guest, host = tree
    return guest, host


def _still(client: ControlClient, warn: Callable[[str], None], cleanup: ExitStack) -> None:
    """Have the guest write out what it holds, and pause it until `cleanup`."""
    if client.call("status")["state"] == "paused":
        warn("the machine is paused: what its guest has not written out yet cannot be seen")
        return
    from tinyvmm.guest_calls import open_guest, sync

    try:
        with open_guest(client) as guest:
            guest.do(sync())
    except (ConfigError, OSError) as error:
        warn(f"what the guest has not written out yet cannot be seen: {error}")
    client.call("pause")
    cleanup.callback(client.call, "resume")
