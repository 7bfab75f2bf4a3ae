"""DeepSpeed's own engines against our reading and writing of their checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import ranks_on_cpu
import torch
from checkpoint_mover import Arrays, gathered, wanted_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_on_cpu import states

from shardwright.checkpoint.contents import Contents, Job, Wanted
from shardwright.checkpoint.conversion import convert
from shardwright.checkpoint.formats import Options, deepspeed, deepspeed_universal
from shardwright.checkpoint.layout import Layout
from shardwright.ir import CorruptCheckpoint, InvalidInput

WORKER = Path(__file__).with_name("deepspeed_worker.py")


run = partial(ranks_on_cpu.run, WORKER)


CASES: dict[str, dict[str, Any]] = {
    "zero1-groups-tied": dict(stage=1, groups=True, tied=True),
    "zero2-aligned": dict(stage=2, config='{"parameter_alignment": true}'),
    "zero3-tied": dict(stage=3, tied=True),
    "zero3-sub-groups": dict(stage=3, groups=True, config='{"sub_group_size": 300}'),
    "zero2-frozen": dict(stage=2, frozen=True),
    "zero3-frozen": dict(stage=3, frozen=True),
}


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(flags, checkpoint after two steps, what the engine then held)."""
    root = tmp_path_factory.mktemp(request.param)
    flags = CASES[request.param]
    run(root / "out", save=root / "saved", steps=2, **flags)
    return flags, root / "saved", states(root / "out")


@pytest.mark.slow
def test_reads_what_the_engine_holds(saved: Any) -> None:
    flags, folder, held = saved
    contents = deepspeed.read(folder, Options())
    found = gathered(contents)
    assert contents.job.step == 2
    assert contents.facts["zero_stage"] == flags["stage"]
    ours = {key for key in found if key[0] not in ("weight", "buffer")}
    assert ours == held.keys()
    for key in ours:
        assert np.array_equal(found[key], held[key]), key
    assert found["buffer", "scale"].astype(float).tolist() == [1.5, 2.5]
    frozen = {name for state, name in found if state == "weight"} - {n for _, n in held}
    assert any(name.startswith("layers.1.") for name in frozen) == bool(flags.get("frozen"))


def rewritten(contents: Contents, folder: Path, stage: int, ranks: int) -> Arrays:
    """A checkpoint written again for another stage and number of ranks."""
    found = gathered(contents)
    wanted = wanted_of(contents)
    for one in list(wanted):
        if one.state == "master" and ("weight", one.name) not in found:
            wanted.append(replace(one, state="weight", dtype="BF16"))
            found["weight", one.name] = found["master", one.name]
    shutil.rmtree(folder, ignore_errors=True)
    options = Options(mesh={"dp": ranks}, flags={"stage": stage}, tag="moved")
    write(deepspeed.target(wanted, contents.job, options), found, folder)
    return found


