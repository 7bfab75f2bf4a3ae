"""predict: the engine of plan on a given configuration."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel.cluster import Degraded, Island, Pair
from shardwright.ir import InvalidInput
from shardwright.ir.from_dims import Experts, TransformerDims, transformer
from shardwright.ir.graph import Model

WORK = sw.Workload(global_batch=64, seq_len=2048)
NODES = "a100-80g:2"


def llama(layers: int = 8, **changes: object) -> Model:
    sizes: dict[str, object] = {
        "layers": layers, "hidden": 2048, "heads": 16, "kv_heads": 8, "ffn": 5632, "vocab": 32000,
    }  # fmt: skip
    return transformer(TransformerDims(**(sizes | changes)))  # type: ignore[arg-type]


LLAMA = llama()
MIXTURE = llama(experts=Experts(count=8, top_k=2, ffn=2816))


def test_a_planned_configuration_predicted_again_is_the_plan() -> None:
    """What plan says of its choice, predict says of it too, where the layout is the same."""
    plan = sw.plan(LLAMA, NODES, WORK, fix={"tp": 1, "recompute": "none"})
    strategy = plan.strategy
    fix = {
        "pp": strategy.pp, "dp": strategy.dp, "zero": strategy.zero, "recompute": "none",
        "micro_batch": strategy.micro_batch, "stages": list(strategy.layers),
    }  # fmt: skip
    again = sw.predict(LLAMA, NODES, WORK, fix)
    assert again.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert again.memory_bytes == plan.predicted.memory_bytes


@st.composite
def fixes(draw: st.DrawFn) -> dict[str, object]:
    """Configurations on 16 devices, most of the space that predict covers."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    pp = draw(st.sampled_from([p for p in (1, 2, 4) if 16 % (p * tp) == 0]))
    cp = draw(st.sampled_from([c for c in (1, 2) if 16 % (pp * tp * c) == 0]))
    vpp = draw(st.sampled_from([1, 2] if pp > 1 else [1]))
    fix: dict[str, object] = {
        "tp": tp, "pp": pp, "cp": cp, "vpp": vpp,
        "sp": draw(st.integers(0, 1)) if tp > 1 else 0,
        "zero": draw(st.integers(0, 3)),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
    }  # fmt: skip
    if vpp == 1 and pp > 1:
        fix["schedule"] = draw(st.sampled_from(["1f1b", "gpipe", "zb-h1"]))
    return fix


@settings(max_examples=25, deadline=None)
@given(fixes(), st.sampled_from(sw.Runtime.preset_names()), st.sampled_from([LLAMA, MIXTURE]))
def test_parts_add_up_and_nothing_beats_the_peak(
    fix: dict[str, object], runtime: str, model: Model
) -> None:
    found = sw.predict(model, NODES, WORK, fix, runtime=runtime)
    assert sum(found.time.values()) == pytest.approx(found.step_seconds)
    assert all(seconds >= 0 for seconds in found.time.values())
    assert 0 < found.mfu <= 1
    assert 0 < found.hfu <= 1
    assert found.tokens_per_second == pytest.approx(64 * 2048 / found.step_seconds)
    assert len(found.memory) == fix["pp"]
    assert all(value >= 0 for stage in found.memory for value in stage.to_json().values())
    assert sum(found.strategy.layers) == 8


def test_recomputing_costs_time_and_frees_memory() -> None:
    by_mode = {
        mode: sw.predict(LLAMA, NODES, WORK, {"tp": 4, "recompute": mode, "micro_batch": 4})
        for mode in ("none", "selective", "full")
    }
    times = [by_mode[mode].step_seconds for mode in ("none", "selective", "full")]
    memory = [max(by_mode[mode].memory_bytes) for mode in ("none", "selective", "full")]
    assert times == sorted(times)
    assert memory == sorted(memory, reverse=True)
    assert by_mode["none"].mfu / by_mode["none"].hfu > by_mode["full"].mfu / by_mode["full"].hfu


def test_zero_over_a_node_gathers_over_its_fast_links() -> None:
    """What hierarchical ZeRO is for: the parameters of a step come from neighbours."""
    runtime = sw.Runtime.preset("internevo")
    wide = sw.predict(LLAMA, "a100-80g:8", WORK, {"zero": 1}, runtime=runtime)
    near = sw.predict(LLAMA, "a100-80g:8", WORK, {"zero": 1, "zero_group": 8}, runtime=runtime)
    assert near.time["data_parallel"] < wide.time["data_parallel"]
    assert max(near.memory_bytes) > max(wide.memory_bytes)


def test_interleaving_shrinks_the_bubble() -> None:
    plain = sw.predict(LLAMA, NODES, WORK, {"pp": 4, "dp": 4, "micro_batch": 2})
    turns = sw.predict(LLAMA, NODES, WORK, {"pp": 4, "dp": 4, "micro_batch": 2, "vpp": 2})
    assert turns.strategy.schedule == "interleaved"
    assert turns.time["pipeline_bubble"] < 0.75 * plain.time["pipeline_bubble"]


