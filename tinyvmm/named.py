"""NamedTuple for classes that every start makes; to type checkers it is typing's.

That compiles a constructor for each class, and each annotation that is a string: 0.1 ms a class, of
which a run has forty before its guest's first instruction. Here a class costs a tenth of that. The
price is a constructor that takes twice as long, so what is made for each request is typing's. So is
all where annotations are not in a class's namespace any more: from Python 3.14 on (PEP 649).

Imports nothing of ours, and knows no threads.
"""

import sys
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.version_info >= (3, 14):
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 (for others to import from here)
else:
    _PLACES = [property(itemgetter(place)) for place in range(64)]

    class _Fields(type):
        """Makes annotated names the places of a tuple, and their values its defaults."""

        def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
            fields = tuple(namespace.get("__annotations__", ()))
            if len(fields) > len(_PLACES):
                raise TypeError(f"{name} has more than {len(_PLACES)} fields")
            namespace["_field_defaults"] = {
                field: namespace[field] for field in fields if field in namespace
            }
            namespace.update(zip(fields, _PLACES, strict=False))
            namespace.update(__slots__=(), _fields=fields, __match_args__=fields)
            return type.__new__(cls, name, bases, namespace)

    class NamedTuple(tuple, metaclass=_Fields):
        """A tuple with a name for each place, as typing.NamedTuple makes them."""

        __slots__ = ()

        def __new__(cls, *values: Any, **named: Any) -> tuple:
            """Take every field without a default, by position or by name; TypeError otherwise."""
            fields = cls._fields
            if named or len(values) != len(fields):
                placed = dict(zip(fields, values, strict=False))
                given = {**cls._field_defaults, **placed, **named}
                if len(values) > len(fields) or placed.keys() & named or len(given) > len(fields):
                    raise TypeError(f"{cls.__name__} takes {', '.join(fields)}, each once")
                try:
                    values = [given[field] for field in fields]
                except KeyError as error:
                    raise TypeError(f"{cls.__name__}: {error} is missing") from None
            return tuple.__new__(cls, values)

        @classmethod
        def _make(cls, values: Any) -> tuple:
            return cls(*values)

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **named: Any) -> tuple:
            return type(self)(**(self._asdict() | named))

        def __getnewargs__(self) -> tuple:
            return tuple(self)

        def __repr__(self) -> str:
            pairs = [f"{name}={value!r}" for name, value in self._asdict().items()]
            return f"{type(self).__name__}({', '.join(pairs)})"
