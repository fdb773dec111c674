"""qcow2 images of QEMU's making read as qemu-img reads them, and bad ones do no harm."""

import contextlib
import itertools
import os
import random
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyvmm.disks import qcow2
from tinyvmm.disks.opening import CHAIN_MAX, DiskOptions, open_disk
from tinyvmm.disks.qcow2 import Qcow2Image
from tinyvmm.errors import ConfigError

KIB, MIB = 1 << 10, 1 << 20


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 (the same each time is what is wanted)


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def truth(image: Path) -> bytes:
    """The disk as qemu-img sees it."""
    raw = image.with_suffix(".truth")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw))
    return raw.read_bytes()


def opened(image: Path) -> "contextlib.closing[Qcow2Image]":
    disk = open_disk(DiskOptions(str(image), read_only=True, format="qcow2"))
    assert isinstance(disk, Qcow2Image)
    return contextlib.closing(disk)


def read(disk: Qcow2Image, offset: int, length: int, cuts: tuple[int, ...] = ()) -> bytes:
    room = bytearray(b"\xa5" * length)
    marks = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    views = [memoryview(room)[a:b] for a, b in itertools.pairwise(marks)]
    disk.read_into(views, offset)
    return bytes(room)


def text(seed: int, length: int) -> bytes:
    """Bytes that can be compressed."""
    chosen = seeded(seed)
    words = [chosen.randbytes(9) for _ in range(50)]
    return b"".join(chosen.choices(words, k=length // 9 + 1))[:length]


def write(image: Path, *commands: str) -> None:
    run("qemu-io", "-f", "qcow2", *(word for c in commands for word in ("-c", c)), str(image))


def a_chain(where: Path, options: str, cluster: int, compat: str) -> Path:
    """A raw base, a compressed image on it, one with zeros and holes on that; each larger."""
    raw, low, top = where / "base.raw", where / "low.qcow2", where / "top.qcow2"
    size = max(3 * MIB, 4 * cluster)
    raw.write_bytes(text(1, size // 3 // 512 * 512))
    full = where / "full.raw"
    full.write_bytes(text(2, size // 2 // 512 * 512))
    run("qemu-img", "convert", "-O", "qcow2", "-c", "-o", options, str(full), str(low))
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", raw.name, str(low))
    more = ["-F", "qcow2", "-b", low.name]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, str(top), str(size))
    chosen = seeded(cluster)
    for _ in range(12):
        at = chosen.randrange(size // 512) * 512
        length = min(size - at, chosen.randrange(1, 3 * cluster // 512 + 2) * 512)
        kinds = [f"-P {chosen.randrange(1, 255)}"] + (["-z"] if compat == "1.1" else [])
        write(top, f"write {chosen.choice(kinds)} {at} {length}")
    return top


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB])
def test_every_byte_is_as_qemu_has_it(tmp_path: Path, compat: str, cluster: int) -> None:
    image = a_chain(tmp_path, f"compat={compat},cluster_size={cluster}", cluster, compat)
    expected = truth(image)
    with opened(image) as disk:
        assert disk.size == len(expected)
        assert read(disk, 0, disk.size) == expected
        chosen = seeded(7)
        for _ in range(60):
            at = chosen.randrange(disk.size // 512) * 512
            length = min(disk.size - at, chosen.randrange(1, 400) * 512)
            cuts = tuple(chosen.randrange(length) for _ in range(chosen.randrange(9)))
            assert read(disk, at, length, cuts) == expected[at : at + length]


def test_tables_beyond_what_is_kept_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qcow2, "TABLES_LEN", 1024)
    image = a_chain(tmp_path, "cluster_size=512", 512, "1.1")
    with opened(image) as disk:
        assert read(disk, 0, disk.size) == truth(image)
        assert len(disk._tables) == 2


def test_a_file_shorter_than_its_last_cluster_reads_as_zeros_there(tmp_path: Path) -> None:
    image = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M")
    write(image, "write -P 1 0 512")
    whole = image.stat().st_size
    os.truncate(image, whole // 65536 * 65536 - 65536 + 512 if whole % 65536 == 0 else whole)
    with opened(image) as disk:
        assert read(disk, 0, MIB) == b"\1" * 512 + bytes(MIB - 512)


# --- what is refused --------------------------------------------------------------------------


def created(*arguments: str) -> Callable[[Path], Path]:
    def make(where: Path) -> Path:
        image = where / "image"
        words = [word.replace("@", str(where)) for word in arguments]
        run("qemu-img", "create", "-q", "-f", "qcow2", *words, str(image), "1M")
        return image

    return make


def changed(form: str, offset: int, value: int) -> Callable[[Path], Path]:
    def make(where: Path) -> Path:
        image = created()(where)
        with image.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, value))
        return image

    return make


def onto_itself(where: Path) -> Path:
    first, second = where / "first", where / "second"
    for image in (first, second):
        run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M")
    for image, base in ((first, second), (second, first)):
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(image))
    return first


def too_many(where: Path) -> Path:
    below = where / "0"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(below), "1M")
    header = below.read_bytes()
    for number in range(1, CHAIN_MAX + 1):
        image = where / str(number)
        shutil.copy(below, image)
        name = str(number - 1).encode()
        extension = struct.pack(">II8sQ", qcow2.BACKING_FORMAT, 5, b"qcow2", 0)
        image.write_bytes(header[:8] + struct.pack(">QI", 1024, len(name)) + header[20:])
        with image.open("r+b") as file:
            file.seek(struct.unpack_from(">I", header, 100)[0])
            file.write(extension)
            file.seek(1024)
            file.write(name)
        below = image
    return below


def without_format(where: Path) -> Path:
    """On an image that looks like qcow2, and does not say that it is."""
    image = created()(where)
    top = where / "top"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(top))
    data = bytearray(top.read_bytes())
    at = data.index(struct.pack(">II", qcow2.BACKING_FORMAT, 5))
    data[at : at + 4] = b"none"
    top.write_bytes(data)
    return top


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (changed(">I", 32, 2), "encrypted; qemu-img convert"),
        (created("-o", "data_file=@/data"), "external data file.*convert"),
        (created("-o", "extended_l2=on"), "extended L2"),
        (created("-o", "compression_type=zstd"), "compression type"),
        (changed(">Q", 72, 2), "corrupt.*check -r"),
        (changed(">Q", 72, 1 << 40), "bit 40"),
        (changed(">I", 4, 1), "version 1"),
        (changed(">I", 4, 4), "version 4"),
        (changed(">I", 20, 8), "clusters of 2\\^8"),
        (changed(">I", 20, 63), "clusters of 2\\^63"),
        (changed(">Q", 24, 1 << 62), "L1 table"),
        (changed(">Q", 24, 0), "0 bytes"),
        (changed(">Q", 24, 1000), "1000 bytes"),
        (changed(">I", 36, 0), "L1 table"),
        (changed(">Q", 40, 1), "L1 table"),
        (changed(">Q", 40, 1 << 63), "L1 table"),
        (changed(">I", 100, 64), "header's length"),
        (changed(">I", 116, 1 << 31), "header extension"),
        (changed(">Q", 8, 1 << 20), "backing file's name"),
        (changed(">Q", 8, 104), "backing file's name"),
        (changed(">I", 0, 0), "no qcow2 image"),
        (created("-u", "-F", "raw", "-b", "none"), "stands on .*/none, which is not there.*rebase"),
        (created("-u", "-F", "vmdk", "-b", "/etc/hostname"), "no format 'vmdk'"),
        (created("-u", "-F", "raw", "-b", "nbd://host/x"), "'nbd://host/x', which is no file"),
        (created("-u", "-F", "raw", "-b", "json:{}"), "which is no file"),
        (onto_itself, "stands on itself"),
        (too_many, "more than 32 images"),
        (without_format, "begins like a qcow2 image: .*rebase -u -F qcow2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_with_the_remedy(
    tmp_path: Path, make: Callable[[Path], Path], why: str
) -> None:
    image = make(tmp_path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=why) as raised:
        open_disk(DiskOptions(str(image), read_only=True, format="qcow2"))
    assert "\n" not in str(raised.value)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_raw_disk_that_looks_like_qcow2_is_not_taken_for_one(tmp_path: Path) -> None:
    image = created()(tmp_path)
    with pytest.raises(ConfigError, match="begins like a qcow2 image: say format=qcow2"):
        open_disk(DiskOptions(str(image)))
    os.truncate(image, 256 * KIB)
    with contextlib.closing(open_disk(DiskOptions(str(image), format="raw"))) as disk:
        assert disk.size == 256 * KIB


@pytest.mark.parametrize("kind", ["vmdk", "vhdx", "vpc", "vdi", "qed"])
def test_an_image_of_another_format_is_not_taken_for_a_raw_disk(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, image, "8M"], check=True)
    with pytest.raises(ConfigError, match=r"begins like a [A-Z]+ image: qemu-img convert -O raw "):
        open_disk(DiskOptions(str(image)))


def test_writing_into_a_qcow2_image_is_refused_with_the_ways_there_are(tmp_path: Path) -> None:
    image = created()(tmp_path)
    with pytest.raises(ConfigError, match="add overlay=FILE, ephemeral or ro"):
        open_disk(DiskOptions(str(image), format="qcow2"))


# --- hostile images ---------------------------------------------------------------------------

SPECIAL = st.sampled_from(
    [0, 1, 511, 512, 65536, 1 << 30, 1 << 62, 1 << 63, (1 << 63) | 65536, (1 << 64) - 1, 1 << 55]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small image with data, zeros and compressed clusters, of clusters of 512 bytes."""
    where = tmp_path_factory.mktemp("small")
    raw, image = where / "raw", where / "image"
    raw.write_bytes(text(3, 64 * KIB))
    options = "cluster_size=512"
    run("qemu-img", "convert", "-O", "qcow2", "-c", "-o", options, str(raw), str(image))
    write(image, "write -P 5 0 8k", "write -z 8k 4k")
    return image.read_bytes()


@given(
    changes=st.lists(
        st.one_of(
            st.tuples(st.just("byte"), st.integers(0, 1 << 16), st.integers(0, 255)),
            st.tuples(st.just("header"), st.integers(0, 13), SPECIAL),
            st.tuples(st.just("entry"), st.integers(0, 1 << 13), SPECIAL),
            st.tuples(st.just("table"), st.integers(0, 300), SPECIAL),
        ),
        min_size=1,
        max_size=6,
    ),
    cut=st.one_of(st.none(), st.integers(0, 1 << 16)),
)
@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_image_gives_errors_and_never_anything_else(
    small: bytes, tmp_path: Path, changes: list[tuple[str, int, int]], cut: int | None
) -> None:
    data = bytearray(small)
    (l1,) = struct.unpack_from(">Q", data, 40)
    for kind, where, value in changes:
        if kind == "byte":
            data[where % len(data)] = value
        elif kind == "header":
            struct.pack_into(">Q", data, 8 * where, value)
        elif kind == "entry":
            struct.pack_into(">Q", data, 8 * where % (len(data) - 8), value)
        else:
            (table,) = struct.unpack_from(">Q", data, l1)
            table = (table & qcow2.OFFSET_MASK) + 8 * where
            if table + 8 <= len(data):
                struct.pack_into(">Q", data, table, value)
    image = tmp_path / "image"
    image.write_bytes(data[:cut])
    before = os.listdir("/proc/self/fd")
    try:
        with opened(image) as disk:
            for at in range(0, min(disk.size, 64 * KIB), 4 * KIB):
                with contextlib.suppress(OSError):
                    read(disk, at, min(4 * KIB, disk.size - at))
            with contextlib.suppress(OSError):
                read(disk, disk.size - 512, 512)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most images can be opened)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_table_and_a_cluster_that_would_fill_memory_do_not(tmp_path: Path) -> None:
    """The greatest disk, the greatest clusters, and a compressed cluster that goes on for ever."""
    import zlib

    image = tmp_path / "image"
    cluster = 2 * MIB
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(image), "1E")
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compress.compress(bytes(64 * MIB)) + compress.flush()
    with image.open("r+b") as file:
        (l1,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        end = 16 * MIB
        os.pwrite(file.fileno(), struct.pack(">Q", end), l1)
        sectors = len(bomb) // 512 + 1
        entry = qcow2.COMPRESSED | sectors << (62 - 13) | (end + cluster)
        os.pwrite(file.fileno(), struct.pack(">Q", entry) * (cluster // 8), end)
        os.pwrite(file.fileno(), bomb, end + cluster)
    tracemalloc.start()
    with opened(image) as disk:
        for at in range(4):
            assert read(disk, at * cluster, 512) == bytes(512)
        read(disk, disk.size - 512, 512)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * MIB
