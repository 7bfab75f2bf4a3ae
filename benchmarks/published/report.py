"""From rows and predictions to the report: the scores of every family, as data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .baseline import Baseline
from .calibration import Calibrated, Timed, calibrated
from .predictors import Estimate, Predict, least_that_fits
from .scores import (
    ChoiceScore,
    ErrorScore,
    MemoryRow,
    MemoryScore,
    choice_score,
    error_score,
    memory_score,
)
from .setup import Setup, Skipped

DENSE_A100 = ("bloom", "internevo", "korthikanti", "megatron-table1", "vtrain-multi")
"""The dense A100 sources of the data README's first table, together called `dense-a100`."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row and what is predicted of it; `baseline_s` is None where no baseline could be fitted."""

    setup: Setup
    estimate: Estimate
    baseline_s: float | None

    @property
    def measured_s(self) -> float | None:
        return self.setup.run.iter_time_s


@dataclass(frozen=True, slots=True)
class FamilyScore:
    """Errors of a family, and the baseline's on the same rows."""

    errors: ErrorScore
    baseline: ErrorScore | None


@dataclass(frozen=True, slots=True)
class Report:
    """Scores by family; `choice` holds beside each family its groups restricted to equal models."""

    families: Mapping[str, FamilyScore]
    choice: Mapping[str, ChoiceScore]
    baseline_choice: Mapping[str, ChoiceScore]
    memory: Mapping[str, MemoryScore]
    outcomes: tuple[Outcome, ...]
    skipped: tuple[Skipped, ...]
    calibrated: tuple[Calibrated, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints; fractions, seconds, GiB."""
        return {
            "families": {
                name: {
                    **asdict(score.errors),
                    "baseline_median_ape": score.baseline and score.baseline.median_ape,
                    "baseline_p90_ape": score.baseline and score.baseline.p90_ape,
                }
                for name, score in self.families.items()
            },
            "choice": {name: asdict(score) for name, score in self.choice.items()},
            "baseline_choice": {k: asdict(score) for k, score in self.baseline_choice.items()},
            "memory": {name: asdict(score) for name, score in self.memory.items()},
            "calibrated": {
                each.source: {
                    "probes": list(each.probes),
                    "rows": each.after.rows,
                    "median_ape": each.after.median_ape,
                    "p90_ape": each.after.p90_ape,
                    "before_median_ape": each.before.median_ape,
                    "before_p90_ape": each.before.p90_ape,
                    "multipliers": dict(each.multipliers),
                }
                for each in self.calibrated
            },
            "rows": [
                {
                    "row_id": outcome.setup.run.row_id,
                    "predicted_s": outcome.estimate.step_seconds,
                    "measured_s": outcome.measured_s,
                    "predicted_gib": predicted_gib(outcome),
                    "measured_gib": outcome.setup.run.mem_gb_per_gpu,
                    "fits": outcome.estimate.fits,
                    "time": dict(outcome.estimate.breakdown),
                }
                for outcome in self.outcomes
            ],
            "skipped": [{"row_id": row.run.row_id, "reason": row.reason} for row in self.skipped],
        }


def predict_all(
    setups: Iterable[Setup], predict: Predict, baseline: Baseline
) -> tuple[list[Outcome], list[Skipped]]:
    """Predicts every row; one that the predictor refuses (InvalidInput) is reported as skipped."""
    from shardwright import ShardwrightError

    outcomes, skipped = [], []
    for setup in setups:
        try:
            estimate = least_that_fits(setup, predict)
        except ShardwrightError as error:
            skipped.append(Skipped(setup.run, f"refused: {error}"))
        else:
            outcomes.append(Outcome(setup, estimate, baseline.seconds(setup)))
    return outcomes, skipped


def report(
    outcomes: Sequence[Outcome], skipped: Sequence[Skipped], probes: int | None = None
) -> Report:
    """All scores; with `probes`, also those after calibrating each cluster with so many rows."""
    timed = [o for o in outcomes if o.measured_s and o.setup.run.config_complete is not False]
    families = {name: _family(rows) for name, rows in _by(timed, _names).items()}
    return Report(
        families=families,
        choice=_choices(timed, lambda outcome: outcome.estimate.step_seconds),
        baseline_choice=_choices(timed, lambda outcome: outcome.baseline_s or 0.0),
        memory=_memory(outcomes),
        outcomes=tuple(outcomes),
        skipped=tuple(skipped),
        calibrated=_calibrate(timed, probes) if probes else (),
    )


def family_of(setup: Setup) -> str:
    """The family as it is reported: BLOOM's V100 rows, which carry ±40 %, are one of their own."""
    run = setup.run
    return f"{run.family}-v100" if run.family == "bloom" and "V100" in run.gpu else run.family


def _names(outcome: Outcome) -> list[str]:
    """The lines of the table that a row counts in: its family, the dense or the expert rows of a
    family that has both kinds, and the dense A100 sources together."""
    family, dims = family_of(outcome.setup), outcome.setup.dims
    names = [family]
    if family in ("megatron-bridge", "simumax-b200"):
        names.append(f"{family} {'experts' if dims.experts else 'dense'}")
    if family in DENSE_A100 and not dims.experts:
        names.append("dense-a100")
    return names


def _by(
    outcomes: Iterable[Outcome], names: Callable[[Outcome], list[str]]
) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for name in names(outcome):
            found.setdefault(name, []).append(outcome)
    return found


def _family(rows: Sequence[Outcome]) -> FamilyScore:
    measured = [row.measured_s or 0.0 for row in rows]
    errors = error_score([row.estimate.step_seconds for row in rows], measured)
    assert errors
    known = [row for row in rows if row.baseline_s is not None]
    baseline = error_score(
        [row.baseline_s or 0.0 for row in known], [row.measured_s or 0.0 for row in known]
    )
    return FamilyScore(errors, baseline)


def _choices(
    timed: Sequence[Outcome], seconds: Callable[[Outcome], float]
) -> dict[str, ChoiceScore]:
    """Groups as the data's README compares them: runs of one group, model, batch and number of
    GPUs; and, where a model comes in several shapes (BLOOM's search for a number of heads), runs of
    equal shape."""
    found: dict[str, ChoiceScore] = {}
    for name, rows in _by(timed, lambda outcome: [family_of(outcome.setup)]).items():
        by_group = choice_score((_group(o), seconds(o), o.measured_s or 0.0) for o in rows)
        equal = choice_score(
            ((_group(o), o.setup.dims), seconds(o), o.measured_s or 0.0) for o in rows
        )
        if by_group:
            found[name] = by_group
        if equal and by_group and equal.groups != by_group.groups:
            found[f"{name} (equal shape)"] = equal
    return found


def _group(outcome: Outcome) -> Hashable:
    run = outcome.setup.run
    return run.group, run.model, run.gbs, run.n_gpus, run.seq


def predicted_gib(outcome: Outcome) -> float | None:
    """Predicted memory of what the source's figure counts."""
    estimate, kind = outcome.estimate, outcome.setup.memory_kind
    found = estimate.allocated_bytes if kind == "allocated" else estimate.memory_bytes
    return None if found is None else found / GIB


def _memory(outcomes: Sequence[Outcome]) -> dict[str, MemoryScore]:
    found: dict[str, MemoryScore] = {}
    for name, rows in _by(outcomes, lambda outcome: [family_of(outcome.setup)]).items():
        score = memory_score(
            [
                MemoryRow(
                    group=row.setup.run.group,
                    predicted_gib=predicted_gib(row),
                    measured_gib=row.setup.run.mem_gb_per_gpu,
                    fits=row.estimate.fits,
                    oom=bool(row.setup.run.oom),
                    ran=bool(row.measured_s) and row.setup.memory_known,
                )
                for row in rows
            ]
        )
        if score:
            found[name] = score
    return found


def _calibrate(timed: Sequence[Outcome], probes: int) -> tuple[Calibrated, ...]:
    """One calibration per source and kind of GPU: that is as near to a cluster as sources say."""
    clusters: dict[tuple[str, str], list[Timed]] = {}
    for outcome in timed:
        key = family_of(outcome.setup), outcome.setup.run.gpu
        row = Timed(outcome.setup, outcome.estimate.breakdown, outcome.measured_s or 0.0)
        clusters.setdefault(key, []).append(row)
    several = {family for family, gpu in clusters if sum(f == family for f, _ in clusters) > 1}
    found = (
        calibrated(f"{family} {gpu}" if family in several else family, rows, probes)
        for (family, gpu), rows in clusters.items()
    )
    return tuple(each for each in found if each)
