"""What the SBP program pays: the cost model's seconds for ops and conversions on a mesh.

`ModelCosts` answers twice: `op` and `conversion` give the program plain seconds to minimise,
`op_work` and `conversion_work` say where these go, pass by pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import Group, collective_seconds
from ..costmodel.kernels import Kernels
from ..costmodel.liveness import BlockBytes, block_bytes
from ..costmodel.overlap import exposed_seconds
from ..costmodel.precision import Precision
from ..costmodel.runtime import Runtime
from ..costmodel.saved import runs_again
from ..costmodel.shards import local_sizes
from ..costmodel.work import Work
from ..ir.conversion import Collective, Step, steps
from ..ir.graph import SLOTS, Binding, Dims, Dtype, Graph, Op, Value, bind
from ..ir.mesh import Axis, Mesh
from ..ir.optable import TABLE
from ..ir.plan import Annotation, Recompute
from ..ir.rule import FactorName
from ..ir.types import NdType
from .candidates import Candidate
from .experts import ExpertPart, exchange_seconds, expert_sizes
from .signatures import NdSignature

TIE_S = 1e-9
"""Added to every conversion, so that of equally fast layouts one with fewer conversions wins."""

_VOCABULARY_REDUCTIONS = 3
"""All-reduces of one number per token in a cross-entropy over a split vocabulary: the maximum, the
sum of exponentials and the label's logit (Megatron-LM, Shoeybi et al. 2019, section 3)."""


@dataclass(frozen=True, slots=True)
class PassWork:
    """One forward pass, what of it runs again before the backward pass, and the backward pass."""

    forward: Work
    again: Work
    backward: Work

    @property
    def total_s(self) -> float:
        """Seconds of the device for all of it."""
        return self.forward.total_s + self.again.total_s + self.backward.total_s


@dataclass(slots=True)
class BlockWork:
    """The passes of one call of a block, all its ops and conversions together."""

    forward: Work = field(default_factory=Work)
    again: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    weights_s: float = 0.0


_NOTHING = Work()


_Move = tuple[Dims, Dtype, bool, bool, NdType, NdType]
"""What a conversion's price depends on: of its value the sizes, the dtype, whether it is a
parameter and whether it has a gradient; the types."""


def _move(value: Value, source: NdType, target: NdType) -> _Move:
    return value.dims, value.dtype, value.role == "parameter", value.grad, source, target


@dataclass(slots=True)
class _Known:
    """What has been priced so far; passes are forward and backward."""

    experts: dict[str, ExpertPart] = field(default_factory=dict)
    kernels: dict[str, Kernels] = field(default_factory=dict)
    ops: dict[tuple[Hashable, ...], tuple[Work, Work]] = field(default_factory=dict)
    moves: dict[_Move, tuple[Work, Work]] = field(default_factory=dict)
    seconds: dict[tuple[Recompute, _Move], float] = field(default_factory=dict)
    collectives: dict[tuple[Collective, str, int], float] = field(default_factory=dict)
    memory: dict[tuple[str, Recompute], tuple[Annotation, BlockBytes]] = field(default_factory=dict)
    blocks: dict[Hashable, tuple[Annotation, BlockWork]] = field(default_factory=dict)


