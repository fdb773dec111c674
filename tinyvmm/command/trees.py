"""The trees of files that a run serves: the root's, shared directories, packs."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from tinyvmm.command.options import RunOptions
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.descriptors import raise_nofile_limit
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.tree import Tree
from tinyvmm.fileserver.union import UnionTree, open_tree
from tinyvmm.guest.init import ROOT_TAG
from tinyvmm.roots.mounts import open_shared, shared_tag
from tinyvmm.scratch import ScratchDirectory


def open_root(options: RunOptions, scratch: str | None) -> UnionTree:
    """Join the root's read and write trees; `scratch` takes writes that nothing keeps."""
    writes = list(options.writes)
    if options.private_writes == "guest" and options.writes:
        raise ConfigError(
            "--private-writes guest throws away what the guest writes, --write keeps it: "
            "leave one out"
        )
    if options.root_mode == "erofs":
        writes = []  # they are a disk's
    elif scratch is not None:
        writes.append(("/", scratch))
    return open_tree(options.reads, writes)


def open_trees(
    options: RunOptions, warn: Callable[[str], None], cleanup: ExitStack
) -> tuple[Tree, list[tuple[str, Tree]]]:
    """Open the root's tree, and all that is served, with its mount tag."""
    raise_nofile_limit()
    scratch = None
    over_9p = options.root_mode == "9p"
    if (
        over_9p
        and options.root is None
        and options.private_writes == "server"
        and all(guest != "/" for guest, _ in options.writes)
    ):
        directory = ScratchDirectory(kept_by=options.keep_writes)
        cleanup.callback(directory.close)
        scratch = directory.path

    def no_space(path: bytes) -> None:
        warn(f"no space left for the guest's writes: {os.fsdecode(path)} is full")

    trees: list[tuple[str, Tree]] = []

    def add(tag: str, tree: HostTree | UnionTree) -> None:
        cleanup.callback(tree.close)
        tree.on_no_space = no_space
        trees.append((tag, tree))

    root: Tree
    if options.root is not None:
        root = options.root
        trees.append((ROOT_TAG, root))
    else:
        root = opened = open_root(options, scratch)
        if over_9p:
            add(ROOT_TAG, opened)
        else:
            cleanup.callback(opened.close)
    if options.on_access is not None and over_9p:
        from tinyvmm.fileserver.watched import WatchedTree

        trees[0] = (ROOT_TAG, WatchedTree(root, options.on_access))
    for number, shared in enumerate(options.shared):
        add(shared_tag(number), open_shared(shared))
    return root, trees


def pack_trees(options: RunOptions, cleanup: ExitStack) -> "Sequence[tuple[str, Tree]]":
    """Open the packs that are served, with their mount tags, until `cleanup`."""
    if not options.packs:
        return ()
    from tinyvmm.roots import pack_mounts

    return pack_mounts.open_trees(options.packs, cleanup)
