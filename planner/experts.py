"""Mixtures of experts under expert parallelism: what a rank has of them, and what it exchanges.

Experts have a mesh of their own over the dp x cp x tp ranks of a stage: `ep` x `etp` ranks hold
them once, the rest are copies (parallel folding, arXiv:2504.14960). Load is balanced: every rank
does the same part of all experts' work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import Group, collective_seconds
from ..ir.graph import SLOTS, Graph, Op
from ..ir.rule import FactorName
from .candidates import Candidate


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Of a block: the ops that work on experts' slots, and their parameters."""

    ops: frozenset[str]
    parameters: frozenset[str]

    @staticmethod
    def of(graph: Graph) -> ExpertPart:
        """Ops that read or make slots; parameters that only these read, with views of them."""
        slotted = {
            name for name, value in graph.values.items() if any(SLOTS in dim for dim in value.dims)
        }
        if not slotted:
            return ExpertPart(frozenset(), frozenset())
        ops = [op for op in graph.ops if slotted & {*op.operands, *op.results}]
        read = {name for op in ops for name in op.operands}
        for op in reversed(graph.ops):
            if op.kind == "reshape" and op.results[0] in read:
                read.add(op.operands[0])
        return ExpertPart(frozenset(op.name for op in ops), frozenset(set(graph.parameters) & read))


def expert_sizes(
    op: Op, sizes: Mapping[FactorName, int], candidate: Candidate
) -> dict[FactorName, int]:
    """A rank's loops of an op inside experts, from those of one rank that has all of them: its
    experts take the slots of the whole expert group, which tensor ranks have shared out."""
    found = dict(sizes)
    experts = _experts(op)
    for factor in op.rule.factors:
        if factor == experts:
            found[factor] = -(-sizes[factor] // candidate.ep)
        elif op.sizes[factor] == SLOTS:
            found[factor] = max(1, round(sizes[factor] * candidate.ep / candidate.tp))
        elif op.sizes[factor] == "s":
            found[factor] = -(-sizes[factor] // candidate.tp)
    return found


def _experts(op: Op) -> FactorName | None:
    """The loop over experts: the first dim of the slots."""
    for shape in (*op.rule.operands, *op.rule.results):
        if len(shape) > 1 and any(op.sizes[f] == SLOTS for f in shape[1]):
            return shape[0][0] if shape[0] else None
    return None


def exchange_seconds(cluster: Cluster, candidate: Candidate, slot_bytes: float) -> float:
    """Sending a rank's tokens to their experts (or back): an all-to-all over the expert ranks, and
    with split experts a gather of what each of their ranks got.

    `slot_bytes` are those of a rank's own tokens, once for every expert they go to.
    """
    group = Group(candidate.ep, candidate.etp)
    seconds = collective_seconds(cluster, "all_to_all", slot_bytes * candidate.ep, group)
    if candidate.etp > 1:
        gathered = slot_bytes * candidate.etp
        seconds += collective_seconds(cluster, "all_gather", gathered, Group(candidate.etp))
    return seconds
