"""Compute and memory of a Llama-like block, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import (
    BlockBytes,
    Device,
    Kernel,
    Precision,
    Runtime,
    backward_seconds,
    block_bytes,
    forward_seconds,
    gather_bytes,
    in_flight_microbatches,
    kernel_seconds,
    local_shape,
    local_sizes,
    op_flops,
    op_splits,
    run_again,
    saves,
    stage_bytes,
    state_bytes,
)
from shardwright.costmodel.compute import product_efficiency
from shardwright.ir import AxisType, I, NdType, P, R, S
from shardwright.ir.errors import InvalidInput
from shardwright.ir.graph import Graph, Op, Value
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Annotation, OpTypes, data_parallel_types
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


# compute ------------------------------------------------------------------------------------------


def test_flops_of_the_block_are_the_textbooks() -> None:
    total = sum(
        op_flops(op, local_sizes(op, BINDING))
        for op in BLOCK.ops
        if op.kind in ("linear", "attention")
    )
    weights = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD + 3 * HIDDEN * FFN
    scores = 2 * 2 * BATCH * HEADS * SEQ * SEQ * HEAD / 2  # q·kT and p·v, half of it causal
    assert total == 2 * TOKENS * weights + scores


def test_a_window_sees_less_and_a_mask_changes_nothing() -> None:
    op = named(BLOCK, "attention:o_t")
    sizes = local_sizes(op, BINDING)
    pairs = {
        (causal, window): op_flops(
            replace(op, attributes={"causal": causal, "window": window}), sizes
        )
        / (4 * BATCH * HEADS * HEAD)
        for causal in (False, True)
        for window in (None, 8, 100)
    }
    assert pairs[False, None] == pairs[False, 100] == SEQ * SEQ
    assert pairs[True, None] == pairs[True, 100] == SEQ * SEQ / 2
    assert pairs[False, 8] == 8 * SEQ
    assert pairs[True, 8] == 8 * SEQ - 8 * 8 / 2


def test_a_roofline_has_two_sides_and_a_floor() -> None:
    peak, bandwidth = 989.4e12 * 0.73, 3350e9 * 0.85
    assert kernel_seconds(H100, Kernel("matmul", 1e15, 0, "bfloat16")) == pytest.approx(
        1e15 / peak + 4e-6
    )
    assert kernel_seconds(H100, Kernel("matmul", 0, 1e12, "bfloat16")) == pytest.approx(
        1e12 / bandwidth + 4e-6
    )
    assert kernel_seconds(H100, Kernel("pointwise", 0, 0, "bfloat16")) == 4e-6


def test_products_lose_what_tiles_and_waves_leave_idle() -> None:
    whole = product_efficiency(1, 128 * 108, 256, 1 << 20, 108)  # one tile for everyone, endless
    assert whole == pytest.approx(1.0, abs=1e-3)
    one_more = product_efficiency(1, 128 * 109, 256, 1 << 20, 108)  # a second wave for one tile
    assert one_more < 0.75 * whole
    short = product_efficiency(1, 128 * 108, 256, 192, 108)  # as long to fill as to work
    assert short == pytest.approx(0.5, abs=1e-3)
    alone = product_efficiency(1, 128, 256, 1024, 108)  # too short to be split
    assert alone < 0.05
    split = product_efficiency(1, 128, 256, 108 * 1024, 108)
    assert split > 0.5


@given(
    st.integers(1, 64), st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000),
    st.integers(1, 304),
)  # fmt: skip
def test_no_product_is_faster_than_the_peak(
    batch: int, m: int, n: int, k: int, multiprocessors: int
) -> None:
    found = product_efficiency(batch, m, n, k, multiprocessors)
    assert 0 < found <= 1
    transposed = product_efficiency(batch, n, m, k, multiprocessors)
    assert found == pytest.approx(transposed)


def test_unaligned_products_are_slower() -> None:
    def seconds(batch: int, n: int) -> float:
        flops = 2.0 * batch * 4096 * n * 4096
        product, rows = (batch, 4096, n, 4096), (4096, n)
        kernel = Kernel("matmul", flops, 0, "bfloat16", 0, product, rows)
        return kernel_seconds(H100, kernel) / flops

    assert seconds(1, 50257) > 2.5 * seconds(1, 50304)
    assert seconds(8, 108) > seconds(1, 108) > 2.5 * seconds(1, 128)


def test_backward_of_contractions_and_attention() -> None:
    """Twice the forward pass, and 2.5 times (FlashAttention-2), where arithmetic binds."""
    big = {"b": 64, "s": 8192}
    plain = {"kernel_launch_s": 0.0, "memory_bandwidth_bytes_per_s": 1e18, "multiprocessors": None}
    device = H100.model_copy(update=plain)
    for name, ratio in (("linear:gate", 2), ("attention:o_t", 2.5)):
        op = named(BLOCK, name)
        sizes = local_sizes(op, big)
        forward = forward_seconds(op, BLOCK.values, sizes, device, BF16)
        backward = backward_seconds(op, BLOCK.values, sizes, device, BF16)
        assert backward == pytest.approx(ratio * forward)


def test_pointwise_ops_cost_their_bytes() -> None:
    rate = 3350e9 * 0.85
    elements = TOKENS * FFN * 2
    silu = named(BLOCK, "silu:act")
    sizes = local_sizes(silu, BINDING)
    forward = forward_seconds(silu, BLOCK.values, sizes, H100, BF16)
    assert forward == pytest.approx(2 * elements / rate + 4e-6)  # read, write
    backward = backward_seconds(silu, BLOCK.values, sizes, H100, BF16)
    assert backward == pytest.approx(3 * elements / rate + 4e-6)  # dy, saved x; dx


def test_views_are_free_and_what_has_no_gradient_has_no_backward() -> None:
    view = named(BLOCK, "reshape:q_heads")
    sizes = local_sizes(view, BINDING)
    assert forward_seconds(view, BLOCK.values, sizes, H100, BF16) == 0
    assert backward_seconds(view, BLOCK.values, sizes, H100, BF16) == 0
    frozen = {n: replace(v, grad=False) for n, v in BLOCK.values.items()}
    linear = named(BLOCK, "linear:gate")
    assert backward_seconds(linear, frozen, local_sizes(linear, BINDING), H100, BF16) == 0
    assert saves(linear, frozen) == saves(view, BLOCK.values)


def test_a_frozen_weight_halves_a_linear_layers_backward() -> None:
    """No product for the weight's gradient, and its input is not kept."""
    big = {"b": 64, "s": 8192}
    linear = named(BLOCK, "linear:gate")
    sizes = local_sizes(linear, big)
    frozen = {**BLOCK.values, "wgate": replace(BLOCK.values["wgate"], grad=False)}
    device = H100.model_copy(update={"kernel_launch_s": 0.0})
    both = backward_seconds(linear, BLOCK.values, sizes, device, BF16)
    assert backward_seconds(linear, frozen, sizes, device, BF16) == pytest.approx(both / 2, rel=0.1)
    assert saves(linear, frozen).operands == (1,)


