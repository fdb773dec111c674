"""The shape of the house: who may import whom, and nothing but the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyvmm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower layers first; a module imports from its own layer (if it must) or from below.
LAYERS = [
    ("named",),
    ("errors", "layout", "trace", "views", "grammar", "ninep", "mountinfo", "regular"),
    ("kvm",),
    ("memory", "bus", "options", "recording"),
    ("devices", "disks", "fileserver", "nbd", "cpuid", "kernel_files"),
    (
        "boot",
        "bare_kernel",
        "acpi",
        "placement",
        "bars",
        "vcpu",
        "streams",
        "terminal",
        "scratch",
        "net",
        "vsock_host",
        "vhost",
        "eventfds",
        "tree_entries",
        "tree_tar",
    ),
    ("machine", "session", "guest", "images"),
    ("own_init", "instances"),
    ("inside",),
    ("methods", "roots", "lab"),
    ("command", "own_device", "bare"),
    ("process_streams", "process", "vm_options", "vm_guest", "vm", "aio", "pytest_tinyvmm"),
    ("cli", "__main__", "__init__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def dotted(path: Path) -> str:
    parts = ["tinyvmm", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in it, types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_run_time_needs_the_standard_library_only(path: Path) -> None:
    foreign = (
        {name.split(".")[0] for name in imports(path)}
        - sys.stdlib_module_names
        - {"tinyvmm", "compression"}
    )
    if path.name == "pytest_tinyvmm.py":  # which only a pytest loads
        foreign -= {"pytest"}
    assert foreign == set()


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_one_way(path: Path) -> None:
    own = layer(dotted(path))
    assert own in RANK, f"give {own} a place in LAYERS"
    upward = {
        name
        for name in imports(path)
        if name.startswith("tinyvmm.") and RANK.get(layer(name), 0) > RANK[own]
    }
    assert upward == set()


def test_a_device_knows_no_kvm_bus_or_machine() -> None:
    for path in (PACKAGE / "devices").rglob("*.py"):
        known = {layer(name) for name in imports(path) if name.startswith("tinyvmm.")}
        assert known <= {"devices", "trace", "errors", "views", "ninep", "layout", "named"}, path


def test_the_codec_imports_its_grammar_and_views_only() -> None:
    ours = {layer(n) for n in imports(PACKAGE / "ninep.py") if n.startswith("tinyvmm")}
    assert ours == {"grammar", "views"}
    assert not [n for n in imports(PACKAGE / "grammar.py") if n.startswith("tinyvmm")]


def test_no_module_uses_a_private_name_of_another() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyvmm"):
                private = [
                    a.name for a in node.names if a.name.startswith("_") and a.name != "__version__"
                ]
                assert not private, f"{path}: {private}"


def test_only_kvm_py_knows_an_ioctl_on_kvm() -> None:
    for path in MODULES:
        if path.name not in {"kvm.py", "vcpu.py"}:
            assert "kvm.KVM_RUN" not in path.read_text().replace("KVM_RUN_UNION", ""), path


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import tinyvmm; print(set(sys.modules) - before)"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "{'tinyvmm'}"
