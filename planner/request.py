"""What is to be planned, checked: model, cluster, workload, what is fixed, and the pins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod

from ..costmodel.cluster import Cluster
from ..costmodel.kernels import op_flops
from ..costmodel.offload import can_offload
from ..costmodel.precision import Precision
from ..costmodel.runtime import Runtime
from ..costmodel.shards import local_sizes
from ..ir import InvalidInput
from ..ir.from_dims import expert_binding
from ..ir.graph import Graph, Model
from ..ir.optable import TABLE
from ..ir.plan import data_parallel_types
from ..ir.types import AxisType
from ..ir.workload import Workload
from .allow import Allow
from .fix import Fix


@dataclass(frozen=True)
class Request:
    """A planning problem. `cluster` is priced; `hardware`, where the job is priced at the pace of
    its slowest devices, is the cluster as it is. `optimizer_on_host`: the optimizer's state takes
    no memory of a device. `allow`: what of the model itself may be changed."""

    model: Model
    cluster: Cluster
    workload: Workload
    fix: Fix
    runtime: Runtime = field(default_factory=lambda: Runtime.preset("torch"))
    hardware: Cluster | None = None
    optimizer_on_host: bool = False
    allow: Allow = field(default_factory=Allow)

    @staticmethod
    def on(
        model: Model,
        cluster: Cluster,
        workload: Workload,
        fix: Fix,
        runtime: Runtime | None = None,
        allow: Allow | None = None,
    ) -> Request:
        """A problem on a cluster as it is: every device does the same work, at the pace of the
        slowest."""
        runs = runtime or Runtime.preset("torch")
        return Request(
            model, cluster.at_slowest(), workload, fix, runs, cluster, allow=allow or Allow()
        )

    @property
    def precision(self) -> Precision:
        return Precision.preset(self.workload.precision)

    @property
    def peak_flops_per_s(self) -> float:
        """What all devices could do, each at its own peak: what MFU is measured against."""
        return (self.hardware or self.cluster).peak_flops_per_s(self.precision.compute_dtype)

    @property
    def limit_bytes(self) -> int:
        """Bytes of a device that a plan may use."""
        return int(self.cluster.device.memory_limit_bytes)

    def flops_per_step(self) -> float:
        """Model FLOPs of a step, without recomputation: forward, and in the backward pass one
        product for each operand of a contraction that has a gradient, twice the forward pass of
        other ops (PaLM's convention, Chowdhery et al. 2022, appendix B)."""
        return self._flops(others=3)

    @cached_property
    def least_flops_per_step(self) -> float:
        """FLOPs that every plan executes, whatever its kernels save of ops that are no
        contractions."""
        return self._flops(others=1)

    def _flops(self, others: int) -> float:
        binding = expert_binding(self.model, {"b": 1, "s": self.workload.seq_len})
        total = 0.0
        for block, count in self.model.counts.items():
            graph = self.model.blocks[block]
            for op in graph.ops:
                passes = others
                if TABLE[op.kind].work == "contraction":
                    passes = 1 + sum(graph.values[name].grad for name in op.operands)
                total += count * passes * op_flops(op, local_sizes(op, binding))
        return total * self.workload.global_batch

    def whole_batch(self) -> str | None:
        """Why the sequences of a batch cannot be taken apart (over ranks or microbatches), or None
        where they can."""
        try:
            for graph in self.model.blocks.values():
                data_parallel_types(graph)
        except InvalidInput as error:
            return str(error)
        return None

    def check(self) -> None:
        """Raises InvalidInput where the model has fewer learned positions than tokens, the device
        has no units for the precision, or a fixed degree does not fit the cluster or the model."""
        self._check_positions()
        self._check_units()
        if self.fix.recompute == "offload" and not can_offload(self.cluster.device):
            raise InvalidInput(
                f"--fix: recompute=offload: device {self.cluster.device.name} has no "
                "host_link_bytes_per_s or no host_memory_bytes; add both to the device file"
            )
        if (self.fix.dp or 1) > 1 and (reason := self.whole_batch()):
            raise InvalidInput(f"--fix: dp={self.fix.dp}: {reason}")
        fix = self.fix
        check_degrees(fix, self.cluster)
        if fix.stages is not None:
            pins = repeated(self.model)
            if sum(fix.stages) != pins.count:
                raise InvalidInput(
                    f"--fix: stages={'-'.join(map(str, fix.stages))} adds up to "
                    f"{sum(fix.stages)} layers, the model has {pins.count}"
                )

    def _check_units(self) -> None:
        """Float8 products need units for them; wider dtypes run on the next wider ones."""
        device, dtype = self.cluster.device, self.precision.linear_dtype
        if dtype == "float8" and device.peak_flops_per_s.float8 is None:
            raise InvalidInput(
                f"precision {self.workload.precision}: {device.name} has no float8 units, expected "
                "bf16 or another that it has"
            )

    def _check_positions(self) -> None:
        """A table of learned positions must have a row for every token of a sequence."""
        made = self.model.preamble.producer()
        looking_up = {
            block: [op for op in graph.ops if op.kind == "embedding"]
            for block, graph in self.model.blocks.items()
        }
        for segment in self.model.segments:
            if not looking_up[segment.block]:
                continue
            graph = self.model.blocks[segment.block]
            outer = dict(zip(graph.inputs, segment.inputs, strict=True))
            names = dict(zip(graph.parameters, segment.parameters, strict=True))
            for op in looking_up[segment.block]:
                ids = outer.get(op.operands[1], "")
                while ids in made and made[ids][0].kind in ("shift", "reshape", "expand"):
                    ids = made[ids][0].operands[0]
                if ids not in made or made[ids][0].kind != "positions":
                    continue
                rows = graph.values[op.operands[0]].shape({})[0]
                if rows < self.workload.seq_len:
                    raise InvalidInput(
                        f"seq_len {self.workload.seq_len}: {names[op.operands[0]]} has learned "
                        f"positions for {rows} tokens only"
                    )


def check_degrees(fix: Fix, cluster: Cluster) -> None:
    """Raises InvalidInput where fixed degrees cannot make up a cluster."""
    world = cluster.world_size
    degrees = [fix.pp, fix.dp, fix.cp or 1, fix.tp]
    product = prod(degree or 1 for degree in degrees)
    if world % product or (None not in degrees and product != world):
        raise InvalidInput(
            f"--fix: pp*dp*cp*tp = {product} does not make up the cluster's {world} devices ({fix})"
        )


@dataclass(frozen=True, slots=True)
class Layers:
    """The segments that count as layers: `first … first + count - 1`."""

    first: int
    count: int

    def __contains__(self, segment: int) -> bool:
        return self.first <= segment < self.first + self.count

    def per_stage(self, bounds: Sequence[int]) -> tuple[int, ...]:
        """Layers in each of the stages that `bounds` (segment indices) cut."""
        inside = [min(max(bound - self.first, 0), self.count) for bound in bounds]
        return tuple(last - first for first, last in pairwise(inside))


def repeated(model: Model) -> Layers:
    """The segments that count as layers (`Model.layer_run`)."""
    return Layers(*model.layer_run)


def bounds_of(model: Model, layers_per_stage: tuple[int, ...]) -> tuple[int, ...]:
    """Segment bounds of stages that hold so many layers each; what comes before the layers goes to
    the first stage, what comes after to the last."""
    layers = repeated(model)
    bounds = [0]
    position = layers.first
    for count in layers_per_stage:
        position += count
        bounds.append(position)
    bounds[-1] = len(model.segments)
    return tuple(bounds)


def pinned_types(model: Model) -> dict[tuple[str, str], Mapping[str, AxisType]]:
    """Pins on parameters and activations, by (block, value).

    Raises InvalidInput for a pin on something that the model does not have.
    """
    found: dict[tuple[str, str], Mapping[str, AxisType]] = {}
    for pin in model.pins:
        if pin.target == "stage":
            continue
        types = {axis: AxisType.parse(text) for axis, text in pin.types.items()}
        if pin.target == "activation":
            block, _, value = pin.name.partition(":")
            if block not in model.blocks or value not in model.blocks[block].values:
                raise InvalidInput(f"pin on {pin.name}: the model has no such activation")
            _check_pin(pin.name, model.blocks[block], value, types)
            found[block, value] = types
            continue
        places = [
            (segment.block, inner)
            for segment in model.segments
            for outer, inner in zip(
                segment.parameters, model.blocks[segment.block].parameters, strict=True
            )
            if outer == pin.name
        ]
        if not places:
            raise InvalidInput(f"pin on {pin.name}: the model has no such parameter")
        for block, inner in places:
            _check_pin(pin.name, model.blocks[block], inner, types)
            if found.get((block, inner), types) != types:
                raise InvalidInput(
                    f"pin on {pin.name}: {types} contradicts {dict(found[block, inner])} on the "
                    "same parameter of another layer; layers of one kind are planned alike"
                )
            found[block, inner] = types
    return found


def _check_pin(name: str, graph: Graph, value: str, types: Mapping[str, AxisType]) -> None:
    dims = graph.values[value].dims
    for axis, kind in types.items():
        if axis not in ("tp", "dp"):
            raise InvalidInput(f"pin on {name}: unknown axis {axis!r}, expected tp")
        if axis == "dp":
            raise InvalidInput(
                f"pin on {name}: dp={kind}: data parallelism splits the batch and ZeRO the state; "
                "pin tp, or fix zero"
            )
        if kind.is_split and (kind.dim >= len(dims) or kind.part >= max(1, len(dims[kind.dim]))):
            raise InvalidInput(f"pin on {name}: {axis}={kind}, but it has {len(dims)} dims {dims}")


def pinned_stages(model: Model) -> list[int | None]:
    """For every segment the stage it is pinned to, or None.

    Raises InvalidInput for a module path that holds no segment.
    """
    stage_of: list[int | None] = [None] * len(model.segments)
    for pin in model.pins:
        if pin.target != "stage":
            continue
        hit = [
            i
            for i, segment in enumerate(model.segments)
            if not pin.name  # the model as a whole
            or (segment.module and f"{segment.module}.".startswith(f"{pin.name}."))
            or any(p.startswith(f"{pin.name}.") for p in segment.parameters)
        ]
        if not hit:
            raise InvalidInput(f"pin {pin.name}: stage={pin.stage}: no such module in the model")
        for i in hit:
            if stage_of[i] not in (None, pin.stage):
                raise InvalidInput(
                    f"pin {pin.name}: stage={pin.stage} contradicts stage={stage_of[i]} of the "
                    "same layer"
                )
            stage_of[i] = pin.stage
    return stage_of
