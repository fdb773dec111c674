"""What the control socket's methods take and give, as JSON Schema, from their own annotations.

A method is a Python function with keyword-only parameters; its annotations say what it takes, and
`Annotated[int, limits(minimum=0)]` says more of it in JSON Schema's words. What it gives is
annotated too, a TypedDict saying each key. From these come the check of each call (`problem_of`),
the answer to `rpc.discover` (OpenRPC's name for it), and by tests/control_docs.py the file
docs/control.schema.json and the reference in docs/control.md.

Understood of JSON Schema 2020-12: type, anyOf, enum, minimum, maximum, maxLength, minItems,
maxItems, items, properties, required, additionalProperties.
"""

import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, is_typeddict

Schema = dict[str, Any]

_TYPES: dict[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    None: {"type": "null"},
    type(None): {"type": "null"},
    Any: {},
}
_PYTHON: dict[str, Any] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}


def limits(**words: Any) -> tuple[tuple[str, Any], ...]:
    """Say more of a type, in JSON Schema's words, as what `Annotated` takes."""
    return tuple(words.items())


def schema_of(annotation: Any) -> Schema:
    """Return the JSON Schema of what a Python annotation describes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None and annotation in _TYPES:
        return dict(_TYPES[annotation])
    if origin is Annotated:
        words = dict(arguments[1])
        return schema_of(arguments[0]) | {
            word: list(value) if isinstance(value, tuple) else value
            for word, value in words.items()
        }
    if origin in {types.UnionType, Union}:
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    if is_typeddict(annotation):
        from typing import get_type_hints

        hints = get_type_hints(annotation, include_extras=True)
        properties = {name: schema_of(hint) for name, hint in hints.items()}
        return {"type": "object", "properties": properties, "required": list(properties)}
    raise TypeError(f"{annotation!r} has no schema")


def params_of(method: Callable[..., Any]) -> Schema:
    """Return the JSON Schema of a method's params."""
    function = getattr(method, "__func__", method)
    code = function.__code__
    first = code.co_argcount
    names = code.co_varnames[first : first + code.co_kwonlyargcount]
    defaults = function.__kwdefaults__ or {}
    properties = {}
    for name in names:
        if name != "client":
            properties[name] = schema_of(function.__annotations__[name])
            if name in defaults:
                properties[name]["default"] = defaults[name]
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in defaults],
        "additionalProperties": False,
    }


_params: dict[Callable[..., Any], Schema] = {}


def problem_of(method: Callable[..., Any], params: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the params of a call; None if nothing is."""
    function = getattr(method, "__func__", method)
    schema = _params.get(function)
    if schema is None:
        schema = _params[function] = params_of(method)
    return check(schema, params, "")


def check(schema: Schema, value: Any, where: str) -> str | None:
    """Say how `value`, called `where`, is not what `schema` describes; None if it is."""
    name = where or "params"
    if "anyOf" in schema:
        found = [check(option, value, where) for option in schema["anyOf"]]
        return None if None in found else found[0]
    kind = schema.get("type")
    if kind is not None:
        fits = isinstance(value, _PYTHON[kind]) and isinstance(value, bool) == (kind == "boolean")
        if not fits:
            return f"{name} is no {kind}"
    problem = _check_size(schema, value)
    if problem is not None:
        return f"{name} {problem}"
    if kind == "array":
        for index, item in enumerate(value):
            problem = check(schema["items"], item, f"{name}[{index}]")
            if problem is not None:
                return problem
    return _check_object(schema, value, where) if kind == "object" else None


def _check_size(schema: Schema, value: Any) -> str | None:
    if "enum" in schema and value not in schema["enum"]:
        return f"is none of {', '.join(map(str, schema['enum']))}"
    bounded = "minimum" in schema or "maximum" in schema
    if bounded and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        least, most = schema.get("minimum", "..."), schema.get("maximum", "...")
        return f"is not within {least} to {most}"
    length = len(value) if isinstance(value, str | list) else 0
    if length > schema.get("maxLength", length) or length > schema.get("maxItems", length):
        return f"is longer than {schema.get('maxLength', schema.get('maxItems'))}"
    if length < schema.get("minItems", length):
        return f"has fewer than {schema['minItems']} items"
    return None


def _check_object(schema: Schema, value: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{name} is missing"
    for name, item in value.items():
        inner = properties.get(name, schema.get("additionalProperties", True))
        if inner is False:
            known = ", ".join(properties) or "none at all"
            return f"{name!r} is no parameter: there are {known}"
        if inner is not True:
            problem = check(inner, item, f"{where}.{name}" if where else name)
            if problem is not None:
                return problem
    return None


def describe(methods: Mapping[str, Callable[..., Any]], notifications: Mapping[str, Any]) -> Schema:
    """Describe every method and notification: what `rpc.discover` answers."""
    return {
        "methods": {
            name: {
                "summary": _summary(method),
                "params": params_of(method),
                "result": schema_of(method.__annotations__["return"]),
            }
            for name, method in sorted(methods.items())
        },
        "notifications": {
            name: {"summary": _summary(kind), "params": schema_of(kind)}
            for name, kind in sorted(notifications.items())
        },
    }


def _summary(thing: Any) -> str:
    return " ".join((thing.__doc__ or "").split("\n\n")[0].split())
