"""The store of images: what has been pulled, each layer once.

    $XDG_DATA_HOME/tinyvmm/images/      mode 0700: what has set-id bits in there is for guests only
      images.json        the images: names, layers, sizes; replaced as a whole, under images.lock
      blobs/DIGEST       manifests and configurations
      layers/DIGEST/     a layer by its diff_id: `diff`, its tree, and `size`, its files' bytes
      partial/DIGEST     what has come of a layer that is being downloaded, or was

Locks (flock(2), so they die with their holder). `lock` is held shared by who pulls or looks an
image up to run it, and alone by who removes what no image has any more. A running machine holds its
layers' directories, shared; what is held is never removed. A layer appears by rename, complete or
not at all; who makes it holds partial/DIGEST.lock, so that two who want one layer fetch it once.
"""

import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.removal import remove_whole
from tinyvmm.images.holding import hold, is_held
from tinyvmm.images.oci import reference
from tinyvmm.images.oci.tree_writer import OPAQUE_XATTR
from tinyvmm.images.storing import storing

ID_PREFIX_MIN = 4  # hexadecimal digits that may stand for an image
_DRAFT = ".draft-"
_POLL = 0.1  # seconds between looks at a lock that another process has


class Image(NamedTuple):
    """An image of the store."""

    id: str
    """The digest of its configuration."""
    names: list[str]
    """What it is called; none if its names have gone to others."""
    manifest: str
    layers: list[str]
    """diff_ids, the lowest first."""
    size: int
    """Bytes of its layers' files."""
    created: str
    pulled: float
    """Seconds since 1970."""


