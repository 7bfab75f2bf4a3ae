"""The pipeline master problem: layers with alternatives, cut into stages, the slowest least slow.

The model is Piper's (Tarnawski, Narayanan, Phanishayee 2021, "Piper: Multidimensional Planner for
DNN Parallelization").
A *stage* is a piece of a topological order of the layers; it has a tensor-parallel degree t, d
data-parallel replicas, and one choice per layer. Of N microbatches

    in flight    y = ceil(Σ d of this stage and those after it / d)
    bytes        Σ (in_flight_bytes · y + fixed_bytes)     at most the limit
    seconds      [2 · Σ over cut edges (edge + sync bytes) / d
                  + 4 · (d - 1) · Σ parameter_bytes / (d · N)] / bandwidth
                 + Σ seconds_per_sample / d            of the slowest stage: least

where every d divides N, Σ d is at most N, and Σ t · d at most the devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral

from ..ir.errors import InvalidInput

_SAME = 1 + 1e-12
"""Fractions of bytes are summed in any order; whole bytes exactly."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a layer: seconds per sample, bytes of parameters, bytes for every microbatch
    in flight and bytes besides, and the bytes that a degree above one adds to a cut edge, by the
    layer at its other end (none where it is not named)."""

    seconds_per_sample: float
    parameter_bytes: float = 0.0
    in_flight_bytes: float = 0.0
    fixed_bytes: float = 0.0
    sync_in_bytes: Mapping[int, float] = field(default_factory=dict)
    sync_out_bytes: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer and its choices by tensor-parallel degree; a stage with a degree has only layers that
    know it."""

    name: str
    choices: Mapping[int, Sequence[Choice]]


@dataclass(frozen=True, slots=True)
class Edge:
    """What one layer sends another for a sample; layers are given by their place in the problem."""

    source: int
    target: int
    bytes: float


@dataclass(frozen=True, slots=True)
class StageProblem:
    """The whole problem; `microbatches` is N.

    Raises InvalidInput where a layer has no choices, or a number is out of its range.
    """

    layers: Sequence[Layer]
    edges: Sequence[Edge]
    devices: int
    microbatches: int
    bandwidth_bytes_per_s: float
    memory_limit_bytes: float

    def __post_init__(self) -> None:
        for name in ("devices", "microbatches"):
            value: object = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise InvalidInput(f"{name}: {value!r}; expected a whole number of at least 1")
        if not 0 < self.bandwidth_bytes_per_s < math.inf:
            raise InvalidInput(
                f"bandwidth_bytes_per_s: {self.bandwidth_bytes_per_s!r}; expected a number above 0"
            )
        if not self.memory_limit_bytes >= 0:
            raise InvalidInput(
                f"memory_limit_bytes: {self.memory_limit_bytes!r}; expected a number of at least 0"
            )
        if not self.layers:
            raise InvalidInput("layers: there are none; expected at least one")
        for layer in self.layers:
            _check_layer(layer)
        for edge in self.edges:
            for end in (edge.source, edge.target):
                if not 0 <= end < len(self.layers):
                    raise InvalidInput(
                        f"edge {edge.source} -> {edge.target}: no layer {end}; expected 0 to "
                        f"{len(self.layers) - 1}"
                    )
            _check_amounts(f"edge {edge.source} -> {edge.target}", {"bytes": edge.bytes})


def _check_layer(layer: Layer) -> None:
    if not layer.choices:
        raise InvalidInput(
            f"layer {layer.name}: no choices; expected some for at least one tensor-parallel degree"
        )
    for degree, choices in layer.choices.items():
        if degree < 1:
            raise InvalidInput(
                f"layer {layer.name}: tensor-parallel degree {degree!r}; expected a whole number "
                "of at least 1"
            )
        if not choices:
            raise InvalidInput(
                f"layer {layer.name}, degree {degree}: no choices; expected at least one, or that "
                "the degree is left out"
            )
        for at, choice in enumerate(choices):
            where = f"layer {layer.name}, degree {degree}, choice {at}"
            _check_amounts(where, {
                "seconds_per_sample": choice.seconds_per_sample,
                "parameter_bytes": choice.parameter_bytes,
                "in_flight_bytes": choice.in_flight_bytes,
                "fixed_bytes": choice.fixed_bytes,
                **{f"sync_in_bytes of {k}": v for k, v in choice.sync_in_bytes.items()},
                **{f"sync_out_bytes of {k}": v for k, v in choice.sync_out_bytes.items()},
            })  # fmt: skip


