"""What users give as text or leave out, alike at the command line and in Python."""

import os
from collections.abc import Iterable

from tinyvmm.errors import ConfigError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED_ON = ("HOME", "TERM", "LANG")
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Return `512M`, `2G`, `1048576` in bytes: units of 1024, whole MiB, 32M or more, as RAM has.

    ConfigError for anything else.
    """
    digits, unit = text.rstrip("KMGTkmgtiBb"), text.lstrip("0123456789").upper()
    unit = unit.removesuffix("IB") if unit.endswith("IB") else unit.removesuffix("B")
    if not digits.isascii() or not digits.isdigit() or unit not in _UNITS:
        raise ConfigError(f"{text!r} is no size: give e.g. 512M or 2G")
    size = int(digits) << _UNITS[unit]
    if size < 32 << 20 or size % (1 << 20):
        raise ConfigError(f"{text!r}: give whole MiB, 32M or more")
    return size


def environment(given: Iterable[str], *, home: bool = True) -> list[str]:
    """Return a command's environment: PATH, HOME, TERM, LANG as here, then what is `given`.

    `NAME=VALUE` each. Without `home` HOME is left for the user's in the guest.
    """
    variables = {"PATH": os.environ.get("PATH") or DEFAULT_PATH}
    passed_on = [name for name in _PASSED_ON if home or name != "HOME"]
    variables |= {name: os.environ[name] for name in passed_on if name in os.environ}
    variables |= dict(entry.split("=", 1) for entry in given)
    return [f"{name}={value}" for name, value in variables.items()]
