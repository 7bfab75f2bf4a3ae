"""The plan: strategy, types on every value of every distinct block, stages, predicted figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import InvalidInput
from .graph import Graph, Model
from .mesh import Mesh
from .types import NdType, P, R, S

Recompute = Literal["none", "selective", "full", "offload"]
"""What becomes of a block's activations until its backward pass: kept; the dear ones kept and the
rest made again; all made again; moved to host memory and back."""

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


MODEL_CHANGES = ("parallel_block", "ladder_residual", "local_update")
"""Parts of a strategy that change the model itself, or how it is trained."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """Degrees of parallelism and the choices beside them.

    `micro_batch` in sequences per data-parallel rank; `layers` counts the segments of the repeated
    run per stage, as `--fix stages=8-8-7-9` gives them; `zero` is 0 (none) to 3 (FSDP), its state
    split over `zero_group` neighbouring data-parallel ranks (0: all), gradients over
    `gradient_group` of these (0: as many), parameters over `parameter_group` of those. Of the `cp`
    ranks of a sequence `ulysses` exchange sequence for heads, the others pass keys round. `sp`:
    whether values between blocks were fixed to be split along the sequence, or not (None: as is
    cheapest). `MODEL_CHANGES`: whether attention and MLP of a layer read the same input, and
    sub-blocks the residual without the one before them; every how many steps replicas average their
    parameters instead of reducing gradients (0: they do not).
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    zero: int = 0
    micro_batch: int = 1
    recompute: Recompute = "none"
    schedule: ScheduleName = "1f1b"
    layers: tuple[int, ...] = ()
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    zero_group: int = 0
    sp: bool | None = None
    ulysses: int = 1
    gradient_group: int = 0
    parameter_group: int = 0
    parallel_block: bool = False
    ladder_residual: bool = False
    local_update: int = 0

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def to_json(self) -> dict[str, Any]:
        """The fields scripts rely on."""
        names = ("pp", "vpp", "dp", "cp", "tp", "ep", "zero", "micro_batch", "schedule")
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        others = ("etp", "zero_group", "gradient_group", "parameter_group", "sp")
        more = {name: getattr(self, name) for name in (*others, *MODEL_CHANGES)}
        return data | {"recompute": self.recompute, "stages": list(self.layers), **more}

    def __str__(self) -> str:
        shown = [f"pp={self.pp}", f"dp={self.dp}", f"tp={self.tp}", f"zero={self.zero}"]
        for name in ("vpp", "cp", "ulysses", "ep", "etp"):
            if getattr(self, name) > 1:
                shown.append(f"{name}={getattr(self, name)}")
        for name in ("zero_group", "gradient_group", "parameter_group"):
            if getattr(self, name):
                shown.append(f"{name}={getattr(self, name)}")
        if self.schedule not in ("1f1b", "interleaved"):
            shown.append(f"schedule={self.schedule}")
        shown += [f"{name}={int(getattr(self, name))}" for name in MODEL_CHANGES
                  if getattr(self, name)]  # fmt: skip
        shown += [f"micro_batch={self.micro_batch}", f"recompute={self.recompute}"]
        return " ".join(shown)


@dataclass(frozen=True, slots=True)
class OpTypes:
    """Types of an op's operands as it reads them and of its results as it makes them."""

    operands: tuple[NdType, ...]
    results: tuple[NdType, ...]


@dataclass(frozen=True, slots=True)
class Annotation:
    """The types of one distinct block on a mesh; all conversions follow from them.

    `inputs` and `outputs` are the types at the block's boundary, `parameters` those in which the
    parameters enter the block's forward pass (`I` or `S` along tensor axes, `R` along the data
    axis), aligned with the graph's tuples; `ops` maps op names.
    """

    inputs: tuple[NdType, ...]
    parameters: tuple[NdType, ...]
    ops: Mapping[str, OpTypes]
    outputs: tuple[NdType, ...]

    def on(self, axes: Sequence[str]) -> Annotation:
        """The same on some of the axes alone."""

        def cut(kinds: tuple[NdType, ...]) -> tuple[NdType, ...]:
            return tuple(NdType(tuple((a, k) for a, k in kind if a in axes)) for kind in kinds)

        ops = {n: OpTypes(cut(t.operands), cut(t.results)) for n, t in self.ops.items()}
        return Annotation(cut(self.inputs), cut(self.parameters), ops, cut(self.outputs))

    def produced(self, graph: Graph) -> dict[str, NdType]:
        """The type in which every value of the graph comes into being."""
        types = dict(zip(graph.inputs, self.inputs, strict=True))
        types |= dict(zip(graph.parameters, self.parameters, strict=True))
        for op in graph.ops:
            types |= dict(zip(op.results, self.ops[op.name].results, strict=True))
        return types

    def needed(self, graph: Graph) -> dict[str, list[NdType]]:
        """The distinct types in which every value is read, in order of first use."""
        needs: dict[str, list[NdType]] = {name: [] for name in graph.values}
        for op in graph.ops:
            for name, want in zip(op.operands, self.ops[op.name].operands, strict=True):
                if want not in needs[name]:
                    needs[name].append(want)
        for name, want in zip(graph.outputs, self.outputs, strict=True):
            if want not in needs[name]:
                needs[name].append(want)
        return needs