def _check_amounts(where: str, amounts: Mapping[str, float]) -> None:
    for name, amount in amounts.items():
        if not 0 <= amount < math.inf:
            raise InvalidInput(f"{where}: {name} is {amount!r}; expected a number of at least 0")


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers (in ascending order) at a tensor-parallel degree, in `replicas` data-parallel copies;
    `picks`: which choice of each; and what follows: the microbatches in flight, the seconds per
    sample and the bytes of a device."""

    layers: tuple[int, ...]
    degree: int
    replicas: int
    picks: tuple[int, ...]
    in_flight: int
    seconds: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Stages from first to last."""

    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Per sample, of the slowest stage."""
        return max(stage.seconds for stage in self.stages)

    @property
    def devices(self) -> int:
        """How many are used."""
        return sum(stage.degree * stage.replicas for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Cut:
    """What is chosen for a stage; the rest follows by definition."""

    layers: tuple[int, ...]
    degree: int
    replicas: int
    picks: tuple[int, ...]


def plan_of(problem: StageProblem, cuts: Sequence[Cut]) -> StagePlan:
    """The plan of given stages, from first to last: every figure straight from the definition.

    Raises InvalidInput where the stages are no plan of the problem, with the constraint.
    """
    _check_cover(problem, cuts)
    stages, after = [], 0
    for cut in reversed(cuts):
        if problem.microbatches % cut.replicas:
            raise InvalidInput(
                f"{cut.replicas} replicas do not divide {problem.microbatches} microbatches"
            )
        after += cut.replicas
        in_flight = -(-after // cut.replicas)
        held = memory_bytes(problem, cut, in_flight)
        if held > problem.memory_limit_bytes * _SAME:
            raise InvalidInput(
                f"the stage of layers {cut.layers} holds {held:,.0f} bytes on a device, more than "
                f"{problem.memory_limit_bytes:,.0f}"
            )
        stages.append(
            Stage(cut.layers, cut.degree, cut.replicas, cut.picks, in_flight,
                  stage_seconds(problem, cut), held)
        )  # fmt: skip
    plan = StagePlan(tuple(reversed(stages)))
    if plan.devices > problem.devices or after > problem.microbatches:
        raise InvalidInput(
            f"{plan.devices} devices and {after} replicas; expected at most {problem.devices} and "
            f"{problem.microbatches}"
        )
    return plan


def _check_cover(problem: StageProblem, cuts: Sequence[Cut]) -> None:
    stage_of = {layer: at for at, cut in enumerate(cuts) for layer in cut.layers}
    if sorted(i for cut in cuts for i in cut.layers) != list(range(len(problem.layers))):
        raise InvalidInput("the stages do not have every layer once")
    for edge in problem.edges:
        if stage_of[edge.source] > stage_of[edge.target]:
            raise InvalidInput(f"edge {edge.source} -> {edge.target} runs to an earlier stage")


def _chosen(problem: StageProblem, cut: Cut) -> Iterable[Choice]:
    for layer, pick in zip(cut.layers, cut.picks, strict=True):
        yield problem.layers[layer].choices[cut.degree][pick]


def memory_bytes(problem: StageProblem, cut: Cut, in_flight: int) -> float:
    """What a device of a stage holds."""
    chosen = _chosen(problem, cut)
    return sum(each.in_flight_bytes * in_flight + each.fixed_bytes for each in chosen)


def stage_seconds(problem: StageProblem, cut: Cut) -> float:
    """What a stage takes per sample."""
    inside = frozenset(cut.layers)
    return sum(
        layer_seconds(problem, inside, layer, choice, cut.replicas)
        for layer, choice in zip(cut.layers, _chosen(problem, cut), strict=True)
    )


def layer_seconds(
    problem: StageProblem, stage: Set[int], layer: int, choice: Choice, replicas: int
) -> float:
    """What a layer adds to its stage's seconds; a cut edge is its that has its end in the stage."""
    sent = 0.0
    for edge in problem.edges:
        if edge.target == layer and edge.source not in stage:
            sent += edge.bytes + choice.sync_in_bytes.get(edge.source, 0.0)
        elif edge.source == layer and edge.target not in stage:
            sent += edge.bytes + choice.sync_out_bytes.get(edge.target, 0.0)
    d, n = replicas, problem.microbatches
    moved = 2 * sent / d + 4 * (d - 1) * choice.parameter_bytes / (d * n)
    return moved / problem.bandwidth_bytes_per_s + choice.seconds_per_sample / d
