"""Fabrics: what a hash of flows onto paths costs, beside spraying packets and splitting flows."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shardwright.costmodel.fabric import (
    Fabric,
    expected_fullest_bin,
    fullest_path_flows,
    split_flows,
)
from shardwright.ir.errors import InvalidInput

counts = st.integers(1, 40)


@pytest.mark.parametrize(("balls", "bins"), [(5, 1), (1, 5), (2, 2), (4, 3), (6, 3), (5, 4)])
def test_the_fullest_bin_is_that_of_all_throws(balls: int, bins: int) -> None:
    throws = list(product(range(bins), repeat=balls))
    total = sum(max(throw.count(each) for each in range(bins)) for throw in throws)
    assert expected_fullest_bin(balls, bins) == pytest.approx(total / len(throws), rel=1e-9)


@given(counts, counts)
def test_split_flows_load_every_path_as_spraying_does(flows: int, paths: int) -> None:
    load = [0.0] * paths
    plan = split_flows(flows, paths)
    for shares in plan:
        assert sum(share for _, share in shares) == pytest.approx(1)
        for path, share in shares:
            load[path] += share
    assert len(plan) == flows
    assert load == pytest.approx([flows / paths] * paths)
    whole = sum(len(shares) == 1 for shares in plan)
    assert whole >= flows // paths * paths
    assert fullest_path_flows("split", flows, paths) == pytest.approx(max(load))


@given(counts, counts)
def test_a_hash_is_never_better_than_spraying(flows: int, paths: int) -> None:
    hashed = fullest_path_flows("ecmp", flows, paths)
    assert flows / paths * (1 - 1e-9) <= hashed <= flows * (1 + 1e-9)
    assert hashed >= 1 - 1e-9


@given(counts, counts, st.integers(1, 8), st.floats(1, 8))
def test_more_flows_and_less_oversubscription_never_hurt(
    devices: int, uplinks: int, flows: int, over: float
) -> None:
    for mode in ("ideal", "ecmp", "split"):
        few = Fabric(mode=mode, leaf_devices=devices, uplinks=uplinks, oversubscription=over)
        assert 0 < few.bandwidth_fraction <= 1 / over * (1 + 1e-9)
        many = few.model_copy(update={"flows_per_device": flows, "oversubscription": 1.0})
        many = Fabric.model_validate(many.model_dump())
        assert many.bandwidth_fraction >= few.bandwidth_fraction * (1 - 1e-9)
        if mode != "ecmp":
            assert few.bandwidth_fraction == pytest.approx(1 / over)


def test_a_leaf_of_32_hashed_onto_32_uplinks_keeps_under_a_third() -> None:
    """Maximum of 32 balls in 32 bins: 3.53 (simulated: 3.532 ± 0.002 over 200,000 throws)."""
    assert Fabric(mode="ecmp").bandwidth_fraction == pytest.approx(1 / 3.53, rel=2e-3)
    assert Fabric(mode="ecmp", flows_per_device=16).bandwidth_fraction > 0.6


def test_bad_fabrics_say_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match="oversubscription"):
        Fabric(oversubscription=0.5)
    with pytest.raises(ValidationError, match="mode"):
        Fabric(mode="magic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="flows is 0, expected 1 to 1024"):
        fullest_path_flows("ideal", 0, 4)
    with pytest.raises(InvalidInput, match="paths is 2000, expected 1 to 1024"):
        fullest_path_flows("ecmp", 4, 2000)
    with pytest.raises(InvalidInput, match="0 flows over 4 paths"):
        split_flows(0, 4)
