"""Where a 9P server listens and a client finds it: `unix:PATH` or `tcp:HOST:PORT`.

564 is the port that IANA gave 9P; below 1024, so that only root can serve there. An IPv6 address
stands in brackets: `tcp:[::1]:5640`.
"""

import re
import socket
from typing import NamedTuple

from tinyvmm.errors import ConfigError

PORT = 564
UNIX_PATH_MAX = 108  # sun_path of <linux/un.h>, its NUL included

_TCP = re.compile(r"tcp:(?P<host>[^:\[\]]+|\[[^\[\]]+\])(:(?P<port>[0-9]{1,5}))?")


class Address(NamedTuple):
    """A Unix socket's path, or a host and its port."""

    path: str
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return (
            f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        )

    def resolve(self) -> list[tuple[socket.AddressFamily, str | tuple[object, ...]]]:
        """The (family, socket address) pairs to try, in order; ConfigError if there are none."""
        if self.path:
            return [(socket.AF_UNIX, self.path)]
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"{self}: {error.strerror}; name a host there is") from None
        return [(family, where) for family, _, _, _, where in found]


def parse_address(text: str, port: int = PORT) -> Address:
    """Parse `unix:PATH` or `tcp:HOST[:PORT]`, else at `port`; ConfigError for anything else."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        if len(rest.encode("utf-8", "surrogateescape")) >= UNIX_PATH_MAX or "\0" in rest:
            raise ConfigError(
                f"{text}: too long for a socket; give a path of less than {UNIX_PATH_MAX} bytes"
            )
        return Address(rest)
    found = _TCP.fullmatch(text)
    if found is not None and (port := int(found["port"] or port)) < 1 << 16:
        return Address("", found["host"].strip("[]"), port)
    raise ConfigError(f"{text!r} is no address: give unix:PATH or tcp:HOST:PORT")
