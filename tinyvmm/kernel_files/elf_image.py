"""ELF executables of 32 and 64 bits, read for what a loader needs: segments, entry and notes.

Follows the System V ABI, chapters 4 and 5 ("ELF Header", "Program Header", "Note Section"). Nothing
in the file is trusted: every offset and count is checked against what there is.
"""

from itertools import pairwise
from struct import Struct, unpack_from
from typing import NamedTuple

ELF_MAGIC = b"\x7fELF"
ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4

# e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum
_EHDR = {ELFCLASS32: Struct("<16xHHIIIIIHHH"), ELFCLASS64: Struct("<16xHHIQQQIHHH")}
_PHDR32 = Struct("<8I")  # p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align
_PHDR64 = Struct("<IIQQQQQQ")  # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz...


class ElfError(ValueError):
    """What is wrong with an ELF file, to go behind "it"."""


class Load(NamedTuple):
    """A PT_LOAD segment: `length` bytes at `offset`, then zeros up to `memory_len`, at `gpa`."""

    gpa: int
    offset: int
    length: int
    memory_len: int


class Note(NamedTuple):
    """One entry of a PT_NOTE segment."""

    name: bytes
    type: int
    desc: bytes


class ElfImage(NamedTuple):
    """An executable's segments (by rising address), its entry point, and its notes."""

    loads: tuple[Load, ...]
    entry: int
    notes: tuple[Note, ...]


def parse(data: bytes) -> ElfImage:
    """Read an executable for x86; ElfError if it is none, or contradicts itself."""
    if data[:4] != ELF_MAGIC:
        raise ElfError("is no ELF file")
    if len(data) < 6 or data[4] not in _EHDR or data[5] != ELFDATA2LSB:
        raise ElfError("is an ELF file of no known kind")
    is_64 = data[4] == ELFCLASS64
    header = _EHDR[data[4]]
    if len(data) < header.size:
        raise ElfError("is cut short")
    e_type, machine, _, entry, phoff, _, _, _, phentsize, phnum = header.unpack_from(data)
    if machine not in {EM_386, EM_X86_64}:
        raise ElfError("is an ELF file, but not for x86")
    phdr = _PHDR64 if is_64 else _PHDR32
    if e_type not in {ET_EXEC, ET_DYN} or phentsize != phdr.size or not phnum:
        raise ElfError("is no executable")
    if phoff + phnum * phdr.size > len(data):
        raise ElfError("is cut short")
    loads: list[Load] = []
    notes: list[Note] = []
    for index in range(phnum):
        fields = phdr.unpack_from(data, phoff + index * phdr.size)
        if is_64:
            p_type, _, offset, _, paddr, filesz, memsz, _ = fields
        else:
            p_type, offset, _, paddr, filesz, memsz, _, _ = fields
        if p_type not in {PT_LOAD, PT_NOTE}:
            continue
        if offset + filesz > len(data):
            raise ElfError("is cut short")
        if p_type == PT_NOTE:
            notes += _notes(data[offset : offset + filesz])
        elif memsz:
            if filesz > memsz:
                raise ElfError("has a segment larger than its memory")
            loads.append(Load(paddr, offset, filesz, memsz))
    loads.sort()
    for before, after in pairwise(loads):
        if before.gpa + before.memory_len > after.gpa:
            raise ElfError(f"has two segments at {after.gpa:#x}")
    if not loads:
        raise ElfError("has nothing to load")
    return ElfImage(tuple(loads), entry, tuple(notes))


def _notes(data: bytes) -> list[Note]:
    """The notes in a segment, as far as they make sense."""
    found = []
    at = 0
    while at + 12 <= len(data):
        namesz, descsz, kind = unpack_from("<III", data, at)
        name_at = at + 12
        desc_at = name_at + (namesz + 3 & ~3)
        at = desc_at + (descsz + 3 & ~3)
        if desc_at + descsz > len(data):
            break
        name = data[name_at : name_at + namesz]
        found.append(Note(name, kind, data[desc_at : desc_at + descsz]))
    return found
