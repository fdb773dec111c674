"""A reader of EROFS images for the tests: what a tree is, in an image or on this computer.

And a tree to read, of everything that a file can be.

Written after fs/erofs/*.c, by what the kernel does with an image, and not after our writer.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # CAP_NET_RAW, permitted
ACL = bytes.fromhex(
    "02000000" "01000600ffffffff" "02000600e8030000" "04000400ffffffff"
    "10000600ffffffff" "20000400ffffffff"
)  # fmt: skip

Read = Callable[[int, int], bytes]
"""(offset, length) to bytes."""

XATTR_NAMES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
TYPES = {
    1: stat.S_IFREG,
    2: stat.S_IFDIR,
    3: stat.S_IFCHR,
    4: stat.S_IFBLK,
    5: stat.S_IFIFO,
    6: stat.S_IFSOCK,
    7: stat.S_IFLNK,
}

# All of the tree $1 that programs can ask for: a line of each file; devices; attributes; contents.
LIST = r"""
cd "$1" || exit 1
LC_ALL=C; export LC_ALL
line='%P|%y|%m|%U|%G|%n|%T@|%l'
find . -type d -printf "$line\n" -o -printf "$line|%s\n" | sort
find . -type b -printf '%P ' -exec stat -c '%t:%T' {} \; -o -type c -printf '%P ' \
    -exec stat -c '%t:%T' {} \; | sort
find . -print0 | sort -z | xargs -0 getfattr -h -d -m - -e hex | sort
find . -type f -print0 | sort -z | xargs -0 sha256sum
"""


class Entry(NamedTuple):
    """All that a file is, but its name."""

    mode: int
    uid: int
    gid: int
    links: int
    mtime_ns: int
    rdev: int
    size: int
    content: bytes
    """Of a file its SHA-256, of a symlink its target."""
    xattrs: tuple[tuple[bytes, bytes], ...]


class Inode(NamedTuple):
    """An inode of an image, and where its data is."""

    entry: Entry
    nid: int
    inline: bool
    block: int
    tail_at: int


class Image:
    """An image, by what reads it."""

    def __init__(self, read: Read) -> None:
        self.read = read
        head = read(1024, 128)
        (magic,) = struct.unpack_from("<I", head)
        assert magic == 0xE0F5E1E2
        assert head[12] == 12, "blocks of 4096"
        self.root: int = struct.unpack_from("<H", head, 14)[0]
        self.inodes: int = struct.unpack_from("<Q", head, 16)[0]
        self.blocks, self.meta = struct.unpack_from("<II", head, 36)

    def inode(self, nid: int) -> Inode:
        at = self.meta * 4096 + nid * 32
        raw = self.read(at, 64)
        layout, icount, mode, _, size, union = struct.unpack_from("<HHHHQI", raw)
        _, uid, gid, mtime, nanoseconds, links = struct.unpack_from("<IIIqII", raw, 20)
        assert layout & 1, "an extended inode"
        assert layout in {1, 5}, f"nid {nid}: layout {layout}"
        xattr_len = 12 + (icount - 1) * 4 if icount else 0
        device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        rdev = 0
        if device:
            rdev = os.makedev(union >> 8 & 0xFFF, union & 0xFF | union >> 12 & 0xFFF00)
        entry = Entry(
            mode,
            uid,
            gid,
            links,
            mtime * 10**9 + nanoseconds,
            rdev,
            0 if stat.S_ISDIR(mode) else size,
            b"",
            tuple(sorted(self.xattrs(at + 64, xattr_len))),
        )
        inode = Inode(entry, nid, layout == 5, union, at + 64 + xattr_len)
        if inode.inline:
            tail = size % 4096
            assert tail, "an inline part of no bytes"
            assert inode.tail_at % 4096 + tail <= 4096, "an inline part in two blocks"
        return inode._replace(entry=entry._replace(size=size))

    def xattrs(self, at: int, length: int) -> Iterator[tuple[bytes, bytes]]:
        if not length:
            return
        assert length > 12, "a body of nothing but its header"
        body = self.read(at, length)
        assert body[4] == 0, "no shared attributes"
        where = 12
        while where < length:
            name_len, index, value_len = struct.unpack_from("<BBH", body, where)
            name = body[where + 4 : where + 4 + name_len]
            where += 4 + name_len
            yield XATTR_NAMES[index] + name, body[where : where + value_len]
            where = (where + value_len + 3) & ~3

    def data(self, inode: Inode) -> Iterator[bytes]:
        size = inode.entry.size
        whole = size // 4096 * 4096 if inode.inline else size
        for at in range(0, whole, 1 << 20):
            yield self.read(inode.block * 4096 + at, min(1 << 20, whole - at))
        if whole < size:
            yield self.read(inode.tail_at, size - whole)

    def directory(self, inode: Inode) -> list[tuple[bytes, int, int]]:
        """Name, nid and S_IFMT of each entry, which must be sorted."""
        data = b"".join(self.data(inode))
        entries = []
        for start in range(0, len(data), 4096):
            block = data[start : start + 4096]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            heads = [struct.unpack_from("<QHB", block, 12 * index) for index in range(count)]
            ends = [offset for _, offset, _ in heads[1:]]
            last = heads[-1][1]
            ends.append(last + len(block[last:].partition(b"\0")[0]))
            for (nid, offset, kind), end in zip(heads, ends, strict=True):
                entries.append((block[offset:end], nid, TYPES[kind]))
        names = [name for name, _, _ in entries]
        assert names == sorted(set(names))
        assert all(names)
        return entries

    def tree(self) -> dict[bytes, tuple[int, Entry]]:
        """Path to nid and what is there, of everything in it."""
        found: dict[bytes, tuple[int, Entry]] = {}
        pending = [(b"", self.root, self.root)]
        while pending:
            path, nid, above = pending.pop()
            inode = self.inode(nid)
            mode = inode.entry.mode
            if not stat.S_ISDIR(mode):
                found[path] = (nid, self.with_content(inode))
                continue
            found[path] = (nid, inode.entry._replace(size=0))
            entries = self.directory(inode)
            assert {name: to for name, to, _ in entries if name in {b".", b".."}} == {
                b".": nid,
                b"..": above,
            }
            for name, to, kind in entries:
                if name not in {b".", b".."}:
                    assert stat.S_IFMT(self.inode(to).entry.mode) == kind
                    pending.append((path + b"/" + name, to, nid))
        return found

    def with_content(self, inode: Inode) -> Entry:
        entry = inode.entry
        if stat.S_ISLNK(entry.mode):
            return entry._replace(content=b"".join(self.data(inode)))
        if stat.S_ISREG(entry.mode):
            digest = sha256()
            for piece in self.data(inode):
                digest.update(piece)
            return entry._replace(content=digest.digest())
        return entry


def read_image(path: Path) -> dict[bytes, Entry]:
    """What is in an image: path to entry, the root's path being empty."""
    with path.open("rb") as file:
        image = Image(lambda offset, length: os.pread(file.fileno(), length, offset))
        tree = image.tree()
    assert image.blocks * 4096 == path.stat().st_size
    assert image.inodes == len({nid for nid, _ in tree.values()})
    return {name: entry for name, (_, entry) in tree.items()}


