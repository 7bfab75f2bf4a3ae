"""The wiring: what a user calls, and the methods of a plan that reach up to the backends.

`shardwright` gives these names when they are first asked for. Neither torch, jax nor transformers
is imported before it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import isfunction
from pathlib import Path
from typing import Any

from . import planner as _planner
from .checkpoint import Converted, Inspected, convert, inspect
from .costmodel import Cluster, Device, Runtime, Spending
from .ir import (
    CorruptCheckpoint,
    Infeasible,
    InvalidInput,
    ShardwrightError,
    UnsupportedOp,
    VerificationFailed,
)
from .ir import plan as _ir_plan
from .ir import serial as _serial
from .ir.callables import FunctionModel, called, function_parts, is_installed, is_path
from .ir.graph import Model
from .ir.workload import Workload
from .planner import Explanation, Prediction, Replanned

__all__ = [
    "Cluster",
    "Converted",
    "CorruptCheckpoint",
    "Device",
    "Explanation",
    "Infeasible",
    "Inspected",
    "InvalidInput",
    "Plan",
    "Prediction",
    "Replanned",
    "Runtime",
    "ShardwrightError",
    "UnsupportedOp",
    "VerificationFailed",
    "Workload",
    "annotate",
    "convert",
    "inspect",
    "plan",
    "predict",
    "replan",
    "trace",
    "verify",
]


class Plan(_ir_plan.Plan):
    """A plan: `print` it, `save` and `load` it, `emit` it as a program, `verify` that program.

    The data is `ir.plan.Plan`: strategy, mesh, types of every value, stages, predicted figures,
    certificate and alternatives.
    """

    __slots__ = ()

    @classmethod
    def _of(cls, plan: _ir_plan.Plan) -> Plan:
        return cls(**{field.name: getattr(plan, field.name) for field in fields(plan)})

    def __str__(self) -> str:
        return _planner.summary(self)

    def to_json(self) -> dict[str, Any]:
        """What `shardwright plan --json` prints."""
        return dict(_planner.to_json(self))

    def explain(self) -> Explanation:
        """Where time and memory go, what binds, what the runners-up lose on: `print` it."""
        return _planner.Explanation.of(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all."""
        _serial.save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan file. Raises InvalidInput saying what is wrong with it."""
        found = _serial.load_plan(path)
        try:
            _planner.check_described(found)
        except InvalidInput as error:
            raise InvalidInput(f"plan file {path}: {error}") from None
        return cls._of(found)

    def emit(
        self,
        backend: str,
        folder: str | Path,
        weights: Any = None,
    ) -> Path:
        """Writes the sharded program as source into `folder` and returns it.

        `weights` (a state dict, a safetensors file or folder, or the parameters of a JAX function)
        is what training starts from: the program reads its own slices of it. Raises InvalidInput
        for another backend than `torch` and `jax`, and for a plan that uses what cannot be emitted
        yet.
        """
        if backend not in ("torch", "jax"):
            raise InvalidInput(f"backend {backend!r}: expected torch or jax")
        experts = None if _planner.emits(self.model) else "mixtures of experts"
        if reason := _planner.unemittable(self.strategy, backend) or experts:
            raise InvalidInput(
                f"this plan cannot be emitted yet: {reason}; plan with --backend {backend} and "
                "without fixing these"
            )
        if weights is not None and not isinstance(weights, str | Path) and not _is_flat(weights):
            from .ir import from_jax

            weights = from_jax.weights_of(weights)
        if backend == "jax":
            from .backends.to_jax import emit as emit_jax

            return emit_jax(self, folder, weights=weights)
        from .backends.to_torch import emit

        return emit(self, folder, weights=weights)


def _is_flat(weights: Any) -> bool:
    """Whether this maps names to tensors, as a state dict does."""
    return isinstance(weights, Mapping) and all(hasattr(t, "shape") for t in weights.values())


def trace(
    model: Any,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    params: Any = None,
) -> Model:
    """The graph of a model: a `torch.nn.Module` with example inputs (a Hugging Face causal language
    model needs none); a JAX function `(params, *inputs) -> loss` with its `params` (a pytree of
    arrays or ShapeDtypeStructs) and example inputs; or a MODEL specification (a preset name, a
    Hugging Face config file or folder, `package.module:callable`).

    Raises InvalidInput where it cannot be traced and UnsupportedOp for an op without a rule.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str | Path):
        return _trace_spec(str(model))
    if params is not None:
        from .ir import from_jax

        if example_inputs is None:
            raise InvalidInput("example_inputs: a JAX function needs them, arrays or shapes")
        return from_jax.trace(model, params, example_inputs)
    if not is_installed("torch") or (isfunction(model) and example_inputs is not None):
        raise InvalidInput(
            f"model: got {type(model).__name__}, expected a torch module, or a JAX function with "
            "params= (a pytree of arrays or ShapeDtypeStructs)"
        )
    from .ir import from_torch

    return from_torch.trace(model, example_inputs, loss=loss)


