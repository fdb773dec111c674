"""zstd, by whichever of Python and program is here, against what the program makes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvmm.errors import ConfigError
from tinyvmm.kernel_files import zstd

DATA = os.urandom(1 << 16) + bytes(3 << 20)


def packed(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


def test_what_the_program_packs_is_unpacked() -> None:
    with zstd.Reader(io.BytesIO(packed(DATA))) as reader:
        assert reader.read(5) == DATA[:5]
        assert reader.read() == DATA[5:]
        assert reader.read(1) == b""


def test_a_reader_may_be_closed_before_its_end() -> None:
    with zstd.Reader(io.BytesIO(packed(os.urandom(4 << 20)))) as reader:
        assert len(reader.read(10)) == 10


@pytest.mark.parametrize("data", [packed(DATA)[:-100], b"no zstd at all", packed(b"x")[:5]])
def test_damage_is_a_value_error(data: bytes) -> None:
    with zstd.Reader(io.BytesIO(data)) as reader, pytest.raises((ValueError, EOFError)):
        reader.read()


class Failing(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


def test_what_its_source_says_is_what_its_reader_hears() -> None:
    with zstd.Reader(Failing()) as reader, pytest.raises(OSError, match="Input/output"):
        reader.read(100)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python needs no program")
def test_where_nothing_can_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="install the package zstd"):
        zstd.Reader(io.BytesIO())
