"""Torch's distributed checkpoints: FSDP1, FSDP2, FSDP2 with tensor parallelism, both ways."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_on_cpu
import torch
import torch.distributed.checkpoint as torch_dcp
from checkpoint_mover import gathered, wanted_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_on_cpu import states
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from shardwright.checkpoint import convert
from shardwright.checkpoint.contents import Job, Wanted
from shardwright.checkpoint.formats import Options, dcp
from shardwright.checkpoint.formats.dcp.metadata import load, parse
from shardwright.ir import CorruptCheckpoint

run = partial(ranks_on_cpu.run, Path(__file__).with_name("dcp_worker.py"))

CASES: dict[str, dict[str, Any]] = {
    "fsdp2": dict(ranks=3),
    "fsdp2-tp": dict(ranks=4, tp=2),
    "fsdp2-flattened-optimizer": dict(ranks=2, flatten=True),
    "fsdp1": dict(ranks=2, fsdp1=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_reads_what_training_saves(case: str, tmp_path: Path) -> None:
    run(tmp_path / "out", save=tmp_path / "saved", **CASES[case])
    contents = dcp.read(tmp_path / "saved", Options())
    found, held = gathered(contents), states(tmp_path / "out")
    assert contents.job.step == 2 and contents.job.others == {"seen": 12}
    (group,) = contents.job.param_groups
    assert group["lr"] == 0.01 and len(group["params"]) == 6
    assert found.keys() == held.keys() and len(held) == 18
    for key, array in held.items():
        assert np.array_equal(found[key], array), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "after"),
    [({"dp": 5}, dict(ranks=2)), ({"dp": 2, "tp": 2}, dict(ranks=4, tp=2))],
)
def test_training_goes_on_from_what_is_written(
    mesh: dict[str, int], after: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(tmp_path / "o1", steps=5, ranks=2)
    run(tmp_path / "o2", save=tmp_path / "saved", ranks=2)
    contents = dcp.read(tmp_path / "saved", Options())
    splits = {"0.weight": (("tp", 0),), "2.weight": (("tp", 1),)} if "tp" in mesh else {}
    target = dcp.target(wanted_of(contents, splits), contents.job, Options(mesh=mesh))
    write(target, gathered(contents), tmp_path / "moved")
    resumed = run(tmp_path / "o3", load=tmp_path / "moved", first=2, steps=3, **after)
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mesh_and_dtype_there_and_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Odd sizes, more ranks than rows, scalars, factors split in the middle: torch reads all."""
    root = tmp_path_factory.mktemp("dcp")
    mesh = {"dp": data.draw(st.integers(1, 4)), "tp": data.draw(st.integers(1, 3))}
    wanted, arrays = [], {}
    for k in range(data.draw(st.integers(1, 3))):
        sizes = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
        fused = len(sizes) > 1 and data.draw(st.booleans())
        dims = ((0, 1), *((d,) for d in range(2, len(sizes)))) if fused else tuple(
            (d,) for d in range(len(sizes))
        )  # fmt: skip
        shape = tuple(int(np.prod([sizes[f] for f in members])) for members in dims)
        factor = data.draw(st.integers(0, len(sizes) - 1)) if sizes else None
        splits = (("tp", factor),) if factor is not None and data.draw(st.booleans()) else ()
        dtype = data.draw(st.sampled_from(["F32", "BF16", "F64"]))
        wanted.append(Wanted("weight", f"w{k}", shape, dtype, dims, sizes, splits))
        arrays["weight", f"w{k}"] = np.arange(int(np.prod(shape))).reshape(shape) + 0.5
    job = Job(others={"more": {"of": [1, None], "it": {"$tuple": [1, 2]}}})
    write(dcp.target(wanted, job, Options(mesh=mesh)), arrays, root / "a")
    contents = dcp.read(root / "a", Options())
    assert contents.job == job
    found = gathered(contents)
    dcp_to_torch_save(root / "a", root / "whole.pt")
    whole = torch.load(root / "whole.pt", weights_only=False)
    assert whole["more"] == {"of": [1, None], "it": (1, 2)}
    for one in wanted:
        expected = arrays[one.key].astype(found[one.key].dtype)
        assert np.array_equal(found[one.key], expected)
        assert np.array_equal(whole["model"][one.name].double().numpy(), expected.astype(float))
    shutil.rmtree(root)


