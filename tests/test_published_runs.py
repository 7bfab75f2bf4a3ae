"""The harness over published runs: rows to setups, baseline, calibration, the command."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright import Cluster, InvalidInput
from shardwright.costmodel.runtime import Runtime
from shardwright.ir.from_dims import TransformerDims, transformer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import published_runs  # noqa: E402
from published.architecture import dims_of  # noqa: E402
from published.baseline import Baseline, executed_flops  # noqa: E402
from published.features import FEATURES  # noqa: E402
from published.predictors import Estimate, least_that_fits  # noqa: E402
from published.prior import Prior  # noqa: E402
from published.rows import REQUIRED, Run, read_runs  # noqa: E402
from published.setup import Recompute, Setup, Skipped, facts, setup_of  # noqa: E402

DATA = published_runs.REFERENCE.parent
TABLES = [DATA / "published_runs.csv", DATA / "published_runs_single_node.csv"]
needs_data = pytest.mark.skipif(
    not all(path.is_file() for path in TABLES), reason="the published tables are not beside here"
)

GPT = {
    "row_id": "r1", "family": "lab", "group": "g", "model": "GPT", "arch": "gpt", "layers": "24",
    "hidden": "1024", "heads": "16", "vocab": "51200", "seq": "2048", "gated_mlp": "0",
    "gpu": "A100-SXM-80GB", "n_gpus": "16", "gpus_per_node": "8", "inter_node_gbytes_per_gpu": "25",
    "framework": "Megatron-LM", "tp": "2", "pp": "2", "dp": "4", "cp": "1", "vpp": "1",
    "zero_stage": "0", "mbs": "2", "gbs": "64", "recompute": "full", "precision": "fp16",
    "attn_impl": "standard", "iter_time_s": "1.5", "config_complete": "1",
}  # fmt: skip


def row(**changes: object) -> Run:
    return Run.model_validate({**GPT, **{key: str(value) for key, value in changes.items()}})


def setup(**changes: object) -> Setup:
    found = setup_of(row(**changes))
    assert isinstance(found, Setup), found
    return found


def skipped(**changes: object) -> str:
    found = setup_of(row(**changes))
    assert isinstance(found, Skipped), found
    return found.reason


def table(path: Path, rows: Sequence[Mapping[str, str]], without: str = "") -> Path:
    columns = [name for name in GPT if name != without]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())
    return path


# Rows


def test_cells_are_read_as_columns_say(tmp_path: Path) -> None:
    rows = [GPT, {**GPT, "row_id": "r2", "n_gpus": "16.0", "iter_time_s": "", "recompute": ""}]
    first, second = read_runs(table(tmp_path / "runs.csv", rows)).rows
    assert (first.n_gpus, first.iter_time_s, first.gated_mlp) == (16, 1.5, False)
    assert (second.n_gpus, second.iter_time_s, second.recompute) == (16, None, "")
    assert first.moe_ffn is None and first.notes == ""
    assert first.microbatches == 8


@pytest.mark.parametrize("column", REQUIRED)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = table(tmp_path / "runs.csv", [GPT], without=column)
    with pytest.raises(InvalidInput, match=rf"runs\.csv: column '{column}' is missing"):
        read_runs(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "many"}, "line 2: layers is 'many'"),
        ({"n_gpus": "0"}, "line 2: n_gpus is '0'"),
        ({"tp": "1.5"}, "line 2: tp is '1.5'"),
        ({"iter_time_s": "-3"}, "line 2: iter_time_s is '-3'"),
        ({"iter_time_s": "nan"}, "line 2: iter_time_s is 'nan'"),
        ({"zero_stage": "4"}, "line 2: zero_stage is '4'"),
        ({"row_id": ""}, "line 2: row_id is ''"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        read_runs(table(tmp_path / "runs.csv", [{**GPT, **changes}]))
    assert "\n" not in str(error.value)


def test_a_bad_row_does_not_lose_the_others(tmp_path: Path) -> None:
    runs = read_runs(table(tmp_path / "runs.csv", [GPT, {**GPT, "row_id": "r2", "gbs": "many"}]))
    assert [run.row_id for run in runs.rows] == [GPT["row_id"]]
    assert "line 3: gbs is 'many'" in runs.refused[0]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(InvalidInput, match="row_id 'r1' is that of line 2 too"):
        read_runs(table(tmp_path / "twice.csv", [GPT, GPT]))
    with pytest.raises(InvalidInput, match="no rows"):
        read_runs(table(tmp_path / "empty.csv", []))
    short = tmp_path / "short.csv"
    short.write_text(",".join(GPT) + "\nr1,lab\n")
    with pytest.raises(InvalidInput, match="line 2: fewer cells"):
        read_runs(short)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00row_id")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_runs(binary)


# Setups


def test_a_row_becomes_a_configuration() -> None:
    found = setup(vpp=3, zero_stage=1, zero_group=2, sp=1)
    assert found.fix == {
        "pp": 2, "dp": 4, "tp": 2, "sp": 1, "zero": 1, "micro_batch": 2, "vpp": 3,
        "schedule": "interleaved", "zero_group": 2,
    }  # fmt: skip
    assert (found.cluster.world_size, found.cluster.nodes) == (16, 2)
    assert found.cluster.levels[-1].bandwidth_bytes_per_s == 25e9
    assert (found.workload.global_batch, found.workload.seq_len) == (64, 2048)
    assert found.runtime.name == "megatron-lm" and found.runtime.attention == "unfused"
    assert found.recompute == ("full",) and found.memory_kind == "device"
    single = setup(n_gpus=4, dp=1, tp=2, gbs=8)
    assert (single.cluster.nodes, single.cluster.devices_per_node) == (1, 4)


@pytest.mark.parametrize(
    ("framework", "runtime"),
    [
        ("Megatron-LM 2.x", "megatron-lm-2"),
        ("Megatron-LM", "megatron-lm"),
        ("Megatron-LM 0.14 + TE 2.11", "megatron-core"),
        ("Megatron-LM +DeepSpeed", "megatron-deepspeed"),
        ("Megatron-DeepSpeed", "megatron-deepspeed"),
        ("NeMo/Megatron-Bridge 26.04", "megatron-core"),
        ("llm-foundry/Composer FSDP", "fsdp"),
        ("torchtitan +compile", "torchtitan"),
    ],
)
def test_frameworks(framework: str, runtime: str) -> None:
    assert setup(framework=framework).runtime.name == runtime


def test_a_fused_kernel_is_the_frameworks_own() -> None:
    for framework in ("InternEvo", "Megatron-LM", "torchtitan"):
        own = setup(framework=framework, attn_impl="").runtime.attention
        fused = setup(framework=framework, attn_impl="flash").runtime.attention
        assert fused == ("flash" if own == "unfused" else own)
        assert setup(framework=framework, attn_impl="standard").runtime.attention == "unfused"


def test_an_older_kernel_is_told_by_its_source() -> None:
    mosaic = dict(framework="llm-foundry/Composer FSDP", attn_impl="flash")
    assert setup(**mosaic).runtime.attention == "flash1"
    assert setup(**mosaic, source="H100 (Large Scale)").runtime.attention == "flash2"


def test_facts_name_what_exists() -> None:
    assert set(facts()["runtimes"].values()) <= set(Runtime.preset_names())
    for fields in facts()["notes"].values():
        assert Runtime.preset("torch", **fields) != Runtime.preset("torch")
    devices = {name for name in facts()["devices"].values() if not name.startswith("tpu")}
    assert devices <= set(Cluster.preset_names())
    assert set(facts()["chips"]) <= {name.partition("-")[0] for name in facts()["devices"]}


def test_notes_say_how_it_was_run() -> None:
    blocking = setup(notes="CUDA_LAUNCH_BLOCKING=1 likely; 02-25").runtime
    assert blocking.synchronous_launches and not setup().runtime.synchronous_launches
    pure, default = (
        setup(framework="llm-foundry", notes=f"MP={mode}; dims").runtime.gradient_bytes
        for mode in ("PURE", "DEFAULT")
    )
    assert (pure, default) == (2, 4)


def test_recipes_and_notes_say_what_overlaps() -> None:
    """NVIDIA's recipes overlap tensor-parallel communication; a note that says otherwise counts."""
    recipe = setup(framework="NeMo/Megatron-Bridge 26.04").runtime
    assert (recipe.name, recipe.tensor_overlap) == ("megatron-core", "chunked")
    off = setup(framework="NeMo 24.07", notes="comm overlap OFF").runtime
    assert off.tensor_overlap == "none" and not off.overlap_gradients
    assert setup(framework="Megatron-LM 0.14 + TE 2.11").runtime.tensor_overlap == "none"
    titan = [
        setup(framework="torchtitan +compile", notes=f"{way}; seq 8192").runtime.tensor_overlap
        for way in ("vanilla TP", "AsyncTP")
    ]
    assert titan == ["none", "chunked"]


