"""tinyvmm: a virtual machine monitor for Linux/KVM in pure Python.

    run(args, ...)      a command in a machine of its own, as subprocess.run; popen, as Popen
    Machine(...)        a guest that stays up; run, popen, put and get, memory, cpus, trace
    PIPE, STDOUT, DEVNULL, CalledProcessError, TimeoutExpired, CompletedProcess   subprocess's own
    ConfigError, MachineError, TinyvmmError                                       errors.py
    Entry, Symlink, Access                                                        for roots

docs/api.md shows them; tinyvmm.aio has them for asyncio. Importing this package costs next to
nothing: names are loaded when they are first used.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's, which would be one more module to load
if TYPE_CHECKING:
    from subprocess import (
        DEVNULL,
        PIPE,
        STDOUT,
        CalledProcessError,
        CompletedProcess,
        TimeoutExpired,
    )

    from tinyvmm.errors import ConfigError, MachineError, TinyvmmError
    from tinyvmm.fileserver.entry import Entry, Symlink
    from tinyvmm.fileserver.watched import Access
    from tinyvmm.process import Process
    from tinyvmm.vm import Machine, popen, run

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Access",
    "CalledProcessError",
    "CompletedProcess",
    "ConfigError",
    "Entry",
    "Machine",
    "MachineError",
    "Process",
    "Symlink",
    "TimeoutExpired",
    "TinyvmmError",
    "popen",
    "run",
]

_HOMES = {
    "Access": "tinyvmm.fileserver.watched",
    "ConfigError": "tinyvmm.errors",
    "Entry": "tinyvmm.fileserver.entry",
    "Machine": "tinyvmm.vm",
    "MachineError": "tinyvmm.errors",
    "Process": "tinyvmm.process",
    "Symlink": "tinyvmm.fileserver.entry",
    "TinyvmmError": "tinyvmm.errors",
    "popen": "tinyvmm.vm",
    "run": "tinyvmm.vm",
}


def __getattr__(name: str) -> object:
    """Load a name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES.get(name, "subprocess")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
