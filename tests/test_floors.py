"""The floors of the house: a folder imports only from floors below it, and frameworks stay lazy.

Imports are read from the source, those inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = "shardwright"
FLOORS = {"ir": 1, "costmodel": 2, "planner": 3, "backends": 4, "checkpoint": 4}
PUBLIC_FACE = {"__init__.py", "__main__.py", "api.py", "cli.py", "terminal.py"}
"""Top-level files: they may import everything, nothing below imports them."""
FRAMEWORKS = {"torch", "jax", "transformers"}
FRAMEWORK_ROOMS = (
    "ir.from_torch",
    "ir.from_jax",
    "backends",
    "costmodel.ranks",
    "costmodel.probe",
    "costmodel.calibrate",
)
"""Where a framework may be imported at all (but not by `import shardwright`)."""

CodeFolders = Callable[[Path], list[str]]


def test_every_folder_of_code_has_a_floor(repository: Path, code_folders: CodeFolders) -> None:
    assert set(code_folders(repository)) <= FLOORS.keys()
    assert {file.name for file in repository.glob("*.py")} <= PUBLIC_FACE


def test_floors_import_only_from_below(repository: Path, code_folders: CodeFolders) -> None:
    assert violations(repository, code_folders(repository)) == []


def test_import_shardwright_loads_no_framework(tmp_path: Path) -> None:
    script = "import json, sys, shardwright; print(json.dumps(list(sys.modules)))"
    run = [sys.executable, "-c", script]
    loaded = json.loads(subprocess.check_output(run, cwd=tmp_path, text=True))
    assert PACKAGE in loaded
    assert FRAMEWORKS.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("file", "source", "imported"),
    [
        ("ir/graph.py", "from ..planner import search", "shardwright.planner.search"),
        ("ir/graph.py", "from .. import planner", "shardwright.planner"),
        ("ir/graph.py", "from ..planner.search import solve", "shardwright.planner.search"),
        ("ir/graph.py", "import shardwright.costmodel", "shardwright.costmodel"),
        ("ir/graph.py", "def f():\n    from ..costmodel import x", "shardwright.costmodel"),
        ("ir/graph.py", "if TYPE_CHECKING:\n    from .. import costmodel", "shardwright.costmodel"),
        ("ir/from_torch/trace.py", "from ...backends import x", "shardwright.backends"),
        ("ir/__init__.py", "from ..costmodel import x", "shardwright.costmodel"),
        ("ir/graph.py", "from .. import plan", "shardwright"),
        ("ir/graph.py", "from ..cli import main", "shardwright.cli"),
        ("planner/search.py", "import shardwright", "shardwright"),
        ("planner/search.py", "import_module('..backends', __package__)", "shardwright.backends"),
        ("backends/emit.py", "from ..checkpoint import x", "shardwright.checkpoint"),
        ("checkpoint/dcp.py", "from shardwright.backends import x", "shardwright.backends"),
        ("planner/search.py", "import torch.nn as nn", "torch.nn"),
        ("costmodel/device.py", "def f():\n    from jax import numpy", "jax"),
        ("ir/graph.py", "importlib.import_module('transformers')", "transformers"),
        ("cli.py", "def f():\n    import torch", "torch"),
    ],
)
def test_checker_sees(
    tmp_path: Path, code_folders: CodeFolders, file: str, source: str, imported: str
) -> None:
    lay_tree(tmp_path, file, source)
    found = violations(tmp_path, code_folders(tmp_path))
    assert [(at.partition(":")[0], name) for at, name in found] == [(file, imported)]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("planner/search.py", "from ..ir import Graph\nfrom ..costmodel.device import Device"),
        ("planner/search.py", "from . import a\nfrom .. import ir\nimport numpy, shardwright.ir"),
        ("ir/from_torch/trace.py", "import torch\nfrom ..graph import Graph\nfrom . import lift"),
        ("backends/emit.py", "import torch, jax\nfrom transformers import AutoModel"),
        ("ir/graph.py", "from .torch import x\nimport torchlike, shardwright_ext"),
        ("cli.py", "from . import planner, backends\nfrom .checkpoint import convert"),
        ("__init__.py", "from .planner.search import solve\nfrom .cli import main"),
    ],
)
def test_checker_allows(tmp_path: Path, code_folders: CodeFolders, file: str, source: str) -> None:
    lay_tree(tmp_path, file, source)
    assert violations(tmp_path, code_folders(tmp_path)) == []


def lay_tree(root: Path, file: str, source: str) -> None:
    """A miniature of the repository, with `source` in one file of it."""
    files = ["__init__.py", "cli.py", *(f"{folder}/__init__.py" for folder in FLOORS)]
    files += ["ir/from_torch/__init__.py", "planner/search.py"]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / file).write_text(source)


def violations(root: Path, folders: list[str]) -> list[tuple[str, str]]:
    """`(file:line, imported module)` of every import that the floors of the tree do not allow."""
    modules = {
        module_name(root, path): path
        for path in [*root.glob("*.py"), *(p for f in folders for p in (root / f).rglob("*.py"))]
        if "templates" not in path.relative_to(root).parts  # text of emitted programs, not ours
    }
    return [
        (f"{path.relative_to(root)}:{line}", imported)
        for module, path in sorted(modules.items())
        for line, imported in imports(path, module, modules.keys())
        if not allowed(module, imported)
    ]


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])


def imports(path: Path, module: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module that a file imports, wherever in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import(names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(names=names, level=level):
                base = absolute("." * level + (node.module or ""), package)
                # `from A import b` imports the module A.b where there is one, else a name of A.
                for name in dict.fromkeys(f"{base}.{alias.name}" for alias in names):
                    yield node.lineno, name if name in modules else base
            case ast.Call(
                ast.Name(called) | ast.Attribute(attr=called), [ast.Constant(str(name)), *_]
            ) if called in {"import_module", "__import__"}:
                yield node.lineno, absolute(name, package)


def absolute(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *filter(None, [name[level:]])])


def allowed(module: str, imported: str) -> bool:
    if imported.partition(".")[0] in FRAMEWORKS:
        return any(within(module, f"{PACKAGE}.{room}") for room in FRAMEWORK_ROOMS)
    here, there = folder(module), folder(imported)
    if not within(imported, PACKAGE) or here not in FLOORS or here == there:
        return True
    return there in FLOORS and FLOORS[there] < FLOORS[here]


def folder(module: str) -> str:
    """`ir` of `shardwright.ir.graph`; empty for the package itself."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
