"""Output of `nvidia-smi topo -m`: which GPUs of a node are close, and the levels that follow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations

import networkx as nx

from ...ir.errors import InvalidInput
from ..levels import Level
from ..yaml_files import packaged, pick

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PATHS = ("NV", "PIX", "PXB", "PHB", "NODE", "SYS")
"""From close to far, as the legend of the output explains them; NV# are # NVLinks."""
_LEVELS = {
    "NV": "nvlink",
    "PIX": "pcie-switch",
    "PXB": "pcie-switches",
    "PHB": "host-bridge",
    "NODE": "socket",
    "SYS": "sockets",
}


@dataclass(frozen=True)
class Topology:
    """The paths between the GPUs of a node, and to its NICs.

    `paths[i, j]` for GPUs i < j is `NV12`, `PIX`, …; `nics` the names of the NICs, and
    `nic_paths[k][i]` the path from NIC k to GPU i.
    """

    gpus: int
    paths: dict[tuple[int, int], str]
    nics: tuple[str, ...]
    nic_paths: tuple[tuple[str, ...], ...]

    def nvlinks(self, i: int, j: int) -> int:
        """Number of NVLinks between two GPUs; 0 where they have none."""
        path = self.paths[min(i, j), max(i, j)]
        return int(path[2:]) if path.startswith("NV") else 0


def topology(text: str, source: str = "nvidia-smi topo -m") -> Topology:
    """The matrix that `nvidia-smi topo -m` prints, wherever in the text it stands.

    Raises InvalidInput where there is none, for an unknown path, or where the two directions of a
    pair differ.
    """
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    header = next((i for i, line in enumerate(lines) if line.split()[:1] == ["GPU0"]), None)
    if header is None or _is_row(lines[header]):
        raise InvalidInput(f"{source}: expected a matrix with the columns GPU0 GPU1 …")
    names = []
    for word in lines[header].split():
        if word in ("CPU", "NUMA"):
            break
        names.append(word)
    table: dict[str, list[str]] = {}
    for number, line in enumerate(lines[header + 1 :], header + 2):
        words = line.split()
        if not words or words[0] not in names:
            break
        cells = words[1 : len(names) + 1]
        for name, cell in zip(names, cells, strict=False):
            if not (re.fullmatch(r"NV\d+", cell) or cell in _PATHS[1:]) and (
                cell != "X" or name != words[0]
            ):
                raise InvalidInput(
                    f"{source}, line {number}: {cell!r} from {words[0]} to {name}, expected NV#, "
                    f"{', '.join(_PATHS[1:])}"
                )
        if len(cells) < len(names):
            raise InvalidInput(
                f"{source}, line {number}: {len(cells)} columns, expected {len(names)}"
            )
        table[words[0]] = cells
    gpus = [name for name in names if re.fullmatch(r"GPU\d+", name)]
    for name in names:
        if name not in table:
            raise InvalidInput(f"{source}: no row of {name}")
    at = {name: i for i, name in enumerate(names)}
    for first, second in combinations(names, 2):
        there, back = table[first][at[second]], table[second][at[first]]
        if there != back:
            raise InvalidInput(
                f"{source}: {first} to {second} is {there}, back it is {back}: expected the same"
            )
    legend = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", "\n".join(lines), re.MULTILINE))
    nics = [name for name in names if name not in gpus]
    return Topology(
        gpus=len(gpus),
        paths={(i, j): table[gpus[i]][at[gpus[j]]] for i, j in combinations(range(len(gpus)), 2)},
        nics=tuple(legend.get(name, name) for name in nics),
        nic_paths=tuple(tuple(table[nic][at[gpu]] for gpu in gpus) for nic in nics),
    )


def node_levels(found: Topology, device: str) -> tuple[Level, ...]:
    """The levels inside a node of that device (a preset's name), innermost first.

    Closer paths make inner levels where they join equal runs of neighbouring GPUs. Bandwidths are
    nominal, from `data/topology.yaml`. Raises InvalidInput for a device whose links are unknown.
    """
    table = packaged("topology")
    pick(table["nvlink_bytes_per_s"], device, "device with known links")
    levels: list[Level] = []
    inner = 1
    for path in _PATHS:
        span = _span(found, path)
        if span > inner:
            levels.append(_level(found, path, span, inner, device))
            inner = span
    if not levels:  # one GPU
        levels.append(_level(found, "PIX", 1, 1, device))
    return tuple(levels)


def _is_row(line: str) -> bool:
    return re.search(r"\s(X|NV\d+|PIX|PXB|PHB|NODE|SYS)\s", line) is not None


def _span(found: Topology, farthest: str) -> int:
    """Size of the runs of GPUs that paths up to `farthest` join; 1 where they are not equal runs of
    neighbours."""
    near = _PATHS[: _PATHS.index(farthest) + 1]
    graph = nx.Graph()
    graph.add_nodes_from(range(found.gpus))
    graph.add_edges_from(
        pair for pair, path in found.paths.items() if ("NV" if path[:2] == "NV" else path) in near
    )
    runs = sorted(sorted(run) for run in nx.connected_components(graph))
    size = len(runs[0])
    even = all(run == list(range(i * size, (i + 1) * size)) for i, run in enumerate(runs))
    return size if even else 1


def _level(found: Topology, path: str, span: int, inner: int, device: str) -> Level:
    table = packaged("topology")
    reached = table["reached"]["NV" if path == "NV" else "PCIE"]
    bandwidth = table["pcie_bytes_per_s"][device]
    pair: float | None = None
    if path == "NV":
        link = table["nvlink_bytes_per_s"][device]
        counts = [found.nvlinks(0, j) for j in range(1, span)]
        if sum(counts) > table["switch"]["most_links"]:
            bandwidth = max(counts) * link
        else:
            bandwidth = sum(counts) * link
            pair = min(count for count in counts if count) * link if span > 2 else None
    elif path == "SYS":
        # The GPUs of a socket share what leaves it.
        bandwidth = min(bandwidth, table["socket"]["bandwidth_bytes_per_s"] / max(inner, 1))
    return Level(
        name=_LEVELS[path],
        span_devices=span,
        bandwidth_bytes_per_s=bandwidth,
        pair_bandwidth_bytes_per_s=pair,
        **reached,
    )
