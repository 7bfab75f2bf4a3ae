"""Manifests of a model of a trillion parameters on ten thousand ranks, for `convert.py`.

Tables only: no file exists. Weights are in bf16 per (tp, pp) rank, master weights and both moments
in ZeRO-1's flat buffers, cut evenly over dp wherever that falls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import prod

import numpy as np

from shardwright.checkpoint.arrangement import Arranged, arrange
from shardwright.checkpoint.boxes import Boxes, row_major
from shardwright.checkpoint.contents import Array, Key, Record
from shardwright.checkpoint.factor_boxes import Split, shard
from shardwright.checkpoint.notation import Arrangement
from shardwright.checkpoint.plan import Joins, pieces, prove, prove_stored

LAYERS, HIDDEN, HEADS, VOCABULARY = 128, 25600, 160, 51200
OPTIMIZER = ("master", "exp_avg", "exp_avg_sq")

Kind = tuple[Arranged, int | None]
"""How a stored tensor is made of logical ones, and the factor that tp splits (None: copies)."""


def kinds() -> dict[str, Kind]:
    """The tensors of a layer, and of both ends, by what their names end in."""
    width = HIDDEN // HEADS

    def made(stored: str, parts: dict[str, tuple[str, str]], **sizes: int) -> Arranged:
        return arrange(Arrangement.parse(stored, parts), sizes)

    fused = made(
        "(g [q k v] d) h",
        {name: (f"{name}_proj.weight", "(g d) h") for name in "qkv"},
        g=HEADS, d=width, h=HIDDEN,
    )  # fmt: skip
    return {
        "qkv": (fused, 0),
        "o": (made("o i", {"": ("o_proj.weight", "o i")}, o=HIDDEN, i=HIDDEN), 1),
        "up": (made("f h", {"": ("up_proj.weight", "f h")}, f=4 * HIDDEN, h=HIDDEN), 0),
        "down": (made("h f", {"": ("down_proj.weight", "h f")}, f=4 * HIDDEN, h=HIDDEN), 1),
        "norm1": (made("h", {"": ("norm1.weight", "h")}, h=HIDDEN), None),
        "norm2": (made("h", {"": ("norm2.weight", "h")}, h=HIDDEN), None),
    }


def stages(pp: int) -> Iterator[list[tuple[str, Kind]]]:
    """The stored tensors of every stage, by name."""
    of_layer = kinds()
    ends = arrange(
        Arrangement.parse("v h", {"": ("weight", "v h")}), {"v": VOCABULARY, "h": HIDDEN}
    )
    each = LAYERS // pp
    for stage in range(pp):
        found: list[tuple[str, Kind]] = [("embedding.", (ends, 0))] if stage == 0 else []
        for layer in range(stage * each, (stage + 1) * each):
            found += [(f"layers.{layer}.", kind) for kind in of_layer.values()]
        yield found + ([("head.", (ends, 0))] if stage == pp - 1 else [])


class Tables:
    """Boxes by logical tensor: weights whole, optimizer states in flat buffers."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.weights: dict[str, list[Boxes]] = {}
        self.flat: dict[str, list[Boxes]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(
        self, into: dict[str, list[Boxes]], name: str, arranged: Arranged, table: Boxes
    ) -> None:
        for logical, boxes in arranged.logical(table).items():
            into.setdefault(name + logical, []).append(boxes)
        for part in arranged.arrangement.parts:
            self.shapes[name + part.name] = arranged.part_shape(part)

    def arrays(self) -> dict[Key, Array]:
        found: dict[Key, Array] = {}
        for name, shape in self.shapes.items():
            for state in ("weight", *OPTIMIZER):
                tables = self.weights[name] if state == "weight" else self.flat[name]
                shift = max(0, OPTIMIZER.index(state)) if state in OPTIMIZER else 0
                dtype = "BF16" if state == "weight" else "F32"

                def where(t: list[Boxes] = tables, k: int = shift, n: int = len(shape)) -> Boxes:
                    one = Boxes.joined(t, n)
                    return Boxes(one.begin, one.size, one.stride, one.record + k, one.offset)

                found[state, name] = Array(state, name, shape, dtype, where)
        return found


def megatron(tp: int, pp: int, dp: int) -> Tables:
    """tp · pp · dp ranks with ZeRO-1."""
    made = Tables()
    for stage, tensors in enumerate(stages(pp)):
        whole: list[list[Boxes]] = [[] for _ in tensors]
        flat: list[list[Boxes]] = [[] for _ in tensors]
        for rank in range(tp):
            sizes = [
                prod(arranged.shape) // (1 if split is None else tp)
                for _, (arranged, split) in tensors
            ]
            slice_ = -(-sum(sizes) // (2 * dp)) * 2
            first = len(made.records)
            made.records.append(Record(f"model{rank}.{stage}", 0, 2 * sum(sizes)))
            made.records += [
                Record(f"zero{r}.{rank}.{stage}.{k}", 0, 4 * slice_)
                for r in range(dp)
                for k in range(len(OPTIMIZER))
            ]
            at = 0
            for number, ((_, (arranged, split)), size) in enumerate(
                zip(tensors, sizes, strict=True)
            ):
                dims, factors = arranged.columns
                splits = [] if split is None else [Split(split, tp, rank)]
                whole[number].append(shard(dims, factors, splits, first, at))
                flat[number] += [
                    shard(
                        dims,
                        factors,
                        splits,
                        first + 1 + r * len(OPTIMIZER),
                        max(0, at - r * slice_),
                        (max(0, r * slice_ - at), min(size, (r + 1) * slice_ - at)),
                    )
                    for r in range(at // slice_, (at + size - 1) // slice_ + 1)
                ]
                at += size
        # As a layout reads: the shards of all ranks of a stored tensor, then what they hold.
        for (name, (arranged, _)), weights, parts in zip(tensors, whole, flat, strict=True):
            dims = len(arranged.columns[0])
            made.add(made.weights, name, arranged, Boxes.joined(weights, dims))
            made.add(made.flat, name, arranged, Boxes.joined(parts, dims))
    return made


def rows(shapes: dict[str, tuple[int, ...]], ranks: int) -> tuple[dict[Key, Array], list[Record]]:
    """Every tensor cut along dim 0, one behind the other in a record per rank and state."""
    found: dict[Key, Array] = {}
    states = ("weight", *OPTIMIZER)
    at = 0
    for name, shape in shapes.items():
        each = -(-shape[0] // ranks)
        inner = prod(shape[1:])
        count = -(-shape[0] // each)
        begin = np.zeros((count, len(shape)), np.int64)
        begin[:, 0] = np.arange(0, shape[0], each)
        size = np.tile(np.array(shape), (count, 1))
        size[:, 0] = np.minimum(each, shape[0] - begin[:, 0])
        stride = np.tile(np.array(row_major(shape)), (count, 1))
        table = Boxes(begin, size, stride, len(states) * np.arange(count), np.full(count, at))
        for number, state in enumerate(states):

            def where(t: Boxes = table, k: int = number) -> Boxes:
                return Boxes(t.begin, t.size, t.stride, t.record + k, t.offset)

            dtype = "BF16" if state == "weight" else "F32"
            found[state, name] = Array(state, name, shape, dtype, where)
        at += each * inner
    widths = (2, 4, 4, 4)
    records = [
        Record(f"{r}.{s}", 0, at * w)
        for r in range(ranks)
        for s, w in zip(states, widths, strict=True)
    ]
    return found, records


def plan_case(case: str) -> tuple[str, str]:
    """Plans a conversion; what it was, and what it took."""
    begun = time.perf_counter()
    one = megatron(8, 16, 80)
    source = one.arrays()
    if case == "megatron":
        other = megatron(16, 8, 64)
        target, what = other.arrays(), "tp8 pp16 dp80 to tp16 pp8 dp64, ZeRO-1"
        records = other.records
    else:
        target, records = rows(one.shapes, 8192)
        what = "tp8 pp16 dp80, ZeRO-1, to rows over 8,192 ranks"
    built = time.perf_counter()
    moved = pieces(source, target.values())
    prove(moved)
    prove_stored(target.values(), records)
    proved = time.perf_counter()
    sources: list[None] = [None] * len(one.records)
    targets: list[None] = [None] * len(records)
    tiles = reads = writes = 0
    joins = Joins(sources, targets, 32 << 20)
    for piece in moved:
        joined = joins.join(piece)
        tiles += len(joined)
        reads += len(joined.reads)
        writes += len(joined.writes)
    done = time.perf_counter()
    parameters = sum(prod(shape) for shape in one.shapes.values())
    return (
        f"{parameters / 1e12:.2f} T parameters, {what}",
        f"coverage of {len(moved):,} tensors proved in {proved - built:.1f} s, {tiles:,} tiles, "
        f"{reads:,} reads, {writes:,} writes in {done - proved:.1f} s "
        f"(manifests {built - begun:.1f} s)",
    )
