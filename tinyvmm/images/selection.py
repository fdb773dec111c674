"""Which files of a tree are wanted: `--include` and `--exclude` patterns.

A pattern is a shell's (fnmatch(3), of which `*` matches slashes too). With a slash in it, it is of
the path from the top on: `usr/share/doc`; without, of a name at any depth: `*.pyc`. What matches
stands for all that is below it. What is excluded is out, whatever else matches; where something is
included, only that is in, with the directories on the way to it, which are given when it is.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.written import Change, Kept


class Selection:
    """The files that patterns want."""

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self._include = [pattern.strip("/") for pattern in include]
        self._exclude = [pattern.strip("/") for pattern in exclude]

    def excludes(self, path: bytes) -> bool:
        """Whether `path`, from / on, or a directory it is in, is excluded."""
        return _matches(path, self._exclude)

    def includes(self, path: bytes) -> bool:
        """Whether `path`, or a directory it is in, is included."""
        return not self._include or _matches(path, self._include)


def select(changes: Iterable[Change], selection: Selection) -> Iterator[Change]:
    """List those of `changes` that are wanted: a tree's, directories before what is in them.

    ConfigError if there are some, and none is wanted.
    """
    above: list[Kept] = []  # directories that may turn out to be on the way to something
    any_there = any_wanted = False
    for change in changes:
        any_there = True
        if selection.excludes(change.path):
            continue
        while above and not change.path.startswith(above[-1].path + b"/"):
            above.pop()
        if selection.includes(change.path):
            yield from above
            above = []
            any_wanted = True
            yield change
        elif change.stat is not None and stat.S_ISDIR(change.stat.st_mode):
            above.append(Kept(change))
    if any_there and not any_wanted:
        raise ConfigError("--include and --exclude leave nothing")


def _matches(path: bytes, patterns: Sequence[str]) -> bool:
    if not patterns:
        return False
    steps = os.fsdecode(path).strip("/").split("/")
    for end in range(1, len(steps) + 1):
        whole = "/".join(steps[:end])
        for pattern in patterns:
            if fnmatchcase(whole if "/" in pattern else steps[end - 1], pattern):
                return True
    return False
