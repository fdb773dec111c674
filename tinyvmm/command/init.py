"""What the guest's first process is told, and the kernel before it: from options to its program."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tinyvmm.command.options import UNSENT_MS, RunOptions
from tinyvmm.fileserver.tree import Tree
from tinyvmm.guest.archive import ModuleArchive
from tinyvmm.guest.init import STANDARD_MOUNTS, Filesystem, InitConfig, Mkdir, Network, search_path
from tinyvmm.roots.mounts import root_mounts, shared_mounts

# What most runs have none of is imported where it is made: the lab pays dearly for each module.
if TYPE_CHECKING:
    from tinyvmm.methods.supervised import Context
    from tinyvmm.roots.erofs_root import RootDisks
    from tinyvmm.terminal import Terminal


# `panic=-1` makes a panic reset at once, which ends the run; what the kernel printed tells why. And
# `reboot=a` makes a reset use the register that ACPI names: see acpi.py. The rest has it start
# sooner: no trial of the timer nor of ciphers, and no waiting for grace periods of RCU to pass by
# themselves, of which a start has dozens.
CMDLINE = (
    "console=ttyS0 panic=-1 reboot=a no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1"
)


def with_user(options: RunOptions, root: Tree) -> RunOptions:
    """Look up whom the command runs as; ConfigError if there is no such user."""
    if options.user is None:
        return options
    from tinyvmm.inside.guest_users import resolve

    account = resolve(options.user, root)
    env = list(options.env)
    if not any(entry.startswith("HOME=") for entry in env):
        env.append(f"HOME={account.home}")
    return options._replace(account=account.user, env=env)


def with_stop_signal(options: RunOptions, root: Tree) -> RunOptions:
    """Find out the number of what asks the command to end; ConfigError if it is no signal."""
    if options.stop_signal is not None:
        from tinyvmm.methods.supervisor import signal_number

        return options._replace(stop_signal=signal_number(options.stop_signal))
    number = int(signal.SIGTERM)
    if options.own_init:
        from tinyvmm.own_init import stop_signal

        number = stop_signal(root, options.argv[0])
    return options._replace(stop_signal=number)


def stops(options: RunOptions) -> Mapping[int, int]:
    """Return which signals of ours ask the command to end, and by which."""
    number = int(options.stop_signal or signal.SIGTERM)
    stops: dict[int, int] = {signal.SIGTERM: number, signal.SIGHUP: number}
    if options.own_init:  # to it, SIGINT is Ctrl-Alt-Delete
        stops[signal.SIGINT] = number
    return stops


def context(
    options: RunOptions, root: Tree, where: str | None, inserted: ModuleArchive
) -> "Context":
    """Return what a command of `exec` has in common with ours; `where` the kernel's modules are."""
    from tinyvmm.methods.supervised import Context

    def modules(names: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        from tinyvmm.guest.modules import closure

        if where is None:
            return ()  # then everything must be built in
        there = {os.path.basename(path).removesuffix(".ko") for path in inserted.paths}
        needed = closure(where, names)
        return [(module.name, module.read()) for module in needed if module.name not in there]

    return Context(options.env, options.cwd, root, modules, options.account)


def init_config(
    options: RunOptions,
    modules: ModuleArchive,
    terminal: "Terminal | None",
    root_disks: "RootDisks | None",
) -> InitConfig:
    """Return what PID 1 is to do."""
    path = dict(entry.split("=", 1) for entry in options.env).get("PATH", "/usr/bin:/bin")
    return InitConfig(
        commands=search_path(options.argv[0], path) if options.argv else (),
        argv=options.argv,
        env=options.env,
        cwd=options.cwd,
        modules=modules.paths,
        root=_root(options, root_disks),
        mounts=(
            *(Mkdir(path) for path in options.directories),
            *STANDARD_MOUNTS,
            *shared_mounts(options.shared),
        ),
        hostname=options.hostname,
        network=_network(options),
        terminal=_terminal_size(options, terminal),
        user=options.account,
        merged=options.merged,
        idle=not options.argv,
        own_init=options.own_init,
        # An init of the root's own shuts down as it likes.
        unsent_ms=0 if options.net is None or options.own_init else UNSENT_MS,
        # The end of the run is ours to make: on its way down Linux resets its devices, and what we
        # had not yet taken from their queues would be gone.
        await_goodbye=True,
    )


def _root(options: RunOptions, root_disks: "RootDisks | None") -> Sequence[Filesystem]:
    """How PID 1 mounts the root, and joins packs with it."""
    policies = options.cache, options.private_writes
    if not options.packs:
        return root_disks.mounts() if root_disks else root_mounts(*policies)
    from tinyvmm.roots import pack_mounts

    own = len(options.disks) - len(pack_mounts.disks(options.packs))
    below, at = pack_mounts.layers(options.packs, own)
    over: Sequence[str] = ()
    if root_disks or options.private_writes == "guest":  # an overlay, which can have them
        over = at.get("/", ())
        at = {guest: packs for guest, packs in at.items() if guest != "/"}
    mounts = root_disks.mounts(over) if root_disks else root_mounts(*policies, over)
    return (*below, *mounts, *pack_mounts.overlays(at))


def _network(options: RunOptions) -> Network | None:
    """Return how PID 1 sets the interface up; None if there is none, or it is left alone."""
    net = options.net
    if net is None or net.address is None:
        return None
    return Network(net.address, net.gateway, net.nameservers)


def _terminal_size(options: RunOptions, terminal: "Terminal | None") -> tuple[int, int] | None:
    if terminal is None:
        return (24, 80) if options.terminal else None  # until somebody attaches to it
    return terminal.size()


def open_terminal(options: RunOptions) -> "Terminal | None":
    """Take our own terminal for the command's; None if it has none, or another."""
    if not options.terminal or options.detached:
        return None
    from tinyvmm.terminal import Terminal, is_terminal_session

    return Terminal() if is_terminal_session() else None


def cmdline(options: RunOptions) -> str:
    """Return the kernel's command line."""
    quiet = "" if options.console is not None else " quiet"
    # Linux looks for old chipsets' flaws by asking 256 buses, blindly: 35,000 exits.
    pci = " pci=noearly" if options.transport == "pci" else " pci=off"
    more = f" {options.append}" if options.append else ""
    return CMDLINE + pci + quiet + more
