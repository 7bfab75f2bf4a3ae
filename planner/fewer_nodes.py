"""On how many nodes a job spends least: what is paid per device may be least on some of them.

Looked at are all nodes and fewer: any number up to sixteen, divisors of their number beyond; where
devices are of several kinds, also those of some of the kinds alone. Nodes to do without are slow
ones first, then the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from ..costmodel.cluster import Cluster
from ..ir import Infeasible, InvalidInput
from ..ir.graph import Model
from ..ir.workload import Workload
from .allow import Allow
from .candidates import divisors
from .fix import Fix
from .leave_out import slow_nodes
from .request import Request
from .search import Found, Search

_EVERY_NUMBER = 16
"""Nodes up to which every smaller number is looked at."""
_MOST_KINDS = 4
"""Kinds of devices up to which every choice of kinds is."""


def least_spending(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    fix: Fix,
    objective: str,
    anything: bool = False,
    top: int = 5,
    progress: Callable[[str], None] | None = None,
    allow: Allow | None = None,
) -> tuple[Search, Found]:
    """The search whose best configuration spends least, and what it found; its bound is over all
    numbers of nodes.

    Raises Infeasible, saying what would fit, where the job fits on none of them, and InvalidInput
    as `Search` does on all nodes.
    """
    whole = Search(Request.on(model, cluster, workload, fix, allow=allow), anything=anything,
                   objective=objective)  # fmt: skip
    best: tuple[Search, Found] | None = None
    looked_at: list[Found] = []
    refused: InvalidInput | Infeasible | None = None
    for left_out in sorted(choices(cluster), key=len, reverse=True):
        search = whole
        try:
            if left_out:
                request = Request.on(model, cluster.without(left_out), workload, fix, allow=allow)
                search = Search(request, anything=anything, objective=objective, like=whole)
            limit = float("inf") if best is None else best[1].spent(best[1].outcomes[0])
            found = search.attempt(top, progress, limit)
        except (InvalidInput, Infeasible) as error:  # the batch or the pins want another number
            refused = error
            continue
        looked_at.append(found)
        if found.outcomes and found.spent(found.outcomes[0]) < limit:
            best = search, found
        if found.interrupted:
            break
    if best is None:
        if refused is not None and not looked_at:
            raise refused
        whole.run(top, progress)  # says what is short on all nodes
        raise AssertionError("what fits on all nodes was found on them")
    search, found = best
    return search, replace(
        found,
        bound=min(each.bound for each in looked_at),
        solved=sum(each.solved for each in looked_at),
        pruned=sum(each.pruned for each in looked_at),
        infeasible=sum(each.infeasible for each in looked_at),
        seconds=sum(each.seconds for each in looked_at),
        interrupted=any(each.interrupted for each in looked_at),
    )


def choices(cluster: Cluster) -> Iterator[frozenset[int]]:
    """The sets of nodes to leave out, none of them first."""
    per_node = cluster.devices_per_node
    kinds = [cluster.device_of(node * per_node) for node in range(cluster.nodes)]
    distinct = list(dict.fromkeys(kinds))
    sizes = range(1, len(distinct) + 1) if len(distinct) <= _MOST_KINDS else (len(distinct),)
    slow = slow_nodes(cluster)
    seen: set[frozenset[int]] = set()
    for size in reversed(sizes):
        for used in combinations(distinct, size):
            pool = [node for node, kind in enumerate(kinds) if kind in used]
            spare = list(dict.fromkeys([*(n for n in slow if n in pool), *reversed(pool)]))
            for number in reversed(_numbers(len(pool))):
                kept = set(spare[len(pool) - number :])
                left_out = frozenset(range(cluster.nodes)) - kept
                if left_out not in seen:
                    seen.add(left_out)
                    yield left_out


def _numbers(nodes: int) -> Sequence[int]:
    return range(1, nodes + 1) if nodes <= _EVERY_NUMBER else divisors(nodes)
