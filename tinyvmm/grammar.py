# ruff: noqa: S102 - the functions made here come from our own grammars alone, never from input
"""Wire grammars: a record is one line of grammar and its fields; encoding and decoding follow.

A record is a class whose docstring begins with its grammar, in the notation of Plan 9's section 5
of the manual, and whose annotations name and type the same fields for readers and type checkers:

    class Dirent(Record):
        "qid[13] offset[8] type[1] name[s]"

        qid: Qid
        offset: int
        ...

The notation: `fid[4]` is an unsigned little-endian integer of 4 bytes; `name[s]` a string, two
bytes of length and that many bytes; `qid[13]` a qid; `nwname[2] nwname*(wname[s])` a counted list,
always the last field; `count[4] data[count]` counted bytes; `stat[n]` two bytes of length and a
record of that length. `size[2]` at the front of a record is the length of what follows it. A count
is not a field: it follows from what it counts. `n_uname[4]{.u,.L}` is on the wire in those dialects
only; elsewhere the field has its default, and may have no other value. A message is a record whose
grammar begins with the head they all share, `size[4] Name tag[2]`.

From the grammar this module writes the two functions that a person would write by hand, integers
that stand together taken by one struct, and runs the text through `exec`: twice as quick as
walking the grammar for each message. `encoder_text` and `decoder_text` show what they do.

No I/O, no policy, and nothing but functions of their arguments: any thread may call anything.
"""

import struct
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform


class ProtocolError(ValueError):
    """Bytes that are no message, or a message that no bytes can carry."""


class Qid(NamedTuple):
    """The server's identity of a file, type[1] version[4] path[8] on the wire."""

    type: int
    version: int
    path: int


QID = struct.Struct("<BIQ")
HEADER = struct.Struct("<IBH")  # size[4] type[1] tag[2]


_PLACES = [property(itemgetter(place)) for place in range(24)]


@dataclass_transform(frozen_default=True)
class Record(tuple[Any, ...]):
    """Fields on the wire, by name or position; the docstring of a subclass is its grammar."""

    __slots__ = ()
    fields: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[tuple[Any, ...]] = ()  # of the last fields

    def __init_subclass__(cls) -> None:
        """Give each annotated field its place in the tuple, and note its default."""
        cls.fields = tuple(cls.__annotations__)
        cls.defaults = tuple([vars(cls)[name] for name in cls.fields if name in vars(cls)])
        for place, name in enumerate(cls.fields):
            setattr(cls, name, _PLACES[place])

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Take every field without a default, by position or by name; TypeError otherwise."""
        fields = cls.fields
        if len(values) != len(fields) or named:
            rest = fields[len(values) :]
            given = dict(zip(fields[len(fields) - len(cls.defaults) :], cls.defaults, strict=True))
            given.update(named)
            if len(values) > len(fields) or not set(named) <= set(rest) <= set(given):
                raise TypeError(f"{cls.__name__} takes {', '.join(fields)}")
            values += tuple([given[name] for name in rest])
        return tuple.__new__(cls, values)

    def replace(self, **named: Any) -> Self:
        """The same with some fields changed."""
        return type(self)(**(dict(zip(self.fields, self, strict=True)) | named))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), tuple(self)))

    def __repr__(self) -> str:
        pairs = [f"{name}={_show(value)}" for name, value in zip(self.fields, self, strict=True)]
        return f"{type(self).__name__}({', '.join(pairs)})"


def _show(value: Any) -> str:
    if isinstance(value, list) or (isinstance(value, bytes) and len(value) > 300):
        size = sum([len(view) for view in value]) if isinstance(value, list) else len(value)
        return f"<{size} bytes>"
    return repr(value)


# --- reading a grammar ----------------------------------------------------------------------

_INTEGERS = {"1": "B", "2": "H", "4": "I", "8": "Q"}
_COUNTS = {"string": "H", "record": "H", "data": "I", "strings": "H", "qids": "H"}


class _Field(NamedTuple):
    name: str
    kind: str  # B H I Q qid, or one of _COUNTS


class Grammar:
    """One record's grammar as one dialect has it."""

    def __init__(self, record: type[Record], suffix: str) -> None:
        """Read it; AssertionError if it disagrees with the annotations."""
        self.record = record
        self.name = record.__name__
        self.present: list[_Field] = []
        self.absent: list[str] = []  # what this dialect leaves out
        words = (record.__doc__ or "").partition("\n\n")[0].split()
        self.message = words[1:3] == [self.name, "tag[2]"]
        self.sized = words[:1] == ["size[2]"]
        del words[: 3 if self.message else self.sized]

        names: list[str] = []
        for word in words:
            item, _, dialects = word.rstrip("}").partition("{")
            repeated, _, item = item.rpartition("*")  # nwname*(wname[s])
            name, _, kind = item.strip("()").rstrip("]").partition("[")
            if repeated or (names and kind == names[-1]):
                self.present.pop()  # the count
                names.pop()
                kind = {"s": "strings", "13": "qids"}[kind] if repeated else "data"
            else:
                kind = _INTEGERS.get(kind) or {"s": "string", "13": "qid", "n": "record"}[kind]
            names.append(name)
            if not dialects or suffix in dialects.split(","):
                self.present.append(_Field(name, kind))
            else:
                self.absent.append(name)
        if tuple(names) != record.fields:  # python -OO drops docstrings
            raise AssertionError(f"{self.name}: grammar {names}, fields {record.fields}")
        if not set(self.absent) <= set(names[len(names) - len(record.defaults) :]):
            raise AssertionError(f"{self.name}: no default for {self.absent}")
        if any(field.kind in {"strings", "qids"} for field in self.present[:-1]):
            raise AssertionError(f"{self.name}: a list is not the last field")

    def runs(self) -> list[tuple[str, list[str], _Field | None]]:
        """The fields as runs: a struct's format, its integers' names, then what the last counts."""
        runs: list[tuple[str, list[str], _Field | None]] = []
        code, names = "<", list[str]()
        for field in self.present:
            if field.kind in _COUNTS:
                runs.append((code + _COUNTS[field.kind], names, field))
                code, names = "<", []
            elif field.kind == "qid":
                code += "BIQ"
                names += [f"{field.name}_{part}" for part in Qid._fields]
            else:
                code += field.kind
                names.append(field.name)
        if names or not runs:
            runs.append((code, names, None))
        return runs

    def default(self, name: str) -> str:
        """The default of a field, as Python writes it."""
        fields = self.record.fields
        return repr(self.record.defaults[fields.index(name) - len(fields)])


