"""What a person reads after a probe: links, collectives, and what is slow."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from ..curves import Curve
from ..ranks import listed
from .findings import Findings
from .rounds import Nodes
from .run import Measured
from .words import lasting, rate, sized

_SHOWN = 8
"""Slow links that are listed before the rest is counted."""


def report(found: Findings, measured: Measured) -> RenderableType:
    """Two tables and a line for each thing worth knowing."""
    return Group(_links(found), _collectives(found, measured), *_remarks(found, measured))


def _links(found: Findings) -> Table:
    table = Table("link", "latency", "bandwidth", title="Messages between two devices")
    for name, line in (("inside a node", found.inside), ("between nodes", found.across)):
        if line is not None:
            table.add_row(name, lasting(line.latency_s), rate(line.bandwidth_bytes_per_s))
    return table


def _collectives(found: Findings, measured: Measured) -> Table:
    """Smallest and largest size of each curve."""
    table = Table(
        "collective", "groups", "smallest", "takes", "largest", "takes", "bytes/s",
        title="Collectives (bytes of the full tensor)",
    )  # fmt: skip
    names = {family.shape: f"{family.name} ({family.size})" for family in measured.families}
    for curve in found.curves:
        if curve.collective != "send":
            ends = (text for at in (0, -1) for text in _point(curve, at))
            speed = rate(curve.bytes[-1] / curve.seconds[-1])
            table.add_row(curve.collective, names[curve.shape], *ends, speed)
    return table


def _point(curve: Curve, at: int) -> tuple[str, str]:
    return sized(curve.bytes[at]), lasting(curve.seconds[at])


def _remarks(found: Findings, measured: Measured) -> Iterator[str]:
    nodes = found.nodes
    noise, links = found.groups, found.links
    yield (
        f"noise: links repeat to {links.sigma_fraction:.1%} ({links.outliers} outliers of "
        f"{links.count}), collectives to {noise.sigma_fraction:.1%} ({noise.outliers} of "
        f"{noise.count}); links below {1 + found.floor_fraction:.2f}x the usual time count as equal"
    )
    if found.asymmetry_fraction > found.floor_fraction:
        yield (
            f"asymmetric: one direction of a link is up to {found.asymmetry_fraction:.0%} slower; "
            "the mean of both was taken"
        )
    for slow in found.slow_nodes[:_SHOWN]:
        yield f"slow node: {_node(nodes, slow.ends[0])} takes {slow.times_longer:.2f}x as long"
    for slow in found.slow_devices[:_SHOWN]:
        yield f"slow device: {_rank(nodes, slow.ends[0])} takes {slow.times_longer:.2f}x as long"
    for link in found.slow_node_links[:_SHOWN]:
        a, b = (_node(nodes, end) for end in link.ends)
        yield f"slow link: {a} to {b} takes {link.times_longer:.2f}x as long"
    for link in found.slow_links[:_SHOWN]:
        a, b = (_rank(nodes, end) for end in link.ends)
        yield f"slow link: {a} to {b} takes {link.times_longer:.2f}x as long"
    lists = (found.slow_nodes, found.slow_devices, found.slow_node_links, found.slow_links)
    more = sum(max(0, len(every) - _SHOWN) for every in lists)
    if more > 0:
        yield f"and more slow links: {more}, all in the cluster file"
    if not (found.slow_nodes or found.slow_devices or found.slow_links or found.slow_node_links):
        yield "no link and no node is slower than the others beyond the noise"
    for late in found.late:
        yield (
            f"late: {_rank(nodes, late.rank)} comes last {late.last_fraction:.0%} of the time and "
            f"keeps the others waiting {lasting(late.late_s)}"
        )
    if measured.too_large is not None:
        yield f"left out, too large for the memory: {sized(measured.too_large)} and more"
    if measured.left_out:
        least = min(size for _, size in measured.left_out)
        kinds = sorted({series.kind for series, _ in measured.left_out})
        yield (
            f"left out, too long for the time given: {len(measured.left_out)} points, from "
            f"{sized(least)}, of {', '.join(kinds)} (raise --budget)"
        )


def _rank(nodes: Nodes, rank: int) -> str:
    return f"rank {rank} on {nodes.hosts[nodes.node_of(rank)]}"


def _node(nodes: Nodes, node: int) -> str:
    first = node * nodes.devices_per_node
    ranks = listed(range(first, first + nodes.devices_per_node))
    some = "rank" if nodes.devices_per_node == 1 else "ranks"
    return f"node {node} ({nodes.hosts[node]}, {some} {ranks})"
