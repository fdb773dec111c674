"""Packs in a machine: how each gets there, and how its guest joins them with the root.

An EROFS image is a disk, a zip a 9P tree. The guest mounts each read-only and puts an overlay over
what a pack is at: packs above each other, the later over the earlier, and above all a layer in the
guest's RAM that takes writes. At / the root is the lowest layer, and all that is written then is
private; but where the root is an overlay of the guest's anyway, packs at / are further layers of
that. Elsewhere a pack hides what the root has there, as a read tree's map does.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from tinyvmm.disks.opening import DiskOptions
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.objects import ObjectTree
from tinyvmm.guest import abi
from tinyvmm.guest.init import NEW_ROOT, Filesystem, Mkdir, Mount, disk_name, v9fs_options
from tinyvmm.images.packs import Pack

EROFS_MODULES = ("virtio_blk", "erofs")
ZIP_MODULES = ("9pnet_virtio", "9p")
_PLACE = "/packs"  # in the initramfs
_WRITES = f"{_PLACE}/writes"


class PackMap(NamedTuple):
    """A pack that the guest sees at the path `guest`."""

    guest: str
    pack: Pack


def check(packs: Sequence[PackMap], writes: Sequence[tuple[str, str]], root_mode: str) -> None:
    """Raise ConfigError for a pack in the way of what the guest's writes are kept by."""
    if root_mode == "erofs":
        return  # one at / lies below what is written, and nothing else is kept apart
    for guest, pack in packs:
        for written, host in writes:
            if guest in {"/", written} or written.startswith(guest + "/"):
                raise ConfigError(
                    f"--pack {guest}={pack.name}: what is written there stays in the guest's RAM, "
                    f"but --write {written}={host} is to keep it: leave one out"
                    + (", or use --root-mode erofs" if guest == written == "/" else "")
                )


def disks(packs: Sequence[PackMap]) -> list[DiskOptions]:
    """Return the disks of those packs that are EROFS images, in their order."""
    found = [(n, item.pack) for n, item in enumerate(packs) if item.pack.kind == "erofs"]
    return [
        DiskOptions(pack.path, read_only=True, format="raw", serial=_tag(number))
        for number, pack in found
    ]


def modules(packs: Sequence[PackMap]) -> list[str]:
    """Return the kernel modules that the guest needs for them."""
    kinds = {item.pack.kind for item in packs}
    erofs = EROFS_MODULES if "erofs" in kinds else ()
    over_9p = ZIP_MODULES if "zip" in kinds else ()
    return [*erofs, *over_9p, *(("overlay",) if packs else ())]


def open_trees(packs: Sequence[PackMap], cleanup: ExitStack) -> list[tuple[str, ObjectTree]]:
    """Open the trees of those packs that are zips, with their mount tags, until `cleanup`."""
    trees = []
    for number, (_, pack) in enumerate(packs):
        if pack.kind == "zip":
            try:
                archive = cleanup.enter_context(zipfile.ZipFile(pack.path))
                tree = ObjectTree(archive, uid=0, gid=0)
            except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
                raise ConfigError(
                    f"pack {pack.path} cannot be read: {error}; make it again"
                ) from None
            cleanup.callback(tree.close)
            trees.append((_tag(number), tree))
    return trees


class Layers(NamedTuple):
    """The packs as PID 1 mounts them, before the root."""

    mounts: Sequence[Filesystem]
    at: Mapping[str, Sequence[str]]
    """Where the packs are that the guest sees at a path, the uppermost first."""


def layers(packs: Sequence[PackMap], first_disk: int) -> Layers:
    """Return the mounts of `packs`, and what is to be where; `first_disk` is the first's number."""
    steps: list[Filesystem] = [Mkdir(_PLACE)]
    at: dict[str, list[str]] = {}
    disk = first_disk
    for number, (guest, pack) in enumerate(packs):
        target = f"{_PLACE}/{number}"
        if pack.kind == "erofs":
            steps.append(Mount(f"/dev/{disk_name(disk)}", target, "erofs", abi.MS_RDONLY))
            disk += 1
        else:
            options = v9fs_options("loose")
            steps.append(Mount(_tag(number), target, "9p", abi.MS_RDONLY, options))
        at.setdefault(guest, []).insert(0, target)
    return Layers(steps, at)


def overlays(at: Mapping[str, Sequence[str]]) -> list[Filesystem]:
    """How PID 1 lays packs over the root, once that is at NEW_ROOT."""
    if not at:
        return []
    steps: list[Filesystem] = [Mount("tmpfs", _WRITES, "tmpfs", data="size=50%,mode=0755")]
    for number, guest in enumerate(sorted(at, key=lambda path: path.count("/") - (path == "/"))):
        steps += _overlay(guest, at[guest], f"{_WRITES}/{number}")
    return steps


def _overlay(guest: str, lower: Sequence[str], writes: str) -> list[Filesystem]:
    """Lay `lower` over `guest`, and what is written over that."""
    target = NEW_ROOT + guest.rstrip("/")
    under = [NEW_ROOT] if guest == "/" else []
    above = guest.split("/")[1:-1]
    return [
        *(Mkdir(NEW_ROOT + "/" + "/".join(above[:end])) for end in range(1, len(above) + 1)),
        *(Mkdir(path) for path in (writes, f"{writes}/upper", f"{writes}/work")),
        Mount(
            "overlay",
            target,
            "overlay",
            data=f"lowerdir={':'.join([*lower, *under])},upperdir={writes}/upper,"
            f"workdir={writes}/work,redirect_dir=on",
        ),
    ]


def _tag(number: int) -> str:
    return f"pack{number}"


def parse_pack(text: str) -> PackMap:
    """Parse `[GUEST=]NAME`; NAME may be a file's path. ConfigError if there is no such pack."""
    from tinyvmm.images import packs

    guest, equals, name = text.partition("=")
    if not equals or not guest.startswith("/"):
        guest, name = "/", text
    return PackMap(os.path.normpath(guest).replace("//", "/"), packs.find(name))
