"""What clusters and frameworks have in common in how they deviate from predictions: the prior that
calibration starts from, learned from other sources than the one that is calibrated.

    cd benchmarks && python -m published.prior      # writes prior.yaml anew

The logarithm of measured over predicted time is taken as Gaussian: one constant, one deviation of
every cause in proportion to its share of the step, a local deviation that runs share the more, the
nearer they are configured, and noise. The standard deviations and the distances within which runs
are alike are learned by the likelihood of whole sources (Rasmussen & Williams, Gaussian Processes
for Machine Learning, section 5.4.1), each with a scale of its own, so that noisy sources do not
drown the others: integrated over, it makes the Gaussian a t distribution. `prior.yaml` has one
prior for every source, learned without any of its rows, and one of all for sources that are new.
Tables of one campaign are one source. What is learned so are the numbers; the form (causes,
features, how the local part falls, MOST_ROWS) was settled with all published tables in sight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from scipy.optimize import minimize

from .baseline import campaign
from .features import FEATURES, Timed, point, shares

Array = npt.NDArray[np.float64]
FILE = Path(__file__).with_name("prior.yaml")
NEW = "a new source"
"""The name in the file of what is learned from all sources."""

MOST_ROWS = 120
"""Rows of a source that are learned from, evenly spaced: an observation costs its cube."""
LEAST_ROWS = 8
SCALE_FREEDOM = 4.0
"""Degrees of freedom of the t distribution: how alike the scales of sources are thought to be."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Standard deviations of the logarithm of measured over predicted time.

    `octaves` are distances by feature, in doublings, at which the local deviation of two runs has a
    correlation of 1/e. A cause that is not in `causes` gets the first guess.
    """

    constant: float
    causes: Mapping[str, float]
    local: float
    octaves: Mapping[str, float]
    noise: float

    def cause(self, name: str) -> float:
        return self.causes.get(name, _GUESS.causes["matmul"])


_GUESS = Prior(0.2, {"matmul": 0.3}, 0.07, dict.fromkeys(FEATURES, 2.0), 0.02)
"""What is thought before any row is seen: class defaults are within about 30 % of what a cluster
does, causes too; repeats of one run differ by 2 %."""
_GUESS_SD = Prior(0.7, {"matmul": 0.5}, 0.5, dict.fromkeys(FEATURES, 0.7), 0.5)
"""How far the learned may be from that: standard deviations of logarithms."""


def covariance(prior: Prior, rows: Sequence[Timed]) -> Array:
    """Covariance of the log ratios of rows, without noise."""
    causes = sorted({cause for row in rows for cause in shares(row)})
    source = _Source.of(rows, causes, np.zeros(len(rows)))
    found: Array = _covariance(_vector(prior, causes), source)[0]
    return found


@lru_cache(maxsize=1)
def _priors() -> Mapping[str, Prior]:
    data: Mapping[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: Prior(**fields) for name, fields in data.items()}


def prior_for(family: str) -> Prior:
    """The prior that was learned without the source of a family."""
    return _priors().get(campaign(family)) or _priors()[NEW]


def learned(sources: Mapping[str, Sequence[Sequence[Timed]]]) -> dict[str, Prior]:
    """The prior of every source from the clusters of the others, and of all for a new one."""
    usable = {
        name: [_thinned(rows) for rows in clusters if len(rows) >= LEAST_ROWS]
        for name, clusters in sources.items()
    }
    found = {NEW: fitted([rows for clusters in usable.values() for rows in clusters])}
    for left_out in sorted(sources):
        others = [
            rows for name, clusters in usable.items() if name != left_out for rows in clusters
        ]
        found[left_out] = fitted(others, found[NEW])
    return found


def _thinned(rows: Sequence[Timed]) -> Sequence[Timed]:
    return rows[:: -(-len(rows) // MOST_ROWS)]


def fitted(clusters: Sequence[Sequence[Timed]], start: Prior = _GUESS) -> Prior:
    """The most likely prior for the rows of several clusters."""
    causes = sorted({cause for rows in clusters for row in rows for cause in shares(row)})
    sources = [
        _Source.of(rows, causes, np.log([row.measured_s / row.predicted_s for row in rows]))
        for rows in clusters
    ]
    guess, sd = _vector(_GUESS, causes), np.exp(_vector(_GUESS_SD, causes))

    def objective(unknowns: Array) -> tuple[float, Array]:
        off = (unknowns - guess) / sd
        value, gradient = float(0.5 * off @ off), off / sd
        for source in sources:
            one, slope = surprise(unknowns, source)
            value, gradient = value + one, gradient + slope
        return value, gradient

    found = minimize(
        objective, _vector(start, causes), jac=True, method="L-BFGS-B", options={"maxiter": 60}
    )
    e = [float(value) for value in np.exp(found.x)]
    n = len(causes)
    return Prior(
        constant=e[0],
        causes=dict(zip(causes, e[3:], strict=False)),
        local=e[1],
        octaves=dict(zip(FEATURES, e[3 + n :], strict=True)),
        noise=e[2],
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows as arrays: shares by cause, squared distances by feature, log ratios."""

    shares: Array
    distance2: Array
    log_ratio: Array

    @staticmethod
    def of(rows: Sequence[Timed], causes: Sequence[str], log_ratio: Array) -> _Source:
        parts = [shares(row) for row in rows]
        points = np.array([point(row.setup) for row in rows])
        return _Source(
            np.array([[part.get(cause, 0.0) for cause in causes] for part in parts]),
            (points[:, None, :] - points[None, :, :]) ** 2,
            log_ratio,
        )


