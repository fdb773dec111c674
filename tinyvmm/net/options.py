"""`--net KIND[,OPTION]...`: what was asked for, and the backend that does it."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.net.passt import Frames, Passt
from tinyvmm.net.tap import Tap

USER_ADDRESS = "10.0.2.15/24"  # as QEMU's user networking has it, whom everybody knows
USER_GATEWAY = "10.0.2.2"  # this computer's loopback
USER_NAMESERVER = "10.0.2.3"  # asks this computer's
MTU_MIN, MTU_MAX = 68, 65535
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


def parse_net(text: str) -> NetOptions:
    """Parse `user[,mac=M][,mtu=N]` or `tap[=NAME][,address=A/P][,gateway=G][,dns=D]...`."""
    head, *pairs = text.split(",")
    kind, equals, name = head.partition("=")
    if kind not in {"user", "tap"} or (equals and (kind == "user" or not name)):
        raise ConfigError(f"--net {text}: give user, tap or tap=NAME")
    options = NetOptions(kind, tap=name or TAP_NAME)
    if kind == "user":
        options = options._replace(
            address=USER_ADDRESS, gateway=USER_GATEWAY, nameservers=(USER_NAMESERVER,)
        )
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            options = _with(options, key, value)
        except ValueError:
            raise ConfigError(f"--net {text}: {key}={value} cannot be") from None
    return options


def _with(options: NetOptions, key: str, value: str) -> NetOptions:
    """Add one option; ValueError if there is none such."""
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
    if options.kind == "tap" and key == "address":
        return options._replace(address=str(IPv4Interface(value)))
    if options.kind == "tap" and key == "gateway":
        return options._replace(gateway=str(IPv4Address(value)))
    if options.kind == "tap" and key == "dns":
        return options._replace(nameservers=(*options.nameservers, str(IPv4Address(value))))
    raise ValueError(key)


def random_mac() -> bytes:
    """An address of our own making: locally administered, unicast."""
    return bytes((0x52,)) + os.urandom(5)


def open_backend(
    options: NetOptions,
    warn: Callable[[str], None],
    cleanup: ExitStack,
) -> Tap | Frames:
    """Open what the interface leads to, until `cleanup`; ConfigError if it cannot be had."""
    if options.kind == "tap":
        tap = Tap(options.tap)
        cleanup.callback(tap.close)
        return tap
    address = IPv4Interface(USER_ADDRESS)
    command = ["--ipv4-only", "--address", str(address.ip), "--netmask", str(address.netmask)]
    command += ["--gateway", USER_GATEWAY, "--dns-forward", USER_NAMESERVER]
    passt = Passt(command, warn)
    cleanup.callback(passt.close)
    return passt.frames