@pytest.mark.slow
def test_there_and_back_is_exact(saved: Any, tmp_path: Path) -> None:
    _, folder, held = saved
    contents = deepspeed.read(folder, Options())
    for stage in (1, 2, 3):
        for ranks in (1, 2, 3, 7):
            rewritten(contents, tmp_path / "there", stage, ranks)
            there = deepspeed.read(tmp_path / "there", Options())
            found = gathered(there)
            assert (there.job.step, there.mesh["dp"]) == (2, ranks)
            assert there.job.param_groups == contents.job.param_groups
            for key, array in held.items():
                assert np.array_equal(found[key], array), key
    shutil.rmtree(tmp_path / "there")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "flags"),
    [
        (1, 3, dict(groups=True, tied=True)),
        (3, 2, dict(groups=True, tied=True)),
        (3, 3, dict(config='{"sub_group_size": 300}')),
        (2, 1, dict(frozen=True)),
    ],
)
def test_engines_resume_from_what_is_written(
    before: int, after: int, flags: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(tmp_path / "o1", stage=before, steps=5, dtype="fp32", **flags)
    run(tmp_path / "o2", stage=before, steps=2, dtype="fp32", save=tmp_path / "saved", **flags)
    contents = deepspeed.read(tmp_path / "saved", Options())
    found = gathered(contents)
    wanted = wanted_of(contents)
    if before == 3:
        for one in [one for one in wanted if one.state == "master"]:
            wanted.append(replace(one, state="weight"))
            found["weight", one.name] = found["master", one.name]
    options = Options(mesh={"dp": 2}, flags={"stage": after}, tag="moved")
    write(deepspeed.target(wanted, contents.job, options), found, tmp_path / "moved")
    resumed = run(
        tmp_path / "o3",
        stage=after,
        first=2,
        steps=3,
        dtype="fp32",
        load=tmp_path / "moved",
        **flags,
    )
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], rel=1e-6), (step, whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_universal_engines_resume_from_what_is_written(
    before: int, after: int, tmp_path: Path
) -> None:
    """DeepSpeed's own converter cannot cross from the stages 1 and 2 to 3."""
    whole = run(tmp_path / "o1", stage=before, steps=5, dtype="fp32", tied=True)
    run(tmp_path / "o2", stage=before, steps=2, dtype="fp32", save=tmp_path / "saved", tied=True)
    contents = deepspeed.read(tmp_path / "saved", Options())
    found = gathered(contents)
    options = Options(mesh={"dp": 2}, flags={"stage": after}, tag="moved")
    target = deepspeed_universal.target(wanted_of(contents), contents.job, options)
    write(target, found, tmp_path / "moved")
    again = deepspeed_universal.read(tmp_path / "moved", Options())
    assert again.job.step == 2 and again.job.param_groups == contents.job.param_groups
    for key, array in gathered(again).items():
        assert np.array_equal(array, found[key]), key
    resumed = run(
        tmp_path / "o3", stage=after, first=2, steps=3, dtype="fp32", load=tmp_path / "moved",
        tag="moved", universal=True, tied=True,
    )  # fmt: skip
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], rel=1e-6), (step, whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_universal_reads_what_deepspeed_converts(stage: int, tmp_path: Path) -> None:
    run(tmp_path / "out", stage=stage, save=tmp_path / "saved", groups=True)
    convert = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        f"--input_folder={tmp_path}/saved/step2", f"--output_folder={tmp_path}/universal/step2",
    ]  # fmt: skip
    (tmp_path / "universal").mkdir()
    subprocess.run(convert, check=True, capture_output=True, timeout=120)
    contents = deepspeed_universal.read(tmp_path / "universal", Options())
    found, held = gathered(contents), states(tmp_path / "out")
    assert contents.job.step == 2
    for key, array in held.items():
        assert np.array_equal(found[key], array), key


