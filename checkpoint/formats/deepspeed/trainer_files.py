"""What transformers' Trainer keeps beside DeepSpeed's steps: random states by rank, its scheduler.

`rng_state_RANK.pth` (`rng_state.pth` of one rank) and `scheduler.pt` lie next to `latest`. A job
carries them under `transformers`, by file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...contents import Job
from ...pickles import decode, encode, open_torch
from .planning import Files

_OWN = "transformers"
_SCHEDULER = "scheduler.pt"
_RANDOM = re.compile(r"rng_state(_\d+)?\.pth")
_STATE_BYTES = 1 << 20
"""Of a tensor in them, at most: random states are some KiB."""


def with_trainer_files(job: Job, root: Path) -> Job:
    """A job with what the Trainer keeps in `root`; raises CorruptCheckpoint for damaged files."""
    names = [path.name for path in sorted(root.iterdir()) if _RANDOM.fullmatch(path.name)]
    if names:
        job = replace(job, rng={**job.rng, _OWN: {name: _read(root, name) for name in names}})
    if (root / _SCHEDULER).is_file():
        scheduler = _read(root, _SCHEDULER)
        own = job.scheduler or (scheduler if isinstance(scheduler, dict) else {})
        job = replace(job, scheduler=own, others={**job.others, _OWN: {_SCHEDULER: scheduler}})
    return job


def trainer_files(job: Job, files: Files) -> None:
    """Writes them again, if the source had some."""
    random, beside = job.rng.get(_OWN), job.others.get(_OWN)
    if isinstance(random, Mapping):
        for name, value in random.items():
            if _RANDOM.fullmatch(name):
                files.add(name, decode(value), [])
    if isinstance(beside, Mapping) and _SCHEDULER in beside:
        files.add(_SCHEDULER, decode(beside[_SCHEDULER]), [])


def _read(root: Path, name: str) -> Any:
    with open_torch(root / name, name) as file:
        file.check_name(Path(name).stem)
        return encode(file.loaded(file.value, _STATE_BYTES))
