"""What a machine's guest wrote, whether it runs or has ended: what `diff` and `commit` look at.

Where nothing else was asked for it is in a directory of this computer, which stays for as long as a
machine with a name is known (scratch.py), or in those of `run --write`. Of a machine that runs, the
guest first writes out what it still holds in memory (sync(2)), and is paused while we look. What it
writes to its own memory or disk is read from there, by calls of its kernel, as long as it runs.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.written import Change, list_changes
from tinyvmm.instances import registry
from tinyvmm.instances.control import ControlClient
from tinyvmm.instances.registry import WRITES, State
from tinyvmm.scratch import kept_writes


class Written(NamedTuple):
    """What a machine wrote."""

    changes: Iterator[Change]
    trees: Sequence[tuple[str, str]]
    """(guest path, host directory) of the directories it is in; none if some may be the guest's."""


@contextmanager
def written(name: str, warn: Callable[[str], None]) -> Iterator[Written]:
    """List the changes that machine `name` made, while it stands still; `warn` takes a line.

    ConfigError if there is no such machine, or what it wrote is not to be had.
    """
    state = registry.find(name)
    writes = _write_trees(state)
    with ExitStack() as cleanup:
        changes = _changes(state, writes, warn, cleanup)
        cleanup.callback(changes.close)
        yield Written(changes, () if state.running else writes)


def _changes(
    state: State,
    writes: Sequence[tuple[str, str]],
    warn: Callable[[str], None],
    cleanup: ExitStack,
) -> Generator[Change, None, None]:
    """List what is in the guest, which runs for that, and then what is here, while it does not."""
    reads = [_pair(tree) for tree in state.reads]
    if state.running:
        from tinyvmm.inside.guest_calls import open_guest, sync
        from tinyvmm.inside.guest_writes import list_guest_changes

        client = cleanup.enter_context(ControlClient(registry.path_of(state.name, "control")))
        if client.call("status")["state"] == "paused":
            if not writes:
                raise ConfigError(f"machine {state.name} is paused: tinyvmm resume {state.name}")
            warn("the machine is paused: what its guest has not written out yet cannot be seen")
        else:
            try:
                with open_guest(client) as guest:
                    yield from list_guest_changes(guest, reads)
                    guest.do(sync())
            except (ConfigError, OSError) as error:
                if not writes:
                    raise
                warn(f"what the guest has not written out yet cannot be seen: {error}")
            if not writes:
                return
            client.call("pause")
            cleanup.callback(client.call, "resume")
    yield from list_changes(reads, writes)


def _write_trees(state: State) -> list[tuple[str, str]]:
    writes = [_pair(tree) for tree in state.writes]
    kept = kept_writes(registry.path_of(state.name, WRITES))
    if kept is not None and not state.in_memory:
        writes.append(("/", kept))
    if not writes and not state.running:
        if state.upper:
            raise ConfigError(
                f"machine {state.name}: what it wrote is on the disk {state.upper}, which is "
                "looked at while a machine has it: tinyvmm run -d --root-mode erofs --write "
                f"{os.path.dirname(state.upper)} -- sleep inf"
            )
        raise ConfigError(
            f"machine {state.name}: what it wrote was in its own memory, or is gone from "
            "TMPDIR; leave out --private-writes guest, --root-mode erofs and --pack /=..., or keep "
            "it: --write DIR"
        )
    return writes


def _pair(tree: Sequence[str]) -> tuple[str, str]:
    guest, host = tree
    return guest, host