def test_experts_are_exchanged_and_shared_out() -> None:
    alone = sw.predict(MIXTURE, NODES, WORK, {})
    spread = sw.predict(MIXTURE, NODES, WORK, {"ep": 8})
    assert alone.time.get("expert_parallel", 0.0) == 0
    assert spread.time["expert_parallel"] > 0
    assert spread.memory[0].weights < alone.memory[0].weights
    assert spread.time["matmul"] == pytest.approx(alone.time["matmul"], rel=0.3)


def test_the_json_has_the_fields_that_scripts_rely_on() -> None:
    found = json.loads(json.dumps(sw.predict(LLAMA, NODES, WORK, {"tp": 2, "pp": 2}).to_json()))
    keys = {"pp", "vpp", "dp", "cp", "tp", "ep", "zero", "micro_batch", "schedule", "recompute"}
    assert keys <= found["strategy"].keys()
    assert {"step_seconds", "tokens_per_second", "mfu", "memory_bytes", "memory_limit_bytes"} <= (
        found["predicted"].keys()
    )
    assert found["strategy"]["dp"] == 4
    weight = found["parameters"]["model.layers.7.mlp.down_proj.weight"]
    assert weight["stages"] == [1]
    assert weight["sbp"]["tp"] == "S(1)"


def test_a_measured_device_decides_instead_of_its_class() -> None:
    device = sw.Device.preset("a100-80g")
    curve = {"kind": "matmul", "dtype": "bfloat16", "work": [1e9], "rate_per_s": [100e12]}
    slow = sw.Device.model_validate(device.model_dump() | {"curves": [curve]})
    cluster = sw.Cluster.parse(NODES)
    before = sw.predict(LLAMA, cluster, WORK, {}).time["matmul"]
    after = sw.predict(LLAMA, cluster.with_device(slow), WORK, {}).time["matmul"]
    assert after > 1.5 * before


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        ({"tp": 3}, "tp = 1*1*3 does not divide the cluster's 16 devices"),
        ({"dp": 3}, "= 3, expected the cluster's 16 devices"),
        ({"micro_batch": 7}, "micro_batch = 16*7 does not divide global_batch 64"),
        ({"pp": 16, "vpp": 2, "micro_batch": 1}, "stages, but the model has 8 layers"),
        ({"pp": 2, "stages": "4-5"}, "adds up to 9 layers, the model has 8"),
        ({"zero_group": 2}, "zero_group=2 without ZeRO, expected zero=1, 2 or 3"),
        ({"zero": 1, "zero_group": 3}, "zero_group=3 does not divide dp*cp = 16"),
        ({"ep": 2}, "the model has no experts"),
        ({"zero": 4}, "zero=4, expected 0, 1, 2 or 3"),
        ({"degree": 4}, "unknown key 'degree'"),
    ],
)
def test_a_fix_that_does_not_fit_is_one_line(fix: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        sw.predict(LLAMA, NODES, WORK, fix)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tp", "heads"), [(11, 32), (3, 32), (64, 32), (8, 12)])
def test_a_degree_that_does_not_divide_the_heads_is_refused(tp: int, heads: int) -> None:
    model = llama(heads=heads, hidden=heads * 64, kv_heads=heads // 4)
    with pytest.raises(InvalidInput, match=f"tp={tp} does not divide the model's {heads} atten"):
        sw.predict(model, f"a100-80g:1x{tp}", sw.Workload(tp, 2048), {"tp": tp})


def test_float8_needs_units_for_it() -> None:
    work = sw.Workload(64, 2048, precision="fp8")
    assert sw.predict(llama(), "h100-sxm:1", work, {"tp": 8}).step_seconds > 0
    with pytest.raises(InvalidInput, match="precision fp8: v100 has no float8 units"):
        sw.predict(llama(), "v100:1", work, {"tp": 8})


def test_measured_links_have_their_price() -> None:
    """Slow is a boundary of stages, and a link of a data-parallel ring."""
    plain = sw.Cluster.preset("a100-80g", nodes=4)
    slow = [Pair(nodes=(i, j), bandwidth_fraction=0.1) for i in range(4) for j in range(i)]
    for fix, ends in (
        ({"tp": 8, "pp": 4}, (1, 2)), ({"tp": 8, "zero": 3}, (1, 2)), ({"tp": 8, "pp": 2}, (0, 1)),
    ):  # fmt: skip
        one = plain.with_pairs([Pair(nodes=ends, bandwidth_fraction=0.1)])
        least, between, most = (
            sw.predict(llama(), cluster, WORK, fix).step_seconds
            for cluster in (plain, one, plain.with_pairs(slow))
        )
        assert least < between <= most
    # a bad link that no group uses costs nothing
    aside = plain.with_pairs([Pair(nodes=(0, 3), bandwidth_fraction=0.1)])
    fix = {"tp": 8, "pp": 4}
    assert sw.predict(llama(), aside, WORK, fix).step_seconds == pytest.approx(
        sw.predict(llama(), plain, WORK, fix).step_seconds
    )


def test_only_the_boundary_between_islands_is_slow() -> None:
    ethernet = Pair(islands=("a", "b"), bandwidth_bytes_per_s=3e8)
    islands = (Island(name="a", nodes=2), Island(name="b", nodes=2))
    plain = sw.Cluster.preset("a100-80g", nodes=4)
    joined = plain.model_copy(update={"islands": islands, "pairs": (ethernet,)})
    four, two = (sw.predict(llama(), joined, WORK, {"tp": 8, "pp": pp}) for pp in (4, 2))
    assert 0 < four.time["pipeline_p2p"] < 1.2 * two.time["pipeline_p2p"]


def test_mixed_devices_are_no_slower_than_the_slowest() -> None:
    for slow, fast in (("a100-80g", "mi300x"), ("v100", "a100-80g"), ("h100-sxm", "b200")):
        plain = sw.Cluster.preset(slow, nodes=2).model_copy(update={"curves": ()})
        mixed = plain.model_copy(
            update={"islands": (Island(name="a", nodes=1),
                                Island(name="b", nodes=1, device=sw.Device.preset(fast)))}
        )  # fmt: skip
        alone = sw.predict(llama(), plain, WORK, {"tp": 8, "pp": 2}).step_seconds
        both = sw.predict(llama(), mixed, WORK, {"tp": 8, "pp": 2}).step_seconds
        assert both <= alone * 1.05  # a part may be slower on the faster device


def test_a_degraded_node_is_slower_and_utilisation_says_so() -> None:
    plain = sw.Cluster.preset("b200", nodes=4)
    fractions = (1.0, 0.5, 0.1)
    found = [
        sw.predict(llama(), plain.model_copy(update={"degraded": degraded}), WORK, {"zero": 3})
        for degraded in (
            (),
            *((Degraded(nodes=(1,), bandwidth_fraction=f),) for f in fractions[1:]),
        )
    ]
    assert found[0].step_seconds < found[1].step_seconds < found[2].step_seconds
    halved = Degraded(nodes=(1,), compute_fraction=0.5)
    slow = sw.predict(llama(), plain.model_copy(update={"degraded": (halved,)}), WORK, {"zero": 3})
    assert slow.mfu == pytest.approx(found[0].mfu * found[0].step_seconds / slow.step_seconds)


@pytest.mark.parametrize("mode", ["chunked", "fused", "one-block-late"])
def test_hidden_tensor_communication_is_cheaper_but_not_free(mode: str) -> None:
    """On links on which it shows: eight devices of a node, large products."""
    fix = {"tp": 8, "micro_batch": 4}
    wide = llama(hidden=8192, heads=64, ffn=22016)
    waits = sw.predict(wide, NODES, WORK, fix)
    hides = sw.predict(
        wide, NODES, WORK, fix, runtime=sw.Runtime.preset("torch", tensor_overlap=mode)
    )
    assert 0 < hides.time["tensor_parallel"] < waits.time["tensor_parallel"]
    assert hides.time["matmul"] == waits.time["matmul"]


def test_rare_averaging_of_replicas_is_cheaper() -> None:
    runtime = sw.Runtime.preset("torch", outer_every=10, overlap_gradients=False)
    each = sw.predict(LLAMA, NODES, WORK, {}, runtime=sw.Runtime.preset("torch"))
    rare = sw.predict(LLAMA, NODES, WORK, {}, runtime=runtime)
    assert 0 < rare.time["data_parallel"] < each.time["data_parallel"]


def test_what_was_predicted_before_changes_nothing() -> None:
    """Types are kept between predictions, by all that they depend on."""
    odd, even = sw.Workload(64, 2044), sw.Workload(64, 2048)
    fix = {"tp": 8}
    first = sw.predict(llama(), NODES, even, fix).step_seconds
    model = llama()
    sw.predict(model, NODES, odd, fix)
    assert sw.predict(model, NODES, even, fix).step_seconds == first


def test_tensor_parallel_plans_are_predicted_alike() -> None:
    fix = {"tp": 8, "pp": 1, "zero": 1, "micro_batch": 2, "recompute": "none"}
    plan = sw.plan(LLAMA, NODES, WORK, fix=fix)
    again = sw.predict(LLAMA, NODES, WORK, fix)
    assert again.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)


def test_a_job_goes_at_the_pace_of_its_slowest_devices() -> None:
    uniform = sw.Cluster.parse(NODES)
    kept = uniform.model_dump()
    slow = sw.Cluster.model_validate(kept | {"degraded": [{"nodes": [1], "compute_fraction": 0.5}]})
    mixed = sw.Cluster.model_validate(
        kept
        | {
            "islands": [
                {"name": "new", "nodes": 1},
                {"name": "old", "nodes": 1, "device": "v100"},
            ]
        }
    )
    work = sw.Workload(64, 2048, precision="fp16")
    alone = sw.predict(LLAMA, uniform, work, {})
    assert sw.predict(LLAMA, slow, work, {}).time["matmul"] > 1.8 * alone.time["matmul"]
    both = sw.predict(LLAMA, mixed, work, {})
    assert both.time["matmul"] > 2 * alone.time["matmul"]
    assert both.memory_limit_bytes < alone.memory_limit_bytes
