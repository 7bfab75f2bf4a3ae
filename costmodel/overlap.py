"""What communication adds to the compute that it runs beside: pure functions from pieces of both to
exposed seconds.

"Exposed" is what the step takes longer than the compute alone: communication with nothing left to
hide behind, and what hidden communication costs the compute beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..ir.errors import InvalidInput
from . import yaml_files

OverlapMode = Literal["none", "chunked", "fused", "one-block-late"]


def overlap_cost_fraction() -> float:
    """Seconds that a second of communication costs the compute it is hidden behind.

    While a collective runs, compute takes `1 + slowdown` as long, so in each second of it
    `slowdown / (1 + slowdown)` of a second is lost. The slowdown and its source are in
    `data/overlap.yaml`.
    """
    slowdown = float(yaml_files.packaged("overlap")["compute"]["slowdown_fraction"])
    return slowdown / (1 + slowdown)


def exposed_seconds(communication_s: float, compute_s: float) -> float:
    """What communication adds to the compute that it runs beside: the loss while it is hidden, and
    what is left of it when the compute is done."""
    loss = overlap_cost_fraction()
    hidden = min(communication_s, compute_s / (1 - loss))
    return loss * hidden + communication_s - hidden


def piecewise_exposed_seconds(communication_s: float, compute_s: float, pieces: float) -> float:
    """Both cut into equal pieces and pipelined, each piece of one waiting for one of the other.

    One piece of the communication sticks out at an end, the others run beside all but one of the
    pieces of compute. Without a loss in overlap that is the makespan of a two-machine flow shop
    (Johnson 1954) less the compute: `q/k + (k-1)/k · max(0, q - g)`.
    """
    if pieces < 1:
        raise InvalidInput(f"pieces={pieces}: expected at least 1")
    rest = 1 - 1 / pieces
    return communication_s / pieces + exposed_seconds(rest * communication_s, rest * compute_s)


def tensor_exposed_seconds(
    mode: OverlapMode,
    compute_s: Sequence[float],
    communication_s: Sequence[float],
    chunks: int = 4,
    chunk_latency_s: float = 0.0,
) -> float:
    """What the tensor-parallel collectives of a stage add to one pass over it.

    `communication_s[i]` is a collective and `compute_s[i]` the work next to it, in the order in
    which they run. Modes:

    - `none`: every collective is waited for (Megatron-LM, arXiv:1909.08053).
    - `chunked`: each collective is cut in `chunks` that are pipelined with its matmul cut likewise;
      every chunk after the first costs `chunk_latency_s` more (Wang et al. 2023, ASPLOS,
      doi:10.1145/3567955.3567959; Centauri, Chen et al. 2024, ASPLOS).
    - `fused`: matmul and collective are one kernel and overlap tile by tile; the share that cannot
      be hidden is Flux's best (arXiv:2406.06858; `data/overlap.yaml`).
    - `one-block-late`: a collective runs beside the next piece of compute, the last one beside
      nothing: ladder residual (arXiv:2501.06589). This is another model: a block reads the residual
      without the output of the block before it.

    Raises InvalidInput for another mode, unequal numbers of pieces, or fewer than 1 chunk.
    """
    if len(compute_s) != len(communication_s):
        raise InvalidInput(
            f"{len(compute_s)} pieces of compute with {len(communication_s)} of communication: "
            "expected as many"
        )
    if chunks < 1:
        raise InvalidInput(f"chunks={chunks}: expected at least 1")
    pairs = list(zip(communication_s, compute_s, strict=True))
    match mode:
        case "none":
            return sum(communication_s)
        case "chunked":
            more = (chunks - 1) * chunk_latency_s
            return sum(piecewise_exposed_seconds(q + more * (q > 0), g, chunks) for q, g in pairs)
        case "fused":
            hidden = float(yaml_files.packaged("overlap")["fused"]["hidden_fraction"])
            return sum(piecewise_exposed_seconds(q, g, 1 / (1 - hidden)) for q, g in pairs)
        case "one-block-late":
            behind = [*compute_s[1:], 0.0][: len(pairs)]
            return sum(map(exposed_seconds, communication_s, behind))
        case _:
            raise InvalidInput(
                f"overlap mode {mode}: expected none, chunked, fused or one-block-late"
            )


def sharded_pass_seconds(
    compute_s: float, gather_s: float, reduce_s: float, blocks: int, prefetch: bool = True
) -> float:
    """One pass of a microbatch over a stage whose parameters are sharded (ZeRO-3, FSDP).

    `gather_s` collects the parameters of its `blocks` equal blocks, `reduce_s` reduces their
    gradients (0 in a forward pass). With `prefetch`, the next block is gathered during this one
    (arXiv:2304.11277, section 3.3): the first gather and the last reduction stick out. Otherwise a
    block waits for its own gather, and only reductions are hidden.
    """
    if blocks < 1:
        raise InvalidInput(f"blocks={blocks}: expected at least 1")
    if not prefetch:
        return compute_s + gather_s + piecewise_exposed_seconds(reduce_s, compute_s, blocks)
    return compute_s + piecewise_exposed_seconds(gather_s + reduce_s, compute_s, blocks)


def outer_exposed_seconds(
    sync_s: float, step_compute_s: float, every: int, asynchronous: bool = True
) -> float:
    """What synchronisation adds to a step, on average, if replicas average only every so many steps
    (local updates: DiLoCo, arXiv:2311.08105).

    `asynchronous`: it runs beside the compute of the `every` steps up to the next one (Streaming
    DiLoCo, arXiv:2501.18512); otherwise the replicas wait for it. This optimises differently from
    synchronous data parallelism. Raises InvalidInput for fewer than one step.
    """
    if every < 1:
        raise InvalidInput(f"outer steps every {every}: expected at least 1")
    exposed = exposed_seconds(sync_s, every * step_compute_s) if asynchronous else sync_s
    return exposed / every
