"""A device of the user's own: `--device package.module:Class[,key=value...]`, found and made.

The class derives from devices.device.Device (or RegisterDevice) and says where its registers are,
or from devices.virtio.device.VirtioDevice, which needs no place. What its constructor wants it says
by its parameters. Three names are filled in by the machine:

    irq       an IrqLine of its own
    memory    the guest's RAM (GuestMemory, with `discard` as well as `view`)
    on_exit   a function of one number that ends the run, like DebugExit's

Every other parameter is a key of the command line, converted as it is annotated: int (also 0x...),
float, bool (on or off) or str, which is what it is without annotation. A comma in a value is
written twice.

What its methods raise ends the run with one line, which says where: `add` sees to that.

The module is looked for in the current directory, then on Python's path; on the way out the current
directory is the last on that path, so that a file there is never taken for one of Python's own.
"""

import importlib
import inspect
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from tinyvmm import placement
from tinyvmm.devices.device import Device
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.errors import ConfigError
from tinyvmm.machine import Machine

DEVICE_IDS = range(1, 64)  # whose PCI device IDs are 0x1040 and on (virtio 1.2, 4.1.2.1)
QUEUE_SIZES = [1 << bits for bits in range(16)]  # section 2.7
COLLABORATORS = ("irq", "memory", "on_exit")
_BOOLEANS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_FORM = "give package.module:Class[,key=value...]"


class OwnDevice(NamedTuple):
    """A class and what it is called with."""

    text: str
    cls: type[Device | VirtioDevice]
    values: dict[str, Any]
    collaborators: tuple[str, ...]


