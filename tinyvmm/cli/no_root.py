"""`tinyvmm run --no-root`: a kernel by itself; its options, and those of `run` that it shares."""

import argparse
import os
from typing import TYPE_CHECKING

from tinyvmm.cli import tracing
from tinyvmm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvmm.bare_kernel import Module

# What `run` has for a root and the command in it, by the name of the option and its default.
_FOR_A_ROOT: dict[str, object] = {
    "read": [],
    "write": [],
    "shared": [],
    "cache": None,
    "private_writes": None,
    "root_mode": "auto",
    "env": [],
    "pack": [],
    "console": None,
    "balloon": None,
    "vsock": None,
    "net": None,
    "publish": [],
    "detach": False,
    "name": "",
    "rm": False,
    "interactive": False,
    "tty": False,
    "init": False,
    "stop_signal": None,
    "user": None,
    "workdir": None,
    "hostname": "tinyvmm",
    "image": None,
    "pull": "missing",
    "entrypoint": None,
    "insecure": False,
}
_OWN: dict[str, object] = {"boot_protocol": "auto", "module": [], "fw_cfg": [], "serial": None}


def parse_module(text: str) -> "Module":
    """Parse `FILE[ WORDS]`, WORDS being what the kernel is told of it."""
    from tinyvmm.bare_kernel import Module

    path, _, words = text.partition(" ")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return Module(os.path.abspath(path), words)


def parse_fw_cfg(text: str) -> tuple[str, str]:
    """Parse `NAME=PATH`, also QEMU's `name=NAME,file=PATH`."""
    if text.startswith("name=") and ",file=" in text:
        text = text.removeprefix("name=").replace(",file=", "=", 1)
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=PATH, e.g. opt/greeting=hello.txt")
    return name, os.path.abspath(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only --no-root has, and --on-reboot."""
    group = parser.add_argument_group("a kernel by itself")
    add = group.add_argument
    add("--no-root", action="store_true", help="run --kernel with no root, and no command in it")
    add(
        "--boot-protocol",
        choices=("auto", "linux", "pvh", "multiboot"),
        default="auto",
        help="how the kernel wants to be entered (default: what its file says)",
    )
    add(
        "--module",
        "--initrd",
        type=parse_module,
        action="append",
        default=[],
        metavar="FILE[ WORDS]",
        help="a multiboot or PVH module, or Linux's initramfs",
    )
    add(
        "--fw-cfg",
        type=parse_fw_cfg,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a file the kernel can ask fw_cfg for",
    )
    add("--serial", metavar="WHERE", help="COM1: stdio (the default), none or file:PATH")
    add(
        "--on-reboot",
        choices=("exit", "reset"),
        default="exit",
        help="what a reset by the guest does (default exit)",
    )


def check_unused(args: argparse.Namespace) -> None:
    """Raise ConfigError if an option was given that means nothing without --no-root."""
    _refuse(args, _OWN, "needs --no-root")


def _refuse(args: argparse.Namespace, options: dict[str, object], why: str) -> None:
    for name, default in options.items():
        if getattr(args, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} {why}; leave it out")


def main(args: argparse.Namespace) -> int:
    """Run the kernel here: whether this KVM can run it depends on the kernel."""
    from tinyvmm.bare import BareOptions, run_bare
    from tinyvmm.cli.values import warn
    from tinyvmm.images import kernels

    if args.argv + args.guest_argv:
        raise ConfigError("--no-root runs no command: leave it out, or leave out --no-root")
    if args.kernel is None:
        raise ConfigError("--no-root needs a kernel: give --kernel FILE")
    _refuse(args, _FOR_A_ROOT, "is for a root, and with --no-root there is none")
    path = args.kernel if os.path.exists(args.kernel) else kernels.find(args.kernel).vmlinuz
    tracing.start(args.trace, args.trace_file)
    result = run_bare(
        BareOptions(
            kernel=path,
            protocol=None if args.boot_protocol == "auto" else args.boot_protocol,
            modules=args.module,
            append=args.append,
            memory=args.memory,
            cpus=args.cpus,
            serial="stdio" if args.serial is None else args.serial,
            fw_cfg=args.fw_cfg,
            disks=args.disk,
            devices=args.device,
            timeout=args.timeout,
            on_reboot=args.on_reboot,
            transport=args.transport,
            ioeventfd={"on": True, "off": False}.get(args.ioeventfd),
        ),
        warn,
    )
    if result.message is not None:
        warn(result.message)
    return result.status
