"""How well a few probes predict a collective's curve, on published measurements.

    python benchmarks/collective_curves.py [--curves FILE]

Per curve, sizes from 1 MiB: 8 sizes in equal ratios are probes and the rest are predicted; then
with the up to 4 more that `next_size` asks for, and, at the same cost as the 8, with 6 and the 2
it asks for. Errors are over sizes that were not probed; "- (0)" where none are left, or where there
is nothing to predict with. Beside them through the same 8 probes: lines between logarithms, and one
latency and bandwidth; and without probes: PyTorch DTensor's cost, the nominal bandwidth, this
package's model of the preset, and the curve of the nearest other group of the same devices. `left
out` predicts each inner size from all others.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from shardwright.costmodel.cluster import Cluster
from shardwright.costmodel.collectives import collective
from shardwright.costmodel.curves import CollectiveKind, Curve, Reading
from shardwright.costmodel.groups import Group
from shardwright.costmodel.probe_sizes import next_size, spread_sizes
from shardwright.ir.errors import InvalidInput

DEFAULT = Path(__file__).parents[2] / "shared/data/allreduce_curves.csv"
FROM_BYTES = 2**20
PROBES = 8
MORE_PROBES = 4
FEWER_PROBES = 6
COLUMNS = ("gpu", "nodes", "gpus", "collective", "bytes", "time_us")
Key = tuple[str, int, int, CollectiveKind, str]
Errors = list[float]


@dataclass(frozen=True)
class Measured:
    """One published curve, from 1 MiB on."""

    gpu: str
    nodes: int
    gpus: int
    curve: Curve

    @property
    def time_at(self) -> dict[float, float]:
        """Seconds by bytes."""
        return dict(zip(self.curve.bytes, self.curve.seconds, strict=True))


def read(path: Path) -> list[Measured]:
    """The curves of a CSV; raises InvalidInput naming file, line and column."""
    points: dict[Key, dict[float, float]] = defaultdict(dict)
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InvalidInput(f"{path}: columns {', '.join(missing)} are missing")
            for row in reader:
                size, time_s, key = _point(row, f"{path}, line {reader.line_num}")
                if size >= FROM_BYTES:
                    points[key][size] = time_s
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    found = []
    for (gpu, nodes, gpus, kind, source), times in points.items():
        if len(times) < 3:
            print(f"{gpu} {nodes}x{gpus // nodes} {kind}: fewer than 3 sizes, left out")
            continue
        sizes = tuple(sorted(times))
        curve = Curve(
            collective=kind,
            shape=(gpus // nodes, nodes),
            bytes=sizes,
            seconds=tuple(times[size] for size in sizes),
            source=source,
        )
        found.append(Measured(gpu, nodes, gpus, curve))
    return found


def _point(row: Mapping[str, str], where: str) -> tuple[float, float, Key]:
    kind = row["collective"].replace("-", "_")
    if kind not in get_args(CollectiveKind):
        raise InvalidInput(f"{where}: collective is {row['collective']!r}")
    try:
        size, time_s = float(row["bytes"]), float(row["time_us"]) * 1e-6
        nodes, gpus = int(row["nodes"]), int(row["gpus"])
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{where}: {error}") from None
    if size <= 0 or time_s <= 0 or nodes < 1 or gpus % nodes or gpus < 2:
        raise InvalidInput(
            f"{where}: {nodes} nodes, {gpus} gpus, {size:g} bytes, {time_s:g} s: expected sizes "
            "and times above 0, 2 or more gpus, as many on each node"
        )
    return size, time_s, (row["gpu"], nodes, gpus, kind, row.get("source") or "")


def probed(measured: Measured, first: int, more: int) -> tuple[float, ...]:
    """Sizes after `first` spread probes and up to `more` placed ones."""
    times = measured.time_at
    sizes = spread_sizes(tuple(times), first)
    for _ in range(more):
        size = next_size(sizes, [times[s] for s in sizes], tuple(times))
        if size is None:
            break
        sizes = tuple(sorted((*sizes, size)))
    return sizes


def errors(measured: Measured, sizes: Sequence[float], predict: Callable[[float], float]) -> Errors:
    """Relative errors at the sizes that are not among `sizes`."""
    return [abs(predict(s) / t - 1) for s, t in measured.time_at.items() if s not in sizes]


def read_through(measured: Measured, sizes: tuple[float, ...]) -> Errors:
    """Errors of the curve that has been measured at these sizes only."""
    times = measured.time_at
    return errors(measured, sizes, Reading.of(sizes, tuple(times[s] for s in sizes)).at)


def between_logarithms(measured: Measured, sizes: tuple[float, ...]) -> Errors:
    """Errors of a line between the logarithms of neighbours."""
    x, y = np.log(sizes), np.log([measured.time_at[s] for s in sizes])
    return errors(measured, sizes, lambda s: float(np.exp(np.interp(np.log(s), x, y))))


def one_line(measured: Measured, sizes: tuple[float, ...]) -> Errors:
    """Errors of one latency and bandwidth: least squares of the relative error."""
    times = np.array([measured.time_at[s] for s in sizes])
    terms = np.stack([np.ones(len(sizes)), np.array(sizes)], axis=1) / times[:, None]
    latency_s, s_per_byte = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)[0]
    return errors(measured, sizes, lambda s: float(latency_s + s_per_byte * s))


def left_out(measured: Measured) -> Errors:
    """Errors at each inner size, from all the others."""
    inner = measured.curve.bytes[1:-1]
    return [
        error
        for size in inner
        for error in read_through(measured, tuple(s for s in measured.curve.bytes if s != size))
    ]


def pytorch(measured: Measured) -> Errors:
    """Errors of torch.distributed.tensor's own cost functions; none without torch or for kinds it
    has none for. Constants of `MeshTopoInfo.build_from_mesh`: 87.7 GB/s and 0.6 us inside a node,
    0.22 of it and 2.7 us across."""
    try:
        from torch.distributed.tensor import _collective_utils as torch_costs
    except ImportError:
        return []
    name = {
        "all_reduce": "allreduce_cost",
        "all_gather": "allgather_cost",
        "reduce_scatter": "reduce_scatter_cost",
    }.get(measured.curve.collective)
    if name is None:
        return []
    across = measured.nodes > 1
    info = torch_costs.MeshTopoInfo(
        None,  # type: ignore[arg-type]  # the costs read the lists only
        [measured.gpus],
        [87.7 * (0.22 if across else 1)],
        [2.7 if across else 0.6],
    )
    cost = getattr(torch_costs, name)
    return errors(measured, (), lambda s: float(cost(s / 2**30, info, 0)) * 1e-6)


def cluster_of(measured: Measured) -> Cluster | None:
    """The preset of the device (the first whose name begins with it), if there is one.

    One node is whole, and the group the first of its devices; of several, those of the group.
    """
    name = next((n for n in Cluster.preset_names() if n.startswith(measured.gpu.lower())), None)
    if name is None:
        return None
    unmeasured: dict[str, object] = {"curves": ()}  # presets carry these very curves
    if measured.nodes > 1:
        found = Cluster.preset(name, measured.nodes, measured.gpus // measured.nodes)
        return found.model_copy(update=unmeasured)
    whole = Cluster.preset(name).model_copy(update=unmeasured)
    return whole if measured.gpus <= whole.world_size else None


def nominal(measured: Measured) -> Errors:
    """Errors of the bytes of the collective over the data sheet's bandwidth, no latency."""
    cluster = cluster_of(measured)
    if cluster is None:
        return []
    level = cluster.levels[0 if measured.nodes == 1 else -1]
    rate = level.bandwidth_bytes_per_s
    if measured.nodes > 1:
        rate = min(rate * measured.gpus / measured.nodes, cluster.levels[0].bandwidth_bytes_per_s)
    times = 2 if measured.curve.collective == "all_reduce" else 1
    factor = times * (measured.gpus - 1) / measured.gpus
    return errors(measured, (), lambda s: factor * s / rate)


