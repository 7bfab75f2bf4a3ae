"""Memory of blocks and stages, against figures worked out by hand and laws."""

from __future__ import annotations

import pytest
from block_cases import (
    ALONE,
    BATCH,
    BF16,
    BINDING,
    BLOCK,
    FFN,
    FP32,
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SEQ,
    TOKENS,
    WHOLE,
    Block,
    nd,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import (
    BlockBytes,
    Precision,
    Runtime,
    block_bytes,
    gather_bytes,
    in_flight_microbatches,
    run_again,
    stage_bytes,
    state_bytes,
)
from shardwright.costmodel.memory import flat_buffer_bytes
from shardwright.ir import P, R, S
from shardwright.ir.errors import InvalidInput
from shardwright.ir.from_dims import Experts, TransformerDims, expert_binding, transformer
from shardwright.ir.graph import Graph
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Annotation, OpTypes, Recompute, data_parallel_types
from shardwright.ir.refine import RawOp

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


def split_mlp() -> tuple[Graph, Annotation, Mesh, int]:
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
    seq, col = nd(tp=S(1)), nd(tp=S(2))
    linear = OpTypes((nd(tp=R), nd(tp=S(0))), (col,))
    types = Annotation(
        inputs=(seq,),
        parameters=(nd(tp=R), nd(tp=S(0)), nd(tp=S(0)), nd(tp=S(1))),
        ops={
            "rms_norm:n": OpTypes((seq, nd(tp=R)), (seq,)),
            "linear:gate": linear,
            "linear:up": linear,
            "mul:mlp": OpTypes((col, col), (col,)),
            "linear:down": OpTypes((col, nd(tp=S(1))), (nd(tp=P),)),
            "add:y": OpTypes((seq, seq), (seq,)),
        },
        outputs=(seq,),
    )
    return graph, types, Mesh.of(tp=4), 4


def test_a_converted_operand_is_a_copy_of_its_own() -> None:
    graph, types, mesh, tp = split_mlp()
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
    assert full == BlockBytes(kept=one, workspace=3 * one, output=one)


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
    stage = stage_bytes(state, blocks, in_flight=3, buffers=7, outputs=10, reserve=5)
    assert stage.to_json() == {
        "weights": 200,
        "gradients": 400,
        "optimizer": 1200,
        "activations": 9030,
        "logits": 0,
        "workspace": 500,
        "buffers": 7,
    }
    assert stage.total == sum(stage.to_json().values())  # the reserve is beside it
    assert stage.reserve == 5


def test_bad_stages() -> None:
    with pytest.raises(InvalidInput, match="zero_stage is 5"):
        state_bytes(1, BF16, 5, 1)
    with pytest.raises(InvalidInput, match="over 0 ranks"):
        state_bytes(1, BF16, 1, 0)
    with pytest.raises(InvalidInput, match="stage 4 of 4"):
        in_flight_microbatches(4, 4, 1)


# frameworks ---------------------------------------------------------------------------------------

RUNTIMES = [Runtime.preset(name) for name in Runtime.preset_names()]
GRAPHS = {"layer": BLOCK, "head": head(True), "narrow head": head(False)}
MODES = ("none", "selective", "full")


@given(
    st.sampled_from(RUNTIMES), st.sampled_from(sorted(GRAPHS)), st.sampled_from(MODES),
    st.integers(1, 9), st.integers(1, 4), st.sampled_from(["bf16", "fp32", "fp64"]),
)  # fmt: skip
def test_more_sequences_never_take_less(
    runtime: Runtime, name: str, mode: Recompute, batch: int, more: int, precision: str
) -> None:
    graph = GRAPHS[name]
    types, kind = data_parallel_types(graph), Precision.preset(precision)
    less, all_of = (
        block_bytes(graph, types, ALONE, {"b": b, "s": SEQ}, kind, mode, runtime)
        for b in (batch, batch + more)
    )
    assert 0 <= less.kept <= all_of.kept
    assert less.workspace >= 0
    assert less.kept + less.workspace <= all_of.kept + all_of.workspace
    assert 0 <= less.logits <= less.kept


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_recomputing_more_keeps_less(runtime: Runtime) -> None:
    none, selective, full = (
        block_bytes(BLOCK, WHOLE, ALONE, BINDING, BF16, mode, runtime).kept for mode in MODES
    )
    assert full < selective <= none


def with_fields(**changes: object) -> Runtime:
    return Runtime.preset("torch", **changes)


def test_a_fused_chain_keeps_what_goes_into_it() -> None:
    """SwiGLU in one kernel: gate and up are kept, the activated gate is made again."""
    fused = block_bytes(
        BLOCK, WHOLE, ALONE, BINDING, BF16, "none", with_fields(fused_pointwise=True)
    )
    assert kept("none") - fused.kept == 2 * TOKENS * FFN


def test_a_gathered_operand_is_gathered_again() -> None:
    graph, types, mesh, tp = split_mlp()
    plain, again = (
        block_bytes(graph, types, mesh, BINDING, BF16, "none", with_fields(gathers_again=flag))
        for flag in (False, True)
    )
    whole = 2 * TOKENS * HIDDEN
    assert plain.kept - again.kept == whole - whole // tp
    assert again.kept + again.workspace >= again.kept + whole


def test_alternate_contractions() -> None:
    """q, v, gate and down of seven products, from the first every second; and the attention."""
    found = block_bytes(
        BLOCK, WHOLE, ALONE, BINDING, BF16, "selective",
        with_fields(selective="alternate-contractions"),
    )  # fmt: skip
    per_token = HIDDEN + (Q + KV) + Q + FFN + HIDDEN
    assert found.kept == 2 * TOKENS * per_token + 4 * TOKENS * HEADS


@pytest.mark.parametrize("cast", [False, True])
def test_what_losses_keep_of_logits(cast: bool) -> None:
    """1,000 words: float32 where probabilities are kept, else 2 bytes; and what comes on top."""
    graph = head(cast)
    types = data_parallel_types(graph)
    found = {
        how: block_bytes(graph, types, ALONE, BINDING, BF16, "none", with_fields(cross_entropy=how))
        for how in ("log-probabilities", "probabilities", "logits", "in-place")
    }
    logits = TOKENS * 1000
    assert {how: block.logits // logits for how, block in found.items()} == {
        "log-probabilities": 4, "probabilities": 4, "logits": 2, "in-place": 2,
    }  # fmt: skip
    rest = {block.kept - block.logits for block in found.values()}
    assert rest == {2 * TOKENS * HIDDEN + 4 * TOKENS}
    peaks = [block.kept + block.workspace for block in found.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert found["in-place"].workspace < 2 * logits <= found["logits"].workspace


def test_gradients_of_parameters_before_they_are_added() -> None:
    b = Block()
    b.value("ids", "b", "s", dtype="int64", grad=False, role="input")
    b.weight("table", 500_000, HIDDEN)
    b.op("embedding", "table ids", "x", "b", "s", HIDDEN)
    b.weight("w", HIDDEN, HIDDEN)
    b.op("linear", "x w", "y", "b", "s", HIDDEN)
    graph = b.graph("ids", "y")

    def workspace(**fields: object) -> int:
        types = data_parallel_types(graph)
        return block_bytes(
            graph, types, ALONE, BINDING, BF16, "none", with_fields(**fields)
        ).workspace

    table, activation = 2 * 500_000 * HIDDEN, 2 * TOKENS * HIDDEN
    assert table <= workspace(transient_gradients=True) <= table + 2 * activation
    fused = workspace(transient_gradients=True, fused_accumulation=True)
    assert fused == workspace(transient_gradients=True)  # of lookups, always
    assert workspace() <= 2 * activation


def test_flat_buffers_of_deepspeed() -> None:
    """Bytes per parameter. BF16_Optimizer: a microbatch's gradients, a gathered copy of weights;
    FP16 with ZeRO 1: of a shard 2 + 4, and a bucket; without ZeRO gradients in float32, twice."""
    n, shards = 8 * 10**9, 8
    assert flat_buffer_bytes(n, BF16, 4, 1, shards) == n * (2 + 2)
    assert flat_buffer_bytes(n, BF16, 4, 1, 1) == n * 2
    assert flat_buffer_bytes(n, BF16, 2, 1, shards) == n // shards * (2 + 4) + 500_000_000 * 2
    assert flat_buffer_bytes(n, BF16, 2, 0, shards) == n * 8


# laws of stages -----------------------------------------------------------------------------------


@given(
    st.integers(1, 10**6), st.integers(1, 512), st.sampled_from([1, 2, 3]),
    st.sampled_from(["bf16", "fp32", "fp64"]), st.sampled_from([None, 2, 4]),
)  # fmt: skip
def test_shards_divide_states_exactly(
    each: int, shards: int, stage: int, name: str, gradient_bytes: int | None
) -> None:
    precision = Precision.preset(name)
    whole = state_bytes(each * shards, precision, 0, 1, gradient_bytes=gradient_bytes)
    part = state_bytes(each * shards, precision, stage, shards, gradient_bytes=gradient_bytes)
    assert part.optimizer * shards == whole.optimizer
    assert part.gradients * (shards if stage >= 2 else 1) == whole.gradients
    if stage == 3 and precision.master_bytes:
        assert part.weights == 0  # gathered, not stored
    else:
        assert part.weights * (shards if stage == 3 else 1) == whole.weights


calls = st.lists(
    st.builds(BlockBytes, st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=8
)


@given(calls, st.integers(1, 6))
def test_the_peak_of_a_stage_is_that_of_its_backward_pass(
    blocks: list[BlockBytes], in_flight: int
) -> None:
    """Walked by hand: the last microbatch is freed block by block, from the last."""
    alive = in_flight * sum(block.kept for block in blocks)
    peak = alive
    for block in reversed(blocks):
        peak = max(peak, alive + block.workspace)
        alive -= block.kept
    stage = stage_bytes(state_bytes(0, BF16, 0, 1), blocks, in_flight)
    assert stage.total == peak
    assert min(stage.to_json().values()) >= 0


def test_slots_of_experts_are_shared_out_by_tensor_ranks() -> None:
    """On their own mesh experts hold as many slots as without it, but for what tensor ranks share
    out; the router and the rest of the layer are as their types say."""
    experts = Experts(count=8, top_k=2, ffn=96)
    dims = TransformerDims(layers=1, hidden=64, heads=4, ffn=1, vocab=64, experts=experts)
    graph = transformer(dims).blocks["ExpertLayer"]
    binding = expert_binding(dims, {"b": 2, "s": 32})

    def kept(shards: int | None) -> int:
        return block_bytes(
            graph, data_parallel_types(graph), ALONE, binding, BF16, "none", slot_shards=shards
        ).kept

    assert kept(None) == kept(1)
    # a row: what goes in, gate with up, gate activated, their product, what comes out
    row, rows = 64 + 2 * 96 + 96 + 96 + 64, 2 * 32 * 2
    assert kept(1) - kept(2) == 2 * rows * row // 2
