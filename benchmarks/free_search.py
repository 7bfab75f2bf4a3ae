"""Published groups of runs with the search free: is its plan as fast as the best of them?

A group's best is the run that was measured fastest; it is priced in its own configuration, with the
same model, cluster, batch and runtime that the search is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from published.predictors import Shardwright, least_that_fits
from published.report import family_of
from published.rows import read_runs
from published.scores import SMALLEST_GROUP
from published.setup import Setup, setup_of

import shardwright as sw
from shardwright.ir.from_dims import transformer
from shardwright.planner import Fix, Request, Search


@dataclass(frozen=True, slots=True)
class Compared:
    """The best run of a group as it is predicted, and what the search finds; seconds of a step.
    Nothing is found where the model is predicted not to fit."""

    family: str
    group: str
    best_s: float
    best_fits: bool
    found_s: float | None
    plan: str
    cpu_s: float


def compared(path: Path) -> Iterator[Compared]:
    """Every group of the table that is ranked, in its order."""
    setups = [each for run in read_runs(path).rows if isinstance(each := setup_of(run), Setup)]
    timed = [each for each in setups if each.run.iter_time_s is not None]
    timed.sort(key=_group)
    predict = Shardwright()
    for (family, *group), runs in groupby(timed, key=_group):
        every = list(runs)
        if len(every) < SMALLEST_GROUP:
            continue
        best = min(every, key=lambda each: each.run.iter_time_s or 0.0)
        estimate = least_that_fits(best, predict)
        began = time.process_time()
        request = Request.on(
            transformer(best.dims), best.cluster, best.workload, Fix(), best.runtime
        )
        try:
            outcome = Search(request, anything=True).run(top=1).outcomes[0]
            found: tuple[float | None, str] = outcome.seconds, outcome.candidate.key
        except sw.Infeasible:
            found = None, "nothing fits"
        yield Compared(
            family, " ".join(map(str, group)), estimate.step_seconds, estimate.fits, *found,
            time.process_time() - began,
        )  # fmt: skip


def _group(setup: Setup) -> tuple[str, str, int]:
    return family_of(setup), setup.run.group, setup.run.gbs or 0
