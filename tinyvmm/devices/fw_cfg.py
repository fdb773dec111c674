"""fw_cfg: what a guest may ask of its machine, and named files, as QEMU's firmware knows it.

Model: the QEMU firmware configuration device (QEMU's docs/specs/fw_cfg.rst). Port 0x510 takes a
selector, 16 bits wide; each read of a byte at 0x511 gives the next byte of what was selected, and 0
past its end. No interrupt. Well-known items are little-endian; the file directory is big-endian.

Not emulated: DMA (bit 1 of the interface ID is clear), writing, items of QEMU's own kernel loader.

Threads: vCPUs only; `_lock` guards the selector and the place in the item.
"""

import struct
import threading
from collections.abc import Mapping
from typing import Any

from tinyvmm.devices.device import Device
from tinyvmm.errors import ConfigError

FW_CFG_SIGNATURE = 0x00
FW_CFG_ID = 0x01
FW_CFG_RAM_SIZE = 0x03
FW_CFG_NB_CPUS = 0x05
FW_CFG_MAX_CPUS = 0x0F
FW_CFG_FILE_DIR = 0x19
FW_CFG_FILE_FIRST = 0x20
FW_CFG_VERSION = 1 << 0  # the interface without DMA
NAME_MAX = 55
FILES_MAX = 1024

_file = struct.Struct(">IHH56s")  # size, select, reserved, name


class FwCfg(Device):
    """The device; two ports from 0x510."""

    name = "fw-cfg"
    length = 2

    def __init__(self, *, ram_size: int, cpus: int, files: Mapping[str, bytes]) -> None:
        """Offer the size of RAM in bytes, the number of CPUs, and `files` by name.

        ConfigError for a name that is empty, longer than 55 bytes or not ASCII.
        """
        self._lock = threading.Lock()
        self._items: dict[int, bytes] = {
            FW_CFG_SIGNATURE: b"QEMU",
            FW_CFG_ID: struct.pack("<I", FW_CFG_VERSION),
            FW_CFG_RAM_SIZE: struct.pack("<Q", ram_size),
            FW_CFG_NB_CPUS: struct.pack("<H", cpus),
            FW_CFG_MAX_CPUS: struct.pack("<H", cpus),
        }
        if len(files) > FILES_MAX:
            raise ConfigError(f"more than {FILES_MAX} fw_cfg files: leave some out")
        directory = struct.pack(">I", len(files))
        for select, name in enumerate(sorted(files), FW_CFG_FILE_FIRST):
            if not (1 <= len(name) <= NAME_MAX and name.isascii() and name.isprintable()):
                raise ConfigError(
                    f"fw_cfg file {name!r}: give it a name of 1 to {NAME_MAX} ASCII characters"
                )
            self._items[select] = files[name]
            directory += _file.pack(len(files[name]), select, 0, name.encode())
        self._items[FW_CFG_FILE_DIR] = directory
        self._selector = FW_CFG_SIGNATURE
        self._offset = 0

    def read(self, offset: int, size: int) -> int:
        """Give the selected item's next byte; nothing else can be read."""
        if (offset, size) != (1, 1):
            return 0
        with self._lock:
            item = self._items.get(self._selector, b"")
            if self._offset >= len(item):
                return 0
            self._offset += 1
            return item[self._offset - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, and begin at its beginning."""
        if (offset, size) == (0, 2):
            with self._lock:
                self._selector, self._offset = value, 0

    def save(self) -> dict[str, Any]:
        """Return what is selected and how far it was read; the items are the machine's making."""
        with self._lock:
            return {"selector": self._selector, "offset": self._offset}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `save` returned."""
        with self._lock:
            self._selector, self._offset = state["selector"], state["offset"]