def load(text: str) -> OwnDevice:
    """Find the class that `text` names and convert the values; ConfigError if anything is wrong."""
    where, *pairs = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    module, colon, name = where.partition(":")
    if not (colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        raise ConfigError(f"--device {text}: {_FORM}")
    cls = getattr(_import(text, module), name, None)
    if cls is None:
        raise ConfigError(f"--device {text}: module {module} has no {name}")
    if not (isinstance(cls, type) and issubclass(cls, Device | VirtioDevice)):
        raise ConfigError(
            f"--device {text}: {name} is no device: derive it from "
            "tinyvmm.devices.device.Device or tinyvmm.devices.virtio.device.VirtioDevice"
        )
    try:
        parameters = inspect.signature(cls, eval_str=True).parameters
    except Exception as error:  # noqa: BLE001 (an annotation may be any expression)
        raise ConfigError(f"--device {text}: {name}'s annotations: {_describe(error)}") from None
    collaborators = tuple(key for key in COLLABORATORS if key in parameters)
    if "irq" in collaborators and issubclass(cls, VirtioDevice):
        raise ConfigError(f"--device {text}: {name} has no irq: its transport interrupts for it")
    known = {
        key: parameter
        for key, parameter in parameters.items()
        if key not in COLLABORATORS
        and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    values = _values(text, name, known, pairs)
    return OwnDevice(text, cls, values, collaborators)


def add(own: OwnDevice, machine: Machine) -> None:
    """Make the device and put it on the machine; ConfigError if it, or the machine, refuses."""
    gsi = None
    given: dict[str, Any] = {}
    for name in own.collaborators:
        if name == "irq":
            gsi = placement.free_gsi(machine.device_nodes, len(machine.virtio_mmio))
            given[name] = machine.irq_line(gsi)
        else:
            given[name] = machine.memory if name == "memory" else machine.end
    try:
        device = own.cls(**own.values, **given)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the user's code: whatever it raises)
        raise ConfigError(f"--device {own.text}: {_describe(error)}") from None
    _guard(device, own.text)
    try:
        if isinstance(device, VirtioDevice):
            machine.add_virtio(device)
            return
        if not hasattr(device, "name"):  # the bus calls it so in traces
            device.name = own.cls.__name__
        machine.add_device(device, gsi)
    except ConfigError as error:
        raise ConfigError(f"--device {own.text}: {error}") from None


def _guard(device: Device | VirtioDevice, text: str) -> None:
    """Have what goes wrong in the user's methods end the run with one line that says where."""
    names: Sequence[str] = ("read", "write")
    if isinstance(device, VirtioDevice):
        if why := _ill_made(device):
            raise ConfigError(f"--device {text}: {type(device).__name__}: {why}")
        names = ("handle", "write_config", "reset")
    for name in names:
        vars(device)[name] = _guarded(getattr(device, name), text, answers=name == "read")


def _ill_made(device: VirtioDevice) -> str | None:
    """Say what no transport could carry of a virtio device, if anything."""
    if not hasattr(device, "queues"):
        return "its __init__ does not call super().__init__"
    if device.device_id not in DEVICE_IDS:
        return f"device_id {device.device_id!r}: give one of virtio 1.2, section 5: 1 to 63"
    for queue in device.queues:
        if queue.size_max not in QUEUE_SIZES:
            return f"a queue of {queue.size_max!r}: give a power of two, 32768 at most"
    return None


def _guarded(method: Callable[..., Any], text: str, *, answers: bool) -> Callable[..., Any]:
    """Call `method`, of which a number is wanted if it `answers`."""

    def call(*args: Any) -> Any:
        try:
            value = method(*args)
        except ConfigError:
            raise
        except NotImplementedError as error:
            what = str(error) or f"there is no method {method.__name__}"
            raise ConfigError(f"--device {text}: {what}") from error
        except (Exception, SystemExit) as error:
            raise ConfigError(f"--device {text}: {_describe(error)}") from error
        if answers and not isinstance(value, int):
            raise ConfigError(f"--device {text}: read gave {value!r}, and is to give an int")
        return value

    return call


def _import(text: str, module: str) -> types.ModuleType:
    here = os.getcwd()
    path = [entry for entry in sys.path if entry not in {"", here}]
    sys.path[:] = [here, *path]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the user's code runs here)
        missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                f"--device {text}: there is no module {missing} in {here} or on Python's path"
            ) from None
        raise ConfigError(f"--device {text}: module {module}: {_describe(error)}") from None
    finally:
        sys.path[:] = [*path, here]


def _values(
    text: str, name: str, known: dict[str, inspect.Parameter], pairs: list[str]
) -> dict[str, Any]:
    """Convert `key=value` each for the parameters `known`."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--device {text}: {pair!r} is no key=value")
        if key not in known:
            keys = ", ".join(known) or "none"
            raise ConfigError(f"--device {text}: {name} has no {key!r}; its keys: {keys}")
        if key in values:
            raise ConfigError(f"--device {text}: {key} is given twice")
        values[key] = _convert(text, known[key], value)
    needed = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty and key not in values
    ]
    if needed:
        raise ConfigError(f"--device {text}: {name} needs {', '.join(f'{k}=...' for k in needed)}")
    return values


def _convert(text: str, parameter: inspect.Parameter, value: str) -> Any:
    """Make of `value` what the parameter is annotated to be."""
    wanted = parameter.annotation
    if typing.get_origin(wanted) in {typing.Union, types.UnionType}:  # int | None
        wanted = next((t for t in typing.get_args(wanted) if t is not type(None)), str)
    convert = _CONVERTERS.get(str if wanted is parameter.empty else wanted)
    if convert is None:
        raise ConfigError(
            f"--device {text}: {parameter.name} cannot be given here: annotate it int, float, "
            "bool or str"
        )
    with suppress(ValueError, KeyError):
        return convert(value)
    like = "on or off" if wanted is bool else f"{'an' if wanted is int else 'a'} {wanted.__name__}"
    raise ConfigError(f"--device {text}: {parameter.name} is to be {like}, not {value!r}")


_CONVERTERS: dict[object, Callable[[str], Any]] = {
    int: lambda value: int(value, 0),
    float: float,
    bool: lambda value: _BOOLEANS[value.lower()],
    str: str,
    Any: str,
}


def _describe(error: BaseException) -> str:
    """Say in one line what the user's code raised, and where."""
    said, where = str(error), ""
    if isinstance(error, SyntaxError):
        said, where = error.msg, f" ({error.filename} line {error.lineno})"
    else:
        for frame, line in traceback.walk_tb(error.__traceback__):
            file = frame.f_code.co_filename
            if file != __file__ and not file.startswith("<"):  # neither ours nor Python's importer
                where = f" ({file} line {line})"
    lines = said.splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}{where}"
