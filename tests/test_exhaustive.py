"""The search equals exhaustive enumeration on small problems (sixty of them in
`benchmarks/search.py --part exact`)."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.planner import Fix, Search


@pytest.mark.parametrize(
    ("seed", "fix"),
    [*((seed, None) for seed in (1, 2, 4, 7, 8, 9, 10, 13, 16, 33)),
     (9, "zero=3,parameter_group=2")],
)  # fmt: skip
def test_equals_all_plans_one_by_one(
    seed: int, fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules, virtual stages, tensor, context and expert degrees, ZeRO and the groups of each
    state, uneven stages, recomputation, host memory, changes of the model; memory that binds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    exhaustive = importlib.import_module("exhaustive")
    request = exhaustive.instance(seed)
    if fix is not None:
        request = replace(request, fix=Fix.parse(fix))
    best = exhaustive.best_of_all(request)
    search = Search(request, anything=True)
    if best.candidate is None:
        with pytest.raises(sw.Infeasible):
            search.run(top=1)
        return
    found = search.run(top=1)
    assert found.outcomes[0].seconds == pytest.approx(best.seconds, rel=1e-9)
    assert found.bound <= best.seconds * (1 + 1e-9)
    fullest = max(stage.total for stage in found.outcomes[0].memory)
    assert fullest <= request.limit_bytes
