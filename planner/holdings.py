"""What every rank of a plan keeps from step to step: its share of the training state.

Parameters are kept as master copy and moments, `state_bytes` an element together (gradients live
within a step). Along tensor axes they lie as the forward pass reads them; with ZeRO the
data-parallel ranks share the rows of what is left, as FSDP cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..costmodel.precision import Precision
from ..ir.graph import bind
from ..ir.mesh import Mesh
from ..ir.plan import Plan
from ..ir.region import Region, held_region
from ..ir.schedule_rows import schedule_placement
from ..ir.types import NdType


@dataclass(frozen=True)
class Holdings:
    """The state of a plan's parameters. A rank is a stage and a *corner*: its coordinates on all
    axes but `pp`, counted as ranks are."""

    plan: Plan

    @cached_property
    def corners(self) -> int:
        """Ranks of a stage."""
        return self.plan.mesh.size // self.plan.mesh["pp"].size

    @cached_property
    def state_bytes(self) -> int:
        """Bytes kept per element of a parameter."""
        return Precision.preset(str(self.plan.workload["precision"])).state_bytes

    @property
    def pipe(self) -> int:
        """Pipeline ranks."""
        return self.plan.strategy.pp

    @cached_property
    def where(self) -> dict[str, tuple[str, int]]:
        """Parameter → block, and its index among the block's parameters, of its first use."""
        found: dict[str, tuple[str, int]] = {}
        for segment in self.plan.model.segments:
            for index, name in enumerate(segment.parameters):
                found.setdefault(name, (segment.block, index))
        return found

    @cached_property
    def stages(self) -> dict[str, tuple[int, ...]]:
        """Parameter → the pipeline ranks that keep it, of whose (virtual) stages one uses it."""
        strategy = self.plan.strategy
        placement = schedule_placement(
            strategy.schedule, strategy.pp, self.plan.microbatches, strategy.vpp
        )
        return {
            name: tuple(sorted({placement[stage] for stage in stages}))
            for name, stages in self.plan.parameter_stages().items()
        }

    @cached_property
    def regions(self) -> dict[str, tuple[tuple[Region, ...], ...]]:
        """Block → for each of its parameters the region of every corner."""
        plan = self.plan
        inner = Mesh(plan.mesh.axes[1:])
        tensor = Mesh(tuple(a for a in inner.axes if a.name in plan.tensor_axes))
        sharded = plan.strategy.zero > 0 and plan.strategy.dp > 1
        found: dict[str, tuple[tuple[Region, ...], ...]] = {}
        for block, graph in plan.model.blocks.items():
            every = []
            for name, kind in zip(
                graph.parameters, plan.annotations[block].parameters, strict=True
            ):
                dims = graph.values[name].dims
                factors = tuple(tuple(bind(size, {}) for size in dim) for dim in dims)
                types = NdType(tuple((a, k) for a, k in kind if a in tensor.names))
                corners = []
                for corner in range(self.corners):
                    at = inner.coordinates(corner)
                    rows = (plan.strategy.dp, at["dp"]) if sharded else None
                    corners.append(held_region(factors, types, tensor, at, rows))
                every.append(tuple(corners))
            found[block] = tuple(every)
        return found

    @cached_property
    def rank_bytes(self) -> NDArray[np.float64]:
        """(ranks,): all that each keeps. A parameter used twice on one rank counts once."""
        total = np.zeros((self.pipe, self.corners))
        for name, (block, index) in self.where.items():
            sizes = [region.elements for region in self.regions[block][index]]
            for stage in self.stages[name]:
                total[stage] += sizes
        return self.state_bytes * total.ravel()
