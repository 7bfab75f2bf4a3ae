"""A few rows of a cluster as probes: what is learned from them, and from other sources."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from published import prior  # noqa: E402
from published.baseline import campaign  # noqa: E402
from published.calibration import calibrated, choose  # noqa: E402
from published.features import FEATURES, Timed, shares  # noqa: E402
from published.rows import read_runs  # noqa: E402
from test_published_runs import PLAIN, TABLES, needs_data, setup  # noqa: E402


def _timed(true: Mapping[str, float], count: int = 30, seed: int = 7) -> list[Timed]:
    """Runs whose measured time is predicted but for a factor on each cause."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        tp, mbs = int(2 ** draw.integers(0, 4)), int(2 ** draw.integers(0, 4))
        parts = {
            "matmul": 1.0, "attention": float(draw.uniform(0.1, 0.5)),
            "tensor_parallel": 0.1 * (tp > 1) * float(draw.uniform(0.5, 2)) * tp,
            "data_parallel": 0.2 / mbs,
        }  # fmt: skip
        bubble = 0.2 * sum(parts[c] for c in ("matmul", "attention", "tensor_parallel"))
        seconds = sum(
            true[cause] * value * (1 if cause == "data_parallel" else 1.2)
            for cause, value in parts.items()
        )
        here = setup(row_id=f"r{i}", tp=tp, dp=16, pp=1, n_gpus=16 * tp, mbs=mbs, gbs=512)
        rows.append(Timed(here, {**parts, "pipeline_bubble": bubble}, seconds))
    return rows


RIGHT = dict.fromkeys(("matmul", "attention", "tensor_parallel", "data_parallel"), 1.0)


def test_multipliers_are_found() -> None:
    true = {"matmul": 1.2, "attention": 0.8, "tensor_parallel": 1.3, "data_parallel": 1.1}
    found = calibrated("lab", _timed(true), 6, PLAIN)
    assert found is not None and len(set(found.probes)) == 6
    assert found.after.rows == 24 and not set(found.probes) & set(found.predicted_s)
    assert found.before.median_ape > 0.1
    assert found.after.median_ape < 0.015 and found.after.p90_ape < 0.03
    assert found.multipliers["everything"] * found.multipliers["matmul"] > 1.1
    assert found.multipliers["attention"] < 1 < found.multipliers["tensor_parallel"]


def test_a_right_prediction_stays() -> None:
    found = calibrated("lab", _timed(RIGHT), 4, PLAIN)
    assert found is not None and found.after.p90_ape < 1e-9
    assert all(value == pytest.approx(1) for value in found.multipliers.values())


def test_a_probe_tells_about_runs_like_it() -> None:
    """Runs with tp = 8 take twice as long and nothing else does: what no cause explains."""
    rows = [
        replace(row, measured_s=row.measured_s * (2 if row.setup.run.tp == 8 else 1))
        for row in _timed(RIGHT)
    ]
    near = replace(PLAIN, local=0.3, octaves={**PLAIN.octaves, "tp": 0.3, "tokens_per_rank": 50.0})
    far = replace(PLAIN, local=1e-3)
    local, shared = calibrated("lab", rows, 6, near), calibrated("lab", rows, 6, far)
    assert local is not None and shared is not None
    assert local.after.mean_ape < 0.5 * shared.after.mean_ape


def test_probes_do_not_depend_on_measurements() -> None:
    rows = _timed(RIGHT)
    shuffled = [replace(row, measured_s=1.0 + i) for i, row in enumerate(rows)]
    first, second = calibrated("lab", rows, 5), calibrated("lab", shuffled, 5)
    assert first is not None and second is not None and first.probes == second.probes


def test_few_rows_have_few_probes() -> None:
    rows = _timed(RIGHT)
    few = calibrated("lab", rows[:7], 6)
    assert few is not None and (len(few.probes), few.after.rows) == (4, 3)
    assert calibrated("lab", rows[:5], 6) is None
    one = calibrated("lab", rows[:4], 1)
    assert one is not None and one.after.rows == 3


@given(st.integers(0, 99), st.integers(1, 6))
def test_each_probe_is_the_best_next_one(seed: int, probes: int) -> None:
    """Against trying every row: the variance left over all rows, by definition."""
    draw = np.random.default_rng(seed)
    factor = draw.normal(size=(8, 4))
    covariance = factor @ factor.T
    chosen = choose(covariance, probes, 0.02)
    assert len(set(chosen)) == probes

    def left(rows: list[int]) -> float:
        known = covariance[np.ix_(rows, rows)] + 0.02**2 * np.eye(len(rows))
        cross = covariance[:, rows]
        return float(np.trace(covariance - cross @ np.linalg.solve(known, cross.T)))

    before = chosen[: probes - 1]
    others = [i for i in range(8) if i not in before]
    assert left(chosen) <= min(left([*before, i]) for i in others) + 1e-9