def emitted(folder: Path, step: int = 7) -> dict[str, torch.Tensor]:
    """What the programs that we emit save (backends/to_torch/templates/checkpoint.py)."""
    torch.manual_seed(step)
    state = {"model.state.w": torch.randn(5, 3), "lm_head.weight": torch.randn(2)}
    for key in ("exp_avg", "exp_avg_sq"):
        state |= {f"optimizer.{key}.{n}": torch.randn_like(t) for n, t in list(state.items())[:2]}
    state |= {f"train.{k}": torch.tensor(v) for k, v in dict(step=step, samples=70, seed=3).items()}
    torch_dcp.save(state, checkpoint_id=folder, no_dist=True)
    return state


def test_our_own_programs_checkpoints(tmp_path: Path) -> None:
    state = emitted(tmp_path / "step-7")
    contents = dcp.read(tmp_path / "step-7", Options())
    assert contents.job.step == 7
    assert {key for key in contents.arrays if key[0] == "weight"} == {
        ("weight", "model.state.w"), ("weight", "lm_head.weight"),
    }  # fmt: skip
    options = Options(mesh={"dp": 2}, flags={"names": "emitted"})
    target = dcp.target(wanted_of(contents), contents.job, options)
    write(target, gathered(contents), tmp_path / "moved")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch_dcp.load(loaded, checkpoint_id=tmp_path / "moved", no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_tied_weights_are_stored_once_and_found_twice(tmp_path: Path) -> None:
    wanted = [Wanted("weight", "emb.w", (6, 2), "F32", ((0,), (1,)), (6, 2))]
    arrays = {("weight", "emb.w"): np.arange(12.0).reshape(6, 2)}
    job = Job(others={"shared_params": {"head.w": "emb.w"}})
    write(dcp.target(wanted, job, Options(mesh={"dp": 2})), arrays, tmp_path / "a")
    loaded = {"model": {name: torch.zeros(6, 2) for name in ("emb.w", "head.w")}}
    torch_dcp.load(loaded, checkpoint_id=tmp_path / "a", no_dist=True)
    for tensor in loaded["model"].values():
        assert np.array_equal(tensor.numpy(), arrays["weight", "emb.w"])
    contents = dcp.read(tmp_path / "a", Options())
    assert list(contents.arrays) == [("weight", "emb.w")] and contents.job == job


def test_safetensors_serialisation_is_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": {"text": "x"}}
    writer = torch_dcp.FileSystemWriter(
        tmp_path / "s", serialization_format=SerializationFormat.SAFETENSORS
    )
    torch_dcp.save(state, storage_writer=writer, no_dist=True)
    contents = dcp.read(tmp_path / "s", Options())
    found = gathered(contents)
    assert np.array_equal(found["weight", "a"], state["a"].numpy())
    assert np.array_equal(found["buffer", "b"], state["b"].numpy())
    assert contents.job.others == {"c": {"text": "x"}}
    (data,) = (tmp_path / "s").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"{data.name}: . reaches beyond"):
        dcp.read(tmp_path / "s", Options())


