"""What every test may rely on: it tests this checkout, offline, with reproducible draws."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {"tests", "examples", "benchmarks", "docs", "build", "dist", "out"}

# Ranks and workers inherit these: a hub is never asked, and two cores are not split forty ways.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Compiling takes most of the time of JAX programs that run a few steps: LLVM may hurry. (Programs
# kept between processes would be faster still, but what XLA loads of them for the CPU has lost the
# order of its collectives, and hangs.)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# No deadline: the machine is shared. CI draws the same examples each time, developers new ones.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test another installation of shardwright than this checkout."""
    spec = importlib.util.find_spec("shardwright")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if found != REPOSITORY:
        raise pytest.UsageError(
            f"`import shardwright` finds {found or 'nothing'}, not {REPOSITORY}: run `make setup`"
        )


def _code_folders(root: Path) -> list[str]:
    return sorted(
        folder.name
        for folder in root.iterdir()
        if folder.is_dir()
        and folder.name.isidentifier()
        and folder.name not in NOT_SHIPPED
        and any(folder.rglob("*.py"))
    )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this checkout, which is the package."""
    return REPOSITORY


@pytest.fixture(scope="session")
def code_folders() -> Callable[[Path], list[str]]:
    """A function that names the top-level folders of a tree which hold code of the package."""
    return _code_folders
