"""Images from files into the store: names, configurations, what is kept and what goes."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.oci import Layer, directory, entry, image, layer, tar_of, trees
from tests.test_oci_unpack import names, put, seen, union
from tinyvmm.cli import instance
from tinyvmm.cli.main import main
from tinyvmm.cli.table import size
from tinyvmm.command.options import RunOptions
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.written import list_changes
from tinyvmm.images.layer import write_layer
from tinyvmm.images.oci import store as store_module
from tinyvmm.images.oci import tree_writer
from tinyvmm.images.oci.config import ImageConfig, combine, parse_config, parse_entrypoint
from tinyvmm.images.oci.prepare import find_or_pull, prepare
from tinyvmm.images.oci.pull import pull
from tinyvmm.images.oci.reference import Elsewhere, Reference, parse
from tinyvmm.images.oci.spec import Descriptor, choose
from tinyvmm.images.oci.store import Store, store_dir
from tinyvmm.kernel_files import zstd
from tinyvmm.lab import probe

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return Store()


def hello(path: Path, text: bytes = b"hello", **options: object) -> str:
    """An image of one small file."""
    return image(path, layer(entry("hello", text)), **options)  # type: ignore[arg-type]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("docker://debian:12", "docker.io/library/debian:12"),
        ("user/app", "docker.io/user/app:latest"),
        ("index.docker.io/user/app", "docker.io/user/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/a/b_c:v-1.0", "localhost:5000/a/b_c:v-1.0"),
        ("ghcr.io/a/b@" + DIGEST, "ghcr.io/a/b@" + DIGEST),
        ("ghcr.io/a/b:tag@" + DIGEST, "ghcr.io/a/b:tag@" + DIGEST),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
    ],
)
def test_names_mean_what_podman_and_docker_mean_by_them(text: str, meant: str) -> None:
    found = parse(text)
    assert isinstance(found, Reference)
    assert str(found) == meant


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "UPPER",
            "a:b:c",
            "a@sha256:12",
            "a@md5:" + "0" * 32,
            "a//b",
            "../a",
            "a:" + "t" * 129,
        ),
        *("https://a/b", "oci:", "containers-storage:", "-a", "a/..", "x" * 256, "a b", "a\nb"),
    ],
)
def test_what_is_no_name_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse(text)
    assert "\n" not in str(told.value)


def test_files_are_named_with_skopeos_transports(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert parse(f"oci:{tmp_path}/x:v1") == Elsewhere("oci", f"{tmp_path}/x", "v1")
    assert parse(f"oci:{tmp_path}/a:b") == Elsewhere("oci", f"{tmp_path}/a:b", "")
    assert parse("docker-archive:/x.tar:a/b:c") == Elsewhere("docker-archive", "/x.tar", "a/b:c")
    assert parse("containers-storage:localhost/a:b").path == "localhost/a:b"  # type: ignore[union-attr]


# --- platforms and configurations -----------------------------------------------------------------


def of_platform(**platform: str) -> Descriptor:
    return Descriptor(DIGEST, 1, "", platform, {"is": " ".join(platform.values())})


def test_the_platform_is_ours_and_the_oldest_variant_of_it() -> None:
    arm = of_platform(os="linux", architecture="arm64", variant="v8")
    v3 = of_platform(os="linux", architecture="amd64", variant="v3")
    plain = of_platform(os="linux", architecture="amd64")
    attestation = of_platform(os="unknown", architecture="unknown")
    assert choose([arm, attestation, v3, plain]) is plain
    assert choose([arm, v3]) is v3
    with pytest.raises(ConfigError, match=r"only for linux/arm64/v8$"):
        choose([arm, attestation])


def config(**values: object) -> ImageConfig:
    return parse_config(json.dumps({"config": values}).encode())


@pytest.mark.parametrize(
    ("argv", "entrypoint", "run"),
    [
        # As podman: podman-run(1) on --entrypoint, Dockerfile(5) on CMD and ENTRYPOINT.
        ([], None, ["entry", "-e", "cmd"]),
        (["x"], None, ["entry", "-e", "x"]),
        ([], ["mine"], ["mine"]),
        (["x"], ["mine", "-m"], ["mine", "-m", "x"]),
        ([], [], ["cmd"]),
        (["x"], [], ["x"]),
    ],
)
def test_entrypoint_and_command_combine_as_with_podman(
    argv: list[str], entrypoint: list[str] | None, run: list[str]
) -> None:
    given = config(Entrypoint=["entry", "-e"], Cmd=["cmd"])
    assert combine(given, argv, entrypoint=entrypoint).argv == run


def test_the_command_line_counts_more_than_the_image() -> None:
    given = config(Cmd=["c"], Env=["A=1", "B=2", "=bad"], WorkingDir="/w", User="u:g")
    found = combine(given, [])
    assert (found.workdir, found.user) == ("/w", "u:g")
    assert found.env == [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "A=1",
        "B=2",
    ]
    found = combine(given, [], env=["B=3", "PATH=/p"], workdir="/x", user="7")
    assert (found.workdir, found.user) == ("/x", "7")
    assert found.env == ["PATH=/p", "A=1", "B=3"]
    with pytest.raises(ConfigError, match="says no command"):
        combine(config(), [])


def test_an_entrypoint_is_a_word_a_list_or_nothing() -> None:
    assert parse_entrypoint("a b") == ["a b"]
    assert parse_entrypoint('["a", "b"]') == ["a", "b"]
    assert parse_entrypoint("[ is a program") == ["[ is a program"]
    assert parse_entrypoint("") == []


@pytest.mark.parametrize(
    "document",
    [
        *(b"", b"[]", b"\xff", b'{"config": {"Cmd": [1]}}', b"[" * 100_000),
        b'{"architecture": "arm64", "os": "linux"}',
        b'{"rootfs": {"diff_ids": ["../../x"]}}',
    ],
)
def test_a_configuration_that_is_none_is_refused(document: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_config(document)


# --- from files -----------------------------------------------------------------------------------


def test_an_image_of_a_layout_is_in_the_store_under_its_name(tmp_path: Path, store: Store) -> None:
    found = pull(hello(tmp_path / "lay"), store)
    assert found.names == ["localhost/lay:v1"]
    assert [(tree / "hello").read_bytes() for tree in trees(store, found)] == [b"hello"]
    for name in ("lay:v1", "localhost/lay:v1", found.id, found.id[7:19]):
        assert store.find(name) == found
    assert store.find("lay") is None
    assert os.stat(store.path).st_mode & 0o777 == 0o700
    assert store_dir() == str(tmp_path / "data/tinyvmm/images")


def test_a_layout_of_several_images_wants_one_named(tmp_path: Path, store: Store) -> None:
    lay = tmp_path / "lay"
    hello(lay, b"one", tag="one")
    hello(lay, b"two", tag="two")
    with pytest.raises(ConfigError, match="name one of one, two"):
        pull(f"oci:{lay}", store)
    with pytest.raises(ConfigError, match="no image three; it has one, two"):
        pull(f"oci:{lay}:three", store)
    [tree] = trees(store, pull(f"oci:{lay}:two", store))
    assert (tree / "hello").read_bytes() == b"two"


def test_what_skopeo_and_umoci_write_is_read(tmp_path: Path, store: Store) -> None:
    """Foreign writers: docker's archive, OCI's, and a layout with a layer of umoci's on top."""
    origin = hello(tmp_path / "lay", config={"Cmd": ["/hello"]})
    names = {
        f"docker-archive:{tmp_path}/d.tar": ":some/name:1",
        f"oci-archive:{tmp_path}/o.tar": ":tag",
        f"oci:{tmp_path}/copy": ":tag",
    }
    for name, tag in names.items():
        subprocess.run(["skopeo", "copy", "-q", origin, name + tag], check=True)
        [tree] = trees(store, pull(name, store))
        assert (tree / "hello").read_bytes() == b"hello", name
    assert len(store.images()) == 1
    assert "docker.io/some/name:1" in store.images()[0].names

    with (tmp_path / "d.tar").open("rb") as file:
        compressed = subprocess.run(["gzip", "-c"], stdin=file, check=True, capture_output=True)
    (tmp_path / "d.tar.gz").write_bytes(compressed.stdout)
    assert pull(f"docker-archive:{tmp_path}/d.tar.gz", store).id == store.images()[0].id

    bundle = tmp_path / "bundle"
    umoci = ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/copy:tag", str(bundle)]
    subprocess.run(umoci, check=True, capture_output=True)
    (bundle / "rootfs/hello").unlink()
    (bundle / "rootfs/new").write_bytes(b"new")
    umoci = ["umoci", "repack", "--image", f"{tmp_path}/copy:next", str(bundle)]
    subprocess.run(umoci, check=True, capture_output=True)
    found = pull(f"oci:{tmp_path}/copy:next", store)
    low, high = trees(store, found)
    assert (low / "hello").exists()
    assert (high / "new").read_bytes() == b"new"
    assert (high / "hello").is_char_device()  # a whiteout