@dataclass(slots=True)
class ModelCosts:
    """`sbp_program.Costs` of one microbatch on one rank, in seconds.

    `mesh` is the whole mesh (it gives groups their strides), `axes` those that the program decides
    over. With `gather_parameters` a parameter may be kept split and gathered where it is read (and
    again in the backward pass, as FSDP does): for programs whose axes include data parallelism;
    beside a data-parallel axis of its own that is ZeRO's work. `memory_price_s_per_byte` turns
    bytes of parameter state into seconds; `state_bytes` is what an element of a parameter costs
    in all its copies. `candidate` says how sequences and experts are split beside the axes (by
    default not): `binding` then has a rank's part of the sequence.
    """

    cluster: Cluster
    mesh: Mesh
    axes: tuple[Axis, ...]
    binding: Binding
    precision: Precision
    graphs: Mapping[str, Graph]
    runtime: Runtime = field(default_factory=lambda: Runtime.preset("torch"))
    candidate: Candidate | None = None
    recompute: Recompute = "none"
    gather_parameters: bool = False
    memory_price_s_per_byte: float = 0.0
    state_bytes: int = 0
    _known: _Known = field(default_factory=lambda: _Known(), init=False)

    def variant(
        self,
        recompute: Recompute | None = None,
        memory_price_s_per_byte: float | None = None,
        state_bytes: int | None = None,
    ) -> ModelCosts:
        """The same prices of ops and conversions under another recomputation or price of storage;
        what is known of them is shared."""
        price = memory_price_s_per_byte
        other = replace(
            self,
            recompute=self.recompute if recompute is None else recompute,
            memory_price_s_per_byte=self.memory_price_s_per_byte if price is None else price,
            state_bytes=self.state_bytes if state_bytes is None else state_bytes,
        )
        other._known = self._known
        return other

    def beside(self, candidate: Candidate) -> ModelCosts:
        """The same prices for another way to split sequences and experts beside the axes, with as
        many tokens on a rank; what is known of ops that this does not touch is shared."""
        other = replace(self, candidate=candidate)
        other._known = self._known
        return other

    def memory(self, block: str, types: Annotation) -> BlockBytes:
        """Activations of a block under given types, under this recomputation. Expert and context
        parallelism leave them as they are: slots are shared out over tensor ranks alone."""
        key, known = (block, self.recompute), self._known.memory
        if key not in known or known[key][0] is not types:
            slot_shards = None if self.candidate is None else self.candidate.tp
            known[key] = types, block_bytes(
                self.graphs[block], types, self.mesh, self.binding, self.precision,
                self.recompute, self.runtime, slot_shards,
            )  # fmt: skip
        return known[key][1]

    def block(
        self, block: str, types: Annotation, work: Callable[[Annotation], BlockWork]
    ) -> BlockWork:
        """`work(types)`, unless the block has been added up before for as good as the same."""
        key: tuple[Hashable, ...] = (block, self.recompute)
        if (beside := self.candidate) is not None:
            if any(TABLE[op.kind].work == "attention" for op in self.graphs[block].ops):
                key += (beside.cp, beside.ulysses)
            if self.expert_part(block).ops:
                key += (beside.ep, beside.etp)
        known = self._known.blocks
        if key not in known or known[key][0] is not types:
            known[key] = types, work(types)
        return known[key][1]

    def op(self, block: str, op: Op, signature: NdSignature) -> float:
        return self.op_work(block, op, signature).total_s

    def op_work(self, block: str, op: Op, signature: NdSignature) -> PassWork:
        """What an op takes, split as a signature says."""
        key: tuple[Hashable, ...] = (block, op.name, signature.factors)
        beside, known = self.candidate, self._known.ops
        if beside is not None and op.name in self.expert_part(block).ops:
            key += (beside.ep, beside.etp)
        elif beside is not None and TABLE[op.kind].work == "attention":
            key += (beside.cp, beside.ulysses)
        if key not in known:
            known[key] = self._op(block, op, signature)
        forward, backward = known[key]
        again = runs_again(op, self.recompute, self.runtime)
        return PassWork(forward, forward if again else _NOTHING, backward)

    def _op(self, block: str, op: Op, signature: NdSignature) -> tuple[Work, Work]:
        every = self._known.kernels
        if block not in every:
            every[block] = Kernels.of(self.graphs[block], self.precision, self.runtime)
        kernels = every[block]
        inside = self.candidate is not None and op.name in self.expert_part(block).ops
        sizes = self._sizes(op, signature, inside)
        device, line = self.cluster.device, TABLE[op.kind]
        attention = line.work == "attention"
        forward = Work.of(device, kernels.forward(op, sizes), attention)
        special = {factor for factor, _ in line.special}
        for axis, factor in zip(self.axes, signature.factors, strict=True):
            if factor is not None and factor.split("_")[0] in special:
                inner = {f for f in op.rule.factors if f.split("_")[0] in special}
                rows = prod(n for f, n in sizes.items() if f not in inner)
                once = self._collective("all_reduce", axis.name, rows * 4)
                work = Work.communication("tensor_parallel", once, self.runtime)
                forward.add(work, _VOCABULARY_REDUCTIONS)
        backward = Work.of(device, kernels.backward(op, sizes), attention)
        if attention and self.candidate is not None and self.candidate.cp > 1:
            self._context(op, sizes, forward, backward)
        if inside and line.work == "dispatch":
            self._exchange(block, op, forward, backward)
        return forward, backward

    def expert_part(self, block: str) -> ExpertPart:
        """What of a block belongs to experts."""
        known = self._known.experts
        if block not in known:
            known[block] = ExpertPart.of(self.graphs[block])
        return known[block]

    def _sizes(self, op: Op, signature: NdSignature, inside: bool) -> dict[FactorName, int]:
        """A rank's iterations of the loops of an op; under context parallelism its queries attend
        to the keys of the whole sequence, and experts have a mesh of their own."""
        if inside:
            assert self.candidate is not None
            return expert_sizes(op, local_sizes(op, self.binding), self.candidate)
        sizes = local_sizes(op, self.binding, signature.splits(self.axes))
        if op.kind == "attention" and self.candidate is not None:
            for factor in op.rule.operands[1][2]:
                if op.sizes[factor] == "s":
                    sizes[factor] *= self.candidate.cp
        return sizes

    def _context(
        self, op: Op, sizes: Mapping[FactorName, int], forward: Work, backward: Work
    ) -> None:
        """Attention over a sequence that is split over the context group: its ranks exchange
        sequence for heads as far as `ulysses` goes (DeepSpeed-Ulysses, arXiv:2309.14509), and in
        both passes again for the result; keys and values travel round the others beside the
        products, in the backward pass their gradients too, and what takes longer counts (ring
        attention, arXiv:2310.01889)."""
        assert self.candidate is not None
        beside = self.candidate
        own = dict(sizes)
        for factor in op.rule.operands[1][2]:
            if op.sizes[factor] == "s":
                own[factor] //= beside.cp

        def held(shapes: Iterable[Sequence[Sequence[FactorName]]]) -> int:
            """Bytes of a rank's part of tensors of attention."""
            elements = sum(prod(own[f] for dim in shape for f in dim) for shape in shapes)
            return elements * self.precision.compute_bytes

        if beside.ring > 1:
            group = Group(beside.ring, beside.tp * beside.ulysses)
            moved = held(op.rule.operands[1:3]) * beside.ring
            once = collective_seconds(self.cluster, "all_gather", moved, group)
            for work, rounds in ((forward, 1), (backward, 2)):
                exposed = exposed_seconds(rounds * once, work.total_s)
                work.add(Work.communication("context_parallel", exposed, self.runtime))
        if beside.ulysses > 1:
            group = Group(beside.ulysses, beside.tp)
            for shapes in (op.rule.operands[:3], op.rule.results[:1]):
                moved = held(shapes) * beside.ulysses
                seconds = collective_seconds(self.cluster, "all_to_all", moved, group)
                for work in (forward, backward):
                    work.add(Work.communication("context_parallel", seconds, self.runtime))

    def _exchange(self, block: str, op: Op, forward: Work, backward: Work) -> None:
        """Tokens to their experts or back, in the backward pass their gradients."""
        assert self.candidate is not None
        hidden, shape = (
            (op.results[0], op.rule.results[0])
            if op.kind == "moe_dispatch"
            else (op.operands[0], op.rule.operands[0])
        )
        whole = local_sizes(op, self.binding)
        elements = prod(whole[f] for dim in shape for f in dim) / self.candidate.tp
        each = self.precision.element_bytes(self.graphs[block].values[hidden].dtype)
        seconds = exchange_seconds(self.cluster, self.candidate, elements * each)
        for work in (forward, backward):
            work.add(Work.communication("expert_parallel", seconds, self.runtime))

    def conversion(self, block: str, value: Value, source: NdType, target: NdType) -> float:
        if source == target:
            return 0.0
        key, known = (self.recompute, _move(value, source, target)), self._known.seconds
        if key not in known:
            known[key] = self._conversion_seconds(block, value, source, target)
        return known[key]

    def _conversion_seconds(
        self, block: str, value: Value, source: NdType, target: NdType
    ) -> float:
        path = steps(source, target)
        if any(_dominated(step) for step in path):
            return float("inf")
        gathered = value.role == "parameter" and any(s.forward == "all_gather" for s in path)
        if gathered and not self.gather_parameters:
            return float("inf")
        return self.conversion_work(block, value, source, target).total_s + TIE_S * len(path)

    def conversion_work(self, block: str, value: Value, source: NdType, target: NdType) -> PassWork:
        """What a conversion takes, and its dual in the backward pass."""
        if self.candidate is not None and any(SLOTS in dim for dim in value.dims):
            return PassWork(_NOTHING, _NOTHING, _NOTHING)  # priced with dispatch and combine
        key, known = _move(value, source, target), self._known.moves
        path = steps(source, target)
        if key not in known:
            known[key] = self._conversion(value, source, path)
        forward, backward = known[key]
        again = self._converts_again(value, path)
        return PassWork(forward, forward if again else _NOTHING, backward)

    def _converts_again(self, value: Value, path: Sequence[Step]) -> bool:
        """Whether a conversion on the way runs again before the backward pass: all but reductions
        that selective recomputation keeps."""
        parameter = value.role == "parameter"
        gathered = parameter and any(step.forward == "all_gather" for step in path)
        if self.recompute == "selective" and self.runtime.selective == "core-attention":
            return gathered
        return gathered or (self.recompute != "none" and not parameter)

    def _conversion(self, value: Value, source: NdType, path: Sequence[Step]) -> tuple[Work, Work]:
        element = self.precision.element_bytes(value.dtype)
        # gradients of parameters are reduced in the dtype they are accumulated in
        gradient = self.precision.gradient_bytes if value.role == "parameter" else element
        forward, backward = Work(), Work()
        state = source
        for step in path:
            full = self._full_elements(value, state, step)
            forward.add(self._communication(step.forward, step.axis, full * element))
            if value.grad:
                backward.add(self._communication(step.backward, step.axis, full * gradient))
            state = state.replace(step.axis, step.target)
        return forward, backward

    def _communication(self, kind: Collective, axis: str, full_bytes: int) -> Work:
        seconds = self._collective(kind, axis, full_bytes)
        if not seconds:
            return _NOTHING
        return Work.communication("tensor_parallel", seconds, self.runtime)

    def _full_elements(self, value: Value, state: NdType, step: Step) -> int:
        """Elements of the value within the step's group: what the other axes leave of it."""
        ways = prod(
            axis.size for axis in self.axes if axis.name != step.axis and state[axis.name].is_split
        )
        return prod(bind(size, self.binding) for dim in value.dims for size in dim) // ways

    def _collective(self, kind: Collective, axis: str, full_bytes: int) -> float:
        if kind == "none" or kind == "slice" or kind == "keep_one" or kind == "pad":
            return 0.0
        key, known = (kind, axis, full_bytes), self._known.collectives
        if key not in known:
            group = Group(self.mesh[axis].size, self.mesh.stride(axis))
            known[key] = collective_seconds(self.cluster, kind, full_bytes, group)
        return known[key]

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
