"""DeepSpeed with tensor parallelism: its automatic one, and its converter, against our reading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_on_cpu
import torch
from checkpoint_mover import gathered, write
from test_checkpoint_deepspeed import trained

from shardwright.checkpoint.boxes import Boxes
from shardwright.checkpoint.contents import Contents, Job, Wanted
from shardwright.checkpoint.conversion import convert
from shardwright.checkpoint.formats import Options, deepspeed, deepspeed_universal
from shardwright.checkpoint.formats.deepspeed.assembling import _whole_boxes
from shardwright.checkpoint.formats.deepspeed.tensor_ranks import Info
from shardwright.ir import CorruptCheckpoint, InvalidInput

WORKER = Path(__file__).with_name("deepspeed_tp_worker.py")
PIPELINE = Path(__file__).with_name("deepspeed_pipe_worker.py")
MERGER = Path(__file__).with_name("deepspeed_merge_worker.py")

run = partial(ranks_on_cpu.run, WORKER)

ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def to_universal(folder: Path, out: Path) -> None:
    """By DeepSpeed's converter."""
    tag = (folder / "latest").read_text()
    out.mkdir()
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1",
        f"--input_folder={folder}/{tag}", f"--output_folder={out}/{tag}", "--num_merge_workers=1",
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def same_as_universal(contents: Contents, out: Path) -> int:
    """How many states of parameters there are, all equal to DeepSpeed's."""
    found, theirs = gathered(contents), gathered(deepspeed_universal.read(out, Options()))
    keys = [key for key in theirs if key[0] in ("master", "exp_avg", "exp_avg_sq")]
    for key in keys:
        assert np.array_equal(found[key], theirs[key]), key
    assert {key for key in found if key[0] == "exp_avg"} <= set(keys)
    return len(keys)


def without_maps(folder: Path) -> None:
    """Leaves the lists of patterns only, as versions before the maps wrote them."""
    for path in folder.glob("*/*_model_states.pt"):
        state = torch.load(path, weights_only=False)
        state["universal_checkpoint_info"].pop("affine_map")
        torch.save(state, path)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "stage", "ranks"), [("fused", 1, 2), ("llama", 3, 4)])
def test_reads_automatic_tensor_parallelism(
    model: str, stage: int, ranks: int, tmp_path: Path
) -> None:
    """Uneven fused projections, rows and columns, copies, a padded head: as DeepSpeed merges them,
    by maps and by lists."""
    saved = tmp_path / "saved"
    run(tmp_path / "out", model=model, stage=stage, ranks=ranks, save=saved)
    to_universal(saved, tmp_path / "universal")
    contents = deepspeed.read(saved, Options())
    assert (contents.mesh["tp"], contents.job.step) == (2, 2)
    assert same_as_universal(contents, tmp_path / "universal") > 50
    without_maps(saved)
    assert same_as_universal(deepspeed.read(saved, Options()), tmp_path / "universal") > 50


@pytest.mark.slow
def test_automatic_tensor_parallelism_resumes_from_what_is_written(tmp_path: Path) -> None:
    """From data parallelism to tensor parallelism, native and by DeepSpeed's converter."""
    saved, there = tmp_path / "saved", tmp_path / "there"
    whole = run(tmp_path / "o1", stage=1, tp=1, dtype="fp32", steps=4, save=saved)
    convert(saved, there, to="deepspeed", mesh={"tp": 2}, target_spec="autotp-llama", verify=True)
    to_universal(there, tmp_path / "universal")
    assert same_as_universal(deepspeed.read(saved, Options()), tmp_path / "universal") > 50
    resumed = run(
        tmp_path / "o2", stage=1, tp=2, dtype="fp32", first=2, steps=2, load=there
    )  # fmt: skip
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], rel=1e-5), (step, whole, resumed)


def cases() -> list[dict[str, Any]]:
    """Infos for a parameter `w` (ranks, shapes of its shards), one of every kind and version."""
    one = ["^w$"]
    three = {"patterns": one, "shape": [3, -1], "partition_dim": 0}
    named = {"patterns": one, "shape": [[6, 2, 4], 5], "partition_dim": 0}
    widths = {"^w$": [[3, 2, 1], [1, 1, 0], [2, 0, 2]]}
    inner = {"patterns": one, "shape": [4, [3, 3], 2], "partition_dim": 1}
    averaged = {"parameter_to_average_patterns": one}
    row = {"parameter_with_row_parallelism_patterns": one}
    two = {"parameter_with_2_sub_params_cat_dim_0": one}
    padded = {"vocabulary_parameter_patterns": one, "original_vocab_size": 7}
    new = {"universal_checkpoint_version": 0.4}
    return [
        {"ranks": 2, "shapes": [[4, 3]] * 2, "info": averaged},
        {"ranks": 3, "shapes": [[4]] * 3, "info": {"tp_replicated_parameter_patterns": one}},
        {"ranks": 2, "shapes": [[4, 3]] * 2, "info": {**averaged, **row}},
        {"ranks": 3, "shapes": [[4, 3], [4, 2], [4, 2]], "info": row},
        {"ranks": 2, "shapes": [[4, 3]] * 2, "info": padded},
        {"ranks": 2, "shapes": [[6, 3]] * 2, "info": two},
        {"ranks": 2, "shapes": [[5, 3], [3, 3]], "info": two},
        {"ranks": 2, "shapes": [[6, 5]] * 2, "info": {"parameter_with_sub_params": [three]}},
        {"ranks": 2, "shapes": [[6, 5]] * 2, "info": {"parameter_with_sub_params": [named]}},
        {
            "ranks": 3,
            "shapes": [[6, 5], [3, 5], [3, 5]],
            "info": {"parameter_with_sub_params": [named], "sub_param_shard_widths": widths, **new},
        },
        {"ranks": 3, "shapes": [[4, 2, 2]] * 3, "info": {"parameter_with_sub_params": [inner]}},
    ]  # fmt: skip


