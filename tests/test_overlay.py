"""An overlay keeps what was written, the base stays as it is, and no power cut loses a flush."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_qcow2 import read, run, seeded, text, truth
from tinyvmm.disks import files, overlay, qcow2
from tinyvmm.disks.opening import DiskOptions, open_disk
from tinyvmm.disks.overlay import OverlayDisk
from tinyvmm.errors import ConfigError

KIB, MIB = 1 << 10, 1 << 20
SIZE = 5 * 64 * KIB + 1536  # the last cluster is not whole


def make_base(where: Path, kind: str = "raw") -> Path:
    raw = where / "base.raw"
    raw.write_bytes(text(5, SIZE))
    if kind == "raw":
        return raw
    image = where / "base.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", "-c", str(raw), str(image))
    return image


def opened(base: Path, delta: Path | None) -> OverlayDisk:
    kind = "raw" if base.suffix == ".raw" else "qcow2"
    more: dict[str, Any] = {"ephemeral": True} if delta is None else {"overlay": str(delta)}
    disk = open_disk(DiskOptions(str(base), format=kind, **more))
    assert isinstance(disk, OverlayDisk)
    return disk


def put(disk: OverlayDisk, offset: int, data: bytes, cuts: Sequence[int] = ()) -> None:
    marks = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    whole = memoryview(data)
    disk.write_from([whole[a:b] for a, b in zip(marks, marks[1:], strict=False)], offset)  # noqa: RUF007


def check(delta: Path) -> None:
    """Qemu-img finds nothing wrong."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(delta)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


PLACES = st.integers(0, SIZE // 512 - 1).map(lambda n: 512 * n)
LENGTHS = st.integers(1, 200 * KIB // 512).map(lambda n: 512 * n)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), PLACES, LENGTHS),
        st.tuples(st.just("zero"), PLACES, LENGTHS),
        st.tuples(st.just("unmap"), PLACES, LENGTHS),
        st.tuples(st.just("discard"), PLACES, LENGTHS),
        st.tuples(st.sampled_from(["flush", "reopen"]), st.just(0), st.just(0)),
    ),
    max_size=14,
)


@given(
    operations=OPERATIONS,
    kind=st.sampled_from(["raw", "qcow2"]),
    seed=st.integers(0, 99),
    hole=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_it_is_the_disk_that_a_plain_file_would_be(
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[str, int, int]],
    kind: str,
    seed: int,
    hole: bool,
) -> None:
    where = tmp_path_factory.mktemp("model")
    base, delta = make_base(where, kind), where / "delta"
    before = base.read_bytes()
    model = bytearray(text(5, SIZE))
    known = bytearray(b"\1" * SIZE)  # what has been discarded may read as anything
    chosen = seeded(seed)
    patch = pytest.MonkeyPatch()
    if not hole:
        patch.setattr(files, "_fallocate", lambda *_: False)
    disk = opened(base, delta)
    try:
        for name, offset, length in operations:
            end = min(SIZE, offset + length)
            part = slice(offset, end)
            if name == "write":
                data = chosen.randbytes(end - offset)
                put(disk, offset, data, [chosen.randrange(99999) for _ in range(3)])
                model[part] = data
                known[part] = b"\1" * (end - offset)
            elif name in {"zero", "unmap"}:
                disk.write_zeroes(offset, end - offset, name == "unmap")
                model[part] = bytes(end - offset)
                known[part] = b"\1" * (end - offset)
            elif name == "discard":
                disk.discard(offset, end - offset)
                known[part] = bytes(end - offset)
            elif name == "flush":
                disk.flush()
                assert not disk._new
            else:
                disk.close()
                disk = opened(base, delta)
            found = read(disk, 0, SIZE)
            assert all(
                found[at : at + 512] == model[at : at + 512]
                for at in range(0, SIZE, 512)
                if known[at]
            )
        found = read(disk, 0, SIZE)
        disk.close()
        check(delta)
        assert truth(delta) == found
        assert base.read_bytes() == before
    finally:
        disk.close()
        patch.undo()
        shutil.rmtree(where)


