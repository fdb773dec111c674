"""Packs: a tree of files as one file, an EROFS image or a zip, to be a read tree of machines.

    $XDG_DATA_HOME/tinyvmm/packs/NAME/   pack.erofs or pack.zip   about

`about` is JSON: where it is from, its SHA-256, how many files, when. A pack appears in the store by
rename, complete or not at all, and leaves it so. Who makes one holds its draft, and the store's
lock only to begin and to end: nobody waits for another's slow server. A pack is never unpacked: a
zip is served over 9P (fileserver/archives.py), an EROFS image is a disk, and the guest joins either
with its root.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import EOPNOTSUPP
from typing import IO, Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.written import Change
from tinyvmm.images.storing import storing
from tinyvmm.regular import regular

KINDS = ("erofs", "zip")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DRAFT = ".draft-"
_COPY_LEN = 1 << 20
_EROFS_MAGIC = b"\xe2\xe1\xf5\xe0"  # EROFS_SUPER_MAGIC_V1, of the superblock at byte 1024
_SUPERBLOCK, _BLOCK_BITS, _BLOCKS = 1024, 12, 36  # where it is, and blkszbits and blocks in it
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # APPNOTE.TXT, 4.3.7 and 4.3.16

Progress = Callable[[str, int, int], None]


class Pack(NamedTuple):
    """A pack: its name, or its path if it is not in the store; `path` is the file."""

    name: str
    path: str
    kind: str
    source: str = ""
    digest: str = ""
    """SHA-256, in hexadecimal."""
    size: int = 0
    created: float = 0.0


# --- looking -------------------------------------------------------------------------------------


def store_dir() -> str:
    """Return the store: XDG_DATA_HOME/tinyvmm/packs (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/share")
    return os.path.join(base, "tinyvmm", "packs")


def list_() -> list[Pack]:
    """Return the packs of the store, by name."""
    try:
        names = sorted(os.listdir(store_dir()))
    except OSError:
        return []
    return [pack for name in names if (pack := _stored(name))]


def find(name: str) -> Pack:
    """Return the pack of that name in the store, or of that path; ConfigError for neither."""
    stored = _stored(name)
    if stored is not None:
        return stored
    if not os.path.exists(name):
        known = ", ".join(pack.name for pack in list_()) or "none yet"
        raise ConfigError(f"pack {name}: neither a file nor a pack here ({known})")
    path = os.path.abspath(name)
    return Pack(name, path, kind_of(path), size=os.stat(path).st_size)


def kind_of(path: str, shown: str | None = None) -> str:
    """Return which of KINDS a file is, by its content; ConfigError, of `shown`, if it is none."""
    shown = shown or path
    try:
        with open(path, "rb", opener=regular) as file:
            head = file.read(4)
            file.seek(_SUPERBLOCK)
            superblock = file.read(_BLOCKS + 4)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ConfigError(f"pack {shown}: {error.strerror}") from None
    if superblock[:4] == _EROFS_MAGIC:
        whole = int.from_bytes(superblock[_BLOCKS:], "little") << superblock[_BLOCK_BITS]
        if size < whole:
            raise ConfigError(f"pack {shown} is cut short: {size} bytes of {whole}; get it again")
        return "erofs"
    if head in _ZIP_MAGICS:
        return "zip"
    raise ConfigError(f"pack {shown}: neither an EROFS image nor a zip; make one: pack create")


def _stored(name: str) -> Pack | None:
    if not _NAME.fullmatch(name):
        return None
    directory = os.path.join(store_dir(), name)
    try:
        with open(os.path.join(directory, "about"), encoding="utf-8") as file:
            about = json.load(file)
        kind = about["kind"]
        path = os.path.join(directory, f"pack.{kind}")
        fields: dict[str, Any] = {key: about[key] for key in ("source", "digest", "created")}
        return Pack(name, path, kind, size=os.stat(path).st_size, **fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- putting in ----------------------------------------------------------------------------------


class Files(NamedTuple):
    """What is to be in a pack."""

    changes: Iterable[Change]
    """Each file that is wanted."""
    trees: Sequence[tuple[str, str]]
    """(guest path, host directory) of the trees they are in; none for what a guest holds."""


def create(name: str, files: Files, source: str, kind: str, warn: Callable[[str], None]) -> Pack:
    """Put a pack of `files` into the store; ConfigError for what cannot be."""

    def fill(draft: str) -> str:
        try:
            write(files, os.path.join(draft, f"pack.{kind}"), kind, warn)
        except PermissionError as error:  # of what is read: the draft is ours
            raise ConfigError(
                f"pack create {name}: not all of {source} can be read ({error.strerror}): "
                "--exclude what cannot"
            ) from None
        return kind

    return _install(name, fill, source)


def write(files: Files, path: str, kind: str, warn: Callable[[str], None]) -> None:
    """Write a pack of `files` to `path`; it appears there whole, or not at all."""
    if kind == "erofs":
        try:
            _write_erofs(files, path, warn)
        except PermissionError:
            raise  # of what is read: `create` has the words
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno == EOPNOTSUPP:  # an overlay over a tmpfs, for one
                why = "this file system cannot say what is gone: name a place on another"
            raise ConfigError(f"cannot write {path}: {why}") from None
    elif kind == "zip":
        _write_zip(files, path, warn)
    else:
        raise ConfigError(f"{kind!r} is no kind of pack: give {' or '.join(KINDS)}")


def _write_zip(files: Files, path: str, warn: Callable[[str], None]) -> None:
    from tinyvmm.images.draft import drafted
    from tinyvmm.images.zips import write_zip

    try:
        with drafted(path) as draft:
            write_zip(files.changes, draft, warn)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def _write_erofs(files: Files, path: str, warn: Callable[[str], None]) -> None:
    import tempfile

    from tinyvmm.images.changed_tree import Gone, fill_directory, said_once
    from tinyvmm.images.erofs.writer import write_image

    where = os.path.dirname(os.path.abspath(path))
    with tempfile.TemporaryDirectory(dir=where, prefix=f"{_DRAFT}gone-") as here:
        if not files.trees:  # what a guest holds: an image is made of what is here
            fill_directory(files.changes, here, warn, for_image=True)
            write_image([("/", here)], path, keep=lambda _: True)
            return
        gone, wanted = Gone(files.trees, here), set()
        for change in said_once(files.changes):
            gone.note(change)
            wanted.add(change.path)
        trees = [*files.trees, *gone.close()]
        tops = [(os.path.realpath(os.fsencode(host)), os.fsencode(guest)) for guest, host in trees]

        def keep(host: bytes) -> bool:
            for top, guest in tops:
                if host.startswith(os.path.join(top, b"")):
                    return os.path.join(guest, os.path.relpath(host, top)) in wanted
            return False

        write_image(trees, path, keep=keep)


def get(name: str, url: str, digest: str | None, progress: Progress) -> Pack:
    """Fetch a pack from a file:, http: or https: address, whose SHA-256 must be `digest`.

    A file: may come without one. ConfigError if it is another, or cannot be had.
    """
    scheme = url.partition(":")[0].lower()
    if scheme not in {"file", "http", "https"}:
        raise ConfigError(f"pack get {url}: give an address that begins with file: or http:")
    if digest is None and scheme != "file":
        raise ConfigError(
            f"pack get {url}: what it must be is to be known: give its --sha256, as sha256sum says"
        )
    wanted = None if digest is None else digest.lower().removeprefix("sha256:")
    if wanted is not None and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ConfigError(f"{digest!r} is no SHA-256: give 64 hexadecimal digits")

    def fill(draft: str) -> str:
        path = os.path.join(draft, "fetched")
        found = _fetch(url, path, progress)
        if wanted is not None and found != wanted:
            raise ConfigError(
                f"pack get {url}: its SHA-256 is {found}, not {wanted}: it is another"
            )
        kind = kind_of(path, url)
        if kind == "zip":
            _check_zip(path, url)
        os.rename(path, os.path.join(draft, f"pack.{kind}"))
        return kind

    return _install(name, fill, url)


def _check_zip(path: str, shown: str) -> None:
    """ConfigError if the directory at the end of an archive is not there."""
    from zipfile import is_zipfile

    if not is_zipfile(path):
        raise ConfigError(f"pack {shown} is cut short: its directory is not there; get it again")


def remove(names: Iterable[str]) -> None:
    """Take packs out of the store; ConfigError, and none is gone, if one is not there."""
    import shutil

    with _locked() as store:
        for name in (names := list(dict.fromkeys(names))):
            if _stored(name) is None:
                known = ", ".join(pack.name for pack in list_()) or "none"
                raise ConfigError(f"pack rm {name}: no such pack here ({known})")
        for name in names:
            gone = os.path.join(store, f"{_DRAFT}{name}-gone")
            os.rename(os.path.join(store, name), gone)
            shutil.rmtree(gone)


def _install(name: str, fill: Callable[[str], str], source: str) -> Pack:
    """Have `fill` put a pack into a draft directory and say its kind; store it as `name`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name: give letters, digits, _ . and -, 64 at most")
    with storing("pack", store_dir()), _draft(name) as draft:
        kind = fill(draft)
        path = os.path.join(draft, f"pack.{kind}")
        about = {
            "kind": kind,
            "source": source,
            "digest": _digest(path),
            "created": time.time(),
        }
        with open(os.path.join(draft, "about"), "w", encoding="utf-8") as file:
            json.dump(about, file)
        os.chmod(draft, 0o755)
        with _locked() as store:
            _refuse_taken(name)  # by one who was quicker
            os.rename(draft, os.path.join(store, name))
    return find(name)


@contextmanager
def _draft(name: str) -> Iterator[str]:
    """Make a directory for what is to be pack `name`, gone at the end if it did not become it."""
    import shutil
    import tempfile

    from tinyvmm.images.holding import hold

    with ExitStack() as cleanup:
        with _locked() as store:
            _refuse_taken(name)
            draft = tempfile.mkdtemp(dir=store, prefix=_DRAFT)
            hold(draft, cleanup)
        try:
            yield draft
        finally:
            if os.path.exists(draft):
                shutil.rmtree(draft, ignore_errors=True)


def _refuse_taken(name: str) -> None:
    if _stored(name) is not None:
        raise ConfigError(f"a pack {name} is here already: tinyvmm pack rm {name}")


@contextmanager
def _locked() -> Iterator[str]:
    """Hold the store's lock, and clear away drafts that nobody holds: their makers were killed."""
    import fcntl
    import shutil

    from tinyvmm.images.holding import is_held

    store = store_dir()
    with storing("pack", store):
        os.makedirs(store, exist_ok=True)
        lock = os.open(os.path.join(store, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in os.listdir(store):
                path = os.path.join(store, name)
                if name.startswith(_DRAFT) and not is_held(path):
                    shutil.rmtree(path, ignore_errors=True)
            yield store
        finally:
            os.close(lock)


def _digest(path: str) -> str:
    from hashlib import file_digest

    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _fetch(url: str, path: str, progress: Progress) -> str:
    """Fetch `url` to `path`; its SHA-256."""
    import urllib.request
    from hashlib import sha256

    hashed = sha256()
    with _asking(url):
        if url.lower().startswith("file:"):
            local = urllib.request.url2pathname(url.partition(":")[2].removeprefix("//"))
            open(local, "rb", opener=regular).close()
        opened = urllib.request.urlopen(url, timeout=60)  # noqa: S310 - `get` looked at the scheme
    with opened as source, open(path, "xb") as file:
        done = 0
        with _asking(url):
            total = int(source.headers.get("Content-Length") or 0)
        while data := _read(source, url):
            file.write(data)
            hashed.update(data)
            done += len(data)
            progress(f"fetching {url}", done, total)
    if total and done != total:
        raise ConfigError(f"pack get {url}: {done} bytes of {total} came: try again")
    return hashed.hexdigest()


def _read(source: IO[bytes], url: str) -> bytes:
    with _asking(url):
        return source.read(_COPY_LEN)


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Have what fails at the other end, or on the way, be a ConfigError."""
    import http.client
    import urllib.error

    try:
        yield
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error.reason, "strerror", None) or error.reason or error
        raise ConfigError(f"pack get {url}: {reason}") from None
    except (http.client.HTTPException, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise ConfigError(f"pack get {url}: {reason}") from None
