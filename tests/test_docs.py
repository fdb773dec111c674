"""The documentation is true: its Python runs, its marked commands print what they are said to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"^<!-- run -->\n+```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^<!-- file (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_of(page: Path) -> str:
    """The page's Python blocks as one program, each at its own line number."""
    text = page.read_text()
    program = ""
    for match in BLOCK.finditer(text):
        if match[1] == "python":
            line = text.count("\n", 0, match.start(2))
            program += "\n" * (line - program.count("\n")) + match[2]
    return program


def commands_of(page: Path) -> list[tuple[str, str]]:
    """(command, expected output) of every block that is marked to be run."""
    found = []
    for block in RUN.findall(page.read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def with_needs(pages: list[Path]) -> list[object]:
    return [
        pytest.param(
            page,
            id=name(page),
            marks=[pytest.mark.kvm] if "<!-- needs kvm -->" in page.read_text() else [],
        )
        for page in pages
    ]


def environment() -> dict[str, str]:
    """The commands of a page mean this Python and this package."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", with_needs([page for page in PAGES if python_of(page)]))
def test_the_python_on_a_page_runs(page: Path) -> None:
    program = python_of(page)
    compile(program, name(page), "exec")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"],
        input=program,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", with_needs([page for page in PAGES if commands_of(page)]))
def test_the_commands_on_a_page_print_what_it_says(page: Path) -> None:
    for command, expected in commands_of(page):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        pattern = ".*".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(pattern, done.stdout, re.DOTALL), f"{command}:\n{done.stdout}"


def shown_files() -> list[tuple[Path, str, str]]:
    """(page, file's name, text shown) of every block that is said to be a file."""
    return [(page, file, text) for page in PAGES for file, text in SHOWN.findall(page.read_text())]


@pytest.mark.parametrize(("page", "file", "text"), shown_files(), ids=lambda item: str(item)[-40:])
def test_a_file_shown_on_a_page_is_the_file(page: Path, file: str, text: str) -> None:
    assert text == (ROOT / file).read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_links_only_to_what_is_there(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


def test_there_is_python_in_the_tour() -> None:
    assert sum(bool(python_of(page)) for page in PAGES) >= 2