@dataclass(frozen=True, slots=True)
class Stage:
    """Segments `first … last-1` of the model, and for each the recompute mode."""

    first: int
    last: int
    recompute: tuple[Recompute, ...]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the cost model expects. Memory in bytes, per stage; time in seconds.

    `memory_limit_bytes` is what the smallest device has; `memory_limits_bytes` what each stage's
    have, where they differ.
    """

    step_seconds: float
    tokens_per_second: float
    mfu: float
    memory_bytes: tuple[int, ...]
    memory_limit_bytes: int
    time: Mapping[str, float] = field(default_factory=dict)
    memory: tuple[Mapping[str, int], ...] = ()
    memory_limits_bytes: tuple[int, ...] = ()

    @property
    def limits_bytes(self) -> tuple[int, ...]:
        """What a plan may use on every stage."""
        return self.memory_limits_bytes or (self.memory_limit_bytes,) * len(self.memory_bytes)


@dataclass(frozen=True, slots=True)
class NodeMapping:
    """Which physical node takes which place of the job: `node_of[place]`, a place being the next
    `devices_per_node` ranks. What communication between nodes takes so, what it takes with places
    on nodes in order, and a bound below every mapping: seconds of a step with nothing hidden, 0
    where nodes were placed for what they hold (`replan`). `ranks[i]` is the rank that the
    launcher's process i takes; empty: its own.
    """

    node_of: tuple[int, ...]
    seconds: float
    in_order_seconds: float
    bound_seconds: float
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good the plan is: a lower bound over everything searched, and what was done to find it.

    `relaxation` counts the inner programs by how they were solved: `integral` (the linear
    relaxation was) or `mip`. Where the plan is not the fastest but the one that costs least or
    takes least energy (`objective`), `spent` is what a step of it does and `bound` what no other
    undercuts, in `unit`; the gap is between these, and `lower_bound_seconds` the step time with the
    gap taken off.
    """

    lower_bound_seconds: float
    gap: float
    solved: int
    pruned: int
    infeasible: int
    seconds: float
    relaxation: Mapping[str, int] = field(default_factory=dict)
    objective: str = "time"
    spent: float = 0.0
    bound: float = 0.0
    unit: str = "s"


@dataclass(frozen=True, slots=True)
class Alternative:
    """A runner-up: its strategy, predicted step time and why it lost; `time` is its step's seconds
    by cause, as `Predicted.time` has them."""

    strategy: Strategy
    step_seconds: float | None
    memory_bytes: int
    reason: str
    time: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A strategy with the types of every value: enough to emit, explain and verify.

    `mesh` has the axes `pp`, `dp` and `tp` (or its sub-axes `tp0`, `tp1`, …), outermost first;
    types name all of them but `pp`. `workload` and `cluster` are what the plan was made for.
    `mapping` is None where all nodes are alike. `advice` says what about the job itself would make
    it faster.
    """

    model: Model
    strategy: Strategy
    mesh: Mesh
    annotations: Mapping[str, Annotation]
    preamble: Annotation
    stages: tuple[Stage, ...]
    workload: Mapping[str, Any]
    cluster: Mapping[str, Any]
    predicted: Predicted
    certificate: Certificate
    alternatives: tuple[Alternative, ...] = ()
    mapping: NodeMapping | None = None
    advice: tuple[str, ...] = ()

    @property
    def microbatches(self) -> int:
        """Microbatches per step and data-parallel rank."""
        return int(self.workload["global_batch"]) // (self.strategy.dp * self.strategy.micro_batch)

    @property
    def type_axes(self) -> tuple[str, ...]:
        """The mesh axes that types name: all but `pp`, and but `cp`, whose programs are not emitted
        yet."""
        return tuple(name for name in self.mesh.names if name not in ("pp", "cp"))

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """`tp`, or its sub-axes, outermost first."""
        return tuple(axis.name for axis in self.mesh.axes if axis.parent == "tp")

    def parameter_types(self) -> dict[str, NdType]:
        """Original parameter name → the type in which forward reads it."""
        found: dict[str, NdType] = {}
        for segment in self.model.segments:
            types = self.annotations[segment.block].parameters
            found |= dict(zip(segment.parameters, types, strict=True))
        return found

    def parameter_stages(self) -> dict[str, list[int]]:
        """Original parameter name → the stages that hold it (several for a tied parameter)."""
        found: dict[str, list[int]] = {}
        for i, stage in enumerate(self.stages):
            for segment in self.model.segments[stage.first : stage.last]:
                for name in segment.parameters:
                    if i not in found.setdefault(name, []):
                        found[name].append(i)
        return found


def data_parallel_types(graph: Graph) -> Annotation:
    """Types along the data-parallel axis: every loop over the batch (`b`) is split.

    Returns an annotation on the single axis `dp`. Raises InvalidInput where an op mixes the
    sequences of a batch, so that data parallelism would change the result.
    """
    ops: dict[str, OpTypes] = {}

    def typed(dims: tuple[tuple[Any, ...], ...], otherwise: Any) -> NdType:
        for dim, sizes in enumerate(dims):
            if "b" in sizes:
                return NdType((("dp", S(dim, sizes.index("b"))),))
        return NdType((("dp", otherwise),))

    for op in graph.ops:
        batch = [f for f in op.rule.factors if op.sizes[f] == "b"]
        if any(f in op.rule.locked for f in batch):
            raise InvalidInput(
                f"op {op.kind!r} at {op.module or 'the top level'} ({op.name}) mixes the sequences "
                "of a batch: data parallelism would change the result"
            )
        lost = bool(batch) and any(f in op.rule.contracted for f in batch)
        ops[op.name] = OpTypes(
            tuple(typed(graph.values[v].dims, R) for v in op.operands),
            tuple(typed(graph.values[v].dims, P if lost else R) for v in op.results),
        )
    produced = {
        r: t for op in graph.ops for r, t in zip(op.results, ops[op.name].results, strict=True)
    }
    entering = {v: typed(graph.values[v].dims, R) for v in (*graph.inputs, *graph.parameters)}
    return Annotation(
        tuple(entering[v] for v in graph.inputs),
        tuple(entering[v] for v in graph.parameters),
        ops,
        tuple((entering | produced)[v] for v in graph.outputs),
    )
