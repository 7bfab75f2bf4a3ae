"""Compute of a Llama-like block, and what ops keep, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from block_cases import (
    BATCH,
    BF16,
    BINDING,
    BLOCK,
    FFN,
    H100,
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SEQ,
    TOKENS,
    Block,
    llama_block,
    named,
    nd,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel import (
    Kernel,
    backward_seconds,
    forward_seconds,
    kernel_seconds,
    local_shape,
    local_sizes,
    op_flops,
    op_splits,
    saves,
)
from shardwright.costmodel.compute import product_efficiency
from shardwright.ir import I, P, R, S
from shardwright.ir.graph import Op
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import OpTypes

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
        (nd(dp=S(0), tp=R), nd(dp=R, tp=S(0))),
        (nd(dp=S(0), tp=S(2)),),
    )
    splits = op_splits(op, types, mesh)
    assert splits == {"n0" if "n0" in op.sizes else "b": 2, out: 2}
    assert local_sizes(op, BINDING, splits)[out] == FFN // 2
    gate = BLOCK.values["gate"]
    assert local_shape(gate, types.results[0], mesh, BINDING) == (1, SEQ, FFN // 2)
    assert local_shape(gate, nd(dp=P, tp=I), mesh, BINDING) == (BATCH, SEQ, FFN)
    assert local_shape(gate, nd(dp=S(1), tp=S(1)), mesh, {"b": 1, "s": 30}) == (1, 8, FFN)
