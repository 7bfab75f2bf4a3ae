"""Plans to emit: traced small models, planned layouts, and annotations drawn at random.

A random annotation runs every op in any of its signatures, so that every conversion there is occurs
somewhere: what a planner would never choose must be right too.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import shardwright as sw
from shardwright.ir.graph import Graph, Model, Value
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Annotation, OpTypes, Plan
from shardwright.ir.signature import Signature, signatures
from shardwright.ir.types import AxisType, I, NdType, P, R, S
from shardwright.planner import scaled_plan
from shardwright.planner.build import full_annotations, preamble_annotation


class PlainBlock(nn.Module):
    """Attention with fused projections and a Sequential, as people write them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (
            part.view(b, s, self.heads, h // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, h))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """A module without a loss of its own."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(8, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mean_square(output: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(output, wanted)


@functools.cache
def module(name: str, layers: int = 6, large: bool = False) -> nn.Module:
    """`llama` (two key heads), `gpt2` (tied, fused), `dropout` (the same with it) or `plain`:
    small, or of real size and without values."""
    torch.manual_seed(0)
    if name == "plain":
        with torch.device("meta" if large else "cpu"):
            return Plain(4096 if large else 32, 32 if large else 4, layers)
    drop = 0.1 if name == "dropout" else 0.0
    config: Any
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=4096 if large else 32, intermediate_size=14336 if large else 64,
            num_hidden_layers=layers, vocab_size=128256 if large else 64,
            num_attention_heads=32 if large else 4, num_key_value_heads=8 if large else 2,
            max_position_embeddings=8192 if large else 64,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            n_embd=4096 if large else 32, n_head=32 if large else 4, n_layer=layers,
            vocab_size=50304 if large else 64, n_positions=8192 if large else 64, bos_token_id=0,
            eos_token_id=0, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop),
        )  # fmt: skip
    config.use_cache = False
    with torch.device("meta" if large else "cpu"):
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return made


@functools.cache
def traced(name: str, layers: int = 6, large: bool = False) -> Model:
    """The graph of a model."""
    device = "meta" if large else "cpu"
    if name == "plain":
        x, wanted = (torch.zeros(2, 32, 8, device=device) for _ in range(2))
        batch = {"x": x, "wanted": wanted}
        return sw.trace(module(name, layers, large), batch, loss=mean_square)
    ids, labels = (torch.zeros(2, 32, dtype=torch.long, device=device) for _ in range(2))
    return sw.trace(module(name, layers, large), {"input_ids": ids, "labels": labels})


@functools.cache
def _large_plan(name: str, precision: str) -> Plan:
    work = sw.Workload(global_batch=64, seq_len=8192, precision=precision)
    layout = "tp=8,dp=4,pp=1,micro_batch=1"
    return sw.plan(traced(name, 6, True), sw.Cluster.parse("h100-sxm:4x8"), work, fix=layout)


