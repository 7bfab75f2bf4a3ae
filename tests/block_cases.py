"""A Llama-like block of known sizes, and a builder for others, for tests of the cost model."""

from __future__ import annotations

from dataclasses import replace

from shardwright.costmodel import Device, Precision
from shardwright.ir import AxisType, NdType
from shardwright.ir.graph import Graph, Op, Value
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import data_parallel_types
from shardwright.ir.refine import RawGraph, RawOp, refine

HIDDEN, HEADS, KV_HEADS, HEAD, FFN = 64, 8, 2, 8, 160
BATCH, SEQ = 2, 32
TOKENS = BATCH * SEQ
BINDING = {"b": BATCH, "s": SEQ}
BF16, FP32 = Precision.preset("bf16"), Precision.preset("fp32")
H100 = Device.preset("h100-sxm")
ALONE = Mesh.of(dp=1)


class Block:
    """Builds a raw graph line by line."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.ops: list[RawOp] = []
        self.parameters: list[str] = []

    def value(self, name: str, *shape: int | str, **other: object) -> str:
        self.values[name] = Value(name, tuple((d,) for d in shape), **other)  # type: ignore[arg-type]
        return name

    def weight(self, name: str, *shape: int) -> str:
        self.parameters.append(name)
        return self.value(name, *shape, role="parameter")

    def op(self, kind: str, operands: str, result: str, *shape: int | str, **other: object) -> str:
        sizes = other.pop("sizes", {})
        dtype = other.pop("dtype", "model")
        self.value(result, *shape, dtype=dtype)
        self.ops.append(
            RawOp(f"{kind}:{result}", kind, tuple(operands.split()), (result,), other, sizes=sizes)  # type: ignore[arg-type]
        )
        return result

    def graph(self, inputs: str, outputs: str) -> Graph:
        raw = RawGraph(
            self.values,
            tuple(self.ops),
            tuple(inputs.split()),
            tuple(self.parameters),
            tuple(outputs.split()),
        )
        return refine({"block": raw})["block"]


def llama_block(
    hidden: int = HIDDEN, heads: int = HEADS, kv: int = KV_HEADS, head: int = HEAD, ffn: int = FFN
) -> Graph:
    """Attention and gated MLP with their norms, as traced from Hugging Face's Llama."""
    b = Block()
    x = ("b", "s", hidden)
    b.value("x", *x)
    for table in ("cos", "sin"):
        b.value(table, 1, "s", head, role="input", grad=False)
        b.values[table] = replace(b.values[table], dims=((), ("s",), (head,)))
    b.weight("norm1", hidden)
    b.op("rms_norm", "x norm1", "n1", *x)
    for name, n in (("q", heads), ("k", kv), ("v", kv)):
        b.weight(f"w{name}", n * head, hidden)
        b.op("linear", f"n1 w{name}", name, "b", "s", n * head)
        b.op("reshape", name, f"{name}_heads", "b", "s", n, head)
        b.op("permute", f"{name}_heads", f"{name}_t", "b", n, "s", head, order=(0, 2, 1, 3))
        if name != "v":
            b.op("rotary", f"{name}_t cos sin", f"{name}_r", "b", n, "s", head)
    b.op("attention", "q_r k_r v_t", "o_t", "b", heads, "s", head, causal=True, sizes={"k": kv})
    b.op("permute", "o_t", "o_heads", "b", "s", heads, head, order=(0, 2, 1, 3))
    b.op("reshape", "o_heads", "o", "b", "s", heads * head)
    b.weight("wo", hidden, heads * head)
    b.op("linear", "o wo", "o_out", *x)
    b.op("add", "x o_out", "x1", *x)
    b.weight("norm2", hidden)
    b.op("rms_norm", "x1 norm2", "n2", *x)
    for name in ("gate", "up"):
        b.weight(f"w{name}", ffn, hidden)
        b.op("linear", f"n2 w{name}", name, "b", "s", ffn)
    b.op("silu", "gate", "act", "b", "s", ffn)
    b.op("mul", "act up", "mlp", "b", "s", ffn)
    b.weight("wdown", hidden, ffn)
    b.op("linear", "mlp wdown", "down", *x)
    b.op("add", "x1 down", "y", *x)
    return b.graph("x cos sin", "y")


BLOCK = llama_block()
WHOLE = data_parallel_types(BLOCK)


def named(graph: Graph, name: str) -> Op:
    return next(op for op in graph.ops if op.name == name)


def nd(**types: AxisType) -> NdType:
    return NdType.of(types)
