"""Replanning: the best plan on the nodes that are left (or joined), the way there included.

Numbers of nodes are searched from all that are left downwards (every one up to sixteen; of more the
upper quarter and divisors), each for what may still be better than the best found; of the best few
of each the moves are worked out. Wanted is what spends least in the next `steps` steps, migration
first: time, or what the plan's own objective was. The global batch stays, and with it the scale of
the gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from ..costmodel.cluster import Cluster
from ..costmodel.yaml_files import validated
from ..ir import Infeasible, InvalidInput, ShardwrightError
from ..ir.plan import NodeMapping, Plan
from ..ir.workload import Workload
from .build import build_plan
from .candidates import emits, unemittable
from .fewer_nodes import flops_floor, numbers
from .fix import Fix
from .holdings import Holdings
from .leave_out import slow_nodes
from .migration import Migrating, Migration
from .relax import infeasible
from .report import replan_text
from .request import Request
from .search import Found, Search
from .traffic import has_choice
from .waiting import Waiting

_MANY_SHARE = 0.75
"""Of many nodes left: every number above is looked at."""
FINALISTS = 3
"""Configurations of each number of nodes whose moves are worked out."""


@dataclass(frozen=True, slots=True)
class Replanned:
    """A new plan and how to get there. The plan numbers its nodes anew, in the order of their old
    numbers; the migration counts as the old cluster does, joined nodes after its own.
    `before_seconds` is a step of the old plan as it was predicted; `wait` sets the new plan beside
    waiting for the repair, None where nothing was lost."""

    plan: Plan
    migration: Migration
    before_seconds: float
    lost: tuple[int, ...]
    wait: Waiting | None = None

    def __str__(self) -> str:
        return replan_text(self)

    def moves_text(self) -> str:
        """What a running job executes (`migrate.py` of emitted programs): lines of JSON. The first
        names the device of every rank `before` and `after`, and the devices that are `lost`, as the
        old cluster counts; each of the others is a `Move`."""
        moved = self.migration
        gone = [device for device in moved.before if device // moved.per_node in self.lost]
        first = {"before": moved.before, "after": moved.device_of, "lost": gone}
        every = (first, *(move.to_json() for move in moved.moves))
        return "".join(json.dumps(line) + "\n" for line in every)

    def to_json(self) -> dict[str, Any]:
        """What `shardwright replan --json` prints beside the plan."""
        moved = self.migration
        return {
            "lost": list(self.lost),
            "node_of": list(moved.node_of),
            "device_of": list(moved.device_of),
            "before": {"step_seconds": self.before_seconds},
            "after": {"step_seconds": self.plan.predicted.step_seconds},
            "migration": {
                "moved_bytes": moved.moved_bytes,
                "from_checkpoint_bytes": moved.lost_bytes,
                "lower_bound_bytes": moved.bound_bytes,
                "seconds": moved.seconds,
                "moves": len(moved.moves),
            },
            "wait": None if self.wait is None else self.wait.to_json(),
        }


def replan(
    plan: Plan,
    lost: Sequence[int] = (),
    gained: int = 0,
    steps: int = 1000,
    fix: Fix | None = None,
    repair_seconds: float | None = None,
) -> Replanned:
    """The plan for the next `steps` steps after nodes are lost and others of the same kind joined.

    `repair_seconds` is how long it would take to have the lost nodes back. Raises InvalidInput for
    nodes that the plan does not have, and Infeasible where nothing fits what is left.
    """
    cluster = validated(Cluster, plan.cluster, "the plan's cluster")
    for node in lost:
        if type(node) is not int:
            raise InvalidInput(f"lost node {node!r}: expected a whole number")
    if not lost and not gained:
        raise InvalidInput("nothing changed: expected nodes that are lost, or gained ones")
    if gained < 0 or steps < 1:
        raise InvalidInput(f"gained={gained}, steps={steps}: expected gained >= 0, steps >= 1")
    if repair_seconds is not None and not (lost and 0 <= repair_seconds < float("inf")):
        raise InvalidInput(
            f"repair_seconds={repair_seconds:g}: expected seconds >= 0 until lost nodes are back, "
            + ("a finite number" if lost else "but no node is lost")
        )
    gone = sorted(set(lost))
    for node in gone:
        if not 0 <= node < cluster.nodes:
            raise InvalidInput(f"lost node {node}: expected 0 to {cluster.nodes - 1}")
    if len(gone) == cluster.nodes + gained:
        raise InvalidInput(f"all {cluster.nodes} nodes are lost, expected one left, or gained")
    joined = cluster.resized(cluster.nodes + gained).without(gone)
    every = [node for node in range(cluster.nodes + gained) if node not in gone]
    # those to do without first: slow ones, then the last
    spare = dict.fromkeys([*slow_nodes(joined), *reversed(range(joined.nodes))])
    before, fix = Holdings(plan), fix or Fix()
    objective = plan.certificate.objective
    beyond = fix.beyond_backends or unemittable(plan.strategy) is not None
    anything = beyond or not emits(plan.model)
    best: tuple[float, Plan, Migrating] | None = None
    refused: ShardwrightError | None = None
    search: Search | None = None
    for nodes in _numbers(joined.nodes):
        unused = set(list(spare)[: joined.nodes - nodes])
        where = joined.without(unused)
        request = Request.on(plan.model, where, Workload(**plan.workload), fix)
        if best is not None and flops_floor(request, objective) > best[0] / steps:
            break  # fewer nodes take longer still
        try:
            search = Search(request, anything=anything, objective=objective, like=search)
            limit = float("inf") if best is None else best[0] / steps
            found = search.attempt(FINALISTS, limit=limit)
        except (InvalidInput, Infeasible) as error:  # no configuration divides the batch, or pins
            refused = refused or error
            continue
        if found.interrupted:
            if best is None and not found.outcomes:
                raise KeyboardInterrupt
        elif not found.outcomes and best is None:
            refused = refused or infeasible(search.solving, search.anything, found.short)
            break  # fewer nodes have less memory
        used = tuple(every[i] for i in range(joined.nodes) if i not in unused)
        alike = not has_choice(joined)  # then any nodes will do, and those that have most are taken
        for at in range(len(found.outcomes)):
            one = _finalist(search, found, at)
            moving = Migrating(
                before, Holdings(one), cluster, tuple(every) if alike else used,
                None if alike else _places(one, used),
            )  # fmt: skip
            moved_s, spent = moving.estimated_seconds(), one.certificate.spent
            total = found.spending.of(moved_s, 0.0) + steps * spent
            if best is None or total < best[0]:
                best = total, one, moving
        if found.interrupted:
            break
    if best is None:
        raise refused or InvalidInput("no nodes are left")
    _, chosen, moving = best
    moved = moving.result()
    new = replace(chosen, mapping=_mapping(chosen, moved))
    before_s, after_s = plan.predicted.step_seconds, new.predicted.step_seconds
    wait = Waiting(before_s, after_s, moved.seconds, steps, repair_seconds) if gone else None
    return Replanned(new, moved, before_s, tuple(gone), wait)


def _numbers(nodes: int) -> list[int]:
    """The numbers of nodes that are looked at, the largest first."""
    upper = range(ceil(_MANY_SHARE * nodes), nodes + 1)
    return sorted({*numbers(nodes), *upper}, reverse=True)


def _places(plan: Plan, used: Sequence[int]) -> tuple[int, ...]:
    """The node of every place, as the plan maps them."""
    places = -(-plan.mesh.size // int(plan.cluster["devices_per_node"]))
    order = range(places) if plan.mapping is None else plan.mapping.node_of
    return tuple(used[i] for i in order)


def _mapping(plan: Plan, moved: Migration) -> NodeMapping | None:
    """The same in the numbers of the plan's own cluster, whose nodes are those used, in order."""
    per_node = int(plan.cluster["devices_per_node"])
    number = {node: i for i, node in enumerate(sorted(moved.node_of))}
    order = tuple(number[node] for node in moved.node_of)
    process = {
        node * per_node + slot: place * per_node + slot
        for place, node in enumerate(moved.node_of)
        for slot in range(per_node)
    }
    ranks = sorted(range(plan.mesh.size), key=lambda rank: process[moved.device_of[rank]])
    renumbered = () if ranks == list(range(plan.mesh.size)) else tuple(ranks)
    if plan.mapping is not None:
        return replace(plan.mapping, node_of=order, ranks=renumbered)
    if not renumbered and order == tuple(range(len(order))):
        return None
    return NodeMapping(order, 0.0, 0.0, 0.0, renumbered)


def _finalist(search: Search, found: Found, at: int) -> Plan:
    """The plan of one of the outcomes, the others its alternatives."""
    order = (found.outcomes[at], *found.outcomes[:at], *found.outcomes[at + 1 :])
    return build_plan(search, replace(found, outcomes=order))