def test_a_fabric_that_a_row_says_was_measured_limits_it() -> None:
    """5.06 of 6.25 GB/s on Jean Zay's A100 nodes; other rows keep the class default."""
    nic = {"inter_node_gbytes_per_gpu": 6.25}
    notes = "02-25; measured 4-node all-reduce busbw 5.06 GB/s (experiments/bandwidth)"
    inside = setup(notes=notes, **nic).cluster.levels[-1]
    outside = setup(**nic).cluster.levels[-1]
    assert inside.bandwidth_bytes_per_s * inside.achieved_fraction == pytest.approx(5.06e9)
    assert outside.achieved_fraction > inside.achieved_fraction


def test_stages_are_cut_as_deepspeed_did() -> None:
    """ "78/12=6.5 - so the last stage has 1 block, while the rest have 7"; from the rebalancing on,
    70 layers and two embeddings are six a stage (bigscience, chronicles-prequel.md)."""
    uneven = dict(framework="Megatron-DeepSpeed", layers=78, tp=1, pp=12, dp=1, n_gpus=12, gbs=64)
    uneven |= dict(gpus_per_node=4)
    assert setup(**uneven).fix["stages"] == (7,) * 11 + (1,)
    balanced = setup(**(uneven | dict(layers=70, notes="Rebalancing layers; 02-28"))).fix
    assert balanced["stages"] == (5,) + (6,) * 10 + (5,)
    assert "stages" not in setup(**(uneven | dict(layers=72))).fix
    assert "stages" not in setup(**(uneven | dict(framework="Megatron-LM"))).fix


