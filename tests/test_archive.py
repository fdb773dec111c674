"""The cached half of an initramfs: made once, remade when damaged or outdated, never half-read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.guest.archive import module_archive


def make_modules(directory: Path) -> str:
    (directory / "kernel").mkdir(parents=True)
    (directory / "kernel" / "a.ko").write_bytes(b"A" * 100)
    (directory / "kernel" / "b-c.ko").write_bytes(b"B" * 101)
    (directory / "modules.dep").write_text("kernel/a.ko: kernel/b-c.ko\nkernel/b-c.ko:\n")
    return str(directory)


def test_a_cached_archive_is_the_one_that_was_made(tmp_path: Path) -> None:
    modules, cache = make_modules(tmp_path / "m"), str(tmp_path / "cache")
    made = module_archive(modules, ["a"], cache)
    assert list(made.paths) == ["/modules/b_c.ko", "/modules/a.ko"]
    (tmp_path / "m" / "kernel" / "a.ko").unlink()  # not read again
    cached = module_archive(modules, ["a"], cache)
    assert list(cached.paths) == list(made.paths)
    assert bytes(cached.archive) == bytes(made.archive)
    assert bytes(made.archive).count(b"B" * 101) == 1


def test_a_damaged_or_outdated_cache_is_made_anew(tmp_path: Path) -> None:
    modules, cache = make_modules(tmp_path / "m"), tmp_path / "cache"
    made = module_archive(modules, ["a"], str(cache))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], whole + b"x", b"\0" * len(whole)):
        file.write_bytes(damaged)
        again = module_archive(modules, ["a"], str(cache))
        assert bytes(again.archive) == bytes(made.archive)
        assert file.read_bytes() == whole
    (tmp_path / "m" / "kernel" / "a.ko").write_bytes(b"new")
    os.utime(tmp_path / "m" / "modules.dep", ns=(1, 1))
    assert b"new" in bytes(module_archive(modules, ["a"], str(cache)).archive)


def test_processes_that_make_it_at_once_each_have_it_whole(tmp_path: Path) -> None:
    modules, cache = make_modules(tmp_path / "m"), str(tmp_path / "cache")
    script = (
        "import sys; from tinyvmm.guest.archive import module_archive\n"
        "print(len(module_archive(sys.argv[1], ['a'], sys.argv[2]).archive))"
    )
    command = [sys.executable, "-c", script, modules, cache]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    lengths = {process.communicate()[0] for process in running}
    assert lengths == {b"%d\n" % len(module_archive(modules, ["a"], cache).archive)}
    assert len(os.listdir(cache)) == 1


def test_archives_of_kernels_long_gone_do_not_pile_up(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for number in range(40):
        module_archive(make_modules(tmp_path / str(number)), ["a"], str(cache))
    assert len(list(cache.iterdir())) == 32


def test_without_a_cache_it_still_works(tmp_path: Path) -> None:
    modules = make_modules(tmp_path / "m")
    (tmp_path / "file").write_bytes(b"")
    assert module_archive(modules, ["a"], str(tmp_path / "file")).paths
    assert list(tmp_path.glob("file*")) == [tmp_path / "file"]


def test_a_kernel_without_a_module_says_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'9p'"):
        module_archive(make_modules(tmp_path / "m"), ["9p"], str(tmp_path / "cache"))
