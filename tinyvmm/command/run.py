"""Run one command in one virtual machine: what `tinyvmm run` does, as an API.

`run_command` reads as the whole story: find a kernel, join the directories into one tree, make an
initramfs around PID 1, build a machine with a console and that tree as its root, boot, relay the
command's streams, and turn the end into an exit status. Everything opened on the way is closed on
the way out, whatever happened.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING

from tinyvmm.boot import load_kernel
from tinyvmm.command.checks import check_balloon, settle, with_packs
from tinyvmm.command.init import context, init_config, open_terminal, with_stop_signal, with_user
from tinyvmm.command.options import MODULES, RunOptions, modules_for
from tinyvmm.command.parts import load_devices, open_disks, open_root_disks
from tinyvmm.command.trees import open_trees, pack_trees
from tinyvmm.command.turn import Ends, Opened, Turn
from tinyvmm.fileserver.tree import Tree
from tinyvmm.guest.archive import ModuleArchive, init_archive, module_archive
from tinyvmm.guest.init import describe_step
from tinyvmm.images import kernels
from tinyvmm.kernel_files.kernel_cache import default_dir
from tinyvmm.roots.mounts import arrange
from tinyvmm.session import HostFiles, Result, Session

# What most runs have none of is imported where it is made: the lab pays dearly for each module.
if TYPE_CHECKING:
    from tinyvmm.kernel_files.kernel_image import Kernel
    from tinyvmm.methods.supervised import Supervised


def run_command(
    options: RunOptions,
    warn: Callable[[str], None],
    supervised: "Supervised | None" = None,
    sinks: Mapping[str, Callable[[bytes], None]] | None = None,
    *,
    files: HostFiles | None = None,
    on_session: Callable[[Session], None] | None = None,
) -> Result:
    """Run `options.argv` in a new virtual machine and return how it ended.

    `warn` takes lines for the user, on any thread. `supervised` is told of the machine;
    `files` and `sinks` are as for `Session`, which `on_session` is given before it runs.
    ConfigError for what cannot be done.
    """
    with ExitStack() as cleanup:
        options = settle(options._replace(shared=arrange(options.shared)))
        check_balloon(options)
        options = with_packs(options)
        own_devices = load_devices(options.devices)
        disks = open_disks(options.disks, cleanup)
        installed = kernels.find(options.kernel, root=options.root_mode)
        kernels.hold(installed, cleanup)
        kernel, modules = _load(installed, modules_for(options))
        cleanup.callback(kernel.close)
        root, trees = open_trees(options, warn, cleanup)
        served: list[tuple[str, Tree]] = [*trees, *pack_trees(options, cleanup)]
        root_disks = open_root_disks(options, warn, cleanup)
        terminal = open_terminal(options)
        options = with_stop_signal(with_user(options, root), root)
        config = init_config(options, modules, terminal, root_disks)
        if supervised is not None:
            supervised.stop_signal = int(options.stop_signal or signal.SIGTERM)
            supervised.begin(context(options, root, installed.modules, modules))
        initrd = [modules.archive, init_archive(config)]
        ends = Ends(files, sinks or {}, on_session)
        opened = Opened(
            options, served, disks, root_disks, own_devices, terminal, warn, supervised, ends
        )
        timeout, begin = options.timeout, monotonic()
        while True:  # once, unless the guest reboots and is to
            turn = Turn(opened, timeout)
            result = turn.run(kernel, initrd, lambda step: describe_step(config, step))
            if not (turn.rebooted and options.on_reboot == "reset"):
                return result
            if options.timeout is not None:
                timeout = max(0.0, options.timeout - (monotonic() - begin))


def prepare_kernel(
    wanted: str | None, names: Sequence[str] = MODULES, root: str = "9p"
) -> tuple["Kernel", ModuleArchive]:
    """Find, unpack and cache the kernel and its modules; the caller closes the kernel.

    `root` is the kind of root that the kernel has to serve for.
    """
    return _load(kernels.find(wanted, root=root), names)


def _load(
    installed: kernels.InstalledKernel, names: Sequence[str]
) -> tuple["Kernel", ModuleArchive]:
    kernel = load_kernel(installed.vmlinuz)
    if installed.modules is None:
        return kernel, ModuleArchive((), b"")  # then everything must be built in
    return kernel, module_archive(installed.modules, names, default_dir())