@given(st.integers(2, 12), st.integers(1, 100), st.booleans())
def test_stages_hold_all_layers_under_the_least_bottleneck(
    pp: int, layers: int, rebalanced: bool
) -> None:
    found = setup(
        framework="Megatron-DeepSpeed", layers=layers, pp=pp, tp=1, dp=1, n_gpus=pp,
        gpus_per_node=1, notes="Rebalancing layers" if rebalanced else "",
    ).fix.get("stages")  # fmt: skip
    if found is not None:
        assert len(found) == pp and sum(found) == layers and min(found) >= 0
        weights = list(found)
        weights[0] += rebalanced
        weights[-1] += rebalanced
        assert max(weights) == ceil((layers + 2 * rebalanced) / pp)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_complete": 0, "missing": "heads"}, "the source is incomplete: heads"),
        ({"arch": "mamba"}, "arch is 'mamba', which is no known family"),
        ({"gpu": "Cerebras"}, "gpu is 'Cerebras'"),
        ({"framework": "home-made"}, "framework is 'home-made'"),
        ({"attn_impl": "magic"}, "attn_impl is 'magic'"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"recompute": "offload"}, "recompute is 'offload'"),
        ({"dp": 8}, "tp*pp*dp*cp = 2*2*8*1 = 32, but n_gpus is 16"),
        ({"gbs": 63}, "mbs*dp = 2*4 does not divide gbs 63"),
        ({"hidden": ""}, "hidden is empty"),
        ({"n_experts": 8}, "top_k or moe_ffn is empty"),
        ({"gpus_per_node": 3}, "gpus_per_node 3 does not divide n_gpus 16"),
    ],
)
def test_what_cannot_be_predicted_says_why(changes: dict[str, object], reason: str) -> None:
    assert reason in skipped(**changes)


def test_an_unsaid_mode_is_the_least_that_fits() -> None:
    unsaid = setup(recompute="unspecified")
    assert unsaid.recompute == ("none", "selective", "full")
    for enough, expected in (("selective", 2.0), ("never", 3.0)):
        tried: list[Recompute] = []

        def predict(
            _: Setup, mode: Recompute, enough: str = enough, tried: list[Recompute] = tried
        ) -> Estimate:
            tried.append(mode)
            return Estimate(float(len(tried)), None, None, fits=mode == enough)

        assert least_that_fits(unsaid, predict).step_seconds == expected


@needs_data
def test_every_published_row_is_a_setup_or_says_why_not() -> None:
    """Complete rows fail for nothing but a device that is not described yet, and the models have as
    many parameters as the sources print (rounded, and for DeepSeek-V3 without the MTP module)."""
    for path in TABLES:
        with path.open() as file:
            printed = {cells["row_id"]: cells["params_b"] for cells in csv.DictReader(file)}
        models: set[TransformerDims] = set()
        for run in read_runs(path).rows:
            found = setup_of(run)
            if isinstance(found, Skipped):
                assert found.reason
                assert not run.config_complete or "no cluster preset" in found.reason, found
            elif printed[run.row_id] and found.dims not in models:
                models.add(found.dims)
                billions = transformer(found.dims).elements / 1e9
                assert billions == pytest.approx(float(printed[run.row_id]), rel=0.03), run.model
        assert len(models) >= 8


