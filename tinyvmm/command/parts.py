"""What a run adds to the board because an option asks for it: opened first, then added.

What most runs have none of is imported where it is made: the lab pays dearly for each module.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tinyvmm.command.options import RunOptions
from tinyvmm.errors import ConfigError
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

# What most runs have none of is imported where it is made: the lab pays dearly for each module.
if TYPE_CHECKING:
    from tinyvmm.devices.virtio.net import VirtioNet
    from tinyvmm.devices.virtio.vsock import VirtioVsock
    from tinyvmm.disks.opening import DiskOptions
    from tinyvmm.disks.qcow2 import Qcow2Image
    from tinyvmm.disks.raw import RawDisk
    from tinyvmm.net.pump import Pump
    from tinyvmm.own_device import OwnDevice
    from tinyvmm.roots.erofs_root import RootDisks
    from tinyvmm.vsock_host import VsockHost


def load_devices(texts: Sequence[str]) -> "list[OwnDevice]":
    """Find the classes of the user's own devices; ConfigError for what is none."""
    if not texts:
        return []
    from tinyvmm import own_device

    return [own_device.load(text) for text in texts]


def add_devices(machine: Machine, devices: "Sequence[OwnDevice]") -> None:
    """Make the user's own devices and add them."""
    if not devices:
        return
    from tinyvmm import own_device

    for device in devices:
        own_device.add(device, machine)


def open_disks(disks: "Sequence[DiskOptions]", cleanup: ExitStack) -> "list[RawDisk | Qcow2Image]":
    """Open and lock every disk, until `cleanup`; ConfigError for what cannot be."""
    if not disks:
        return []
    from tinyvmm.disks.opening import open_disk

    opened = []
    for given in disks:
        disk = open_disk(given)
        cleanup.callback(disk.close)
        opened.append(disk)
    return opened


def add_disks(
    machine: Machine, given: "Sequence[DiskOptions]", opened: "Sequence[RawDisk | Qcow2Image]"
) -> None:
    """Add a device for each disk."""
    if not opened:
        return
    from tinyvmm.devices.virtio.blk import VirtioBlk

    for number, (options, disk) in enumerate(zip(given, opened, strict=True)):
        serial = f"disk{number}" if options.serial is None else options.serial
        try:
            device = VirtioBlk(disk, serial=serial, queues=options.queues)
        except ConfigError as error:
            raise ConfigError(f"disk {options.path}: {error}") from None
        machine.add_virtio(device)


def open_root_disks(
    options: RunOptions, warn: Callable[[str], None], cleanup: ExitStack
) -> "RootDisks | None":
    """Open the disks of a root of EROFS, until `cleanup`; None if it is another."""
    if options.root_mode != "erofs":
        return None
    from tinyvmm.roots.erofs_root import open_root

    return open_root(
        options.reads,
        options.writes,
        private_writes=options.private_writes or "guest",
        number=len(options.disks),
        warn=warn,
        cleanup=cleanup,
    )


def add_root_disks(machine: Machine, root: "RootDisks | None") -> None:
    """Add a device for each disk of the root."""
    if root is None:
        return
    from tinyvmm.devices.virtio.blk import VirtioBlk
    from tinyvmm.roots.erofs_root import OPT_IO_SIZE, SERIAL, UPPER_SERIAL

    machine.add_virtio(VirtioBlk(root.image, serial=SERIAL, opt_io_size=OPT_IO_SIZE))
    if root.upper is not None:
        machine.add_virtio(VirtioBlk(root.upper, serial=UPPER_SERIAL))


def open_vsock(given: tuple[str | None, int] | None, cleanup: ExitStack) -> "VsockHost | None":
    """Listen for the vsock device, until `cleanup`; None if there is none, or none of ours."""
    if given is None or given[0] is None:
        return None
    from tinyvmm.vsock_host import VsockHost

    host = VsockHost(given[0])
    cleanup.callback(host.close)
    return host


def add_vsock(machine: Machine, host: "VsockHost", cid: int) -> "VirtioVsock":
    """Add a vsock device with `host` behind it."""
    from tinyvmm.devices.virtio.vsock import VirtioVsock

    device = VirtioVsock(cid, host)
    machine.add_virtio(device)

    def failed(error: BaseException) -> None:
        machine.stop(StopCause.ERROR, error)

    host.start(device, failed)
    return device


def add_vhost_vsock(machine: Machine, cid: int, cleanup: ExitStack) -> None:
    """Add a vsock device that the kernel serves; ConfigError, with the remedy, where it cannot."""
    from tinyvmm.devices.virtio.vhost_vsock import VhostVsock
    from tinyvmm.vhost import VhostVsock as Kernel

    def failed(error: BaseException) -> None:
        machine.stop(StopCause.ERROR, error)

    def open_kernel() -> Kernel:
        return Kernel(cid, machine.memory.regions)

    device = VhostVsock(cid, open_kernel, failed)
    cleanup.callback(device.close)
    machine.add_virtio(device)


def open_net(
    options: RunOptions, warn: Callable[[str], None], cleanup: ExitStack
) -> "tuple[VirtioNet, list[Pump]] | None":
    """Open what the network interface leads to, until `cleanup`; None if there is none."""
    if options.net is None:
        return None
    from tinyvmm.devices.virtio.net import VirtioNet
    from tinyvmm.net.options import open_backend, random_mac

    mac = options.net.mac or random_mac()
    backends = open_backend(options.net, mac, options.publish, warn, cleanup)
    device = VirtioNet(backends, mac, mtu=options.net.mtu)
    return device, [backend.pump for backend in backends]


def add_net(machine: Machine, net: "tuple[VirtioNet, list[Pump]]") -> None:
    """Add a network interface, and begin to wait for frames."""
    device, pumps = net
    machine.add_virtio(device)

    def failed(error: BaseException) -> None:
        machine.stop(StopCause.ERROR, error)

    for pair, pump in zip(device.pairs, pumps, strict=True):
        pump.start(pair, failed)
