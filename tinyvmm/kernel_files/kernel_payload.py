"""Unpacking a bzImage's payload on the host: compressed bytes in, an ELF vmlinux out.

The kernel's build appends the decompressed size to the payload as four little-endian bytes
(scripts/Makefile.lib, `size_append`; gzip ends so by itself). Decoders get that size as their
limit, so a damaged or hostile payload cannot ask for more memory than it announces.

A decoder is imported when its format is met: a cached kernel needs none of them.
"""

from collections.abc import Callable

VMLINUX_SIZE_MAX = 1 << 30
XZ_MEMORY_MAX = 512 << 20  # the kernel's build uses dictionaries of 32 MiB (scripts/xz_wrap.sh)


class PayloadError(ValueError):
    """A payload that is not what its first bytes promise."""


def _gunzip(data: bytes, size: int) -> bytes:
    import zlib

    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(data, size)


def _bunzip2(data: bytes, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(data, size)


def _unxz(data: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_MAX).decompress(data, size)


def _unlzma(data: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=XZ_MEMORY_MAX).decompress(data, size)


def _unlz4(data: bytes, size: int) -> bytes:
    from tinyvmm.kernel_files import lz4

    return lz4.decompress_legacy(data[:-4], size)


def _unzstd(data: bytes, size: int) -> bytes:
    import importlib

    zstd = importlib.import_module("compression.zstd")  # Python 3.14
    return bytes(zstd.ZstdDecompressor().decompress(data, size))


Decoder = Callable[[bytes, int], bytes]

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
DECODERS: dict[bytes, Decoder] = {
    # the payload's first bytes, as in the kernel's lib/decompress.c
    b"\x1f\x8b": _gunzip,
    b"BZh": _bunzip2,
    b"\xfd7zXZ\0": _unxz,
    b"\x5d\0\0": _unlzma,
    b"\x02\x21\x4c\x18": _unlz4,
    ZSTD_MAGIC: _unzstd,
}


def find_decoder(payload: bytes) -> Decoder | None:
    """Return what unpacks `payload`; None for LZO, the unknown, and zstd before Python 3.14."""
    for magic, decoder in DECODERS.items():
        if payload.startswith(magic):
            return decoder if magic != ZSTD_MAGIC or _has_zstd() else None
    return None


def unpack(payload: bytes) -> bytes:
    """Return the vmlinux in `payload`, for which there is a decoder; PayloadError if damaged."""
    decoder = find_decoder(payload)
    size = int.from_bytes(payload[-4:], "little")
    if decoder is None or not 0 < size <= VMLINUX_SIZE_MAX:  # to zlib, 0 is no limit
        raise PayloadError(f"announces {size} bytes")
    try:
        vmlinux = decoder(payload, size)
    except Exception as error:
        # each decoder has exceptions of its own; out of memory is among them
        raise PayloadError(f"does not unpack ({error or type(error).__name__})") from error
    if len(vmlinux) != size:
        raise PayloadError(f"unpacks to {len(vmlinux)} bytes of {size}")
    return vmlinux


def _has_zstd() -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec("compression.zstd") is not None
    except ModuleNotFoundError:
        return False