def predicted(measured: Measured, curves: Sequence[Curve]) -> Errors:
    """Errors of `collective` on the preset with these curves."""
    cluster = cluster_of(measured)
    if cluster is None:
        return []
    known = cluster.with_curves(curves)
    kind, group = measured.curve.collective, Group(measured.gpus)
    if curves and collective(known, kind, FROM_BYTES, group).source == "model":
        return []
    return errors(measured, (), lambda s: collective(known, kind, s, group).seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--curves", type=Path, default=DEFAULT, help="CSV of measured curves")
    try:
        every = read(parser.parse_args(arguments).curves)
        if not every:
            raise InvalidInput("no curve with 3 or more sizes from 1 MiB on")
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    columns: dict[str, Callable[[Measured], Errors]] = {
        f"{PROBES} probes": lambda m: read_through(m, probed(m, PROBES, 0)),
        f"{PROBES}+{MORE_PROBES} placed": lambda m: read_through(m, probed(m, PROBES, MORE_PROBES)),
        f"{FEWER_PROBES}+{PROBES - FEWER_PROBES} placed": lambda m: read_through(
            m, probed(m, FEWER_PROBES, PROBES - FEWER_PROBES)
        ),
        "left out": left_out,
        "log-log": lambda m: between_logarithms(m, probed(m, PROBES, 0)),
        "α-β line": lambda m: one_line(m, probed(m, PROBES, 0)),
        "PyTorch": pytorch,
        "nominal": nominal,
        "model": lambda m: predicted(m, ()),
        "nearest group": lambda m: predicted(m, _others(m, every)),
    }
    table = Table(title="median error in %, (sizes predicted)")
    for name in ("curve", "sizes", *columns):
        table.add_column(name, justify="left" if name == "curve" else "right", no_wrap=True)
    by_gpu: dict[str, list[tuple[Measured, list[Errors]]]] = defaultdict(list)
    for measured in every:
        by_gpu[measured.gpu].append((measured, [column(measured) for column in columns.values()]))
    for gpu, rows in by_gpu.items():
        for measured, found in rows:
            curve = measured.curve
            name = f"{gpu} {measured.nodes}x{measured.gpus // measured.nodes} {curve.collective}"
            table.add_row(name, str(len(curve.bytes)), *map(_cell, found))
        pooled = [[e for _, found in rows for e in found[i]] for i in range(len(columns))]
        sizes = sum(len(measured.curve.bytes) for measured, _ in rows)
        table.add_row(f"{gpu}, all", str(sizes), *map(_cell, pooled), style="bold")
        table.add_section()
    Console(width=max(160, Console().width)).print(table)
    return 0


def _others(measured: Measured, every: Sequence[Measured]) -> list[Curve]:
    """Curves of the same devices, in other groups."""
    return [
        other.curve
        for other in every
        if (other.gpu, other.nodes) == (measured.gpu, measured.nodes)
        and other.gpus != measured.gpus
    ]


def _cell(found: Errors) -> str:
    return f"{100 * median(found):.1f} ({len(found)})" if found else "- (0)"


if __name__ == "__main__":
    sys.exit(main())