def test_families_differ_where_they_should() -> None:
    bloom, plain = dims_of(row(arch="gpt(alibi)")), dims_of(row())
    assert (plain.positions, bloom.positions) == ("learned", "alibi")
    assert bloom.embedding_norm and plain.max_positions == 2048 and plain.fused_qkv
    sizes = dict(heads=128, kv_heads=128, n_experts=256, top_k=8, moe_ffn=2048, ffn=18432)
    text = "deepseek-v3 MLA+MoE (3 dense layers, 1 shared expert, MTP)"
    experts = dims_of(row(arch=text, gated_mlp=1, **sizes))
    assert experts.experts is not None and experts.latent is not None
    assert (experts.experts.dense_layers, experts.experts.shared) == (3, 1)
    assert (experts.mtp_layers, experts.latent.kv_rank) == (1, 512)
    window = row(arch="gpt-oss moe (alternating sliding window 128)", gated_mlp=1)
    assert dims_of(window).windows == (128, None)


# Baseline


def test_flops_are_megatrons() -> None:
    """96 B s l h^2 (1 + s/6h + V/16lh) with full recomputation (arXiv:2104.04473, section 5.1)."""
    b, s, layers, h, v = 64, 2048, 24, 1024, 51200
    full = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert executed_flops(setup()) == pytest.approx(full)
    assert executed_flops(setup(recompute="none")) == pytest.approx(
        full * 3 / 4 + b * s * h * v * 3 / 2
    )


def test_the_baseline_never_sees_its_own_source() -> None:
    rows = [setup(row_id=f"r{i}", iter_time_s=1.5 + i) for i in range(3)]
    other = setup(row_id="x", family="other", iter_time_s=3.0)
    fitted = Baseline.fitted([*rows, other])
    assert fitted.seconds(other) == pytest.approx(2.5)  # as fast as the median of the others
    assert fitted.seconds(rows[0]) == pytest.approx(3.0)
    assert Baseline.fitted(rows).seconds(rows[0]) is None
    elsewhere = setup(row_id="h", family="other", gpu="H100-SXM-80GB")
    assert fitted.seconds(elsewhere) == pytest.approx(2.5 * 312 / 989.4, rel=1e-3)


@needs_data
def test_the_baseline_is_that_of_the_data() -> None:
    """The column "one efficiency" of the data's README, on rows of which some are kept back."""
    found = published_runs.evaluate(read_runs(TABLES[0]), predictor="one-efficiency")
    published = {
        "bloom": 0.14, "korthikanti": 0.17, "megatron-table1": 0.08, "vtrain-multi": 0.12,
        "internevo": 0.12, "dense-a100": 0.12,
    }  # fmt: skip
    for family, expected in published.items():
        baseline = found.families[family].baseline
        assert baseline is not None
        assert baseline.median_ape == pytest.approx(expected, abs=0.03), family
    single = published_runs.evaluate(read_runs(TABLES[1]), predictor="one-efficiency")
    assert single.choice["vtrain-single"].kendall == pytest.approx(-0.14, abs=0.02)
    assert found.choice["bloom"].random_regret == pytest.approx(0.08, abs=0.01)


# Calibration

PLAIN = Prior(0.2, {"matmul": 0.3}, 0.03, dict.fromkeys(FEATURES, 3.0), 0.01)


def test_the_command_prints_what_scripts_rely_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**GPT, "row_id": f"r{i}", "tp": str(tp), "dp": str(8 // tp), "iter_time_s": f"{1 + i}"}
            for i, tp in enumerate((1, 2, 4, 8))]  # fmt: skip
    rows.append({**GPT, "row_id": "x", "arch": "unheard of"})
    path = table(tmp_path / "runs.csv", rows)
    assert published_runs.main(["--runs", str(path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["families"]["lab"]["rows"] == 4
    assert {"median_ape", "p90_ape", "bias", "baseline_median_ape"} <= set(found["families"]["lab"])
    assert {"groups", "kendall", "mean_regret", "max_regret"} <= set(found["choice"]["lab"])
    memory = {"rows", "median_ape", "oom_caught", "oom_total", "false_oom"}
    assert memory <= set(found["memory"]["lab"])
    assert [each["row_id"] for each in found["rows"]] == ["r0", "r1", "r2", "r3"]
    assert all(each["predicted_s"] > 0 and each["measured_s"] > 0 for each in found["rows"])
    for each in found["rows"]:
        assert sum(each["time"].values()) == pytest.approx(each["predicted_s"])
    assert found["skipped"][0]["row_id"] == "x"
    assert published_runs.main(["--runs", str(path), "--only", "lab"]) == 0
    shown = capsys.readouterr().out
    assert "lab" in shown and "skipped 1 of lab: arch is 'unheard of'" in shown


def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "runs.csv", [GPT])
    for arguments, message in (
        (["--runs", str(tmp_path / "none.csv")], "No such file"),
        (["--runs", str(path), "--only", "nobody"], "--only nobody: no such rows"),
    ):
        assert published_runs.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        published_runs.main(["--runs", str(path), "--calibrate", "0"])