def test_qemu_reads_checks_and_commits_it(tmp_path: Path) -> None:
    base, delta = make_base(tmp_path), tmp_path / "delta"
    with contextlib.closing(opened(base, delta)) as disk:
        put(disk, 70000 // 512 * 512, b"w" * 100 * KIB)
    info = run("qemu-img", "info", str(delta))
    assert "file format: qcow2" in info
    assert f"backing file: {base}" in info
    assert "backing file format: raw" in info
    expected = truth(delta)
    run("qemu-img", "commit", "-q", str(delta))
    assert base.read_bytes() == expected


def test_what_qemu_wrote_into_it_is_there_and_can_be_written_on(tmp_path: Path) -> None:
    base, delta = make_base(tmp_path), tmp_path / "delta"
    with contextlib.closing(opened(base, delta)) as disk:
        put(disk, 0, b"a" * 512)
    commands = ["-c", "write -P 7 64k 70k", "-c", "write -z 0 64k", "-c", "discard 192k 64k"]
    run("qemu-io", "-f", "qcow2", *commands, str(delta))
    expected = bytearray(truth(delta))
    with contextlib.closing(opened(base, delta)) as disk:
        assert read(disk, 0, SIZE) == expected
        put(disk, 60 * KIB, b"b" * 20 * KIB)
        put(disk, 200 * KIB, b"c" * 512)
    expected[60 * KIB : 80 * KIB] = b"b" * 20 * KIB
    expected[200 * KIB : 200 * KIB + 512] = b"c" * 512
    assert truth(delta) == expected


def test_what_is_ephemeral_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with contextlib.closing(opened(base, None)) as disk:
        put(disk, 0, b"w" * SIZE)
        disk.flush()
        assert read(disk, 0, SIZE) == b"w" * SIZE
        assert list(scratch.iterdir()) == []
        assert len(list(tmp_path.iterdir())) == 2
    assert base.read_bytes() == text(5, SIZE)


def test_an_overlay_costs_no_more_than_its_tables_until_it_is_written(tmp_path: Path) -> None:
    base, delta = tmp_path / "base.raw", tmp_path / "delta"
    base.touch()
    os.truncate(base, 1 << 40)
    with contextlib.closing(opened(base, delta)) as disk:
        put(disk, (1 << 40) - 512, b"last" * 128)
        disk.discard(0, 2 << 30)
    assert os.stat(delta).st_blocks * 512 < 2 * MIB
    with contextlib.closing(opened(base, delta)) as disk:
        assert read(disk, (1 << 40) - 1024, 1024) == bytes(512) + b"last" * 128
    check(delta)


def test_discarded_space_goes_back_to_the_host(tmp_path: Path) -> None:
    base, delta = make_base(tmp_path), tmp_path / "delta"
    with contextlib.closing(opened(base, delta)) as disk:
        before = os.stat(delta).st_blocks
        put(disk, 0, b"w" * 256 * KIB)
        disk.flush()
        assert os.stat(delta).st_blocks >= before + 512
        disk.discard(0, 256 * KIB)
        assert os.stat(delta).st_blocks <= before + 16
        assert read(disk, 0, 256 * KIB) == bytes(256 * KIB)


def test_what_is_kept_between_flushes_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay, "_NEW_MAX", 3)
    base = tmp_path / "base.raw"
    base.touch()
    os.truncate(base, 64 * MIB)
    with contextlib.closing(opened(base, tmp_path / "delta")) as disk:
        for index in range(20):
            put(disk, index * MIB, b"w" * 512)
            assert len(disk._new) <= 3
        disk.discard(32 * MIB, 16 * MIB)
        assert len(disk._new) <= 3


# --- whose it is ------------------------------------------------------------------------------


def touched(base: Path, delta: Path) -> None:
    os.utime(base, ns=(0, 12345))


def grown(base: Path, delta: Path) -> None:
    os.truncate(base, SIZE + 512)


