"""What a dict of files says beyond bytes: attributes, symbolic links, special files."""

from os import fsencode

TARGET_MAX = 4095  # bytes of a symbolic link's content: PATH_MAX, less the NUL


class Entry:
    """Content with attributes: `{"run": Entry(script, mode=0o755)}`.

    What is None is as for content that is given alone. One Entry at two places is one file with
    two names (of directories there can be but one). When its file is written, `content` changes.
    """

    __slots__ = ("content", "gid", "mode", "mtime_ns", "uid")

    def __init__(
        self,
        content: object,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        self.content = content
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns


class Symlink:
    """A symbolic link: `{"sh": Symlink("/bin/dash")}`."""

    __slots__ = ("target",)

    def __init__(self, target: str | bytes) -> None:
        self.target = fsencode(target)


class Special:
    """A fifo, socket or device, to be looked at; nothing here can open it."""

    __slots__ = ("kind", "rdev")

    def __init__(self, kind: int, rdev: int = 0) -> None:
        """Of S_IFMT `kind`; `rdev` is a device's number."""
        self.kind = kind
        self.rdev = rdev
