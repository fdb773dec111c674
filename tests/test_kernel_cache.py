"""The cache of unpacked kernels: quick when it can be, right whatever happened to its files."""

import gzip
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm.boot import load, load_kernel
from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files import kernel_cache, kernel_payload
from tinyvmm.kernel_files.kernel_cache import KernelCache
from tinyvmm.kernel_files.kernel_payload import unpack
from tinyvmm.memory import GuestMemory

MIB = 1 << 20
GPA = 16 * MIB


def make_bzimage(code: bytes) -> bytes:
    """A gzip'd vmlinux of one segment in a bzImage of the fewest fields that pass for one."""
    ehdr = struct.pack("<16sHHIQQQ", b"\x7fELF\2\1\1", 2, 62, 1, GPA, 64, 0)
    ehdr += struct.pack("<IHHHHHH", 0, 64, 56, 1, 0, 0, 0)
    phdr = struct.pack("<IIQQQQQQ", 1, 5, 120, GPA, GPA, len(code), 2 * MIB, 4096)
    payload = gzip.compress(ehdr + phdr + code, mtime=0)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, len(payload) // 16 + 1)
    struct.pack_into("<HH4sH", setup, 0x1FE, 0xAA55, 0x6AEB, b"HdrS", 0x20F)
    struct.pack_into("<H", setup, 0x236, 1)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<II", setup, 0x248, 0, len(payload))
    return (bytes(setup) + payload).ljust(8192, b"\0")


def loaded(path: Path, cache: Path, length: int) -> bytes:
    """What stands in RAM after loading the kernel at `path`."""
    memory = GuestMemory(32 * MIB)
    with load_kernel(str(path), str(cache)) as kernel:
        assert load(memory, kernel).rip == GPA
    data = memory.read(GPA, length)
    memory.close()
    return data


CODE = b"".join(bytes([n]) * 5000 + bytes(200_000) for n in range(1, 4)) + b"end"


@pytest.fixture
def kernel_path(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_bzimage(CODE))
    return path


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names what was unpacked or hashed, in order, while all works as ever."""
    seen: list[str] = []
    digest_of = kernel_cache.digest_of

    def spy_unpack(payload: bytes) -> bytes:
        seen.append("unpack")
        return unpack(payload)

    def spy_digest(payload: bytes, setup_header: bytes, version: str) -> str:
        seen.append("hash")
        return digest_of(payload, setup_header, version)

    monkeypatch.setattr(kernel_payload, "unpack", spy_unpack)
    monkeypatch.setattr(kernel_cache, "digest_of", spy_digest)
    return seen


def test_the_second_start_neither_hashes_nor_unpacks(
    kernel_path: Path, tmp_path: Path, unpackings: list[str]
) -> None:
    assert loaded(kernel_path, tmp_path / "cache", len(CODE)) == CODE
    assert unpackings == ["hash", "unpack"]
    assert loaded(kernel_path, tmp_path / "cache", len(CODE)) == CODE
    assert unpackings == ["hash", "unpack"]


def test_a_copy_of_a_known_kernel_is_recognised_by_its_contents(
    kernel_path: Path, tmp_path: Path, unpackings: list[str]
) -> None:
    loaded(kernel_path, tmp_path / "cache", 1)
    copy = tmp_path / "copy"
    copy.write_bytes(kernel_path.read_bytes())
    assert loaded(copy, tmp_path / "cache", len(CODE)) == CODE
    assert unpackings == ["hash", "unpack", "hash"]


def test_another_kernel_under_the_same_name_size_and_time_is_noticed(
    kernel_path: Path, tmp_path: Path
) -> None:
    loaded(kernel_path, tmp_path / "cache", 1)
    before = kernel_path.stat()
    other = CODE.replace(b"end", b"END")
    image = make_bzimage(other)
    kernel_path.write_bytes(image)
    assert kernel_path.stat().st_size == before.st_size
    os.utime(kernel_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert loaded(kernel_path, tmp_path / "cache", len(CODE)) == other


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_cut_or_damaged_header_or_memo_is_as_good_as_absent(
    kernel_path: Path, tmp_path: Path, data: st.DataObject
) -> None:
    cache = tmp_path / "cache"
    loaded(kernel_path, cache, 1)
    victim = data.draw(st.sampled_from(sorted((cache / "kernels").iterdir())))
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        place = data.draw(st.integers(0, min(len(content), 4096) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    victim.write_bytes(content)
    assert loaded(kernel_path, cache, len(CODE)) == CODE


def test_zeros_are_not_kept(kernel_path: Path, tmp_path: Path) -> None:
    loaded(kernel_path, tmp_path / "cache", 1)
    (entry,) = (tmp_path / "cache").glob("kernels/*.kernel")
    assert entry.stat().st_size < 50_000 < len(CODE)


def test_a_cache_that_cannot_be_made_is_done_without(kernel_path: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert loaded(kernel_path, blocked / "cache", len(CODE)) == CODE


def test_a_full_disk_leaves_no_draft_behind(
    kernel_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert loaded(kernel_path, tmp_path / "cache", len(CODE)) == CODE
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_only_the_newest_entries_stay(tmp_path: Path) -> None:
    for number in range(kernel_cache.ENTRIES_KEPT + 3):
        path = tmp_path / f"vmlinuz-{number}"
        path.write_bytes(make_bzimage(b"%d" % number))
        loaded(path, tmp_path / "cache", 1)
    entries = list((tmp_path / "cache").glob("kernels/*.kernel"))
    assert len(entries) == kernel_cache.ENTRIES_KEPT
    assert loaded(path, tmp_path / "cache", 1) == b"6"


def test_a_kernel_that_shrinks_while_it_is_loaded_is_a_config_error(
    kernel_path: Path, tmp_path: Path
) -> None:
    memory = GuestMemory(32 * MIB)
    with load_kernel(str(kernel_path), str(tmp_path / "cache")) as kernel:
        (entry,) = (tmp_path / "cache").glob("kernels/*.kernel")
        os.truncate(entry, 5000)
        with pytest.raises(ConfigError, match="cut short"):
            load(memory, kernel)
    memory.close()


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert kernel_cache.default_dir() == "/x/tinyvmm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative paths are to be ignored")
    monkeypatch.setenv("HOME", "/home/someone")
    assert kernel_cache.default_dir() == "/home/someone/.cache/tinyvmm"


def test_recalling_an_unknown_file_is_none(kernel_path: Path, tmp_path: Path) -> None:
    assert KernelCache(str(tmp_path)).recall(str(kernel_path), kernel_path.stat()) is None
