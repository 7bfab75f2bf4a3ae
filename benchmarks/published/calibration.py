"""Calibrating the predictor to a cluster with a few of its own rows, and judging it on the others.

The prior (`prior.py`) says how predictions deviate on clusters in general: causes by what they take
of a step (the rate of products, of memory, of each kind of communication, overhead), and locally,
so that a probe also tells about runs that are configured like it. Probes condition it (kriging;
Rasmussen & Williams, Gaussian Processes for Machine Learning, section 2.2). Which rows are probes
is decided by configurations and predictions alone, before any measurement is looked at: each next
probe is the one that leaves the least uncertainty over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .features import Timed as Timed
from .features import shares
from .prior import Prior, covariance, prior_for
from .scores import ErrorScore, error_score

Array = npt.NDArray[np.float64]
LEAST = 3
"""Rows to report on, and probes, where more are asked for."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A source after calibration: which rows were probes, the multipliers, errors of the others.

    `multipliers` are what the probes say of all runs (`everything`) and of the time of a cause.
    """

    source: str
    probes: tuple[str, ...]
    multipliers: Mapping[str, float]
    before: ErrorScore
    after: ErrorScore
    predicted_s: Mapping[str, float]


def calibrated(
    source: str, rows: Sequence[Timed], probes: int, prior: Prior | None = None
) -> Calibrated | None:
    """Calibrates with that many probes, or fewer where else fewer than LEAST rows would be left to
    report on; None where neither so many probes are left.

    `prior` is by default the one that was learned without the rows' source.
    """
    wanted, probes = probes, min(probes, len(rows) - LEAST)
    if probes < min(wanted, LEAST):
        return None
    prior = prior or prior_for(rows[0].setup.run.family)
    smooth = covariance(prior, rows)
    chosen = choose(smooth, probes, prior.noise)
    measured = np.array([rows[i].measured_s for i in chosen])
    log_ratio = np.log(measured / [rows[i].predicted_s for i in chosen])
    known = smooth[np.ix_(chosen, chosen)] + prior.noise**2 * np.eye(probes)
    weights = np.linalg.solve(known, log_ratio)
    corrected = np.exp(smooth[:, chosen] @ weights)
    others = [i for i in range(len(rows)) if i not in set(chosen)]
    predicted = {i: rows[i].predicted_s * float(corrected[i]) for i in others}
    left = [rows[i].measured_s for i in others]
    before = error_score([rows[i].predicted_s for i in others], left)
    after = error_score(list(predicted.values()), left)
    assert before and after
    return Calibrated(
        source=source,
        probes=tuple(rows[i].setup.run.row_id for i in chosen),
        multipliers=_multipliers(prior, [shares(rows[i]) for i in chosen], weights),
        before=before,
        after=after,
        predicted_s={rows[i].setup.run.row_id: seconds for i, seconds in predicted.items()},
    )


def _multipliers(
    prior: Prior, parts: Sequence[Mapping[str, float]], weights: Array
) -> dict[str, float]:
    """The most likely factors: of everything, and of each cause."""
    found = {"everything": float(np.exp(prior.constant**2 * weights.sum()))}
    for cause in sorted({cause for part in parts for cause in part}):
        taken = np.array([part.get(cause, 0.0) for part in parts])
        found[cause] = float(np.exp(prior.cause(cause) ** 2 * taken @ weights))
    return found


def choose(smooth: Array, probes: int, noise: float) -> list[int]:
    """Rows to measure: each next one lowers the summed variance of all rows the most, given those
    before (the first of equals). `smooth` is their covariance without `noise`."""
    left = smooth.copy()
    chosen: list[int] = []
    for _ in range(min(probes, len(left))):
        gain = (left**2).sum(axis=0) / (left.diagonal() + noise**2)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        column = left[:, best].copy()
        left -= np.outer(column, column) / (column[best] + noise**2)
        chosen.append(best)
    return chosen