def _trace_spec(spec: str) -> Model:
    """The graph of a MODEL specification, in whichever framework it is written."""
    if is_installed("torch"):
        from .ir import from_torch

        try:
            return from_torch.trace_spec(spec)
        except FunctionModel as found:
            parts = found.parts
    else:
        if not is_path(spec):
            raise InvalidInput(
                f"model {spec!r}: presets and Hugging Face configs need torch: "
                "pip install shardwright[torch,hf]"
            )
        returned = function_parts(called(spec))
        if returned is None:
            raise InvalidInput(
                f"model {spec!r}: expected (function, params, example_inputs); torch, which other "
                "models need, is not installed"
            )
        parts = returned
    from .ir import from_jax

    function, params, inputs = parts
    model = from_jax.trace(function, params, inputs, name=spec.partition(":")[2])
    return model.with_source({"callable": spec})


def plan(
    model: Any,
    cluster: Cluster | str,
    workload: Workload,
    *,
    fix: str | Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    params: Any = None,
    top: int = 5,
    backend: str = "torch",
    objective: str = "time",
    allow: str | Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The best way found to train `model` on `cluster`, with a bound on how good it can be.

    `model`: what `trace` takes, or a traced model; `example_inputs`, `loss` and `params` as for it.
    `cluster`: a `Cluster` or its specification.
    `fix`: parts of the strategy that are given (`tp=8,pp=4` or a mapping). `top` configurations are
    kept, the best first. `backend`: what the plan is to be emitted for, `torch` or `jax`, or `any`
    for the best there is, whether it can be emitted yet or not (a plan that cannot says so).
    `objective`: what is least, the `time` of a step, or its `cost` or `energy` by the price or
    power of the cluster's devices; then fewer nodes than there are may be used. `allow`: changes of
    the model itself that may be made, `parallel-block`, `ladder-residual`, `local-update=H`; a plan
    that makes some says so. Interrupted (Ctrl-C) it returns
    the best plan so far and says so in its advice. Raises Infeasible, saying what is short, where
    nothing fits.
    """
    if backend not in ("torch", "jax", "any"):
        raise InvalidInput(f"backend {backend!r}: expected torch, jax, or any for the whole space")
    fixed = _planner.Fix.parse(fix)  # what is quick to refuse comes before tracing
    changes = _planner.Allow.parse(allow)
    if backend == "jax" and (fixed.vpp or 1) > 1:
        fixed = replace(fixed, schedule=fixed.schedule_name)  # none with backward passes in halves
    where = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
    Spending.on(objective, where)
    if objective == "time":  # others may use fewer nodes
        _planner.check_degrees(fixed, where)
    traced = _priceable(model, example_inputs, loss, params)
    beyond = fixed.beyond_backends or changes.anything
    everything = backend == "any" or beyond or not _planner.emits(traced)
    if objective == "time":
        search = _planner.Search(
            _planner.Request.on(traced, where, workload, fixed, allow=changes), anything=everything
        )
        found = search.run(top, progress)
    else:
        search, found = _planner.least_spending(
            traced, where, workload, fixed, objective, everything, top, progress, changes
        )
    return Plan._of(_planner.build_plan(search, found, where))


def predict(
    model: Any,
    cluster: Cluster | str,
    workload: Workload,
    fix: str | Mapping[str, Any] | None = None,
    *,
    runtime: Runtime | str = "torch",
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    params: Any = None,
) -> Prediction:
    """What a step of a given configuration takes: `plan` without its search.

    `model`, `cluster` and `workload` as for `plan`; what `fix` leaves open is 1 or the default
    (dp: what is left of the devices). `runtime`: the framework that runs it, by name or in detail;
    `torch` is what `emit` writes. Raises InvalidInput for degrees that do not multiply to the
    devices or do not divide the model or the batch; a configuration that does not fit the memory is
    priced all the same, see `Prediction.fits`.
    """
    fixed = _planner.Fix.parse(fix)
    where = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
    runs = Runtime.preset(runtime) if isinstance(runtime, str) else runtime
    traced = _priceable(model, example_inputs, loss, params)
    return _planner.predict(_planner.Request.on(traced, where, workload, fixed, runs))


def replan(
    plan: Plan,
    lost: Sequence[int] = (),
    *,
    gained: int = 0,
    steps: int = 1000,
    fix: str | Mapping[str, Any] | None = None,
    repair_seconds: float | None = None,
) -> Replanned:
    """The best plan for the next `steps` steps after nodes were lost and `gained` others joined.

    Nodes count as in the plan's cluster. The way there is worked out (which part of which parameter
    goes from where to where) and counted; the global batch stays. `fix` as for `plan`. `wait` of
    the result sets it beside waiting `repair_seconds` for the lost nodes; without these it says
    above how many the new plan wins. Raises InvalidInput for nodes that are not there, Infeasible
    where nothing fits what is left.
    """
    found = _planner.replan(plan, lost, gained, steps, _planner.Fix.parse(fix), repair_seconds)
    return replace(found, plan=Plan._of(found.plan))


_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What Hugging Face configs call their number of experts."""


