"""A root of EROFS: what is decided, mounted and made for it, without a guest."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tinyvmm.command.checks import settle
from tinyvmm.command.options import RunOptions, modules_for
from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError
from tinyvmm.guest.init import Mount, upper_directories
from tinyvmm.images import kernels
from tinyvmm.images.features import FEATURES
from tinyvmm.roots.erofs_root import UPPER_FILE, open_root, open_upper

COMMAND = ("true",)
TOP = str(Path(__file__).parent.parent)


@pytest.fixture
def kernel_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """What the one kernel there is can do."""
    kernel = kernels.InstalledKernel("6.1.0-9-x", str(tmp_path / "vmlinuz"), None, "a test's")
    has = set(FEATURES)
    monkeypatch.setattr(kernels, "default", lambda root="9p": kernel)
    monkeypatch.setattr(kernels, "look_up", lambda name: kernel)
    monkeypatch.setattr(kernels, "able", lambda kernel: {name: name in has for name in FEATURES})
    return has


def test_the_root_is_9p_where_the_kernel_has_it_else_erofs(kernel_has: set[str]) -> None:
    assert settle(RunOptions(COMMAND)).root_mode == "9p"
    kernel_has.discard("9p")
    assert settle(RunOptions(COMMAND)).root_mode == "erofs"
    assert settle(RunOptions(COMMAND, kernel="x")).root_mode == "erofs"
    kernel_has.discard("erofs")
    assert settle(RunOptions(COMMAND)).root_mode == "9p"  # and its absence is what is told


def test_private_writes_go_to_ram_unless_the_root_is_served_or_kept(kernel_has: set[str]) -> None:
    del kernel_has

    def where(**options: object) -> str | None:
        return settle(RunOptions(COMMAND, **options)).private_writes  # type: ignore[arg-type]

    assert where() == "server"
    assert where(root_mode="erofs") == "guest"
    assert where(root_mode="erofs", private_writes="server") == "server"
    assert where(root_mode="erofs", writes=[("/", "/tmp")]) == "server"


def test_modules_are_those_of_the_root_there_is(kernel_has: set[str]) -> None:
    kernel_has.discard("vsock")
    plain = modules_for(settle(RunOptions(COMMAND, root_mode="erofs")))
    assert {"virtio_blk", "erofs", "overlay", "virtio_console"} <= set(plain)
    assert not {"9p", "9pnet_virtio", "ext4"} & set(plain)
    assert plain.index("crc32c_generic?") < plain.index("erofs")  # libcrc32c.ko fails without
    kept = modules_for(settle(RunOptions(COMMAND, root_mode="erofs", writes=[("/", "/tmp")])))
    assert "ext4" in kept
    assert len(kept) == len(set(kept))
    assert "erofs" not in modules_for(settle(RunOptions(COMMAND)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"root_mode": "nfs"}, "'nfs' is no kind of root: give 9p or erofs or auto"),
        ({"writes": [("/data", "/tmp")]}, "--root-mode 9p"),
        ({"writes": [("/", "/tmp"), ("/", "/var")]}, "one --write DIR"),
        ({"cache": "loose"}, "leave out --cache"),
    ],
)
def test_what_does_not_go_with_a_root_of_erofs_is_refused(
    options: dict[str, object], says: str, kernel_has: set[str]
) -> None:
    del kernel_has
    with pytest.raises(ConfigError) as refused:
        settle(RunOptions(COMMAND, **{"root_mode": "erofs", **options}))  # type: ignore[arg-type]
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shared_directories_need_9p(kernel_has: set[str]) -> None:
    from tinyvmm.roots.mounts import Shared

    options = RunOptions(COMMAND, root_mode="erofs", shared=[Shared("/s", "/tmp")])
    assert "9p" in modules_for(settle(options))
    kernel_has.discard("9p")
    with pytest.raises(ConfigError, match=r"--shared needs 9P, which kernel 6\.1\.0-9-x"):
        settle(options)


@pytest.mark.parametrize("writes", ["guest", "server", "kept"])
def test_the_disks_come_behind_the_users_and_the_upper_is_where_it_was_asked_for(
    writes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = tmp_path / "kept"
    kept.mkdir()
    with ExitStack() as cleanup:
        root = open_root(
            [("/", str(tmp_path))],
            [("/", str(kept))] if writes == "kept" else [],
            private_writes="guest" if writes == "guest" else "server",
            number=2,
            warn=pytest.fail,
            cleanup=cleanup,
        )
        lower, scratch, *_ = [item for item in root.mounts() if isinstance(item, Mount)]
        assert (lower.source, lower.fstype) == ("/dev/vdc", "erofs")
        expected = ("tmpfs", "tmpfs") if writes == "guest" else ("/dev/vdd", "ext4")
        assert (scratch.source, scratch.fstype) == expected
        assert upper_directories(root.mounts()) == ["/scratch/upper"]  # which diff looks at
        made = list(tmp_path.rglob(UPPER_FILE))
        assert len(made) == (writes != "guest")
    assert list(tmp_path.rglob(UPPER_FILE)) == ([kept / UPPER_FILE] if writes == "kept" else [])


def test_a_disk_that_keeps_what_is_written_is_a_clean_ext4_and_locked(tmp_path: Path) -> None:
    disk = open_upper(str(tmp_path))
    assert isinstance(disk, RawDisk)
    path = tmp_path / UPPER_FILE
    assert path.stat().st_blocks * 512 < 20 << 20 < 1 << 30 < disk.size
    with pytest.raises(ConfigError, match="in use by another machine"):
        open_upper(str(tmp_path))
    disk.close()
    before = path.stat().st_ino
    open_upper(str(tmp_path)).close()
    assert path.stat().st_ino == before
    checked = subprocess.run(
        ["e2fsck", "-fn", str(path)], capture_output=True, env=_with_sbin(), check=False
    )
    assert checked.returncode == 0, checked.stdout


def _with_sbin() -> dict[str, str]:
    return {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


def test_a_disk_that_cannot_be_made_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; name a directory"):
        open_upper(str(tmp_path / "nowhere"))
    false = tmp_path / "mkfs.ext4"
    false.write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    false.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match="it is broken"):
        open_upper(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mkfs.ext4"]


def test_a_root_in_ram_imports_nothing_that_only_others_need() -> None:
    """Start-up is part of every run."""
    code = "import sys, tinyvmm.roots.erofs_root; print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {TOP!r}); {code}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "tinyvmm.images.erofs.plan" in found
    others = {"subprocess", "tempfile", "shutil", "zipfile", "tinyvmm.disks.qcow2"}
    assert not found & {*others, "tinyvmm.images.packs"}
