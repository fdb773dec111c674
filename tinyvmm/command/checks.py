"""Options before anything is made: what they leave open is decided, what cannot be is refused."""

from collections.abc import Sequence

from tinyvmm.command.options import ROOT_MODES, RunOptions
from tinyvmm.command.parts import load_devices
from tinyvmm.command.trees import open_root
from tinyvmm.errors import ConfigError
from tinyvmm.images import kernels
from tinyvmm.roots.mounts import Shared, arrange, root_mounts


def settle(options: RunOptions) -> RunOptions:
    """Decide what was left open of the root; ConfigError for what does not go together."""
    check_append(options)
    mode = options.root_mode
    if mode not in ROOT_MODES:
        raise ConfigError(f"{mode!r} is no kind of root: give {' or '.join(ROOT_MODES)}")
    if mode == "auto":
        mode = "9p"
        given = options.kernel
        found = kernels.default() if given is None else kernels.look_up(given)
        if found and kernels.missing(found, "9p") and not kernels.missing(found, "erofs"):
            mode = "erofs"
    if mode == "erofs":
        from tinyvmm.roots.erofs_root import check_shared, upper_directory

        upper_directory(options.writes)
        if options.cache is not None:
            raise ConfigError("--cache is about 9P, and the root is none: leave out --cache")
        if options.shared:
            check_shared(kernels.find(options.kernel, root="erofs"))
    usual = "guest" if mode == "erofs" and not options.writes else "server"
    return options._replace(root_mode=mode, private_writes=options.private_writes or usual)


def check_options(options: RunOptions) -> Sequence[Shared]:
    """Raise ConfigError for directories and policies that cannot be; return what is shared."""
    shared = arrange(options.shared)
    options = settle(options)
    root_mounts(options.cache, options.private_writes)
    check_balloon(options)
    load_devices(options.devices)
    with_packs(options)
    open_root(options, None).close()
    return shared


def check_append(options: RunOptions) -> None:
    """Raise ConfigError for kernel parameters with which Linux has no devices."""
    for word in options.append.split():
        name, _, value = word.partition("=")
        words = set(value.split(","))
        if name == "acpi" and words & {"off", "noirq"}:
            raise ConfigError(f"--append {word}: ACPI says where the devices are: leave it out")
        if name in {"noapic", "nolapic", "disableapic", "nosmp"} or word == "maxcpus=0":
            raise ConfigError(f"--append {word}: without APICs nothing interrupts: leave it out")
        if name == "pci" and options.transport == "pci":
            if words & {"off", "nommconf", "conf1", "conf2"}:
                why = "it hides the bus that the devices are on"
            elif "nomsi" in words:
                why = "the devices would interrupt nobody"
            else:
                continue
            raise ConfigError(f"--append {word}: {why}: leave it out, or give --transport mmio")


def check_balloon(options: RunOptions) -> None:
    """Raise ConfigError for a balloon that leaves the guest no memory."""
    if options.balloon is not None and options.balloon >= options.memory:
        raise ConfigError(
            f"--balloon {options.balloon >> 20}M takes all of --memory {options.memory >> 20}M: "
            "give it less"
        )


def with_packs(options: RunOptions) -> RunOptions:
    """Add the disks that packs are; ConfigError for packs that cannot be where they are to be."""
    if not options.packs:
        return options
    from tinyvmm.roots import pack_mounts

    pack_mounts.check(options.packs, options.writes, options.root_mode)
    return options._replace(disks=(*options.disks, *pack_mounts.disks(options.packs)))