def test_a_layer_that_commit_made_is_one_to_umoci_and_to_us(tmp_path: Path, store: Store) -> None:
    lay, wrote, made = tmp_path / "lay", tmp_path / "wrote", tmp_path / "layer.tar"
    image(lay, layer(entry("kept", b"old"), entry("gone"), entry("d/below"), entry("e/below")))
    [below] = trees(store, pull(f"oci:{lay}:v1", store))
    wrote.mkdir()
    put(
        wrote,
        *(entry("kept", b"new"), entry(".wh.gone"), entry("d/.wh..wh..opq"), entry("d/own")),
        entry("e/own"),
    )
    write_layer(list_changes([("/", str(below))], [("/", str(wrote))]), str(made), print)
    subprocess.run(["umoci", "raw", "add-layer", "--image", f"{lay}:v1", str(made)], check=True)
    bundle = tmp_path / "bundle"
    unpacking = ["umoci", "unpack", "--rootless", "--image", f"{lay}:v1", str(bundle)]
    subprocess.run(unpacking, check=True, capture_output=True)
    root = bundle / "rootfs"
    expected = {"kept", "d", "d/own", "e", "e/below", "e/own"}
    assert {str(path.relative_to(root)) for path in root.rglob("*")} == expected
    assert (root / "kept").read_bytes() == b"new"
    with union(*trees(store, pull(f"oci:{lay}:v1", store))) as tree:
        assert set(names(tree)) == {b"kept", b"d", b"e"}
        assert set(names(tree, "d")) == {b"own"}
        assert set(names(tree, "e")) == {b"own", b"below"}
        assert seen(tree, "kept").st_size == 3


