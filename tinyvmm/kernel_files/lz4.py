"""An LZ4 decoder for what kernels are packed with: the legacy frame format.

Follows the LZ4 block format and the "legacy frame" section of the LZ4 frame format. A legacy frame
is a magic number and then blocks, each of 8 MiB decompressed save the last, each preceded by its
compressed length. The kernel's own reader (lib/decompress_unlz4.c) skips the magic wherever a
length could stand, and so do we: `lz4` writes it anew for each input it concatenates.

A block is a run of sequences: a token, literals to copy from the input, and a match to copy from
what was already decoded. A sequence costs a microsecond here, a kernel has a few million.
"""

LEGACY_MAGIC = 0x184C_2102
LEGACY_BLOCK_SIZE = 8 << 20
MIN_MATCH = 4


class Lz4Error(ValueError):
    """The input is not what an LZ4 compressor writes."""


def decompress_legacy(data: bytes | memoryview, size_max: int) -> bytes:
    """Decode a legacy frame; Lz4Error if it is damaged or holds more than `size_max` bytes."""
    source = bytes(data)
    if source[:4] != LEGACY_MAGIC.to_bytes(4, "little"):
        raise Lz4Error("no LZ4 legacy magic number")
    blocks = []
    left = size_max
    position = 4
    while len(source) - position >= 4:
        block_len = int.from_bytes(source[position : position + 4], "little")
        position += 4
        if block_len == LEGACY_MAGIC:
            continue
        if block_len == 0:
            break
        if block_len > len(source) - position:
            raise Lz4Error("a block reaches past the end")
        block = source[position : position + block_len]
        blocks.append(decompress_block(block, min(left, LEGACY_BLOCK_SIZE)))
        left -= len(blocks[-1])
        position += block_len
    return b"".join(blocks)


def decompress_block(source: bytes, size_max: int) -> bytes:
    """Decode one block of at most `size_max` decompressed bytes; Lz4Error if it is damaged."""
    output = bytearray()
    position = 0
    end = len(source)
    try:
        while True:
            token = source[position]
            position += 1
            literal_len = token >> 4
            if literal_len:
                if literal_len == 15:
                    while (more := source[position]) == 255:
                        literal_len += 255
                        position += 1
                    literal_len += more
                    position += 1
                output += source[position : position + literal_len]
                position += literal_len
            if position >= end:
                break  # the last sequence is literals only
            distance = source[position] | source[position + 1] << 8
            position += 2
            match_len = (token & 15) + MIN_MATCH
            if match_len == 15 + MIN_MATCH:
                while (more := source[position]) == 255:
                    match_len += 255
                    position += 1
                match_len += more
                position += 1
                if match_len > size_max:
                    raise Lz4Error("more data than announced")
            start = len(output) - distance
            if start < 0 or not distance:
                raise Lz4Error("a match reaches before the start of its block")
            if distance >= match_len:
                output += output[start : start + match_len]
            else:  # the match overlaps what it writes: its last `distance` bytes repeat
                pattern = output[start:]
                output += (pattern * (match_len // distance + 1))[:match_len]
            if len(output) > size_max:
                break
    except IndexError:
        raise Lz4Error("the block ends within a sequence") from None
    if position > end:
        raise Lz4Error("literals reach past the end of the block")
    if len(output) > size_max:
        raise Lz4Error("more data than announced")
    return bytes(output)
