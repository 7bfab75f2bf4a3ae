"""What rank 0 shows while the ranks measure, and how it writes: whole files or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...ir.errors import InvalidInput
from .team import Team

Report = Callable[[float, str], None]
"""Told the share of the work that is done, and what is being done."""


def check_writable(path: str | Path) -> None:
    """Raises InvalidInput, before any time is spent, if the file could not be written later."""
    path = Path(path)
    if path.is_dir():
        raise InvalidInput(f"--output {path}: is a folder, expected a file name")
    if not path.parent.is_dir():
        raise InvalidInput(f"--output {path}: folder {path.parent} does not exist, make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidInput(f"--output {path}: may not be written")


def write_whole(path: str | Path, save: Callable[[Path], None]) -> None:
    """Has `save` write beside the file, then puts it in place: readers never see a part.

    Raises what `save` raises, and leaves an older file as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def progress(team: Team, title: str) -> Iterator[Report]:
    """A bar on rank 0's terminal; silent elsewhere."""
    console = Console(stderr=True)
    if not team.leads or not console.is_terminal:
        yield lambda share, what: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0, what="")
        yield lambda share, what: bar.update(task, completed=min(share, 1.0), what=what)
