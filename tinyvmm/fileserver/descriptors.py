"""Descriptors held on behalf of a guest: how many, and which are given up when there are too many.

Every node of a tree holds O_PATH descriptors, and a guest that caches names holds many nodes (v9fs
keeps a fid for every dentry). `Descriptors` keeps a tree under its share of RLIMIT_NOFILE: nodes
whose descriptors are oldest lose them and open them again by parent and name when next used,
checking that they found the same inode. A node that has no name any more keeps its own.

Invariant: descriptors are given up only at the start of a public operation, never in the middle of
one, so a number fetched within an operation stays good until it returns. All of this runs under the
tree's lock.
"""

import os
from typing import Protocol

_CEILING = 1 << 15  # an inode pinned in the host's kernel costs more than our table of them


class Holder(Protocol):
    """A node, as the keeper of descriptors sees it."""

    def close_descriptors(self) -> None:
        """Close its descriptors, if they are open."""

    def give_up(self) -> bool:
        """Close its descriptors if it can open them again; False if it must keep them."""


def raise_nofile_limit() -> int:
    """Raise RLIMIT_NOFILE to its hard limit and return that; for who runs, before opening trees."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Descriptors:
    """The nodes of one tree that hold descriptors, oldest first."""

    def __init__(self, limit: int | None = None) -> None:
        """Allow `limit` nodes to hold descriptors; by default half of RLIMIT_NOFILE."""
        if limit is None:
            soft = os.sysconf("SC_OPEN_MAX")
            limit = _CEILING if soft < 0 else min(_CEILING, soft // 2)
        self.limit = max(limit, 8)
        self._holders: dict[Holder, None] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def hold(self, holder: Holder) -> None:
        """Note that `holder` has opened its descriptors just now."""
        self._holders[holder] = None

    def release(self, holder: Holder) -> None:
        """Note that `holder` has closed its descriptors."""
        self._holders.pop(holder, None)

    def close_all(self) -> None:
        """Close what every holder has, for good."""
        for holder in self._holders:
            holder.close_descriptors()
        self._holders.clear()

    def holders(self) -> list[Holder]:
        """Who holds descriptors now, oldest first."""
        return list(self._holders)

    def make_room(self) -> None:
        """Come down to three quarters of the limit, if it is reached."""
        if len(self._holders) >= self.limit:
            self._give_up(len(self._holders) - self.limit * 3 // 4)

    def give_up_half(self) -> None:
        """The process is out of descriptors: give up half of ours."""
        self._give_up((len(self._holders) + 1) // 2)

    def _give_up(self, count: int) -> None:
        holders = self._holders
        for holder in list(holders):
            if count <= 0:
                break
            del holders[holder]
            if holder.give_up():
                count -= 1
            else:
                holders[holder] = None  # to the back, so that the next search is short
