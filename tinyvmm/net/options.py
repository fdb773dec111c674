"""`--net KIND[,OPTION]...` and `--publish`: what was asked for, and the backend that does it."""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple

from tinyvmm.devices.virtio.net import PAIRS_MAX
from tinyvmm.errors import ConfigError
from tinyvmm.net.passt import Frames, Passt
from tinyvmm.net.tap import Tap

USER_ADDRESS = "10.0.2.15/24"  # as QEMU's user networking has it, whom everybody knows
USER_GATEWAY = "10.0.2.2"  # this computer's loopback
USER_NAMESERVER = "10.0.2.3"  # asks this computer's
USER_MTU = 65520  # what passt is best at: it ends TCP itself, so no wire sees such frames
MTU_MIN, MTU_MAX = 68, 65535
_FORMS = {  # what is to stand behind each option's =
    "mac": "six bytes of one station, e.g. 52:54:00:12:34:56",
    "mtu": f"{MTU_MIN} to {MTU_MAX}",
    "queues": f"1 to {PAIRS_MAX}",
    "address": "an IPv4 address and its network, e.g. 192.0.2.2/24",
    "gateway": "an IPv4 address, e.g. 192.0.2.1",
    "dns": "an IPv4 address, e.g. 192.0.2.1",
}
_OPTIONS = {"user": ("mac", "mtu"), "tap": tuple(_FORMS)}
PORT_MAX = 65535
TAP_NAME = "tinyvmm0"


class NetOptions(NamedTuple):
    """One network interface."""

    kind: str
    """What it leads to: passt ("user"), or a "tap"."""
    tap: str = TAP_NAME
    mac: bytes | None = None
    mtu: int | None = None
    address: str | None = None
    """`192.0.2.2/24`; None leaves the interface to the guest."""
    gateway: str | None = None
    nameservers: Sequence[str] = ()
    queues: int = 1
    """Pairs of queues, of a tap."""


class Published(NamedTuple):
    """A port of this computer that leads to one of the guest's."""

    protocol: str
    """"tcp" or "udp"."""
    address: str | None
    """Where it is; None for all of this computer's IPv4 addresses."""
    host: int
    guest: int


def parse_net(text: str) -> NetOptions | None:
    """Parse `user[,mac=M][,mtu=N]`, `tap[=NAME][,address=A/P][,gateway=G][,dns=D][,queues=N]`.

    Or `none`, for which it returns None. ConfigError for anything else.
    """
    if text == "none":
        return None
    head, *pairs = text.split(",")
    kind, equals, name = head.partition("=")
    if kind not in {"user", "tap"} or (equals and (kind == "user" or not name)):
        raise ConfigError(f"--net {text}: give user, tap, tap=NAME or none")
    options = NetOptions(kind, tap=name or TAP_NAME)
    if kind == "user":
        options = options._replace(
            mtu=USER_MTU,
            address=USER_ADDRESS,
            gateway=USER_GATEWAY,
            nameservers=(USER_NAMESERVER,),
        )
    for pair in pairs:
        key, _, value = pair.partition("=")
        if kind == "user" and key == "queues":
            raise ConfigError(f"--net {text}: passt has one queue; use a tap")
        if key not in _OPTIONS[kind]:
            known = ", ".join(f"{name}=" for name in _OPTIONS[kind])
            raise ConfigError(f"--net {text}: {kind} has no option {key!r}; its options: {known}")
        try:
            options = _with(options, key, value)
        except ValueError:
            raise ConfigError(f"--net {text}: {key}={value}: give {_FORMS[key]}") from None
    return options


