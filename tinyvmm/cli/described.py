"""The command line as data, taken from the parser: for environment, completion and man page."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple


class Option(NamedTuple):
    """One option, or a positional argument if it has no `strings`."""

    strings: tuple[str, ...]
    dest: str
    metavar: str
    help: str
    takes_value: bool
    repeatable: bool
    choices: tuple[str, ...]
    action: argparse.Action

    @property
    def long(self) -> str | None:
        """Its long form."""
        return next((text for text in self.strings if text.startswith("--")), None)


class Command(NamedTuple):
    """A command: `words` are what stands behind `tinyvmm`."""

    words: tuple[str, ...]
    help: str
    parser: argparse.ArgumentParser
    options: tuple[Option, ...]
    positionals: tuple[Option, ...]
    commands: "tuple[Command, ...]"
    """Commands of its own, as `kernel` has."""


def describe(parser: argparse.ArgumentParser) -> Command:
    """Describe the whole command line; the first word is left out."""
    return _describe(parser, (), "")


def walk(command: Command) -> Iterator[Command]:
    """Give a command and all below it."""
    yield command
    for below in command.commands:
        yield from walk(below)


def _describe(parser: argparse.ArgumentParser, words: tuple[str, ...], says: str) -> Command:
    options, positionals, below = [], [], []
    for action in parser._actions:  # noqa: SLF001 (argparse shows them nowhere else)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            for name, sub in action.choices.items():
                below.append(_describe(sub, (*words, name), helps.get(name, "")))
        elif action.option_strings and action.help == argparse.SUPPRESS:
            continue  # ours alone
        elif action.option_strings:
            options.append(_option(action))
        else:
            positionals.append(_option(action))
    return Command(words, says, parser, tuple(options), tuple(positionals), tuple(below))


def _option(action: argparse.Action) -> Option:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return Option(
        strings=tuple(action.option_strings),
        dest=action.dest,
        metavar=metavar,
        help="" if action.help in {None, argparse.SUPPRESS} else str(action.help),
        takes_value=action.nargs != 0,
        repeatable=isinstance(action, argparse._AppendAction),  # noqa: SLF001
        choices=tuple(map(str, action.choices or ())),
        action=action,
    )
