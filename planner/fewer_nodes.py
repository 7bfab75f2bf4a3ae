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
from ..costmodel.spending import Spending
from ..ir import Infeasible, InvalidInput
from ..ir.graph import Model
from ..ir.workload import Workload
from .allow import Allow
from .candidates import divisors
from .fix import Fix
from .leave_out import slow_nodes
from .relax import infeasible
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

    def request_on(where: Cluster) -> Request:
        return Request.on(model, where, workload, fix, allow=allow)

    whole = Search(request_on(cluster), anything=anything, objective=objective)
    every = sorted(choices(cluster), key=len, reverse=True)
    best: tuple[Search, Found] | None = None
    looked_at: list[Found] = []
    refused: InvalidInput | Infeasible | None = None
    interrupted = False
    bounds: list[float] = []
    for number, left_out in enumerate(every):
        limit = float("inf") if best is None else best[1].spent(best[1].outcomes[0])
        try:
            search = whole
            if left_out:
                request = request_on(cluster.without(left_out))
                search = Search(request, anything=anything, objective=objective, like=whole)
            found = search.attempt(top, progress, limit)
        except (InvalidInput, Infeasible) as error:  # the batch or the pins want another number
            refused = error
            continue
        except KeyboardInterrupt:
            interrupted = True
        else:
            looked_at.append(found)
            bounds.append(found.bound)
            interrupted = found.interrupted
            if found.outcomes and found.spent(found.outcomes[0]) < limit:
                best = search, found
        if interrupted:  # what was not looked at spends its FLOPs at least
            bounds += [
                flops_floor(request_on(cluster.without(rest)), objective) for rest in every[number:]
            ]
            break
    if best is None:
        if interrupted:
            raise KeyboardInterrupt
        if refused is not None and not looked_at:
            raise refused
        raise infeasible(whole.solving, anything, whole.attempt(1).short)
    search, found = best
    return search, replace(
        found,
        bound=min(bounds),
        solved=sum(each.solved for each in looked_at),
        pruned=sum(each.pruned for each in looked_at),
        infeasible=sum(each.infeasible for each in looked_at),
        seconds=sum(each.seconds for each in looked_at),
        interrupted=interrupted,
    )


def flops_floor(request: Request, objective: str) -> float:
    """What a step spends at least: all its FLOPs at the peak of all devices."""
    hardware = request.hardware or request.cluster
    step = request.least_flops_per_step / request.peak_flops_per_s
    return Spending.on(objective, hardware).of(step, 0.0)


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
            for number in reversed(numbers(len(pool))):
                kept = set(spare[len(pool) - number :])
                left_out = frozenset(range(cluster.nodes)) - kept
                if left_out not in seen:
                    seen.add(left_out)
                    yield left_out


def numbers(nodes: int) -> Sequence[int]:
    """The numbers of nodes that are looked at, of so many."""
    return range(1, nodes + 1) if nodes <= _EVERY_NUMBER else divisors(nodes)