def _with(options: NetOptions, key: str, value: str) -> NetOptions:
    """Add one option; ValueError for a value that it cannot have."""
    if key == "mac":
        mac = bytes.fromhex(value.replace(":", ""))
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ValueError(value)
        return options._replace(mac=mac)
    if key == "mtu":
        mtu = int(value)
        if not MTU_MIN <= mtu <= MTU_MAX:
            raise ValueError(value)
        return options._replace(mtu=mtu)
    if key == "queues":
        queues = int(value)
        if not 1 <= queues <= PAIRS_MAX:
            raise ValueError(value)
        return options._replace(queues=queues)
    if key == "address":
        if "/" not in value:  # which IPv4Interface takes for a network of one
            raise ValueError(value)
        return options._replace(address=str(IPv4Interface(value)))
    if key == "gateway":
        return options._replace(gateway=str(IPv4Address(value)))
    return options._replace(nameservers=(*options.nameservers, str(IPv4Address(value))))  # dns


def parse_publish(text: str) -> Published:
    """Parse `[ADDRESS:]HOST:GUEST[/tcp|/udp]`; ConfigError for what is not that."""
    ports, slash, protocol = text.partition("/")
    *address, host, guest = ports.rsplit(":", 2) if ":" in ports else ("", "")
    try:
        found = Published(
            protocol if slash else "tcp",
            str(IPv4Address(address[0])) if address else None,
            int(host),
            int(guest),
        )
    except ValueError:
        found = Published("", None, 0, 0)
    if found.protocol not in {"tcp", "udp"} or not (
        1 <= found.host <= PORT_MAX and 1 <= found.guest <= PORT_MAX
    ):
        raise ConfigError(
            f"--publish {text}: give [ADDRESS:]HOST:GUEST[/udp], an IPv4 address and ports "
            f"from 1 to {PORT_MAX}, e.g. 8080:80"
        )
    return found


def check_kind(net: NetOptions | None) -> None:
    """Raise ConfigError for a network that cannot have published ports."""
    if net is None or net.kind != "user":
        raise ConfigError("--publish: needs --net user: give that too")


def check_published(published: Sequence[Published]) -> None:
    """Raise ConfigError for ports that cannot be had: passt would say less of why."""
    seen: set[tuple[str, int]] = set()
    for entry in published:
        if (entry.protocol, entry.host) in seen:
            raise ConfigError(
                f"--publish: {entry.protocol} port {entry.host} of this computer can lead to one "
                "port only: leave one out"
            )
        seen.add((entry.protocol, entry.host))
    for protocol, address, host, guest in published:
        kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as sock:
            if protocol == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address or "", host))
            except OSError as error:
                where = f"{address}:{host}" if address else str(host)
                raise ConfigError(
                    f"--publish {where}:{guest}/{protocol}: {error.strerror} for {protocol} port "
                    f"{host} of this computer; give another"
                ) from None


def random_mac() -> bytes:
    """An address of our own making: locally administered, unicast."""
    return bytes((0x52,)) + os.urandom(5)


def open_backend(
    options: NetOptions,
    mac: bytes,
    published: Sequence[Published],
    warn: Callable[[str], None],
    cleanup: ExitStack,
) -> Sequence[Tap | Frames]:
    """Open what the interface `mac` leads to, until `cleanup`; ConfigError if it cannot be had."""
    if options.kind == "tap":
        taps = []
        for _ in range(options.queues):
            tap = Tap(options.tap, several=options.queues > 1)
            cleanup.callback(tap.close)
            taps.append(tap)
        return taps
    address = IPv4Interface(USER_ADDRESS)
    command = ["--ipv4-only", "--address", str(address.ip), "--netmask", str(address.netmask)]
    command += ["--gateway", USER_GATEWAY, "--dns-forward", USER_NAMESERVER]
    check_published(published)
    for protocol, where, host, guest in published:
        port = f"{where}/{host}:{guest}" if where else f"{host}:{guest}"
        command += [f"--{protocol}-ports", port]
    gateway = IPv4Address(USER_GATEWAY).packed
    passt = Passt(command, warn, mac=mac, gateway=gateway, published=bool(published))
    cleanup.callback(passt.close)
    return [passt.frames]