def qemus(base: Path, delta: Path) -> None:
    delta.unlink()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(delta))


def no_qcow2(base: Path, delta: Path) -> None:
    delta.write_bytes(b"precious")


def with_snapshot(base: Path, delta: Path) -> None:
    run("qemu-img", "snapshot", "-c", "s", str(delta))


def not_closed(base: Path, delta: Path) -> None:
    with delta.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (touched, "was not made for .*base.raw as it is now"),
        (grown, "was not made for"),
        (qemus, "was not made for"),
        (no_qcow2, "no qcow2 image"),
        (with_snapshot, "can be read but not written"),
        (not_closed, "can be read but not written"),
    ],
)
def test_an_overlay_that_does_not_fit_is_refused_and_left_alone(
    tmp_path: Path, change: Callable[[Path, Path], None], why: str
) -> None:
    base, delta = make_base(tmp_path), tmp_path / "delta"
    with contextlib.closing(opened(base, delta)) as disk:
        put(disk, 0, b"w" * 512)
    change(base, delta)
    before = delta.read_bytes(), os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=why) as raised:
        opened(base, delta)
    assert "\n" not in str(raised.value)
    assert delta.read_bytes() == before[0]
    assert len(os.listdir("/proc/self/fd")) == len(before[1])


def test_base_and_overlay_are_locked(tmp_path: Path) -> None:
    base, delta = make_base(tmp_path), tmp_path / "delta"
    with contextlib.closing(opened(base, delta)):
        with pytest.raises(ConfigError, match="in use"):
            opened(base, delta)
        with pytest.raises(ConfigError, match="in use"):
            open_disk(DiskOptions(str(base)))
        opened(base, tmp_path / "other").close()
    open_disk(DiskOptions(str(base))).close()


def test_an_overlay_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot make the overlay .*No such file"):
        opened(base, tmp_path / "none" / "delta")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(ConfigError, match="No space left"):
        opened(base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    with pytest.raises(ConfigError, match="set TMPDIR"):
        opened(base, None)


@pytest.mark.parametrize("options", [{"read_only": True}, {"overlay": "x"}])
def test_options_that_contradict_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give one of"):
        open_disk(DiskOptions(str(make_base(tmp_path)), ephemeral=True, **options))


def test_an_image_is_no_overlay_over_itself(tmp_path: Path) -> None:
    base = str(make_base(tmp_path))
    os.symlink(base, tmp_path / "link")
    with pytest.raises(ConfigError, match="no overlay over itself: name another file"):
        open_disk(DiskOptions(base, overlay=str(tmp_path / "link")))


def test_a_full_file_system_is_an_error_of_the_write_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = make_base(tmp_path), tmp_path / "delta"
    real = files.write_all
    with contextlib.closing(opened(base, delta)) as disk:
        put(disk, 0, b"a" * 512)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "write_all", full)
        with pytest.raises(OSError, match="No space"):
            put(disk, 65536, b"b" * 512)
        with pytest.raises(OSError, match="No space"):
            disk.flush()
        monkeypatch.setattr(files, "write_all", real)
        put(disk, 65536, b"c" * 512)
        disk.flush()
        put(disk, 131072, b"d" * 512)
        monkeypatch.setattr(files, "write_all", full)
        with pytest.raises(ConfigError, match="its last flush stands"):
            disk.close()
    monkeypatch.setattr(files, "write_all", real)
    with contextlib.closing(opened(base, delta)) as disk:
        expected = bytearray(text(5, SIZE))
        expected[:512], expected[65536 : 65536 + 512] = b"a" * 512, b"c" * 512
        assert read(disk, 0, SIZE) == expected


