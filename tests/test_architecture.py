"""Imports point down, only backends touch storage, and what is read is never executed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path, PurePath

import pytest

import deltackpt

PACKAGE = Path(deltackpt.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
MODULES["deltackpt"] = MODULES.pop("__init__")

#: Modules that open files which are not a store's.
OPENS_FILES = {
    "targets", "files", "folders", "originals", "markers", "series", "export", "demo", "cli", "process",
    "energy", "integrations.transformers",
}  # fmt: skip
FILE_MODULES = {"pathlib", "shutil", "tempfile", "glob", "io", "fcntl", "fileinput", "mmap"}
#: What of `os` opens nothing.
HARMLESS = {
    "os": {
        "PathLike",
        "environ",
        "fspath",
        "path",
        "getpid",
        "cpu_count",
        "sched_getaffinity",
        "register_at_fork",
        # Memory that has a descriptor and no name, and a process's own life.
        "memfd_create",
        "MFD_CLOEXEC",
        "ftruncate",
        "close",
        "getppid",
        "nice",
        "_exit",
    },
    # Memory, not files: to map one takes a descriptor, and nothing here can open it.
    "mmap": {
        "PAGESIZE",
        "MADV_HUGEPAGE",
        "MADV_REMOVE",
        "mmap",
        "MAP_PRIVATE",
        "MAP_SHARED",
        "MAP_ANONYMOUS",
    },
    # So is a file in memory, as torch.save wants one.
    "io": {"BytesIO"},
}


def layers() -> list[set[str]]:
    lines = re.search(r"^```layers\n(.*?)^```", PAGE.read_text(), re.M | re.S)[1].splitlines()
    return [set(line.split()) for line in lines]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def top(name: str) -> str:
    return name.partition(".")[0]


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever it does; a subpackage counts as one."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and node.module == "deltackpt":
            found |= {a.name if a.name in MODULES else "deltackpt" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltackpt."):
            found.add(top(node.module.removeprefix("deltackpt.")))
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if top(a.name) == "deltackpt"]
            found |= {top(n.removeprefix("deltackpt.")) for n in names}
    return found - {top(name)}


def names_used(name: str) -> set[str]:
    """What a module calls or reads by plain name, and every ``module.attribute`` it reads."""
    nodes = list(ast.walk(tree_of(name)))
    dotted = {
        f"{n.value.id}.{n.attr}"
        for n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    return dotted | {n.id for n in nodes if isinstance(n, ast.Name)}


def modules_used(name: str) -> set[str]:
    nodes = list(ast.walk(tree_of(name)))
    found = {top(a.name) for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return found | {top(n.module or "") for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}


def test_every_module_has_its_place_on_the_page():
    placed = [name for layer in layers() for name in layer]
    assert sorted(placed) == sorted({top(name) for name in MODULES})


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str):
    below: set[str] = set()
    for layer in layers():
        if top(name) in layer:
            break
        below |= layer
    assert imported(name) <= below


def test_within_a_subpackage_no_two_modules_need_each_other():
    needs: dict[str, set[str]] = {}
    for name in MODULES:
        froms = [n for n in ast.walk(tree_of(name)) if isinstance(n, ast.ImportFrom) and n.module]
        pairs = [(n.module.removeprefix("deltackpt."), a.name) for n in froms for a in n.names]
        found = {f"{m}.{of}" if f"{m}.{of}" in MODULES else m for m, of in pairs}
        needs[name] = {m for m in found & MODULES.keys() if top(m) == top(name)} - {name}
    assert needs["integrations.jax"] == {"integrations.peers"}
    TopologicalSorter(needs).prepare()  # raises a CycleError


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not {n, top(n)} & (OPENS_FILES | {"backends"})))
def test_only_backends_touch_storage(name: str):
    used = names_used(name)
    assert "open" not in used
    assert not modules_used(name) & (FILE_MODULES - HARMLESS.keys())
    for module, harmless in HARMLESS.items():
        attributes = {n.partition(".")[2] for n in used if n.startswith(f"{module}.")}
        assert attributes <= harmless


@pytest.mark.parametrize("name", sorted(n for n in MODULES if top(n) == "backends"))
def test_of_the_backends_only_the_shim_calls_the_system(name: str):
    if name == "backends.osshim":
        return
    constants = {n for n in names_used(name) if n.startswith("os.O_")}
    assert {n for n in names_used(name) if n.startswith("os.")} <= constants | {
        "os.PathLike",
        "os.stat_result",
    }
    assert "open" not in names_used(name)
    assert not modules_used(name) & (FILE_MODULES - {"pathlib"})
    # Paths are for their parts: what of them asks the system is called on the shim, or is the backend's own.
    asks = set(dir(Path)) - set(dir(PurePath)) - {"absolute"}
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Attribute) and node.attr in asks:
            assert ast.unparse(node.value) in {"self", "self._os", "Os()"}, ast.unparse(node)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_that_was_read_is_executed(name: str):
    used = names_used(name)
    assert not used & {"eval", "exec", "compile", "__import__", "marshal.loads"}
    assert "import_module" not in used or name == "kernels"  # its own extension
    # One module unpickles, and only tree calls it, when it is told allow_pickle.
    assert {n for n in used if n.startswith("pickle.")} <= {"pickle.UnpicklingError"} or name == "pickles"
    assert not any(n.startswith("pickles.") for n in used) or name == "tree"
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
            assert "weights_only=True" in ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            value = ast.unparse(node.value)
            assert value in ("False", "allow_pickle", "asked.allow_pickle", "self.allow_pickle")


def test_importing_the_package_brings_in_no_framework_and_no_command_line():
    code = "import sys, deltackpt; print(*{'torch', 'click', 'rich', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_owns_and_what_it_never_does(name: str):
    text = ast.get_docstring(tree_of(name)) or ""
    assert text
    if name not in {"deltackpt", "__main__"} and not name.startswith("codecs."):
        assert re.search(r"^Owns   .*^Never  ", text, re.M | re.S)