def _priceable(
    model: Any,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None,
    loss: Callable[..., Any] | None,
    params: Any,
) -> Model:
    """A traced model; one with experts, which cannot be traced yet, is built from its config."""
    if isinstance(model, str | Path) and not is_path(str(model)) and is_installed("torch"):
        from .ir.from_dims import dims_of_config, transformer
        from .ir.from_torch import config_of

        config = config_of(str(model)) or {}
        if any(key in config for key in _EXPERT_KEYS):
            return transformer(dims_of_config(config), name=str(model))
    return trace(model, example_inputs, loss=loss, params=params)


def annotate(
    target: Any, *, params: str | None = None, stage: int | None = None, **axes: str
) -> Any:
    """Pins what you already know: `sw.annotate(model.lm_head.weight, tp="S(0)")`.

    `target`: a parameter; an activation inside `forward`, or an array inside a JAX function
    (returned unchanged); or a module, whose
    output is pinned, or with `params` its parameters that match the name pattern, or with `stage`
    the pipeline stage it is in. Axes take SBP types: `S(dim)`, `R`, `I`, `P`.
    """
    if "jax" in sys.modules:  # else there are no arrays of JAX
        from .ir import from_jax

        if from_jax.is_array(target):
            return from_jax.annotate(target, params=params, stage=stage, axes=axes)
    from .ir.from_torch.annotate import annotate as pin

    return pin(target, params=params, stage=stage, axes=axes)


def verify(
    model: Any,
    *,
    layout: str | Mapping[str, Any] | None = None,
    params: Any = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dtype: str = "float64",
    backend: str = "torch",
    **options: Any,
) -> dict[str, Any]:
    """Runs the emitted program on local CPU ranks against the single-device model.

    `model`: a plan (scaled down to fit), a MODEL specification, or a JAX function with `params` and
    `example_inputs`, with the layout to check. A function keeps its size; it is the judge itself.
    `backend`: `torch` (ranks that talk by gloo) or `jax` (one process with several host devices).
    Returns what `shardwright verify --json` prints.
    """
    from .backends.parity import Function, verify_layout, verify_plan

    if params is not None:
        if example_inputs is None:
            raise InvalidInput("example_inputs: a JAX function needs them, arrays or shapes")
        model = Function(model, params, example_inputs)

    if isinstance(model, _ir_plan.Plan):
        return verify_plan(model, dtype=dtype, backend=backend, **options)
    return verify_layout(model, layout, dtype=dtype, backend=backend, **options)
