"""A device on one I/O port: every byte read from it is a throw of a die.

    python -m tinyvmm run --device examples.dice_port:Dice,sides=20 -- \
        dd if=/dev/port bs=1 skip=1280 count=1 status=none | od -An -tu1

Writing a byte to the port (1280 is 0x500) sets the die rolling from there: the same number, the
same throws.
"""

from typing import Any

from tinyvmm.devices.device import Device


class Dice(Device):
    """Port 0x500, no interrupt."""

    PORTS = (0x500, 1)
    HID = "DICE0001"
    name = "dice"

    def __init__(self, sides: int = 6, seed: int = 1) -> None:
        if not 1 <= sides <= 255:
            raise ValueError(f"a die of {sides} sides: a port has room for 1 to 255")
        self.sides = sides
        self.state = seed

    def read(self, offset: int, size: int) -> int:
        """Throw, with the generator that POSIX shows as an example of rand()."""
        del offset, size  # there is one port, and the bus lets only bytes through to it
        self.state = (self.state * 1103515245 + 12345) & 0xFFFF_FFFF
        return (self.state >> 16) % self.sides + 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Begin another row of throws."""
        del offset, size
        self.state = value

    def save(self) -> dict[str, Any]:
        """Return how far the row has come."""
        return {"state": self.state}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.state = state["state"]
