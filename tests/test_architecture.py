"""The layers of the code, read from its imports: each module from lower numbers and its own package only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvctl

PACKAGE = Path(hvctl.__file__).parent

# Module (or package) directly below hvctl -> its layer. README.md, "How the code is cut", says what each is for.
LAYERS = {
    "__init__": 0, "errors": 0, "units": 0, "values": 0,
    "model": 1, "events": 1, "store": 1, "rendering": 1,
    "config": 2, "templates": 2, "metadata": 2, "identity": 2, "seed": 2, "sshclient": 2, "shell": 2, "hostside": 2,
    "libvirtapi": 3,
    "host": 4, "operation": 4,
    "rootfs": 5, "access": 5, "accel": 5,
    "backends": 6,
    "instances": 7, "images": 7, "networks": 7, "doctor": 7, "hostsetup": 7,
    "gc": 8, "run": 8, "backups": 8,
    "cli": 9, "__main__": 9,
}  # fmt: skip

# Third-party package -> where it may be imported.
HOMES = {
    "libvirt": ("libvirtapi",),
    "libvirt_qemu": ("libvirtapi",),
    "libvirt_lxc": ("libvirtapi",),
    "click": ("cli",),
    "rich": ("cli",),
    "jinja2": ("rendering",),
    "paramiko": ("sshclient",),
    "pycdlib": ("seed",),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """`hvctl/cli/main.py` -> `cli`, `hvctl/model.py` -> `model`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, late imports and TYPE_CHECKING ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names if node.module == "hvctl" else []:
                yield node.lineno, f"hvctl.{alias.name}"
            if node.module and node.module != "hvctl":
                yield node.lineno, node.module


def names_from(module: str, path: Path) -> Iterator[str]:
    """`module.name` of everything that is taken from a module, by `from` or as its attribute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield f"{module}.{node.attr}"


def problems_of(path: Path) -> list[str]:
    found = []
    unit = unit_of(path)
    for line, name in imports_of(path):
        root, _, rest = name.partition(".")
        where = f"{path.relative_to(PACKAGE.parent)}:{line}"
        if root == "hvctl":
            target = rest.split(".")[0] or "__init__"
            if target == "__version__":
                continue
            if target not in LAYERS:
                found.append(f"{where}: hvctl.{target} has no layer")
            elif target != unit and LAYERS[target] >= LAYERS[unit] and not is_peer_allowed(unit, target):
                found.append(f"{where}: layer {LAYERS[unit]} ({unit}) imports layer {LAYERS[target]} ({target})")
        elif root in HOMES and unit not in HOMES[root]:
            found.append(f"{where}: {root} belongs in {HOMES[root]}")
        elif root not in HOMES and not is_standard_library(root):
            found.append(f"{where}: third-party package {root} has no home")
    return found


def is_peer_allowed(unit: str, target: str) -> bool:
    """The few sideways paths, each between two that belong together."""
    return (unit, target) in {("units", "errors"), ("shell", "hostside"), ("operation", "host"), ("__main__", "cli")}


def is_standard_library(root: str) -> bool:
    return root in sys.stdlib_module_names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_below(path: Path) -> None:
    assert unit_of(path) in LAYERS, f"give hvctl/{unit_of(path)} a layer"
    assert problems_of(path) == []


def test_dataclasses_are_those_that_cost_nothing_to_import() -> None:
    users = [path for path in modules() if path.name != "values.py"]
    assert [path for path in users if "dataclasses.dataclass" in names_from("dataclasses", path)] == []


def test_daily_commands_import_nothing_that_few_need() -> None:
    """`create`, `start`, `exec`, `list`, as far as the first call of libvirt: each of these costs 2 to 20 ms."""
    modules = "cli.create instances.create instances.enter backends.container backends.vm config access.keys"
    script = "import sys\n" + "\n".join(f"import hvctl.{name}" for name in modules.split()) + "\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    dear = "cryptography email http jinja2 paramiko pycdlib rich ssl tarfile tomllib urllib.request "
    dear += "hvctl.hostside.transfer hvctl.rootfs.building hvctl.rootfs.intake"
    assert set(dear.split()) & set(done.stdout.split()) == set()


def test_importing_and_listing_images_needs_no_web() -> None:
    """TLS, HTTP and what they stand on cost 25 ms; Containerfiles need most of what applications do."""
    script = "import sys, hvctl.images, hvctl.rootfs.imported; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert {"ssl", "http.client", "urllib.request", "hvctl.rootfs.containerfile"} & set(done.stdout.split()) == set()


def test_libvirts_hook_imports_nothing_that_it_can_do_without() -> None:
    """Every start waits for it: `dataclasses` alone, which imports `inspect`, costs 8 ms."""
    modules = "confine daemons files filters hook roots"
    script = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    script += "\n".join(f"import hvctl.hostside.{name}" for name in modules.split()) + "\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-ISc", script], capture_output=True, text=True, timeout=60, check=True)
    dear = {"dataclasses", "inspect", "json", "shutil", "subprocess", "threading", "typing"}
    assert dear & set(done.stdout.split()) == set()


def test_hostside_needs_only_the_standard_library() -> None:
    """And where things lie in the store, and `dataclass`, which go with it wherever it is installed."""
    for path in [*(PACKAGE / "hostside").rglob("*.py"), PACKAGE / "store.py", PACKAGE / "values.py"]:
        for line, name in imports_of(path):
            is_ours = name.startswith(("hvctl.hostside", "hvctl.store", "hvctl.values"))
            assert name.split(".")[0] != "hvctl" or is_ours, f"{path}:{line} imports {name}"


def mode_decisions(path: Path) -> Iterator[int]:
    """Lines that decide on a mode: a comparison, a match case or a table with `Mode.X` or a mode's word."""

    def is_mode(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Mode":
            return node.attr in ("VM", "CONTAINER")
        return isinstance(node, ast.Constant) and node.value in ("vm", "container", "lxc")

    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Compare():
                parts = [node.left, *node.comparators]
            case ast.MatchValue():
                parts = [node.value]
            case ast.Dict():
                parts = [key for key in node.keys if key is not None]
            case _:
                continue
        if any(is_mode(part) for part in parts):
            yield node.lineno


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if unit_of(path) not in ("model", "backends", "cli")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_backends_decide_on_a_mode(path: Path) -> None:
    assert list(mode_decisions(path)) == []
