"""What a run's options make of directories: how each is served, and the steps that mount it."""

import argparse
import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm.cli.run import parse_shared
from tinyvmm.command.checks import check_options
from tinyvmm.command.options import RunOptions
from tinyvmm.errors import ConfigError
from tinyvmm.guest.init import InitConfig, Mkdir, Mount, build_init
from tinyvmm.roots.mounts import (
    CACHES,
    Shared,
    arrange,
    open_shared,
    root_mounts,
    shared_mounts,
)

MS_RDONLY = 1  # <linux/mount.h>


@pytest.fixture
def host(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("x")
    return str(tmp_path)


# --- the command line ------------------------------------------------------------------------
def test_a_shared_directory_appears_at_its_own_path_unless_told_otherwise(host: str) -> None:
    assert parse_shared(host) == Shared(host, host)
    assert parse_shared(f"/data={host}") == Shared("/data", host)
    assert parse_shared("/data=.") == Shared("/data", os.getcwd())
    assert parse_shared(".").guest == os.getcwd()


def test_options_follow_a_shared_directory_in_any_order(host: str) -> None:
    assert parse_shared(f"/d={host},ro") == Shared("/d", host, readonly=True)
    assert parse_shared(f"{host},cache=none,ro") == Shared(host, host, readonly=True, cache="none")
    assert parse_shared(f"{host},ro,cache=mmap") == parse_shared(f"{host},cache=mmap,ro")


@given(st.from_regex(r"/[a-z,]*[a-z]{4}", fullmatch=True))
def test_other_commas_belong_to_the_name(name: str) -> None:
    assert parse_shared(f"/g={name},ro") == Shared("/g", os.path.normpath(name), readonly=True)


@pytest.mark.parametrize("text", ["", "/guest=", ",ro", "/guest=,ro"])
def test_a_shared_directory_needs_a_host(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="names no host directory"):
        parse_shared(text)


# --- what cannot be --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (Shared("/data", "/nowhere"), "/nowhere: there is no such directory"),
        (Shared("/data", "/etc/passwd"), "/etc/passwd: not a directory"),
        (Shared("data", "/etc"), "'data'.*starts with a slash"),
        (Shared("/", "/etc"), "private.*--write"),
        (Shared("/x/..", "/etc"), "private.*--write"),
        (Shared("/x", "/etc", cache="lose"), "'lose'.*loose or mmap or none"),
    ],
)
def test_what_cannot_be_shared_is_one_line_with_the_remedy(shared: Shared, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_options(RunOptions(("true",), shared=[shared]))
    assert "\n" not in str(caught.value)


def test_each_place_in_the_guest_takes_one_shared_directory(host: str) -> None:
    with pytest.raises(ConfigError, match="two shared directories at /data"):
        arrange([Shared("/data", host), Shared("/x/../data/", host)])


def test_policies_there_are_none_of_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'lose' is no cache policy.*loose"):
        check_options(RunOptions(("true",), cache="lose"))
    with pytest.raises(ConfigError, match=r"'moon' is no place.*server or guest"):
        check_options(RunOptions(("true",), private_writes="moon"))


def test_writes_are_kept_or_thrown_away_not_both(host: str) -> None:
    options = RunOptions(("true",), writes=[("/", host)], private_writes="guest")
    with pytest.raises(ConfigError, match="--write keeps it: leave one out"):
        check_options(options)


# --- how it is mounted -----------------------------------------------------------------------
def cache_of(mount: Mount) -> str:
    found = re.search(r"\bcache=(\w+)", mount.data)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("readonly", "cache", "expected"),
    [
        (False, None, "mmap"),
        (True, None, "loose"),
        *[(readonly, cache, cache) for readonly in (False, True) for cache in CACHES],
    ],
)
def test_the_cache_follows_from_who_may_write_unless_it_is_chosen(
    host: str, readonly: bool, cache: str | None, expected: str
) -> None:
    *_, mount = shared_mounts([Shared("/a/b", host, readonly=readonly, cache=cache)])
    assert isinstance(mount, Mount)
    assert (mount.target, cache_of(mount), mount.flags & MS_RDONLY) == ("/a/b", expected, readonly)


def test_mount_points_are_made_from_the_top(host: str) -> None:
    mounts = shared_mounts([Shared("/a/b/c", host)])
    assert mounts[:-1] == [Mkdir("/a"), Mkdir("/a/b")]


def test_what_is_mounted_inside_another_comes_after_it(host: str) -> None:
    order = arrange([Shared("/a/b", host), Shared("/a", host), Shared("/z", host)])
    assert [item.guest for item in order] == ["/a", "/z", "/a/b"]


@pytest.mark.parametrize("private_writes", ["server", "guest"])
def test_the_root_is_ours_alone_so_that_everything_is_cached(private_writes: str) -> None:
    mounts = root_mounts(None, private_writes)
    (ninep,) = [item for item in mounts if isinstance(item, Mount) and item.fstype == "9p"]
    assert cache_of(ninep) == "loose"
    assert bool(ninep.flags & MS_RDONLY) is (private_writes == "guest")
    assert build_init(InitConfig(("/bin/true",), ("true",), root=mounts))


# --- how it is served ------------------------------------------------------------------------
def test_a_read_only_directory_refuses_writes_whatever_the_guest_mounts(host: str) -> None:
    tree = open_shared(Shared("/data", host, readonly=True))
    root = tree.root()
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EROFS))):
        root.mkdir(b"new", 0o755, 0, 0)
    assert os.listdir(host) == ["file"]
    root.close()
    tree.close()


def test_a_shared_directory_is_the_hosts_own(host: str) -> None:
    tree = open_shared(Shared("/data", host))
    root = tree.root()
    root.mkdir(b"new", 0o755, 0, 0).close()
    assert sorted(os.listdir(host)) == ["file", "new"]
    root.close()
    tree.close()
