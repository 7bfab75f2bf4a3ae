"""What `shardwright verify` does: from a plan file, or from a model and a layout, to a comparison.

Plans are scaled down to what local CPU ranks can run: the model to a small one of the same
structure, every axis larger than 1 to 2. The types stay those of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ...costmodel import Cluster
from ...ir import InvalidInput
from ...ir.graph import Model
from ...ir.plan import Plan
from ...ir.workload import Precision, Workload
from ...planner import Fix, Request, Search, build_plan, scaled_plan

SEQ_LEN = 16
_PRECISION: dict[str, Precision] = {"float64": "fp64", "float32": "fp32"}


def layout_plan(
    model: Model, layout: str | Mapping[str, Any] | None, dtype: str = "float64",
    seq_len: int = SEQ_LEN,
) -> Plan:  # fmt: skip
    """A plan of a small model with a pinned layout, for as many local ranks as the layout has.

    Raises InvalidInput where the layout does not divide the model.
    """
    fix = Fix.parse(layout).with_defaults()
    pp, dp, tp = fix.degrees
    micro = fix.micro_batch or 2
    fix = replace(fix, micro_batch=micro)
    workload = Workload(
        global_batch=dp * micro * max(2, pp), seq_len=seq_len, precision=_PRECISION[dtype]
    )
    cluster = Cluster.preset("local", nodes=pp * dp * tp)
    request = Request(model, cluster, workload, fix)
    search = Search(request)
    found = search.run(top=1)
    return build_plan(search, found)


def verify_layouts(
    model: Any, layouts: Sequence[str | Mapping[str, Any] | None], *, dtype: str = "float64"
) -> list[dict[str, Any]]:
    """`verify_layout` for several layouts of one model, on ranks that are started once."""
    from ...ir import from_torch
    from .verify import verify_many

    if dtype not in _PRECISION:
        raise InvalidInput(f"dtype {dtype!r}: expected float64 or float32")
    fixes = [Fix.parse(layout).with_defaults() for layout in layouts]
    widest = max(fix.tp or 1 for fix in fixes)
    deepest = max(_layers(fix) for fix in fixes)
    loaded = from_torch.load_model(model, tp=widest, layers=deepest, small=True)
    graph = from_torch.trace_loaded(loaded)
    plans = [layout_plan(graph, layout, dtype) for layout in layouts]
    return verify_many(plans, model=loaded.module, loss=loaded.loss, dtype=dtype)


def verify_layout(
    model: Any, layout: str | Mapping[str, Any] | None, *, dtype: str = "float64"
) -> dict[str, Any]:
    """Plans `model` (a MODEL specification) small with a pinned layout, emits, runs, compares."""
    return verify_layouts(model, [layout], dtype=dtype)[0]


def verify_plan(
    plan: Plan, *, dtype: str = "float64", sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Runs a plan scaled down and compares it with its model on one device.

    `sizes` overrides the scaled size of mesh axes (default: 2 where larger than 1). Raises
    InvalidInput for a plan of a module that was given in process: its reference cannot be rebuilt.
    """
    from ...ir import from_torch
    from .verify import verify_many

    if dtype not in _PRECISION:
        raise InvalidInput(f"dtype {dtype!r}: expected float64 or float32")
    if not plan.model.source:
        raise InvalidInput(
            "this plan was made from a module in memory: verify it in the same process, or plan "
            "from a config file or package.module:callable"
        )
    small = {axis.name: min(axis.size, 2) for axis in plan.mesh.axes} | dict(sizes or {})
    ranks = prod(small.values())
    tp = prod(size for name, size in small.items() if name.startswith("tp"))
    loaded = from_torch.load_model(plan.model.source, tp=tp, layers=2 * small["pp"], small=True)
    model = from_torch.trace_loaded(loaded)
    batch = small["dp"] * 2 * max(2, small["pp"])
    precise = replace(
        plan,
        strategy=replace(plan.strategy, micro_batch=2),
        workload={**plan.workload, "precision": _PRECISION[dtype]},
    )
    scaled = scaled_plan(precise, model, small, batch, SEQ_LEN)
    assert scaled.mesh.size == ranks
    return verify_many([scaled], model=loaded.module, loss=loaded.loss, dtype=dtype)[0]


def _layers(fix: Fix) -> int:
    return sum(fix.stages) if fix.stages else 2 * (fix.pp or 1)