def read_tree(root: Path) -> dict[bytes, Entry]:
    """What is in a directory of this computer."""
    top = os.fsencode(root)
    found = {b"": read_file(top)}
    pending = [top]
    while pending:
        directory = pending.pop()
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            found[path[len(top) :]] = entry = read_file(path)
            if stat.S_ISDIR(entry.mode):
                pending.append(path)
    return found


def read_file(path: bytes) -> Entry:
    """What a file of this computer is."""
    st = os.lstat(path)
    content = b""
    if stat.S_ISLNK(st.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(st.st_mode):
        digest = sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        content = digest.digest()
    names = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    xattrs = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
    return Entry(
        st.st_mode,
        st.st_uid,
        st.st_gid,
        st.st_nlink,
        st.st_mtime_ns,
        st.st_rdev,
        0 if stat.S_ISDIR(st.st_mode) else st.st_size,
        content,
        tuple(sorted(xattrs)),
    )


def make_torture_tree(top: Path, *, many: int = 2000, sparse: int = 200 << 20) -> None:
    """Everything that a file can be."""
    (top / "plain").write_text("hello\n")
    (top / "empty").touch()
    for size in (1, 4095, 4096, 4097, 8192, 70_000):
        (top / f"bytes-{size}").write_bytes(os.urandom(size))
    with (top / "sparse").open("wb") as file:
        file.truncate(sparse)
        file.seek(sparse // 2)
        file.write(b"in the midst")
    (top / "linked").hardlink_to(top / "plain")
    for length in (1, 3900, 3990, 4095):
        (top / f"symlink-{length}").symlink_to("t" * length)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "socket", 0o755 | stat.S_IFSOCK)  # anybody may: mknod(2)
    names = os.fsencode(top / "names")
    os.mkdir(names)
    odd = (b"\xff\xfe", b"!", b"-", b"\1", b"\n", b".hidden", b"..x", b"...", b"a" * 255)
    for name in odd:
        Path(os.fsdecode(names + b"/" + name)).touch()
    (top / "directory").mkdir(mode=0o750)
    (top / "directory" / "again").hardlink_to(top / "plain")
    (top / "many").mkdir()
    for number in range(many):
        (top / "many" / f"{number:x}{'n' * (number % 40)}").touch()
    deep = top / "deep"
    for _ in range(30):
        deep.mkdir()
        deep /= "deeper"
    os.setxattr(top / "empty", "user.nothing", b"")
    os.setxattr(top / "empty", "user." + "n" * 200, os.urandom(3000))
    os.setxattr(top / "directory", "user.of-a-directory", b"\0\1")
    for number, path in enumerate(sorted(top.rglob("*"))):
        when = (number - 20) * 1_000_000_007
        os.utime(path, ns=(0, when), follow_symlinks=False)
    (top / "plain").chmod(0o644)
    if os.geteuid() == 0:
        os.chown(top / "plain", 70_000, 4_000_000_000)
        (top / "plain").chmod(0o6755)
        os.mknod(top / "device", 0o620 | stat.S_IFCHR, os.makedev(4095, 1_048_575))
        os.mknod(top / "disk", 0o600 | stat.S_IFBLK, os.makedev(8, 300))
        os.setxattr(top / "directory", "trusted.t", b"t")
        os.setxattr(top / "bytes-1", "security.capability", CAPABILITY)
        os.setxattr(top / "bytes-1", "system.posix_acl_access", ACL)
        os.setxattr(top / "directory", "system.posix_acl_default", ACL)
