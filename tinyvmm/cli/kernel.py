"""`tinyvmm kernel`: the kernels there are to boot; getting more, choosing one, building one."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from tinyvmm.cli.values import parse_count

if TYPE_CHECKING:
    from tinyvmm.images.kernels import InstalledKernel

_EPILOG = """\
examples:
  tinyvmm kernel fetch                     Debian's newest
  tinyvmm kernel fetch --flavour cloud     for roots of EROFS: it has no 9P
  tinyvmm kernel fetch 6.1.0-48            that one
  tinyvmm kernel import kernel-core.rpm kernel-modules-core.rpm kernel-modules.rpm
  tinyvmm kernel import bzImage --modules ./lib/modules/6.12.1
  tinyvmm kernel build && tinyvmm kernel use 6.1.192-tinyvmm
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the `tinyvmm` parser."""
    parser = subparsers.add_parser(
        "kernel",
        help="list, fetch, import, build and choose kernels to boot",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, says: str, main: Any, example: str = "") -> argparse.ArgumentParser:
        epilog = f"example: tinyvmm kernel {name} {example}".rstrip()
        added = actions.add_parser(name, help=says, epilog=epilog, allow_abbrev=False)
        added.set_defaults(main=main)
        return added

    listing = action("list", "the kernels here; * is what `run` boots", _list)
    listing.add_argument("--json", action="store_true", help="for programs")

    fetching = action(
        "fetch", "get a kernel of Debian's through apt-get", _fetch, "--flavour cloud"
    )
    fetching.add_argument(
        "version",
        metavar="VERSION",
        nargs="?",
        help="all of it or its beginning (default: newest)",
    )
    fetching.add_argument("--flavour", help="amd64 (the default), cloud or rt")

    importing = action(
        "import",
        "take in packages, or a vmlinuz and its modules",
        _import,
        "bzImage --modules ./lib/modules/6.12.1",
    )
    what = importing.add_argument_group("what").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        default=[],
        help=".deb or .rpm files of one kernel, or a vmlinuz or vmlinux",
    )
    what.add_argument("--running", action="store_true", help="the kernel this computer runs")
    importing.add_argument("--modules", metavar="DIR", help="its modules, as /lib/modules/VERSION")

    building = action("build", "make one that needs no modules, of Debian's source", _build)
    building.add_argument(
        "--source",
        metavar="PATH",
        help="a tree or tarball (default: /usr/src/linux-source-*.tar.*)",
    )
    building.add_argument("--config", metavar="FILE", help="more options, each CONFIG_NAME=value")
    building.add_argument(
        "--jobs", type=parse_count, metavar="N", help="at once (default: every CPU)"
    )
    building.add_argument(
        "--directory", metavar="DIR", help="where to build, and keep what is made"
    )

    showing = action("show", "all about one kernel", _show, "6.1.0-48")
    showing.add_argument(
        "kernel",
        metavar="VERSION|FILE",
        nargs="?",
        help="a version or a file (default: what `run` boots)",
    )
    showing.add_argument("--json", action="store_true", help="for programs")

    using = action("use", "choose what `run` boots", _use, "6.1.0-48")
    using.add_argument(
        "version", metavar="VERSION", help="one of those here; newest for whatever is newest"
    )

    removing = action("rm", "remove kernels", _rm, "6.1.0-48")
    removing.add_argument("versions", nargs="+", metavar="VERSION", help="of those here")


def _fetch(args: argparse.Namespace) -> int:
    from tinyvmm.images import kernel_store

    _print_stored(kernel_store.fetch(None, args.version, args.flavour))
    return 0


def _import(args: argparse.Namespace) -> int:
    from tinyvmm.images import kernel_store

    paths = [_running()] if args.running else args.paths
    _print_stored(kernel_store.import_(paths, args.modules))
    return 0


def _running() -> str:
    from tinyvmm.errors import ConfigError
    from tinyvmm.images import kernels

    path = kernels.running_vmlinuz()
    if not os.path.exists(path):
        raise ConfigError(
            f"kernel import --running: the kernel that runs has no file {path} here; give the "
            "path of its file, or get another kernel with: tinyvmm kernel fetch"
        )
    return path


def _build(args: argparse.Namespace) -> int:
    from tinyvmm.images import kernel_build

    built = kernel_build.build(args.source, args.config, args.jobs, args.directory)
    _print_stored(built)
    print(f"to have `run` boot it: tinyvmm kernel use {built.version}")
    return 0


def _use(args: argparse.Namespace) -> int:
    from tinyvmm.images import kernel_store

    found = kernel_store.use(args.version)
    print(found.version if found else _none())
    return 0


def _none() -> str:
    """Say that a run has no kernel, though there may be some for other roots than the usual."""
    from tinyvmm.images import kernels

    none = "no kernel here can do a root over 9P" if kernels.list_() else "no kernel here yet"
    return f"{none}; `tinyvmm run` fetches one, or: tinyvmm kernel fetch"


def _rm(args: argparse.Namespace) -> int:
    from tinyvmm.images import kernel_store

    kernel_store.remove(args.versions)
    return 0


def _print_stored(kernel: "InstalledKernel") -> None:
    """Say what was put in, and what it can do."""
    print(f"{kernel.version}  {kernel.vmlinuz}")
    print(f"can do: {_abilities(kernel)}")


def _abilities(kernel: "InstalledKernel") -> str:
    """Return the features a kernel has, with a ? behind those it may have."""
    from tinyvmm.images import kernels

    has = kernels.able(kernel)
    return " ".join(n if has[n] else f"{n}?" for n in has if has[n] is not False) or "nothing"


def _show(args: argparse.Namespace) -> int:
    from tinyvmm.errors import ConfigError
    from tinyvmm.images import kernels

    found = kernels.default() if args.kernel is None else kernels.look_up(args.kernel)
    if found is None:
        raise ConfigError(_none())
    has = kernels.able(found)
    known = {
        **found._asdict(),
        "size": kernels.size(found),
        "default": found == kernels.default(),
        "roots": [root for root in kernels.ROOTS if not kernels.missing(found, root)],
        "features": has,
    }
    if args.json:
        import json

        print(json.dumps(known, indent=2))
        return 0
    words = {True: "yes", False: "no", None: "unknown"}
    rows = {
        "version": found.version,
        "kernel": found.vmlinuz,
        "modules": found.modules or "none: what it can do is built in",
        "source": found.source,
        "size": f"{kernels.size(found) / 1e6:.1f} MB",
        "default": words[found == kernels.default()],
        "roots": " ".join(known["roots"]) or "none",
        **{feature: words[known_to_have] for feature, known_to_have in has.items()},
    }
    for name, value in rows.items():
        print(f"{name + ':':<16} {value}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from tinyvmm.images import kernels

    default = kernels.default()
    found = kernels.list_()
    rows = [(kernel, kernels.able(kernel), kernel == default) for kernel in found]
    if args.json:
        import json

        records = [{**k._asdict(), "features": has, "default": mark} for k, has, mark in rows]
        print(json.dumps(records, indent=2))
        return 0
    if not rows:
        print(_none())
    version_len = max((len(kernel.version) for kernel in found), default=0)
    for kernel, _, mark in rows:
        star = "*" if mark else " "
        roots = "+".join(root for root in kernels.ROOTS if not kernels.missing(kernel, root))
        size = f"{kernels.size(kernel) / 1e6:.0f} MB"
        row = f"{star} {kernel.version:<{version_len}}  {roots:<8}  {size:>7}  {kernel.source}"
        print(row.rstrip())
    return 0
