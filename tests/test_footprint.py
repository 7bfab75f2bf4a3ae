"""Bytes of pipeline ranks, against measured runs and schedules; and moving state off a device."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright import Cluster, InvalidInput, Workload
from shardwright.costmodel import Device, Precision, Runtime, state_bytes
from shardwright.costmodel.offload import offload_activations, offload_optimizer, offload_parameters
from shardwright.ir.from_dims import Experts, TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.ir.plan import ScheduleName
from shardwright.ir.schedule_rows import schedule_table
from shardwright.planner.candidates import Candidate
from shardwright.planner.fix import Fix
from shardwright.planner.footprint import in_flight
from shardwright.planner.predict import Prediction, predict
from shardwright.planner.request import Request

BF16 = Precision.preset("bf16")
MIB = 2**20


@lru_cache(maxsize=4)
def model_of(dims: TransformerDims) -> Model:
    return transformer(dims)


def predicted(dims: TransformerDims, cluster: Cluster, runtime: str, **fix: object) -> Prediction:
    batch = int(fix.pop("batch", 32))  # type: ignore[call-overload]
    seq = int(fix.pop("seq", 128))  # type: ignore[call-overload]
    request = Request(
        model_of(dims), cluster, Workload(batch, seq), Fix.parse(fix), Runtime.preset(runtime)
    )
    return predict(request)


SMALL = TransformerDims(
    layers=8, hidden=64, heads=4, ffn=96, vocab=512, gated=True,
    norm="rms_norm", activation="silu", positions="rotary",
)  # fmt: skip
MIXTURE = TransformerDims(
    layers=4, hidden=64, heads=4, ffn=96, vocab=512, gated=True, norm="rms_norm",
    activation="silu", positions="rotary", experts=Experts(count=8, top_k=2, ffn=48),
)  # fmt: skip
EIGHT = Cluster.preset("b200", 1, 8)


def test_megatron_core_on_b200_as_measured() -> None:
    """Llama-3-70B with 12 layers, pp=2 dp=4, Megatron-LM 0.14 with Transformer Engine 2.11:
    max_memory_allocated of the ranks of either stage (SimuMax, docs/b200, release 1.2)."""
    dims = TransformerDims(
        layers=12, hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=128256, gated=True,
        norm="rms_norm", activation="silu", positions="rotary",
    )  # fmt: skip
    found = predicted(
        dims, EIGHT, "megatron-core", pp=2, dp=4, zero=1, micro_batch=1, batch=16, seq=4096
    )
    first, last = (stage.total / MIB for stage in found.memory)
    assert first == pytest.approx(68146, rel=0.01)
    assert last == pytest.approx(64479, rel=0.02)


@pytest.mark.parametrize("runtime", Runtime.preset_names())
def test_kinds_add_up_and_none_is_negative(runtime: str) -> None:
    found = predicted(SMALL, EIGHT, runtime, pp=2, vpp=2, dp=4, zero=2, micro_batch=2)
    for stage, total in zip(found.memory, found.memory_bytes, strict=True):
        assert min(stage.to_json().values()) >= 0
        assert sum(stage.to_json().values()) == stage.total == total
        assert stage.reserve >= EIGHT.device.reserve_bytes


@given(st.sampled_from([1, 2, 4]), st.sampled_from(["torch", "megatron-core", "fsdp"]))
def test_more_sequences_in_a_microbatch_take_no_less(micro_batch: int, runtime: str) -> None:
    less, more = (
        predicted(SMALL, EIGHT, runtime, dp=8, micro_batch=n, batch=64).memory_bytes[0]
        for n in (micro_batch, 2 * micro_batch)
    )
    assert less <= more


def test_zero_takes_state_away_stage_by_stage() -> None:
    states = [predicted(SMALL, EIGHT, "torch", dp=8, zero=zero).memory[0] for zero in (0, 1, 2, 3)]
    totals = [stage.weights + stage.gradients + stage.optimizer for stage in states]
    assert totals == sorted(totals, reverse=True)
    assert states[1].optimizer * 8 == states[0].optimizer
    assert states[2].gradients * 8 == states[0].gradients


def test_experts_are_divided_and_their_slots_are_not() -> None:
    """ep ranks have a part of the experts each, and the tokens of all for these."""
    one, four = (predicted(MIXTURE, EIGHT, "torch", dp=8, ep=ep).memory[0] for ep in (1, 4))
    experts = 4 * 8 * 3 * 64 * 48
    assert one.weights - four.weights == 2 * (experts - experts // 4)
    assert one.activations == four.activations


def test_gradients_are_counted_as_a_framework_accumulates_them() -> None:
    """DeepSpeed in bf16: 2 + 4 bytes and its buffers; Megatron-Core 4; a shard has its own part."""
    plain = predicted(SMALL, EIGHT, "megatron-deepspeed", pp=2, dp=4, zero=1).memory[1]
    assert plain.gradients == plain.weights  # as it is: 2 bytes
    core = predicted(SMALL, EIGHT, "megatron-core", pp=2, dp=4, zero=1).memory[1]
    assert core.gradients == 2 * core.weights
    assert plain.buffers > 0


@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_microbatches_in_flight_are_the_schedules(vpp: int) -> None:
    pp, m = 4, 12
    name: ScheduleName = "1f1b" if vpp == 1 else "interleaved"
    table = schedule_table(name, pp, m, vpp)
    candidate = Candidate(pp, 1, 1, 0, 1, m, name, vpp)
    for rank in range(pp):
        whole, _ = table.held(rank)
        assert in_flight(candidate, rank) == whole.sum(axis=1).max() / vpp


@pytest.mark.parametrize("pp", range(2, 13))
def test_zero_bubble_schedules_hold_what_their_tables_do(pp: int) -> None:
    for m in (pp, pp + 1, 2 * pp - 1, 2 * pp, 2 * pp + 1, 3 * pp, 4 * pp + 3):
        schedules: tuple[tuple[ScheduleName, int], ...] = (("zb-h1", 1), ("zb-v", 2))
        for name, vpp in schedules:
            table = schedule_table(name, pp, m, vpp)
            candidate = Candidate(pp, 1, 1, 0, 1, m, name, vpp)
            for rank in range(pp):
                held = sum(table.held(rank)).sum(axis=1).max() / vpp
                assert in_flight(candidate, rank) == held, (name, m, rank)


def test_other_schedules_hold_what_they_run() -> None:
    gpipe = Candidate(4, 1, 1, 0, 1, 12, "gpipe")
    assert [in_flight(gpipe, rank) for rank in range(4)] == [12] * 4
    first = in_flight(Candidate(4, 1, 1, 0, 1, 12), 0)
    delayed = Candidate(4, 1, 1, 0, 1, 12, "zb-h1")
    assert max(in_flight(delayed, rank) for rank in range(4)) == first  # arXiv:2401.10241: as 1F1B
    folded = [in_flight(Candidate(4, 1, 1, 0, 1, 12, "zb-v", 2), rank) for rank in range(4)]
    assert max(folded) - min(folded) <= 0.5  # balanced over ranks
    assert max(folded) <= first + 0.5


# tiers --------------------------------------------------------------------------------------------

TIERED = Device.preset("h100-sxm").model_copy(
    update={
        "host_memory_bytes": 10**12, "host_link_bytes_per_s": 50e9,
        "nvme_bytes": 4 * 10**12, "nvme_bytes_per_s": 6e9,
    }
)  # fmt: skip


def test_optimizer_state_in_host_memory_by_hand() -> None:
    """10^9 parameters: 12 GB of the device; 4 GB of gradients down, 2 GB of weights up."""
    n = 10**9
    found = offload_optimizer(TIERED, state_bytes(n, BF16, 1, 1), BF16, n)
    assert found.saved_bytes == found.tier_bytes == 12 * n
    assert (found.to_device_s, found.from_device_s) == (2 * n / 50e9, 4 * n / 50e9)
    disk = offload_optimizer(TIERED, state_bytes(n, BF16, 1, 1), BF16, n, "nvme")
    assert disk.seconds == 12 * n / 6e9


def test_parameters_and_activations_in_a_tier_by_hand() -> None:
    weights = offload_parameters(TIERED, 10**10, 10**9, passes=3)
    assert weights.saved_bytes == 8 * 10**9
    assert (weights.to_device_s, weights.from_device_s) == (3 * 10**10 / 50e9, 0)
    kept = offload_activations(TIERED, 10**9, 10**8, in_flight=4, microbatches=16, tier="nvme")
    assert (kept.saved_bytes, kept.tier_bytes) == (4 * 10**9 - 2 * 10**8, 4 * 10**9)
    assert kept.seconds == 16 * 10**9 / 6e9  # the slower of link and disk


@given(
    st.integers(0, 10**11), st.integers(0, 10**10), st.integers(1, 8), st.integers(0, 64),
    st.sampled_from(["host", "nvme"]),
)  # fmt: skip
def test_moving_more_saves_and_costs_no_less(
    size: int, largest: int, in_flight: int, more: int, tier: str
) -> None:
    for less, larger in (
        (
            offload_parameters(TIERED, size, largest, 2, tier),  # type: ignore[arg-type]
            offload_parameters(TIERED, size + more, largest, 2, tier),  # type: ignore[arg-type]
        ),
        (
            offload_activations(TIERED, size, largest, in_flight, 8, tier),  # type: ignore[arg-type]
            offload_activations(TIERED, size + more, largest, in_flight, 8, tier),  # type: ignore[arg-type]
        ),
    ):
        assert 0 <= less.saved_bytes <= larger.saved_bytes <= larger.tier_bytes
        assert 0 <= less.seconds <= larger.seconds


def test_a_tier_that_is_not_there_or_too_small() -> None:
    tiers = {"host_link_bytes_per_s": None, "host_memory_bytes": None}
    bare = Device.preset("h100-sxm").model_copy(update=tiers)
    with pytest.raises(InvalidInput, match="h100-sxm: host_link_bytes_per_s is not given"):
        offload_parameters(bare, 1, 1, 2)
    with pytest.raises(InvalidInput, match="host_memory_bytes is 1000000000000, but 2000000000000"):
        offload_parameters(TIERED, 2 * 10**12, 1, 2)
    with pytest.raises(InvalidInput, match="host_link_bytes_per_s"):
        offload_activations(bare, 1, 1, 1, 1)
