"""What the SBP program pays: the cost model's seconds for ops and conversions on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import Group, collective_seconds
from ..costmodel.compute import backward_seconds, forward_seconds
from ..costmodel.precision import Precision
from ..costmodel.saved import is_expensive
from ..costmodel.shards import local_sizes
from ..ir.conversion import Collective, Step, steps
from ..ir.graph import Binding, Op, Value, bind
from ..ir.mesh import Axis, Mesh
from ..ir.optable import TABLE
from ..ir.plan import Recompute
from ..ir.types import NdType
from .signatures import NdSignature

TIE_S = 1e-9
"""Added to every conversion, so that of equally fast layouts one with fewer conversions wins."""

_VOCABULARY_REDUCTIONS = 3
"""All-reduces of one number per token in a cross-entropy over a split vocabulary: the maximum, the
sum of exponentials and the label's logit (Megatron-LM, Shoeybi et al. 2019, section 3)."""


@dataclass(slots=True)
class ModelCosts:
    """`sbp_program.Costs` of one microbatch on one rank, in seconds.

    `mesh` is the whole mesh (it gives groups their strides), `axes` those that the program decides
    over. With `gather_parameters` a parameter may be kept split and gathered where it is read (and
    again in the backward pass, as FSDP does): for programs whose axes include data parallelism;
    beside a data-parallel axis of its own that is ZeRO's work. `memory_price_s_per_byte` turns
    bytes of parameter state into seconds; `state_bytes` is what an element of a parameter costs
    in all its copies.
    """

    cluster: Cluster
    mesh: Mesh
    axes: tuple[Axis, ...]
    binding: Binding
    precision: Precision
    recompute: Recompute = "none"
    gather_parameters: bool = False
    memory_price_s_per_byte: float = 0.0
    state_bytes: int = 0
    values: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    _ops: dict[tuple[str, str, tuple[str | None, ...]], float] = field(default_factory=dict)
    _moves: dict[tuple[str, str, NdType, NdType], float] = field(default_factory=dict)
    _collectives: dict[tuple[Collective, str, int], float] = field(default_factory=dict)

    def op(self, block: str, op: Op, signature: NdSignature) -> float:
        key = (block, op.name, signature.factors)
        if key not in self._ops:
            self._ops[key] = self._op(block, op, signature)
        return self._ops[key]

    def _op(self, block: str, op: Op, signature: NdSignature) -> float:
        values = self.values[block]
        sizes = local_sizes(op, self.binding, signature.splits(self.axes))
        device = self.cluster.device
        forward = forward_seconds(op, values, sizes, device, self.precision)
        again = self.recompute == "full" or (self.recompute == "selective" and not is_expensive(op))
        total = forward * (2 if again else 1)
        total += backward_seconds(op, values, sizes, device, self.precision)
        special = {factor for factor, _ in TABLE[op.kind].special}
        for axis, factor in zip(self.axes, signature.factors, strict=True):
            if factor is not None and factor.split("_")[0] in special:
                inner = {f for f in op.rule.factors if f.split("_")[0] in special}
                rows = prod(n for f, n in sizes.items() if f not in inner)
                once = self._collective("all_reduce", axis.name, rows * 4)
                total += _VOCABULARY_REDUCTIONS * once * (2 if again else 1)
        return total

    def conversion(self, block: str, value: Value, source: NdType, target: NdType) -> float:
        if source == target:
            return 0.0
        key = (block, value.name, source, target)
        if key not in self._moves:
            self._moves[key] = self._conversion(value, source, target)
        return self._moves[key]

    def _conversion(self, value: Value, source: NdType, target: NdType) -> float:
        path = steps(source, target)
        if any(_dominated(step) for step in path):
            return float("inf")
        parameter = value.role == "parameter"
        if parameter and any(step.forward == "all_gather" for step in path):
            if not self.gather_parameters:
                return float("inf")
            again = 2
        else:
            again = 2 if self.recompute != "none" and not parameter else 1
        seconds = TIE_S * len(path)
        state = source
        element = self.precision.element_bytes(value.dtype)
        # gradients of parameters are reduced in the dtype they are accumulated in
        gradient = self.precision.gradient_bytes if parameter else element
        for step in path:
            full = self._full_elements(value, state, step)
            seconds += again * self._collective(step.forward, step.axis, full * element)
            if value.grad:
                seconds += self._collective(step.backward, step.axis, full * gradient)
            state = state.replace(step.axis, step.target)
        return seconds

    def _full_elements(self, value: Value, state: NdType, step: Step) -> int:
        """Elements of the value within the step's group: what the other axes leave of it."""
        ways = prod(
            axis.size for axis in self.axes if axis.name != step.axis and state[axis.name].is_split
        )
        return prod(bind(size, self.binding) for dim in value.dims for size in dim) // ways

    def _collective(self, kind: Collective, axis: str, full_bytes: int) -> float:
        if kind == "none" or kind == "slice" or kind == "keep_one" or kind == "pad":
            return 0.0
        key = (kind, axis, full_bytes)
        if key not in self._collectives:
            group = Group(self.mesh[axis].size, self.mesh.stride(axis))
            self._collectives[key] = collective_seconds(self.cluster, kind, full_bytes, group)
        return self._collectives[key]

    def storage(self, block: str, value: Value, kind: NdType) -> float:
        if not self.memory_price_s_per_byte:
            return 0.0
        ways = prod(axis.size for axis in self.axes if kind[axis.name].is_split)
        elements = prod(bind(size, self.binding) for dim in value.dims for size in dim)
        return self.memory_price_s_per_byte * self.state_bytes * elements / ways


def _dominated(step: Step) -> bool:
    """Making summands of what is whole or split, but for a bias (`I→P`): reducing them again costs
    more than gathering."""
    return step.target.kind == "P" and step.source.kind in ("R", "S")
