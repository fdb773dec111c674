"""Unpacking a bzImage's payload on the host: compressed bytes in, an ELF vmlinux out.

The kernel's build appends the decompressed size to the payload as four little-endian bytes
(scripts/Makefile.lib, `size_append`; gzip ends so by itself). Decoders get that size as their
limit, so a damaged or hostile payload cannot ask for more memory than it announces.

A decoder is imported when its format is met: a cached kernel needs none of them.
"""

from collections.abc import Callable

from tinyvmm.errors import ConfigError
from tinyvmm.kernel_image import Segment, damaged
from tinyvmm.layout import PAGE_SIZE

VMLINUX_SIZE_MAX = 1 << 30
XZ_MEMORY_MAX = 512 << 20  # the kernel's build uses dictionaries of 32 MiB (scripts/xz_wrap.sh)
ZERO_GAP = 1 << 16  # shorter runs of zeros cost less to copy than another system call


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
    from tinyvmm import lz4

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


def unpack(path: str, payload: bytes) -> bytes:
    """Return the vmlinux in `payload`, which has a decoder; ConfigError if it is damaged."""
    decoder = find_decoder(payload)
    size = int.from_bytes(payload[-4:], "little")
    if decoder is None or size > VMLINUX_SIZE_MAX:
        raise damaged(path, f"its payload announces {size >> 20} MiB")
    try:
        vmlinux = decoder(payload, size)
    except MemoryError:
        raise ConfigError(f"kernel {path}: not enough memory to unpack {size >> 20} MiB") from None
    except Exception as error:  # noqa: BLE001 - each decoder has exceptions of its own
        raise damaged(path, f"its payload does not unpack ({error})") from None
    if len(vmlinux) != size:
        raise damaged(path, f"its payload unpacks to {len(vmlinux)} bytes of {size}")
    return vmlinux


def skip_zeros(data: bytes, segments: tuple[Segment, ...], count_max: int) -> tuple[Segment, ...]:
    """Return the parts of `segments` worth copying into RAM that is zero: at most `count_max`.

    Half of a distribution's vmlinux is zeros: room for .bss, padding between sections.
    """
    gap = ZERO_GAP
    while True:
        parts = [part for segment in segments for part in _nonzero_parts(data, segment, gap)]
        if len(parts) <= count_max:
            return tuple(parts)
        if gap > len(data):
            return segments
        gap *= 2


def _nonzero_parts(data: bytes, segment: Segment, gap: int) -> list[Segment]:
    """Split a segment at runs of zero pages longer than `gap` bytes."""
    zeros = bytes(PAGE_SIZE)
    view = memoryview(data)[segment.offset : segment.offset + segment.length]
    runs: list[list[int]] = []
    for start in range(0, segment.length, PAGE_SIZE):
        page = view[start : start + PAGE_SIZE]
        if page == zeros[: len(page)]:
            continue
        end = start + len(page)
        if runs and start - runs[-1][1] <= gap:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    return [Segment(segment.gpa + a, segment.offset + a, b - a) for a, b in runs]


def _has_zstd() -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec("compression.zstd") is not None
    except ModuleNotFoundError:
        return False
