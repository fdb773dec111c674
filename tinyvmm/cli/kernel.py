"""`tinyvmm kernel list | fetch | import PATH`: the kernels there are to boot."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvmm.images.kernels import InstalledKernel


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the `tinyvmm` parser."""
    parser = subparsers.add_parser("kernel", help="list, fetch or import kernels to boot")
    parser.set_defaults(main=main)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the kernels here; * is what `run` boots")
    listing.add_argument("--json", action="store_true", help="for programs")
    actions.add_parser("fetch", help="get Debian's newest kernel through apt-get")
    importing = actions.add_parser("import", help="take in a .deb, or a vmlinuz and its modules")
    importing.add_argument("path", metavar="PATH", help="a .deb, vmlinuz or vmlinux file")
    importing.add_argument("--modules", metavar="DIR", help="its modules, as /lib/modules/VERSION")


def main(args: argparse.Namespace) -> int:
    """Do what the arguments say; ConfigError says what is wrong with them."""
    from tinyvmm.images import kernels

    if args.action == "list":
        _print_list(kernels.list_(), as_json=args.json)
    elif args.action == "fetch":
        _print_stored(kernels.fetch())
    else:
        _print_stored(kernels.import_(args.path, args.modules))
    return 0


def _print_stored(kernel: "InstalledKernel") -> None:
    print(f"{kernel.version}  {kernel.vmlinuz}")


def _print_list(found: "list[InstalledKernel]", *, as_json: bool) -> None:
    from tinyvmm.images import kernels

    default = kernels.default()
    rows = [(kernel, kernels.features(kernel), kernel == default) for kernel in found]
    if as_json:
        import json

        records = [{**k._asdict(), "features": has, "default": mark} for k, has, mark in rows]
        print(json.dumps(records, indent=2))
        return
    if not rows:
        print("no kernel here yet; `tinyvmm run` fetches one, or: tinyvmm kernel fetch")
    width = max((len(kernel.version) for kernel in found), default=0)
    for kernel, has, mark in rows:
        names = " ".join(n if has[n] else f"{n}?" for n in has if has[n] is not False)
        star = "*" if mark else " "
        print(f"{star} {kernel.version:<{width}}  {names}  {kernel.source}  {kernel.vmlinuz}")