def test_podmans_storage_is_read_through_skopeo(tmp_path: Path, store: Store) -> None:
    """With a graph root of its own, and the driver that works everywhere."""
    where = f"[vfs@{tmp_path}/graph+{tmp_path}/run]"
    origin = hello(tmp_path / "lay")
    copied = subprocess.run(
        ["skopeo", "copy", "-q", origin, f"containers-storage:{where}localhost/kept:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    if copied.returncode:
        pytest.skip(f"no storage of podman's can be made here: {copied.stderr[-200:]}")
    found = pull(f"containers-storage:{where}localhost/kept:1", store)
    assert found.names == ["localhost/kept:1"]
    assert (trees(store, found)[0] / "hello").read_bytes() == b"hello"
    with pytest.raises(ConfigError, match=r"absent: no such image there; see: podman images"):
        pull(f"containers-storage:{where}localhost/absent", store)


@pytest.fixture
def graph_and_run() -> Iterator[tuple[str, str]]:
    """Directories for a storage of podman's, with paths of the 50 characters that it takes."""
    with tempfile.TemporaryDirectory() as path:
        yield f"{path}/graph", f"{path}/run"
        mounted = ["umount", "--quiet", f"{path}/graph/overlay"]  # over itself, by podman
        subprocess.run(mounted, check=False, capture_output=True)


CONTAINERFILE = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox mkdir /d && echo old > /d/old && echo hi > /gone"]
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox rm -r /gone /d; /bin/busybox mkdir /d && \
echo new > /d/new; /bin/busybox touch /his; /bin/busybox chown 5:70000 /his"]
USER 1000
CMD ["/bin/busybox", "id"]
"""


@pytest.mark.parametrize("driver", ["vfs", "overlay"])
def test_what_podman_builds_saves_and_has_in_its_storage_is_one_image(
    tmp_path: Path, graph_and_run: tuple[str, str], store: Store, driver: str
) -> None:
    """Nothing of podman's own is touched: it has a storage here for the while."""
    context = tmp_path / "context"
    context.mkdir()
    shutil.copy(str(shutil.which("busybox")), context)
    (context / "Containerfile").write_text(CONTAINERFILE)
    graph, run = graph_and_run
    podman = ["podman", f"--root={graph}", f"--runroot={run}", f"--storage-driver={driver}"]
    build = ["build", "--quiet", "--isolation=chroot", "--layers", "--tag=built:1", str(context)]
    built = subprocess.run([*podman, *build], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"podman cannot build here: {built.stderr[-200:]}")
    sources = [f"containers-storage:[{driver}@{graph}+{run}]localhost/built:1"]
    for kind in ("docker-archive", "oci-archive"):
        save = ["save", "--quiet", f"--format={kind}", f"--output={tmp_path / kind}", "built:1"]
        subprocess.run([*podman, *save], check=True, capture_output=True)
        sources.append(f"{kind}:{tmp_path / kind}")
    found = [pull(source, store) for source in sources]
    assert {(each.id, *each.names) for each in found} == {
        (f"sha256:{built.stdout.strip()}", "localhost/built:1")
    }
    with union(*trees(store, found[0])) as tree:
        assert b"gone" not in names(tree)
        assert set(names(tree, "d")) == {b"new"}
        his = seen(tree, "his")
        assert (his.st_uid, his.st_gid) == (5, 70_000)
    assert parse_config(store.config(found[0])).user == "1000"


@pytest.mark.parametrize("with_module", [True, False])
def test_layers_compressed_with_zstd_need_the_module_or_the_program(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, with_module: bool
) -> None:
    tar = tar_of(entry("hello", b"hello" * 100_000))
    done = subprocess.run(["zstd", "-qc"], input=tar, capture_output=True, check=True)
    diff_id = f"sha256:{hashlib.sha256(tar).hexdigest()}"
    name = image(tmp_path / "lay", Layer(done.stdout, diff_id))
    if not with_module:
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
        monkeypatch.setattr(zstd, "_module", lambda: None)
        with pytest.raises(ConfigError, match=r"compressed with zstd.*install the package zstd"):
            pull(name, store)
        return
    [tree] = trees(store, pull(name, store))
    assert (tree / "hello").read_bytes() == b"hello" * 100_000
    broken = image(tmp_path / "broken", Layer(done.stdout[:-20], diff_id))
    with pytest.raises(ConfigError):
        pull(broken, Store(str(tmp_path / "other")))


@pytest.mark.parametrize("what", ["flip", "cut", "config", "manifest", "diff_id", "missing"])
def test_what_is_corrupted_is_refused_and_nothing_of_it_kept(
    tmp_path: Path, store: Store, what: str
) -> None:
    written = layer(entry("hello", os.urandom(5000)))
    if what == "diff_id":
        written = written._replace(diff_id=DIGEST)
    name = image(tmp_path / "lay", written)
    with_layer = tmp_path / "lay/blobs/sha256" / written.digest[7:]
    manifest = json.loads((tmp_path / "lay/index.json").read_bytes())["manifests"][0]["digest"]
    manifest_path = tmp_path / "lay/blobs/sha256" / manifest[7:]
    config_digest = json.loads(manifest_path.read_bytes())["config"]["digest"]
    path = {
        "config": tmp_path / "lay/blobs/sha256" / config_digest[7:],
        "manifest": manifest_path,
    }.get(what, with_layer)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0 if what == "diff_id" else 1
    path.write_bytes(data[:-100] if what == "cut" else data)
    if what == "missing":
        path.unlink()
    with pytest.raises(ConfigError, match="No such file" if what == "missing" else "corrupted"):
        pull(name, store)
    assert store.images() == []
    assert os.listdir(f"{store.path}/layers") == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, r"free some \(tinyvmm prune\), or set"), (errno.EROFS, "set XDG_DATA_HOME to")],
)
def test_what_cannot_be_stored_says_what_helps_and_leaves_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tree_writer.TreeWriter, "file", fails)
    why = f"^image store {store.path}: {os.strerror(number)}; {remedy}"
    with pytest.raises(ConfigError, match=why):
        pull(hello(tmp_path / "lay"), store)
    assert store.images() == []
    assert os.listdir(f"{store.path}/layers") == []


