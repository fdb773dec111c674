"""EROFS on disk: fs/erofs/erofs_fs.h, the uncompressed part. Values to bytes; no files here.

    block 0              the superblock, at byte 1024
    from meta_blkaddr    the metadata: an inode's number (nid) is its place here, in units of 32
    anywhere             whole blocks of data, found by an inode's raw_blkaddr

An inode is `struct erofs_inode_extended`: 64 bytes, then its extended attributes, then, with the
layout FLAT_INLINE, the last part of its data if that ends in the same block. The compact inode of
32 bytes is not used, as it has no times and 16-bit owners. Everything is little-endian.
"""

import struct
from collections.abc import Iterable, Sequence
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK

BLOCK = 4096
BLOCK_BITS = 12
SLOT = 32  # a nid counts these
INODE_LEN = 64
NAME_MAX = 255  # EROFS_NAME_LEN
BLOCKS_MAX = 1 << 32  # block addresses are 32-bit numbers
SUPER_OFFSET = 1024  # EROFS_SUPER_OFFSET
SUPER_MAGIC = 0xE0F5_E1E2  # EROFS_SUPER_MAGIC_V1

COMPAT_SB_CHKSUM = 0x1
COMPAT_MTIME = 0x2
FLAT_PLAIN, FLAT_INLINE = 0, 2
_EXTENDED = 1  # EROFS_INODE_LAYOUT_EXTENDED
_LAYOUT_SHIFT = 1  # EROFS_I_DATALAYOUT_BIT

FILE_TYPES = {
    S_IFREG: 1,
    S_IFDIR: 2,
    S_IFCHR: 3,
    S_IFBLK: 4,
    S_IFIFO: 5,
    S_IFSOCK: 6,
    S_IFLNK: 7,
}
"""S_IFMT to `file_type` of a dirent: the kernel's FT_* (include/linux/fs_types.h)."""

XATTR_PREFIXES = (
    # the longer ones first: name prefix, EROFS_XATTR_INDEX_*, whether it is the whole name
    (b"system.posix_acl_access", 2, True),
    (b"system.posix_acl_default", 3, True),
    (b"user.", 1, False),
    (b"trusted.", 4, False),
    (b"security.", 6, False),
)
XATTR_VALUE_MAX = 0xFFFF

# magic, checksum, compat, blkszbits, sb_extslots, root_nid, inos, build_time, build_time_nsec,
# blocks, meta_blkaddr, xattr_blkaddr, uuid, volume_name, incompat; what follows is 0
_super = struct.Struct("<IIIBBHQQIIII16s16sI44x")
# i_format, i_xattr_icount, i_mode, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink
INODE = struct.Struct("<HHH2xQIIIIqII16x")
_dirent = struct.Struct("<QHBx")
_xattr_entry = struct.Struct("<BBH")
_XATTR_HEADER_LEN = 12  # struct erofs_xattr_ibody_header

PLAIN_FORMAT = FLAT_PLAIN << _LAYOUT_SHIFT | _EXTENDED
INLINE_FORMAT = FLAT_INLINE << _LAYOUT_SHIFT | _EXTENDED


def superblock(
    *, root_nid: int, inodes: int, blocks: int, meta_block: int, uuid: bytes, name: bytes = b""
) -> bytes:
    """Return block 0: `blocks` are all there are, `meta_block` is where the metadata begins."""

    def packed(checksum: int) -> bytes:
        compat = COMPAT_SB_CHKSUM | COMPAT_MTIME
        fields = (SUPER_MAGIC, checksum, compat, BLOCK_BITS, 0, root_nid, inodes, 0, 0)
        more = (min(blocks, BLOCKS_MAX - 1), meta_block, 0, uuid, name, 0)
        return _super.pack(*fields, *more).ljust(BLOCK - SUPER_OFFSET, b"\0")

    return bytes(SUPER_OFFSET) + packed(crc32c(packed(0)))


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, B.4), begun with ones and, as EROFS has it, not inverted at the end."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc


def device_number(rdev_major: int, rdev_minor: int) -> int:
    """Encode a device number as `new_encode_dev` of <linux/kdev_t.h> does."""
    return rdev_minor & 0xFF | rdev_major << 8 | (rdev_minor & ~0xFF) << 12


# --- extended attributes ----------------------------------------------------------------------


def xattr_index(name: bytes) -> tuple[int, bytes] | None:
    """Return the name's index and the rest of it; None for one that EROFS cannot hold."""
    for prefix, index, whole in XATTR_PREFIXES:
        if name == prefix if whole else name.startswith(prefix):
            return index, name[len(prefix) :]
    return None


def xattr_body(attributes: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the attributes (name, value) as they follow an inode; b"" if there are none.

    ValueError for one that EROFS cannot hold. ACLs have the form that getxattr(2) gives.
    """
    body = bytearray()
    for name, value in attributes:
        found = xattr_index(name)
        if found is None or len(found[1]) > NAME_MAX or len(value) > XATTR_VALUE_MAX:
            raise ValueError(f"EROFS cannot hold the extended attribute {name!r}")
        index, rest = found
        body += _xattr_entry.pack(len(rest), index, len(value)) + rest + value
        body += bytes(-len(body) % 4)
    return bytes(_XATTR_HEADER_LEN) + bytes(body) if body else b""


def xattr_count(body_len: int) -> int:
    """Return i_xattr_icount for a body of so many bytes."""
    return 1 + (body_len - _XATTR_HEADER_LEN) // 4 if body_len else 0


# --- directories ------------------------------------------------------------------------------


def split_names(names: Sequence[bytes]) -> tuple[list[int], int]:
    """Cut the sorted `names` into blocks: how many are in each, and the bytes of the last."""
    counts, count, used = [], 0, 0
    for name in names:
        need = _dirent.size + len(name)
        if used + need > BLOCK:
            counts.append(count)
            count = used = 0
        count += 1
        used += need
    return [*counts, count], used


def directory_data(
    names: Sequence[bytes], nids: Sequence[int], types: Sequence[int], counts: Sequence[int]
) -> bytes:
    """Return a directory's content: sorted entries, `.` and `..` among them, by `split_names`.

    In a block the entries come first, then their names, the last of which ends with the block or
    at a NUL; the first entry's nameoff tells how many there are.
    """
    data = bytearray()
    at = 0
    pack = _dirent.pack
    for count in counts:
        data += bytes(-len(data) % BLOCK)
        end = at + count
        offset = _dirent.size * count
        entries = []
        for name, nid, file_type in zip(names[at:end], nids[at:end], types[at:end], strict=True):
            entries.append(pack(nid, offset, file_type))
            offset += len(name)
        data += b"".join(entries)
        data += b"".join(names[at:end])
        at = end
    return bytes(data)
