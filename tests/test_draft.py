"""What is written whole or not at all, and what is never replaced."""

import os
import stat
from pathlib import Path

import pytest

from tinyvmm.cli.main import main
from tinyvmm.errors import ConfigError
from tinyvmm.images.draft import drafted


def write(path: Path, text: str) -> None:
    with drafted(str(path)) as draft:
        Path(draft).write_text(text)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with drafted(str(path)) as draft:
        Path(draft).write_text("half")
        assert not path.exists()
    write(path, "whole")
    assert path.read_text() == "whole"
    with pytest.raises(TypeError), drafted(str(path)) as draft:
        Path(draft).write_text(b"no text")  # type: ignore[arg-type]  # when it is open
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    for text in ("new", "newer"):
        write(link, text)
        assert (tmp_path / "there/file").read_text() == text
    assert os.readlink(link) == "there/file"


def test_only_a_regular_file_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    fifo, link, directory = tmp_path / "fifo", tmp_path / "link", tmp_path / "directory"
    os.mkfifo(fifo)
    directory.mkdir()
    link.symlink_to("fifo")
    for path in (fifo, link, directory):
        with pytest.raises(ConfigError, match="no regular file"):
            write(path, "lost")
        assert main(["image", "build", str(tmp_path / "source"), "-o", str(path)]) == 125
        assert capsys.readouterr().err.count("\n") == 1
    assert stat.S_ISFIFO(os.stat(link).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["directory", "fifo", "link", "source"]
