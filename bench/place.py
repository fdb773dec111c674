"""Where a bench measures: here, or in one lab if this computer's KVM cannot run Linux."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parent.parent)
MAIN = (  # `tinyvmm`, for `python -c`
    f"import sys; sys.path.insert(0, {ROOT!r}); sys.argv[0] = 'tinyvmm'; "
    "from tinyvmm.cli.main import main; sys.exit(main())"
)


def where_linux_runs(function: Callable[..., object], *arguments: object, timeout: float) -> Any:
    """Return what a function of bench/ returns for `arguments`, both as JSON has them.

    In the lab it may take `timeout` seconds; if it fails there, so do we, with what it said.
    """
    from tinyvmm.lab.lab import Lab, python_command
    from tinyvmm.lab.probe import missing_for_linux

    given = json.dumps(arguments)
    if missing_for_linux() is None:
        return json.loads(json.dumps(function(*json.loads(given))))
    module, name = function.__module__, function.__name__
    code = (
        f"import sys, json; sys.path.insert(0, {ROOT!r}); from {module} import {name}; "
        f"print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    )
    with Lab() as lab:
        done = lab.run(python_command(code, [given]), timeout=timeout)
    if done.status:
        sys.exit(done.stderr.decode(errors="replace"))
    return json.loads(done.stdout)
