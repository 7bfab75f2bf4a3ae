"""What changes of the model itself cost and save; see `allow` for what they are."""

from __future__ import annotations

from collections.abc import Iterator

from ..costmodel.overlap import exposed_seconds
from ..costmodel.runtime import Runtime
from ..costmodel.work import Work
from ..ir.graph import Graph
from ..ir.optable import TABLE
from ..ir.plan import Strategy
from .candidates import Candidate


def follow_each_other(graph: Graph) -> bool:
    """Whether a block is a layer whose MLP reads what its attention adds: on some way from an
    attention to an output there are two products more, its own and one of the MLP."""
    products: dict[str, int] = {}
    for op in graph.ops:
        work = TABLE[op.kind].work
        reached = [products[name] for name in op.operands if name in products]
        if work == "attention":
            reached.append(0)
        if reached:
            count = max(reached) + (work == "contraction")
            products |= dict.fromkeys(op.results, count)
    return max(products.values(), default=0) >= 2


def with_changes(work: Work, candidate: Candidate | None, runtime: Runtime) -> Work:
    """One pass over a layer as the changed model takes it.

    In parallel, attention and MLP share the collectives before and after them: half as many. With a
    ladder a collective runs beside the next sub-block's compute, of which there is as much, and
    what takes longer is exposed (`overlap.tensor_exposed_seconds` has it piece by piece; the last
    of a stage, with nothing beside it, is left out).
    """
    if candidate is None or "tensor_parallel" not in work.seconds:
        return work
    seconds, calls, collectives = dict(work.seconds), work.calls, work.collectives
    if candidate.parallel_block:
        seconds["tensor_parallel"] /= 2
        collectives /= 2
        calls -= collectives * runtime.calls_per_collective
    if candidate.ladder_residual:
        seconds["tensor_parallel"] = exposed_seconds(seconds["tensor_parallel"], work.compute_s)
    return Work(seconds, calls, work.flops, collectives)


def described(chosen: Candidate | Strategy) -> Iterator[str]:
    """What a plan changes of the model, in words."""
    if chosen.parallel_block:
        yield "attention and MLP of a layer read the same input (arXiv:2204.02311)"
    if chosen.ladder_residual:
        yield "sub-blocks read the residual without the one before them (arXiv:2501.06589)"
    if chosen.local_update:
        yield (
            f"replicas train apart and average parameters every {chosen.local_update} steps "
            "(arXiv:2311.08105)"
        )
