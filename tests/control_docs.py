"""What docs/ says of the control socket's methods, from the methods themselves.

    python -m tests.control_docs

writes docs/control.schema.json, and in docs/control.md what is between the two marks.
"""

import json
from pathlib import Path
from typing import Any

from tinyvmm.methods.supervised import Supervised

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- methods: python -m tests.control_docs -->\n", "<!-- end of methods -->"
Schema = dict[str, Any]


def described() -> Schema:
    """Every method and notification of a machine."""
    return Supervised("").supervisor().discover()


def schema_text() -> str:
    """What docs/control.schema.json is to hold."""
    return json.dumps(described(), indent=1) + "\n"


def page() -> str:
    """What docs/control.md is to be."""
    text = (DOCS / "control.md").read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{reference(described())}\n{END}{after}"


def reference(described: Schema) -> str:
    """Render what `describe` returned as the reference of docs/control.md."""
    lines = []
    for name, method in described["methods"].items():
        params = method["params"]
        shown = [
            f"{key}: {_short(value)}"
            + (f" = {_word(value['default'])}" if "default" in value else "")
            for key, value in params["properties"].items()
        ]
        lines.append(f"- **`{name}({', '.join(shown)})`** -> `{_short(method['result'])}`  ")
        lines.append(f"  {method['summary']}")
    lines += ["", "Notifications:", ""]
    for name, told in described["notifications"].items():
        shown = [f"{key}: {_short(value)}" for key, value in told["params"]["properties"].items()]
        lines.append(f"- **`{name}({', '.join(shown)})`**  ")
        lines.append(f"  {told['summary']}")
    return "\n".join(lines) + "\n"


def _word(value: Any) -> str:
    return json.dumps(value)


def _short(schema: Schema) -> str:
    """Render a schema in a few characters."""
    if "anyOf" in schema:
        return " or ".join(_short(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(_word, schema["enum"]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"[{_short(schema['items'])}]"
    if kind == "object":
        if "properties" in schema:
            return "{" + ", ".join(schema["properties"]) + "}"
        return "{name: " + _short(schema["additionalProperties"]) + "}"
    return str(kind)


if __name__ == "__main__":
    (DOCS / "control.schema.json").write_text(schema_text())
    (DOCS / "control.md").write_text(page())
