"""Calibrating the predictor to a cluster with a few of its own rows, and judging it on the others.

A measured time over the predicted one is modelled as

    measured / predicted = sum over causes of (share of the cause * multiplier) + local + noise

Multipliers are physical (the rate of matrix products, of memory, of each kind of communication,
overhead) with a prior around 1; `local` is a smooth deviation over configurations, so that a probe
also tells about runs that are configured like it. All is Gaussian, so fitting is least squares:
ridge regression towards 1 and kriging at once (Rasmussen & Williams, Gaussian Processes for Machine
Learning, section 2.7), with multipliers kept positive. Which rows are probes is decided by
configurations alone, before any measurement is looked at: each next probe is the one that leaves
the least uncertainty over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt
from scipy.optimize import lsq_linear

from .scores import ErrorScore, error_score
from .setup import Setup

Array = npt.NDArray[np.float64]

MULTIPLIER_SD = 0.3
"""Prior of a multiplier: class defaults are within about 30 % of what a cluster does."""
LEAST_MULTIPLIER = 0.1
"""No cause takes less than a tenth of what it should."""
LOCAL_SD = 0.05
"""Prior of the local deviation of one configuration."""
LOCAL_OCTAVES = 1.5
"""Configurations that are more than so many doublings apart share little of it."""
NOISE_SD = 0.02
"""Repeats of one run on one cluster differ by about 2 %. These four are one set for all sources, of
a grid of 72 on which the mean gain over the sources hardly differs: the median error falls to 0.44
to 0.69 of what it was, the 90th percentile to 0.68 to 0.86."""

ONCE_PER_STEP = ("data_parallel", "optimizer")
BUBBLE = "pipeline_bubble"
_AXES = ("tp", "pp", "dp", "cp", "ep", "mbs", "vpp", "seq", "n_gpus", "zero_group")
_SIZES = ("hidden", "layers", "head_dim")


@dataclass(frozen=True, slots=True)
class Timed:
    """A row with its prediction by cause and its measured time, in seconds."""

    setup: Setup
    breakdown: Mapping[str, float]
    measured_s: float

    @property
    def predicted_s(self) -> float:
        return sum(self.breakdown.values())


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A source after calibration: which rows were probes, the multipliers, errors of the others."""

    source: str
    probes: tuple[str, ...]
    multipliers: Mapping[str, float]
    before: ErrorScore
    after: ErrorScore
    predicted_s: Mapping[str, float]


def calibrated(source: str, rows: Sequence[Timed], probes: int) -> Calibrated | None:
    """Calibrates with that many probes; None where fewer than 3 rows are left to report on."""
    if len(rows) < probes + 3:
        return None
    causes = sorted({cause for row in rows for cause in row.breakdown} - {BUBBLE})
    shares = np.array([_shares(row, causes) for row in rows])
    local = _local(rows)
    chosen = choose(MULTIPLIER_SD**2 * shares @ shares.T + local, probes)
    ratio = np.array([rows[i].measured_s / rows[i].predicted_s for i in chosen])
    multipliers, deviation = _fitted(shares[chosen], local[np.ix_(chosen, chosen)], ratio)
    corrected = shares @ multipliers + local[:, chosen] @ deviation
    others = [i for i in range(len(rows)) if i not in set(chosen)]
    predicted = {i: rows[i].predicted_s * max(float(corrected[i]), 0.05) for i in others}
    measured = [rows[i].measured_s for i in others]
    before = error_score([rows[i].predicted_s for i in others], measured)
    after = error_score(list(predicted.values()), measured)
    assert before and after
    return Calibrated(
        source=source,
        probes=tuple(rows[i].setup.run.row_id for i in chosen),
        multipliers=dict(zip(causes, map(float, multipliers), strict=True)),
        before=before,
        after=after,
        predicted_s={rows[i].setup.run.row_id: seconds for i, seconds in predicted.items()},
    )


def _fitted(shares: Array, local: Array, ratio: Array) -> tuple[Array, Array]:
    """The most likely multipliers, none below LEAST_MULTIPLIER, and the weights of the probes in
    the local deviation of any row.

    Least squares in whitened unknowns: multipliers in their prior's deviations from 1, and `u` with
    local deviation = root @ u.
    """
    probes, causes = shares.shape
    root = np.linalg.cholesky(local + 1e-9 * np.eye(probes))
    model = np.hstack([MULTIPLIER_SD * shares, root]) / NOISE_SD
    residual = (ratio - shares.sum(axis=1)) / NOISE_SD
    unknowns = causes + probes
    least = np.full(unknowns, -np.inf)
    least[:causes] = (LEAST_MULTIPLIER - 1) / MULTIPLIER_SD
    found = lsq_linear(
        np.vstack([model, np.eye(unknowns)]),
        np.concatenate([residual, np.zeros(unknowns)]),
        bounds=(least, np.inf),
    ).x
    weights: Array = np.linalg.solve(root.T, found[causes:])
    return 1 + MULTIPLIER_SD * found[:causes], weights


def choose(covariance: Array, probes: int) -> list[int]:
    """Rows to measure: each next one lowers the summed variance of all rows the most, given those
    before (the first of equals)."""
    left = covariance.copy()
    chosen: list[int] = []
    for _ in range(min(probes, len(left))):
        gain = (left**2).sum(axis=0) / (left.diagonal() + NOISE_SD**2)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        column = left[:, best].copy()
        left -= np.outer(column, column) / (column[best] + NOISE_SD**2)
        chosen.append(best)
    return chosen


def _shares(row: Timed, causes: Sequence[str]) -> list[float]:
    """Shares of the step by cause. A bubble is waiting for other stages' work: it is spread over
    the causes that are paid per microbatch."""
    total = row.predicted_s
    bubble = row.breakdown.get(BUBBLE, 0.0)
    repeated = sum(
        seconds for cause, seconds in row.breakdown.items()
        if cause != BUBBLE and cause not in ONCE_PER_STEP
    )  # fmt: skip
    shares = []
    for cause in causes:
        seconds = row.breakdown.get(cause, 0.0)
        if cause not in ONCE_PER_STEP and repeated:
            seconds += bubble * seconds / repeated
        shares.append(seconds / total)
    return shares


def _local(rows: Sequence[Timed]) -> Array:
    """Covariance of the local deviation: squared exponential in doublings of degrees and sizes."""
    points = np.array([_point(row.setup) for row in rows])
    distance2 = ((points[:, None, :] - points[None, :, :]) ** 2).sum(axis=2)
    similar: Array = LOCAL_SD**2 * np.exp(-0.5 * distance2 / LOCAL_OCTAVES**2)
    return similar


def _point(setup: Setup) -> list[float]:
    run, dims = setup.run, setup.dims
    degrees = [log2(getattr(run, name) or 1) for name in _AXES]
    sizes = [log2(getattr(dims, name)) for name in _SIZES]
    modes = [float(len(setup.recompute) == 1 and setup.recompute[0] == "full"), float(bool(run.sp))]
    return [*degrees, *sizes, *modes, float(run.zero_stage or 0)]