def test_wide_operands_compute_in_float32() -> None:
    big = {"b": 64, "s": 8192}
    linear = named(BLOCK, "linear:gate")
    sizes = local_sizes(linear, big)
    wide = {**BLOCK.values, "n2": replace(BLOCK.values["n2"], dtype="wide")}
    device = H100.model_copy(update={"kernel_launch_s": 0.0, "memory_bandwidth_bytes_per_s": 1e18})
    narrow_s = forward_seconds(linear, BLOCK.values, sizes, device, BF16)
    wide_s = forward_seconds(linear, wide, sizes, device, BF16)
    assert wide_s == pytest.approx(narrow_s * 989.4 / 67)


def test_a_lookup_reads_rows_not_the_table() -> None:
    b = Block()
    b.value("ids", "b", "s", dtype="int64", grad=False, role="input")
    b.weight("table", 128_000, HIDDEN)
    b.op("embedding", "table ids", "x", "b", "s", HIDDEN)
    graph = b.graph("ids", "x")
    (op,) = graph.ops
    seconds = forward_seconds(op, graph.values, local_sizes(op, BINDING), H100, BF16)
    assert seconds == pytest.approx(2 * TOKENS * HIDDEN * 2 / (3350e9 * 0.85) + 4e-6)
    # its gradient is dense: the whole table is written
    back = backward_seconds(op, graph.values, local_sizes(op, BINDING), H100, BF16)
    assert back > 128_000 * HIDDEN * 2 / (3350e9 * 0.85)