@pytest.mark.slow
def test_lists_of_patterns_say_what_they_say_to_deepspeed(tmp_path: Path) -> None:
    every = cases()
    random = np.random.default_rng(0)
    shards: dict[str, Any] = {}
    for number, case in enumerate(every):
        same = "tp_replicated_parameter_patterns" in case["info"]
        values = [random.random(shape).astype(np.float32) for shape in case["shapes"]]
        for rank, value in enumerate(values):
            shards[f"{number} {rank}"] = values[0] if same else value
    np.savez(tmp_path / "shards.npz", **shards)
    (tmp_path / "cases.json").write_text(json.dumps(every))
    command = [sys.executable, str(MERGER), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "merged.npz") as merged:
        for number, case in enumerate(every):
            values = [shards[f"{number} {rank}"] for rank in range(case["ranks"])]
            assert np.array_equal(assembled(case["info"], values), merged[str(number)]), case


def assembled(info: dict[str, Any], shards: list[Any]) -> Any:
    """By our reading of an info."""
    whole = Info(info, "x").whole("w", [shard.shape for shard in shards])
    found, counts = np.zeros(whole.shape, np.float32), np.zeros(whole.shape, np.int64)
    tables = {rank: [Boxes.whole(shard.shape, rank)] for rank, shard in enumerate(shards)}
    boxes = _whole_boxes(whole, tables)
    columns = (boxes.begin, boxes.size, boxes.stride, boxes.record, boxes.offset)
    for begin, size, stride, record, offset in zip(*(c.tolist() for c in columns), strict=True):
        at = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
        flat = shards[record].reshape(-1)[offset:]
        view = np.lib.stride_tricks.as_strided(flat, size, tuple(4 * s for s in stride))
        found[at] = found[at] + view if whole.combine == "mean" else view
        counts[at] += 1
    assert counts.min() == 1 or whole.combine != "copy"
    return found / counts.max() if whole.combine == "mean" else found


SPLITS = {"a.w": (("tp", 0),), "b.w": (("tp", 1),), "q.w": (("tp", 1),)}


def split() -> tuple[list[Wanted], Any]:
    """Columns, rows, a fused array of three parts that are cut each, and copies."""
    wanted, arrays = trained({"a.w": (6, 5), "b.w": (3, 4), "q.w": (12, 2), "n.w": (7,)})
    made = []
    for one in wanted:
        dims, sizes = one.dims, one.sizes
        if one.name == "q.w":
            dims, sizes = ((0, 1), (2,)), (3, 4, 2)
        made.append(
            Wanted(one.state, one.name, one.shape, one.dtype, dims, sizes, SPLITS.get(one.name, ()))
        )
    return made, arrays


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("maps", [True, False])
def test_tensor_ranks_there_and_back(stage: int, maps: bool, tmp_path: Path) -> None:
    """By maps and by lists; every rank's shard is what the type says."""
    wanted, arrays = split()
    options = Options(mesh={"dp": 3, "tp": 2}, flags={"stage": stage}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path)
    if not maps:
        without_maps(tmp_path)
    contents = deepspeed.read(tmp_path, Options())
    found = gathered(contents)
    for key, array in arrays.items():
        if key[0] != "weight":
            assert np.array_equal(found[key], array), key
            combine = contents.arrays[key].combine
            assert combine == ("equal" if key[1] == "n.w" else "copy")
    shards = gathered(deepspeed.read(tmp_path, Options(flags={"info": False})))
    three = arrays["master", "q.w"].reshape(3, 2, 2, 2)
    assert np.array_equal(shards["master", "q.w"][1], three[:, 1].reshape(6, 2))
    assert np.array_equal(shards["exp_avg", "b.w"][1], arrays["exp_avg", "b.w"][:, 2:])