def test_a_layer_that_claims_terabytes_is_refused_before_it_is_asked_for(
    tmp_path: Path, store: Store
) -> None:
    lay = tmp_path / "lay"
    hello(lay)
    index = json.loads((lay / "index.json").read_bytes())
    blobs = lay / "blobs" / "sha256"
    entry_of_index = index["manifests"][0]
    manifest = json.loads((blobs / entry_of_index["digest"].partition(":")[2]).read_bytes())
    manifest["layers"][0]["size"] = 5 << 40
    (blobs / manifest["layers"][0]["digest"].partition(":")[2]).unlink()
    data = json.dumps(manifest).encode()
    entry_of_index["digest"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
    (blobs / entry_of_index["digest"].partition(":")[2]).write_bytes(data)
    (lay / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"said to have 5497558138880 bytes: more than 64 GiB"):
        pull(f"oci:{lay}:v1", store)


def test_a_layer_that_two_images_have_is_there_once(tmp_path: Path, store: Store) -> None:
    base = layer(entry("base"))
    one = pull(image(tmp_path / "one", base, layer(entry("1"))), store)
    two = pull(image(tmp_path / "two", base, layer(entry("2"))), store)
    assert one.layers[0] == two.layers[0]
    assert len(os.listdir(f"{store.path}/layers")) == 3
    assert main(["rmi", "one:v1"]) == 0
    assert len(os.listdir(f"{store.path}/layers")) == 2
    assert [tree.name for tree in trees(store, two)] == ["diff", "diff"]


def test_a_name_that_moves_on_leaves_the_old_image_for_prune(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    old = pull(hello(tmp_path / "lay", b"old"), store)
    new = pull(hello(tmp_path / "lay", b"new"), store)
    assert {found.id: found.names for found in store.images()} == {
        old.id: [],
        new.id: ["localhost/lay:v1"],
    }
    assert main(["images"]) == 0
    assert "<none>" in capsys.readouterr().out
    assert main(["prune"]) == 0
    assert "freed" in capsys.readouterr().out
    assert [found.id for found in store.images()] == [new.id]
    assert len(os.listdir(f"{store.path}/layers")) == 1
    assert len(os.listdir(f"{store.path}/blobs")) == 2


def test_what_is_being_run_is_neither_removed_nor_pruned(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    name = hello(tmp_path / "lay", config={"Cmd": ["/hello"]})
    with ExitStack() as cleanup:
        ready = prepare(name, [], cleanup)
        assert main(["rmi", "lay:v1"]) == 125
        assert "is being run" in capsys.readouterr().err
        assert main(["prune", "--all"]) == 0
        # Its name may go to another all the same, and the layers stay as long as it runs.
        pull(hello(tmp_path / "lay", b"new"), store)
        assert main(["prune"]) == 0
        assert Path(ready.reads[0][1], "hello").read_bytes() == b"hello"
    assert main(["prune"]) == 0
    assert not Path(ready.reads[0][1]).exists()
    assert main(["prune", "--all"]) == 0
    assert store.images() == []
    assert os.listdir(f"{store.path}/layers") == []


def test_what_a_killed_pull_left_behind_goes_with_prune(tmp_path: Path, store: Store) -> None:
    pull(hello(tmp_path / "lay"), store)
    with store.draft() as draft:
        shutil.copytree(draft, f"{store.path}/layers/.draft-dead")
    Path(f"{store.path}/partial/sha256-{'0' * 64}").write_bytes(bytes(1000))
    assert main(["prune"]) == 0
    assert len(os.listdir(f"{store.path}/layers")) == 1
    assert os.listdir(f"{store.path}/partial") == []


def test_a_layer_is_made_by_one_at_a_time_and_no_lock_is_left(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_POLL", 0.001)
    diff_id = "sha256:" + "1" * 64
    makers: list[int] = []
    most = 0

    def make(number: int) -> None:
        nonlocal most
        for _ in range(20):
            with store.making(diff_id, threading.Event()):
                makers.append(number)
                most = max(most, len(makers))
                time.sleep(0.0005)
                makers.remove(number)

    with store.shared():
        threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1
    assert os.listdir(f"{store.path}/partial") == []


def test_prune_waits_for_who_pulls_and_rmi_leaves_it_to_prune(tmp_path: Path, store: Store) -> None:
    pull(hello(tmp_path / "lay"), store)
    done = threading.Event()

    def prune() -> None:
        store.collect(partial=True, wait=True)
        done.set()

    with store.shared():
        assert store.collect(partial=True, wait=False) == 0
        thread = threading.Thread(target=prune)
        thread.start()
        assert not done.wait(0.2)
    thread.join(60)
    assert done.is_set()


def test_two_processes_that_pull_one_image_at_once_both_have_it(
    tmp_path: Path, store: Store
) -> None:
    files = [entry(f"{n}", os.urandom(2000)) for n in range(300)]
    name = image(tmp_path / "lay", layer(*files), layer(directory("d")))
    command = [sys.executable, "-m", "tinyvmm", "pull", name]
    pulls = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in pulls]
    assert [process.returncode for process in pulls] == [0, 0, 0], outputs
    [found] = store.images()
    assert {out.decode().strip() for out, _ in outputs} == {found.id[7:]}
    assert len(os.listdir(f"{store.path}/layers")) == 2
    assert len(list(trees(store, found)[0].iterdir())) == 300


def test_the_base_of_an_opaque_root_is_left_out(tmp_path: Path, store: Store) -> None:
    found = pull(
        image(tmp_path / "lay", layer(entry("old")), layer(entry(".wh..wh..opq"), entry("new"))),
        store,
    )
    [tree] = trees(store, found)
    assert os.listdir(tree) == ["new"]


# --- made ready -----------------------------------------------------------------------------------


def test_an_image_made_ready_has_its_directories_and_its_words(
    tmp_path: Path, store: Store
) -> None:
    name = hello(
        tmp_path / "lay",
        config={
            "Entrypoint": ["/hello"],
            "WorkingDir": "/srv/../work/dir",
            "Volumes": {"/data/db": {}, "rel": {}},
            "User": "1000:1000",
            "StopSignal": "SIGINT",
            "ExposedPorts": {"80/tcp": {}},
        },
    )
    with ExitStack() as cleanup:
        ready = prepare(name, ["-x"], cleanup, env=["A=b"], store=store)
        assert ready.command.argv == ["/hello", "-x"]
        assert (ready.command.workdir, ready.command.user) == ("/work/dir", "1000:1000")
        assert ready.stop_signal == "SIGINT"
        assert ready.directories[:3] == ["/proc", "/sys", "/dev"]
        assert ready.directories[5:] == ["/data", "/data/db", "/rel", "/work", "/work/dir"]
        [(at, path)] = ready.reads
        assert at == "/"
        held = os.open(os.path.dirname(path), os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)


def test_what_an_image_says_is_run_unless_the_command_line_says_otherwise(
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config: dict[str, object] = {"Entrypoint": ["/hello"], "Cmd": ["-c"], "Env": ["A=1", "B=2"]}
    config |= {"User": "7", "WorkingDir": "/work", "StopSignal": "SIGINT", "Volumes": {"/v": {}}}
    name = hello(tmp_path / "lay", config=config)
    started: list[RunOptions] = []

    def start(_: object, options: RunOptions, __: object) -> int:
        started.append(options)
        return 0

    monkeypatch.setattr(probe, "missing_for_linux", lambda: None)
    monkeypatch.setattr(instance, "run", start)
    words = ["--stop-signal", "USR1", "--env", "B=3", "--user", "8", "--workdir", "/", "--", "-d"]
    for more in ([], words):
        assert main(["run", "--image", name, *more]) == 0
    said, other = started
    assert (said.argv, other.argv) == (["/hello", "-c"], ["/hello", "-d"])
    assert (said.cwd, said.user, said.stop_signal) == ("/work", "7", signal.SIGINT)
    assert (other.cwd, other.user, other.stop_signal) == ("/", "8", "USR1")
    assert {"A=1", "B=2"} <= set(said.env)
    assert {"A=1", "B=3"} <= set(other.env)
    assert {"/v", "/work"} <= set(said.directories)
    assert [place for place, _ in said.reads] == ["/"]

    name = hello(tmp_path / "odd", config=config | {"StopSignal": "SIGODD"})
    assert main(["run", "--image", name]) == 125
    assert "StopSignal 'SIGODD' is no signal; give --stop-signal" in capsys.readouterr().err
    assert main(["run", "--image", name, "--stop-signal", "INT"]) == 0


def test_policies_say_when_an_image_is_pulled(tmp_path: Path, store: Store) -> None:
    name = hello(tmp_path / "lay", b"old")
    with pytest.raises(ConfigError, match="is not here: tinyvmm pull"):
        find_or_pull("lay:v1", store, policy="never")
    old = find_or_pull(name, store)
    hello(tmp_path / "lay", b"new")
    assert find_or_pull("lay:v1", store) == old
    assert find_or_pull(name, store).id != old.id  # what is in a file is looked at anew


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pull", "oci:/nonexistent"], "there is no such directory"),
        (["pull", "oci:/etc/passwd"], "a file; give oci-archive:"),
        (["pull", "oci-archive:/etc/passwd"], "no archive of an image: no tar"),
        (["pull", "oci-archive:/dev/zero"], "no regular file"),
        (["pull", "docker-archive:/etc"], "is no image: it has neither"),
        (["pull", "UPPER"], "in lower case"),
        (["rmi", "absent"], "is not here"),
        pytest.param(
            *(["run", "--image", "absent", "--pull", "never"], "is not here"),
            marks=pytest.mark.kvm,
        ),
        pytest.param(
            *(["run", "--entrypoint", "x", "--", "y"], "give --image"), marks=pytest.mark.kvm
        ),
        (["run", "--no-root", "--kernel", "k", "--image", "x"], "--image is for a root"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    store: Store, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(words) == 125
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert store.images() == []


def test_the_list_is_for_people_and_for_programs(
    tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pull(hello(tmp_path / "lay", config={"ExposedPorts": {"80/tcp": {}}}), store)
    assert main(["images"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    assert row.split()[:3] == ["localhost/lay", "v1", found.id[7:19]]
    assert main(["images", "--json"]) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["names"] == ["localhost/lay:v1"]
    assert record["config"]["exposed_ports"] == ["80/tcp"]


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (12_288, "12.3 kB"), (999_600, "1 MB"), (5 * 10**15, "5e+03 TB")],
)
def test_sizes_have_three_digits(count: int, said: str) -> None:
    assert size(count) == said


def test_an_archive_that_lies_about_its_layers_is_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "a.tar"
    contents = {
        "manifest.json": b'[{"Config": "c", "RepoTags": ["a:b"], "Layers": ["../../etc/passwd"]}]',
        "c": b'{"rootfs": {"diff_ids": ["%s"]}}' % DIGEST.encode(),
    }
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ConfigError, match="no such file in the archive"):
        pull(f"docker-archive:{path}", store)


def test_what_is_no_file_in_a_layout_is_not_waited_for(tmp_path: Path, store: Store) -> None:
    hello(tmp_path / "lay")
    index = tmp_path / "lay/index.json"
    for path in (*(tmp_path / "lay/blobs/sha256").iterdir(), index):
        kept = path.rename(tmp_path / "kept")
        os.mkfifo(path)
        why = "neither index.json nor" if path == index else "no regular file"
        with pytest.raises(ConfigError, match=why):
            pull(f"oci:{tmp_path}/lay:v1", store)
        path.unlink()
        kept.rename(path)


def test_a_list_in_a_directory_names_no_file_outside_of_it(tmp_path: Path, store: Store) -> None:
    (tmp_path / "secret").write_text('{"rootfs": {"diff_ids": []}}')
    (tmp_path / "image").mkdir()
    for name in ("../secret", f"{tmp_path}/secret", "x/../../secret"):
        listed = [{"Config": name, "RepoTags": ["a:b"], "Layers": []}]
        (tmp_path / "image/manifest.json").write_text(json.dumps(listed))
        with pytest.raises(ConfigError, match="leads out of the image"):
            pull(f"docker-archive:{tmp_path}/image", store)
