"""From what the user said of a disk to the disk."""

from typing import NamedTuple

from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError


class DiskOptions(NamedTuple):
    """One disk of a machine."""

    path: str
    read_only: bool = False
    serial: str | None = None
    """What the guest finds in /sys/block/vda/serial; None for `disk0`, by its number."""
    queues: int = 1

    @property
    def written(self) -> str | None:
        """The file that keeps what the guest writes, if one does."""
        return None if self.read_only else self.path


def open_disk(options: DiskOptions) -> RawDisk:
    """Open and lock the image; ConfigError for what cannot be."""
    return RawDisk(options.path, read_only=options.read_only)


def parse_disk(text: str) -> DiskOptions:
    """Parse `PATH[,ro][,serial=ID][,queues=N]`; ConfigError for anything else.

    A comma that begins no option is part of the path.
    """
    rest = text
    options = DiskOptions("")
    while True:
        head, comma, option = rest.rpartition(",")
        name, equals, value = option.partition("=")
        if not comma:
            break
        if option == "ro":
            options = options._replace(read_only=True)
        elif name == "serial" and equals:
            options = options._replace(serial=value)
        elif name == "queues" and equals:
            if not value.isascii() or not value.isdigit():
                raise ConfigError(f"disk {text!r}: queues={value} is no number: give e.g. queues=2")
            options = options._replace(queues=int(value))
        else:
            break
        rest = head
    if not rest:
        raise ConfigError(f"disk {text!r} names no image: give PATH[,OPTION]...")
    return options._replace(path=rest)