def test_damage_is_named(tmp_path: Path) -> None:
    emitted(tmp_path / "good")
    (data,) = (tmp_path / "good").glob("*.distcp")
    bad = tmp_path / "bad"

    def read(file: str, content: bytes | None) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path / "good", bad)
        if content is None:
            (bad / file).unlink()
        else:
            (bad / file).write_bytes(content)
        dcp.read(bad, Options())

    whole = data.read_bytes()
    index = (tmp_path / "good" / ".metadata").read_bytes()
    for file, content, said in [
        (data.name, None, f"{data.name}: missing"),
        (data.name, whole[:-1], f"{data.name}: .*accounts for"),
        (data.name, whole + b"\0", f"{data.name}: .*another save"),
        (".metadata", index[:-10], r"\.metadata: its pickle is damaged"),
        (".metadata", index.replace(data.name.encode(), b"../abc.distc"), "outside of it"),
    ]:
        with pytest.raises(CorruptCheckpoint, match=said):
            read(file, content)
    # The index of one save over the data of another of other shapes.
    torch_dcp.save({"model.state.w": torch.ones(4000)}, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.raises(CorruptCheckpoint, match=f"{data.name}"):
        read(data.name, (tmp_path / "x" / data.name).read_bytes())


def _ours(folder: Path, seed: int, ranks: int = 2) -> None:
    """Two weights and their moments, of shapes that do not depend on the seed."""
    generator = np.random.default_rng(seed)
    wanted, arrays = [], {}
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        for name, rows in (("a.w", 5), ("b.w", 2000)):
            one = Wanted(state, name, (rows, 3), "F32", ((0,), (1,)), (rows, 3))
            wanted.append(one)
            arrays[one.key] = generator.random((rows, 3), np.float32)
    write(dcp.target(wanted, Job(step=3), Options(mesh={"dp": ranks})), arrays, folder)


def test_every_flipped_bit_of_our_index_is_found(tmp_path: Path) -> None:
    """It has a checksum, which torch's has not; and cut off anywhere it is refused."""
    _ours(tmp_path / "a", 0, ranks=1)
    index = (tmp_path / "a" / ".metadata").read_bytes()
    assert len(parse(index, "index").tensors) == 8  # with the steps
    for at in range(len(index)):
        for bit in range(8):
            changed = bytearray(index)
            changed[at] ^= 1 << bit
            with pytest.raises(CorruptCheckpoint, match="index"):
                parse(bytes(changed), "index")
        with pytest.raises(CorruptCheckpoint, match="index"):
            parse(index[:at], "index")


def test_data_of_another_save_of_equal_shapes_are_refused(tmp_path: Path) -> None:
    """Our index knows the directories of its zips, and so all their CRCs."""
    _ours(tmp_path / "a", 0)
    _ours(tmp_path / "b", 1)
    assert dcp.read(tmp_path / "a", Options()).job.step == 3
    for name in ("__0_0.distcp", "__1_0.distcp"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        shutil.copy(tmp_path / "b" / name, tmp_path / name / name)
        with pytest.raises(CorruptCheckpoint, match=f"{name}: the item at byte"):
            dcp.read(tmp_path / name, Options())


def test_bytes_between_items_are_padding(tmp_path: Path) -> None:
    _ours(tmp_path / "a", 0)
    data = tmp_path / "a" / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    items = sorted(
        {(i.offset, i.nbytes) for i in load(tmp_path / "a").items if i.file == data.name}
    )
    gaps = [at for begin, n in items[:-1] for at in range(begin + n, -(-(begin + n) // 64) * 64)]
    assert gaps
    for at in (gaps[0], gaps[-1]):
        data.write_bytes(raw[:at] + b"\x10" + raw[at + 1 :])
        with pytest.raises(CorruptCheckpoint, match=f"{data.name}: bytes .*no item"):
            dcp.read(tmp_path / "a", Options())


def test_damage_in_what_is_left_out_is_found(tmp_path: Path) -> None:
    """A conversion of the weights checks the moments beside them in the same file."""
    _ours(tmp_path / "a", 0)
    contents = dcp.read(tmp_path / "a", Options())
    boxes = contents.arrays["exp_avg", "b.w"].where()
    place = contents.records[int(boxes.record[0])]
    path = tmp_path / "a" / place.file
    raw = bytearray(path.read_bytes())
    raw[place.offset + 100] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=f"{place.file}: bytes {place.offset} .*crc32"):
        convert(tmp_path / "a", tmp_path / "out", "safetensors", states=["weight"])
    assert not (tmp_path / "out").exists()