@given(st.floats(0, 1), st.integers(1, 8), st.sampled_from((1, 2, 4, 8)))
def test_shares_add_up(bubble: float, pp: int, tp: int) -> None:
    """A bubble is spread over what is paid per microbatch, the vocabulary has its part of the
    products; once-per-step causes keep theirs."""
    for missing in ("", "zero stage; vocab 50257 padded"):
        here = setup(missing=missing, tp=tp, pp=pp, dp=1, n_gpus=tp * pp, gpus_per_node=1, gbs=8)
        parts = {"matmul": 2.0, "attention": 0.5, "optimizer": 0.25, "pipeline_bubble": bubble}
        found = shares(Timed(here, parts, 1.0))
        assert sum(found.values()) == pytest.approx(1)
        assert found["optimizer"] == pytest.approx(0.25 / sum(parts.values()))
        head = {"head", "head of unpadded words"} & set(found)
        products = found["matmul"] + sum(found[name] for name in head)
        assert products / found["attention"] == pytest.approx(4)
        # 50257 words in 2 parts are 25128 = 8 * 3141; whole, in 4 or in 8 they fill no row of 8
        odd = bool(missing) and tp != 2
        assert head == {"head of unpadded words" if odd else "head"}


def test_the_likelihoods_slope_is_its_slope() -> None:
    """Against differences, for every unknown of the prior."""
    rows = _timed({**RIGHT, "matmul": 1.3, "attention": 0.7}, count=8)
    causes = sorted(shares(rows[0]))
    ratio = np.log([row.measured_s / row.predicted_s for row in rows])
    source = prior._Source.of(rows, causes, ratio + 0.05 * np.sin(np.arange(8)))
    at = prior._vector(PLAIN, causes) + 0.1 * np.cos(np.arange(3 + len(causes) + len(FEATURES)))
    _, slope = prior.surprise(at, source)
    for i in range(len(at)):
        step = np.zeros(len(at))
        step[i] = 1e-5
        up, down = prior.surprise(at + step, source)[0], prior.surprise(at - step, source)[0]
        assert slope[i] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-6)


def test_a_scale_of_its_own() -> None:
    """A source with all deviations ten times as large says the same of their proportions: the
    slope falls to nothing when only the scale is wrong, however wrong."""
    rows = _timed(RIGHT, count=60)
    causes = sorted(shares(rows[0]))
    at = prior._vector(replace(PLAIN, noise=0.5, local=1e-4, constant=1e-4), causes)
    draw = np.random.default_rng(3).normal(size=60)
    gaussian = 0.5 * 60 * (10.0**2 - 1)  # what it would cost a Gaussian
    small, large = (
        prior.surprise(at, prior._Source.of(rows, causes, 0.5 * scale * draw))[0]
        for scale in (1.0, 10.0)
    )
    assert 0 < large - small < gaussian / 10


def test_what_differs_between_clusters_is_learned() -> None:
    """Clusters that differ in attention alone, and clusters that differ in communication alone."""

    def clusters(cause: str) -> list[list[Timed]]:
        return [
            _timed({**RIGHT, cause: factor}, count=12, seed=i)
            for i, factor in enumerate((0.6, 0.8, 1.3, 1.6))
        ]

    first, second = (prior.fitted(clusters(c)) for c in ("attention", "tensor_parallel"))
    assert first.causes["attention"] > 1.5 * first.causes["tensor_parallel"]
    assert second.causes["tensor_parallel"] > 1.5 * second.causes["attention"]


@needs_data
def test_every_source_has_a_prior_without_it() -> None:
    sources = {campaign(run.family) for path in TABLES for run in read_runs(path).rows
               if run.iter_time_s and run.config_complete is not False}  # fmt: skip
    assert set(prior._priors()) == {prior.NEW, *sources}
    assert prior.prior_for("vtrain-multi") == prior.prior_for("vtrain-single")
    assert prior.prior_for("a lab nobody knows") == prior._priors()[prior.NEW]
    for each in prior._priors().values():
        assert set(each.octaves) == set(FEATURES)
        values = [each.constant, each.local, each.noise, *each.causes.values()]
        assert all(0 < value < 2 for value in values)


# The command