def changed(folder: Path, change: Any) -> None:
    for path in sorted(folder.glob("*/*_model_states.pt")):
        state = torch.load(path, weights_only=False)
        change(path.name, state)
        torch.save(state, path)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    wanted, arrays = split()
    options = Options(mesh={"tp": 2}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path / "a")

    def change(name: str, state: Any) -> None:
        if name.startswith("mp_rank_01"):
            state["module"]["n.w"][2] += 1

    changed(tmp_path / "a", change)
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00.* values of n.w \(weight\)"):
        convert(tmp_path / "a", tmp_path / "b", to="safetensors", states=["weight"])
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "a", tmp_path / "b", to="safetensors", states=["master"])


@pytest.mark.parametrize(
    ("info", "error", "said"),
    [
        ({"tp_replicated_parameter_patterns": ["["]}, CorruptCheckpoint, "no pattern"),
        ({"tp_replicated_parameter_patterns": ["n", "^n"]}, InvalidInput, r"n and \^n"),
        ({"parameter_with_row_parallelism_patterns": ["n"]}, CorruptCheckpoint, "along dim 1"),
        ({"affine_map": {"version": 2}}, InvalidInput, "version 2"),
        ({"affine_map": {"params": {"n": {"ranks": {}}}}}, CorruptCheckpoint, "damaged"),
        (
            {
                "tp_replicated_parameter_patterns": ["n"],
                "autotp_unsupported_parameter_patterns": {"a": "because"},
            },
            InvalidInput,
            r"because.*--spec",
        ),
        (
            {"vocabulary_parameter_patterns": ["a"], "original_vocab_size": 99},
            CorruptCheckpoint,
            "original_vocab_size is 99",
        ),
    ],
)  # fmt: skip
def test_infos_that_cannot_be_are_named(info: Any, error: Any, said: str, tmp_path: Path) -> None:
    wanted, arrays = split()
    options = Options(mesh={"tp": 2}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path)
    changed(tmp_path, lambda _, state: state.update(universal_checkpoint_info=info))
    with pytest.raises(error, match=said):
        deepspeed.read(tmp_path, Options())
    assert deepspeed.read(tmp_path, Options(flags={"info": False})).mesh["tp"] == 2


def test_scaled_pieces_and_other_runs_are_refused(tmp_path: Path) -> None:
    wanted, arrays = split()
    options = Options(mesh={"tp": 2}, flags={"stage": 1}, tag="x")
    write(deepspeed.target(wanted, Job(step=1), options), arrays, tmp_path)

    def of(state: Any) -> Any:
        return state["universal_checkpoint_info"]["affine_map"]["params"]["^n\\.w$"]

    changed(tmp_path, lambda _, s: of(s)["ranks"][1]["pieces"][0].update(scale=0.5))
    with pytest.raises(InvalidInput, match=r"scaled by 0\.5"):
        deepspeed.read(tmp_path, Options())
    changed(tmp_path, lambda _, s: of(s)["ranks"][1].update(shard_shape=[9]))
    with pytest.raises(CorruptCheckpoint, match="affine map says"):
        deepspeed.read(tmp_path, Options())

    def one(name: str, state: Any) -> None:
        if name.startswith("mp_rank_01"):
            state["universal_checkpoint_info"]["note"] = 1

    changed(tmp_path, one)
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_01.*differs"):
        deepspeed.read(tmp_path, Options())


@pytest.mark.slow
def test_reads_pipelines(tmp_path: Path) -> None:
    """Two stages of two data ranks with a tied embedding, as DeepSpeed's converter has them."""
    saved = tmp_path / "saved"
    ranks_on_cpu.run(PIPELINE, tmp_path / "out", ranks=4, save=saved)
    to_universal(saved, tmp_path / "universal")
    contents = deepspeed.read(saved, Options())
    assert (contents.mesh["pp"], contents.mesh["dp"], contents.job.step) == (2, 2, 2)
    assert same_as_universal(contents, tmp_path / "universal") == 45
    assert contents.arrays["master", "tied_modules.embed.weight"].combine == "equal"
    assert {name for state, name in contents.arrays if state == "buffer"} == {
        "1.scale", "2.scale", "3.scale"
    }  # fmt: skip
    convert(saved, tmp_path / "there", to="deepspeed", mesh={"dp": 3}, verify=True)
    found, there = gathered(contents), gathered(deepspeed.read(tmp_path / "there", Options()))
    assert all(np.array_equal(found[key], array) for key, array in there.items())
    assert found.keys() == there.keys()
    weight, master = (found[s, "tied_modules.embed.weight"] for s in ("weight", "master"))
    assert np.array_equal(weight, master.astype(weight.dtype))
    members = [name for group in contents.job.param_groups for name in group["params"]]
    assert len(members) == 15 and "5.bias" in members
    next(saved.glob("*/layer_02-model_states.pt")).unlink()
    with pytest.raises(CorruptCheckpoint, match="layer 2 of tensor rank 0 is missing"):
        deepspeed.read(saved, Options())
