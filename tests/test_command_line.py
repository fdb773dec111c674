"""The command line as a whole: help, options from the environment, completion, the man page."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from tests.waiting import wait_for
from tinyvmm.cli import run as run_module
from tinyvmm.cli.completion import script
from tinyvmm.cli.described import Command, describe, walk
from tinyvmm.cli.environment import variable, with_environment
from tinyvmm.cli.main import all_modules, build_parser, main
from tinyvmm.cli.manual import manual
from tinyvmm.cli.run import open_console
from tinyvmm.errors import ConfigError
from tinyvmm.instances.registry import Instance, State
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

PARSER = build_parser(all_modules())
WHOLE = describe(PARSER)
COMMANDS = [command for command in walk(WHOLE) if command.words]


def name(command: Command) -> str:
    return " ".join(command.words)


# --- help -----------------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_help_shows_an_example_that_parses(command: Command) -> None:
    if command.commands:
        return  # each of them has its own
    lines = [line.strip() for line in command.parser.format_help().splitlines()]
    examples = [line.removeprefix("example: ") for line in lines]
    found = [line for line in examples if line.startswith(f"tinyvmm {name(command)}")]
    assert found, f"tinyvmm {name(command)} --help shows no example"
    for example in found:
        words = re.split(r"  | \| | > | && | \(", example)[0].split()[1:]
        own = words[: words.index("--")] if "--" in words else words
        PARSER.parse_args(own)


@pytest.mark.parametrize("command", [WHOLE, *COMMANDS], ids=name)
def test_everything_says_what_it_is_for(command: Command) -> None:
    for option in (*command.options, *command.positionals):
        if option.dest not in {"argv", "own"}:
            assert option.help, (command.words, option.strings, option.dest)


# --- the environment ------------------------------------------------------------------------
def arguments(text: str, **environ: str) -> list[str]:
    return with_environment(PARSER, text.split(), environ)


def test_an_option_comes_from_the_environment() -> None:
    assert arguments("run ls", TINYVMM_MEMORY="2G") == ["run", "--memory=2G", "ls"]
    assert arguments("kernel list", TINYVMM_JSON="yes") == ["kernel", "list", "--json"]
    assert arguments("ps", TINYVMM_JSON="0", TINYVMM_MEMORY="2G") == ["ps"]
    args = PARSER.parse_args(arguments("run --cpus 3", TINYVMM_MEMORY="2G", TINYVMM_CPUS="2"))
    assert (args.memory, args.cpus) == (2 << 30, 3)


def test_the_command_line_comes_first() -> None:
    environ = {"TINYVMM_MEMORY": "2G", "TINYVMM_READ": "/x '/y z'", "TINYVMM_DETACH": "1"}
    assert arguments("run --memory=1G --read /", **environ)[:2] == ["run", "--detach"]
    assert "--memory=2G" not in arguments("run --memory 1G", **environ)
    assert arguments("run", **environ)[1:] == [
        "--memory=2G",
        "--read=/x",
        "--read=/y z",
        "--detach",
    ]
    assert arguments("run -d", **environ).count("--detach") == 0


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("TINYVMM_MEMORY", "much", "no size"),
        ("TINYVMM_CPUS", "two", "1 or more"),
        ("TINYVMM_CPUS", "0", "1 or more"),
        ("TINYVMM_TRANSPORT", "isa", "pci, mmio"),
        ("TINYVMM_DETACH", "perhaps", "1 or 0"),
        ("TINYVMM_READ", "'/a", "quot"),
    ],
)
def test_a_bad_value_names_its_variable(
    variable: str,
    value: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError, match=says):
        arguments("run", **{variable: value})
    monkeypatch.setenv(variable, value)
    assert main(["run", "--", "true"]) == 125
    told = capsys.readouterr().err
    assert f"{variable}={value}" in told
    assert told.count("\n") == 1


def test_a_value_that_is_no_number_names_its_variable() -> None:
    with pytest.raises(ConfigError, match="TINYVMM_TIME=soon: no such value"):
        arguments("stop web", TINYVMM_TIME="soon")


def test_every_long_option_has_a_variable() -> None:
    for command in COMMANDS:
        for option in command.options:
            if option.long not in {None, "--help", "--version"}:
                made = variable(option)
                assert made is not None
                assert made.replace("_", "").isalnum()


# --- completion -----------------------------------------------------------------------------
@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two machines, one of which has ended, and a `tinyvmm` to ask for them."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    state = State("webby", os.getpid(), ["x"], 1, 1, 1.0, keep=True)
    Instance(state)  # its lock is ours until this process ends
    Instance(state._replace(name="ended-one")).end(0, None)
    command = tmp_path / "bin" / "tinyvmm"
    command.parent.mkdir()
    root = Path(__file__).parent.parent
    command.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m tinyvmm "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bash(line: str) -> set[str]:
    """What a real bash would offer for the last word."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        'eval "$(tinyvmm completion bash)"; '
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _tinyvmm; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.splitlines()) - {""}


