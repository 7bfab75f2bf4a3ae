"""The chain of a model's blocks: what the SBP program types, each distinct block once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..ir.graph import Graph, Model
from ..ir.types import AxisType


@dataclass(frozen=True, slots=True)
class Chain:
    """The distinct blocks of a model and how they follow each other.

    `counts`: occurrences of each block. `links`: ((block, output value), (block, input value))
    pairs that meet at a boundary. `free`: per block the inputs that are whole on every rank and
    carry no gradient. `losses`: per block the outputs that are scalars of the loss. `tied`: groups
    of (block, parameter) that are one logical parameter. `pins`: types fixed from outside, by
    (block, value). `sequence_split`: whether blocks hand on values split along the sequence
    (False: they hand them on whole, and split nothing along it; None: as is cheapest).
    """

    blocks: Mapping[str, Graph]
    counts: Mapping[str, int]
    links: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = ()
    free: Mapping[str, frozenset[str]] = field(default_factory=dict)
    losses: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tied: tuple[tuple[tuple[str, str], ...], ...] = ()
    pins: Mapping[tuple[str, str], Mapping[str, AxisType]] = field(default_factory=dict)
    sequence_split: bool | None = None

    @staticmethod
    def of(
        model: Model, pins: Mapping[tuple[str, str], Mapping[str, AxisType]] | None = None
    ) -> Chain:
        """The chain of a traced model."""
        counts: dict[str, int] = defaultdict(int)
        maker: dict[str, tuple[str, str]] = {}
        links: dict[tuple[tuple[str, str], tuple[str, str]], None] = {}
        free: dict[str, set[str]] = defaultdict(set)
        losses: dict[str, set[str]] = defaultdict(set)
        users: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        for segment in model.segments:
            name, graph = segment.block, model.blocks[segment.block]
            counts[name] += 1
            for outer, inner in zip(segment.inputs, graph.inputs, strict=True):
                if outer in maker:
                    links[maker[outer], (name, inner)] = None
                else:
                    free[name].add(inner)
            for outer, inner in zip(segment.outputs, graph.outputs, strict=True):
                maker[outer] = (name, inner)
                if outer in model.loss:
                    losses[name].add(inner)
            if not model.tied.isdisjoint(segment.parameters):
                for outer, inner in zip(segment.parameters, graph.parameters, strict=True):
                    users[outer][name, inner] = None
        tied = {tuple(uses) for uses in users.values() if len(uses) > 1}
        return Chain(
            model.blocks,
            dict(counts),
            tuple(links),
            {b: frozenset(v) for b, v in free.items()},
            {b: frozenset(v) for b, v in losses.items()},
            tuple(sorted(tied)),
            dict(pins or {}),
        )