# --- writing the functions ------------------------------------------------------------------
# Names of fields stand as they are in the text; everything else begins with an underscore or is
# one of the namespace's. What is read may end too early: then a struct is short (struct.error), an
# index is (IndexError), or the last line finds that the places do not meet.

Encode = Callable[[Any, int], bytes]  # message, tag
Decode = Callable[[bytes], tuple[int, Any]]  # gives tag, message
Put = Callable[[Any], bytes]  # record
Take = Callable[[bytes], list[Any]]  # gives records

_SHORT = [length.to_bytes(2, "little") for length in range(256)]


def encoder_text(grammar: Grammar) -> str:
    """The function that writes a message (or, with no tag, a record)."""
    fields = grammar.record.fields
    lines = [f"def encode(_record{', _tag' if grammar.message else ''}):"]
    if fields:
        lines.append(f"    {', '.join(fields)}, = _record")
    for name in grammar.absent:
        lines.append(f"    if {name} != {grammar.default(name)}:")
        lines.append(f"        raise ProtocolError('{grammar.name}: no {name} in this dialect')")
    for name, kind in grammar.present:
        if kind == "qid":
            lines.append(f"    {', '.join([f'{name}_{part}' for part in Qid._fields])} = {name}")
        elif kind == "data":
            lines.append(f"    if isinstance({name}, list):")
            lines.append(f"        {name} = b''.join({name})")
        elif kind == "record":
            lines.append(f"    {name} = put_{name}({name})")
        elif kind == "strings":
            lines.append("    _list = b''")
            lines.append(f"    for _item in {name}:")
            lines.append("        _n = len(_item)")
            lines.append("        _list += (short[_n] if _n < 256 else long(_n)) + _item")
        elif kind == "qids":
            lines.append("    _list = b''")
            lines.append(f"    for _item in {name}:")
            lines.append("        _list += pack_qid(*_item)")

    total = HEADER.size if grammar.message else 0
    sizes: list[str] = []
    pieces: list[str] = []
    for place, (code, names, counted) in enumerate(grammar.runs()):
        total += struct.calcsize(code)
        values = names[:]
        if counted is not None:
            listed = counted.kind in {"strings", "qids"}
            sizes.append("len(_list)" if listed else f"len({counted.name})")
            values.append(f"len({counted.name})")
        pieces.append(f"pack{place}({', '.join(values)})")
        if counted is not None:
            pieces.append("_list" if listed else counted.name)
    whole = " + ".join([str(total), *sizes])
    first = f"{whole}, number, _tag, " if grammar.message else f"{whole}, " * grammar.sized
    text = " + ".join(pieces).replace("pack0(", "pack0(" + first, 1) or "b''"
    return "\n".join([*lines, f"    return {text}"])