@given(st.sampled_from(BLOCK.ops), st.integers(1, 8))
def test_a_split_loop_is_never_slower(op: Op, pieces: int) -> None:
    """Tiles and alignment aside: a piece of 3 rows may take as long as one of 4."""
    device = H100.model_copy(update={"multiprocessors": None})
    whole = local_sizes(op, BINDING)
    for factor in op.rule.factors:
        split = local_sizes(op, BINDING, {factor: pieces})
        assert split[factor] == -(-whole[factor] // pieces)
        for seconds in (forward_seconds, backward_seconds):
            assert seconds(op, BLOCK.values, split, device, BF16) <= seconds(
                op, BLOCK.values, whole, device, BF16
            )


def test_a_layer_of_llama_3_8b_runs_at_a_believable_part_of_peak() -> None:
    """Llama 3 405B trained at 38-43 % end to end (arXiv:2407.21783); one layer alone, at more."""
    block = llama_block(4096, 32, 8, 128, 14336)
    seconds = flops = 0.0
    for op in block.ops:
        sizes = local_sizes(op, {"b": 1, "s": 8192})
        seconds += forward_seconds(op, block.values, sizes, H100, BF16)
        seconds += backward_seconds(op, block.values, sizes, H100, BF16)
        flops += 3 * op_flops(op, sizes) * (op.kind in ("linear", "attention"))
    assert 0.5 < flops / seconds / 989.4e12 < 0.65


# shards -------------------------------------------------------------------------------------------


def test_local_sizes_follow_from_types() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    op = named(BLOCK, "linear:gate")
    (out,) = [f for f in op.rule.factors if f in op.rule.operands[1][0]]
    types = OpTypes(
        (_nd(dp=S(0), tp=R), _nd(dp=R, tp=S(0))),
        (_nd(dp=S(0), tp=S(2)),),
    )
    splits = op_splits(op, types, mesh)
    assert splits == {"n0" if "n0" in op.sizes else "b": 2, out: 2}
    assert local_sizes(op, BINDING, splits)[out] == FFN // 2
    gate = BLOCK.values["gate"]
    assert local_shape(gate, types.results[0], mesh, BINDING) == (1, SEQ, FFN // 2)
    assert local_shape(gate, _nd(dp=P, tp=I), mesh, BINDING) == (BATCH, SEQ, FFN)
    assert local_shape(gate, _nd(dp=S(1), tp=S(1)), mesh, {"b": 1, "s": 30}) == (1, 8, FFN)


def _nd(**types: AxisType) -> NdType:
    return NdType.of(types)


# activations --------------------------------------------------------------------------------------

Q, KV = HEADS * HEAD, KV_HEADS * HEAD
STATISTICS = 4 * TOKENS * (2 + HEADS)
"""1/rms of two norms, and log-sum-exp per head, in float32."""


def kept(recompute: str, precision: Precision = BF16) -> int:
    return block_bytes(BLOCK, WHOLE, ALONE, BINDING, precision, recompute).kept  # type: ignore[arg-type]


def test_without_recomputation_each_tensor_is_kept_once() -> None:
    per_token = (
        HIDDEN  # x, by the norm
        + HIDDEN  # n1, once for three linear layers
        + Q + 2 * KV  # rotated q and k, and v, by attention; not q and k before rotation
        + Q  # o, by attention and by the output projection
        + HIDDEN  # x1
        + HIDDEN  # n2
        + 4 * FFN  # gate (silu), act and up (mul), mlp (down)
    )  # fmt: skip
    assert kept("none") == 2 * TOKENS * per_token + STATISTICS
    assert kept("none", FP32) == 4 * TOKENS * per_token + STATISTICS


def test_selective_keeps_results_of_contractions_and_attention() -> None:
    per_token = HIDDEN + (Q + 2 * KV) + Q + HIDDEN + 2 * FFN + HIDDEN
    #           x        q, k, v        o   o_out    gate, up  down
    assert kept("selective") == 2 * TOKENS * per_token + 4 * TOKENS * HEADS


def test_full_keeps_the_input() -> None:
    assert kept("full") == 2 * TOKENS * HIDDEN


def test_what_runs_again() -> None:
    assert run_again(BLOCK, "none") == ()
    assert run_again(BLOCK, "full") == BLOCK.ops
    again = {op.kind for op in run_again(BLOCK, "selective")}
    assert again == {"rms_norm", "reshape", "permute", "rotary", "add", "silu", "mul"}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_splitting_the_batch_splits_the_activations(recompute: str) -> None:
    on_two = block_bytes(
        BLOCK, WHOLE, Mesh.of(dp=2), {"b": 2 * BATCH, "s": SEQ}, BF16, recompute  # type: ignore[arg-type]
    )  # fmt: skip
    assert on_two == block_bytes(BLOCK, WHOLE, ALONE, BINDING, BF16, recompute)  # type: ignore[arg-type]


def test_recomputation_trades_what_is_kept_for_workspace() -> None:
    none, selective, full = (
        block_bytes(BLOCK, WHOLE, ALONE, BINDING, BF16, mode)
        for mode in ("none", "selective", "full")
    )
    assert full.kept < selective.kept < none.kept
    # While a block runs again it holds what it would have kept, and a gradient of its output.
    assert full.kept + full.workspace >= none.kept + 2 * TOKENS * HIDDEN
    assert none.workspace < full.workspace


def test_a_converted_operand_is_a_copy_of_its_own() -> None:
    """Sequence-split norm, gathered once for two column-parallel layers, partial result reduced."""
    b = Block()
    x = ("b", "s", HIDDEN)
    b.value("x", *x)
    b.weight("norm", HIDDEN)
    b.op("rms_norm", "x norm", "n", *x)
    b.weight("wgate", FFN, HIDDEN)
    b.weight("wup", FFN, HIDDEN)
    b.op("linear", "n wgate", "gate", "b", "s", FFN)
    b.op("linear", "n wup", "up", "b", "s", FFN)
    b.op("mul", "gate up", "mlp", "b", "s", FFN)
    b.weight("wdown", HIDDEN, FFN)
    b.op("linear", "mlp wdown", "down", *x)
    b.op("add", "x down", "y", *x)
    graph = b.graph("x", "y")
    seq, col = _nd(tp=S(1)), _nd(tp=S(2))
    linear = OpTypes((_nd(tp=R), _nd(tp=S(0))), (col,))
    types = Annotation(
        inputs=(seq,),
        parameters=(_nd(tp=R), _nd(tp=S(0)), _nd(tp=S(0)), _nd(tp=S(1))),
        ops={
            "rms_norm:n": OpTypes((seq, _nd(tp=R)), (seq,)),
            "linear:gate": linear,
            "linear:up": linear,
            "mul:mlp": OpTypes((col, col), (col,)),
            "linear:down": OpTypes((col, _nd(tp=S(1))), (_nd(tp=P),)),
            "add:y": OpTypes((seq, seq), (seq,)),
        },
        outputs=(seq,),
    )
    tp = 4
    mesh = Mesh.of(tp=tp)
    per_token = HIDDEN / tp + HIDDEN + 3 * FFN / tp  # x split, gathered n, gate, up, mlp
    statistics = 4 * TOKENS // tp
    none = block_bytes(graph, types, mesh, BINDING, BF16)
    assert none.kept == 2 * TOKENS * per_token + statistics
    # The partial result is kept whole, and after its reduction: a quarter of it.
    per_token = HIDDEN / tp + 2 * FFN / tp + HIDDEN + HIDDEN / tp
    selective = block_bytes(graph, types, mesh, BINDING, BF16, "selective")
    assert selective.kept == 2 * TOKENS * per_token


def head(precision_cast: bool) -> Graph:
    b = Block()
    vocab = 1000
    b.value("x", "b", "s", HIDDEN)
    b.value("labels", "b", "s", dtype="int64", grad=False, role="input")
    b.weight("w", vocab, HIDDEN)
    logits = b.op("linear", "x w", "logits", "b", "s", vocab)
    if precision_cast:
        logits = b.op("cast", "logits", "wide", "b", "s", vocab, dtype="wide", to="wide")
    b.value("loss", dtype="wide")
    b.value("count", dtype="wide", grad=False)
    b.ops.append(RawOp("ce", "cross_entropy", (logits, "labels"), ("loss", "count")))
    return b.graph("x labels", "loss count")


@pytest.mark.parametrize("precision_cast", [False, True])
def test_logits_are_kept_in_float32(precision_cast: bool) -> None:
    graph = head(precision_cast)
    block = block_bytes(graph, data_parallel_types(graph), ALONE, BINDING, BF16)
    log_probabilities, hidden, log_sum_exp = 4 * TOKENS * 1000, 2 * TOKENS * HIDDEN, 4 * TOKENS
    assert block.kept == log_probabilities + hidden + log_sum_exp
    # Two gradients of that size beside it: of the log-probabilities and of the float32 logits.
    assert 2 * log_probabilities <= block.workspace <= 2.6 * log_probabilities


def test_a_chain_by_hand() -> None:
    """x → linear a → relu r → linear y, 8 bytes per element: every moment is written out."""
    b = Block()
    for name in ("w1", "w2"):
        b.weight(name, 10, 10)
    b.value("x", "b", 10)
    b.op("linear", "x w1", "a", "b", 10)
    b.op("relu", "a", "r", "b", 10)
    b.op("linear", "r w2", "y", "b", 10)
    graph = b.graph("x", "y")
    one = 8 * 10 * BATCH
    fp64 = Precision.preset("fp64")
    block = block_bytes(graph, data_parallel_types(graph), ALONE, {"b": BATCH}, fp64)
    assert block.kept == 2 * one  # x and r; relu keeps its result
    # Forward at relu: x, a, r. Backward of the second layer: x, r, dy, dr.
    assert block.workspace == 2 * one
    full = block_bytes(graph, data_parallel_types(graph), ALONE, {"b": BATCH}, fp64, "full")
    assert full == BlockBytes(kept=one, workspace=3 * one)


# state and stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [(0, 2 + 4 + 12), (1, 2 + 4 + 12 / 8), (2, 2 + (4 + 12) / 8), (3, 16 / 8)],
)
def test_state_by_zero_stage(stage: int, bytes_per_parameter: float) -> None:
    """ZeRO's table, with gradients accumulated in float32; stage 3 gathers its compute copy."""
    assert state_bytes(8000, BF16, stage, shards=8).total == 8000 * bytes_per_parameter


def test_state_of_other_precisions() -> None:
    assert state_bytes(100, FP32, 0, 1).total == 100 * 16
    assert state_bytes(100, FP32, 3, 4).total == 25 * 16
    assert state_bytes(100, Precision.preset("fp64"), 0, 1).total == 100 * 32
    assert state_bytes(101, FP32, 3, 4).total == 26 * 16  # the fullest rank


def test_frozen_parameters_have_no_state() -> None:
    frozen = state_bytes(1000, BF16, 0, 1, trainable=100)
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (2000, 400, 1200)
    assert state_bytes(1000, BF16, 3, 10, trainable=100).weights == 180


@given(st.integers(0, 10**9), st.integers(1, 1024), st.sampled_from(["bf16", "fp32", "fp64"]))
def test_a_higher_zero_stage_never_stores_more(elements: int, shards: int, name: str) -> None:
    totals = [state_bytes(elements, Precision.preset(name), z, shards).total for z in range(4)]
    assert totals == sorted(totals, reverse=True)


def test_gather_buffers() -> None:
    assert gather_bytes(100, BF16, 3, 8) == 100 * (2 + 2 + 4)
    assert gather_bytes(100, BF16, 2, 8) == 100 * 4
    assert gather_bytes(100, BF16, 1, 8) == gather_bytes(100, BF16, 3, 1) == 0


def test_the_first_stage_holds_most_microbatches() -> None:
    assert [in_flight_microbatches(4, s, 16) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight_microbatches(4, s, 2) for s in range(4)] == [2, 2, 2, 1]


def test_a_stage_adds_up() -> None:
    state = state_bytes(100, BF16, 0, 1)
    blocks = [BlockBytes(1000, 50), BlockBytes(2000, 500)]
    stage = stage_bytes(state, blocks, in_flight=3, gather=7)
    assert stage.to_json() == {
        "weights": 200,
        "gradients": 400,
        "optimizer": 1200,
        "activations": 9000,
        "workspace": 507,
    }
    assert stage.total == sum(stage.to_json().values())


def test_bad_stages() -> None:
    with pytest.raises(InvalidInput, match="zero_stage is 5"):
        state_bytes(1, BF16, 5, 1)
    with pytest.raises(InvalidInput, match="over 0 ranks"):
        state_bytes(1, BF16, 1, 0)
    with pytest.raises(InvalidInput, match="stage 4 of 4"):
        in_flight_microbatches(4, 4, 1)
