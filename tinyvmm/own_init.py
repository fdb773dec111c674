"""What asks an init to shut the machine down: which init it is shows in the root, where it leads.

- systemd: SIGRTMIN+4 starts poweroff.target (systemd(1), "Signals").
- busybox: SIGUSR2 powers off (init of busybox, documented in its init.c and `halt`'s signals).
- any other: SIGPWR, which sysvinit's takes from powerd (init(8)); one that does not understand it
  has the power button, which comes next.
"""

import os
import signal
import stat
from collections import deque

from tinyvmm.fileserver.tree import Node, Tree

_LINKS_MAX = 40  # as path_resolution(7)
_SIGNALS = {
    "systemd": int(signal.SIGRTMIN) + 4,
    "busybox": int(signal.SIGUSR2),
}


def stop_signal(root: Tree, path: str) -> int:
    """Return the number of the signal for the init that `path` leads to in the guest's root."""
    name = os.path.basename(resolve(root, path))
    return next((number for known, number in _SIGNALS.items() if name.startswith(known)), _OTHER)


_OTHER = int(signal.SIGPWR)


def resolve(root: Tree, path: str) -> str:
    """Return where a path leads in a tree, by its symbolic links; as far as there is something."""
    todo = deque(part for part in path.split("/") if part)
    names: list[str] = []
    links = 0
    while todo:
        name = todo.popleft()
        if name in {".", ".."}:
            del names[len(names) - (name == "..") :]
            continue
        target = _link(root, [*names, name])
        if target is None:
            names.append(name)
            continue
        links += 1
        if links > _LINKS_MAX:
            break
        if target.startswith("/"):
            names = []
        todo.extendleft(reversed([part for part in target.split("/") if part]))
    return "/" + "/".join(names)


def _link(root: Tree, names: list[str]) -> str | None:
    """Return the target of a symbolic link; None if it is none, or there is no such file."""
    nodes: list[Node] = [root.root()]
    try:
        for name in names:
            nodes.append(nodes[-1].walk(os.fsencode(name)))
        if stat.S_ISLNK(nodes[-1].stat().st_mode):
            return os.fsdecode(nodes[-1].readlink())
    except OSError:
        return None
    else:
        return None
    finally:
        for node in reversed(nodes):
            node.close()
