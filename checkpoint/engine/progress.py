"""How far a conversion is: a bar with rate and time left, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called with the bytes that are done more."""

    def __call__(self, nbytes: int) -> None: ...


@contextmanager
def shown(what: str, total_bytes: int, done_bytes: int, quiet: bool) -> Iterator[Advance]:
    """A bar on stderr while the block runs; nothing where that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_bytes, completed=done_bytes)
        yield lambda nbytes: bar.advance(task, nbytes)