def decoder_text(grammar: Grammar) -> str:
    """The function that reads a message, or all records of the bytes it is given."""
    message, runs = grammar.message, grammar.runs()
    if message:
        lines, indent, end = ["def decode(_wire):"], "    ", str(HEADER.size)
        head = ["_size", "_tag"]
    else:
        lines = ["def decode(_wire):", "    _records = []", "    _at = 0"]
        lines.append("    while _at < len(_wire):")
        indent, end = " " * 8, "_at"  # `end` is where reading goes on, as text
        head = ["_size"] * grammar.sized
    body: list[str] = []
    if grammar.sized:
        body.append("_begin = _at + 2")
    for place, (code, names, counted) in enumerate(runs):
        size = struct.calcsize(code)
        taken = names + ["_n"] * (counted is not None)
        if not place:
            taken = head + taken
            size += 2 * grammar.sized
        at = "" if message and not place else f", {end}"
        if taken:
            body.append(f"{', '.join(taken)}, = unpack{place}(_wire{at})")
        if message and not place:
            start = end = str(HEADER.size + size)
        else:
            body.append(f"_start = _at + {size}")
            start = end = "_start"
        if counted is None:
            continue
        name, kind = counted
        end = "_at"
        if kind == "strings":
            body += [
                f"_at = {start}",
                f"{name} = []",
                "while _at < _size:",
                "    _start = _at + 2",
                "    _at = _start + _wire[_at] + (_wire[_at + 1] << 8)",
                f"    {name}.append(_wire[_start:_at])",
                f"if len({name}) != _n:",
                f"    raise ProtocolError('{grammar.name}: miscounted')",
                f"{name} = tuple({name})",
            ]
        elif kind == "qids":
            body.append(f"_at = {start} + _n * {QID.size}")
            body.append(f"{name} = tuple(map(make_qid, unpack_qids(_wire[{start}:_at])))")
        elif kind == "record":
            body.append(f"_at = {start} + _n")
            body.append(f"{name} = one_{name}(_wire[{start}:_at])")
        else:
            body.append(f"_at = {start} + _n")
            body.append(f"{name} = _wire[{start}:_at]")

    values = []
    qids = {field.name for field in grammar.present if field.kind == "qid"}
    for name in grammar.record.fields:
        if name in grammar.absent:
            values.append(grammar.default(name))
        elif name in qids:
            parts = [f"{name}_{part}" for part in Qid._fields]
            values.append(f"new(Qid, ({', '.join(parts)}))")
        else:
            values.append(name)
    record = f"new(record, ({', '.join(values)}{',' * bool(values)}))"
    wrong = f"raise ProtocolError('{grammar.name}: lengths that do not agree')"
    if message:
        whole = len(runs) == 1 and runs[0][2] is None  # unpack0 has seen to the length
        body.append(f"if _size != {end}:" if whole else f"if not {end} == _size == len(_wire):")
        body += [f"    {wrong}", f"return _tag, {record}"]
        return "\n".join([*lines, *[indent + line for line in body]])
    if grammar.sized:
        body += [f"if {end} != _begin + _size:", f"    {wrong}"]
    body += [f"_at = {end}"] * (end != "_at")
    body.append(f"_records.append({record})")
    lines += [indent + line for line in body]
    return "\n".join(
        [*lines, "    if _at != len(_wire):", f"        {wrong}", "    return _records"]
    )


def _namespace(grammar: Grammar) -> dict[str, Any]:
    names = {
        "ProtocolError": ProtocolError,
        "Qid": Qid,
        "long": _long,
        "make_qid": partial(tuple.__new__, Qid),
        "new": tuple.__new__,
        "number": getattr(grammar.record, "number", 0),
        "pack_qid": QID.pack,
        "record": grammar.record,
        "short": _SHORT,
        "unpack_qids": QID.iter_unpack,
    }
    runs = grammar.runs()
    whole = grammar.message and len(runs) == 1 and runs[0][2] is None
    head = HEADER.format if grammar.message else "<" + "H" * grammar.sized
    for place, (code, _, _) in enumerate(runs):
        writing = reading = struct.Struct(code if place else head + code[1:])
        if grammar.message and not place:
            reading = struct.Struct("<IxH" + code[1:])  # the type is known by now
        names[f"pack{place}"] = writing.pack
        names[f"unpack{place}"] = reading.unpack if whole else reading.unpack_from
    return names


def _long(length: int) -> bytes:
    return length.to_bytes(2, "little")


def _one(take: Take) -> Callable[[bytes], Any]:
    def one(wire: bytes) -> Any:
        records = take(wire)
        if len(records) != 1:
            raise ProtocolError(f"{len(records)} records where one belongs")
        return records[0]

    return one


def encoder(record: type[Record], suffix: str) -> Any:
    """The function that encodes a record in a dialect: an `Encode`, or a `Put`."""
    grammar = Grammar(record, suffix)
    names = _namespace(grammar)
    for name, kind in grammar.present:
        if kind == "record":
            names[f"put_{name}"] = encoder(record.__annotations__[name], suffix)
    exec(encoder_text(grammar), names)
    return names["encode"]


def decoder(record: type[Record], suffix: str) -> Any:
    """The function that decodes a record in a dialect: a `Decode`, or a `Take`."""
    grammar = Grammar(record, suffix)
    names = _namespace(grammar)
    for name, kind in grammar.present:
        if kind == "record":
            names[f"one_{name}"] = _one(decoder(record.__annotations__[name], suffix))
    exec(decoder_text(grammar), names)
    return names["decode"]