def damaged(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    return copy


@pytest.mark.slow
def test_damage_is_named(tmp_path: Path) -> None:
    """Mixed steps, missing ranks, truncation and flips: each names the file."""
    saved = tmp_path / "saved"
    run(tmp_path / "out", stage=1, save=saved)
    run(tmp_path / "out", stage=1, steps=3, save=saved)
    last = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"

    mixed = damaged(saved, tmp_path / "mixed")
    shutil.copy(mixed / "step2" / last, mixed / "step3" / last)
    with pytest.raises(CorruptCheckpoint, match=f"{last}.*step 2.*of 3"):
        deepspeed.read(mixed, Options())
    model = "mp_rank_00_model_states.pt"
    mixed = damaged(saved, tmp_path / "swapped")
    shutil.copy(mixed / "step2" / model, mixed / "step3" / model)
    with pytest.raises(CorruptCheckpoint, match=f"{model} of step 2"):
        deepspeed.read(mixed, Options())

    missing = damaged(saved, tmp_path / "missing")
    (missing / "step3" / last).unlink()
    with pytest.raises(CorruptCheckpoint, match="optimizer states of 1 ranks"):
        deepspeed.read(missing, Options())

    short = damaged(saved, tmp_path / "short")
    content = (short / "step3" / last).read_bytes()
    (short / "step3" / last).write_bytes(content[:-200])
    with pytest.raises(CorruptCheckpoint, match=f"{last}.*truncated"):
        deepspeed.read(short, Options())

    flipped = damaged(saved, tmp_path / "flipped")
    at = content.index(b"base_optimizer_state")
    changed = bytearray(content)
    changed[at] ^= 1
    (flipped / "step3" / last).write_bytes(changed)
    with pytest.raises(CorruptCheckpoint, match=f"{last}: .*data.pkl is damaged"):
        deepspeed.read(flipped, Options())

    (saved / "latest").unlink()
    with pytest.raises(InvalidInput, match="step2, step3; choose one with --tag"):
        deepspeed.read(saved, Options())
    assert deepspeed.read(saved, Options(tag="step2")).job.step == 2
    (saved / "latest").write_text("../../etc")
    with pytest.raises(CorruptCheckpoint, match="outside"):
        deepspeed.read(saved, Options())


def trained(sizes: dict[str, tuple[int, ...]]) -> tuple[list[Wanted], Arrays]:
    """A model of some parameters with all that AdamW keeps."""
    wanted, arrays = [], {}
    for name, shape in sizes.items():
        dims = tuple((d,) for d in range(len(shape)))
        splits = (("tp", 0),) if len(shape) > 1 else ()
        for k, state in enumerate(("weight", "master", "exp_avg", "exp_avg_sq")):
            dtype = "BF16" if state == "weight" else "F32"
            wanted.append(Wanted(state, name, shape, dtype, dims, shape, splits))
            arrays[state, name] = np.random.default_rng(max(k, 1)).random(shape).astype(np.float32)
    return wanted, arrays


SHAPES = st.dictionaries(
    st.from_regex(r"[a-z]{1,3}\.w", fullmatch=True),
    st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(1, 9), st.booleans())
def test_any_shapes_and_ranks_there_and_back(
    shapes: dict[str, tuple[int, ...]], ranks: int, stage: int, limit: int, universal: bool
) -> None:
    """Parameters smaller than the ranks, paddings over several ranks, sub-groups of any size."""
    wanted, arrays = trained(shapes)
    config = {"zero_optimization": {"sub_group_size": limit}}
    entries = ({"lr": 0.1, "betas": {"$tuple": [0.9, 0.99]}, "params": list(shapes)},)
    kept = {"deepspeed": {"model": {"ds_config": config}, "optimizer": {}}}
    job = Job(step=3, param_groups=entries, others=kept)
    options = Options(mesh={"dp": ranks}, flags={"stage": stage})
    module = deepspeed_universal if universal else deepspeed
    with TemporaryDirectory() as folder:
        write(module.target(wanted, job, options), arrays, Path(folder))
        contents = module.read(Path(folder), Options())
        assert (contents.job.step, contents.job.param_groups) == (3, entries)
        found = gathered(contents)
    for key, array in arrays.items():
        if key[0] != "weight":
            assert np.array_equal(found[key], array), key
        elif stage < 3:
            assert np.array_equal(found[key], array.astype(found[key].dtype)), key


def test_hops_keep_arrays_and_job(tmp_path: Path) -> None:
    """ZeRO-1 → DCP → ZeRO-3 → universal → ZeRO-2, by the engine: nothing is lost on the way."""
    wanted, arrays = trained({"b.w": (5, 3), "a.w": (4,), "a.b": (2, 3, 2)})
    wanted.append(Wanted("buffer", "scale", (2,), "F32", ((0,),), (2,)))
    arrays["buffer", "scale"] = np.array([1.0, 2.0], np.float32)
    kept = {"model": {"buffer_names": ["scale"], "note": "x"}, "optimizer": {"clip_grad": 0.5}}
    entries = ({"lr": 0.1, "params": ["b.w", "a.w", "a.b"]},)
    job = Job(step=3, param_groups=entries, others={"deepspeed": kept})
    options = Options(mesh={"dp": 3}, flags={"stage": 1})
    write(deepspeed.target(wanted, job, options), arrays, tmp_path / "0")
    first = deepspeed.read(tmp_path / "0", Options())
    hops: list[tuple[str, dict[str, int], dict[str, Any]]] = [
        ("dcp", {"dp": 2}, {}),
        ("deepspeed", {"dp": 4}, {"stage": 3}),
        ("deepspeed-universal", {}, {"stage": 1}),
        ("deepspeed", {"dp": 2}, {"stage": 2}),
    ]
    for k, (to, mesh, flags) in enumerate(hops):
        convert(tmp_path / str(k), tmp_path / str(k + 1), to=to, mesh=mesh, flags=flags)
    last = deepspeed.read(tmp_path / str(len(hops)), Options())
    found = gathered(last)
    for key, array in arrays.items():
        expected = array.astype("bfloat16") if key[0] == "weight" else array
        assert np.array_equal(found[key].astype(expected.dtype), expected), key
    assert (last.job.step, last.job.others["deepspeed"]["model"]["note"]) == (3, "x")
    assert last.job.others["deepspeed"]["optimizer"] == first.job.others["deepspeed"]["optimizer"]
    assert [g["params"] for g in last.job.param_groups] == [["b.w", "a.w", "a.b"]]


def test_tensor_parallel_shards_wait_for_a_layout(tmp_path: Path) -> None:
    """Without DeepSpeed's word on how shards make a whole, it is not guessed."""
    wanted, arrays = trained({"a.w": (6, 5), "a.b": (7,)})
    options = Options(mesh={"dp": 2, "tp": 2}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path)
    contents = deepspeed.read(tmp_path, Options(flags={"info": False}))
    assert contents.mesh["tp"] == 2
    array = contents.arrays["master", "a.w"]
    assert (array.axes, array.shape) == (("tp",), (2, 3, 5))
    found = gathered(contents)
    assert np.array_equal(found["master", "a.w"].reshape(6, 5), arrays["master", "a.w"])
    for rank in range(2):
        assert np.array_equal(found["exp_avg", "a.b"][rank], arrays["exp_avg", "a.b"])
    with pytest.raises(InvalidInput, match="tp=2 and no rule says how"):
        Layout.identity().logical(contents)


def test_what_deepspeed_cannot_say_is_refused(tmp_path: Path) -> None:
    wanted, _ = trained({"a.w": (6, 5)})
    weights = [one for one in wanted if one.state == "weight"]
    for some, options, said in [
        (weights, Options(), "master"),
        (wanted[1:], Options(mesh={"dp": 2}, flags={"stage": 1}), "weight of a.w"),
        (wanted, Options(mesh={"pp": 2}), "axes dp, tp and ep, not pp"),
        (wanted, Options(mesh={"dp": 2, "ep": 2}), "ep=2: DeepSpeed shares experts among ranks in"),
        (wanted, Options(flags={"stage": 4}), "stage=4: expected 1, 2 or 3"),
        (wanted, Options(flags={"order": ["b.w"]}), "order: 1 names"),
    ]:
        with pytest.raises(InvalidInput, match=said):
            deepspeed.target(some, Job(), options)


def test_names_client_state_and_trainer_files_are_kept(tmp_path: Path) -> None:
    """Tags, large tensors of a user's own, random states and schedulers, from DeepSpeed to it."""
    wanted, arrays = trained({"a.w": (6, 5)})
    options = Options(mesh={"dp": 2}, flags={"stage": 1}, tag="best")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path / "a")
    path = tmp_path / "a" / "best" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    table = torch.arange(1 << 19)  # 4 MiB
    torch.save({**state, "table": table}, path)
    random = {"python": (3, (1, 2)), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(random, tmp_path / "a" / "rng_state_1.pth")
    torch.save({"last_epoch": 7}, tmp_path / "a" / "scheduler.pt")
    convert(tmp_path / "a", tmp_path / "b", to="universal")
    convert(tmp_path / "b", tmp_path / "c", to="deepspeed", mesh={"dp": 1})
    there = torch.load(tmp_path / "c" / "best" / path.name, weights_only=False)
    assert (tmp_path / "c" / "latest").read_text() == "best"
    assert torch.equal(there["table"], table)
    again = torch.load(tmp_path / "c" / "rng_state_1.pth", weights_only=False)
    assert again["python"] == random["python"] and torch.equal(again["cpu"], random["cpu"])
    assert np.array_equal(again["numpy"][1], random["numpy"][1])
    assert torch.load(tmp_path / "c" / "scheduler.pt") == {"last_epoch": 7}
    for k, tag in enumerate(("../x", "..")):
        with pytest.raises(InvalidInput, match="expected the name of a directory"):
            convert(tmp_path / "b", tmp_path / f"d{k}", to="deepspeed", flags={"tag": tag})
    convert(tmp_path / "b", tmp_path / "e", to="deepspeed", flags={"tag": "new"})
    assert (tmp_path / "e" / "new" / path.name).exists()


class Called:
    """Of a user's own: what its pickle calls would show in a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.place),)


def test_calls_in_client_state_are_written_as_data_or_not_at_all(tmp_path: Path) -> None:
    wanted, arrays = trained({"a.w": (6, 5)})
    options = Options(mesh={"dp": 1}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path / "a")
    path = tmp_path / "a" / "x" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "mine": [Called(tmp_path / "ran")], "note": 5}, path)
    with pytest.raises(InvalidInput, match=r"client state mine: .*os\.makedirs.*foreign=data"):
        convert(tmp_path / "a", tmp_path / "b", to="deepspeed")
    convert(tmp_path / "a", tmp_path / "b", to="deepspeed", flags={"foreign": "data"})
    there = torch.load(tmp_path / "b" / "x" / path.name, weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert there["note"] == 5 and there["mine"][0]["called"]
    assert there["mine"][0]["$object"] == ["os", "makedirs"]


def test_files_that_say_another_rank_are_refused(tmp_path: Path) -> None:
    """As written through an open file: zips do not tell by their names."""
    wanted, arrays = trained({"a.w": (6, 5)})
    options = Options(mesh={"dp": 2}, flags={"stage": 3}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path)
    paths = sorted((tmp_path / "x").glob("*_optim_states.pt"))
    for rank, path in enumerate(paths):
        state = torch.load(path, weights_only=False)
        groups = [{"partition_count": 2, "partition_rank": rank}]
        state["optimizer_state_dict"]["ds_zero_partition_groups"] = groups
        with path.open("wb") as file:
            torch.save(state, file)
    assert deepspeed.read(tmp_path, Options()).mesh["dp"] == 2
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(CorruptCheckpoint, match=f"{paths[0].name}: says .* data rank 1: .*swapped"):
        deepspeed.read(tmp_path, Options())
