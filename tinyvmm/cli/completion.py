"""`tinyvmm completion bash|zsh`: the shell's completion, made from the parser.

What is printed is a function of the shell's with the words of every command in it, in three tables:
which command is being given, which option waits for its value, and what else the command takes.
Only names of machines are asked for when they are wanted (`tinyvmm ps --quiet`).
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from tinyvmm.cli.described import Command, Option, describe, walk

_EPILOG = """\
examples:
  source <(tinyvmm completion bash)
  tinyvmm completion bash > ~/.local/share/bash-completion/completions/tinyvmm
  tinyvmm completion zsh > ~/.zfunc/_tinyvmm
"""


class _Shell(NamedTuple):
    """How a shell says it; {} is replaced."""

    script: str
    words: str
    files: str
    machines: str
    copies: str


_BASH = _Shell(
    """\
# bash completion for tinyvmm, made by: tinyvmm completion bash
_tinyvmm() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command= i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${{COMP_WORDS[i]}} == -- ]]; then
            mapfile -t COMPREPLY < <(compgen -c -f -- "$word")
            return
        fi
        case "$command:${{COMP_WORDS[i]}}" in
{commands}
        esac
    done
    if [[ $word == = ]]; then
        word=
    elif [[ $previous == = ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    case "$command:$previous" in
{values}
    esac
    case "$command:$word" in
{options}
    esac
    case "$command" in
{rest}
    esac
}}
complete -o filenames -F _tinyvmm tinyvmm
""",
    """mapfile -t COMPREPLY < <(compgen -W '{}' -- "$word"); return""",
    """mapfile -t COMPREPLY < <(compgen -f -- "$word"); return""",
    """mapfile -t COMPREPLY < <(compgen -W "$(tinyvmm ps {} 2>/dev/null)" -- "$word"); return""",
    """mapfile -t COMPREPLY < <(compgen -f -- "$word"
            compgen -S : -W "$(tinyvmm ps -q 2>/dev/null)" -- "$word"); return""",
)
_ZSH = _Shell(
    """\
#compdef tinyvmm
# zsh completion for tinyvmm, made by: tinyvmm completion zsh
_tinyvmm() {{
    local previous=$words[CURRENT-1] command= i
    for ((i = 2; i < CURRENT; i++)); do
        if [[ $words[i] == -- ]]; then
            shift $i words
            ((CURRENT -= i))
            _normal
            return
        fi
        case "$command:$words[i]" in
{commands}
        esac
    done
    if [[ $PREFIX == --*=* ]]; then
        previous=${{PREFIX%%=*}}
        compset -P '*='
    fi
    case "$command:$previous" in
{values}
    esac
    case "$command:$PREFIX" in
{options}
    esac
    case "$command" in
{rest}
    esac
}}
if [[ $funcstack[1] == _tinyvmm ]]; then
    _tinyvmm "$@"
else
    compdef _tinyvmm tinyvmm
fi
""",
    "compadd -- {}; return",
    "_files; return",
    """compadd -- ${{(f)"$(tinyvmm ps {} 2>/dev/null)"}}; return""",
    """compadd -S : -- ${(f)"$(tinyvmm ps -q 2>/dev/null)"}; _files; return""",
)
_SHELLS = {"bash": _BASH, "zsh": _ZSH}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "completion",
        help="print a shell's completion of this command line",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main)
    parser.add_argument("shell", metavar="SHELL", choices=tuple(_SHELLS), help="bash or zsh")


def main(args: argparse.Namespace) -> int:
    """Print it."""
    from tinyvmm.cli.main import all_modules, build_parser

    print(script(args.shell, describe(build_parser(all_modules()))), end="")
    return 0


def script(shell: str, command: Command) -> str:
    """Return the completion of a whole command line for `bash` or `zsh`."""
    speech = _SHELLS[shell]
    everything = list(walk(command))
    return speech.script.format(
        commands="\n".join(_known(everything)),
        values="\n".join(_values(speech, everything)),
        options="\n".join(_options(speech, everything)),
        rest="\n".join(_rest(speech, everything)),
    )


def _known(commands: list[Command]) -> Iterator[str]:
    """Give which word leads from which command to which."""
    for command in commands:
        if command.words:
            before, name = " ".join(command.words[:-1]), " ".join(command.words)
            yield f'            "{before}:{command.words[-1]}") command="{name}" ;;'


def _values(speech: _Shell, commands: list[Command]) -> Iterator[str]:
    """Give what an option that waits for its value is offered."""
    for command in commands:
        for option in command.options:
            if option.takes_value:
                name = " ".join(command.words)
                patterns = "|".join(f'"{name}:{text}"' for text in option.strings)
                yield f"        {patterns}) {_offer(speech, option)} ;;"


def _options(speech: _Shell, commands: list[Command]) -> Iterator[str]:
    for command in commands:
        words = " ".join(text for option in command.options for text in option.strings)
        yield f'        "{" ".join(command.words)}:"-*) {speech.words.format(words)} ;;'


def _rest(speech: _Shell, commands: list[Command]) -> Iterator[str]:
    for command in commands:
        if command.commands:
            offer = speech.words.format(" ".join(one.words[-1] for one in command.commands))
        elif command.positionals:
            offer = _offer(speech, command.positionals[0], command)
        else:
            continue
        yield f'        "{" ".join(command.words)}") {offer} ;;'


def _offer(speech: _Shell, option: Option, command: Command | None = None) -> str:
    if option.choices:
        return speech.words.format(" ".join(option.choices))
    if command is not None and command.words == ("cp",):
        return speech.copies
    if command is not None and option.dest in {"name", "names"}:
        ended = command.words[-1] in {"logs", "wait", "rm", "inspect"}
        return speech.machines.format("-aq" if ended else "-q")
    return speech.files