HOSTILE = st.lists(
    st.tuples(
        st.sampled_from(["header", "table"]),
        st.integers(0, 200),
        st.sampled_from(
            [0, 1, 512, 65536, 131072, qcow2.COPIED, qcow2.COPIED | 65536, 1 << 55, (1 << 64) - 1]
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(changes=HOSTILE)
@settings(deadline=None, max_examples=100)
def test_a_damaged_overlay_gives_errors_and_keeps_its_tables(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, int]]
) -> None:
    where = tmp_path_factory.mktemp("hostile")
    base, delta = make_base(where), where / "delta"
    with contextlib.closing(opened(base, delta)) as disk:
        put(disk, 0, b"w" * 200 * KIB)
        l2 = disk._l2_offset
    with delta.open("r+b") as file:
        for kind, number, value in changes:
            place = 8 * (number % 13) if kind == "header" else l2 + 8 * (number % 9)
            os.pwrite(file.fileno(), value.to_bytes(8, "big"), place)
    tables = delta.read_bytes()[:l2]
    try:
        with contextlib.closing(opened(base, delta)) as disk:
            for offset in range(0, SIZE - 512, 32 * KIB):
                with contextlib.suppress(OSError):
                    put(disk, offset, b"x" * 512)
                with contextlib.suppress(OSError):
                    disk.write_zeroes(offset, 512, unmap=False)
                with contextlib.suppress(OSError):
                    read(disk, offset, 512)
            start = disk._counts
            kept = delta.read_bytes()[:l2]
            assert kept[:start] == tables[:start]
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 (some can be opened)
    shutil.rmtree(where)


# --- power cuts -------------------------------------------------------------------------------


class UnsafeFile:
    """What a host's disk has of a file: what was synced, and of later writes any part."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.since: list[tuple[int, bytes]] = []
        self.synced = path.read_bytes()
        write, punch, zero, sync = files.write_all, files.punch_hole, files.zero_range, os.fdatasync

        def write_all(fd: int, views: Sequence[memoryview], offset: int) -> None:
            self.since.append((offset, b"".join(views)))
            write(fd, views, offset)

        def punch_hole(fd: int, offset: int, length: int) -> bool:
            self.since.append((offset, bytes(length)))
            return punch(fd, offset, length)

        def zero_range(fd: int, offset: int, length: int, *, unmap: bool) -> None:
            self.since.append((offset, bytes(length)))
            zero(fd, offset, length, unmap=unmap)

        def fdatasync(fd: int) -> None:
            sync(fd)
            self.synced = self.path.read_bytes()
            self.since.clear()

        patch.setattr(files, "write_all", write_all)
        patch.setattr(files, "punch_hole", punch_hole)
        patch.setattr(files, "zero_range", zero_range)
        patch.setattr(os, "fdatasync", fdatasync)

    def after_a_cut(self, chosen: random.Random) -> bytes:
        """What may be found: each sector of each write since the last sync is there or is not."""
        data = bytearray(self.synced)
        some = chosen.choice([0.1, 0.5, 0.9, 1])
        for offset, written in self.since:
            data += bytes(max(0, offset + len(written) - len(data)))
            at = 0
            while at < len(written):
                piece = min(512 - (offset + at) % 512, len(written) - at)
                if chosen.random() < some:
                    data[offset + at : offset + at + piece] = written[at : at + piece]
                at += piece
        return bytes(data)


@pytest.mark.parametrize("seed", range(30))
def test_after_a_power_cut_each_sector_has_what_was_flushed_or_written_since(
    tmp_path: Path, seed: int
) -> None:
    chosen = seeded(seed)
    base, delta = make_base(tmp_path), tmp_path / "delta"
    opened(base, delta).close()
    sectors = SIZE // 512
    original = text(5, SIZE)
    # What each sector may hold: what it had at the last flush, and all that was written since.
    allowed = [{original[512 * n : 512 * n + 512]} for n in range(sectors)]
    latest = [original[512 * n : 512 * n + 512] for n in range(sectors)]
    with pytest.MonkeyPatch.context() as patch:
        unsafe = UnsafeFile(delta, patch)
        disk = opened(base, delta)
        cut_in_flush = chosen.random() < 0.3
        for _ in range(chosen.randrange(3, 25)):
            first = chosen.randrange(sectors)
            count = min(chosen.randrange(1, 300), sectors - first)
            span = range(first, first + count)
            what = chosen.random()
            if what < 0.6:
                data = chosen.randbytes(512 * count)
                put(disk, 512 * first, data)
            elif what < 0.8:
                data = bytes(512 * count)
                disk.write_zeroes(512 * first, 512 * count, chosen.random() < 0.5)
            else:
                disk.flush()
                for n in range(sectors):
                    allowed[n] = {latest[n]}
                continue
            for n in span:
                latest[n] = data[512 * (n - first) :][:512]
                allowed[n].add(latest[n])
        if cut_in_flush:  # entries are written, and not synced
            with disk._lock:
                os.fdatasync(disk.fd)
                disk._write_entries(dict(disk._new))
        found = unsafe.after_a_cut(chosen)
        disk.close()
    delta.write_bytes(found)
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(delta)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 3}, done.stdout  # 3: leaks, and nothing worse
    with contextlib.closing(opened(base, delta)) as disk:
        data = read(disk, 0, SIZE)
        wrong = [n for n in range(sectors) if data[512 * n : 512 * n + 512] not in allowed[n]]
        assert wrong == []
        put(disk, 0, b"on" * 256)
        assert read(disk, 0, 512) == b"on" * 256


WRITER = """
import os, random, struct, sys
from tinyvmm.disks.opening import DiskOptions, open_disk
path, delta, seed = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
chosen = random.Random(seed)
disk = open_disk(DiskOptions(path, overlay=delta))
sectors = disk.size // 512
version = 0
say = lambda line: os.write(1, line.encode())
while True:
    for _ in range(chosen.randrange(1, 12)):
        version += 1
        first = chosen.randrange(sectors)
        count = min(chosen.randrange(1, 200), sectors - first)
        data = b"".join(struct.pack("<QQ", n, version) * 32 for n in range(first, first + count))
        say(f"write {version} {first} {count}\\n")
        disk.write_from([memoryview(data)], 512 * first)
    disk.flush()
    say(f"flushed {version}\\n")
"""


@contextlib.contextmanager
def writer(base: Path, delta: Path | None, seed: int) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-c", WRITER, str(base), str(delta or ""), str(seed)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        yield process


@pytest.mark.parametrize("kind", ["raw", "overlay"])
@pytest.mark.parametrize("seed", range(6))
def test_a_process_killed_while_writing_has_kept_what_it_flushed(
    tmp_path: Path, kind: str, seed: int
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(4 * MIB))
    delta = tmp_path / "delta" if kind == "overlay" else None
    flushes = seeded(seed).randrange(1, 12)
    lines = []
    with writer(base, delta, seed) as process:
        assert process.stdout is not None
        killer = threading.Timer(seeded(seed).random() * 0.01, process.kill)
        for line in process.stdout:
            lines.append(line.split())
            if line.startswith("flushed"):
                flushes -= 1
                if not flushes:
                    killer.start()
        assert flushes <= 0, f"the writer ended too soon: {process.wait(30)}"
        killer.join()
    assert process.returncode == -9
    kept = None if delta is None else str(delta)
    flushed = max(int(line[1]) for line in lines if line[0] == "flushed")
    sectors = 4 * MIB // 512
    least, most = [0] * sectors, [{0} for _ in range(sectors)]
    for word, *numbers in lines:
        if word == "write":
            version, first, count = map(int, numbers)
            for n in range(first, first + count):
                most[n].add(version)
                if version <= flushed:
                    least[n] = version
    with contextlib.closing(open_disk(DiskOptions(str(base), overlay=kept))) as disk:
        room = bytearray(4 * MIB)
        disk.read_into([memoryview(room)], 0)
    for n in range(sectors):
        sector = bytes(room[512 * n : 512 * n + 512])
        number, version = (int.from_bytes(sector[at : at + 8], "little") for at in (0, 8))
        assert version >= least[n]
        assert version in most[n]
        assert number == (n if version else 0)
        assert sector == sector[:16] * 32