class Store:
    """The store at `path`, by default this user's."""

    def __init__(self, path: str | None = None) -> None:
        self.path = store_dir() if path is None else path
        self._records = threading.Lock()

    # --- locks ------------------------------------------------------------------------------------
    @contextmanager
    def shared(self) -> Iterator[None]:
        """While this lasts nobody removes anything; makes the store if there is none."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with storing("image", self.path):
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            for name in ("blobs", "layers", "partial"):
                os.makedirs(self._file(name), mode=0o700, exist_ok=True)
            fd = os.open(self._file("lock"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def making(self, diff_id: str, cancelled: threading.Event) -> Iterator[bool]:
        """Alone with a layer: whether it is there by now. Raises KeyboardInterrupt if cancelled."""
        path = self._file("partial", f"{_name(diff_id)}.lock")
        while True:
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while not _try_lock(fd):
                    if cancelled.wait(_POLL):
                        raise KeyboardInterrupt
                if not _is_file(fd, path):  # who had it has removed it: it locks nobody out
                    continue
                try:
                    yield self.has_layer(diff_id)
                finally:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                return
            finally:
                os.close(fd)

    def hold(self, image: Image, cleanup: ExitStack) -> None:
        """Keep the image's layers from being removed until `cleanup`; within `shared`."""
        for diff_id in image.layers:
            try:
                hold(self._file("layers", _name(diff_id)), cleanup)
            except FileNotFoundError:
                raise ConfigError(
                    f"image {image.id[:19]} has lost a layer: pull it again"
                ) from None

    # --- layers -----------------------------------------------------------------------------------
    def has_layer(self, diff_id: str) -> bool:
        """Whether the layer is there."""
        return os.path.exists(self._file("layers", _name(diff_id), "size"))

    def layer(self, diff_id: str) -> str:
        """Return the path of the layer's tree."""
        return self._file("layers", _name(diff_id), "diff")

    def layer_size(self, diff_id: str) -> int:
        """Return how many bytes its files have."""
        return _read_number(self._file("layers", _name(diff_id), "size"))

    def partial(self, digest: str) -> str:
        """Return where the blob `digest` is downloaded to; within `making`."""
        return self._file("partial", _name(digest))

    @contextmanager
    def draft(self) -> Iterator[str]:
        """Make an empty directory for a layer, removed if `keep_layer` does not take it."""
        path = tempfile.mkdtemp(dir=self._file("layers"), prefix=_DRAFT)
        try:
            os.mkdir(os.path.join(path, "diff"))
            os.chmod(os.path.join(path, "diff"), 0o755)  # whatever our umask is
            yield path
        finally:
            _remove(path)

    def keep_layer(self, draft: str, diff_id: str, size: int) -> None:
        """Take a draft, whose `diff` is complete, as the layer `diff_id`."""
        with open(os.path.join(draft, "size"), "w", encoding="ascii") as file:
            file.write(str(size))
        _sync(draft)  # or a computer that fails might keep the name and lose the data
        path = self._file("layers", _name(diff_id))
        _remove(path)  # of which something was lost, or it would be there
        os.rename(draft, path)

    def reads(self, image: Image) -> list[tuple[str, str]]:
        """Return the image as read trees: ("/", path) of each layer, the lowest first."""
        paths: list[tuple[str, str]] = []
        for diff_id in image.layers:
            path = self.layer(diff_id)
            if _is_opaque(path):
                paths.clear()  # its root hides all that is below
            paths.append(("/", path))
        return paths

    # --- images -----------------------------------------------------------------------------------
    def images(self) -> list[Image]:
        """Return every image, the newest first."""
        try:
            with open(self._file("images.json"), encoding="utf-8") as file:
                found = [Image(**entry) for entry in json.load(file)["images"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"image store {self.path}: cannot read images.json: {error}; remove it and pull "
                "the images again"
            ) from None
        return sorted(found, key=lambda image: -image.pulled)

    def find(self, text: str) -> Image | None:
        """Return the image called `text`: a name, an ID, or the beginning of one.

        ConfigError if it is neither, or the beginning of several.
        """
        images = self.images()
        digits = text.removeprefix("sha256:")
        if len(digits) >= ID_PREFIX_MIN and not set(digits) - set("0123456789abcdef"):
            found = [image for image in images if image.id.startswith(f"sha256:{digits}")]
            if len(found) > 1:
                raise ConfigError(
                    f"{text} is the beginning of {len(found)} images: give more of it"
                )
            if found:
                return found[0]
        if text.startswith("sha256:"):
            return None
        wanted = reference.parse_name(text)
        # A name without a host may be one that was read from a file, which has none either.
        names = {str(wanted), f"localhost/{text}", f"localhost/{text}:latest"}
        for image in images:
            if names & set(image.names):
                return image
            if wanted.digest and wanted.digest == image.manifest:
                return image
        return None

    def record(self, image: Image, blobs: dict[str, bytes]) -> Image:
        """Note `image`, whose names are its alone from now on, and its manifest and configuration.

        Returns it with the names it already had.
        """
        for digest, data in blobs.items():
            self._write("blobs", _name(digest), data=data)

        def change(images: dict[str, Image]) -> None:
            for known in images.values():
                kept = [name for name in known.names if name not in image.names]
                images[known.id] = known._replace(names=kept)
            before = images[image.id].names if image.id in images else []
            images[image.id] = image._replace(names=[*before, *image.names])

        return self._change(change)[image.id]

    def config(self, image: Image) -> bytes:
        """Return the image's configuration."""
        try:
            with open(self._file("blobs", _name(image.id)), "rb") as file:
                return file.read()
        except OSError:
            raise ConfigError(f"image {image.id[:19]} is damaged here: pull it again") from None

    def forget(self, image: Image, name: str | None) -> None:
        """Take a name from an image, and with its last the image; None is the image at once."""

        def change(images: dict[str, Image]) -> None:
            known = images.get(image.id)
            if known is None:
                return
            names = [] if name is None else [other for other in known.names if other != name]
            if names:
                images[image.id] = known._replace(names=names)
            else:
                del images[image.id]

        self._change(change)

    def in_use(self, image: Image) -> bool:
        """Whether a machine runs that has a layer which only this image has."""
        others = {d for other in self.images() if other.id != image.id for d in other.layers}
        return any(self._is_held(diff_id) for diff_id in image.layers if diff_id not in others)

    def collect(self, *, partial: bool, wait: bool) -> int:
        """Remove what no image has; with `partial` downloads that have stopped, too.

        Returns how many bytes of layers and downloads that was. Where somebody pulls, it waits for
        them or, without `wait`, leaves everything as it is.
        """
        try:
            with self._locked(fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
                return self._collect(partial=partial)
        except BlockingIOError:
            return 0

    def _collect(self, *, partial: bool) -> int:
        images = self.images()
        layers = {_name(diff_id) for image in images for diff_id in image.layers}
        blobs = {_name(digest) for image in images for digest in (image.id, image.manifest)}
        freed = 0
        for name in os.listdir(self._file("layers")):
            path = self._file("layers", name)
            if name in layers or is_held(path):
                continue
            if os.path.exists(os.path.join(path, "size")):  # or it is a draft of somebody's
                freed += _read_number(os.path.join(path, "size"))
            going = self._file("layers", f"{_DRAFT}gone-{name}")  # whoever dies here leaves no half
            os.rename(path, going)
            _remove(going)
        for name in set(os.listdir(self._file("blobs"))) - blobs:
            os.unlink(self._file("blobs", name))
        for name in os.listdir(self._file("partial")) if partial else ():
            path = self._file("partial", name)
            freed += os.stat(path).st_size
            os.unlink(path)
        return freed

    def _is_held(self, diff_id: str) -> bool:
        return is_held(self._file("layers", _name(diff_id)))

    # --- files ------------------------------------------------------------------------------------
    def _change(self, change: Callable[[dict[str, Image]], None]) -> dict[str, Image]:
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
        with self._records:  # threads share no flock
            fd = os.open(self._file("images.lock"), flags, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                images = {image.id: image for image in self.images()}
                change(images)
                document: dict[str, Any] = {"images": [i._asdict() for i in images.values()]}
                self._write("images.json", data=json.dumps(document, indent=1).encode())
                return images
            finally:
                os.close(fd)

    def _write(self, *where: str, data: bytes) -> None:
        """Replace a file as a whole."""
        path = self._file(*where)
        fd, temporary = tempfile.mkstemp(dir=self.path, prefix=_DRAFT)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _file(self, *names: str) -> str:
        return os.path.join(self.path, *names)


def store_dir() -> str:
    """Return this user's store: XDG_DATA_HOME/tinyvmm/images (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/share")
    return os.path.join(base, "tinyvmm", "images")


def _try_lock(fd: int) -> bool:
    """Take a lock alone, if nobody has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_file(fd: int, path: str) -> bool:
    """Whether the file at `path` is the open one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _name(digest: str) -> str:
    """A digest as a file name; it has been checked, or comes from where such are."""
    return reference.check_digest(digest).replace(":", "-")


def _sync(path: str) -> None:
    """Have all that was written to the file system of `path` on its disk: syncfs(2)."""
    import ctypes

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    finally:
        os.close(fd)


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE_XATTR) == b"y"
    except OSError:
        return False


def _read_number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _remove(path: str) -> None:
    """Remove a directory with all in it, if it is there."""
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            remove_whole(os.fsencode(os.path.basename(path)), parent)
    finally:
        os.close(parent)
