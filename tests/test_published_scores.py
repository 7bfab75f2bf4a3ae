"""Scores of the harness over published runs, against definitions and sums done by hand."""

from __future__ import annotations

import sys
from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from published import scores

POSITIVE = st.floats(0.01, 100.0)
PAIRS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=8)


@given(PAIRS)
def test_kendall_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    """Against tau-b's definition (Kendall 1945): concordant less discordant pairs, over untied."""
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for a, b in combinations(pairs, 2)]
    untied = sqrt(sum(x != 0 for x, _ in signs)) * sqrt(sum(y != 0 for _, y in signs))
    expected = sum(x * y for x, y in signs) / untied if untied else 0.0
    assert scores.kendall(*zip(*pairs, strict=True)) == pytest.approx(expected)


@given(st.lists(POSITIVE, min_size=1, max_size=8), st.floats(0.1, 10))
def test_a_right_order_has_no_regret(measured: list[float], scale: float) -> None:
    assert scores.regret([scale * y for y in measured], measured) == pytest.approx(0, abs=1e-6)
    worst = max(measured) / min(measured) - 1
    assert scores.regret([1 / y for y in measured], measured) == pytest.approx(worst, abs=1e-6)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=8))
def test_regret_is_within_the_group(pairs: list[tuple[float, float]]) -> None:
    predicted, measured = zip(*pairs, strict=True)
    found = scores.regret(predicted, measured)
    assert -1e-12 <= found <= max(measured) / min(measured) - 1 + 1e-12


def test_scores_by_hand() -> None:
    found = scores.error_score([1.1, 0.8, 3.0, 4.0], [1.0, 1.0, 2.0, 4.0])  # +10, -20, +50, 0 %
    assert found is not None and found.rows == 4
    assert found.median_ape == pytest.approx(0.15)
    assert found.mean_ape == pytest.approx(0.20)
    assert found.p90_ape == pytest.approx(0.2 + 0.7 * 0.3)  # 0.9 of the way through 0, 10, 20, 50
    assert found.bias == pytest.approx(0.05)
    assert scores.error_score([], []) is None


def test_choice_by_hand() -> None:
    runs = [
        ("a", 1.0, 12.0), ("a", 2.0, 10.0), ("a", 3.0, 20.0),  # one of three pairs is wrong
        ("b", 5.0, 1.0), ("b", 5.0, 3.0), ("b", 5.0, 2.0),  # no preference
        ("c", 1.0, 9.0), ("c", 2.0, 1.0),  # too few
    ]  # fmt: skip
    found = scores.choice_score(runs)
    assert found is not None and (found.groups, found.rows) == (2, 6)
    assert found.kendall == pytest.approx((1 / 3 + 0) / 2)
    assert found.mean_regret == pytest.approx((0.2 + 1.0) / 2)
    assert found.max_regret == pytest.approx(1.0)
    assert found.random_regret == pytest.approx(((12 + 10 + 20) / 30 - 1 + 1.0) / 2)
    assert scores.choice_score(runs[-2:]) is None


def test_memory_by_hand() -> None:
    def memory(group: str, predicted: float | None, measured: float | None, **changes: bool):
        given = {"fits": True, "oom": False, "ran": True, **changes}
        return scores.MemoryRow(group, predicted, measured, **given)

    found = scores.memory_score(
        [
            memory("a", 9.0, 10.0),
            memory("a", 19.0, 20.0, fits=False),
            memory("b", 40.0, 42.0),
            memory("b", None, None),
            memory("b", 90.0, None, fits=False, oom=True, ran=False),
            memory("b", 70.0, None, oom=True, ran=False),
        ]
    )
    assert found is not None and found.rows == 3
    assert (found.oom_caught, found.oom_total, found.ran) == (1, 2, 4)
    assert found.false_oom == pytest.approx(1 / 4)
    assert found.median_ape == pytest.approx(1 / 20)
    # half a misses 1 GiB and half b 2: each is corrected with the other's constant
    assert found.overhead_gib == pytest.approx((1.0, 2.0))
    assert found.median_ape_with_overhead == pytest.approx(1 / 20)
    assert scores.memory_score([memory("a", None, None, ran=False)]) is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), POSITIVE), min_size=1), st.floats(-5, 5))
def test_one_missing_constant_is_found(rows: list[tuple[str, float]], offset: float) -> None:
    constants, left = scores.cross_fitted_offsets([(g, y - offset, y) for g, y in rows])
    assert bool(constants) == (len({group for group, _ in rows}) > 1)
    assert all(predicted == pytest.approx(measured) for predicted, measured in left)
