"""DeepSpeed-MoE's own engines against our reading and writing of their checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_on_cpu
import torch
from checkpoint_mover import Arrays, gathered, wanted_of, write
from ranks_on_cpu import states

from shardwright import CorruptCheckpoint, InvalidInput
from shardwright.checkpoint import convert
from shardwright.checkpoint.contents import Contents, Job, Wanted
from shardwright.checkpoint.formats import Options, deepspeed, deepspeed_universal
from shardwright.checkpoint.formats.deepspeed import sharing

WORKER = Path(__file__).with_name("deepspeed_moe_worker.py")
OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
EXPERTS = "deepspeed_moe.experts.deepspeed_experts"

run = partial(ranks_on_cpu.run, WORKER)

DATA_FIRST = '{"use_data_before_expert_parallelism": true}'

CASES: dict[str, dict[str, Any]] = {
    # Expert data parallelism: 2 ranks have the same experts; the layers differ in size.
    "zero2-4-ranks": dict(ranks=4, stage=2, sizes="[[4, 2], [2, 2]]"),
    "zero1-data-first": dict(
        ranks=4, stage=1, sizes="[[4, 2], [2, 2]]", config=DATA_FIRST,
        zero='{"parameter_alignment": true}',
    ),
    # Three kinds of groups, of which one is on all ranks; they are cut by their size.
    "zero1-three-sizes": dict(ranks=4, stage=1, sizes="[[4, 4], [2, 1], [4, 2]]", largest=200),
    "zero2-all-experts": dict(
        ranks=2, stage=2, sizes="[[3, 1], [2, 1]]", zero='{"elastic_checkpoint": true}'
    ),
    "zero2-frozen": dict(ranks=2, stage=2, sizes="[[4, 2], [4, 2]]", frozen=True),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(flags, checkpoint after two steps, what the engine then held)."""
    root = tmp_path_factory.mktemp(request.param)
    flags = CASES[request.param]
    run(root / "out", save=root / "saved", **flags)
    return flags, root / "saved", states(root / "out")


@pytest.mark.slow
def test_reads_what_the_engine_holds(saved: Any) -> None:
    flags, folder, held = saved
    contents = deepspeed.read(folder, Options())
    assert (contents.job.step, contents.facts["zero_stage"]) == (2, flags["stage"])
    found = gathered(contents)
    ours = {("weight" if state == "buffer" else state, name) for state, name in found}
    assert ours == held.keys()
    for (state, name), array in found.items():
        expected = held["weight" if state == "buffer" else state, name]
        assert np.array_equal(array.astype(expected.dtype), expected), (state, name)
    grouped = [name for group in contents.job.param_groups for name in group.get("params", ())]
    if "elastic" not in flags.get("zero", ""):
        assert sorted(grouped) == sorted(name for state, name in held if state == "master")
    trained = {name for state, name in held if state == "master"}
    frozen = {name for state, name in found if state == "weight"} - trained
    assert any(EXPERTS in name for name in frozen) == bool(flags.get("frozen"))


def _written(contents: Contents, folder: Path, mesh: dict[str, int], **flags: Any) -> Arrays:
    found = gathered(contents)
    target = deepspeed.target(wanted_of(contents), contents.job, Options(mesh, flags=flags))
    write(target, found, folder)
    return found


@pytest.mark.slow
def test_there_and_back_is_exact(saved: Any, tmp_path: Path) -> None:
    """Under the source's sharing of experts and under any other."""
    flags, folder, _ = saved
    contents = deepspeed.read(folder, Options())
    one_size = len({size for _, size in json.loads(flags["sizes"])}) == 1
    meshes = [{"dp": 4}] + [{"dp": 4, "ep": 1}, {"dp": 2, "ep": 2}, {"dp": 6, "ep": 2}] * one_size
    for k, mesh in enumerate(meshes):
        if "[3, 1]" in flags["sizes"] and mesh.get("ep", 1) > 1:
            with pytest.raises(InvalidInput, match=r"3 experts shared by ep=2 of dp="):
                _written(contents, tmp_path / str(k), mesh)
            continue
        found = _written(contents, tmp_path / str(k), mesh)
        there = deepspeed.read(tmp_path / str(k), Options())
        again = gathered(there)
        assert again.keys() == found.keys() and there.mesh["dp"] == mesh["dp"]
        for key, array in found.items():
            assert np.array_equal(again[key], array), key
        groups = [group.get("params") for group in there.job.param_groups]
        if "ep" not in mesh and contents.job.param_groups:
            assert groups == [group["params"] for group in contents.job.param_groups]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "ranks", "ep", "largest"),
    [(2, 1, 4, 2, 10**9), (1, 2, 2, 1, 200)],
)
def test_engines_resume_from_what_is_written(
    before: int, after: int, ranks: int, ep: int, largest: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of four ranks, two and two of which share experts; of ranks that have all, whose groups are
    cut in other places than the source's."""
    monkeypatch.setattr(sharing, "_GROUP_ELEMENTS", largest)
    whole = run(tmp_path / "o1", ranks=ranks, stage=before, steps=5, dtype="fp32")
    run(tmp_path / "o2", ranks=ranks, stage=before, dtype="fp32", save=tmp_path / "saved")
    contents = deepspeed.read(tmp_path / "saved", Options())
    _written(contents, tmp_path / "moved", {"dp": ranks, "ep": ep}, stage=after)
    resumed = run(
        tmp_path / "o3", ranks=ranks, stage=after, sizes=f"[[4, {ep}], [4, {ep}]]", first=2,
        steps=3, dtype="fp32", largest=largest, load=tmp_path / "moved",
    )  # fmt: skip
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], rel=1e-6), (step, whole, resumed)


