"""The wheel holds all code and data of the package and nothing else; the root is imported once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CodeFolders = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy: what a build leaves behind would end up in the next wheel."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")
    shutil.copytree(repository, source, ignore=ignored)
    run = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "../wheel"]
    built = subprocess.run(run, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source.parent / "wheel").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_nothing_else(
    wheel: zipfile.ZipFile, repository: Path, code_folders: CodeFolders
) -> None:
    # What lies beside code is data that the code reads (cluster presets, templates): it ships too.
    expected = {path.name for path in repository.glob("*.py")} | {"py.typed"}
    for folder in code_folders(repository):
        for path in (repository / folder).rglob("*"):
            name = path.relative_to(repository)
            hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
            if path.is_file() and not hidden and path.suffix != ".md":
                expected.add(name.as_posix())
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == {f"shardwright/{name}" for name in expected}


def test_wheel_has_the_licence_the_command_and_the_extras(wheel: zipfile.ZipFile) -> None:
    about = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(about["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in wheel.read(about["LICENSE"]).decode()
    assert {f"Provides-Extra: {extra}" for extra in ("torch", "jax", "hf", "dev")} <= set(
        metadata.splitlines()
    )
    commands = wheel.read(about["entry_points.txt"]).decode()
    assert "shardwright = shardwright.__main__:main" in commands


def test_unpacked_wheel_imports_away_from_the_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    run = [sys.executable, "-c", "import shardwright; print(shardwright.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.check_output(run, cwd=tmp_path, env=environment, text=True)
    assert Path(found.strip()) == tmp_path / "shardwright" / "__init__.py"


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_install_resolves_to_the_checkout(repository: Path, tmp_path: Path, where: str) -> None:
    run = [sys.executable, "-c", "import shardwright; print(shardwright.__file__)"]
    cwd = repository if where == "checkout" else tmp_path
    found = Path(subprocess.check_output(run, cwd=cwd, text=True).strip())
    assert found.resolve() == repository / "__init__.py"


def test_root_is_imported_under_its_own_name_only(repository: Path) -> None:
    import shardwright

    assert Path(shardwright.__file__ or "").resolve() == repository / "__init__.py"
    root_files = {repository / name for name in ("__init__.py", "__main__.py", "cli.py")}
    aliases = {
        name
        for name, module in list(sys.modules.items())
        if Path(getattr(module, "__file__", None) or "/").resolve() in root_files
        and name.partition(".")[0] != "shardwright"
    }
    assert aliases == set()
