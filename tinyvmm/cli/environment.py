"""Options from the environment: TINYVMM_MEMORY=2G is --memory 2G of every command that has it.

Each long option of a command has a variable: TINYVMM_ and its name, in capitals, with _ for -. The
command line comes first: an option given there wins, and of one that can be given several times the
variable is passed over as a whole. Such a variable holds several values in a shell's syntax
(shlex), and that of an option without a value 1 or 0 (yes, no, true, false, on, off); an empty one
counts for nothing.
"""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence

from tinyvmm.cli.described import Option, describe
from tinyvmm.errors import ConfigError

PREFIX = "TINYVMM_"
_YES, _NO = {"1", "yes", "true", "on"}, {"0", "no", "false", "off"}


def variable(option: Option) -> str | None:
    """Return the name of an option's variable, None if it has none."""
    if option.long is None or option.dest in {"help", "version"}:
        return None
    return PREFIX + option.long.removeprefix("--").replace("-", "_").upper()


def with_environment(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """Return our arguments, with those of the environment in front of what follows the command.

    ConfigError, which names the variable, for a value that the option does not take.
    """
    command, rest = describe(parser), list(argv)
    while rest and (below := [one for one in command.commands if one.words[-1] == rest[0]]):
        command = below[0]
        rest.pop(0)
    found: list[str] = []
    for option in command.options if command.words else ():
        name = variable(option)
        text = environ.get(name) if name else None
        if name and text and not any(word.partition("=")[0] in option.strings for word in rest):
            found += _arguments(option, name, text)
    return [*command.words, *found, *rest]


def _arguments(option: Option, name: str, text: str) -> list[str]:
    if not option.takes_value:
        if text.lower() not in _YES | _NO:
            raise ConfigError(f"{name}={text}: give 1 or 0")
        return [option.long or ""] if text.lower() in _YES else []
    values = [text]
    if option.repeatable:
        try:
            values = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"{name}={text}: {error}; quote it as for a shell") from None
    for value in values:
        _check(option, name, value)
    return [f"{option.long}={value}" for value in values]


def _check(option: Option, name: str, value: str) -> None:
    convert = option.action.type
    if callable(convert):
        try:
            convert(value)
        except (argparse.ArgumentTypeError, ValueError) as error:
            what = error if isinstance(error, argparse.ArgumentTypeError) else "no such value"
            raise ConfigError(f"{name}={value}: {what}") from None
    if option.choices and value not in option.choices:
        raise ConfigError(f"{name}={value}: give one of {', '.join(option.choices)}")