@pytest.mark.slow
def test_agrees_with_ds_to_universal(tmp_path: Path) -> None:
    """DeepSpeed's own converter knows experts only where every rank has all; it drops weights."""
    run(tmp_path / "out", ranks=2, stage=2, sizes="[[3, 1], [2, 1]]", save=tmp_path / "saved")
    convert_it = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        f"--input_folder={tmp_path}/saved/global_step2",
        f"--output_folder={tmp_path}/universal",
    ]  # fmt: skip
    subprocess.run(convert_it, check=True, capture_output=True, timeout=120)
    theirs = deepspeed_universal.read(tmp_path / "universal", Options())
    ours = deepspeed.read(tmp_path / "saved", Options())
    found, expected = gathered(ours), gathered(theirs)
    trained = {key for key in found if key[0] not in ("weight", "buffer")}
    assert trained == {key for key in expected if key[0] != "weight"}
    for key, array in expected.items():
        assert np.array_equal(found[key], array), key
    assert ours.job.param_groups == theirs.job.param_groups


SHAPES = {"emb.weight": (7, 3), **{f"moe.{EXPERTS}.{e}.up.weight": (5, 3) for e in range(4)}}


def _model(names: Mapping[str, str] = {}) -> tuple[list[Wanted], Arrays]:
    """A model with one MoE layer and all that AdamW keeps; parameters may have other names."""
    wanted, arrays = [], {}
    random = np.random.default_rng(0)
    for own, shape in SHAPES.items():
        for state in ("weight", "master", "exp_avg", "exp_avg_sq"):
            name = names.get(own, own)
            wanted.append(Wanted(state, name, shape, "F32", ((0,), (1,)), shape))
            arrays[state, name] = random.random(shape).astype(np.float32)
    return wanted, arrays


def test_hops_keep_groups_and_layers(tmp_path: Path) -> None:
    """One param group is cut as engines with MoE layers have it; then ZeRO-1 → DCP → ZeRO-2."""
    wanted, arrays = _model()
    job = Job(step=3, param_groups=({"lr": 0.1, "params": list(SHAPES)},))
    options = Options({"dp": 4, "ep": 2}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, job, options), arrays, tmp_path / "0")
    first = deepspeed.read(tmp_path / "0", Options())
    dense, moe = first.job.param_groups
    assert (dense["params"], moe["params"]) == (["emb.weight"], list(SHAPES)[1:])
    assert (moe["name"], moe["moe"], dense.get("moe")) == ("ep_size_2", True, None)
    convert(tmp_path / "0", tmp_path / "1", to="dcp", verify=True)
    mesh = {"dp": 2, "ep": 1}
    convert(tmp_path / "1", tmp_path / "2", to="deepspeed", mesh=mesh, verify=True)
    last = deepspeed.read(tmp_path / "2", Options())
    assert [group.get("name") for group in last.job.param_groups] == [None, "ep_size_1"]
    assert last.job.others["deepspeed"]["moe_layers"] == [f"moe.{EXPERTS}."]
    found = gathered(last)
    for key, array in arrays.items():
        assert np.array_equal(found[key], array), key


def test_experts_under_other_names_are_plain_parameters(tmp_path: Path) -> None:
    """An engine without MoE layers fails on groups that say they are of experts."""
    plain = {name: name.replace("deepspeed_experts", "plain") for name in SHAPES}
    wanted, arrays = _model(plain)
    groups = (
        {"name": "dense", "params": ["emb.weight"]},
        {"name": "ep_size_2", "moe": True, "params": [plain[n] for n in list(SHAPES)[1:]]},
    )
    job = Job(step=3, param_groups=groups, others={"deepspeed": {"model": {"num_experts": [4]}}})
    options = Options({"dp": 2}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, job, options), arrays, tmp_path)
    assert not list((tmp_path / "x").glob("layer_*"))
    again = deepspeed.read(tmp_path, Options()).job
    assert [sorted(group) for group in again.param_groups] == [["name", "params"], ["params"]]
    assert "num_experts" not in again.others["deepspeed"]["model"]