def scaled(name: str, ranks: int, tp: int, precision: str = "fp64") -> Plan:
    """What the planner chooses for a model of real size, carried over to the small one."""
    sizes = {"dp": ranks // tp, "tp": tp}
    return scaled_plan(_large_plan(name, precision), traced(name), sizes, 2 * ranks, 32)


def small_plan(
    name: str,
    layout: str,
    ranks: int,
    *,
    precision: str = "fp64",
    layers: int = 6,
    global_batch: int = 0,
) -> Plan:
    """The planner's own types for a layout of a small model."""
    nodes = f"{-(-ranks // 8)}x{min(ranks, 8)}"
    work = sw.Workload(global_batch=global_batch or 2 * ranks, seq_len=32, precision=precision)
    cluster = sw.Cluster.parse(f"h100-sxm:{nodes}")
    return sw.plan(traced(name, layers), cluster, work, fix=layout)


class Drawing:
    """Draws types of all blocks of a model along the tensor axes of a mesh."""

    def __init__(self, model: Model, mesh: Mesh, seed: int) -> None:
        self.model, self.mesh = model, mesh
        self.axes = tuple(a.name for a in mesh.axes if a.parent == "tp")
        self.random = random.Random(seed)

    def annotations(self) -> dict[str, Annotation]:
        """Types on (dp, tensor axes)."""
        boundary: dict[str, NdType] = {}
        stored: dict[str, NdType] = {}
        tensor: dict[str, Annotation] = {}
        for segment in self.model.segments:
            graph = self.model.blocks[segment.block]
            if segment.block in tensor:
                annotation = tensor[segment.block]
            else:
                annotation = tensor[segment.block] = self._block(
                    graph,
                    [boundary.get(name) for name in segment.inputs],
                    [stored.get(name) for name in segment.parameters],
                    self._loops(segment.block),
                    self.model.loss[0] in segment.outputs,
                )
            boundary |= dict(zip(segment.outputs, annotation.outputs, strict=True))
            stored |= dict(zip(segment.parameters, annotation.parameters, strict=True))
        return full_annotations(self.model, tensor)

    def _loops(self, block: str) -> bool:
        return sum(segment.block == block for segment in self.model.segments) > 1

    def _block(
        self,
        graph: Graph,
        inputs: list[NdType | None],
        parameters: list[NdType | None],
        loops: bool,
        last: bool,
    ) -> Annotation:
        kinds = [
            given or NdType.uniform(self.axes, R) for given in inputs
        ]  # what the preamble made is whole
        held = [
            given or self._value(graph.values[name], (I,))
            for name, given in zip(graph.parameters, parameters, strict=True)
        ]
        ops = {}
        for op in graph.ops:
            options = signatures(op, graph.values)
            ops[op.name] = self._op(graph, op.operands, op.results, options)
        outputs = []
        for k, name in enumerate(graph.outputs):
            value = graph.values[name]
            if loops:
                outputs.append(kinds[0])
            elif last:
                outputs.append(self._each((I, P) if value.grad else (R,)))
            else:
                outputs.append(self._value(value, (I, R, P) if k == 0 else (R,)))
        return Annotation(tuple(kinds), tuple(held), ops, tuple(outputs))

    def _op(
        self,
        graph: Graph,
        operands: tuple[str, ...],
        results: tuple[str, ...],
        options: tuple[Signature, ...],
    ) -> OpTypes:
        names = operands + results
        split = [o for o in options if o.factor is not None]
        for _ in range(100):
            chosen = [
                self.random.choice(split or options)
                if self.random.random() < 0.7
                else self.random.choice(options)
                for _ in self.axes
            ]
            types = [
                NdType(
                    tuple(
                        (a, (c.operands + c.results)[k])
                        for a, c in zip(self.axes, chosen, strict=True)
                    )
                )
                for k in range(len(names))
            ]
            if all(self._fits(graph.values[n], t) for n, t in zip(names, types, strict=True)):
                return OpTypes(tuple(types[: len(operands)]), tuple(types[len(operands) :]))
        whole = next(o for o in options if o.factor is None and all(t is not P for t in o.results))
        return OpTypes(
            tuple(NdType.uniform(self.axes, t) for t in whole.operands),
            tuple(NdType.uniform(self.axes, t) for t in whole.results),
        )

    def _each(self, kinds: tuple[AxisType, ...]) -> NdType:
        return NdType(tuple((a, self.random.choice(kinds)) for a in self.axes))

    def _value(self, value: Value, others: tuple[AxisType, ...]) -> NdType:
        splits = [S(d, p) for d, sizes in enumerate(value.dims) for p, _ in enumerate(sizes)]
        options = [
            NdType(tuple(zip(self.axes, kinds, strict=True)))
            for kinds in product([*splits, *others], repeat=len(self.axes))
        ]
        return self.random.choice([t for t in options if self._fits(value, t)])

    def _fits(self, value: Value, types: NdType) -> bool:
        for dim, sizes in enumerate(value.dims):
            for part, size in enumerate(sizes):
                pieces = prod(self.mesh[a].size for a in types.splitting(dim, part))
                if size == "b" and pieces > 1:
                    return False
                if isinstance(size, int) and size % pieces:
                    return False
        return True


def random_plan(plan: Plan, mesh: Mesh, seed: int) -> Plan:
    """A plan of the same model and stages with types drawn at random."""
    drawing = Drawing(plan.model, mesh, seed)
    pp, dp = mesh["pp"].size, mesh["dp"].size
    strategy = replace(plan.strategy, pp=pp, dp=dp, tp=mesh.size // (pp * dp))
    annotations = drawing.annotations()
    preamble = preamble_annotation(plan.model, mesh)
    return replace(plan, mesh=mesh, strategy=strategy, annotations=annotations, preamble=preamble)