@pytest.mark.usefixtures("machines")
def test_bash_completes() -> None:
    assert bash("tinyvmm pau") == {"pause"}
    assert {"run", "exec", "cp", "completion"} <= bash("tinyvmm ")
    assert bash("tinyvmm run --mem") == {"--memory"}
    assert bash("tinyvmm run --transport ") == {"pci", "mmio"}
    assert bash("tinyvmm run --transport = m") == {"mmio"}  # bash splits at =
    assert bash("tinyvmm kernel ") >= {"list", "fetch", "import"}
    assert bash("tinyvmm kernel list --j") == {"--json"}
    assert bash("tinyvmm stop ") == {"webby"}
    assert bash("tinyvmm rm ") == {"webby", "ended-one"}
    assert bash("tinyvmm cp ") >= {"webby:", "a file"}
    assert bash("tinyvmm run --read a") == {"a file"}
    assert "uname" in bash("tinyvmm run -- una")
    assert bash("tinyvmm completion z") == {"zsh"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh: apt install zsh")
def test_zsh_completes(machines: Path) -> None:
    (machines / "_tinyvmm").write_text(script("zsh", WHOLE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: it executes at once
        pid, fd = pty.fork()
    if pid == 0:
        os.execvp("zsh", ["zsh", "-f"])
    seen = b""

    def say(text: str, until: str) -> None:
        nonlocal seen
        seen = b""
        os.write(fd, text.encode())
        end = time.monotonic() + 60
        while until.encode() not in seen:
            assert time.monotonic() < end, seen
            if select.select([fd], [], [], 1)[0]:
                seen += os.read(fd, 1 << 16)

    try:
        say(
            "PS1=; autoload -U compinit; compinit -u -D; source ./_tinyvmm; "
            """show() { print -r -- "[$BUFFER]" }; zle -N show; bindkey '^X' show; """
            "echo rea''dy\n",
            "ready",
        )
        for typed, becomes in [
            ("tinyvmm pau", "tinyvmm pause "),
            ("tinyvmm run --transport mm", "tinyvmm run --transport mmio "),
            ("tinyvmm run --transport=mm", "tinyvmm run --transport=mmio "),
            ("tinyvmm stop we", "tinyvmm stop webby "),
            ("tinyvmm kernel li", "tinyvmm kernel list "),
            ("tinyvmm rm end", "tinyvmm rm ended-one "),
            ("tinyvmm cp we", "tinyvmm cp webby:"),
        ]:
            say(f"\x15{typed}\t\x18", f"[{becomes}]")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(fd)


def test_ps_tells_programs_all(machines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert machines.exists()
    assert main(["ps", "--all", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["ended-one"]["status"] == 0
    assert found["webby"]["resident"] > 1 << 20
    assert {"memory", "cpus", "uptime", "command", "pid", "state"} <= found["webby"].keys()


# --- the manual page ------------------------------------------------------------------------
PAGE = Path(__file__).parent.parent / "docs" / "man" / "tinyvmm.1"


def test_the_manual_page_is_of_this_command_line() -> None:
    assert manual(WHOLE) == PAGE.read_text(), "docs/man/tinyvmm.1 is out of date: make man"


@pytest.mark.skipif(shutil.which("man") is None, reason="no man: apt install man-db")
def test_man_shows_it_without_complaint() -> None:
    done = subprocess.run(
        ["man", "--warnings=w", "--local-file", "--ascii", PAGE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""},
    )
    assert done.stderr == ""
    for words in (
        "TINYVMM RUN",
        "--memory SIZE",
        "tinyvmm exec web -- ps aux",
        "TINYVMM_MEMORY=2G",
    ):
        assert words in done.stdout


def test_a_wheel_installs_the_page_and_every_module(tmp_path: Path) -> None:
    root = PAGE.parent.parent.parent
    for name in ("pyproject.toml", "README.md", "tinyvmm", "docs/man"):
        source, copy = root / name, tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    sources = [path for path in (tmp_path / "tinyvmm").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)) for path in sources} <= set(names)
    assert any(name.endswith(".data/data/share/man/man1/tinyvmm.1") for name in names)


@pytest.mark.parametrize(
    ("option", "value"), [("--cpus", "0"), ("--memory", "lots"), ("--timeout", "soon")]
)
def test_a_value_that_is_none_is_a_mistake_of_usage(option: str, value: str) -> None:
    command = [sys.executable, "-m", "tinyvmm", "run", option, value, "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    usage, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert usage.startswith("usage: tinyvmm run ")
    assert line.startswith(f"tinyvmm run: error: argument {option}: '{value}'")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "words", [["ps"], ["kernel", "list"], ["completion", "bash"], ["serve", "--listen", "unix:S"]]
)
def test_output_that_cannot_be_written_is_one_line(
    words: list[str], buffered: bool, tmp_path: Path
) -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment |= {"PYTHONUNBUFFERED": "" if buffered else "1", "XDG_DATA_HOME": str(tmp_path)}
    words += ["--read", "."] if words[0] == "serve" else []
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tinyvmm", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=60,
            check=False,
        )
    assert done.returncode == 125
    (line,) = done.stderr.splitlines()
    assert re.fullmatch("tinyvmm: cannot .*: No space left on device.*", line)


def test_no_file_is_taken_for_a_stream_that_was_closed(tmp_path: Path) -> None:
    code = """
import os, sys
from tinyvmm.cli.main import main
status = main(["ps"])
seen = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
os.write(9, repr((status, seen)).encode())
"""
    root = Path(__file__).parent.parent
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&- 9>seen', "sh", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(root), "XDG_RUNTIME_DIR": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, env=environment, timeout=60, check=True)
    assert (tmp_path / "seen").read_text() == repr((0, ["/dev/null"] * 3))


@pytest.mark.kvm
def test_a_console_that_nobody_reads_holds_up_neither_the_guest_nor_its_end_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "CONSOLE_PATIENCE", 0.2)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write = open_console(str(tmp_path / "fifo"))
    assert write is not None
    with Machine(memory=1 << 20, cpus=1) as machine:
        machine.add_board(console=write)
        # mov dx, 0x3f8; mov al, 'x'; again: out dx, al; inc word [0x2000]; jmp again
        machine.boot_real_mode(bytes.fromhex("baf803 b078 ee ff060020 ebf9"))
        machine.start()

        def written() -> int:
            return int.from_bytes(machine.memory.read(0x2000, 2), "little")

        room = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        wait_for(lambda: "nobody reads it" in capsys.readouterr().err)
        before = written()
        wait_for(lambda: written() != before)  # it goes on
        said = 0
        while said <= room:  # and so does what it says, once somebody reads
            with suppress(BlockingIOError):
                data = os.read(reader, 1 << 16)
                assert not data.strip(b"x")
                said += len(data)
    assert machine.cause == StopCause.STOPPED
    assert capsys.readouterr().err == ""  # once is enough
    for fd in os.listdir("/proc/self/fd"):  # a process that runs one keeps its console to its end
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "fifo"):
                os.close(int(fd))


def test_a_console_that_cannot_be_written_is_given_up_and_the_guest_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = open_console("/dev/full")
    assert write is not None
    for _ in range(3):
        write(b"booting\n")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "tinyvmm: cannot write the console to /dev/full: No space left on device; the rest is lost"
    )
