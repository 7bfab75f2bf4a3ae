"""What collectives take by algorithm, where nothing was measured: a latency and seconds per byte.

`N` is the full logical tensor in bytes, `n` the group's size, `n_l` how many units of the level
inside it one unit of level `l` has of the group, α_l its step latency, B the bus bandwidth of a
ring through all levels:

    ring          (n-1)/n · N/B and n-1 steps; rings of one node's members leave it through all
                  their NICs at once (NCCL's channels)
    hierarchical  level by level, recursive halving: Σ_l (n_l-1)/n_l · N_l/b_l, ⌈log2 n_l⌉ steps,
                  N_l = what is left of N inside the level
    tree          N/B pipelined, Σ_l ⌈log2 n_l⌉ steps (all-reduce, broadcast)
    direct        every rank to every other, over the level where they meet (all-to-all), or one
                  rank to the next (send)

On a torus (`torus.py`) "hierarchical" goes by the rings of its dims, in parts that use all links at
once.

An all-reduce is a reduce-scatter and an all-gather. Each algorithm runs over the protocols of
`data/collectives.yaml`: one starts at once and wastes bandwidth, one the other way round. Sources:
Thakur, Rabenseifner, Gropp (2005) for the terms; Sanders, Speck, Träff (2009) for the two-tree
bandwidth; NCCL's src/graph/tuning.cc for the protocols.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..ir.errors import InvalidInput
from . import yaml_files
from .curves import CollectiveKind
from .groups import Hop, pair_at

Algorithm = Literal["ring", "hierarchical", "tree", "direct"]


@dataclass(frozen=True, slots=True)
class Line:
    """One algorithm over one protocol: `latency_s` and `s_per_byte` of the full logical tensor."""

    algorithm: Algorithm
    latency_s: float
    s_per_byte: float

    def seconds(self, bytes: float) -> float:
        """Of a full logical tensor of that many bytes."""
        return self.latency_s + bytes * self.s_per_byte


@dataclass(frozen=True, slots=True)
class Protocol:
    """`start_steps` steps of the innermost level before each pass; `bandwidth_fraction` of what
    large messages reach. `torus` marks how devices of a torus send."""

    start_steps: float
    bandwidth_fraction: float
    torus: bool = False


@cache
def protocols() -> tuple[Protocol, ...]:
    """The protocols of `data/collectives.yaml`."""
    return tuple(Protocol(**entry) for entry in yaml_files.packaged("collectives").values())


def lines(kind: CollectiveKind, path: tuple[Hop, ...], step_s: float) -> tuple[Line, ...]:
    """The algorithms that may carry out a collective over a path of one or more hops.

    `step_s` is the latency of the cluster's innermost level, which starting is counted in. Raises
    InvalidInput for an unknown kind.
    """
    found: tuple[Line, ...]
    passes = 1
    match kind:
        case "all_gather" | "reduce_scatter":
            found = _in_order(path)
        case "all_reduce":
            found, passes = (*_in_order(path), tree(path)), 2
        case "broadcast":
            found = (tree(path),)
        case "all_to_all":
            found = (direct(path),)
        case "send":
            pair = pair_at(path[-1])
            found = (Line("direct", pair.steps * pair.level.latency_s, 1 / pair.bytes_per_s),)
        case _:
            raise InvalidInput(f"unknown collective {kind!r}")
    return tuple(
        Line(
            line.algorithm,
            passes * (protocol.start_steps * step_s + line.latency_s),
            passes * line.s_per_byte / protocol.bandwidth_fraction,
        )
        for protocol in protocols()
        if protocol.torus == (path[0].level.torus is not None)
        for line in found
    )


def _in_order(path: tuple[Hop, ...]) -> tuple[Line, ...]:
    """Reduce-scatters or all-gathers; on a torus the rings are those of its dims."""
    by_level = hierarchical(path)
    return (by_level,) if path[0].spans else (ring(path), by_level)


def ring(path: tuple[Hop, ...]) -> Line:
    """A reduce-scatter or all-gather by rings through all levels."""
    size = _size(path)
    # Of the n hops of a closed ring, those of the outermost level and one less than all units
    # inside it are on every longest path of n-1 hops.
    latency_s = -path[0].level.latency_s
    for outer, hop in enumerate(path):
        entered = size // hop.members
        within = entered if outer == len(path) - 1 else entered - entered // hop.units
        latency_s += within * hop.level.latency_s
    return Line("ring", latency_s, (size - 1) / size / _bus_bytes_per_s(path))


def hierarchical(path: tuple[Hop, ...]) -> Line:
    """A reduce-scatter or all-gather level by level, each on what the level inside left."""
    return Line(
        "hierarchical",
        sum(hop.steps * hop.level.latency_s for hop in path),
        sum((hop.units - 1) / hop.units / hop.members / hop.bytes_per_s for hop in path),
    )


def tree(path: tuple[Hop, ...]) -> Line:
    """A broadcast or a reduction down a pipelined pair of trees."""
    latency_s = sum(hop.steps * hop.level.latency_s for hop in path)
    return Line("tree", latency_s, 1 / _bus_bytes_per_s(path))


def direct(path: tuple[Hop, ...]) -> Line:
    """An all-to-all: each rank sends bytes/size² to every other, over the level where they meet.

    Levels one after the other (safe side); messages of one level in flight together.
    """
    size = _size(path)
    return Line(
        "direct",
        sum(hop.steps * hop.level.latency_s for hop in path),
        sum(hop.exchange_s_per_byte(size) for hop in path),
    )


def level_s_per_byte(kind: CollectiveKind, path: tuple[Hop, ...]) -> tuple[float, ...]:
    """For each hop, how long its links are busy per byte of the full logical tensor, at least: what
    must cross the level, by whichever algorithm, over what its devices can send."""
    if not path:
        return ()
    match kind:
        case "all_to_all":
            size = _size(path)
            return tuple(hop.exchange_s_per_byte(size) for hop in path)
        case "send":
            return (*(0.0 for _ in path[:-1]), 1 / pair_at(path[-1]).bytes_per_s)
        case _:
            times = 2 if kind == "all_reduce" else 1
            return tuple(times * (h.units - 1) / h.units / h.members / h.bytes_per_s for h in path)


def _bus_bytes_per_s(path: tuple[Hop, ...]) -> float:
    """Bandwidth of the members' rings together: all enter the narrowest level at once."""
    return min(hop.members * hop.bytes_per_s for hop in path)


def _size(path: tuple[Hop, ...]) -> int:
    return path[-1].members * path[-1].units
