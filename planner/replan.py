"""Replanning: the best plan on the nodes that are left (or joined), the way there included.

Every number of nodes that the batch allows is searched, from all that are left downwards; of the
best few of each the moves are worked out. Wanted is the least time for the next `steps` steps,
migration first. The global batch stays, and with it the scale of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..costmodel.cluster import Cluster
from ..costmodel.yaml_files import validated
from ..ir import Infeasible, InvalidInput
from ..ir.plan import NodeMapping, Plan
from ..ir.workload import Workload
from .build import build_plan
from .fix import Fix
from .holdings import Holdings
from .migration import Migrating, Migration
from .report import replan_text
from .request import Request
from .search import Found, Search

LEAST_SHARE = 0.75
"""Of the nodes left: plans on fewer are not looked at where there is one on more."""
FINALISTS = 3
"""Configurations of each number of nodes whose moves are worked out."""


@dataclass(frozen=True, slots=True)
class Replanned:
    """A new plan and how to get there. The plan numbers its nodes anew, in the order of their old
    numbers; the migration's devices count as in the old cluster, joined nodes after its own.
    `before_seconds` is a step of the old plan as it was predicted."""

    plan: Plan
    migration: Migration
    before_seconds: float
    lost: tuple[int, ...]

    def __str__(self) -> str:
        return replan_text(self)

    def to_json(self) -> dict[str, Any]:
        """What `shardwright replan --json` prints beside the plan."""
        moved = self.migration
        return {
            "lost": list(self.lost),
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
        }


def replan(
    plan: Plan,
    lost: Sequence[int] = (),
    gained: int = 0,
    steps: int = 1000,
    fix: Fix | None = None,
) -> Replanned:
    """The plan for the next `steps` steps after nodes are lost and others of the same kind joined.

    Raises InvalidInput for nodes that the plan does not have, and Infeasible where nothing fits
    what is left.
    """
    cluster = validated(Cluster, plan.cluster, "the plan's cluster")
    if not lost and not gained:
        raise InvalidInput("nothing changed: expected nodes that are lost, or gained ones")
    if gained < 0 or steps < 1:
        raise InvalidInput(f"gained={gained}, steps={steps}: expected gained >= 0, steps >= 1")
    left = cluster.without(lost)
    joined = left.resized(left.nodes + gained) if gained else left
    before, gone, fix = Holdings(plan), frozenset(lost), fix or Fix()
    best: tuple[float, Plan, Migrating] | None = None
    short: Infeasible | None = None
    search: Search | None = None
    for nodes in range(joined.nodes, 0, -1):
        if best is not None and nodes < LEAST_SHARE * joined.nodes:
            break
        request = Request.on(plan.model, joined.resized(nodes), Workload(**plan.workload), fix)
        try:
            search = Search(request, like=search)
            found = search.run(top=FINALISTS)
        except InvalidInput:  # no configuration divides the batch on so many
            continue
        except Infeasible as error:
            short = short or error
            break  # fewer nodes have less memory
        for at in range(len(found.outcomes)):
            one = _finalist(search, found, at)
            moving = Migrating(before, Holdings(one), cluster, gone, gained)
            seconds = moving.estimated_seconds() + steps * one.predicted.step_seconds
            if best is None or seconds < best[0]:
                best = seconds, one, moving
    if best is None:
        raise short or InvalidInput(
            f"no configuration for {joined.nodes} nodes or fewer divides the global batch"
        )
    _, chosen, moving = best
    moved = moving.result()
    return Replanned(_renumbered(chosen, moved, cluster), moved, plan.predicted.step_seconds,
                     tuple(lost))  # fmt: skip


def _renumbered(plan: Plan, moved: Migration, cluster: Cluster) -> Plan:
    """The plan with its nodes in the order in which they stay where they are."""
    nodes = [device // cluster.devices_per_node for device in moved.device_of]
    places = list(dict.fromkeys(nodes))
    number = {node: i for i, node in enumerate(sorted(places))}
    node_of = tuple(number[node] for node in places)
    if node_of == tuple(range(len(places))):
        return plan
    return replace(plan, mapping=NodeMapping(node_of, 0.0, 0.0, 0.0))


def _finalist(search: Search, found: Found, at: int) -> Plan:
    """The plan of one of the outcomes, the others its alternatives."""
    order = (found.outcomes[at], *found.outcomes[:at], *found.outcomes[at + 1 :])
    mesh = search.mesh(order[0].candidate)
    return build_plan(search.request, mesh, replace(found, outcomes=order))
