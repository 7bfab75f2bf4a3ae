"""The engine moves what numpy would, whatever lies where; and loses nothing whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import Shape, Side, sides, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.checkpoint.boxes import Boxes, first_gap, without_repeats
from shardwright.checkpoint.contents import Array, Contents, Digest, Key, Record
from shardwright.checkpoint.dtypes import as_numpy
from shardwright.checkpoint.engine import DiskFull, Limits, Moved, execute, place
from shardwright.checkpoint.engine import files as engine_files
from shardwright.checkpoint.engine.directory import held
from shardwright.checkpoint.engine.files import BLOCK, Files, aligned_buffer
from shardwright.checkpoint.engine.tiles import runs_of
from shardwright.checkpoint.plan import (
    Joins,
    pieces,
    prove,
    prove_stored,
)
from shardwright.ir import CorruptCheckpoint, InvalidInput

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(["F32", "BF16", "U8", "I64"])
LIMITS = Limits(threads=2)


def move(source: Contents, side: Side, to: Path, **more: Any) -> Moved:
    target = side.target()
    prove_stored(target.arrays.values(), target.records)
    moved = pieces(source.arrays, target.arrays.values())
    prove(moved)
    at = place(to, source.root, more.pop("overwrite", False))
    return execute(source, moved, target, at, LIMITS, **more)


@st.composite
def conversions(draw: st.DrawFn) -> tuple[dict[Key, tuple[Shape, str]], Side, Side]:
    names = {("weight", "x"): (draw(shapes), draw(dtypes)), ("m", "y"): (draw(shapes), "F32")}
    return names, draw(sides(names, replicas=True)), draw(sides(names))


@given(conversions(), st.integers(0, 99), st.integers(3, 400))
@settings(max_examples=150)
def test_what_is_moved_is_what_numpy_rearranges(
    case: tuple[dict[Key, tuple[Shape, str]], Side, Side], seed: int, tile_bytes: int
) -> None:
    names, one, other = case
    values = values_of(names, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Tiles of a few elements, so that small arrays are many of them.
        patch.setattr(
            "shardwright.checkpoint.engine.run.Joins",
            lambda *kinds: Joins(*kinds, tile_bytes=tile_bytes),
        )
        patch.setattr("shardwright.checkpoint.engine.tiles.SMALLEST_PART", 16)
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(os, "fdatasync", lambda descriptor: None)
        source = one.write(Path(folder) / "source", values)
        move(source, other, Path(folder) / "target")
        assert sorted(p.name for p in Path(folder).iterdir()) == ["source", "target"]
        found = other.read(Path(folder) / "target")
    assert all(found[key].tobytes() == values[key].tobytes() for key in names)


@given(conversions(), st.integers(0, 99), st.data())
@settings(max_examples=60)
def test_a_flipped_bit_under_a_checksum_is_found(
    case: tuple[dict[Key, tuple[Shape, str]], Side, Side], seed: int, data: st.DataObject
) -> None:
    names, one, other = case
    under = [r for r, kind in zip(one.records, one.kinds, strict=True) if kind and r.nbytes]
    if not under:
        return
    record = data.draw(st.sampled_from(under))
    at = record.offset + data.draw(st.integers(0, record.nbytes - 1))
    with tempfile.TemporaryDirectory() as folder:
        source = one.write(Path(folder) / "source", values_of(names, seed))
        path = source.root / record.file
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        with pytest.raises(CorruptCheckpoint, match=record.file):
            move(source, other, Path(folder) / "target")
        assert not (Path(folder) / "target").exists()


@given(shapes, st.data())
def test_gaps_and_repeats_of_a_table_are_found(shape: Shape, data: st.DataObject) -> None:
    rows = []
    for record in range(data.draw(st.integers(0, 5))):
        begin = [data.draw(st.integers(0, max(0, n - 1))) for n in shape]
        size = [data.draw(st.integers(0, n - b)) for n, b in zip(shape, begin, strict=True)]
        rows.append((begin, size, [1] * len(shape), record, 0))
    table = Boxes.of(rows, len(shape))
    counts = np.zeros(shape, np.int64)
    own = np.zeros(shape, np.int64)
    for box, into in ((table, counts), (without_repeats(table), own)):
        for begin, size in zip(box.begin.tolist(), box.size.tolist(), strict=True):
            into[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))] += 1
    assert (own == (counts > 0)).all()
    gap = first_gap(table, shape)
    assert (gap is None) == bool((counts > 0).all())
    if gap is not None:
        assert (counts[tuple(slice(*pair) for pair in zip(*gap, strict=True))] == 0).all()
    array = Array("weight", "x", shape, "F32", lambda: table)
    if gap is not None:
        with pytest.raises(CorruptCheckpoint, match=r"x \(weight\).*none of the source"):
            prove(pieces({array.key: array}, [array]))
    else:
        prove(pieces({array.key: array}, [array]))


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_runs_visit_every_element_once(size: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(size))))
    stride, step = [0] * len(size), 1
    for dim in reversed(order):
        stride[dim] = step
        step = step * size[dim] + data.draw(st.integers(0, 2))
    runs = runs_of(size, stride)
    assert runs.dense
    outer = [range(size[d]) for d in runs.outer]
    starts = [
        sum(i * stride[d] for i, d in zip(at, runs.outer, strict=True))
        for at in np.ndindex(*(len(r) for r in outer))
    ]
    reached = sorted(s + k for s in starts for k in range(runs.span))
    index = np.indices(size).reshape(len(size), -1) if size else np.zeros((0, 1), int)
    assert reached == sorted((index * np.array(stride, int)[:, None]).sum(0).tolist())


def test_sums_and_means_of_copies(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts = random.standard_normal((3, 40)).astype(np.float32)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.bin").write_bytes(parts.tobytes())
    records = [Record("a.bin", 160 * k, 160) for k in range(3)]
    table = Boxes.of([((0,), (40,), (1,), k, 0) for k in range(3)], 1)
    for combine, expected in (("sum", parts[0] + parts[1] + parts[2]), ("mean", parts.mean(0))):
        array = Array("weight", "x", (40,), "F32", lambda: table, combine)
        source = Contents("raw", tmp_path / "source", {"a.bin": 480}, records, {array.key: array})
        side = Side(
            {array.key: ((40,), "F32", [((0,), (40,), (1,), 0, 0)])},
            [Record("a.bin", 0, 160)],
            {"a.bin": 160},
            [None],
        )
        move(source, side, tmp_path / combine)
        assert np.array_equal(side.read(tmp_path / combine)[array.key], expected)


def test_dtypes_are_cast_as_ml_dtypes_casts(tmp_path: Path) -> None:
    values = {("weight", "x"): np.random.default_rng(0).standard_normal((50, 3)).astype("f4")}
    row = ((0, 0), (50, 3), (3, 1), 0, 0)
    one = Side(
        {("weight", "x"): ((50, 3), "F32", [row])},
        [Record("a.bin", 0, 600)],
        {"a.bin": 600},
        [None],
    )
    other = Side(
        {("weight", "x"): ((50, 3), "BF16", [row])},
        [Record("a.bin", 0, 300)],
        {"a.bin": 300},
        ["crc32"],
    )
    move(one.write(tmp_path / "a", values), other, tmp_path / "b")
    found = other.read(tmp_path / "b")["weight", "x"]
    assert found.tobytes() == values["weight", "x"].astype(as_numpy("BF16")).tobytes()


# ------------------------------------------------------------------- whatever happens


def large(tmp_path: Path, count: int = 24) -> tuple[Contents, Side, dict[Key, np.ndarray]]:
    """Some 12 MB: rows in four files, to be put together column by column."""
    random = np.random.default_rng(1)
    keys = [("weight", f"w{k}") for k in range(count)]
    values = {key: random.standard_normal((128, 1000)).astype(np.float32) for key in keys}
    one, other = Side({}, [], {}, []), Side({}, [], {}, [])
    for number, key in enumerate(keys):
        rows = []
        for rank in range(4):
            file = f"rank{rank}.bin"
            rows.append(((32 * rank, 0), (32, 1000), (1000, 1), len(one.records), 0))
            one.records.append(Record(file, 128_000 * number, 128_000))
            one.files[file] = 128_000 * (number + 1)
            one.kinds.append("crc32")
        one.tables[key] = ((128, 1000), "F32", rows)
        rows = []
        for half in range(2):
            rows.append(((0, 500 * half), (128, 500), (500, 1), len(other.records), 0))
            other.records.append(Record(f"half{half}.bin", 256_000 * number, 256_000))
            other.files[f"half{half}.bin"] = 256_000 * (number + 1)
            other.kinds.append("crc32")
        other.tables[key] = ((128, 1000), "F32", rows)
    return one.write(tmp_path / "source", values), other, values


def test_an_error_midway_is_resumed_and_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, side, _ = large(tmp_path)
    whole = Path(tmp_path / "whole")
    move(source, side, whole)
    write, calls = engine_files.Files.write, []

    def full(self: Any, file: str, offset: int, data: Any) -> None:
        calls.append(file)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, file, offset, data)

    monkeypatch.setattr(engine_files.Files, "write", full)
    with pytest.raises(DiskFull, match="no space left"):
        move(source, side, tmp_path / "target")
    assert not (tmp_path / "target").exists() and (tmp_path / "target.partial").exists()
    monkeypatch.setattr(engine_files.Files, "write", write)
    found = move(source, side, tmp_path / "target")
    assert 0 < found.resumed_bytes < found.nbytes
    same(tmp_path / "target", whole)
    assert not list(tmp_path.glob("*partial")) and not list(tmp_path.glob(".*"))


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, side, _ = large(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match=r"1,024,\d+ bytes are needed, 1,000 are free"):
        move(source, side, tmp_path / "target")
    assert not (tmp_path / "target.partial").exists()


def test_a_changed_source_or_option_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, side, _ = large(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "shardwright.checkpoint.engine.directory.put_in_place",
            lambda at: (_ for _ in ()).throw(OSError(5, "broken")),
        )
        with pytest.raises(InvalidInput, match="broken"):
            move(source, side, tmp_path / "target")
    os.utime(source.root / "rank0.bin", (1, 1))
    found = move(source, side, tmp_path / "target")
    assert found.resumed_bytes == 0 and "started over" in found.notes[0]


def test_what_is_there_stays_until_the_end(tmp_path: Path) -> None:
    source, side, _ = large(tmp_path, 2)
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("old")
    with pytest.raises(InvalidInput, match="exists already"):
        move(source, side, target)
    assert (target / "mine").read_text() == "old"
    move(source, side, target, overwrite=True)
    assert not (target / "mine").exists() and (target / "half0.bin").exists()
    with pytest.raises(InvalidInput, match="inside the source"):
        place(source.root / "sub", source.root, False)


def test_two_conversions_to_one_target_do_not_mix(tmp_path: Path) -> None:
    source, side, _ = large(tmp_path, 2)
    target = tmp_path / "target"
    other = pytest.raises(InvalidInput, match="another process converts to it")
    with held(place(target, source.root, False)), other:
        move(source, side, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    move(source, side, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("name", ["../stolen", "/etc/passwd", "link"])
def test_paths_that_leave_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    source, side, _ = large(tmp_path, 1)
    (tmp_path / "stolen").write_bytes(bytes(128_000))
    os.symlink(tmp_path / "stolen", source.root / "link")
    evil = [Record(name, 0, 128_000), *source.records[1:]]
    changed = Contents("raw", source.root, source.files, evil, source.arrays)
    with pytest.raises(CorruptCheckpoint, match="not inside its directory"):
        move(changed, side, tmp_path / "target")


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    source, side, _ = large(tmp_path, 1)
    os.truncate(source.root / "rank2.bin", 1000)
    with pytest.raises(CorruptCheckpoint, match=r"rank2.bin: it ends at byte 1000"):
        move(source, side, tmp_path / "target")
    (source.root / "rank2.bin").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"rank2.bin: the file is missing"):
        move(source, side, tmp_path / "target")


KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from shardwright.checkpoint.engine import streaming
    streaming._FLUSH_BYTES = 1_000_000
    streaming.TASK_BYTES = 256_000
    import test_checkpoint_engine as tests
    from shardwright.checkpoint.contents import Contents
    import pickle
    source, side = pickle.load(open(sys.argv[2], "rb"))
    contents = Contents("raw", Path(source), *side[0], side[1].arrays())
    tests.move(contents, side[2], Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(
    tmp_path: Path, repository: Path
) -> None:
    import pickle

    source, side, _ = large(tmp_path)
    move(source, side, tmp_path / "whole")
    tables = Side({}, [], {}, [])
    for key, array in source.arrays.items():
        box = array.where()
        rows = [
            (tuple(b), tuple(s), tuple(t), int(r), int(o))
            for b, s, t, r, o in zip(
                box.begin.tolist(),
                box.size.tolist(),
                box.stride.tolist(),
                box.record,
                box.offset,
                strict=True,
            )
        ]
        tables.tables[key] = (array.shape, array.dtype, rows)
    given_to = tmp_path / "case"
    with open(given_to, "wb") as file:
        pickle.dump((str(source.root), ((source.files, source.records), tables, side)), file)
    random = np.random.default_rng(3)
    script = textwrap.dedent(KILLED)
    kills = 0
    for attempt in range(8):
        target = tmp_path / f"target{attempt}"
        for last in (False, True):
            run = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    script,
                    str(repository / "tests"),
                    str(given_to),
                    str(target),
                ]
            )
            if not last:
                partial = target.with_name(target.name + ".partial")
                while run.poll() is None and not partial.exists():
                    os.sched_yield()
                try:
                    run.wait(timeout=float(random.uniform(0, 0.15)))
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGKILL)
                    kills += 1
                run.wait()
                journal = tmp_path / f".{target.name}.conversion" / "journal.0"
                if target.exists() and not journal.exists():
                    break  # all was done before the kill: nothing is left to resume
            else:
                assert run.wait() == 0
        same(target, tmp_path / "whole")
        assert not target.with_name(target.name + ".partial").exists()
    assert kills >= 3


def same(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_digests_agree_with_their_libraries() -> None:
    assert Digest("crc32", "cbf43926") == Digest("crc32", engine_digest("crc32"))
    assert engine_digest("sha256").startswith("15e2b0d3c338")


def engine_digest(kind: Any) -> str:
    from shardwright.checkpoint.engine.digests import whole

    return whole(kind, b"123456789")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_long_writes_past_the_page_cache_leave_their_neighbours_alone(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pieces of a file in any order, from memory that begins anywhere."""
    root = tmp_path_factory.mktemp("direct")
    whole = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(1, len(whole) - 1), max_size=5))})
    with (root / "file").open("wb") as file:
        file.truncate(len(whole))
    files = Files(root, os.O_RDWR)
    for begin, end in data.draw(st.permutations(list(pairwise(cuts)))):
        memory = aligned_buffer(end - begin, data.draw(st.sampled_from([begin % BLOCK, 0, 13])))
        memory[:] = whole[begin:end]
        files.write("file", begin, memory)
    files.close()
    assert (root / "file").read_bytes() == whole.tobytes()
