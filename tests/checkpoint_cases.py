"""Checkpoints of no format: arrays cut anyhow, their boxes anywhere in raw files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shardwright.checkpoint.boxes import Boxes
from shardwright.checkpoint.contents import Array, Contents, Digest, Given, Key, Record, Target
from shardwright.checkpoint.dtypes import as_numpy, itemsize
from shardwright.checkpoint.engine.digests import whole

Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]
Shape = tuple[int, ...]


@dataclass
class Side:
    """One side of a conversion: where the arrays of `tables` lie, and the records' sizes."""

    tables: dict[Key, tuple[Shape, str, list[Row]]]
    records: list[Record]
    files: dict[str, int]
    kinds: list[Any]

    def arrays(self) -> dict[Key, Array]:
        return {
            key: Array(*key, shape, dtype, partial(Boxes.of, tuple(rows), len(shape)))
            for key, (shape, dtype, rows) in self.tables.items()
        }

    def write(self, root: Path, values: dict[Key, np.ndarray], filler: int = 7) -> Contents:
        """Puts values where the boxes are; what is in no box is filler."""
        raw = {name: np.full(n, filler, np.uint8) for name, n in self.files.items()}
        for key, (_, dtype, rows) in self.tables.items():
            width = itemsize(dtype)
            for begin, size, stride, record, offset in rows:
                held = self.records[record]
                words = raw[held.file][held.offset : held.offset + held.nbytes]
                words = words[: held.nbytes // width * width].view(values[key].dtype)
                at = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
                view = np.lib.stride_tricks.as_strided(
                    words[offset:], size, [s * width for s in stride]
                )
                view[...] = values[key][at]
        root.mkdir(parents=True)
        for name, data in raw.items():
            (root / name).write_bytes(data.tobytes())
        records = [
            Record(
                r.file,
                r.offset,
                r.nbytes,
                Digest(kind, whole(kind, raw[r.file][r.offset : r.offset + r.nbytes]))
                if kind
                else None,
            )
            for r, kind in zip(self.records, self.kinds, strict=True)
        ]
        return Contents("raw", root, self.files, records, self.arrays())

    def target(self) -> Target:
        """Its last literal is the digests, one a line."""
        size = sum(len(self._line(k, Digest(k, whole(k, b"")) if k else None)) for k in self.kinds)
        files = {**self.files, "digests": size}

        def finish(digests: Sequence[Digest | None]) -> Sequence[Given]:
            text = "".join(map(self._line, self.kinds, digests))
            return [Given("digests", 0, text.encode())]

        return Target("raw", files, self.records, self.kinds, self.arrays(), [], finish)

    @staticmethod
    def _line(kind: str | None, digest: Digest | None) -> str:
        return f"{kind} {digest.value if digest else ''}\n"

    def read(self, root: Path) -> dict[Key, np.ndarray]:
        """The arrays as their boxes say, and a check of the digests beside them."""
        lines = (root / "digests").read_text().splitlines()
        for record, kind, line in zip(self.records, self.kinds, lines, strict=True):
            raw = (root / record.file).read_bytes()[record.offset :][: record.nbytes]
            assert len(raw) == record.nbytes
            assert line == f"{kind} {whole(kind, raw) if kind else ''}"
        found = {}
        for key, (shape, dtype, rows) in self.tables.items():
            width = itemsize(dtype)
            real = as_numpy(dtype)
            value = np.zeros(shape, real)
            for begin, size, stride, record, offset in rows:
                held = self.records[record]
                raw = np.fromfile(root / held.file, np.uint8)[held.offset :][: held.nbytes]
                words = raw[: held.nbytes // width * width].copy().view(real)
                at = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
                value[at] = np.lib.stride_tricks.as_strided(
                    words[offset:], size, [s * width for s in stride]
                )
            found[key] = value
        return found


@st.composite
def sides(
    draw: st.DrawFn,
    shapes: dict[Key, tuple[Shape, str]],
    kinds: Sequence[Any] = (None, "crc32", "xxh3", "sha256"),
    replicas: bool = False,
) -> Side:
    """Arrays cut along all dims at random places; boxes in records in any dim order, with gaps."""
    side = Side({}, [], {"a.bin": 0, "b.bin": 0}, [])
    for key, (shape, dtype) in shapes.items():
        width = itemsize(dtype)
        cuts = []
        for length in shape:
            inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=2)) if length else ()
            edges = sorted({0, length, *(c for c in inner if c < length)})
            cuts.append([(a, b - a) for a, b in pairwise(edges)])
        boxes: list[tuple[Shape, Shape]] = [((), ())]
        for dim in cuts:
            boxes = [((*b, at), (*s, n)) for b, s in boxes for at, n in dim]
        if replicas and boxes and draw(st.booleans()):
            boxes.append((tuple(0 for _ in shape), shape))  # all of it once more, differently cut
        rows: list[Row] = []
        together = draw(st.booleans())  # all boxes in one record, or one each
        record, at = -1, 0
        for begin, size in boxes:
            order = draw(st.permutations(range(len(shape))))
            stride, step = [0] * len(shape), 1
            for dim in reversed(order):
                stride[dim] = step
                step *= size[dim]
            gap = draw(st.integers(0, 3))
            if record < 0 or not together:
                file = draw(st.sampled_from(["a.bin", "b.bin"]))
                begin_at = -(-side.files[file] // 8) * 8
                record, at = len(side.records), 0
                side.records.append(Record(file, begin_at, 0))
                side.kinds.append(draw(st.sampled_from(list(kinds))))
            rows.append((begin, size, tuple(stride), record, at + gap))
            at += gap + prod(size)
            held = side.records[record]
            side.records[record] = Record(held.file, held.offset, at * width)
            side.files[held.file] = held.offset + at * width
        side.tables[key] = (shape, dtype, rows)
    return side


def values_of(shapes: dict[Key, tuple[Shape, str]], seed: int) -> dict[Key, np.ndarray]:
    """Any bit patterns for integers and finite numbers for floats."""
    random = np.random.default_rng(seed)
    return {
        key: random.integers(-1000, 1000, shape).astype(as_numpy(dtype))
        for key, (shape, dtype) in shapes.items()
    }