def _vector(prior: Prior, causes: Sequence[str]) -> Array:
    """Logarithms of a prior: constant, local, noise, causes, octaves."""
    sds = [prior.constant, prior.local, prior.noise, *(prior.cause(name) for name in causes)]
    return np.array([log(value) for value in [*sds, *(prior.octaves[name] for name in FEATURES)]])


def _covariance(unknowns: Array, source: _Source) -> tuple[Array, Array, Array]:
    """The covariance without noise, its local part, and the scaled distances of that.

    The local part falls exponentially (Matern's with exponent 1/2): deviations are rough, for a
    library changes its kernel from one size to the next."""
    n = source.shares.shape[1]
    constant, local = np.exp(unknowns[:2])
    scaled = source.shares * np.exp(unknowns[3 : 3 + n])
    distance = np.sqrt(source.distance2 @ np.exp(-2 * unknowns[3 + n :]))
    near = local**2 * np.exp(-distance)
    return constant**2 + scaled @ scaled.T + near, near, distance


def surprise(unknowns: Array, source: _Source) -> tuple[float, Array]:
    """The negative logarithm of a source's likelihood, but for a constant, and its gradient."""
    smooth, near, distance = _covariance(unknowns, source)
    y, rows, causes = source.log_ratio, len(source.log_ratio), source.shares.shape[1]
    noise2 = np.exp(2 * unknowns[2])
    inverse = np.linalg.inv(smooth + noise2 * np.eye(rows))
    weights = inverse @ y
    misfit = float(y @ weights)
    value = 0.5 * (SCALE_FREEDOM + rows) * np.log1p(misfit / SCALE_FREEDOM)
    value -= 0.5 * float(np.linalg.slogdet(inverse)[1])
    pull = (SCALE_FREEDOM + rows) / (SCALE_FREEDOM + misfit)
    slope = 0.5 * (inverse - pull * np.outer(weights, weights))  # of the value by the covariance
    each = np.exp(2 * unknowns[3 : 3 + causes])
    by_cause = (
        2 * each * np.einsum("ic,ij,jc->c", source.shares, slope, source.shares, optimize=True)
    )
    pulled = slope * near / np.maximum(distance, 1e-12)
    by_octave = np.exp(-2 * unknowns[3 + causes :]) * np.einsum(
        "ij,ijf->f", pulled, source.distance2
    )
    first = [
        2 * np.exp(2 * unknowns[0]) * slope.sum(),
        2 * float((slope * near).sum()),
        2 * noise2 * float(np.trace(slope)),
    ]
    return float(value), np.concatenate([first, by_cause, by_octave])


def _written(priors: Mapping[str, Prior]) -> str:
    lines = [
        "# Learned from the published tables (`python -m published.prior`), each entry without any",
        "# row of the source it is named for. Standard deviations of log(measured / predicted);",
        "# octaves are doublings.",
    ]
    for name, prior in priors.items():
        lines.append(f"{name}:")
        lines += [f"  {key}: {getattr(prior, key):.3g}" for key in ("constant", "local", "noise")]
        for key, values in (("causes", prior.causes), ("octaves", prior.octaves)):
            inside = ", ".join(f"{inner}: {value:.3g}" for inner, value in values.items())
            lines.append(f"  {key}: {{{inside}}}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Predicts the published tables, learns all priors and writes them."""
    from published_runs import REFERENCE, evaluate

    from .report import family_of
    from .rows import read_runs

    clusters: dict[str, dict[tuple[str, str], list[Timed]]] = {}
    for path in (REFERENCE, REFERENCE.with_name("published_runs_single_node.csv")):
        for outcome in evaluate(read_runs(path)).outcomes:
            setup, measured_s = outcome.setup, outcome.measured_s
            if measured_s and setup.run.config_complete is not False:
                row = Timed(setup, outcome.estimate.breakdown, measured_s)
                cluster = family_of(setup), setup.run.gpu
                source = clusters.setdefault(campaign(setup.run.family), {})
                source.setdefault(cluster, []).append(row)
    found = learned({name: list(each.values()) for name, each in clusters.items()})
    FILE.write_text(_written(found), encoding="utf-8")


if __name__ == "__main__":
    main()
