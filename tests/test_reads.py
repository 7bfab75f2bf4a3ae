"""Read lists: a program loads what a checkpoint of any layout says, wherever its bytes lie."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
from emit_cases import module, small_plan
from handwritten import imported
from host_devices import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardwright as sw
from shardwright.checkpoint.boxes import Boxes, row_major
from shardwright.checkpoint.contents import WEIGHT, Array, Contents, Digest, Job, Key, Record
from shardwright.checkpoint.reads import write_reads

EMITTED = Path(__file__).resolve().parent.parent / "backends" / "emission" / "templates"


def cuts(size: int, numbers: list[int]) -> list[tuple[int, int]]:
    """A partition of a range, at some of the numbers."""
    return list(pairwise(sorted({0, size, *(n % size for n in numbers)})))


class Folder:
    """A checkpoint of raw files, as a reader would describe it."""

    def __init__(self, root: Path, job: Job | None = None) -> None:
        self.root, self.job = root, job or Job()
        self.records: list[Record] = []
        self.arrays: dict[Key, Array] = {}
        root.mkdir(exist_ok=True)

    def add(self, name: str, values: np.ndarray, numbers: list[int], turned: bool = False) -> None:  # type: ignore[type-arg]
        """Writes an array cut along its first dim, each piece a file; `turned`: transposed."""
        rows = []
        for begin, end in cuts(len(values), numbers):
            piece = values[begin:end]
            strides = row_major(piece.shape)
            if turned:
                strides = tuple(reversed(row_major(piece.shape[::-1])))
                piece = piece.T
            data = np.ascontiguousarray(piece).tobytes()
            file = f"{len(self.records)}.raw"
            (self.root / file).write_bytes(b"head" + data)
            self.records.append(Record(file, 4, len(data)))
            at = (begin,) + (0,) * (values.ndim - 1)
            rows.append((at, (end - begin, *values.shape[1:]), strides, len(self.records) - 1, 0))
        boxes = Boxes.of(rows, values.ndim)
        dtype = {4: "F32", 8: "F64"}[values.itemsize]
        self.arrays[WEIGHT, name] = Array(WEIGHT, name, values.shape, dtype, lambda: boxes)

    def contents(self) -> Contents:
        files = {path.name: path.stat().st_size for path in sorted(self.root.iterdir())}
        return Contents("raw", self.root, files, self.records, self.arrays, self.job)


@pytest.fixture(scope="module")
def plan() -> sw.Plan:
    return small_plan("llama", "dp=1,tp=1", 1, layers=2, precision="fp32", global_batch=4)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {n: p.detach().numpy() for n, p in module("llama", 2).named_parameters()}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_box_is_read_from_any_cut(
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    plan: sw.Plan,
    weights: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    root = tmp_path_factory.mktemp("cut")
    folder = Folder(root / "source")
    for name, values in weights.items():
        numbers = data.draw(st.lists(st.integers(0, 63), max_size=3))
        folder.add(name, values, numbers, turned=data.draw(st.booleans()))
    write_reads(plan, folder.contents(), folder.arrays, root)
    with imported(EMITTED, "reads") as program:
        name = data.draw(st.sampled_from(sorted(weights)))
        source = program.reads.Reads(root, [name])
        assert {other for other, _ in source.boxes} == {name}
        begin, end = zip(
            *(sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in weights[name].shape),
            strict=True,
        )
        sizes = [b - a for a, b in zip(begin, end, strict=True)]
        found, dtype = source.read(name, "weight", begin, sizes)
    wanted = weights[name][tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
    assert dtype == "F32"
    assert np.array_equal(found.view(np.float32), wanted)


def test_damage_in_a_box_that_is_read_whole_is_found(
    tmp_path: Path,
    plan: sw.Plan,
    weights: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    from isal.isal_zlib import crc32

    folder = Folder(tmp_path / "source")
    for name, values in weights.items():
        folder.add(name, values, [])
    whole = folder.contents()
    digests = []
    for record in whole.records:
        data = (whole.root / record.file).read_bytes()[4:]
        digests.append(replace(record, digest=Digest("crc32", f"{crc32(data):08x}")))
    write_reads(plan, replace(whole, records=digests), folder.arrays, tmp_path)
    last = whole.root / whole.records[-1].file
    name, values = list(weights.items())[-1]
    with imported(EMITTED, "reads") as program:
        source = program.reads.Reads(tmp_path)
        source.read(name, "weight", [0] * values.ndim, values.shape)
        damaged = bytearray(last.read_bytes())
        damaged[7] ^= 16
        last.write_bytes(damaged)
        with pytest.raises(SystemExit, match=f"{last}: damaged at byte 4"):
            source.read(name, "weight", [0] * values.ndim, values.shape)


def test_what_is_missing_or_of_another_shape_is_named(
    tmp_path: Path,
    plan: sw.Plan,
    weights: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    folder = Folder(tmp_path / "source")
    for name, values in weights.items():
        folder.add(name, values, [])
    contents = folder.contents()
    one = "model.layers.1.mlp.up_proj.weight"
    less = {key: array for key, array in folder.arrays.items() if key[1] != one}
    with pytest.raises(sw.InvalidInput, match=f"no weight of {one}"):
        write_reads(plan, contents, less, tmp_path)
    other = folder.arrays[WEIGHT, one]
    wrong = folder.arrays | {(WEIGHT, one): replace(other, shape=(1, *other.shape))}
    with pytest.raises(sw.InvalidInput, match=r"shape \(1, 64, 32\) in the checkpoint, \(64, 32\)"):
        write_reads(plan, contents, wrong, tmp_path)
    half = Boxes.of([((0, 0), (3, 32), (32, 1), 0, 0)], 2)
    part = folder.arrays | {(WEIGHT, one): replace(other, where=lambda: half)}
    with pytest.raises(sw.InvalidInput, match="hold 96 of 2048 elements"):
        write_reads(plan, contents, part, tmp_path)
    assert not (tmp_path / "reads.jsonl").exists()


@pytest.mark.parametrize("cut", [[], [5, 40]])
def test_copies_that_have_to_be_equal_are_compared(
    tmp_path: Path,
    plan: sw.Plan,
    weights: dict[str, np.ndarray],  # type: ignore[type-arg]
    cut: list[int],
) -> None:
    """A list names one copy of each element; a copy in other pieces that differs is named."""
    folder, again = Folder(tmp_path / "source"), Folder(tmp_path / "source")
    for name, values in weights.items():
        folder.add(name, values, [])
    one = "model.layers.1.mlp.up_proj.weight"
    again.records = folder.records
    again.add(one, weights[one], cut)
    both = [side.arrays[WEIGHT, one].where() for side in (folder, again)]
    copies = replace(
        folder.arrays[WEIGHT, one], where=lambda: Boxes.joined(both, 2), combine="equal"
    )
    arrays = folder.arrays | {(WEIGHT, one): copies}
    write_reads(plan, folder.contents(), arrays, tmp_path)
    lines = map(json.loads, (tmp_path / "reads.jsonl").read_text().splitlines()[1:])
    boxes = next(line["boxes"] for line in lines if line["name"] == one)
    assert sum(prod(box[3]) for box in boxes) == prod(weights[one].shape)
    last = tmp_path / "source" / folder.records[-1].file
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    with pytest.raises(
        sw.CorruptCheckpoint, match=rf"{last.name} hold different values of {one} \(weight\)"
    ):
        write_reads(plan, folder.contents(), arrays, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "layout"),
    [("torch", "dp=1,tp=1"), ("jax", "dp=1,tp=1"), ("jax", "tp=2,dp=2,zero=3"), ("jax", "pp=2")],
)
def test_a_run_starts_from_a_list_as_from_plain_weights(
    backend: str,
    layout: str,
    tmp_path: Path,
    weights: dict[str, np.ndarray],  # type: ignore[type-arg]
) -> None:
    folder = Folder(tmp_path / "source", Job(step=0, others={"train.seed": 3, "train.samples": 0}))
    for name, values in weights.items():
        folder.add(name, values, [5, 9], turned=name.endswith("up_proj.weight"))
    (tmp_path / "list").mkdir()
    ranks = prod(int(part[3:]) for part in layout.split(",") if not part.startswith("zero"))
    plan = small_plan("llama", layout, ranks, layers=2, precision="fp32", global_batch=4)
    write_reads(plan, folder.contents(), folder.arrays, tmp_path / "list")
    save_file(dict(module("llama", 2).named_parameters()), tmp_path / "model.safetensors")
    plan.emit(backend, tmp_path / "program")
    losses = []
    for source in (("--resume", "list"), ("--weights", "model.safetensors", "--seed", "3")):
        metrics = tmp_path / f"{source[0]}.jsonl"
        train = [sys.executable, "program/train.py", "--steps", "3", *source, "--metrics", metrics]
        subprocess.run(
            train,
            cwd=tmp_path,
            check=True,
            timeout=300,
            capture_output=True,
            env=environment(ranks),
        )
        losses.append([json.loads(line)["loss"] for line in metrics.read_text().splitlines()])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
