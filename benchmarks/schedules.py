"""Bounds and estimates of pipeline schedules against their exact simulation.

    python benchmarks/schedules.py

500 random pipelines per schedule and spread: 2 to 16 ranks, up to 24 rounds of microbatches, stages
of about equal forward, input and weight gradients that vary as a whole or each part by itself,
evenly or between the ends of the range only, transfers up to 10 % of a stage. The bound must never
exceed the simulated time; the estimate is compared where stages vary by up to 20 %, as those that
the planner cuts do. Then the bubbles that the papers give for equal stages, and the largest table
that is timed in practice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from shardwright.costmodel.pipeline import schedule_bound_seconds, schedule_estimate_seconds
from shardwright.costmodel.simulate import StageTimes, simulate
from shardwright.ir.plan import ScheduleName
from shardwright.ir.schedule import ScheduleTable
from shardwright.ir.schedule_rows import schedule_table

PIPELINES = 500
NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)


@dataclass(frozen=True)
class Pipeline:
    """A table with its stage times and transfers in seconds."""

    table: ScheduleTable
    times: StageTimes
    p2p_s: tuple[float, ...]


def drawn(name: ScheduleName, spread: float, random: np.random.Generator) -> Pipeline:
    """A random pipeline; a stage takes about 3 s, a transfer up to 0.3 s."""
    pp = int(random.integers(2, 17))
    vpp = {"interleaved": int(random.integers(2, 5)), "zb-v": 2}.get(name, 1)
    microbatches = int(random.integers(1, 24 * pp + 1))
    if name == "interleaved":  # in rounds of pp, or of a few more where there are rounds enough
        rounds = int(random.integers(1, 25))
        microbatches = rounds * (pp + int(random.integers(0, pp // rounds + 1)))
        microbatches -= rounds * (microbatches // pp > rounds)
    stages = pp * vpp
    parts = random.uniform(1 - spread, 1 + spread, (3, stages))
    if random.random() < 0.5:
        parts = 1 + spread * np.sign(parts - 1)
    if random.random() < 0.5:
        parts[:] = parts[0]
    p2p = random.uniform(0, 0.3, stages - 1)
    times = StageTimes(*(tuple(part.tolist()) for part in parts))
    return Pipeline(schedule_table(name, pp, microbatches, vpp), times, tuple(p2p.tolist()))


@dataclass(frozen=True)
class Figures:
    """Of one pipeline: relative to the simulated time, and seconds of our own."""

    bound: float
    estimate: float
    estimate_took_s: float
    simulate_took_s: float


def figures(pipeline: Pipeline) -> Figures:
    """Bound, estimate and simulation of a pipeline."""
    table, times, p2p = pipeline.table, pipeline.times, pipeline.p2p_s
    args = table.name, times, p2p, table.microbatches, table.vpp
    schedule_estimate_seconds(*args)  # makes the tables, as the first candidate of a search does
    simulate(table, times, p2p)
    estimate, estimate_took_s = timed(lambda: schedule_estimate_seconds(*args))
    simulated, simulate_took_s = timed(lambda: simulate(table, times, p2p).step_s)
    bound = schedule_bound_seconds(*args)
    return Figures(bound / simulated, estimate / simulated, estimate_took_s, simulate_took_s)


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """A result and the seconds it took."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def random_table() -> Table:
    """The table of bounds and estimates."""
    table = Table(
        "schedule", "pipelines", "bound above simulation", "bound below, median",
        "estimate ±20 %: median", "lowest", "highest", "±30 %: lowest", "highest",
        "estimate", "simulation", title="against exact simulation",
    )  # fmt: skip
    random = np.random.default_rng(0)
    for name in NAMES:
        near, wide = (
            [figures(drawn(name, spread, random)) for _ in range(PIPELINES)]
            for spread in (0.2, 0.3)
        )
        above = sum(found.bound > 1 + 1e-12 for found in near + wide)
        table.add_row(
            name,
            f"{len(near)} + {len(wide)}",
            str(above),
            f"{median(1 - found.bound for found in wide):.1%}",
            f"{median(abs(found.estimate - 1) for found in near):.2%}",
            *(
                f"{pick(found.estimate - 1 for found in drawn_figures):+.2%}"
                for drawn_figures in (near, wide)
                for pick in (min, max)
            ),
            f"{1e6 * median(found.estimate_took_s for found in near):.0f} µs",
            f"{1e6 * median(found.simulate_took_s for found in near):.0f} µs",
        )
    return table


def bubble_table(pp: int = 8, microbatches: int = 32, vpp: int = 4) -> Table:
    """Idle share of device time with F = I = W and no transfers, against the papers."""
    table = Table(
        "schedule", "source", "formula", "expected", "simulated",
        title=f"bubbles of equal stages: {pp} ranks, {microbatches} microbatches, {vpp} stages per "
        "rank if interleaved",
    )  # fmt: skip
    p, m, v = pp, microbatches, vpp
    one_f_one_b = "(p-1) / (m+p-1)", (p - 1) / (m + p - 1)
    expected: dict[ScheduleName, tuple[str, str, float]] = {
        "gpipe": ("arXiv:2104.04473", *one_f_one_b),
        "1f1b": ("arXiv:2104.04473", *one_f_one_b),
        "interleaved": ("arXiv:2104.04473", "(p-1) / (v·m+p-1)", (p - 1) / (v * m + p - 1)),
        "zb-h1": ("arXiv:2401.10241", "(p-1) / (3m+p-1)", (p - 1) / (3 * m + p - 1)),
        "zb-v": ("arXiv:2401.10241", "0 from a rank's first action to its last", 0.0),
    }
    for name, (source, formula, share) in expected.items():
        made = schedule_table(name, p, m, v if name == "interleaved" else None)
        one = (1.0,) * made.stages
        timeline = simulate(made, StageTimes(one, one, one), [0.0] * (made.stages - 1))
        found = timeline.bubble_fraction
        if name == "zb-v":
            found = float((timeline.inner_bubble_s / timeline.step_s).max())
        table.add_row(name, source, formula, f"{share:.6f}", f"{found:.6f}")
    return table


def largest_table(pp: int = 64, microbatches: int = 512) -> Table:
    """Seconds of our own for a large pipeline."""
    table = Table(
        "schedule", "actions", "make the table", "order it", "simulate", "estimate",
        title=f"{pp} ranks, {microbatches} microbatches (tables are made and ordered once)",
    )  # fmt: skip
    for name in NAMES:
        vpp = 2 if name in ("interleaved", "zb-v") else 1
        start = time.perf_counter()
        made = schedule_table(name, pp, microbatches, vpp)
        made_s = time.perf_counter()
        _ = made.order.inputs, made.order.slots
        ordered_s = time.perf_counter()
        one = (1.0,) * made.stages
        found = figures(Pipeline(made, StageTimes(one, one, one), (0.1,) * (made.stages - 1)))
        seconds = (
            made_s - start, ordered_s - made_s, found.simulate_took_s, found.estimate_took_s,
        )  # fmt: skip
        table.add_row(name, f"{len(made.kind):,}", *(f"{1e3 * s:.2f} ms" for s in seconds))
    return table


def main() -> None:
    """Prints the tables."""
    console = Console(width=170)
    for table in (random_table(), bubble_table(), largest_table()):
        console.print(table)


if __name__ == "__main__":
    main()
