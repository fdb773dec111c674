"""The manual page, made from the parser: `python -m tinyvmm.cli.manual > docs/man/tinyvmm.1`.

In the man macros (man(7)). What a reader wants first is written here, and the rest is what each
command's --help says; a test holds docs/man/tinyvmm.1 to it.
"""

import sys

from tinyvmm import __version__
from tinyvmm.cli.described import Command, Option, describe, walk

_FIRST = """\
.SH NAME
tinyvmm \\- run commands in real virtual machines
.SH SYNOPSIS
.B tinyvmm
.I COMMAND
.RI [ OPTION ]...
.RI [ ARGUMENT ]...
.RB [ \\-\\-
.IR CMD " [" ARG ]...]
.SH DESCRIPTION
.B tinyvmm run
runs a command in a virtual machine as easily as in a container: a stock kernel boots, this
computer's directories are its root, over 9P, what it writes is private, and output and exit status
come back. A machine can have a name, and then more commands are run in it, and it is watched and
stopped by that.
.PP
What follows
.B \\-\\-
belongs to the guest.
"""
_LAST = """\
.SH ENVIRONMENT
Each long option of a command can come from a variable: TINYVMM_ and its name in capitals, with _
for \\-; so TINYVMM_MEMORY=2G is
.BR "\\-\\-memory 2G" .
The command line comes first. An option that can be given several times takes several values, as a
shell separates them, and one without a value 1 or 0.
.TP
.B XDG_RUNTIME_DIR
Machines with names have their state, sockets and logs in its directory tinyvmm; without it in
/tmp/tinyvmm\\-UID.
.TP
.B XDG_CACHE_HOME
Kernels that were fetched or imported, and what is made of them, are in its directory tinyvmm
(default ~/.cache).
.SH EXIT STATUS
That of the command; 128+N if signal N killed it; 124 after a time limit; 125 if tinyvmm could not
do what was asked; 126 and 127 if the command could not be executed or found; 255 if the guest
crashed; 2 for usage.
.SH SEE ALSO
.BR podman (1),
.BR qemu\\-system\\-x86_64 (1)
"""


def manual(command: Command) -> str:
    """Return the page for a whole command line."""
    below = [one for one in walk(command) if one.words and not one.commands]
    parts = [f'.TH TINYVMM 1 "" "tinyvmm {__version__}" "User Commands"\n', _FIRST]
    parts.append(".SH COMMANDS\n")
    parts += [f".TP\n.B {_plain(' '.join(one.words))}\n{_plain(one.help)}\n" for one in below]
    parts += map(_section, below)
    return "".join([*parts, _LAST])


def _section(command: Command) -> str:
    name = " ".join(command.words)
    lines = [f'.SH "TINYVMM {name.upper()}"']
    lines.append(_plain(command.help[:1].upper() + command.help[1:] + "."))
    for option in (*command.positionals, *command.options):
        if option.dest != "help" and option.help:
            lines += [".TP", _heading(option), _plain(option.help)]
    if command.parser.epilog:
        lines += [".PP", ".nf", *map(_plain, command.parser.epilog.rstrip().splitlines()), ".fi"]
    return "\n".join(lines) + "\n"


def _heading(option: Option) -> str:
    if not option.strings:
        return f".I {_plain(option.metavar)}"
    texts = ", ".join(option.strings)
    value = ""
    if option.takes_value:
        value = " " + ("|".join(option.choices) if option.choices else option.metavar)
    return f".B {_plain(texts + value)}"


def _plain(text: str) -> str:
    """Return text that roff shows as it is."""
    escaped = text.replace("%%", "%").replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


def main() -> None:
    """Print it."""
    from tinyvmm.cli.main import all_modules, build_parser

    sys.stdout.write(manual(describe(build_parser(all_modules()))))


if __name__ == "__main__":
    main()
