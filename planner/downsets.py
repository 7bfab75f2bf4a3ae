"""The downsets of a graph of layers, and the intervals between them: what a stage can be.

A downset has with every layer all that lead to it. What the first stages of a pipeline have
together is a downset, and a stage is the difference of two. A chain of n layers has n + 1; few
branches side by side multiply them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import InvalidInput

Array = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

MOST = 3000
"""Downsets of the largest graph that is taken: intervals are nearly a square of that."""


@dataclass(frozen=True, slots=True, eq=False)
class Downsets:
    """`members[i, v]`: whether downset i has layer v; smaller ones come first, from the empty one
    to that of all layers. `masks[i]`: the same as a bit for each place in `order`, which is
    topological. Interval k is what downset `last[k]` has beyond downset `first[k]`."""

    order: tuple[int, ...]
    members: Bools
    masks: tuple[int, ...]
    first: Ints
    last: Ints

    @staticmethod
    def of(layers: int, edges: Sequence[tuple[int, int]]) -> Downsets:
        """The downsets of `layers` layers under edges (from, to).

        Raises InvalidInput for a cycle, and for a graph with more downsets than `MOST`.
        """
        sources: dict[int, set[int]] = {layer: set() for layer in range(layers)}
        for source, target in edges:
            sources[target].add(source)
        try:
            order = tuple(TopologicalSorter(sources).static_order())
        except CycleError as error:
            cycle = " -> ".join(map(str, error.args[1]))
            raise InvalidInput(
                f"edges: layers {cycle} form a cycle; expected an acyclic graph"
            ) from None
        place = {layer: at for at, layer in enumerate(order)}
        needs = [sum(1 << place[source] for source in sources[layer]) for layer in order]
        masks, level = [0], {0: None}
        for _ in range(layers):
            level = {
                mask | 1 << at: None
                for mask in level
                for at in range(layers)
                if not mask >> at & 1 and needs[at] & ~mask == 0
            }
            masks += level
            if len(masks) > MOST:
                raise InvalidInput(
                    f"edges: more than {MOST:,} sets of layers can come first in a pipeline; "
                    "expected a graph nearer to a chain: join layers that run side by side"
                )
        members = np.zeros((len(masks), layers), np.bool_)
        for at, layer in enumerate(order):
            members[:, layer] = [mask >> at & 1 for mask in masks]
        beyond = members.astype(np.float64) @ ~members.T
        np.fill_diagonal(beyond, 1)
        first, last = np.nonzero(beyond == 0)
        return Downsets(order, members, tuple(masks), first, last)

    def layers_of(self, mask: int) -> tuple[int, ...]:
        """The layers of a mask, in ascending order."""
        return tuple(sorted(v for at, v in enumerate(self.order) if mask >> at & 1))
