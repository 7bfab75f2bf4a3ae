"""The insides of blocks that a search needs: solved once for every mesh shape, priced once for
every way to split beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from ..costmodel.cluster import Cluster
from ..ir import Infeasible
from ..ir.from_dims import expert_binding
from ..ir.graph import Binding, Graph
from ..ir.mesh import Mesh
from ..ir.optable import TABLE
from ..ir.plan import Annotation, Recompute
from .candidates import Candidate
from .chain import Chain
from .costs import ModelCosts
from .inner import Inner, chosen_types, inner_of, modes_for, splits_anything, sub_axes
from .linear_program import Solver
from .request import Request, pinned_types, repeated
from .signatures import nd_signatures

Solved = tuple[Mapping[str, Annotation], float, str]
"""Types, the least seconds that any types take, how the program was solved."""


@dataclass(slots=True)
class Insides:
    """What is known of the insides of a model's blocks.

    Types depend on tp and on the tokens of a microbatch; prices on how sequences and experts are
    split as well, and on the devices and links of a pipeline rank.
    """

    request: Request
    solver: Solver = "highs"
    anything: bool = False
    chain: Chain = field(init=False)
    modes: tuple[Recompute, ...] = field(init=False)
    refused: dict[int, Infeasible] = field(default_factory=dict)
    _solved: dict[Hashable, Solved | None] = field(default_factory=dict)
    _costs: dict[Hashable, ModelCosts] = field(default_factory=dict)
    _inner: dict[Hashable, Inner | None] = field(default_factory=dict)
    _least: dict[Hashable, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.request.model
        chain = Chain.of(model, pinned_types(model))
        self.chain = replace(chain, sequence_split=self.request.fix.sp)
        device = self.request.cluster.device
        self.modes = modes_for(self.request.fix.recompute, device, self.anything)

    def mesh(self, candidate: Candidate) -> Mesh:
        """pp, dp and tp with its sub-axes, outermost first; between dp and tp the context-parallel
        ranks, where there are any."""
        degrees = {"pp": candidate.pp, "dp": candidate.dp}
        if candidate.cp > 1:
            degrees["cp"] = candidate.cp
        mesh = Mesh.of(**degrees, tp=candidate.tp)
        return mesh.factored("tp", sub_axes(self.request.model, candidate.tp))

    def of(self, candidate: Candidate, cluster: Cluster | None = None) -> Inner | None:
        """The inside of blocks for a candidate, on the devices and links of `cluster` (the
        request's); None where tp would split nothing, or pins cannot hold (`refused` says why)."""
        where = cluster or self.request.cluster
        beside = (candidate.cp, candidate.ulysses, candidate.ep, candidate.etp)
        changes = (candidate.parallel_block, candidate.ladder_residual)
        key = (candidate.tp, candidate.micro_batch, *beside, *changes, where)
        if key not in self._inner:
            self._inner[key] = self._priced(candidate, where)
        return self._inner[key]

    def given(self, candidate: Candidate, types: Mapping[str, Annotation]) -> None:
        """Takes the types of a candidate's blocks, on the tensor axes, as they are given."""
        self._solved[_key(candidate)] = types, 0.0, "given"

    def methods(self) -> list[str]:
        """How every program was solved."""
        return [solved[2] for solved in self._solved.values() if solved is not None]

    def solved_for(self, candidate: Candidate) -> Solved | None:
        """The types of a candidate's blocks, None where there are none worth it."""
        key = _key(candidate)
        if key not in self._solved:
            try:
                self._solved[key] = self._solve(candidate)
            except Infeasible as error:  # pins that cannot hold at this tp
                self.refused[candidate.tp] = error
                self._solved[key] = None
        return self._solved[key]

    def least_seconds(self, candidate: Candidate, cluster: Cluster) -> float:
        """What a microbatch takes through the model at least, whatever its types: its products and
        attentions, each split as suits it best, conversions and everything else for nothing."""
        beside = (candidate.cp, candidate.ulysses, candidate.ep, candidate.etp)
        key = (candidate.tp, candidate.micro_batch, *beside, cluster)
        if key not in self._least:
            costs = self._costs_of(candidate, cluster).beside(candidate)
            divisible = {**costs.binding, "b": 1}
            self._least[key] = sum(
                self.chain.counts[block] * _product_seconds(costs, block, graph, divisible)
                for block, graph in self.chain.blocks.items()
            )
        return self._least[key]

    def _priced(self, candidate: Candidate, where: Cluster) -> Inner | None:
        solved = self.solved_for(candidate)
        if solved is None:
            return None
        types, bound, method = solved
        modes = tuple(dict.fromkeys(("none", *self.modes)))
        costs = self._costs_of(candidate, where).beside(candidate)
        inner = inner_of(self.chain, types, costs, modes, bound, method)
        if self.request.fix.recompute is not None:
            return inner
        model, layers = self.request.model, repeated(self.request.model)
        counts = Counter(s.block for i, s in enumerate(model.segments) if i in layers)
        return inner.where_hidden(counts)

    def _costs_of(self, candidate: Candidate, where: Cluster) -> ModelCosts:
        key = (candidate.tp, candidate.micro_batch, candidate.cp, where)
        if key not in self._costs:
            request, mesh = self.request, self.mesh(candidate)
            tokens = request.workload.seq_len // candidate.cp
            self._costs[key] = ModelCosts(
                where,
                mesh,
                tuple(axis for axis in mesh.axes if axis.parent == "tp"),
                expert_binding(request.model, {"b": candidate.micro_batch, "s": tokens}),
                request.precision,
                request.model.blocks,
                request.runtime,
            )
        return self._costs[key]

    def _solve(self, candidate: Candidate) -> Solved | None:
        costs = self._costs_of(candidate, self.request.cluster)
        solved = chosen_types(self.chain, costs, self.solver)
        useful = candidate.tp == 1 or splits_anything(costs.axes, solved[0])
        if not useful and self.request.fix.tp == candidate.tp:
            # The model is so small that splitting does not pay, but it was asked for.
            local = Cluster.preset("local").resized(self.request.cluster.world_size)
            types, _, method = chosen_types(self.chain, replace(costs, cluster=local), self.solver)
            solved = types, solved[1], method
            useful = splits_anything(costs.axes, types)
        return solved if useful else None

    def shared_with(self, like: Insides) -> None:
        """Takes over what another knows, whose nodes are alike and whose model and work are the
        same: its types, wherever they lie inside a node."""
        most = self.request.cluster.devices_per_node
        for key, solved in like._solved.items():
            if isinstance(key, tuple) and key[0] <= most:
                self._solved.setdefault(key, solved)


def _key(candidate: Candidate) -> tuple[int, int, int]:
    """What types depend on."""
    return candidate.tp, candidate.micro_batch, candidate.cp


def _product_seconds(costs: ModelCosts, block: str, graph: Graph, divisible: Binding) -> float:
    """The least seconds of a block's contractions and attentions, forward and backward."""
    total = 0.0
    for op in graph.ops:
        if TABLE[op.kind].work in ("contraction", "attention"):
            works = [
                costs.op_work(block, op, signature)
                for signature in nd_signatures(op, graph.values, costs.axes, divisible)
            ]
            total += min(
                sum(
                    each.seconds.get(cause, 0.0)
                    for each in (work.forward, work.backward)
                    for cause in ("matmul", "attention")
                )
                for work in works
            )
    return total
