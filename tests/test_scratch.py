"""The directory for writes nobody keeps: private, gone afterwards, even after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.scratch import ScratchDirectory, kept_writes, remove_kept


def test_it_is_private_and_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    scratch = ScratchDirectory(str(tmp_path))
    assert os.stat(os.path.dirname(scratch.path)).st_mode & 0o777 == 0o700
    (Path(scratch.path) / "a").mkdir()
    (Path(scratch.path) / "a" / "file").write_bytes(b"x")
    scratch.close()
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_and_a_live_one_is_not(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, time; from tinyvmm.scratch import ScratchDirectory\n"
        "s = ScratchDirectory(sys.argv[1]); open(s.path + '/file', 'w').close()\n"
        "print(s.path, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    theirs = child.stdout.readline().strip()
    ours = ScratchDirectory(str(tmp_path))
    assert os.path.exists(theirs)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    another = ScratchDirectory(str(tmp_path))
    assert not os.path.exists(theirs)
    assert os.path.exists(ours.path)
    ours.close()
    another.close()
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_it_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot make a directory .* set TMPDIR"):
        ScratchDirectory(str(tmp_path / "missing"))


def test_it_goes_however_deep_a_guest_has_dug(tmp_path: Path) -> None:
    scratch = ScratchDirectory(str(tmp_path))
    limit = len(os.listdir("/proc/self/fd"))
    fd = os.open(scratch.path, os.O_PATH)
    for depth in range(3000):
        os.mkdir("d", dir_fd=fd)
        if not depth % 100:  # names that are in the way of whoever flattens it
            os.mkdir(f".removed-{depth}", dir_fd=fd)
            os.symlink("/", "link", dir_fd=fd)
            os.close(os.open(f".removed-{depth + 1}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open("d", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    scratch.close()
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) < limit


def test_what_somebody_else_put_in_the_place_of_what_is_kept_is_not_ours(tmp_path: Path) -> None:
    link = tmp_path / "link"
    scratch = ScratchDirectory(str(tmp_path), kept_by=str(link))
    scratch.close()
    assert kept_writes(str(link)) == scratch.path
    base = os.path.dirname(scratch.path)
    try:
        os.chown(base, 65534, -1)
    except PermissionError:
        pytest.skip("only root can give a directory away")
    assert kept_writes(str(link)) is None
    remove_kept(str(link))
    assert os.path.isdir(scratch.path)
