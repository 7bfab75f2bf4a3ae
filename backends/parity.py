"""What `shardwright verify` does: from a plan file, or from a model and a layout, to a comparison.

Plans are scaled down to what local CPU ranks can run: the model to a small one of the same
structure, every axis larger than 1 to 2. The types stay those of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from ..costmodel import Cluster
from ..ir import InvalidInput
from ..ir.callables import FunctionModel, called, function_parts, is_installed, is_path
from ..ir.graph import Model
from ..ir.plan import Plan
from ..ir.workload import Precision, Workload
from ..planner import Fix, Request, Search, build_plan, scaled_plan, unemittable
from .judging import check_dtype

SEQ_LEN = 16
_PRECISION: dict[str, Precision] = {"float64": "fp64", "float32": "fp32"}


def layout_plan(
    model: Model, layout: str | Mapping[str, Any] | None, dtype: str = "float64",
    seq_len: int = SEQ_LEN, backend: str = "torch",
) -> Plan:  # fmt: skip
    """A plan of a small model with a pinned layout, for as many local ranks as the layout has.

    Raises InvalidInput where the layout does not divide the model, or the backend does not emit it.
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
    search = Search(request, anything=backend == "jax" and fix.beyond_backends)
    plan = build_plan(search, search.run(top=1))
    if reason := unemittable(plan.strategy, backend):
        raise InvalidInput(f"layout {layout}: {backend} programs have no {reason} yet")
    return plan


@dataclass(frozen=True, slots=True)
class Function:
    """A JAX function `(params, *inputs) -> loss`, its parameters and example inputs."""

    function: Callable[..., Any]
    params: Any
    example_inputs: Any
    name: str = ""

    def trace(self) -> Model:
        """Its graph. It keeps its size."""
        from ..ir import from_jax

        return from_jax.trace(self.function, self.params, self.example_inputs, name=self.name)


Runner = Callable[[Sequence[Plan]], list[dict[str, Any]]]
"""What emits and runs several plans of one model, and compares them with their judge."""


def verify_layouts(
    model: Any,
    layouts: Sequence[str | Mapping[str, Any] | None],
    *,
    dtype: str = "float64",
    backend: str = "torch",
) -> list[dict[str, Any]]:
    """`verify_layout` for several layouts of one model, in programs that are started once."""
    _check(backend, dtype)
    fixes = [Fix.parse(layout).with_defaults() for layout in layouts]
    widest = max(fix.tp or 1 for fix in fixes)
    deepest = max(_layers(fix) for fix in fixes)
    graph, run = _judged(model, widest, deepest, backend, dtype)
    return run([layout_plan(graph, layout, dtype, backend=backend) for layout in layouts])


def verify_layout(
    model: Any,
    layout: str | Mapping[str, Any] | None,
    *,
    dtype: str = "float64",
    backend: str = "torch",
) -> dict[str, Any]:
    """Plans `model` small (a MODEL specification, or a `Function`, which keeps its size) with a
    pinned layout, emits, runs, compares."""
    return verify_layouts(model, [layout], dtype=dtype, backend=backend)[0]


def verify_plan(
    plan: Plan,
    *,
    dtype: str = "float64",
    sizes: Mapping[str, int] | None = None,
    backend: str = "torch",
) -> dict[str, Any]:
    """Runs a plan scaled down and compares it with its model on one device.

    `sizes` overrides the scaled size of mesh axes (default: 2 where larger than 1). Raises
    InvalidInput for a plan of a module that was given in process: its reference cannot be rebuilt.
    """
    _check(backend, dtype)
    if not plan.model.source:
        raise InvalidInput(
            "this plan was made from a model in memory: verify that with layout=, or plan from a "
            "config file or package.module:callable"
        )
    small = {axis.name: min(axis.size, 2) for axis in plan.mesh.axes} | dict(sizes or {})
    ranks = prod(small.values())
    tp = prod(size for name, size in small.items() if name.startswith("tp"))
    layers = 2 * small["pp"] * plan.strategy.vpp
    model, run = _judged(plan.model.source, tp, layers, backend, dtype)
    batch = small["dp"] * 2 * max(2, small["pp"])
    precise = replace(
        plan,
        strategy=replace(plan.strategy, micro_batch=2),
        workload={**plan.workload, "precision": _PRECISION[dtype]},
    )
    scaled = scaled_plan(precise, model, small, batch, SEQ_LEN)
    assert scaled.mesh.size == ranks
    return run([scaled])[0]


def _layers(fix: Fix) -> int:
    return sum(fix.stages) if fix.stages else 2 * (fix.pp or 1) * (fix.vpp or 1)


def _check(backend: str, dtype: str) -> None:
    if backend not in ("torch", "jax"):
        raise InvalidInput(f"backend {backend!r}: expected torch or jax")
    check_dtype(dtype)


def _judged(model: Any, tp: int, layers: int, backend: str, dtype: str) -> tuple[Model, Runner]:
    """The graph of a model, small where it can be, and what runs plans of it."""
    if isinstance(model, Function):
        return _of_function(model, backend, dtype)
    if not is_installed("torch"):
        return _of_function(_function(model), backend, dtype)
    from ..ir import from_torch

    try:
        loaded = from_torch.load_model(model, tp=tp, layers=layers, small=True)
    except FunctionModel as found:
        return _of_function(Function(*found.parts, name=_name(model)), backend, dtype)
    if backend == "jax":
        from .to_jax.verify import verify_many as many
    else:
        from .to_torch.verify import verify_many as many
    graph = from_torch.trace_loaded(loaded)
    return graph, partial(many, model=loaded.module, loss=loaded.loss, dtype=dtype)


def _function(model: Any) -> Function:
    """The JAX function of a path, where there is nothing but JAX."""
    path = model.get("callable", "") if isinstance(model, Mapping) else str(model)
    parts = function_parts(called(path)) if is_path(path) else None
    if parts is None:
        raise InvalidInput(
            f"model {path or model!r}: expected package.module:callable that returns (function, "
            "params, example_inputs); torch, which other models need, is not installed"
        )
    return Function(*parts, name=_name(model))


def _name(model: Any) -> str:
    path = model.get("callable", "") if isinstance(model, Mapping) else str(model)
    return path.partition(":")[2]


def _of_function(function: Function, backend: str, dtype: str) -> tuple[Model, Runner]:
    """A function's graph, and what runs plans of it; the function is the judge."""
    from .to_jax.reference import FunctionReference

    if backend == "torch" and not is_installed("torch"):
        raise InvalidInput("backend torch: torch is not installed; give --backend jax")
    graph = function.trace()
    reference = FunctionReference(
        function.function, function.params, function.example_inputs, graph.parameters, dtype
    )
    if backend == "jax":
        from .to_jax.verify import compare

        return graph, partial(compare, reference=reference, dtype=dtype)
    from .to_torch.verify_function import verify_function

    return graph, partial(verify_function, reference=reference, dtype=dtype)
