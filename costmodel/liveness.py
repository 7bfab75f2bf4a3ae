"""Bytes of activations of one block by liveness: what it keeps for backward, and its peak.

Tensors are counted as storages. A value in the layout it is made in is one storage, each other
layout it is converted to is one more, a view shares its source's, and a value that several ops
keep is kept once. Parameters are not activations, nor are inputs without a gradient (token ids,
rotary tables: made once, shared by all blocks). What a framework does otherwise than eager torch
(`Runtime`) changes what is kept, never how it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..ir.graph import SLOTS, Binding, Graph, Op, Value
from ..ir.mesh import Mesh
from ..ir.optable import TABLE
from ..ir.plan import Annotation, Recompute
from ..ir.types import NdType
from .precision import Precision
from .runtime import Runtime
from .saved import is_expensive, is_fused, saves
from .shards import local_shape

_FLOAT32_BYTES = 4
_ALIASING = frozenset({"reshape", "permute", "expand", "chunk", "slice"})
"""Views that share their operand's storage; a concat does not."""

Layout = tuple[object, ...]
Storage = tuple[str, Layout]
"""(value, layout): one allocation."""


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Per rank and microbatch: `kept` from forward to backward, `workspace` on top of it at the
    worst moment of the block's forward or backward pass, `logits` that part of what is kept which
    a loss over the vocabulary keeps of them, `output` what the block hands to the next,
    `offloaded` what waits in host memory instead, beside the buffers that it passes through
    (`memory.activation_buffers`)."""

    kept: int
    workspace: int
    logits: int = 0
    output: int = 0
    offloaded: int = 0


@dataclass(slots=True)
class _Life:
    """A storage: bytes, the ops (by position) between which it lives, the first that keeps it."""

    bytes: int
    born: int
    last: int
    grad: bool
    saver: int | None = None


def block_bytes(
    graph: Graph,
    types: Annotation,
    mesh: Mesh,
    binding: Binding,
    precision: Precision,
    recompute: Recompute = "none",
    runtime: Runtime | None = None,
    slot_shards: int | None = None,
) -> BlockBytes:
    """Activation bytes of one call of a block on the fullest rank.

    `none` keeps what the op table says; `selective` keeps the block's input and the results of
    contractions and attention (a partial result before and after its reduction), or all but the
    attention core, as the runtime does it; `full` keeps the input alone; `offload` moves what
    `none` keeps to host memory. `binding` gives the
    logical sizes that `types` split; the default runtime is `torch`. `slot_shards`: experts have a
    mesh of their own, on which so many (tensor) ranks share out the slots of `binding`; with None
    slots are split as their types say.
    """
    runs = runtime or Runtime.preset("torch")
    found = _Liveness(graph, types, mesh, binding, precision, runs, slot_shards)
    return found.measure(recompute)


class _Liveness:
    def __init__(
        self,
        graph: Graph,
        types: Annotation,
        mesh: Mesh,
        binding: Binding,
        precision: Precision,
        runtime: Runtime,
        slot_shards: int | None,
    ) -> None:
        self.graph, self.types, self.mesh = graph, types, mesh
        self.binding, self.precision, self.runtime = binding, precision, runtime
        self.slot_shards = slot_shards
        self.producer = {name: (i, op) for i, op in enumerate(graph.ops) for name in op.results}
        self.within_chains: list[str] = []
        self.logits: set[Storage] = set()
        self.produced = types.produced(graph)
        self.root: dict[str, Storage | None] = {}
        self.lives: dict[Storage, _Life] = {}
        self.statistics = [0] * len(graph.ops)
        self.scores = [0] * len(graph.ops)
        self.scratch = [0] * len(graph.ops)
        for name in (*graph.inputs, *graph.parameters):
            value = graph.values[name]
            counts = value.role != "parameter" and value.grad and name in graph.inputs
            self.root[name] = self._new(name, self.produced[name], -1) if counts else None
        for i, op in enumerate(graph.ops):
            self._op(i, op)
        self._keep_inputs_of_chains()
        handed = {
            self._read(name, want, len(graph.ops))
            for name, want in zip(graph.outputs, types.outputs, strict=True)
        }
        self.output = sum(self.lives[storage].bytes for storage in handed if storage)

    def _new(self, name: str, nd: NdType, born: int, element_bytes: int = 0) -> Storage:
        value = self.graph.values[name]
        per_element = element_bytes or self.precision.element_bytes(value.dtype)
        size = prod(self._shape(value, nd)) * per_element
        storage = (name, (*_layout(nd), element_bytes))
        self.lives.setdefault(storage, _Life(size, born, born, value.grad))
        return storage

    def _shape(self, value: Value, nd: NdType) -> tuple[int, ...]:
        """A rank's part of a value; of slots under expert parallelism, experts times slots are
        as many as without, shared out by the tensor ranks."""
        if self.slot_shards is not None and any(SLOTS in dim for dim in value.dims):
            experts, slots, *rest = value.shape(self.binding)
            return (experts, -(-slots // self.slot_shards), *rest)
        return local_shape(value, nd, self.mesh, self.binding)

    def _read(self, name: str, want: NdType, at: int) -> Storage | None:
        """The storage an op reads, alive until then; None for what is not counted."""
        storage = self.root[name]
        if storage is None:
            return None
        self.lives[storage].last = max(self.lives[storage].last, at)
        if _layout(want) != _layout(self.produced[name]):
            storage = self._new(name, want, at)
            self.lives[storage].last = max(self.lives[storage].last, at)
        return storage

    def _copy(self, name: str, want: NdType) -> Storage | None:
        """The storage of a value in a layout that it has been read in."""
        storage = self.root[name]
        if storage is None or _layout(want) == _layout(self.produced[name]):
            return storage
        return (name, (*_layout(want), 0))

    def _op(self, i: int, op: Op) -> None:
        types = self.types.ops[op.name]
        read = [self._read(v, t, i) for v, t in zip(op.operands, types.operands, strict=True)]
        aliases = op.kind in _ALIASING or (op.kind == "cast" and self._same_bytes(op))
        for name, nd in zip(op.results, types.results, strict=True):
            self.root[name] = read[0] if aliases else self._new(name, nd, i)
        kept = saves(op, self.graph.values)
        for k in kept.operands:
            storage = read[k]
            if storage is None or (
                op.kind == "moe_combine" and k == 0 and self.runtime.early_gates
            ):
                continue
            if TABLE[op.kind].work == "loss" and k == 0:
                storage = self._keep_logits(i, op, types.operands[0])
            elif self._made_in_chain(op, op.operands[k], types.operands[k]):
                self.within_chains.append(op.operands[k])
                continue
            elif self._is_gathered(op, k):
                whole, storage = self.lives[storage], self.root[op.operands[k]]
                self.scratch[i] = max(self.scratch[i], whole.bytes)
            self._keep(storage, i)
        for k in kept.results:
            self._keep(self.root[op.results[k]], i)
        self.scratch[i] += self._parameter_gradients(op)
        if kept.statistics:
            self._keep_statistics(i, op, kept.statistics)
        if op.kind == "attention" and self.runtime.attention == "unfused":
            self._keep_scores(i, op)
        if op.kind == "dropout":
            shape = self._shape(self.graph.values[op.results[0]], types.results[0])
            self.statistics[i] = prod(shape) * self.runtime.dropout_mask_bytes

    def _made_in_chain(self, op: Op, name: str, want: NdType) -> bool:
        """Whether an operand is made by the pointwise op before, in one kernel with this one."""
        if not (self.runtime.fused_pointwise and is_fused(op) and name in self.producer):
            return False
        return is_fused(self.producer[name][1]) and want == self.produced[name]

    def _keep_inputs_of_chains(self) -> None:
        """A fused chain of pointwise ops keeps what goes into it and makes what is between again,
        unless somebody else keeps that (Megatron-LM's fused SwiGLU and bias-GELU)."""
        waiting = list(self.within_chains)
        while waiting:
            name = waiting.pop()
            i, op = self.producer[name]
            storage = self.root[name]
            if storage is None or self.lives[storage].saver is not None:
                continue
            for operand, want in zip(op.operands, self.types.ops[op.name].operands, strict=True):
                if self._made_in_chain(op, operand, want):
                    waiting.append(operand)
                else:
                    self._keep(self._copy(operand, want), i)

    def _is_gathered(self, op: Op, k: int) -> bool:
        """Whether a product keeps only its rank's part of an operand and gathers it again in the
        backward pass (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2)."""
        if not self.runtime.gathers_again or TABLE[op.kind].work != "contraction":
            return False
        made, want = self.produced[op.operands[k]], self.types.ops[op.name].operands[k]
        changed = [(made[axis].kind, kind.kind) for axis, kind in want if made[axis] != kind]
        return bool(changed) and all(pair in (("S", "R"), ("S", "I")) for pair in changed)

    def _parameter_gradients(self, op: Op) -> int:
        """Gradients of parameters as they are made, before they are added up; products that add
        to the accumulated ones themselves make none."""
        work = TABLE[op.kind].work
        if not self.runtime.transient_gradients or work not in ("contraction", "lookup"):
            return 0
        if work == "contraction" and self.runtime.fused_accumulation:
            return 0
        found = 0
        for name, nd in zip(op.operands, self.types.ops[op.name].operands, strict=True):
            value = self.graph.values[name]
            if value.role == "parameter" and value.grad:
                found += prod(self._shape(value, nd)) * self.precision.compute_bytes
        return found

    def _keep_scores(self, i: int, op: Op) -> None:
        """Attention with its probabilities in memory: kept after the softmax and, with dropout,
        after that as well, with a mask (Korthikanti et al. 2022, arXiv:2205.05198, section 4.1);
        beside them one more matrix of scores while they are made."""
        types = self.types.ops[op.name].operands
        query, key = (self._shape(self.graph.values[op.operands[k]], types[k]) for k in (0, 1))
        pairs = query[0] * query[1] * query[2] * key[2]
        each = self.precision.compute_bytes
        dropped = bool(op.attributes.get("dropout"))
        self.scores[i] = pairs * (each + (each + 1 if dropped else 0))
        self.scratch[i] = max(self.scratch[i], pairs * each)

    def _same_bytes(self, op: Op) -> bool:
        sizes = {self.precision.element_bytes(self.graph.values[v].dtype)
                 for v in (op.operands[0], op.results[0])}  # fmt: skip
        return len(sizes) == 1

    def _keep_logits(self, i: int, op: Op, nd: NdType) -> Storage | None:
        """What a cross-entropy keeps of the logits, and has beside it in its backward pass; see
        `Runtime.cross_entropy`."""
        name, how = op.operands[0], self.runtime.cross_entropy
        if how in ("logits", "in-place"):
            source = self.producer.get(name, (i, op))[1]
            cast = source.kind == "cast" and not self._same_bytes(source)
            storage = self.root[source.operands[0]] if cast else self.root[name]
            if cast:  # read as they are, never widened in memory
                self.lives[self.root[name]].bytes = 0  # type: ignore[index]
            if storage is not None:
                self.logits.add(storage)
                # a gradient of their size beside them, or in their place once this op is done
                self.lives[storage].last = i if how == "logits" else i - 1
            return storage
        own = self.precision.element_bytes(self.graph.values[name].dtype)
        wide = max(_FLOAT32_BYTES, own)
        storage = self._new(name, nd, i, wide)
        life = self.lives[storage]
        life.grad = False  # the logits' gradient is counted with the logits
        self.logits.add(storage)
        if how == "log-probabilities":  # gradients of these, and of the logits they were made of
            self.scratch[i] = life.bytes + max(0, life.bytes - own * (life.bytes // wide))
        elif self.root[name] != storage:  # probabilities become the gradient in their memory
            self.lives[self.root[name]].grad = own < wide  # type: ignore[index]
        return storage

    def _keep(self, storage: Storage | None, i: int) -> None:
        if storage is not None:
            life = self.lives[storage]
            life.saver = i if life.saver is None else min(life.saver, i)

    def _keep_statistics(self, i: int, op: Op, count: int) -> None:
        """`count` float32 values per row of the result (of the logits, for a loss)."""
        if TABLE[op.kind].work == "loss":
            name, nd = op.operands[0], self.types.ops[op.name].operands[0]
        else:
            name, nd = op.results[0], self.types.ops[op.name].results[0]
        shape = self._shape(self.graph.values[name], nd)
        self.statistics[i] = count * _FLOAT32_BYTES * prod(shape[:-1])

    def measure(self, recompute: Recompute) -> BlockBytes:
        if recompute == "offload":  # all that `none` keeps waits elsewhere
            plain = self.measure("none")
            return BlockBytes(0, plain.workspace, 0, plain.output, offloaded=plain.kept)
        count = len(self.graph.ops)
        saved = {s: life.saver for s, life in self.lives.items() if life.saver is not None}
        core_only = self.runtime.selective == "core-attention"
        if recompute == "none" or (recompute == "selective" and core_only):
            kept = sum(self.lives[s].bytes for s in saved) + sum(self.statistics)
            peak = max(self._forward_peak(set(saved)), self._backward_peak(saved))
            if recompute == "none":
                kept += sum(self.scores)
            return self._found(kept, peak, set(saved))
        keeps = {s for s, life in self.lives.items() if life.born < 0}
        statistics = 0
        if recompute == "selective":
            for i in self._expensive():
                keeps |= self._results_kept(self.graph.ops[i])
                statistics += self.statistics[i]
        kept = sum(self.lives[s].bytes for s in keeps) + statistics
        # Backward starts with the forward pass run again, beside the gradient of the output.
        again = self._forward_peak(set(saved) | keeps)
        again += sum(life.bytes for life in self.lives.values() if life.grad and life.last == count)
        held = dict.fromkeys(keeps - set(saved), -1)
        peak = max(self._forward_peak(keeps), again, self._backward_peak({**saved, **held}))
        return self._found(kept, peak, keeps)

    def _found(self, kept: int, peak: int, keeps: set[Storage]) -> BlockBytes:
        logits = sum(self.lives[storage].bytes for storage in self.logits & keeps)
        return BlockBytes(kept, max(0, peak - kept), logits, self.output)

    def _expensive(self) -> list[int]:
        """Ops whose results selective recomputation keeps, by position: contractions and attention,
        or every second contraction, from the first, and attention."""
        found, contractions = [], 0
        for i, op in enumerate(self.graph.ops):
            if not is_expensive(op):
                continue
            contractions += TABLE[op.kind].work == "contraction"
            alternate = self.runtime.selective == "alternate-contractions"
            if TABLE[op.kind].work == "attention" or not alternate or contractions % 2:
                found.append(i)
        return found

    def _results_kept(self, op: Op) -> set[Storage]:
        """Storages of an op's results, and where they are partial also what they are reduced to:
        torch's checkpoint policy keeps by kind of op, so it keeps both."""
        kept: set[Storage] = set()
        for name in op.results:
            made = self.root[name]
            if made is None:
                continue
            partial = any(kind.kind == "P" for _, kind in self.produced[name])
            copies = {s for s in self.lives if s[0] == name and s != made}
            kept |= {made, *copies} if partial else {made}
        return kept

    def _forward_peak(self, kept: set[Storage]) -> int:
        """Most bytes alive at any op of a forward pass that keeps `kept`."""
        count = len(self.graph.ops)
        change = [0] * (count + 2)
        for storage, life in self.lives.items():
            change[max(life.born, 0)] += life.bytes
            if storage not in kept:
                change[min(life.last, count) + 1] -= life.bytes
        return self._running_peak(change)

    def _backward_peak(self, saved: dict[Storage, int]) -> int:
        """Most bytes alive at any op of the backward pass: saved tensors until their first saver
        is done, gradients from a value's last reader back to its producer."""
        count = len(self.graph.ops)
        change = [0] * (count + 2)  # over ops in forward order: alive from `start` to `end`
        for storage, first in saved.items():
            change[max(first, 0)] += self.lives[storage].bytes
        for life in self.lives.values():
            if life.grad:
                change[max(life.born, 0)] += life.bytes
                change[min(life.last, count) + 1] -= life.bytes
        return self._running_peak(change, self.scratch)

    def _running_peak(self, change: list[int], scratch: list[int] | None = None) -> int:
        alive = peak = 0
        for i, delta in enumerate(change):
            at_op = i < len(self.graph.ops)
            alive += delta + (self.statistics[i] + self.scores[i] if at_op else 0)
            peak = max(peak, alive + (scratch[i] if scratch and at_op else 0))
        return peak


def _layout(nd: NdType) -> Layout:
    """What a type means for storage: R and I are the same bytes."""
    return tuple(("R", -1, -1) if k.kind == "I" else (k.kind, k.dim, k.part) for _, k in nd)