def test_what_moe_engines_cannot_load_is_refused() -> None:
    wanted, _ = _model()
    some_frozen = [one for one in wanted if ".3." not in one.name or one.state == "weight"]
    gap = [one for one in wanted if ".1." not in one.name]
    for some, mesh, stage, said in [
        (wanted, {"dp": 2}, 3, "an expert of DeepSpeed-MoE.*stage=1 or 2"),
        (some_frozen, {"dp": 2, "ep": 2}, 1, r"up\.weight: in the param group of some"),
        (wanted, {"dp": 2, "tp": 2}, 1, "an expert of DeepSpeed-MoE.*without tp"),
        (wanted, {"dp": 3, "ep": 2}, 1, "4 experts shared by ep=2 of dp=3 ranks"),
        (wanted, {"dp": 3, "ep": 3}, 1, "4 experts shared by ep=3 of dp=3 ranks"),
        (gap, {"dp": 2}, 1, r"the experts \[0, 2, 3\]"),
    ]:
        with pytest.raises(InvalidInput, match=said):
            deepspeed.target(some, Job(step=1), Options(mesh, flags={"stage": stage}))
    with pytest.raises(InvalidInput, match=r"an expert of DeepSpeed-MoE.*--to deepspeed"):
        deepspeed_universal.target(wanted, Job(step=1), Options())


def _again(path: Path, change: Any) -> None:
    """A file with another content, as written through an open file: its zip tells no name."""
    state = torch.load(path, weights_only=False)
    with path.open("wb") as file:
        torch.save(change(state), file)


@pytest.mark.slow
def test_damage_is_named(tmp_path: Path) -> None:
    """Missing, swapped and foreign files of experts, and what is no DeepSpeed-MoE."""
    run(tmp_path / "out", ranks=2, stage=1, save=tmp_path / "saved")
    step = tmp_path / "saved" / "global_step2"
    expert = "layer_{}_expert_{}_mp_rank_00_model_states.pt".format
    model = "mp_rank_00_model_states.pt"

    def saying(said: Any) -> Any:
        return lambda state: {**state, **said}

    def renamed(state: Any) -> Any:
        return {name.replace("layers.1.", "layers.0."): tensor for name, tensor in state.items()}

    damages: dict[str, tuple[type[Exception], Any]] = {
        f"{expert(1, 2)} is missing, {model} says that layer 1 has 4": (
            CorruptCheckpoint, lambda d: (d / expert(1, 2)).unlink(),
        ),
        "optimizer states of 1 ranks, the model states are of 2": (
            CorruptCheckpoint, lambda d: (d / OPTIMIZER.format(1)).unlink(),
        ),
        f"{expert(1, 3)}: .*layer_1_expert_2": (
            CorruptCheckpoint, lambda d: shutil.copy(d / expert(1, 2), d / expert(1, 3)),
        ),
        f"{expert(0, 1)}: holds .*experts.0.* swapped": (
            CorruptCheckpoint,
            lambda d: _again(d / expert(0, 1), lambda _: torch.load(d / expert(0, 0))),
        ),
        "two of 2 MoE layers have the same names": (
            CorruptCheckpoint,
            lambda d: [_again(d / expert(1, e), renamed) for e in range(4)],
        ),
        rf"{expert(1, 3)} is an expert of which {model} does not speak \(num_experts: \[4, 3\]": (
            CorruptCheckpoint, lambda d: _again(d / model, saying({"num_experts": [4, 3]})),
        ),
        "experts.1.* on 2 expert ranks, of 2 experts in files of their own": (
            CorruptCheckpoint,
            lambda d: [
                _again(d / model, saying({"num_experts": [4, 2]})),
                *[(d / expert(1, e)).unlink() for e in (2, 3)],
            ],
        ),
        "AutoEP": (
            InvalidInput, lambda d: _again(d / model, saying({"ds_autoep_layers": [{}]})),
        ),
        "before it numbered MoE layers": (
            InvalidInput,
            lambda d: shutil.copy(d / expert(0, 0), d / "expert_0_mp_rank_00_model_states.pt"),
        ),
        "tensor or pipeline parallelism": (
            InvalidInput,
            lambda d: shutil.copy(d / expert(0, 0), d / expert(0, 0).replace("_00_", "_01_")),
        ),
    }  # fmt: skip
    for k, (said, (error, damage)) in enumerate(damages.items()):
        shutil.copytree(step, tmp_path / str(k))
        damage(tmp_path / str(k))
        with pytest.raises(error, match=said):
            deepspeed.read(tmp_path / str(k), Options())


@pytest.mark.slow
def test_without_zero_weights_are_read(tmp_path: Path) -> None:
    """The optimizer's states (`expp_rank_…`) then name no parameters."""
    run(tmp_path / "out", ranks=2, stage=0, dtype="fp32", save=tmp_path / "saved")
    contents = deepspeed.read(tmp_path / "saved", Options())
    assert {state for state, _ in contents.arrays} == {"weight", "buffer"}
    assert "without optimizer state" in contents.notes
    found = gathered(contents)
    folder = tmp_path / "saved" / "global_step2"
    for layer in range(2):
        for expert in range(4):
            name = f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            for key, tensor in torch.load(folder / name).items():
                state = "buffer" if key.endswith("scale") else "weight"
                assert np.array_equal(found[state, key], tensor.numpy()), key
    name = "expp_rank_1_mp_rank_00_optim_states.pt"
    assert name in contents.files
    content = bytearray((folder / name).read_bytes())
    content[content.index(b"param_groups")] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=f"{name}: .*data.pkl is damaged"):
        deepspeed.read(tmp_path / "saved", Options())
